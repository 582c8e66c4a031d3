"""The plan of the study: which commands, in which order, and which learning rates.

A *cell* is one base model, a family and a seed such as llama-0, and everything measured on it.
1. The worlds and the base models of all cells.
2. On the grid's seeds: every arm at every learning rate, compared on both splits.
3. The learning rate of each arm is chosen on the validation split.
4. Every cell: the four arms, the controls (llama only), three attackers a target, the pool of
   their prompts against every target, compare.
5. The map (map.py): other numbers of pairs and updates, on some of the seeds.
The grid goes seed after seed, and steps 4 and 5 take as many seeds at a time as there are cores:
so a sitting ends with whole cells and points.
"""
import sys
from dataclasses import dataclass, field, replace

import numpy as np

from studies.study import ARMS

# Name of a control: the arm that it repeats and its --control.
CONTROLS = {"sft-clean": ("sft", "clean"), "opct-clean": ("opct", "clean"),
            "opct-shuffled": ("opct", "shuffled")}
TARGETS = ("base", *ARMS)               # what is attacked
LEARNT = ("capability_math", "capability_facts", "capability_instructions")


# Seconds of a core: a command's start, an update of each method, a column of a table, and so on.
COST = {"world": 3, "base": 300, "start": 5, "sft": 0.4, "opct": 0.5, "attacker": 30, "pool": 70,
        "column": 6, "point": 45}
SMALL = {"world": 3, "base": 6, "start": 4, "sft": 0.1, "opct": 0.1, "attacker": 6, "pool": 6,
         "column": 0.5, "point": 6}


@dataclass
class Preset:
    """Sizes of a study, by default those of full. The flags of world, base and runs are those of
    train.sh. A point of the map is (--pairs of data.py, updates)."""
    world: str = ""
    base: str = "--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2"
    runs: str = "--steps 60 --batch 32 --samples 4"
    attacker: str = "--steps 24 --group 16 --attempts 64"
    attempts: int = 64
    attackers: int = 3                                      # of each target
    rates: tuple = ("1e-4", "3e-4", "6e-4", "1e-3", "2e-3", "4e-3")
    seeds: tuple = tuple(range(10))                         # of the family llama
    others: tuple = ("qwen2", "qwen3")
    more_seeds: tuple = (0, 1, 2)                           # of the other families
    grid_seeds: tuple = (0, 1)                              # of llama, for all learning rates
    map_seeds: tuple = (0, 1, 2, 3, 4)                      # of llama
    own: tuple = (24, 60)                                   # the point of the cells
    map_points: tuple = ((3, 60), (3, 240), (3, 480), (24, 60), (24, 240), (24, 480))
    map_second: tuple = (3, 240)                            # where the second reading's are chosen
    map_rates: tuple = ("1e-4", "3e-4", "6e-4", "1e-3")     # that are tried there
    map_again: tuple = ((3, 240), (24, 480))                # the points of the second reading
    map_tries: int = 240                                    # responses for each good_*
    cost: dict = field(default_factory=COST.copy)


PRESETS = {
    # Every stage once, models that know nothing: two minutes on 2 CPU cores.
    "smoke": Preset(world="--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12",
                    base="--steps 20 --rows 8 --layers 2 --width 64",
                    runs="--steps 4 --batch 8 --samples 2",
                    attacker="--steps 2 --group 4 --attempts 4", attempts=4, attackers=2,
                    rates=("1e-3",), seeds=(0,), more_seeds=(), grid_seeds=(0,), map_seeds=(0,),
                    own=(8, 4), map_points=((2, 8), (8, 4)), map_second=(2, 8),
                    map_again=((2, 8),), map_rates=("3e-4",), map_tries=24, cost=SMALL),
    # All questions with few seeds and points: about an hour on 2 CPU cores.
    "quick": Preset(seeds=(0, 1), more_seeds=(), grid_seeds=(0,), map_seeds=(0, 1),
                    map_points=((3, 60), (3, 240), (24, 60)), map_again=((3, 240),)),
    # The study of the README: 6 to 13 hours on 2 CPU cores.
    "full": Preset()}


def grid_of(preset, seed):
    """The part of a study that tries learning rates on this seed."""
    return replace(preset, seeds=(seed,), grid_seeds=(seed,), more_seeds=(), map_seeds=())


def cells_of(preset):
    """(family, seed) of every cell."""
    cells = [("llama", seed) for seed in preset.seeds]
    for family in preset.others:
        cells += [(family, seed) for seed in preset.more_seeds]
    return cells


def bases_of(preset):
    """(family, seed) of every base model: the cells' and the map's, which are mostly the same."""
    return list(dict.fromkeys(cells_of(preset) + [("llama", seed) for seed in preset.map_seeds]))


