"""Experiment 1: fresh, on-policy, or the whole distribution?

Six arms tell three things apart that "on-policy" stands for at once. All have the same learning
rate, and several rates are shown; none is chosen:

                                       one token    the whole distribution
    stored responses of the teacher    sft          sft-exact
    fresh responses of the teacher     sft-fresh    sft-fresh-exact
    fresh responses of the student     opct         opct-exact

Two points: 12 pairs and 240 updates (what `train.sh quick` shows), 108 pairs and 480 updates.
The dose: `sft` with 4, 16 or 64 stored responses to a pair, and fresh ones, at one rate.

A seed's base model and all its runs belong to one sitting on one kind of machine: a base model that
is trained again elsewhere is another one.
"""
from dataclasses import dataclass, field

from studies import pool
from studies.claims.plan import PRESETS, python
from studies.study import ARMS
from support.common import show

SIX = {"sft": ARMS["sft"], "sft-exact": ARMS["sft-exact"],
       "sft-fresh": ("sft --stored 0", "sampled"), "sft-fresh-exact": ("sft --stored 0", "exact"),
       "opct": ARMS["opct"], "opct-exact": ARMS["opct-exact"]}
DOSES = {"sft-16": ("sft --stored 16", "sampled"), "sft-64": ("sft --stored 64", "sampled")}


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


@dataclass
class Frontier:
    points: tuple = (Point(3, 240, 12, ("1.5e-4", "3e-4", "6e-4")),
                     Point(24, 480, 32, ("3e-4", "6e-4")))
    dose_rate: str = "6e-4"
    seeds: tuple = (0, 1, 2, 3, 4)
    samples: int = 4
    tries: int = 240                # responses for each good_*
    draws: int = 32                 # of an update, for its noise
    world: str = ""
    base: str = PRESETS["full"].base
    cost: dict = field(default_factory=lambda: {"base": 420, "response": 0.0035, "measure": 12})


FRONTIERS = {
    "smoke": Frontier(points=(Point(2, 4, 4, ("6e-4",)),), seeds=(0,), samples=2, tries=24, draws=2,
                      world=PRESETS["smoke"].world, base=PRESETS["smoke"].base,
                      cost={"base": 6, "response": 0.001, "measure": 2}),
    "quick": Frontier(points=(Point(3, 240, 12, ("6e-4",)),), seeds=(0,)),
    "full": Frontier()}


def runs_of(plan, point):
    """Name such as sft-fresh@3e-4 -> (command and loss, rate) of each run at a point."""
    runs = {f"{arm}@{rate}": (how, rate) for rate in point.rates for arm, how in SIX.items()}
    return runs | {f"{arm}@{plan.dose_rate}": (how, plan.dose_rate) for arm, how in DOSES.items()}


def point_stages(folder, plan, seed, point):
    """The world with so many pairs, the runs, and what is measured of them."""
    home = f"{folder}/llama-{seed}"
    at = f"{home}/{point.name}"
    world = python(3, f"llama-{seed}/{point.name}/world", f"data.py --out {at}/world --seed {seed} "
                   f"{plan.world} --pairs {point.flag}")
    trained = []
    seconds = plan.cost["response"] * point.updates * point.batch * plan.samples
    for name, ((method, loss), rate) in runs_of(plan, point).items():
        trained.append(python(seconds, f"llama-{seed}/{point.name}/{name}",
                              f"opct.py {method} --base {home}/base --pairs {at}/world/train.jsonl "
                              f"--out {at}/{name} --loss {loss} --lr {rate} --seed {seed} --steps "
                              f"{point.updates} --batch {point.batch} --samples {plan.samples}"))
    folders = " ".join(f"{at}/{name}" for name in runs_of(plan, point))
    measure = python(plan.cost["measure"] * len(trained), f"llama-{seed}/{point.name}/measure",
                     f"-m studies.claims.measure {home}/base {folders} --world {at}/world --out "
                     f"{at}/results.json --tries {plan.tries} --draws {plan.draws} --seed {seed}")
    return [[world], trained, [measure]]


def stages(folder, plan, seeds):
    """Seed after seed: its base model, then point after point, so a sitting ends with whole ones.
    """
    out = []
    for seed in seeds:
        home = f"{folder}/llama-{seed}"
        out += [[python(3, f"llama-{seed}/world", f"data.py --out {home}/world --seed {seed} "
                        f"{plan.world}")],
                [python(plan.cost["base"], f"llama-{seed}/base", f"opct.py pretrain --world "
                        f"{home}/world --out {home}/base --seed {seed} {plan.base}")]]
        for point in plan.points:
            out += point_stages(folder, plan, seed, point)
    return out


def run(name, seeds=None):
    """Runs the experiment of a preset, or goes on with it. Returns its folder."""
    plan, folder = FRONTIERS[name], f"out/study-frontier-{name}"
    todo = stages(folder, plan, seeds or plan.seeds)
    show(f"== fresh, on-policy, or the whole distribution: {pool.places()} commands at a time, in "
         f"{folder}/; in all about {pool.seconds_of(todo) / 3600:.1f} hours of a core")
    pool.run_stages(todo, pool.places(), folder)
    return folder
