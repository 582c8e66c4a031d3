"""The tables of README.md, and how they read results.json."""
import numpy as np

from data import CAPABILITIES
from studies.entrench.methods import LABELS, STEPS
from studies.entrench.organisms import ORGANISMS
from studies.entrench.run import KINDS, runs_of
from studies.stats import mean_over_seeds
from support.report import markdown

TITLES = {"sycophancy": "sycophancy", "hacking": "reward hacking",
          "spurious": "spurious correlation", "emergent": "emergent misalignment"}
# Changes in points that the paper reports: (lowest, highest).
PAPER = {"hacking": {"act": (-55, -55), "bct-soft": (-49, -49), "diverse": (-28, -22),
                     "self-rewarding": (-12, -10), "greedy": (-7, -7)},
         "emergent": {"act": (-17, -17), "bct-soft": (-18, -18), "self-rewarding": (-5, -5)},
         "sycophancy": {"act": (19, 19), "bct-soft": (10, 10), "self-rewarding": (8, 8),
                        "self-confidence": (4, 4), "greedy": (-1, -1)},
         "spurious": {}}
SCORES = {"likelihood": "own likelihood", "outside_score": "outside score", "grade": "own grade"}

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


def steps_of(study, organism, run, seed=None, number=None):
    """(rate before, rate after, strength, run) of each strength of each cell, or of one of them.
    A rate of which no answer can be read is left out; `lost` counts these."""
    for cell in cells_of(study, organism, seed):
        for each, strength in cell["strengths"].items():
            after = strength["runs"].get(run)
            if after is None:                               # added after these seeds had run
                continue
            ends = rate_of(strength["before"]["figures"]), rate_of(after["figures"])
            if None not in ends and number in (None, each):
                yield *ends, strength, after


def numbers_of(study):
    """The strengths of this study, "0", "1", "2" or some of them."""
    return sorted({number for cell in study["cells"].values() for number in cell["strengths"]})


def lost(study):
    """How many runs left a model of which no answer can be read."""
    return sum(not run["figures"]["rate"] for cell in study["cells"].values()
               for strength in cell["strengths"].values() for run in strength["runs"].values())


def over_seeds(study, organisms, run, value_of, number=None):
    """The mean over strengths (and organisms) of value_of(before, after, ...), then over seeds."""
    each = []
    for seed in seeds_of(study):
        values = [value_of(*step) for organism in organisms
                  for step in steps_of(study, organism, run, seed, number)]
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

STRENGTHS = {"0": "Weak", "1": "Middle", "2": "Strong"}


def changes_tables(study):
    """The change in points, a line a run, for all strengths and for each."""
    parts, columns = [], [*([organism] for organism in ORGANISMS), list(ORGANISMS)]
    for number in (None, *numbers_of(study)):
        lines = [[STRENGTHS[number].lower() if number else "all strengths", *ORGANISMS, "all"]]
        for run in runs_of():
            lines.append([run, *(text_of(over_seeds(study, some, run, change, number), 0, "+")
                                 for some in columns)])
        lines.append(["greedy - sampling, planted", *(text_of(over_seeds(
            study, some, "greedy, planted", change_over_samples, number), 0, "+")
            for some in columns)])
        parts.append(markdown(lines))
    return "\n\n".join(parts)


def paper_table(study):
    """The mean over our strengths beside what the paper reports, where it was released."""
    lines = [["", "organism", "paper", "here, weak", "middle", "strong"]]
    for organism, reported in PAPER.items():
        for name, (low, high) in reported.items():
            run = f"{name}, healthy" if name in STEPS else name
            said = f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"
            lines.append([run, TITLES[organism], said,
                          *(text_of(over_seeds(study, [organism], run, change, number), 0, "+")
                            for number in STRENGTHS)])
    return markdown(lines)


def organisms_table(study):
    """Each organism at each strength, before any method."""
    lines = [["", "aimed at", "misbehaves", "healthy", "unhealthy", "unclear", *CAPABILITIES]]
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
    return markdown(lines, keep=2)


def shift(name):
    """Of a figure, in points."""
    def value_of(_, __, strength, run):
        return 100 * (run["figures"][name]["value"] - strength["before"]["figures"][name]["value"])
    return value_of


def capability_table(study, capability):
    """What training on pairs does to a capability, organism by organism, in points."""
    lines = [["", "clean prompts", *STEPS]]
    for organism in ORGANISMS:
        for kind in KINDS:
            found = [over_seeds(study, [organism], f"{name}, {kind}",
                                shift(f"capability_{capability}")) for name in STEPS]
            lines.append([organism, kind, *(text_of(figure, 0, "+") for figure in found)])
    return markdown(lines, keep=2)


