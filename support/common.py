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
    for stream in (sys.stdout, sys.stderr):     # output never fails for its encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:                                 # `python data.py | head`
        silence()
    except UserError as error:
        stop(error)
    except OSError as error:
        text = f"cannot use {error.filename} ({error.strerror}): choose another"
        stop(text if error.filename else error)
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "allocate memory")        # not "illegal memory access"
        if not isinstance(error, MemoryError) and not any(w in str(error).lower() for w in words):
            raise
        stop("out of memory: give --micro-batch (a run goes on with it), or --lora with --dtype "
             "bfloat16, or fewer --rows, --batch, --samples or --max-new-tokens, or take a smaller "
             "model")
    except KeyboardInterrupt:
        sys.exit(130)


def stop(message):
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def silence():
    """Nobody reads the output any more: what is printed from now on goes nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def show(text, end="\n"):
    """Prints; a run goes on without its output where nobody reads it any more."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        silence()


# What a value may be, by the name of its flag or field; other whole numbers are counts from 1.
RANGES = {"lr": (0, 1e38, "above 0"), "clip": (0, 1e38, "above 0"), "gamma": (-1e-9, 1, "0 to 1"),
          "kl": (-1e-9, 1e38, "0 or more"), "temperature": (-1e-9, 1e38, "0 or more"),
          "lora": (-1, 4096, "0 to 4096"), "stored": (-1, 4096, "0 to 4096"),
          "seed": (-1, 2**63 - 1, "from 0 to 2**63 - 1")}


def checked(name, value, kind):
    """The value, if it is of its kind (int, float or str) and in its range. Raises ValueError."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} = {value!r} is no {kind.__name__}")
    low, high, text = RANGES.get(name, (0, 10**9, "a whole number from 1 to 10**9"))
    if kind is not str and not low < value <= high:         # nan is in no range
        raise ValueError(f"{name} = {value} has to be {text}")
    return value


def flag(default, text, choices=None):
    """A field of a config dataclass that is also a flag of a command."""
    return field(default=default, metadata={"help": text, "choices": choices})


def number(name, kind):
    """The type of a flag, for argparse."""
    def parse(text):
        try:
            return checked(name, kind(text), kind)
        except (ValueError, OverflowError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return parse


def add_flags(parser, config, without=()):
    """One flag for each field of a config dataclass but those without, with its type, range,
    default and help."""
    for f in fields(config):
        if f.name in without:
            continue
        text = f.metadata["help"] + (f.default is not None) * f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=number(f.name, f.type),
                            default=f.default, choices=f.metadata["choices"], help=text)


def add_number(parser, name, default, text):
    parser.add_argument("--" + name, type=number(name, type(default)), default=default,
                        help=f"{text} (default: {default})")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        stop(f"{message} (see {self.prog} -h)")


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
        mask = os.umask(0)                                  # safetensors makes private files
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
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


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_text(path, hint):
    """Reads a file in UTF-8, a byte-order mark allowed. Raises UserError with the hint."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {hint}") from error
    except ValueError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error}): {hint}") from error


def read_json(path, hint, kind=dict, parse_float=None):
    """Reads a JSON file of ours. Raises UserError with the hint: it is missing or damaged."""
    text = read_text(path, hint)
    try:
        value = json.loads(text, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {hint}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged (it holds no {kind.__name__}): {hint}")
    return value


# --- The machine ------------------------------------------------------------------------------

def pick_device(name=None):
    """The device of that name, by default CUDA where there is one. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such kind of device; choose cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; choose cpu or cuda")
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
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {"command": "python " + shlex.join(sys.argv), "commit": commit,
            "date": str(date.today()), "machine": machine, "torch": torch.__version__}
