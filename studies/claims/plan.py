"""What the study runs, in which order.

Experiment 1, the frontier. Six arms tell three things apart that "on-policy" stands for at once:
fresh responses, the student's own ones, and the direction of the KL. All have the same learning
rate, and several rates are shown; none is chosen.

It stands at two points: 12 pairs and 240 updates (what `train.sh quick` shows), 108 pairs and 480
updates. Its dose is `sft` with 4, 16 or 64 stored responses to a pair, and fresh ones, at one rate.

Experiment 2, the attack. Four arms and three controls at 108 pairs and 60 updates, three attackers
against each arm, and all attackers' prompts together against each.

A *cell* is a family and a seed such as llama-0: a world, a base model and all that starts from it.
It belongs to one sitting on one kind of machine: a base model that is trained again elsewhere is
another one.
"""
import sys
from dataclasses import dataclass, field

from studies.study import ARMS

SIX = {"sft": ARMS["sft"], "sft-exact": ARMS["sft-exact"],
       "sft-fresh": ("sft --stored 0", "sampled"), "sft-fresh-exact": ("sft --stored 0", "exact"),
       "opct": ARMS["opct"], "opct-exact": ARMS["opct-exact"]}
DOSES = {"sft-16": ("sft --stored 16", "sampled"), "sft-64": ("sft --stored 64", "sampled")}

# The rates of the attack's arms. In the first edition of this study a grid from 1e-4 to 4e-3 chose
# them, on validation prompts of two seeds: the fewest failures among the rates that cost no
# capability more than 0.03.
RATES = {"sft": "6e-4", "sft-exact": "1e-3", "opct": "6e-4", "opct-exact": "3e-4"}
# Name of a control: the arm that it repeats and its --control.
CONTROLS = {"sft-clean": ("sft", "clean"), "opct-clean": ("opct", "clean"),
            "opct-shuffled": ("opct", "shuffled")}
TARGETS = ("base", *ARMS)               # what is attacked


