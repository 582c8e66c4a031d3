"""
A small GPT of the Llama shape: the model, its KV cache, the sampler, checkpoints.

    idx (B, T) -> embed_tokens -> [ x += self_attn(norm(x)); x += mlp(norm(x)) ] * layers -> norm -> lm_head -> logits (B, T, V)

RMSNorm (1910.07467), rotary positions (2104.09864), SwiGLU (2002.05202), grouped-query attention (2305.13245). Config
fields, modules and tensors carry the names of Hugging Face's `LlamaForCausalLM`, so `transformers` opens a checkpoint
of ours as it is, and `load_checkpoint` one of theirs. Two booleans make the other families: Qwen2 adds a bias to the query,
key and value projections, Qwen3 a norm to each query and key head. No dropout: the teacher must be the same function every
time.

B batch, T tokens, S keys, V vocabulary, C hidden size, H query heads, K key/value heads, D head size.
"""
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

PREFILL_ROWS = 64           # rows that are prefilled at a time: enough for the matrices, few enough for the processor's cache
LOOK_EVERY = {"cpu": 1, "cuda": 16}     # tokens between two looks at who has ended: on a GPU a look waits for all that is queued


class CannotRun(Exception):
    """A checkpoint that is missing, cut off or of a kind that this model does not compute, or a device that is not there."""


@dataclass
class GPTConfig:
    """The fields of Hugging Face's config.json that this model reads; all of them are written back."""
    model_type: str = "llama"               # llama, qwen2 or qwen3
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352            # about 8/3 of hidden_size: SwiGLU has three matrices where an MLP has two
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 256      # the context: longer inputs are refused
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None         # ends a response
    pad_token_id: int | None = None         # an id of its own: where pad is eos, masks lose the end token

    @property
    def qkv_bias(self):
        return self.model_type == "qwen2"

    @property
    def qk_norm(self):
        return self.model_type == "qwen3"


