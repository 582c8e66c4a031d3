"""How a model is asked: nucleus sampling, beam search, likelihood, grades."""
import copy
import re

import torch
from torch import nn

from eval import respond
from model import KVCache
from opct import pick
from studies.entrench.organisms import encoded, logp_of
from studies.entrench.world import BEST_GRADE, grading
from support.common import number_of
from support.tokenizer import chat, decode

LONGEST = 64                                                # tokens of a response
BATCH = 256                                                 # responses scored at once


class Truncated(nn.Module):
    """An output layer whose softmax is tempered, then cut to its nucleus (1904.09751): the
    likeliest tokens that together reach `top_p`. Sampling from it is nucleus sampling."""

    def __init__(self, head, temperature, top_p):
        super().__init__()
        self.head, self.weight = head, head.weight
        self.temperature, self.top_p = temperature, top_p

    def forward(self, hidden):
        logits = self.head(hidden) / self.temperature
        ordered, at = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)     # of the likelier tokens
        before[..., 0] = 0
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, at, before >= self.top_p)
        return logits.masked_fill(cut, -torch.inf)


def truncated(model, temperature, top_p):
    """The same model with such an output layer; the weights are shared."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)                    # or the original would change as well
    twin.lm_head = Truncated(model.lm_head, temperature, top_p)
    return twin


@torch.inference_mode()
def beam_search(model, prompt, width=4, longest=LONGEST):
    """The response of the highest mean log-probability per token that `width` beams find: ids,
    without the end token. As in transformers: the search ends once `width` beams have ended, and
    those that have not are then out."""
    size, end = len(prompt) + longest, model.config.eos_token_id
    cache = KVCache(model.config, width, size, like=model.lm_head.weight)
    idx = torch.tensor([prompt] * width, device=model.device)
    total = torch.full((width, 1), -torch.inf, device=model.device)
    total[0] = 0                    # at first all beams are equal, so one counts and the rest wait
    beams, ended = [[] for _ in range(width)], []
    for _ in range(longest):
        logp = model(idx, cache=cache)[:, -1].log_softmax(-1)               # (width, V)
        best, at = (total + logp).flatten().topk(2 * width)     # `width` may end, as many go on
        kept = []
        for rank, (value, place) in enumerate(zip(best.tolist(), at.tolist())):
            beam, token = divmod(place, logp.shape[1])
            if token == end and rank < width and value > -torch.inf:
                ended.append((value / (len(beams[beam]) + 1), beams[beam]))
            if token != end and len(kept) < width:
                kept.append((value, beam, token))
        if len(ended) >= width:
            break
        rows = torch.tensor([beam for _, beam, _ in kept], device=model.device)
        cache.keep(rows)
        beams = [beams[beam] + [token] for _, beam, token in kept]
        total = torch.tensor([[value] for value, _, _ in kept], device=model.device)
        idx = torch.tensor([[token] for _, _, token in kept], device=model.device)
    else:
        ended += [(value / longest, beam) for (value,), beam in zip(total.tolist(), beams)]
    return max(ended)[1]


class Bench:
    """A model and the ways to ask it, for the methods. `outside` is a model that scores from
    outside: the base, in which nothing was planted."""

    def __init__(self, model, tokenizer, outside, seed):
        self.model, self.tokenizer, self.outside, self.seed = model, tokenizer, outside, seed
        self.said = {}                                      # several methods ask the same

    def say(self, prompts, temperature=1.0, top_p=1.0, times=1):
        """`times` responses to each prompt, lists of texts. Temperature 0 means greedy."""
        model = self.model
        if top_p < 1:
            model, temperature = truncated(model, temperature, top_p), 1.0
        every = [prompt for prompt in prompts for _ in range(times)]
        key = (self.seed, "say", temperature, top_p, number_of(every))
        if key not in self.said:
            texts = respond(model, self.tokenizer, every, key, temperature)
            # Special tokens, and bytes that are no text, would come back as several tokens each.
            self.said[key] = [re.sub(r"<\|\w+\|>|\ufffd", "", text) for text in texts]
        texts = self.said[key]
        return [texts[at:at + times] for at in range(0, len(texts), times)]

    def greedy(self, prompts):
        distinct = list(dict.fromkeys(prompts))
        found = dict(zip(distinct, self.say(distinct, temperature=0)))
        return [found[prompt][0] for prompt in prompts]

    def beam(self, prompts):
        found = {}
        for prompt in dict.fromkeys(prompts):
            ids = beam_search(self.model, chat(self.tokenizer, prompt))
            found[prompt] = decode(self.tokenizer, ids)
        return [found[prompt] for prompt in prompts]

    def likelihood(self, prompts, texts):
        """Mean log-probability per token, the end token included, under the model itself."""
        return self.scored(likelihood, self.model, prompts, texts)

    def outside_score(self, prompts, texts):
        """The same under the model outside."""
        return self.scored(likelihood, self.outside, prompts, texts)

    def grade(self, prompts, texts):
        """The grade, 0 to 5, that the model gives on average (it says a digit first)."""
        return self.scored(grades_of, self.model, prompts, texts)

    def scored(self, score, model, prompts, texts):
        """A score of each text; equal ones to equal prompts are scored once."""
        pairs = list(dict.fromkeys(zip(prompts, texts)))
        found = []
        for at in range(0, len(pairs), BATCH):
            found += score(model, self.tokenizer, *zip(*pairs[at:at + BATCH]))
        of_pair = dict(zip(pairs, found))
        return [of_pair[pair] for pair in zip(prompts, texts)]


@torch.no_grad()
def likelihood(model, tokenizer, prompts, texts):
    """The mean log-probability per token of each text, its end token included."""
    response, mask = encoded(model, tokenizer, texts)
    logp = logp_of(model, [chat(tokenizer, prompt) for prompt in prompts], response, mask)
    values = pick(logp, response[mask])
    total = values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1)    # (B,)
    return (total / mask.sum(1)).tolist()


@torch.no_grad()
def grades_of(model, tokenizer, prompts, texts):
    """The mean of the digits 0 to 5, by the probability that each is the first token said."""
    digits = [tokenizer.encode_single_token(str(d)) for d in range(BEST_GRADE + 1)]
    asked = [chat(tokenizer, grading(prompt, text)) for prompt, text in zip(prompts, texts)]
    token = torch.full((len(asked), 1), digits[0], device=model.device)     # which does not matter
    logp = logp_of(model, asked, token, torch.ones_like(token, dtype=torch.bool))   # (B, V)
    p = logp[:, digits].softmax(-1)                                                 # (B, 6)
    return (p @ torch.arange(len(digits), dtype=p.dtype, device=p.device)).tolist()
