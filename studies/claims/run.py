"""
The claims study: learning rates, seeds, families, controls, trained attackers.

    python -m studies.claims [smoke|quick|full]     everything; goes on where it was stopped
    python -m studies.claims cell FAMILY SEED [PRESET]      one cell of it
    python -m studies.claims readme                 the READMEs from the committed results.json

A cell is one base model, all its runs and their attackers. First every arm is trained at every
learning rate on the first seeds, and one rate an arm is chosen on the validation split. Then all
cells run with these rates.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from model import ARCHITECTURES
from studies.claims.report import ARMS, choose, collect, grid_of, report, write_readmes
from studies.pool import Job, Pool
from support.common import UserError, guarded

RATES = ["1e-4", "3e-4", "6e-4", "1e-3", "2e-3", "4e-3"]
CONTROLS = {"sft-clean": ("sft", "clean"), "opct-clean": ("opct", "clean"),
            "opct-shuffled": ("opct", "shuffled")}


@dataclass
class Preset:
    """What train.sh's preset of this name is made of, and how large the study is."""
    world: str
    base: str
    runs: str
    attacker: str = "--steps 24 --group 16 --attempts 64"
    attempts: int = 64
    rates: tuple = tuple(RATES)
    grid_seeds: tuple = (0, 1)
    seeds: tuple = (0, 1, 2, 3, 4)
    more_seeds: tuple = (0, 1, 2)       # of the families qwen2 and qwen3


PRESETS = {
    "smoke": Preset(
        world="--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12",
        base="--steps 20 --rows 8 --layers 2 --width 64",
        runs="--steps 4 --batch 8 --samples 2", attacker="--steps 2 --group 4 --attempts 4",
        attempts=4, rates=("3e-4", "1e-3"), grid_seeds=(0,), seeds=(0,), more_seeds=()),
    "quick": Preset(
        world="", base="--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2",
        runs="--steps 60 --batch 32 --samples 4"),
    "full": Preset(
        world="--cities 240 --lands 32 --recipes 120 --things 120 --largest 99 --steps 4 "
              "--pairs 240 --tests 480",
        base="--steps 6000 --rows 128 --layers 8 --width 256 --lr 5e-3",
        runs="--steps 100 --batch 64 --samples 4")}

# The rates that the study chose, for a cell that is run alone. A test compares.
CHOSEN = {"sft": "6e-4", "sft-exact": "6e-4", "opct": "1e-3", "opct-exact": "3e-4"}


