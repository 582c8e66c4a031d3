"""Statistics over seeds. A seed (a world, a base model and its runs) is one observation."""
import math

import numpy as np

# The 97.5 % point of Student's t, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
POWER = 0.84                # the 80 % point of the normal distribution


def student(n):
    """The 97.5 % point of Student's t for n seeds; beyond the table its expansion, within 0.01."""
    return STUDENT.get(n, 1.96 + 2.4 / (n - 1) + 2.8 / (n - 1) ** 2)


def mean_over_seeds(values):
    """The mean and the half width of its 95 % interval (Student's t)."""
    mean, n = np.mean(values).item(), len(values)
    if n == 1:                                              # one seed says nothing about others
        return {"value": mean, "n": n}
    half = student(n) * np.std(values, ddof=1).item() / math.sqrt(n)
    return {"value": mean, "half": half, "low": mean - half, "high": mean + half, "n": n}


def contrast(cells, metric, weights):
    """The weighted sum of the runs' figures, seed by seed, then the mean over seeds.

    The runs of a cell share base model, pairs and random numbers, so their difference varies
    less than each of them. Returns None if a cell lacks one of the figures.
    """
    values = []
    for cell in cells:
        runs = cell["runs"]
        if any(metric not in runs.get(name, {}) for name in weights):
            return None
        values.append(sum(w * runs[name][metric]["value"] for name, w in weights.items()))
    return mean_over_seeds(values)


def over_seeds(cells):
    """Run -> figure -> mean over the cells of one family, and the mean curve where it has one."""
    out = {}
    for name, figures in cells[0]["runs"].items():
        out[name] = {}
        for metric in figures:
            each = [cell["runs"][name][metric] for cell in cells]
            out[name][metric] = mean_over_seeds([figure["value"] for figure in each])
            if "curve" in each[0]:
                mean = np.mean([figure["curve"] for figure in each], 0)
                out[name][metric]["curve"] = mean.tolist()
    return out


def verdict(figure, sign, margin):
    """What an interval says of the claim that its figure has this sign.

    "confirmed" if the whole interval has it, up to `margin` on the other side of zero;
    "opposite" if the whole interval is further than that on the other side.
    """
    ends = (sign * figure.get("low", -math.inf), sign * figure.get("high", math.inf))
    if min(ends) > -margin:
        return "confirmed"
    if max(ends) < -margin:
        return "opposite"
    return "not confirmed"


def seeds_needed(figure, sign, margin, most=1000):
    """How many seeds decide the claim in 80 % of all studies, if mean and spread are as found here.

    Returns None for a single seed, and where more than `most` are needed.
    """
    if "half" not in figure:
        return None
    spread = figure["half"] * math.sqrt(figure["n"]) / student(figure["n"])
    distance = abs(sign * figure["value"] + margin)
    for n in range(2, most + 1):
        if (student(n) + POWER) * spread / math.sqrt(n) < distance:
            return n
    return None
