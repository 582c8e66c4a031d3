"""What studies share: the arms, a command line with presets, a page made from the results."""
import argparse
import re
import textwrap
from pathlib import Path

import torch

from support.common import UserError, read_json, write_text
from support.report import COLOURS, WIDTH

# Name of an arm: the command of opct.py and its --loss.
ARMS = {"sft": ("sft", "sampled"), "sft-exact": ("sft", "exact"),
        "opct": ("opct", "sampled"), "opct-exact": ("opct", "exact")}
# The colour of each run, the same in every figure.
COLOUR = dict(zip(("base", *ARMS, "sft-fresh", "teacher"), COLOURS))

# --- The command line ------------------------------------------------------------------------

def parser_of(name, text):
    """The parser of `python -m studies.NAME`, which shows the text as it is."""
    return argparse.ArgumentParser(prog=f"python -m studies.{name}", description=text,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def default_preset():
    return "full" if torch.cuda.is_available() else "quick"


def check_preset(name, presets):
    """Raises UserError if there is no preset of that name."""
    if name not in presets:
        raise UserError(f"unknown preset '{name}': choose smoke, quick or full")


# --- Results ---------------------------------------------------------------------------------

def joined(origins):
    """Where measurements come from: key -> all its values, such as two dates."""
    return {key: " and ".join(dict.fromkeys(value for one in origins
                                            for value in one[key].split(" and ")))
            for key in origins[0]}


# --- The page ----------------------------------------------------------------------------------

def committed(folder):
    """The results that a study's page is made from."""
    return read_json(Path(folder) / "results.json", "get it from git again")


def filled(words, tables):
    """The text with its {names} replaced by tables. Raises UserError if a name is unknown.

    A paragraph or list item with a name inside it is wrapped again.
    """
    def put(found):
        if found[1] not in tables:
            raise UserError(f"words.md asks for {found[0]}, which the report does not make")
        return tables[found[1]]

    parts = re.split(r"(\n\n|\n(?=- |\d\. ))", words)
    for i, part in enumerate(parts):
        parts[i] = re.sub(r"\{(\w+)\}", put, part)
        if parts[i] != part and not re.fullmatch(r"\{\w+\}", part.strip()):
            indent = " " * len(re.match(r"- |\d\. |", part)[0])
            parts[i] = textwrap.fill(" ".join(parts[i].split()), WIDTH, subsequent_indent=indent,
                                     break_long_words=False, break_on_hyphens=False)
    return "".join(parts)


def fill(text, name, block):
    """Puts the block between <!-- name --> and <!-- end -->. Raises UserError: no such place."""
    pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
    new = f"<!-- {name} -->\n{block}\n<!-- end -->"
    text, found = re.subn(pattern, lambda _: new, text, flags=re.S)
    if found != 1:
        raise UserError(f"the text has {found} places between <!-- {name} --> and <!-- end -->, "
                        "and needs one")
    return text


def write_tables(folder, tables):
    """results.md: all tables one after the other, without the words."""
    text = "\n\n".join(f"## {name}\n\n{block}" for name, block in tables.items())
    write_text(Path(folder) / "results.md", text + "\n")
