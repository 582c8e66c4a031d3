"""The study: a real chat model that gives in to wrong hints, fixed on a CPU.

    python -m studies.real [smoke|quick|full]   runs it in out/study-real-PRESET/, or goes on
    python -m studies.real rest                 of full, what results.json lacks
    python -m studies.real report [FOLDER]      takes over what FOLDER has measured, and writes
                                                README.md, tables.md and the figure again
"""
from studies.real import report, run
from studies.study import check_preset, parser_of
from support.common import guarded


def main():
    parser = parser_of("real", __doc__)
    parser.add_argument("preset", nargs="?", default="quick",
                        help="smoke, quick, full, rest or report (default: quick)")
    parser.add_argument("folder", nargs="?", help="report: the study to take over")
    args = parser.parse_args()
    if args.preset == "report":
        study = run.collect(args.folder) if args.folder else report.taken_over()
        if args.folder and report.FILE.exists():
            study = run.merged(report.taken_over(), study)
        report.publish(study)
        return
    if args.preset == "rest":
        folder = run.run("full", report.taken_over()["runs"] if report.FILE.exists() else ())
    else:
        check_preset(args.preset, run.PRESETS)
        folder = run.run(args.preset)
    report.write_all(run.collect(folder), folder)


if __name__ == "__main__":
    guarded(main)
