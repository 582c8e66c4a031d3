"""README.md of the study, all from its results.json: words.md with its {names} filled in."""
import json
import textwrap
from pathlib import Path

from studies.speed.real import BASE
from studies.speed.run import PRESETS
from studies.study import fill
from support.common import read_json, write_text
from support.report import WIDTH, markdown

FOLDER = Path(__file__).parent
MAIN = FOLDER.parent.parent / "README.md"
SAMPLERS = ("ours", "naive", "transformers")


def count(number):
    return f"{number:,.0f}"


def rate(speed):
    """1,234 tokens/s, or 12.3."""
    return count(speed) if speed >= 100 else f"{speed:.1f}"


def duration(seconds):
    """12.3 s, or 45 ms."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def percent(share):
    return f"{100 * share:.0f} %"


def spread(values, form="{:.1f}"):
    """The smallest and the largest of some values, in words."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


# --- The sampler -----------------------------------------------------------------------------

def ratios(rows, other):
    """How many times as fast as the other sampler ours is, batch by batch."""
    speeds = [row["tokens_per_second"] for row in rows]
    return [speed["ours"] / speed[other] for speed in speeds if other in speed]


def speed_table(study):
    lines = [["batch", *(f"{name}, tokens/s" for name in SAMPLERS)]]
    for row in study["sampler"]["compared"]:
        speeds = row["tokens_per_second"]
        cells = [count(speeds[name]) if name in speeds else "-" for name in SAMPLERS]
        lines.append([count(row["batch"]), *cells])
    return markdown(lines)


def ratio_table(study):
    lines = [["batch", "ours / naive", "ours / transformers", "floor / ours"]]
    for row in study["sampler"]["compared"]:
        speeds, cells = row["tokens_per_second"], []
        for name in SAMPLERS[1:]:
            cells.append(f"{speeds['ours'] / speeds[name]:.1f}" if name in speeds else "-")
        lines.append([count(row["batch"]), *cells, f"{row['floor']:.2f}"])
    return markdown(lines)


def growth_table(study):
    lines = [["batch", "new tokens", "seconds", "microseconds a token", "cache, MB", "peak, MB"]]
    for row in study["sampler"]["growth"]:
        peak = count(row["peak_bytes"] / 1e6) if "peak_bytes" in row else "-"
        each = row["seconds"] / (row["batch"] * row["new"])
        lines.append([count(row["batch"]), str(row["new"]), f"{row['seconds']:.2f}",
                      f"{each * 1e6:.1f}", count(row["cache_bytes"] / 1e6), peak])
    return markdown(lines)


def beside_transformers(study):
    found = ratios(study["sampler"]["compared"], "transformers")
    if not found:
        return "`transformers` was not installed in this run."
    real = ratios(study["real"].get("sampler", []), "transformers")
    on_real = f", on {BASE.name} {spread(real)} times" if real else ""
    return (f"It is {spread(found)} times as fast as `generate` of transformers "
            f"{study['sampler']['transformers']}{on_real}.")


# --- Training --------------------------------------------------------------------------------

def update_table(study):
    """Milliseconds of each part, and its share of the update."""
    updates = study["training"]["updates"]
    lines = [["part", *(update["arm"] for update in updates)]]
    for part in updates[0]["seconds"]:
        cells = []
        for update in updates:
            seconds, total = update["seconds"].get(part), sum(update["seconds"].values())
            cell = "-"
            if seconds is not None:
                cell = f"{seconds * 1e3:.1f} ms, {percent(seconds / total)}"
            cells.append(cell)
        lines.append([part, *cells])
    totals = [sum(update["seconds"].values()) for update in updates]
    lines.append(["all", *(f"{total * 1e3:.1f} ms" for total in totals)])
    lines.append(["response tokens", *(count(update["tokens"]) for update in updates)])
    speeds = [update["tokens"] / total for update, total in zip(updates, totals)]
    lines.append(["response tokens/s", *map(count, speeds)])
    lines.append(["padding of the packed rows", *(percent(u["padding"]) for u in updates)])
    lines.append(["padding of a rectangle, not computed",
                  *(percent(u["padding_of_a_rectangle"]) for u in updates)])
    return markdown(lines)


