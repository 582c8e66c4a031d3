"""Plumbing of a run: its folder, its log, its state, the processes that share it, progress."""
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

from support.common import UserError, read_json, rng, write_atomically, write_text

# --- Progress and processes ------------------------------------------------------------------


def progress(done, total, left, text):
    """On a terminal one line that renews itself; in a file a line every twentieth of the way."""
    line = f"  {done}/{total}  {text}  {int(left) // 60}:{int(left) % 60:02d} left"
    if sys.stdout.isatty():
        print(f"\r{line}\033[K", end="\n" if done == total else "", flush=True)
    elif done == total or done * 20 // total != (done - 1) * 20 // total:
        print(line, flush=True)


def processes():
    """(rank, number) of the processes that `torchrun` started, (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text):
    """Prints, once for all processes."""
    if processes()[0] == 0:
        print(text, flush=True)


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


# --- Run folders: run.json says what a run is, state.safetensors is where it stands -----------


def run_settings(config, stage, **more):
    """What a run is: everything in run.json that the same command must repeat."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "device", "save_every")}
    return {"stage": stage, **settings, **more}


def open_run(out, settings):
    """Prepares the folder of a run. Returns False where the run is finished already.

    Raises UserError where the folder holds another run.
    """
    out = Path(out)
    if (out / "run.json").exists():
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
        write_text(out / "run.json", json.dumps(settings, indent=2) + "\n")
    return True


def weights_hash(model):
    """A hash of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_state(out, model, optimizers, step):
    """Weights, moments and step in one file, so that no kill can leave them of different steps."""
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
    except SafetensorError as error:
        hint = f"delete the folder {out} and start again"
        raise UserError(f"{path} is damaged ({error}): {hint}") from error


def controlled(records, config):
    """The records of a control: no wrapped prompts, or clean prompts of other pairs."""
    if config.control == "clean":       # nothing to learn: what changes now, training itself does
        return [{**r, "wrapped": r["clean"]} for r in records]
    if config.control == "none":
        return records
    # Nothing to be consistent with. Each pair gets the clean prompt of the next in a random ring.
    n, out = len(records), list(records)
    ring = rng(config.seed, "shuffled").sample(range(n), n)
    for i, j in zip(ring, ring[1:] + ring[:1]):
        out[i] = {**records[i], "clean": records[j]["clean"]}
    return out


def pairs_of_update(step, n, config):
    """The rows of an update: of n pairs in a new random order in every epoch, each with all its
    responses, which stand side by side."""
    orders, rows = {}, []
    for at in range(step * config.batch, (step + 1) * config.batch):
        epoch = at // n
        if epoch not in orders:
            orders[epoch] = rng(config.seed, "epoch", epoch).sample(range(n), n)
        first = orders[epoch][at % n] * config.samples
        rows += range(first, first + config.samples)
    return rows


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
            kept = path.read_text().splitlines(keepends=True)[:self.start] if self.start else []
            write_text(path, "".join(kept))
            self.file = open(path, "a", buffering=1)
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


def coloured(texts, nats):
    """Tokens in a line, marked by their KL: by colour on a terminal, else in brackets."""
    if sys.stdout.isatty():
        marks = [[32, 33, 31][(x >= 0.1) + (x >= 1)] for x in nats]
        line = "".join(f"\033[{mark}m{text}\033[0m" for text, mark in zip(texts, marks))
        key = "green under 0.1, yellow under 1, red from 1 nat"
    else:
        line = "".join(f"{text}[{x:.1f}]" if x >= 0.1 else text for text, x in zip(texts, nats))
        key = "in brackets from 0.1 nats"
    return f"{line}\n            (KL of student and teacher at each token: {key})"
