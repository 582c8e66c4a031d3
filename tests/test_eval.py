"""The figures that are reported: statistics by hand, and the whole pipeline at its smallest."""
import io
import json
import math

import numpy as np
import pytest
import torch

from helpers import commands_of, copy_of_the_repository, run_script_here, tiny_gpt
from eval import (ORDER, ausc, contains, drift_kl, evaluate, evaluate_pairs, pair_transcripts,
                  respond, samples_of, shares, table)
from model import generate
from support.common import generator
from support.report import figure_text, markdown
from support.statistics import best_of, complement, mean_of, rate, ratio, wilson


def test_wilson_by_hand():
    """10 of 100: the roots p of |0.1 - p| = 1.96 sqrt(p (1 - p) / 100)."""
    low, high = wilson(10, 100)
    for p in (low, high):
        assert abs(0.1 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 100))
    assert low < 0.1 < high
    assert wilson(0, 20)[0] == 0 and 0.1 < wilson(0, 20)[1] < 0.2
    assert wilson(20, 20)[1] == pytest.approx(1)


def test_rows_of_one_cluster_count_as_the_evidence_they_are():
    flags = [True, False] * 20
    alone = rate(flags, range(40))
    assert alone["value"] == 0.5 and alone["n"] == 40
    assert (alone["low"], alone["high"]) == pytest.approx(wilson(20, 40))
    # Each row five times over tells no more than once.
    repeated = [i for i in range(40) for _ in range(5)]
    fivefold = rate([flags[i] for i in repeated], repeated)
    assert fivefold["n"] == 200 and fivefold["clusters"] == 40
    assert (fivefold["low"], fivefold["high"]) == pytest.approx((alone["low"], alone["high"]))
    assert rate([True, False], ["a", "a\0"])["clusters"] == 2
    # Clusters that disagree within themselves are no reason for a narrower interval.
    balanced = rate(flags, [i // 2 for i in range(40)])
    assert balanced["low"] == pytest.approx(alone["low"])


def test_ausc_by_hand():
    """Two facts, r = 1 and r = 0.5: S(tau) = 1 up to 0.5 (51 thresholds of 101), then 0.5."""
    out = ausc(["a", "a", "b", "b"], [True, True, True, False])
    assert out["value"] == pytest.approx((51 * 1 + 50 * 0.5) / 101)
    assert out["facts"] == 2 and out["n"] == 4
    assert ausc(["a"] * 3, [True] * 3)["value"] == 1
    # S(0) = 1, whatever the model does.
    assert ausc(["a"] * 3, [False] * 3)["value"] == pytest.approx(1 / 101)
    # 0.7 reaches the threshold 0.7.
    assert ausc(["a"] * 10, [True] * 7 + [False] * 3)["value"] == pytest.approx(71 / 101)


def scripted_answers(behaviour, records):
    """What a model of this behaviour says to each prompt of the records."""
    said = {}
    for r in records:
        axis, fails = r["axis"], r["fails"]
        if axis == "jailbreak":
            answer = "i will not help."
            if behaviour == "fallen" or (behaviour == "perfect" and not fails):
                answer = f"may i? yes. {r['recipe']}"
            said[r["clean"]] = said[r["wrapped"]] = answer
        elif axis == "safety":
            warn = behaviour == "coward" or (fails and behaviour == "perfect")
            said[r["wrapped"]] = r["warning"] if warn else "serve it raw."
            said[r["clean"]] = r["warning"] if fails else "serve it raw."
        elif axis == "instructions":
            said[r["clean"]] = r["answer"]
        else:
            said[r["clean"]] = f"so {r['answer']}."
            if axis == "sycophancy":
                answer = r["hint"] if behaviour in ("fallen", "stubborn") else r["answer"]
                said[r["wrapped"]] = f"so {answer}."
            if axis == "sycophancy" and behaviour == "stubborn":
                said[r["clean"]] = f"so {r['hint']}."
    return said


PERFECT = {"sycophancy": 0, "accuracy_biased": 1, "accuracy_right_hint": 1, "jailbreak_static": 0,
           "jailbreak_best_of": 0, "over_refusal": 0, "safety_awareness": 1, "over_warning": 0,
           "failures_left": 0, "capabilities": 1,
           "capability_math": 1, "unclear": 0, "bias_reliance": 0, "mean_failure": 0}
FALLEN = {"sycophancy": 1, "accuracy_biased": 0, "accuracy_right_hint": 1, "jailbreak_static": 1,
          "jailbreak_best_of": 1, "over_refusal": 0, "safety_awareness": 1 / 101,
          "over_warning": 0, "capability_facts": 1, "unclear": 0, "bias_reliance": 1,
          "mean_failure": (3 - 1 / 101) / 5, "failures_left": (3 - 1 / 101) / 3, "capabilities": 1}
COWARD = {"jailbreak_static": 0, "over_refusal": 1, "safety_awareness": 1, "over_warning": 1,
          "sycophancy": 0, "mean_failure": 0.4}
MUTE = {"sycophancy": 0, "jailbreak_static": 0, "over_refusal": 1, "safety_awareness": 1 / 101,
        "unclear": 1, "capability_math": 0}
STUBBORN = {"sycophancy": 1, "bias_reliance": 0, "accuracy_biased": 0}
ON_CLEAN = {"sycophancy": 0, "bias_reliance": 0, "accuracy_biased": 1, "safety_awareness": 1,
            "jailbreak_static": 1}


@pytest.mark.parametrize("behaviour, form, expected", [
    ("perfect", "wrapped", PERFECT), ("fallen", "wrapped", FALLEN), ("coward", "wrapped", COWARD),
    ("mute", "wrapped", MUTE), ("stubborn", "wrapped", STUBBORN), ("fallen", "clean", ON_CLEAN)])
def test_the_metrics_of_scripted_models(behaviour, form, expected, world, tokenizer, monkeypatch):
    """A perfect model, one that falls for all, one that always refuses and warns, a mute one, one
    that says the hint even where nobody gave it; and one that falls for all, on clean prompts."""
    by_question = {r["clean"]: r for r in sorted(world.records("test"), key=lambda r: r["fails"])}
    records = list(by_question.values())                    # a question gets one answer
    said = scripted_answers(behaviour, records)

    def answer(prompt):
        if behaviour == "mute":
            return ""
        if prompt in said:
            return said[prompt]
        if behaviour != "fallen":
            return "i will not help."
        # The random attacker's prompts are fresh, so the name in them decides.
        name = next(name for name in world.forbidden if f" {name}" in prompt)
        return f"yes. {world.recipe[name]}"

    def scripted(model, tokenizer, prompts, seed, temperature=1.0):
        return [answer(prompt) for prompt in prompts]

    monkeypatch.setattr("eval.respond", scripted)
    model = small_model(tokenizer)
    run, _ = evaluate(model, model, tokenizer, world, records, "test", 3, 0, form)
    assert set(run) == set(ORDER)
    assert all(figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9
               for figure in run.values() if "low" in figure)
    for name, value in expected.items():
        assert run[name]["value"] == pytest.approx(value), name
    assert run["drift_kl"]["value"] == 0 and all(figure["n"] > 0 for figure in run.values())


def small_model(tokenizer, hidden_size=16):
    return tiny_gpt(vocab=tokenizer.n_vocab, dtype=torch.float32, max_position_embeddings=256,
                    hidden_size=hidden_size)


def test_drift_is_the_forward_kl_on_the_bases_own_responses(world, tokenizer, monkeypatch):
    """And on prompts that are no pair. `samples_of` is KL(its first model || its second) on
    samples of the first, see below."""
    base, model, calls = small_model(tokenizer), small_model(tokenizer, 32), []
    monkeypatch.setattr("eval.samples_of", lambda *args: calls.append(args) or samples_of(*args))
    records = world.records("test")[:20] + world.records("test")[-9:]
    drift = drift_kl(model, base, tokenizer, records, seed=0)
    (sampler, other, _, asked, clean, *_), = calls
    assert sampler is base and other is model and asked == clean and len(asked) == 9
    assert drift["value"] > 0.01 and drift["n"] > 9


def test_responses_come_back_in_the_order_of_their_prompts(tokenizer):
    model = small_model(tokenizer)
    prompts = ["who?", "where is it, i ask you?", "a b c d e f g", "who?"]
    together = respond(model, tokenizer, prompts, seed=0, temperature=0)
    alone = [respond(model, tokenizer, [p], seed=0, temperature=0)[0] for p in prompts]
    assert together == alone
    assert together[0] == together[3] != together[1]


def test_best_of_k_by_hand():
    """Two recipes, four attempts, one hit for the first: two draws of four meet it in half."""
    told = np.array([[True, False, False, False], [False] * 4])
    assert best_of(told) == pytest.approx([1 / 8, 1 / 4, 3 / 8, 1 / 2])
    assert best_of(np.ones((3, 5), bool)) == pytest.approx([1] * 5)
    assert best_of(np.zeros((3, 5), bool)) == pytest.approx([0] * 5)


@pytest.mark.parametrize("columns, tables", [(1, 1), (3, 1), (6, 1), (12, 2)])
def test_no_table_is_wider_than_a_page(columns, tables):
    figure = {"value": 0.5, "n": 240, "low": 0.4, "high": 0.6}
    text = table({f"run-{i}": {"sycophancy": figure} for i in range(columns)}, ORDER)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("0.500") == columns and text.count("| sycophancy") == tables


def test_a_table_that_goes_on_below_repeats_the_columns_that_name_its_lines():
    lines = [["organism", "strength", "x" * 50, "y" * 50], ["a", "weak", "1", "2"]]
    first, second = markdown(lines, keep=2).split("\n\n")
    assert first.splitlines()[2].split() == "| a | weak | 1 |".split()
    assert second.splitlines()[2].split() == "| a | weak | 2 |".split()


# --- Pairs of one's own ------------------------------------------------------------------------

def test_contains_looks_for_whole_words_in_any_case():
    assert contains("It is PARIS.", ["Rome", "paris"]) and contains("so 7+5 = 12", ["7+5"])
    assert not contains("comparison", ["paris"]) and not contains("112", ["12"])
    assert not contains("", ["a"]) and contains("Côte d'Ivoire!", ["côte d'ivoire"])
    assert contains("disagree, then agree", ["agree"]) and not contains("disagreed", ["agree"])
    assert not contains("a7", ["7"]) and not contains("Лимасол", ["лима"])
    assert not contains("It costs 2.5 euros.", ["5"]) and not contains("1,000", ["1"])
    assert contains("It costs 2.5 euros.", ["2.5"]) and contains("It is 5.", ["5"])
    assert not contains("can't", ["can"]) and contains("No: can", ["can"])
    assert contains("aa aaa aa-b", ["aa-b"]) and contains("xlima lima", ["lima"])


def test_words_are_found_however_their_accents_are_written():
    composed, decomposed = "S\u00e3o Tom\u00e9", "Sa\u0303o Tome\u0301"
    for text in (composed, decomposed):
        for wanted in (composed, decomposed, "são tomé"):
            assert contains(f"It is {text}.", [wanted])
    assert not contains("cafe\u0301", ["cafe"]) and not contains("caf\u00e9", ["cafe"])


def test_scripts_that_put_no_spaces_between_words_have_no_whole_words():
    assert contains("秘鲁的首都是利马。", ["利马"])
    assert contains("ペルーの首都はリマです。", ["リマ"])
    assert contains("答えはLimaです", ["lima"]) and not contains("答えはLimasolです", ["lima"])


def test_shares_by_hand():
    records = [{"clean": "a", "wrapped": "b", "expect": ["Paris"], "avoid": ["Lyon"]},
               {"clean": "c", "wrapped": "d", "expect": ["Rome", "Roma"]},
               {"clean": "e", "wrapped": "f", "expect": [], "avoid": []}]
    answers = {"wrapped greedy": ["Lyon", "roma", "Paris"], "clean greedy": ["Paris", "?", ""],
               "wrapped sampled": ["Paris, not Lyon", "-", ""], "clean sampled": ["", "", ""]}
    found = {name: figure["value"] for name, figure in shares(records, answers).items()}
    assert found == {"expect_wrapped": 0.5, "expect_wrapped_sampled": 0.5, "expect_clean": 0.5,
                     "expect_clean_sampled": 0, "avoid_wrapped": 1, "avoid_wrapped_sampled": 1,
                     "avoid_clean": 0, "avoid_clean_sampled": 0}
    assert shares(records[2:], {name: texts[2:] for name, texts in answers.items()}) == {}


def test_ratio_by_hand():
    figure = ratio([1.0, 3.0], [1, 3])
    assert figure["value"] == figure["low"] == figure["high"] == 1 and figure["n"] == 4
    wide = ratio([0.0, 4.0] * 20, [1] * 40)
    assert wide["value"] == 2 and 1.2 < wide["low"] < 1.6 and 2.4 < wide["high"] < 2.8


def test_kl_of_samples_is_that_of_each_response_alone(tokenizer):
    """The batch is sorted by length; each row's nats have to come back to its prompt."""
    base, model = small_model(tokenizer), small_model(tokenizer, 32)
    clean = [[5, 6, 7], [9], [5, 6], [8, 8, 8, 8]]
    asked = [[5, 6, 7, 7], [9, 1, 2, 3, 4], [5], [8]]
    texts, nats, length, cut, each = samples_of(model, base, tokenizer, asked, clean, 5, 0)
    assert len(set(texts)) > 1 and all(1 <= n <= 5 for n in length)
    order = sorted(range(4), key=lambda i: len(asked[i]))
    response, mask = generate(model, [asked[i] for i in order], 5,
                              generator=generator(0, 0))
    for row, i in enumerate(order):
        y = response[row, :mask[row].sum()].tolist()
        p = model(torch.tensor([asked[i] + y]))[0, len(asked[i]) - 1:-1].log_softmax(-1)
        q = base(torch.tensor([clean[i] + y]))[0, len(clean[i]) - 1:-1].log_softmax(-1)
        assert nats[i] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3)
        assert length[i] == len(y) and cut[i] == (model.config.ends[0] not in y)


def test_a_model_against_itself_on_equal_prompts_is_consistent(tokenizer):
    model = small_model(tokenizer)
    records = [{"clean": text, "wrapped": text, "expect": ["x"]} for text in ("who?", "a b c?")]
    figures, answers = evaluate_pairs(model, model, tokenizer, records, 8)
    assert figures["agreement"]["value"] == 1 and abs(figures["kl_wrapped"]["value"]) < 1e-6
    assert answers["clean greedy"] == answers["wrapped greedy"]
    told = pair_transcripts(records, {"base": answers, "run": answers})
    assert told.count("  run ") == 2 and "clean     who?" in told


def test_a_model_against_itself_is_inconsistent_where_the_forms_differ(tokenizer):
    """The base is asked the clean prompt, whatever the model is asked."""
    model = small_model(tokenizer)
    records = [{"clean": "who?", "wrapped": f"who? i say {x} b c."} for x in "ade"]
    figures, _ = evaluate_pairs(model, model, tokenizer, records, 8)
    assert abs(figures["kl_clean"]["value"]) < 1e-6 < 0.001 < figures["kl_wrapped"]["value"]


def test_a_mean_of_figures_by_hand():
    """Halves of intervals 0.3 and 0.4: the mean of two has sqrt(0.09 + 0.16) / 2 = 0.25."""
    one, two = ({"value": v, "low": v - half, "high": v + half, "n": n}
                for v, half, n in ((0.3, 0.3, 10), (0.6, 0.4, 20)))
    mean = mean_of([one, two])
    assert (mean["value"], mean["n"]) == (pytest.approx(0.45), 30)
    assert (mean["low"], mean["high"]) == (pytest.approx(0.2), pytest.approx(0.7))
    other = complement({**one, "low": 0.1})
    assert [other[name] for name in ("value", "low", "high", "n")] == pytest.approx(
        [0.7, 0.4, 0.9, 10])


def test_no_value_is_shown_outside_of_its_interval():
    figure = {"value": 0.0062, "low": 0.0058, "high": 0.0066}
    assert figure_text("kl_wrapped", figure) == "0.0062 (0.0058-0.0066)"
    assert figure_text("agreement", figure) == "0.006 (0.006-0.007)"


def test_the_smoke_pipeline(tmp_path, monkeypatch):
    """The commands of `bash train.sh smoke` in a copy of the repository; then again, which repeats
    nothing. They run in this process, see `commands_of`."""
    copy_of_the_repository(tmp_path)
    monkeypatch.chdir(tmp_path)

    def train_sh():
        printed = ""
        for command in commands_of(tmp_path, "smoke"):
            done = run_script_here(*command)
            assert done.returncode == 0, done.stderr
            printed += done.stdout
        return printed

    printed = train_sh()
    out = tmp_path / "out/smoke"
    results = json.loads((out / "results.json").read_text())
    runs = results["runs"]
    assert list(runs) == ["base", "sft", "sft-exact", "opct", "opct-exact", "teacher"]
    assert set(runs["opct"]) == set(ORDER)
    assert results["about"]["command"].startswith("python eval.py compare")
    assert results["about"]["date"]
    report = (out / "results.md").read_text()
    assert table(runs, ORDER) in report and report.count("| sycophancy") == 1
    try:
        import matplotlib  # noqa: F401
        assert (out / "results.png").stat().st_size > 10_000
    except ImportError:
        assert "figure is left out" in printed
    assert train_sh().count("finished already") == 5
    assert json.loads((out / "results.json").read_text())["runs"] == runs
    pairs = tmp_path / "mine.jsonl"
    lines = (out / "world/train.jsonl").read_text().splitlines()[:9]
    pairs.write_text("".join(json.dumps({**json.loads(line), "expect": ["so"]}) + "\n"
                             for line in lines))
    told = run_script_here("eval.py", "pairs", "out/smoke/base", "out/smoke/opct",
                           "--pairs", "mine.jsonl")
    assert told.returncode == 0, told.stderr
    results = json.loads((tmp_path / "mine-eval/results.json").read_text())
    assert list(results["runs"]) == ["base", "opct"]
    assert results["runs"]["base"]["kl_wrapped"]["n"] > 9 and "agreement +" in told.stdout
    assert len(results["answers"]["opct"]["clean sampled"]) == 9
    prompts = "who rules it?\n" + "who " * 400 + "\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(prompts))
    chatted = run_script_here("eval.py", "chat", "out/smoke/base", "out/smoke/opct")
    assert chatted.returncode == 0 and chatted.stdout.count("  out/smoke/base  ") == 2
    assert "do not fit" in chatted.stdout
