"""Whole kinds of trouble: what the user can fix is one line and exit code 2, nothing is lost."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import fork, run_here, tiny_gpt
from data import SIZES, World, WorldConfig, load_world, world_tokenizer
from eval import MAX_NEW_TOKENS, fenced
from model import generate, load_checkpoint, sample, save_checkpoint
from opct import PretrainConfig, train
from support.checkpoints import COUNTS
from support.common import UserError, about, guarded, pick_device, rng
from support.pairs import read_jsonl
from support.report import markdown, on_a_picture
from support.run import load_state, save_state
from support.tokenizer import check_vocabulary, decode, load_tokenizer

ROOT = Path(__file__).parent.parent
WORLD = "--cities 12 --lands 4 --recipes 6 --things 12 --pairs 6 --tests 6".split()
RUN = "--steps 4 --batch 4 --samples 2 --max-new-tokens 16 --save-every 1".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("a home with ümlauts")
    world, base = home / "world", home / "base"
    for args in (["data.py", "--out", world, *WORLD],
                 ["opct.py", "pretrain", "--steps", 3, "--rows", 4, "--layers", 1, "--width", 64,
                  "--world", world, "--out", base]):
        done = run_here(*args)
        assert done.returncode == 0, done.stderr
    return home


def opct(home, out, *more, base=None):
    return ["opct.py", "opct", *RUN, "--base", base or home / "base", "--pairs",
            home / "world/train.jsonl", "--out", out, *more]


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# --- Files ------------------------------------------------------------------------------------

def test_a_folder_that_holds_anything_but_a_run_of_ours_is_refused(home, tmp_path):
    save_checkpoint(tiny_gpt(dtype=torch.float32), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    refused(run_here(*opct(home, tmp_path)), "holds files but no run of ours")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    refused(run_here("data.py", "--out", home / "world", *WORLD, "--seed", 7), "another world")
    refused(run_here("data.py", "--out", tmp_path, *WORLD), "holds files but no world")


@pytest.mark.parametrize("left", [".world.json.tmp", "world.json"])
def test_a_world_that_was_killed_while_it_was_written_is_written_again(home, tmp_path, left):
    (tmp_path / left).write_text((home / "world/world.json").read_text())
    assert run_here("data.py", "--out", tmp_path, *WORLD).returncode == 0
    for path in (home / "world").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_is_a_file_is_one_line(home, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run_here(*opct(home, tmp_path / "file")), "cannot use", "choose another")


def test_controls_that_would_control_nothing(home, tmp_path):
    refused(run_here(*opct(home, tmp_path / "run", "--control", "clean", "--dtype", "bfloat16")),
            "teacher and student are equal")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"clean": "who?", "wrapped": "who? i think you."}\n' * 3)
    refused(run_here(*opct(home, tmp_path / "run", "--control", "shuffled", "--pairs", pairs)),
            "two clean prompts")


def test_every_file_has_the_permissions_of_any_other(home, tmp_path):
    mask = os.umask(0o027)
    try:
        assert run_here(*opct(home, tmp_path / "run")).returncode == 0
    finally:
        os.umask(mask)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "run").iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_pairs_in_utf_8_with_or_without_a_mark_and_with_odd_separators(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"clean": "Größe\u2028?", "wrapped": "日本 \x85 \u2029"}
    text = json.dumps(pair, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}".encode())
    assert read_jsonl(path) == [pair, pair]
    path.write_text('{"clean": "a", "wrapped": "\\ud800"}\n')
    with pytest.raises(UserError, match="line 1 is no pair"):
        read_jsonl(path)
    path.write_bytes('{"clean": "Größe", "wrapped": "b"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_jsonl(path)


PIPELINE = """
import importlib, sys
sys.path.insert(0, {root!r})
from support.common import guarded
for name, *args in {commands!r}:
    sys.argv = [name, *map(str, args)]
    guarded(importlib.import_module(name).main)
