"""Experiment 1: its plan, its sums and its table from hand-made results, the gradient's noise."""
import copy
import json

import pytest
import torch

from helpers import ROOT, tiny_gpt
from opct import ConsistencyConfig
from studies.claims import frontier
from studies.claims.frontier import (FRONTIERS, SIX, quick_table, rounded, stages, take_over,
                                     with_sums)
from studies.claims.noise import gradient_noise
from support.common import UserError, read_json, write_json

ABOUT = {"date": "d", "machine": "m", "torch": "t", "commit": "c", "command": "long"}


def run(left, right, **more):
    """Figures of a run that fails at `left` of each axis and is right in `right` of each kind."""
    return {"sycophancy": left, "jailbreak_static": left, "safety_awareness": 1 - left,
            "capability_math": right, "capability_facts": right, "capability_instructions": right,
            "over_refusal": 0.25, "drift_kl": 0.0125, **more}


def cell(shift=0.0):
    runs = {"base": run(0.5, 0.9)}
    for number, arm in enumerate(SIX):
        runs[f"{arm}@6e-4"] = run(0.1 + shift, 0.8 - number / 100)
    return {"about": ABOUT, "runs": runs}


def test_all_arms_have_the_same_rates_updates_and_responses():
    """What differs between two arms at a point and a rate is the method and the loss alone."""
    plan = FRONTIERS["full"]
    names = {}
    for stage in stages("out", plan, plan.seeds):
        for _, name, argv in stage:
            assert name not in names, "nothing is done twice"
            names[name] = " ".join(argv[1:])
    for point, rates in (("12x240", ("1.5e-4", "3e-4", "6e-4")), ("108x480", ("3e-4", "6e-4"))):
        for seed in range(5):
            for rate in rates:
                alike = set()
                for arm, (method, loss) in SIX.items():
                    text = names[f"llama-{seed}/{point}/{arm}@{rate}"]
                    assert f"--lr {rate} " in text and f"--seed {seed} " in text
                    alike.add(text.replace(f"opct.py {method} --base", "").replace(
                        f"--loss {loss} ", "").replace(f"/{arm}@", "/"))
                assert len(alike) == 1
    assert "--stored 0 " in names["llama-0/12x240/sft-fresh@6e-4"]
    assert "--stored 64 " in names["llama-0/12x240/sft-64@6e-4"]


def test_the_quick_preset_stands_at_the_point_that_the_readme_shows():
    script, plan = (ROOT / "train.sh").read_text(), FRONTIERS["full"]
    point = plan.points[0]
    assert point.name == frontier.QUICK_POINT and f"rate={frontier.QUICK_RATE};" in script
    assert f'base="{plan.base}"' in script and f'world+=" --pairs {point.flag}"' in script
    runs = f"--steps {point.updates} --batch {point.batch} --samples {plan.samples}"
    assert f'runs="{runs}"' in script


def test_the_table_of_the_readme_by_hand():
    """Two seeds: 0.1 and 0.3 of the failures left, 0.1 and 0.2 of the capabilities lost."""
    def seed(left, right):
        names = ("failures_left", "capabilities", "over_refusal", "drift_kl")
        rows = {"base": (0.5, 0.9, 0.25, 0.0), "sft": (left, right, 0.25, 0.0125)}
        return {run: {name: {"value": value} for name, value in zip(names, row)}
                for run, row in rows.items()}

    text = quick_table([seed(0.1, 0.8), seed(0.3, 0.7)])
    lines = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    found = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines}
    assert found["sft"] == ["20.0 (10.0-30.0)", "15.0 (10.0-20.0)", "25.0 (25.0-25.0)",
                            "12.5 (12.5-12.5)"]
    assert found["base"][:2] == ["50.0 (50.0-50.0)", "0.0 (0.0-0.0)"]
    assert text.startswith("Mean (least-most) of 2 seeds")


