"""Carries the plan out: runs what has not been run, and chooses the learning rates in between."""
import json
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from studies import pool
from studies.claims import map as the_map
from studies.claims import plan
from studies.claims.results import NOTHING, collect_cell, collect_tries, place_of, read
from studies.study import ARMS
from support.common import show, write_text


def chosen(grid, where):
    rates, _ = plan.choose(grid)
    each = ", ".join(f"{arm} {rate}" for arm, rate in rates.items())
    show(f"learning rates, chosen on the validation split {where}: {each}")
    return rates


def grid_stages(folder, preset, found=NOTHING):
    """The tries of learning rates that are not found, seed by seed: those of the cells, then those
    of the map's second reading."""
    stages = []
    of_cells, of_map = ([seed for seed in preset.grid_seeds if f"llama-{seed}" not in tried]
                        for tried in (found["grid"], found["map"]["grid"]))
    for seed in of_cells:
        stages += plan.first_stages(folder, plan.grid_of(preset, seed))
    for seed in of_map:
        part = plan.grid_of(preset, seed)
        if seed not in of_cells:
            stages += plan.first_stages(folder, part)[:2]   # its world and base model
        stages += the_map.grid_stages(folder, part)
    return stages


def seed_stages(folder, parts, rates, second, together=1):
    """Everything in these parts with the chosen learning rates, so many parts at a time."""
    stages = []
    for at in range(0, len(parts), together):
        each = [[*plan.first_stages(folder, part), *plan.second_stages(folder, part, rates),
                 *the_map.stages(folder, part, rates, second)] for part in parts[at:at + together]]
        stages += [sum(beside, []) for beside in zip_longest(*each, fillvalue=[])]
    return [stage for stage in stages if stage]


def left_of(preset, seed, found=NOTHING):
    """The part of a study that is about this seed and not among the results that are found. Its
    learning rates are chosen already."""
    name, points = f"llama-{seed}", found["map"].get("points", ())
    there = {place_of(point) for point in points if name in point["cells"]}
    first, again = ([(point.flag, point.updates) for point in reading if point.place not in there]
                    for reading in (the_map.first_reading(preset, {}),
                                    the_map.second_reading(preset, {})))
    others = [family for family in preset.others if f"{family}-{seed}" not in found["cells"]]
    return replace(preset, seeds=() if name in found["cells"] else (seed,), grid_seeds=(),
                   others=tuple(others), more_seeds=seed_in(preset.more_seeds, seed),
                   map_seeds=seed_in(preset.map_seeds, seed) if first or again else (),
                   map_points=tuple(first), map_again=tuple(again))


def seed_in(seeds, seed):
    return (seed,) if seed in seeds else ()


def run(name, before=None, only=None):
    """Runs the study of a preset, or goes on with it. Returns its folder.

    before: the results of earlier sittings; what they hold is not run again. only: some seeds.
    """
    preset, folder, at_once = plan.PRESETS[name], f"out/study-claims-{name}", pool.places()
    found = before or NOTHING
    parts = [left_of(preset, seed, found) for seed in only or preset.seeds]
    parts = [part for part in parts if plan.bases_of(part)]
    first = grid_stages(folder, preset, found)
    guess = dict.fromkeys(ARMS, preset.rates[-1])      # not chosen yet
    later = pool.seconds_of(seed_stages(folder, parts, guess, guess))
    show(f"== the study claims: {at_once} commands at a time, in {folder}/; a line for each; in "
         f"all about {(pool.seconds_of(first) + later) / 3600:.1f} hours of a core")
    pool.run_stages(first, at_once, folder, later)
    grid, grid_of_map, _ = collect_tries(folder, before)
    rates = chosen(grid, "at the pairs and updates of the cells")
    second = chosen(grid_of_map, "at the map's second reading")
    stages = seed_stages(folder, parts, rates, second, at_once)
    pool.run_stages(stages, at_once, folder)
    return folder


def run_cell(family, seed, name):
    """Everything on one base model, with the learning rates that the committed study chose."""
    rates, _ = plan.choose(read(Path(__file__).parent / "results.json")["grid"])
    preset = replace(plan.PRESETS[name], seeds=(), more_seeds=(), grid_seeds=(), map_seeds=())
    if family == "llama":
        preset = replace(preset, seeds=(seed,))
    else:
        preset = replace(preset, more_seeds=(seed,), others=(family,))
    folder = f"out/cell-claims-{name}"
    stages = plan.first_stages(folder, preset)[:2] + plan.second_stages(folder, preset, rates)
    pool.run_stages(stages, pool.places(), folder)
    path = Path(folder) / f"{family}-{seed}/results.json"
    write_text(path, json.dumps(collect_cell(path), indent=1) + "\n")
    show(f"written to {path}")
