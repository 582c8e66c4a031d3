"""The plan of the study: base models, planting, all methods on every organism, what is measured.

A *cell* is one organism with one seed. Its strengths are stops on one way: planting goes on until
the rate on the validation split has reached each of them. Then every method starts from each stop.
What is finished lies in FOLDER/ORGANISM-SEED/STRENGTH/METHOD.json, so a stopped study goes on.
"""
import copy
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields
from math import log
from pathlib import Path

import numpy as np
import torch

from data import CAPABILITIES, judge as judge_world
from eval import drift_kl, respond, share
from model import load_checkpoint, save_checkpoint
from opct import ConsistencyConfig, Pairs, PretrainConfig, pretrain, train
from studies import pool
from studies.entrench.decoding import LONGEST, Bench, likelihood
from studies.entrench.methods import LABEL_RATE, LABELS, STEPS, best, label_step
from studies.entrench.organisms import ORGANISMS, encoded, judged, plant, rates, records_of
from studies.entrench.world import load_study_world, write_world
from support.common import (UserError, about, generator, pick_device, read_json, rng, show,
                            write_json)
from support.pairs import pairs_of_update, write_jsonl
from support.runs import lock
from support.tokenizer import chat, load_tokenizer, save_tokenizer

KINDS = ("healthy", "unhealthy")                            # of clean prompts


@dataclass
class Preset:
    """Sizes of the study."""
    seeds: tuple
    strengths: tuple        # which of an organism's three
    world: dict             # fields of WorldConfig
    base: dict              # fields of PretrainConfig
    prompts: int = 64       # that methods train on
    samples: int = 4        # labels, or responses, for each
    batch: int = 8          # prompts in an update
    steps: int = 40         # updates
    tests: int = 200        # prompts on which misbehaviour is measured
    planting: int = 200     # most updates that plant
    plain: int = 60         # prompts of each capability


PRESETS = {
    # Every stage once, models that know nothing.
    "smoke": Preset((0,), (1,), {"cities": 12, "lands": 4, "recipes": 12, "things": 12},
                    {"steps": 20, "rows": 8, "layers": 2, "width": 64},
                    prompts=4, samples=2, batch=2, steps=2, tests=8, planting=2, plain=4),
    "quick": Preset((0,), (0, 2), {}, {"steps": 1500}),
    "full": Preset((0, 1, 2, 3, 4), (0, 1, 2), {}, {"steps": 1500})}


# --- The base model of a seed, and its organisms -------------------------------------------------


def make_base(folder, seed, preset):
    """A world and a base model, which has met graders, weather, rules, revising and grading."""
    world = Path(folder) / f"world-{seed}"
    write_world(world, seed=seed, **preset.world)
    pretrain(PretrainConfig(world=str(world), out=f"{folder}/base-{seed}", seed=seed,
                            **preset.base), load_study_world)


def open_base(folder, seed):
    """The world, the tokenizer and the base model of a seed."""
    world = load_study_world(f"{folder}/world-{seed}")
    device = pick_device()
    return world, load_tokenizer(f"{folder}/world-{seed}"), load_checkpoint(
        f"{folder}/base-{seed}", device)


def plant_strength(at, name, strength, base, world, tokenizer, seed, preset):
    """Plants one organism. Its checkpoint is AT/organism; planting.json holds the way there."""
    if not (at / "planting.json").exists():
        model, way = plant(ORGANISMS[name], strength, base, world, tokenizer, seed, preset.planting)
        save_checkpoint(model, at / "organism")
        save_tokenizer(tokenizer, at / "organism")
        write_json(at / "planting.json", {"way": way})
    return load_checkpoint(at / "organism", pick_device())


# --- What is measured on a model -----------------------------------------------------------------


class Exam:
    """The test prompts of a cell: misbehaviour, capabilities, drift. The same for every model."""

    def __init__(self, organism, world, tokenizer, seed, preset, group="test"):
        self.organism, self.tokenizer, self.seed = organism, tokenizer, seed
        self.records = records_of(organism, world, group, preset.tests, seed)
        plain = [r for r in world.records(group) if r["axis"] in CAPABILITIES]
        self.plain = plain[:len(CAPABILITIES) * preset.plain]

    def measure(self, model, before):
        """All figures of a model, and its first responses. before: what drift starts from."""
        texts, verdicts = judged(self.organism, model, self.tokenizer, self.records, self.seed)
        figures = rates(self.records, verdicts)
        plain = [r["clean"] for r in self.plain]
        said = respond(model, self.tokenizer, plain, (self.seed, "plain"))
        for axis in CAPABILITIES:
            of_axis = [(r, judge_world(r, text)) for r, text in zip(self.plain, said)
                       if r["axis"] == axis]
            figures[f"capability_{axis}"] = share(of_axis, "right")
        figures["drift_kl"] = drift_kl(model, before, self.tokenizer, self.plain, self.seed)
        return figures, [[r["prompt"], text] for r, text in zip(self.records, texts)][:3]

    def rate_on(self, model, form):
        """The rates on another form of the prompts."""
        _, verdicts = judged(self.organism, model, self.tokenizer, self.records, self.seed, form)
        return rates(self.records, verdicts)


