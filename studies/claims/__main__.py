"""The study: does OPCT do what its paper says, and why?

    python -m studies.claims [smoke|quick|full]   runs it in out/study-claims-PRESET/, or goes on
    python -m studies.claims rest [SEEDS]         of full, what results.json lacks, of all seeds
                                                  or of some, such as 3,4
    python -m studies.claims report [FOLDER]      takes over what FOLDER has measured, and writes
                                                  README.md, tables.md and the figures again
"""
from studies import pool
from studies.claims import report
from studies.claims.plan import PRESETS, stages
from studies.claims.results import collect, measured, merged
from studies.claims.tables import page_tables
from studies.study import check_preset, default_preset, parser_of
from support.common import UserError, guarded, show


def seeds_of(text):
    """3,4 -> {3, 4}; None -> None, all. Raises UserError."""
    every = {str(seed): seed for seeds in PRESETS["full"].attacked.values() for seed in seeds}
    names = text.split(",") if text else []
    if not set(names) <= set(every):
        raise UserError(f"rest {text}: seeds are 0 to {len(every) - 1}, such as rest 3,4")
    return {every[name] for name in names} or None


def run(name, only=None, there=()):
    """Runs what is not there of a preset, or goes on with it. Returns its folder."""
    folder = f"out/study-claims-{name}"
    todo = stages(folder, PRESETS[name], only, there)
    show(f"== the study claims: {pool.places()} commands at a time, in {folder}/; a line for each; "
         f"in all about {pool.seconds_of(todo) / 3600:.1f} hours of a core")
    pool.run_stages(todo, pool.places(), folder)
    return folder


def main():
    parser = parser_of("claims", __doc__)
    default = default_preset()
    parser.add_argument("preset", nargs="?", default=default,
                        help=f"smoke, quick, full, rest or report (default: {default})")
    parser.add_argument("more", nargs="?", help="rest: seeds; report: the folder to take over")
    args = parser.parse_args()
    if args.preset == "report":
        study = report.taken_over()
        report.publish(merged(study, collect(args.more)) if args.more else study)
        return
    if args.preset == "rest":
        folder = run("full", seeds_of(args.more), measured(report.taken_over()))
    else:
        check_preset(args.preset, PRESETS)
        folder = run(args.preset)
    study = collect(folder)
    report.write_all(study, folder)
    tables = page_tables(study)
    show(f"\n{tables['verdicts']}\n\nwritten to {folder}: results.json, tables.md and the figures")


if __name__ == "__main__":
    guarded(main)
