"""Plumbing, nothing about the method: errors, flags, seeded random numbers, files, devices."""
import argparse
import hashlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
from dataclasses import field, fields
from datetime import date
from pathlib import Path

import torch
from safetensors import SafetensorError

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


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_jsonl(path):
    """Reads pairs: a JSON object a line with the strings "clean" and "wrapped"."""
    records = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the pairs: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            forms = [record["clean"], record["wrapped"]]
        except (ValueError, KeyError, TypeError):
            forms = [None]
        if not all(isinstance(form, str) and form for form in forms):
            raise UserError(f'{path}, line {number} is no pair: it wants {{"clean": "...", '
                            '"wrapped": "..."}')
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no pairs")
    return records


# --- The machine ------------------------------------------------------------------------------


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