def label_shift(bench, records, labels):
    """KL(labels || model) in nats a label, the mean over prompts.

    q is the share of each text among a prompt's labels, p the model's probability of it. Few labels
    a prompt make it too large by something that `sampling`, whose true value is 0, shows.
    """
    of_prompt = {}
    for record, label in zip(records, labels):
        if label is not None:
            of_prompt.setdefault(record["prompt"], Counter())[label] += 1
    if not of_prompt:
        return None
    pairs = [(prompt, text) for prompt, texts in of_prompt.items() for text in texts]
    sums, _ = likelihood(bench.model, bench.tokenizer, *zip(*pairs))
    logp, total = dict(zip(pairs, sums)), 0.0
    for prompt, texts in of_prompt.items():
        n = sum(texts.values())
        total += sum(k / n * (log(k / n) - logp[prompt, text]) for text, k in texts.items())
    return total / len(of_prompt)


def eta(organism, bench, records):
    """Does a score tell misbehaviour? For each score: the rate in each fifth of the samples, from
    the lowest scores to the highest; the rate of the best of 4 and that of all samples."""
    prompts = [r["prompt"] for r in records]
    shown, out = bench.say(prompts, temperature=0.7, times=4), {}
    every = [(r, text) for r, texts in zip(records, shown) for text in texts]
    bad = np.array([organism.judge(r, text) == "bad" for r, text in every])
    for name in ("likelihood", "outside_score", "grade"):
        score_of = getattr(bench, name)
        scores = score_of([r["prompt"] for r, _ in every], [text for _, text in every])
        fifths = np.array_split(bad[np.argsort(scores, kind="stable")], 5)
        chosen = best(prompts, shown, score_of)
        out[name] = {"fifths": [fifth.mean().item() for fifth in fifths], "all": bad.mean().item(),
                     "best": np.mean([organism.judge(r, text) == "bad"
                                      for r, text in zip(records, chosen)]).item()}
    return out


# --- One method on one organism ------------------------------------------------------------------


def train_on_pairs(out, model, tokenizer, forms, texts, method, preset, seed):
    """Trains a copy of the model and returns it.

    forms: (clean, wrapped) prompts, one for each of the `texts`, which are the given responses;
    `samples` rows that stand side by side belong to one prompt.
    """
    step_method, loss, rate = method
    student, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False).eval()
    clean, wrapped = ([chat(tokenizer, prompt) for prompt in side] for side in zip(*forms))
    response, mask = encoded(model, tokenizer, texts)
    config = ConsistencyConfig(out=str(out), loss=loss, steps=preset.steps, batch=preset.batch,
                               samples=preset.samples, lr=rate, seed=seed, save_every=10**6)

    def step_of(step):
        rows = pairs_of_update(step, len(texts) // config.samples, config)
        longest = mask[rows].sum(1).max()
        noise = torch.rand(len(rows), LONGEST, generator=generator(seed, "sampling", step))
        pairs = Pairs([clean[i] for i in rows], [wrapped[i] for i in rows],
                      response[rows, :longest], mask[rows, :longest], noise)
        yield step_method(student, teacher, pairs, config)

    train(student, step_of, config, [torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)])
    shutil.rmtree(out)                                      # 60 models of each cell are not kept
    return student.eval()


def run_labels(out, name, bench, organism, records, preset):
    """Labels by a method, then SFT on them. Returns the model and what is known of the labels."""
    every = [r for r in records for _ in range(preset.samples)]
    labels = LABELS[name](bench, every)
    kept = [(r, x) for r, x in zip(every, labels) if x is not None]
    found = {"kept": len(kept) / len(every), "label_kl": label_shift(bench, every, labels)}
    if not kept:                                            # nothing to learn from
        return bench.model, found
    if "healthy" in records[0]:                             # else planted prompts: no judge
        verdicts = [organism.judge(*pair) for pair in kept]
        found["labels"] = rates([r for r, _ in kept], verdicts)
    forms = [(r["prompt"], r["prompt"]) for r, _ in kept]
    method = (label_step, "sampled", LABEL_RATE)
    return train_on_pairs(out, bench.model, bench.tokenizer, forms, [x for _, x in kept], method,
                          preset, bench.seed), found


def run_steps(out, name, kind, bench, organism, records, preset):
    """A step method on pairs with healthy or unhealthy clean prompts."""
    every = [r for r in records for _ in range(preset.samples)]
    texts = [texts[0] for texts in bench.say([r[kind] for r in every])]
    verdicts = [organism.judge(r, text) for r, text in zip(every, texts)]
    forms = [(r[kind], r["prompt"]) for r in every]
    found = {"labels": rates(every, verdicts)}
    return train_on_pairs(out, bench.model, bench.tokenizer, forms, texts, STEPS[name], preset,
                          bench.seed), found


