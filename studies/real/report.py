"""Tables, figure and README.md of the study, all from its results.json."""
import json
import math
import textwrap
from pathlib import Path

import numpy as np

from studies.real import questions
from studies.real.measure import fingerprint, groups
from studies.real.run import CONTROLS, PRESETS
from studies.stats import mean_over_seeds
from studies.study import ARMS, COLOUR, committed, filled, write_tables
from support.common import UserError, show, write_text
from support.report import markdown, pyplot, save_figure
from support.statistics import wilson

FOLDER = Path(__file__).parent
CONTROLLED = tuple(f"{arm}-{control}" for control, arm in CONTROLS.items())
KINDS = {"taught": questions.TAUGHT, "new": questions.NEW}

# Figure: what it is called in a table. `taught` and `new` are kinds of question.
TITLES = {
    "follows_taught": "follows wrong hint, taught", "follows_new": "follows wrong hint, new",
    "right_taught": "right despite it, taught", "right_new": "right despite it, new",
    "clean_taught": "right, no hint, taught", "clean_new": "right, no hint, new",
    "agrees": "right under a right hint", "agrees_clean": "right, no hint, same questions",
    "follows_taught_sampled": "follows, taught, temperature 1",
    "follows_new_sampled": "follows, new, temperature 1",
    "right_taught_sampled": "right, taught, temperature 1",
    "right_new_sampled": "right, new, temperature 1",
    "everyday": "everyday questions", "context": "told by the user",
    "kl": "KL on wrapped prompts", "drift_kl": "drift, plain questions"}
KLS = ("kl", "drift_kl")
# The last one differs in two things, whose responses and which loss.
CONTRASTS = {"opct - sft": ("opct", "sft"), "opct-exact - sft-exact": ("opct-exact", "sft-exact"),
             "opct-exact - sft": ("opct-exact", "sft")}
# The question of the study, fixed before its results: two figures, two contrasts.
PRIMARY = [(metric, name) for metric in ("follows_new", "right_new")
           for name in ("opct - sft", "opct-exact - sft-exact")]
Z = 1.96                    # 95 % of a normal distribution


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
    helped = {r["clean"] for r in records_of["wrapped"] if not r["fails"]}
    put("agrees_clean", "clean", "r", lambda r: r["clean"] in helped)
    for family in ("everyday", "context"):
        put(family, "plain", "r", lambda r: r["family"] == family)
    return out


def over_questions(values, names):
    """The standard error of a mean. Answers to one question are one cluster."""
    sums = {}
    for value, name in zip(values, names):
        sums[name] = sums.get(name, 0) + value - values.mean()
    n, squares = len(sums), sum(s * s for s in sums.values())
    return math.sqrt(squares * n / max(1, n - 1)) / len(values)


def share_of(values, names):
    """A share and the half width of its 95 % interval: Wilson's, whose wider side counts, with as
    many answers as the clusters are worth, at most one a question."""
    p, n = values.mean().item(), len(set(names))
    if 0 < p < 1 and n > 1:
        worth = p * (1 - p) / max(1e-9, over_questions(values, names) ** 2)
        n = min(n, max(1.0, worth))                         # several seeds do not count as more
    low, high = wilson(p * n, n)
    return {"value": p, "half": max(high - p, p - low), "n": len(values)}


def runs_of(study):
    """Arm -> its measurements, of the seeds that all arms have; base and controls have one."""
    runs = {}
    for name, found in study["runs"].items():
        arm, _, seed = name.partition(".")
        runs.setdefault(arm, {})[seed] = found
    shared = set.intersection(*(set(runs[arm]) for arm in ARMS if arm in runs))
    order = ["base", *ARMS, *CONTROLLED, "rounded-again"]
    return {name: [runs[name][seed] for seed in sorted(runs[name])
                   if name not in ARMS or seed in shared] for name in order if name in runs}


def figures_of(study):
    """Run -> figure -> {"value", "half", "n", "seeds"}: the mean over seeds of each question, then
    an interval over questions; `seeds` has the value of each seed."""
    out, records_of = {}, asked(study)
    for name, seeds in runs_of(study).items():
        each = [flags(found, records_of) for found in seeds]
        out[name] = {}
        for figure, (_, names) in each[0].items():
            values = np.mean([one[figure][0] for one in each], 0)
            out[name][figure] = {**share_of(values, names), "each": values, "names": names,
                                 "seeds": [one[figure][0].mean().item() for one in each]}
        for figure in KLS:
            values = [found[figure]["value"] for found in seeds]
            out[name][figure] = {**mean_over_seeds(values), "seeds": values}
    return out


