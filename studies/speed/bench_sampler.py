"""
How fast the sampler is, beside a naive one and Hugging Face's `generate`, and how far from what the machine allows.

    python studies/speed/bench_sampler.py [--batches 1 64 512 4096] [--new 32] [--device cuda]

All three get the same weights, the same prompts of mixed length and the same number of new tokens (ends are ignored), in
alternation, and each cell is the best of `--rounds` runs, since other work on the machine only ever adds time. The floor of
a step is the larger of two times: the arithmetic over the matrix rate, and the bytes that must move (weights and cache, once)
over the copy rate, both rates measured in the same run. Then how time and memory grow with the batch and with the new tokens;
and the same with responses that end, whose rows are to cost nothing once they are done.
"""
import argparse
import random
import resource
import shlex
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import GPT, GPTConfig, KVCache, generate, save_checkpoint
from support.common import pick_device

try:
    import transformers
    transformers.utils.logging.set_verbosity_error()
except ImportError:
    transformers = None


def headline(device, rates):
    """What was run, when and on what; the rates that ratios are to."""
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return (f"`python {shlex.join(sys.argv)}`, {date.today()}, torch {torch.__version__}, {machine}: "
            f"{rates[0] / 1e9:,.0f} GFLOP/s float32, {rates[1] / 1e9:,.1f} GB/s")


def timed(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def naive(model, prompts, new):
    """The whole row again for every token, one length at a time: what one would write first."""
    for length in {len(p) for p in prompts}:
        idx = torch.tensor([p for p in prompts if len(p) == length], device=model.device)
        for _ in range(new):
            idx = torch.cat((idx, torch.multinomial(model(idx)[:, -1].softmax(-1), 1)), 1)


def machine_rates(device):
    """(floating-point operations a second of a float32 matrix product, bytes a second of a copy, read and written)"""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device)
    big = torch.randn(2 ** 28 if device.type == "cuda" else 2 ** 25, device=device)
    out = torch.empty_like(big)
    matrix = min(timed(lambda: torch.mm(a, b), device) for _ in range(8))
    copy = min(timed(lambda: out.copy_(big), device) for _ in range(8))
    return 2 * n ** 3 / matrix, 2 * big.numel() * 4 / copy


def matrix_weights(config):
    """How many weights the matrices of the layers have, and how many the output layer has."""
    c = config
    heads = c.num_attention_heads + c.num_key_value_heads   # queries and output; keys and values
    return c.num_hidden_layers * c.hidden_size * (2 * c.head_dim * heads + 3 * c.intermediate_size), c.hidden_size * c.vocab_size


def floor_seconds(config, batch, prompt, new, rates):
    """The least time that `new` decode steps and the prefill can take."""
    c = config
    weights, head = matrix_weights(c)
    cache_bytes = 4 * batch * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    total = 2 * batch * prompt * weights / rates[0]         # prefill: arithmetic
    for t in range(new):
        attention = 4 * batch * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (prompt + t)
        arithmetic = (2 * batch * (weights + head) + attention) / rates[0]
        total += max(arithmetic, (4 * (weights + head) + cache_bytes * (prompt + t)) / rates[1])
    return total


def random_prompts(rng, batch):
    return [[rng.randrange(1, 850) for _ in range(rng.randint(8, 40))] for _ in range(batch)]


def growth_row(model, rng, batch, new, rounds):
    """One row of the tables of growth. The cache's size is what its tensors take, since the peak of a process never falls."""
    device, prompts = model.device, random_prompts(rng, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = min(timed(lambda: generate(model, prompts, new), device) for _ in range(rounds))
    cache = KVCache(model.config, batch, max(map(len, prompts)) + new, like=model.lm_head.weight)
    peak = f"{torch.cuda.max_memory_allocated() / 1e6:,.0f}" if device.type == "cuda" else "-"
    return (f"| {batch} | {new} | {seconds:.2f} | {seconds / (batch * new) * 1e6:.1f} | "
            f"{sum(kv.nbytes for kv in cache.layers) / 1e6:,.0f} | {peak} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 512, 4096])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    args = parser.parse_args()
    device, rng = pick_device(args.device), random.Random(0)
    torch.manual_seed(0)
    # The shape of the quick preset. The end token is out of the vocabulary, so that every row writes all tokens.
    config = GPTConfig(vocab_size=850, eos_token_id=-1, pad_token_id=0)
    model = GPT(config).to(device).eval()
    theirs = None
    if transformers:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(model, folder)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    rates = machine_rates(device)
    print(f"{headline(device, rates)}; {args.new} new tokens, prompts of 8 to 40\n")
    print("| batch | ours, tokens/s | naive, tokens/s | transformers, tokens/s | ours / naive | ours / transformers | floor / ours "
          "| peak MB of the process |\n|---|---|---|---|---|---|---|---|")
    for batch in args.batches:
        prompts = random_prompts(rng, batch)
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        attend = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        ways = {"ours": lambda: generate(model, prompts, args.new)}
        if batch <= 512:
            ways["naive"] = lambda: naive(model, prompts, args.new)
        if theirs:
            ways["transformers"] = lambda: theirs.generate(
                padded, attention_mask=attend, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, pad_token_id=0, eos_token_id=None)
        best = {name: float("inf") for name in ways}
        for _ in range(args.rounds if batch <= 512 else 1):  # a large batch is its own average
            for name, way in ways.items():                  # in alternation, so that a slow minute hits all alike
                best[name] = min(best[name], timed(way, device))
        tokens = batch * args.new
        speed = {name: tokens / seconds for name, seconds in best.items()}
        floor = floor_seconds(config, batch, sum(map(len, prompts)) / batch, args.new, rates)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        cell = lambda name: f"{speed[name]:,.0f}" if name in speed else "-"
        ratio = lambda name: f"{speed['ours'] / speed[name]:.1f}" if name in speed else "-"
        print(f"| {batch} | {cell('ours')} | {cell('naive')} | {cell('transformers')} | {ratio('naive')} | {ratio('transformers')} | "
              f"{floor / best['ours']:.2f} | {peak / 1e6:,.0f} |", flush=True)

    print("\n| batch | new tokens | seconds | microseconds a token | MB of the cache | peak MB of the device |\n|---|---|---|---|---|---|")
    for batch, new in [(batch, args.new) for batch in (512, 1024, 2048, 4096)] + [(512, new) for new in (64, 128, 192)]:
        print(growth_row(model, rng, batch, new, 2), flush=True)

    print("\nResponses that end: batch 512, an end token with probability 1/8 at each step, at most 96 tokens.")
    ending = GPT(GPTConfig(vocab_size=8, eos_token_id=7, pad_token_id=0)).to(device).eval()
    with torch.no_grad():
        ending.lm_head.weight.zero_()                       # uniform over 8 tokens, one of which ends
    prompts = [[1, 2, 3]] * 512
    used = generate(ending, prompts, 96, generator=torch.Generator().manual_seed(0))[1].sum().item()
    full, short = float("inf"), float("inf")
    for _ in range(args.rounds):
        ending.config.eos_token_id = -1
        full = min(full, timed(lambda: generate(ending, prompts, 96), device))
        ending.config.eos_token_id = 7
        short = min(short, timed(lambda: generate(ending, prompts, 96, generator=torch.Generator().manual_seed(0)), device))
    print(f"share of the tokens that are needed {used / (512 * 96):.2f}, share of the time that it takes {short / full:.2f}")


if __name__ == "__main__":
    main()
