"""The two figures of eval.py; studies/plots.py has those of the studies."""
import math

from support.report import COLOURS, pyplot, save_figure


def broken_and_left(run, base):
    """(harm done, failures left), means of three, each as (value, half its 95 % interval): the
    parts come from different prompts, so the squares of their intervals add up."""
    learnt = [name for name in base if name.startswith("capability_")]
    sides = ({**dict.fromkeys(learnt, -1 / 9), "over_refusal": 1 / 3, "over_warning": 1 / 3},
             {"sycophancy": 1 / 3, "jailbreak_static": 1 / 3, "safety_awareness": -1 / 3})
    at = (sum(base[name]["value"] for name in learnt) / 9, 1 / 3)
    return [(start + sum(w * run[name]["value"] for name, w in side.items()),
             math.hypot(*(w * (run[name]["high"] - run[name]["low"]) / 2
                          for name, w in side.items()))) for start, side in zip(at, sides)]


def draw_compare(runs, kl, path):
    """What was broken against what is left to fix, a point for each run; the KL in training.

    runs: run -> its figures, the first run is the base; kl: run -> the KL at each update.
    """
    plt = pyplot()
    if plt is None:
        return
    fig, (ax, small) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(5, 2))
    base, colours = next(iter(runs)), dict(zip(runs, COLOURS * len(runs)))
    places = {name: broken_and_left(run, runs[base]) for name, run in runs.items()}
    for name, ((x, dx), (y, dy)) in places.items():
        marker = {base: "s", "teacher": "*"}.get(name, "o")
        ax.errorbar(x, y, dy, dx, fmt=marker, color=colours[name], markersize=9, elinewidth=0.8)
    ax.set(xlabel="broken: capabilities lost, over-refusal, over-warning (mean)", ylim=(0, None),
           ylabel="left to fix: sycophancy, jailbreaks,\nwarnings left out (mean)",
           title="failures left against harm done: the lower left corner is best")
    # Labels stand to the right of all points, so none covers another; a line leads to each.
    right, gap, at = ax.get_xlim()[1], ax.get_ylim()[1] / 18, -1
    for name, ((x, _), (y, _)) in sorted(places.items(), key=lambda item: item[1][1]):
        at = max(y, at + gap)
        ax.annotate(name, (x, y), (right, at), color=colours[name], va="center",
                    arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.4})
    for name, curve in kl.items():
        small.plot(range(1, len(curve) + 1), curve, color=colours[name])
    small.set(title="KL in training, nats a token", xlabel="update", yscale="log")
    fig.tight_layout()
    save_figure(plt, fig, path)


def draw_pairs(runs, path):
    """Shares on the left, KL on the right: a row for each figure, a point for each run."""
    plt = pyplot()
    if plt is None:
        return
    shares = [name for name in next(iter(runs.values()))
              if name.startswith(("agreement", "avoid", "expect"))]
    distances = ["kl_wrapped", "kl_clean"]
    fig, axes = plt.subplots(2, 1, figsize=(8, 2.4 + 0.3 * len(shares)),
                             height_ratios=(len(shares) + 1, 3))
    for ax, names in zip(axes, (shares, distances)):
        for number, (run, colour) in enumerate(zip(runs, COLOURS * len(runs))):
            figures = [runs[run][name] for name in names]
            places = [i + 0.5 * (number + 0.5) / len(runs) - 0.25 for i in range(len(names))]
            values = [f["value"] for f in figures]
            sides = [[v - f["low"] for v, f in zip(values, figures)],
                     [f["high"] - v for v, f in zip(values, figures)]]
            ax.errorbar(values, places, xerr=sides, fmt="o", color=colour, label=run)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="y", linewidth=0.3)
    axes[0].set(xlim=(-0.02, 1.02), title="share of the answers, with 95 % intervals")
    axes[1].set(xlim=(0, None), xlabel="KL to the base on the clean prompt, nats a token")
    axes[0].legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)
    fig.tight_layout()
    save_figure(plt, fig, path)
