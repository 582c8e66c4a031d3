"""Plumbing of a run: its folder, its log, its state, the processes that share it."""
import fcntl
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.common import UserError, read_json, read_text, show, write_atomically, write_text
from support.report import progress
from support.tokenizer import save_tokenizer

# --- Processes ------------- -------------------------------------------------------------------


def processes():
    """(rank, number) of the processes that `torchrun` started, (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Prints, once for all processes."""
    if processes()[0] == 0:
        show(text)


def average(tensors):
    """Averages tensors over all processes, in place and in one message."""
    size = processes()[1]
    if size == 1:
        return
    message = torch.cat([t.flatten().float() for t in tensors])
    distributed.all_reduce(message)
    for t, mean in zip(tensors, (message / size).split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def join_processes():
    if processes()[1] > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend)


def leave_processes():
    """All is written by now. At an ordinary end a thread of gloo's sometimes aborts the process."""
    if processes()[1] > 1:
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


# --- Run folders: run.json says what a run is, state.safetensors is where it stands ------------


def run_settings(config, stage, **more):
    """What a run is: everything in run.json that the same command must repeat. Files are in it by
    their hashes, so another spelling of a path is the same run."""
    names = ("out", "device", "save_every", "base", "pairs", "world", "target")
    settings = {k: v for k, v in asdict(config).items() if k not in names}
    return {"stage": stage, **settings, **more}


IN_USE = {}                                                 # folder -> what holds its lock


def lock(folder):
    """Takes a folder for this process until it ends, however it ends. Raises UserError."""
    folder = Path(folder).resolve()
    if folder in IN_USE:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise UserError(f"{folder} is in use by another process: wait for its end, or choose "
                        "another folder") from error
    IN_USE[folder] = handle


def open_run(out, settings, tokenizer):
    """Prepares the folder of a run. Returns False where the run is finished already.

    Raises UserError where the folder holds another run, or anything but a run.
    """
    out = Path(out)
    others = [p for p in out.glob("*") if not p.name.startswith(".")]
    if others and not (out / "run.json").exists():
        raise UserError(f"{out} holds files but no run of ours: choose another --out")
    if processes()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        if not (out / "run.json").exists():
            write_text(out / "run.json", json.dumps(settings, indent=2) + "\n")
        for path in [*out.glob(".*.tmp"), *out.glob(".tmp*")]:  # of a run killed while it wrote
            path.unlink(missing_ok=True)
    average([torch.zeros(1)])       # the first process has written it
    before = read_json(out / "run.json", f"delete the folder {out} and start again")
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(f"{out} holds a run with {name} = {before.get(name)}, and this one "
                            f"has {value}: choose another --out (for an attack another "
                            "--seed), or delete that folder")
    if (out / "model.safetensors").exists():
        say(f"{out} is finished already, nothing to do")
        return False
    if processes()[0] == 0:
        save_tokenizer(tokenizer, out)
    return True


def weights_hash(model):
    """A hash of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_finite(model, step):
    """Raises UserError before weights that are no numbers are saved."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"the weights are not finite after step {step}: stopped, nothing was saved "
                        "of it; start again in another folder, with a smaller --lr")


def save_state(out, model, optimizers, step):
    """Weights, moments and step in one file, so that no kill can leave them of different steps."""
    require_finite(model, step)
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"{name}/weight"] = p.detach()
        for optimizer in optimizers:                        # each parameter belongs to one of them
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{name}/{key}"] = value
    metadata = {"next_step": str(step)}
    write_atomically(Path(out) / "state.safetensors",
                     lambda path: save_file(tensors, path, metadata=metadata))


def load_state(out, model, optimizers):
    """Puts back what `save_state` saved. Returns the step to go on from, 0 where there is none."""
    path = Path(out) / "state.safetensors"
    if not path.exists():
        return 0
    parameters = dict(model.named_parameters())
    hint = f"delete the folder {out} and start again"
    owner = {p: opt for opt in optimizers for p in opt.param_groups[0]["params"]}
    try:
        with safe_open(path, "pt", device=str(model.device)) as file, torch.no_grad():
            for key in file.keys():
                name, kind = key.rsplit("/", 1)
                p = parameters[name]
                if kind == "weight":
                    p.copy_(file.get_tensor(key))
                else:
                    owner[p].state[p][kind] = file.get_tensor(key)
            return int(file.metadata()["next_step"])
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {hint}") from error


class Log:
    """log.jsonl of a run, a line a step, and the progress on the screen. The first process
    writes for all; the others do nothing."""

    def __init__(self, config, start):
        self.out, self.steps, self.start, self.began = Path(config.out), config.steps, start, None
        self.first = processes()[0] == 0

    def __enter__(self):
        self.began = time.time()
        if self.start:
            say(f"  going on from step {self.start}")
        if self.first:              # what was logged after the last save will be logged again
            path = self.out / "log.jsonl"
            hint = f"delete the folder {self.out} and start again"
            lines = read_text(path, hint).splitlines(keepends=True) if self.start else []
            if len(lines) < self.start:
                raise UserError(f"{path} lacks steps that were saved: {hint}")
            write_text(path, "".join(lines[:self.start]))
            self.file = open(path, "a", buffering=1, encoding="utf-8")
        return self

    def __exit__(self, *error):
        if self.first:
            self.file.close()

    def write(self, step, means, tokens, seconds):
        if not self.first:
            return
        line = {"step": step, **means, "tokens": tokens, "seconds": round(seconds, 4)}
        self.file.write(json.dumps(line) + "\n")
        done = step + 1
        left = (time.time() - self.began) / (done - self.start) * (self.steps - done)
        shown = "  ".join(f"{name} {means[name]:.4f}" for name in means
                          if name not in ("grad_norm", "lr"))
        progress(done, self.steps, left, f"{shown}  {tokens / seconds:,.0f} tokens/s")

    def drop_state(self):
        (self.out / "state.safetensors").unlink(missing_ok=True)


def read_log(folder):
    """The lines of a run's log, none where there is no log. Raises UserError: damaged."""
    path = Path(folder) / "log.jsonl"
    hint = "delete it to go without the curve of this run"
    try:
        lines = read_text(path, hint).splitlines() if path.exists() else []
        return [dict(**json.loads(line)) for line in lines]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {hint}") from error