def pretraining_table(study):
    lines = [["pretraining", "tokens/s", "GFLOP/s of the matrices", "share of the matrix rate"]]
    for row in study["training"]["pretraining"]["rows"]:
        lines.append([row["part"], count(row["tokens_per_second"]), count(row["flops"] / 1e9),
                      f"{row['share']:.2f}"])
    return markdown(lines)


def responses(study):
    """Where the responses of the update come from."""
    if study["training"]["base"]:
        preset = study["about"]["preset"]
        return (f"The model is the base that `bash train.sh {preset}` makes, so its responses are "
                "real.")
    limit = study["training"]["limit"]
    return f"No base was there: an untrained model writes {limit} tokens for each response."


def compiling(study):
    pretraining = study["training"]["pretraining"]
    found, steps = pretraining["compile"], pretraining["steps"]
    if "missing" in found:
        return f"It was not measured in this run: {found['missing']}."
    if "error" in found:
        return f"It does not run on this machine: `{found['error']}`."
    saved = found["saved_seconds"]
    effect, size = "saves" if saved > 0 else "adds", abs(saved)
    gain = saved * steps - found["first_seconds"]
    return (f"Its first step takes {found['first_seconds']:.0f} s. Each later step {effect} "
            f"{size * 1e3:.1f} ms, which is {size * steps:.0f} s in the {steps:,} steps that "
            f"`opct.py pretrain` takes by default. A whole run {'gains' if gain > 0 else 'loses'} "
            f"{abs(gain):.0f} s.")


def over_trl(trl):
    """How many times as fast as TRL's our updates are, by their means."""
    return sum(trl["theirs"]) / sum(trl["ours"])


def singles(trl):
    """The same of single updates."""
    return [theirs / ours for ours, theirs in zip(trl["ours"], trl["theirs"])]


def beside_trl_rows(real):
    """The updates of a real model that ran beside TRL's."""
    return [row for row in real.get("updates", []) if "ours" in row["trl"]]


def beside_trl(study):
    """The answer in one sentence, and the numbers."""
    found = study["training"]["trl"]
    if "missing" in found:
        text = f"TRL was not measured in this run: {found['missing']}."
        return text, text
    ours, theirs = found["ours"], found["theirs"]
    responses = study["training"]["updates"][0]["responses"]
    ratio = f"{over_trl(found):.1f} times as fast"
    real = [over_trl(row["trl"]) for row in beside_trl_rows(study["real"])]
    on_real = f", on {BASE.name} {spread(real)} times" if real else ""
    answer = (f"An opct-exact update is {ratio} as TRL's{on_real}. TRL ran in float32 with its own "
              "sampling, without vLLM and without gradient checkpointing.")
    mine, other = (1e3 * sum(seconds) / len(seconds) for seconds in (ours, theirs))
    return answer, (
        f"An opct-exact update of {responses} responses takes {mine:.0f} ms, mean of {len(ours)}. "
        f"One of TRL {found['version']}'s DistillationTrainer takes {other:.0f} ms. "
        f"Ours is {ratio}, and {spread(singles(found))} times in single updates.")


# --- A real model ----------------------------------------------------------------------------

def case_name(case):
    """8 x 4, 50 + 32: pairs x responses, tokens of a prompt + of a response."""
    name = f"{case['pairs']} x {case['samples']}, {case['prompt']} + {case['new']}"
    return name + (f", LoRA {case['lora']}" if case["lora"] else "")


def real_sampler_table(real):
    lines = [["batch", "ours, tokens/s", "transformers, tokens/s", "ratio", "floor / ours"]]
    for row in real["sampler"]:
        speeds = row["tokens_per_second"]
        theirs = speeds.get("transformers")
        lines.append([count(row["batch"]), rate(speeds["ours"]), rate(theirs) if theirs else "-",
                      f"{speeds['ours'] / theirs:.1f}" if theirs else "-", f"{row['floor']:.2f}"])
    return markdown(lines)