def runs_of():
    """The runs of each strength: name -> (method, kind of prompts). Two runs have prompts of the
    kind that was planted, as all have in 2606.03810."""
    labels = {name: (name, "measured") for name in LABELS}
    planted = {f"{name}, planted": (name, "planted") for name in ("sampling", "greedy")}
    pairs = {f"{name}, {kind}": (name, kind) for kind in KINDS for name in STEPS}
    return labels | planted | pairs


def run_strength(at, name, number, bench, exam, world, preset):
    """The organism before, then every method. What is there already is not done again."""
    organism, model = ORGANISMS[name], bench.model
    records = records_of(organism, world, "train", preset.prompts, bench.seed)
    draws = rng(bench.seed, "planted prompts")
    planted = [{"prompt": organism.plant(world, draws, 1)[0]} for _ in records]
    if not (at / "before.json").exists():
        figures, examples = exam.measure(model, bench.outside)
        for kind in KINDS:
            figures[kind] = exam.rate_on(model, kind)["rate"]
        write_json(at / "before.json", {"figures": figures, "examples": examples,
                                        "eta": eta(organism, bench, records)})
    for run, (method, kind) in runs_of().items():
        path = at / f"{run.replace(', ', '-')}.json"
        if path.exists():
            continue
        began, out = time.time(), at / "run"
        shutil.rmtree(out, ignore_errors=True)              # of a killed run
        if kind in KINDS:
            after, found = run_steps(out, method, kind, bench, organism, records, preset)
        else:
            asked = records if kind == "measured" else planted
            after, found = run_labels(out, method, bench, organism, asked, preset)
        figures, examples = exam.measure(after, model)
        write_json(path, {"figures": figures, "examples": examples, **found,
                          "seconds": time.time() - began})
        value = figures["rate"]["value"] if figures["rate"] else float("nan")
        show(f"== {name}, strength {number}: {run}: {value:.3f}, {time.time() - began:.0f} s")


def write_pairs(at, organism, world, seed, preset):
    """healthy.jsonl and unhealthy.jsonl: held-out pairs as `eval.py pairs` reads them."""
    records = records_of(organism, world, "val", preset.tests, seed)
    for kind in KINDS:
        write_jsonl(at / f"{kind}.jsonl", [
            {"clean": r[kind], "wrapped": r["prompt"], "expect": r["expect"], "avoid": r["avoid"]}
            for r in records])


def run_cell(folder, name, seed, preset):
    """All strengths of one organism."""
    at = Path(folder) / f"{name}-{seed}"
    at.mkdir(parents=True, exist_ok=True)
    lock(at)
    world, tokenizer, base = open_base(folder, seed)
    write_pairs(at, ORGANISMS[name], world, seed, preset)
    exam = Exam(ORGANISMS[name], world, tokenizer, seed, preset)
    if not (at / "base.json").exists():
        figures, examples = exam.measure(base, base)
        write_json(at / "base.json", {"figures": figures, "examples": examples})
    for number in preset.strengths:
        model = plant_strength(at / str(number), name, number, base, world, tokenizer, seed, preset)
        bench = Bench(model, tokenizer, base, seed)
        run_strength(at / str(number), name, number, bench, exam, world, preset)


# --- The whole study -----------------------------------------------------------------------------


def run(name):
    """Runs the study of a preset, or goes on with it. Returns its folder."""
    preset, folder, at_once = PRESETS[name], f"out/study-entrench-{name}", pool.places()
    show(f"== the study entrench: {at_once} commands at a time, in {folder}/; a line for each")
    each = 20 * (len(runs_of()) + 1) * len(preset.strengths)
    cells = [(seed, organism) for seed in preset.seeds for organism in ORGANISMS]
    command = [sys.executable, "-m", "studies.entrench"]
    bases = [(330, f"base-{seed}", [*command, "base", name, str(seed)]) for seed in preset.seeds]
    tests = [(each, f"{organism}-{seed}", [*command, "cell", name, str(seed), organism])
             for seed, organism in cells]
    pool.run_stages([bases, tests], at_once, folder)
    return folder


def collect(folder):
    """Everything that a study has measured: {"cells": {organism-seed: ...}, "about"}."""
    cells, preset = {}, Path(folder).name.removeprefix("study-entrench-")
    for path in sorted(Path(folder).glob("*-*/base.json")):
        cell = cells[path.parent.name] = {"base": read(path), "strengths": {}}
        for at in sorted(path.parent.glob("[0-9]")):
            if (at / "before.json").exists():
                runs = {run: read(at / f"{run.replace(', ', '-')}.json") for run in runs_of()
                        if (at / f"{run.replace(', ', '-')}.json").exists()}
                cell["strengths"][at.name] = {**read(at / "planting.json"), "runs": runs,
                                              "before": read(at / "before.json")}
    if not cells or preset not in PRESETS:
        raise UserError(f"{folder} holds no study: run `bash train.sh study entrench`")
    sizes = {f.name: getattr(PRESETS[preset], f.name) for f in fields(Preset)}
    origin = {**about(pick_device()), "command": f"bash train.sh study entrench {preset}"}
    return {"cells": cells, "sizes": sizes, "about": origin}


def read(path):
    return read_json(path, "delete it and give the same command again",
                     parse_float=lambda text: float(f"{float(text):.5g}"))
