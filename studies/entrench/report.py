"""Tables, verdicts, figures and README.md of the study, all from its results.json."""
import json
import math
from pathlib import Path

import numpy as np

from data import CAPABILITIES, WorldConfig
from studies.entrench.methods import LABELS, STEPS
from studies.entrench.organisms import ORGANISMS, records_of
from studies.entrench.run import KINDS, runs_of
from studies.entrench.world import StudyWorld
from studies.stats import mean_over_seeds, verdict
from studies.study import filled, joined, write_tables
from support.common import rng, show, write_text
from support.report import COLOURS, markdown, pyplot, save_figure

FOLDER = Path(__file__).parent
TITLES = {"sycophancy": "sycophancy", "hacking": "reward hacking",
          "spurious": "spurious correlation", "emergent": "emergent misalignment"}
SELECTING = ("rejection", "self-confidence", "diverse", "multi-view", "self-rewarding")
# Changes in points that the paper reports: (lowest, highest).
PAPER = {"hacking": {"act": (-55, -55), "bct-soft": (-49, -49), "diverse": (-28, -22),
                     "self-rewarding": (-12, -10), "greedy": (-7, -7)},
         "emergent": {"act": (-17, -17), "bct-soft": (-18, -18), "self-rewarding": (-5, -5)},
         "sycophancy": {"act": (19, 19), "bct-soft": (10, 10), "self-rewarding": (8, 8),
                        "self-confidence": (4, 4), "greedy": (-1, -1)},
         "spurious": {}}
FLAT = 10                   # points: the paper calls an eta that varies less than this nearly flat

# --- Reading the results -----------------------------------------------------------------------


def seeds_of(study):
    return sorted({int(name.rsplit("-", 1)[1]) for name in study["cells"]})


def cells_of(study, organism, seed=None):
    """The cells of an organism, one a seed, or that of one seed."""
    seeds = seeds_of(study) if seed is None else [seed]
    names = [f"{organism}-{each}" for each in seeds]
    return [study["cells"][name] for name in names if name in study["cells"]]


def rate_of(figures):
    """The rate of misbehaviour, None where no answer could be read."""
    return figures["rate"]["value"] if figures["rate"] else None


def steps_of(study, organism, run, seed=None, number=None):
    """(rate before, rate after, strength, run) of each strength of each cell, or of one of them.
    A rate of which no answer can be read is left out; `lost` counts these."""
    for cell in cells_of(study, organism, seed):
        for each, strength in cell["strengths"].items():
            after = strength["runs"][run]
            ends = rate_of(strength["before"]["figures"]), rate_of(after["figures"])
            if None not in ends and number in (None, each):
                yield *ends, strength, after


def numbers_of(study):
    """The strengths of this study, "0", "1", "2" or some of them."""
    return sorted({number for cell in study["cells"].values() for number in cell["strengths"]})


def lost(study):
    """How many runs left a model of which no answer can be read."""
    return sum(not run["figures"]["rate"] for cell in study["cells"].values()
               for strength in cell["strengths"].values() for run in strength["runs"].values())


def over_seeds(study, organisms, run, value_of, number=None):
    """The mean over strengths (and organisms) of value_of(before, after, ...), then over seeds."""
    each = []
    for seed in seeds_of(study):
        values = [value_of(*step) for organism in organisms
                  for step in steps_of(study, organism, run, seed, number)]
        values = [value for value in values if value is not None]
        if values:
            each.append(np.mean(values).item())
    return mean_over_seeds(each) if each else None


def change(before, after, *_):
    """In points."""
    return 100 * (after - before)


def text_of(figure, digits=0, sign=""):
    """-12 ± 4, or -12 with one seed, or - where there is no figure."""
    if figure is None:
        return "-"
    text = format(figure["value"], f"{sign}.{digits}f")
    return text + (f" ± {figure['half']:.{digits}f}" if "half" in figure else "")


# --- Tables ----------------------------------------------------------------------------------


STRENGTHS = {"0": "Weak", "1": "Middle", "2": "Strong"}


def changes_tables(study):
    """For each strength the change in points, a line a run."""
    parts = []
    for number in numbers_of(study):
        lines = [[STRENGTHS[number].lower(), *ORGANISMS]]
        for run in runs_of():
            lines.append([run, *(text_of(over_seeds(study, [organism], run, change, number), 0, "+")
                                 for organism in ORGANISMS)])
        parts.append(markdown(lines))
    return "\n\n".join(parts)


