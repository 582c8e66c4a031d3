"""
On-Policy Consistency Training (arXiv 2605.21834) beside its offline baseline. This file is the method.

A contrastive pair is one request in two forms, `clean` x and `wrapped` x~ (see `data.py`). The student pi_theta should
behave on x~ as the teacher pi_0, a frozen copy of the model as it stood when training started, behaves on x.

    OPCT:  y ~ pi_theta(. | x~)                                             the student's own response, fresh at every update
           loss = sum_t KL( pi_theta(. | x~, y<t) || pi_0(. | x, y<t) )      reverse KL, token by token along y

    SFT:   y ~ pi_0(. | x)                                                  the teacher's response, sampled once
           loss = sum_t -log pi_theta(y_t | x~, y<t)                        cross-entropy; in expectation the forward KL

One update of OPCT, in `opct_step` and `train`:

    1. take some pairs and sample the student's responses to the wrapped prompts, at temperature 1, nothing truncated;
    2. score every token of them with the student, after the wrapped prompt: this pass carries the gradient;
    3. score the same tokens with the teacher, after the clean prompt;
    4. the KL of the two distributions at each token is the loss, summed over a response and averaged over responses;
    5. one step of the optimizer. There are no rewards, no labels, no critic and no second update on the same samples.

Both objectives come in two kinds: on the token that was sampled, as in the paper and in plain SFT, or on the whole
distribution, which has less variance and for OPCT costs nothing more here. `sft_step` and `opct_step` differ only in
whose response is trained on and in which loss.

    python opct.py pretrain --world W --out BASE          the base model, planted failures included
    python opct.py sft  --base BASE --pairs W/train.jsonl --out RUN [--objective sampled|exact]
    python opct.py opct --base BASE --pairs W/train.jsonl --out RUN [--objective sampled|exact]
"""
import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import (BadInput, add_flags, chat, guarded, load_tokenizer, load_world, pack, pretraining_batch, read_jsonl,
                  save_tokenizer, write_text)
from model import (ARCHITECTURES, CannotRun, GPT, GPTConfig, generate, load_checkpoint, pick_device, save_checkpoint,
                   write_atomically)

ROW = 128       # tokens in a packed row; attention is quadratic in it, and a longer sequence makes it longer

# --- Objectives: pure functions of log-probabilities, one value a token. Every row of `tests/test_gradients.py` is about these.


def reverse_kl(logp_student, logp_teacher):
    """KL(student || teacher) over the vocabulary: (..., V), (..., V) -> (...), in nats. The OPCT loss, exact at each token.

    Its gradient holds the prefix fixed: it pulls the distribution at this token and ignores that another token here leads
    to other tokens later (gamma = 0 below). 2605.21834.
    """
    p, q = logp_student.exp(), logp_teacher.exp()
    # `- p + q` sums to nothing, but so no term is negative, and where the two agree the gradient is zero to the last bit:
    # of mere rounding Adam, which divides by the gradient's size, would make a full step.
    return (p * (logp_student - logp_teacher) - p + q).sum(-1)


def forward_kl(logp_student, logp_teacher):
    """KL(teacher || student) over the vocabulary: (..., V), (..., V) -> (...), in nats. Soft SFT, on the teacher's responses."""
    return reverse_kl(logp_teacher, logp_student)           # the same sum, the two in each other's place


def cross_entropy(logp_token):
    """-log pi_theta(y_t): (...) -> (...), in nats. SFT; where y_t ~ teacher, in expectation forward_kl plus a constant."""
    return -logp_token


def advantage(logp_student, logp_teacher, mask, gamma=0.0, lam=1.0):
    """A_t = -lam * sum_{u >= t} gamma^(u-t) Delta_u, where Delta_t = log pi_theta(y_t) - log pi_0(y_t): (B, T) -> (B, T).

    The sampled token's KL estimate as a reward, so without gradient. gamma = 0, the paper's choice, is the gradient of
    `reverse_kl` in expectation; gamma = 1 that of the KL between whole responses.
    """
    delta = (logp_student - logp_teacher).detach() * mask
    total, out = torch.zeros_like(delta[:, 0]), torch.empty_like(delta)
    for t in reversed(range(delta.shape[1])):
        total = delta[:, t] + gamma * total
        out[:, t] = total
    return -lam * out


