"""Tables and figures: Markdown no wider than a page, matplotlib where it is installed."""

WIDTH = 100                                                 # of a table, in characters
COLOURS = "#999999 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()   # Okabe and Ito


def markdown(lines):
    """A Markdown table of lists of cells, the first of them the head. Columns that do not fit into
    100 characters go into a second table below, again behind the first column."""
    width = [max(map(len, column)) + 3 for column in zip(*lines)]
    fit = len(width)
    while fit > 2 and sum(width[:fit]) >= WIDTH:
        fit -= 1
    rows = ["| " + " | ".join(cell.ljust(w - 3) for cell, w in zip(line, width[:fit])) + " |"
            for line in lines]
    rule = "|" + "|".join("-" * (w - 1) for w in width[:fit]) + "|"
    text = "\n".join([rows[0], rule, *rows[1:]])
    if fit == len(width):
        return text
    return text + "\n\n" + markdown([line[:1] + line[fit:] for line in lines])


def pyplot():
    """matplotlib's pyplot, drawing to files; None, and a word about it, if it is not installed."""
    try:
        import matplotlib.pyplot
    except ImportError:
        return print("matplotlib is not installed: the figure is left out")
    matplotlib.use("agg")
    return matplotlib.pyplot


def save_figure(plt, fig, path):
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
