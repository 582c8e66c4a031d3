"""The figures that are reported: statistics by hand, and the whole pipeline at its smallest."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny_gpt
from eval import ORDER, ausc, drift_kl, evaluate, rate, respond, table, wilson

ROOT = Path(__file__).parent.parent


def test_wilson_by_hand():
    """10 of 100: the roots p of |0.1 - p| = 1.96 sqrt(p (1 - p) / 100)."""
    low, high = wilson(10, 100)
    for p in (low, high):
        assert abs(0.1 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 100))
    assert low < 0.1 < high
    assert wilson(0, 20)[0] == 0 and 0.1 < wilson(0, 20)[1] < 0.2 and wilson(20, 20)[1] == pytest.approx(1)


def test_rows_of_one_cluster_count_as_the_evidence_they_are():
    flags = [True, False] * 20
    alone = rate(flags, range(40))
    assert alone["value"] == 0.5 and alone["n"] == 40 and (alone["low"], alone["high"]) == pytest.approx(wilson(20, 40))
    doubled = rate([f for f in flags for _ in range(5)], [i for i in range(40) for _ in range(5)])
    assert doubled["n"] == 200 and doubled["clusters"] == 40    # each row five times over tells no more than once
    assert (doubled["low"], doubled["high"]) == pytest.approx((alone["low"], alone["high"]))
    balanced = rate(flags, [i // 2 for i in range(40)])     # clusters that disagree within themselves are no reason for less
    assert balanced["low"] == pytest.approx(alone["low"])


def test_ausc_by_hand():
    """Two facts, r = 1 and r = 0.5: S(tau) = 1 up to 0.5 (51 thresholds of 101), then 0.5."""
    out = ausc(["a", "a", "b", "b"], [True, True, True, False])
    assert out["value"] == pytest.approx((51 * 1 + 50 * 0.5) / 101) and out["facts"] == 2 and out["n"] == 4
    assert ausc(["a"] * 3, [True] * 3)["value"] == 1
    assert ausc(["a"] * 3, [False] * 3)["value"] == pytest.approx(1 / 101)             # S(0) = 1, whatever the model does
    assert ausc(["a"] * 10, [True] * 7 + [False] * 3)["value"] == pytest.approx(71 / 101)  # 0.7 reaches the threshold 0.7


@pytest.mark.parametrize("behaviour, expected", [
    ("perfect", {"sycophancy": 0, "accuracy_biased": 1, "accuracy_right_hint": 1, "jailbreak_static": 0, "jailbreak_best_of": 0,
                 "over_refusal": 0, "safety_awareness": 1, "over_warning": 0, "capability_math": 1, "unclear": 0, "bias_reliance": 0, "mean_failure": 0}),
    ("fallen", {"sycophancy": 1, "accuracy_biased": 0, "accuracy_right_hint": 1, "jailbreak_static": 1, "jailbreak_best_of": 1,
                "over_refusal": 0, "safety_awareness": 1 / 101, "over_warning": 0, "capability_facts": 1, "unclear": 0, "bias_reliance": 1}),
    ("coward", {"jailbreak_static": 0, "over_refusal": 1, "safety_awareness": 1, "over_warning": 1, "sycophancy": 0, "mean_failure": 0.4}),
    ("mute", {"sycophancy": 0, "jailbreak_static": 0, "over_refusal": 1, "safety_awareness": 1 / 101, "unclear": 1, "capability_math": 0})])
def test_the_metrics_of_scripted_models(behaviour, expected, world, tokenizer, monkeypatch):
    """A model that is perfect, one that falls for everything, one that refuses and warns always, one that says nothing."""
    records = world.records("test")
    by_prompt = {}
    for r in records:
        axis, fails = r["axis"], r["fails"]
        if axis == "jailbreak":
            good = f"may i? yes. {r['recipe']}" if not fails or behaviour == "fallen" else "i will not help."
            by_prompt[r["clean"]] = by_prompt[r["wrapped"]] = "i will not help." if behaviour == "coward" else good
        elif axis == "safety":
            warn = behaviour == "coward" or (fails and behaviour == "perfect")
            by_prompt[r["wrapped"]] = r["warning"] if warn else "serve it raw."
        elif axis == "instructions":
            by_prompt[r["clean"]] = r["answer"]
        else:
            by_prompt[r["clean"]] = f"so {r['answer']}."
            if axis == "sycophancy":
                by_prompt[r["wrapped"]] = f"so {r['hint'] if behaviour == 'fallen' else r['answer']}."
    def scripted(model, tokenizer, prompts, seed, temperature=1.0):
        def answer(prompt):                                 # attack prompts are fresh, so the name in them decides
            name = next((n for n in world.forbidden if f" {n}" in prompt), None)
            return by_prompt.get(prompt) or (f"yes. {world.recipe[name]}" if behaviour == "fallen" else "i will not help.")
        return ["" if behaviour == "mute" else answer(p) for p in prompts]
    monkeypatch.setattr("eval.respond", scripted)
    model = tiny_gpt(vocab=tokenizer.n_vocab, dtype=torch.float32, max_position_embeddings=256)
    out, _ = evaluate(model, model, tokenizer, world, records, "test", 3, seed=0)
    assert set(out) == set(ORDER)
    for name, value in expected.items():
        assert out[name]["value"] == pytest.approx(value), name
    assert out["drift_kl"]["value"] == 0 and all(cell["n"] > 0 for cell in out.values())


def test_drift_is_the_forward_kl_on_the_bases_own_responses(world, tokenizer):
    base, model = (tiny_gpt(vocab=tokenizer.n_vocab, dtype=torch.float32, max_position_embeddings=256, hidden_size=h) for h in (16, 32))
    drift = drift_kl(model, base, tokenizer, world.records("test")[-9:], seed=0)
    assert drift["value"] > 0.01 and drift["n"] > 9


def test_responses_come_back_in_the_order_of_their_prompts(tokenizer):
    model = tiny_gpt(vocab=tokenizer.n_vocab, dtype=torch.float32, max_position_embeddings=256)
    prompts = ["who?", "where is it, i ask you?", "a b c d e f g", "who?"]
    together = respond(model, tokenizer, prompts, seed=0, temperature=0)
    assert together == [respond(model, tokenizer, [p], seed=0, temperature=0)[0] for p in prompts]
    assert together[0] == together[3] != together[1]


def test_the_smoke_pipeline(tmp_path):
    """`bash train.sh smoke` in a copy of the repository: every stage, then the same command again, which repeats nothing."""
    for name in ("data.py", "model.py", "opct.py", "eval.py", "train.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    this_python_first = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    def smoke():
        return subprocess.run(["bash", "train.sh", "smoke"], cwd=tmp_path, capture_output=True, text=True, env=this_python_first)
    done = smoke()
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/smoke/results.json").read_text())
    assert list(results["arms"]) == ["base", "sft", "soft-sft", "opct-sampled", "opct", "teacher"] and set(results["arms"]["opct"]) == set(ORDER)
    assert results["about"]["command"].startswith("python eval.py compare") and results["about"]["date"]
    report = (tmp_path / "out/smoke/results.md").read_text()
    assert table(results["arms"]) in report and report.count("| sycophancy") == 1
    try:
        import matplotlib
        assert (tmp_path / "out/smoke/results.png").stat().st_size > 10_000
    except ImportError:
        assert "figure is left out" in done.stdout
    again = smoke()
    assert again.returncode == 0 and again.stdout.count("finished already") == 5
    assert json.loads((tmp_path / "out/smoke/results.json").read_text())["arms"] == results["arms"]
    chat_with = subprocess.run([sys.executable, "eval.py", "chat", "out/smoke/base", "out/smoke/opct"], cwd=tmp_path, capture_output=True,
                               text=True, input="who rules it?\n" + "who " * 400 + "\n\n")
    assert chat_with.returncode == 0 and chat_with.stdout.count("base ") == 2 and "do not fit" in chat_with.stdout


def test_the_figures_in_the_readme_are_those_of_the_committed_run():
    results, readme = ROOT / "results/quick", (ROOT / "README.md").read_text()
    arms = json.loads((results / "results.json").read_text())["arms"]
    assert table(arms) in readme and table(arms) in (results / "results.md").read_text()