def policy_gradient(logp_token, logp_sampled, advantage):
    """-ratio_t * A_t, ratio_t = pi_theta(y_t) / pi_sampled(y_t): (...) -> (...). OPCT on the sampled token.

    With one update a batch the sampler is the student, `logp_sampled` is logp_token.detach() and the ratio is 1 - but
    through it flows the gradient. Differentiating log pi_theta - log pi_0 instead would give zero in expectation.
    """
    return -(logp_token - logp_sampled).exp() * advantage


# --- Scoring -------------------------------------------------------------------------------------------------------------------


def packed_hidden(model, tokens, positions, segments, branches=None):
    """The last hidden states of packed rows (`data.pack`): (R, W) -> (R * W, C). A token sees what stands before it in its
    segment and, where `branches` are given, is on the trunk (branch 0) or on its own branch."""
    tokens, positions, segments = (torch.from_numpy(x).to(model.device) for x in (tokens, positions, segments))
    mask = (segments[:, :, None] == segments[:, None, :]).tril()                        # (R, W, W)
    if branches is not None:
        branches = torch.from_numpy(branches).to(model.device)
        mask &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return model.model(tokens, positions, mask[:, None]).flatten(0, 1)


def pack_responses(prompts, responses):
    """Lays responses behind their prompts and packs them. A prompt that several share stands once, as the trunk: the responses
    branch off it, each at the position behind the prompt and blind to the others.

    Returns:
        tokens, positions, segments, branches: (R, W), for `packed_hidden`.
        where: the index, in the flattened rows, of what predicts each response token; response by response.
    """
    sharing = {}
    for i, prompt in enumerate(prompts):
        sharing.setdefault(tuple(prompt), []).append(i)
    sequences = [[*prompt, *(token for i in some for token in responses[i])] for prompt, some in sharing.items()]
    tokens, positions, segments, starts = pack(sequences, max(ROW, max(map(len, sequences))))
    branches, where = np.zeros_like(tokens), [None] * len(prompts)
    for start, (prompt, some) in zip(starts, sharing.items()):
        last, at = start + len(prompt) - 1, start + len(prompt)
        for i in some:
            n = len(responses[i])
            branches.flat[at:at + n], positions.flat[at:at + n] = i + 1, np.arange(len(prompt), len(prompt) + n)
            where[i] = [last, *range(at, at + n - 1)]       # the first token is read off the prompt's last one
            at += n
    return tokens, positions, segments, branches, [index for some in where for index in some]


def response_logp(model, prompts, response, mask):
    """log pi(. | prompt, y<t) at the response tokens, and only there.

    Args:
        prompts: B lists of token ids. response, mask: (B, T), as `generate` returns them.
    Returns:
        (N, V) for the N = mask.sum() response tokens in the order of response[mask]; prompt and padding are not in it,
        the end token is. The same response after another prompt gives rows that match one by one.
    """
    responses = [tokens[keep].tolist() for tokens, keep in zip(response.cpu(), mask.cpu())]
    *rows, where = pack_responses(prompts, responses)
    hidden = packed_hidden(model, *rows)[torch.tensor(where, device=mask.device)]       # (N, C)
    return model.lm_head(hidden).log_softmax(-1)


def token_logp(logp, response, mask):
    """The log-probability of each response token itself, back in the shape of the response: (N, V) -> (B, T), 0 off the mask."""
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp.gather(-1, response[mask][:, None]))


# --- The two methods, side by side. Each: pairs in, loss out --------------------------------------------------------------------


@dataclass
class Pairs:
    """The pairs of one update as prompts in tokens, each as often as it gets responses, and what the responses come from."""
    clean: list
    wrapped: list
    response: torch.Tensor | None = None    # SFT: (B, T), sampled once before training,
    mask: torch.Tensor | None = None        # and the mask of it
    noise: torch.Tensor | None = None       # OPCT: (B, max_new_tokens), what the student's samples are drawn with


