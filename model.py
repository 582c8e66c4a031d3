"""A small GPT of the Llama shape: the model, its KV cache, the sampler, checkpoints.

    idx (B, T) -> embed_tokens -> [ x += self_attn(norm(x)); x += mlp(norm(x)) ] * layers
               -> norm -> lm_head -> logits (B, T, V)

RMSNorm (1910.07467), rotary positions (2104.09864), SwiGLU (2002.05202), grouped-query attention
(2305.13245). Config fields, modules and tensors have the names of Hugging Face's
`LlamaForCausalLM`: `transformers` opens a checkpoint of ours as it is, and `load_checkpoint` one
of theirs. Mistral is the same function as Llama. Qwen2 adds a bias to the query, key and value
projections, Qwen3 a norm to each query and key head. Llama 3.1 and later scale the rotary
frequencies. `Linear` is a linear layer that may have a LoRA adapter. No dropout: the teacher must
be the same function every time.

B batch, T tokens, S keys, V vocabulary, C hidden size, H query heads, K key/value heads,
D head size.
"""
import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoints import read_checkpoint, shapes, write_checkpoint
from support.common import UserError
from support.graph import DecodeGraph
from support.lora import Linear

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Prompts in one forward pass, fewer if long: enough to be fast, few enough for the memory.
PREFILL_ROWS = {"cpu": 64, "cuda": 1024}
# Check for finished rows every so many tokens: on a GPU a check waits for all queued work.
CHECK_EVERY = {"cpu": 1, "cuda": 16}


@dataclass
class GPTConfig:
    """The fields of Hugging Face's config.json that this model reads and writes back."""
    model_type: str = "llama"               # one of ARCHITECTURES
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352            # about 8/3 of hidden_size: SwiGLU has three matrices
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 256      # the context: longer inputs are refused
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # None, or rope_type llama3 and its numbers
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None  # each of them ends a response
    pad_token_id: int | None = None         # may be an end token: masks say what is padding

    @property
    def ends(self):
        """The ids that end a response: a tuple."""
        ids = () if self.eos_token_id is None else self.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(ids)


class KVCache:
    """Keys and values: (2, B, K, S, D) a layer, of which `length` columns are filled and the rest
    is zero: NaN would pass a mask. A `prefix` of one row is copied to the start of every row."""

    def __init__(self, config, batch, size, like, prefix=None):
        shape = (2, batch, config.num_key_value_heads, size, config.head_dim)
        self.layers = [torch.zeros(shape, dtype=like.dtype, device=like.device)
                       for _ in range(config.num_hidden_layers)]
        self.length = prefix.length if prefix else 0
        for mine, others in zip(self.layers, prefix.layers if prefix else []):
            mine[:, :, :, :self.length] = others

    def update(self, layer, k, v):
        """Adds k, v (B, K, T, D) and returns all that is filled: (B, K, length + T, D)."""
        keys, values = self.layers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def fill(self, rows, other, source, first):
        """Copies another cache's columns from `first` on (its rows `source`) to the end of `rows`.
        """
        start = self.length - other.length + first
        for mine, others in zip(self.layers, other.layers):
            mine[:, rows, :, start:self.length] = others[:, source, :, first:]

    def keep(self, rows):
        """Drops all but these rows (indices) of the batch; only what is filled moves."""
        for i, kv in enumerate(self.layers):
            kv[:, :len(rows), :, :self.length] = kv[:, rows, :, :self.length]
            self.layers[i] = kv[:, :len(rows)]


def llama3_frequency(frequency, scaling):
    """The rotary frequencies (D/2,) of Llama 3.1 and later; the same ones where scaling is None.

    The slow ones, which turn less than `low_freq_factor` times in the context of the first
    training, are slowed down by `factor`; the fast ones are kept; those between are in between.
    """
    if scaling is None:
        return frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling["factor"])


