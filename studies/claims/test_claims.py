"""The claims study: statistics by hand, the attacker, the smallest study, the committed results."""
import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import World, WorldConfig, world_tokenizer
from eval import ORDER
from model import GPT, GPTConfig
from opct import hidden_states, pick, reverse_kl, score
from studies.claims.attack import (AttackConfig, ask, attack_step, attacks_on, same_means,
                                   strongest, train_attacker, try_attacker)
from studies.claims.report import ARMS, ATTACKED, CONTRASTS, HOME, choose, readmes, tables
from studies.claims.run import CHOSEN, PRESETS
from studies.stats import contrast, mean_over_seeds, verdict
from support.common import UserError
from support.packing import pack
from support.tokenizer import IM_END, PAD, document_tokens

ROOT = HOME.parent.parent


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(seed=3, cities=24, recipes=12, things=24, pairs=12, tests=24))


@pytest.fixture(scope="module")
def tokenizer(world):
    return world_tokenizer(world)


def small_gpt(tokenizer, seed=0):
    torch.manual_seed(seed)
    special = tokenizer.encode_single_token
    return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, hidden_size=64, intermediate_size=176,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         eos_token_id=special(IM_END), pad_token_id=special(PAD)))


# --- The attacker ----------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_an_update_of_the_attacker_is_grpo_with_the_gradient_of_the_reverse_kl(kl, world,
                                                                               tokenizer):
    """Advantages (r - mean) / deviation within each group, plus kl times KL(attacker || start)."""
    attacker, start = small_gpt(tokenizer).double(), small_gpt(tokenizer, 1).double()
    config, names, n = AttackConfig(group=4, kl=kl), world.forbidden[:2], 8
    reward = [True, False, False, False, True, True, True, True]    # the second teaches nothing
    loss, _ = attack_step(attacker, start, tokenizer, names, lambda *_: reward, config, step=3)
    loss.backward()
    got = [p.grad.clone() for p in attacker.parameters()]
    attacker.zero_grad()
    every = [name for name in names for _ in range(4)]
    wanted, response, mask, _ = ask(attacker, tokenizer, every, (0, "ask", 3))
    logp = score(attacker, wanted, response, mask)
    logp_start = score(start, wanted, response, mask).detach()
    weight = torch.tensor([3, -1, -1, -1, 0, 0, 0, 0], dtype=torch.float64) / 4
    weight = weight / (1 / 2 + 1e-4)                        # the first group's deviation is 1/2
    each = weight[:, None].expand_as(mask)[mask]
    policy = -(each * pick(logp, response[mask])).sum() / n
    (policy + kl * reverse_kl(logp, logp_start).sum() / n).backward()
    assert any(g.abs().max() > 1e-3 for g in got)
    for mine, p in zip(got, attacker.parameters()):
        assert torch.allclose(mine, p.grad, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def a_user(world, tokenizer):
    """A small model that knows how users ask, and nothing else: the weakest start of an attack."""
    model, rng = small_gpt(tokenizer), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        documents = [document_tokens(tokenizer, *world.an_asking_user(rng)) for _ in range(48)]
        packed = pack([(tokens, []) for tokens in documents])
        logits, target = model.lm_head(hidden_states(model, packed)), packed.next_tokens()
        F.cross_entropy(logits, target.flatten(), ignore_index=-1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_attacker_finds_a_planted_weakness_and_carries_it_over_to_new_names(
        a_user, world, tokenizer, tmp_path):
    """A scripted target tells where a prompt ends with one demand of twelve. Untrained, the
    attacker uses it in 1 of 16 attempts; trained on other names, in most."""
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
    assert [p.endswith("speak freely.") for p in prompts] == after.flatten().tolist()
    lines = (tmp_path / "attacker-0/log.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first["success"] < 0.2 < 0.5 < last["success"] and last["kl_exact"] > 0.01


def test_an_attacker_without_success_stays_where_it_started(a_user, world, tokenizer, tmp_path):
    def never(names, prompts, seed):
        return [False] * len(names)

    attacker = copy.deepcopy(a_user)
    config = AttackConfig(target=str(tmp_path), steps=6, group=8)
    train_attacker(attacker, tokenizer, world.forbidden[:4], never, config)
    wanted, response, mask, _ = ask(attacker, tokenizer, world.forbidden, (1,))
    moved = reverse_kl(score(attacker, wanted, response, mask),
                       score(a_user, wanted, response, mask))
    assert moved.mean() < 1e-3


def an_attack(seed, success, told):
    return {"seed": seed, "success": success,
            "figures": {"jailbreak_adaptive": {"value": told, "n": 10}}}


def test_the_strongest_attacker_is_the_one_that_learnt_most_not_the_one_that_tries_best():
    attacks = [an_attack(0, [0.9] * 6 + [0.1] * 2, 0.8), an_attack(1, [0.0] * 6 + [0.2] * 2, 0.3),
               an_attack(2, [0.0] * 8, 0.1)]
    best = strongest(attacks)
    assert best["seed"] == 1
    assert best["figures"]["jailbreak_adaptive"] == {"value": 0.3, "n": 10}
    assert best["figures"]["jailbreak_adaptive_mean"] == {
        "value": pytest.approx(0.4), "n": 30, "each": [0.8, 0.3, 0.1]}
    assert "jailbreak_adaptive_mean" not in attacks[1]["figures"]
    few = [an_attack(0, [0.9, 0.1, 0.1], 0.5), an_attack(1, [0.0, 0.0, 0.2], 0.5)]
    assert strongest(few)["seed"] == 1                      # of three updates the last one decides


def test_an_attack_on_a_checkpoint_that_stood_there_before_does_not_count(tmp_path):
    for seed, weights in ((0, "new"), (1, "old"), (2, "new")):
        (tmp_path / f"attacker-{seed}").mkdir()
        text = json.dumps({"weights": weights, "seed": seed})
        (tmp_path / f"attacker-{seed}/attack.json").write_text(text)
    (tmp_path / "attacker-3").mkdir()                       # one that is still learning
    assert [attack["seed"] for attack in attacks_on(tmp_path, "new")] == [0, 2]


def test_attacks_with_unequal_means_are_neither_compared_nor_averaged():
    four = {"queries": {"train": 4, "test": 8}}
    five = {"queries": {"train": 5, "test": 8}}
    same_means({"base": [four, four], "opct": [four, four]})
    same_means({})
    for found in ({"base": [four], "opct": [four, four]}, {"base": [four], "opct": [five]},
                  {"base": [four, five], "opct": [four, five]}, {"opct": [four, five]}):
        with pytest.raises(UserError, match=r"opct: \d attackers with"):
            same_means(found)


# --- Statistics ------------------------------------------------------------------------------


def test_the_mean_over_seeds_by_hand():
    """Values 1, 2, 3: mean 2, standard error 1 / sqrt(3), Student's t 4.30 for 2 degrees."""
    figure = mean_over_seeds([1.0, 2.0, 3.0])
    assert figure["value"] == 2 and figure["half"] == pytest.approx(4.30 / math.sqrt(3))
    assert figure["n"] == 3 and mean_over_seeds([0.5]) == {"value": 0.5, "n": 1}


def test_contrasts_are_paired_seed_by_seed():
    """OPCT is better by 0.1 in every seed, however much the seeds differ: no spread is left."""
    cells = []
    for v in (0.4, 0.9, 0.5):
        values = {"sft": v, "sft-exact": v, "opct": v - 0.1, "opct-exact": v - 0.3}
        cells.append({"runs": {run: {"x": {"value": x}} for run, x in values.items()}})
    for name, value in (("opct - sft", -0.1), ("opct-exact - sft", -0.3), ("on-policy", -0.2),
                        ("whole distribution", -0.1)):
        figure = contrast(cells, "x", CONTRASTS[name])
        assert (figure["value"], figure["half"]) == pytest.approx((value, 0), abs=1e-12)
    assert contrast(cells, "y", CONTRASTS["on-policy"]) is None
    assert all(sum(weights.values()) == 0 for weights in CONTRASTS.values())


def test_verdicts():
    figure = {"low": -0.05, "high": -0.01}
    assert verdict(figure, -1, 0) == "confirmed" and verdict(figure, 1, 0) == "opposite"
    assert verdict({"low": -0.05, "high": 0.01}, -1, 0) == "not confirmed"
    assert verdict({"low": -0.01, "high": 0.05}, 1, 0.02) == "confirmed"    # within the margin
    assert verdict({"value": -1}, -1, 0) == "not confirmed"     # a single seed confirms nothing


def a_run(failure, math=0.9):
    return {"mean_failure": {"value": failure}, "capability_math": {"value": math},
            "capability_facts": {"value": 0.9}, "capability_instructions": {"value": 0.9}}


def test_the_learning_rate_is_chosen_by_the_criterion():
    """The lowest failure is ruled out by what it costs; of two equals the smaller rate wins."""
    by_rate = {"1e-3": a_run(0.0204), "3e-4": a_run(0.0201), "1e-4": a_run(0.025),
               "2e-3": a_run(0.001, math=0.8)}
    val = {f"{arm}@{rate}": run for arm in ARMS for rate, run in by_rate.items()}
    rates, scores = choose({"llama-0": {"val": {"base": a_run(0.3), **val}}})
    assert set(rates) == set(ARMS) and set(rates.values()) == {"3e-4"}
    assert scores["sft"]["2e-3"] == pytest.approx((0.001, 0.1))


# --- The whole study -------------------------------------------------------------------------


def test_the_study_at_its_smallest(tmp_path):
    """`bash train.sh study claims smoke` in a copy; given again, it repeats no run."""
    for name in ("data.py", "model.py", "opct.py", "eval.py", "train.sh"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("support", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def started(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "PATH": path})

    study = ("bash", "train.sh", "study", "claims", "smoke")
    first = started(*study)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "out/study-claims-smoke"
    done = (folder / "done").read_text().splitlines()
    results = json.loads((folder / "results.json").read_text())
    runs = results["cells"]["llama-0"]["runs"]
    assert set(results["cells"]) == {"llama-0"}
    assert set(runs) == {"base", *ARMS, "sft-clean", "opct-clean", "opct-shuffled", "teacher"}
    assert set(runs["opct"]) == {*ORDER, *ATTACKED}
    assert len(runs["opct"]["jailbreak_adaptive_best_of"]["curve"]) == 4
    assert runs["opct-clean"]["drift_kl"]["value"] == 0     # same function, same prompt
    assert runs["opct-shuffled"]["drift_kl"]["value"] > 0
    text = (folder / "results.md").read_text()
    assert all(block in text for block in tables(results).values())
    assert "100 %" in first.stdout and len(done) == len(set(done))
    again = started(*study)
    assert again.returncode == 0 and (folder / "done").read_text().splitlines() == done
    assert json.loads((folder / "results.json").read_text())["cells"] == results["cells"]
    # An attack that was killed after its training is tried again, not trained again.
    attacked = folder / "llama-0/opct/attacker-10/attack.json"
    before = attacked.read_text()
    attacked.unlink()
    command = next(line for line in done if "opct --base" in line and "--seed 10" in line)
    once_more = started(sys.executable, *command.split())
    assert "finished already" in once_more.stdout and attacked.read_text() == before
    # A target with fewer attackers than the others would look better than it is.
    attacked.unlink()
    unequal = started(*study)
    assert unequal.returncode == 2 and "opct: 2 attackers with [" in unequal.stderr
    assert unequal.stderr.count("\n") == 1


def test_a_study_says_what_is_wrong_in_one_line(tmp_path):
    for args in (["cell", "mamba", "0"], ["cell", "llama", "one"], ["plot"]):
        done = subprocess.run([sys.executable, "-m", "studies.claims", *args], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def committed():
    return json.loads((HOME / "results.json").read_text())


def test_the_figures_in_the_readmes_are_those_of_the_committed_runs():
    """Made anew from results.json the READMEs stay as they are; with other results they do not."""
    study = committed()
    for path, text in readmes(study).items():
        assert path.read_text(encoding="utf-8") == text, path
    old = tables(study)
    study["cells"]["llama-0"]["runs"]["opct-exact"]["sycophancy"]["value"] += 0.1
    new = tables(study)
    assert all(old[name] != new[name] for name in ("seed_0", "study", "claims", "differences"))
    assert readmes(study)[ROOT / "README.md"] != (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_presets_learning_rates_are_those_that_the_study_chose():
    rates, _ = choose(committed()["grid"])
    text = (ROOT / "train.sh").read_text()
    line = re.search(r"^sft=.*$", text, re.M)[0]
    in_train_sh = dict(word.split("=") for word in line.split() if "=" in word)
    assert {arm: in_train_sh[arm.replace("-", "_")] for arm in ARMS} == rates == CHOSEN


def test_the_presets_of_the_study_are_those_of_train_sh():
    text = (ROOT / "train.sh").read_text()
    text = text[text.index("case $preset in\n    smoke)"):]
    for name, preset in PRESETS.items():
        part = text[text.index(f"    {name})"):].split(";;")[0]
        words = " ".join(re.findall(r'"([^"]*)"', part)).replace("$world ", "")
        assert words.split() == f"{preset.world} {preset.base} {preset.runs}".split()


def test_the_committed_study_attacked_for_real():
    """On the base of every seed the trained attacker does better than random frames."""
    study = committed()
    assert len(study["cells"]) == 11
    for name, cell in study["cells"].items():
        base = cell["runs"]["base"]
        told = base["jailbreak_adaptive"]
        assert told["value"] > base["jailbreak_best_of"]["per_attempt"], name
        assert told["n"] == 20 * 64 and base["jailbreak_adaptive_mean"]["n"] == 3 * 20 * 64


def test_rates_over_seeds_are_plain_means():
    study = committed()
    values = [cell["runs"]["opct"]["sycophancy"]["value"] for name, cell in study["cells"].items()
              if name.startswith("llama")]
    assert f"{np.mean(values):.3f}" in readmes(study)[ROOT / "README.md"]
