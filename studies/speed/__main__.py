"""The study: how fast are the sampler and the updates, and what is left to gain?

    python -m studies.speed [smoke|quick|full]    runs it in out/study-speed-PRESET/, or goes on
    python -m studies.speed report                writes each README.md again, from results.json:
                                                  the one of a CPU, and gpu/README.md
    python -m studies.speed report FOLDER         first takes the results of FOLDER over
"""
from studies.speed import report, run
from studies.study import check_preset, default_preset, parser_of
from support.common import guarded


def main():
    parser = parser_of("speed", __doc__)
    default = default_preset()
    parser.add_argument("preset", nargs="?", default=default,
                        help=f"smoke, quick, full or report (default: {default})")
    parser.add_argument("folder", nargs="?",
                        help="where the results go; report: the study to take over")
    args = parser.parse_args()
    if args.preset == "report":
        report.publish(report.read(args.folder) if args.folder else None)
        return
    check_preset(args.preset, run.PRESETS)
    folder = args.folder or f"out/study-speed-{args.preset}"
    study = run.run(args.preset, folder)
    report.write_all(study, folder)
    run.forget_parts(folder)
    print(f"written to {folder}: results.json and README.md")


if __name__ == "__main__":
    guarded(main)
