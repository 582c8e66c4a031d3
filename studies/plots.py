"""What the figures of the studies share."""
from eval import COLOURS, pyplot, save_figure

__all__ = ["STYLE", "pyplot", "save_figure"]

# run -> (colour, marker, line); the arms in every figure of every study look alike.
STYLE = {name: (colour, marker, line) for name, colour, marker, line in zip(
    ("base", "sft", "sft-exact", "opct", "opct-exact", "teacher"), COLOURS, "xos^D+",
    (":", "-", "-", "--", "--", ":"))}