def taken(row, who):
    """The bytes that two updates took at the peak without the libraries; None: they did not run."""
    found = row["peak_bytes"][who]
    return found and found["peak"] - found["libraries"]


def real_update_table(real):
    """Seconds, and gigabytes at the peak without those of the libraries."""
    lines = [["update", "ours, s", "TRL, s", "ratio", "ours, GB", "TRL, GB", "least, GB"]]
    for row in real["updates"]:
        trl, cells = row["trl"], ["-", "-", "-"]
        if "missing" not in trl:
            mine, other = (sum(s) / len(s) for s in (trl["ours"], trl["theirs"]))
            cells = [f"{mine:.2f}", f"{other:.2f}",
                     f"{over_trl(trl):.1f} ({spread(singles(trl))})"]
        for who in ("ours", "theirs"):
            found = taken(row, who)
            cells.append(f"{found / 1e9:.1f}" if found else "-")
        lines.append([case_name(row["case"]), *cells, f"{row['least_bytes'] / 1e9:.1f}"])
    return markdown(lines)


def real_parts_table(real):
    rows = [row for row in real["updates"] if "parts" in row]
    lines = [["update", *rows[0]["parts"]]]
    for row in rows:
        total = sum(row["parts"].values())
        lines.append([case_name(row["case"]), *(f"{duration(seconds)}, {percent(seconds / total)}"
                                                for seconds in row["parts"].values())])
    return markdown(lines)


def real_growth_table(real):
    """The tokens of an update: each distinct prompt once, and all responses."""
    lines = [["update", "tokens", "seconds", "milliseconds a token"]]
    for row in real["growth"]:
        case = row["case"]
        tokens = case["pairs"] * (case["prompt"] + case["samples"] * case["new"])
        lines.append([case_name(case), count(tokens), f"{row['seconds']:.2f}",
                      f"{1e3 * row['seconds'] / tokens:.1f}"])
    return markdown(lines)


def real_blocks(study):
    """The tables of the real model, or why there are none."""
    real, tables = study["real"], {"real_sampler": real_sampler_table,
                                   "real_updates": real_update_table,
                                   "real_parts": real_parts_table, "real_growth": real_growth_table}
    if "missing" in real:
        found = dict.fromkeys(tables, f"Not measured in this run: {real['missing']}.")
    else:
        found = {name: table(real) for name, table in tables.items()}
    return {"real_name": BASE.name, **found}


# --- In short, for the main README -----------------------------------------------------------

def at_batches(rows, batches):
    """Ours over transformers' at these batches; nothing where it was not measured."""
    return ratios([row for row in rows if row["batch"] in batches], "transformers")


def short_column(study, batches, real_batches):
    """The ratios of one machine, a cell for each row of the table; "-" where there are none."""
    real, trl = study["real"], study["training"]["trl"]
    rows = beside_trl_rows(real)
    found = [at_batches(study["sampler"]["compared"], batches),
             at_batches(real.get("sampler", []), real_batches),
             [over_trl(trl)] if "ours" in trl else [], [over_trl(row["trl"]) for row in rows],
             [taken(row, "theirs") / taken(row, "ours") for row in rows if taken(row, "theirs")]]
    return [", ".join(f"{ratio:.1f}" for ratio in cell) or "-" for cell in found]


def in_short(studies):
    """A table of ratios, each taken side by side in one run: a column for each machine's study."""
    batches, real_batches = ([row["batch"] for row in rows] for rows in (
        studies[0]["sampler"]["compared"], studies[0]["real"].get("sampler", [])))
    labels = [f"sampler, batch {listed(batches)}",
              f"sampler, SmolLM2, batch {listed(real_batches)}",
              "update", "update, SmolLM2: short prompts, long, LoRA",
              "memory of an update, the same three"]
    columns = [short_column(study, batches, real_batches) for study in studies]
    return markdown([["times better here", *(study["about"]["machine"] for study in studies)],
                     *zip(labels, *columns)])


def listed(numbers):
    return ", ".join(map(count, numbers))


