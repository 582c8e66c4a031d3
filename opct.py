"""On-Policy Consistency Training (OPCT, arXiv 2605.21834) beside its offline baseline (SFT).

A contrastive pair is one request in two forms, `clean` x and `wrapped` x~ (see data.py). The
student pi_theta should behave on x~ as the teacher pi_0 behaves on x. The teacher is a frozen
copy of the model as it stood when training started.

    OPCT:  y ~ pi_theta(. | x~)         the student's own response, fresh at every update
           loss = sum_t KL( pi_theta(. | x~, y<t) || pi_0(. | x, y<t) )       reverse KL

    SFT:   y ~ pi_0(. | x)              the teacher's response, sampled once before training
           loss = sum_t -log pi_theta(y_t | x~, y<t)

If y is fresh, the mean of the SFT loss is the forward KL and a constant. Stored responses come back
in every epoch: then it is not, and the student may learn these responses by heart.

One update of OPCT (`opct_step`, `train`):

    1. sample the student's responses to some wrapped prompts, at temperature 1, no top-k or top-p;
    2. score each token of them with the student, after the wrapped prompt, with gradient;
    3. score the same tokens with the teacher, after the clean prompt;
    4. the loss is the KL at each token, summed over a response, averaged over responses;
    5. take one step of the optimizer, then sample again. No reward model, no critic, no label.

Each method has two losses. `sampled`, the default, sees the sampled token alone: the paper's OPCT,
plain SFT. `exact` sees the whole distribution at each token. If y is fresh, both have the same
gradient on average (gamma = 0), and `exact` has less noise at every token. `sft_step` and
`opct_step` differ in whose response and which loss, no more.

    python data.py --out W && python opct.py pretrain --world W --out BASE
    python opct.py opct|sft --base BASE --pairs W/train.jsonl --out RUN [--loss sampled|exact]
"""
import copy
import math
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import load_world
from model import GPT, GPTConfig, generate, is_end, load_checkpoint, save_checkpoint
from support import run
from support.common import (Parser, UserError, add_flags, flag, generator, guarded, pick_device,
                            rng)
from support.lora import add_lora, merge_lora, without_lora
from support.muon import Muon
from support.packing import ROW, pack_documents, pack_responses
from support.pairs import chat_all, check_forms, check_use, given_responses, read_jsonl, shown
from support.processes import average, join_processes, leave_processes, processes, say
from support.report import coloured
from support.tokenizer import IM_END, PAD, chat, check_vocabulary, load_tokenizer, token_text

# --- Objectives: pure functions, one value a token. tests/test_gradients.py is about these -----

def reverse_kl(logp, logq):
    """KL(p || q) at each token, in nats: (N, V), (N, V) -> (N,). p student, q teacher: OPCT, exact.

    N response tokens, V vocabulary. No gradient flows through how y was sampled.
    """
    p, q = logp.exp(), logq.exp()
    # `- p + q` sums to zero, but with it each term's derivative is exactly 0 at agreement. Without
    # it rounding noise is left, and Adam scales noise up to a full step.
    return (p * (logp - logq) - p + q).sum(-1)


def forward_kl(logp_student, logp_teacher):
    """KL(teacher || student) at each token, in nats: (N, V), (N, V) -> (N,). SFT, exact."""
    return reverse_kl(logp_teacher, logp_student)           # same formula, arguments swapped


def nll(logp_token):
    """-log pi_theta(y_t), in nats: (N,) -> (N,). SFT, sampled. Its mean over fresh y is forward_kl
    and a constant."""
    return -logp_token


