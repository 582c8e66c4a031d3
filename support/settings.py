"""Every flag of opct.py, with its default and its meaning."""
from dataclasses import dataclass, replace

from support.common import flag
from support.packing import ROW


@dataclass
class PretrainConfig:
    """Trains the base model on fresh text of the world."""
    world: str = flag("world", "the folder that `python data.py --out` wrote")
    out: str = flag("base", "the folder for checkpoint and log")
    family: str = flag("llama", "shape of the model", choices=["llama", "qwen2", "qwen3"])
    layers: int = flag(4, "layers")
    width: int = flag(128, "hidden size, a multiple of 64; a head has 32 of it")
    rows: int = flag(24, f"rows of {ROW} tokens in a step")
    steps: int = flag(1700, "steps")
    lr: float = flag(1e-2, "highest learning rate")
    clip: float = flag(1.0, "largest gradient norm")
    seed: int = flag(0, "initialisation, documents and their order follow from it")
    save_every: int = flag(100, "steps between two saved states")
    device: str = flag(None, "cpu or cuda; the best there is")


@dataclass
class ConsistencyConfig:
    """Trains a base model for consistency on contrastive pairs."""
    base: str = flag("base", "the checkpoint to start from; the teacher is a frozen copy of it")
    pairs: str = flag("world/train.jsonl", "contrastive pairs, one JSON object a line")
    out: str = flag("run", "the folder for checkpoint and log")
    loss: str = flag("sampled", "the sampled token alone, as in the paper, or the exact KL",
                     choices=["sampled", "exact"])
    gamma: float = flag(0.0, "--loss sampled: discount of later tokens' KL")
    control: str = flag("none", "clean: the student gets the clean prompt; shuffled: the teacher "
                        "gets another pair's", choices=["none", "clean", "shuffled"])
    lora: int = flag(0, "rank of an adapter to train instead of the weights; 0: all weights")
    dtype: str = flag("float32", "of what is frozen: the teacher, then a rounded copy, or under "
                      "--lora the base; what is trained is float32",
                      choices=["float32", "bfloat16"])
    steps: int = flag(60, "updates")
    batch: int = flag(32, "pairs in an update")
    samples: int = flag(4, "responses to a pair in an update")
    stored: int = flag(None, "responses of the teacher that a pair gets before training; an update "
                       "takes --samples of them in turn; 0: fresh ones at every update (default: "
                       "4)")
    micro_batch: int = flag(None, "responses computed at a time: the same update, less memory")
    max_new_tokens: int = flag(64, "a longer response is cut")
    lr: float = flag(None, "highest learning rate; 3e-4 for a small model, 2e-5 from 20 million "
                     "parameters on, ten times that with --lora")
    clip: float = flag(1.0, "largest gradient norm")
    seed: int = flag(0, "order of the pairs and sampling follow from it")
    save_every: int = flag(10, "updates between two saved states")
    device: str = flag(None, "cpu or cuda; the best there is")


def is_large(model):
    return sum(p.numel() for p in model.parameters()) >= 20e6


def with_defaults(config, model, stage, given=False):
    """The config with what depends on the model and the method filled in: the learning rate, and
    the responses that `sft` stores. given: the pairs hold a response each."""
    if config.lr is None:
        rate = 2e-5 if is_large(model) else 3e-4
        config = replace(config, lr=10 * rate if config.lora else rate)
    if config.stored is None and stage == "sft":
        config = replace(config, stored=1 if given else 4)
    return config
