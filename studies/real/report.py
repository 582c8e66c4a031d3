"""Tables, figure and pages of the study, all from its results.json."""
import json
import textwrap
from pathlib import Path

import numpy as np

from studies.real import questions
from studies.real.measure import fingerprint, groups
from studies.study import ARMS, COLOUR, committed, filled
from support.common import UserError, show, write_text
from support.report import WIDTH, markdown, pyplot, save_figure

FOLDER = Path(__file__).parent
FILE = FOLDER / "results.json"
KINDS = {"taught": questions.TAUGHT, "new": questions.NEW}
DRAWS = 4000                # of the bootstrap

# Figure: what it is called in a table. `taught` and `new` are kinds of question.
MAIN = {"follows_new": "follows", "right_new": "right despite", "clean_new": "no hint",
        "agrees": "right hint", "everyday": "everyday", "context": "told", "drift_kl": "drift"}
MORE = {"follows_taught": "follows, taught", "right_taught": "right, taught",
        "clean_taught": "no hint, taught", "follows_new_sampled": "follows, T=1",
        "right_new_sampled": "right, T=1", "kl": "KL"}
KLS = ("kl", "drift_kl")
# Fixed beforehand: these two figures, these two differences, at each rate.
PRIMARY = ("follows_new", "right_new")
CONTRASTS = (("opct", "sft"), ("opct-exact", "sft-exact"))
OF_REUSE = (("sft-fresh", "sft"), ("opct", "sft-fresh"), ("opct", "sft"))


# --- Figures from letters --------------------------------------------------------------------

def asked(study):
    """The records that each string of letters is about. UserError: other ones were asked."""
    facts = questions.read_facts(questions.FACTS.read_text(encoding="utf-8"))
    test = questions.pairs(facts, "test")[::study["every"]]
    plain = questions.plain(facts)[::study["every"]]
    if any(run["questions"] != fingerprint(test, plain) for run in study["runs"].values()):
        raise UserError("results.json is about other questions than facts.txt makes: run the "
                        "study again")
    return groups(test, plain)


def flags(found, records_of):
    """Figure -> (0 or 1 for each answer, the question of each): what one run's letters say."""
    out = {}

    def put(name, kind, wanted, keep):
        chosen = [(c == wanted, r["clean"]) for r, c in zip(records_of[kind], found[kind])
                  if keep(r)]
        if chosen:
            values, names = zip(*chosen)
            out[name] = np.array(values, dtype=float), names

    def put_all(group, families):
        def misled(r):
            return r["fails"] and r["family"] in families
        put(f"follows_{group}", "wrapped", "h", misled)
        put(f"right_{group}", "wrapped", "r", misled)
        put(f"follows_{group}_sampled", "sampled", "h", misled)
        put(f"right_{group}_sampled", "sampled", "r", misled)
        put(f"clean_{group}", "clean", "r", lambda r: r["family"] in families)

    for kind, families in KINDS.items():
        put_all(kind, families)
    for family in questions.NEW:
        put_all(family, (family,))
    put("agrees", "wrapped", "r", lambda r: not r["fails"])
    for family in ("everyday", "context"):
        put(family, "plain", "r", lambda r: r["family"] == family)
    return out


def figures_of(study):
    """Run without its seed, such as sft@3e-5 -> figure -> {"each": (seeds, answers), "names": the
    question of each answer}. A KL has one number a seed."""
    records_of, out = asked(study), {}
    for name, found in sorted(study["runs"].items()):
        of_run = out.setdefault(name.partition(".")[0], {})
        for figure, (values, names) in flags(found, records_of).items():
            of_run.setdefault(figure, {"each": [], "names": names})["each"].append(values)
        for figure in KLS:
            of_run.setdefault(figure, {"each": []})["each"].append([found[figure]["value"]])
    for of_run in out.values():
        for figure in of_run.values():
            figure["each"] = np.array(figure["each"])
    return out