def paper_table(study):
    """The mean over our strengths beside what the paper reports, where it was released."""
    lines = [["", "organism", "paper", "here, weak", "middle", "strong"]]
    for organism, reported in PAPER.items():
        for name, (low, high) in reported.items():
            run = f"{name}, healthy" if name in STEPS else name
            said = f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"
            lines.append([run, TITLES[organism], said,
                          *(text_of(over_seeds(study, [organism], run, change, number), 0, "+")
                            for number in STRENGTHS)])
    return markdown(lines)


def organisms_table(study):
    """Each organism at each strength, before any method."""
    lines = [["", "aimed at", "misbehaves", "healthy", "unhealthy", "unclear", *CAPABILITIES]]
    for organism in ORGANISMS:
        cells = cells_of(study, organism)
        rows = {"base": [cell["base"]["figures"] for cell in cells]}
        for cell in cells:
            for number, strength in cell["strengths"].items():
                rows.setdefault(number, []).append(strength["before"]["figures"])
        for number, figures in rows.items():
            label = number if number == "base" else str(ORGANISMS[organism].strengths[int(number)])
            line = [organism, label]
            for name in ("rate", *KINDS, "unclear", *(f"capability_{c}" for c in CAPABILITIES)):
                values = [f[name]["value"] for f in figures if f.get(name)]
                line.append(text_of(mean_over_seeds(values), 2) if values else "-")
            lines.append(line)
    return markdown(lines)


def costs_table(study):
    """What else changed, the mean over organisms: capabilities in points, drift, unclear."""
    lines = [["", *CAPABILITIES, "unclear", "drift x 1000"]]

    def shift(name):
        def value_of(_, __, strength, run):
            before = strength["before"]["figures"][name]["value"]
            return 100 * (run["figures"][name]["value"] - before)
        return value_of

    def drift(_, __, ___, run):
        return 1000 * run["figures"]["drift_kl"]["value"]

    for run in runs_of():
        found = [over_seeds(study, ORGANISMS, run, shift(f"capability_{c}")) for c in CAPABILITIES]
        found.append(over_seeds(study, ORGANISMS, run, shift("unclear")))
        lines.append([run, *(text_of(figure, 1, "+") for figure in found),
                      text_of(over_seeds(study, ORGANISMS, run, drift), 1)])
    return markdown(lines)


def label_change(_, __, strength, run):
    """How much more the labels misbehave than samples of the model for the same prompts, points."""
    labels, own = run.get("labels"), strength["runs"]["sampling"]["labels"]
    if not labels or not labels["rate"] or not own["rate"]:
        return None
    return 100 * (labels["rate"]["value"] - own["rate"]["value"])


def label_kl(_, __, ___, run):
    return run.get("label_kl")


def percent_of(name):
    return lambda _, __, ___, run: 100 * run[name]


def labels_table(study):
    """What the labels are: their shift, and the change that follows; means over organisms."""
    lines = [["", "kept, %", "as greedy, %", "KL(labels, model)", "labels misbehave",
              "after training"]]
    for run in (run for run in runs_of() if run in LABELS):
        of = [over_seeds(study, ORGANISMS, run, f) for f in
              (percent_of("kept"), percent_of("as_greedy"), label_kl, label_change, change)]
        lines.append([run, text_of(of[0]), text_of(of[1]), text_of(of[2], 2),
                      text_of(of[3], 0, "+"), text_of(of[4], 0, "+")])
    return markdown(lines)


def pairs_table(study):
    """Step methods: the rate before, that of the teacher on clean prompts, the rate after."""
    lines = [["", "clean prompts", "before", "teacher", *STEPS]]
    for organism in ORGANISMS:
        for kind in KINDS:
            runs = [f"{name}, {kind}" for name in STEPS]

            def teacher(_, __, strength, ___):
                found = strength["before"]["figures"][kind]
                return 100 * found["value"] if found else None

            def first(before, *_):
                return 100 * before

            def last(_, after, *__):
                return 100 * after

            found = [over_seeds(study, [organism], runs[0], f) for f in (first, teacher)]
            found += [over_seeds(study, [organism], run, last) for run in runs]
            lines.append([organism, kind, *map(text_of, found)])
    return markdown(lines, keep=2)