def advantage(logp_student, logp_teacher, mask, gamma=0.0):
    """A_t = -sum_{u >= t} gamma^(u-t) Delta_u, Delta_t = log pi_theta(y_t) - log pi_0(y_t).

    logp_student, logp_teacher (N,): of each sampled token. mask (B, T): True on the responses.
    Returns (N,), no gradient. Put into `policy_gradient`, gamma = 0 (the paper's) has on average
    the gradient of `reverse_kl`, gamma = 1 that of the KL between whole responses.
    """
    delta = (logp_student - logp_teacher).detach()
    total = delta.new_zeros(mask.shape).masked_scatter(mask, delta)             # (B, T)
    for t in reversed(range(mask.shape[1] - 1)):
        total[:, t] += gamma * total[:, t + 1]
    return -total[mask]


def policy_gradient(logp_token, logp_sampled, advantages):
    """-ratio_t * A_t, ratio_t = pi_theta(y_t) / pi_sampled(y_t): (N,) -> (N,). OPCT, sampled.

    logp_sampled: under the model that sampled y. Here that is the student itself, so the ratio is
    1, and its gradient is that of log pi_theta(y_t). (With Delta_t itself as the loss the mean
    gradient would be zero.)
    """
    return -(logp_token - logp_sampled).exp() * advantages


# --- The two methods, side by side. Each: pairs in, loss out -----------------------------------

@dataclass
class Batch:
    """What B responses need. A pair with several samples stands here once for each of them."""
    clean: list                             # B prompts, each a list of token ids: the teacher's
    wrapped: list                           # the student's
    response: torch.Tensor | None = None    # sft alone: (B, T), the teacher's
    mask: torch.Tensor | None = None        # sft alone: (B, T), True on the response
    noise: torch.Tensor | None = None       # (B, max_new_tokens), uniform: picks sampled tokens


def sft_step(student, teacher, batch, config):
    """Offline: the teacher's responses. Returns the loss and values to log."""
    response, mask = batch.response, batch.mask                                     # (B, T)
    logp_student, _, kl = score(student, teacher, batch, response, mask, forward_kl)
    if config.loss == "exact":
        loss = kl
    else:
        loss = nll(logp_student)
    return loss.sum() / len(response), to_log(student, response, mask, kl)


def opct_step(student, teacher, batch, config):
    """On-policy: the student's own responses. Returns the loss and values to log."""
    response, mask = generate(student, batch.wrapped, config.max_new_tokens, noise=batch.noise)
    logp_student, logp_teacher, kl = score(student, teacher, batch, response, mask, reverse_kl)
    if config.loss == "exact":
        loss = kl
    else:
        advantages = advantage(logp_student, logp_teacher, mask, config.gamma)
        loss = policy_gradient(logp_student, logp_student.detach(), advantages)
    return loss.sum() / len(response), to_log(student, response, mask, kl)


# --- Scoring ---------------------------------------------------------------------------------

def score(student, teacher, batch, response, mask, divergence):
    """The student after `wrapped` and the teacher after `clean`, at each response token.

    Args: response and mask (B, T), as `generate` returns them; divergence: reverse_kl, forward_kl.
    Returns, each (N,) in the order of response[mask]: the student's log-probability of the token,
    the teacher's, and the divergence of their distributions over the vocabulary, in nats. The end
    token has a value, prompt and padding have none.
    """
    hidden_student = response_states(student, batch.wrapped, response, mask)        # (N, C)
    with torch.no_grad(), without_lora(teacher):
        hidden_teacher = response_states(teacher, batch.clean, response, mask)      # (N, C)

    def compare(hidden_student, hidden_teacher, tokens):
        logp_student = log_probabilities(student, hidden_student)                   # (N, V)
        with torch.no_grad():
            logp_teacher = log_probabilities(teacher, hidden_teacher)               # (N, V)
        return (pick(logp_student, tokens), pick(logp_teacher, tokens),
                divergence(logp_student, logp_teacher))

    rows = PIECE // student.config.vocab_size
    return in_pieces(compare, rows, hidden_student, hidden_teacher, response[mask])


PIECE = 2**25       # logits at a time: 128 MB in float32


