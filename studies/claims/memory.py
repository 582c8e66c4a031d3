"""What runs on the same pairs have memorised, beside all figures of eval.py: a point of the map.

    python -m studies.claims.memory BASE RUN ... --world W --out FILE

The figures are those of measure.py.
"""
from dataclasses import replace
from pathlib import Path

from data import load_world
from eval import check_world, evaluate
from model import load_checkpoint
from opct import ConsistencyConfig
from studies.claims.measure import FRESH, good, memorised, responses_of, token_logp, variations
from support.common import (Parser, UserError, about, add_number, guarded, pick_device,
                            read_json, show, write_json)
from support.pairs import read_jsonl
from support.tokenizer import load_tokenizer


def settings_of(runs):
    """How the offline ones of these runs sampled the teacher's responses, all alike."""
    kept, found = ("samples", "seed", "max_new_tokens"), {}
    for run in runs:
        stored = read_json(Path(run) / "run.json", "train it again")
        found[tuple(stored[name] for name in kept)] = run
    if len(found) > 1:
        raise UserError(f"{', '.join(map(str, found.values()))} differ in samples, seed or "
                        "max_new_tokens: they have not trained on the same responses")
    config = ConsistencyConfig(**dict(zip(kept, next(iter(found)))))
    return replace(config, stored=config.samples)


def measure(args):
    """All figures of the base and of the runs; name -> figures goes to FILE."""
    device, world = pick_device(args.device), load_world(args.world)
    check_world([args.base, *args.runs], args.world)
    tokenizer, base = load_tokenizer(args.world), load_checkpoint(args.base, device)
    records, config = read_jsonl(Path(args.world) / "train.jsonl"), settings_of(args.runs)
    fresh = replace(config, stored=FRESH, seed=10**6 + config.seed)
    kinds = []
    for each in (config, fresh):
        kinds.append(responses_of(base, tokenizer, records, each))
    variants = variations(world, records, args.tries, args.seed)
    test, found = world.records("test"), {}
    for folder in (args.base, *args.runs):
        name, model = Path(folder).name.split("@")[0], load_checkpoint(folder, device)
        figures, _ = evaluate(model, base, tokenizer, world, test, "test", 1, args.seed)
        pairs = [token_logp(model, base, *kind) for kind in kinds]
        figures["memorised"] = {"value": memorised(*pairs), "n": len(pairs[0][0])}
        for kind, some in variants.items():
            for axis, figure in good(model, tokenizer, some, (args.seed, kind)).items():
                figures[f"good_{kind}{axis}"] = figure
        figures["gap"] = {"value": figures["good_trained"]["value"] - figures["good_both"]["value"],
                          "n": len(variants["both"])}
        found[name] = {metric: {"value": figure["value"], "n": figure["n"]}
                       for metric, figure in figures.items()}
        show(f"  {folder}: memorised {figures['memorised']['value']:.3f} nats a token, good "
             + ", ".join(f"{kind} {figures[f'good_{kind}']['value']:.2f}" for kind in variants))
    write_json(args.out, {"about": about(device), "runs": found})


def main():
    parser = Parser(prog="python -m studies.claims.memory", description="What runs memorised.")
    parser.add_argument("base", help="the checkpoint that all runs started from")
    parser.add_argument("runs", nargs="+", help="their folders; `sft@6e-4` is shown as sft")
    parser.add_argument("--world", required=True, help="the folder with their pairs")
    parser.add_argument("--out", required=True, help="a JSON file")
    add_number(parser, "tries", 240, "responses for each good_*")
    add_number(parser, "seed", 0, "of all sampling")
    parser.add_argument("--device", help="cpu or cuda (default: the best there is)")
    measure(parser.parse_args())


if __name__ == "__main__":
    guarded(main)
