"""The training loop and the command lines: learning, killing and resuming, bad input."""
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import opct
from helpers import fork, run_here, tiny_gpt
from model import generate, load_checkpoint, save_checkpoint
from opct import (ConsistencyConfig, PretrainConfig, controlled, finish, learning_rate,
                  rows_of_update, train, with_defaults)
from support.muon import Muon
from support.pairs import read_jsonl
from support.run import load_state, save_state, weights_hash
from support.tokenizer import chat, load_tokenizer

ROOT = Path(__file__).parent.parent
TINY_WORLD = "--cities 12 --lands 4 --recipes 6 --things 12 --pairs 6 --tests 6".split()
PRETRAIN = "pretrain --steps 8 --rows 4 --layers 1 --width 64 --save-every 3".split()
CONSISTENCY = "--steps 6 --batch 4 --samples 2 --max-new-tokens 16 --save-every 2".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny world and a base model that knows next to nothing: enough for all but the science."""
    home = tmp_path_factory.mktemp("home")
    world, base = ["--world", home / "world"], ["--out", home / "base"]
    for args in (["data.py", "--out", home / "world", *TINY_WORLD],
                 ["opct.py", *PRETRAIN, *world, *base]):
        done = run_here(*args)
        assert done.returncode == 0, done.stderr
    return home


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stage(home, name):
    if name == "pretrain":
        return ["opct.py", *PRETRAIN, "--world", home / "world"]
    return ["opct.py", *name.split(), *CONSISTENCY, "--base", home / "base",
            "--pairs", home / "world/train.jsonl"]


@pytest.fixture(scope="module")
def unbroken(home):
    """A run that nobody disturbs, made once: its folder and what it printed."""
    found = {"pretrain": (home / "base", "")}

    def run(name):
        if name not in found:
            out = home / name.replace(" ", "")
            done = run_here(*stage(home, name), "--out", out)
            assert done.returncode == 0, done.stderr
            found[name] = out, done.stdout
        return found[name]

    return run


# --- Learning ----------------------------------------------------------------------------------

def test_one_batch_can_be_overfitted(tmp_path):
    """Model, loss and loop together: eight random sequences, which nothing but memory can
    predict, from 1.5 nats to under 0.05."""
    torch.manual_seed(0)
    model = tiny_gpt(vocab=7, dtype=torch.float32, hidden_size=32)
    idx = torch.randint(0, 7, (8, 12))
    losses = []

    def loss_of(step):
        # Two rows may begin with the same three tokens, which leaves open what follows them.
        logits = model(idx[:, :-1])[:, 3:].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, idx[:, 4:].flatten()))
        yield losses[-1], {"tokens": torch.tensor(idx.numel())}

    config = PretrainConfig(out=str(tmp_path), steps=100, lr=1e-2)
    train(model, loss_of, config, [torch.optim.AdamW(model.parameters(), weight_decay=0.0)])
    finish(model, config)
    assert losses[0] > 1.5 and losses[-1] < 0.05
    assert load_checkpoint(tmp_path)(idx).allclose(model(idx))


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    config = PretrainConfig(steps=100, lr=1.0)
    rates = [learning_rate(s, config) for s in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[99] == pytest.approx(1 / 95)
    assert learning_rate(0, PretrainConfig(steps=1, lr=1.0)) == 1.0


@pytest.mark.parametrize("name", ["sft --loss sampled", "sft --loss exact",
                                  "opct --loss sampled", "opct --loss exact"])
def test_every_arm_trains_and_logs(home, unbroken, name):
    out, printed = unbroken(name)
    log = read_log(out)
    assert [line["step"] for line in log] == list(range(6))
    assert set(log[0]) == {"step", "loss", "grad_norm", "lr", "kl_exact", "tokens", "seconds",
                           "length", "cut"}
    base, trained = load_checkpoint(home / "base"), load_checkpoint(out)
    assert weights_hash(base) != weights_hash(trained)
    assert json.loads((out / "run.json").read_text())["teacher"] == weights_hash(base)
    assert "clean " in printed and "wrapped " in printed and "response " in printed


def weights(folder):
    return load_checkpoint(folder).state_dict()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_muon_is_the_one_of_torch_but_for_bfloat16(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [Muon([ours], lr=0.1, weight_decay=0.5), torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.005 * moved and moved > 0.1 * start.norm()


@pytest.mark.parametrize("name", ["sft --loss sampled", "opct --loss exact"])
def test_micro_batches_take_the_same_step(home, name, tmp_path):
    """Eight responses at once, or 3 + 3 + 2: the same weights but for rounding, the same log."""
    for folder, more in (("whole", []), ("parts", ["--micro-batch", 3])):
        args = [*stage(home, name), *more, "--out", tmp_path / folder, "--lr", "1e-3"]
        assert run_here(*args).returncode == 0
    before, whole, parts = (weights(f) for f in (home / "base", tmp_path / "whole",
                                                 tmp_path / "parts"))
    # By length: AdamW makes full steps also where a gradient is nothing but rounding.
    moved = sum((whole[n] - before[n]).pow(2).sum() for n in whole).sqrt()
    apart = sum((whole[n] - parts[n]).pow(2).sum() for n in whole).sqrt()
    assert apart < 1e-3 * moved
    for one, other in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts")):
        assert one["tokens"] == other["tokens"] and one["cut"] == pytest.approx(other["cut"])
        for field in ("loss", "kl_exact", "grad_norm", "length"):
            assert one[field] == pytest.approx(other[field], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["sft --loss exact", "opct --loss sampled", "opct --loss exact"])
def test_lora_trains_an_adapter_and_saves_a_plain_checkpoint(home, name, tmp_path):
    out = tmp_path / "lora"
    done = run_here(*stage(home, name), "--lora", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    assert read_log(out)[0]["kl_exact"] < 10 and "frozen in float32" in done.stdout
    before, after = weights(home / "base"), weights(out)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert before.keys() == after.keys()
    assert moved == {n for n in before if n.endswith("_proj.weight")}
    assert json.loads((out / "run.json").read_text())["teacher"] == weights_hash(
        load_checkpoint(home / "base")), "the frozen part is the run-start copy"


def test_a_frozen_part_in_bfloat16(home, tmp_path):
    """The teacher alone, or under --lora the base: the student's own numbers stay near."""
    log = {}
    for dtype in ("float32", "bfloat16"):
        for lora in (0, 4):
            out = tmp_path / f"{dtype}-{lora}"
            done = run_here(*stage(home, "opct"), "--dtype", dtype, "--lora", lora, "--out", out)
            assert done.returncode == 0, done.stderr
            log[dtype, lora] = read_log(out)[0]["kl_exact"]
    for lora in (0, 4):
        assert log["bfloat16", lora] != log["float32", lora]
        assert log["bfloat16", lora] == pytest.approx(log["float32", lora], rel=0.2)


