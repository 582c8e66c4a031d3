"""
Plumbing: errors, flags, seeded random numbers, files, progress, processes, devices, run folders.

Nothing here is about the method. A first reading can skip it.
"""
import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import shlex
import sys
from dataclasses import field, fields
from datetime import date
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# --- Errors and flags ------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can fix; the message says what is wrong and what to do."""


def guarded(main):
    """Runs a program's main. What the user can fix is one line on standard error, exit code 2."""
    try:
        main()
    except BrokenPipeError:                                 # `python data.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def whole(text):
    """A whole number from 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def flag(default, text, choices=None):
    """A field of a config dataclass that is also a flag of a command."""
    return field(default=default, metadata={"help": text, "choices": choices})


def add_flags(parser, config):
    """One flag for each field of a config dataclass. Whole numbers are counts, except seeds."""
    for f in fields(config):
        name = "--" + f.name.replace("_", "-")
        kind = whole if f.type is int and f.name != "seed" else f.type
        text = f"{f.metadata['help']} (default: {f.default})"
        choices = f.metadata["choices"]
        parser.add_argument(name, type=kind, default=f.default, choices=choices, help=text)


# --- Random numbers: functions of a key such as (seed, step), so a resumed run draws the same ----


def number_of(key):
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def rng(*key):
    """A random.Random that depends on nothing but the key."""
    return random.Random(number_of(key))


def generator(*key):
    """A torch.Generator on the CPU that depends on nothing but the key."""
    return torch.Generator().manual_seed(number_of(key))


# --- Files -----------------------------------------------------------------------------------


def write_atomically(path, write):
    """Calls write(temporary path), then renames: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:                        # a full or read-only disk
        raise OSError(f"cannot write {path}: {error}") from error
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path, hint):
    """Reads a JSON file of ours. Raises UserError: it is missing or damaged, and then the hint."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): {hint}") from error


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


def pick_device(name=None):
    """The device of that name, by default CUDA where there is one. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such kind of device; choose cpu or cuda") from error
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; leave the flag out to run on the CPU")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"{device} is not there, of {count}: one process for each, or --device cpu")
    return device


def about(device):
    """What a results.json says of its own origin."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    return {"command": "python " + shlex.join(sys.argv), "commit": commit,
            "date": str(date.today()), "machine": machine, "torch": torch.__version__}


# --- Run folders: run.json says what a run is, state.safetensors is where it stands -----------


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
    """A hash of all weights: two models share it where they are the same function."""
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
