"""Tables and verdicts of the study, in Markdown, all from its results.json."""
import re

import numpy as np

from studies.claims.plan import CONTROLS, DOSES, RATES, SIX, TARGETS
from studies.claims.results import LEARNT, with_sums
from studies.stats import mean_over_seeds, verdict
from support.report import markdown

FEW, MANY, RATE = "12x240", "108x480", "6e-4"       # the points, and the rate of the page's tables
TITLE = {FEW: "12 pairs, 240 updates", MANY: "108 pairs, 480 updates"}
SCALES = {"drift_kl": (1000, 1), "memorised": (1000, 0)}   # nats in thousandths, and digits
HEAD = ("failures_left", "capabilities_lost", "over_refusal", "drift_kl", "memorised", "gap")
MORE = {"what was fixed": ("sycophancy", "jailbreak_static", "safety_awareness",
                           "accuracy_biased", "accuracy_right_hint", "bias_reliance"),
        "what was broken, and what carries over": (*LEARNT, "good_wordings", "good_entities",
                                                   "over_warning")}
ATTACK = ("sycophancy", "accuracy_biased", "accuracy_right_hint",
          "jailbreak_static", "defended_random", "defended_own", "defended_pool",
          "jailbreak_adaptive", "jailbreak_pool", "jailbreak_transfer",
          "over_refusal", "safety_awareness", "over_warning", *LEARNT, "drift_kl", "unclear")
SHORT = {"failures_left": "left", "capabilities_lost": "lost", "over_refusal": "refused",
         "drift_kl": "drift", "jailbreak_static": "jailbreak", "safety_awareness": "warns",
         "accuracy_biased": "wrong hint", "accuracy_right_hint": "right hint",
         "bias_reliance": "swayed", "capability_math": "math", "capability_facts": "facts",
         "capability_instructions": "instructed", "good_wordings": "wordings",
         "good_entities": "entities", "over_warning": "overwarns"}
# Differences at equal rates: the first is primary, the next two are secondary.
CONTRASTS = (("sft-fresh", "sft"), ("opct", "sft-fresh"), ("opct-exact", "sft-fresh-exact"),
             ("opct", "sft"), ("opct-exact", "sft-exact"))


def text_of(metric, figure, sign=""):
    """.123±.020, or .123 with one seed, or - if there is no figure."""
    if not figure:
        return "-"
    scale, digits = SCALES.get(metric, (1, 3))
    text = f"{scale * figure['value']:{sign}.{digits}f}"
    if "half" in figure:
        text += f"±{scale * figure['half']:.{digits}f}"
    return re.sub(r"\b0\.", ".", text) if digits == 3 else text


def over_seeds(cells, run, metric):
    """The mean over cells of one figure of a run; None if one of them lacks it."""
    values = [cell["runs"].get(run, {}).get(metric) for cell in cells]
    return None if None in values or not values else mean_over_seeds(values)


def difference(cells, metric, weights):
    """The weighted sum of the runs' figures, cell by cell, then the mean over cells.

    The runs of a cell share base model, pairs and random numbers, so their difference varies less
    than each of them. None if a cell lacks one of the figures.
    """
    values = []
    for cell in cells:
        if any(metric not in cell["runs"].get(name, {}) for name in weights):
            return None
        values.append(sum(w * cell["runs"][name][metric] for name, w in weights.items()))
    return mean_over_seeds(values) if values else None


def figures_table(cells, runs, metrics, across=True):
    """A line a run and a column a figure; with across=False a line a figure and a column a run."""
    lines = [["", *((SHORT.get(metric, metric) if across else metric) for metric in metrics)]]
    for name in runs:
        found = [over_seeds(cells, name, metric) for metric in metrics]
        if any(found):
            lines.append([name, *map(text_of, metrics, found)])
    return markdown(lines if across else [list(line) for line in zip(*lines)])


# --- Experiment 1: the frontier ----------------------------------------------------------------

def cells_at(study, point):
    """The cells of a point, with their sums."""
    return [{"runs": with_sums(cell["runs"])} for cell in study["frontier"][point].values()]


