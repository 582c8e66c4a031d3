"""Reads, checks and writes the folder of a checkpoint, ours or Hugging Face's: config.json with
Hugging Face's defaults, and the files of weights."""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.common import UserError, read_json, write_atomically, write_text

COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
WINDOW = 4096           # the default of Mistral and Qwen
# What transformers takes where a config lacks the field. For other kinds it follows from the sizes.
DEFAULTS = {"mistral": {"num_key_value_heads": 8}, "qwen2": {"num_key_value_heads": 32},
            "qwen3": {"num_key_value_heads": 32, "head_dim": 128}}
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# --- Reading -----------------------------------------------------------------------------------

def read_checkpoint(folder, families, device, dtype):
    """Reads a folder, its weights straight into a dtype.

    Returns the config with Hugging Face's defaults filled in, the weights (name -> tensor), and
    the origin that `write_checkpoint` takes: config.json as it is, the dtype of each weight.
    Raises UserError: the folder is missing, damaged, or of a kind that is not computed here.
    """
    folder, hint = Path(folder), f"{folder} is damaged, get or make it again"
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; nothing is downloaded: `hf download NAME "
                        "--local-dir FOLDER` gets a model of the Hugging Face hub")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no finished checkpoint: it has no config.json")
    original = read_json(folder / "config.json", hint)
    generation = {}
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json", hint)
    files = files_of_weights(folder, hint)
    try:
        refuse_other_kinds(folder, original, families)
        config = filled(original, generation)
        weights, dtypes = read_weights(files, device, getattr(torch, dtype))
    except (SafetensorError, ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        raise UserError(f"{folder} is damaged: {error}") from error
    tie(config, weights)
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    if len(layers) != config["num_hidden_layers"]:  # a wrong one could build millions
        raise UserError(f"{folder}: weights and config.json do not belong together")
    return config, weights, {"config": original, "dtypes": dtypes}


def files_of_weights(folder, hint):
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        listed = read_json(index, hint).get("weight_map")
        names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{index} lists no files of weights: {hint}")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no finished checkpoint: it has no {name}")
    return [folder / name for name in names]


def read_weights(files, device, dtype):
    """The weights in a dtype, and the dtype in which each is stored: name -> tensor, -> dtype."""
    weights, dtypes = {}, {}
    for path in files:
        open(path, "rb").close()        # the system's own error says more than safetensors'
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith("rotary_emb.inv_freq"):    # only in old files
                    continue
                stored = file.get_tensor(name)
                if stored.dtype not in DTYPES:
                    raise UserError(f"{path}: {name} is {stored.dtype}, not computed here")
                weights[name], dtypes[name] = stored.to(device, dtype, copy=True), stored.dtype
    return weights, dtypes


def shapes(weights):
    return {name: t.shape for name, t in weights.items()}


def refuse_other_kinds(folder, config, families):
    """What would change the function silently is refused: a wrong number is worse than none."""
    def refuse(name, value):
        raise UserError(f"{folder}: {name} = {value!r} is not computed here")

    rope = rope_of(config)
    if config.get("model_type") not in list(families):
        refuse("model_type", config.get("model_type"))
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"])
    if rope.get("rope_type") not in ("default", "llama3"):
        refuse("rope_type", rope.get("rope_type"))
    if rope.get("partial_rotary_factor") not in (None, 1):
        refuse("partial_rotary_factor", rope["partial_rotary_factor"])
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name):
            refuse(name, config[name])
    if not config.get("is_causal", True):
        refuse("is_causal", config["is_causal"])
    if has_sliding_window(config):
        refuse("sliding_window", config.get("sliding_window", WINDOW))


def has_sliding_window(config):
    """Qwen's configs name a window even where it is off; in Mistral's a named window is on."""
    if config["model_type"] == "mistral":
        return config.get("sliding_window", WINDOW) is not None
    if config.get("layer_types"):
        return set(map(str, config["layer_types"])) != {"full_attention"}
    if not (config.get("use_sliding_window") and config.get("sliding_window", WINDOW)):
        return False
    # As in transformers: the layers from this one on have the window.
    return config.get("max_window_layers", 28) < config["num_hidden_layers"]


