"""Where the time of an update goes, and how near pretraining comes to the machine's matrix rate.

One opct-exact and one sft-exact update are split into their parts, each the best of some rounds.
With a checkpoint of train.sh the responses are real ones. Without it a model that knows
nothing writes responses of a fixed length.

Given that checkpoint, and where `trl` is installed, whole opct-exact updates also run in
alternation with those of TRL's DistillationTrainer, in one process: the same weights, prompts,
float32, reverse KL over the whole distribution, temperature 1, clipping and AdamW. The rate is
zero, so that the responses stay those of the same model. TRL shows teacher and student one prompt.
For this timing ours does so too, the wrapped one.
"""
import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from data import World, load_world, world_tokenizer
from model import GPT, GPTConfig, generate, load_checkpoint
from opct import (ConsistencyConfig, Batch, PretrainConfig, forward_kl, opct_step, pretrain,
                  reverse_kl, score, student_and_teacher)
from studies.speed.sampler import best, machine_rates, matrix_weights, timed
from support.common import UserError, generator, rng, write_text
from support.lora import LORA_SCALE
from support.packing import pack_documents, pack_responses
from support.tokenizer import chat, save_tokenizer

FIXED_LENGTH = 24           # of the responses of a model that knows nothing


# --- The parts of an update ------------------------------------------------------------------

class Update:
    """One update in parts. Each part leaves what the next one needs."""

    def __init__(self, arm, student, teacher, clean, wrapped, limit):
        self.student, self.teacher, self.limit = student, teacher, limit
        self.clean, self.wrapped = clean, wrapped
        self.kl = reverse_kl if arm == "opct-exact" else forward_kl
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
        self.parts = {"scoring": self.score, "backward": self.backward,
                      "optimizer": self.optimize}
        if arm == "opct-exact":
            self.parts = {"sampling": self.sample, **self.parts}
        else:                                               # sampled once, before training
            self.sample_offline()

    def sample_offline(self):
        self.response, self.mask = generate(self.teacher, self.clean, self.limit,
                                            generator=generator("sampling"))

    def sample(self):
        self.response, self.mask = generate(self.student, self.wrapped, self.limit,
                                            generator=generator("sampling"))

    def score(self):
        _, _, kl = score(self.student, self.teacher, Batch(self.clean, self.wrapped),
                         self.response, self.mask, self.kl)
        self.loss = kl.sum() / len(self.wrapped)

    def backward(self):
        self.loss.backward()

    def optimize(self):
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def time_update(arm, student, teacher, clean, wrapped, limit, rounds):
    """Seconds of each part, and how much of what is computed is padding."""
    update = Update(arm, student, teacher, clean, wrapped, limit)
    seconds = dict.fromkeys(update.parts, float("inf"))
    for _ in range(rounds):
        for name, part in update.parts.items():
            seconds[name] = min(seconds[name], timed(part, student.device))
    lengths = update.mask.sum(1).tolist()
    packed, _ = pack_responses(wrapped, [[0] * n for n in lengths])
    return {"arm": arm, "responses": len(wrapped), "tokens": sum(lengths), "seconds": seconds,
            "padding": (packed.segments < 0).mean().item(),
            "padding_of_a_rectangle": (~update.mask).float().mean().item()}


def prompts_of(world, tokenizer, preset):
    """The clean and the wrapped prompts of one update, each as often as it gets responses."""
    records = world.records("train")
    rng("records").shuffle(records)
    clean, wrapped = [], []
    for record in records[:preset.pairs]:
        clean += [chat(tokenizer, record["clean"])] * preset.samples
        wrapped += [chat(tokenizer, record["wrapped"])] * preset.samples
    return clean, wrapped


# --- Pretraining and torch.compile -----------------------------------------------------------

def whole_step(world, tokenizer, preset, device):
    """Tokens a second of the best step of the real loop, from its own log: documents, forward,
    backward and optimizers."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet:
        write_text(f"{folder}/world.json", json.dumps(asdict(world.config)))
        save_tokenizer(tokenizer, folder)
        width, layers = preset.shape["hidden_size"], preset.shape["num_hidden_layers"]
        pretrain(PretrainConfig(world=folder, out=f"{folder}/base", steps=preset.pretrain_steps,
                                rows=preset.rows, width=width, layers=layers, device=device.type))
        lines = Path(f"{folder}/base/log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    return max(line["tokens"] / line["seconds"] for line in log)


def compile_model(model, step, plain, steps, device):
    """What torch.compile costs once and saves in each step, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
            try:
                model.model.compile()
                first = timed(step, device)
                compiled = best(step, device, steps)
            except RuntimeError as error:                   # such as: no C++ compiler
                return {"error": str(error).splitlines()[0][:200]}
    return {"first_seconds": first, "saved_seconds": plain - compiled}


def time_pretraining(world, tokenizer, preset, rates, device):
    """Tokens a second of a step, and the share of the matrix rate that its matrices reach."""
    config = GPTConfig(vocab_size=tokenizer.n_vocab, **preset.shape)
    model = GPT(config).to(device)
    packed = pack_documents(world, tokenizer, rng("documents"), preset.rows)
    target = packed.next_tokens().flatten().to(device)

    def step():
        logits = model(*packed.inputs(device)).flatten(0, 1)
        F.cross_entropy(logits, target, ignore_index=-1).backward()
        model.zero_grad()

    steps = preset.pretrain_steps
    seconds = best(step, device, steps)
    padding = packed.segments < 0
    speeds = {"forward and backward": (~padding).sum().item() / seconds,
              "whole step": whole_step(world, tokenizer, preset, device)}
    flops = 6 * sum(matrix_weights(config))     # a token, forward and backward, attention left out
    rows = []
    for part, speed in speeds.items():
        rows.append({"part": part, "tokens_per_second": speed, "flops": speed * flops,
                     "share": speed * flops / rates["flops"]})
    found = {"missing": "the preset leaves it out"}
    if preset.compiles:
        print("torch.compile", flush=True)
        found = compile_model(model, step, seconds, steps, device)
    return {"padding": padding.mean().item(), "rows": rows, "compile": found,
            "steps": PretrainConfig.steps}


