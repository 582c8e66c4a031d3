"""On-Policy Consistency Training (OPCT, arXiv 2605.21834) beside its offline baseline (SFT).

A contrastive pair is one request in two forms, `clean` x and `wrapped` x~ (see data.py). The
student pi_theta should behave on x~ as the teacher pi_0 behaves on x. The teacher is a frozen
copy of the model as it stood when training started.

    OPCT:  y ~ pi_theta(. | x~)         the student's own response, fresh at every update
           loss = sum_t KL( pi_theta(. | x~, y<t) || pi_0(. | x, y<t) )       reverse KL

    SFT:   y ~ pi_0(. | x)              the teacher's response, sampled once before training
           loss = sum_t -log pi_theta(y_t | x~, y<t)       forward KL + a constant, on average

One update of OPCT (`opct_step`, `train`):

    1. sample the student's responses to some wrapped prompts, at temperature 1, untruncated;
    2. score each token of them with the student, after the wrapped prompt, with gradient;
    3. score the same tokens with the teacher, after the clean prompt;
    4. the loss is the KL at each token, summed over a response, averaged over responses;
    5. take one step of the optimizer. No reward, no critic, no label, no second update.

Each method has two losses. `sampled` sees the sampled token alone: the paper's OPCT, plain SFT.
`exact`, the default, sees the whole distribution: same gradient on average over fresh y, less
variance. `sft_step` and `opct_step` differ in whose response and which loss, no more.

    python data.py --out W && python opct.py pretrain --world W --out BASE
    python opct.py opct|sft --base BASE --pairs W/train.jsonl --out RUN [--loss sampled|exact]
"""
import copy
import hashlib
import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from data import load_world
from model import ARCHITECTURES, GPT, GPTConfig, generate, load_checkpoint, save_checkpoint
from support.common import Parser, UserError, add_flags, flag, generator, guarded, pick_device, rng
from support.packing import ROW, pack, pack_responses
from support.pairs import controlled, pairs_of_update, read_jsonl
from support.report import coloured
from support.runs import (Log, average, join_processes, leave_processes, load_state, open_run,
                          processes, require_finite, run_settings, save_state, say, weights_hash)
from support.tokenizer import (IM_END, PAD, chat, chat_all, check_vocabulary, decode,
                               document_tokens, load_tokenizer)

# --- Objectives: pure functions, one value a token. tests/test_gradients.py is about these -----

def reverse_kl(logp_student, logp_teacher):
    """KL(first || second argument) at each token, in nats: (N, V), (N, V) -> (N,). OPCT, exact.

    N response tokens, V vocabulary. No gradient flows through how y was sampled. 2605.21834.
    """
    p, q = logp_student.exp(), logp_teacher.exp()
    # `- p + q` sums to zero, but with it each term's derivative is exactly 0 at agreement. Without
    # it rounding noise is left, and Adam scales noise up to a full step.
    return (p * (logp_student - logp_teacher) - p + q).sum(-1)


def forward_kl(logp_student, logp_teacher):
    """KL(teacher || student) at each token, in nats: (N, V), (N, V) -> (N,). SFT, exact."""
    return reverse_kl(logp_teacher, logp_student)           # KL(first || second), so swapped


def cross_entropy(logp_token):
    """-log pi_theta(y_t), in nats: (N,) -> (N,). SFT; over fresh y, forward_kl + a constant."""
    return -logp_token


def advantage(own, ref, mask, gamma=0.0):
    """A_t = -sum_{u >= t} gamma^(u-t) Delta_u, Delta_t = log pi_theta(y_t) - log pi_0(y_t).

    own, ref (N,): log-probability of each sampled token, student's and teacher's. mask (B, T): True
    on the responses. Returns (N,), no gradient. gamma = 0, as in the paper: A_t = -Delta_t, on
    average the gradient of `reverse_kl`; gamma = 1: that of the KL between whole responses.
    """
    delta = (own - ref).detach()
    total = delta.new_zeros(mask.shape).masked_scatter(mask, delta)             # (B, T)
    for t in reversed(range(mask.shape[1] - 1)):
        total[:, t] += gamma * total[:, t + 1]
    return -total[mask]


