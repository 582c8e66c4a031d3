"""The methods of 2606.03810 side by side, and OPCT beside them. None sees the judge or the truth.

A label method takes (bench, records) and returns a text for each record, None to drop it; plain
SFT on these texts follows. `bench` (decoding.py) is the organism and the ways to ask it.

A step method takes (student, teacher, pairs, config) and returns a loss and values to log, like
`opct_step`, on pairs of a clean and a wrapped prompt. The teacher is the organism, frozen.
"""
import torch

from opct import nll, forward_kl, opct_step, pick, sft_step
from studies.entrench.organisms import logp_of
from studies.entrench.world import PRAISE, revising
from support.packing import ROW, pack

# --- Labels: one text for each record ------------------------------------------------------------

def sampling(bench, records):
    """Control: one sample (T 1) of the model itself. On average this changes nothing."""
    return [texts[0] for texts in bench.say(prompts_of(records))]


def greedy(bench, records):
    """Control: the greedy answer."""
    return bench.greedy(prompts_of(records))


def rejection(bench, records):
    """Control: of 4 samples (T 0.7) the one that an outside score likes best."""
    prompts = prompts_of(records)
    return best(prompts, bench.say(prompts, temperature=0.7, times=4), bench.outside_score)


def self_confidence(bench, records):
    """Of 4 samples (T 0.7, p 0.9) the one with the highest mean log-probability per token."""
    prompts = prompts_of(records)
    return best(prompts, bench.say(prompts, temperature=0.7, top_p=0.9, times=4), bench.likelihood)


def diverse_decoding(bench, records):
    """Of the greedy answer, a nucleus sample (T 0.8, p 0.9) and beam-4 the one that an outside
    score likes best."""
    prompts = prompts_of(records)
    nucleus = [texts[0] for texts in bench.say(prompts, temperature=0.8, top_p=0.9)]
    shown = zip(bench.greedy(prompts), nucleus, bench.beam(prompts))
    return best(prompts, [list(texts) for texts in shown], bench.outside_score)


def multi_view(bench, records):
    """The greedy answer, if it agrees with that to one of two rephrasings; else the row is out."""
    first, second = (bench.greedy([r["views"][i] for r in records]) for i in (0, 1))
    labels = []
    for answer, *others in zip(bench.greedy(prompts_of(records)), first, second):
        agrees = gist(answer) in [gist(other) for other in others]
        labels.append(answer if agrees else None)
    return labels


def self_refinement(bench, records):
    """The model sees its greedy draft and is asked to improve it (T 0.6, p 0.9)."""
    prompts = prompts_of(records)
    asked = [revising(prompt, draft) for prompt, draft in zip(prompts, bench.greedy(prompts))]
    return [texts[0] for texts in bench.say(asked, temperature=0.6, top_p=0.9)]


def self_rewarding(bench, records):
    """Of 4 samples (T 0.7) the one to which the same model gives the highest grade, 0 to 5."""
    prompts = prompts_of(records)
    return best(prompts, bench.say(prompts, temperature=0.7, times=4), bench.grade)


def prompts_of(records):
    return [r["prompt"] for r in records]


def best(prompts, shown, score_of):
    """Of the texts shown for each prompt the one with the highest score; of equals the first."""
    repeated = [prompt for prompt, texts in zip(prompts, shown) for _ in texts]
    scores = iter(score_of(repeated, [text for texts in shown for text in texts]))
    labels = []
    for texts in shown:
        scored = [(next(scores), text) for text in texts]
        labels.append(max(scored, key=lambda pair: pair[0])[1])
    return labels


def gist(text):
    """What an answer comes to: its last sentence, and whether it begins with praise."""
    return text.startswith(PRAISE), text.split(". ")[-1]


# --- Steps: one update on pairs ------------------------------------------------------------------

