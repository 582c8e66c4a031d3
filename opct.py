"""
On-Policy Consistency Training (OPCT, arXiv 2605.21834) beside its offline baseline (SFT).

A contrastive pair is one request in two forms, `clean` x and `wrapped` x~ (see data.py). The
student pi_theta should behave on x~ as the teacher pi_0 behaves on x. The teacher is a frozen
copy of the model as it stood when training started.

    OPCT:  y ~ pi_theta(. | x~)         the student's own response, fresh at every update
           loss = sum_t KL( pi_theta(. | x~, y<t) || pi_0(. | x, y<t) )       reverse KL

    SFT:   y ~ pi_0(. | x)              the teacher's response, sampled once before training
           loss = sum_t -log pi_theta(y_t | x~, y<t)       in expectation the forward KL

One update of OPCT (`opct_step`, `train`):

    1. take some pairs and sample the student's responses to the wrapped prompts, at
       temperature 1 and without truncation;
    2. score each token of them with the student, after the wrapped prompt, with gradient;
    3. score the same tokens with the teacher, after the clean prompt;
    4. the loss is the KL at each token, summed over a response, averaged over responses;
    5. take one step of the optimizer.

There is no reward, no critic, no label, and no second update on the same samples.

Each method has two losses. `--loss sampled` uses the token that was sampled, as the paper and
plain SFT do. `--loss exact` uses the whole distribution, which has the same expected gradient
and less noise. `sft_step` and `opct_step` differ in whose response and which loss, no more.

    python opct.py pretrain --world W --out BASE
    python opct.py sft  --base BASE --pairs W/train.jsonl --out RUN [--loss sampled|exact]
    python opct.py opct --base BASE --pairs W/train.jsonl --out RUN [--loss sampled|exact]
"""
import argparse
import copy
import hashlib
import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from data import load_world
from model import ARCHITECTURES, GPT, GPTConfig, generate, load_checkpoint, save_checkpoint
from support.common import (UserError, add_flags, flag, generator, guarded, pick_device,
                            read_jsonl, rng)
from support.packing import ROW, pack, pack_responses
from support.runs import (Log, average, coloured, join_processes, leave_processes, load_state,
                          open_run, processes, run_settings, save_state, say, weights_hash)
from support.tokenizer import IM_END, PAD, chat, document_tokens, load_tokenizer, save_tokenizer

# --- Objectives: pure functions, one value a token. tests/test_gradients.py is about these -----


def reverse_kl(logp_student, logp_teacher):
    """KL(student || teacher) at each token, in nats: (N, V), (N, V) -> (N,). OPCT, exact.

    The prefix is held fixed: the gradient ignores that another token here leads to other tokens
    later (gamma = 0 below). 2605.21834.
    """
    p, q = logp_student.exp(), logp_teacher.exp()
    # `- p + q` sums to zero. Without it the gradient at agreement is rounding noise, and Adam
    # scales noise up to a full step.
    return (p * (logp_student - logp_teacher) - p + q).sum(-1)


def forward_kl(logp_student, logp_teacher):
    """KL(teacher || student) at each token, in nats: (N, V), (N, V) -> (N,). SFT, exact."""
    return reverse_kl(logp_teacher, logp_student)           # same formula, arguments swapped


def cross_entropy(logp_token):
    """-log pi_theta(y_t), in nats: (N,) -> (N,). SFT; in expectation forward_kl + constant."""
    return -logp_token


def advantage(logp_student, logp_teacher, mask, gamma=0.0):
    """A_t = -sum_{u >= t} gamma^(u-t) Delta_u, Delta_t = log pi_theta(y_t) - log pi_0(y_t).

    The KL estimate of the sampled token as a reward, so without gradient. gamma = 0 is the
    paper's choice: in expectation the gradient of `reverse_kl`. gamma = 1 gives the gradient of
    the KL between whole responses. 2605.21834, lambda = 1.

    Args: the log-probabilities of the N sampled tokens, (N,) and (N,); mask (B, T), which says
    where a response ends. Returns (N,).
    """
    delta = (logp_student - logp_teacher).detach()
    total = delta.new_zeros(mask.shape).masked_scatter(mask, delta)             # (B, T)
    for t in reversed(range(mask.shape[1] - 1)):
        total[:, t] += gamma * total[:, t + 1]
    return -total[mask]