def policy_gradient(logp_token, logp_sampled, advantages):
    """-ratio_t * A_t, ratio_t = pi_theta(y_t) / pi_sampled(y_t): (N,) -> (N,). OPCT, sampled.

    logp_sampled: under the model that sampled y. Here that is the student itself, so the ratio is
    1, and its gradient that of log pi_theta(y_t). (Delta_t itself as a loss: zero on average.)
    """
    return -(logp_token - logp_sampled).exp() * advantages


# --- The two methods, side by side. Each: pairs in, loss out -----------------------------------

@dataclass
class Pairs:
    """The batch of an update, in tokens: B rows, one a response; a pair fills `samples` rows."""
    clean: list
    wrapped: list
    response: torch.Tensor | None = None    # sft: (B, T), sampled once before training
    mask: torch.Tensor | None = None        # sft: (B, T), True on the response
    noise: torch.Tensor | None = None       # opct: (B, max_new_tokens), uniform: picks the tokens


def sft_step(student, teacher, pairs, config):
    """Offline: the teacher's responses, sampled once. Returns the loss and values to log."""
    response, mask = pairs.response, pairs.mask                                     # (B, T)
    logp_student = score(student, pairs.wrapped, response, mask)                    # (N, V)
    with torch.no_grad():
        logp_teacher = score(teacher, pairs.clean, response, mask)                  # (N, V)
    kl = reverse_kl(logp_student.detach(), logp_teacher)            # (N,), for the log alone
    if config.loss == "exact":
        loss = forward_kl(logp_student, logp_teacher)
    else:
        loss = cross_entropy(pick(logp_student, response[mask]))
    return loss.sum() / len(response), {"kl_exact": kl, "tokens": mask.sum()}


def opct_step(student, teacher, pairs, config):
    """On-policy: the student's own responses, fresh. Returns the loss and values to log."""
    response, mask = generate(student, pairs.wrapped, config.max_new_tokens, noise=pairs.noise)
    logp_student = score(student, pairs.wrapped, response, mask)                    # (N, V)
    with torch.no_grad():
        logp_teacher = score(teacher, pairs.clean, response, mask)                  # (N, V)
    kl = reverse_kl(logp_student, logp_teacher)                                     # (N,)
    if config.loss == "exact":
        loss = kl
    else:
        own, ref = pick(logp_student, response[mask]), pick(logp_teacher, response[mask])
        loss = policy_gradient(own, own.detach(), advantage(own, ref, mask, config.gamma))
    return loss.sum() / len(response), {"kl_exact": kl.detach(), "tokens": mask.sum()}


# --- Scoring ---------------------------------------------------------------------------------

def hidden_states(model, packed):
    """The last hidden states of R packed rows of W tokens, flattened: (R * W, C)."""
    return model.model(*packed.inputs(model.device)).flatten(0, 1)


def score(model, prompts, response, mask):
    """log pi(. | prompt, y<t) at each response token: (N, V), N = mask.sum().

    The rows are in the order of response[mask]: the end token has one, prompt and padding have
    none. Args: B lists of token ids; response and mask (B, T), as `generate` returns them.
    """
    responses = [ids[keep].tolist() for ids, keep in zip(response.cpu(), mask.cpu())]
    packed, where = pack_responses(prompts, responses)
    hidden = hidden_states(model, packed)[torch.tensor(where, device=model.device)]     # (N, C)
    return model.lm_head(hidden).log_softmax(-1)


def pick(logp, tokens):
    """The log-probability of each token itself: (N, V), (N,) -> (N,)."""
    return logp.gather(-1, tokens[:, None]).squeeze(-1)


# --- The training loop -------------------------------------------------------------------------

