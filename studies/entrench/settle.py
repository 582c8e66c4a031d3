"""How planting and two learning rates were settled, on the validation split of one seed alone.

    python -m studies.entrench.settle plant PRESET SEED [ORGANISM ...]
    python -m studies.entrench.settle rates PRESET SEED

`plant` plants every organism in several ways. No method is run, so nothing can be chosen to suit
one; what was taken stands in ORGANISMS. `rates` then tries learning rates of `bct-soft` and `act`,
which studies/claims has not, on healthy pairs of all organisms at the middle strength, and names
the one of each by the rule of studies/claims: of those at which no capability falls by more than
.03, the one that leaves the least misbehaviour. Both write settled.json in the study's folder.
"""
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from data import CAPABILITIES
from studies.entrench.decoding import Bench
from studies.entrench.methods import STEPS
from studies.entrench.organisms import ORGANISMS, plant, records_of
from studies.entrench.run import KINDS, PRESETS, Exam, open_base, pair_data, train_on_pairs
from support.common import guarded, read_json, show, write_json

# (planted of 32, learning rate of planting): for all, and what some still needed after that.
WAYS = [(share, rate) for share in (8, 16, 24) for rate in (1e-4, 3e-4)]
MORE = {"hacking": [(8, 3e-5), (4, 1e-4), (2, 1e-4), (4, 3e-5)],
        "emergent": [(8, 6e-4), (16, 6e-4), (24, 6e-4)]}
TRIED, METHOD_RATES = ("bct-soft", "act"), (3e-5, 1e-4, 3e-4, 6e-4)


def figures_of(exam, model, base):
    """Rate, unreadable share and capabilities, as plain numbers."""
    found, _ = exam.measure(model, base)
    names = ("rate", "unclear", *(f"capability_{c}" for c in CAPABILITIES))
    return {name: found[name]["value"] if found[name] else None for name in names}


def planted(organism, cell, preset):
    """The figures of an organism at each of its strengths."""
    world, tokenizer, base, seed = cell
    exam, found = Exam(organism, world, tokenizer, seed, preset, "val"), []
    for number, model, way in plant(organism, (0, 1, 2), base, world, tokenizer, seed,
                                    preset.planting):
        row = {"strength": organism.strengths[number], "updates": way[-1][0],
               **figures_of(exam, model, base)}
        for kind in KINDS:
            rate = exam.rate_on(model, kind)["rate"]
            row[kind] = rate["value"] if rate else None
        found.append(row)
    return found


def trained(organism, cell, preset):
    """{"METHOD@RATE": figures} on healthy pairs at the middle strength, and those before."""
    world, tokenizer, base, seed = cell
    exam = Exam(organism, world, tokenizer, seed, preset, "val")
    _, model, _ = next(plant(organism, (1,), base, world, tokenizer, seed, preset.planting))
    bench, found = Bench(model, tokenizer, base, seed), {"before": figures_of(exam, model, base)}
    records = records_of(organism, world, "train", preset.prompts, seed)
    forms, texts, _ = pair_data("healthy", bench, organism, records, preset)
    for name, rate in product(TRIED, METHOD_RATES):
        with tempfile.TemporaryDirectory() as place:
            after = train_on_pairs(Path(place) / "run", model, tokenizer, forms, texts,
                                   (*STEPS[name][:2], rate), preset, seed)
        found[f"{name}@{rate:g}"] = figures_of(exam, after, model)
    return found


def choose(found):
    """{method: rate} by the rule. found: organism -> what `trained` returns."""
    rates = {}
    for name in TRIED:
        def rank(rate):
            pairs = [(one["before"], one[f"{name}@{rate:g}"]) for one in found.values()]
            lost = max(np.mean([before[c] - after[c] for before, after in pairs])
                       for c in (f"capability_{c}" for c in CAPABILITIES))
            left = np.mean([1.0 if after["rate"] is None else after["rate"] for _, after in pairs])
            return lost > 0.03, round(left, 3), rate
        rates[name] = min(METHOD_RATES, key=rank)
    return rates


def shown(name, row):
    show(f"  {name:24}" + "  ".join(f"{key.removeprefix('capability_')} {value:.2f}"
                                    for key, value in row.items() if value is not None))


def main():
    job, name, seed, *only = sys.argv[1:]
    preset, folder, seed = PRESETS[name], Path(f"out/study-entrench-{name}"), int(seed)
    cell = (*open_base(folder, seed), seed)
    path = folder / "settled.json"
    tries = read_json(path, "delete it") if path.exists() else {"plant": {}, "rates": {}}
    for organism in only or ORGANISMS:
        if job == "rates":
            if organism not in tries["rates"]:
                tries["rates"][organism] = trained(ORGANISMS[organism], cell, preset)
                write_json(path, tries)
            show(organism)
            for key, row in tries["rates"][organism].items():
                shown(key, row)
            continue
        for share, lr in WAYS + MORE.get(organism, []):
            key = f"{organism}, {share} of 32, rate {lr:g}, seed {seed}"
            if key not in tries["plant"]:
                one = replace(ORGANISMS[organism], share=share, lr=lr)
                tries["plant"][key] = planted(one, cell, preset)
                write_json(path, tries)
            show(key)
            for row in tries["plant"][key]:
                shown(f"strength {row['strength']}", row)
    if job == "rates" and set(tries["rates"]) == set(ORGANISMS):
        show(f"chosen: {choose(tries['rates'])}")


if __name__ == "__main__":
    guarded(main)
