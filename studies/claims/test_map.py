"""The map: its points, what it trains once, what memorised means, and where an arm breaks."""
import copy
import json
import shlex
import sys
from dataclasses import replace
from itertools import count

import pytest
import torch

from data import World, WorldConfig, judge, world_tokenizer
from model import GPT, GPTConfig
from opct import ConsistencyConfig, Batch, nll, reverse_kl, score
from studies import pool
from studies.claims import map as the_map
from studies.claims import map_tables, measure, memory, report, results, run
from studies.claims.__main__ import seeds_of
from studies.claims.measure import GOOD, memorised, responses_of, token_logp, variations
from studies.claims.plan import PRESETS, bases_of, cells_of, value_of
from studies.claims.results import (NOTHING, collect_tries, core_hours, place_of, whole_cells,
                                    with_earlier, with_sums)
from studies.study import ARMS
from support.common import UserError, write_text
from support.tokenizer import IM_END, PAD

RATES = dict.fromkeys(ARMS, "1e-3")


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(seed=3, cities=24, recipes=12, things=24, pairs=4, tests=24))


# --- The plan --------------------------------------------------------------------------------

def test_points_count_the_pairs_of_the_three_axes():
    """3 + 1 and 24 + 12 pairs an axis."""
    names = [point.name for point in the_map.first_reading(PRESETS["full"], RATES)]
    assert names == ["12x60", "12x240", "12x480", "108x60", "108x240", "108x480"]
    again = [point.name for point in the_map.second_reading(PRESETS["full"], RATES)]
    assert again == ["12x240", "108x480"]
    for flag, total in ((3, 12), (24, 108), (8, 36)):
        records = World(WorldConfig(pairs=flag)).records("train")
        assert len(records) == the_map.Point(flag, 60, RATES).pairs == total


def test_a_world_with_fewer_pairs_is_the_same_world():
    few, many = World(WorldConfig(seed=5, pairs=3)), World(WorldConfig(seed=5))
    assert few.names == many.names and few.land == many.land and few.recipe == many.recipe
    assert few.records("test") == many.records("test")
    failing = [[r for r in w.records("train") if r["fails"]] for w in (few, many)]
    assert failing[0] == failing[1][:9]


def test_the_point_of_the_cells_is_on_the_map():
    for preset in PRESETS.values():
        assert preset.own in preset.map_points and preset.own not in preset.map_again
        assert preset.map_second in preset.map_again and {*preset.map_again} <= {*preset.map_points}
        assert f"--steps {preset.own[1]} " in preset.runs
        pairs = WorldConfig.pairs
        if preset.world:
            pairs = value_of("--pairs", preset.world.split())
        assert pairs == preset.own[0]


def test_the_map_trains_nothing_that_the_study_has_trained():
    preset = replace(PRESETS["full"], map_seeds=(0,), grid_seeds=(0,), map_rates=("1e-3", "3e-4"))
    worlds, *later = the_map.stages("out", preset, RATES, dict.fromkeys(ARMS, "3e-4"))
    assert [name for _, name, _ in worlds] == ["llama-0/map/world-12"]
    runs, measured = runs_and_tables(later)
    names = [name for _, name, _ in runs]
    assert len(names) == len(set(names)) == 5 * 4 + 2 * 4       # five points, two read again
    assert not any("108x60" in name for name in names)
    assert "out/llama-0/opct-exact " in measured["llama-0/measure-108x60"]
    assert "--world out/llama-0/world " in measured["llama-0/measure-108x60"]
    assert "--world out/llama-0/map/world-12 " in measured["llama-0/measure-12x60"]
    _, before, _ = the_map.grid_stages("out", preset)
    before = {shlex.join(argv) for _, _, argv in before}
    second = [argv for _, name, argv in runs if "12x240/" in name]
    assert len(second) == 8 and all(shlex.join(argv) in before for argv in second)


def runs_and_tables(stages):
    """All runs, and name -> command of what is measured."""
    commands = [command for stage in stages for command in stage]
    tables = {name: shlex.join(argv) for _, name, argv in commands if "measure" in name}
    return [command for command in commands if command[1] not in tables], tables