def noise_table(study):
    """Noise and size of an update's gradient, by arm: at agreement, and at the end of a run."""
    lines = [["noise / size", "agreement", *(f"end of {point}" for point in study["frontier"])]]
    for arm in SIX:
        same = arm.replace("-fresh", "")                    # one update, whether stored or fresh
        each = [[cell["runs"]["base"]["gradient"][same]
                 for cell in study["frontier"][FEW].values()]]
        for cells in study["frontier"].values():
            each.append([cell["runs"][f"{arm}@{RATE}"]["gradient"] for cell in cells.values()])
        line = [arm, *(" / ".join(f"{np.mean([one[key] for one in found]):.2f}"
                                  for key in ("noise", "size")) for found in each)]
        lines.append(line)
    return markdown(lines)


def contrasts_table(cells):
    """Paired differences of arms at equal rates, for every rate."""
    lines = [["", "rate", *(SHORT[metric] for metric in HEAD[:4])]]
    rates = dict.fromkeys(name.split("@")[1] for name in cells[0]["runs"] if "@" in name)
    for one, other in CONTRASTS:
        for rate in rates:
            weights = {f"{one}@{rate}": 1, f"{other}@{rate}": -1}
            found = [difference(cells, metric, weights) for metric in HEAD[:4]]
            if any(found):
                lines.append([f"{one} - {other}", rate,
                              *(text_of(metric, figure, "+") for metric, figure in
                                zip(HEAD[:4], found))])
    return markdown(lines)


def harm_gone(cells, metric):
    """The share of sft's harm that fresh responses of the teacher take away; None: no harm."""
    base, stored, fresh = (over_seeds(cells, name, metric)["value"]
                           for name in ("base", f"sft@{RATE}", f"sft-fresh@{RATE}"))
    return (stored - fresh) / (stored - base) if stored > base else None


def cause(share):
    """The word that was fixed beforehand for this share of the harm."""
    return "reuse" if share >= 0.8 else "noise" if share <= 0.2 else "both"


def seeds_table(study):
    """failures_left and capabilities_lost of every seed, at the page's rate."""
    lines = [["", "left, seed by seed", "lost, seed by seed"]]
    for point in study["frontier"]:
        cells = cells_at(study, point)
        for arm in SIX:
            each = [" ".join(f"{cell['runs'][f'{arm}@{RATE}'][metric]:.3f}" for cell in cells)
                    for metric in HEAD[:2]]
            lines.append([f"{point} {arm}", *each])
    return markdown(lines)


# --- Experiment 2: the attack ------------------------------------------------------------------

def families_of(study):
    """The cells of llama, and those of the other families together."""
    families = {}
    for name, cell in study["attack"].items():
        family = "llama" if name.startswith("llama-") else "qwen2 and qwen3"
        families.setdefault(family, []).append(cell)
    return families


def attack_table(cells):
    """Behaviours defended within 24 attempts, beside the paper's."""
    lines = [["24 attempts fail", *TARGETS]]
    for text, metric in (("own attacker", "defended_own"),
                         ("all attackers", "defended_pool"),
                         ("random frames", "defended_random")):
        found = [over_seeds(cells, name, metric) for name in TARGETS]
        lines.append([text, *(text_of(metric, figure) for figure in found)])
    lines.append(["in the paper", "-", "87 %", "-", "99 %", "-"])
    return markdown(lines)


def matrix_table(cells):
    """Share told of the prompts by the strongest attacker of a line's model, by each column's."""
    told = np.mean([[[cell["matrix"][a][b] for b in TARGETS] for a in TARGETS]
                    for cell in cells], 0)
    lines = [["attacker of", *(f"against {name}" for name in TARGETS)]]
    return markdown(lines + [[name, *(f"{value:.2f}" for value in row)]
                             for name, row in zip(TARGETS, told)])


# --- Verdicts: a row a claim -------------------------------------------------------------------