def in_pieces(function, rows, *tensors):
    """function(*tensors), computed for so many rows at a time.

    All logits of a batch over a real vocabulary, (N, V), would take gigabytes. So each piece is
    computed again when the backward pass comes to it, and only one is in memory at a time.
    """
    rows = max(1, rows)
    if len(tensors[0]) <= rows:
        return function(*tensors)
    pieces = [checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False)
              for piece in zip(*(tensor.split(rows) for tensor in tensors))]
    return [torch.cat(values) for values in zip(*pieces)]


def response_states(model, prompts, response, mask):
    """The hidden state that predicts each response token: (N, C), N = mask.sum()."""
    responses = [ids[keep].tolist() for ids, keep in zip(response.cpu(), mask.cpu())]
    packed, where = pack_responses(prompts, responses)      # R rows of W tokens
    hidden = model.model(*packed.inputs(model.device)).flatten(0, 1)                # (R * W, C)
    return hidden[torch.tensor(where, device=model.device)]


def log_probabilities(model, hidden):
    """(N, C) -> (N, V), in float32 also where the model computes in bfloat16."""
    logits = model.lm_head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def pick(logp, tokens):
    """The log-probability of each token itself: (N, V), (N,) -> (N,)."""
    return logp.gather(-1, tokens[:, None]).squeeze(-1)


def to_log(student, response, mask, kl):
    """Values for the log, one a token or a response. It gets their means; of `tokens`, the sum."""
    ended = is_end(response, student.config) & mask
    return {"kl_exact": kl.detach(), "tokens": mask.sum(), "length": mask.sum(1),
            "cut": ~ended.any(1)}


# --- Settings: every flag, its default and its meaning -----------------------------------------

@dataclass
class PretrainConfig:
    """Trains the base model on fresh text of the world."""
    world: str = flag("world", "the folder that `python data.py --out` wrote")
    out: str = flag("base", "the folder for checkpoint and log")
    family: str = flag("llama", "shape of the model", choices=["llama", "qwen2", "qwen3"])
    layers: int = flag(4, "layers")
    width: int = flag(128, "hidden size, a multiple of 64; a head has 32 of it")
    rows: int = flag(24, f"rows of {ROW} tokens in a step")
    steps: int = flag(1700, "steps")
    lr: float = flag(1e-2, "highest learning rate")
    clip: float = flag(1.0, "largest gradient norm")
    seed: int = flag(0, "initialisation, documents and their order follow from it")
    save_every: int = flag(100, "steps between two saved states")
    device: str = flag(None, "cpu or cuda; the best there is")


@dataclass
class ConsistencyConfig:
    """Trains a base model for consistency on contrastive pairs."""
    base: str = flag("base", "the checkpoint to start from; the teacher is a frozen copy of it")
    pairs: str = flag("world/train.jsonl", "contrastive pairs, one JSON object a line")
    out: str = flag("run", "the folder for checkpoint and log")
    loss: str = flag("sampled", "the sampled token alone, as in the paper, or the exact KL",
                     choices=["sampled", "exact"])
    gamma: float = flag(0.0, "--loss sampled: discount of later tokens' KL")
    control: str = flag("none", "clean: the student gets the clean prompt; shuffled: the teacher "
                        "gets another pair's", choices=["none", "clean", "shuffled"])
    lora: int = flag(0, "rank of an adapter to train instead of the weights; 0: all weights")
    dtype: str = flag("float32", "of what is frozen: the teacher, then a rounded copy, or under "
                      "--lora the base; what is trained is float32",
                      choices=["float32", "bfloat16"])
    steps: int = flag(60, "updates")
    batch: int = flag(32, "pairs in an update")
    samples: int = flag(4, "responses to a pair in an update")
    stored: int = flag(None, "responses of the teacher that a pair gets before training; an update "
                       "takes --samples of them in turn; 0: fresh ones at every update (default: "
                       "4)")
    micro_batch: int = flag(None, "responses computed at a time: the same update, less memory")
    max_new_tokens: int = flag(64, "a longer response is cut")
    lr: float = flag(None, "highest learning rate; 3e-4 for a small model, 2e-5 from 20 million "
                     "parameters on, ten times that with --lora")
    clip: float = flag(1.0, "largest gradient norm")
    seed: int = flag(0, "order of the pairs and sampling follow from it")
    save_every: int = flag(10, "updates between two saved states")
    device: str = flag(None, "cpu or cuda; the best there is")


