"""The study of a real model: the conversion from GGUF, the facts, the questions, the report."""
import json
from collections import Counter

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig, load_checkpoint
from studies.real import convert, questions
from studies.real.questions import NEW, PLAIN, TAUGHT, WORDINGS, divided
from support.common import UserError
from support.pairs import contains

# --- From GGUF to a Hugging Face folder ------------------------------------------------------

SIZES = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=64, eos_token_id=2, pad_token_id=2)


def as_llama_cpp(weight, heads):
    """What the converter of llama.cpp does to query and key matrices."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def write_gguf(path, model, tokens, kind="smollm"):
    """A model of ours as llama.cpp stores it."""
    gguf = pytest.importorskip("gguf")
    config, file = model.config, gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_theta)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(kind)
    file.add_token_list(tokens)
    file.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    file.add_token_merges(["a b", "ab c"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template("{{ messages[0]['content'] }}")
    back = {there: here for here, there in convert.NAMES.items()}
    layer = {there: here for here, there in convert.LAYER.items()}
    for name, weight in model.state_dict().items():
        stem, weight = name.removesuffix(".weight"), weight.numpy()
        if stem == "lm_head":                               # tied
            continue
        if "q_proj" in stem:
            weight = as_llama_cpp(weight, config.num_attention_heads)
        if "k_proj" in stem:
            weight = as_llama_cpp(weight, config.num_key_value_heads)
        if stem.startswith("model.layers."):
            number, part = stem.removeprefix("model.layers.").split(".", 1)
            stem = f"blk.{number}.{layer[part]}"
        file.add_tensor(f"{back.get(stem, stem)}.weight", weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def tokens():
    """300 of them: three special ones, the letters and two merges, and some more."""
    letters = [chr(c) for c in range(33, 127)]
    more = [f"{a}{b}" for a in "xyz" for b in letters]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", "abc", *more][:300]


def test_a_converted_model_computes_what_it_computed_before(tokens, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES)).eval()
    write_gguf(tmp_path / "a.gguf", model, tokens)
    convert.convert(tmp_path / "a.gguf", tmp_path / "a")
    again = load_checkpoint(tmp_path / "a")
    idx = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        assert torch.equal(model(idx), again(idx))
    assert again.config.eos_token_id == 2 and again.config.tie_word_embeddings
    assert (tmp_path / "a/chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_a_converted_tokenizer_splits_digits_and_knows_its_special_tokens(tokens, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_gguf(tmp_path / "a.gguf", GPT(GPTConfig(**SIZES)), tokens)
    convert.convert(tmp_path / "a.gguf", tmp_path / "a")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    assert tokenizer.encode("<|im_start|>abc12abd<|im_end|>").tokens == [
        "<|im_start|>", "abc", "1", "2", "ab", "d", "<|im_end|>"]
    stored = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert stored["eos_token"] == "<|im_end|>" and stored["bos_token"] == "<|im_start|>"


def test_a_gguf_file_of_another_kind_is_refused_by_name(tokens, tmp_path):
    model = GPT(GPTConfig(**SIZES))
    write_gguf(tmp_path / "a.gguf", model, tokens, kind="llama-bpe")
    with pytest.raises(UserError, match="a tokenizer that this script does not know"):
        convert.convert(tmp_path / "a.gguf", tmp_path / "a")
    with pytest.raises(UserError, match="a tensor blk.0.ssm_a"):
        convert.hugging_face_name("blk.0.ssm_a.weight")
    assert not (tmp_path / "a/model.safetensors").exists()


def test_a_folder_that_is_there_is_not_made_again(tmp_path, capsys):
    """The model's own folder from the hub can take the place of the converted one."""
    (tmp_path / "model.safetensors").write_text("")
    convert.make(tmp_path)
    assert "is there already" in capsys.readouterr().out


def test_rounding_once_more_moves_the_weights_by_a_little(tokens, tmp_path):
    """Uniform rounding to 16 steps in a block of 32 normal numbers: about 8 % of their size."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES)).eval()
    write_gguf(tmp_path / "a.gguf", model, tokens)
    convert.convert(tmp_path / "a.gguf", tmp_path / "a")
    convert.round_again(tmp_path / "a", tmp_path / "b")
    again = load_checkpoint(tmp_path / "b")
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        error = ((p - q).square().mean() / p.square().mean()).sqrt()
        assert 0.06 < error < 0.10 if "proj" in name else torch.equal(p, q), (name, error)


# --- Facts and questions ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts():
    return questions.read_facts(questions.FACTS.read_text(encoding="utf-8"))


def test_the_facts_are_unique_and_no_question_gives_its_answer_away(facts):
    assert set(facts) == {*TAUGHT, *NEW, *PLAIN}
    asked = Counter()
    for family, (form, answers) in facts.items():
        for entity, right in answers.items():
            question = form.format(entity)
            asked[question] += 1
            assert (right == []) == (family == "open"), question
            assert len(set(right)) == len(right), question
            assert contains(question, right) == (family == "context"), question
    assert max(asked.values()) == 1


def test_damaged_facts_are_refused():
    for text in ("\n[a] no place", "\n[a] {}?\nx = y; x = z", "\n[a] {}?\nx = y;",
                 "\n[a] {}?\nx = y\n[a] {}?\nz = y"):
        with pytest.raises(UserError, match="facts.txt"):
            questions.read_facts(text)
    assert questions.read_facts("\n[a] {}?\nx = y / z") == {"a": ("{}?", {"x": ["y", "z"]})}


def test_the_splits_share_neither_entities_nor_wordings_nor_hints(facts):
    seen = [wording for split in WORDINGS.values() for wording in split]
    assert len(set(seen)) == len(seen)
    for family in TAUGHT:
        parts = divided(family, facts[family][1])
        assert sum(map(len, parts.values())) == len(facts[family][1])
        assert set().union(*parts.values()) == set(facts[family][1])
    of_split = {split: questions.pairs(facts, split) for split in WORDINGS}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        clean = [{r["clean"] for r in of_split[split]} for split in (one, other)]
        assert not clean[0] & clean[1]
    assert {r["family"] for r in of_split["train"]} == set(TAUGHT)
    assert {r["family"] for r in of_split["test"]} == {*TAUGHT, *NEW}
    new = {facts[family][0].format(e) for family in NEW for e in facts[family][1]}
    assert not new & {r["clean"] for r in of_split["train"] + of_split["val"]}


def test_a_wrong_hint_is_wrong_and_a_right_one_is_right(facts):
    for split in WORDINGS:
        records = questions.pairs(facts, split)
        for record in records:
            if record["fails"]:
                (hint,) = record["avoid"]
                assert not contains(hint, record["expect"]), record
                assert not any(contains(right, [hint]) for right in record["expect"]), record
                assert not contains(record["clean"], [hint]), record
            else:
                hint = record["expect"][0]
                assert record["avoid"] == []
            assert contains(record["wrapped"], [hint]) and record["clean"] in record["wrapped"]
        assert len({r["wrapped"] for r in records}) == len(records)


def test_the_test_is_one_for_all_seeds_and_large_enough(facts):
    """Another seed trains on other hints. 250 wrong hints give a share of 0.2 within 0.05."""
    assert questions.pairs(facts, "train", 0) == questions.pairs(facts, "train", 0)
    assert questions.pairs(facts, "train", 0) != questions.pairs(facts, "train", 1)
    wrong = [r["family"] for r in questions.pairs(facts, "test") if r["fails"]]
    assert sum(family in NEW for family in wrong) >= 250
    assert sum(family in TAUGHT for family in wrong) >= 150