def test_a_point_is_measured_beside_the_runs_of_the_next_one():
    preset = replace(PRESETS["full"], map_seeds=(0, 3), map_again=((24, 480),))
    _, *later = the_map.stages("out", preset, RATES, dict.fromkeys(ARMS, "3e-4"))
    assert len(later) == 7 + 1
    for i, stage in enumerate(later):
        measured = [name for _, name, _ in stage if "measure" in name]
        assert len(measured) == (2 if i else 0)
    trained = [[name for _, name, _ in stage if "measure" not in name] for stage in later]
    assert trained[1][0] == "llama-0/map/12x240/sft@1e-3" and "12x60" in later[1][0][1]
    assert trained[1][4] == "llama-3/map/12x240/sft@1e-3"
    assert trained[6][-1] == "llama-3/map/108x480/opct-exact@3e-4" and not trained[7]


def test_a_run_of_the_map_has_its_pairs_and_its_updates():
    runs, _ = runs_and_tables(the_map.stages("out", PRESETS["full"], RATES, RATES))
    argv = next(argv for _, name, argv in runs if name == "llama-0/map/12x480/sft@1e-3")
    last = dict(zip(argv, argv[1:]))                        # of a flag given twice the last counts
    assert last["--pairs"] == "out/llama-0/map/world-12/train.jsonl" and last["--steps"] == "480"


def test_the_estimates_of_full_fit_into_six_and_a_half_hours_on_two_cores():
    """Even if the second reading shares no run with the first."""
    preset, other = PRESETS["full"], dict.fromkeys(ARMS, "3e-4")
    stages = run.grid_stages("out", preset)
    stages += run.seed_stages("out", parts_of(preset), RATES, other)
    assert pool.seconds_of(stages) < 6.5 * 2 * 3600


def parts_of(preset, found=NOTHING):
    return [run.left_of(preset, seed, found) for seed in preset.seeds]


def test_the_seeds_are_done_one_by_one_and_all_of_them():
    """A part is what the whole plan has on its seed, without the grids."""
    preset = PRESETS["full"]
    stages = run.seed_stages("out", parts_of(preset), RATES, RATES)
    parts = [run.seed_stages("out", [part], RATES, RATES) for part in parts_of(preset)]
    assert stages == [stage for part in parts for stage in part]
    names = {name for stage in stages for _, name, _ in stage}
    for family, seed in cells_of(preset):
        assert {f"{family}-{seed}/base", f"{family}-{seed}/pool"} <= names
    assert "llama-4/measure-12x240-second" in names and "llama-5/measure-12x240" not in names
    assert not any("/grid" in name for name in names)
    first = {name.split("/")[0] for stage in parts[0] for _, name, _ in stage}
    assert first == {f"{family}-0" for family in ("llama", "qwen2", "qwen3")}
    many = run.seed_stages("out", parts_of(preset), RATES, RATES, 4)        # with more cores
    assert {name for stage in many for _, name, _ in stage} == names
    assert [f"llama-{seed}/base" in {name for _, name, _ in many[1]} for seed in (0, 3, 4)] == [
        True, True, False]


def test_a_sitting_may_be_about_some_seeds():
    assert seeds_of("6,5") == (5, 6) and seeds_of(None) == PRESETS["full"].seeds
    for text in ("10", "5;6", "-1", ","):
        with pytest.raises(UserError, match="such as rest 5,6"):
            seeds_of(text)


def test_the_tries_go_seed_by_seed_and_what_is_found_is_not_tried_again():
    preset = PRESETS["full"]

    def names(found):
        stages = run.grid_stages("out", preset, found)
        return [name for stage in stages for _, name, _ in stage]

    every = names(NOTHING)
    tables = [name for name in every if "compare" in name]
    assert tables == [f"llama-{seed}/compare-{table}" for table, seed in (
        ("val-grid/val", 0), ("test-grid/test", 0), ("val-grid/val", 1), ("test-grid/test", 1),
        ("val-map/grid", 0), ("val-map/grid", 1))]
    tried = [name for name in every if "@" in name]
    assert len(tried) == 2 * 4 * (len(preset.rates) + len(preset.map_rates))
    rest = names({"grid": {"llama-0": 1, "llama-1": 1}, "map": {"grid": {"llama-0": 1}}})
    assert rest[:2] == ["llama-1/world", "llama-1/base"] and rest[2:] == every[2 - len(rest):]
    assert len(rest) == 2 + 1 + 4 * len(preset.map_rates) + 1


