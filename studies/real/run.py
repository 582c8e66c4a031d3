"""The plan of the study: which commands, in which order, and which learning rates.

1. The base model's folder and the questions.
2. With the first seed: every arm at every learning rate, measured on the validation questions.
3. The learning rate of each arm is chosen there.
4. Base, arms and the test questions to them, seed after seed; those to the grid's other runs,
   by which nothing is chosen; the controls.
5. What an update costs.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from studies import pool
from studies.real import convert, questions
from studies.study import ARMS, joined
from support.common import UserError, read_json, show
from support.pairs import read_jsonl

# --control: the arm it repeats. After the clean prompt both OPCT arms have a gradient of exactly 0.
CONTROLS = {"clean": "sft", "shuffled": "opct-exact"}


@dataclass
class Preset:
    """Sizes of a study."""
    updates: str                        # flags of opct.py
    seeds: tuple
    arms: tuple = tuple(ARMS)
    rates: tuple = ()                   # tried on validation; none: those of CHOSEN
    controls: tuple = ()
    every: int = 1                      # of so many questions one is asked
    again: bool = False                 # also the base with its weights rounded once more
    costs: tuple = ()                   # what an update of opct-exact costs, with these flags


# No state is saved on the way: a run is short, and the state of this model takes 1.6 GB.
UPDATES = "--steps 24 --batch 8 --samples 2 --max-new-tokens 16 --save-every 24"
CHOSEN = {"sft": "1e-4", "sft-exact": "1e-5", "opct": "1e-5", "opct-exact": "1e-4"}
COSTS = ("", "--micro-batch 4", "--lora 16")
PRESETS = {
    # Every stage once: some minutes with the real model.
    "smoke": Preset("--steps 2 --batch 2 --samples 1 --max-new-tokens 8", seeds=(0,),
                    arms=("sft", "opct-exact"), rates=("1e-5", "3e-5"), controls=("clean",),
                    every=40, again=True, costs=("",)),
    # One seed, two arms, half of the questions, at the rates that `full` chose.
    "quick": Preset(UPDATES, seeds=(0,), arms=("sft", "opct-exact"), every=2),
    # The study of the README.
    "full": Preset(UPDATES, seeds=(0, 1, 2, 3), rates=("1e-5", "3e-5", "1e-4"),
                   controls=tuple(CONTROLS), again=True, costs=COSTS)}


# --- Commands: (seconds that it takes about, name, argv) -------------------------------------

def python(seconds, name, text):
    return seconds, name, [sys.executable, *text.split()]


def place(folder, seed, name):
    return f"{folder}/seed-{seed}/{name}"


def train(folder, preset, arm, rate, seed, control=None):
    """One consistency run."""
    method, loss = ARMS[arm]
    name = f"{arm}-{control}" if control else f"{arm}@{rate}"
    text = (f"opct.py {method} --base {convert.FOLDER} --out {place(folder, seed, name)} --pairs "
            f"{folder}/questions/train-{seed}.jsonl --loss {loss} --lr {rate} --seed {seed} "
            + preset.updates)
    if control:
        text += f" --control {control}"
    return python(600, f"seed-{seed}/{name}", text)


def measured(folder, preset, run, out, split):
    """All questions of a split to one checkpoint."""
    text = (f"-m studies.real.measure {run} --base {convert.FOLDER} --questions "
            f"{folder}/questions --split {split} --out {folder}/{split}/{out}.json "
            f"--every {preset.every}")
    return python(600 if split == "test" else 150, f"{split}/{out}", text)


def grid_stages(folder, preset):
    """Every arm at every rate with the first seed, and the validation questions to each."""
    runs, tables = [], [measured(folder, preset, convert.FOLDER, "base", "val")]
    for rate in preset.rates:
        for arm in preset.arms:
            runs.append(train(folder, preset, arm, rate, preset.seeds[0]))
            run = place(folder, preset.seeds[0], f"{arm}@{rate}")
            tables.append(measured(folder, preset, run, f"{arm}@{rate}", "val"))
    return [runs, tables] if runs else []


def final_stages(folder, preset, rates):
    """The runs of a seed stand beside the test questions to those before: the first seed, the
    controls, seed after seed."""
    stages, tables = [], [measured(folder, preset, convert.FOLDER, "base", "test")]
    for seed in preset.seeds:
        runs, first = [], seed == preset.seeds[0]
        for arm in preset.arms:
            if not (first and preset.rates):                    # else the grid has run it
                runs.append(train(folder, preset, arm, rates[arm], seed))
        if runs:
            stages.append(tables + runs)
            tables = []
        tables += [measured(folder, preset, place(folder, seed, f"{arm}@{rates[arm]}"),
                            f"{arm}.{seed}", "test") for arm in preset.arms]
        if first:
            runs, of_controls = control_commands(folder, preset, rates)
            stages.append(tables + other_rates(folder, preset, rates) + runs)
            tables = of_controls
    return [*stages, tables]


def control_commands(folder, preset, rates):
    """The runs of the controls, with the first seed, and the test questions to them."""
    runs, tables, seed = [], [], preset.seeds[0]
    for control in preset.controls:
        arm = CONTROLS[control]
        runs.append(train(folder, preset, arm, rates[arm], seed, control))
        run = place(folder, seed, f"{arm}-{control}")
        tables.append(measured(folder, preset, run, f"{arm}-{control}.{seed}", "test"))
    if preset.again:
        runs.append(python(20, "rounded-again", "-m studies.real.convert again"))
        tables.append(measured(folder, preset, convert.AGAIN, "rounded-again", "test"))
    return runs, tables


def other_rates(folder, preset, rates):
    """The test questions to the grid's other runs, first at the rates that some arm has. Nothing is
    chosen by them: they tell an arm from its learning rate."""
    others = [(arm, rate) for rate in preset.rates for arm in preset.arms if rates[arm] != rate]
    others.sort(key=lambda run: run[1] not in rates.values())
    return [measured(folder, preset, place(folder, preset.seeds[0], f"{arm}@{rate}"),
                     f"{arm}@{rate}.{preset.seeds[0]}", "test") for arm, rate in others]


def cost_stage(folder, preset):
    """One at a time with all cores, or the seconds would say little."""
    return [python(150, f"cost {flags or 'all weights'}",
                   f"-m studies.real.cost {folder}/cost/{i} --pairs "
                   f"{folder}/questions/train-{preset.seeds[0]}.jsonl {preset.updates} {flags}")
            for i, flags in enumerate(preset.costs)]


# --- The learning rates ----------------------------------------------------------------------

def share(text, letters):
    """The share of the answers that got one of these letters."""
    return sum(c in letters for c in text) / len(text)


def score_of(found, records):
    """(right under a wrong hint, right without a hint), from the letters of a measurement."""
    wrong = "".join(c for c, r in zip(found["wrapped"], records) if r["fails"])
    return share(wrong + found["sampled"], "r"), share(found["clean"], "r")


def choose(val, records):
    """The learning rate of each arm, by a rule that was fixed beforehand.

    Among the rates at which the questions without a hint lose no more than 0.05: the one with
    most right answers under a wrong hint, greedy and sampled together. If equal to two decimals:
    the smaller. If all lose more: the one that loses least.

    Args: val: "base" and "ARM@RATE" -> what `measure` found on these validation records.
    Returns {arm: rate} and {arm: {rate: (right under a wrong hint, loss without a hint)}}.
    """
    _, clean = score_of(val["base"], records)
    scores = {}
    for name, found in val.items():
        if "@" in name:
            arm, rate = name.split("@")
            right, now = score_of(found, records)
            scores.setdefault(arm, {})[rate] = right, clean - now
    rates = {}
    for arm, of_rate in scores.items():
        def rank(rate):
            right, loss = of_rate[rate]
            return max(0, round(loss - 0.05, 3)), -round(right, 2), float(rate)
        rates[arm] = min(of_rate, key=rank)
    return rates, scores


# --- What the commands have written ----------------------------------------------------------

def read(path):
    return read_json(path, "delete it and give the same command again")


def collect_split(folder, split):
    """(name -> what was measured on the split, the records asked). UserError: nothing there."""
    preset = preset_of(folder)
    found = {path.stem: read(path) for path in sorted(Path(folder, split).glob("*.json"))}
    if "base" not in found:
        raise UserError(f"{folder} holds no measurements: run `bash train.sh study real`")
    return found, read_jsonl(Path(folder, "questions", f"{split}.jsonl"))[::preset.every]


def preset_of(folder):
    name = Path(folder).name.removeprefix("study-real-")
    if name not in PRESETS:
        raise UserError(f"{folder}: not the name of a folder of this study, out/study-real-PRESET")
    return PRESETS[name]


def transcripts(found, records):
    """Six wrong hints that the base followed, three of new families, and all first-seed answers."""
    out = []
    for new in (False, True):
        wanted = [i for i, r in enumerate(records) if r["fails"]
                  and (r["family"] in questions.NEW) == new and found["base"]["wrapped"][i] == "h"]
        # One of each family first, then others.
        families = [records[i]["family"] for i in wanted]
        rank = [families[:k].count(family) for k, family in enumerate(families)]
        for _, i in sorted(zip(rank, wanted))[:3]:
            said = {name: found[f"{name}.0" if name in ARMS else name]["said"][i]
                    for name in ("base", *ARMS) if name == "base" or f"{name}.0" in found}
            out.append({"prompt": records[i]["wrapped"], "said": said})
    return out


def collect(folder):
    """Everything that a study has measured."""
    preset, name = preset_of(folder), Path(folder).name.removeprefix("study-real-")
    found, records = collect_split(folder, "test")
    origins = [one.pop("about") for one in found.values()]
    study = {"about": {**joined(origins), "command": f"bash train.sh study real {name}"},
             "updates": preset.updates, "every": preset.every,
             "transcripts": transcripts(found, records)}
    if preset.rates:
        val, asked = collect_split(folder, "val")
        study["rates"], study["scores"] = choose(val, asked)
    else:
        study["rates"] = {arm: CHOSEN[arm] for arm in preset.arms}
    for one in found.values():
        del one["said"]
    study["runs"] = found
    study["costs"] = [read(path) for path in sorted(Path(folder, "cost").glob("*.json"))]
    return study


def run(name):
    """Runs the study of a preset, or goes on with it. Returns its folder."""
    preset, folder, at_once = PRESETS[name], f"out/study-real-{name}", pool.places()
    show(f"== the study real: {at_once} commands at a time, in {folder}/; a line for each")
    convert.make()
    questions.write(f"{folder}/questions", preset.seeds)
    rates, grid = dict(CHOSEN), grid_stages(folder, preset)
    costs = cost_stage(folder, preset)
    later = pool.seconds_of([*final_stages(folder, preset, rates), costs])
    pool.run_stages(grid, at_once, folder, later)
    if grid:
        rates |= choose(*collect_split(folder, "val"))[0]
    show("learning rates: " + ", ".join(f"{arm} {rates[arm]}" for arm in preset.arms))
    final = final_stages(folder, preset, rates)
    pool.run_stages(final, at_once, folder, pool.seconds_of([costs]))
    pool.run(costs, 1, folder)
    return folder
