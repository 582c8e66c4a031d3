"""Real checkpoints: what transformers writes is read with the same logits, and the other way."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import fork_of, tiny_gpt
from model import (GPT, GPTConfig, KVCache, generate, llama3_frequency, load_checkpoint, sample,
                   save_checkpoint)
from support.common import UserError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
ROPE = {"rope_scaling": LLAMA3, "rope_theta": 50000.0}
SHAPE = dict(vocab_size=120, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, initializer_range=0.2,
             bos_token_id=110, pad_token_id=None, eos_token_id=111)
# What a checkpoint of each kind has besides SHAPE, and how it is stored.
KINDS = {
    "llama": ("llama", {}, {}),
    "llama, tied, every head its own keys": (
        "llama", {"tie_word_embeddings": True, "num_key_value_heads": None}, {}),
    "llama 3": ("llama", {**ROPE, "max_position_embeddings": 131072,
                          "eos_token_id": [111, 112, 113]}, {"max_shard_size": "30KB"}),
    "llama 3, wide heads": ("llama", {**ROPE, "head_dim": 16}, {}),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "max_position_embeddings": 32768},
              {"max_shard_size": "30KB"}),
    "qwen2, untied": ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, {}),
    "qwen3, untied": ("qwen3", {"head_dim": 10, "eos_token_id": [111, 110], "pad_token_id": 110},
                      {"max_shard_size": "30KB"}),
}
IDX = torch.randint(0, 110, (3, 90), generator=torch.Generator().manual_seed(0))
SHORT = IDX[:, :40] % 11        # for the tiny model of the other tests


def theirs(folder, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=dtype, attn_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


def made_by_transformers(kind, folder, dtype=torch.float32):
    """A random checkpoint of a kind: no weight, bias or norm is left at its default."""
    transformers = pytest.importorskip("transformers")
    family, changes, how = KINDS[kind]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.add_(torch.randn(p.shape) * 0.3)
    model.to(dtype).save_pretrained(folder, **how)
    assert (folder / "model.safetensors").exists() is not bool(how)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_answers_are_those_of_transformers(kind, dtype, tmp_path):
    """And what is saved of it opens there again: same tensors, dtypes and logits."""
    folder = made_by_transformers(kind, tmp_path / "theirs", dtype)
    reference, model = theirs(folder), load_checkpoint(folder)
    logits = reference(IDX).logits
    assert logits.std() > 0.5
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (model(IDX) - logits).abs().max() < 1e-4
    response, mask = generate(model, IDX[:, :20].tolist(), 30, temperature=0)
    for row, keep, prompt in zip(response, mask, IDX[:, :20]):
        whole = reference.generate(prompt[None], max_new_tokens=30, do_sample=False,
                                   attention_mask=torch.ones(1, 20))[0]
        assert row[keep].tolist() == whole[20:].tolist()
    save_checkpoint(model, tmp_path / "ours")
    again = theirs(tmp_path / "ours")
    assert torch.equal(again(IDX).logits, logits)
    assert {t.dtype for t in load_file(tmp_path / "ours/model.safetensors").values()} == {dtype}
    assert again.config.to_dict() == reference.config.to_dict() | {
        "_name_or_path": again.config.to_dict()["_name_or_path"]}


def test_configs_of_transformers_4_are_read_as_those_of_5(tmp_path):
    folder = made_by_transformers("llama 3", tmp_path)
    expected = load_checkpoint(folder)(IDX)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(name, None)
    rest = {name: value for name, value in LLAMA3.items() if name != "rope_type"}
    factors = {name: value for name, value in rest.items() if name.endswith("factor")}
    for spelling in ({"rope_parameters": {**LLAMA3, "rope_theta": 50000.0}}, ROPE,
                     {**ROPE, "rope_scaling": {**rest, "type": "llama3"}, "torch_dtype": "float32"},
                     {**ROPE, "rope_scaling": {**factors, "rope_type": "llama3"},
                      "original_max_position_embeddings": 64}):
        (folder / "config.json").write_text(json.dumps({**config, **spelling}))
        model = load_checkpoint(folder)
        assert torch.equal(model(IDX), expected)
        save_checkpoint(model, folder / "again")
        assert json.loads((folder / "again/config.json").read_text()) == {**config, **spelling}


@pytest.mark.parametrize("family, name, value", [
    ("llama", "num_key_value_heads", 32), ("mistral", "num_key_value_heads", 8),
    ("qwen2", "num_key_value_heads", 32), ("qwen3", "num_key_value_heads", 32),
    ("llama", "head_dim", 4), ("mistral", "head_dim", 4), ("qwen3", "head_dim", 128)])
def test_a_field_that_is_left_out_is_what_transformers_makes_it(family, name, value, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **{
        **SHAPE, "hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": 4,
        "sliding_window": None, name: value})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop(name) == value
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert (load_checkpoint(tmp_path)(IDX) - theirs(tmp_path)(IDX).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama 3", "qwen2", "qwen3"])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(kind, tmp_path):
    """Each rounds in its own order: both are off by 2 to 4 % of the logits' standard deviation."""
    folder = made_by_transformers(kind, tmp_path)
    exact = theirs(folder)(IDX).logits
    model = load_checkpoint(folder, dtype="bfloat16")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    cache = KVCache(model.config, 3, 90, like=model.lm_head.weight)
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache) for part in IDX.split(50, 1)], 1)
    expected = (theirs(folder, torch.bfloat16)(IDX).logits - exact).std()
    assert 0.01 * exact.std() < expected < 0.04 * exact.std()
    for logits in (model(IDX), cached):
        assert (logits - exact).std() < 1.1 * expected
    save_checkpoint(model, tmp_path / "again")              # in the dtype of the file, float32
    assert {t.dtype for t in load_file(tmp_path / "again/model.safetensors").values()} == {
        torch.float32}


