"""What several tests need."""
import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from model import GPT, GPTConfig
from opct import log_probabilities, response_states
from support import run
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


# --- Commands without a new Python, which takes seconds to import torch ------------------------

def captured(call, argv):
    """Calls it with these arguments on the command line. Returns what subprocess.run would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", list(map(str, argv))):
            try:
                call()
            except SystemExit as stopped:
                code = stopped.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def run_here(*args):
    """Runs a command such as ("opct.py", "sft", ...) in this process."""
    main = importlib.import_module(Path(args[0]).stem).main
    return captured(lambda: guarded(main), args)


def run_script_here(*args):
    """As `python *args`, in this process: a script of the current folder, or -m and a module."""
    if args[0] != "-m":
        return captured(lambda: runpy.run_path(args[0], run_name="__main__"), args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # it was imported before
        return captured(lambda: runpy.run_module(args[1], run_name="__main__", alter_sys=True),
                        args[1:])


STAND_IN = """#!/bin/sh
[ "$1" = -c ] && exit           # are the packages there?
IFS=$(printf '\\t')
echo "$*" >> commands.txt
"""


def commands_of(folder, *args):
    """What `bash train.sh *args` in this folder has Python do: a list of argument lists. A stand-in
    for Python notes them and does nothing."""
    stand_in = folder / "bin/python3"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    done = subprocess.run(["bash", "train.sh", *args], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    lines = (folder / "commands.txt").read_text().splitlines()
    (folder / "commands.txt").unlink()
    return [line.split("\t") for line in lines]


class DoneHere:
    """Stands for a process of the pool: the command runs in this one, before anybody asks."""

    def __init__(self, argv, stdout, **more):
        assert argv[0] == sys.executable
        done = run_script_here(*argv[1:])
        stdout.write(done.stdout + done.stderr)
        self.returncode = done.returncode

    def poll(self):
        return self.returncode

    terminate = wait = poll


def fork_of(function, *args):
    """Starts function(*args) in a process of its own, forked from one that has imported torch and
    done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opct", "torch._dynamo"])   # every optimizer imports the second
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
        process = context.Process(target=function, args=args)
        process.start()
    return process


def fork(*args, environment=(), die_at=None):
    """Starts a command of opct.py in a process of its own, which kills itself when it has logged
    the step `die_at`."""
    return fork_of(in_a_fork, args, dict(environment), die_at)


def in_a_fork(args, environment, die_at):
    os.environ.update(environment)
    sys.stdout = open(os.devnull, "w")
    sys.argv, write = list(map(str, args)), run.Log.write

    def write_and_die(self, step, *more):
        write(self, step, *more)
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    run.Log.write = write_and_die
    guarded(importlib.import_module("opct").main)


def copy_of_the_repository(folder):
    """The code, for a command that writes to out/."""
    for name in ("data.py", "model.py", "opct.py", "eval.py", "train.sh"):
        shutil.copy(ROOT / name, folder)
    for name in ("support", "studies"):
        shutil.copytree(ROOT / name, folder / name)