def row(claim, paper, figure, sign, margin=0.0):
    """A claim that the figure has this sign, up to a margin, with its verdict."""
    said = verdict(figure, sign, margin) if "half" in figure else "one seed"
    return [claim, paper, text_of("", figure, "+"), said]


def verdicts_table(study):
    """The claims of the paper and those of experiment 1, one a row."""
    cells = families_of(study).get("llama", [])
    opct_sft = {"opct": 1, "sft": -1}
    lines = [["claim", "the paper", "difference here", "verdict"]]
    if cells:
        ratio = difference(cells, "sycophancy", {"opct": 1, "base": -0.53})
        lines += [
            row("OPCT leaves at most .53 of the sycophancy", "15 → 8 %", ratio, -1),
            row("OPCT leaves less of it than SFT", "11, 8 %",
                difference(cells, "sycophancy", opct_sft), -1),
            row("an attacker fails more often on OPCT", "87, 99 %",
                difference(cells, "defended_own", opct_sft), 1),
            row("OPCT warns as well as SFT (margin .02)", ".83, .87",
                difference(cells, "safety_awareness", opct_sft), 1, 0.02)]
    if not study["frontier"]:
        return markdown(lines)
    point = MANY if MANY in study["frontier"] else list(study["frontier"])[0]
    cells = cells_at(study, point)
    for one, other, claim, paper in (
            ("opct", "sft", "OPCT loses fewer capabilities than SFT", "28 points"),
            ("sft-fresh", "sft", "SFT on fresh responses loses fewer, too", "-"),
            ("opct", "sft-fresh", "OPCT loses fewer than that", "-"),
            ("opct-exact", "sft-fresh-exact", "and so with the exact loss", "-")):
        weights = {f"{one}@{RATE}": 1, f"{other}@{RATE}": -1}
        lines.append(row(f"{claim}, {point}", paper,
                         difference(cells, "capabilities_lost", weights), -1))
    return markdown(lines)


def dose_runs():
    """Names of the dose's runs: 4, 16, 64 stored responses, fresh ones."""
    return [f"{arm}@{RATE}" for arm in ("sft", *DOSES, "sft-fresh")]


def page_tables(study):
    """Name -> Markdown of the tables of the page."""
    out = {}
    for name, point in (("few", FEW), ("many", MANY)):
        cells = cells_at(study, point) if point in study["frontier"] else []
        out[f"{name}_seeds"] = str(len(cells))
        if cells:
            runs = ("base", *(f"{arm}@{RATE}" for arm in SIX))
            out[f"{name}_table"] = figures_table(cells, runs, HEAD)
            shares = [harm_gone(cells, metric) for metric in HEAD[1:3]]
            out[f"{name}_gone"] = " and ".join("none to lose" if share is None else
                                               f"{100 * share:.0f} % ({cause(share)})"
                                               for share in shares)
    out["noise"] = noise_table(study) if FEW in study["frontier"] else "Not measured."
    cells = families_of(study).get("llama")
    out["attack"] = attack_table(cells) if cells else "Not run with this preset."
    out["verdicts"] = verdicts_table(study)
    return out


def all_tables(study):
    """Title -> Markdown of tables.md."""
    out = {}
    for point in study["frontier"]:
        cells, where = cells_at(study, point), TITLE.get(point, point)
        names = list(cells[0]["runs"])
        for kind, metrics in {"summary": HEAD, **MORE}.items():
            out[f"{where}: {kind}"] = figures_table(cells, names, metrics)
        out[f"{where}: paired differences at equal rates"] = contrasts_table(cells)
    if study["frontier"]:
        out["Every seed"] = seeds_table(study)
    for family, cells in families_of(study).items():
        name = f"The attack, {family}, {len(cells)} cells: rates {', '.join(RATES.values())}"
        out[name] = figures_table(cells, TARGETS, ATTACK, across=False)
        if family == "llama":
            out["Controls: pairs of clean prompts, a shuffled teacher"] = figures_table(
                cells, CONTROLS, ATTACK, across=False)
            out["Whose prompts work against whom"] = matrix_table(cells)
    return out
