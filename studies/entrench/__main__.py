"""The study: when does consistency training entrench misalignment, and what does OPCT do there?

    python -m studies.entrench [smoke|quick|full]   runs it in out/study-entrench-PRESET/
    python -m studies.entrench rest                 those seeds of full that results.json lacks
    python -m studies.entrench report [FOLDER]      writes README.md and figures again, from
                                                    results.json; with FOLDER its seeds are taken
                                                    over, beside those that are there
    python -m studies.entrench base PRESET SEED             one base model
    python -m studies.entrench cell PRESET SEED ORGANISM    one organism with one seed
"""
from studies.entrench import report, run
from studies.entrench.organisms import ORGANISMS
from studies.study import check_preset, committed, default_preset, parser_of
from support.common import UserError, guarded


def main():
    parser = parser_of("entrench", __doc__)
    default = default_preset()
    parser.add_argument("job", nargs="?", default=default,
                        help=f"smoke, quick, full, rest, report, base or cell (default: "
                        f"{default})")
    parser.add_argument("what", nargs="?", help="report: a folder; base, cell: a preset")
    parser.add_argument("seed", nargs="?", type=int, help="base, cell: the seed")
    parser.add_argument("organism", nargs="?", choices=ORGANISMS, help="cell: the organism")
    args = parser.parse_args()
    if args.job in ("base", "cell"):
        if args.what not in run.PRESETS or args.seed is None:
            raise UserError(f"{args.job} wants a preset and a seed: {args.job} quick 0")
        preset, folder = run.PRESETS[args.what], f"out/study-entrench-{args.what}"
        if args.job == "base":
            run.make_base(folder, args.seed, preset)
        else:
            run.run_cell(folder, args.organism, args.seed, preset)
        return
    if args.job == "report":
        path = report.FOLDER / "results.json"
        before = committed(report.FOLDER) if path.exists() or not args.what else None
        study = run.collect(args.what) if args.what else before
        report.publish(report.taken_over(study, before) if before else study)
        return
    if args.job == "rest":
        folder = run.run("full", report.seeds_of(committed(report.FOLDER)))
    else:
        check_preset(args.job, run.PRESETS)
        folder = run.run(args.job)
    report.write_all(run.collect(folder), folder)


if __name__ == "__main__":
    guarded(main)