# --- Files -----------------------------------------------------------------------------------

def about_line(study):
    a = study["about"]
    return (f"`{a['command']}`, {a['date']}, commit {a['commit']}, {a['machine']}, "
            f"CPU threads: {a['threads']}, torch {a['torch']}.")


def rates_line(study):
    """Each part of the study has measured the machine for itself."""
    parts = []
    for name in ("sampler", "real", "training"):
        rates = study[name].get("rates")
        if not rates:                                       # there was no real model
            continue
        parts.append(f"{rates['flops'] / 1e9:,.0f} GFLOP/s and {rates['bytes'] / 1e9:,.1f} GB/s "
                     f"({name})")
    return ", ".join(parts)


def training_blocks(study):
    """What is said of updates and pretraining."""
    training = study["training"]
    sampling = training["updates"][0]["seconds"]
    shares = [row["share"] for row in training["pretraining"]["rows"]]
    trl_answer, trl = beside_trl(study)
    part = percent(sampling["sampling"] / sum(sampling.values()))
    reached = spread([100 * share for share in shares], "{:.0f}")
    padding = percent(training["pretraining"]["padding"])
    return {
        "in_short": f"Sampling is {part} of an opct-exact update. Pretraining reaches {reached} % "
                    f"of the matrix rate. {trl_answer}",
        "responses": f"{training['pairs']} pairs with {training['samples']} responses each. "
                     + responses(study),
        "updates": update_table(study), "compile": compiling(study), "trl": trl,
        "pretraining": f"Padding is {padding} of the rows.\n\n{pretraining_table(study)}"}


def blocks(study):
    """What words.md may ask for: name -> text."""
    sampler = study["sampler"]
    ending, shortest, longest = sampler["ending"], *sampler["prompt"]
    return {
        "about": about_line(study), "preset": study["about"]["preset"],
        "rates": rates_line(study), "parameters": count(sampler["parameters"]),
        "rounds": str(PRESETS[study["about"]["preset"]].rounds), "new": str(sampler["new"]),
        "shortest": str(shortest), "longest": str(longest),
        "over_naive": spread(ratios(sampler["compared"], "naive")),
        "beside_transformers": beside_transformers(study),
        "floor": spread([100 * row["floor"] for row in sampler["compared"]], "{:.0f}"),
        "speed": speed_table(study), "ratios": ratio_table(study), "growth": growth_table(study),
        "ending_batch": str(ending["batch"]), "ending_new": str(ending["new"]),
        "ending_probability": f"{ending['probability']:.3f}",
        "ending_needed": percent(ending["needed"]), "ending_taken": percent(ending["taken"]),
        **training_blocks(study), **real_blocks(study)}


def readme(study, words):
    """The text with its {names} replaced, its paragraphs wrapped again. Raises KeyError if words.md
    asks for a name that `blocks` does not make."""
    paragraphs = words.strip().format_map(blocks(study)).split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if not paragraph.startswith(("|", "#", "    ")):
            paragraphs[i] = textwrap.fill(paragraph, WIDTH, break_long_words=False,
                                          break_on_hyphens=False)
    return "\n\n".join(paragraphs) + "\n"


def read(folder):
    return read_json(Path(folder) / "results.json",
                     "no finished study there: run `bash train.sh study speed`")


def publish(study=None):
    """The pages of this folder again, and the ratios of the main README. With a study its machine's
    results are taken over."""
    if study is not None:
        write_all(study, FOLDER / "gpu" if study["about"]["preset"] == "full" else FOLDER)
    there = [folder for folder in (FOLDER, FOLDER / "gpu") if (folder / "results.json").exists()]
    for folder in there:
        write_all(read(folder), folder)
    if there:
        write_text(MAIN, fill(MAIN.read_text(), "speed", in_short(list(map(read, there)))))


def write_all(study, folder):
    """results.json and README.md of a study."""
    words = (FOLDER / "words.md").read_text(encoding="utf-8")
    write_text(Path(folder) / "results.json", json.dumps(study, indent=1) + "\n")
    write_text(Path(folder) / "README.md", readme(study, words))
