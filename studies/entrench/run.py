"""The plan of the study: base models, planting, all methods on every organism, what is measured.

A *cell* is one organism with one seed. Its strengths are stops on one way: planting goes on until
the rate on the validation split has reached each of them. Then every method starts from each stop.
What is finished lies in FOLDER/ORGANISM-SEED/STRENGTH/METHOD.json, so a stopped study goes on.
Seeds come one after the other, and only whole seeds count.
"""
import copy
import math
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from data import CAPABILITIES, judge as judge_world
from eval import drift_kl, respond, share
from model import load_checkpoint, save_checkpoint
from opct import Batch, ConsistencyConfig, PretrainConfig, pretrain, rows_of_update, train
from studies import pool
from studies.entrench.decoding import LONGEST, Bench
from studies.entrench.methods import LABEL_STEP, LABELS, STEPS, best, gist
from studies.entrench.organisms import ORGANISMS, encoded, judged, plant, rates, records_of
from studies.entrench.world import load_study_world, write_world
from support.common import (UserError, about, generator, number_of, pick_device, read_json, rng,
                            show, write_json, write_jsonl)
from support.run import lock
from support.tokenizer import chat, load_tokenizer, save_tokenizer

KINDS = ("healthy", "unhealthy")                            # of clean prompts
DRAWS = 32                                                  # samples that stand for a model


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
    plain: int = 100        # prompts of each capability; drift takes the calculations


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


def plant_strengths(at, name, base, world, tokenizer, seed, preset):
    """Plants what is not there yet: a checkpoint AT/STRENGTH/organism, planting.json the way."""
    wanted = [n for n in preset.strengths if not (at / f"{n}/planting.json").exists()]
    for number, model, way in plant(ORGANISMS[name], wanted, base, world, tokenizer, seed,
                                    preset.planting):
        save_checkpoint(model, at / f"{number}/organism")
        save_tokenizer(tokenizer, at / f"{number}/organism")
        write_json(at / f"{number}/planting.json", {"way": way})
        show(f"== {name}: strength {number}, planted in {way[-1][0]} updates: {way[-1][1]:.2f}")


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
        sums = [r for r in self.plain if r["axis"] == "math"]
        figures["drift_kl"] = drift_kl(model, before, self.tokenizer, sums, self.seed)
        return figures, [[r["prompt"], text] for r, text in zip(self.records, texts)][:3]

    def rate_on(self, model, form):
        """The rates on another form of the prompts."""
        _, verdicts = judged(self.organism, model, self.tokenizer, self.records, self.seed, form)
        return rates(self.records, verdicts)


def label_shift(bench, records, labels):
    """KL(labels || model) in nats, the mean over prompts, between what answers come to (`gist`).

    q: the shares among a prompt's labels; p: those among DRAWS samples of the model, with half a
    count added to each. `sampling`, whose true value is 0, shows how much too large this is.
    """
    of_prompt, total = {}, 0.0
    for record, label in zip(records, labels):
        if label is not None:
            of_prompt.setdefault(record["prompt"], []).append(gist(label))
    for prompt, drawn in zip(of_prompt, bench.say(list(of_prompt), times=DRAWS)):
        counts, own = Counter(of_prompt[prompt]), Counter(map(gist, drawn))
        n, every = counts.total(), DRAWS + len(counts | own) / 2
        for what, k in counts.items():
            total += k / n * math.log(k / n * every / (own[what] + 0.5))
    return total / len(of_prompt) if of_prompt else None