def is_large(model):
    return sum(p.numel() for p in model.parameters()) >= 20e6


def with_defaults(config, model, stage, given=False):
    """The config with what depends on the model and the method filled in: the learning rate, and
    the responses that `sft` stores. given: the pairs hold a response each."""
    if config.lr is None:
        rate = 2e-5 if is_large(model) else 3e-4
        config = replace(config, lr=10 * rate if config.lora else rate)
    if config.stored is None and stage == "sft":
        config = replace(config, stored=1 if given else 4)
    return config


# --- The training loop -------------------------------------------------------------------------

def learning_rate(step, config):
    """Up in a straight line over the first 5 % of the steps, then down to zero."""
    warmup = max(1, config.steps // 20)
    down = (config.steps - step) / max(1, config.steps - warmup)
    return config.lr * min((step + 1) / warmup, down)


def train(model, losses_of, config, optimizers):
    """The loop of every stage. `losses_of(step)` yields, for each micro-batch of an update, its
    share of the loss and the values to log.

    All randomness follows from (seed, step), and the whole state is saved now and then. So a run
    that was killed and started again ends like an unbroken one: bit for bit on a CPU with the same
    number of threads.
    """
    model.train()
    start = run.load_state(config.out, model, optimizers)
    trained = [p for p in model.parameters() if p.requires_grad]
    with run.Log(config, start) as log:
        for step in range(start, config.steps):
            began = time.time()
            total, sums = torch.zeros((), device=model.device), {}
            for loss, values in losses_of(step):
                loss.backward()
                total += loss.detach()
                run.add_sums(sums, values)
            average([*(p.grad for p in trained), total, *sums.values()])    # over processes
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip).item()
            means, tokens = run.means_and_tokens(sums)
            means = {"loss": total.item(), **means, "grad_norm": norm}
            if not math.isfinite(means["loss"] + norm):
                raise UserError(f"loss {means['loss']}, gradient {norm} at step {step}: stopped; "
                                "start again in another folder, with a smaller --lr")
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate = learning_rate(step, config)
                optimizer.step()
                optimizer.zero_grad()
            log.write(step, {**means, "lr": rate}, tokens, time.time() - began)
            if log.first and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                run.save_state(config.out, model, optimizers, step + 1)
    run.require_finite(model, config.steps)


def finish(model, config):
    """Saves the checkpoint of a whole run, and drops the state, which nobody needs any more."""
    if processes()[0] == 0:
        merge_lora(model.cpu())     # there is room for the merged weights in float32
        save_checkpoint(model, config.out)
        run.drop_state(config.out)


# --- Pretraining: next-token prediction on fresh documents of the world ------------------------

