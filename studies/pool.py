"""Runs commands side by side, skips those that finished before, and shows the time left.

A study is a list of stages. The commands of one stage do not need each other's results.
"""
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from support.common import UserError, show
from support.run import lock


def places():
    """How many commands run at once: one for each CPU core, up to eight that share a GPU."""
    cores = len(os.sched_getaffinity(0))
    return min(8, cores) if torch.cuda.is_available() else cores


def finished(folder):
    """The commands that have finished in this folder, in any earlier call too."""
    path = Path(folder) / "done"
    return set(path.read_text().splitlines()) if path.exists() else set()


def start(name, argv, folder):
    """Starts one command. Its output goes to FOLDER/logs/NAME.txt."""
    log = Path(folder) / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread each, so a figure does not depend on how many cores the machine has.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return process, log


def core_seconds():
    """The CPU time of all commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def stop(*_):
    sys.exit(143)


def seconds_of(stages):
    """What all commands of some stages take of a core, about."""
    return sum(command[0] for stage in stages for command in stage)


def run_stages(stages, at_once, folder, later=0):
    """Stage after stage. later: seconds of what comes after them, for the time left."""
    for i, stage in enumerate(stages):
        run(stage, at_once, folder, seconds_of(stages[i + 1:]) + later)


def run(commands, at_once, folder, later=0):
    """Runs all commands, `at_once` at a time. Raises UserError if one of them fails.

    Args:
        commands: a list of (seconds it takes about, name, argv). None needs another's results.
        folder: where `done` lists what has finished, `seconds.jsonl` what it took of a core, and
            where the logs are.
        later: seconds of the stages that come after this one, for the time left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)                                            # two studies would do all twice
    done = finished(folder)
    waiting = [command for command in commands if shlex.join(command[2]) not in done]
    left = sum(command[0] for command in waiting) + later
    worked, took, running, failed = 0, 0, [], None
    before = signal.signal(signal.SIGTERM, stop)            # `kill` ends the commands, too
    try:
        while running or (waiting and not failed):
            while waiting and not failed and len(running) < at_once:
                seconds, name, argv = waiting.pop(0)
                running.append((seconds, name, argv, time.time(), *start(name, argv, folder)))
            time.sleep(0.05)
            for job in list(running):
                seconds, name, argv, began, process, log = job
                used_before = core_seconds()
                if process.poll() is None:
                    continue
                running.remove(job)
                record = {"name": name, "seconds": round(core_seconds() - used_before, 2)}
                with (folder / "seconds.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
                if process.returncode:
                    failed = failed or (name, log)
                    continue
                with (folder / "done").open("a") as file:
                    file.write(shlex.join(argv) + "\n")
                worked, left, took = worked + seconds, left - seconds, took + time.time() - began
                minutes = left * took / worked / at_once / 60
                show(f"  {name:40} about {minutes:.0f} min left")
    finally:
        for job in running:
            job[4].terminate()
        for job in running:
            job[4].wait()
        signal.signal(signal.SIGTERM, before)
    if failed:
        lines = failed[1].read_text().strip().splitlines() or ["no output"]
        raise UserError(f"{failed[0]}: {lines[-1]} (all of it: {failed[1]}; the same command "
                        "goes on from here)")
