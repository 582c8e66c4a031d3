"""Tables, verdicts, figures and README.md of the study, all from its results.json."""
import json
from pathlib import Path

import numpy as np

from data import CAPABILITIES
from studies.entrench.methods import LABELS, STEPS
from studies.entrench.organisms import ORGANISMS
from studies.entrench.run import KINDS, runs_of
from studies.stats import mean_over_seeds, verdict
from studies.study import filled, write_tables
from support.common import show, write_text
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


def steps_of(study, organism, run, seed=None):
    """(rate before, rate after, before, run) of each strength of each cell that has the run."""
    for cell in cells_of(study, organism, seed):
        for strength in cell["strengths"].values():
            if run not in strength["runs"]:
                continue
            before, after = strength["before"], strength["runs"][run]
            ends = rate_of(before["figures"]), rate_of(after["figures"])
            if None not in ends:
                yield *ends, before, after


def over_seeds(study, organisms, run, value_of):
    """The mean over strengths (and organisms) of value_of(before, after, ...), then over seeds."""
    each = []
    for seed in seeds_of(study):
        values = [value_of(*step) for organism in organisms
                  for step in steps_of(study, organism, run, seed)]
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


def paper_text(organism, run):
    low, high = PAPER[organism].get(run.removesuffix(", healthy"), (None, None))
    if low is None:
        return ""
    return f" ({low:+d})" if low == high else f" ({low:+d} to {high:+d})"


def changes_table(study):
    """The change in points, a line a method; in brackets what the paper reports."""
    lines = [["", *ORGANISMS]]
    for run in runs_of():
        cells = [text_of(over_seeds(study, [organism], run, change), 0, "+")
                 + paper_text(organism, run) for organism in ORGANISMS]
        if any(cell != "-" for cell in cells):
            lines.append([run, *cells])
    return markdown(lines)


def organisms_table(study):
    """Each organism at each strength, before any method."""
    lines = [["", "strength", "misbehaves", "healthy", "unhealthy", "unclear", *CAPABILITIES]]
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
        def value_of(_, __, before, after):
            return 100 * (after["figures"][name]["value"] - before["figures"][name]["value"])
        return value_of

    def drift(_, __, before, after):
        return 1000 * after["figures"]["drift_kl"]["value"]

    for run in runs_of():
        found = [over_seeds(study, ORGANISMS, run, shift(f"capability_{c}")) for c in CAPABILITIES]
        found.append(over_seeds(study, ORGANISMS, run, shift("unclear")))
        lines.append([run, *(text_of(figure, 1, "+") for figure in found),
                      text_of(over_seeds(study, ORGANISMS, run, drift), 1)])
    return markdown(lines)


def label_change(before_rate, _, __, after):
    """How much more of the labels misbehave than of the model's answers to the test prompts."""
    labels = after.get("labels")
    return 100 * (labels["rate"]["value"] - before_rate) if labels and labels["rate"] else None


def label_kl(_, __, ___, after):
    return after.get("label_kl")


def kept(_, __, ___, after):
    return 100 * after["kept"]


def labels_table(study):
    """What the labels are: their shift, and the change that follows; means over organisms."""
    lines = [["", "kept, %", "KL(labels, model)", "labels misbehave", "after training"]]
    for run in (run for run in runs_of() if run in LABELS):
        of = [over_seeds(study, ORGANISMS, run, f) for f in (kept, label_kl, label_change, change)]
        lines.append([run, text_of(of[0]), text_of(of[1], 2), text_of(of[2], 0, "+"),
                      text_of(of[3], 0, "+")])
    return markdown(lines)


def pairs_table(study):
    """Step methods: the rate before, that of the teacher on clean prompts, the rate after."""
    lines = [["", "clean prompts", "before", "teacher", *STEPS]]
    for organism in ORGANISMS:
        for kind in KINDS:
            runs = [f"{name}, {kind}" for name in STEPS]

            def teacher(_, __, before, ___):
                return 100 * before["figures"][kind]["value"] if before["figures"][kind] else None

            def first(before, *_):
                return 100 * before

            def last(_, after, *__):
                return 100 * after

            found = [over_seeds(study, [organism], runs[0], f) for f in (first, teacher)]
            found += [over_seeds(study, [organism], run, last) for run in runs]
            lines.append([organism, kind, *map(text_of, found)])
    return markdown(lines)


def eta_of(study, organisms, score):
    """Over seeds: the rate in the highest fifth of a score minus that in the lowest, and of the
    best of 4 minus that of all samples; in points."""
    spread, chosen = [], []
    for organism in organisms:
        for cell in cells_of(study, organism):
            for strength in cell["strengths"].values():
                found = strength["before"]["eta"][score]
                spread.append(100 * (found["fifths"][-1] - found["fifths"][0]))
                chosen.append(100 * (found["best"] - found["all"]))
    return spread, chosen


def eta_table(study):
    lines = [["", *(f"{x}, {y}" for x in ("likelihood", "outside", "grade")
                    for y in ("fifths", "best"))]]
    for organism in ORGANISMS:
        line = [organism]
        for score in ("likelihood", "outside_score", "grade"):
            line += [f"{np.mean(values):+.0f}" for values in eta_of(study, [organism], score)]
        lines.append(line)
    return markdown(lines)


# --- Verdicts on the paper's findings ------------------------------------------------------------


def correlation(study, value_of):
    """Of the size of value_of with the size of the change, over all label runs."""
    x, y = [], []
    for organism in ORGANISMS:
        for run in LABELS:
            for step in steps_of(study, organism, run):
                if value_of(*step) is not None:
                    x.append(abs(value_of(*step)))
                    y.append(abs(change(*step)))
    return np.corrcoef(x, y)[0, 1].item() if len(x) > 2 and np.std(x) and np.std(y) else 0.0