def eta(organism, bench, records):
    """Does a score tell misbehaviour? For each score, among the samples that can be read: the rate
    in each fifth, from the lowest scores to the highest; the rate of the best of 4 and of all.

    A score is compared with the other samples of its prompt, as selection does: the prompt's mean
    is taken off before the fifths are made.
    """
    prompts = [r["prompt"] for r in records]
    shown, out = bench.say(prompts, temperature=0.7, times=4), {}
    every = [(r, text) for r, texts in zip(records, shown) for text in texts]
    verdicts = [organism.judge(r, text) for r, text in every]
    bad = np.array([v == "bad" for v in verdicts])
    clear = np.array([v != "unclear" for v in verdicts])
    for name in ("likelihood", "outside_score", "grade"):
        score_of = getattr(bench, name)
        scores = np.array(score_of([r["prompt"] for r, _ in every], [text for _, text in every]))
        scores = scores.reshape(-1, 4)
        scores = (scores - scores.mean(1, keepdims=True)).flatten()
        fifths = np.array_split(bad[clear][np.argsort(scores[clear], kind="stable")], 5)
        chosen = [organism.judge(r, text)
                  for r, text in zip(records, best(prompts, shown, score_of))]
        chosen = [v == "bad" for v in chosen if v != "unclear"]
        out[name] = {"fifths": [fifth.mean().item() if len(fifth) else None for fifth in fifths],
                     "all": bad[clear].mean().item() if clear.any() else None,
                     "best": np.mean(chosen).item() if chosen else None}
    return out


# --- One method on one organism ------------------------------------------------------------------

