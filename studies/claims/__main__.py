"""The study: does OPCT do what its paper says?

    python -m studies.claims [smoke|quick|full]   runs it in out/study-claims-PRESET/, or goes on
    python -m studies.claims report               writes README.md and figures again, from
                                                  results.json
    python -m studies.claims report FOLDER        first takes over what FOLDER has measured
    python -m studies.claims rest [SEEDS]         what is not taken over yet of full, or of some
                                                  seeds, such as 5,6
    python -m studies.claims cell FAMILY SEED     one cell alone, to compare with results.json
    python -m studies.claims frontier [SEEDS]     experiment 1: six arms at equal rates
"""
from pathlib import Path

from model import ARCHITECTURES
from studies.claims import frontier, report, results, run
from studies.claims.plan import PRESETS
from studies.study import check_preset, default_preset, parser_of
from support.common import UserError, guarded


def main():
    parser = parser_of("claims", __doc__)
    default = default_preset()
    parser.add_argument("preset", nargs="?", default=default,
                        help="smoke, quick, full, rest, report, cell or frontier "
                        f"(default: {default})")
    parser.add_argument("folder", nargs="?", help="report: the study to take over; cell: family; "
                        "rest: seeds")
    parser.add_argument("seed", nargs="?", type=int, help="cell: the seed")
    args = parser.parse_args()
    if args.preset == "cell":
        if args.folder not in ARCHITECTURES or args.seed is None:
            raise UserError("a cell is a family (llama, qwen2, qwen3) and a seed: cell llama 0")
        run.run_cell(args.folder, args.seed, default)
        return
    if args.preset == "frontier":
        frontier.run("full", seeds_of(args.folder, frontier.FRONTIERS["full"].seeds))
        return
    if args.preset == "report" and "study-frontier-" in str(args.folder):
        frontier.take_over(args.folder)
        frontier.publish()
        return
    if args.preset == "report":
        if args.folder:
            report.take_over(results.collect(args.folder, earlier(args.folder)))
        report.publish()
        return
    if args.preset == "rest":
        folder = run.run("full", report.taken_over(), seeds_of(args.folder))
    else:
        check_preset(args.preset, PRESETS)
        folder = run.run(args.preset)
    report.write_all(results.collect(folder, earlier(folder)), folder)


def seeds_of(text, every=PRESETS["full"].seeds):
    """5,6 -> (5, 6); None -> all. Raises UserError."""
    if not text:
        return every
    names = set(text.split(","))
    if not names <= set(map(str, every)):
        raise UserError(f"rest {text}: seeds are {every[0]} to {every[-1]}, such as rest 5,6")
    return tuple(seed for seed in every if str(seed) in names)


def earlier(folder):
    """What has been taken over of full, unless all learning rates were tried in the folder itself:
    then it is a study of its own."""
    every = {f"llama-{seed}" for seed in PRESETS["full"].grid_seeds}
    grid, of_map, _ = results.collect_tries(folder)
    later = Path(folder).name == "study-claims-full" and not every <= grid.keys() & of_map.keys()
    return report.taken_over() if later else None


if __name__ == "__main__":
    guarded(main)