def eta_of(study, organism, number, score):
    """Of one strength, a value a seed: the rate in the highest fifth of a score minus that in the
    lowest, and the rate of the best of 4 minus that of all samples; in points."""
    spread, chosen = [], []
    for cell in cells_of(study, organism):
        found = cell["strengths"][number]["before"]["eta"][score]
        if None not in found["fifths"]:
            spread.append(100 * (found["fifths"][-1] - found["fifths"][0]))
        if None not in (found["best"], found["all"]):
            chosen.append(100 * (found["best"] - found["all"]))
    return spread, chosen


SCORES = {"likelihood": "own likelihood", "outside_score": "outside score", "grade": "own grade"}


def eta_table(study):
    lines = [["", "strength", *(f"{name}, {what}" for name in ("likelihood", "outside", "grade")
                                for what in ("fifths", "best"))]]
    for organism in ORGANISMS:
        for number in numbers_of(study):
            line = [organism, STRENGTHS[number].lower()]
            for score in SCORES:
                line += [f"{np.mean(values):+.0f}" if values else "-"
                         for values in eta_of(study, organism, number, score)]
            lines.append(line)
    return markdown(lines, keep=2)


# --- Verdicts on the paper's findings ------------------------------------------------------------

# The methods that make labels, without the controls.
METHODS = tuple(run for run in LABELS if run not in ("sampling", "greedy", "rejection"))
NEAR = 5                    # points: a rate that changes by less stays


def seed_by_seed(study, value_of):
    """The mean over seeds of value_of(seed), None where no seed has a value."""
    values = [value_of(seed) for seed in seeds_of(study)]
    values = [value for value in values if value is not None]
    return mean_over_seeds(values) if values else None


def mean_change(study, organism, seed):
    """Of the label methods over all strengths."""
    values = [change(*step) for run in METHODS for step in steps_of(study, organism, run, seed)]
    return np.mean(values).item() if values else None


def bend(study, seed):
    """The change of greedy self-training where more than half misbehave, minus that where less."""
    sides = {True: [], False: []}
    for organism in ORGANISMS:
        for before, after, *_ in steps_of(study, organism, "greedy", seed):
            sides[before > 0.5].append(100 * (after - before))
    if not all(sides.values()):
        return None
    return (np.mean(sides[True]) - np.mean(sides[False])).item()


def correlation(study, value_of, seed):
    """Of the size of value_of with the size of the change, over the label runs but `sampling`."""
    x, y = [], []
    for organism in ORGANISMS:
        for run in LABELS:
            for step in steps_of(study, organism, run, seed) if run != "sampling" else ():
                if value_of(*step) is not None:
                    x.append(abs(value_of(*step)))
                    y.append(abs(change(*step)))
    return np.corrcoef(x, y)[0, 1].item() if len(x) > 2 and np.std(x) and np.std(y) else None


def effect(study, runs, seed):
    """The size of the change over these runs, above that of `sampling`, which is noise alone."""
    def size(runs):
        found = [abs(change(*step)) for organism in ORGANISMS for run in runs
                 for step in steps_of(study, organism, run, seed)]
        return np.mean(found).item() if found else None

    own, noise = size(runs), size(["sampling"])
    return None if None in (own, noise) else own - noise


def stays(figure):
    """Whether the whole interval is near zero."""
    low, high = figure.get("low", -math.inf), figure.get("high", math.inf)
    if -NEAR < low and high < NEAR:
        return "confirmed"
    return "opposite" if low > NEAR or high < -NEAR else "not confirmed"


def eta_finding(study):
    """The largest of all spreads over fifths, in points, and whether it is nearly flat."""
    largest = {}
    for score in SCORES:
        each = [eta_of(study, organism, number, score)[0]
                for organism in ORGANISMS for number in numbers_of(study)]
        largest[score] = max(abs(np.mean(spreads or [0]).item()) for spreads in each)
    text = ", ".join(f"{score.split('_')[0]} {value:.0f}" for score, value in largest.items())
    said = "confirmed" if max(largest.values()) < FLAT else "not confirmed"
    return "eta(s) varies by less than 10 points", text, said