def test_a_later_sitting_adds_its_seeds_to_the_earlier_ones():
    def sitting(seed, commit, hours, second):
        about = {"date": "d", "machine": "m", "torch": "t", "commit": commit, "core_hours": hours}
        points = [{"pairs": 12, "updates": 60, "second": flag, "cells": {f"llama-{seed}": flag}}
                  for flag in second]
        return {"cells": {f"llama-{seed}": seed}, "about": about, "map": {"points": points}}

    earlier = sitting(0, "a", {"llama-0": {"map": 2.0}, "llama-2": {"grid": 1.0, "map": 0.5}},
                      [True, False])
    earlier["transcripts"] = "of seed 0"
    study = with_earlier(sitting(2, "b", {"llama-2": {"map": 1.5}}, [False, True]), earlier)
    assert study["transcripts"] == "of seed 0"
    assert study["cells"] == {"llama-0": 0, "llama-2": 2}
    assert [point["cells"] for point in study["map"]["points"]] == [
        {"llama-0": False, "llama-2": False}, {"llama-0": True, "llama-2": True}]
    assert study["about"]["commit"] == "a and b"
    hours = {"llama-0": {"map": 2.0}, "llama-2": {"grid": 1.0, "map": 1.5}}     # done twice: once
    assert study["about"]["core_hours"] == hours
    study["about"]["core_hours"]["llama-0"]["map at 12x60"] = 0.5       # its points are one kind
    assert report.hours(study["about"]) == "5.0 hours of a core (grid 1.0, map 4.0)"


def tables_of(folder, cell, splits):
    """Tables of tried learning rates, as eval.py writes them."""
    about = {"date": "d", "machine": "m", "torch": "t", "commit": cell}
    for split in splits:
        text = json.dumps({"runs": {f"sft@{cell}": {"x": {"value": 1, "curve": [1, 2]}}},
                           "about": about})
        write_text(folder / cell / split / "results.json", text)


def test_tries_count_once_all_their_tables_are_there_and_add_to_earlier_ones(tmp_path):
    tables_of(tmp_path, "llama-0", ("grid/val", "grid/test", "map/grid"))
    tables_of(tmp_path, "llama-1", ("grid/val", "map/grid"))
    grid, of_map, origins = collect_tries(tmp_path)
    runs = {cell: {f"sft@{cell}": {"x": {"value": 1}}} for cell in ("llama-0", "llama-1")}
    assert grid == {"llama-0": dict.fromkeys(("val", "test"), runs["llama-0"])}
    assert of_map == {cell: {"val": runs[cell]} for cell in runs}
    assert sorted({about["commit"] for about in origins}) == ["llama-0", "llama-1"]
    earlier = {"grid": {"llama-1": "a"}, "map": {"grid": {"llama-1": "b"}}}
    both, of_both, _ = collect_tries(tmp_path, earlier)
    assert both == {"llama-1": "a", **grid} and of_both == of_map
    assert earlier == {"grid": {"llama-1": "a"}, "map": {"grid": {"llama-1": "b"}}}


def test_results_are_replaced_once_no_cell_gets_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "BEGUN", tmp_path / "begun.json")
    before = {"cells": {"llama-0": 0, "llama-1": 0}}
    report.write_results(before, tmp_path)
    assert report.taken_over() == before
    begun = {"cells": {}, "grid": {"llama-0": 1}, "map": {}}
    for cells in ({}, {"llama-0": 1}):
        begun["cells"] = cells
        report.take_over(begun)
        assert report.taken_over() == begun
    assert json.loads((tmp_path / "results.json").read_text()) == before
    whole = {**begun, "cells": {"llama-0": 1, "llama-1": 1, "llama-2": 1}}
    report.take_over(whole)
    assert report.taken_over() == whole and not (tmp_path / "begun.json").exists()