def policy_gradient(logp_token, logp_sampled, advantage):
    """-ratio_t * A_t, ratio_t = pi_theta(y_t) / pi_sampled(y_t): (N,) -> (N,). OPCT, sampled.

    With one update a batch the sampler is the student: `logp_sampled` is logp_token.detach()
    and the ratio is 1, but the gradient flows through it. The gradient of
    log pi_theta - log pi_0 itself is zero in expectation.
    """
    return -(logp_token - logp_sampled).exp() * advantage


# --- The two methods, side by side. Each: pairs in, loss out -----------------------------------


@dataclass
class Pairs:
    """The pairs of one update: B prompts in tokens, each as often as it gets responses."""
    clean: list
    wrapped: list
    response: torch.Tensor | None = None    # sft: (B, T), sampled once before training
    mask: torch.Tensor | None = None        # sft: (B, T), True on the response
    noise: torch.Tensor | None = None       # opct: (B, max_new_tokens), decides the samples


def sft_step(student, teacher, pairs, config):
    """Offline: the teacher's responses, sampled once. Returns the loss and the values to log."""
    response, mask = pairs.response, pairs.mask                                     # (B, T)
    student_logp = score(student, pairs.wrapped, response, mask)                    # (N, V)
    with torch.no_grad():
        teacher_logp = score(teacher, pairs.clean, response, mask)                  # (N, V)
    kl = reverse_kl(student_logp.detach(), teacher_logp)                            # (N,)
    if config.loss == "exact":
        loss = forward_kl(student_logp, teacher_logp)
    else:
        loss = cross_entropy(pick(student_logp, response[mask]))
    return loss.sum() / len(response), {"kl_exact": kl, "tokens": mask.sum()}


def opct_step(student, teacher, pairs, config):
    """On-policy: the student's own responses, sampled at every update. Returns as above."""
    response, mask = generate(student, pairs.wrapped, config.max_new_tokens, noise=pairs.noise)
    student_logp = score(student, pairs.wrapped, response, mask)                    # (N, V)
    with torch.no_grad():
        teacher_logp = score(teacher, pairs.clean, response, mask)                  # (N, V)
    kl = reverse_kl(student_logp, teacher_logp)                                     # (N,)
    if config.loss == "exact":
        loss = kl
    else:
        own, other = pick(student_logp, response[mask]), pick(teacher_logp, response[mask])
        loss = policy_gradient(own, own.detach(), advantage(own, other, mask, config.gamma))
    return loss.sum() / len(response), {"kl_exact": kl.detach(), "tokens": mask.sum()}


# --- Scoring ---------------------------------------------------------------------------------


def hidden_states(model, packed):
    """The last hidden states of packed rows, flattened: (R * W, C)."""
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
    weight_decay: float = flag(0.1, "weight decay")
    seed: int = flag(0, "initialisation, documents and their order follow from it")
    save_every: int = flag(100, "steps between two saved states")
    device: str = flag(None, "cpu or cuda; the best there is")


