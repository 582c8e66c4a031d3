"""
The study: how fast are the sampler and the updates, and what is left to gain?

    python -m studies.speed [smoke|quick|full]    runs it in out/study-speed-PRESET/, or goes on
    python -m studies.speed report                writes README.md again, from results.json
    python -m studies.speed report FOLDER         first takes the results of FOLDER over
"""
import argparse

import torch

from studies.speed import report, run
from support.common import UserError, guarded


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "full" if torch.cuda.is_available() else "quick"
    parser.add_argument("preset", nargs="?", default=default,
                        help=f"smoke, quick, full or report (default: {default})")
    parser.add_argument("folder", nargs="?",
                        help="where the results go; report: the study to take over")
    args = parser.parse_args()
    if args.preset == "report":
        study = report.read(args.folder or report.FOLDER)
        report.write_all(study, report.FOLDER)
        return
    if args.preset not in run.PRESETS:
        raise UserError(f"unknown preset '{args.preset}': choose smoke, quick or full")
    folder = args.folder or f"out/study-speed-{args.preset}"
    study = run.run(args.preset, folder)
    report.write_all(study, folder)
    run.forget_parts(folder)
    print(f"written to {folder}: results.json and README.md")


if __name__ == "__main__":
    guarded(main)