def difference(figures, one, other, metric):
    """one - other, paired by question and by seed: {"value", "half", "seeds"}.

    The half width joins two noises, that of the questions (normal) and that of the training
    (Student's t over seeds). With one seed the second is not known and left out. None if a run
    lacks the figure.
    """
    a, b = figures.get(one, {}).get(metric), figures.get(other, {}).get(metric)
    if not a or not b:
        return None
    others = b["seeds"] if len(b["seeds"]) > 1 else b["seeds"] * len(a["seeds"])    # the base: one
    found = mean_over_seeds([x - y for x, y in zip(a["seeds"], others)])
    of_questions = Z * over_questions(a["each"] - b["each"], a["names"])
    return {"value": found["value"], "seeds": found["n"],
            "half": math.hypot(of_questions, found.get("half", 0))}


# --- Tables ----------------------------------------------------------------------------------

def text_of(metric, figure, sign=""):
    """0.12 ± 0.02, or 0.12 where there is no interval. A KL: 0.123."""
    if not figure:
        return "-"
    if metric.endswith("kl"):
        return f"{figure['value']:{sign}.3f}"
    text = f"{figure['value']:{sign}.2f}"
    if "half" in figure:
        text += f" ± {figure['half']:.2f}"
    return text


def table(figures, names, metrics):
    """A line for each figure, a column for each run."""
    names = [name for name in names if name in figures]
    lines = [["", *names]]
    for metric in metrics:
        lines.append([TITLES[metric],
                      *(text_of(metric, figures[name].get(metric)) for name in names)])
    return markdown(lines)


def by_family(figures):
    """The new families one by one, in percent: follows / right despite it / right without it."""
    names = [name for name in ("base", *ARMS) if name in figures]
    lines = [["new kind (n)", *names]]
    for family in questions.NEW:
        if f"follows_{family}" not in figures["base"]:      # a preset that asks few questions
            continue
        line = [f"{family} ({figures['base'][f'follows_{family}']['n']})"]
        for name in names:
            line.append(" / ".join(f"{100 * figures[name][f'{what}_{family}']['value']:.0f}"
                                   for what in ("follows", "right", "clean")))
        lines.append(line)
    return markdown(lines)


def differences(figures, contrasts=CONTRASTS):
    """Paired differences. A primary one is bold where its interval leaves out zero; no verdict from
    one seed."""
    lines = [["", *contrasts]]
    for metric in (metric for metric in TITLES if metric not in KLS):
        line = [TITLES[metric]]
        for name, (one, other) in contrasts.items():
            found = difference(figures, one, other, metric)
            sure = ((metric, name) in PRIMARY and found and found["seeds"] > 1
                    and abs(found["value"]) > found["half"])
            bold = "**" if sure else ""
            line.append(f"{bold}{text_of(metric, found, '+')}{bold}")
        lines.append(line)
    return markdown(lines)


def over_kinds(figures):
    """The primary differences with a kind of question as one observation."""
    lines = [["", "contrast", "mean over kinds", "kinds lower", "equal", "higher"]]
    for metric, name in PRIMARY:
        each = [difference(figures, *CONTRASTS[name], f"{metric.removesuffix('new')}{family}")
                for family in questions.NEW]
        each = [found["value"] for found in each if found]
        if each:
            counts = [sum(np.sign(value) == sign for value in each) for sign in (-1, 0, 1)]
            lines.append([TITLES[metric], name, text_of(metric, mean_over_seeds(each), "+"),
                          *map(str, counts)])
    return markdown(lines, keep=2) if len(lines) > 1 else "Not measured in this run."


