"""The figures of the study, drawn from its results."""
import numpy as np

from studies.claims.plan import SIX, TARGETS
from studies.claims.tables import FEW, MANY, RATE, TITLE, cells_at, dose_runs, families_of
from studies.study import COLOUR
from support.report import save_figure

# The colour says whose responses; filled is the sampled loss, hollow and dashed the exact one.
DOSE_LABELS = ("4", "16", "64", "fresh", "opct")


def look_of(arm):
    """Colour and line of an arm: the exact loss has the colour of its method, dashed."""
    return {"color": COLOUR[arm.removesuffix("-exact")],
            "linestyle": "--" if arm.endswith("-exact") else "-", "label": arm}


def values_of(cells, run, metric):
    return [cell["runs"][run][metric] for cell in cells]


def draw_dose(ax, study):
    """Capabilities lost against the teacher's responses to a pair; last, the student's own."""
    for point, line, marker in ((FEW, "--", "s"), (MANY, "-", "o")):
        if point not in study["frontier"]:
            continue
        cells = cells_at(study, point)
        each = np.array([values_of(cells, run, "capabilities_lost")
                         for run in (*dose_runs(), f"opct@{RATE}")])
        at = np.arange(len(each))
        ax.plot(at[:-1], each[:-1].mean(1), color=COLOUR["sft"], linestyle=line, marker=marker,
                label=TITLE[point])
        ax.plot(at[-1:], each[-1:].mean(1), color=COLOUR["opct"], marker=marker)
        ax.plot(at, each, ".", color="black", markersize=2, alpha=0.5)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(DOSE_LABELS)), DOSE_LABELS)
    ax.set(title="what SFT breaks, by the dose", ylabel="capabilities lost",
           xlabel="teacher's responses to a pair; opct: own")
    ax.legend(frameon=False)


def draw_frontier(ax, study, point):
    """Failures left against capabilities lost: a line an arm through its rates."""
    cells = cells_at(study, point)
    for arm in SIX:
        look = look_of(arm)
        names = [name for name in cells[0]["runs"] if name.startswith(f"{arm}@")]
        lost, left = (np.array([values_of(cells, name, metric) for name in names])
                      for metric in ("capabilities_lost", "failures_left"))
        ax.plot(lost.mean(1), left.mean(1), marker="o", **look,
                markerfacecolor="white" if arm.endswith("-exact") else look["color"])
        ax.plot(lost, left, ".", color=look["color"], markersize=2, alpha=0.6)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set(title=TITLE[point], xlabel="capabilities lost", ylabel="failures left")
    ax.set_ylim(bottom=0)


def draw_first(plt, study, path):
    """Experiment 1: the dose, and the frontier at each point."""
    points = [point for point in TITLE if point in study["frontier"]]
    if not points:
        return
    fig, axes = plt.subplots(1, 1 + len(points), figsize=(4 * (1 + len(points)), 4),
                             layout="constrained")
    draw_dose(axes[0], study)
    for ax, point in zip(axes[1:], points):
        draw_frontier(ax, study, point)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=6,
               frameon=False)
    save_figure(plt, fig, path)


def draw_attacks(plt, study, path):
    """Experiment 2: the share of behaviours that withstand so many attempts."""
    cells = families_of(study).get("llama")
    if not cells:
        return
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    panels = {"own": "prompts of its own attacker", "pool": "prompts of all attackers"}
    for ax, (kind, text) in zip(axes, panels.items()):
        for name in TARGETS:
            curve = 1 - np.mean([cell["curves"][kind][name] for cell in cells], 0)
            ax.plot(range(1, len(curve) + 1), curve, **look_of(name))
        ax.axvline(24, color="black", linewidth=0.6, linestyle=":")
        ax.set(title=text, xlabel="attempts", xscale="log", ylim=(-0.02, 1.02))
        ax.set_xticks([1, 4, 24, 64], ["1", "4", "24", "64"])
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("recipes that were not told")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
               frameon=False)
    save_figure(plt, fig, path)
