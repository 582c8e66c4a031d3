#!/usr/bin/env bash
# Everything in order, from an empty machine to the table:
#   bash train.sh [smoke|quick|full]     train and compare; default: full on a GPU, else quick
#   bash train.sh study NAME [PRESET]    a study: see the top of studies/NAME/__main__.py
#   bash train.sh test                   the tests
#
# The same command again goes on where it was stopped. Results go to out/.
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "error: $1" >&2; exit 2; }

job=${1:-main}
case $job in
    -h|--help) sed -n '2,7s/^# \?//p' train.sh; exit ;;
    test)  preset=auto; most=1 ;;
    study) preset=${3:-auto}; most=3; study=${2:-}
           [[ -f studies/$study/__main__.py ]] || die "no study '$study': see studies/" ;;
    *)     preset=${1:-auto}; most=1; job=main ;;
esac
[[ $preset =~ ^(auto|smoke|quick|full)$ ]] || die "unknown preset '$preset': smoke, quick or full"
[ $# -le $most ] || die "too many arguments: see the top of train.sh"

# This Python if it has the packages (a test wants torch.optim.Muon), else one of our own in .venv.
packages="import torch, tiktoken, numpy, safetensors, pytest, matplotlib; torch.optim.Muon"
python3 -c "$packages" 2>/dev/null && python=python3 || python=.venv/bin/python
if ! $python -c "$packages" 2>/dev/null; then
    echo "== setting up .venv (once; torch is the largest part)"
    python3 -m venv .venv || die "no virtual environment: install python3-venv"
    .venv/bin/pip install -q -r requirements.txt || die "pip could not install requirements.txt"
fi
# Keep freed memory: by default it goes back to the system, which makes a CPU run 10 % slower.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647

many=$($python -c "import xdist" 2>/dev/null && echo "-n auto --dist worksteal" || true)
[ $job = test ] && OMP_NUM_THREADS=1 exec $python -m pytest -q $many    # all cores with xdist
[ $job = study ] && exec $python -m studies.$study ${3:-}
default="import torch; print('full' if torch.cuda.is_available() else 'quick')"
[ $preset = auto ] && preset=$($python -c "$default")

# Learning rates: chosen by studies/claims. Minutes, on 2 CPU cores: base, each run, comparison.
world=""; sft=6e-4; sft_exact=1e-3; opct=6e-4; opct_exact=3e-4; attempts=64
case $preset in
    smoke) # every stage once, with models that know nothing
        world="--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12"; attempts=4
        base="--steps 20 --rows 8 --layers 2 --width 64"
        runs="--steps 4 --batch 8 --samples 2"; minutes=(0.1 0.1 0.1) ;;
    quick) # the whole comparison on a laptop's CPU
        base="--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2"
        runs="--steps 60 --batch 32 --samples 4"; minutes=("4 to 10" 0.7 1) ;;
    full)  # a larger world and model, for one GPU; minutes of an H100
        world="--cities 240 --lands 32 --recipes 120 --things 120 --largest 99 --steps 4 \
--pairs 240 --tests 480"
        base="--steps 2000 --rows 128 --layers 8 --width 256 --lr 5e-3"
        runs="--steps 100 --batch 64 --samples 4"; minutes=(2.5 0.5 0.5) ;;
esac
out=out/$preset
stage() { echo; echo "== $2 (about $1 min)"; "${@:3}"; }
consistency() { # name, method, loss, learning rate
    stage "${minutes[1]}" "consistency training: $1" $python opct.py $2 --base $out/base \
        --pairs $out/world/train.jsonl --out $out/$1 --loss $3 --lr $4 $runs
}
stage 0.1 "the world: facts, text, contrastive pairs" $python data.py --out $out/world $world
stage "${minutes[0]}" "the base" $python opct.py pretrain --world $out/world --out $out/base $base
consistency sft        sft  sampled $sft
consistency sft-exact  sft  exact   $sft_exact
consistency opct       opct sampled $opct
consistency opct-exact opct exact   $opct_exact
stage "${minutes[2]}" "what was fixed and what was broken" $python eval.py compare \
    $out/{base,sft,sft-exact,opct,opct-exact} --world $out/world --out $out --attempts $attempts
echo; echo "== done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
