"""The two figures of eval.py; studies/plots.py has those of the studies."""
from support.report import COLOURS, pyplot, save_figure

# What `draw_compare` shows: figure -> title. "capabilities" are drawn as what was lost of them.
PANELS = {"failures_left": "what is left to fix:\nfailures",
          "capabilities": "what was broken:\ncapabilities lost",
          "over_refusal": "what was broken:\nharmless requests refused",
          "drift_kl": "how far it moved:\nKL(base || model), nats a token"}


def draw_compare(runs, path):
    """A row a run and a panel a figure, as bars with 95 % intervals: shorter is always better.

    runs: run -> its figures; the first run is the base.
    """
    plt = pyplot()
    if plt is None:
        return
    names, base = list(runs), next(iter(runs.values()))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    fig, axes = plt.subplots(1, len(PANELS), figsize=(12, 1.8 + 0.4 * len(names)), sharey=True)
    for ax, (metric, title) in zip(axes, PANELS.items()):
        figures = [runs[name][metric] for name in names]
        values = [figure["value"] for figure in figures]
        halves = [(figure["high"] - figure["low"]) / 2 for figure in figures]
        if metric == "capabilities":
            values = [base[metric]["value"] - value for value in values]
            halves[0] = 0.0                                 # the base against itself
        ax.barh(names, values, xerr=halves, color=colours, height=0.7,
                error_kw={"elinewidth": 0.8, "ecolor": "#444444"})
        room = max(v + h for v, h in zip(values, halves)) or 1.0
        for row, (value, half) in enumerate(zip(values, halves)):
            ax.text(max(value + half, 0) + 0.03 * room, row, f"{value:.3f}", va="center", size=8)
        ax.set(title=title, xlim=(min(0, *(v - h for v, h in zip(values, halves))), 1.3 * room))
        ax.axvline(0, color="black", linewidth=0.8)
        ax.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()
    fig.suptitle("Shorter bars are better. teacher: the base on clean prompts, which is the aim")
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
