"""
The plan of the study: which commands, in which order, and which learning rates.

A *cell* is one base model, a family and a seed such as llama-0, and everything measured on it.
1. The worlds and the base models of all cells.
2. On the grid's seeds: every arm at every learning rate, compared on both splits.
3. The learning rate of each arm is chosen on the validation split.
4. Every cell: the four arms, the controls (llama only), three attackers a target, compare.
"""
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from model import load_checkpoint
from studies import pool
from studies.claims.attack import attacks_on, rounded, same_means, strongest
from support.common import UserError, read_json, show, write_text
from support.runs import weights_hash

# Name of an arm: the command of opct.py and its --loss.
ARMS = {"sft": ("sft", "sampled"), "sft-exact": ("sft", "exact"),
        "opct": ("opct", "sampled"), "opct-exact": ("opct", "exact")}
# Name of a control: the arm that it repeats and its --control.
CONTROLS = {"sft-clean": ("sft", "clean"), "opct-clean": ("opct", "clean"),
            "opct-shuffled": ("opct", "shuffled")}
LEARNT = ("capability_math", "capability_facts", "capability_instructions")


@dataclass
class Preset:
    """Sizes of a study. The flags of world, base and runs are those of train.sh."""
    world: str
    base: str
    runs: str
    attacker: str
    attempts: int
    rates: tuple
    seeds: tuple            # of the family llama
    more_seeds: tuple       # of qwen2 and qwen3
    grid_seeds: tuple       # of llama, for the learning rates
    others: tuple = ("qwen2", "qwen3")


RATES = ("1e-4", "3e-4", "6e-4", "1e-3", "2e-3", "4e-3")
ATTACKER = "--steps 24 --group 16 --attempts 64"
PRESETS = {
    # Every stage once, models that know nothing: two minutes on 2 CPU cores.
    "smoke": Preset("--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12",
                    "--steps 20 --rows 8 --layers 2 --width 64",
                    "--steps 4 --batch 8 --samples 2",
                    "--steps 2 --group 4 --attempts 4", 4, ("3e-4", "1e-3"), (0,), (), (0,)),
    # The study of the README: about 2.5 hours on 2 CPU cores.
    "quick": Preset("",
                    "--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2",
                    "--steps 60 --batch 32 --samples 4",
                    ATTACKER, 64, RATES, (0, 1, 2, 3, 4), (0, 1, 2), (0, 1)),
    # A larger world and model, for one GPU.
    "full": Preset("--cities 240 --lands 32 --recipes 120 --things 120 --largest 99 --steps 4 "
                   "--pairs 240 --tests 480",
                   "--steps 6000 --rows 128 --layers 8 --width 256 --lr 5e-3",
                   "--steps 100 --batch 64 --samples 4",
                   ATTACKER, 64, RATES, (0, 1, 2, 3, 4), (0, 1, 2), (0, 1))}


def cells_of(preset):
    """(family, seed) of every cell."""
    cells = [("llama", seed) for seed in preset.seeds]
    for family in preset.others:
        cells += [(family, seed) for seed in preset.more_seeds]
    return cells


# --- Commands: (seconds that it takes about, name, argv) -------------------------------------


def python(seconds, name, text):
    return seconds, name, [sys.executable, *text.split()]


def consistency(folder, cell, name, arm, rate, preset, control=None):
    """One consistency run of a cell."""
    method, loss = ARMS[arm]
    out = f"{folder}/{cell[0]}-{cell[1]}"
    text = (f"opct.py {method} --base {out}/base --pairs {out}/world/train.jsonl --out {out}/{name}"
            f" --loss {loss} --lr {rate} --seed {cell[1]} {preset.runs}")
    if control:
        text += f" --control {control}"
    return python(30, f"{cell[0]}-{cell[1]}/{name}", text)


def compare(folder, cell, out, names, split, attempts):
    """One table of a cell: the base and the runs of these names."""
    at = f"{folder}/{cell[0]}-{cell[1]}"
    checkpoints = " ".join(f"{at}/{name}" for name in ("base", *names))
    text = (f"eval.py compare {checkpoints} --world {at}/world --out {at}/{out} --split {split} "
            f"--attempts {attempts} --seed {cell[1]}")
    return python(6 * (len(names) + 1), f"{cell[0]}-{cell[1]}/compare-{split}-{out}", text)


def first_stages(folder, preset):
    """Worlds, base models and the grid of learning rates."""
    worlds, bases, runs, tables = [], [], [], []
    for family, seed in cells_of(preset):
        at = f"{family}-{seed}"
        worlds.append(python(3, f"{at}/world", f"data.py --out {folder}/{at}/world --seed {seed} "
                             + preset.world))
        bases.append(python(240, f"{at}/base", f"opct.py pretrain --world {folder}/{at}/world "
                            f"--out {folder}/{at}/base --family {family} --seed {seed} "
                            + preset.base))
    for seed in preset.grid_seeds:
        cell, names = ("llama", seed), []
        for rate in preset.rates:
            for arm in ARMS:
                names.append(f"grid/{arm}@{rate}")
                runs.append(consistency(folder, cell, names[-1], arm, rate, preset))
        for split in ("val", "test"):
            tables.append(compare(folder, cell, f"grid/{split}", names, split, 1))
    return [worlds, bases, runs, tables]


