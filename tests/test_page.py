"""The page of tokens: its numbers are those of training, and strangers' text is only ever text."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from data import World, WorldConfig, world_tokenizer
from eval import explained, nats_of, samples_of, some_pairs, telling_pairs
from helpers import logp_of, run_here, tiny_gpt
from model import generate, save_checkpoint
from support.common import generator
from support.report import pieces_of, write_page
from support.tokenizer import chat, decode, save_tokenizer

NASTY = ["<script>alert(1)</script>", '"\'><i onclick="x">', "</span></i></html>", "a\0b",
         "\u202eabc", "&lt;b&gt; &amp;", "x" * 10_000, "line\nline  two", "{{ 7 * 7 }}{% raw %}",
         "\ufffd\u2028é"]


def small(tokenizer, hidden_size=16):
    return tiny_gpt(vocab=tokenizer.n_vocab, dtype=torch.float32, max_position_embeddings=256,
                    hidden_size=hidden_size, eos_token_id=tokenizer.n_vocab - 2)


def token(text, kl, p=0.5):
    return {"text": text, "p": p, "p_base": 0.25, "log_ratio": 0.7, "kl": kl,
            "likeliest": [(text, p)], "likeliest_base": [("<other>", 0.75)]}


def written(tmp_path, prompt, texts, kls=(0.0, 1.0, 5.0)):
    tokens = [token(text, kl) for text, kl in zip(texts, kls)]
    response = {"name": "run", "tokens": tokens, "nats": sum(t["kl"] for t in tokens)}
    write_page(tmp_path / "page.html", "a title", "base",
               [{"name": "pair 1", "prompts": [("clean", prompt)], "responses": [response]}])
    return (tmp_path / "page.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """The tags of a page, and (style, tip, text) of its tokens."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tokens, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "i":
            self.inside = True
            self.tokens.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "i"

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1][1] += data


# --- Numbers -----------------------------------------------------------------------------------

def test_the_numbers_are_those_of_an_enumeration(tokenizer):
    """Both models' distributions at each token, computed without `score`."""
    base, model = small(tokenizer), small(tokenizer, 32)
    asked = [chat(tokenizer, text) for text in ("who? i say a.", "how?")]
    clean = [chat(tokenizer, text) for text in ("who?", "how?")]
    noise = torch.rand(2, 6, generator=generator("page"))
    found = explained(model, base, tokenizer, asked, clean, noise)
    response, mask = generate(model, asked, 6, noise=noise)
    logp, logq = logp_of(model, asked, response, mask), logp_of(base, clean, response, mask)
    tokens = [token for one in found for token in one]
    assert [len(one) for one in found] == mask.sum(1).tolist()
    for i, (t, id) in enumerate(zip(tokens, response[mask].tolist())):
        p, q = logp[i].exp(), logq[i].exp()
        assert t["text"] == decode(tokenizer, [id])
        assert t["p"] == pytest.approx(p[id].item(), rel=1e-4)
        assert t["p_base"] == pytest.approx(q[id].item(), rel=1e-4)
        assert t["log_ratio"] == pytest.approx((logp[i, id] - logq[i, id]).item(), abs=1e-4)
        assert t["kl"] == pytest.approx((p * (logp[i] - logq[i])).sum().item(), abs=1e-4)
        for name, distribution in (("likeliest", p), ("likeliest_base", q)):
            top = distribution.topk(5)
            assert [text for text, _ in t[name]] == [decode(tokenizer, [j]) for j in top.indices]
            assert [x for _, x in t[name]] == pytest.approx(top.values.tolist(), rel=1e-4)


def test_the_sum_of_a_line_is_the_kl_that_pairs_are_measured_by(tokenizer):
    base, model = small(tokenizer), small(tokenizer, 32)
    asked, clean = [chat(tokenizer, "who? i say a.")] * 3, [chat(tokenizer, "who?")] * 3
    texts, nats, lengths, _, each = samples_of(model, base, tokenizer, asked, clean, 6, "seed")
    noise = torch.rand(3, 6, generator=generator("seed", 0))
    found = explained(model, base, tokenizer, asked, clean, noise)
    assert [nats_of(tokens) for tokens in found] == pytest.approx(nats, rel=1e-4)
    assert [t["kl"] for t in found[1]] == pytest.approx(each[1], abs=1e-5)
    assert [len(tokens) for tokens in found] == list(lengths)
    against_itself = explained(base, base, tokenizer, clean, clean, noise)
    assert nats_of(against_itself[0]) == pytest.approx(0, abs=1e-6)


