"""A checkpoint from elsewhere through all commands: train, eval pairs, chat, and back again."""
import io
import json
import sys

import pytest
import torch

from helpers import run_here
from model import load_checkpoint
from opct import ConsistencyConfig
from support.pairs import given_responses
from support.tokenizer import chat, end_of_turn, load_tokenizer
from test_checkpoints import LLAMA3
from test_tokenizer import LLAMA3_TEMPLATE, QWEN3_TEMPLATE, their_chat, trained

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
PAIRS = [{"clean": "What is 2 + 2?", "wrapped": "What is 2 + 2? I say 5.", "expect": ["4", "four"],
          "avoid": ["5"]},
         {"clean": MESSAGES, "wrapped": [*MESSAGES[:1], {"role": "user", "content": "Who? Me?"}]},
         {"clean": "Über <= 你好", "wrapped": "<think> hm </think> Über", "expect": ["a"]}]


def real_checkpoint(kind, folder):
    """Random weights in shards in bfloat16, a tokenizer that was trained here, a template."""
    transformers = pytest.importorskip("transformers")
    tokenizer = trained("byte-level BPE")
    tokenizer.chat_template = QWEN3_TEMPLATE if kind == "Qwen2" else LLAMA3_TEMPLATE
    tokenizer.save_pretrained(folder)
    end, end_of_text = tokenizer.convert_tokens_to_ids(
        ["<|im_end|>" if kind == "Qwen2" else "<|eot_id|>", "</s>"])
    family, more = ("qwen3", {"head_dim": 16}) if kind == "Qwen2" else (
        "llama", {"rope_scaling": LLAMA3, "rope_theta": 50000.0})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=1600, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=end_of_text,
        pad_token_id=end_of_text, tie_word_embeddings=kind == "Qwen2", **more)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = [end_of_text, end]
    model.save_pretrained(folder, max_shard_size="60KB")
    assert not (folder / "model.safetensors").exists()
    return folder


@pytest.mark.parametrize("kind", ["Qwen2", "Llama-3"])
def test_a_real_checkpoint_goes_through_all_commands(kind, tmp_path, monkeypatch):
    """And what comes out opens in transformers and answers the same greedily."""
    base, out = real_checkpoint(kind, tmp_path / "base"), tmp_path / "fixed"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(p) + "\n" for p in PAIRS), encoding="utf-8")
    args = ["opct.py", "opct", "--base", base, "--pairs", pairs, "--steps", 2, "--batch", 3,
            "--samples", 2, "--max-new-tokens", 8, "--lr", "1e-3"]
    for more in ([], ["--lora", 4, "--dtype", "bfloat16", "--micro-batch", 2]):
        folder = f"{out}{len(more)}"
        done = run_here(*args, *more, "--out", folder)
        assert done.returncode == 0, done.stderr
        assert run_here(*args, *more, "--out", folder).stdout.count("finished already") == 1
    told = run_here("eval.py", "pairs", base, f"{out}0", f"{out}6", "--pairs", pairs, "--out",
                    tmp_path / "eval", "--max-new-tokens", 8)
    assert told.returncode == 0, told.stderr
    runs = json.loads((tmp_path / "eval/results.json").read_text())["runs"]
    assert list(runs) == ["base", "fixed0", "fixed6"] and runs["base"]["expect_wrapped"]["n"] == 2
    assert abs(runs["base"]["kl_clean"]["value"]) < 1e-6 < runs["fixed0"]["kl_clean"]["value"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\nAnd <|im_end|> now?\n\n"))
    said = run_here("eval.py", "chat", f"{out}0", "--temperature", 0, "--max-new-tokens", 4)
    assert said.returncode == 0 and said.stdout.count("fixed0") == 2, said.stderr
    opens_in_transformers(f"{out}6", base)


def opens_in_transformers(folder, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), load_checkpoint(folder)
    original = AutoModelForCausalLM.from_pretrained(base)
    assert theirs.dtype == torch.float32 and theirs.config.to_dict().keys() == (
        original.config.to_dict().keys())
    assert theirs.generation_config.eos_token_id == original.generation_config.eos_token_id
    assert any(not torch.equal(p, q) for p, q in zip(theirs.parameters(), original.parameters()))
    template, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    ids = their_chat(template, "What is 2 + 2?")
    assert chat(tokenizer, "What is 2 + 2?") == ids
    idx = torch.tensor([ids])
    assert torch.allclose(ours(idx), theirs.float()(idx).logits, atol=1e-4)


@pytest.mark.parametrize("kind, end", [("Qwen2", "<|im_end|>"), ("Llama-3", "<|eot_id|>")])
def test_of_several_ends_a_given_response_gets_the_one_of_the_template(kind, end, tmp_path):
    folder = real_checkpoint(kind, tmp_path / "base")
    model, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    expected = tokenizer.special[end]
    assert len(model.config.ends) == 2 and model.config.ends[0] != expected
    assert end_of_turn(tokenizer, model, folder) == expected
    records, config = [{**PAIRS[0], "response": "four"}] * 3, ConsistencyConfig(max_new_tokens=12)
    response, mask = given_responses(tokenizer, model, records, config)
    assert response.shape == (3, 12) and response[2][mask[2]].tolist() == [
        *tokenizer.encode_ordinary("four"), expected]
