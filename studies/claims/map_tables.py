"""The tables of the map: points as lines, arms or differences between arms as columns."""
from data import AXES
from studies.claims.tables import figures_table, text_of, title
from studies.claims.verdicts import BOTH_EXACT, EXACT, MARGIN, SAMPLED
from studies.stats import contrast, over_seeds, verdict
from studies.study import ARMS
from support.report import markdown

GOOD = ("good_trained", "good_wordings", "good_entities", "good_both")
METRICS = ("failures_left", "capabilities_lost", "capability_math", "capability_facts",
           "capability_instructions", "over_refusal", "over_warning", "drift_kl", "memorised",
           "gap", *GOOD, *(f"{kind}_{axis}" for kind in GOOD for axis in AXES), "sycophancy",
           "bias_reliance", "accuracy_biased", "accuracy_right_hint", "jailbreak_static",
           "jailbreak_best_of", "safety_awareness", "mean_failure", "unclear")
MEANS = {name: {name: 1} for name in ("base", *ARMS)}
OFFLINE_EXACT = {"sft-exact": 1, "sft": -1}
DIFFERENCES = {"opct - sft": SAMPLED, "opct-exact - sft": EXACT, "sft-exact - sft": OFFLINE_EXACT,
               "opct-exact - sft-exact": BOTH_EXACT}
# What an arm may break: figure -> the sign of the change for the worse.
BREAKS = {"capability_math": -1, "capability_facts": -1, "capability_instructions": -1,
          "over_refusal": 1, "over_warning": 1, "unclear": 1}

# claim, figure, contrast, the sign that the claim says it has.
CLAIMS = []
for arm in ("opct", "opct-exact", "sft-exact"):
    weights = {arm: 1, "sft": -1}
    CLAIMS += [(f"{arm} keeps more arithmetic than sft", "capability_math", weights, 1),
               (f"{arm} keeps more facts than sft", "capability_facts", weights, 1),
               (f"{arm} keeps more instructions than sft", "capability_instructions", weights, 1),
               (f"{arm} tells more harmless ones than sft", "over_refusal", weights, -1),
               (f"{arm} leaves fewer failures than sft", "failures_left", weights, -1),
               (f"{arm} drifts less than sft", "drift_kl", weights, -1),
               (f"{arm} memorises less than sft", "memorised", weights, -1)]
WORDS = {"confirmed": "yes", "opposite": "no", "not confirmed": "?"}


def by_passes(the_map, second=False):
    """The points of a reading, from few passes over a response to many."""
    return sorted((point for point in the_map["points"] if point["second"] == second),
                  key=lambda point: point["passes"])


def seeds_of(the_map):
    """How many seeds its points have: "5", or "3 to 5" if that differs."""
    numbers = sorted({len(point["cells"]) for point in the_map["points"]})
    return " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def in_order(the_map):
    """All points: those of the first reading, then those of the second."""
    return by_passes(the_map) + by_passes(the_map, second=True)


def by_point(the_map, metric, columns):
    """One figure at every point. columns: head -> weights of the runs, as for `contrast`."""
    lines = [["", *columns]]
    for point in in_order(the_map):
        cells = list(point["cells"].values())
        found = [contrast(cells, metric, weights) for weights in columns.values()]
        head = f"{point['pairs']} x {point['updates']}{' *' * point['second']}"
        lines.append([head, *(text_of(metric, figure) for figure in found)])
    return markdown(lines)


def verdicts(the_map):
    """The claims as lines, the points as columns."""
    points = in_order(the_map)
    lines = [["pairs", *(f"{point['pairs']}{'*' * point['second']}" for point in points)],
             ["updates", *(str(point["updates"]) for point in points)],
             ["passes over a response", *(f"{point['passes']:.0f}" for point in points)]]
    for claim, metric, weights, sign in CLAIMS:
        found = [contrast(list(point["cells"].values()), metric, weights) for point in points]
        lines.append([claim, *(WORDS[verdict(figure, sign, 0)] for figure in found)])
    return markdown(lines)


def broken_from(points, arm, metric, sign):
    """The updates from which on the arm is worse than the base, in text. points: all with the same
    pairs, from few updates to many.

    Worse: by more than MARGIN in the mean, and the interval over seeds is clear of zero.
    """
    start = None
    for point in points:
        found = contrast(list(point["cells"].values()), metric, {arm: 1, "base": -1})
        if found["n"] < 3:
            return "?"
        if sign * found["value"] <= MARGIN or verdict(found, sign, 0) != "confirmed":
            start = None
        elif start is None:
            start = str(point["updates"])
    return start or "-"


def breaks(the_map):
    rows = {}
    for point in by_passes(the_map):                        # with equal pairs that is by updates
        rows.setdefault(point["pairs"], []).append(point)
    lines = [["worse than the base from update", *ARMS]]
    for metric, sign in BREAKS.items():
        for pairs, points in sorted(rows.items()):
            lines.append([f"{metric}, {pairs} pairs",
                          *(broken_from(points, arm, metric, sign) for arm in ARMS)])
    return markdown(lines)


def generalisation(the_map):
    """Good responses to what was trained and to what is new, after the most updates on the most
    pairs."""
    point = max(by_passes(the_map), key=lambda point: (point["updates"], point["pairs"]))
    return figures_table(over_seeds(list(point["cells"].values())), MEANS, GOOD)


def appendix(the_map):
    """Every figure at every point, as the text of map.md."""
    parts = ["# The map: every figure at every point\n\nMeans over seeds with 95 % intervals. "
             "`12 x 240` is 12 pairs and 240 updates; * marks the second\nreading of the learning "
             "rates."]
    for metric in METRICS:
        parts += [f"## {title(metric)}", by_point(the_map, metric, MEANS),
                  by_point(the_map, metric, DIFFERENCES)]
    return "\n\n".join(parts) + "\n"
