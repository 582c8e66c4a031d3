"""A thousand tries of flags, JSONL lines and values in config.json: no traceback, ever."""
import json

import pytest
import torch

from helpers import run_here, tiny_gpt
from model import load_checkpoint, save_checkpoint
from support.common import UserError
from support.pairs import read_jsonl

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TRIES = hypothesis.settings(
    max_examples=350, deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
FLAGS = ["--base", "--pairs", "--out", "--loss", "--gamma", "--control", "--steps", "--batch",
         "--samples", "--max-new-tokens", "--lr", "--clip", "--seed", "--save-every", "--device",
         "--no-such-flag"]
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans()).map(str)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5)


@TRIES
@hypothesis.given(flags=st.lists(st.tuples(st.sampled_from(FLAGS), NUMBERS | st.text()),
                                 max_size=4))
def test_flags(flags, tmp_path):
    """The base does not exist, so every try has to end in a refusal."""
    args = [f"{name}={value}" for name, value in flags]
    done = run_here("opct.py", "opct", *args, "--base", tmp_path / "nowhere", "--pairs",
                    tmp_path / "nothing", "--out", tmp_path / "out")
    assert done.returncode == 2 or "usage" in done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


@TRIES
@hypothesis.given(text=st.binary() | JSON.map(lambda x: json.dumps(x).encode())
                  | st.dictionaries(st.sampled_from(["clean", "wrapped", "axis"]), JSON).map(
                      lambda x: json.dumps(x).encode()))
def test_lines_of_pairs(text, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(text)
    try:
        records = read_jsonl(path)
    except UserError:
        return
    assert all(isinstance(record[form], str) for record in records for form in ("clean", "wrapped"))


@TRIES
@hypothesis.given(data=st.data())
def test_values_in_config_json(data, tmp_path):
    if not (tmp_path / "kept.json").exists():
        save_checkpoint(tiny_gpt(dtype=torch.float32), tmp_path)
        (tmp_path / "kept.json").write_text((tmp_path / "config.json").read_text())
    config = json.loads((tmp_path / "kept.json").read_text())
    names = st.sampled_from([*config, "rope_parameters", "partial_rotary_factor", "layer_types",
                             "use_sliding_window", "sliding_window", "max_window_layers",
                             "attention_bias", "quantization_config"])
    config.update(data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        load_checkpoint(tmp_path)(torch.tensor([[0, 1]]))
    except UserError as error:
        assert str(error)
