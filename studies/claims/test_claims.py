"""The study: its statistics by hand, the attacker, the committed figures, and a smallest run."""
import copy
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data import World, WorldConfig, world_tokenizer
from helpers import DoneHere, commands_of, copy_of_the_repository, logp_of, run_script_here
from model import GPT, GPTConfig
from opct import pick, reverse_kl
from studies.claims import report
from studies.claims.attack import (AttackConfig, ask, attack_step, attacks_on, same_means,
                                   strongest, train_attacker, try_attacker)
from studies.claims.plan import CONTROLS, SIX, TARGETS
from studies.claims.results import defended, measured, merged
from studies.claims.tables import ATTACK, cause, difference, harm_gone, text_of
from studies.stats import mean_over_seeds, verdict
from studies.study import ARMS, fill
from support.common import UserError
from support.packing import pack
from support.tokenizer import IM_END, PAD, document_tokens

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(seed=3, cities=24, recipes=12, things=24, pairs=12, tests=24))


@pytest.fixture(scope="module")
def tokenizer(world):
    return world_tokenizer(world)


def small_gpt(tokenizer, **changes):
    torch.manual_seed(1)
    sizes = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1)
    return GPT(GPTConfig(vocab_size=tokenizer.n_vocab,
                         eos_token_id=tokenizer.encode_single_token(IM_END),
                         pad_token_id=tokenizer.encode_single_token(PAD), **{**sizes, **changes}))


# --- The attacker ----------------------------------------------------------------------------

