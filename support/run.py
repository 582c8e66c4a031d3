"""Plumbing of a run: its folder, its settings, its state and its log."""
import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.common import UserError, read_json, read_text, write_atomically, write_text
from support.processes import average, processes, say
from support.report import progress
from support.tokenizer import save_tokenizer

# --- Run folders: run.json says what a run is, state.safetensors is where it stands ------------

def hash_of(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def run_settings(config, stage, **more):
    """What a run is: everything in run.json that the same command must repeat. Files are in it by
    their hashes, so another spelling of a path is the same run. So are the tokens of its prompts: a
    chat template may tell today's date."""
    names = ("out", "device", "save_every", "micro_batch", "base", "pairs", "world", "target")
    settings = {k: v for k, v in asdict(config).items() if k not in names}
    for name in {"pairs", "prompts"} & more.keys():
        more[name] = hash_of(more[name])
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
                            f"has {value}: choose another --out, or delete that folder")
    if (out / "model.safetensors").exists():
        say(f"{out} is finished already, nothing to do")
        return False
    if processes()[0] == 0:
        save_tokenizer(tokenizer, out)
    return True


def first_screen(stage, config, records, student, teacher):
    """What a run is going to do, and the memory that it needs at least."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = [p for p in student.parameters() if not p.requires_grad]
    frozen += [] if teacher is student else [*teacher.parameters()]
    size = 16 * trained + sum(p.numel() * p.element_size() for p in frozen)
    return (f"{stage} ({config.loss}): {len(records)} pairs, {config.steps} updates of "
            f"{config.batch} pairs with {config.samples} responses each on {student.device}\n"
            f"  {trained:,} parameters trained in float32, {sum(p.numel() for p in frozen):,} "
            f"frozen in {config.dtype}; learning rate {config.lr:g}\n  memory: {size / 1e9:.2f} GB "
            "for weights, gradients and optimizer, and what an update needs beside them")


def weights_hash(model):
    """A hash of a model: its config, and the names and values of all weights but an adapter's."""
    digest = hashlib.sha256(repr(asdict(model.config)).encode())
    for name, p in sorted(model.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode() + p.cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
        if not p.requires_grad:
            continue
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
    found = path.exists()
    average([torch.zeros(1)])       # a barrier: all look before one of them saves the next
    if not found:
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


def drop_state(out):
    (Path(out) / "state.safetensors").unlink(missing_ok=True)


# --- The log -----------------------------------------------------------------------------------

def add_sums(sums, values):
    """Adds (sum, count) of each value, so that micro-batches and processes average exactly."""
    for name, v in values.items():
        pair = torch.stack([v.sum().float(), torch.ones_like(v, dtype=torch.float32).sum()])
        sums[name] = sums.get(name, 0) + pair


def means_and_tokens(sums):
    """The means by name, and the number of tokens of all processes; `sums` is their average."""
    means = {name: (total / count).item() for name, (total, count) in sums.items()}
    means.pop("tokens")
    return means, round(sums["tokens"][0].item() * processes()[1])


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
        if step == self.start:
            say(f"  one update: {seconds:.2f} s, {self.steps - step} to go")
        done = step + 1
        left = (time.time() - self.began) / (done - self.start) * (self.steps - done)
        shown = "  ".join(f"{name} {means[name]:.4f}" for name in means
                          if name not in ("grad_norm", "lr"))
        progress(done, self.steps, left, f"{shown}  {tokens / seconds:,.0f} tokens/s")
