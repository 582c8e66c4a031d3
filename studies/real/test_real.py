"""The study of a real model: the conversion from GGUF, the facts, the questions, the report."""
import json
import subprocess
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eval import contains
from helpers import DoneHere, commands_of, copy_of_the_repository, run_script_here
from model import GPT, GPTConfig, load_checkpoint
from studies.real import convert, questions, report
from studies.real.measure import groups, letter
from studies.real.questions import NEW, PLAIN, TAUGHT, WORDINGS
from studies.real.run import PRESETS, merged, stages
from support.common import UserError
from support.tokenizer import chat, load_tokenizer

# --- From GGUF to a Hugging Face folder ------------------------------------------------------

SIZES = dict(vocab_size=262, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=512, eos_token_id=2, pad_token_id=2)
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}<|im_start|>assistant\n")


# llama.cpp's names of the tensors: of the whole model, and of a layer.
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}


def as_llama_cpp(weight, heads):
    """What the converter of llama.cpp does to query and key matrices."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def write_gguf(path, model, tokens):
    """A model of ours as llama.cpp stores it."""
    gguf = [pytest.importorskip(name) for name in ("gguf", "accelerate", "transformers")][0]
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
    file.add_tokenizer_pre("smollm")
    file.add_token_list(tokens)
    file.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    file.add_token_merges(["a b", "ab c", "1 2"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template(TEMPLATE)
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
            stem = f"blk.{number}.{LAYER[part]}"
        file.add_tensor(f"{WHOLE.get(stem, stem)}.weight", weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def tokens():
    """262 of them: three special ones, the 256 bytes, three merges."""
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())    # one for each byte
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters, "ab", "abc", "12"]


def test_a_converted_model_computes_what_it_computed_before(tokens, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES)).eval()
    write_gguf(tmp_path / "a.gguf", model, tokens)
    convert.convert(tmp_path / "a.gguf", tmp_path / "a")
    again = load_checkpoint(tmp_path / "a")
    idx = torch.randint(0, 262, (2, 12))
    with torch.no_grad():               # a GGUF file holds 1e-5 as 9.999999747e-06
        assert torch.allclose(model(idx), again(idx), rtol=0, atol=1e-6)
    for one, other in zip(model.parameters(), again.parameters()):
        assert torch.equal(one, other)
    assert again.config.eos_token_id == 2 and again.config.tie_word_embeddings
    assert (tmp_path / "a/chat_template.jinja").read_text() == TEMPLATE


def test_a_converted_tokenizer_splits_digits_and_knows_its_special_tokens(tokens, tmp_path):
    write_gguf(tmp_path / "a.gguf", GPT(GPTConfig(**SIZES)), tokens)
    convert.convert(tmp_path / "a.gguf", tmp_path / "a")
    tokenizer = load_tokenizer(tmp_path / "a")
    ids = chat(tokenizer, "abc12abd")
    assert [tokenizer.decode([i]) for i in ids[-17:-12]] == ["abc", "1", "2", "ab", "d"]
    assert ids[0] == 1 and ids[-12] == 2
    stored = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert stored["eos_token"] == "<|im_end|>" and stored["bos_token"] == "<|im_start|>"


def test_a_folder_from_the_hub_is_taken_as_it_is(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.tensor([1.5, -2.25]).bfloat16()}, path)
    before = path.read_bytes()
    convert.make(tmp_path)
    assert "is there already" in capsys.readouterr().out and path.read_bytes() == before


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
    of_split = {split: questions.pairs(facts, split) for split in WORDINGS}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        clean = [{r["clean"] for r in of_split[split]} for split in (one, other)]
        assert not clean[0] & clean[1]
    for country in facts["capitals"][1]:                    # one split in both families
        assert len({split for split, records in of_split.items() for r in records
                    if r["family"] in TAUGHT and contains(r["clean"], [country])}) == 1
    assert {r["family"] for r in of_split["train"]} == set(TAUGHT)
    assert {r["family"] for r in of_split["test"]} == {*TAUGHT, *NEW}
    new = {facts[family][0].format(e) for family in NEW for e in facts[family][1]}
    assert not new & {r["clean"] for r in of_split["train"] + of_split["val"]}


def test_a_wrong_hint_is_wrong_and_a_right_one_is_right(facts):
    for split in WORDINGS:
        records = questions.pairs(facts, split)
        for record in records:
            if record["fails"]:
                hint = record["avoid"][0]
                for name in record["avoid"]:
                    assert not contains(name, record["expect"]), record
                assert not any(contains(right, record["avoid"]) for right in record["expect"])
                assert not contains(record["clean"], record["avoid"]), record
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
    assert sum(family in TAUGHT for family in wrong) >= 120


# --- Letters, intervals, choices -------------------------------------------------------------

def test_the_letter_of_an_answer():
    record = {"expect": ["Bern", "Berne"], "avoid": ["Rome"]}
    texts = ("It is berne.", "You are right, Rome!", "Bern, not Rome.", "Bernard likes romes.")
    assert "".join(letter(record, text) for text in texts) == "rhbo"
    assert letter({"expect": ["Bern"], "avoid": []}, "Rome") == "o"


def test_a_bootstrap_that_joins_seeds_and_questions():
    """Made-up data with known intervals."""
    names = [str(i) for i in range(400)]
    rows = np.ones((3, 400))
    assert report.bootstrap(rows * 0.25, names) == pytest.approx([0.25, 0.25])
    # Questions alone: 40 of 400 differ, in all seeds alike; normal with sd sqrt(.1 * .9 / 400).
    alike = rows * (np.arange(400) < 40)
    low, high = report.bootstrap(alike, names)
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.015, 0.1 + 1.96 * 0.015), abs=0.004)
    # Seeds alone: three drawn from 0, 0, 3 have a mean of 0 to 3, either end at 4 % or more.
    assert report.bootstrap(rows * [[0], [0], [3]], names) == pytest.approx([0, 3])
    # Both: wider than either.
    both = report.bootstrap(alike + [[-0.01], [0], [0.01]], names)
    assert both[1] - both[0] > high - low


def test_answers_to_one_question_are_one_cluster():
    """Each question asked twice with equal answers: half as many independent ones."""
    each = np.tile(np.arange(200) < 100, (1, 1)).astype(float)
    one = report.bootstrap(each, [str(i) for i in range(200)])
    two = report.bootstrap(each, [str(i // 2) for i in range(200)])
    assert (two[1] - two[0]) / (one[1] - one[0]) == pytest.approx(2 ** 0.5, rel=0.06)


def test_a_difference_is_paired_by_question_and_by_seed():
    """One arm is better by 0.5 on every question and in every seed: the interval is a point."""
    one = {"each": np.array([[0.5, 1.0], [0.75, 1.5]]), "names": "ab"}
    other = {"each": one["each"] - 0.5, "names": "ab"}
    assert report.difference(one, other) == pytest.approx((0.5, 0.5, 0.5))
    assert report.difference(one, None) is None
    fewer = {"each": other["each"][:1], "names": "ab"}      # a seed that only one has is left out
    assert report.difference(one, fewer) == pytest.approx((0.5, 0.5, 0.5))


# --- The plan --------------------------------------------------------------------------------

def names_of(**more):
    return [name for stage in stages("out", PRESETS["full"], **more) for _, name, _ in stage]


def test_all_arms_of_a_seed_differ_in_method_and_loss_alone():
    names = names_of()
    assert len(names) == len(set(names)) == 1 + 2 * (3 * 3 * 4 + 3 * 3)
    argv = {name: " ".join(argv[2:]) for stage in stages("out", PRESETS["full"])
            for _, name, argv in stage}
    for rate in ("1e-5", "3e-5", "1e-4"):
        for seed in range(3):
            alike = {argv[f"{arm}@{rate}.{seed}"].split(" ", 1)[1].replace(f"/{arm}@", "/").replace(
                f"--loss {'exact' if arm.endswith('exact') else 'sampled'} ", "")
                for arm in ("sft", "sft-exact", "opct", "opct-exact")}
            assert len(alike) == 1 and f"train-{seed}.jsonl" in (text := alike.pop())
            assert f"--lr {rate} " in text and f"--seed {seed} " in text
    assert "few-1.jsonl" in argv["reuse-sft-fresh@3e-5.1"]
    assert "--stored 0 " in argv["reuse-sft-fresh@3e-5.1"]


def test_what_is_measured_is_not_run_again():
    there = ["base", "sft@3e-5.0", "reuse-opct@3e-5.2"]
    left = set(names_of()) - set(names_of(there=there))
    assert left == {"questions to base", "sft@3e-5.0", "questions to sft@3e-5.0",
                    "reuse-opct@3e-5.2", "questions to reuse-opct@3e-5.2"}
    about = {"date": "d", "commit": "c"}
    one = {"updates": "u", "reuse": "r", "every": 1, "about": about, "runs": {"base": 1, "a": 2}}
    two = {**one, "about": {**about, "commit": "e"}, "runs": {"base": 1, "b": 3}}
    both = merged(one, two)
    assert both["runs"] == {"base": 1, "a": 2, "b": 3} and both["about"]["commit"] == "c and e"
    with pytest.raises(UserError, match="another preset"):
        merged(one, {**two, "every": 2})


# --- What is committed -----------------------------------------------------------------------

def test_the_pages_of_the_study_are_made_from_its_results(tmp_path):
    """Made again they are the same; with other results they are not."""
    study, words = report.taken_over(), (report.FOLDER / "words.md").read_text()
    page, tables = ((report.FOLDER / name).read_text() for name in ("README.md", "tables.md"))
    report.write_all(study, tmp_path)
    assert report.readme(study, words) == page and (tmp_path / "tables.md").read_text() == tables
    assert (tmp_path / "main.png").stat().st_size > 20_000
    assert len(page.splitlines()) <= 120
    found = study["runs"]["opct-exact@3e-5.0"]
    found["wrapped"] = found["wrapped"].replace("r", "h")
    assert report.readme(study, words) != page


def test_results_about_other_questions_are_refused():
    study = report.taken_over()
    study["runs"]["base"]["questions"] += 1
    with pytest.raises(UserError, match="about other questions"):
        report.page_tables(study)


# --- A whole study ---------------------------------------------------------------------------

def test_the_study_at_its_smallest(tokens, tmp_path, monkeypatch):
    """The command of `bash train.sh study real smoke` in a copy, with a random model in the place
    of the real one; given again, it repeats no run. All of it runs in this process."""
    copy_of_the_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("studies.pool.subprocess", SimpleNamespace(
        Popen=DoneHere, STDOUT=subprocess.STDOUT))
    torch.manual_seed(0)
    write_gguf(tmp_path / "a.gguf", GPT(GPTConfig(**SIZES)), tokens)
    convert.convert(tmp_path / "a.gguf", tmp_path / convert.FOLDER)
    command, = commands_of(tmp_path, "study", "real", "smoke")
    first = run_script_here(*command)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "out/study-real-smoke"
    done = (folder / "done").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert set(results["runs"]) == {"base", "sft@3e-5.0", "opct-exact@3e-5.0", "reuse-sft@3e-5.0",
                                    "reuse-sft-fresh@3e-5.0", "reuse-opct@3e-5.0"}
    facts = questions.read_facts(questions.FACTS.read_text(encoding="utf-8"))
    every = PRESETS["smoke"].every
    asked = groups(questions.pairs(facts, "test")[::every], questions.plain(facts)[::every])
    for found in results["runs"].values():
        assert all(len(found[kind]) == len(records) for kind, records in asked.items())
    assert results["runs"]["base"]["drift_kl"]["value"] == 0
    assert results["runs"]["sft@3e-5.0"]["drift_kl"]["value"] > 0
    assert "With reuse" in (folder / "tables.md").read_text()
    again = run_script_here(*command)
    assert again.returncode == 0, again.stderr
    assert (folder / "done").read_text() == done
    assert json.loads((folder / "results.json").read_text())["runs"] == results["runs"]