class KVCache:
    """Keys and values, preallocated: a tensor (2, B, K, S, D) a layer, of whose S columns `length` are filled."""

    def __init__(self, config, batch, size, like):
        c = config
        shape = (2, batch, c.num_key_value_heads, size, c.head_dim)
        self.layers = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(c.num_hidden_layers)]
        self.length = 0

    def update(self, layer, k, v):
        """Writes k, v (B, K, T, D) behind what is there and returns all that is filled: (B, K, length + T, D)."""
        keys, values = self.layers[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def fill(self, rows, other, source):
        """Makes these rows (a slice) the rows `source` of another cache, which end in the same column; zeros in front."""
        start = self.length - other.length
        for mine, others in zip(self.layers, other.layers):
            mine[:, rows, :, :start] = 0                    # masked, but a NaN left in memory would come through the mask
            mine[:, rows, :, start:self.length] = others[:, source]

    def keep(self, rows):
        """Drops all but these rows (indices) of the batch; only what is filled moves."""
        for i, kv in enumerate(self.layers):
            kv[:, :len(rows), :, :self.length] = kv[:, rows, :, :self.length]
            self.layers[i] = kv[:, :len(rows)]


def rotate(x, cos, sin):
    """Rotary positions: x (B, T, heads, D), cos and sin (B, T, 1, D). Pairs i with i + D/2, as Hugging Face does.

    The first half of `sin` is negative: (a, b) turns into (a cos - b sin, b cos + a sin).
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        c, self.layer = config, layer
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=False)
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=c.rms_norm_eps)

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)        # (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)     # (B, T, K, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(torch.cat((q, k), 2), *rope).split((self.heads, self.kv_heads), 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                       # (B, heads, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        else:       # few queries: written out, the heads that share keys as one matrix, this takes two thirds of the time
            k, v = cache.update(self.layer, k, v)                                               # (B, K, S, D), all so far
            score = q.reshape(B, self.kv_heads, -1, self.head_dim) @ k.mT                       # (B, K, H/K * T, S)
            score = score.view(B, self.heads, T, -1).mul_(self.head_dim ** -0.5).add_(mask)
            y = (score.softmax(-1).view(B, self.kv_heads, -1, k.shape[2]) @ v).view(B, self.heads, T, self.head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))         # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the output layer; `GPT.model`, as in Hugging Face's files."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.arange(c.max_position_embeddings)[:, None] * frequency            # (context, D/2)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), 1), persistent=False)     # (context, D)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), 1), persistent=False)

    def forward(self, idx, positions=None, mask=None, cache=None):
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if positions is None:
            if start + T > self.config.max_position_embeddings:
                raise ValueError(f"{start + T} tokens do not fit into the context of {self.config.max_position_embeddings}")
            positions = torch.arange(start, start + T, device=idx.device).expand(B, T)
        x = self.embed_tokens(idx)                                                      # (B, T, C)
        rope = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)       # (B, T, 1, D)
        # Causal by default; over a cache the T new tokens see all that is filled and, among themselves, what is before them.
        if mask is None and cache is not None:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=idx.device).tril(start)
        if mask is not None:                                # what is added to the scores, once for all layers
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type is {config.model_type!r}; this model computes {', '.join(ARCHITECTURES)}")
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init)
        # GPT-2's rule: what is added to the residual stream starts smaller, the more layers add to it.
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
            positions: (B, T), each below max_position_embeddings; by default the place in the row, behind what is cached.
            mask: bool, broadcastable to (B, H, T, S): True where a token may look. None means causal.
            cache: a KVCache, to which the T tokens are added; None in training.
        Returns:
            logits (B, T, V). Where only some positions matter, call `model.model` and put just those through `lm_head`.
        Raises:
            ValueError: without explicit positions, more tokens than the context holds.
        """
        return self.lm_head(self.model(idx, positions, mask, cache))


# --- Sampling ---------------------------------------------------------------------------------------------------------------

def sample(logits, temperature, noise):
    """One token a row by inverting the cumulative distribution: logits (B, V), noise (B,) uniform in [0, 1) -> (B,).

    One number of noise decides one token, so a row's tokens depend on its own noise and, but for the rounding of float
    sums, on nothing else in the batch.
    Temperature 0 means argmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum_(-1)
    # Where rounding leaves the last value under 1, noise above it must not fall off the end: scale it to what is there.
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def prefill(model, prompts, size, pad):
    """Runs the model over prompts in the order of their lengths, for `generate`, some rows at a time, so that short prompts are
    not padded to the longest of all, and equal ones among them only once.

    Returns:
        a KVCache of `size` columns, each row ending in the same one, and the logits (B, V) of what follows each prompt.
    """
    config, device = model.config, model.device
    cache = KVCache(config, len(prompts), size, like=model.lm_head.weight)
    cache.length, logits = len(prompts[-1]), []
    for first in range(0, len(prompts), PREFILL_ROWS):
        some = [tuple(p) for p in prompts[first:first + PREFILL_ROWS]]
        distinct = {p: i for i, p in enumerate(dict.fromkeys(some))}                    # prompt -> its row, b of them
        source = torch.tensor([distinct[p] for p in some], device=device)
        width = len(some[-1])
        idx = torch.tensor([(pad,) * (width - len(p)) + p for p in distinct], device=device)            # (b, width)
        column = torch.arange(width, device=device)
        positions = column - torch.tensor([[width - len(p)] for p in distinct], device=device)          # under 0: padding
        sees = (positions[:, None] >= 0) & (column <= column[:, None])                  # (b, width, width): causal
        sees |= torch.eye(width, dtype=torch.bool, device=device)   # padding sees itself, or its softmax would be over nothing
        part = KVCache(config, len(distinct), width, like=model.lm_head.weight)
        hidden = model.model(idx, positions.clamp(min=0), sees[:, None], part)
        logits.append(model.lm_head(hidden[:, -1])[source])
        cache.fill(slice(first, first + PREFILL_ROWS), part, source)
    return cache, torch.cat(logits)


def generate(model, prompts, max_new_tokens, temperature=1.0, generator=None, noise=None):
    """Samples one response to each prompt, all at once.

    Prompts of different lengths are padded on the left, so that all rows write the same cache column; positions count
    from each prompt's first token and the mask hides the padding, so no row can tell what it was batched with. Inside, the
    rows are in the order of their prompts' lengths, equal prompts side by side, and those that have ended leave.

    Args:
        prompts: a list of B lists of token ids.
        temperature: 1 samples what the model says (training needs that, see `opct.py`); 0 takes the likeliest token.
        generator: a torch.Generator on the CPU; the same state gives the same responses.
        noise: (B, max_new_tokens) uniform in [0, 1), instead of what would be drawn from the generator.
    Returns:
        response (B, R) token ids and mask (B, R) bool, R <= max_new_tokens: True on the response, its end token
        included, False on the padding behind it. A response cut at the limit is kept, without an end token.
    Raises:
        ValueError: the longest prompt and the new tokens do not fit into the context.
    """
    config, device = model.config, model.device
    B, P = len(prompts), max(map(len, prompts))
    if P + max_new_tokens > config.max_position_embeddings:
        raise ValueError(f"a prompt of {P} tokens and {max_new_tokens} new ones do not fit into the context of "
                         f"{config.max_position_embeddings}: shorten the prompt, or ask for fewer new tokens")
    end = -1 if config.eos_token_id is None else config.eos_token_id                    # -1: no token ends a response
    pad = config.pad_token_id or 0                                                      # masked, so any id will do
    order = sorted(range(B), key=lambda i: (len(prompts[i]), prompts[i]))
    rows = torch.tensor(order, device=device)
    noise = (torch.rand(B, max_new_tokens, generator=generator) if noise is None else noise).to(device)[rows]
    response = torch.full((B, max_new_tokens), end, device=device)

    # Decode. `rows` are the responses still in the batch; the other tensors here, and the cache, hold just these.
    with torch.inference_mode():                # no_grad, and less to do at each operation: saves a single row a sixth of its time
        cache, logits = prefill(model, [prompts[i] for i in order], P + max_new_tokens, pad)
        padding = torch.tensor([P - len(prompts[i]) for i in order], device=device)
        visible = torch.arange(P + max_new_tokens, device=device) >= padding[:, None]   # (B, S): not padding
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            token = sample(logits, temperature, noise[:, t])
            response[rows, t] = token
            ended = ended | (token == end)
            if t + 1 == max_new_tokens:
                break
            if (t + 1) % LOOK_EVERY.get(device.type, 1) == 0:
                going = (~ended).nonzero().squeeze(1)
                if len(going) == 0:
                    break
                # Leaving costs a copy of the cache, so rows leave an eighth of the batch at a time; until then they idle in it.
                if len(going) <= len(rows) - len(rows) / 8:
                    rows, token, noise, padding, visible, ended = (x[going] for x in (rows, token, noise, padding, visible, ended))
                    cache.keep(going)
            hidden = model.model(token[:, None], (P + t - padding)[:, None], visible[:, None, None, :P + t + 1], cache)
            logits = model.lm_head(hidden[:, -1])

    # What idle rows wrote behind their end is padding, as is what was never written.
    response = response[:, :t + 1]
    is_end = response == end
    mask = is_end.cumsum(1) - is_end.long() == 0                                        # no end before this token
    return response.masked_fill(~mask, pad), mask


# --- Checkpoints: a folder with config.json and model.safetensors (and the tokenizer, which `data.py` writes) ---------------

def write_atomically(path, write):
    """Calls write(temporary path), then renames: whoever looks at `path` sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:                        # how safetensors reports a full or read-only disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(model, folder):
    """Writes the config first and the weights last: where the weights are, the checkpoint is whole."""
    config = {"architectures": [ARCHITECTURES[model.config.model_type]], "hidden_act": "silu", "dtype": "float32",
              **asdict(model.config)}
    write_atomically(Path(folder) / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]                       # the same tensor as the embedding
    write_atomically(Path(folder) / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))