# --- TRL -------------------------------------------------------------------------------------

def our_update(config, prompts, device):
    """A function that makes one opct-exact update of the base, at a rate of zero."""
    student, teacher = student_and_teacher(config, device)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    student.train()

    def update():
        noise = torch.rand(len(prompts), config.max_new_tokens)
        loss, _ = opct_step(student, teacher, Batch(prompts, prompts, noise=noise), config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        optimizer.zero_grad()

    return update


def number_tokenizer(config):
    """TRL wants text: token ids are written out as words, and this reads them again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {str(i): i for i in range(config.vocab_size)}
    numbers = Tokenizer(models.WordLevel(words, unk_token=str(config.pad_token_id)))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=numbers, eos_token=str(config.eos_token_id),
                                   pad_token=str(config.pad_token_id))


def their_trainer(config, prompts, updates, callbacks, device, folder):
    """TRL's trainer of the same update."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DistillationConfig, DistillationTrainer
    args = DistillationConfig(
        folder, beta=1.0, temperature=1.0, max_completion_length=config.max_new_tokens,
        learning_rate=0.0, per_device_train_batch_size=len(prompts), max_steps=updates,
        gradient_accumulation_steps=1, gradient_checkpointing=False, bf16=False,
        max_grad_norm=config.clip, use_cpu=device.type == "cpu", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    student = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    adapter = None
    if config.lora:
        from peft import LoraConfig
        adapter = LoraConfig(r=config.lora, lora_alpha=LORA_SCALE * config.lora,
                             target_modules="all-linear", task_type="CAUSAL_LM")
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    return DistillationTrainer(
        student, teacher, processing_class=number_tokenizer(student.config), args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=callbacks,
        peft_config=adapter)


def train_theirs(config, prompts, updates, device, callbacks=None):
    """So many of TRL's updates, without a word."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.ExitStack() as quiet:
            folder = quiet.enter_context(tempfile.TemporaryDirectory())
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            their_trainer(config, prompts, updates, callbacks, device, folder).train()
    finally:
        logging.disable(logging.NOTSET)


def against_trl(config, prompts, updates, device):
    """Seconds of our updates and of theirs in alternation, a list of each."""
    from transformers import TrainerCallback
    update, ours, theirs = our_update(config, prompts, device), [], []

    class Alternate(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            ours.append(timed(update, device))
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            theirs.append(time.perf_counter() - self.start)

    train_theirs(config, prompts, updates + 1, device, [Alternate()])
    return ours[1:], theirs[1:]                             # the first of each warms up


def compare_with_trl(config, prompts, updates, device):
    """The comparison, or why there is none."""
    if importlib.util.find_spec("trl") is None:
        return {"missing": "`trl` was not installed"}
    print("updates beside TRL's", flush=True)
    try:
        ours, theirs = against_trl(config, prompts, updates, device)
    except (ImportError, TypeError, AttributeError) as error:   # its interface still changes
        reason = str(error).splitlines()[0][:200]
        return {"missing": f"`trl` did not run, {type(error).__name__}: {reason}"}
    import trl
    return {"ours": ours, "theirs": theirs, "version": trl.__version__}


# --- All of it -------------------------------------------------------------------------------

def models(base, tokenizer, preset, device):
    """Student, teacher and the longest response: the checkpoint `base`, or a model untrained."""
    if not base:
        torch.manual_seed(0)
        config = GPTConfig(vocab_size=tokenizer.n_vocab, eos_token_id=-1, pad_token_id=0,
                           **preset.shape)
        student, limit = GPT(config).to(device), min(FIXED_LENGTH, preset.longest)
    else:
        student, limit = load_checkpoint(base, device), preset.longest
    if student.config.vocab_size != tokenizer.n_vocab:
        raise UserError(f"{base} does not belong to the world beside it: run `bash train.sh` "
                        "again, or move that folder away")
    return student, copy.deepcopy(student).eval(), limit


def measure(preset, device, base):
    """Everything on training, as numbers. base: a checkpoint, its world beside it, or None."""
    world = load_world(base.parent / "world") if base else World()
    tokenizer = world_tokenizer(world)
    student, teacher, limit = models(base, tokenizer, preset, device)
    rates, updates = machine_rates(device), []
    clean, wrapped = prompts_of(world, tokenizer, preset)
    for arm in ("opct-exact", "sft-exact"):
        print(f"an update: {arm}", flush=True)
        updates.append(time_update(arm, student, teacher, clean, wrapped, limit, preset.rounds))
    print("pretraining", flush=True)
    pretraining = time_pretraining(world, tokenizer, preset, rates, device)
    trl = {"missing": "there was no base"}
    if base:
        trl = compare_with_trl(ConsistencyConfig(base=str(base)), wrapped, preset.trl_updates,
                               device)
    return {"rates": rates, "base": bool(base), "pairs": preset.pairs, "samples": preset.samples,
            "limit": limit, "updates": updates, "pretraining": pretraining, "trl": trl}
