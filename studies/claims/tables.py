"""Tables of figures, in Markdown, at most 100 columns wide."""
from studies.claims.plan import LEARNT
from studies.study import ARMS
from support.report import markdown

ATTACKED = ("jailbreak_pool", "jailbreak_pool_best_of", "jailbreak_transfer",
            "jailbreak_adaptive", "jailbreak_adaptive_mean", "jailbreak_adaptive_best_of")
ORDER = ("sycophancy", "bias_reliance", "accuracy_biased", "accuracy_right_hint",
         "jailbreak_static", "jailbreak_best_of", *ATTACKED, "over_refusal", "safety_awareness",
         "over_warning", "mean_failure", *LEARNT, "drift_kl", "unclear")
HEADLINE = ("sycophancy", "jailbreak_static", "jailbreak_best_of", "jailbreak_pool",
            "jailbreak_pool_best_of", "jailbreak_transfer", "jailbreak_adaptive",
            "jailbreak_adaptive_best_of", "over_refusal", "safety_awareness", "mean_failure",
            *LEARNT, "drift_kl")
HIGHER = ("accuracy", "safety", "capability", "good")


def title(metric):
    return "drift_kl x 1000" if metric == "drift_kl" else metric


def text_of(metric, figure):
    """0.123 ± 0.020, or 0.123 with one seed, or - if there is no figure. Drift in thousandths."""
    if not figure:
        return "-"
    scale, digits = (1000, 1) if metric == "drift_kl" else (1, 3)
    text = f"{scale * figure['value']:.{digits}f}"
    if "half" in figure:
        text += f" ± {scale * figure['half']:.{digits}f}"
    return text


def figures_table(runs, names, metrics, better=False):
    """A line for each figure, a column for each run; figures that no run has are left out."""
    names = [name for name in names if name in runs]
    lines = [["", *(["better"] if better else []), *names]]
    for metric in metrics:
        found = [runs[name].get(metric) for name in names]
        if not any(found):
            continue
        line = [title(metric)]
        if better:
            line.append("higher" if metric.startswith(HIGHER) else "lower")
        lines.append(line + [text_of(metric, figure) for figure in found])
    return markdown(lines)


def two_tables(runs, metrics):
    """Base and teacher, then the four arms: side by side they would be too wide."""
    first = figures_table(runs, ("base", "teacher"), metrics, better=True)
    return first + "\n\n" + figures_table(runs, ARMS, metrics)


def families_of(study):
    """family -> its cells."""
    families = {}
    for name, cell in study["cells"].items():
        families.setdefault(name.split("-")[0], []).append(cell)
    return families
