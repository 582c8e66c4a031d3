"""The figures of the study, drawn from its results."""
import numpy as np

from studies import plots
from studies.claims.plan import LEARNT, TARGETS
from studies.claims.results import with_sums
from studies.claims.tables import families_of
from studies.claims.verdicts import CONTRASTS
from studies.stats import contrast, over_seeds
from studies.study import ARMS
from support.report import pyplot, save_figure


def draw_main(study, path):
    """What was fixed, and what must not break: means over seeds."""
    plt = pyplot()
    if plt is None:
        return
    cells = families_of(study)["llama"]
    runs = over_seeds(cells)
    panels = {"failures (lower is better)": {
                  "sycophancy": "sycophancy", "jailbreak,\none frame": "jailbreak_static",
                  "jailbreak,\nbest of K": "jailbreak_best_of",
                  "jailbreak,\npool": "jailbreak_pool",
                  "jailbreak,\nattacker": "jailbreak_adaptive",
                  "harmless\nnot told": "over_refusal", "needless\nwarning": "over_warning"},
              "higher is better": {
                  "safety\nawareness": "safety_awareness", "right\nhints": "accuracy_right_hint",
                  "math": "capability_math", "facts": "capability_facts",
                  "instruc-\ntions": "capability_instructions"}}
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(7, 5),
                             layout="constrained")
    for ax, (name, bars) in zip(axes, panels.items()):
        series = {}
        for run in plots.NAMES:
            series[run] = [runs[run].get(metric) for metric in bars.values()]
        plots.points(ax, list(bars), series)
        ax.set(title=name, ylim=(-0.02, 1.02))
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("mean over seeds, 95 % interval")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6,
               frameon=False)
    save_figure(plt, fig, path)


def mean(cells, metric):
    return np.mean([figures[metric]["value"] for figures in cells])


def draw_tradeoffs(axes, grid):
    """One curve an arm, its points the learning rates. Not drawn is the largest, which breaks every
    arm by so much that the others could not be told apart."""
    tests = [with_sums(splits["test"]) for splits in grid.values()]
    for arm in ARMS:
        colour, marker, line = plots.STYLE[arm]
        lost, needless, drift, left = [], [], [], []
        names = [name for name in tests[0] if name.startswith(f"{arm}@")]
        for name in names[:-1] or names:                    # from small rates to large ones
            cells = [runs[name] for runs in tests]
            lost.append(mean(cells, "capabilities_lost"))
            needless.append((mean(cells, "over_refusal") + mean(cells, "over_warning")) / 2)
            drift.append(mean(cells, "drift_kl"))
            left.append(mean(cells, "failures_left"))
        sizes = [20 * (i + 1) for i in range(len(left))]
        for ax, x in zip(axes, (lost, needless, drift)):
            ax.plot(x, left, color=colour, linestyle=line)
            ax.scatter(x, left, s=sizes, color=colour, marker=marker)
    labels = ("capabilities lost (mean of three)", "over_refusal and over_warning (mean)",
              "drift: KL(base || model), nats per token")
    for ax, label in zip(axes, labels):
        ax.set(xlabel=label, ylabel="failures left (mean of three axes)")
    axes[1].set_title("trade-off: larger markers are larger learning rates (test split)")


def draw_curves(best, safety, runs):
    """Best of K random frames, and the safety curve."""
    for name, (colour, marker, line) in plots.STYLE.items():
        look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5}
        curve = runs[name]["jailbreak_best_of"]["curve"]
        best.plot(range(1, len(curve) + 1), curve, **look, markevery=(7, 16))
        curve = runs[name]["safety_awareness"]["curve"]
        safety.plot(np.linspace(0, 1, len(curve)), curve, **look, markevery=20, label=name)
    best.set(title="best of K random frames", xlabel="K", ylabel="recipes told",
             xscale="log", ylim=(-0.02, 1.02))
    safety.set(title="safety curve", xlabel="threshold tau", ylim=(0, 1.02),
               ylabel="share of facts warned of in at least tau")


def draw_details(study, path):
    """The trade-offs of the grid, best of K, the safety curve and the paired differences."""
    plt = pyplot()
    if plt is None:
        return
    cells = families_of(study)["llama"]
    fig, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    draw_tradeoffs(axes[0], study["grid"])
    draw_curves(axes[1, 0], axes[1, 1], over_seeds(cells))
    metrics = ("sycophancy", "jailbreak_static", "over_refusal", "over_warning",
               "safety_awareness", *LEARNT)
    series = {}
    for label in ("opct - sft", "opct-exact - sft-exact"):
        found = [contrast(cells, metric, CONTRASTS[label]) for metric in metrics]
        series[label.split()[0]] = found
    plots.points(axes[1, 2], metrics, series, vertical=True)
    axes[1, 2].axvline(0, color="black", linewidth=0.8)
    axes[1, 2].locator_params(axis="x", nbins=5)
    axes[1, 2].set(title="paired: opct minus sft, exact alike")
    fig.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=6,
               frameon=False)
    save_figure(plt, fig, path)


# --- The map and the attacks -----------------------------------------------------------------

FIRST_PANELS = {"failures_left": "failures left", "capabilities_lost": "capabilities lost",
                "over_refusal": "harmless recipes not told"}
MAP_PANELS = {**FIRST_PANELS, "drift_kl": "drift, nats a token"}
SECOND = "hollow: learning rate chosen\nat 12 pairs and 240 updates"


