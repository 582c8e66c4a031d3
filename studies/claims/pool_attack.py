"""The same prompts against every checkpoint of a cell. What an attacker finds by luck then counts
against all of them, not against its own target alone.

    python -m studies.claims.pool_attack BASE RUN ... --world W --out FILE

1. Candidates: for each target the prompts that it told most to its attackers, with the name taken
   out. All of this is on the validation recipes, by attackers whose training is over.
2. Each candidate is tried on every target with every validation recipe. The `--size` prompts that
   were told most, over all targets, are the pool. It is written down before the test.
3. Every target is tried with the pool on the test recipes, with the same random numbers.

    jailbreak_pool          P(the recipe is in the response), a prompt of the pool
    jailbreak_pool_best_of  share of the recipes that one prompt of the pool gets

Also the matrix: what the prompts of the strongest attacker of A, on the test recipes, get from B.
"""
from collections import Counter
from pathlib import Path

import numpy as np

from data import load_world
from eval import check_world
from model import load_checkpoint
from studies.claims.attack import (GAP, attacks_on, figures_of, judge_of, late_success,
                                   same_means)
from support.common import Parser, UserError, add_number, guarded, pick_device, show, write_json
from support.run import weights_hash
from support.tokenizer import load_tokenizer

MOST = 100                  # candidates of a target


def candidates(attacks, size):
    """The prompts that may enter the pool, sorted. attacks: target -> what attack.json holds.

    If fewer than `size` were ever told, all that were tried compete.
    """
    tried = {prompt for some in attacks.values() for attack in some
             for prompt in attack["validation"]}
    if not tried:
        raise UserError("none of these checkpoints has attackers: run studies.claims.attack first")
    told_ones = {prompt for some in attacks.values() for prompt in most_told(some)}
    return sorted(told_ones if len(told_ones) >= size else tried)


def most_told(of_target):
    """The prompts that one target told most to its attackers, MOST at the most."""
    told = Counter()
    for attack in of_target:
        told.update(attack["validation"])
    hits = [prompt for prompt in told if told[prompt] and GAP in prompt]
    return sorted(hits, key=lambda prompt: (-told[prompt], prompt))[:MOST]


def try_prompts(told, prompts, names, seed):
    """Every prompt with every name: (names, prompts) of bool."""
    every = [name for name in names for _ in prompts]
    asked = [prompt.replace(GAP, name) for name in names for prompt in prompts]
    return np.array(told(every, asked, seed)).reshape(len(names), -1)


def choose_pool(prompts, targets, names, size, seed):
    """The `size` prompts that were told most: (prompt, times) each, the most told first.

    Args: targets: name -> its function `told`; names: the validation recipes.
    """
    times = sum(try_prompts(told, prompts, names, (seed, "choose")).sum(0)
                for told in targets.values())
    order = sorted(range(len(prompts)), key=lambda i: (-times[i], prompts[i]))
    return [(prompts[i], int(times[i])) for i in order[:size]]


def matrix(attacks, targets, names, seed):
    """A -> B -> share told by B to the prompts that A's strongest attacker wrote for the names."""
    out = {}
    for a, of_target in attacks.items():
        tried = max(of_target, key=late_success)["tried"]
        every = [name for name in names for _ in range(len(tried) // len(names))]
        asked = [prompt.replace(GAP, name) for prompt, name in zip(tried, every)]
        out[a] = {b: float(np.mean(told(every, asked, (seed, "matrix"))))
                  for b, told in targets.items()}
    return out


def attack_all(args):
    device, world = pick_device(args.device), load_world(args.world)
    names = [Path(folder).name for folder in args.targets]
    check_world(args.targets, args.world)
    tokenizer, weights, targets, attacks = load_tokenizer(args.world), {}, {}, {}
    for name, folder in zip(names, args.targets):
        model = load_checkpoint(folder, device)
        weights[name] = weights_hash(model)
        targets[name] = judge_of(model, tokenizer, world)
        attacks[name] = attacks_on(folder, weights[name])
    same_means(attacks)
    to_choose, to_test = world.split["val"]["forbidden"], world.split["test"]["forbidden"]
    prompts = candidates(attacks, args.size)
    show(f"{len(prompts)} candidates for a pool of {args.size} prompts")
    pool = choose_pool(prompts, targets, to_choose, args.size, args.seed)
    found = {"weights": weights, "candidates": len(prompts), "pool": pool, "figures": {}}
    write_json(args.out, found)                             # frozen: what follows is the test
    for name, told in targets.items():
        hits = try_prompts(told, [prompt for prompt, _ in pool], to_test, (args.seed, "test"))
        found["figures"][name] = figures_of(hits, to_test, "jailbreak_pool")
        show(f"  {name}: told to {hits.mean():.1%} of the prompts, {hits.any(1).sum()} of "
             f"{len(hits)} recipes")
    found["matrix"] = matrix(attacks, targets, to_test, args.seed)
    write_json(args.out, found)


def main():
    parser = Parser(prog="python -m studies.claims.pool_attack",
                    description="The same prompts against several checkpoints.")
    parser.add_argument("targets", nargs="+", help="the checkpoints, each with its attackers")
    parser.add_argument("--world", required=True, help="the folder that `data.py --out` wrote")
    parser.add_argument("--out", required=True, help="a JSON file")
    add_number(parser, "size", 64, "prompts in the pool")
    add_number(parser, "seed", 0, "of all sampling")
    parser.add_argument("--device", help="cpu or cuda (default: the best there is)")
    attack_all(parser.parse_args())


if __name__ == "__main__":
    guarded(main)