def pretrain(config, load=load_world):
    (rank, size), device = processes(), pick_device(config.device)
    world, tokenizer = load(config.world), load_tokenizer(config.world)
    if config.width % 64:
        raise UserError(f"--width {config.width}: it has to be a multiple of 64")
    if config.rows % size:
        raise UserError(f"--rows {config.rows} cannot be shared out evenly by {size} processes")
    settings = run.run_settings(config, "pretrain", world_config=asdict(world.config))
    if not run.open_run(config.out, settings, tokenizer):
        return
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(
        model_type=config.family, vocab_size=tokenizer.n_vocab, hidden_size=config.width,
        intermediate_size=config.width * 11 // 4, num_hidden_layers=config.layers,
        num_attention_heads=config.width // 32, num_key_value_heads=config.width // 64,
        head_dim=32, eos_token_id=tokenizer.encode_single_token(IM_END),
        pad_token_id=tokenizer.encode_single_token(PAD))).to(device)
    say(f"pretrain: {sum(p.numel() for p in model.parameters()):,} parameters, {config.steps} "
        f"steps of {config.rows * ROW:,} tokens on {device}")

    def losses_of(step):
        random = rng(config.seed, "pretrain", step)
        packed = pack_documents(world, tokenizer, random, config.rows)
        mine = packed.rows(slice(rank, None, size))         # the rows of this process
        target = mine.next_tokens().flatten().to(device)
        logits = model(*mine.inputs(device)).flatten(0, 1)                          # (R * W, V)
        total = F.cross_entropy(logits, target, reduction="sum", ignore_index=-1)
        scale = size / (packed.next_tokens() >= 0).sum()    # `average` divides by size again
        yield total * scale, {"tokens": (target >= 0).sum()}

    # Muon for the matrices of the layers, AdamW for the rest.
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    train(model, losses_of, config, [
        Muon(matrices, weight_decay=0.1),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.1, fused=True)])
    finish(model, config)


# --- Consistency training: which pairs, whose responses ----------------------------------------

def controlled(records, config):
    """The records of a control: no wrapped prompts, or clean prompts of other pairs."""
    if config.control == "clean":       # nothing to learn: what changes now, training itself does
        return [{**r, "wrapped": r["clean"]} for r in records]
    if config.control == "none":
        return records
    # Nothing to be consistent with. Each pair gets the clean prompt of the next in a random ring.
    n, out = len(records), list(records)
    ring = rng(config.seed, "shuffled").sample(range(n), n)
    for i, j in zip(ring, ring[1:] + ring[:1]):
        out[i] = {**records[i], "clean": records[j]["clean"]}
    return out


def rows_of_update(step, n, config):
    """The rows of an update, (pair, number of its response) each. An epoch takes each of the n
    pairs once, in a random order of its own, so in epoch k a pair has its k-th turn, with the
    responses k * samples, k * samples + 1, ..., which stand side by side."""
    orders, rows = {}, []
    for at in range(step * config.batch, (step + 1) * config.batch):
        epoch, place = divmod(at, n)
        if epoch not in orders:
            orders[epoch] = rng(config.seed, "epoch", epoch).sample(range(n), n)
        first = epoch * config.samples
        rows += [(orders[epoch][place], first + i) for i in range(config.samples)]
    return rows


def teacher_responses(teacher, clean, noise):
    """The teacher's responses to clean prompts, and the mask: (B, T) each."""
    with without_lora(teacher):
        return generate(teacher, clean, noise.shape[1], noise=noise)


def offline_responses(teacher, clean, config):
    """`config.stored` responses of the teacher to each clean prompt, which stand side by side, and
    the mask: (rows, max_new_tokens) each."""
    clean = [prompt for prompt in clean for _ in range(config.stored)]
    response = torch.zeros(len(clean), config.max_new_tokens, dtype=torch.long)
    mask = torch.zeros_like(response, dtype=torch.bool)
    batch = config.micro_batch or (config.batch * config.samples if is_large(teacher) else 512)
    noise = torch.rand(response.shape, generator=generator(config.seed, "offline"))
    for at in range(0, len(clean), batch):
        rows = slice(at, at + batch)
        some, kept = teacher_responses(teacher, clean[rows], noise[rows])
        response[rows, :some.shape[1]], mask[rows, :some.shape[1]] = some, kept
    return response.to(teacher.device), mask.to(teacher.device)


def student_and_teacher(config, device):
    """The model to train and its run-start copy. With LoRA they are one: see `without_lora`."""
    student = load_checkpoint(config.base, device, config.dtype if config.lora else "float32")
    if config.lora:
        add_lora(student, config.lora, config.seed)
        return student, student
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    return student, teacher.to(getattr(torch, config.dtype))