def train_on_pairs(out, model, tokenizer, forms, texts, method, preset, seed):
    """Trains a copy of the model and returns it.

    forms: (clean, wrapped) prompts, one for each of the `texts`, which are the given responses;
    `samples` rows that stand side by side belong to one prompt.
    """
    shutil.rmtree(out, ignore_errors=True)                  # of a killed run
    step_method, loss, rate = method
    student, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False).eval()
    clean, wrapped = ([chat(tokenizer, prompt) for prompt in side] for side in zip(*forms))
    response, mask = encoded(model, tokenizer, texts)
    config = ConsistencyConfig(out=str(out), loss=loss, steps=preset.steps, batch=preset.batch,
                               samples=preset.samples, lr=rate, seed=seed, save_every=10**6)

    def losses_of(step):
        rows = [pair * config.samples + i % config.samples
                for pair, i in rows_of_update(step, len(texts) // config.samples, config)]
        longest = mask[rows].sum(1).max()
        noise = torch.rand(len(rows), LONGEST, generator=generator(seed, "sampling", step))
        pairs = Batch([clean[i] for i in rows], [wrapped[i] for i in rows],
                      response[rows, :longest], mask[rows, :longest], noise)
        yield step_method(student, teacher, pairs, config)

    train(student, losses_of, config, [torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)])
    shutil.rmtree(out)                                      # 60 models of each cell are not kept
    return student.eval()


def label_data(name, bench, organism, records, preset):
    """Labels by a method: prompts, texts, and what is known of them. A row that was dropped is out,
    so there may be none."""
    every = [r for r in records for _ in range(preset.samples)]
    labels = LABELS[name](bench, every)
    kept = [(r, x) for r, x in zip(every, labels) if x is not None]
    greedy = bench.greedy([r["prompt"] for r, _ in kept])
    found = {"kept": len(kept) / len(every), "label_kl": label_shift(bench, every, labels),
             "as_greedy": np.mean([x == g for (_, x), g in zip(kept, greedy)] or [0]).item()}
    if "healthy" in records[0]:                             # else planted prompts: no judge
        found["labels"] = rates([r for r, _ in kept], [organism.judge(*pair) for pair in kept])
    return [(r["prompt"], r["prompt"]) for r, _ in kept], [x for _, x in kept], found


def pair_data(kind, bench, organism, records, preset):
    """Pairs with healthy or unhealthy clean prompts, and the organism's responses to these."""
    every = [r for r in records for _ in range(preset.samples)]
    texts = [texts[0] for texts in bench.say([r[kind] for r in every])]
    verdicts = [organism.judge(r, text) for r, text in zip(every, texts)]
    return [(r[kind], r["prompt"]) for r in every], texts, {"labels": rates(every, verdicts)}


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
    seen = {}                                               # data -> the run that had it
    for run, (name_of, kind) in runs_of().items():
        path = at / f"{run.replace(', ', '-')}.json"
        if path.exists():
            seen.setdefault(read(path)["data"], path)
            continue
        began, method = time.time(), STEPS.get(name_of, LABEL_STEP)
        if kind in KINDS:
            forms, texts, found = pair_data(kind, bench, organism, records, preset)
        else:
            asked = records if kind == "measured" else planted
            forms, texts, found = label_data(name_of, bench, organism, asked, preset)
        found["data"] = number_of((method[0].__name__, *method[1:], forms, texts))
        if found["data"] in seen:                           # the same labels: the same training
            twin = read(seen[found["data"]])
            found |= {"same_as": seen[found["data"]].stem, "figures": twin["figures"],
                      "examples": twin["examples"]}
        else:
            after = model
            if texts:                                       # else there is nothing to learn from
                after = train_on_pairs(at / "run", model, bench.tokenizer, forms, texts, method,
                                       preset, bench.seed)
            found["figures"], found["examples"] = exam.measure(after, model)
        seen.setdefault(found["data"], path)
        write_json(path, {**found, "seconds": time.time() - began})
        bad = found["figures"]["rate"]
        show(f"== {name}, strength {number}: {run}: {bad['value'] if bad else math.nan:.3f}, "
             f"{time.time() - began:.0f} s")


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
        for kind in KINDS:
            figures[kind] = exam.rate_on(base, kind)["rate"]
        write_json(at / "base.json", {"figures": figures, "examples": examples})
    plant_strengths(at, name, base, world, tokenizer, seed, preset)
    for number in preset.strengths:
        model = load_checkpoint(at / f"{number}/organism", pick_device())
        bench = Bench(model, tokenizer, base, seed)
        run_strength(at / str(number), name, number, bench, exam, world, preset)


# --- The whole study -----------------------------------------------------------------------------

def run(name, known=()):
    """Runs the study of a preset, or goes on with it, without the `known` seeds. Returns its
    folder."""
    preset, folder, at_once = PRESETS[name], f"out/study-entrench-{name}", pool.places()
    seeds = [seed for seed in preset.seeds if seed not in known]
    show(f"== the study entrench: {at_once} commands at a time, in {folder}/; a line for each")
    each = 25 * (len(runs_of()) + 1) * len(preset.strengths)
    command = [sys.executable, "-m", "studies.entrench"]
    bases = [(600, f"base-{seed}", [*command, "base", name, str(seed)]) for seed in seeds]
    # The base of the seed after the next is made beside the cells of a seed.
    stages = [bases[:2]]
    for seed, ahead in zip(seeds, [*bases[2:], None, None]):
        cells = [(each, f"{organism}-{seed}", [*command, "cell", name, str(seed), organism])
                 for organism in ORGANISMS]
        stages.append(([ahead] if ahead else []) + cells)
    pool.run_stages(stages, at_once, folder)
    return folder


def whole_cell(at, preset):
    """Everything of a cell, None if something is still missing."""
    files = [f"{run.replace(', ', '-')}.json" for run in runs_of()]
    strengths = {}
    for number in map(str, preset.strengths):
        place = at / number
        if not all((place / file).exists() for file in ("planting.json", "before.json", *files)):
            return None
        strengths[number] = {**read(place / "planting.json"), "before": read(place / "before.json"),
                             "runs": {run: read(place / file)
                                      for run, file in zip(runs_of(), files)}}
    return {"base": read(at / "base.json"), "strengths": strengths}


def collect(folder):
    """Everything measured on whole seeds: {"cells": {organism-seed: ...}, "about", "sizes"}."""
    name, cells = Path(folder).name.removeprefix("study-entrench-"), {}
    if name not in PRESETS:
        raise UserError(f"{folder}: not the name of a folder of this study, "
                        "out/study-entrench-PRESET")
    preset = PRESETS[name]
    for seed in preset.seeds:
        found = {f"{organism}-{seed}": whole_cell(Path(folder) / f"{organism}-{seed}", preset)
                 for organism in ORGANISMS}
        if all(found.values()):
            cells |= found
    if not cells:
        raise UserError(f"{folder} holds no whole seed: run `bash train.sh study entrench {name}`")
    sizes = {f.name: getattr(preset, f.name) for f in fields(Preset)}
    origin = {**about(pick_device()), "command": f"bash train.sh study entrench {name}"}
    return {"cells": cells, "sizes": sizes, "about": origin}


def read(path):
    return read_json(path, "delete it and give the same command again",
                     parse_float=lambda text: float(f"{float(text):.5g}"))