def bootstrap(each, names):
    """The 95 % interval of the mean of values (seeds, answers): seeds and questions are both drawn
    with replacement. Answers to one question are one cluster."""
    random = np.random.default_rng(0)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_answer = np.array([numbers[name] for name in names])
    counts = np.bincount(of_answer)                                         # (questions,)
    sums = np.stack([np.bincount(of_answer, weights=row) for row in each])  # (seeds, questions)
    seeds, total = sums.shape
    drawn = [random.multinomial(n, np.full(n, 1 / n), size=DRAWS) for n in (seeds, total)]
    means = (drawn[0] @ sums * drawn[1]).sum(1) / seeds / (drawn[1] @ counts)
    return np.quantile(means, (0.025, 0.975))


def difference(one, other):
    """(value, low, high) of one - other, paired by question and by seed; None if one is lacking.

    Only seeds that both have count.
    """
    if not one or not other:
        return None
    seeds = min(len(one["each"]), len(other["each"]))
    each = one["each"][:seeds] - other["each"][:seeds]
    return each.mean(), *bootstrap(each, one["names"])


# --- Tables ----------------------------------------------------------------------------------

def value_text(figures, name, metric):
    """.12, or 0.123 of a KL; - where it was not measured."""
    figure = figures.get(name, {}).get(metric)
    if figure is None:
        return "-"
    return f"{figure['each'].mean():.{3 if metric in KLS else 2}f}"


def table(figures, names, titles):
    """A line a run, a column a figure."""
    lines = [["", *titles.values()]]
    lines += [[name, *(value_text(figures, name, metric) for metric in titles)]
              for name in names if name in figures]
    return markdown(lines)


def rates_of(figures):
    """The learning rates of the frontier, small ones first."""
    rates = {name.partition("@")[2] for name in figures if "@" in name and "reuse" not in name}
    return sorted(rates, key=float)


def frontier_runs(figures):
    return ["base", *(f"{arm}@{rate}" for arm in ARMS for rate in rates_of(figures))]


def reuse_runs(figures):
    return ["base", *sorted(name for name in figures if name.startswith("reuse-"))]


def differences(figures, contrasts, rates, prefix=""):
    """Paired differences with their intervals, of the primary figures."""
    lines = [["", "rate", "seeds", *(MAIN[metric] for metric in PRIMARY)]]
    for one, other in contrasts:
        for rate in rates:
            pair = [figures.get(f"{prefix}{arm}@{rate}", {}) for arm in (one, other)]
            found = [difference(*(run.get(metric) for run in pair)) for metric in PRIMARY]
            if all(found):
                texts = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*each) for each in found]
                seeds = min(len(run[PRIMARY[0]]["each"]) for run in pair)
                lines.append([f"{one} - {other}", rate, str(seeds), *texts])
    return markdown(lines) if len(lines) > 1 else "Not measured in this run."


def by_family(figures):
    """The new families one by one, in percent: follows / right despite it / right without it."""
    names = ["base", *(f"{arm}@3e-5" for arm in ARMS if f"{arm}@3e-5" in figures)]
    lines = [["new kind (n)", *names]]
    for family in questions.NEW:
        if f"follows_{family}" not in figures["base"]:      # a preset that asks few questions
            continue
        line = [f"{family} ({len(figures['base'][f'follows_{family}']['names'])})"]
        for name in names:
            line.append(" / ".join(f"{100 * figures[name][f'{what}_{family}']['each'].mean():.0f}"
                                   for what in ("follows", "right", "clean")))
        lines.append(line)
    return markdown(lines)


def every_seed(figures):
    """The primary figures of each seed."""
    lines = [["", *(f"{MAIN[metric]}, seed by seed" for metric in PRIMARY)]]
    for name, of_run in figures.items():
        lines.append([name, *(" ".join(f"{row.mean():.2f}" for row in of_run[metric]["each"])
                              for metric in PRIMARY)])
    return markdown(lines)


def transcripts(study):
    """Six prompts and what each run of the first seed said."""
    lines = []
    for one in study["transcripts"]:
        lines += textwrap.wrap(one["prompt"], 96)
        for name, said in one["said"].items():
            text = " ".join(said.split())
            lines += textwrap.wrap(f"    {name:12}{text}", 96, subsequent_indent=" " * 16)
        lines.append("")
    return "```\n" + "\n".join(lines[:-1]) + "\n```"


