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
from pathlib import Path

from studies import pool
from studies.claims.plan import LEARNT, PRESETS, python
from studies.study import ARMS, fill
from support.common import UserError, read_json, show, write_json, write_text
from support.report import markdown

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


# --- Results: frontier.json, point -> seed -> {"about", "runs": run -> figures} ----------------

HERE = Path(__file__).parent
RESULTS = HERE / "frontier.json"
# What the main README shows of `bash train.sh quick`, which stands at a point of the experiment.
QUICK_POINT, QUICK_RATE = "12x240", "6e-4"
QUICK_FIGURES = {"failures left": "failures_left", "capabilities lost": "capabilities",
                 "harmless refused": "over_refusal", "drift": "drift_kl"}


def rounded(figures):
    """The same figures with four significant digits."""
    return {name: rounded(value) if isinstance(value, dict) else float(f"{value:.4g}")
            for name, value in figures.items()}


def take_over(folder):
    """Adds what a folder has measured to frontier.json. Raises UserError: nothing is there."""
    study = read_json(RESULTS, "get it from git again") if RESULTS.exists() else {}
    paths = sorted(Path(folder).glob("llama-*/*x*/results.json"))
    if not paths:
        raise UserError(f"{folder} holds nothing measured of experiment 1")
    for path in paths:
        found = read_json(path, "delete it and give the same command again")
        about = {name: found["about"][name] for name in ("date", "machine", "torch", "commit")}
        cell = {"about": about, "runs": rounded(found["runs"])}
        study.setdefault(path.parent.name, {})[path.parent.parent.name] = cell
    write_json(RESULTS, study)


def with_sums(runs):
    """Runs with failures left, a mean of three, and with what was lost of three capabilities."""
    base, out = sum(runs["base"][name] for name in LEARNT), {}
    for name, run in runs.items():
        left = run["sycophancy"] + run["jailbreak_static"] + 1 - run["safety_awareness"]
        lost = base - sum(run[metric] for metric in LEARNT)
        out[name] = {**run, "failures_left": left / 3, "capabilities_lost": lost / 3}
    return out


def quick_table(seeds):
    """What to expect of `bash train.sh quick`: the mean over seeds, and the least and the most.

    seeds: the runs of each seed, name -> figures, as `eval.py compare` writes them.
    """
    lines = [["lower is better", *QUICK_FIGURES]]
    for name in seeds[0]:
        line = [name]
        for metric in QUICK_FIGURES.values():
            values = [runs[name][metric]["value"] for runs in seeds]
            if metric == "capabilities":
                values = [runs["base"][metric]["value"] - value
                          for runs, value in zip(seeds, values)]
            scale = 1000 if metric == "drift_kl" else 100
            mean = scale * sum(values) / len(values)
            line.append(f"{mean:.1f} ({scale * min(values):.1f}-{scale * max(values):.1f})")
        lines.append(line)
    return (f"Mean (least-most) of {len(seeds)} seeds, in percent; drift in thousandths of a nat:"
            f"\n\n{markdown(lines)}")


def publish():
    """Writes the table of the main README."""
    path = HERE.parent.parent / "README.md"
    seeds = [read_json(file, "get it from git again")["runs"]
             for file in sorted((HERE / "quick").glob("seed-*.json"))]
    write_text(path, fill(path.read_text(), "quick", quick_table(seeds)))
