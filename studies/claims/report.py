"""README.md, tables.md and the figures of the study, and the table of quick in the main README."""
import json
from pathlib import Path

from studies.claims import figures
from studies.claims.results import FILE, NOTHING
from studies.claims.tables import all_tables, page_tables
from studies.study import committed, fill, filled, joined
from support.common import read_json, show, write_text
from support.report import markdown, pyplot

FOLDER = Path(__file__).parent
# What the main README shows of `bash train.sh quick`.
QUICK_FIGURES = {"failures left": "failures_left", "capabilities lost": "capabilities",
                 "harmless refused": "over_refusal", "drift": "drift_kl"}


def taken_over():
    """The committed results."""
    return committed(FOLDER) if FILE.exists() else NOTHING


def origins(study):
    """Where the numbers come from: a sentence an experiment."""
    parts = {"Experiment 1": [cell["about"] for cells in study["frontier"].values()
                              for cell in cells.values()],
             "experiment 2": [cell["about"] for cell in study["attack"].values()]}
    each = []
    for name, abouts in parts.items():
        if abouts:
            about = joined(abouts)
            each.append(f"{name}: commit {about['commit']}, {about['date']}, {about['machine']}, "
                        f"torch {about['torch']}")
    return "; ".join(each) + "."


def readme(study, words):
    """The words with the tables of the study in their places."""
    return filled(words, page_tables(study) | {"about": origins(study)})


def appendix(study):
    """tables.md."""
    parts = [f"# All tables of the study\n\nMade from results.json. {origins(study)} Means over "
             "cells with 95 % intervals (Student's t); the figures are explained in "
             "[eval.py](../../eval.py) and [measure.py](measure.py)."]
    parts += [f"## {title}\n\n{table}" for title, table in all_tables(study).items()]
    return "\n\n".join(parts) + "\n"


def write_all(study, folder):
    """What a run of the study leaves in its folder. The answers in words are for a person."""
    folder = Path(folder)
    write_text(folder / "results.json", json.dumps(study) + "\n")
    write_text(folder / "tables.md", appendix(study))
    plt = pyplot()
    if plt:
        figures.draw_first(plt, study, folder / "first.png")
        figures.draw_attacks(plt, study, folder / "attacks.png")


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


def publish(study):
    """Writes everything that is committed: results, tables, figures and pages."""
    write_all(study, FOLDER)
    write_text(FOLDER / "README.md", readme(study, (FOLDER / "words.md").read_text()))
    main = FOLDER.parent.parent / "README.md"
    seeds = [read_json(path, "get it from git again")["runs"]
             for path in sorted((FOLDER / "quick").glob("seed-*.json"))]
    write_text(main, fill(main.read_text(), "quick", quick_table(seeds)))
    show(f"written: README.md, tables.md, results.json and the figures of {FOLDER.name}, and the "
         "table of quick in the main README")