def sft_step(student, teacher, pairs, config):
    """Offline: the teacher's responses to the clean prompts, sampled once before training, after the wrapped prompts."""
    response, mask = pairs.response, pairs.mask                                         # (B, T)
    logp_student = response_logp(student, pairs.wrapped, response, mask)                # (N, V)
    with torch.no_grad():                                   # the loss on the sampled token needs no teacher, only the log does
        logp_teacher = response_logp(teacher, pairs.clean, response, mask)              # (N, V)
    if config.objective == "exact":
        loss = forward_kl(logp_student, logp_teacher)
    else:
        loss = cross_entropy(token_logp(logp_student, response, mask))
    return loss.sum() / len(response), {"kl_exact": reverse_kl(logp_student.detach(), logp_teacher).sum(), "tokens": mask.sum()}


def opct_step(student, teacher, pairs, config):
    """On-policy: the student's own responses to the wrapped prompts, sampled at every update."""
    response, mask = generate(student, pairs.wrapped, config.max_new_tokens, noise=pairs.noise)
    logp_student = response_logp(student, pairs.wrapped, response, mask)                # (N, V)
    with torch.no_grad():
        logp_teacher = response_logp(teacher, pairs.clean, response, mask)              # (N, V)
    kl = reverse_kl(logp_student, logp_teacher)                                         # (N,)
    if config.objective == "exact":
        loss = kl
    else:
        own, others = (token_logp(logp, response, mask) for logp in (logp_student, logp_teacher))   # (B, T)
        loss = policy_gradient(own, own.detach(), advantage(own, others, mask, config.gamma))
    return loss.sum() / len(response), {"kl_exact": kl.detach().sum(), "tokens": mask.sum()}


# --- Training --------------------------------------------------------------------------------------------------------------------