def test_sft_on_responses_that_the_pairs_hold(home, tmp_path):
    """They become certain; `opct` refuses them, and so does a file in which some have none."""
    pairs = [json.loads(line) for line in (home / "world/train.jsonl").read_text().splitlines()]
    given = [{"clean": p["clean"], "wrapped": p["wrapped"], "response": "5 5."} for p in pairs]
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in given))
    args = ["--base", home / "base", "--pairs", path, "--steps", 60, "--batch", 4, "--samples",
            1, "--max-new-tokens", 16, "--lr", "1e-2"]
    done = run_here("opct.py", "sft", "--loss", "sampled", *args, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < 0.2 < log[0]["loss"]
    assert {line["length"] for line in log} == {4.0}        # 5, 5, the full stop, the end
    refused = run_here("opct.py", "opct", *args, "--out", tmp_path / "no")
    assert refused.returncode == 2 and "which are for `sft`" in refused.stderr
    short = ["--max-new-tokens", 3, "--loss", "sampled", "--out", tmp_path / "no"]
    refused = run_here("opct.py", "sft", *args, *short)
    assert refused.returncode == 2 and "a response of 4 tokens" in refused.stderr
    del given[0]["response"]
    path.write_text("".join(json.dumps(p) + "\n" for p in given))
    refused = run_here("opct.py", "sft", *args, "--out", tmp_path / "no")
    assert refused.returncode == 2 and "give one to all, or to none" in refused.stderr


# --- Killing and resuming ----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["pretrain", "sft --loss sampled", "sft --stored 0",
                                  "opct --loss sampled"])
