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


def parts_of(preset, folder):
    """The four parts of the study, for their estimates: the learning rates are not chosen yet."""
    guess = dict.fromkeys(plan.ARMS, preset.rates[-1])
    return [plan.first_stages(folder, preset), plan.second_stages(folder, preset, guess),
            the_map.first_stages(folder, preset, guess),
            the_map.second_stages(folder, preset, guess)]


def run(name):
    """Runs the study of a preset, or goes on with it. Returns its folder."""
    preset, folder, at_once = plan.PRESETS[name], f"out/study-claims-{name}", pool.places()
    each = [pool.seconds_of(stages) for stages in parts_of(preset, folder)]
    show(f"== the study claims: {at_once} commands at a time, in {folder}/; a line for each; in "
         f"all about {sum(each) / 3600:.1f} hours of a core")
    pool.run_stages(plan.first_stages(folder, preset), at_once, folder, sum(each[1:]))
    rates = chosen(collect_grid(folder), "at the pairs and updates of the cells")
    pool.run_stages(plan.second_stages(folder, preset, rates), at_once, folder, sum(each[2:]))
    pool.run_stages(the_map.first_stages(folder, preset, rates), at_once, folder, each[3])
    second = chosen(collect_map_grid(folder), "at the map's second reading")
    pool.run_stages(the_map.second_stages(folder, preset, second), at_once, folder)
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
