"""The map: at how many pairs and updates does which arm break what?

A point is a number of pairs and a number of updates. Each is trained anew: the learning rate of a
run falls to zero at its last update, so a longer run on its way is no finished shorter one. The
cells share their worlds, base models and, at the first point, their runs with the rest of the
study. A world with fewer pairs is the same world; its pairs of failures are the first ones.

First reading: all points with the learning rates of the study, which were chosen at the point of
the cells. Second reading: some points, with learning rates that were chosen at one of them, by the
same rule, on the validation split.
"""
from dataclasses import dataclass
from pathlib import Path

from studies.claims.plan import compare, consistency, python
from studies.study import ARMS


@dataclass
class Point:
    """A place on the map, with one learning rate for each arm."""
    flag: int               # --pairs of data.py
    updates: int
    rates: dict
    second: bool = False    # reading

    @property
    def pairs(self):
        """Of the three axes, with a failure and without."""
        return 3 * (self.flag + self.flag // 2)

    @property
    def name(self):
        return f"{self.pairs}x{self.updates}"

    @property
    def place(self):
        """What tells it from the others, as `place_of` of results.py gives it once measured."""
        return self.pairs, self.updates, self.second


def first_reading(preset, rates):
    return [Point(flag, updates, rates) for flag, updates in preset.map_points]


def second_reading(preset, rates):
    return [Point(*place, rates, second=True) for place in preset.map_again]


def world_of(preset, point):
    """Of a cell: that of its pairs."""
    return "world" if point.flag == preset.own[0] else f"map/world-{point.pairs}"


def run_of(preset, point, arm, rate):
    """The folder of a run in its cell. What the study has trained anyway is not trained again."""
    if (point.flag, point.updates) == preset.own:
        return arm
    return f"map/{point.name}/{arm}@{rate}"


# --- Commands --------------------------------------------------------------------------------

def make_world(folder, preset, seed, point):
    name = f"llama-{seed}/{world_of(preset, point)}"
    text = f"data.py --out {folder}/{name} --seed {seed} {preset.world} --pairs {point.flag}"
    return python(preset.cost["world"], name, text)


def train(folder, preset, seed, point, arm, rate):
    at = f"{folder}/llama-{seed}/{world_of(preset, point)}"
    more = f"--pairs {at}/train.jsonl --steps {point.updates}"
    if (point.flag, point.updates) == preset.own:
        more = ""                                           # the very command of the study
    return consistency(folder, ("llama", seed), run_of(preset, point, arm, rate), arm, rate,
                       preset, more)


def measure(folder, preset, seed, point):
    at = f"{folder}/llama-{seed}"
    runs = " ".join(f"{at}/{run_of(preset, point, arm, point.rates[arm])}" for arm in ARMS)
    text = (f"-m studies.claims.memory {at}/base {runs} --world {at}/{world_of(preset, point)} "
            f"--out {at}/{file_of(point)} --tries {preset.map_tries} --seed {seed}")
    return python(preset.cost["point"], f"llama-{seed}/measure-{Path(file_of(point)).stem}", text)


def file_of(point):
    return f"map/{point.name}{'-second' * point.second}.json"


def grid_stages(folder, preset):
    """The learning rates of the second reading: every arm at every rate, on validation."""
    worlds, runs, tables, second = [], [], [], Point(*preset.map_second, {})
    tried = [(arm, rate) for rate in preset.map_rates for arm in ARMS]
    for seed in preset.grid_seeds:
        if world_of(preset, second) != "world":
            worlds.append(make_world(folder, preset, seed, second))
        runs += [train(folder, preset, seed, second, arm, rate) for arm, rate in tried]
        names = [run_of(preset, second, arm, rate) for arm, rate in tried]
        tables.append(compare(folder, ("llama", seed), "map/grid", names, "val", preset))
    return [worlds, runs, tables]


def stages(folder, preset, rates, second):
    """All points: worlds with fewer pairs, then point after point its runs, beside them what is
    measured at the point before. Runs that the preset's cells have anyway are left to them.

    rates, second: the learning rates of the first and of the second reading.
    """
    worlds, stages, tables = [], [], []
    for point in (*first_reading(preset, rates), *second_reading(preset, second)):
        stages.append(tables)
        tables = [measure(folder, preset, seed, point) for seed in preset.map_seeds]
        for seed in preset.map_seeds:
            if world_of(preset, point) != "world":
                worlds.append(make_world(folder, preset, seed, point))
            if (point.flag, point.updates) != preset.own or seed not in preset.seeds:
                stages[-1] = stages[-1] + [train(folder, preset, seed, point, arm,
                                                 point.rates[arm]) for arm in ARMS]
    return once([worlds, *stages, tables])


def once(stages):
    """The stages without repetitions: points share worlds, and the two readings some runs."""
    seen, out = set(), []
    for stage in stages:
        out.append([])
        for command in stage:
            if command[1] not in seen:
                out[-1].append(command)
                seen.add(command[1])
    return out