def test_the_pairs_with_most_nats_come_first_and_of_a_world_as_many_of_each_axis():
    def with_nats(*nats, rare=None):
        return [[token("a", x / 2), token("b", x / 2, 0.005 if i == rare else 0.5)]
                for i, x in enumerate(nats)]

    plain = [{} for _ in range(5)]
    assert telling_pairs(plain, with_nats(0.1, 0.5, 0.3, 0.9, 0.2), 3) == [3, 1, 2]
    assert telling_pairs(plain, with_nats(0.1, 0.5, 0.3, 0.9, 0.2, rare=3), 5) == [1, 2, 4, 0, 3]
    axes = ["safety", "safety", "jailbreak", "sycophancy", "safety"]
    records = [{"axis": axis} for axis in axes]
    assert telling_pairs(records, with_nats(9, 8, 1, 2, 7), 3) == [0, 3, 2]


def test_colours_go_from_white_at_0_to_full_at_2_nats(tmp_path):
    tokens = Reader(written(tmp_path, "?", ["a", "b", "c"])).tokens
    assert [attributes.get("style") for attributes, _ in tokens] == [None, "--k:50", "--k:100"]
    assert "p 0.5, base 0.25, log-ratio +0.700, KL 1.0000" in tokens[1][0]["data-x"]
    assert all(attributes["tabindex"] == "0" for attributes, _ in tokens)


# --- Text --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", NASTY)
def test_any_text_is_shown_as_text(text, tmp_path):
    page = written(tmp_path, text, [text, "b", "c"])
    harmless = Reader(written(tmp_path, "x y", ["x", "b", "c"]))
    reader = Reader(page)
    assert set(reader.tags) <= set(harmless.tags) and reader.tags.count("i") == 3
    assert "script" not in reader.tags and "\0" not in page and "\u202e" not in page
    expected = "".join(piece for _, piece in pieces_of(text))
    assert reader.tokens[0][1] == expected


def test_what_cannot_be_seen_is_marked():
    assert pieces_of("a b\n") == [(False, "a"), (True, "·"), (False, "b"), (True, "↵\n")]
    assert pieces_of("\0\u202e") == [(True, "U+0000"), (True, "U+202E")]


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    page = written(tmp_path, "where?", ["a", "b", "c"])
    assert not re.search(r"<script|<link|<img|src=|https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


# --- The command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A world of its own, with two checkpoints that know nothing of it."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = world_tokenizer(World(WorldConfig(cities=12, lands=4, recipes=6, things=12)))
    for name, size in (("base", 16), ("run", 32)):
        save_checkpoint(small(tokenizer, size), folder / name)
        save_tokenizer(tokenizer, folder / name)
    records = [{"clean": f"{text[:100]}?", "wrapped": f"so. {text[:100]}?"} for text in NASTY]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def test_the_command_writes_a_page_and_the_same_as_jsonl(home):
    args = ["eval.py", "tokens", home / "base", home / "run", "--pairs", home / "pairs.jsonl",
            "--out", home / "out.html", "--number", 4, "--max-new-tokens", 8]
    done = run_here(*args)
    assert done.returncode == 0, done.stderr
    page = Reader((home / "out.html").read_text(encoding="utf-8"))
    stored = (home / "out.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in stored.split("\n")[:-1]]
    assert [line["checkpoint"] for line in lines] == ["base, clean", "base", "run"] * 4
    assert len(page.tokens) == sum(len(line["tokens"]) for line in lines)
    for line in lines:
        assert line["nats"] == pytest.approx(sum(line["metrics"]["kl"]), abs=1e-6)
        assert len(line["next_tokens"]) == len(line["tokens"])
        if line["checkpoint"] == "base, clean":
            assert abs(line["nats"]) < 1e-4
    assert run_here(*args).returncode == 0, "the same question again renews its files"
    assert (home / "out.jsonl").read_text(encoding="utf-8") == stored


def test_at_most_so_many_pairs_are_looked_at_and_as_many_of_each_axis():
    assert some_pairs([{}] * 10, 96) == list(range(10))
    few = some_pairs([{}] * 1000, 4)
    assert len(set(few)) == 4 and few == sorted(few) == some_pairs([{}] * 1000, 4)
    axes = [{"axis": axis} for axis in ("math", "safety", "jailbreak", "facts", "sycophancy")]
    places = some_pairs(axes * 30, 12)
    assert sorted(i % 5 for i in places) == [1] * 4 + [2] * 4 + [4] * 4
    assert some_pairs([{"axis": "math"}, {"axis": "safety", "fails": False}], 3) == []


def test_a_browser_shows_the_colours(tmp_path):
    """Headless chromium, which computes the style of each token."""
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("chromium is not installed")
    page = written(tmp_path, "where?", ["a", "b", "c"])
    look = ("<script>document.title = [...document.querySelectorAll('i')]"
            ".map(i => getComputedStyle(i).backgroundColor).join('#')</script>")
    (tmp_path / "looked.html").write_text(page.replace("</html>", look + "</html>"))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={tmp_path}/browser", f"file://{tmp_path}/looked.html"],
                          capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]
    numbers = [re.findall(r"[\d.]+", colour) for colour in title.split("#")]
    opaque = [float(found[3]) if len(found) == 4 else 1.0 for found in numbers]
    assert opaque == pytest.approx([0.0, 0.5, 1.0], abs=0.01), title
