"""
Where the time of an update goes, and how near pretraining comes to the machine's matrix rate.

    python studies/speed/bench_training.py [--base out/quick/base] [--device cuda]

Splits one OPCT update and one exact SFT update into their parts, each the best of `--rounds`, and prints the share of the packed
rows that is padding. With the checkpoint of the quick preset the responses are real ones; without it a model
that knows nothing writes 24 tokens each.

Given that checkpoint, and where `trl` is installed, one OPCT update also runs against one of TRL's DistillationTrainer, in
alternation in one process: the same weights, prompts, float32, reverse KL over the whole distribution, temperature 1, clipping
and AdamW, at a rate of zero, so that the lengths of the responses stay those of the same model. TRL shows teacher and student
one prompt; for this timing ours does so too, the wrapped one.
"""
import argparse
import contextlib
import io
import json
import logging
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench_sampler import headline, machine_rates, matrix_weights, timed
from data import World, world_tokenizer
from model import GPT, GPTConfig, generate, load_checkpoint
from opct import (ConsistencyConfig, Pairs, PretrainConfig, hidden_states, opct_step, pretrain,
                  pretraining_batch, reverse_kl, score)
from support.packing import ROW, pack
from support.common import pick_device, write_text
from support.tokenizer import chat, save_tokenizer


def update_parts(student, teacher, clean, wrapped, limit):
    """name -> function of the parts of one update; each leaves what the next one needs."""
    state = {}
    def offline():
        state["response"], state["mask"] = generate(teacher, clean, limit, generator=torch.Generator().manual_seed(0))
    def sample():
        state["response"], state["mask"] = generate(student, wrapped, limit, generator=torch.Generator().manual_seed(0))
    def teacher_scores():
        with torch.no_grad():
            state["q"] = score(teacher, clean, state["response"], state["mask"])
    def student_forward():
        state["p"] = score(student, wrapped, state["response"], state["mask"])
        state["loss"] = reverse_kl(state["p"], state["q"]).sum() / len(wrapped)
    def backward():
        state["loss"].backward()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    def step():
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return state, offline, {"sampling": sample, "teacher": teacher_scores, "student forward": student_forward, "backward": backward,
                            "optimizer": step}


