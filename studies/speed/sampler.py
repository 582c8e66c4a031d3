"""How fast the sampler is, beside a naive one and Hugging Face's `generate`, and how near it
comes to what the machine allows.

All get the same weights, the same prompts of mixed length and the same number of new tokens; ends
are ignored. They run in alternation, and each keeps its best round, since other work on the machine
only adds time.

The floor of a step is the larger of two times: its arithmetic over the matrix rate, and the bytes
that must move (weights and cache, once) over the copy rate. Both rates are measured in the same
run.
"""
import re
import tempfile
import time
from os.path import commonprefix
from pathlib import Path

import torch

from model import GPT, GPTConfig, KVCache, generate, save_checkpoint
from support.common import generator, rng

try:
    import transformers
    transformers.utils.logging.set_verbosity_error()
except ImportError:
    transformers = None

VOCABULARY = 850                                            # about that of the default world
SHORTEST, LONGEST = 8, 40                                   # tokens of a prompt
ENDING_BATCH, ENDING_TOKENS, ENDING_WORDS = 512, 96, 8      # responses that end


def timed(function, device):
    """Seconds that a call takes, on a GPU with the work that it has started."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best(function, device, rounds):
    return min(timed(function, device) for _ in range(rounds))


def machine_rates(device):
    """What the machine can do: float32 operations of a matrix product and bytes of a copy, both
    a second. A copied byte counts twice, read and written."""
    gpu = device.type == "cuda"
    n = 8192 if gpu else 1536
    a, b = torch.randn(2, n, n, device=device)
    big = torch.randn(2 ** 28 if gpu else 2 ** 25, device=device)
    out = torch.empty_like(big)
    matrix = best(lambda: torch.mm(a, b), device, 8)
    copy = best(lambda: out.copy_(big), device, 8)
    return {"flops": 2 * n ** 3 / matrix, "bytes": 2 * big.nbytes / copy}


def matrix_weights(config):
    """How many weights the matrices of the layers have, and how many the output layer has."""
    heads = config.num_attention_heads + config.num_key_value_heads     # q and o; k and v
    attention = 2 * config.hidden_size * config.head_dim * heads
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp), config.hidden_size * config.vocab_size


def floor_seconds(config, batch, prompt, new, rates, shared=0):
    """The least time that the prefill of `prompt` tokens a row and `new` decode steps can take.

    Multiplying by a weight is two operations, and so is an addition to an attention score or to an
    attention output. A float32 has 4 bytes. `shared` tokens, with which all prompts begin, are
    computed once.
    """
    layers, head = matrix_weights(config)
    queries = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    cached = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    total = 2 * (batch * (prompt - shared) + shared) * layers / rates["flops"]
    for step in range(new):
        length = prompt + step
        operations = batch * (2 * (layers + head) + 4 * queries * length)
        moved = 4 * (layers + head + batch * cached * length)
        total += max(operations / rates["flops"], moved / rates["bytes"])
    return total


@torch.no_grad()
def naive(model, prompts, new):
    """The whole row again for every token, one length at a time: what one would write first."""
    for length in {len(p) for p in prompts}:
        idx = torch.tensor([p for p in prompts if len(p) == length], device=model.device)
        for _ in range(new):
            probabilities = model(idx)[:, -1].softmax(-1)
            idx = torch.cat((idx, torch.multinomial(probabilities, 1)), 1)


def hugging_face(model):
    """The same weights as a model of transformers; None if that is not installed."""
    if transformers is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return theirs.to(model.device).eval()


def generate_theirs(theirs, prompts, new):
    """A function that samples as ours does: temperature 1, nothing cut off, no end."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(p)) + p for p in prompts]
    attend = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    padded = torch.tensor(padded, device=theirs.device)
    attend = torch.tensor(attend, device=theirs.device)

    def call():
        theirs.generate(padded, attention_mask=attend, max_new_tokens=new, min_new_tokens=new,
                        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
                        eos_token_id=None)

    return call


def random_prompts(batch):
    random = rng("prompts", batch)
    lengths = [random.randint(SHORTEST, LONGEST) for _ in range(batch)]
    return [[random.randrange(1, VOCABULARY) for _ in range(n)] for n in lengths]