def rope_of(config):
    """How the rotary positions are computed: `rope_parameters` holds all of it since transformers
    5, before that `rope_scaling` held all but `rope_theta`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        rope = {"rope_type": rope}
    outer = {name: config[name] for name in ("rope_theta", "partial_rotary_factor")
             if config.get(name) is not None}
    if any(isinstance(value, dict) for value in rope.values()):     # one for each kind of layer
        rope = {"rope_type": rope}
    return {"rope_theta": 10000.0, "rope_type": rope.get("type", "default"), **outer, **rope}


def filled(original, generation):
    """The config with defaults and checks. Raises ValueError: a value makes no sense."""
    config = {**DEFAULTS.get(original["model_type"], {}), **original}
    rope = rope_of(original)
    config.setdefault("rms_norm_eps", 1e-6)
    config["rope_theta"], config["rope_scaling"] = rope["rope_theta"], None
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if not config.get("head_dim"):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    for name in COUNTS:
        if type(config[name]) is not int or not 0 < config[name] < 2**24:
            raise ValueError(f"{name} = {config[name]!r}")
    for name in ("rms_norm_eps", "rope_theta"):
        require_positive(name, config[name])
    if config["head_dim"] % 2 or config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ValueError("the sizes of its heads do not divide")
    if rope["rope_type"] == "llama3":
        name = "original_max_position_embeddings"           # in transformers 5 the outer one counts
        rope[name] = config.get(name, rope.get(name, config["max_position_embeddings"]))
        for name in LLAMA3:
            require_positive(name, rope.get(name))
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        config["rope_scaling"] = {"rope_type": "llama3", **{name: rope[name] for name in LLAMA3}}
    ends = dict.fromkeys(ids_of(config, "eos_token_id") + ids_of(generation, "eos_token_id"))
    config["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends), None)
    pads = [i for i in ids_of(config, "pad_token_id") if 0 <= i < config["vocab_size"]]
    config["pad_token_id"] = pads[0] if pads else None      # old files have -1
    ids_of(config, "bos_token_id")
    return config


def require_positive(name, value):
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{name} = {value!r}")


def ids_of(config, name):
    """The token ids of a field that holds one, several or none: a list."""
    value = config.get(name)
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None]
    if any(type(i) is not int or not -2**24 < i < 2**24 for i in ids):
        raise ValueError(f"{name} = {value!r}")
    return ids


def tie(config, weights):
    """Settles whether output layer and embedding are one tensor, which a file may hold once.

    As in transformers: a stored output layer that differs is not tied, whatever the config says.
    """
    tied = bool(config.get("tie_word_embeddings", HEAD not in weights))
    if tied and HEAD in weights and EMBEDDING in weights:
        tied = torch.equal(weights[HEAD], weights[EMBEDDING])
    if tied:
        for one, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if one in weights:
                weights[other] = weights[one]
    config["tie_word_embeddings"] = tied


# --- Writing -----------------------------------------------------------------------------------

def write_checkpoint(folder, config, weights, origin):
    """Writes the config first and the weights last: where they are, the checkpoint is whole.

    With the origin of a checkpoint that was read, its config is kept, and the dtype of each weight
    that it can hold without rounding: after training it cannot, since bfloat16 would take back
    most of a small update. Fields that several files or tensors decide are written as decided.
    """
    folder = Path(folder)
    if any(".lora_" in name for name in weights):
        raise ValueError("call merge_lora before a checkpoint is saved")
    if origin is not None:
        settled = {name: config[name] for name in ("eos_token_id", "tie_word_embeddings")}
        config, before = {**origin["config"], **settled}, origin["dtypes"]
        weights = {name: exactly(t, before.get(name, t.dtype)) for name, t in weights.items()}
        if any(t.dtype != before.get(name, t.dtype) for name, t in weights.items()):
            names = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}   # the new and the old
            config |= dict.fromkeys(names, "float32")
    weights = {name: t.contiguous() for name, t in weights.items()}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_atomically(folder / "model.safetensors",
                     lambda path: save_file(weights, path, metadata={"format": "pt"}))


def exactly(weight, dtype):
    """The weight in this dtype, if that holds it to the bit, else as it is."""
    rounded = weight.to(dtype)
    return rounded if torch.equal(rounded.to(weight.dtype), weight) else weight
