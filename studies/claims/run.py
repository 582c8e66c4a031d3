"""Carries the plan out: runs what has not been run, and chooses the learning rates in between."""
import json
from dataclasses import replace
from pathlib import Path

from studies import pool
from studies.claims import map as the_map
from studies.claims import plan
from studies.claims.results import collect_cell, collect_grid, collect_map_grid, read
from support.common import show, write_text


def chosen(grid, where):
    rates, _ = plan.choose(grid)
    each = ", ".join(f"{arm} {rate}" for arm, rate in rates.items())
    show(f"learning rates, chosen on the validation split {where}: {each}")
    return rates


def grid_stages(folder, preset):
    """What chooses the learning rates, of the cells and of the map's second reading."""
    grid = plan.grid_of(preset)
    return [*plan.first_stages(folder, grid), *the_map.grid_stages(folder, preset)]


def seed_stages(folder, preset, seeds, rates, second):
    """Everything on these seeds with the chosen learning rates, two seeds after two."""
    stages = []
    for i in range(0, len(seeds), 2):
        part = plan.part_of(preset, seeds[i:i + 2])
        stages += [*plan.first_stages(folder, part), *plan.second_stages(folder, part, rates),
                   *the_map.stages(folder, part, rates, second)]
    return [stage for stage in stages if stage]


def run(name, before=None):
    """Runs the study of a preset, or goes on with it. Returns its folder.

    before: the results of earlier sittings; their seeds and learning rates are not run again.
    """
    preset, folder, at_once = plan.PRESETS[name], f"out/study-claims-{name}", pool.places()
    seeds = tuple(seed for seed in preset.seeds
                  if not before or f"llama-{seed}" not in before["cells"])
    first = [] if before else grid_stages(folder, preset)
    guess = dict.fromkeys(plan.ARMS, preset.rates[-1])      # not chosen yet
    later = pool.seconds_of(seed_stages(folder, preset, seeds, guess, guess))
    show(f"== the study claims: {at_once} commands at a time, in {folder}/; a line for each; in "
         f"all about {(pool.seconds_of(first) + later) / 3600:.1f} hours of a core")
    pool.run_stages(first, at_once, folder, later)
    rates = chosen(before["grid"] if before else collect_grid(folder),
                   "at the pairs and updates of the cells")
    second = chosen(before["map"]["grid"] if before else collect_map_grid(folder),
                    "at the map's second reading")
    pool.run_stages(seed_stages(folder, preset, seeds, rates, second), at_once, folder)
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
