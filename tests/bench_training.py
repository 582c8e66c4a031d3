"""
Where the time of an update goes, and how near pretraining comes to the machine's matrix rate.

    python tests/bench_training.py [--base out/quick/base] [--device cuda]

Splits one OPCT update and one SFT update into their parts, each the best of `--rounds`, and prints the share of the packed
rows that is padding. With the checkpoint of the quick preset the responses are real ones; without it a model
that knows nothing writes 24 tokens each.
"""
import argparse
import random
import shlex
import sys
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_sampler import machine_rates, timed
from data import World, chat, pack, pretraining_batch, world_tokenizer
from model import GPT, GPTConfig, generate, load_checkpoint, pick_device
from opct import ROW, next_tokens, packed_hidden, response_logp, reverse_kl


def matrix_flops(config, tokens):
    """Floating-point operations of the matrices in a forward and a backward pass, attention left out: 6 per weight and token."""
    c = config
    layer = c.hidden_size * (c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) + 3 * c.intermediate_size)
    return 6 * tokens * (c.num_hidden_layers * layer + c.hidden_size * c.vocab_size)


def update_parts(student, teacher, clean, wrapped, limit):
    """name -> function of the parts of one update; each leaves what the next one needs."""
    state = {}
    def offline():
        state["response"], state["mask"] = generate(teacher, clean, limit, generator=torch.Generator().manual_seed(0))
    def sample():
        state["response"], state["mask"] = generate(student, wrapped, limit, generator=torch.Generator().manual_seed(0))
    def teacher_scores():
        with torch.no_grad():
            state["q"] = response_logp(teacher, clean, state["response"], state["mask"])
    def student_forward():
        state["p"] = response_logp(student, wrapped, state["response"], state["mask"])
        state["loss"] = reverse_kl(state["p"], state["q"]).sum() / len(wrapped)
    def backward():
        state["loss"].backward()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    def step():
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return state, offline, {"sampling": sample, "teacher": teacher_scores, "student forward": student_forward, "backward": backward, "optimizer": step}


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
    print(f"`python {shlex.join(sys.argv)}`, {date.today()}, torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'}: "
          f"{rates[0] / 1e9:,.0f} GFLOP/s float32\n")

    records = world.records("train")
    random.Random(0).shuffle(records)
    clean, wrapped = ([chat(tokenizer, r[form]) for r in records[:args.batch] for _ in range(args.samples)] for form in ("clean", "wrapped"))
    state, offline, parts = update_parts(student, teacher, clean, wrapped, limit)
    best = {}
    for method in ("opct", "sft"):
        offline()                                           # what SFT trains on, sampled before training and not timed
        for _ in range(args.rounds):
            for name, part in parts.items():
                if method == "sft" and name == "sampling":
                    continue
                seconds = timed(part, device)
                best[method, name] = min(best.get((method, name), seconds), seconds)
        tokens = state["mask"].sum().item()
        total = sum(v for (m, _), v in best.items() if m == method)
        sequences = [p + [0] * n for p, n in zip(wrapped, state["mask"].sum(1).tolist())]
        segments = pack(sequences, max(ROW, max(map(len, sequences))))[2]
        print(f"{method}: {args.batch} pairs x {args.samples} responses, {tokens} response tokens, {total * 1e3:.0f} ms "
              f"({tokens / total:,.0f} response tokens/s; padding {100 * (segments < 0).mean():.1f} % of the packed rows, "
              f"{100 * (~state['mask']).float().mean():.0f} % of the responses as a rectangle, which is never scored)")
        for (m, name), seconds in best.items():
            if m == method:
                print(f"    {name:16} {seconds * 1e3:7.1f} ms  {100 * seconds / total:3.0f} %")

    tokens, positions, segments, _ = pretraining_batch(world, tokenizer, random.Random(0), 24, ROW)
    target = next_tokens(tokens, segments).flatten().to(device)
    def pretrain_step():
        F.cross_entropy(student.lm_head(packed_hidden(student, tokens, positions, segments)), target, ignore_index=-1).backward()
        student.zero_grad()
    seconds = min(timed(pretrain_step, device) for _ in range(args.rounds + 1))
    used = (segments >= 0).sum()
    print(f"\npretraining, forward and backward: {used / seconds:,.0f} tokens/s, padding {100 * (segments < 0).mean():.1f} %; the matrices alone "
          f"do {matrix_flops(student.config, used) / seconds / 1e9:.0f} GFLOP/s, {matrix_flops(student.config, used) / seconds / rates[0]:.2f} of the matrix rate")


if __name__ == "__main__":
    main()