# --- Commands: (seconds of a core that it takes about, name, argv) ----------------------------

def python(seconds, name, text):
    return seconds, name, [sys.executable, *text.split()]


def value_of(name, flags):
    """The number that counts where a flag may be given twice: the last one."""
    return [int(value) for flag, value in zip(flags, flags[1:]) if flag == name][-1]


def consistency(folder, cell, name, arm, rate, preset, more=""):
    """One consistency run of a cell. `more` are flags; given a second time, the last one counts."""
    method, loss = ARMS[arm]
    at = f"{folder}/{cell[0]}-{cell[1]}"
    flags = (f"--base {at}/base --pairs {at}/world/train.jsonl --out {at}/{name} --loss {loss} "
             f"--lr {rate} --seed {cell[1]} {preset.runs} {more}").split()
    seconds = preset.cost["start"] + value_of("--steps", flags) * preset.cost[method]
    return python(seconds, f"{cell[0]}-{cell[1]}/{name}", f"opct.py {method} {' '.join(flags)}")


def compare(folder, cell, out, names, split, preset, attempts=1):
    """One table of a cell: the base and the runs of these names."""
    at = f"{folder}/{cell[0]}-{cell[1]}"
    checkpoints = " ".join(f"{at}/{name}" for name in ("base", *names))
    text = (f"eval.py compare {checkpoints} --world {at}/world --out {at}/{out} --split {split} "
            f"--attempts {attempts} --seed {cell[1]}")
    seconds = preset.cost["start"] + preset.cost["column"] * (len(names) + 2)
    return python(seconds, f"{cell[0]}-{cell[1]}/compare-{split}-{out}", text)


def first_stages(folder, preset):
    """Worlds, base models and the grid of learning rates."""
    worlds, bases, runs, tables = [], [], [], []
    for family, seed in bases_of(preset):
        at = f"{family}-{seed}"
        worlds.append(python(preset.cost["world"], f"{at}/world", f"data.py --out "
                             f"{folder}/{at}/world --seed {seed} {preset.world}"))
        bases.append(python(preset.cost["base"], f"{at}/base", f"opct.py pretrain --world "
                            f"{folder}/{at}/world --out {folder}/{at}/base --family {family} "
                            f"--seed {seed} {preset.base}"))
    for seed in preset.grid_seeds:
        cell, names = ("llama", seed), []
        for rate in preset.rates:
            for arm in ARMS:
                names.append(f"grid/{arm}@{rate}")
                runs.append(consistency(folder, cell, names[-1], arm, rate, preset))
        for split in ("val", "test"):
            tables.append(compare(folder, cell, f"grid/{split}", names, split, preset))
    return [worlds, bases, runs, tables]


def second_stages(folder, preset, rates):
    """The arms, the controls and the attackers of every cell, and its tables."""
    runs, attackers, tables = [], [], []
    for cell in cells_of(preset):
        family, seed = cell
        at = f"{folder}/{family}-{seed}"
        names = list(ARMS)
        for arm in ARMS:
            runs.append(consistency(folder, cell, arm, arm, rates[arm], preset))
        if family == "llama":
            for name, (arm, control) in CONTROLS.items():
                names.append(name)
                runs.append(consistency(folder, cell, name, arm, rates[arm], preset,
                                        f"--control {control}"))
        for name in TARGETS:
            for luck in [f"{seed}", f"1{seed}", f"2{seed}"][:preset.attackers]:
                text = (f"-m studies.claims.attack --target {at}/{name} --base {at}/base "
                        f"--world {at}/world --seed {luck} " + preset.attacker)
                attackers.append(python(preset.cost["attacker"],
                                        f"{family}-{seed}/{name}-attacker-{luck}", text))
        checkpoints = " ".join(f"{at}/{name}" for name in TARGETS)
        tables.append(python(preset.cost["pool"], f"{family}-{seed}/pool",
                             f"-m studies.claims.pool_attack {checkpoints} --world {at}/world "
                             f"--out {at}/pool.json --size {preset.attempts} --seed {seed}"))
        tables.append(compare(folder, cell, ".", names, "test", preset, preset.attempts))
    return [runs, attackers, tables]


# --- Learning rates --------------------------------------------------------------------------

def choose(grid):
    """The learning rate of each arm, by a rule that was fixed beforehand.

    Among the rates at which no capability falls by more than 0.03: the lowest mean_failure, both
    means over the grid's seeds on the validation split. If equal to three decimals: the smaller.
    If there is no such rate: the one with the smallest loss of a capability.

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
            return max(loss, 0.03), round(failure, 3), float(rate)
        rates[arm] = min(of_rate, key=rank)
    return rates, scores
