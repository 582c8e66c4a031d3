"""What the commands of the study have written, put together as results.json."""
import json
import re
from pathlib import Path
from statistics import mean

from model import load_checkpoint
from studies.claims.attack import attacks_on, rounded, same_means, strongest
from studies.claims.map import file_of, first_reading, second_reading
from studies.claims.plan import LEARNT, PRESETS, cells_of, choose, value_of
from studies.claims.pool_attack import most_told
from studies.study import joined
from support.common import UserError, read_json, read_text
from support.run import weights_hash

NOTHING = {"cells": {}, "grid": {}, "map": {"grid": {}}}    # measured by earlier sittings


def read(path):
    return read_json(path, "delete it and give the same command again", parse_float=rounded)


def without_curves(runs):
    for figures in runs.values():
        for figure in figures.values():
            figure.pop("curve", None)                       # not reported, most of the file
    return runs


def collect_tries(folder, before=None):
    """The cells on which all learning rates were tried, here or in earlier sittings.

    Returns {cell: {split: runs}} of the study, the same of the map's second reading (validation
    alone), and where these were measured here.
    """
    found = before or NOTHING
    grid, of_map, origins = dict(found["grid"]), dict(found["map"]["grid"]), []
    for cell in sorted(Path(folder).glob("llama-*")):
        tables = {split: cell / f"grid/{split}/results.json" for split in ("val", "test")}
        second = {"val": cell / "map/grid/results.json"}
        for where, files in ((grid, tables), (of_map, second)):
            if all(file.exists() for file in files.values()):
                each = {split: read(file) for split, file in files.items()}
                where[cell.name] = {split: without_curves(table["runs"])
                                    for split, table in each.items()}
                origins += [table["about"] for table in each.values()]
    return grid, of_map, origins


def collect_pool(path, weights):
    """The pool of a cell. Raises UserError if it was tried on other checkpoints than these."""
    pool = read(path)
    if pool["weights"] != weights:
        raise UserError(f"{path} is about checkpoints that have been trained again since: delete "
                        "it, and its line in the file `done`, and give the same command again")
    return pool


def collect_cell(path):
    """The results of one cell. The figures of its attackers and its pool are added to its runs."""
    cell, found, weights = read(path), {}, {}
    for name in cell["runs"]:
        folder = path.parent / name
        if (folder / "model.safetensors").exists():
            of_folder = weights_hash(load_checkpoint(folder))
            attacks = attacks_on(folder, of_folder)
            if attacks:
                found[name], weights[name] = attacks, of_folder
    same_means(found)
    cell["attacks"] = {}
    for name, attacks in found.items():
        best = strongest(attacks)
        cell["runs"][name].update(best["figures"])
        cell["attacks"][name] = {"success": best["success"], "prompts": best["prompts"],
                                 "queries": best["queries"],
                                 "curves": [attack["success"] for attack in attacks]}
    pool = collect_pool(path.parent / "pool.json", weights)
    for name, figures in pool["figures"].items():
        cell["runs"][name].update(figures)
    cell["pool"] = {name: pool[name] for name in ("candidates", "pool", "matrix")}
    in_pool = {prompt for prompt, _ in pool["pool"]}
    cell["pool"]["origins"] = {name: len(in_pool.intersection(most_told(attacks)))
                               for name, attacks in found.items()}
    for name, value in transfer(pool["matrix"]).items():
        cell["runs"][name]["jailbreak_transfer"] = {"value": value}
    return cell


def transfer(matrix):
    """What the attackers of all other targets get from each: the mean of their shares."""
    return {name: mean(row[name] for other, row in matrix.items() if other != name)
            for name in matrix}


def with_sums(runs):
    """The runs with what the map's figure shows: failures left, a mean of three, and capabilities
    lost."""
    base = sum(runs["base"][name]["value"] for name in LEARNT)
    found = {}
    for run, figures in runs.items():
        value = {name: figure["value"] for name, figure in figures.items()}
        left = value["sycophancy"] + value["jailbreak_static"] + 1 - value["safety_awareness"]
        lost = base - sum(value[name] for name in LEARNT)
        found[run] = {**figures, "failures_left": {"value": left / 3},
                      "capabilities_lost": {"value": lost / 3}}
    return found