@dataclass
class PretrainConfig:
    """Trains the base model on fresh text of the world."""
    world: str = flag("world", "the folder that `python data.py --out` wrote")
    out: str = flag("base", "the folder for checkpoint and log")
    family: str = flag("llama", "shape of the model", choices=list(ARCHITECTURES))
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
    loss: str = flag("exact", "sampled token or exact KL", choices=["sampled", "exact"])
    gamma: float = flag(0.0, "opct --loss sampled: discount of later tokens' KL")
    control: str = flag("none", "clean: the student gets the clean prompt; shuffled: the teacher "
                        "gets another pair's", choices=["none", "clean", "shuffled"])
    steps: int = flag(60, "updates")
    batch: int = flag(32, "pairs in an update")
    samples: int = flag(4, "responses to a pair in an update")
    max_new_tokens: int = flag(64, "a longer response is cut")
    lr: float = flag(3e-4, "highest learning rate")
    clip: float = flag(1.0, "largest gradient norm")
    seed: int = flag(0, "order of the pairs and sampling follow from it")
    save_every: int = flag(10, "updates between two saved states")
    device: str = flag(None, "cpu or cuda; the best there is")


def learning_rate(step, config):
    """Up in a straight line over the first 5 % of the steps, then down to zero."""
    warmup = max(1, config.steps // 20)
    down = (config.steps - step) / max(1, config.steps - warmup)
    return config.lr * min((step + 1) / warmup, down)


def train(model, step_of, config, optimizers):
    """The loop of every stage: `step_of(step)` returns the loss and the values to log.

    All randomness follows from (seed, step), and the whole state is saved now and then. So a run
    that was killed and started again ends like an unbroken one: bit for bit on a CPU with the same
    number of threads.
    """
    model.train()
    start = load_state(config.out, model, optimizers)
    average([torch.zeros(1)])       # a barrier: all have read the state before one saves the next
    with Log(config, start) as log:
        for step in range(start, config.steps):
            began = time.time()
            loss, values = step_of(step)
            loss.backward()
            # A pair (sum, count) for each value, so that processes average exactly.
            sums = {name: torch.stack([v.sum().float(), v.new_tensor(v.numel()).float()])
                    for name, v in {"loss": loss.detach(), **values}.items()}
            average([*(p.grad for p in model.parameters()), *sums.values()])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
            means = {name: (total / count).item() for name, (total, count) in sums.items()}
            if not math.isfinite(means["loss"] + norm):
                raise UserError(f"loss {means['loss']}, gradient {norm} at step {step}: stopped; "
                                "start again in another folder, with a smaller --lr")
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate = learning_rate(step, config)
                optimizer.step()
                optimizer.zero_grad()
            tokens = round(means.pop("tokens") * processes()[1])
            log.write(step, {**means, "grad_norm": norm, "lr": rate}, tokens, time.time() - began)
            if log.first and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                save_state(config.out, model, optimizers, step + 1)
    require_finite(model, config.steps)
    if log.first:
        save_checkpoint(model, config.out)
        log.drop_state()


# --- Pretraining: next-token prediction on fresh documents of the world ------------------------

def pretraining_batch(world, tokenizer, random, rows):
    """Packed fresh documents. At 97 % of the room first-fit leaves hardly any of them out."""
    groups, room = [], 0.97 * rows * ROW
    while room > 0:
        groups.append((document_tokens(tokenizer, *world.document(random)), []))
        room -= len(groups[-1][0])
    return pack(groups[:-1], max_rows=rows)


def pretrain(config, load=load_world):
    (rank, size), device = processes(), pick_device(config.device)
    world, tokenizer = load(config.world), load_tokenizer(config.world)
    if config.width % 64:
        raise UserError(f"--width {config.width}: it has to be a multiple of 64")
    if config.rows % size:
        raise UserError(f"--rows {config.rows} cannot be shared out evenly by {size} processes")
    settings = run_settings(config, "pretrain", world_config=asdict(world.config))
    if not open_run(config.out, settings, tokenizer):
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

    def step_of(step):
        random = rng(config.seed, "pretrain", step)
        packed = pretraining_batch(world, tokenizer, random, config.rows)
        mine = packed.rows(slice(rank, None, size))         # the rows of this process
        target = mine.next_tokens().flatten().to(device)
        logits = model.lm_head(hidden_states(model, mine))                          # (R * W, V)
        total = F.cross_entropy(logits, target, reduction="sum", ignore_index=-1)
        scale = size / (packed.next_tokens() >= 0).sum()    # the processes' mean is then per token
        return total * scale, {"tokens": (target >= 0).sum()}

    # Muon for the matrices of the layers, AdamW for the rest. `match_rms_adamw` gives both the
    # same size of update, so one learning rate serves the two.
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    train(model, step_of, config, [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.1, fused=True)])


