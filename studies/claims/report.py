"""Tables, claims, figures and README.md of the study, all from its results.json."""
import json
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from studies.claims import attack_tables, figures, map_tables
from studies.claims.plan import CONTROLS, choose
from studies.claims.tables import (ATTACKED, HEADLINE, ORDER, families_of, figures_table,
                                   two_tables)
from studies.claims.verdicts import CONTRASTS, claims_tables, differences
from studies.stats import over_seeds
from studies.study import ARMS, committed, filled, write_tables
from support.common import read_json, show, write_text
from support.report import WIDTH, markdown

FOLDER = Path(__file__).parent
BEGUN = FOLDER / "begun.json"
NEW = [f"llama-{seed}" for seed in range(5, 10)]            # of these the first edition saw nothing


def failures_table(grid):
    """mean_failure on validation (and the largest loss) for every learning rate; chosen ones bold.
    """
    rates, scores = choose(grid)
    lines = [["rate", *ARMS]]
    for rate in scores["sft"]:
        cells = []
        for arm in ARMS:
            bold = "**" if rate == rates[arm] else ""
            cells.append(bold + "{:.3f} ({:+.3f})".format(*scores[arm][rate]) + bold)
        lines.append([rate, *cells])
    return markdown(lines)


def drift_table(grid):
    """Drift on test for every learning rate, the chosen ones bold."""
    rates, scores = choose(grid)
    tests = [splits["test"] for splits in grid.values()]
    lines = [["rate", *ARMS]]
    for rate in scores["sft"]:
        cells = []
        for arm in ARMS:
            bold = "**" if rate == rates[arm] else ""
            value = np.mean([test[f"{arm}@{rate}"]["drift_kl"]["value"] for test in tests])
            cells.append(f"{bold}{1000 * value:.1f}{bold}")
        lines.append([rate, *cells])
    return markdown(lines)


def span(runs, metric):
    """The lowest and the highest of the four arms, in per cent: "38 to 58"."""
    values = [100 * runs[arm][metric]["value"] for arm in ARMS]
    return f"{min(values):.0f} to {max(values):.0f}"


def map_blocks(the_map):
    """What words.md says of the map: name -> Markdown."""
    means = map_tables.MEANS
    rates = choose(the_map["grid"])[0]
    return {"map_seeds": map_tables.seeds_of(the_map),
            "map_breaks": map_tables.breaks(the_map),
            "map_verdicts": map_tables.verdicts(the_map),
            "map_memorised": map_tables.by_point(the_map, "memorised", means),
            "map_gap": map_tables.by_point(the_map, "gap", means),
            "map_good": map_tables.generalisation(the_map),
            "map_rates": failures_table(the_map["grid"]),
            "map_chosen": ", ".join(f"{rate} (`{arm}`)" for arm, rate in rates.items())}


def pool_blocks(cells, runs):
    """What words.md says of the pool attack: name -> Markdown."""
    out = {"pool_prompts": attack_tables.pool_prompts(cells[0]),
           "pool_origins": attack_tables.origins_table(cells),
           "pool_sizes": attack_tables.pool_sizes(cells)}
    for name in ("pool", "pool_best_of"):
        out[name] = span(runs, f"jailbreak_{name}")
        out[f"base_{name}"] = f"{100 * runs['base'][f'jailbreak_{name}']['value']:.0f}"
    return out


def hours(about):
    """What the study cost, measured."""
    total = Counter()
    for kinds in about["core_hours"].values():
        for kind, value in kinds.items():
            total[kind.split(" at ")[0]] += value
    each = ", ".join(f"{kind} {value:.1f}" for kind, value in total.items())
    return f"{total.total():.1f} hours of a core ({each})"