def test_a_killed_run_that_is_started_again_ends_bit_identical(home, unbroken, name, tmp_path):
    """kill -9 a step behind the first saved state, then the same command again, in another process;
    on a CPU with the same number of threads."""
    (undisturbed, _), killed = unbroken(name), tmp_path / "killed"
    args = [*stage(home, name), "--device", "cpu", "--out", killed]
    saved = int(args[args.index("--save-every") + 1])
    process = fork(*args, die_at=saved)
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(read_log(killed)) == saved + 1
    assert (killed / "state.safetensors").exists() and not (killed / "model.safetensors").exists()
    again = run_here(*args)
    assert again.returncode == 0 and f"going on from step {saved}" in again.stdout
    for file in ("model.safetensors", "config.json", "tiktoken.json", "run.json"):
        assert (undisturbed / file).read_bytes() == (killed / file).read_bytes()
    logs = [read_log(folder) for folder in (undisturbed, killed)]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    assert logs[0] == logs[1]                               # each step once, with the same numbers
    assert sorted(p.name for p in killed.iterdir()) == [
        "config.json", "log.jsonl", "model.safetensors", "run.json", "tiktoken.json"]


def test_the_teacher_after_a_resume_is_the_one_of_the_start(home, tmp_path):
    """A public code lost it: after a resume the half-trained student was the teacher, and the loss
    fell to zero at once."""
    out = tmp_path / "run"
    process = fork(*stage(home, "opct"), "--out", out, die_at=3)
    process.join()
    assert (out / "state.safetensors").exists()
    kept = (home / "base/model.safetensors").read_bytes()
    try:                                                    # another base in its place is noticed
        other = load_checkpoint(home / "base")
        with torch.no_grad():
            other.model.norm.weight.add_(0.1)
        save_checkpoint(other, home / "base")
        refused = run_here(*stage(home, "opct"), "--out", out)
    finally:
        (home / "base/model.safetensors").write_bytes(kept)
    assert refused.returncode == 2 and "holds a run with teacher = " in refused.stderr
    assert run_here(*stage(home, "opct"), "--out", out).returncode == 0


def test_a_state_that_comes_back_is_the_one_that_was_saved(tmp_path):
    def after(steps, model, optimizers):
        for _ in range(steps):
            model(torch.tensor([[0, 1, 2]])).pow(2).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return model, optimizers

    def fresh():
        model = tiny_gpt(dtype=torch.float32)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() == 1]
        return model, [Muon(matrices), torch.optim.AdamW(others, fused=True)]

    model, optimizers = after(3, *fresh())
    save_state(tmp_path, model, optimizers, 3)
    other, others = fresh()
    assert load_state(tmp_path, other, others) == 3
    assert weights_hash(after(2, other, others)[0]) == weights_hash(after(2, model, optimizers)[0])


def test_a_finished_run_says_so_and_does_nothing(home):
    before = (home / "base/model.safetensors").stat().st_mtime_ns
    done = run_here(*stage(home, "pretrain"), "--out", home / "base")
    assert done.returncode == 0 and "finished already" in done.stdout
    assert (home / "base/model.safetensors").stat().st_mtime_ns == before


# --- What an update is shown ---------------------------------------------------------------------

def prompts_of(home):
    """(clean, wrapped) of every training pair, as token ids."""
    tokenizer, records = load_tokenizer(home / "base"), read_jsonl(home / "world/train.jsonl")
    return {tuple(tuple(chat(tokenizer, r[form])) for form in ("clean", "wrapped"))
            for r in records}


def as_tuples(pairs):
    return list(zip(map(tuple, pairs.clean), map(tuple, pairs.wrapped)))


def spied(monkeypatch, name):
    """Every call of opct's function of that name: (arguments, what it returned)."""
    calls, real = [], getattr(opct, name)

    def spy(*args):
        calls.append((args, real(*args)))
        return calls[-1][1]

    monkeypatch.setattr(opct, name, spy)
    return calls


def test_opct_shows_wrapped_prompts_to_the_student_and_clean_ones_to_the_teacher(home, tmp_path,
                                                                                 monkeypatch):
    """Other pairs and fresh noise at every update."""
    steps = spied(monkeypatch, "opct_step")
    assert run_here(*stage(home, "opct"), "--out", tmp_path / "run").returncode == 0
    updates = [args[2] for args, _ in steps]
    assert len(updates) == 6 and all(len(pairs.clean) == 8 for pairs in updates)
    shown = [as_tuples(pairs) for pairs in updates]
    assert set().union(*shown) <= prompts_of(home)
    assert len({tuple(pairs) for pairs in shown}) == 6
    assert len({tuple(pairs.noise.flatten().tolist()) for pairs in updates}) == 6


