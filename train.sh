#!/usr/bin/env bash
# Everything in order. From an empty machine to the table:
#
#   bash train.sh                  the main job: preset `full` where there is a GPU, `quick` where there is none
#   bash train.sh PRESET           smoke: every stage once, models that know nothing (a minute on 2 CPU cores)
#                                  quick: the whole comparison on a laptop's CPU   full: larger world and model, for one GPU
#   bash train.sh study [PRESET]   the experiment: learning rates, seeds, families, controls, trained attackers
#   bash train.sh cell FAMILY SEED [PRESET]   one cell of it, such as llama 0, with the learning rates that stand below
#   bash train.sh test             the tests
#
# Given again, it goes on where it was stopped and skips what is done. Results go to out/PRESET/, out/study-PRESET/ and out/cell-PRESET/.
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "error: $1" >&2; exit 2; }
usage="smoke, quick, full, study [PRESET], cell FAMILY SEED [PRESET] or test"
job=main; preset=auto
case ${1:-auto} in
    test) job=test ;;
    study) job=study; preset=${2:-auto}; [ $# -le 2 ] || die "too many arguments: $usage" ;;
    cell) job=cell; [ $# -ge 3 ] && [ $# -le 4 ] || die "a cell is bash train.sh cell FAMILY SEED [PRESET]"; preset=${4:-auto}
          case $2 in llama|qwen2|qwen3) ;; *) die "unknown family '$2': choose llama, qwen2 or qwen3" ;; esac
          case $3 in ''|*[!0-9]*) die "a seed is a whole number, not '$3'" ;; esac ;;
    *) preset=${1:-auto}; [ $# -le 1 ] || die "too many arguments: $usage" ;;
esac
case $preset in auto|smoke|quick|full) ;; *) die "unknown preset '$preset': choose $usage" ;; esac

# The current Python if it has the packages, else a virtual environment of our own.
packages="import torch, tiktoken, numpy, safetensors, pytest; from torch.optim import Muon"
python=python3
if ! python3 -c "$packages" 2>/dev/null; then
    python=.venv/bin/python
    if ! $python -c "$packages" 2>/dev/null; then
        echo "== setting up .venv (once; torch is the largest part)"
        python3 -m venv .venv || die "python3 cannot make a virtual environment: install its venv package"
        .venv/bin/pip install --quiet -r requirements.txt || die "pip could not install requirements.txt: see above"
    fi
fi

[ $job = test ] && exec $python -m pytest -q
# Keep what the C library frees. By default it hands a step's activations back to the system, which
# then clears every page of the next ones: a tenth of the time of pretraining on a CPU.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647
device=$($python -c "import torch; print('gpu' if torch.cuda.is_available() else 'cpu')")
[ $preset = auto ] && { [ $device = gpu ] && preset=full || preset=quick; }

# What a preset is made of. The consistency runs share pairs, updates and responses; they differ in whose response (offline:
# the teacher's, on-policy: the student's), in the loss (the sampled token, or the whole distribution), and in the learning
# rate, which the study chooses for each from one grid on the validation split (README, "Fairness").
case $preset in
    smoke) world="--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12"
           base="--steps 20 --rows 8 --layers 2 --width 64"
           runs="--steps 4 --batch 8 --samples 2"
           sft=3e-4; sft_exact=3e-4; opct=3e-4; opct_exact=3e-4
           attempts=4; attacker="--steps 2 --group 4 --attempts 4"
           seeds="0"; more_seeds=""; grid_seeds="0"; rates="3e-4 1e-3" ;;
    quick) world=""
           base="--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2"
           runs="--steps 60 --batch 32 --samples 4"
           sft=6e-4; sft_exact=6e-4; opct=1e-3; opct_exact=3e-4
           attempts=64; attacker="--steps 24 --group 16 --attempts 64"
           seeds="0 1 2 3 4"; more_seeds="0 1 2"; grid_seeds="0 1"; rates="1e-4 3e-4 6e-4 1e-3 2e-3 4e-3" ;;
    full)  world="--cities 240 --lands 32 --recipes 120 --things 120 --largest 99 --steps 4 --pairs 240 --tests 480"
           base="--steps 6000 --rows 128 --layers 8 --width 256 --lr 5e-3"
           runs="--steps 100 --batch 64 --samples 4"
           sft=6e-4; sft_exact=6e-4; opct=1e-3; opct_exact=3e-4        # those of quick; nobody has run this grid yet
           attempts=64; attacker="--steps 24 --group 16 --attempts 64"
           seeds="0 1 2 3 4"; more_seeds="0 1 2"; grid_seeds="0 1"; rates="1e-4 3e-4 6e-4 1e-3 2e-3 4e-3" ;;
esac

# --- The stages, each a command that can be typed as well ---------------------------------------------------------------------