def test_the_frequencies_of_llama_3_are_those_of_transformers():
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    for original, factor in ((8192, 8.0), (8192, 32.0), (1024, 3.0)):
        scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
        config = transformers.LlamaConfig(head_dim=128, rope_scaling=scaling, rope_theta=50000.0,
                                          max_position_embeddings=131072)
        expected = rope.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        frequency = 50000.0 ** (-torch.arange(0, 128, 2) / 128)
        found = llama3_frequency(frequency, scaling)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
        assert 0.1 < (found == frequency).float().mean() < 0.9      # fast ones are kept, slow not


# --- Without transformers --------------------------------------------------------------------

def stored(folder, model=None, **changes):
    """A checkpoint of ours whose config.json then gets some other fields."""
    save_checkpoint(model or tiny_gpt(vocab=11, dtype=torch.float32), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def in_shards(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(weights)}
    for shard in set(where.values()):
        save_file({n: t for n, t in weights.items() if where[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_are_read_and_a_missing_one_is_named(tmp_path):
    model = tiny_gpt(vocab=11, dtype=torch.float32)
    in_shards(stored(tmp_path, model))
    assert torch.equal(load_checkpoint(tmp_path)(SHORT), model(SHORT))
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    for damaged in ("{", "{}", '{"weight_map": {"a": "../other/model.safetensors"}}'):
        index.write_text(damaged)
        with pytest.raises(UserError, match="index.json"):
            load_checkpoint(tmp_path)
    index.write_text(whole)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="it has no model-00002-of-00003.safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_loaded_and_saved_is_the_same_tensor_for_tensor(dtype, tmp_path):
    """A norm in float32 among weights of half the size stays what it is."""
    folder = stored(tmp_path / "a", quirk=[1, {"of": "another program"}])
    weights = {name: t if "norm" in name else t.to(dtype)
               for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    save_checkpoint(load_checkpoint(folder), tmp_path / "b")
    saved = load_file(tmp_path / "b/model.safetensors")
    assert saved.keys() == weights.keys()
    for name, t in weights.items():
        assert saved[name].dtype == t.dtype and torch.equal(saved[name], t)
    assert (tmp_path / "b/config.json").read_text() == json.dumps(
        json.loads((folder / "config.json").read_text()), indent=2) + "\n"


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_small_update_of_a_bfloat16_checkpoint_is_not_rounded_away(field, tmp_path):
    """What did not change keeps its dtype; the config names that of what did."""
    folder = stored(tmp_path / "a", **{field: "bfloat16"})
    weights = load_file(folder / "model.safetensors")
    save_file({name: t.bfloat16() for name, t in weights.items()}, folder / "model.safetensors")
    model = load_checkpoint(folder)
    changed = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.state_dict()[changed].mul_(1 + 2**-12)
    save_checkpoint(model, tmp_path / "b")
    saved = load_file(tmp_path / "b/model.safetensors")
    assert torch.equal(saved[changed], model.state_dict()[changed])
    assert {name for name, t in saved.items() if t.dtype != torch.bfloat16} == {changed}
    assert json.loads((tmp_path / "b/config.json").read_text())[field] == "float32"


def test_an_embedding_that_is_stored_as_the_output_layer_alone_is_found(tmp_path):
    """safetensors' own `save_model` keeps the first name of a tensor that has two."""
    model = tiny_gpt(vocab=11, dtype=torch.float32)
    weights = load_file(stored(tmp_path, model) / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(load_checkpoint(tmp_path)(SHORT), model(SHORT))


@pytest.mark.parametrize("changes, message", [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_type = {'full"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "factor = None"),
    ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor = '8'"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
    ({"use_sliding_window": True, "max_window_layers": 1}, "sliding_window = 4096"),
    ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
     "sliding_window = 32"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
    ({"model_type": "mistral"}, "sliding_window = 4096"),
    ({"model_type": "mistral", "sliding_window": 32}, "sliding_window = 32"),
    ({"is_causal": False}, "is_causal = False"),
    ({"is_causal": None}, "is_causal = None"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ({"eos_token_id": [2.0]}, "eos_token_id"),
    ({"eos_token_id": True}, "eos_token_id")])
def test_what_is_not_computed_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_checkpoint(stored(tmp_path, **changes))


def test_weights_of_a_quantised_file_are_refused_by_name(tmp_path):
    weights = load_file(stored(tmp_path) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} is torch.float8_e4m3fn"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("changes", [
    {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2},
    {"layer_types": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 10000.0}},
    {"model_type": "mistral", "sliding_window": None}, {"original_max_position_embeddings": 8},
    {"attention_dropout": 0.1, "quantization_config": None, "pretraining_tp": 2}])
def test_what_changes_nothing_is_no_reason_to_refuse(changes, tmp_path):
    model = tiny_gpt(vocab=11, dtype=torch.float32)
    found = load_checkpoint(stored(tmp_path, model, **changes))(SHORT)
    assert torch.equal(found, model(SHORT))


# --- End tokens ------------------------------------------------------------------------------

@pytest.mark.parametrize("config, generation, ends", [
    (5, None, (5,)), ([5, 6], None, (5, 6)), (5, 5, (5,)), (5, [7, 5], (5, 7)),
    (None, [6], (6,)), ([6, 5, 6], [7], (6, 5, 7)), (None, None, ()), ([5], None, (5,))])
def test_the_ends_are_those_of_both_files_and_stay_when_saved(config, generation, ends, tmp_path):
    folder = stored(tmp_path / "a", eos_token_id=config)
    if generation is not None:
        text = json.dumps({"eos_token_id": generation, "temperature": 0.6})
        (folder / "generation_config.json").write_text(text)
    model = load_checkpoint(folder)
    assert model.config.ends == ends
    save_checkpoint(model, tmp_path / "b")
    assert load_checkpoint(tmp_path / "b").config.ends == ends
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="generation_config.json is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("pad", [None, 10, 4, 3])
def test_any_of_several_ends_a_response_and_counts_once(pad):
    """The same noise with one end: what stands before the first of any is the same."""
    model = tiny_gpt(vocab=11, eos_token_id=None)
    prompts, noise = [[1, 2], [5], [0, 7, 3]] * 60, torch.rand(180, 20)
    endless, mask = generate(model, prompts, 20, noise=noise)
    assert mask.all()
    model.config.eos_token_id, model.config.pad_token_id = [4, 3, 9], pad
    response, mask = generate(model, prompts, 20, noise=noise)
    found = [row[keep].tolist() for row, keep in zip(response, mask)]
    expected = []
    for row in endless.tolist():
        at = next((t for t, token in enumerate(row) if token in (3, 4, 9)), 19)
        expected.append(row[:at + 1])
    assert found == expected
    assert {y[-1] for y in found} > {3, 4, 9}               # each of them, and some were cut
    assert (response[~mask] == (pad or 0)).all()
    model.config.eos_token_id = list(range(1, 11))
    response, mask = generate(model, prompts, 20, noise=noise)
    assert response.shape[1] == mask.sum(1).max() < 20      # it stops when all have ended


def test_a_list_of_one_end_is_that_end():
    model, args = tiny_gpt(vocab=11), dict(noise=torch.rand(50, 20))
    one = generate(model, [[1, 2]] * 50, 20, **args)
    model.config.eos_token_id = [model.config.eos_token_id]
    assert all(map(torch.equal, generate(model, [[1, 2]] * 50, 20, **args), one))


def test_a_padding_token_that_the_weights_lack_is_none(tmp_path):
    """Old files say -1, and others a token that was added later."""
    for pad in (-1, 11, 10 ** 6):
        model = load_checkpoint(stored(tmp_path, pad_token_id=pad))
        assert model.config.pad_token_id is None
        generate(model, [[1], [2, 3]], 3)


# --- Precision and size ----------------------------------------------------------------------

def test_the_frequencies_stay_float32_in_any_dtype_and_a_long_context_costs_nothing():
    """A table for 131,072 positions took 134 MB; frequencies in bfloat16 are off by whole turns."""
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny_gpt(max_position_embeddings=131072).to(dtype)
        assert model.model.frequency.dtype == torch.float32
        assert sum(b.numel() for b in model.buffers()) == 4
    # Only distances count: far out, the angles are rounded to 2^-7.
    model, idx = tiny_gpt(vocab=11, max_position_embeddings=131072), SHORT[:, :30]
    near = model(idx)
    far = model(idx, torch.arange(100_000, 100_030)[None])
    assert (far - near).abs().max() < 0.05 * near.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sampling_from_half_precision_draws_from_the_softmax(dtype):
    """Summed in bfloat16 the distribution stops growing after some hundred of 5,000 tokens."""
    logits = torch.zeros(1, 5000, dtype=dtype)
    noise = (torch.arange(1000) + 0.5) / 1000
    drawn = sample(logits.expand(1000, -1), 1.0, noise)
    assert (drawn - 5 * torch.arange(1000) - 2).abs().max() <= 1


def field(name):
    """A size of this process, in MB."""
    return next(int(line.split()[1]) for line in open("/proc/self/status")
                if line.startswith(name)) / 1024


def measure_peak(folder, dtype):
    """Writes how much higher the most memory so far is after a load, in MB."""
    load_checkpoint(folder / "tiny")    # PyTorch imports some 60 MB of code at a first call
    before = field("VmHWM")
    load_checkpoint(folder, dtype=dtype)
    (folder / "peak").write_text(str(field("VmHWM") - before))


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """53 MB of bfloat16 in three shards."""
    folder = tmp_path_factory.mktemp("large")
    model = GPT(GPTConfig(vocab_size=16, hidden_size=1024, intermediate_size=4096,
                          num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=2))
    save_checkpoint(model.bfloat16(), folder)
    in_shards(folder)
    stored(folder / "tiny")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype, size", [("bfloat16", 53), ("float32", 105)])
def test_loading_takes_the_memory_of_one_copy(dtype, size, large_checkpoint):
    """While a shard is read, its file is mapped as well."""
    process = fork_of(measure_peak, large_checkpoint, dtype)
    process.join()
    assert process.exitcode == 0
    peak = float((large_checkpoint / "peak").read_text())
    (large_checkpoint / "peak").unlink()
    assert 0.9 * size < peak < size + 25