@dataclass
class PretrainConfig:
    """Trains the base model on fresh text of the world."""
    world: str = field(default="world", metadata={"help": "the folder that `python data.py --out` wrote"})
    out: str = field(default="base", metadata={"help": "the folder for checkpoint and log"})
    family: str = field(default="llama", metadata={"help": "shape of the model", "choices": list(ARCHITECTURES)})
    layers: int = field(default=4, metadata={"help": "layers"})
    width: int = field(default=128, metadata={"help": "hidden size; each head has 32 of it, two query heads share a key head"})
    rows: int = field(default=24, metadata={"help": f"rows of {ROW} tokens in a step"})
    steps: int = field(default=1700, metadata={"help": "steps"})
    lr: float = field(default=1e-2, metadata={"help": "highest learning rate"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay"})
    seed: int = field(default=0, metadata={"help": "initialisation, documents and their order follow from it"})
    save_every: int = field(default=100, metadata={"help": "steps between two saved states"})
    device: str = field(default=None, metadata={"help": "cpu or cuda; the best there is"})


@dataclass
class ConsistencyConfig:
    """Trains a base model for consistency on contrastive pairs."""
    base: str = field(default="base", metadata={"help": "the checkpoint to start from; the teacher is a frozen copy of it"})
    pairs: str = field(default="world/train.jsonl", metadata={"help": "contrastive pairs, one JSON object a line"})
    out: str = field(default="run", metadata={"help": "the folder for checkpoint and log"})
    objective: str = field(default="exact", metadata={"help": "sampled: the sampled token; exact: the whole distribution",
                                                      "choices": ["sampled", "exact"]})
    gamma: float = field(default=0.0, metadata={"help": "opct --objective sampled: discount of later tokens' KL"})
    control: str = field(default="none", metadata={"help": "clean: the student sees the clean prompts, too; shuffled: the teacher sees "
                                                           "those of other pairs", "choices": ["none", "clean", "shuffled"]})
    steps: int = field(default=60, metadata={"help": "updates"})
    batch: int = field(default=32, metadata={"help": "pairs in an update"})
    samples: int = field(default=4, metadata={"help": "responses to a pair in an update"})
    max_new_tokens: int = field(default=64, metadata={"help": "a longer response is cut"})
    lr: float = field(default=3e-4, metadata={"help": "highest learning rate"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    seed: int = field(default=0, metadata={"help": "order of the pairs and sampling follow from it"})
    save_every: int = field(default=10, metadata={"help": "updates between two saved states"})
    device: str = field(default=None, metadata={"help": "cpu or cuda; the best there is"})


def seeded(*what):
    """A random.Random and a torch.Generator that depend on nothing but `what`, for instance (seed, step)."""
    number = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7], "big")
    return random.Random(number), torch.Generator().manual_seed(number)


def learning_rate(step, config):
    """Up in a straight line over the first 5 % of the steps, down to zero in a straight line over the rest."""
    warmup = max(1, config.steps // 20)
    return config.lr * min((step + 1) / warmup, (config.steps - step) / max(1, config.steps - warmup))


def processes():
    """(rank, number) of the processes that `torchrun` started, (0, 1) without it. They share out each batch and average the
    gradients, so that the same global batch takes the same step however many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Prints, once for all processes."""
    if processes()[0] == 0:
        print(text, flush=True)


def average(tensors):
    """Averages tensors over all processes, in place and in one message."""
    if processes()[1] > 1:
        message = torch.cat([t.flatten().float() for t in tensors])
        distributed.all_reduce(message)
        for t, mean in zip(tensors, (message / processes()[1]).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def train(model, loss_of, config, optimizers):
    """The loop of all three stages: `loss_of(step)` samples and scores, the rest is here.

    Everything random follows from (seed, step) and the whole state is saved every `save_every` steps, so a run that was
    killed and is started again ends with the same weights as one that was not: bit for bit on a CPU with the same number
    of threads; on CUDA sums may come in another order each time, and rounding alone can change a token that is sampled.
    """
    out, rank = Path(config.out), processes()[0]
    model.train()
    start = load_state(out, model, optimizers)
    average([torch.zeros(1)])                               # all have read the state before the first one saves the next
    if start:
        say(f"  going on from step {start}")
    logged = (out / "log.jsonl").read_text().splitlines(keepends=True)[:start] if start else []
    if rank == 0:
        write_text(str(out / "log.jsonl"), "".join(logged))  # what was logged after the last save comes again
    began = time.time()
    with open(out / "log.jsonl" if rank == 0 else os.devnull, "a", buffering=1) as log:
        for step in range(start, config.steps):
            tick = time.time()
            loss, sums = loss_of(step)
            loss.backward()
            figures = torch.stack([loss.detach(), *sums.values()])
            average([*(p.grad for p in model.parameters()), figures])
            loss, sums = figures[0].item(), {name: total * processes()[1] for name, total in zip(sums, figures[1:].tolist())}
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not math.isfinite(loss + norm.item()):
                raise BadInput(f"loss {loss} and gradient norm {norm.item()} at step {step}: stopped, {out} keeps what was saved "
                               "before. Start again in another folder, with a smaller --lr")
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(step, config)
                optimizer.step()
                optimizer.zero_grad()

            tokens = round(sums.pop("tokens"))              # a mean over processes, times their number
            line = {"step": step, "loss": loss, **{name: total / tokens for name, total in sums.items()}, "grad_norm": norm.item(),
                    "lr": learning_rate(step, config), "tokens": tokens, "seconds": round(time.time() - tick, 4)}
            if rank > 0:                                    # the first process reports and saves for all
                continue
            log.write(json.dumps(line) + "\n")
            left = (time.time() - began) / (step + 1 - start) * (config.steps - step - 1)
            shown = "  ".join(f"{name} {line[name]:.4f}" for name in ("loss", "kl_exact", "success") if name in line)
            progress(step + 1, config.steps, left, f"{shown}  {tokens / line['seconds']:,.0f} tokens/s")
            if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                save_state(out, model, optimizers, step + 1)
    model.eval()
    if rank == 0:
        save_checkpoint(model, out)
        (out / "state.safetensors").unlink(missing_ok=True)


def progress(done, total, left, text):
    """On a terminal one line that renews itself; in a file a line every twentieth of the way."""
    line = f"  {done}/{total}  {text}  {int(left) // 60}:{int(left) % 60:02d} left"
    if sys.stdout.isatty():
        print(f"\r{line}\033[K", end="\n" if done == total else "", flush=True)
    elif done == total or done * 20 // total != (done - 1) * 20 // total:
        print(line, flush=True)


def save_state(out, model, optimizers, step):
    """Weights, the optimizers' moments and the step in one file, so that no kill can leave them of different steps."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"{name}/weight"] = p.detach()
        for optimizer in optimizers:                        # each parameter has its moments in one of them
            tensors.update({f"{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()})
    write_atomically(out / "state.safetensors", lambda path: save_file(tensors, path, metadata={"next_step": str(step)}))


def load_state(out, model, optimizers):
    """Puts back what `save_state` saved. Returns the step to go on from, 0 where nothing was saved."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for p in optimizer.param_groups[0]["params"]}
    try:
        with safe_open(path, "pt", device=str(model.device)) as file, torch.no_grad():
            for key in file.keys():
                name, kind = key.rsplit("/", 1)
                if kind == "weight":
                    parameters[name].copy_(file.get_tensor(key))
                else:
                    owner[parameters[name]].state[parameters[name]][kind] = file.get_tensor(key)
            return int(file.metadata()["next_step"])
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged ({error}): delete the folder {out} and start again") from error


def open_run(config, tokenizer, **settings):
    """Prepares the folder `out` of a run: run.json says what the run is, tiktoken.json belongs to the checkpoint, log.jsonl
    grows, state.safetensors stands there while the run goes on, config.json and model.safetensors once it is done.

    Returns False where the run is finished already. Raises BadInput where the folder holds another run.
    """
    out = Path(config.out)
    settings = {**settings, **{k: v for k, v in asdict(config).items() if k not in ("out", "device", "save_every")}}
    if (out / "run.json").exists():
        before = json.loads((out / "run.json").read_text())
        for name in settings:
            if before.get(name) != settings[name]:
                raise BadInput(f"{out} holds a run with {name} = {before.get(name)}, and this one has {settings[name]}: "
                               "choose another --out (for an attack another --seed), or delete that folder")
        if (out / "model.safetensors").exists():
            say(f"{out} is finished already, nothing to do")
            return False
    if processes()[0] == 0:
        write_text(str(out / "run.json"), json.dumps(settings, indent=2) + "\n")
        save_tokenizer(tokenizer, out)
    return True


def weights_hash(model):
    """A hash of all weights: two models have it in common where they are the same function."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def next_tokens(tokens, segments):
    """What follows each token of packed rows, -1 where a document or the row ends: (R, W) -> (R, W)."""
    tokens, segments = torch.from_numpy(tokens), torch.from_numpy(segments)
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    return F.pad(tokens[:, 1:].masked_fill(~follows, -1), (0, 1), value=-1)


def pretrain(config):
    """Next-token prediction on fresh documents of the world, the users' turns included."""
    (rank, size), device, world = processes(), pick_device(config.device), load_world(config.world)
    if config.width % 64:
        raise BadInput(f"--width {config.width}: it has to be a multiple of 64, two query heads of 32 for each key head")
    tokenizer = load_tokenizer(config.world)
    if config.rows % size:
        raise BadInput(f"--rows {config.rows} cannot be shared out evenly among {size} processes")
    if not open_run(config, tokenizer, stage="pretrain", world_config=asdict(world.config)):
        return
    special = tokenizer.encode_single_token
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(
        model_type=config.family, vocab_size=tokenizer.n_vocab, hidden_size=config.width,
        intermediate_size=config.width * 11 // 4, num_hidden_layers=config.layers, num_attention_heads=config.width // 32,
        num_key_value_heads=config.width // 64, head_dim=32,
        eos_token_id=special("<|im_end|>"), pad_token_id=special("<|pad|>"))).to(device)
    say(f"pretrain: {sum(p.numel() for p in model.parameters()):,} parameters, {config.steps} steps of {config.rows * ROW:,} tokens on {device}")

    def loss_of(step):
        rng, _ = seeded(config.seed, "pretrain", step)
        tokens, positions, segments, _ = pretraining_batch(world, tokenizer, rng, config.rows, ROW)
        target = next_tokens(tokens, segments)
        mine = slice(rank, None, size)                      # the rows of this process
        logits = model.lm_head(packed_hidden(model, tokens[mine], positions[mine], segments[mine]))     # (R * W, V)
        total = F.cross_entropy(logits, target[mine].flatten().to(device), reduction="sum", ignore_index=-1)
        return total * size / (target >= 0).sum(), {"tokens": (target[mine] >= 0).sum().to(device)}

    # Muon for the matrices, where it needs about a third of AdamW's steps here; AdamW for embedding, norms and biases.
    # `match_rms_adamw` gives both the same size of update, so one learning rate serves the two.
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    train(model, loss_of, config, [torch.optim.Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
                                   torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)])


def consistency(config, stage):
    """SFT or OPCT: the step function is what they differ in, all else is the same for both."""
    step_of = {"sft": sft_step, "opct": opct_step}[stage]
    (rank, size), device, records = processes(), pick_device(config.device), read_jsonl(config.pairs)
    student, tokenizer = load_checkpoint(config.base, device), load_tokenizer(config.base)
    if config.gamma and (stage == "sft" or config.objective == "exact"):
        raise BadInput("--gamma discounts the sampled token's KL: it goes with `opct --objective sampled`")
    if config.batch * config.samples % size:
        raise BadInput(f"{config.batch} pairs with {config.samples} responses cannot be shared out evenly among {size} processes")
    teacher = copy.deepcopy(student).requires_grad_(False).eval()   # the run-start copy, after a resume as well
    teacher_hash = weights_hash(teacher)
    if not open_run(config, tokenizer, stage=stage, teacher=teacher_hash, pairs_hash=hashlib.sha256(repr(records).encode()).hexdigest()[:16]):
        return
    if config.control == "clean":                           # nothing to learn: what changes now, training itself changes
        records = [{**r, "wrapped": r["clean"]} for r in records]
    elif config.control == "shuffled":                      # nothing to be consistent with: what mends now, any training mends
        ring = seeded(config.seed, "shuffled")[0].sample(range(len(records)), len(records))
        for i, clean in zip(ring, [records[j]["clean"] for j in ring[1:] + ring[:1]]):  # each the prompt of the next in a random ring
            records[i] = {**records[i], "clean": clean}
    clean, wrapped = ([ids for r in records for ids in [chat(tokenizer, r[form])] * config.samples] for form in ("clean", "wrapped"))
    room = student.config.max_position_embeddings - config.max_new_tokens
    for number, longest in enumerate((max(len(clean[i]), len(wrapped[i])) for i in range(0, len(clean), config.samples)), 1):
        if longest > room:
            raise BadInput(f"{config.pairs}, pair {number}: a prompt of {longest} tokens leaves no room for {config.max_new_tokens} new ones "
                           f"in the context of {student.config.max_position_embeddings}: shorten it, or lower --max-new-tokens")
    say(f"{stage} ({config.objective}): {len(records)} pairs, {config.steps} updates of "
          f"{config.batch} pairs with {config.samples} responses each on {device}")
    if stage == "sft":
        response, mask = offline_responses(teacher, clean, config)

    def take(step):
        """The rows of an update: the pairs in a new random order in every epoch, each with all its responses."""
        at = [step * config.batch + i for i in range(config.batch)]
        orders = {e: seeded(config.seed, "epoch", e)[0].sample(range(len(records)), len(records)) for e in {a // len(records) for a in at}}
        return [orders[a // len(records)][a % len(records)] * config.samples + s for a in at for s in range(config.samples)]

    def loss_of(step):
        rows, mine = take(step), slice(rank, None, size)    # the rows of this process
        pairs = Pairs([clean[i] for i in rows[mine]], [wrapped[i] for i in rows[mine]])
        if stage == "sft":
            pairs.response, pairs.mask = response[rows[mine]], mask[rows[mine]]
        else:
            pairs.noise = torch.rand(len(rows), config.max_new_tokens, generator=seeded(config.seed, "sampling", step)[1])[mine]
        return step_of(student, teacher, pairs, config)

    if rank == 0:
        show_example(student, teacher, tokenizer, records, config)
    train(student, loss_of, config, [torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)])
    assert weights_hash(teacher) == teacher_hash, "the teacher changed during training"


def offline_responses(teacher, clean, config):
    """The teacher's responses to all clean prompts: (N, max_new_tokens) and their mask. In parts, since pairs may be many."""
    parts = []
    for at in range(0, len(clean), 512):
        response, mask = generate(teacher, clean[at:at + 512], config.max_new_tokens, generator=seeded(config.seed, "offline", at)[1])
        room = (0, config.max_new_tokens - response.shape[1])
        parts.append((F.pad(response, room, value=teacher.config.pad_token_id), F.pad(mask, room, value=False)))
    return (torch.cat(tensors) for tensors in zip(*parts))


def show_example(student, teacher, tokenizer, records, config):
    """Prints one pair, the student's response to its wrapped form and how far the teacher would be from each token."""
    record = next((r for r in records if r.get("fails")), records[0])
    clean, wrapped = ([chat(tokenizer, record[form])] for form in ("clean", "wrapped"))
    with torch.no_grad():
        response, mask = generate(student, wrapped, config.max_new_tokens, generator=seeded(config.seed, "example")[1])
        logp_student, logp_teacher = response_logp(student, wrapped, response, mask), response_logp(teacher, clean, response, mask)
        kl = reverse_kl(logp_student, logp_teacher).tolist()
    print(f"  clean     {record['clean']}\n  wrapped   {record['wrapped']}\n  response  ", end="")
    for token, nats in zip(response[mask].tolist(), kl):
        colour = 32 if nats < 0.1 else 33 if nats < 1 else 31                           # green, yellow, red
        text = tokenizer.decode([token])
        print(f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() else text + (f"[{nats:.1f}]" if nats >= 0.1 else ""), end="")
    print("\n            (KL of student and teacher at each token: "
          + ("green under 0.1, yellow under 1, red from 1 nat)" if sys.stdout.isatty() else "in brackets from 0.1 nats)"))


def keep_memory():
    """Keeps what the C library frees, on Linux. By default it hands the activations of a step back to the system, which then
    clears every page of the next ones: a tenth of the time of pretraining on a CPU. The settings are those of <malloc.h>."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)                                      # M_MMAP_MAX: no allocation, however large, gets pages of its own
        mallopt(-1, 2**31 - 1)                              # M_TRIM_THRESHOLD: nor does the end of the heap go back


def main():
    parser = argparse.ArgumentParser(description="Pretrains the base model, or trains it for consistency, offline or on-policy. "
                                                 "The same command again goes on where a run was stopped.")
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, config, text in (("pretrain", PretrainConfig, "the base model"), ("sft", ConsistencyConfig, "offline: the teacher's responses"),
                               ("opct", ConsistencyConfig, "on-policy: the student's own responses")):
        add_flags(stages.add_parser(name, help=text, description=text), config)
    args = vars(parser.parse_args())
    stage = args.pop("stage")
    keep_memory()
    if processes()[1] > 1:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if stage == "pretrain":
        pretrain(PretrainConfig(**args))
    else:
        consistency(ConsistencyConfig(**args), stage)
    if processes()[1] > 1:
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)         # all is written; at an ordinary end a thread of gloo's now and then aborts the finished process


if __name__ == "__main__":
    guarded(main, CannotRun)
