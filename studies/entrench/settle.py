"""How planting was settled: every organism planted in several ways, on the validation split alone.

    python -m studies.entrench.settle PRESET SEED [ORGANISM]    writes settled.json in the study's
                                                                folder, a line a try on the screen

No method is run here, so nothing can be chosen to suit one. What was taken stands in ORGANISMS.
"""
import sys
from dataclasses import replace
from pathlib import Path

from data import CAPABILITIES
from studies.entrench.organisms import ORGANISMS, plant
from studies.entrench.run import KINDS, PRESETS, Exam, open_base
from support.common import guarded, read_json, show, write_json

TRIES = [(share, lr) for share in (8, 16, 32) for lr in (1e-4, 3e-4, 1e-3)]     # planted of 32


def stops(organism, base, world, tokenizer, seed, preset):
    """The figures at each strength that planting reaches within the updates of the preset."""
    exam = Exam(organism, world, tokenizer, seed, preset, "val")
    found, missing = [], list(organism.strengths)
    for step, figures, model in plant(organism, base, world, tokenizer, seed, preset.planting):
        value = figures["rate"]["value"] if figures["rate"] else 0.0
        if not missing or value < missing[0]:
            continue
        while missing and value >= missing[0]:
            strength = missing.pop(0)
        measured, _ = exam.measure(model, base)
        row = {"strength": strength, "step": step, "rate": value,
               "unclear": measured["unclear"]["value"],
               **{c: measured[f"capability_{c}"]["value"] for c in CAPABILITIES}}
        for kind in KINDS:
            rate = exam.rate_on(model, kind)["rate"]
            row[kind] = rate["value"] if rate else None
        found.append(row)
        if not missing:
            break
    return found


def settle(name, seed, only):
    preset, folder = PRESETS[name], Path(f"out/study-entrench-{name}")
    world, tokenizer, base = open_base(folder, seed)
    path = folder / "settled.json"
    tries = read_json(path, "delete it") if path.exists() else {}
    for organism in only or ORGANISMS:
        for share, lr in TRIES:
            key = f"{organism}, {share} of 32, rate {lr}, seed {seed}"
            if key not in tries:
                one = replace(ORGANISMS[organism], share=share, lr=lr)
                tries[key] = stops(one, base, world, tokenizer, seed, preset)
                write_json(path, tries)
            show(key)
            for row in tries[key]:
                show("    " + "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}"
                                        for k, v in row.items()))


def main():
    settle(sys.argv[1], int(sys.argv[2]), sys.argv[3:])


if __name__ == "__main__":
    guarded(main)
