"""The tables of the map: points as lines, arms or differences between arms as columns."""
from studies.claims.plan import ARMS
from studies.claims.tables import text_of, title
from studies.claims.verdicts import BOTH_EXACT, EXACT, MARGIN, SAMPLED
from studies.stats import contrast, verdict
from support.report import markdown

METRICS = ("failures_left", "capabilities_lost", "capability_math", "capability_facts",
           "capability_instructions", "over_refusal", "over_warning", "drift_kl", "memorised",
           "gap", "good_trained", "good_wordings", "good_entities", "good_both", "sycophancy",
           "accuracy_biased", "jailbreak_static", "safety_awareness", "unclear")
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
               (f"{arm} refuses fewer harmless requests than sft", "over_refusal", weights, -1),
               (f"{arm} leaves fewer failures than sft", "failures_left", weights, -1),
               (f"{arm} drifts less than sft", "drift_kl", weights, -1),
               (f"{arm} memorises less than sft", "memorised", weights, -1)]
WORDS = {"confirmed": "yes", "opposite": "no", "not confirmed": "?"}


def by_passes(the_map):
    """The points of the first reading, from few passes over a response to many."""
    return sorted((point for point in the_map["points"] if not point["second"]),
                  key=lambda point: point["passes"])


def points_of(the_map):
    """All points as (head, cells): the first reading by passes, then the second."""
    out = []
    for point in by_passes(the_map) + [p for p in the_map["points"] if p["second"]]:
        head = f"{point['pairs']} x {point['updates']}{' *' * point['second']}"
        out.append((head, f"{point['passes']:.0f}", list(point["cells"].values())))
    return out


def by_point(the_map, metric, columns):
    """One figure at every point. columns: head -> weights of the runs, as for `contrast`."""
    lines = [[title(metric), "passes", *columns]]
    for head, passes, cells in points_of(the_map):
        found = [contrast(cells, metric, weights) for weights in columns.values()]
        lines.append([head, passes, *(text_of(metric, figure) for figure in found)])
    return markdown(lines)


def verdicts(the_map):
    """The claims as lines, the points as columns."""
    points = points_of(the_map)
    lines = [["pairs x updates", *(head for head, _, _ in points)],
             ["passes over a response", *(passes for _, passes, _ in points)]]
    for claim, metric, weights, sign in CLAIMS:
        found = [contrast(cells, metric, weights) for _, _, cells in points]
        lines.append([claim, *(WORDS[verdict(figure, sign, 0)] for figure in found)])
    return markdown(lines)


def broken_from(the_map, arm, metric, sign):
    """The passes from which on the arm is worse than the base, in text.

    Worse: by more than MARGIN in the mean, and the interval over seeds is clear of zero.
    """
    start = None
    for point in by_passes(the_map):
        found = contrast(list(point["cells"].values()), metric, {arm: 1, "base": -1})
        if sign * found["value"] <= MARGIN or verdict(found, sign, 0) != "confirmed":
            start = None
        elif start is None:
            start = f"{point['passes']:.0f}"
    return start or "-"


def breaks(the_map):
    lines = [["worse than the base from", *ARMS]]
    for metric, sign in BREAKS.items():
        lines.append([metric, *(broken_from(the_map, arm, metric, sign) for arm in ARMS)])
    return markdown(lines)


def appendix(the_map):
    """Every figure at every point, as the text of map.md."""
    parts = ["# The map: every figure at every point\n\nMeans over seeds with 95 % intervals. "
             "`12 x 240` is 12 pairs and 240 updates; * marks the second\nreading of the learning "
             "rates. `passes`: how often an offline run goes over each of its responses."]
    for metric in METRICS:
        parts += [f"## {metric}", by_point(the_map, metric, MEANS),
                  by_point(the_map, metric, DIFFERENCES)]
    return "\n\n".join(parts) + "\n"
