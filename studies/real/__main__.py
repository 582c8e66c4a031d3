"""
The study: a real chat model that gives in to wrong hints, fixed on a CPU.

    python -m studies.real [smoke|quick|full]   runs it in out/study-real-PRESET/, or goes on
    python -m studies.real report               writes README.md and its figure again, from
                                                results.json
    python -m studies.real report FOLDER        first takes the results of FOLDER over
"""
import argparse

from studies.real import report, run
from support.common import UserError, guarded, write_json


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="quick",
                        help="smoke, quick, full or report (default: quick)")
    parser.add_argument("folder", nargs="?", help="report: the study to take over")
    args = parser.parse_args()
    if args.preset == "report":
        if args.folder:
            write_json(report.FOLDER / "results.json", run.collect(args.folder))
        report.publish()
        return
    if args.preset not in run.PRESETS:
        raise UserError(f"unknown preset '{args.preset}': choose smoke, quick or full")
    folder = run.run(args.preset)
    report.write_all(run.collect(folder), folder)


if __name__ == "__main__":
    guarded(main)