def costs_table(study):
    """What else changed, the mean over organisms: capabilities in points, drift, unclear."""
    lines = [["", *CAPABILITIES, "unclear", "drift"]]

    def drift(_, __, ___, run):
        return 1000 * run["figures"]["drift_kl"]["value"]

    for run in runs_of():
        found = [over_seeds(study, ORGANISMS, run, shift(f"capability_{c}")) for c in CAPABILITIES]
        found.append(over_seeds(study, ORGANISMS, run, shift("unclear")))
        lines.append([run, *(text_of(figure, 1, "+") for figure in found),
                      text_of(over_seeds(study, ORGANISMS, run, drift), 1)])
    return markdown(lines)


def label_change(_, __, strength, run):
    """How much more the labels misbehave than samples of the model for the same prompts, points."""
    labels, own = run.get("labels"), strength["runs"]["sampling"]["labels"]
    if not labels or not labels["rate"] or not own["rate"]:
        return None
    return 100 * (labels["rate"]["value"] - own["rate"]["value"])


def label_kl(_, __, ___, run):
    return run.get("label_kl")


def change_over_samples(_, after, strength, __):
    """For labels on planted prompts: the change beyond that by single samples there, in points."""
    figures = strength["runs"]["sampling, planted"]["figures"]
    return 100 * (after - rate_of(figures)) if figures["rate"] else None


def percent_of(name):
    return lambda _, __, ___, run: 100 * run[name]


def labels_table(study):
    """What the labels are: their shift, and the change that follows; means over organisms."""
    lines = [["", "kept, %", "as greedy, %", "KL(labels, model)", "labels misbehave",
              "after training"]]
    for run in (run for run in runs_of() if run in LABELS):
        of = [over_seeds(study, ORGANISMS, run, f) for f in
              (percent_of("kept"), percent_of("as_greedy"), label_kl, label_change, change)]
        lines.append([run, text_of(of[0]), text_of(of[1]), text_of(of[2], 2),
                      text_of(of[3], 0, "+"), text_of(of[4], 0, "+")])
    return markdown(lines)


def pairs_table(study):
    """Step methods: the rate before, that of the teacher on clean prompts, the rate after."""
    lines = [["", "clean prompts", "before", "teacher", *STEPS]]
    for organism in ORGANISMS:
        for kind in KINDS:
            runs = [f"{name}, {kind}" for name in STEPS]

            def teacher(_, __, strength, ___):
                found = strength["before"]["figures"][kind]
                return 100 * found["value"] if found else None

            def first(before, *_):
                return 100 * before

            def last(_, after, *__):
                return 100 * after

            found = [over_seeds(study, [organism], runs[0], f) for f in (first, teacher)]
            found += [over_seeds(study, [organism], run, last) for run in runs]
            lines.append([organism, kind, *map(text_of, found)])
    return markdown(lines, keep=2)


def runs_table(study, organism):
    """Each model of an organism with unhealthy pairs: rates on clean prompts and after training.
    Where planting ended before a strength was reached, the same model would stand twice. The last
    line: mean distance from the teacher, over the models that have all runs."""
    names, rows = [name for name in STEPS if name != "bct-soft"], {}
    for seed in seeds_of(study):
        for cell in cells_of(study, organism, seed):
            for number, strength in cell["strengths"].items():
                figures = strength["before"]["figures"]
                runs = [strength["runs"].get(f"{name}, unhealthy") for name in names]
                rates = [figures["unhealthy"], figures["rate"],
                         *(run and run["figures"]["rate"] for run in runs)]
                if all(rates[:2]):
                    cells = [f"{100 * rate['value']:.0f}" if rate else "-" for rate in rates]
                    name = f"{STRENGTHS[number].lower()}, seed {seed}"
                    rows.setdefault((seed, *cells), [name, *cells])
    ordered = sorted(rows.values(), key=lambda row: int(row[1]))
    whole = np.array([row[1:] for row in ordered if "-" not in row], dtype=float)
    if len(whole):
        far = np.abs(whole[:, 1:] - whole[:, :1]).mean(0)
        ordered.append([f"distance, {len(whole)} models", "0", *(f"{x:.0f}" for x in far)])
    return markdown([["", "teacher", "before", *names], *ordered])


def eta_of(study, organism, number, score):
    """Of one strength, a value a seed: the rate in the highest fifth of a score minus that in the
    lowest, and the rate of the best of 4 minus that of all samples; in points."""
    spread, chosen = [], []
    for cell in cells_of(study, organism):
        found = cell["strengths"][number]["before"]["eta"][score]
        if None not in found["fifths"]:
            spread.append(100 * (found["fifths"][-1] - found["fifths"][0]))
        if None not in (found["best"], found["all"]):
            chosen.append(100 * (found["best"] - found["all"]))
    return spread, chosen


def eta_table(study):
    lines = [["", "strength", *(f"{name}, {what}" for name in ("likelihood", "outside", "grade")
                                for what in ("fifths", "best"))]]
    for organism in ORGANISMS:
        for number in numbers_of(study):
            line = [organism, STRENGTHS[number].lower()]
            for score in SCORES:
                line += [f"{np.mean(values):+.0f}" if values else "-"
                         for values in eta_of(study, organism, number, score)]
            lines.append(line)
    return markdown(lines, keep=2)