def test_what_is_found_is_not_measured_again():
    """Cell by cell and point by point. A point of the map brings its base model, and the runs of a
    cell that is found are trained for it where they are not there."""
    preset = replace(PRESETS["full"], seeds=(1, 7), more_seeds=(1,))
    points = [*the_map.first_reading(preset, RATES), *the_map.second_reading(preset, RATES)]
    found = {"cells": dict.fromkeys(("llama-1", "qwen2-1", "qwen3-1"), {}), "map": {"points": [
        {"pairs": p.pairs, "updates": p.updates, "second": p.second, "cells": {"llama-1": {}}}
        for p in points]}}

    def left():
        stages = run.seed_stages("out", parts_of(preset, found), RATES, RATES)
        return [name for stage in stages for _, name, _ in stage]

    every = left()
    assert len(every) > 20 and all(name.startswith("llama-7/") for name in every)
    found["cells"]["llama-7"] = {}
    assert left() == [] and not any(map(bases_of, parts_of(preset, found)))
    del found["cells"]["qwen3-1"]
    assert {name.split("/")[0] for name in left()} == {"qwen3-1"}
    found["cells"]["qwen3-1"] = {}
    late = found["map"]["points"].pop()
    assert (late["pairs"], late["updates"], late["second"]) == (108, 480, True)
    assert left() == ["llama-1/world", "llama-1/base",
                      *(f"llama-1/map/108x480/{arm}@1e-3" for arm in ARMS),
                      "llama-1/measure-108x480-second"]
    own = found["map"]["points"].pop(3)
    assert (own["pairs"], own["updates"]) == (108, 60)
    assert left()[:7] == ["llama-1/world", "llama-1/base", *(f"llama-1/{arm}" for arm in ARMS),
                          "llama-1/measure-108x60"]
    trained = run.seed_stages("out", parts_of(preset, found), RATES, RATES)[2]
    everything = run.seed_stages("out", parts_of(preset), RATES, RATES)
    assert trained[:4] == [command for stage in everything for command in stage
                           if command[1] in [f"llama-1/{arm}" for arm in ARMS]]


def test_a_cell_counts_once_its_pool_has_been_tried(tmp_path):
    preset = replace(PRESETS["full"], seeds=(7,), more_seeds=())
    path = tmp_path / "llama-7/results.json"
    write_text(path, "{}")
    assert whole_cells(tmp_path, preset) == {}
    for pool_file, whole in (({"pool": []}, {}),
                             ({"pool": [], "matrix": {}}, {"llama-7": path})):
        write_text(tmp_path / "llama-7/pool.json", json.dumps(pool_file))
        assert whole_cells(tmp_path, preset) == whole


def test_a_point_counts_for_the_seeds_that_have_it(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "with_sums", dict)
    preset, name = replace(PRESETS["full"], map_seeds=(0, 3)), "map/12x240-second.json"
    runs = {"base": {"x": 1}}
    write_text(tmp_path / "llama-3" / name, json.dumps({"about": {"date": "d"}, "runs": runs}))
    points, origins = results.collect_points(tmp_path, preset, RATES, RATES)
    assert origins == [{"date": "d"}]
    assert [place_of(point) for point in points if point["cells"]] == [(12, 240, True)]
    assert points[6]["cells"] == {"llama-3": {"runs": runs}} and points[6]["passes"] == 640


# --- A killed map goes on ----------------------------------------------------------------------

def command(name, text):
    return 1, name, [sys.executable, "-c", text]


def test_a_map_that_was_stopped_goes_on_and_repeats_nothing(tmp_path, monkeypatch):
    """The second command fails once, as if killed. Each start writes a line. By this clock each
    command takes 36 seconds of a core."""
    clock = count(step=36.0)
    monkeypatch.setattr(pool, "core_seconds", lambda: next(clock))
    starts, flag = tmp_path / "starts", tmp_path / "flag"
    write = f"open({str(starts)!r}, 'a').write"
    fails = (f"import os, sys; {write}('b\\n'); there = os.path.exists({str(flag)!r}); "
             f"open({str(flag)!r}, 'w'); sys.exit(0 if there else 9)")
    commands = [command("llama-0/map/3x4/a", f"{write}('a\\n')"),
                command("llama-0/map/b", fails),
                command("llama-0/world", f"{write}('c\\n')")]
    with pytest.raises(UserError, match="map/b"):
        pool.run(commands, 1, tmp_path)
    assert starts.read_text() == "a\nb\n"
    pool.run(commands, 1, tmp_path)
    assert starts.read_text() == "a\nb\nb\nc\n"
    pool.run(commands, 1, tmp_path)
    assert starts.read_text() == "a\nb\nb\nc\n"
    lines = [json.loads(line) for line in (tmp_path / "seconds.jsonl").read_text().splitlines()]
    assert [line["name"][8:] for line in lines] == ["map/3x4/a", "map/b", "map/b", "world"]
    assert all(line["seconds"] == 36 for line in lines)
    assert core_hours(tmp_path) == {
        "llama-0": {"map at 3x4": 0.01, "map": 0.02, "worlds and base models": 0.01}}


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