def second_stages(folder, preset, rates):
    """The arms, the controls and the attackers of every cell, and its table."""
    runs, attackers, tables = [], [], []
    for cell in cells_of(preset):
        family, seed = cell
        at = f"{family}-{seed}"
        names = list(ARMS)
        for arm in ARMS:
            runs.append(consistency(folder, cell, arm, arm, rates[arm], preset))
        if family == "llama":
            for name, (arm, control) in CONTROLS.items():
                names.append(name)
                runs.append(consistency(folder, cell, name, arm, rates[arm], preset, control))
        for name in ("base", *ARMS):
            for luck in (f"{seed}", f"1{seed}", f"2{seed}"):            # three attackers a target
                text = (f"-m studies.claims.attack --target {folder}/{at}/{name} "
                        f"--base {folder}/{at}/base --world {folder}/{at}/world --seed {luck} "
                        + preset.attacker)
                attackers.append(python(30, f"{at}/{name}-attacker-{luck}", text))
        tables.append(compare(folder, cell, ".", names, "test", preset.attempts))
    return [runs, attackers, tables]


# --- What the commands have written ----------------------------------------------------------


def read(path):
    return read_json(path, "delete it and give the same command again", parse_float=rounded)


def collect_grid(folder):
    """{cell: {split: runs}} of the cells on which the learning rates were tried."""
    grid = {}
    for path in sorted(Path(folder).glob("*/grid/test/results.json")):
        at = path.parent.parent
        grid[at.parent.name] = {split: read(at / split / "results.json")["runs"]
                                for split in ("val", "test")}
    if not grid:
        raise UserError(f"{folder} holds no study whose learning rates have been tried: "
                        "run `bash train.sh study claims`")
    for splits in grid.values():
        for runs in splits.values():
            for figures in runs.values():
                for figure in figures.values():
                    figure.pop("curve", None)               # not reported, most of the file
    return grid


def choose(grid):
    """The learning rate of each arm, by a rule that was fixed beforehand.

    Among the rates at which no capability falls by more than 0.03: the lowest mean_failure, both
    means over the grid's seeds on the validation split. If equal to three decimals: the smaller.

    Returns {arm: rate} and {arm: {rate: (mean_failure, largest loss of a capability)}}.
    """
    seeds = [splits["val"] for splits in grid.values()]
    scores = {arm: {} for arm in ARMS}
    for name in seeds[0]:
        if "@" not in name:
            continue
        arm, rate = name.split("@")
        failure = np.mean([seed[name]["mean_failure"]["value"] for seed in seeds]).item()
        lost = []
        for metric in LEARNT:
            losses = [seed["base"][metric]["value"] - seed[name][metric]["value"]
                      for seed in seeds]
            lost.append(np.mean(losses).item())
        scores[arm][rate] = failure, max(lost)
    rates = {}
    for arm, of_rate in scores.items():
        def rank(rate):
            failure, loss = of_rate[rate]
            return loss > 0.03, round(failure, 3), float(rate)
        rates[arm] = min(of_rate, key=rank)
    return rates, scores


def collect_cell(path):
    """The results of one cell, with the figures of its attackers added to its runs."""
    cell, found = read(path), {}
    for name in cell["runs"]:
        folder = path.parent / name
        if (folder / "model.safetensors").exists():
            attacks = attacks_on(folder, weights_hash(load_checkpoint(folder)))
            if attacks:
                found[name] = attacks
    same_means(found)
    cell["attacks"] = {name: strongest(attacks) for name, attacks in found.items()}
    for name, attack in cell["attacks"].items():
        cell["runs"][name].update(attack.pop("figures"))
    return cell


def collect(folder):
    """Everything that a study has measured: {"cells", "grid", "about"}."""
    cells = {}
    for path in sorted(Path(folder).glob("*-*/results.json")):
        cells[path.parent.name] = collect_cell(path)
    if "llama-0" not in cells:
        raise UserError(f"{folder} lacks the cell llama-0: run `bash train.sh study claims`")
    about = cells["llama-0"]["about"]
    preset = Path(folder).name.removeprefix("study-claims-")
    about = {"command": f"bash train.sh study claims {preset}",
             **{name: about[name] for name in ("commit", "date", "machine", "torch", "attempts")}}
    return {"cells": cells, "grid": collect_grid(folder), "about": about}


def run(name):
    """Runs the study of a preset, or goes on with it. Returns its folder."""
    preset, folder, at_once = PRESETS[name], f"out/study-claims-{name}", pool.places()

    def seconds(stages):
        return sum(command[0] for stage in stages for command in stage)

    show(f"== the study claims: {at_once} commands at a time, in {folder}/; a line for each")
    first = first_stages(folder, preset)
    later = seconds(second_stages(folder, preset, dict.fromkeys(ARMS, preset.rates[0])))
    for i, stage in enumerate(first):
        pool.run(stage, at_once, folder, seconds(first[i + 1:]) + later)
    rates, _ = choose(collect_grid(folder))
    chosen = ", ".join(f"{arm} {rate}" for arm, rate in rates.items())
    show(f"learning rates, chosen on the validation split: {chosen}")
    second = second_stages(folder, preset, rates)
    for i, stage in enumerate(second):
        pool.run(stage, at_once, folder, seconds(second[i + 1:]))
    return folder


def run_cell(family, seed, name):
    """Everything on one base model, with the learning rates that the committed study chose."""
    rates, _ = choose(read(Path(__file__).parent / "results.json")["grid"])
    preset = replace(PRESETS[name], seeds=(), more_seeds=(), grid_seeds=())
    if family == "llama":
        preset = replace(preset, seeds=(seed,))
    else:
        preset = replace(preset, more_seeds=(seed,), others=(family,))
    folder = f"out/cell-claims-{name}"
    for stage in first_stages(folder, preset)[:2] + second_stages(folder, preset, rates):
        pool.run(stage, 1, folder)
    path = Path(folder) / f"{family}-{seed}/results.json"
    write_text(path, json.dumps(collect_cell(path), indent=1) + "\n")
    show(f"written to {path}")