@dataclass
class ConsistencyConfig:
    """Trains a base model for consistency on contrastive pairs."""
    base: str = flag("base", "the checkpoint to start from; the teacher is a frozen copy of it")
    pairs: str = flag("world/train.jsonl", "contrastive pairs, one JSON object a line")
    out: str = flag("run", "the folder for checkpoint and log")
    loss: str = flag("exact", "on the sampled token, or exact: on the whole distribution",
                     choices=["sampled", "exact"])
    gamma: float = flag(0.0, "opct --loss sampled: discount of later tokens' KL")
    control: str = flag("none", "clean: the student sees the clean prompts, too; shuffled: the "
                        "teacher sees those of other pairs", choices=["none", "clean", "shuffled"])
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

    All randomness follows from (seed, step), and the whole state is saved every `save_every`
    steps. So a run that was killed and started again ends with the same weights as an unbroken
    one: bit for bit on a CPU with the same number of threads.
    """
    model.train()
    start = load_state(config.out, model, optimizers)
    average([torch.zeros(1)])       # wait: all have read the state before one saves the next
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
                raise UserError(f"loss {means['loss']} and gradient norm {norm} at step {step}: "
                                f"stopped, {config.out} keeps what was saved before. Start again "
                                "in another folder, with a smaller --lr")
            rate = learning_rate(step, config)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            tokens = round(means.pop("tokens") * processes()[1])
            log.write(step, {**means, "grad_norm": norm, "lr": rate}, tokens, time.time() - began)
            if log.first and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                save_state(config.out, model, optimizers, step + 1)
    model.eval()
    if log.first:
        save_checkpoint(model, config.out)
        log.drop_state()


# --- Pretraining: next-token prediction on fresh documents of the world ------------------------


def pretraining_batch(world, tokenizer, random, rows):
    """Packed fresh documents. At 97 % of the room first-fit leaves none of them out."""
    groups, room = [], 0.97 * rows * ROW
    while room > 0:
        groups.append((document_tokens(tokenizer, *world.document(random)), []))
        room -= len(groups[-1][0])
    return pack(groups[:-1], max_rows=rows)


def new_model(config, tokenizer):
    torch.manual_seed(config.seed)
    special = tokenizer.encode_single_token
    return GPT(GPTConfig(
        model_type=config.family, vocab_size=tokenizer.n_vocab, hidden_size=config.width,
        intermediate_size=config.width * 11 // 4, num_hidden_layers=config.layers,
        num_attention_heads=config.width // 32, num_key_value_heads=config.width // 64,
        head_dim=32, eos_token_id=special(IM_END), pad_token_id=special(PAD)))


def pretrain(config):
    (rank, size), device = processes(), pick_device(config.device)
    world, tokenizer = load_world(config.world), load_tokenizer(config.world)
    if config.width % 64:
        raise UserError(f"--width {config.width}: it has to be a multiple of 64, two query heads "
                        "of 32 for each key head")
    if config.rows % size:
        raise UserError(f"--rows {config.rows} cannot be shared out evenly by {size} processes")
    if not open_run(config.out, run_settings(config, "pretrain", world=asdict(world.config))):
        return
    save_tokenizer(tokenizer, config.out)
    model = new_model(config, tokenizer).to(device)
    say(f"pretrain: {sum(p.numel() for p in model.parameters()):,} parameters, {config.steps} "
        f"steps of {config.rows * ROW:,} tokens on {device}")

    def step_of(step):
        packed = pretraining_batch(world, tokenizer, rng(config.seed, "pretrain", step),
                                   config.rows)
        count = (packed.next_tokens() >= 0).sum()
        mine = packed.rows(slice(rank, None, size))         # the rows of this process
        target = mine.next_tokens().flatten().to(device)
        logits = model.lm_head(hidden_states(model, mine))                          # (R * W, V)
        total = F.cross_entropy(logits, target, reduction="sum", ignore_index=-1)
        return total * size / count, {"tokens": (target >= 0).sum()}

    # Muon for the matrices, where it needs about a third of AdamW's steps here. The adjustment
    # gives both the same size of update, so one learning rate serves the two.
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    decay = config.weight_decay
    train(model, step_of, config, [
        torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=decay, fused=True)])


# --- Consistency training: the step function is all that SFT and OPCT differ in ----------------


def controlled(records, config):
    """The records of a control: no wrapped prompts, or clean prompts of other pairs."""
    if config.control == "clean":       # nothing to learn: what changes now, training itself does
        return [{**r, "wrapped": r["clean"]} for r in records]
    if config.control == "none":
        return records
    # Nothing to be consistent with. Each pair gets the clean prompt of the next in a random ring.
    out, ring = list(records), rng(config.seed, "shuffled").sample(range(len(records)),
                                                                   len(records))
    for i, j in zip(ring, ring[1:] + ring[:1]):
        out[i] = {**records[i], "clean": records[j]["clean"]}
    return out


def prompts_of(records, form, tokenizer, config, context):
    """One form of each record in tokens, as often as it gets responses."""
    out = []
    for number, record in enumerate(records, 1):
        prompt = chat(tokenizer, record[form])
        if len(prompt) > context - config.max_new_tokens:
            raise UserError(f"{config.pairs}, pair {number}: a prompt of {len(prompt)} tokens "
                            f"leaves no room for {config.max_new_tokens} new ones in the context "
                            f"of {context}: shorten it, or lower --max-new-tokens")
        out += [prompt] * config.samples
    return out


def rows_of_update(step, n, config):
    """The pairs in a new random order in every epoch, each with all its responses."""
    rows = []
    for at in range(step * config.batch, (step + 1) * config.batch):
        order = rng(config.seed, "epoch", at // n).sample(range(n), n)
        rows += [order[at % n] * config.samples + s for s in range(config.samples)]
    return rows


def offline_responses(teacher, clean, config):
    """The teacher's responses to all clean prompts and their mask: (N, max_new_tokens) each."""
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
    if config.gamma and (stage == "sft" or config.loss == "exact"):
        raise UserError("--gamma discounts the sampled token's KL: it goes with "
                        "`opct --loss sampled`")
    if config.batch * config.samples % size:
        raise UserError(f"{config.batch} pairs with {config.samples} responses cannot be shared "
                        f"out evenly by {size} processes")
    teacher = copy.deepcopy(student).requires_grad_(False).eval()       # the run-start copy
    teacher_hash = weights_hash(teacher)
    pairs_hash = hashlib.sha256(repr(records).encode()).hexdigest()[:16]
    if not open_run(config.out, run_settings(config, stage, teacher=teacher_hash,
                                             pairs_hash=pairs_hash)):
        return
    save_tokenizer(tokenizer, config.out)
    records = controlled(records, config)
    context = student.config.max_position_embeddings
    clean = prompts_of(records, "clean", tokenizer, config, context)
    wrapped = prompts_of(records, "wrapped", tokenizer, config, context)
    say(f"{stage} ({config.loss}): {len(records)} pairs, {config.steps} updates of "
        f"{config.batch} pairs with {config.samples} responses each on {device}")
    if stage == "sft":
        response, mask = offline_responses(teacher, clean, config)

    def step_of(step):
        rows = rows_of_update(step, len(records), config)
        mine = rows[rank::size]                             # the rows of this process
        pairs = Pairs([clean[i] for i in mine], [wrapped[i] for i in mine])
        if stage == "sft":
            pairs.response, pairs.mask = response[mine], mask[mine]
            return sft_step(student, teacher, pairs, config)
        noise = torch.rand(len(rows), config.max_new_tokens,
                           generator=generator(config.seed, "sampling", step))
        pairs.noise = noise[rank::size]
        return opct_step(student, teacher, pairs, config)

    example = next((r for r in records if r.get("fails")), records[0])
    show_example(student, teacher, tokenizer, example, config)
    train(student, step_of, config, [torch.optim.AdamW(
        student.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)])
    assert weights_hash(teacher) == teacher_hash, "the teacher changed during training"


@torch.no_grad()
def show_example(student, teacher, tokenizer, record, config):
    """Prints one pair, the student's response to its wrapped form, and the KL at each token."""
    clean, wrapped = [chat(tokenizer, record["clean"])], [chat(tokenizer, record["wrapped"])]
    response, mask = generate(student, wrapped, config.max_new_tokens,
                              generator=generator(config.seed, "example"))
    kl = reverse_kl(score(student, wrapped, response, mask), score(teacher, clean, response, mask))
    text = coloured([tokenizer.decode([t]) for t in response[mask].tolist()], kl.tolist())
    say(f"  clean     {record['clean']}\n  wrapped   {record['wrapped']}\n  response  {text}")


def main():
    parser = argparse.ArgumentParser(
        description="Pretrains the base model, or trains it for consistency, offline or on-policy. "
                    "The same command again goes on where a run was stopped.")
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
