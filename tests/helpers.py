"""What several tests need."""
import contextlib
import importlib
import io
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from model import GPT, GPTConfig
from opct import log_probabilities, response_states
from support.common import guarded

ROOT = Path(__file__).parent.parent


def tiny_gpt(vocab=7, family="llama", dtype=torch.float64, **changes):
    """Small enough to enumerate, with weights large enough that nothing is near uniform."""
    torch.manual_seed(1)
    config = dict(model_type=family, vocab_size=vocab, hidden_size=16, intermediate_size=24,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                  max_position_embeddings=64, eos_token_id=vocab - 2, pad_token_id=vocab - 1)
    model = GPT(GPTConfig(**{**config, **changes})).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=dtype) * 0.3)
    return model


def logp_of(model, prompts, response, mask):
    """log pi(. | prompt, y<t) at each response token: (N, V)."""
    return log_probabilities(model, response_states(model, prompts, response, mask))


def run_here(*args):
    """Runs a command such as ("opct.py", "sft", ...) in this process, since a new one takes seconds
    to import torch. Returns what subprocess.run would: returncode, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(Path(args[0]).stem).main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", list(map(str, args))):
            try:
                guarded(main)
            except SystemExit as stopped:
                code = stopped.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def copy_of_the_repository(folder):
    """The code, for a command that writes to out/."""
    for name in ("data.py", "model.py", "opct.py", "eval.py", "train.sh"):
        shutil.copy(ROOT / name, folder)
    for name in ("support", "studies"):
        shutil.copytree(ROOT / name, folder / name)