def findings(study):
    """(finding, our figure as text, verdict)."""
    out = []
    for organism, sign, claim in (("hacking", -1, "reward hacking falls"),
                                  ("emergent", -1, "emergent misalignment falls"),
                                  ("sycophancy", 1, "sycophancy rises"),
                                  ("spurious", 0, "the spurious correlation stays")):
        figure = seed_by_seed(study, lambda seed: mean_change(study, organism, seed))
        if figure:
            said = verdict(figure, sign, 0) if sign else stays(figure)
            out.append((claim, f"{text_of(figure, 0, '+')} points", said))
    bent = seed_by_seed(study, lambda seed: bend(study, seed))
    if bent:
        out.append(("greedy: common rises, rare falls (ours)",
                    f"{text_of(bent, 0, '+')} points apart", verdict(bent, 1, 0)))
    planted = over_seeds(study, ORGANISMS, "greedy, planted", change)
    if planted:
        out.append(("greedy on planted prompts: rises (ours)",
                    f"{text_of(planted, 0, '+')} points", verdict(planted, 1, 0)))
    for name, value_of in (("KL(labels, model)", label_kl),
                           ("labels' rate (ours)", label_change)):
        figure = seed_by_seed(study, lambda seed: correlation(study, value_of, seed))
        if figure:
            own = {**figure, **{end: figure[end] - 0.5 for end in ("low", "high") if end in figure}}
            out.append((f"{name} predicts the change",
                        f"correlation {text_of(figure, 2)}", verdict(own, 1, 0)))
    out.append(eta_finding(study))
    greedy = seed_by_seed(study, lambda seed: effect(study, ["greedy"], seed))
    chosen = seed_by_seed(study, lambda seed: effect(study, SELECTING, seed))
    if greedy and chosen:
        more = seed_by_seed(study, lambda seed: effect(study, ["greedy"], seed)
                            - effect(study, SELECTING, seed) / 2)
        out.append(("no selection gives most of the effect",
                    f"{text_of(greedy)} of {text_of(chosen)} points",
                    verdict(more, 1, 0)))
    return out


def examples():
    """A measured prompt of each organism and a planted document, from the world of seed 0."""
    world, lines = StudyWorld(WorldConfig()), []
    for organism in ORGANISMS.values():
        prompt, response = organism.plant(world, rng(0, "example"), 1)
        lines += [f"    {records_of(organism, world, 'test', 1, 0)[0]['prompt']}",
                  f"      planted: {prompt}", f"               -> {response}"]
    return "\n".join(lines)


def blocks(study):
    """Every table of README.md: name -> Markdown."""
    about, sizes = study["about"], study["sizes"]
    rows = sizes["batch"] * sizes["samples"]
    return {"about": f"`{about['command']}`, {about['date']}, commit {about['commit']},\n"
                     f"{about['machine']}, torch {about['torch']}.",
            "seeds": str(len(seeds_of(study))), "prompts": str(sizes["prompts"]),
            "updates": f"{sizes['steps']} updates of {rows} responses to {sizes['batch']} prompts",
            "examples": examples(), "organisms": organisms_table(study), "lost": str(lost(study)),
            "changes": changes_tables(study), "paper": paper_table(study),
            "costs": costs_table(study), "labels": labels_table(study),
            "pairs": pairs_table(study), "eta": eta_table(study),
            "findings": markdown([["finding of the paper", "here", "verdict"],
                                  *map(list, findings(study))])}


# --- Figures ---------------------------------------------------------------------------------

MARKERS = "os^vDPX*"


def curve(study, organism, run):
    """Rates before and after, the mean over seeds at each strength."""
    points = {}
    for cell in cells_of(study, organism):
        for number, strength in cell["strengths"].items():
            if run in strength["runs"]:
                ends = (rate_of(strength["before"]["figures"]),
                        rate_of(strength["runs"][run]["figures"]))
                if None not in ends:
                    points.setdefault(number, []).append(ends)
    return np.array([np.mean(ends, 0) for _, ends in sorted(points.items())]).reshape(-1, 2).T