# --- Consistency training: the step function is all that SFT and OPCT differ in ----------------

def offline_responses(teacher, clean, config):
    """The teacher's responses to all clean prompts, and the mask: (rows, max_new_tokens) each."""
    responses, masks = [], []
    for at in range(0, len(clean), 512):
        response, mask = generate(teacher, clean[at:at + 512], config.max_new_tokens,
                                  generator=generator(config.seed, "offline", at))
        room = (0, config.max_new_tokens - response.shape[1])
        responses.append(F.pad(response, room, value=teacher.config.pad_token_id or 0))
        masks.append(F.pad(mask, room, value=False))
    return torch.cat(responses), torch.cat(masks)


def consistency(config, stage):
    (rank, size), device = processes(), pick_device(config.device)
    records = read_jsonl(config.pairs)
    student, tokenizer = load_checkpoint(config.base, device), load_tokenizer(config.base)
    check_vocabulary(tokenizer, student, config.base)
    if config.gamma and (stage == "sft" or config.loss == "exact"):
        raise UserError("--gamma goes with `opct --loss sampled`: it discounts the KL of that")
    if config.batch * config.samples % size:
        raise UserError(f"{config.batch} x {config.samples} responses do not divide by {size}")
    teacher = copy.deepcopy(student).requires_grad_(False).eval()       # the run-start copy
    settings = run_settings(config, stage, teacher=weights_hash(teacher),
                            pairs_hash=hashlib.sha256(repr(records).encode()).hexdigest()[:16])
    records = controlled(records, config)
    room = student.config.max_position_embeddings - config.max_new_tokens
    clean, wrapped = (chat_all(tokenizer, [r[form] for r in records], room, config)
                      for form in ("clean", "wrapped"))     # each prompt `samples` times
    if not open_run(config.out, settings, tokenizer):
        return
    say(f"{stage} ({config.loss}): {len(records)} pairs, {config.steps} updates of "
        f"{config.batch} pairs with {config.samples} responses each on {device}")
    if stage == "sft":
        response, mask = offline_responses(teacher, clean, config)

    def step_of(step):
        rows = pairs_of_update(step, len(records), config)  # places in `clean`, one a response
        mine = rows[rank::size]                             # the rows of this process
        pairs = Pairs([clean[i] for i in mine], [wrapped[i] for i in mine])
        if stage == "sft":
            pairs.response, pairs.mask = response[mine], mask[mine]
            return sft_step(student, teacher, pairs, config)
        draws = generator(config.seed, "sampling", step)
        pairs.noise = torch.rand(len(rows), config.max_new_tokens, generator=draws)[rank::size]
        return opct_step(student, teacher, pairs, config)

    show_example(student, teacher, tokenizer, records, config)
    train(student, step_of, config, [torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)])
    assert weights_hash(teacher) == settings["teacher"], "the teacher changed during training"


@torch.no_grad()
def show_example(student, teacher, tokenizer, records, config):
    """Prints one pair, the student's response to its wrapped form, and the KL at each token."""
    record = next((r for r in records if r.get("fails")), records[0])
    clean, wrapped = [chat(tokenizer, record["clean"])], [chat(tokenizer, record["wrapped"])]
    response, mask = generate(student, wrapped, config.max_new_tokens,
                              generator=generator(config.seed, "example"))
    kl = reverse_kl(score(student, wrapped, response, mask), score(teacher, clean, response, mask))
    text = coloured([decode(tokenizer, [t]) for t in response[mask].tolist()], kl.tolist())
    say(f"  clean     {record['clean']}\n  wrapped   {record['wrapped']}\n  response  {text}")


def main():
    parser = Parser(description="Given again, a command goes on where it stopped.")
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, config, text in (
            ("pretrain", PretrainConfig, "the base model"),
            ("sft", ConsistencyConfig, "offline: the teacher's responses"),
            ("opct", ConsistencyConfig, "on-policy: the student's own responses")):
        add_flags(stages.add_parser(name, help=text, description=text), config)
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
