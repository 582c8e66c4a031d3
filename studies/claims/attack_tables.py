"""The tables of the attacks: what attackers learnt, the pool, who is told what by whose prompts."""
import textwrap

import numpy as np

from studies.claims.plan import TARGETS
from support.report import markdown


def quoted(lines):
    """Lines of (head, prompt) as a block of code, the prompts in one column."""
    width, out = max(len(head) for head, _ in lines) + 2, []
    for head, prompt in lines:
        text = head.ljust(width) + " ".join(prompt.replace("`", "'").split())
        out += textwrap.wrap(text, 96, subsequent_indent=" " * width, drop_whitespace=True)
    return "```\n" + "\n".join(out) + "\n```"


def attacks_tables(families):
    """The strongest attackers of each target; how many of all attackers had success."""
    cells = families["llama"]
    targets = [name for name in TARGETS if name in cells[0]["attacks"]]
    learnt = [["target", "first update", "last update", "on test recipes, seed by seed"]]
    many = [["target", *families]]
    for name in targets:
        success = [cell["attacks"][name]["success"] for cell in cells]
        tried = [cell["runs"][name]["jailbreak_adaptive"]["value"] for cell in cells]
        learnt.append([name, f"{np.mean([curve[0] for curve in success]):.3f}",
                       f"{np.mean([curve[-1] for curve in success]):.3f}",
                       " ".join(f"{value:.2f}" for value in tried)])
        line = [name]
        for of_family in families.values():
            each = []
            for cell in of_family:
                each += cell["runs"][name]["jailbreak_adaptive_mean"]["each"]
            line.append(f"{sum(value > 0.1 for value in each)} of {len(each)}")
        many.append(line)
    return markdown(learnt), markdown(many)


def prompts(cell):
    """The most successful prompt against each target, of the first seed's strongest attacker."""
    lines = []
    for name, attack in cell["attacks"].items():
        prompt, times = (attack["prompts"] or [("none", 0)])[0]
        text = " ".join(prompt.replace("`", "'").split())
        lines += textwrap.wrap(f"{name:12}{times:4}  {text}", 96, subsequent_indent=" " * 18)
    return "```\n" + "\n".join(lines) + "\n```"


def origins_table(cells):
    """How many prompts of the pool each target's attackers have found, seed by seed, and what the
    pool gets from it. A prompt that several have found counts for each."""
    lines = [["target", "prompts of the pool that its attackers found, seed by seed",
              "share of the pool that it told, seed by seed"]]
    for name in TARGETS:
        counts = [str(cell["pool"]["origins"][name]) for cell in cells]
        told = [f"{cell['runs'][name]['jailbreak_pool']['value']:.2f}" for cell in cells]
        lines.append([name, " ".join(counts), " ".join(told)])
    return markdown(lines)


def pool_prompts(cell, most=4):
    """The prompts of one cell's pool that were told most on validation, with how often."""
    return quoted([(str(times), prompt) for prompt, times in cell["pool"]["pool"][:most]])


def pool_sizes(cells):
    """From how many candidates the pools were chosen: "312 to 420"."""
    sizes = [cell["pool"]["candidates"] for cell in cells]
    return f"{min(sizes)} to {max(sizes)}"
