"""What an update of opct-exact costs: seconds and the highest memory, alone on all cores.

    python -m studies.real.cost OUT --pairs FILE [flags of opct.py]     writes OUT.json
"""
import os
import resource
import shutil
import statistics
import subprocess
import sys

from studies.real import convert
from support.common import UserError, about, guarded, pick_device, write_json
from support.run import read_log

STEPS = 4                               # the first one is left out: it warms up


def main():
    out, *flags = sys.argv[1:]
    shutil.rmtree(out, ignore_errors=True)      # what was measured half says nothing
    # --steps is there twice: the last one counts.
    argv = [sys.executable, "opct.py", "opct", "--base", str(convert.FOLDER), "--out", out, *flags,
            "--steps", str(STEPS), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    each = [line["seconds"] for line in read_log(out)][1:]
    origin = about(pick_device("cpu"))
    del origin["command"]
    write_json(f"{out}.json", {"flags": " ".join(flags[2:]), "seconds": statistics.median(each),
                               "bytes": peak, "threads": len(os.sched_getaffinity(0)),
                               "about": origin})
    shutil.rmtree(out)


if __name__ == "__main__":
    guarded(main)
