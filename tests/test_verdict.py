"""Before you train: the verdict on pairs, for scripted answers whose right verdict is known."""
import pytest

from eval import changes, misbehaves, misbehaviour, odd_pairs, verdict, where_the_kl_is

GOOD, BAD = "It is Lima.", "It is Cusco."


def figures(wrapped_bad, clean_bad, n=40):
    """Of n pairs, of which so many are answered badly: the last ones on wrapped prompts, the first
    ones on clean prompts, so as few as possible are bad on both."""
    records = [{"clean": f"{i}?", "wrapped": f"{i}? Cusco!", "expect": ["Lima"], "avoid": ["Cusco"]}
               for i in range(n)]
    wrapped = [GOOD] * (n - wrapped_bad) + [BAD] * wrapped_bad
    clean = [BAD] * clean_bad + [GOOD] * (n - clean_bad)
    return misbehaviour(records, {"wrapped sampled": wrapped, "clean sampled": clean})


def test_an_answer_misbehaves_by_what_it_has_or_by_what_it_lacks():
    lists = {"expect": ["Lima"], "avoid": ["Cusco"]}
    assert misbehaves(lists, BAD) and not misbehaves(lists, GOOD)
    assert misbehaves(lists, "I do not know.") and misbehaves(lists, "Lima, not Cusco.")
    assert misbehaves({"avoid": ["Cusco"]}, "I do not know.") is False
    assert misbehaves({"expect": ["Lima"]}, "I do not know.") is True
    assert misbehaves({"expect": [], "avoid": []}, BAD) is None and misbehaves({}, BAD) is None


def test_the_figures_by_hand():
    """20 of 40 bad on wrapped, 4 on clean, none on both: 16 of 40 to gain, all 20 turned good."""
    found = figures(20, 4)
    assert found["bad_wrapped"]["value"] == 0.5 and found["bad_clean"]["value"] == 0.1
    assert found["gain"]["value"] == pytest.approx(0.4) and found["gain"]["clusters"] == 40
    assert found["turned_good"]["value"] == 1 and found["turned_good"]["n"] == 20
    assert figures(30, 20)["turned_good"]["value"] == pytest.approx(20 / 30)
    assert "turned_good" not in figures(0, 4)


@pytest.mark.parametrize("wrapped, clean, n, expected", [
    (20, 4, 40, "OPCT should repair this"),
    (4, 30, 40, "OPCT would spread what the clean side does: do not train"),
    (0, 0, 40, "little to gain"),
    (400, 396, 400, "little to gain"),
    (9, 6, 40, "too few pairs to say"),
    (10, 0, 10, "too few pairs to say")])
def test_the_verdict_is_the_right_one(wrapped, clean, n, expected):
    assert verdict(figures(wrapped, clean, n)).startswith(f"{expected}: misbehaves on ")


def test_samples_of_one_clean_prompt_are_one_piece_of_evidence():
    """Thirty pairs that share ten clean prompts are ten, and that is too few."""
    records = [{"clean": f"{i % 10}?", "wrapped": f"{i}", "avoid": ["Cusco"]} for i in range(30)]
    found = misbehaviour(records, {"wrapped sampled": [BAD] * 30, "clean sampled": [GOOD] * 30})
    assert found["gain"]["clusters"] == 10 and verdict(found).startswith("too few pairs")
    assert verdict(misbehaviour([{}], {"wrapped sampled": ["a"], "clean sampled": ["a"]})) == (
        "no pair has `expect` or `avoid`, so nothing is said of what training would do")


def test_what_a_run_changed_is_one_line():
    base, run = figures(20, 4), {**figures(2, 6), "kl_clean": {"value": 0.0123}}
    assert changes(base, run) == ("misbehaves, wrapped: 50 -> 5 %, clean: 10 -> 15 %; the clean "
                                  "side moved by 0.012 nats a token")


def test_where_the_kl_is_by_hand():
    """40 tokens: the two with the most have 8 of 10 nats; at the first tokens 3 and 1."""
    found = where_the_kl_is([[3.0, 5.0] + [0.0] * 18, [1.0] + [1 / 19] * 19])
    assert found["kl_first"]["value"] == pytest.approx(2.0)
    assert found["kl_in_5_percent"]["value"] == pytest.approx(8 / 10)
    assert where_the_kl_is([[0.0], [0.0]])["kl_in_5_percent"]["value"] == 0


def test_forms_that_differ_where_nobody_looks_are_named():
    system = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "who?"}]
    fine = {"clean": "who?", "wrapped": "who? me?"}
    assert odd_pairs([fine]) == []
    assert odd_pairs([fine, {"clean": "who?", "wrapped": "who? "}]) == [
        "warning: in 1 pairs only one of the forms ends in a blank"]
    assert odd_pairs([{"clean": system, "wrapped": "who?"}]) == [
        "note: 1 pairs differ in their system messages"]