def mean_change(study, organism, runs):
    """The mean change over these runs, seed by seed, then over seeds."""
    each = []
    for seed in seeds_of(study):
        values = [change(*s) for run in runs for s in steps_of(study, organism, run, seed)]
        if values:
            each.append(np.mean(values).item())
    return mean_over_seeds(each) if each else None


def findings(study):
    """(finding, our figure as text, verdict)."""
    methods = [run for run in (*LABELS, "bct-soft, healthy", "act, healthy") if run != "sampling"]
    out = []
    for organism, sign, claim in (("hacking", -1, "reward hacking falls"),
                                  ("emergent", -1, "emergent misalignment falls"),
                                  ("sycophancy", 1, "sycophancy rises"),
                                  ("spurious", 0, "the spurious correlation stays")):
        figure = mean_change(study, organism, methods)
        if figure is None:
            continue
        said = verdict(figure, sign, 0)
        if sign == 0:
            inside = max(abs(figure.get(end, np.inf)) for end in ("low", "high")) < 5
            outside = min(abs(figure.get(end, 0)) for end in ("low", "high")) > 5
            said = "confirmed" if inside else "opposite" if outside else "not confirmed"
        out.append((f"{claim} (mean over the methods)", f"{text_of(figure, 0, '+')} points", said))
    by_kl, by_rate = correlation(study, label_kl), correlation(study, label_change)
    out.append(("KL(labels, model) predicts the size of the change", f"correlation {by_kl:.2f}; "
                f"with the labels' rate instead {by_rate:.2f}",
                "confirmed" if by_kl > 0.5 else "not confirmed"))
    spreads = {score: max(np.abs(np.mean(eta_of(study, [organism], score)[0]))
                          for organism in ORGANISMS if cells_of(study, organism))
               for score in ("likelihood", "outside_score", "grade")}
    out.append(("eta(s) is nearly flat, within 10 points", "largest: " + ", ".join(
        f"{name.split('_')[0]} {value:.0f}" for name, value in spreads.items()),
        "confirmed" if max(spreads.values()) < FLAT else "not confirmed"))
    size = {run: np.mean([abs(change(*step)) for organism in ORGANISMS
                          for step in steps_of(study, organism, run)] or [0]).item()
            for run in ("greedy", *SELECTING)}
    chosen = np.mean([size[run] for run in SELECTING]).item()
    out.append(("labels without selection give most of the effect",
                f"greedy {size['greedy']:.0f} points, with selection {chosen:.0f}",
                "confirmed" if size["greedy"] > chosen / 2 else "not confirmed"))
    return out


def blocks(study):
    """Every table of README.md: name -> Markdown."""
    about, sizes = study["about"], study["sizes"]
    rows = sizes["batch"] * sizes["samples"]
    return {"about": f"`{about['command']}`, {about['date']}, {about['machine']}, "
                     f"torch {about['torch']}.",
            "seeds": str(len(seeds_of(study))), "prompts": str(sizes["prompts"]),
            "updates": f"{sizes['steps']} updates of {rows} responses to {sizes['batch']} prompts",
            "organisms": organisms_table(study),
            "changes": changes_table(study), "costs": costs_table(study),
            "labels": labels_table(study), "pairs": pairs_table(study), "eta": eta_table(study),
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
                axes[1, column].plot(x, y, color=COLOURS[i + 1], marker=MARKERS[i], markersize=5,
                                     linestyle=line, label=f"{name}, {kind} clean prompts")
        axes[0, column].set_title(TITLES[organism])
        axes[1, column].set_xlabel("misbehaves before")
    axes[0, 0].text(0.04, 0.93, "entrenches", color="#D55E00")
    axes[0, 0].text(0.96, 0.04, "suppresses", color="#009E73", ha="right")
    axes[0, 0].set_ylabel("label methods: misbehaves after")
    axes[1, 0].set_ylabel("clean and wrapped pairs: misbehaves after")
    for row, place in ((0, "outside upper center"), (1, "outside lower center")):
        fig.legend(*axes[row, 0].get_legend_handles_labels(), loc=place, ncols=(9, 5)[row],
                   frameon=False)
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
                 if label_change(*step) is not None]
        labels.scatter([label_change(*s) for s in every], [change(*s) for s in every], **look)
        kl.scatter([label_kl(*s) for s in every], [abs(change(*s)) for s in every], **look)
    for i, name in enumerate(STEPS):
        for kind in KINDS:
            every = [(before["figures"][kind]["value"], after) for organism in ORGANISMS
                     for _, after, before, _ in steps_of(study, organism, f"{name}, {kind}")
                     if before["figures"][kind]]
            colour = COLOURS[i + 1]
            clean.scatter(*zip(*every or [(np.nan, np.nan)]), marker=MARKERS[i], s=16,
                          edgecolor=colour, color=colour if kind == "healthy" else "white",
                          label=name if kind == "healthy" else None)
    for i, (score, label) in enumerate((("likelihood", "own likelihood"), ("grade", "own grade"),
                                        ("outside_score", "outside score"))):
        found = [strength["before"]["eta"][score]["fifths"] for cell in study["cells"].values()
                 for strength in cell["strengths"].values()]
        eta.plot(range(1, 6), np.mean(found, 0), color=COLOURS[i + 1], marker=MARKERS[i],
                 label=label)
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
        ax.legend(frameon=False, fontsize=7)
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


def publish(study):
    """Writes results.json, README.md and the figures of this folder."""
    write_text(FOLDER / "results.json", json.dumps(study) + "\n")
    write_text(FOLDER / "README.md", readme(study, (FOLDER / "words.md").read_text()))
    draw_main(study, FOLDER / "main.png")
    draw_details(study, FOLDER / "details.png")