def peak_bytes(device):
    """The most memory so far: of the process, on a GPU of the device. Not `getrusage`, which counts
    that of the parent at the start, too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def comparison_row(model, theirs, prompts, new, rounds, rates, with_naive):
    """Tokens a second of each sampler on the same prompts, and ours as a share of the floor."""
    device, batch = model.device, len(prompts)
    ways = {"ours": lambda: generate(model, prompts, new)}
    if with_naive:
        ways["naive"] = lambda: naive(model, prompts, new)
    if theirs is not None:
        ways["transformers"] = generate_theirs(theirs, prompts, new)
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():                      # in alternation: a slow minute hits all
            seconds[name] = min(seconds[name], timed(way, device))
    prompt, shared = sum(map(len, prompts)) / batch, len(commonprefix(prompts))
    floor = floor_seconds(model.config, batch, prompt, new, rates, shared if batch > 1 else 0)
    speeds = {name: batch * new / s for name, s in seconds.items()}
    return {"batch": batch, "tokens_per_second": speeds, "floor": floor / seconds["ours"]}


def growth_row(model, batch, new, preset):
    """Time and memory of one size. The cache is counted by its tensors, since the peak of a
    process never falls."""
    device, prompts = model.device, random_prompts(batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = best(lambda: generate(model, prompts, new), device, min(2, preset.rounds))
    size = max(map(len, prompts)) + new
    cache = KVCache(model.config, batch, size, like=model.lm_head.weight)
    row = {"batch": batch, "new": new, "seconds": seconds,
           "cache_bytes": sum(layer.nbytes for layer in cache.layers)}
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def responses_that_end(preset, device):
    """Rows that are done should cost nothing. Each step draws the end with probability 1/8."""
    words = ENDING_WORDS
    config = GPTConfig(vocab_size=words, eos_token_id=words - 1, pad_token_id=0, **preset.shape)
    model = GPT(config).to(device).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()                        # uniform over all tokens
    prompts = [[1, 2, 3]] * ENDING_BATCH
    full, short = float("inf"), float("inf")
    for _ in range(preset.rounds):
        config.eos_token_id = -1                            # no token ends a response
        full = min(full, timed(lambda: generate(model, prompts, ENDING_TOKENS), device))
        config.eos_token_id = words - 1
        short = min(short, timed(lambda: generate(model, prompts, ENDING_TOKENS,
                                                  generator=generator("ends")), device))
    mask = generate(model, prompts, ENDING_TOKENS, generator=generator("ends"))[1]
    return {"batch": ENDING_BATCH, "new": ENDING_TOKENS, "probability": 1 / words,
            "needed": mask.sum().item() / (ENDING_BATCH * ENDING_TOKENS), "taken": short / full}


def measure(preset, device):
    """Everything on the sampler, as numbers."""
    torch.manual_seed(0)
    # The end token is out of the vocabulary, so that every row writes all tokens.
    config = GPTConfig(vocab_size=VOCABULARY, eos_token_id=-1, pad_token_id=0, **preset.shape)
    model = GPT(config).to(device).eval()
    theirs, rates = hugging_face(model), machine_rates(device)
    compared, growth = [], []
    for batch in preset.batches:
        print(f"sampler: batch {batch}", flush=True)
        small = batch <= preset.naive_up_to
        # On a CPU a large batch is an average already.
        rounds = preset.rounds if small or device.type == "cuda" else 1
        compared.append(comparison_row(model, theirs, random_prompts(batch), preset.new, rounds,
                                       rates, small))
    for batch, new in preset.growth:
        print(f"growth: batch {batch}, {new} new tokens", flush=True)
        growth.append(growth_row(model, batch, new, preset))
    found = {"rates": rates, "parameters": sum(p.numel() for p in model.parameters()),
             "new": preset.new, "prompt": [SHORTEST, LONGEST], "compared": compared,
             "growth": growth, "ending": responses_that_end(preset, device)}
    if transformers is not None:
        found["transformers"] = transformers.__version__
    return found
