"""What the figures of the studies share."""
import numpy as np

from support.report import COLOURS

# Colour, marker and line of each run, the same in every figure.
NAMES = ("base", "sft", "sft-exact", "opct", "opct-exact", "teacher")
LINES = (":", "-", "-", "--", "--", ":")
STYLE = dict(zip(NAMES, zip(COLOURS, "xos^D+", LINES)))


def points(ax, labels, series, vertical=False):
    """Draws the figures of each series beside each other, as points with their intervals.

    Args:
        labels: what each position is. series: name -> list of figures, None where there is none.
    """
    for k, (name, figures) in enumerate(series.items()):
        colour, marker, _ = STYLE[name]
        found = [i for i, figure in enumerate(figures) if figure]
        at = np.array(found) + (k - (len(series) - 1) / 2) * 0.7 / len(series)
        value = [figures[i]["value"] for i in found]
        half = [figures[i].get("half", 0) for i in found]
        look = {"fmt": marker, "color": colour, "capsize": 2, "label": name, "markersize": 5}
        if vertical:
            ax.errorbar(value, at, xerr=half, **look)
        else:
            ax.errorbar(at, value, yerr=half, **look)
    if vertical:
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
    else:
        ax.set_xticks(range(len(labels)), labels)