def load_checkpoint(folder, device="cpu"):
    """Opens a checkpoint of ours, or one of Hugging Face's in a single file, as a GPT in eval mode and float32.

    Raises:
        CannotRun: it is missing, cut off, or asks for something that this model does not compute.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CannotRun(f"{folder} is no finished checkpoint: it has no {name}")
    try:
        stored = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
        config = GPTConfig(**{f.name: stored[f.name] for f in fields(GPTConfig) if f.name in stored})
        config.rope_theta = rope.get("rope_theta", config.rope_theta)
        config.head_dim = stored.get("head_dim") or config.hidden_size // config.num_attention_heads
        config.tie_word_embeddings = stored.get("tie_word_embeddings", "lm_head.weight" not in weights)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        # What would change the function silently is refused: a wrong number is worse than none.
        asks = {"model_type": (config.model_type in ARCHITECTURES, config.model_type),
                "hidden_act": (stored.get("hidden_act", "silu") == "silu", stored.get("hidden_act")),
                "rope_type": (rope_type == "default", rope_type),
                "eos_token_id": (not isinstance(config.eos_token_id, list), config.eos_token_id),
                "attention_bias": (not stored.get("attention_bias"), True), "mlp_bias": (not stored.get("mlp_bias"), True),
                "use_sliding_window": (not stored.get("use_sliding_window"), True)}
        for name, (known, value) in asks.items():
            if not known:
                raise CannotRun(f"{folder}: {name} = {value!r} is not computed here")
        model = GPT(config)
    except (ValueError, TypeError, RuntimeError, SafetensorError, AttributeError) as error:
        raise CannotRun(f"{folder} is damaged: {error}") from error
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight")
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise CannotRun(f"{folder}: weights and config.json do not belong together: {error}") from error
    return model.to(device).eval()


def pick_device(name=None):
    """The device of that name, by default CUDA where there is one. Called after the arguments are parsed, never at import."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise CannotRun(f"--device {name}: there is no such kind of device; choose cpu or cuda") from error
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:    # torchrun: a device for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotRun("--device cuda: no CUDA device is to be seen here; leave the flag out to run on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CannotRun(f"{device} is not there, of {torch.cuda.device_count()}: one process for each, or --device cpu")
    return device