def whole_step(world, tokenizer, device):
    """Tokens a second of the best step of the real loop, from its own log: documents, forward, backward and optimizers."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write_text(f"{folder}/world.json", json.dumps(asdict(world.config)))
        save_tokenizer(tokenizer, folder)
        pretrain(PretrainConfig(world=folder, out=f"{folder}/base", steps=20, device=device.type))
        log = [json.loads(line) for line in Path(f"{folder}/base/log.jsonl").read_text().splitlines()]
    return max(line["tokens"] / line["seconds"] for line in log)


def against_trl(base, prompts, rounds, device):
    """Our update and TRL's in alternation: (seconds of ours, seconds of theirs), a list of each."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    logging.disable(logging.WARNING)

    student, teacher, config = load_checkpoint(base, device), load_checkpoint(base, device), ConsistencyConfig()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    student.train()
    def update():
        pairs = Pairs(prompts, prompts, noise=torch.rand(len(prompts), config.max_new_tokens))
        opct_step(student, teacher, pairs, config)[0].backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()

    ours, theirs = [], []
    class Alternate(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            ours.append(timed(update, device))
            self.start = time.perf_counter()
        def on_step_end(self, *args, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            theirs.append(time.perf_counter() - self.start)

    # It wants text: the token ids, written out as words.
    ids = Tokenizer(models.WordLevel({str(i): i for i in range(student.config.vocab_size)}, unk_token=str(student.config.pad_token_id)))
    ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=ids, eos_token=str(student.config.eos_token_id), pad_token=str(student.config.pad_token_id))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        DistillationTrainer(
            AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base), processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, p)) for p in prompts]}), callbacks=[Alternate()],
            args=DistillationConfig(folder, beta=1.0, temperature=1.0, max_completion_length=config.max_new_tokens, learning_rate=0.0,
                                    per_device_train_batch_size=len(prompts), gradient_accumulation_steps=1, max_steps=rounds + 1,
                                    gradient_checkpointing=False, bf16=False, max_grad_norm=config.clip, use_cpu=device.type == "cpu",
                                    report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)).train()
    return ours[1:], theirs[1:]                             # the first of each warms up


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    args = parser.parse_args()
    device, world = pick_device(args.device), World()
    tokenizer = world_tokenizer(world)
    if args.base:
        student, limit = load_checkpoint(args.base, device), 64
        if student.config.vocab_size != tokenizer.n_vocab:
            sys.exit("error: this benchmark wants a checkpoint of the default world, as the quick preset makes it")
    else:
        torch.manual_seed(0)
        student, limit = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, eos_token_id=-1, pad_token_id=0)).to(device), 24
    teacher = load_checkpoint(args.base, device) if args.base else student
    rates = machine_rates(device)
    print(f"{headline(device, rates)}\n")

    records = world.records("train")
    random.Random(0).shuffle(records)
    clean, wrapped = ([chat(tokenizer, r[form]) for r in records[:args.batch] for _ in range(args.samples)] for form in ("clean", "wrapped"))
    state, offline, parts = update_parts(student, teacher, clean, wrapped, limit)
    best = {}
    for method in ("opct-exact", "sft-exact"):                     # plain SFT needs the teacher's part for its log only
        offline()                                           # what SFT trains on, sampled before training and not timed
        for _ in range(args.rounds):
            for name, part in parts.items():
                if method == "sft-exact" and name == "sampling":
                    continue
                seconds = timed(part, device)
                best[method, name] = min(best.get((method, name), seconds), seconds)
        tokens = state["mask"].sum().item()
        total = sum(v for (m, _), v in best.items() if m == method)
        sharing = {}
        for prompt, n in zip(wrapped, state["mask"].sum(1).tolist()):
            sharing.setdefault(tuple(prompt), []).append([0] * n)
        longest = max(len(prompt) + sum(map(len, rows)) for prompt, rows in sharing.items())
        segments = pack(list(sharing.items()), max(ROW, longest)).segments
        print(f"{method}: {args.batch} pairs x {args.samples} responses, {tokens} response tokens, {total * 1e3:.0f} ms "
              f"({tokens / total:,.0f} response tokens/s; padding {100 * (segments < 0).mean():.1f} % of the packed rows, "
              f"{100 * (~state['mask']).float().mean():.0f} % of the responses as a rectangle, which is never scored)")
        for (m, name), seconds in best.items():
            if m == method:
                print(f"    {name:16} {seconds * 1e3:7.1f} ms  {100 * seconds / total:3.0f} %")
    print()

    packed = pretraining_batch(world, tokenizer, random.Random(0), 24)
    segments, target = packed.segments, packed.next_tokens().flatten().to(device)
    def pretrain_step():
        F.cross_entropy(student.lm_head(hidden_states(student, packed)), target, ignore_index=-1).backward()
        student.zero_grad()
    seconds = min(timed(pretrain_step, device) for _ in range(20))                      # as many as `whole_step` takes
    quick = GPTConfig(vocab_size=tokenizer.n_vocab)
    for what, config, speed in (
            (f"forward and backward (padding {100 * (segments < 0).mean():.1f} %)", student.config, (segments >= 0).sum() / seconds),
            ("the complete step of the quick preset", quick, whole_step(world, tokenizer, device))):
        flops = 6 * sum(matrix_weights(config))             # a token, forward and backward, attention left out
        print(f"pretraining, {what}: {speed:,.0f} tokens/s; the matrices alone do {speed * flops / 1e9:.0f} GFLOP/s, "
              f"{speed * flops / rates[0]:.2f} of the matrix rate")
    with tempfile.TemporaryDirectory() as cache:            # nothing that an earlier run has compiled
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            student.model.compile()
            first = timed(pretrain_step, device)
            saved = seconds - min(timed(pretrain_step, device) for _ in range(20))
            print(f"torch.compile, not used: takes {first:.0f} s, saves {saved * 1e3:.0f} ms a step: "
                  f"{saved * PretrainConfig.steps:.0f} s in the {PretrainConfig.steps:,} steps of the quick preset")
        except RuntimeError as error:
            print(f"torch.compile, not used: does not run here ({str(error).splitlines()[0]})")

    if args.base:
        try:
            # Each update samples anew, longer responses or shorter ones: a sum over many says more than the best of a few.
            ours, theirs = against_trl(args.base, wrapped, 5 * args.rounds, device)
            ratios = sorted(b / a for a, b in zip(ours, theirs))
            print(f"\nan update of {len(wrapped)} responses, mean of {len(ours)}: ours {sum(ours) / len(ours) * 1e3:.0f} ms, "
                  f"TRL's DistillationTrainer {sum(theirs) / len(theirs) * 1e3:.0f} ms: ours is {sum(theirs) / sum(ours):.1f} times "
                  f"as fast ({ratios[0]:.1f} to {ratios[-1]:.1f} in single updates)")
        except (ImportError, TypeError, AttributeError) as error:
            print(f"\nno comparison with TRL: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
