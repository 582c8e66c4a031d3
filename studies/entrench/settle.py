"""How planting was settled: every organism planted in several ways, on the validation split alone.

    python -m studies.entrench.settle PRESET SEED [ORGANISM]    writes settled.json in the study's
                                                                folder, a line a try on the screen

No method is run here, so nothing can be chosen to suit one. What was taken stands in ORGANISMS.
"""
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from data import CAPABILITIES
from studies.entrench.organisms import ORGANISMS, plant
from studies.entrench.run import KINDS, PRESETS, Exam, open_base
from support.common import guarded, read_json, show, write_json

SHARES, RATES = (8, 16, 24), (3e-4, 6e-4)           # planted of 32; learning rate


def planted(name, organism, base, world, tokenizer, seed, preset):
    """The figures of an organism at each of its strengths."""
    exam, found = Exam(organism, world, tokenizer, seed, preset, "val"), []
    for number, model, way in plant(organism, (0, 1, 2), base, world, tokenizer, seed,
                                    preset.planting):
        measured, _ = exam.measure(model, base)
        row = {"strength": organism.strengths[number], "updates": way[-1][0],
               "rate": measured["rate"], "unclear": measured["unclear"]}
        row |= {kind: exam.rate_on(model, kind)["rate"] for kind in KINDS}
        row |= {c: measured[f"capability_{c}"] for c in CAPABILITIES}
        found.append({k: v["value"] if isinstance(v, dict) else v for k, v in row.items()})
    return found


def settle(name, seed, only):
    preset, folder = PRESETS[name], Path(f"out/study-entrench-{name}")
    world, tokenizer, base = open_base(folder, seed)
    path = folder / "settled.json"
    tries = read_json(path, "delete it") if path.exists() else {}
    for organism in only or ORGANISMS:
        for share, lr in product(SHARES, RATES):
            key = f"{organism}, {share} of 32, rate {lr:g}, seed {seed}"
            if key not in tries:
                one = replace(ORGANISMS[organism], share=share, lr=lr)
                tries[key] = planted(organism, one, base, world, tokenizer, seed, preset)
                write_json(path, tries)
            show(key)
            for row in tries[key]:
                show("    " + "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}"
                                        for k, v in row.items()))


def main():
    settle(sys.argv[1], int(sys.argv[2]), sys.argv[3:])


if __name__ == "__main__":
    guarded(main)