def consistency(config, stage):
    """`sft` or `opct` from beginning to end: checks, models, pairs, the loop, the checkpoint."""
    (rank, size), device = processes(), pick_device(config.device)
    records = read_jsonl(config.pairs)
    check_use(records, config, stage, size)
    student, teacher = student_and_teacher(config, device)
    tokenizer = load_tokenizer(config.base)
    check_vocabulary(tokenizer, student, config.base)
    config = with_defaults(config, student, stage, given="response" in records[0])
    used = controlled(records, config)
    clean, wrapped = (chat_all(tokenizer, student, used, form, config)
                      for form in ("clean", "wrapped"))
    warning = check_forms(used, clean, wrapped, config.pairs)
    given = given_responses(tokenizer, student, records, config)
    settings = run.run_settings(config, stage, teacher=run.weights_hash(teacher),
                                 pairs=records, prompts=(clean, wrapped))
    if not run.open_run(config.out, settings, tokenizer):
        return
    if warning:
        say(warning)
    say(run.first_screen(stage, config, used, student, teacher))
    if config.stored:                       # sft: the responses of the pairs, or the teacher's
        response, mask = given or offline_responses(teacher, clean, config)
    loss_of = {"sft": sft_step, "opct": opct_step}[stage]

    def losses_of(step):
        rows = rows_of_update(step, len(used), config)
        draws = generator(config.seed, "sampling", step)
        noise = torch.rand(len(rows), config.max_new_tokens, generator=draws)
        mine = torch.arange(rank, len(rows), size)          # the responses of this process
        for some in mine.split(config.micro_batch or len(mine)):
            chosen = [rows[i] for i in some]
            batch = Batch([clean[pair] for pair, _ in chosen],
                          [wrapped[pair] for pair, _ in chosen], noise=noise[some])
            if config.stored:
                stored = [pair * config.stored + i % config.stored for pair, i in chosen]
                batch.response, batch.mask = response[stored], mask[stored]
            elif stage == "sft":
                batch.response, batch.mask = teacher_responses(teacher, batch.clean, batch.noise)
            loss, values = loss_of(student, teacher, batch, config)
            yield loss * len(some) / len(mine), values

    example = next((r for r in used if r.get("fails")), used[0])
    show_example(student, teacher, tokenizer, example, config)
    train(student, losses_of, config, [torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)])
    if run.weights_hash(teacher) != settings["teacher"]:
        raise RuntimeError("the frozen teacher has changed during training: nothing was saved")
    finish(student, config)


@torch.no_grad()
def show_example(student, teacher, tokenizer, record, config):
    """Prints one pair, the student's response to its wrapped form, and the KL at each token."""
    pair = Batch([chat(tokenizer, record["clean"])], [chat(tokenizer, record["wrapped"])])
    response, mask = generate(student, pair.wrapped, config.max_new_tokens,
                              generator=generator(config.seed, "example"))
    kl = score(student, teacher, pair, response, mask, reverse_kl)[2]
    text = coloured([token_text(tokenizer, t) for t in response[mask].tolist()], kl.tolist())
    say(f"{shown(record)}\n  response  {text}")


def main():
    parser = Parser(description="Given again, a command goes on where it stopped.")
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, config, without, text in (
            ("pretrain", PretrainConfig, (), "the base model"),
            ("sft", ConsistencyConfig, ("gamma",), "offline: the teacher's responses"),
            ("opct", ConsistencyConfig, ("stored",), "on-policy: the student's own responses")):
        add_flags(stages.add_parser(name, help=text, description=text), config, without)
    args = vars(parser.parse_args())
    stage = args.pop("stage")
    join_processes()
    if stage == "pretrain":
        pretrain(PretrainConfig(**args))
    else:
        consistency(ConsistencyConfig(**args), stage)
    leave_processes()


if __name__ == "__main__":
    guarded(main)