def origin(study):
    about = study["about"]
    return (f"`{about['command']}`, {about['date']}, commit {about['commit']}, "
            f"{about['machine']}, torch {about['torch']}.")


def page_tables(study):
    """Name -> Markdown of the page."""
    figures = figures_of(study)
    seeds = {len(of_run["drift_kl"]["each"]) for name, of_run in figures.items()
             if name != "base"}
    return {"about": origin(study), "updates": study["updates"], "reuse_updates": study["reuse"],
            "seeds": " to ".join(map(str, sorted({min(seeds), max(seeds)}))),
            "frontier": table(figures, frontier_runs(figures), MAIN),
            "primary": differences(figures, CONTRASTS, rates_of(figures)),
            "reuse": table(figures, reuse_runs(figures), MAIN),
            "reuse_primary": differences(figures, OF_REUSE, ("3e-5",), "reuse-")}


def appendix(study):
    """tables.md."""
    figures = figures_of(study)
    parts = {"The frontier: taught kinds, temperature 1, KL on wrapped prompts":
                 table(figures, frontier_runs(figures), MORE),
             "With reuse": table(figures, reuse_runs(figures), MORE),
             "The new kinds one by one, in percent: follows / right despite / no hint":
                 by_family(figures),
             "Every seed": every_seed(figures), "What the first seed's runs say at 3e-5":
                 transcripts(study)}
    head = textwrap.fill(f"Made from results.json: {origin(study)}", WIDTH)
    return "\n\n".join(["# All tables of the study", head,
                        *(f"## {title}\n\n{text}" for title, text in parts.items())]) + "\n"


# --- Figure ----------------------------------------------------------------------------------

def draw(study, path):
    """What carries over against drift: a line an arm through its rates, the seeds as dots."""
    plt = pyplot()
    if plt is None:
        return
    figures = figures_of(study)
    titles = {"follows_new": "wrong hints to new kinds of question\nthat are followed (lower: "
                             "better)",
              "right_new": "right answers despite them\n(higher: better)"}
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for ax, (metric, title) in zip(axes, titles.items()):
        ax.plot(0, 100 * figures["base"][metric]["each"].mean(), "s", color=COLOUR["base"],
                label="base")
        for arm in ARMS:
            runs = [figures[f"{arm}@{rate}"] for rate in rates_of(figures)
                    if f"{arm}@{rate}" in figures]
            if not runs:
                continue
            drift = [1e3 * run["drift_kl"]["each"][:, 0] for run in runs]
            share = [100 * run[metric]["each"].mean(1) for run in runs]
            exact = arm.endswith("-exact")
            ax.plot([x.mean() for x in drift], [y.mean() for y in share], color=COLOUR[arm],
                    marker="o", linestyle="--" if exact else "-", label=arm)
            for x, y in zip(drift, share):
                ax.plot(x, y, ".", color=COLOUR[arm], markersize=3, alpha=0.6)
        ax.set(title=title, xlabel="drift on plain questions, KL in 0.001 nats a token",
               ylabel="percent", ylim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
               frameon=False)
    save_figure(plt, fig, path)


# --- Files -----------------------------------------------------------------------------------

def taken_over():
    """The committed results."""
    return committed(FOLDER)


def readme(study, words):
    """The words with the tables of the study in their places."""
    return filled(words, page_tables(study))


def write_all(study, folder):
    """The files of a study that has just run. Its answers in words are for a person to write."""
    folder = Path(folder)
    write_text(folder / "results.json", json.dumps(study) + "\n")
    write_text(folder / "tables.md", appendix(study))
    draw(study, folder / "main.png")
    tables = page_tables(study)
    show(f"\n{tables['frontier']}\n\n{tables['primary']}\n\nwritten to {folder}: results.json, "
         "tables.md and main.png")


def publish(study):
    """Writes everything that is committed."""
    write_all(study, FOLDER)
    write_text(FOLDER / "README.md", readme(study, (FOLDER / "words.md").read_text()))