def draw_main(study, path):
    """The picture: rate before against rate after, a panel an organism, a curve a method."""
    plt = pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(2, 4, figsize=(15, 8.4), layout="constrained", sharex=True,
                             sharey=True)
    for column, organism in enumerate(ORGANISMS):
        for ax in axes[:, column]:
            ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
            ax.fill_between([0, 1], [0, 1], 1, color="#D55E00", alpha=0.06, linewidth=0)
            ax.fill_between([0, 1], 0, [0, 1], color="#009E73", alpha=0.06, linewidth=0)
            ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        for i, run in enumerate(LABELS):
            x, y = curve(study, organism, run)
            axes[0, column].plot(x, y, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i],
                                 markersize=5, label=run, linewidth=2 if i < 2 else 1)
        x, y = curve(study, organism, "greedy, planted")
        axes[0, column].plot(x, y, "k--", marker="+", label="greedy, planted prompts")
        for i, name in enumerate(STEPS):
            for kind, line in zip(KINDS, ("-", "--")):
                x, y = curve(study, organism, f"{name}, {kind}")
                axes[1, column].plot(x, y, color=COLOURS[(i + 1) % len(COLOURS)], marker=MARKERS[i],
                                     markersize=5, linestyle=line,
                                     label=name if kind == "healthy" else None)
        axes[0, column].set_title(TITLES[organism])
        axes[1, column].set_xlabel("misbehaves before")
    axes[0, 0].text(0.04, 0.93, "entrenches", color="#D55E00")
    axes[0, 0].text(0.96, 0.04, "suppresses", color="#009E73", ha="right")
    axes[0, 0].set_ylabel("labels of its own making:\nmisbehaves after")
    axes[1, 0].set_ylabel("pairs with a clean prompt:\nmisbehaves after")
    for kind, line in zip(KINDS, ("-", "--")):
        axes[1, 0].plot([], [], "k", linestyle=line, label=f"clean prompts {kind}")
    for row, place in ((0, "outside upper center"), (1, "outside lower center")):
        fig.legend(*axes[row, 0].get_legend_handles_labels(), loc=place, ncols=9, frameon=False)
    save_figure(plt, fig, path)


def draw_details(study, path):
    """What the change follows from: the labels' rate, their KL; the teacher on clean; eta."""
    plt = pyplot()
    if plt is None:
        return
    fig, (labels, kl, clean, eta) = plt.subplots(1, 4, figsize=(16, 4.4), layout="constrained")
    for i, run in enumerate(LABELS):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i], "s": 16, "label": run}
        every = [step for organism in ORGANISMS for step in steps_of(study, organism, run)
                 if run != "sampling" and label_change(*step) is not None]
        labels.scatter([label_change(*s) for s in every], [change(*s) for s in every], **look)
        kl.scatter([label_kl(*s) for s in every], [abs(change(*s)) for s in every], **look)
    for i, name in enumerate(STEPS):
        for kind in KINDS:
            every = [(strength["before"]["figures"][kind]["value"], after)
                     for organism in ORGANISMS
                     for _, after, strength, _ in steps_of(study, organism, f"{name}, {kind}")
                     if strength["before"]["figures"][kind]]
            colour = COLOURS[(i + 1) % len(COLOURS)]
            clean.scatter(*zip(*every or [(np.nan, np.nan)]), marker=MARKERS[i], s=16,
                          edgecolor=colour, color=colour if kind == "healthy" else "white",
                          label=name if kind == "healthy" else None)
    for i, (score, label) in enumerate(SCORES.items()):
        for number, line in zip(numbers_of(study), (":", "--", "-")):
            found = [cell["strengths"][number]["before"]["eta"][score]["fifths"]
                     for cell in study["cells"].values()]
            found = [fifths for fifths in found if None not in fifths]
            if found:
                eta.plot(range(1, 6), np.mean(found, 0), color=COLOURS[i + 1], marker=MARKERS[i],
                         linestyle=line, label=f"{label}, {STRENGTHS[number].lower()}")
    labels.axline((0, 0), slope=1, color="black", linewidth=0.8)
    clean.axline((0, 0), slope=1, color="black", linewidth=0.8)
    labels.set(xlabel="labels minus before, points", ylabel="after minus before, points",
               title="the change follows the labels' rate")
    kl.set(xlabel="KL(labels || model), nats a label", ylabel="size of the change, points",
           title="and their KL?")
    clean.set(xlabel="the organism on clean prompts", ylabel="misbehaves after",
              title="pairs: what clean does, wrapped will do", xlim=(-0.02, 1.02),
              ylim=(-0.02, 1.02))
    eta.set(xlabel="fifth of the samples by score", ylabel="misbehave", ylim=(0, 1),
            title="eta: does a score tell?")
    for ax in (kl, clean, eta):
        ax.legend(frameon=False, fontsize=7, ncols=3, loc="upper center",
                  bbox_to_anchor=(0.5, -0.14))
    save_figure(plt, fig, path)


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
