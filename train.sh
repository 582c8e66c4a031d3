#!/usr/bin/env bash
# Everything in order. From an empty machine to the table:
#
#   bash train.sh            the main job: preset `full` where there is a GPU, `quick` where there is none
#   bash train.sh PRESET     smoke: every stage once, models that know nothing (a minute on 2 CPU cores)
#                            quick: the whole comparison on a laptop's CPU   full: larger world and model, for one GPU
#   bash train.sh test       the tests
#
# Given again, it goes on where it was stopped and skips what is done. Results go to out/PRESET/.
set -euo pipefail
cd "$(dirname "$0")"
die() { echo "error: $1" >&2; exit 2; }
preset=${1:-auto}
case $preset in auto|smoke|quick|full|test) ;; *) die "unknown preset '$preset': choose smoke, quick, full or test" ;; esac
[ $# -le 1 ] || die "one argument at most: smoke, quick, full or test"

# The current Python if it has the packages, else a virtual environment of our own.
packages="import torch, tiktoken, numpy, safetensors, pytest"
python=python3
if ! python3 -c "$packages" 2>/dev/null; then
    python=.venv/bin/python
    if ! $python -c "$packages" 2>/dev/null; then
        echo "== setting up .venv (once; torch is the largest part)"
        python3 -m venv .venv || die "python3 cannot make a virtual environment: install its venv package"
        .venv/bin/pip install --quiet -r requirements.txt || die "pip could not install requirements.txt: see above"
    fi
fi

[ "$preset" = test ] && exec $python -m pytest -q tests
[ "$preset" = auto ] && preset=$($python -c "import torch; print('full' if torch.cuda.is_available() else 'quick')")

# What a preset is made of. The four consistency runs share pairs, updates and responses; they differ in whose response
# (offline: the teacher's, on-policy: the student's), in the loss (the sampled token, or the whole distribution), and in the
# learning rate, which is chosen for each from one grid on the validation split (README, "Fairness").
case $preset in
    smoke) world="--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12"
           base="--steps 20 --rows 8 --layers 2 --width 64"
           runs="--steps 4 --batch 8 --samples 2"
           sft=3e-4; soft_sft=3e-4; opct_sampled=3e-4; opct=3e-4
           attempts=4; times=("10 s" "10 s" "10 s" "10 s") ;;
    quick) world=""
           base="--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2"
           runs="--steps 60 --batch 32 --samples 4"
           sft=6e-4; soft_sft=1e-3; opct_sampled=3e-4; opct=1e-3
           attempts=48; times=("5 min" "1 min" "1 min" "half a minute") ;;
    full)  world="--cities 240 --lands 32 --recipes 120 --things 120 --largest 99 --steps 4 --pairs 240 --tests 480"
           base="--steps 6000 --rows 128 --layers 8 --width 256 --lr 5e-3"
           runs="--steps 100 --batch 64 --samples 4"
           sft=6e-4; soft_sft=1e-3; opct_sampled=3e-4; opct=1e-3
           attempts=48; times=("a few min, not measured yet" "1 min, not measured yet" "1 min, not measured yet" "1 min, not measured yet") ;;
esac
out=out/$preset
say() { echo; echo "== $1"; }
consistency() { # name, method, loss, learning rate
    $python opct.py $2 --base $out/base --pairs $out/world/train.jsonl --out $out/$1 --objective $3 --lr $4 $runs
}

say "1/5 the world: facts, text, contrastive pairs (seconds)"
$python data.py --out $out/world $world
say "2/5 the base model, planted failures included (about ${times[0]})"
$python opct.py pretrain --world $out/world --out $out/base $base
say "3/5 offline consistency training: the teacher's responses (about ${times[1]})"
consistency sft sft sampled $sft
consistency soft-sft sft exact $soft_sft
say "4/5 on-policy consistency training: the student's own responses (about ${times[2]})"
consistency opct-sampled opct sampled $opct_sampled
consistency opct opct exact $opct
say "5/5 what was mended and what was broken, on held-out prompts (about ${times[3]})"
$python eval.py compare $out/{base,sft,soft-sft,opct-sampled,opct} --world $out/world --out $out --attempts $attempts