def rates_table(study):
    """Right under a wrong hint and the loss without a hint, for each rate on validation."""
    if "scores" not in study:
        return "Not tried with this preset: the rates are those that `full` chose."
    arms = [arm for arm in ARMS if arm in study["scores"]]
    lines = [["rate", *arms]]
    for rate in sorted(study["scores"][arms[0]], key=float):
        line = [rate]
        for arm in arms:
            right, lost = study["scores"][arm][rate]
            bold = "**" if study["rates"][arm] == rate else ""
            line.append(f"{bold}{right:.2f} ({-lost:+.2f}){bold}")
        lines.append(line)
    return markdown(lines)


def at_every_rate(study):
    """The first seed: arm -> {rate: {figure: share, "drift_kl": nats}}, small rates first."""
    records_of, out = asked(study), {}
    runs = {name.removesuffix(".0"): found for name, found in study["runs"].items()
            if name.endswith(".0")}
    for arm in ARMS:
        of_arm = {name.partition("@")[2] or study["rates"][arm]: found
                  for name, found in runs.items() if name.partition("@")[0] == arm}
        for rate, found in sorted(of_arm.items(), key=lambda one: float(one[0])):
            shares = {name: values.mean() for name, (values, _) in flags(found, records_of).items()}
            out.setdefault(arm, {})[rate] = {**shares, "drift_kl": found["drift_kl"]["value"]}
    return out


def every_rate(study):
    """The first seed at every learning rate: what carries over, and what breaks."""
    lines = [["", "rate", "follows, new", "right, new", "no hint, new", "right hint",
              "told by user", "drift"]]
    for arm, rates in at_every_rate(study).items():
        for rate, found in rates.items():
            bold = "**" if rate == study["rates"][arm] else ""
            lines.append([arm, f"{bold}{rate}{bold}", *(f"{found[name]:.2f}" for name in
                          ("follows_new", "right_new", "clean_new", "agrees", "context")),
                          f"{found['drift_kl']:.3f}"])
    return markdown(lines)


def costs_table(study):
    """Seconds an update and the highest memory of a whole process."""
    lines = [["flags", "seconds an update", "memory, GB", "threads", "machine"]]
    for cost in study["costs"]:
        flags = cost["flags"]
        for preset in PRESETS.values():
            flags = flags.removeprefix(preset.updates).strip()
        lines.append([flags or "all weights", f"{cost['seconds']:.1f}",
                      f"{cost['bytes'] / 1e9:.1f}", str(cost["threads"]),
                      cost["about"]["machine"]])
    return markdown(lines) if len(lines) > 1 else "Not measured in this run."


def transcripts(study):
    """Six prompts and what each run of the first seed said."""
    lines = []
    for one in study["transcripts"]:
        lines += textwrap.wrap(one["prompt"], 96)
        for name, said in one["said"].items():
            text = " ".join(said.split())
            lines += textwrap.wrap(f"    {name:22}{text}", 96, subsequent_indent=" " * 26)
        lines.append("")
    return "```\n" + "\n".join(lines[:-1]) + "\n```"


def beside(figures, runs, others):
    """The table of some runs and the base, if any of the others was measured."""
    if not set(others) & set(figures):
        return "Not measured in this run."
    return table(figures, runs, TITLES)


def counts_of(study):
    """How many questions the figures stand on."""
    records = asked(study)
    wrong, sampled = ({kind: sum(r["fails"] and r["family"] in families for r in records[form])
                       for kind, families in KINDS.items()} for form in ("wrapped", "sampled"))
    right = sum(not r["fails"] for r in records["wrapped"])
    everyday, told = (sum(r["family"] == family for r in records["plain"])
                      for family in ("everyday", "context"))
    return textwrap.fill(
        f"The test has {wrong['taught']} wrong hints to taught kinds and {wrong['new']} to new ones"
        f" (at temperature 1: {sampled['taught']} and {sampled['new']}), {right} right hints, "
        f"{len(records['clean'])} questions without a hint, {everyday} everyday questions and "
        f"{told} in which the user has told the answer.", 100)