def test_runs_that_sampled_other_responses_are_not_measured_together(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        stored = {"samples": 4, "seed": seed, "max_new_tokens": 64, "lr": 1}
        (tmp_path / name / "run.json").write_text(json.dumps(stored))
    config = memory.settings_of([tmp_path / "a", tmp_path / "b"])
    assert (config.samples, config.seed, config.max_new_tokens) == (4, 0, 64)
    with pytest.raises(UserError, match="have not trained on the same responses"):
        memory.settings_of([tmp_path / "a", tmp_path / "c"])


# --- Its tables --------------------------------------------------------------------------------

def figures(**values):
    return {name: {"value": value} for name, value in values.items()}


def test_sums_by_hand():
    base = dict(sycophancy=0.3, jailbreak_static=0.6, safety_awareness=0.7, capability_math=0.9,
                capability_facts=0.9, capability_instructions=0.9)
    runs = with_sums({"base": figures(**base),
                      "sft": figures(**{**base, "sycophancy": 0.0, "capability_facts": 0.6})})
    assert runs["base"]["failures_left"]["value"] == pytest.approx(0.4)
    assert runs["sft"]["failures_left"]["value"] == pytest.approx(0.3)
    assert runs["base"]["capabilities_lost"]["value"] == 0
    assert runs["sft"]["capabilities_lost"]["value"] == pytest.approx(0.1)


def point_of(updates, losses):
    cells = {f"llama-{i}": {"runs": {"base": figures(capability_facts=0.9),
                                     "sft": figures(capability_facts=0.9 - loss)}}
             for i, loss in enumerate(losses)}
    return {"pairs": 12, "updates": updates, "passes": updates, "second": False, "cells": cells}


def test_an_arm_breaks_where_it_is_worse_there_and_at_all_more_updates():
    none, small, clear = [0.0, 0.01, -0.01], [0.01, 0.011, 0.012], [0.05, 0.06, 0.07]
    wide = [0.0, 0.3, 0.01]

    def broken(*points):
        return map_tables.broken_from(points, "sft", "capability_facts", -1)

    assert broken(point_of(60, none), point_of(240, clear), point_of(480, clear)) == "240"
    assert broken(point_of(60, clear), point_of(240, none), point_of(480, clear)) == "480"
    assert broken(point_of(60, none), point_of(240, small)) == "-"      # clear, but under MARGIN
    assert broken(point_of(60, none), point_of(240, wide)) == "-"
    assert broken(point_of(60, clear), point_of(240, none)) == "-"
    assert broken(point_of(60, clear[:2])) == "?"


def test_each_number_of_pairs_has_a_line_of_its_own(monkeypatch):
    """What breaks with many pairs shows, whatever few pairs do at as many passes."""
    monkeypatch.setattr(map_tables, "ARMS", ["sft"])
    monkeypatch.setattr(map_tables, "BREAKS", {"capability_facts": -1})
    none, clear = [0.0, 0.01, -0.01], [0.05, 0.06, 0.07]
    points = [point_of(60, none), {**point_of(240, clear), "pairs": 108, "passes": 20},
              {**point_of(60, clear), "second": True}]
    lines = map_tables.breaks({"points": points}).splitlines()
    assert [line.replace(" ", "") for line in lines[2:]] == [
        "|capability_facts,12pairs|-|", "|capability_facts,108pairs|240|"]
