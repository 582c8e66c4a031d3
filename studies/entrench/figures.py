"""The figures of README.md, where matplotlib is installed."""
import numpy as np

from studies.entrench.methods import LABELS, SLOWER, STEPS
from studies.entrench.organisms import ORGANISMS
from studies.entrench.run import KINDS
from studies.entrench.tables import (SCORES, STRENGTHS, TITLES, cells_of, change, label_change,
                                     label_kl, numbers_of, rate_of, steps_of)
from support.report import COLOURS, pyplot, save_figure

MARKERS = "os^vDPX*"
PAIRED = [name for name in STEPS if name != SLOWER]
SHADES = [*COLOURS, "#882255"]                            # one for each run with labels


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
            axes[0, column].plot(x, y, color=SHADES[i], marker=MARKERS[i],
                                 markersize=5, label=run, linewidth=2 if i < 2 else 1)
        x, y = curve(study, organism, "greedy, planted")
        axes[0, column].plot(x, y, "k--", marker="+", label="greedy, planted prompts")
        for i, name in enumerate(PAIRED):
            for kind, line in zip(KINDS, ("-", "--")):
                x, y = curve(study, organism, f"{name}, {kind}")
                axes[1, column].plot(x, y, color=COLOURS[i + 1], marker=MARKERS[i],
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
        if run == "sampling":                               # what the others are compared with
            continue
        look = {"color": SHADES[i], "marker": MARKERS[i], "s": 16, "label": run}
        every = [step for organism in ORGANISMS for step in steps_of(study, organism, run)
                 if label_change(*step) is not None]
        labels.scatter([label_change(*s) for s in every], [change(*s) for s in every], **look)
        kl.scatter([label_kl(*s) for s in every], [abs(change(*s)) for s in every], **look)
    for i, name in enumerate(PAIRED):
        for kind in KINDS:
            every = [(strength["before"]["figures"][kind]["value"], after)
                     for organism in ORGANISMS
                     for _, after, strength, _ in steps_of(study, organism, f"{name}, {kind}")
                     if strength["before"]["figures"][kind]]
            colour = COLOURS[i + 1]
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
              title="pairs: from clean to wrapped", xlim=(-0.02, 1.02),
              ylim=(-0.02, 1.02))
    eta.set(xlabel="fifth of the samples by score", ylabel="misbehave", ylim=(0, 1),
            title="eta: does a score tell?")
    for ax in (kl, clean, eta):
        ax.legend(frameon=False, fontsize=7, ncols=3, loc="upper center",
                  bbox_to_anchor=(0.5, -0.14))
    save_figure(plt, fig, path)