@dataclass
class Point:
    """flag: --pairs of data.py; batch: pairs in an update; rates: of all six arms."""
    flag: int
    updates: int
    batch: int
    rates: tuple

    @property
    def pairs(self):
        """Of the three axes, with a failure and without."""
        return 3 * (self.flag + self.flag // 2)

    @property
    def name(self):
        return f"{self.pairs}x{self.updates}"


# Seconds of a core: a world, a base model, a consistency run's start and each of its responses,
# an attacker, a pool, and what is measured of one run.
COST = {"world": 3, "base": 420, "start": 5, "response": 0.0035, "attacker": 30, "pool": 70,
        "measure": 12}


@dataclass
class Preset:
    """Sizes of the study, by default those of full. The flags of world, base and runs are those of
    train.sh."""
    world: str = ""
    base: str = "--steps 1700 --rows 24 --layers 4 --width 128 --lr 1e-2"
    points: tuple = (Point(3, 240, 12, ("1.5e-4", "3e-4", "6e-4")),
                     Point(24, 480, 32, ("3e-4", "6e-4")))
    seeds: tuple = (0, 1, 2, 3, 4)      # of the family llama, at every point
    dose_rate: str = "6e-4"
    samples: int = 4
    tries: int = 240                    # responses for each good_*
    draws: int = 32                     # of an update, for its noise
    attacked: dict = field(default_factory=lambda: {
        "llama": range(10), "qwen2": range(3), "qwen3": range(3)})      # family -> seeds
    runs: str = "--steps 60 --batch 32 --samples 4"
    responses: int = 60 * 32 * 4        # of one of these
    attacker: str = "--steps 24 --group 16 --attempts 64"
    attempts: int = 64
    attackers: int = 3                  # of each target
    cost: dict = field(default_factory=COST.copy)


PRESETS = {
    # Every stage once, with models that know nothing.
    "smoke": Preset(world="--cities 12 --lands 4 --recipes 6 --things 12 --pairs 8 --tests 12",
                    base="--steps 20 --rows 8 --layers 2 --width 64",
                    points=(Point(2, 4, 4, ("6e-4",)),), seeds=(0,), samples=2, tries=24, draws=2,
                    attacked={"llama": (0,)}, runs="--steps 4 --batch 8 --samples 2",
                    responses=64, attacker="--steps 2 --group 4 --attempts 4", attempts=4,
                    attackers=2, cost={"world": 3, "base": 6, "start": 4, "response": 0.001,
                                       "attacker": 6, "pool": 6, "measure": 2}),
    # One seed of experiment 1 at one rate: 40 minutes on 2 CPU cores.
    "quick": Preset(points=(Point(3, 240, 12, ("6e-4",)), Point(24, 480, 32, ("6e-4",))),
                    seeds=(0,), attacked={}),
    # The study of the README: about 15 hours of a core.
    "full": Preset()}


def cells_of(preset):
    """(family, seed) of every cell, those of experiment 1 first."""
    cells = [("llama", seed) for seed in preset.seeds]
    for family, seeds in preset.attacked.items():
        cells += [(family, seed) for seed in seeds]
    return list(dict.fromkeys(cells))


# --- Commands: (seconds of a core that it takes about, name, argv) ----------------------------

def python(seconds, name, text):
    return seconds, name, [sys.executable, *text.split()]


def base_stages(folder, preset, cell):
    """The world and the base model of a cell, such as llama-0."""
    family, seed = cell.split("-")
    at = f"{folder}/{cell}"
    world = python(preset.cost["world"], f"{cell}/world",
                   f"data.py --out {at}/world --seed {seed} {preset.world}")
    base = python(preset.cost["base"], f"{cell}/base",
                  f"opct.py pretrain --world {at}/world --out {at}/base --family {family} --seed "
                  f"{seed} {preset.base}")
    return [[world], [base]]


def runs_of(preset, point):
    """Name such as sft-fresh@3e-4 -> (command, loss, rate) of each run at a point."""
    runs = {f"{arm}@{rate}": (*how, rate) for rate in point.rates for arm, how in SIX.items()}
    doses = {f"{arm}@{preset.dose_rate}": (*how, preset.dose_rate) for arm, how in DOSES.items()}
    return runs | doses


def point_stages(folder, preset, cell, point):
    """Experiment 1 at one point of a cell: the world with so many pairs, the runs, and what is
    measured of them."""
    home, seed = f"{folder}/{cell}", cell.split("-")[1]
    at, name = f"{home}/{point.name}", f"{cell}/{point.name}"
    world = python(preset.cost["world"], f"{name}/world",
                   f"data.py --out {at}/world --seed {seed} {preset.world} --pairs {point.flag}")
    responses = point.updates * point.batch * preset.samples
    seconds = preset.cost["start"] + preset.cost["response"] * responses
    trained = []
    for run, (method, loss, rate) in runs_of(preset, point).items():
        trained.append(python(seconds, f"{name}/{run}",
                              f"opct.py {method} --base {home}/base --pairs {at}/world/train.jsonl "
                              f"--out {at}/{run} --loss {loss} --lr {rate} --seed {seed} --steps "
                              f"{point.updates} --batch {point.batch} --samples {preset.samples}"))
    folders = " ".join(f"{at}/{run}" for run in runs_of(preset, point))
    measure = python(preset.cost["measure"] * len(trained), f"{name}/measure",
                     f"-m studies.claims.measure {home}/base {folders} --world {at}/world --out "
                     f"{at}/results.json --tries {preset.tries} --draws {preset.draws} --seed "
                     f"{seed}")
    return [[world], trained, [measure]]


def attack_stages(folder, preset, cell):
    """Experiment 2 on one cell: the arms and controls, their attackers, the pool, the table."""
    family, seed = cell.split("-")
    at = f"{folder}/{cell}"
    arms = {arm: (arm, "") for arm in ARMS}
    if family == "llama":
        arms |= {name: (arm, f" --control {how}") for name, (arm, how) in CONTROLS.items()}
    seconds = preset.cost["start"] + preset.cost["response"] * preset.responses
    runs = []
    for name, (arm, more) in arms.items():
        method, loss = ARMS[arm]
        runs.append(python(seconds, f"{cell}/{name}",
                           f"opct.py {method} --base {at}/base --pairs {at}/world/train.jsonl "
                           f"--out {at}/{name} --loss {loss} --lr {RATES[arm]} --seed {seed} "
                           f"{preset.runs}{more}"))
    attackers = []
    for name in TARGETS:
        for luck in [f"{seed}", f"1{seed}", f"2{seed}"][:preset.attackers]:
            attackers.append(python(preset.cost["attacker"], f"{cell}/{name}-attacker-{luck}",
                                    f"-m studies.claims.attack --target {at}/{name} --base "
                                    f"{at}/base --world {at}/world --seed {luck} "
                                    f"{preset.attacker}"))
    targets, checkpoints = (" ".join(f"{at}/{name}" for name in names)
                            for names in (TARGETS, ("base", *arms)))
    pool = python(preset.cost["pool"], f"{cell}/pool",
                  f"-m studies.claims.pool_attack {targets} --world {at}/world --out "
                  f"{at}/pool.json --size {preset.attempts} --seed {seed}")
    table = python(preset.cost["measure"] * (len(arms) + 2), f"{cell}/compare",
                   f"eval.py compare {checkpoints} --world {at}/world --out {at} --split test "
                   f"--attempts {preset.attempts} --seed {seed}")
    return [runs, attackers, [pool, table]]


def stages(folder, preset, only=None, there=()):
    """Cell after cell, point after point, so that a sitting ends with whole ones.

    Args:
        only: seeds, or None for all. there: (cell, point's name or "attack") that is measured.
    """
    out = []
    for family, seed in cells_of(preset):
        cell = f"{family}-{seed}"
        if only and seed not in only:
            continue
        todo = []
        if family == "llama" and seed in preset.seeds:
            for point in preset.points:
                if (cell, point.name) not in there:
                    todo += point_stages(folder, preset, cell, point)
        if seed in preset.attacked.get(family, ()) and (cell, "attack") not in there:
            todo += attack_stages(folder, preset, cell)
        if todo:
            out += base_stages(folder, preset, cell) + todo
    return out
