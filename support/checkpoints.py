"""Reads a checkpoint's folder: config.json and model.safetensors, ours or Hugging Face's."""
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from support.common import UserError, read_json

COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


def read_checkpoint(folder, families):
    """The config, with the defaults of Hugging Face filled in, and the weights: name -> tensor.

    Raises UserError: the folder is missing, damaged, or of a kind that is not computed here.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no finished checkpoint: it has no {name}")
    config = read_json(folder / "config.json", f"{folder} is damaged, get or make it again")
    try:
        open(folder / "model.safetensors", "rb").close()    # or the system's word is lost
        weights = load_file(folder / "model.safetensors")
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{folder} is damaged: {error}") from error
    # Old files carry the rotary frequencies, which follow from the config.
    weights = {name: t for name, t in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    refuse_other_kinds(folder, config, families)
    try:
        return filled(config, weights), weights
    except (ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        raise UserError(f"{folder} is damaged: {error}") from error


def refuse_other_kinds(folder, config, families):
    """What would change the function silently is refused: a wrong number is worse than none."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = "default"
    if isinstance(rope, dict):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
    if config.get("model_type") not in list(families):
        raise UserError(f"{folder}: model_type = {config.get('model_type')!r} is not computed here")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{folder}: hidden_act = {config['hidden_act']!r} is not computed here")
    if rope_type != "default":
        raise UserError(f"{folder}: rope_type = {rope_type!r} is not computed here")
    if isinstance(config.get("eos_token_id"), list):
        raise UserError(f"{folder}: eos_token_id = {config['eos_token_id']} is not computed here")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(name):
            raise UserError(f"{folder}: {name} = {config[name]} is not computed here")


def filled(config, weights):
    """The config with defaults and checks. Raises ValueError: a value makes no sense."""
    config = dict(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters = {rope!r}")
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config.setdefault("rms_norm_eps", 1e-6)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if not config.get("head_dim"):
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    for name in COUNTS:
        if type(config[name]) is not int or not 0 < config[name] < 2**24:
            raise ValueError(f"{name} = {config[name]!r}")
    for name in ("rms_norm_eps", "rope_theta"):
        if type(config[name]) not in (int, float) or not 0 < config[name] < math.inf:
            raise ValueError(f"{name} = {config[name]!r}")
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if config.get(name) is not None and type(config[name]) is not int:
            raise ValueError(f"{name} = {config[name]!r}")
    if config["head_dim"] % 2 or config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ValueError("the sizes of its heads do not divide")
    # As in transformers: an output layer that is stored and differs is not tied, whatever is said.
    tied = bool(config.get("tie_word_embeddings", "lm_head.weight" not in weights))
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if tied and head is not None and embedding is not None:
        tied = torch.equal(head, embedding)
    config["tie_word_embeddings"] = tied
    return config
