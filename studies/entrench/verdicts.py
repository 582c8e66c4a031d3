"""Verdicts on the paper's findings."""
import math

import numpy as np

from studies.entrench.methods import LABELS
from studies.entrench.organisms import ORGANISMS
from studies.entrench.tables import (SCORES, change, eta_of, label_change, label_kl, numbers_of,
                                     over_seeds, seeds_of, steps_of, text_of)
from studies.stats import mean_over_seeds, verdict

SELECTING = ("rejection", "self-confidence", "diverse", "multi-view", "self-rewarding")
# The methods that make labels, without the controls.
METHODS = tuple(run for run in LABELS if run not in ("sampling", "greedy", "rejection"))
# With the two methods on pairs, whose clean prompts are healthy.
SEVEN = (*METHODS, "act, healthy", "bct-soft, healthy")
SIMILAR = {"confirmed": "as there", "opposite": "opposite", "not confirmed": "unclear"}
NEAR = 5                    # points: a rate that changes by less stays
FLAT = 10                   # points: the paper calls an eta that varies less than this nearly flat


def seed_by_seed(study, value_of):
    """The mean over seeds of value_of(seed), None where no seed has a value."""
    values = [value_of(seed) for seed in seeds_of(study)]
    values = [value for value in values if value is not None]
    return mean_over_seeds(values) if values else None


def mean_change(study, organism, seed, runs=METHODS):
    """Of the label methods over all strengths."""
    values = [change(*step) for run in runs for step in steps_of(study, organism, run, seed)]
    return np.mean(values).item() if values else None


def bend(study, seed):
    """The change of greedy self-training where more than half misbehave, minus that where less."""
    sides = {True: [], False: []}
    for organism in ORGANISMS:
        for before, after, *_ in steps_of(study, organism, "greedy", seed):
            sides[before > 0.5].append(100 * (after - before))
    if not all(sides.values()):
        return None
    return (np.mean(sides[True]) - np.mean(sides[False])).item()


def correlation(study, value_of, seed):
    """Of the size of value_of with the size of the change, over the label runs but `sampling`."""
    x, y = [], []
    for organism in ORGANISMS:
        for run in LABELS:
            for step in steps_of(study, organism, run, seed) if run != "sampling" else ():
                if value_of(*step) is not None:
                    x.append(abs(value_of(*step)))
                    y.append(abs(change(*step)))
    return np.corrcoef(x, y)[0, 1].item() if len(x) > 2 and np.std(x) and np.std(y) else None


def effect(study, runs, seed):
    """The size of the change over these runs, above that of `sampling`, which is noise alone."""
    def size(runs):
        found = [abs(change(*step)) for organism in ORGANISMS for run in runs
                 for step in steps_of(study, organism, run, seed)]
        return np.mean(found).item() if found else None

    own, noise = size(runs), size(["sampling"])
    return None if None in (own, noise) else own - noise


def stays(figure):
    """Whether the whole interval is near zero."""
    low, high = figure.get("low", -math.inf), figure.get("high", math.inf)
    if -NEAR < low and high < NEAR:
        return "confirmed"
    return "opposite" if low > NEAR or high < -NEAR else "not confirmed"


def eta_finding(study):
    """The largest of all spreads over fifths, in points, and whether it is nearly flat."""
    largest = {}
    for score in SCORES:
        each = [eta_of(study, organism, number, score)[0]
                for organism in ORGANISMS for number in numbers_of(study)]
        largest[score] = max(abs(np.mean(spreads or [0]).item()) for spreads in each)
    text = ", ".join(f"{value:.0f}" for value in largest.values())
    said = "confirmed" if max(largest.values()) < FLAT else "not confirmed"
    return "eta(s) varies by less than 10 points", text, said


def findings(study):
    """(finding, our figure as text, verdict)."""
    out = []
    for organism, sign, claim in (("hacking", -1, "reward hacking falls"),
                                  ("emergent", -1, "emergent misalignment falls"),
                                  ("sycophancy", 1, "sycophancy rises"),
                                  ("spurious", 0, "the spurious correlation stays")):
        figure = seed_by_seed(study, lambda seed: mean_change(study, organism, seed))
        every = seed_by_seed(study, lambda seed: mean_change(study, organism, seed, SEVEN))
        if figure:
            said = verdict(figure, sign, 0) if sign else stays(figure)
            out.append((claim, f"{text_of(figure, 0, '+')} points; seven "
                        f"{text_of(every, 0, '+')}", SIMILAR[said]))
    bent = seed_by_seed(study, lambda seed: bend(study, seed))
    if bent:
        out.append(("greedy: common rises, rare falls (ours)",
                    f"{text_of(bent, 0, '+')} points apart", verdict(bent, 1, 0)))
    planted = over_seeds(study, ORGANISMS, "greedy, planted", change)
    if planted:
        out.append(("greedy on planted prompts: rises (ours)",
                    f"{text_of(planted, 0, '+')} points", verdict(planted, 1, 0)))
    for name, value_of in (("KL(labels, model)", label_kl), ("labels' rate (ours)", label_change)):
        figure = seed_by_seed(study, lambda seed: correlation(study, value_of, seed))
        if figure:
            own = {**figure, **{end: figure[end] - 0.5 for end in ("low", "high") if end in figure}}
            out.append((f"{name} predicts the change",
                        f"correlation {text_of(figure, 2)}", verdict(own, 1, 0)))
    out.append(eta_finding(study))
    greedy = seed_by_seed(study, lambda seed: effect(study, ["greedy"], seed))
    chosen = seed_by_seed(study, lambda seed: effect(study, SELECTING, seed))
    if greedy and chosen:
        more = seed_by_seed(study, lambda seed: effect(study, ["greedy"], seed)
                            - effect(study, SELECTING, seed) / 2)
        out.append(("no selection gives most of the effect",
                    f"{text_of(greedy)} of {text_of(chosen)} points",
                    verdict(more, 1, 0)))
    return out
