"""Experiment 1: its plan, its sums, what memorised means, the gradient's noise."""
import copy
from dataclasses import replace

import pytest
import torch

from data import World, WorldConfig, judge, world_tokenizer
from helpers import ROOT, tiny_gpt
from model import GPT, GPTConfig
from opct import Batch, ConsistencyConfig, nll, reverse_kl, score
from studies.claims import measure
from studies.claims.__main__ import seeds_of
from studies.claims.measure import GOOD, memorised, responses_of, token_logp, variations
from studies.claims.noise import gradient_noise
from studies.claims.plan import PRESETS, SIX, Point, stages
from studies.claims.report import quick_table
from studies.claims.results import collect, rounded, with_sums
from studies.claims.tables import FEW, RATE
from support.common import UserError, write_json
from support.tokenizer import IM_END, PAD

ABOUT = {"date": "d", "machine": "m", "torch": "t", "commit": "c", "command": "long"}


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(seed=3, cities=24, recipes=12, things=24, pairs=4, tests=24))


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
    names = {}
    for stage in stages("out", PRESETS["full"]):
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


def test_a_later_sitting_runs_what_is_not_there():
    """Of seed 1 one point is measured; its other point needs its world and base model again."""
    def names(**more):
        return [name for stage in stages("out", PRESETS["full"], **more) for _, name, _ in stage]

    there = [("llama-1", "12x240"), ("llama-1", "attack"), ("qwen2-1", "attack")]
    left = names(only={1}, there=there)
    assert {name.split("/")[0] for name in left} == {"llama-1", "qwen3-1"}
    assert left[:2] == ["llama-1/world", "llama-1/base"] and "llama-1/108x480/opct@6e-4" in left
    assert not any("12x240" in name or name == "llama-1/opct" for name in left)
    assert len(names()) == len(set(names())) and "llama-9/opct-shuffled" in names()
    assert "qwen2-0/opct" in names() and "qwen2-0/opct-shuffled" not in names()
    assert names(only={1}, there=[*there, ("llama-1", "108x480"), ("qwen3-1", "attack")]) == []


def test_seeds_of_a_sitting():
    assert seeds_of("1,3") == {1, 3} and seeds_of(None) is None
    with pytest.raises(UserError, match="rest 11: seeds are 0 to 9"):
        seeds_of("11")


def test_points_count_the_pairs_of_the_three_axes():
    """3 + 1 and 24 + 12 pairs an axis."""
    for flag, total in ((3, 12), (24, 108), (8, 36)):
        records = World(WorldConfig(pairs=flag)).records("train")
        assert len(records) == Point(flag, 60, 4, ()).pairs == total


def test_a_world_with_fewer_pairs_is_the_same_world():
    few, many = World(WorldConfig(seed=5, pairs=3)), World(WorldConfig(seed=5))
    assert few.names == many.names and few.land == many.land and few.recipe == many.recipe
    assert few.records("test") == many.records("test")
    failing = [[r for r in w.records("train") if r["fails"]] for w in (few, many)]
    assert failing[0] == failing[1][:9]


def test_the_quick_preset_stands_at_the_point_that_the_readme_shows():
    script, plan = (ROOT / "train.sh").read_text(), PRESETS["full"]
    point = plan.points[0]
    assert point.name == FEW and f"rate={RATE};" in script and RATE in point.rates
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


def test_the_sums_by_hand():
    """0.1 of each failure is 0.1 left; 0.9 of each capability of the base and 0.8: 0.1 lost."""
    runs = with_sums(cell()["runs"])
    assert runs["sft@6e-4"]["failures_left"] == pytest.approx(0.1)
    assert runs["sft@6e-4"]["capabilities_lost"] == pytest.approx(0.1)
    assert runs["base"]["failures_left"] == pytest.approx(0.5)


def test_what_a_folder_has_measured_is_collected(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.123456)):
        write_json(tmp_path / f"llama-{seed}/12x240/results.json", cell(shift))
    study = collect(tmp_path)
    assert list(study["frontier"]["12x240"]) == ["llama-0", "llama-1"] and study["attack"] == {}
    assert study["frontier"]["12x240"]["llama-1"]["runs"]["sft@6e-4"]["sycophancy"] == 0.2235
    assert "command" not in study["frontier"]["12x240"]["llama-0"]["about"]
    with pytest.raises(UserError, match="holds nothing measured"):
        collect(tmp_path / "nothing")


def test_figures_are_rounded_to_four_digits():
    assert rounded({"a": 0.123456, "b": {"c": 12345.6}}) == {"a": 0.1235, "b": {"c": 12350.0}}


# --- What a run has memorised ------------------------------------------------------------------

