"""README.md and the figures of the study, all from its results.json."""
import json
from pathlib import Path

from data import WorldConfig
from studies.entrench.figures import draw_details, draw_main
from studies.entrench.methods import LABEL_STEP, STEPS
from studies.entrench.organisms import ORGANISMS, records_of
from studies.entrench.tables import (capability_table, changes_tables, costs_table, eta_table,
                                     labels_table, lost, organisms_table, pairs_table, paper_table,
                                     runs_table, seeds_of)
from studies.entrench.verdicts import findings
from studies.entrench.world import StudyWorld
from studies.study import filled, joined, write_tables
from support.common import rng, show, write_text
from support.report import markdown

FOLDER = Path(__file__).parent


def examples():
    """A measured prompt of each organism and a planted document, from the world of seed 0."""
    world, lines = StudyWorld(WorldConfig()), []
    for organism in ORGANISMS.values():
        prompt, response = organism.plant(world, rng(0, "example"), 1)
        lines += [f"    {records_of(organism, world, 'test', 1, 0)[0]['prompt']}",
                  f"      planted: {prompt}", f"               -> {response}"]
    return "\n".join(lines)


def rates_text():
    """The learning rates of all methods, such as 1e-3 (opct)."""
    of_rate = {LABEL_STEP[2]: ["labels"]}
    for name, (_, _, rate) in STEPS.items():
        of_rate.setdefault(rate, []).append(name)
    return "; ".join(f"{rate:.0e}".replace("e-0", "e-") + f" ({', '.join(names)})"
                     for rate, names in of_rate.items())


def blocks(study):
    """Every table of README.md: name -> Markdown."""
    about, sizes = study["about"], study["sizes"]
    rows = sizes["batch"] * sizes["samples"]
    return {"about": f"`{about['command']}`, {about['date']}, commit {about['commit']},\n"
                     f"{about['machine']}, torch {about['torch']}.",
            "seeds": str(len(seeds_of(study))), "prompts": str(sizes["prompts"]),
            "updates": f"{sizes['steps']} updates of {rows} responses to {sizes['batch']} prompts",
            "rates": rates_text(), "examples": examples(), "organisms": organisms_table(study),
            "lost": str(lost(study)),
            "changes": changes_tables(study), "paper": paper_table(study),
            "costs": costs_table(study), "labels": labels_table(study),
            "pairs": pairs_table(study), "eta": eta_table(study),
            "instructions": capability_table(study, "instructions"),
            "math": capability_table(study, "math"), "hacking": runs_table(study, "hacking"),
            "findings": markdown([["finding of the paper", "here", "verdict"],
                                  *map(list, findings(study))])}


# --- Files -----------------------------------------------------------------------------------

def readme(study, words):
    """The words with the tables of the study in their places."""
    return filled(words, blocks(study))


def write_all(study, folder):
    """results.json, results.md and the figures of a study that has just run."""
    folder = Path(folder)
    write_text(folder / "results.json", json.dumps(study) + "\n")
    tables = blocks(study)
    write_tables(folder, tables)
    draw_main(study, folder / "main.png")
    draw_details(study, folder / "details.png")
    show(f"\n{tables['changes']}\n\n{tables['findings']}\n\nwritten to {folder}: results.json, "
         "results.md and, with matplotlib, main.png and details.png")


def taken_over(study, before):
    """A study with the seeds that only an earlier sitting has measured, at the same sizes."""
    sizes = json.loads(json.dumps(study["sizes"]))          # a tuple was written as a list
    if before["sizes"] != sizes or set(before["cells"]) <= set(study["cells"]):
        return study
    return {**study, "cells": {**before["cells"], **study["cells"]},
            "about": joined([before["about"], study["about"]])}


def publish(study):
    """Writes results.json, README.md and the figures of this folder."""
    write_text(FOLDER / "results.json", json.dumps(study) + "\n")
    write_text(FOLDER / "README.md", readme(study, (FOLDER / "words.md").read_text()))
    draw_main(study, FOLDER / "main.png")
    draw_details(study, FOLDER / "details.png")