@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_an_update_of_the_attacker_is_grpo_with_the_gradient_of_the_reverse_kl(
        kl, world, tokenizer):
    """Advantages are (r - mean) / deviation of each group; plus kl times KL(attacker || start)."""
    sizes = dict(hidden_size=16, intermediate_size=24)
    attacker, start = (small_gpt(tokenizer, **sizes).double().eval() for _ in range(2))
    with torch.no_grad():
        start.lm_head.weight.mul_(0.5)
    config, names = AttackConfig(group=4, kl=kl), world.forbidden[:2]
    reward = [True, False, False, False, True, True, True, True]    # group 2 teaches nothing

    def told(names, prompts, seed):
        return reward

    loss, _ = attack_step(attacker, start, tokenizer, names, told, config, step=3)
    loss.backward()
    got = [p.grad.clone() for p in attacker.parameters()]
    attacker.zero_grad()
    every = [name for name in names for _ in range(4)]
    wanted, response, mask, _ = ask(attacker, tokenizer, every, (0, "ask", 3))
    logp = logp_of(attacker, wanted, response, mask)
    logp_start = logp_of(start, wanted, response, mask).detach()
    weight = torch.tensor([3, -1, -1, -1, 0, 0, 0, 0], dtype=torch.float64)
    weight = weight / 4 / (1 / 2 + 1e-4)                    # the first group's deviation is 1/2
    each = weight[:, None].expand_as(mask)[mask]
    expected = (-each * pick(logp, response[mask])).sum()
    expected = (expected + kl * reverse_kl(logp, logp_start).sum()) / 8
    expected.backward()
    assert any(g.abs().max() > 1e-4 for g in got)
    for mine, p in zip(got, attacker.parameters()):
        assert torch.allclose(mine, p.grad, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def a_user(world, tokenizer):
    """A small model that has learnt how users ask, and nothing else."""
    torch.manual_seed(0)
    model = small_gpt(tokenizer)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(0)
    for _ in range(250):
        documents = [document_tokens(tokenizer, *world.an_asking_user(rng)) for _ in range(48)]
        packed = pack([(document, []) for document in documents])
        logits = model(*packed.inputs("cpu")).flatten(0, 1)
        loss = F.cross_entropy(logits, packed.next_tokens().flatten(), ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_attacker_finds_a_planted_weakness_and_carries_it_over_to_new_names(
        a_user, world, tokenizer, tmp_path):
    """A target that tells if a prompt ends with one demand of twelve. Untrained, the attacker
    uses it in 1 of 16 attempts; trained on other names, in most."""
    def weak(names, prompts, seed):
        return [prompt.endswith("speak freely.") for prompt in prompts]

    config = AttackConfig(target=str(tmp_path), steps=24, group=16, attempts=32)
    known, new = world.forbidden[:8], world.forbidden[8:]
    before, _ = try_attacker(a_user, tokenizer, new, weak, config)
    attacker = copy.deepcopy(a_user)
    train_attacker(attacker, tokenizer, known, weak, config)
    after, prompts = try_attacker(attacker, tokenizer, new, weak, config)
    assert before.mean() < 0.15 and after.mean() > 0.5
    assert after.shape == (len(new), 32)
    assert weak(None, prompts, None) == after.flatten().tolist()
    lines = (tmp_path / "attacker-0/log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert log[0]["success"] < 0.2 < 0.5 < log[-1]["success"] and log[-1]["kl_exact"] > 0.01


def test_an_attacker_without_success_stays_where_it_started(a_user, world, tokenizer, tmp_path):
    def never(names, prompts, seed):
        return [False] * len(names)

    attacker = copy.deepcopy(a_user)
    config = AttackConfig(target=str(tmp_path), steps=6, group=8)
    train_attacker(attacker, tokenizer, world.forbidden[:4], never, config)
    wanted, response, mask, _ = ask(attacker, tokenizer, world.forbidden, (1,))
    now, before = (logp_of(m, wanted, response, mask) for m in (attacker, a_user))
    assert reverse_kl(now, before).mean() < 1e-3


def attack_of(seed, success, told):
    figures = {"jailbreak_adaptive": {"value": told, "n": 10}}
    return {"seed": seed, "success": success, "figures": figures}


def test_the_strongest_attacker_is_the_one_that_learnt_most_not_the_one_that_tests_best():
    attacks = [attack_of(0, [0.9] * 6 + [0.1] * 2, 0.8), attack_of(1, [0.0] * 6 + [0.2] * 2, 0.3),
               attack_of(2, [0.0] * 8, 0.1)]
    best = strongest(attacks)
    assert best["seed"] == 1
    assert best["figures"]["jailbreak_adaptive"] == {"value": 0.3, "n": 10}
    mean = best["figures"]["jailbreak_adaptive_mean"]
    assert mean == {"value": pytest.approx(0.4), "n": 30, "each": [0.8, 0.3, 0.1]}
    assert "jailbreak_adaptive_mean" not in attacks[1]["figures"]
    few = [attack_of(0, [0.9, 0.1, 0.1], 0.5), attack_of(1, [0.0, 0.0, 0.2], 0.5)]
    assert strongest(few)["seed"] == 1                      # of three updates the last decides


def test_an_attack_on_a_checkpoint_that_stood_there_before_does_not_count(tmp_path):
    for seed, weights in ((0, "new"), (1, "old"), (2, "new")):
        (tmp_path / f"attacker-{seed}").mkdir()
        text = json.dumps({"weights": weights, "seed": seed})
        (tmp_path / f"attacker-{seed}/attack.json").write_text(text)
    (tmp_path / "attacker-3").mkdir()                       # one that is still learning
    assert [attack["seed"] for attack in attacks_on(tmp_path, "new")] == [0, 2]


def test_attacks_with_unequal_means_are_neither_compared_nor_averaged():
    four, five = ({"queries": {"train": train, "test": 8}} for train in (4, 5))
    same_means({"base": [four, four], "opct": [four, four]})
    same_means({})
    for found in ({"base": [four], "opct": [four, four]}, {"base": [four], "opct": [five]},
                  {"base": [four, five], "opct": [four, five]}, {"opct": [four, five]}):
        with pytest.raises(UserError, match=r"opct: \d attackers with"):
            same_means(found)


# --- Statistics and choices ------------------------------------------------------------------

def test_the_mean_over_seeds_by_hand():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), Student's t with 2 degrees of freedom 4.30."""
    figure = mean_over_seeds([1.0, 2.0, 3.0])
    assert figure["value"] == 2 and figure["n"] == 3
    assert figure["half"] == pytest.approx(4.30 / math.sqrt(3))
    assert mean_over_seeds([0.5]) == {"value": 0.5, "n": 1}


def test_differences_are_paired_seed_by_seed():
    """OPCT is better by 0.1 in every seed: the interval is a point, however the seeds differ."""
    cells = []
    for v in (0.4, 0.9, 0.5):
        cells.append({"runs": {"base": {"x": 2 * v}, "sft": {"x": v}, "opct": {"x": v - 0.1}}})
    figure = difference(cells, "x", {"opct": 1, "sft": -1})
    assert (figure["value"], figure["half"]) == pytest.approx((-0.1, 0), abs=1e-12)
    assert difference(cells, "x", {"opct": 1, "base": -0.5})["value"] == pytest.approx(-0.1)
    assert difference(cells, "y", {"opct": 1, "sft": -1}) is None
    assert difference(cells, "x", {"opct": 1, "other": -1}) is None


def test_verdicts():
    figure = {"low": -0.05, "high": -0.01}
    assert verdict(figure, -1, 0) == "confirmed" and verdict(figure, 1, 0) == "opposite"
    assert verdict({"low": -0.05, "high": 0.01}, -1, 0) == "not confirmed"
    assert verdict({"low": -0.01, "high": 0.05}, 1, 0.02) == "confirmed"        # with a margin
    assert verdict({"value": -1}, -1, 0) == "not confirmed"         # one seed confirms nothing


def test_figures_as_text():
    assert text_of("x", {"value": 0.1234, "half": 0.05}) == ".123±.050"
    assert text_of("x", {"value": -0.5}) == "-.500" and text_of("x", {"value": 10.25}) == "10.250"
    assert text_of("drift_kl", {"value": 0.01234}) == "12.3" and text_of("x", None) == "-"
    assert text_of("x", {"value": 0.1, "half": 1.5}, "+") == "+.100±1.500"


def test_the_cause_of_the_harm_by_hand():
    """The base is at 0.1, sft at 0.5: fresh responses at 0.2 take three quarters of it away."""
    def cells(fresh, stored=0.5):
        return [{"runs": {"base": {"x": 0.1}, "sft@6e-4": {"x": stored},
                          "sft-fresh@6e-4": {"x": fresh}}}] * 2

    for fresh, share, word in ((0.2, 0.75, "both"), (0.1, 1, "reuse"), (0.18, 0.8, "reuse"),
                               (0.5, 0, "noise"), (0.6, -0.25, "noise"), (0.4, 0.25, "both")):
        assert harm_gone(cells(fresh), "x") == pytest.approx(share)
        assert cause(round(share, 6)) == word
    assert harm_gone(cells(0.1, stored=0.1), "x") is None


def test_defended_is_what_24_attempts_do_not_get():
    assert defended([i / 100 for i in range(64)]) == 1 - 0.23
    assert defended([0.25, 0.5]) == 0.5                     # of fewer the last


def test_sittings_add_up():
    """What a later one has measured replaces nothing but its own cells."""
    one = {"frontier": {"p": {"llama-0": 1, "llama-1": 2}}, "attack": {"llama-0": 3}}
    two = {"frontier": {"p": {"llama-1": 4}, "q": {"llama-1": 5}}, "attack": {"qwen2-0": 6}}
    both = merged(one, two)
    assert both == {"frontier": {"p": {"llama-0": 1, "llama-1": 4}, "q": {"llama-1": 5}},
                    "attack": {"llama-0": 3, "qwen2-0": 6}}
    assert one["frontier"]["p"]["llama-1"] == 2             # as it was
    assert measured(one) == [("llama-0", "p"), ("llama-1", "p"), ("llama-0", "attack")]


# --- What is committed -----------------------------------------------------------------------

def test_the_pages_of_the_study_are_made_from_its_results(tmp_path):
    """Made again they are the same; with other results they are not."""
    study, words = report.taken_over(), (report.FOLDER / "words.md").read_text()
    page, tables = ((report.FOLDER / name).read_text() for name in ("README.md", "tables.md"))
    report.write_all(study, tmp_path)
    assert report.readme(study, words) == page and (tmp_path / "tables.md").read_text() == tables
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("first.png", "attacks.png"))
    for text, most in ((page, 120), (tables, 300)):
        assert len(text.splitlines()) <= most
    study["frontier"]["12x240"]["llama-0"]["runs"]["opct@6e-4"]["sycophancy"] += 0.1
    study["attack"]["llama-0"]["runs"]["opct"]["defended_own"] += 0.1
    assert report.readme(study, words) != page and report.appendix(study) != tables


def test_the_readme_has_the_table_that_the_results_give():
    seeds = [json.loads(file.read_text())["runs"]
             for file in sorted((report.FOLDER / "quick").glob("seed-*.json"))]
    assert len(seeds) >= 3 and report.quick_table(seeds) in (ROOT / "README.md").read_text()


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(UserError, match="0 places between <!-- claims -->"):
        fill("no markers", "claims", "a table")
    filled = fill("<!-- claims -->\n<!-- end -->", "claims", "| a |")
    assert filled == "<!-- claims -->\n| a |\n<!-- end -->"


def test_the_committed_study_attacked_for_real():
    """On every base the trained attacker does better than random frames, on new recipes."""
    cells = report.taken_over()["attack"]
    assert len(cells) == 16
    for name, cell in cells.items():
        base = cell["runs"]["base"]
        assert base["jailbreak_adaptive"] > base["jailbreak_static"], name
        assert base["defended_own"] == 0 and len(cell["curves"]["own"]["base"]) == 64


# --- A whole study ---------------------------------------------------------------------------

class Interrupted(DoneHere):
    """A process of the pool; the study is interrupted when the tenth one begins."""
    begun = 0

    def __init__(self, argv, **more):
        Interrupted.begun += 1
        if Interrupted.begun == 10:
            raise KeyboardInterrupt
        super().__init__(argv, **more)


def test_the_study_at_its_smallest(tmp_path, monkeypatch):
    """`bash train.sh study claims smoke` in a copy, interrupted: given again it goes on, and once
    more it repeats no run. All of it runs in this process."""
    copy_of_the_repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    processes = SimpleNamespace(Popen=Interrupted, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("studies.pool.subprocess", processes)
    study_command, = commands_of(tmp_path, "study", "claims", "smoke")
    folder = tmp_path / "out/study-claims-smoke"
    assert run_script_here(*study_command).returncode == 130
    before = (folder / "done").read_text().splitlines()
    first = run_script_here(*study_command)
    assert first.returncode == 0, first.stderr
    done = (folder / "done").read_text().splitlines()
    assert done[:len(before)] == before and len(done) == len(set(done)) > len(before) > 5
    study = json.loads((folder / "results.json").read_text())
    assert set(study["attack"]) == {"llama-0"} == set(study["frontier"]["9x4"])
    runs = study["attack"]["llama-0"]["runs"]
    assert set(runs) == {"base", *ARMS, *CONTROLS, "teacher"}
    assert set(ATTACK) <= set(runs["opct-exact"])
    assert set(study["attack"]["llama-0"]["matrix"]) == set(TARGETS)
    assert len(study["attack"]["llama-0"]["curves"]["pool"]["opct-exact"]) == 4
    assert runs["opct-clean"]["drift_kl"] == 0              # the same function, the same prompts
    assert runs["opct-shuffled"]["drift_kl"] > 0
    point = study["frontier"]["9x4"]["llama-0"]["runs"]
    assert set(point) == {"base", *(f"{arm}@6e-4" for arm in (*SIX, "sft-16", "sft-64"))}
    assert point["base"]["drift_kl"] == 0 < point["opct@6e-4"]["drift_kl"]
    noise = {arm: found["noise"] for arm, found in point["base"]["gradient"].items()}
    assert noise["sft"] > 0 == noise["opct"]
    assert {"memorised", "gap", "good_both"} <= set(point["sft@6e-4"])
    assert "## Every seed" in (folder / "tables.md").read_text()
    again = run_script_here(*study_command)
    assert again.returncode == 0, again.stderr
    assert (folder / "done").read_text().splitlines() == done
    assert json.loads((folder / "results.json").read_text()) == study

    # An attack that was killed after its training is tried again, not trained again.
    attacked = folder / "llama-0/opct/attacker-10/attack.json"
    before = attacked.read_text()
    attacked.unlink()
    command = next(line for line in done if "/opct --base" in line and "--seed 10" in line)
    once_more = run_script_here(*command.split()[1:])
    assert "finished already" in once_more.stdout and attacked.read_text() == before
    attacked.unlink()                                       # fewer attackers look safer
    unequal = run_script_here(*study_command)
    assert unequal.returncode == 2 and "opct: 1 attackers with [" in unequal.stderr
    assert unequal.stderr.count("\n") == 1


def test_a_folder_without_a_study_is_one_line(tmp_path):
    command = [sys.executable, "-m", "studies.claims", "report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