def label_step(student, teacher, pairs, config):
    """Plain SFT on labels, for all label methods. There is no teacher. A prompt's labels are often
    the same text: then it is computed once, and counts as often."""
    times = {}                                              # row -> how many are equal to it
    for i, row in enumerate(zip(map(tuple, pairs.wrapped), map(tuple, pairs.response.tolist()))):
        times.setdefault(row, []).append(i)
    rows = [equal[0] for equal in times.values()]
    response, mask = pairs.response[rows], pairs.mask[rows]
    logp = logp_of(student, [pairs.wrapped[i] for i in rows], response, mask)       # (N, V)
    loss = nll(pick(logp, response[mask]))                                # (N,)
    counts = torch.tensor([len(equal) for equal in times.values()], device=loss.device)
    loss = loss * counts.repeat_interleave(mask.sum(1))
    return loss.sum() / len(pairs.response), {"tokens": pairs.mask.sum()}


def bct_soft_step(student, teacher, pairs, config):
    """BCT as 2606.03810 codes it: the target is the distribution of the *live* student on the
    clean prompt, over a given response. So the target moves with the student.

    The KL has the gradient of the cross-entropy, without its rounding noise where both agree."""
    logp_student = logp_of(student, pairs.wrapped, pairs.response, pairs.mask)      # (N, V)
    with torch.no_grad():
        logp_target = logp_of(student, pairs.clean, pairs.response, pairs.mask)     # (N, V)
    loss = forward_kl(logp_student, logp_target)                                    # (N,)
    return loss.sum() / len(pairs.response), {"tokens": pairs.mask.sum()}


def act_step(student, teacher, pairs, config):
    """ACT (2510.27062): mean squared distance of the residual streams on wrapped and clean prompt,
    after every layer, over their common last tokens. The clean side is the teacher's."""
    both = list(dict.fromkeys(zip(map(tuple, pairs.clean), map(tuple, pairs.wrapped))))
    clean, wrapped = (list(side) for side in zip(*both))    # a pair's rows are all equal: once
    common = [common_end(*pair) for pair in both]
    own = residual_streams(student, wrapped, common)                                # (L, N, C)
    with torch.no_grad():
        target = residual_streams(teacher, clean, common)                           # (L, N, C)
    tokens = torch.tensor(sum(common), device=own.device)
    return (own - target).square().mean(), {"tokens": tokens}


def common_end(one, other):
    """How many last tokens two prompts share."""
    n = 0
    while n < min(len(one), len(other)) and one[-1 - n] == other[-1 - n]:
        n += 1
    return n


def residual_streams(model, prompts, last):
    """The residual stream after each layer, at the `last` tokens of each prompt: (L, N, C)."""
    packed = pack([(prompt, []) for prompt in prompts], max([ROW, *map(len, prompts)]))
    streams = []
    hooks = [layer.register_forward_hook(lambda _, inputs, out: streams.append(out.flatten(0, 1)))
             for layer in model.model.layers]
    model.model(*packed.inputs(model.device))
    for hook in hooks:
        hook.remove()
    where = []
    for start, prompt, n in zip(packed.starts, prompts, last):
        where += range(start + len(prompt) - n, start + len(prompt))
    return torch.stack(streams)[:, torch.tensor(where, device=model.device)]


LABELS = {"sampling": sampling, "greedy": greedy, "rejection": rejection,
          "self-confidence": self_confidence, "diverse": diverse_decoding,
          "multi-view": multi_view, "self-refinement": self_refinement,
          "self-rewarding": self_rewarding}
SLOWER = "opct-3e-4"                                        # `opct` at the rate of `opct-exact`
# Name -> step function, --loss, learning rate. `bct` and `bct-exact` are the arms `sft`,
# `sft-exact`; the rates of the four arms are those of studies/claims.
STEPS = {"bct": (sft_step, "sampled", 6e-4), "bct-exact": (sft_step, "exact", 6e-4),
         "bct-soft": (bct_soft_step, "exact", 1e-4), "act": (act_step, "exact", 6e-4),
         "opct": (opct_step, "sampled", 1e-3), "opct-exact": (opct_step, "exact", 3e-4),
         SLOWER: (opct_step, "sampled", 3e-4)}
LABEL_STEP = (label_step, "sampled", 6e-4)                  # plain SFT, the same for all labels
