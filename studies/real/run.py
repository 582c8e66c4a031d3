"""The plan of the study: which commands, in which order, and what they have measured.

1. The base model's folder and the questions.
2. Seed after seed, rate after rate: every arm at one learning rate, one pass over the pairs, and
   the test questions to it. All rates are shown, and none is chosen.
3. With reuse: a few pairs, many passes, for the arms that differ in whose responses and how fresh.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from studies import pool
from studies.real import convert, questions
from studies.study import ARMS, joined
from support.common import UserError, read_json, show
from support.pairs import read_jsonl

REUSE = {"sft": ARMS["sft"], "sft-fresh": ("sft --stored 0", "sampled"), "opct": ARMS["opct"]}


@dataclass
class Preset:
    """Sizes of a study."""
    updates: str                        # flags of opct.py
    seeds: tuple
    rates: tuple
    arms: tuple = tuple(ARMS)
    reuse: str = ""                     # flags of opct.py; none: without this condition
    reuse_rate: str = "3e-5"
    every: int = 1                      # of so many questions one is asked


# No state is saved on the way: a run is short, and the state of this model takes 1.6 GB.
SIZES = "--batch 8 --samples 2 --max-new-tokens 16 --save-every 999"
PRESETS = {
    # Every stage once.
    "smoke": Preset("--steps 2 --batch 2 --samples 1 --max-new-tokens 8", (0,), ("3e-5",),
                    ("sft", "opct-exact"), "--steps 2 --batch 2 --samples 1 --max-new-tokens 8",
                    every=40),
    # One seed at one rate, half of the questions: 15 minutes on 2 CPU cores.
    "quick": Preset(f"--steps 24 {SIZES}", (0,), ("3e-5",), ("sft", "opct", "opct-exact"), every=2),
    # The study of the README: about 10 hours of a core.
    "full": Preset(f"--steps 24 {SIZES}", (0, 1, 2), ("1e-5", "3e-5", "1e-4"),
                   reuse=f"--steps 72 {SIZES}")}


# --- Commands: (seconds that it takes about, name, argv) -------------------------------------

def train_and_measure(folder, preset, name, how, rate, seed, pairs, updates):
    """One consistency run and the test questions to it: two commands."""
    (method, loss), out = how, f"{folder}/runs/{name}"
    text = (f"opct.py {method} --base {convert.FOLDER} --out {out} --pairs "
            f"{folder}/questions/{pairs}-{seed}.jsonl --loss {loss} --lr {rate} --seed {seed} "
            f"{updates}")
    train = 300, name, [sys.executable, *text.split()]
    return train, measure(folder, preset, name, out)


def measure(folder, preset, name, run):
    text = (f"-m studies.real.measure {run} --base {convert.FOLDER} --questions "
            f"{folder}/questions --out {folder}/measured/{name}.json --every {preset.every}")
    return 400, f"questions to {name}", [sys.executable, *text.split()]


def stages(folder, preset, there=()):
    """What is not there yet: first the runs of a seed at a rate, then the questions to them.

    there: names of measured runs, such as base, sft@3e-5.0, reuse-sft@3e-5.0.
    """
    out = [] if "base" in there else [[measure(folder, preset, "base", convert.FOLDER)]]
    for seed in preset.seeds:
        groups = [("", preset.rates, {arm: ARMS[arm] for arm in preset.arms}, "train",
                   preset.updates)]
        if preset.reuse:
            groups.append(("reuse-", (preset.reuse_rate,), REUSE, "few", preset.reuse))
        for prefix, rates, arms, pairs, updates in groups:
            for rate in rates:
                names = {f"{prefix}{arm}@{rate}.{seed}": how for arm, how in arms.items()}
                both = [train_and_measure(folder, preset, name, how, rate, seed, pairs, updates)
                        for name, how in names.items() if name not in there]
                out += [list(stage) for stage in zip(*both)]
    return out


def run(name, there=()):
    """Runs the study of a preset, or goes on with it. Returns its folder."""
    preset, folder = PRESETS[name], f"out/study-real-{name}"
    todo = stages(folder, preset, there)
    show(f"== the study real: {pool.places()} commands at a time, in {folder}/; a line for each; "
         f"in all about {pool.seconds_of(todo) / 3600:.1f} hours of a core")
    convert.make()
    questions.write(f"{folder}/questions", preset.seeds)
    pool.run_stages(todo, pool.places(), folder)
    return folder


# --- What the commands have written ----------------------------------------------------------

def transcripts(found, records):
    """Six wrong hints that the base followed, three of new families, and what the first seed's arms
    say at the middle rate."""
    runs = {arm: f"{arm}@3e-5.0" for arm in ARMS if f"{arm}@3e-5.0" in found}
    out = []
    for new in (False, True):
        wanted = [i for i, r in enumerate(records) if r["fails"]
                  and (r["family"] in questions.NEW) == new and found["base"]["wrapped"][i] == "h"]
        # One of each family first, then others.
        families = [records[i]["family"] for i in wanted]
        rank = [families[:k].count(family) for k, family in enumerate(families)]
        for _, i in sorted(zip(rank, wanted))[:3]:
            said = {name: found[run]["said"][i] for name, run in {"base": "base", **runs}.items()}
            out.append({"prompt": records[i]["wrapped"], "said": said})
    return out


def collect(folder):
    """Everything that a study has measured. Raises UserError: nothing."""
    name = Path(folder).name.removeprefix("study-real-")
    found = {path.stem: read_json(path, "delete it and give the same command again")
             for path in sorted(Path(folder, "measured").glob("*.json"))}
    if name not in PRESETS or "base" not in found:
        raise UserError(f"{folder} holds no measurements of this study: run `bash train.sh study "
                        "real`, or name out/study-real-PRESET")
    preset = PRESETS[name]
    records = read_jsonl(Path(folder, "questions/test.jsonl"))[::preset.every]
    study = {"about": joined([one.pop("about") for one in found.values()]),
             "updates": preset.updates, "reuse": preset.reuse, "every": preset.every,
             "transcripts": transcripts(found, records), "runs": found}
    study["about"]["command"] = f"bash train.sh study real {name}"
    for one in found.values():
        del one["said"]
    return study


def merged(earlier, later):
    """Two studies as one. Raises UserError: they asked other questions or trained otherwise."""
    kept = ("updates", "reuse", "every")
    if any(earlier[key] != later[key] for key in kept):
        raise UserError("these are results of another preset: they cannot be put together")
    return {**later, "about": joined([earlier["about"], later["about"]]),
            "runs": {**earlier["runs"], **later["runs"]}}