def test_the_readme_has_the_table_that_the_results_give():
    seeds = [json.loads(file.read_text())["runs"]
             for file in sorted((frontier.HERE / "quick").glob("seed-*.json"))]
    assert len(seeds) >= 3 and quick_table(seeds) in (ROOT / "README.md").read_text()


def test_the_sums_by_hand():
    """0.1 of each failure is 0.1 left; 0.9 of each capability of the base and 0.8: 0.1 lost."""
    runs = with_sums(cell()["runs"])
    assert runs["sft@6e-4"]["failures_left"] == pytest.approx(0.1)
    assert runs["sft@6e-4"]["capabilities_lost"] == pytest.approx(0.1)
    assert runs["base"]["failures_left"] == pytest.approx(0.5)


def test_sittings_add_up(tmp_path, monkeypatch):
    """What a later folder has measured replaces nothing but its own cells."""
    monkeypatch.setattr(frontier, "RESULTS", tmp_path / "frontier.json")
    for folder, seed, shift in (("a", 0, 0.0), ("b", 1, 0.123456), ("c", 1, 0.0)):
        write_json(tmp_path / folder / f"llama-{seed}/12x240/results.json", cell(shift))
    take_over(tmp_path / "a")
    take_over(tmp_path / "b")
    study = read_json(tmp_path / "frontier.json", "")
    assert list(study["12x240"]) == ["llama-0", "llama-1"]
    assert study["12x240"]["llama-1"]["runs"]["sft@6e-4"]["sycophancy"] == 0.2235
    assert "command" not in study["12x240"]["llama-0"]["about"]
    take_over(tmp_path / "c")
    study = read_json(tmp_path / "frontier.json", "")
    assert study["12x240"]["llama-1"]["runs"] == study["12x240"]["llama-0"]["runs"]
    with pytest.raises(UserError):
        take_over(tmp_path / "nothing")


def test_figures_are_rounded_to_four_digits():
    assert rounded({"a": 0.123456, "b": {"c": 12345.6}}) == {"a": 0.1235, "b": {"c": 12350.0}}


# --- The gradient's noise ----------------------------------------------------------------------

PROMPTS = [([0, 1], [0, 1]), ([2], [2])]


@pytest.mark.parametrize("method, loss", [("sft", "sampled"), ("sft", "exact"),
                                          ("opct", "sampled"), ("opct", "exact")])
def test_at_agreement_every_gradient_is_zero_but_that_of_plain_sft(method, loss):
    base = tiny_gpt()
    found = gradient_noise(copy.deepcopy(base), base, PROMPTS, method,
                           ConsistencyConfig(loss=loss, max_new_tokens=4), 8, seed=0)
    if (method, loss) == ("sft", "sampled"):
        assert found["noise"] > 1 and found["size"] < found["noise"]
    else:
        assert found["noise"] < 1e-9 and found["size"] < 1e-9
    assert found["kl"] == pytest.approx(0, abs=1e-9)


def test_the_noise_of_a_response_of_one_token_by_enumeration():
    """With one response of one token, SFT's gradient is -grad log p(v) with probability q(v)."""
    teacher, student = tiny_gpt(), tiny_gpt(hidden_size=24)
    config = ConsistencyConfig(max_new_tokens=1)
    idx = torch.tensor([[0, 1]])
    q = teacher(idx)[0, -1].softmax(-1)
    logp = student(idx)[0, -1].log_softmax(-1)
    each = []
    for token in range(len(q)):
        parts = torch.autograd.grad(-logp[token], list(student.parameters()), retain_graph=True)
        each.append(torch.cat([part.flatten() for part in parts]))
    each = torch.stack(each)                                # (V, parameters)
    mean = q @ each
    noise = (q @ (each - mean).square().sum(1)).sqrt().item()
    prompts = [([0, 1], [0, 1])] * 64                       # of the mean of 64: an eighth of it
    found = gradient_noise(student, teacher, prompts, "sft", config, 200, seed=0)
    assert found["noise"] == pytest.approx(noise / 8, rel=0.1)
    assert found["size"] == pytest.approx(mean.norm().item(), rel=0.1)