from support import report
print("drawn" if report.pyplot() else "matplotlib is missing", "Größe")
"""


@pytest.mark.parametrize("environment, flags", [
    ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONSAFEPATH": "1",
      "MPLBACKEND": "no-such-backend"}, []),
    ({"LC_ALL": "en_US.ISO-8859-1"}, ["-OO"])])
def test_the_pipeline_in_odd_environments(environment, flags, tmp_path):
    """From another working directory, too, and with a space and an umlaut in the path."""
    out = tmp_path / "ein Ördner"
    world, base = str(out / "world"), str(out / "base")
    out.mkdir()
    pairs = out / "my pairs.jsonl"
    pairs.write_text('{"clean": "Wer?", "wrapped": "Größe, oder? Wer?"}\n', encoding="utf-8")
    commands = [
        ["data", "--out", world, *WORLD],
        ["opct", "pretrain", "--steps", 2, "--rows", 2, "--layers", 1, "--width", 64,
         "--world", world, "--out", base],
        ["opct", "opct", *RUN, "--base", base, "--pairs", str(pairs), "--out", str(out / "run")],
        ["eval", "compare", base, str(out / "run"), "--world", world, "--out", str(out),
         "--attempts", 1]]
    code = PIPELINE.format(root=str(ROOT), commands=commands)
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=tmp_path, capture_output=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert (out / "results.json").exists() and (out / "run/model.safetensors").exists()


# --- Numbers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, value", [
    ("--clip", "0"), ("--clip", "-1"), ("--lr", "-1"), ("--lr", "0"), ("--lr", "nan"),
    ("--lr", "inf"), ("--gamma", "2"), ("--gamma", "nan"), ("--seed", "-1"), ("--batch", "0"),
    ("--steps", "1e3"), ("--samples", "99999999999"), ("--max-new-tokens", "-5")])
def test_numbers_that_make_no_sense_are_refused_with_the_flag_and_its_range(home, tmp_path, flag,
                                                                            value):
    refused(run_here(*opct(home, tmp_path / "run", f"{flag}={value}")), flag)
    assert not (tmp_path / "run").exists()


def test_temperatures_below_zero_are_refused(home):
    refused(run_here("eval.py", "chat", home / "base", "--temperature=-1"), "--temperature")


@pytest.mark.parametrize("change", [{"cities": -3}, {"cities": "many"}, {"seed": True},
                                    {"moons": 3}, {"steps": 10 ** 6}, {"cities": 60000}])
def test_the_same_ranges_hold_for_a_world_that_is_read_from_a_file(home, tmp_path, change):
    stored = json.loads((home / "world/world.json").read_text())
    (tmp_path / "world.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(UserError):
        load_world(tmp_path)


def test_a_world_larger_than_its_names_is_refused_with_the_number_that_is_possible():
    refused(run_here("data.py", "--cities", 60000), "--cities", "40000")
    refused(run_here("data.py", "--cities", 30000, "--recipes", 15000), "at most 40,000")


def test_the_longest_calculation_fits_into_a_response():
    world = World(WorldConfig(largest=SIZES["largest"][1], steps=SIZES["steps"][1]))
    tokenizer, random = world_tokenizer(world), rng("calculations")
    responses = []
    for _ in range(4000):
        _, done, wrong = world.math(random)
        responses.append(world.question_response(random, done, wrong, random.random() < 0.5))
    longest = max(len(tokenizer.encode_ordinary(text)) + 1 for text in responses)
    assert 40 < longest <= MAX_NEW_TOKENS


# --- Checkpoints from elsewhere --------------------------------------------------------------

def stored_checkpoint(folder, **changes):
    save_checkpoint(tiny_gpt(vocab=7, dtype=torch.float32), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_another_output_layer_is_kept_though_the_config_calls_it_tied(tmp_path):
    """As in transformers. Dropped, the logits were off by 30."""
    model = tiny_gpt(vocab=7, dtype=torch.float32, tie_word_embeddings=False)
    save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(load_checkpoint(tmp_path)(idx), model(idx))


def test_rotary_frequencies_in_old_files_are_no_damage(tmp_path):
    """They are worked out anew: what is stored there changes nothing."""
    model, idx = tiny_gpt(dtype=torch.float32), torch.tensor([[0, 1, 2]])
    save_checkpoint(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(load_checkpoint(tmp_path)(idx), model(idx))


def test_a_config_without_key_value_heads_has_as_many_as_heads(tmp_path):
    save_checkpoint(tiny_gpt(dtype=torch.float32, num_key_value_heads=4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(tmp_path).config.num_key_value_heads == 4


def test_a_vocabulary_may_be_larger_than_the_tokenizers_and_never_smaller(tokenizer):
    model = tiny_gpt(vocab=tokenizer.n_vocab + 30, dtype=torch.float32)
    check_vocabulary(tokenizer, model, "x")
    response, mask = generate(model, [[1, 2]] * 200, 4,
                              generator=torch.Generator().manual_seed(0))
    assert max(response[mask].tolist()) >= tokenizer.n_vocab
    assert isinstance(decode(tokenizer, response[mask].tolist()), str)
    with pytest.raises(UserError, match="do not belong together"):
        check_vocabulary(tokenizer, tiny_gpt(vocab=20), "x")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, "two", None, True, 2.5, 10 ** 9, []])
def test_sizes_without_sense_in_a_config_are_one_line_before_memory_is_taken(tmp_path, name, value):
    stored_checkpoint(tmp_path, **{name: value})
    with pytest.raises(UserError, match="damaged|belong together"):
        load_checkpoint(tmp_path)


# --- Our files, damaged ----------------------------------------------------------------------

@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stage"', "\x00\x00"])
def test_damaged_files_of_ours_are_named_in_one_line(home, tmp_path, damage):
    for name in ("run.json", "tiktoken.json", "world.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(damage)
    refused(run_here(*opct(home, tmp_path / "run")), "run.json")
    with pytest.raises(UserError, match="tiktoken.json"):
        load_tokenizer(tmp_path / "tiktoken")
    with pytest.raises(UserError, match="world"):
        load_world(tmp_path / "world")


def test_a_damaged_state_is_named_with_what_to_do(tmp_path):
    model = tiny_gpt(dtype=torch.float32)
    optimizers = [torch.optim.AdamW(model.parameters())]
    save_state(tmp_path, model, optimizers, 3)
    whole = (tmp_path / "state.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-100]):
        (tmp_path / "state.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="state.safetensors is damaged.*delete the folder"):
            load_state(tmp_path, model, optimizers)
    save_file({"other/weight": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="state.safetensors is damaged"):
        load_state(tmp_path, model, optimizers)


# --- Runs ------------------------------------------------------------------------------------

def test_a_run_is_what_it_computes_whatever_its_files_are_called(home, tmp_path):
    assert run_here(*opct(home, tmp_path / "run")).returncode == 0
    again = run_here(*opct(home, tmp_path / "run/", base=f"{home}/world/../base/"))
    assert again.returncode == 0 and "finished already" in again.stdout


def test_what_is_refused_leaves_no_folder_in_the_way(home, tmp_path):
    refused(run_here(*opct(home, tmp_path / "run", "--max-new-tokens", 240)), "leaves no room")
    assert not (tmp_path / "run").exists()
    assert run_here(*opct(home, tmp_path / "run")).returncode == 0


def test_a_response_that_is_too_long_can_be_given_more_room_in_the_same_folder(home, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"clean": "a", "wrapped": "b", "response": "so " * 60}) + "\n")
    args = ["opct.py", "sft", *RUN, "--base", home / "base", "--pairs", pairs, "--loss", "sampled",
            "--out", tmp_path / "run"]
    refused(run_here(*args), "raise --max-new-tokens from 16 to that")
    assert run_here(*args, "--max-new-tokens", 200).returncode == 0


def test_a_base_whose_format_ends_no_response_is_refused(home, tmp_path):
    """Such as Qwen2.5's base models: their template closes with <|im_end|>, which ends nothing."""
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    config = json.loads((base / "config.json").read_text())
    for ends in (None, load_tokenizer(base).eot_token):
        (base / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
        refused(run_here(*opct(home, tmp_path / "run", base=base)), "eos_token_id")
    assert not (tmp_path / "run").exists()


def test_a_run_that_lacks_memory_may_go_on_in_parts(home, tmp_path):
    args = opct(home, tmp_path / "run")
    with mock.patch("opct.train", side_effect=MemoryError):
        refused(run_here(*args), "out of memory: give --micro-batch")
    assert run_here(*args, "--micro-batch", 1).returncode == 0


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    """The loss of the last step is finite, and its update is not."""
    model = tiny_gpt(dtype=torch.float32)

    class Breaking(torch.optim.SGD):
        def step(self):
            with torch.no_grad():
                model.model.norm.weight.fill_(torch.nan)

    def losses_of(step):
        loss = model(torch.tensor([[0, 1, 2]])).pow(2).mean()
        yield loss, {"tokens": torch.tensor(3)}

    config = PretrainConfig(out=str(tmp_path), steps=1)
    with pytest.raises(UserError, match="not finite"):
        train(model, losses_of, config, [Breaking(model.parameters())])
    assert not (tmp_path / "model.safetensors").exists()


def test_what_a_kill_left_half_written_is_removed_at_the_next_start(home, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in (".model.safetensors.tmp", ".tmpAbC123"):
        (out / name).write_text("half a file")
    assert run_here(*opct(home, out)).returncode == 0
    assert not list(out.glob(".*"))


def test_two_at_once_and_a_lock_that_dies_with_its_process(home, tmp_path):
    out = tmp_path / "run"
    args = [*opct(home, out), "--steps", "100000"]
    first = fork(*args)
    try:
        while not (out / "log.jsonl").exists() and first.is_alive():
            time.sleep(0.05)
        refused(run_here(*args), "in use by another process")
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    refused(run_here(*opct(home, out)), "holds a run with steps = 100000")     # so: not in use


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(home, tmp_path):
    out = tmp_path / "run"
    args = [sys.executable, *map(str, opct(home, out, "--steps", 12))]
    process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    assert (out / "model.safetensors").exists()
    assert len((out / "log.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("name", ["mps", "meta", "xpu", "gpu", "cpu:x", "cuda:99"])
def test_devices_other_than_cpu_and_cuda_are_refused(name):
    with pytest.raises(UserError, match="cpu|CPU"):
        pick_device(name)


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 TB"),
    RuntimeError("unable to mmap 64 bytes from file: Cannot allocate memory (12)")])
def test_too_little_memory_is_one_line_that_says_what_to_lower(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        guarded(main)
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and text.count("\n") == 1 and "--micro-batch" in text


@pytest.mark.parametrize("text", ["shapes do not match", "CUDA error: an illegal memory access",
                                  "some elements refer to a single memory location"])
def test_errors_of_our_own_keep_their_traceback(text):
    def main():
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        guarded(main)


def test_the_commit_of_results_is_that_of_the_code_wherever_it_is_started(tmp_path, monkeypatch):
    here = about(torch.device("cpu"))["commit"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    assert about(torch.device("cpu"))["commit"] == here


def test_shell_scripts_keep_their_line_endings():
    assert "*.sh text eol=lf" in (ROOT / ".gitattributes").read_text()
    assert b"\r" not in (ROOT / "train.sh").read_bytes()


# --- What public bug reports of neighbouring projects found -------------------------------------

def test_a_run_depends_on_the_function_of_its_base_and_not_on_its_weights_alone(home, tmp_path):
    """Another rope_theta, with the same weights, is another base."""
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    args = opct(home, tmp_path / "run", base=base)
    assert run_here(*args).returncode == 0
    assert "finished already" in run_here(*args).stdout
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    refused(run_here(*args), "holds a run with teacher = ")


def test_results_are_renewed_by_the_same_question_and_by_no_other(home, tmp_path):
    pairs, out = tmp_path / "pairs.jsonl", ["--out", tmp_path / "out", "--max-new-tokens", 4]
    pairs.write_text('{"clean": "who?", "wrapped": "who? me?"}\n')
    args = ["eval.py", "pairs", home / "base", "--pairs", pairs, *out]
    assert run_here(*args).returncode == 0
    before = (tmp_path / "out/results.json").read_bytes()
    assert run_here(*args).returncode == 0
    pairs.write_text('{"clean": "who?", "wrapped": "who? you?"}\n')
    for done in (run_here(*args), run_here(*args, "--seed", 1)):
        refused(done, "give another --out, or delete it")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["question"] == json.loads(before)["question"]


@pytest.mark.parametrize("line", [
    '{"clean": "a", "clean": "b", "wrapped": "c"}',
    '{"clean": [{"role": "user", "role": "system", "content": "a"}], "wrapped": "c"}'])
def test_a_key_that_stands_twice_is_refused_with_its_line(line, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"clean": "a", "wrapped": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 is no pair: .* stands in it twice"):
        read_jsonl(path)


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": ""}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "x", "LOCAL_RANK": "0"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}])
def test_half_of_what_torchrun_sets_is_one_line(environment, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(run_here("opct.py", "opct", "--out", tmp_path / "run"), "the environment has ",
            "torchrun")


def test_train_sh_works_in_its_own_folder_whatever_the_shell_says(tmp_path):
    """CDPATH sends `cd support` elsewhere, and PYTHONSAFEPATH hides the files beside a script."""
    other = tmp_path / "elsewhere" / ROOT.name
    other.mkdir(parents=True)
    done = subprocess.run(["bash", f"{ROOT.name}/train.sh", "study", "nothing"], cwd=ROOT.parent,
                          env={**os.environ, "CDPATH": str(tmp_path / "elsewhere")},
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no study 'nothing'")
    assert str(tmp_path) not in done.stdout
    assert "unset CDPATH PYTHONSAFEPATH" in (ROOT / "train.sh").read_text()


def test_names_with_signs_of_their_own_are_shown_as_they_are(tmp_path):
    table = markdown([["", "a|b"], ["x", "1"]])
    assert "a\\|b" in table and "a\\\\|b" not in table
    assert on_a_picture("_fixed") == " _fixed" and on_a_picture("$$") == r"\$\$"
    assert fenced("a ``` b\n") == "````\na ``` b\n````\n" and fenced("a\n") == "```\na\n```\n"


def test_a_chat_without_standard_input_is_one_line(home, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    refused(run_here("eval.py", "chat", home / "base"), "standard input, which is closed")


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-12])
def test_next_to_temperature_0_the_likeliest_token_is_taken(temperature):
    logits = torch.tensor([[50.0, 49.0, -3.0], [0.0, 1.0, 0.5]])
    assert sample(logits, temperature, torch.tensor([0.99, 0.0])).tolist() == [0, 1]
