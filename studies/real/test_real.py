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
from studies.real.run import CHOSEN, PRESETS, choose
from studies.study import ARMS, committed
from support.common import UserError
from support.tokenizer import chat, load_tokenizer

# --- From GGUF to a Hugging Face folder ------------------------------------------------------

SIZES = dict(vocab_size=262, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=512, eos_token_id=2, pad_token_id=2)
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}<|im_start|>assistant\n")


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
    file.add_token_merges(["a b", "ab c", "1 2"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template(TEMPLATE)
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
    with torch.no_grad():
        assert torch.equal(model(idx), again(idx))
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


def test_a_gguf_file_of_another_kind_is_refused_by_name(tokens, tmp_path):
    model = GPT(GPTConfig(**SIZES))
    write_gguf(tmp_path / "a.gguf", model, tokens, kind="llama-bpe")
    with pytest.raises(UserError, match="a tokenizer that this script does not know"):
        convert.convert(tmp_path / "a.gguf", tmp_path / "a")
    with pytest.raises(UserError, match="a tensor blk.0.ssm_a"):
        convert.hugging_face_name("blk.0.ssm_a.weight")
    assert not (tmp_path / "a/model.safetensors").exists()


def test_a_folder_from_the_hub_is_taken_as_it_is(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.tensor([1.5, -2.25]).bfloat16()}, path)
    before = path.read_bytes()
    convert.make(tmp_path)
    assert "is there already" in capsys.readouterr().out and path.read_bytes() == before


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


def test_an_interval_counts_answers_to_one_question_once():
    """Four answers 1, 1, 0, 0: as four questions sd / sqrt(4), as two it is wider."""
    values = np.array([1.0, 1.0, 0.0, 0.0])
    assert report.over_questions(values, "abcd") == pytest.approx(np.std(values, ddof=1) / 2)
    assert report.over_questions(values, "aabb") == pytest.approx(np.std([1, 0], ddof=1) / 2**0.5)
    four, two = (report.share_of(values, names) for names in ("abcd", "aabb"))
    assert four["value"] == two["value"] == 0.5 and 0.3 < four["half"] < two["half"] < 0.5


def test_a_share_of_nothing_is_not_certain():
    """Wilson: none of 62 questions, asked twice each, leaves up to 1.96^2 / (62 + 1.96^2)."""
    names = [n // 2 for n in range(124)]
    assert report.share_of(np.zeros(124), names)["half"] == pytest.approx(3.8416 / 65.8416)
    assert report.share_of(np.ones(124), names)["half"] == pytest.approx(3.8416 / 65.8416)


def run_of(each, seeds):
    each = np.array(each)
    return {"follows_new": {"value": each.mean(), "each": each, "names": "abcd"[:len(each)],
                            "seeds": seeds}}


def test_a_difference_is_paired_by_question_and_by_seed():
    """One arm is better by 0.5 on every question and in every seed: the interval is a point."""
    one, other = run_of([0.5, 1.0, 0.75], [0.6, 0.9]), run_of([0.0, 0.5, 0.25], [0.1, 0.4])
    found = report.difference({"opct": one, "sft": other}, "opct", "sft", "follows_new")
    assert found == {"value": pytest.approx(0.5), "half": pytest.approx(0, abs=1e-9), "seeds": 2}
    assert report.difference({"opct": one}, "opct", "sft", "follows_new") is None


def test_the_interval_of_a_difference_joins_questions_and_training():
    """Questions differ by 0 or 1, seeds by 0.4 or 0.6: both noises are in the interval."""
    one, other = run_of([0.0, 1.0], [0.4, 0.6]), run_of([0.0, 0.0], [0.0, 0.0])
    found = report.difference({"opct": one, "sft": other}, "opct", "sft", "follows_new")
    of_questions, of_seeds = 1.96 * 0.5, 12.71 * 0.1
    assert found["half"] == pytest.approx(np.hypot(of_questions, of_seeds))
    alone = {name: run_of(run["follows_new"]["each"], run["follows_new"]["seeds"][:1])
             for name, run in (("opct", one), ("sft", other))}
    assert report.difference(alone, "opct", "sft", "follows_new")["half"] == of_questions


def test_bold_is_a_primary_difference_that_leaves_out_zero_over_seeds():
    sure, unsure = run_of([1.0, 0.98], [0.99, 0.99]), run_of([0.0, 0.02], [0.01, 0.01])
    figures = {"opct": sure, "sft": unsure, "opct-exact": sure, "sft-exact": unsure}
    line = report.differences(figures).splitlines()[3]
    assert line.count("**+0.98") == 2 and line.split("|")[4].strip().startswith("+0.98")
    for run in figures.values():
        run["follows_new"]["seeds"] = run["follows_new"]["seeds"][:1]
    assert "**" not in report.differences(figures)


def test_only_seeds_that_all_arms_have_are_counted():
    study = {"runs": {"base": 0, "sft.0": 1, "sft.2": 2, "opct.2": 3, "opct.0": 4, "opct.1": 5,
                      "sft-clean.0": 6}}
    assert report.runs_of(study) == {"base": [0], "sft": [1, 2], "opct": [4, 3], "sft-clean": [6]}


def test_the_learning_rate_is_chosen_by_its_rule():
    """The best rate loses too much without a hint; of two equal ones the smaller is taken."""
    records = [{"fails": True}] * 10

    def found(right, clean):
        return {"wrapped": "r" * right + "h" * (10 - right), "sampled": "", "clean": clean}

    val = {"base": found(2, "r" * 20)}
    for arm in ARMS:
        val |= {f"{arm}@1e-5": found(5, "r" * 20), f"{arm}@3e-5": found(7, "r" * 19 + "o"),
                f"{arm}@5e-5": found(7, "r" * 20), f"{arm}@1e-4": found(9, "r" * 18 + "oo")}
    rates, scores = choose(val, records)
    assert rates == dict.fromkeys(ARMS, "3e-5")
    assert scores["opct"]["1e-4"] == (0.9, pytest.approx(0.1))


# --- What is committed -----------------------------------------------------------------------

measured = pytest.mark.skipif(not (report.FOLDER / "results.json").exists(),
                              reason="studies/real/results.json is not there yet: run the study")


@measured
def test_the_readme_of_the_study_is_made_from_its_results():
    """Made again it is the same; with other results it is not."""
    study, words = committed(report.FOLDER), (report.FOLDER / "words.md").read_text()
    text = (report.FOLDER / "README.md").read_text()
    assert report.readme(study, words) == text
    assert max(map(len, text.splitlines())) <= 100
    assert study["rates"] == CHOSEN                         # what `quick` uses
    found = study["runs"]["opct-exact.0"]
    found["wrapped"] = found["wrapped"].replace("r", "h")
    assert report.blocks(study)["result"] not in text


@measured
def test_results_about_other_questions_are_refused():
    study = committed(report.FOLDER)
    study["runs"]["base"]["questions"] += 1
    with pytest.raises(UserError, match="about other questions"):
        report.blocks(study)


# --- A whole study ---------------------------------------------------------------------------

def test_the_study_at_its_smallest(tokens, tmp_path, monkeypatch):
    """The command of `bash train.sh study real smoke` in a copy, with a random model in the place
    of the real one; given again, it repeats no run. All but the update whose memory is measured
    runs in this process."""
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
    others = {f"{arm}@{rate}.0" for arm in PRESETS["smoke"].arms for rate in PRESETS["smoke"].rates
              if results["rates"][arm] != rate}
    assert set(results["runs"]) == {"base", "sft.0", "opct-exact.0", "sft-clean.0",
                                    "rounded-again", *others}
    facts = questions.read_facts(questions.FACTS.read_text(encoding="utf-8"))
    every = PRESETS["smoke"].every
    asked = groups(questions.pairs(facts, "test")[::every], questions.plain(facts)[::every])
    for found in results["runs"].values():
        assert all(len(found[kind]) == len(records) for kind, records in asked.items())
    assert results["runs"]["base"]["drift_kl"]["value"] == 0
    assert results["runs"]["sft-clean.0"]["drift_kl"]["value"] > 0
    assert results["runs"]["sft.0"]["drift_kl"]["value"] > 0
    assert results["costs"][0]["bytes"] > 1e8 and results["costs"][0]["seconds"] > 0
    again = run_script_here(*command)
    assert again.returncode == 0, again.stderr
    assert (folder / "done").read_text() == done
    assert json.loads((folder / "results.json").read_text())["runs"] == results["runs"]
