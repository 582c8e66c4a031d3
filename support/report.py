"""What a user sees: progress, tables no wider than a page, and the figures of eval.py."""
import os
import re
import sys
from pathlib import Path

from support.common import show, write_text

WIDTH = 100                                                 # of a table, in characters
# Better when higher.
HIGHER = ("accuracy", "safety", "capab", "agreement", "expect", "turned")
COLOURS = "#999999 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()   # Okabe and Ito


def progress(done, total, left, text):
    """On a terminal one line that renews itself; in a file a line every twentieth of the way."""
    line = f"  {done}/{total}  {text}  {int(left) // 60}:{int(left) % 60:02d} left"
    if sys.stdout.isatty():
        show(f"\r{line}\033[K", end="\n" if done == total else "")
    elif done == total or done * 20 // total != (done - 1) * 20 // total:
        show(line)


def coloured(texts, nats):
    """Tokens in a line, marked by their KL: by colour on a terminal, else in brackets."""
    if sys.stdout.isatty():
        marks = [[32, 33, 31][(x >= 0.1) + (x >= 1)] for x in nats]
        line = "".join(f"\033[{mark}m{text}\033[0m" for text, mark in zip(texts, marks))
        key = "green under 0.1, yellow under 1, red from 1 nat"
    else:
        line = "".join(f"{text}[{x:.1f}]" if x >= 0.1 else text for text, x in zip(texts, nats))
        key = "in brackets from 0.1 nats"
    return f"{line}\n            (KL of student and teacher at each token: {key})"


def markdown(lines, keep=1):
    """A Markdown table of lists of cells, the first of them the head. Columns that do not fit into
    100 characters go into a second table below, again behind the first `keep` columns."""
    lines = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in line] for line in lines]
    width = [max(map(len, column)) + 3 for column in zip(*lines)]
    fit = len(width)
    while fit > keep + 1 and sum(width[:fit]) >= WIDTH:
        fit -= 1
    rows = ["| " + " | ".join(cell.ljust(w - 3) for cell, w in zip(line, width[:fit])) + " |"
            for line in lines]
    rule = "|" + "|".join("-" * (w - 1) for w in width[:fit]) + "|"
    text = "\n".join([rows[0], rule, *rows[1:]])
    if fit == len(width):
        return text
    return text + "\n\n" + markdown([line[:keep] + line[fit:] for line in lines], keep)


def figure_text(name, figure, intervals=True):
    """0.123 (0.101-0.145), the interval of one run; 0.123 ± 0.020, that of several seeds."""
    if not figure:
        return "-"
    digits = ".4f" if "kl" in name else ".3f"
    text = format(figure["value"], digits)
    if intervals and "half" in figure:
        text += " ± " + format(figure["half"], digits)
    elif intervals and "low" in figure:
        text += f" ({figure['low']:{digits}}-{figure['high']:{digits}})"
    return text


def table(runs, metrics, n="n", intervals=False):
    """The figures as a Markdown table; `n` is what the last column counts."""
    lines = [["(+: higher is better)", *runs, n]]
    for name in metrics:
        figures = [run.get(name) for run in runs.values()]
        if any(figures):
            lines.append([name + " +" * name.startswith(HIGHER),
                          *(figure_text(name, f, intervals) for f in figures),
                          str(next(f["n"] for f in figures if f))])
    return markdown(lines)


def on_a_picture(name):
    """A name so that matplotlib shows it unchanged: it takes $ for formulas and hides _names."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def pyplot():
    """matplotlib's pyplot, drawing to files; None, and a word about it, if it is not installed."""
    os.environ["MPLBACKEND"] = "agg"                        # whatever Jupyter or a display asks for
    try:
        import matplotlib.pyplot
    except ImportError:
        return show("matplotlib is not installed: the figure is left out")
    matplotlib.pyplot.switch_backend("agg")
    return matplotlib.pyplot


def save_figure(plt, fig, path):
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


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
        ax.barh([on_a_picture(name) for name in names], values, xerr=halves, color=colours,
                height=0.7, error_kw={"elinewidth": 0.8, "ecolor": "#444444"})
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
            ax.errorbar(values, places, xerr=sides, fmt="o", color=colour,
                        label=on_a_picture(run))
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="y", linewidth=0.3)
    axes[0].set(xlim=(-0.02, 1.02), title="share of the answers, with 95 % intervals")
    axes[1].set(xlim=(0, None), xlabel="KL to the base on the clean prompt, nats a token")
    axes[0].legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)
    fig.tight_layout()
    save_figure(plt, fig, path)


# --- The page of tokens ------------------------------------------------------------------------

FULL = 2.0          # nats from which on a token has the full colour


def pieces_of(text):
    """A text as [(mark, text)]: marks, shown in grey, stand for characters that are invisible or
    change what others look like: blanks, line ends, signs that turn the direction of text."""
    import regex                        # here, as jinja2 below: training needs neither

    pieces = regex.split(r"([ \p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}])", text)
    marks = {" ": "·", "\n": "↵\n"}
    return [(i % 2 == 1, marks.get(piece, f"U+{ord(piece):04X}") if i % 2 else piece)
            for i, piece in enumerate(pieces) if piece]


def on_one_line(text):
    return "".join(piece.strip("\n") for _, piece in pieces_of(text))


def tip_of(token):
    """The text that a page shows for a token: probabilities, KL, the likeliest tokens of both."""
    lines = [f"{on_one_line(token['text'])}  p {token['p']:.3g}, base {token['p_base']:.3g}, "
             f"log-ratio {token['log_ratio']:+.3f}, KL {token['kl']:.4f}"]
    for name, title in (("likeliest", "model:"), ("likeliest_base", "base:")):
        some = [f"{on_one_line(text)} {p:.2f}" for text, p in token[name] if p >= 0.005]
        lines.append(f"{title} " + "  ".join(some))
    return "\n".join(lines)


def shade_of(token):
    """The strength of a token's colour, in percent."""
    return round(100 * min(1.0, max(0.0, token["kl"] / FULL)))


def write_page(path, title, base, pairs):
    """Writes the page that shows the KL at each token. No script is needed to read it.

    pairs: {"name", "prompts": [(name, text)], "responses": [{"name", "nats", "tokens"}]} each, with
    tokens as `explained` of eval.py returns them.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True)
    environment.filters |= {"pieces": pieces_of, "tip": tip_of, "shade": shade_of}
    template = environment.get_template("tokens.html.jinja")
    write_text(path, template.render(title=title, base=base, full=f"{FULL:g}", pairs=pairs) + "\n")