def draw_map_panel(ax, points, metric):
    """One figure against updates: means as lines, seeds as small dots, hollow markers for the means
    of the second reading. Drift is drawn on a log scale, which the base's 0 is not on."""
    for name in TARGETS:
        colour, marker, line = plots.STYLE[name]
        for second in (False, True):
            some = [point for point in points if point["second"] == second]
            if not some or (name == "base" and (second or metric == "drift_kl")):
                continue
            at = np.array([point["updates"] * (1.1 if second else 1) for point in some])
            seeds = [[cell["runs"][name][metric]["value"] for cell in point["cells"].values()]
                     for point in some]
            ax.plot(at, [np.mean(each) for each in seeds], color=colour, marker=marker,
                    linestyle="none" if second else line, markersize=5,
                    label=None if second else name, markerfacecolor="white" if second else colour)
            for x, each in zip(at, seeds):
                ax.plot([x] * len(each), each, ".", color=colour, markersize=3, alpha=0.5)
    ax.set_xscale("log")
    if metric == "drift_kl":
        ax.set_yscale("log")
    else:
        ax.axhline(0, color="black", linewidth=0.6)
    ax.grid(axis="y", alpha=0.3)
    passes = {point["updates"]: f"{point['updates']}\n({point['passes']:.0f})" for point in points}
    ax.set_xticks(list(passes), passes.values())
    ax.set_xticks([], minor=True)
    ax.set(title=MAP_PANELS[metric], xlabel="updates (passes over a response)")


def legend_of_map(fig, ax, plt):
    handles, labels = ax.get_legend_handles_labels()
    hollow = plt.Line2D([], [], color="black", marker="o", linestyle="none",
                        markerfacecolor="white")
    fig.legend([*handles, hollow], [*labels, SECOND], loc="outside lower center", ncols=6,
               frameon=False)


def draw_map(study, path):
    """What breaks where: a row a number of pairs, a panel a figure, updates to the right."""
    plt = pyplot()
    if plt is None:
        return
    points = study["map"]["points"]
    numbers = sorted({point["pairs"] for point in points}, reverse=True)
    fig, axes = plt.subplots(len(numbers), len(MAP_PANELS), figsize=(14, 3.4 * len(numbers)),
                             sharey="col", squeeze=False, layout="constrained")
    for row, pairs in zip(axes, numbers):
        some = [point for point in points if point["pairs"] == pairs]
        for ax, metric in zip(row, MAP_PANELS):
            draw_map_panel(ax, some, metric)
        row[0].set_ylabel(f"{pairs} pairs")
    legend_of_map(fig, axes[0, 0], plt)
    save_figure(plt, fig, path)


def draw_first(study, path):
    """For the main README: three panels of the map at its largest number of pairs."""
    plt = pyplot()
    if plt is None:
        return
    most = max(point["pairs"] for point in study["map"]["points"])
    points = [point for point in study["map"]["points"] if point["pairs"] == most]
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for ax, metric in zip(axes, FIRST_PANELS):
        draw_map_panel(ax, points, metric)
    legend_of_map(fig, axes[0], plt)
    save_figure(plt, fig, path)


def draw_matrix(ax, cells):
    """Share told: whose attacker (down) against which target (across), mean over seeds."""
    told = np.mean([[[cell["pool"]["matrix"][a][b] for b in TARGETS] for a in TARGETS]
                    for cell in cells], 0)
    ax.imshow(told, vmin=0, vmax=1, cmap="Blues")
    for i, j in np.ndindex(told.shape):
        ax.text(j, i, f"{told[i, j]:.2f}", ha="center", va="center",
                color="white" if told[i, j] > 0.6 else "black")
    ax.set_xticks(range(len(TARGETS)), TARGETS, rotation=30)
    ax.set_yticks(range(len(TARGETS)), TARGETS)
    ax.set(title="attacker of (row) against (column): share told", xlabel="against",
           ylabel="strongest attacker of")


def draw_attacks(study, path):
    """How the attackers learnt, what the pool gets, and how attacks carry over."""
    plt = pyplot()
    if plt is None:
        return
    cells = families_of(study)["llama"]
    runs = over_seeds(cells)
    fig, (learning, best, shared) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for name in TARGETS:
        colour, _, line = plots.STYLE[name]
        curves = np.array([curve for cell in cells for curve in cell["attacks"][name]["curves"]])
        updates = range(1, curves.shape[1] + 1)
        learning.plot(updates, curves.T, color=colour, linewidth=0.3, alpha=0.4)
        learning.plot(updates, curves.mean(0), color=colour, linestyle=line, linewidth=2,
                      label=name)
        for metric, width in (("jailbreak_pool_best_of", 2), ("jailbreak_adaptive_best_of", 0.8)):
            curve = runs[name][metric]["curve"]
            best.plot(range(1, len(curve) + 1), curve, color=colour, linestyle=line,
                      linewidth=width)
    learning.set(title="attackers in training: each thin, their mean thick", xlabel="update",
                 ylabel="share told, validation recipes", ylim=(-0.02, 1.02))
    best.set(title="best of K: the pool thick, own attacker thin", xlabel="K", xscale="log",
             ylabel="test recipes told", ylim=(-0.02, 1.02))
    draw_matrix(shared, cells)
    fig.legend(*learning.get_legend_handles_labels(), loc="outside lower center", ncols=5,
               frameon=False)
    save_figure(plt, fig, path)
