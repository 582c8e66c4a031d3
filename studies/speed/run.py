"""The plan of the study: its sizes, and the three measurements, one after the other."""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from studies.speed import real, sampler, training
from studies.speed.real import Case
from support.common import about, pick_device, write_text


def shape(layers, width):
    """The fields of GPTConfig that `opct.py pretrain --layers --width` sets."""
    return {"num_hidden_layers": layers, "hidden_size": width, "head_dim": 32,
            "intermediate_size": width * 11 // 4, "num_attention_heads": width // 32,
            "num_key_value_heads": width // 64}


@dataclass
class Preset:
    """Sizes of the measurements; the defaults are those of quick, like its model."""
    shape: dict = field(default_factory=lambda: shape(4, 128))
    base: str = "out/quick/base"                # for the updates, where train.sh has made it
    batches: tuple = (1, 64, 512, 4096)         # of the sampler, beside the others
    new: int = 32                               # tokens that a row writes there
    growth: tuple = ((512, 32), (1024, 32), (2048, 32), (4096, 32), (512, 64), (512, 128),
                     (512, 192))                # (batch, new tokens) of the sampler alone
    naive_up_to: int = 512                      # the largest batch of the naive sampler
    rounds: int = 5                             # the best of so many counts
    pairs: int = 32                             # of an update
    samples: int = 4                            # responses to each
    longest: int = 64                           # tokens of a response
    rows: int = 24                              # of a pretraining step
    pretrain_steps: int = 20                    # the best of so many counts
    compiles: bool = True                       # half a minute
    trl_updates: int = 25                       # their mean counts: each samples other responses
    # On a real model: batches of the sampler, updates beside TRL's, updates alone, rounds of each.
    real_batches: tuple = (1, 16, 64)
    real_cases: tuple = (Case(8, 4, 50, 32), Case(4, 1, 500, 32), Case(8, 4, 50, 32, lora=16))
    real_growth: tuple = (Case(2, 2, 50, 32), Case(2, 2, 50, 128), Case(2, 2, 50, 512),
                          Case(2, 2, 500, 32), Case(2, 2, 1500, 32))
    real_rounds: int = 3


PRESETS = {
    "smoke": Preset(shape(1, 64), batches=(1, 4), new=4, growth=((2, 4), (4, 4), (2, 8)),
                    rounds=1, pairs=2, samples=2, longest=8, rows=2, pretrain_steps=2,
                    compiles=False, trl_updates=1, real_batches=(1, 4), real_rounds=1,
                    real_cases=(Case(2, 2, 12, 4), Case(2, 2, 12, 4, lora=2)),
                    real_growth=(Case(1, 2, 12, 4), Case(1, 2, 12, 8))),
    "quick": Preset(),
    # The model of train.sh's preset full, for a GPU.
    "full": Preset(shape(8, 256), base="out/full/base", rows=128, naive_up_to=64, rounds=3,
                   growth=((1024, 32), (4096, 32), (8192, 32), (16384, 32), (1024, 64),
                           (1024, 128), (1024, 192)), compiles=False, trl_updates=10,
                   real_batches=(1, 16, 64, 512))}


def part(name, measure, origin, folder):
    """One measurement. It is kept until the study is complete, so a stopped study goes on. A part
    of another commit, machine or torch is measured again."""
    path = Path(folder) / f"{name}.part.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["origin"] == origin:
            print(f"{name}: measured before the study was stopped")
            return kept["found"]
    found = measure()
    write_text(path, json.dumps({"origin": origin, "found": found}) + "\n")
    return found


def run(name, folder):
    """Measures everything. Returns the study, as it stands in results.json."""
    preset, device = PRESETS[name], pick_device()
    origin = {"preset": name, "threads": torch.get_num_threads(), **about(device)}
    origin["command"] = f"bash train.sh study speed {name}"
    base = Path(preset.base) if Path(preset.base).is_dir() else None
    same = {key: origin[key] for key in ("preset", "threads", "commit", "machine", "torch")}
    print(f"== the study speed: {name} on {device}, {origin['threads']} threads, in {folder}/")
    found = {"about": origin}
    found["sampler"] = part("sampler", lambda: sampler.measure(preset, device), same, folder)
    found["real"] = real.measure(
        preset, device, lambda name, measure: part(f"real-{name}", measure, same, folder))
    same["base"] = str(base)
    found["training"] = part("training", lambda: training.measure(preset, device, base), same,
                             folder)
    return found


def forget_parts(folder):
    """After results.json is written: the same command then measures afresh."""
    for path in Path(folder).glob("*.part.json"):
        path.unlink()
