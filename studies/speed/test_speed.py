"""The study speed: its floor, its plan end to end, its words from its numbers."""
import json
import re
import sys
from os.path import commonprefix
from unittest import mock

import pytest
import torch

from helpers import tiny_gpt
from model import GPTConfig, save_checkpoint
from studies.speed import __main__, real, report, run, sampler


def test_the_floor_of_a_tiny_config_by_hand():
    """One layer, width 4, one head of 2 for queries and for keys, SwiGLU of 3, 5 words.

    Weights: q 4x2, o 2x4, k and v 4x2 each: 32; MLP 3 x 4x3: 36; together 68; output 4x5: 20.
    Prefill, 2 rows of 3 tokens: 2 * 2 * 3 * 68 = 816 operations.
    Step 0 sees 3 tokens: 2 * (2 * 88 + 4 * 2 * 3) = 400 operations;
    (88 + 2 * 4 * 3) * 4 = 448 bytes. Step 1 sees 4: 416 operations, 480 bytes.
    """
    config = GPTConfig(vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1,
                       num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    assert sampler.matrix_weights(config) == (68, 20)
    slow_matrices = {"flops": 1.0, "bytes": 1e9}
    assert sampler.floor_seconds(config, 2, 3, 2, slow_matrices) == 816 + 400 + 416
    slow_memory = {"flops": 1e9, "bytes": 1.0}
    assert sampler.floor_seconds(config, 2, 3, 2, slow_memory) == pytest.approx(448 + 480, abs=1e-4)


def command(*args):
    with mock.patch.object(sys, "argv", ["speed", *map(str, args)]):
        __main__.main()


def test_smoke_end_to_end_and_taking_it_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                             # no base here
    monkeypatch.setattr(sampler, "ENDING_BATCH", 8)
    command("smoke")
    folder = tmp_path / "out/study-speed-smoke"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "results.json"]
    study = json.loads((folder / "results.json").read_text())
    assert study["about"]["command"] == "bash train.sh study speed smoke"
    for name in ("commit", "date", "machine", "torch", "threads"):
        assert study["about"][name]
    text = (folder / "README.md").read_text()
    assert not re.search(r"[{}]", text)
    assert max(map(len, text.splitlines())) <= 100

    words = report.FOLDER / "words.md"
    (tmp_path / "words.md").write_text(words.read_text())
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "MAIN", tmp_path / "main.md")
    (tmp_path / "main.md").write_text("<!-- speed -->\n<!-- end -->\n")
    command("report", folder)
    assert (tmp_path / "README.md").read_text() == text
    assert (tmp_path / "results.json").read_text() == (folder / "results.json").read_text()