def collect_points(folder, preset, rates, second):
    """What was measured at each point of the map: its cells, llama-0 and so on, and their runs.
    rates, second: those of its two readings.

    `passes`: how often an offline run goes over each of its responses. Also returns where the
    points were measured.
    """
    found, origins, batch = [], [], value_of("--batch", preset.runs.split())
    for point in (*first_reading(preset, rates), *second_reading(preset, second)):
        cells = {}
        for seed in preset.map_seeds:
            path = Path(folder) / f"llama-{seed}" / file_of(point)
            if path.exists():
                measured = read(path)
                cells[f"llama-{seed}"] = {"runs": with_sums(measured["runs"])}
                origins.append(measured["about"])
        found.append({"pairs": point.pairs, "updates": point.updates, "second": point.second,
                      "passes": batch * point.updates / point.pairs, "rates": point.rates,
                      "cells": cells})
    return found, origins


def core_hours(folder):
    """Cell -> kind of command -> hours of a core that it took, measured. What a later sitting does
    again counts once."""
    hours = {}
    for line in read_text(Path(folder) / "seconds.jsonl", "run the study").splitlines():
        command = json.loads(line)
        of_cell = hours.setdefault(command["name"].split("/")[0], {})
        kind = kind_of(command["name"])
        of_cell[kind] = round(of_cell.get(kind, 0) + command["seconds"] / 3600, 5)
    return hours


def kind_of(name):
    """What a command of the plan is for: llama-0/map/12x60/sft@6e-4 is for the "map at 12x60"."""
    name = name.split("/", 1)[1]
    if name.startswith(("map/", "measure-")) or "map/grid" in name:
        point = re.search(r"\d+x\d+", name)
        return f"map at {point[0]}" if point else "map"
    if "grid/" in name:
        return "learning rates"
    if "attacker" in name or name == "pool":
        return "attackers and pool"
    return "worlds and base models" if name in ("world", "base") else "runs and their tables"


def whole_cells(folder, preset):
    """Name -> path of the results of each cell that is measured. A pool is written down before it
    is tried: its matrix comes at the end."""
    cells = {}
    for family, seed in cells_of(preset):
        cell = Path(folder) / f"{family}-{seed}"
        pool = cell / "pool.json"
        if (cell / "results.json").exists() and pool.exists() and "matrix" in read(pool):
            cells[cell.name] = cell / "results.json"
    return cells


def collect(folder, before=None):
    """Everything measured: {"cells", "grid", "map", "about"}; after a first sitting there may be no
    cells yet. before: the results of earlier sittings, which are added."""
    name = Path(folder).name.removeprefix("study-claims-")
    if name not in PRESETS:
        raise UserError(f"{folder}: not the name of a folder of this study, "
                        "out/study-claims-PRESET")
    preset = PRESETS[name]
    grid, second, origins = collect_tries(folder, before)
    points, cells = [], {}
    if grid and second:
        points, of_points = collect_points(folder, preset, choose(grid)[0], choose(second)[0])
        cells = {cell: collect_cell(path) for cell, path in whole_cells(folder, preset).items()}
        origins += [cell["about"] for cell in cells.values()] + of_points
    if not origins:
        raise UserError(f"{folder} holds nothing measured: run `bash train.sh study claims {name}`")
    about = {**origin_of(origins), "command": f"bash train.sh study claims {name}",
             "core_hours": core_hours(folder)}
    study = {"cells": cells, "grid": grid, "map": {"grid": second, "points": points},
             "about": about, "transcripts": transcripts_of(folder) if "llama-0" in cells else None}
    study = with_earlier(study, before) if before else study
    study["map"]["points"] = [point for point in study["map"]["points"] if point["cells"]]
    return study


def transcripts_of(folder):
    """The example responses of the first cell, a block of Markdown."""
    return "```" + (Path(folder) / "llama-0/results.md").read_text().split("```")[1] + "```\n"


def origin_of(abouts):
    """When, where and by what code: the values of all of these."""
    return joined([{key: about[key] for key in ("date", "machine", "torch", "commit")}
                   for about in abouts])


def with_earlier(study, before):
    """A study with the seeds of earlier sittings."""
    study["cells"] = dict(sorted({**before["cells"], **study["cells"]}.items()))
    earlier = {place_of(point): point["cells"] for point in before["map"]["points"]}
    for point in study["map"]["points"]:
        point["cells"] = {**earlier.get(place_of(point), {}), **point["cells"]}
    hours = study["about"]["core_hours"]
    for cell, kinds in before["about"]["core_hours"].items():
        hours[cell] = {**kinds, **hours.get(cell, {})}
    study["about"] |= origin_of([before["about"], study["about"]])
    study["transcripts"] = study.get("transcripts") or before.get("transcripts")
    return study


def place_of(point):
    """What tells a point of the map from the others."""
    return point["pairs"], point["updates"], point["second"]