def blocks(study):
    """Every table of README.md: name -> Markdown."""
    families = families_of(study)
    main, about = families["llama"], study["about"]
    runs, names = over_seeds(main), list(CONTRASTS)
    shown = (*(name for name in HEADLINE if name not in ATTACKED), "accuracy_biased", "unclear")
    out = {"about": f"`{about['command']}`, {about['date']}, "
                    f"commit {about.get('commit', 'not recorded')}, "
                    f"{about['machine']}, torch {about['torch']}.",
           "seeds": str(len(main)), "study": two_tables(runs, ORDER),
           "differences": f"{differences(main, names[:3])}\n\n{differences(main, names[3:])}",
           "controls": figures_table(runs, ("base", *CONTROLS), shown),
           "rates": failures_table(study["grid"]), "drift": drift_table(study["grid"]),
           "prompts": attack_tables.prompts(main[0]),
           "best_of": span(runs, "jailbreak_best_of"),
           "adaptive_best_of": span(runs, "jailbreak_adaptive_best_of")}
    out |= {"hours": hours(about), **map_blocks(study["map"]), **pool_blocks(main, runs)}
    groups = {"llama": main, "qwen2, qwen3": [], "llama 5-9": []}
    for name, cell in study["cells"].items():
        if not name.startswith("llama"):
            groups["qwen2, qwen3"].append(cell)
        elif name in NEW:
            groups["llama 5-9"].append(cell)
    groups = {name: cells for name, cells in groups.items() if cells}
    out["verdicts"], out["numbers"] = claims_tables(groups)
    out["attacks"], out["successful"] = attack_tables.attacks_tables(families)
    others = groups.get("qwen2, qwen3")
    out["families"] = (two_tables(over_seeds(others), HEADLINE) if others
                       else "Not run with this preset.")
    return out


# --- Files -----------------------------------------------------------------------------------

def readme(study, words):
    """The text with its {names} replaced; a paragraph or list item with one in it is wrapped again.

    Raises UserError if a name is unknown.
    """
    tables = blocks(study)
    parts = re.split(r"(\n\n|\n(?=- |\d\. ))", words)
    for i, part in enumerate(parts):
        text = filled(part, tables)
        if text != part and not re.fullmatch(r"\{\w+\}", part.strip()):
            indent = " " * len(re.match(r"- |\d\. |", part)[0])
            text = textwrap.fill(" ".join(text.split()), WIDTH, subsequent_indent=indent,
                                 break_long_words=False, break_on_hyphens=False)
        parts[i] = text
    return "".join(parts)


def write_results(study, folder, name="results.json"):
    write_text(Path(folder) / name, json.dumps(study) + "\n")


def take_over(study):
    """Into results.json or, as long as it lacks a cell that is there, into begun.json."""
    if set(committed(FOLDER)["cells"]) - set(study["cells"]):
        write_results(study, FOLDER, BEGUN.name)
        show(f"written to {BEGUN.name}: {len(study['cells'])} cells, too few for the page")
        return
    write_results(study, FOLDER)
    BEGUN.unlink(missing_ok=True)


def taken_over():
    """What sittings of full have measured so far."""
    return read_json(BEGUN, "get it from git again") if BEGUN.exists() else committed(FOLDER)


def draw_all(study, folder):
    """The figures, where matplotlib is installed, the tables of the map, and the transcripts."""
    figures.draw_main(study, Path(folder) / "main.png")
    figures.draw_details(study, Path(folder) / "details.png")
    figures.draw_map(study, Path(folder) / "map.png")
    figures.draw_first(study, Path(folder) / "first.png")
    figures.draw_attacks(study, Path(folder) / "attacks.png")
    write_text(Path(folder) / "map.md", map_tables.appendix(study["map"]))
    if study.get("transcripts"):
        write_text(Path(folder) / "transcripts.md", study["transcripts"])


def write_all(study, folder):
    """The files of a study that has just run. Its answers in words are for a person to write."""
    folder = Path(folder)
    write_results(study, folder)
    tables = blocks(study)
    write_tables(folder, tables)
    draw_all(study, folder)
    show(f"\n{tables['study']}\n\n{tables['verdicts']}\n\n{tables['map_breaks']}\n\n"
         f"{tables['hours']}; written to {folder}: results.json, results.md, map.md, "
         "transcripts.md and, with matplotlib, the figures")


def publish():
    """Writes README.md and the figures of this folder."""
    study = committed(FOLDER)
    write_text(FOLDER / "README.md", readme(study, (FOLDER / "words.md").read_text()))
    draw_all(study, FOLDER)