class Cell:
    """One base model of a study and the jobs on it."""

    def __init__(self, study, preset, family, seed):
        self.out = study / f"{family}-{seed}"
        self.preset, self.family, self.seed = preset, family, seed

    def job(self, seconds, what, *args):
        return Job([str(a) for a in args], seconds, f"{self.out.name} {what}",
                   self.out / "log.txt")

    def start(self):
        """The world and the base model, planted failures included."""
        world, base = ["--out", self.out / "world"], ["--world", self.out / "world"]
        seed = ["--seed", self.seed]
        return [self.job(3, "world", "data.py", *world, *seed, *self.preset.world.split()),
                self.job(240, "base", "opct.py", "pretrain", *base, "--out", self.out / "base",
                         "--family", self.family, *seed, *self.preset.base.split())]

    def run(self, name, arm, rate, control="none"):
        """Consistency training of one arm."""
        stage, _, exact = arm.partition("-")
        return self.job(30, name, "opct.py", stage, "--base", self.out / "base", "--pairs",
                        self.out / "world/train.jsonl", "--out", self.out / name, "--loss",
                        exact or "sampled", "--lr", rate, "--control", control, "--seed",
                        self.seed, *self.preset.runs.split())

    def compare(self, out, split, attempts, names):
        folders = [self.out / name for name in ("base", *names)]
        return self.job(6 * len(folders), f"{split} split", "eval.py", "compare", *folders,
                        "--world", self.out / "world", "--out", out, "--split", split,
                        "--attempts", attempts, "--seed", self.seed)

    def grid(self):
        """Every arm at every rate: the validation split chooses, the test split shows the
        trade-off and chooses nothing."""
        names = [(arm, rate) for rate in self.preset.rates for arm in ARMS]
        runs = [self.run(f"grid/{arm}@{rate}", arm, rate) for arm, rate in names]
        folders = [f"grid/{arm}@{rate}" for arm, rate in names]
        return [*self.start(), *runs,
                *(self.compare(self.out / "grid" / split, split, 1, folders)
                  for split in ("val", "test"))]

    def attacks(self, name):
        """Three attackers; those of seed 4 have the seeds 4, 14 and 24."""
        return [self.job(30, f"attacker {seed} of {name}", "-m", "studies.claims.attack",
                         "--target", self.out / name, "--base", self.out / "base", "--world",
                         self.out / "world", "--seed", seed, *self.preset.attacker.split())
                for seed in (self.seed, 10 + self.seed, 20 + self.seed)]

    def everything(self, rates):
        """All that the study measures on this base model."""
        jobs, names = self.start(), list(ARMS)
        jobs += [self.run(arm, arm, rates[arm]) for arm in ARMS]
        if self.family == "llama":
            jobs += [self.run(name, arm, rates[arm], control)
                     for name, (arm, control) in CONTROLS.items()]
            names += CONTROLS
        for name in ("base", *ARMS):
            jobs += self.attacks(name)
        return [*jobs, self.compare(self.out, "test", self.preset.attempts, names)]


def study(name):
    preset, folder = PRESETS[name], Path("out") / f"study-claims-{name}"
    main = [Cell(folder, preset, "llama", seed) for seed in preset.seeds]
    others = [Cell(folder, preset, family, seed) for seed in preset.more_seeds
              for family in ("qwen2", "qwen3")]
    first = [cell.grid() if cell.seed in preset.grid_seeds else cell.start() for cell in main]
    first += [cell.start() for cell in others]
    second = [cell.everything(CHOSEN) for cell in main + others]
    at_once = 4 if torch.cuda.is_available() else os.cpu_count()
    pool = Pool(folder, at_once, unique(first + second))
    print(f"== the study: {at_once} runs at a time, in {folder}/; a line for each that is done")
    pool.run(first)
    rates, _ = choose(grid_of(folder))
    print("learning rates, chosen on the validation split: "
          + ", ".join(f"{arm} {rate}" for arm, rate in rates.items()))
    second = [cell.everything(rates) for cell in main + others]
    pool.plan = unique(first + second)
    pool.run(second)
    report(collect(folder), folder, f"python -m studies.claims {name}")


def unique(chains):
    """All jobs once: a base model that two chains want is made once."""
    return list({job.line: job for chain in chains for job in chain}.values())


def one_cell(family, seed, name):
    if family not in ARCHITECTURES:
        raise UserError(f"unknown family '{family}': choose llama, qwen2 or qwen3")
    if not seed.isdigit():
        raise UserError(f"a seed is a whole number, not '{seed}'")
    folder = Path("out") / f"cell-claims-{name}"
    chain = Cell(folder, PRESETS[name], family, int(seed)).everything(CHOSEN)
    Pool(folder, 1, chain).run([chain])


def main():
    args = sys.argv[1:]
    default = "full" if torch.cuda.is_available() else "quick"
    preset = args[-1] if args and args[-1] in PRESETS else default
    words = args[:-1] if args and args[-1] in PRESETS else args
    if words == []:
        study(preset)
    elif words == ["readme"]:
        write_readmes()
    elif len(words) == 3 and words[0] == "cell":
        one_cell(words[1], words[2], preset)
    else:
        raise UserError(f"unknown words {' '.join(args)}: choose [smoke|quick|full], "
                        "cell FAMILY SEED [PRESET], or readme")


if __name__ == "__main__":
    guarded(main)
