"""Statistics over seeds. A seed is one observation: a world, a base model and runs of its own."""
import math

import numpy as np

# Student's t for a 95 % interval, by the number of seeds.
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def mean_over_seeds(values):
    """The mean and the half width of its 95 % interval; one seed says nothing about others."""
    mean, n = np.mean(values).item(), len(values)
    if n == 1:
        return {"value": mean, "n": n}
    half = STUDENT_T.get(n, 2.23) * np.std(values, ddof=1).item() / math.sqrt(n)
    return {"value": mean, "half": half, "low": mean - half, "high": mean + half, "n": n}


def contrast(cells, metric, weights):
    """The weighted sum of the runs' figures, seed by seed, then over the seeds.

    Paired: within a cell the runs share base model, pairs and random numbers. None where a cell
    lacks one of the figures.
    """
    if any(metric not in cell["runs"].get(run, {}) for cell in cells for run in weights):
        return None
    return mean_over_seeds([sum(w * cell["runs"][run][metric]["value"]
                                for run, w in weights.items()) for cell in cells])


def over_seeds(cells):
    """Run -> figure -> mean over the cells, with interval and, where there is one, mean curve."""
    out = {}
    for run in cells[0]["runs"]:
        out[run] = {}
        for name in cells[0]["runs"][run]:
            of_seed = [cell["runs"][run][name] for cell in cells]
            out[run][name] = mean_over_seeds([figure["value"] for figure in of_seed])
            if "curve" in of_seed[0]:
                out[run][name]["curve"] = np.mean([f["curve"] for f in of_seed], 0).tolist()
    return out


def verdict(figure, sign, margin):
    """What an interval says of a claim that its figure has this sign, or is at most `margin` on
    the other side of zero."""
    ends = (sign * figure.get("low", -math.inf), sign * figure.get("high", math.inf))
    if min(ends) > -margin:
        return "confirmed"
    return "opposite" if max(ends) < -margin else "not confirmed"