def rotate(x, cos, sin):
    """Rotary positions: x (B, T, heads, D), cos and sin (B, T, 1, D). Turns the pairs (i, i + D/2):
    (a, b) into (a cos - b sin, b cos + a sin). The first half of `sin` is negated."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        c, self.layer, self.head_dim = config, layer, config.head_dim
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        qkv_bias, self.qk_norm = c.model_type == "qwen2", c.model_type == "qwen3"
        self.q_proj = Linear(c.hidden_size, self.heads * self.head_dim, bias=qkv_bias)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = Linear(self.heads * self.head_dim, c.hidden_size, bias=False)
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=c.rms_norm_eps)

    def forward(self, x, rope, bias, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)        # (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)     # (B, T, K, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(torch.cat((q, k), 2), *rope).split((self.heads, self.kv_heads), 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, heads, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None,
                                               enable_gqa=True)
        else:   # few queries: one product for all heads that share keys takes a third less time
            k, v = cache.update(self.layer, k, v)                           # (B, K, S, D)
            score = q.reshape(B, self.kv_heads, -1, self.head_dim) @ k.mT   # (B, K, H/K * T, S)
            score = score.view(B, self.heads, T, -1).mul_(self.head_dim ** -0.5).add_(bias)
            y = score.softmax(-1).view(B, self.kv_heads, -1, k.shape[2]) @ v
            y = y.view(B, self.heads, T, self.head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))         # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, bias, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, bias, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the output layer; `GPT.model`, as in Hugging Face's files."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        exponent = -torch.arange(0, c.head_dim, 2, device="cpu") / c.head_dim
        frequency = llama3_frequency(c.rope_theta ** exponent, c.rope_scaling)  # (D/2,)
        self.register_buffer("frequency", frequency, persistent=False)

    def _apply(self, fn, recurse=True):
        """Keeps the frequencies in float32 in `model.to(dtype)`: positions multiply their error."""
        frequency = self.frequency
        super()._apply(fn, recurse)
        self.frequency = frequency.to(self.norm.weight.device)
        return self

    def forward(self, idx, positions=None, mask=None, cache=None):
        T = idx.shape[1]
        start = cache.length if cache is not None else 0
        if positions is None:
            if start + T > self.config.max_position_embeddings:
                raise ValueError(f"{start + T} tokens do not fit into the context of "
                                 f"{self.config.max_position_embeddings}")
            positions = torch.arange(start, start + T, device=idx.device)[None]
        x = self.embed_tokens(idx)                                              # (B, T, C)
        angle = positions[:, :, None, None] * self.frequency                    # (B, T, 1, D/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)            # (B, T, 1, D)
        # Over a cache the T new tokens see all that is filled and are causal among themselves.
        if mask is None and cache is not None:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=idx.device).tril(start)
        bias = None                                         # added to the scores in every layer
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        for layer in self.layers:
            x = layer(x, rope, bias, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {config.model_type!r} is none of {[*ARCHITECTURES]}")
        self.config = config
        self.origin = None                  # of a loaded checkpoint: what else it held
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init)
        # GPT-2's rule: the more layers add to the residual stream, the smaller each starts.
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, std=0.02 / (2 * config.num_hidden_layers) ** 0.5)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, idx, positions=None, mask=None, cache=None):
        """
        Args:
            idx: (B, T) token ids.
            positions: (B, T); by default the place in the row, behind what is cached.
            mask: bool, broadcastable to (B, H, T, S): True where a token may look. None: causal.
            cache: a KVCache, to which the T tokens are added; None in training.
        Returns logits (B, T, V). For few positions, give only their hidden states to `lm_head`.
        Raises ValueError: without explicit positions, more tokens than the context holds.
        """
        return self.lm_head(self.model(idx, positions, mask, cache))


# --- Sampling --------------------------------------------------------------------------------

def sample(logits, temperature, noise):
    """One token a row by inverting the cumulative distribution. Temperature 0, or next to it, means
    argmax.

    logits (B, V), noise (B,) uniform in [0, 1) -> (B,). One number of noise decides one token, so
    a row depends, but for the rounding of float sums, on nothing else in the batch.
    """
    if temperature < 1e-6:                  # logits divided by less could overflow
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))    # sums need the digits
    cdf = (logits / temperature).softmax(-1).cumsum_(-1)
    # Rounding may leave the last value under 1. Scaled to it, no noise falls off the end.
    token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp_(max=logits.shape[-1] - 1)


@dataclass
class SamplerState:
    """The rows still being sampled. Columns: shared prefix, padding, rest of prompt, response."""
    rows: torch.Tensor                      # (B,) the place of each among all responses
    noise: torch.Tensor                     # (B, max_new_tokens)
    padding: torch.Tensor                   # (B,) columns of padding
    visible: torch.Tensor                   # (B, S) bool: not padding
    ended: torch.Tensor                     # (B,) bool: the end token has been sampled
    cache: KVCache
    token: torch.Tensor | None = None       # (B,) the last one sampled
    graph: DecodeGraph | None = None        # on a GPU: the step for these rows


def generate(model, prompts, max_new_tokens, temperature=1.0, generator=None, noise=None):
    """Samples one response to each prompt, all at once. What a row is batched with does not matter.

    Args:
        prompts: a list of B lists of token ids.
        temperature: 1 samples what the model says, as training needs; 0 takes the likeliest.
        generator: a torch.Generator on the CPU (default: torch's); it decides the responses.
        noise: (B, max_new_tokens) uniform in [0, 1), instead of draws from the generator.
    Returns response (B, T) token ids and mask (B, T) bool, T <= max_new_tokens: True on the
    response, its end token included. A response cut at the limit is kept, without an end token.
    Raises ValueError: the longest prompt and the new tokens do not fit into the context.
    """
    if noise is None:
        noise = torch.rand(len(prompts), max_new_tokens, generator=generator)
    config, every = model.config, CHECK_EVERY[model.device.type]
    ends = torch.tensor(config.ends or (-1,), device=model.device)      # -1: nothing ends it
    response = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=model.device)
    with torch.inference_mode():        # as no_grad, but a single row takes a sixth less time
        state, logits = prefill(model, prompts, noise)
        for t in range(max_new_tokens):
            state.token = sample(logits, temperature, state.noise[:, t])
            state.ended = state.ended | torch.isin(state.token, ends)
            response[state.rows, t] = state.token
            if (t + 1) % every == 0:
                drop_ended(state)
            if t + 1 == max_new_tokens or len(state.rows) == 0:
                break
            logits = decode_step(model, state)
    end = torch.isin(response[:, :t + 1], ends)
    mask = end.cumsum(1) - end.long() == 0                  # no end token before this one
    return response[:, :t + 1].masked_fill(~mask, config.pad_token_id or 0), mask


def decode_step(model, state):
    """Adds the last token of each row to the cache. Returns the logits (B, V) of the next one."""
    if state.token.is_cuda:             # starting kernels one by one takes longer than they do
        state.graph = state.graph or DecodeGraph(model, state)
        return state.graph(state)
    column = state.cache.length
    positions = (column - state.padding)[:, None]
    mask = state.visible[:, None, None, :column + 1]
    return model(state.token[:, None], positions, mask, state.cache)[:, -1]


def drop_ended(state):
    """Drops the ended rows, but an eighth of them or more at a time: it copies the cache."""
    going = (~state.ended).nonzero().squeeze(1)
    if len(going) <= len(state.rows) - len(state.rows) / 8:
        state.cache.keep(going)
        state.graph = None
        for name in ("rows", "noise", "padding", "visible", "ended", "token"):
            setattr(state, name, getattr(state, name)[going])


def is_end(response, config):
    """Which token ids end a response: bool, of the same shape."""
    return torch.isin(response, response.new_tensor(config.ends))


# --- Prefill: what makes it right (padding, positions, mask) and what makes it fast -------------

def prefill(model, prompts, noise):
    """Runs the model over all prompts: returns a SamplerState and the logits (B, V) that follow.

    What all prompts begin with, such as a system message, is computed once. The rest goes sorted by
    length, some rows at a time, so short ones are not padded to the longest of all.
    """
    B, P, limit = len(prompts), max(map(len, prompts)), noise.shape[1]
    device, context = model.device, model.config.max_position_embeddings
    size = max(1, min(PREFILL_ROWS[device.type], 2**17 // P))
    if P + limit > context:
        raise ValueError(f"a prompt of {P} tokens and {limit} new ones do not fit into the "
                         f"context of {context}: shorten the prompt, or ask for fewer new tokens")
    first, like, logits = shared_prefix(prompts), model.lm_head.weight, []
    prefix = KVCache(model.config, 1, first, like)
    if first:
        model.model(torch.tensor([prompts[0][:first]], device=device), None, None, prefix)
    cache = KVCache(model.config, B, P + limit, like, prefix)
    cache.length = P
    order = sorted(range(B), key=lambda i: (len(prompts[i]), prompts[i]))
    for at in range(0, B, size):
        some = order[at:at + size]
        part, after, source = prefill_rows(model, prefix, [tuple(prompts[i][first:]) for i in some])
        cache.fill(slice(at, at + len(some)), part, source, first)
        logits.append(after[source])
    rows = torch.tensor(order, device=device)
    padding = torch.tensor([P - len(prompts[i]) for i in order], device=device)
    column = torch.arange(P + limit, device=device)
    visible = (column < first) | (column >= first + padding[:, None])
    ended = torch.zeros_like(rows, dtype=torch.bool)
    state = SamplerState(rows, noise.to(device)[rows], padding, visible, ended, cache)
    return state, torch.cat(logits)


def shared_prefix(prompts):
    """How many tokens all prompts begin with, such as a system message; not the last of any."""
    # In the order of a dictionary: what the first and the last begin with, all begin with.
    low, high = min(prompts), max(prompts)
    n, most = 0, min(map(len, prompts)) - 1
    while n < most and low[n] == high[n]:
        n += 1
    return n


def prefill_rows(model, prefix, rests):
    """Runs the model over some prompts, equal ones only once.

    prefix: a KVCache of what all begin with; rests: the tokens (tuples) that follow in each.
    Returns a KVCache of the b distinct ones, the logits (b, V), and each prompt's row in them (B,).
    """
    device, pad = model.device, model.config.pad_token_id or 0      # masked: any id will do
    distinct = {rest: i for i, rest in enumerate(dict.fromkeys(rests))}     # rest -> its row
    source = torch.tensor([distinct[rest] for rest in rests], device=device)
    width, first = max(map(len, rests)), prefix.length
    padding = torch.tensor([[width - len(rest)] for rest in distinct], device=device)
    idx = torch.tensor([(pad,) * (width - len(rest)) + rest for rest in distinct], device=device)
    column = torch.arange(width, device=device)
    positions = column - padding                                            # under 0: padding
    mask = (positions[:, None] >= 0) & (column <= column[:, None])          # (b, width, width)
    # Padding sees itself, or its softmax would be over nothing.
    mask |= torch.eye(width, dtype=torch.bool, device=device)
    mask = F.pad(mask, (first, 0), value=True)                              # all see the prefix
    cache = KVCache(model.config, len(distinct), first + width, model.lm_head.weight, prefix)
    hidden = model.model(idx, first + positions.clamp(min=0), mask[:, None], cache)
    return cache, model.lm_head(hidden[:, -1]), source


# --- Checkpoints: a folder with config.json and model.safetensors, and the tokenizer's files ----

def save_checkpoint(model, folder):
    """Writes config.json and model.safetensors, no weight rounded. A checkpoint that was loaded
    keeps the dtypes of what has not changed, and fields of its config that are not known here."""
    config = model.config
    ours = {"architectures": [ARCHITECTURES[config.model_type]], "hidden_act": "silu",
            "dtype": "float32", **asdict(config)}
    if config.model_type == "mistral":
        ours["sliding_window"] = None                       # transformers' default is a window
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]                       # the same tensor as the embedding
    write_checkpoint(folder, ours, weights, model.origin)


def load_checkpoint(folder, device="cpu", dtype="float32"):
    """A checkpoint as a GPT in eval mode. Memory holds one copy of the weights, in `dtype`.
    Raises UserError: the folder is missing, damaged or of a kind that is not computed here."""
    stored, weights, origin = read_checkpoint(folder, ARCHITECTURES, device, dtype)
    config = GPTConfig(**{f.name: stored[f.name] for f in fields(GPTConfig) if f.name in stored})
    with torch.device("meta"):                              # shapes alone, no memory
        model = GPT(config)
    if shapes(model.state_dict()) != shapes(weights):
        raise UserError(f"{folder}: weights and config.json do not belong together")
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.origin = origin
    return model.to(device).eval()
