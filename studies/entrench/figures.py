"""The figures of README.md, where matplotlib is installed."""
import numpy as np

from studies.entrench.methods import LABELS, SLOWER, STEPS
from studies.entrench.organisms import ORGANISMS
from studies.entrench.run import KINDS
from studies.entrench.tables import (SCORES, STRENGTHS, TITLES, cells_of, change, label_change,
                                     label_kl, numbers_of, rate_of, steps_of)
from support.report import COLOURS, pyplot, save_figure

MARKERS = "os^vDPX*"
SHADES = [*COLOURS, "#882255"]                            # one for each run with labels
PAIRED = [name for name in STEPS if name != SLOWER]
# The runs with labels that the figure names; all others are grey.
NAMED = {"greedy": "-", "rejection": "-", "self-refinement": "-", "greedy, planted": "--"}


def curve(study, organism, run, kind=None):
    """Rates before and after, the mean over seeds at each strength: (2, strengths). With a kind of
    clean prompts, the rate on these before instead."""
    points = {}
    for cell in cells_of(study, organism):
        for number, strength in cell["strengths"].items():
            if run in strength["runs"]:
                figures = strength["before"]["figures"]
                before = figures[kind] and figures[kind]["value"] if kind else rate_of(figures)
                ends = before, rate_of(strength["runs"][run]["figures"])
                if None not in ends:
                    points.setdefault(number, []).append(ends)
    return np.array([np.mean(ends, 0) for _, ends in sorted(points.items())]).reshape(-1, 2).T


def draw_labels(study, organism, ax):
    """The rate before against the rate after labels of its own, a curve a method."""
    ax.fill_between([0, 1], [0, 1], 1, color="#D55E00", alpha=0.06, linewidth=0)
    ax.fill_between([0, 1], 0, [0, 1], color="#009E73", alpha=0.06, linewidth=0)
    for run in LABELS:
        if run not in NAMED:
            ax.plot(*curve(study, organism, run), color="#bbbbbb", linewidth=1,
                    label="the other methods" if run == "sampling" else None)
    for i, (run, line) in enumerate(NAMED.items()):
        ax.plot(*curve(study, organism, run), color=COLOURS[i + 1], marker=MARKERS[i],
                linestyle=line, linewidth=2, label=run.replace(", planted", ", planted prompts"))
    ax.set_title(TITLES[organism])
    ax.set_xlabel("misbehaves before")


def draw_pairs(study, organism, ax):
    """The rate on clean prompts before against the rate on wrapped prompts after."""
    for i, name in enumerate(PAIRED):
        for kind in KINDS:
            x, y = curve(study, organism, f"{name}, {kind}", kind)
            colour = COLOURS[i + 1]
            ax.plot(x, y, color=colour, marker=MARKERS[i], linestyle="none", markersize=7,
                    markerfacecolor=colour if kind == "healthy" else "none",
                    label=name if kind == "healthy" else None)
    ax.set_xlabel("misbehaves on clean prompts before")


def draw_main(study, path):
    """The picture: labels above, pairs below, a panel an organism."""
    plt = pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(2, 4, figsize=(15, 8.4), layout="constrained", sharey=True)
    for column, organism in enumerate(ORGANISMS):
        for ax, draw in zip(axes[:, column], (draw_labels, draw_pairs)):
            ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
            ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
            draw(study, organism, ax)
    axes[0, 0].text(0.04, 0.93, "entrenches", color="#D55E00")
    axes[0, 0].text(0.96, 0.04, "suppresses", color="#009E73", ha="right")
    axes[1, 0].text(0.96, 0.04, "on the line: ends as\non its clean prompts", ha="right")
    axes[0, 0].set_ylabel("labels of its own making:\nmisbehaves after")
    axes[1, 0].set_ylabel("pairs with a clean prompt:\nmisbehaves after, wrapped")
    axes[1, 0].plot([], [], "ks", label="clean prompts healthy", linestyle="none")
    axes[1, 0].plot([], [], "ks", label="unhealthy", linestyle="none", markerfacecolor="none")
    for row, place in ((0, "outside upper center"), (1, "outside lower center")):
        fig.legend(*axes[row, 0].get_legend_handles_labels(), loc=place, ncols=9, frameon=False)
    save_figure(plt, fig, path)


def draw_details(study, path):
    """What the change follows from: the labels' rate, their KL; eta."""
    plt = pyplot()
    if plt is None:
        return
    fig, (labels, kl, eta) = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    for i, run in enumerate(LABELS):
        if run == "sampling":                               # what the others are compared with
            continue
        look = {"color": SHADES[i], "marker": MARKERS[i], "s": 16, "label": run}
        every = [step for organism in ORGANISMS for step in steps_of(study, organism, run)
                 if label_change(*step) is not None]
        labels.scatter([label_change(*s) for s in every], [change(*s) for s in every], **look)
        kl.scatter([label_kl(*s) for s in every], [abs(change(*s)) for s in every], **look)
    for i, (score, label) in enumerate(SCORES.items()):
        for number, line in zip(numbers_of(study), (":", "--", "-")):
            found = [cell["strengths"][number]["before"]["eta"][score]["fifths"]
                     for cell in study["cells"].values()]
            found = [fifths for fifths in found if None not in fifths]
            if found:
                eta.plot(range(1, 6), np.mean(found, 0), color=COLOURS[i + 1], marker=MARKERS[i],
                         linestyle=line, label=f"{label}, {STRENGTHS[number].lower()}")
    labels.axline((0, 0), slope=1, color="black", linewidth=0.8)
    labels.set(xlabel="labels minus single samples, points", ylabel="after minus before, points",
               title="the change follows the labels' rate")
    kl.set(xlabel="KL(labels || model), nats a label, its error included",
           ylabel="size of the change, points", title="and, less closely, their KL")
    eta.set(xlabel="fifth of the samples by score", ylabel="misbehave", ylim=(0, 1),
            xticks=range(1, 6), title="eta: does a score tell?")
    for ax in (labels, kl, eta):
        ax.legend(frameon=False, fontsize=7, ncols=3, loc="upper center",
                  bbox_to_anchor=(0.5, -0.14))
    save_figure(plt, fig, path)
