"""The study: a real chat model that gives in to wrong hints, fixed on a CPU.

    python -m studies.real [smoke|quick|full]   runs it in out/study-real-PRESET/, or goes on
    python -m studies.real report               writes README.md and its figure again, from
                                                results.json
    python -m studies.real report FOLDER        first takes the results of FOLDER over
"""
from studies.real import report, run
from studies.study import check_preset, parser_of
from support.common import guarded, write_json


def main():
    parser = parser_of("real", __doc__)
    parser.add_argument("preset", nargs="?", default="quick",
                        help="smoke, quick, full or report (default: quick)")
    parser.add_argument("folder", nargs="?", help="report: the study to take over")
    args = parser.parse_args()
    if args.preset == "report":
        if args.folder:
            write_json(report.FOLDER / "results.json", run.collect(args.folder))
        report.publish()
        return
    check_preset(args.preset, run.PRESETS)
    folder = run.run(args.preset)
    report.write_all(run.collect(folder), folder)


if __name__ == "__main__":
    guarded(main)