def test_a_real_model_is_measured_where_its_folder_is(tmp_path, monkeypatch):
    """Two of the four processes are started: ours with LoRA, and theirs without."""
    alone, ours = real.alone, []

    def seldom_alone(base, case, who):
        if who == "theirs":
            return alone(base, case, who) if not case.lora else None
        ours[:] = ours or [alone(base, run.PRESETS["smoke"].real_cases[1], who)]
        return ours[0]

    monkeypatch.setattr(real, "alone", seldom_alone)
    monkeypatch.setattr(real, "SHARED", 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")          # for the processes that it starts
    save_checkpoint(tiny_gpt(vocab=40, dtype=torch.float32), tmp_path)
    preset, device = run.PRESETS["smoke"], torch.device("cpu")
    found = json.loads(json.dumps(
        real.measure(preset, device, lambda name, measure: measure(), tmp_path)))
    assert [row["batch"] for row in found["sampler"]] == [1, 4]
    whole, lora = found["updates"]
    for row in (whole, lora):
        memory = row["peak_bytes"]["ours"]
        assert memory["peak"] > memory["libraries"] > 1e7
    parameters = sum(p.numel() for p in tiny_gpt(vocab=40).parameters())
    assert whole["least_bytes"] == 4 * 5 * parameters
    assert 4 * parameters < lora["least_bytes"] < whole["least_bytes"]
    tables = report.real_blocks({"real": found})
    assert "| 2 x 2, 12 + 4, LoRA 2 |" in tables["real_updates"]
    assert "| 1 x 2, 12 + 8 | 28 " in re.sub(" +", " ", tables["real_growth"])
    assert all(len(text.splitlines()) >= 3 for name, text in tables.items() if name != "real_name")


def test_prompts_of_a_real_model_begin_alike():
    prompts = real.prompts_of(100, 5, 2, 50)
    assert len(prompts) == 10 and {len(p) for p in prompts} == {50}
    assert prompts[0] == prompts[1] != prompts[2]
    assert len(commonprefix(prompts)) == real.SHARED


def test_a_stopped_study_goes_on_but_not_with_another_commit(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"seconds": 1.0}

    for commit in ("a", "a", "b"):
        assert run.part("sampler", measure, {"commit": commit}, tmp_path) == {"seconds": 1.0}
    assert len(calls) == 2
    run.forget_parts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_sentences_of_what_not_every_machine_has():
    pretraining = {"compile": {"first_seconds": 33.0, "saved_seconds": 0.028}, "steps": 1700}
    trl = {"ours": [0.5, 0.5], "theirs": [1.0, 1.5], "version": "1"}
    study = {"training": {"pretraining": pretraining, "updates": [{"responses": 128}], "trl": trl},
             "real": {"sampler": [{"tokens_per_second": {"ours": 3.0, "transformers": 1.0}}],
                      "updates": [{"trl": {"ours": [1.0], "theirs": [4.0]}}]}}
    assert "saves 28.0 ms, which is 48 s in the 1,700 steps" in report.compiling(study)
    answer, numbers = report.beside_trl(study)
    assert answer.startswith("An opct-exact update is 2.5 times as fast as TRL's, on SmolLM2-135M-"
                             "Instruct 4.0 times.")
    assert "takes 500 ms, mean of 2." in numbers and "takes 1250 ms" in numbers
    assert "2.0 to 3.0 times in single" in numbers
    compared = [{"tokens_per_second": {"ours": 3.0, "transformers": 2.0}}] * 2
    study |= {"sampler": {"compared": compared, "transformers": "5"}}
    said = report.beside_transformers(study)
    assert "1.5 times as fast as `generate` of transformers 5, on SmolLM2-135M-Instruct 3.0" in said


def test_the_ratios_of_the_main_readme_by_hand():
    rows = [{"batch": batch, "tokens_per_second": {"ours": 3.0 * batch, "transformers": 2.0}}
            for batch in (1, 2)]
    memory = {"ours": {"peak": 35, "libraries": 5}, "theirs": {"peak": 55, "libraries": 10}}
    updates = [{"trl": {"ours": [1.0, 3.0], "theirs": [8.0, 2.0]}, "peak_bytes": memory,
                "least_bytes": 20}] * 2
    small = {"about": {"machine": "slow"}, "sampler": {"compared": rows},
             "training": {"trl": {"ours": [1.0], "theirs": [2.4]}},
             "real": {"sampler": rows, "updates": updates}}
    none = {"about": {"machine": "fast"}, "sampler": {"compared": [{"batch": 1,
            "tokens_per_second": {"ours": 1.0}}]}, "training": {"trl": {"missing": "x"}},
            "real": {"missing": "x"}}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in report.in_short([small, none]).splitlines()]
    assert lines[0] == ["times better here", "slow", "fast"] and lines[2][0].endswith("batch 1, 2")
    assert [line[1] for line in lines[2:]] == ["1.5, 3.0", "1.5, 3.0", "2.4", "2.5, 2.5",
                                               "1.5, 1.5"]
    assert {line[2] for line in lines[2:]} == {"-"}
    # A machine that was measured at other batches shows those of the first one.
    other = {**small, "sampler": {"compared": rows[1:]}}
    assert report.in_short([other, small]).count("| 3.0") == 2


def test_words_type_no_numbers():
    words = re.sub(r"\{\w+\}", "", (report.FOLDER / "words.md").read_text())
    assert not re.search(r"\d", words)


@pytest.mark.skipif(not (report.FOLDER / "results.json").exists(),
                    reason="studies/speed/results.json is not there yet: run the study")
def test_the_readme_is_made_from_the_committed_results():
    words = (report.FOLDER / "words.md").read_text()
    text, study = (report.FOLDER / "README.md").read_text(), report.read(report.FOLDER)
    assert report.readme(study, words) == text
    studies = [study, report.read(report.FOLDER / "gpu")]
    assert report.in_short(studies) in report.MAIN.read_text()


def test_the_page_of_the_gpu_is_made_from_its_results():
    folder = report.FOLDER / "gpu"
    words = (report.FOLDER / "words.md").read_text()
    study = report.read(folder)
    assert "H100" in study["about"]["machine"]
    assert report.readme(study, words) == (folder / "README.md").read_text()
