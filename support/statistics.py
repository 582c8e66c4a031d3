"""Rates and means with their intervals."""
import math

import numpy as np


def wilson(successes, n, z=1.96):
    """The 95 % Wilson interval of a rate, (low, high): right at 0 and 1, unlike p +- 2 s.e."""
    p, centre = successes / n, successes / n + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def rate(flags, clusters):
    """A share with its interval. Rows of one cluster (a question, a recipe) are no independent
    evidence: where they agree more than by chance, they count as n / the design effect."""
    y, n = np.array(flags, dtype=float), len(flags)
    p = y.mean().item()
    numbers = {}                        # cluster -> number; as numpy's strings they take gigabytes
    of_cluster = np.bincount([numbers.setdefault(c, len(numbers)) for c in clusters],
                             weights=y - p)
    effect = max(1.0, (of_cluster ** 2).sum() / (n * p * (1 - p))) if 0 < p < 1 else 1.0
    low, high = wilson(p * n / effect, n / effect)
    return {"value": p, "n": n, "clusters": len(of_cluster), "low": low, "high": high}


def complement(figure):
    """1 - a share, with its interval."""
    return {**figure, "value": 1 - figure["value"],
            "low": 1 - figure["high"], "high": 1 - figure["low"]}


def mean_of(figures):
    """The mean of figures from different prompts: the squares of their intervals add up."""
    mean = np.mean([figure["value"] for figure in figures]).item()
    half = math.hypot(*((figure["high"] - figure["low"]) / 2 for figure in figures)) / len(figures)
    return {"value": mean, "n": sum(figure["n"] for figure in figures),
            "low": mean - half, "high": mean + half}


def best_of(told):
    """The chance that the best of K = 1..A attempts gets it, for told (recipes, A) of bool: K of A
    drawn without replacement, f of which fail, all fail with probability C(f, K) / C(A, K)."""
    A, failures = told.shape[1], [int(f) for f in (~told).sum(1)]
    return [1 - np.mean([math.comb(f, k) / math.comb(A, k) for f in failures]).item()
            for k in range(1, A + 1)]


def ratio(totals, counts):
    """sum(totals) / sum(counts), such as nats per token, with an interval: bootstrap over rows."""
    totals, counts = np.array(totals, dtype=float), np.array(counts, dtype=float)
    draws = np.random.default_rng(0).integers(len(totals), size=(1000, len(totals)))
    low, high = np.quantile(totals[draws].sum(1) / counts[draws].sum(1), (0.025, 0.975))
    return {"value": (totals.sum() / counts.sum()).item(), "n": int(counts.sum()),
            "low": low.item(), "high": high.item()}