def test_memorised_by_hand():
    """Trained responses gained 0.4 nats a token over the teacher, fresh ones lost 0.2."""
    trained = torch.tensor([-0.1, -0.3]), torch.tensor([-0.5, -0.7])
    fresh = torch.tensor([-0.8, -0.6, -1.0]), torch.tensor([-0.6, -0.4, -0.8])
    assert memorised(trained, fresh) == pytest.approx(0.6)
    assert memorised((trained[0], trained[0]), (fresh[0], fresh[0])) == 0


def test_a_run_that_has_learnt_its_responses_by_heart_has_memorised_them(world):
    """After 40 steps on the teacher's fixed responses those are likelier than new ones, and the
    teacher itself, with the clean prompt on both sides, has memorised exactly nothing."""
    tokenizer = world_tokenizer(world)
    torch.manual_seed(0)
    end, padding = (tokenizer.encode_single_token(name) for name in (IM_END, PAD))
    teacher = GPT(GPTConfig(
        vocab_size=tokenizer.n_vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, pad_token_id=padding,
        eos_token_id=end)).eval()
    records = world.records("train")[:6]
    config = ConsistencyConfig(stored=2, max_new_tokens=8, seed=0)
    kinds = [responses_of(teacher, tokenizer, records, c)
             for c in (config, replace(config, stored=8, seed=1))]
    clean, wrapped, response, mask = kinds[0]
    assert len(clean) == 12 and clean[0] == clean[1] != clean[2] and response.shape == (12, 8)
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(40):
        own, _, _ = score(student, teacher, Batch(clean, wrapped), response, mask, reverse_kl)
        nll(own).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def of(model, side):
        return memorised(*(token_logp(model, teacher, kind[0], kind[side], *kind[2:])
                           for kind in kinds))

    assert of(teacher, 0) == 0
    assert abs(of(teacher, 1)) < 0.5 < 1 < of(student, 1)


def test_token_logp_does_not_depend_on_how_many_rows_are_scored_at_once(monkeypatch):
    rows = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]])
    mask = rows > 0
    seen = []

    def scripted(student, teacher, pairs, response, mask, divergence):
        seen.append((pairs.clean, pairs.wrapped))
        tokens = response[mask].float()
        return tokens, -tokens, None

    monkeypatch.setattr(measure, "score", scripted)
    monkeypatch.setattr(measure, "ROWS", 2)
    own, ref = token_logp(None, None, ["a", "b", "c"], ["x", "y", "z"], rows, mask)
    assert own.tolist() == [1, 2, 3, 4, 5, 6] == [-v for v in ref.tolist()]
    assert seen == [(["a", "b"], ["x", "y"]), (["c"], ["z"])]


def test_variations_change_what_they_say_and_keep_the_kinds(world):
    records = world.records("train")
    found = variations(world, records, tries=240, seed=0)
    kinds = {name: [(r["axis"], r["fails"]) for r in some] for name, some in found.items()}
    assert len({len(some) for some in found.values()}) == 1 and len(found["trained"]) > 200
    assert kinds["trained"] == kinds["wordings"] == kinds["entities"] == kinds["both"]
    trained, known = {r["wrapped"] for r in records}, {r["clean"] for r in records}
    assert {r["wrapped"] for r in found["trained"]} == trained
    assert {r["clean"] for r in found["wordings"]} == known
    hidden = world.split["test"]
    for name in ("entities", "both"):
        for r in found[name]:
            assert r["axis"] == "sycophancy" or r["name"] in sum(hidden.values(), [])
    for kind in set(kinds["both"]):                         # every name of a kind, in turn
        names = [r["name"] for r in found["both"] if (r["axis"], r["fails"]) == kind
                 and "name" in r]
        each = set(names)
        assert not names or set(names[:len(each)]) == each, kind
    wordings = [[hint.split("{")[0] or hint[3:].split("{")[0] for hint, _ in world.hints[split]]
                for split in ("train", "test")]
    few = wordings[0][::4]                                  # the two that training pairs have
    for name, allowed in (("trained", few), ("entities", few), ("wordings", wordings[1]),
                          ("both", wordings[1])):
        for r in found[name]:
            if r["axis"] == "sycophancy":
                assert any(text in r["wrapped"] for text in allowed), (name, r)


def test_good_is_what_the_teacher_should_say(world):
    assert {(r["axis"], r["fails"]) for r in world.records("train")} == set(GOOD)
    for r in world.records("train"):
        said = {"sycophancy": f"so {r.get('answer')}.", "jailbreak": "i will not help.",
                "safety": r.get("warning", "")}[r["axis"]]
        if r["axis"] == "jailbreak" and not r["fails"]:
            said = r["recipe"]
        if r["axis"] == "safety" and not r["fails"]:
            said = "serve it raw."
        assert judge(r, said) == GOOD[r["axis"], r["fails"]]


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
