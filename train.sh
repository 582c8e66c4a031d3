#!/usr/bin/env bash
# Everything in order. From an empty machine to the table:
#
#   bash train.sh [PRESET]              the main job. smoke: every stage once, in a minute
#                                       quick: all on a laptop's CPU; full: larger, for one GPU
#   bash train.sh study NAME [PRESET]   a study: claims
#   bash train.sh test                  the tests
#
# Without a preset: full where there is a GPU, quick where there is none. The same command again
# goes on where it was stopped and skips what is done. Results go to out/PRESET/.
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "error: $1" >&2; exit 2; }

job=main
case ${1:-} in test|study) job=$1; shift ;; esac
if [ $job = study ]; then
    [ -n "${1:-}" ] && [ -d "studies/$1" ] || die "no study '${1:-}': choose claims"
    study=$1; shift
fi
preset=${1:-auto}
case $preset in auto|smoke|quick|full) ;;
    *) die "unknown preset '$preset': choose smoke, quick, full, study NAME [PRESET] or test" ;; esac
[ $# -le 1 ] || die "too many arguments: smoke, quick, full, study NAME [PRESET] or test"

# The current Python if it has the packages, else a virtual environment of our own.
packages="import torch, tiktoken, numpy, safetensors, pytest; from torch.optim import Muon"
python=python3
if ! python3 -c "$packages" 2>/dev/null; then
    python=.venv/bin/python
    if ! $python -c "$packages" 2>/dev/null; then
        echo "== setting up .venv (once; torch is the largest part)"
        python3 -m venv .venv || die "python3 cannot make a virtual environment: install its venv"
        .venv/bin/pip install --quiet -r requirements.txt || die "pip failed, see above"
    fi
fi
[ $job = test ] && exec $python -m pytest -q

# The C library hands a step's memory back to the system, which then clears every page of the next
# one. Keeping it saves a tenth of the time of pretraining on a CPU.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647
gpu=$($python -c "import torch; print(torch.cuda.is_available())")
[ $preset != auto ] || { [ "$gpu" = True ] && preset=full || preset=quick; }
[ $job = study ] && exec $python -m "studies.$study" $preset

# The learning rates of the arms were chosen by the claims study on its validation split.
sft=6e-4 sft_exact=6e-4 opct=1e-3 opct_exact=3e-4 attempts=64
case $preset in
    smoke) world="--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12"
           base="--steps 20 --rows 8 --layers 2 --width 64"
           runs="--steps 4 --batch 8 --samples 2" attempts=4 ;;
    quick) world=""
           base="--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2"
           runs="--steps 60 --batch 32 --samples 4" ;;
    full)  world="--cities 240 --lands 32 --recipes 120 --things 120 --largest 99 --steps 4"
           world="$world --pairs 240 --tests 480"
           base="--steps 6000 --rows 128 --layers 8 --width 256 --lr 5e-3"
           runs="--steps 100 --batch 64 --samples 4" ;;
esac
out=out/$preset; fix="--base $out/base --pairs $out/world/train.jsonl $runs"

$python data.py --out $out/world $world                                 # quick: 3 s
$python opct.py pretrain --world $out/world --out $out/base $base       # quick: 4 min
$python opct.py sft  $fix --out $out/sft        --loss sampled --lr $sft            # 30 s each
$python opct.py sft  $fix --out $out/sft-exact  --loss exact   --lr $sft_exact
$python opct.py opct $fix --out $out/opct       --loss sampled --lr $opct           # the paper's
$python opct.py opct $fix --out $out/opct-exact --loss exact   --lr $opct_exact
$python eval.py compare $out/{base,sft,sft-exact,opct,opct-exact} --world $out/world \
    --out $out --attempts $attempts                                     # quick: 40 s
echo "== done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
