"""Statistics over seeds. A seed (a world, a base model and its runs) is one observation."""
import math

import numpy as np

# The 97.5 % point of Student's t, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


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