def test_sft_trains_on_the_teachers_responses_to_the_clean_prompts(home, tmp_path, monkeypatch):
    sampled, steps = spied(monkeypatch, "offline_responses"), spied(monkeypatch, "sft_step")
    assert run_here(*stage(home, "sft"), "--out", tmp_path / "run").returncode == 0
    ((teacher, clean, _), (response, mask)), = sampled
    assert weights_hash(teacher) == weights_hash(load_checkpoint(home / "base"))
    assert {tuple(prompt) for prompt in clean} == {pair[0] for pair in prompts_of(home)}
    assert len(response) == 4 * len(clean), "four responses to each pair"
    there = {(tuple(clean[i // 4]), tuple(row.tolist()), tuple(kept.tolist()))
             for i, (row, kept) in enumerate(zip(response, mask))}
    for (_, _, pairs, _), _ in steps:
        assert set(as_tuples(pairs)) <= prompts_of(home)
        rows = zip(map(tuple, pairs.clean), pairs.response, pairs.mask)
        assert {(c, tuple(y.tolist()), tuple(m.tolist())) for c, y, m in rows} <= there


def test_a_pair_takes_its_stored_responses_in_turn(home, tmp_path, monkeypatch):
    """Two of three at every turn: the responses 0 1, then 2 0, then 1 2."""
    sampled, steps = spied(monkeypatch, "offline_responses"), spied(monkeypatch, "sft_step")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"clean": "who {i}?", "wrapped": "who?"}}\n' for i in range(5)))
    run = [*stage(home, "sft"), "--pairs", pairs, "--stored", 3, "--out", tmp_path / "run"]
    assert run_here(*run).returncode == 0
    ((_, clean, _), (response, mask)), = sampled
    turns = {}
    for (_, _, batch, _), _ in steps:
        for i in range(0, len(batch.clean), 2):
            pair = clean.index(batch.clean[i])
            turn = turns.get(pair, 0)
            turns[pair] = turn + 1
            for j in (0, 1):
                place = 3 * pair + (2 * turn + j) % 3
                assert torch.equal(batch.response[i + j], response[place])
                assert torch.equal(batch.mask[i + j], mask[place])
    assert len(response) == 3 * 5 and max(turns.values()) == 5, "six updates of 4 of 5 pairs"


def test_fresh_responses_are_the_frozen_teachers_at_every_update(home, tmp_path, monkeypatch):
    """`--stored 0`, by the random numbers that `opct` would use; what the student learns
    meanwhile changes none of them, with an adapter as little as without."""
    base, drawn = load_checkpoint(home / "base"), {}
    for name in ("sft --stored 0", "sft --stored 0 --lora 4", "opct"):
        method = name.split()[0]
        steps = spied(monkeypatch, f"{method}_step")
        run = [*stage(home, name), "--lr", "0.01", "--out", tmp_path / name.replace(" ", "")]
        assert run_here(*run).returncode == 0
        monkeypatch.undo()
        drawn[name] = [batch for (_, _, batch, _), _ in steps]
        assert len(drawn[name]) == 6
    for batch, opcts in zip(drawn["sft --stored 0"], drawn["opct"]):
        assert torch.equal(batch.noise, opcts.noise) and batch.clean == opcts.clean
    for batch in drawn["sft --stored 0"] + drawn["sft --stored 0 --lora 4"]:
        response, mask = generate(base, batch.clean, 16, noise=batch.noise)
        assert torch.equal(batch.response, response) and torch.equal(batch.mask, mask)


def test_an_epoch_takes_every_pair_once_and_its_next_responses_and_the_next_in_another_order():
    config = ConsistencyConfig(batch=4, samples=3, seed=1)
    rows = sum((rows_of_update(step, 10, config) for step in range(5)), [])
    pairs = [pair for pair, _ in rows[::3]]
    assert rows == [(pair, 3 * (at // 10) + i) for at, pair in enumerate(pairs) for i in range(3)]
    assert sorted(pairs[:10]) == sorted(pairs[10:]) == list(range(10))
    assert pairs[:10] != pairs[10:]


def test_a_control_changes_the_prompts_that_it_names_and_no_others():
    records = [{"clean": f"c{i}", "wrapped": f"w{i}"} for i in range(5)]
    assert controlled(records, ConsistencyConfig()) == records
    assert controlled(records, ConsistencyConfig(control="clean")) == [
        {"clean": f"c{i}", "wrapped": f"c{i}"} for i in range(5)]
    shuffled = controlled(records, ConsistencyConfig(control="shuffled"))
    assert [r["wrapped"] for r in shuffled] == [f"w{i}" for i in range(5)]
    assert sorted(r["clean"] for r in shuffled) == [f"c{i}" for i in range(5)]
    assert all(r["clean"] != f"c{i}" for i, r in enumerate(shuffled))


# --- Several processes -------------------------------------------------------------------------

def two_forks(args):
    """The two processes that `torchrun` would start, without its seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [fork(*args, environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port)}) for rank in range(2)]
    while any(process.is_alive() for process in both):
        if any(process.exitcode for process in both):       # the other would wait for it
            for process in both:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode for process in both]


def torchrun(args):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True)
    return [done.returncode]


@pytest.mark.parametrize("name, start", [("pretrain", two_forks), ("sft --stored 0", two_forks),
                                         ("opct --loss sampled", torchrun)])
def test_two_processes_take_the_steps_of_one(home, name, start, tmp_path):
    """The same global batch gives the same losses, however many processes share it out."""
    args = [*stage(home, name), "--device", "cpu", "--lr", "3e-4", "--out"]
    assert run_here(*args, tmp_path / "1").returncode == 0
    assert set(start([*args, tmp_path / "2"])) == {0}
    logs = read_log(tmp_path / "1"), read_log(tmp_path / "2")
    assert len(logs[0]) == len(logs[1]) > 5
    for one, two in zip(*logs):
        assert one["tokens"] == two["tokens"] and one["step"] == two["step"]
        for figure in {"loss", "kl_exact", "grad_norm"} & set(one):
            assert abs(one[figure] - two[figure]) < 1e-5 * max(1, abs(one[figure])), figure


# --- Bad input ---------------------------------------------------------------------------------

def refused(done, *words):
    """One clear line, exit code 2, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_nan_in_the_loss_stops_the_run_and_keeps_the_last_state(home, tmp_path):
    out = tmp_path / "run"
    done = run_here(*stage(home, "opct"), "--out", out, "--lr", "1e30", "--save-every", "1")
    refused(done, "at step 1: stopped", "smaller --lr")
    assert (out / "state.safetensors").exists() and not (out / "model.safetensors").exists()


def test_other_settings_in_the_folder_of_another_run(home):
    done = run_here(*stage(home, "pretrain"), "--out", home / "base", "--lr", "0.1")
    refused(done, "holds a run with lr = ", "choose another --out")


def test_missing_and_damaged_checkpoints(home, tmp_path):
    args = ["opct.py", "opct", "--pairs", home / "world/train.jsonl", "--out", tmp_path / "run",
            "--base"]
    refused(run_here(*args, tmp_path / "nowhere"), "there is no folder", "nothing is downloaded")
    refused(run_here(*args, tmp_path), "no finished checkpoint")
    refused(run_here("eval.py", "chat", tmp_path / "nowhere"), "there is no folder")


def test_a_checkpoint_of_another_world(home, tmp_path):
    run_here("data.py", "--out", tmp_path / "world", *TINY_WORLD, "--seed", 1)
    done = run_here("eval.py", "compare", home / "base", "--world", tmp_path / "world",
               "--out", tmp_path)
    refused(done, "another world")


def test_bad_pairs_and_long_prompts(home, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    args = ["opct.py", "sft", "--base", home / "base", "--pairs", pairs, "--out", tmp_path / "run"]
    pairs.write_text('{"clean": "who?", "wrapped": "who? i think you."}\n{"clean": 1}\n')
    refused(run_here(*args), "line 2 is no pair")
    pairs.write_text(json.dumps({"clean": "who?", "wrapped": "who? " * 300}) + "\n")
    refused(run_here(*args), "pair 1", "leaves no room")


def test_pairs_that_are_to_be_measured_and_do_not_fit(home, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    args = ["eval.py", "pairs", home / "base", "--pairs", pairs, "--out", tmp_path / "out"]
    for form in ("clean", "wrapped"):
        pair = {"clean": "who?", "wrapped": "who?", form: "who? " * 300}
        pairs.write_text(json.dumps(pair) + "\n")
        refused(run_here(*args), "pair 1", "leaves no room for 64")
    pairs.write_text('{"clean": "who?", "wrapped": "who?"}\n')
    refused(run_here(*args, "--max-new-tokens", 1000), "pair 1", "lower --max-new-tokens")
    assert not (tmp_path / "out").exists()


def test_own_pairs_need_nothing_but_their_two_forms(home, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pair = '{"clean": "Who are you?", "wrapped": "You are Größe, right? Who are you?"}\n'
    pairs.write_text(pair * 3, encoding="utf-8")
    done = run_here("opct.py", "opct", "--base", home / "base", "--pairs", pairs, "--out",
               tmp_path / "run", *CONSISTENCY)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run_here(*stage(home, "opct"), "--out", tmp_path / "file/run"), "file/run")
    refused(run_here("data.py", "--out", tmp_path / "file/world", *TINY_WORLD), "file/world")


def test_unknown_commands_and_devices(home, tmp_path):
    for args in (["opct.py", "grpo"], ["opct.py"], ["eval.py", "plot"],
                 ["opct.py", "opct", "--loss", "k3"]):
        done = run_here(*args)
        assert done.returncode == 2 and "Traceback" not in done.stderr
    args = [*stage(home, "opct"), "--out", tmp_path / "run", "--device"]
    if not torch.cuda.is_available():
        refused(run_here(*args, "cuda"), "no CUDA device")
    refused(run_here(*args, "gpu"), "no such kind of device")
    refused(run_here("data.py", "--steps", "1"), "--steps 1", "at least 2")
    refused(run_here("data.py", "--largest", "2"), "--largest 2", "at least 3")
    done = run_here("eval.py", "compare", home / "base", home / "base", "--world", home / "world",
               "--out", tmp_path)
    refused(done, "a name of its own")
    done = subprocess.run(["bash", ROOT / "train.sh", "huge"], capture_output=True, text=True)
    refused(done, "unknown preset 'huge'")


def test_stored_responses_where_there_are_none_to_store(home, tmp_path):
    """`opct` stores nothing, and pairs with a response have the one that is to be learnt."""
    out = ["--out", tmp_path / "run", "--stored", 2]
    refused(run_here(*stage(home, "opct"), *out), "unrecognized arguments: --stored 2")
    given = tmp_path / "given.jsonl"
    given.write_text('{"clean": "who?", "wrapped": "who? you?", "response": "me."}\n')
    refused(run_here(*stage(home, "sft"), "--pairs", given, *out), "leave out one of the two")
    refused(run_here(*stage(home, "sft"), "--out", tmp_path / "run", "--stored", -1), "--stored")
    assert run_here(*stage(home, "sft"), "--out", tmp_path / "run").returncode == 0
    refused(run_here(*stage(home, "sft"), *out), "holds a run with stored = 4, and this one has 2")


def test_gamma_without_the_objective_that_it_belongs_to(home, tmp_path):
    out = ["--out", tmp_path / "run", "--gamma", "1"]
    refused(run_here(*stage(home, "sft"), *out), "unrecognized arguments: --gamma 1")
    refused(run_here(*stage(home, "opct"), *out, "--loss", "exact"), "--gamma")


@pytest.mark.parametrize("args", [
    ("data.py", "--tests", "0"), ("opct.py", "opct", "--lr", "x"),
    ("eval.py", "compare", "a", "--world", "w", "--out", "o", "--attempts", "0")])
def test_flags_that_make_no_sense(args):
    done = run_here(*args)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: argument --" in done.stderr


def test_the_flags_of_a_command_are_few_and_explained():
    for args in (["data.py"], ["opct.py", "pretrain"], ["opct.py", "sft"], ["opct.py", "opct"],
                 ["eval.py", "compare"]):
        text = run_here(*args, "-h").stdout
        flags = [line for line in text.splitlines() if line.startswith("  --")]
        assert 3 < len(flags) <= 18, text
        assert "None" not in text


def test_the_learning_rate_goes_with_the_size_of_the_model():
    small, large = torch.nn.Linear(10, 10), torch.nn.Linear(5000, 5000)
    for model, lora, expected in ((small, 0, 3e-4), (large, 0, 2e-5), (large, 4, 2e-4)):
        config = with_defaults(ConsistencyConfig(lora=lora), model, "opct")
        assert config.lr == pytest.approx(expected)
    assert with_defaults(ConsistencyConfig(lr=1.0), large, "opct").lr == 1.0