def blocks(study):
    """Every table of README.md: name -> Markdown."""
    figures, about = figures_of(study), study["about"]
    origin = (f"`{about['command']}`, {about['date']}, commit {about['commit']}, "
              f"{about['machine']}, torch {about['torch']}, {seeds_of(study)}.")
    return {"about": textwrap.fill(origin, 100, break_on_hyphens=False),
            "result": table(figures, ("base", *ARMS), TITLES),
            "families": by_family(figures), "differences": differences(figures),
            "beyond_base": differences(figures, {f"{name} - base": (name, "base")
                                                 for name in ARMS if name in figures}),
            "kinds": over_kinds(figures), "counts": counts_of(study),
            "controls": beside(figures, ("base", "sft", *CONTROLLED), CONTROLLED),
            "again": beside(figures, ("base", "rounded-again"), ("rounded-again",)),
            "rates": rates_table(study), "every_rate": every_rate(study),
            "costs": costs_table(study), "transcripts": transcripts(study),
            "updates": study["updates"]}


def seeds_of(study):
    n = len(runs_of(study)["opct-exact"])
    return f"{n} seed{'s' * (n > 1)}"


# --- Figure ----------------------------------------------------------------------------------

def draw_rates(ax, study, base):
    """Each arm at its learning rates: wrong hints followed, against drift."""
    ax.plot(0, 100 * base["follows_new"]["value"], "s", color=COLOUR["base"])
    for arm, rates in at_every_rate(study).items():
        at = [1e3 * found["drift_kl"] for found in rates.values()]
        follows = [100 * found["follows_new"] for found in rates.values()]
        ax.plot(at, follows, "o-", color=COLOUR[arm])
        if arm == "opct-exact":
            for x, y, rate in zip(at, follows, rates):
                ax.annotate(rate, (x, y), (-8, -15), textcoords="offset points", fontsize=9)
    ax.set(title="Each arm at three learning rates, first seed.\nLower left is better.",
           xlabel="drift on plain questions, KL in 0.001 nats a token",
           ylabel="percent of wrong hints\nto new kinds followed", ylim=(0, None))


def draw(study, path):
    """Wrong hints followed, and what is still right: before and after; and every rate."""
    plt = pyplot()
    if plt is None:
        return
    figures = figures_of(study)
    names = [name for name in ("base", *ARMS) if name in figures]
    panels = (("How often is a wrong hint followed?\n(The learning rates differ: see right.)",
               {"follows_taught": "kinds of question\nseen in training",
                "follows_new": "kinds never seen\nin training"}),
              ("No hint.\nHow often is the answer right?",
               {"clean_new": "kinds\nnever seen", "everyday": "everyday\nquestions",
                "context": "told by\nthe user"}))
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.4), width_ratios=(2, 2.6, 2.2),
                             layout="constrained")
    draw_rates(axes[2], study, figures["base"])
    wide = 0.8 / len(names)
    for ax, (title, bars) in zip(axes, panels):
        for k, name in enumerate(names):
            found = [figures[name][metric] for metric in bars]
            at = np.arange(len(bars)) + (k - (len(names) - 1) / 2) * wide
            value = [100 * figure["value"] for figure in found]
            half = [100 * figure["half"] for figure in found]
            rate = f" (bars: rate {study['rates'][name]})" if name in study["rates"] else ""
            ax.bar(at, value, wide * 0.92, yerr=half, color=COLOUR[name], label=name + rate,
                   error_kw={"elinewidth": 0.8, "ecolor": "#444444"})
            for x, y, h in zip(at, value, half):
                ax.text(x, y + h + 1, f"{y:.0f}", ha="center", fontsize=8)
        ax.set(title=title, ylabel="percent of answers", ylim=(0, None))
        ax.set_xticks(range(len(bars)), bars.values())
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
               ncols=len(names), frameon=False)
    save_figure(plt, fig, path)


# --- Files -----------------------------------------------------------------------------------

def readme(study, words):
    """The words with the tables of the study in their places."""
    return filled(words, blocks(study))


def write_all(study, folder):
    """The files of a study that has just run. Its answers in words are for a person to write."""
    folder = Path(folder)
    write_text(folder / "results.json", json.dumps(study) + "\n")
    tables = blocks(study)
    write_tables(folder, tables)
    draw(study, folder / "main.png")
    show(f"\n{tables['result']}\n\n{tables['transcripts']}\n\nwritten to {folder}: results.json, "
         "results.md and, with matplotlib, main.png")


def publish():
    """Writes README.md and the figure of this folder."""
    study = committed(FOLDER)
    write_text(FOLDER / "README.md", readme(study, (FOLDER / "words.md").read_text()))
    draw(study, FOLDER / "main.png")