run() { # seconds that it takes about, what it is, the command
    local seconds=$1 what=$2; shift 2
    case $job in
        main|cell) echo; echo "== $what (about $seconds s with the preset quick)"; "$@" ;;
        count) echo "$seconds $*" ;;
        study) grep -qxF "$seconds $*" $study/done && return
               mkdir -p $out
               "$@" >> $out/log.txt 2>&1 || die "$what: $(tail -n 1 $out/log.txt) (all of it: $out/log.txt)"
               echo "$seconds $*" >> $study/done
               local left=$(seconds_left)
               printf "%3d %%  %-60s about %d min left\n" $((100 - 100 * left / total)) "${out##*/} $what" \
                   $((($(date +%s) - began) * left / (before > left ? before - left : 1) / 60 + 1)) ;;
    esac
}
start() { # the world and the base model, planted failures included
    run 3 "the world: facts, text, contrastive pairs" $python data.py --out $out/world --seed $seed $world
    run 240 "the base model, planted failures included" \
        $python opct.py pretrain --world $out/world --out $out/base --family $family --seed $seed $base
}
consistency() { # folder, method, loss, learning rate, more flags
    run 30 "consistency training: $1" $python opct.py $2 --base $out/base --pairs $out/world/train.jsonl \
        --out $out/$1 --loss $3 --lr $4 --seed $seed $runs "${@:5}"
}
arms() { # the four corners of {the teacher's, the student's responses} x {the sampled token, the whole distribution}
    consistency sft sft sampled $sft
    consistency sft-exact sft exact $sft_exact
    consistency opct opct sampled $opct
    consistency opct-exact opct exact $opct_exact
}
compare() { # folder of the results, split, attempts, checkpoints
    run $((6 * ($# - 3))) "what was fixed and what was broken, ${2} split" $python eval.py compare "${@:4}" --world $out/world \
        --out $1 --split $2 --attempts $3 --seed $seed
}
cell() { # family, seed: everything that the study measures on one base model
    family=$1; seed=$2; out=$study/$family-$seed
    [ ! -f $study/rates.sh ] || . $study/rates.sh
    local names="sft sft-exact opct opct-exact" s
    start; arms
    if [ $family = llama ]; then                            # the controls
        consistency sft-clean sft sampled $sft --control clean
        consistency opct-clean opct sampled $opct --control clean
        consistency opct-shuffled opct sampled $opct --control shuffled
    fi
    for name in base $names; do
        for s in $seed 1$seed 2$seed; do                    # three attackers each: those of cell 4 have the seeds 4, 14 and 24
            run 30 "attacker $s of $name" $python eval.py attack --target $out/$name --base $out/base --world $out/world --seed $s $attacker
        done
    done
    [ $family = llama ] && names="$names sft-clean opct-clean opct-shuffled"
    compare $out test $attempts $out/base $(printf "$out/%s " $names)
}
grid() { # seed: every arm at every learning rate, to choose from on the validation split; on the test split the trade-off
    family=llama; seed=$1; out=$study/llama-$seed
    local names=""
    start
    for rate in $rates; do
        consistency grid/sft@$rate sft sampled $rate
        consistency grid/sft-exact@$rate sft exact $rate
        consistency grid/opct@$rate opct sampled $rate
        consistency grid/opct-exact@$rate opct exact $rate
        names="$names sft@$rate sft-exact@$rate opct@$rate opct-exact@$rate"
    done
    compare $out/grid/val val 1 $out/base $(printf "$out/grid/%s " $names)
    compare $out/grid/test test 1 $out/base $(printf "$out/grid/%s " $names)
}

took() { echo; echo "== done in $((SECONDS / 60)) min $((SECONDS % 60)) s"; }

# --- The jobs ---------------------------------------------------------------------------------------------------------------------

if [ $job = main ]; then
    family=llama; seed=0; out=out/$preset
    start; arms
    compare $out test $attempts $out/{base,sft,sft-exact,opct,opct-exact}
    took
    exit
fi
export OMP_NUM_THREADS=1
study=out/$job-$preset
mkdir -p $study
if [ $job = cell ]; then
    cell $2 $3
    took
    exit
fi

# The study. Every run has one processor to itself, so a figure does not depend on how many there are; on a GPU four share it.
trap 'for pid in $(jobs -p); do pkill -P $pid; kill $pid; done; exit 143' TERM HUP     # who stops this script stops its runs
side_by_side() { # runs each line of standard input, so many at once: a function of this file with its arguments
    local pids="" failed="" line pid
    while read -r line; do
        while [ "$(jobs -rp | wc -l)" -ge $at_once ]; do sleep 1; done
        $line &
        pids="$pids $!"
    done
    for pid in $pids; do wait $pid || failed=yes; done
    [ -z "$failed" ] || die "a run failed, see above; the same command goes on from here"
}
base() { family=$1; seed=$2; out=$study/$family-$seed; start; }
first() { # what the learning rates are chosen from, and meanwhile the other base models
    for s in $grid_seeds; do echo grid $s; done
    for s in $seeds; do [[ " $grid_seeds " = *" $s "* ]] || echo base llama $s; done
    for s in $more_seeds; do echo base qwen2 $s; echo base qwen3 $s; done
}
second() {
    for s in $seeds; do echo cell llama $s; done
    for s in $more_seeds; do echo cell qwen2 $s; echo cell qwen3 $s; done
}
at_once=4; [ $device = gpu ] || at_once=$(getconf _NPROCESSORS_ONLN)
touch $study/done
# The same functions say, counting, what there is to do; a base model that two of them want is made once.
plan() { (job=count; { first; second; } | while read -r line; do $line; done) | sort -u; }
seconds_left() {
    plan | awk -v file=$study/done 'BEGIN { while ((getline line < file) > 0) done[line] } !($0 in done) { sum += $1 } END { print sum + 0 }'
}
total=$(plan | awk '{ sum += $1 } END { print sum }'); before=$(seconds_left); began=$(date +%s)
echo "== the study: $at_once runs at a time, in $study/; a line for each that is done"
side_by_side < <(first)
$python eval.py choose $study --out $study/rates.sh
side_by_side < <(second)
$python eval.py report $study --out $study
took
