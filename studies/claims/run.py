"""Carries the plan out: runs what has not been run, and chooses the learning rates in between."""
import json
from dataclasses import replace
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


def seed_stages(folder, preset, seeds, rates, second, together=1):
    """Everything on these seeds with the chosen learning rates, so many of them at a time."""
    stages = []
    for at in range(0, len(seeds), together):
        part = plan.part_of(preset, tuple(seeds[at:at + together]))
        stages += [*plan.first_stages(folder, part), *plan.second_stages(folder, part, rates),
                   *the_map.stages(folder, part, rates, second)]
    return [stage for stage in stages if stage]


def lacks(found, preset, seed):
    """Whether something of this seed is not among these results."""
    name, wanted = f"llama-{seed}", []
    if seed in preset.map_seeds:
        wanted = [*the_map.first_reading(preset, {}), *the_map.second_reading(preset, {})]
    there = [place_of(point) for point in found["map"].get("points", ()) if name in point["cells"]]
    return name not in found["cells"] or any(point.place not in there for point in wanted)


def run(name, before=None, only=None):
    """Runs the study of a preset, or goes on with it. Returns its folder.

    before: the results of earlier sittings; what they hold is not run again. only: some seeds.
    """
    preset, folder, at_once = plan.PRESETS[name], f"out/study-claims-{name}", pool.places()
    found = before or NOTHING
    seeds = [seed for seed in only or preset.seeds if lacks(found, preset, seed)]
    first = grid_stages(folder, preset, found)
    guess = dict.fromkeys(ARMS, preset.rates[-1])      # not chosen yet
    later = pool.seconds_of(seed_stages(folder, preset, seeds, guess, guess))
    show(f"== the study claims: {at_once} commands at a time, in {folder}/; a line for each; in "
         f"all about {(pool.seconds_of(first) + later) / 3600:.1f} hours of a core")
    pool.run_stages(first, at_once, folder, later)
    grid, grid_of_map, _ = collect_tries(folder, before)
    rates = chosen(grid, "at the pairs and updates of the cells")
    second = chosen(grid_of_map, "at the map's second reading")
    stages = seed_stages(folder, preset, seeds, rates, second, max(1, at_once // 4))
    pool.run_stages(stages, at_once, folder)
    return folder


def run_cell(family, seed, name):
    """Everything on one base model, with the learning rates that the committed study chose."""
    rates, _ = plan.choose(read(Path(__file__).parent / "results.json")["grid"])
    preset = replace(plan.PRESETS[name], seeds=(), more_seeds=(), grid_seeds=())
    if family == "llama":
        preset = replace(preset, seeds=(seed,))
    else:
        preset = replace(preset, more_seeds=(seed,), others=(family,))
    folder = f"out/cell-claims-{name}"
    stages = plan.first_stages(folder, preset)[:2] + plan.second_stages(folder, preset, rates)
    pool.run_stages(stages, 1, folder)
    path = Path(folder) / f"{family}-{seed}/results.json"
    write_text(path, json.dumps(collect_cell(path), indent=1) + "\n")
    show(f"written to {path}")
