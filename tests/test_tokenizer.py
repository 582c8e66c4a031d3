"""Real tokenizers and chat templates are those of transformers; a world has its own."""
import builtins
import io
import json
import re
import sys

import pytest
import torch

from eval import respond
from helpers import run_here, tiny_gpt
from model import load_checkpoint, save_checkpoint
from support.common import UserError
from support.pairs import check_forms
from support.tokenizer import (chat, check_vocabulary, decode, load_tokenizer, response_tokens,
                               save_tokenizer, token_text)

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# It keeps the thoughts of the turn that follows the last question, and opens with an empty one.
QWEN3_TEMPLATE = """{%- set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
    {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role != 'assistant' %}{% set content = m.content %}{% elif loop.index0 > ns.last %}
        {{- '<think>\\n' + (thought if '</think>' in m.content else '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# It tells the date, trims what was said, and takes a system message in front only.
LLAMA3_TEMPLATE = """{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set first = messages[0].role == 'system' %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string }}
{{- '\\n\\n' + (messages[0].content | trim if first else '') + '<|eot_id|>' }}
{%- for m in messages[first | int:] %}
    {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('only users') }}{% endif %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# A template without turn markers, as Llama-2's, and one that drops system messages.
INST_TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
                 "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
                 "{% endif %}{% endfor %}")
DEAF_TEMPLATE = ("{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
                 "{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n")
TEMPLATES = {"SmolLM2": SMOLLM2_TEMPLATE, "Qwen3": QWEN3_TEMPLATE, "Llama-3": LLAMA3_TEMPLATE,
             "Llama-2": INST_TEMPLATE}
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]
TEXT = ["The quick brown fox says: who rules 42 cities? Größe, 你好! I'd say no, wait.",
        "system user assistant\n tokens of text, [INST] and [/INST], <= and => 3.14"] * 4
PROMPTS = ["who rules?", "  Größe 你好 42 <= 7\n", [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "no."}, {"role": "user", "content": "and now?"}]]

KINDS = ["byte-level BPE", "BPE with byte fallback", "Unigram", "WordPiece"]


def trained(kind):
    """A tokenizer of a kind, trained on a little text, as transformers holds it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import (Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                            trainers)
    special, more = SPECIAL, {}
    if kind == "byte-level BPE":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        more = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif kind == "BPE with byte fallback":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        trainer, special = trainers.BpeTrainer, [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)])
    elif kind == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder, more = decoders.Metaspace(), {"unk_token": "<unk>"}
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer, tokenizer.normalizer = trainers.WordPieceTrainer, normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainer(vocab_size=500, special_tokens=special,
                                                show_progress=False, **more))
    tokenizer.add_tokens(["<think>", "</think>", "<="])
    tokenizer.post_processor = processors.TemplateProcessing(           # what Llama's does
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>",
                                                eos_token="</s>", unk_token="<unk>")


def checkpoint(folder, kind="byte-level BPE", template=SMOLLM2_TEMPLATE):
    """A checkpoint's folder as transformers writes it, with random weights."""
    tokenizer = trained(kind)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = tiny_gpt(vocab=len(tokenizer), dtype=torch.float32, max_position_embeddings=512,
                     eos_token_id=end, pad_token_id=None)
    save_checkpoint(model, folder)
    return folder


def theirs(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def their_chat(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=False, date_string="26 Jul 2024")


# --- Prompts and responses ---------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_has_the_tokens_that_transformers_gives_it(kind, name, tmp_path):
    checkpoint(tmp_path, kind, TEMPLATES[name])
    ours, expected = load_tokenizer(tmp_path), theirs(tmp_path)
    for prompt in PROMPTS[:2] if name == "Llama-2" else PROMPTS:
        assert chat(ours, prompt) == their_chat(expected, prompt)
    assert "<think>" in decode(ours, chat(ours, "so?")) or name != "Qwen3"


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint(tmp_path, kind)
    model, tokenizer = load_checkpoint(tmp_path), load_tokenizer(tmp_path)
    answers = respond(model, tokenizer, PROMPTS, seed=0, temperature=0.0, limit=8)
    other, words = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), theirs(tmp_path)
    for prompt, answer in zip(PROMPTS, answers):
        idx = torch.tensor([their_chat(words, prompt)])
        said = other.generate(idx, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
        said = [i for i in said[idx.shape[1]:].tolist() if i not in model.config.ends]
        assert answer == words.decode(said, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, end", [("SmolLM2", "<|im_end|>"), ("Qwen3", "<|im_end|>"),
                                       ("Llama-2", "</s>")])
def test_a_given_response_has_the_tokens_that_the_template_gives_it(kind, name, end, tmp_path):
    checkpoint(tmp_path, kind, TEMPLATES[name])
    tokenizer = load_tokenizer(tmp_path)
    end = tokenizer.special[end]
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "no, wait."}]
    whole = theirs(tmp_path).apply_chat_template(messages, return_dict=False)
    prompt = chat(tokenizer, "who?")
    ids = response_tokens(tokenizer, "who?", "no, wait.", end)
    assert ids[-1] == end and ids.count(end) == 1 and len(ids) > 2
    assert whole[:len(prompt)] == prompt and whole[len(prompt):len(prompt) + len(ids)] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_that_the_template_changes_is_encoded_as_it_is(kind, tmp_path):
    """The template leaves thoughts out, or says `bot` where it asks for an answer."""
    said = "<think> so </think> no"
    for template in (QWEN3_TEMPLATE, SMOLLM2_TEMPLATE.replace("assistant\n' }}{% endif", "bot' }}{%"
                                                              "endif")):
        tokenizer = load_tokenizer(checkpoint(tmp_path, kind, template))
        plain = theirs(tmp_path).encode(said, add_special_tokens=False)
        assert response_tokens(tokenizer, "who?", said, 4) == [*plain, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_the_tokens_joined_are_the_text(kind, tmp_path):
    """Most tokenizers leave out a token's space where it is decoded alone."""
    tokenizer = load_tokenizer(checkpoint(tmp_path, kind))
    ids = tokenizer.encode_ordinary("who rules cities?")
    text = "".join(token_text(tokenizer, i) for i in ids)
    assert text.strip() == decode(tokenizer, ids) and "who rules" in text
    assert token_text(tokenizer, 10 ** 6) == ""             # ids of padding have no text


def test_a_template_that_asks_for_the_day_makes_another_run_of_another_day(tmp_path):
    """The run's folder says that the prompts are others; Llama 3's own field gets a fixed day."""
    date = "{{ date_string }}" + SMOLLM2_TEMPLATE
    assert "26 Jul 2024" in decode(load_tokenizer(checkpoint(tmp_path / "a", template=date)),
                                   chat(load_tokenizer(tmp_path / "a"), "hi"))
    folder, pairs = checkpoint(tmp_path / "b"), tmp_path / "pairs.jsonl"
    pairs.write_text('{"clean": "who?", "wrapped": "who? me?"}\n')
    args = ["opct.py", "opct", "--base", folder, "--pairs", pairs, "--out", tmp_path / "run",
            "--steps", 1, "--batch", 1, "--max-new-tokens", 4]
    assert run_here(*args).returncode == 0
    assert "finished already" in run_here(*args).stdout
    (folder / "chat_template.jinja").write_text("Tuesday. " + SMOLLM2_TEMPLATE)
    again = run_here(*args)
    assert again.returncode == 2 and "holds a run with prompts = " in again.stderr


# --- What a user typed is text -----------------------------------------------------------------

def test_the_text_of_a_special_token_is_refused_by_its_name(tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path))
    for token in ("<|im_end|>", "<|im_start|>", "</s>", "<unk>", "<|eot_id|>"):
        for role in ("system", "user", "assistant"):
            messages = [{"role": role, "content": f"so{token}"}, {"role": "user", "content": "?"}]
            with pytest.raises(UserError) as refused:
                chat(tokenizer, messages)
            assert f"special token {token}:" in str(refused.value)
        with pytest.raises(UserError, match="special token"):
            response_tokens(tokenizer, "who?", f"I{token}", 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_looks_special_is_text(kind, tmp_path):
    """Added tokens that are not special, single bytes, and what is no token at all; but not what a
    normalizer makes special."""
    tokenizer = load_tokenizer(checkpoint(tmp_path, kind))
    for text in ("a <= b <think> so </think>", "|im_end| < s > <S>", "<0x41> 🙂 \u200b", ""):
        ids = chat(tokenizer, text)
        assert sum(ids.count(i) for token, i in tokenizer.special.items() if token != "<unk>") == 5
    wide = "\uff1c|im_end|\uff1e"
    if kind == "Unigram":
        with pytest.raises(UserError, match=r"special token <\|im_end\|>:"):
            chat(tokenizer, wide)
    else:
        assert chat(tokenizer, wide).count(tokenizer.special["<|im_end|>"]) == 2


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "</s>"])
def test_turn_markers_and_end_tokens_are_special_whatever_their_flag_says(token, tmp_path):
    folder = checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace('"special": true', '"special": false')
        (folder / name).write_text(text)
    tokenizer = load_tokenizer(folder)
    chat(tokenizer, "so<|eot_id|>")
    with pytest.raises(UserError, match=re.escape(f"special token {token}:")):
        chat(tokenizer, f"so{token}")


def test_a_chat_says_what_is_wrong_and_goes_on(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "base")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\nAnd <|im_end|> now?\nSo?\n\n"))
    said = run_here("eval.py", "chat", folder, "--temperature", 0, "--max-new-tokens", 4)
    assert said.returncode == 0 and said.stdout.count("base  ") == 3, said.stderr
    assert said.stdout.count("special token <|im_end|>") == 1


@pytest.mark.parametrize("template, words", [
    (None, "no chat template"), ("{{ raise_exception('only users') }}", "only users"),
    ("{% if %}", "refuses this prompt"), ("{# nothing #}", "makes nothing")])
def test_a_template_that_gives_nothing_is_one_line(template, words, tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path, template=template))
    with pytest.raises(UserError, match=words):
        chat(tokenizer, "who?")


def test_forms_that_the_template_makes_equal_are_named(tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path, template=DEAF_TEMPLATE))
    user = {"role": "user", "content": "who?"}
    deaf = {"clean": [{"role": "system", "content": "Warn."}, user], "wrapped": [user]}
    plain, equal = {"clean": "who?", "wrapped": "who? me?"}, {"clean": "a", "wrapped": "a"}

    def checked(*records):
        sides = ([chat(tokenizer, r[form]) for r in records] for form in ("clean", "wrapped"))
        return check_forms(records, *sides, "mine.jsonl")

    assert checked(plain, equal) is None
    assert "both forms of 1 of 2 pairs the same tokens (first pair 2)" in checked(plain, deaf)
    with pytest.raises(UserError, match="2 of 2 pairs"):
        checked(deaf, deaf)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(deaf) + "\n")
    for command in (["opct.py", "opct", "--base", tmp_path], ["eval.py", "pairs", tmp_path]):
        said = run_here(*command, "--pairs", pairs, "--out", tmp_path / "out")
        assert said.returncode == 2 and "both forms of 1 of 1 pairs the same" in said.stderr


# --- Files -------------------------------------------------------------------------------------

def test_saving_keeps_the_files_as_they_are(tmp_path):
    source, copy = checkpoint(tmp_path / "a"), tmp_path / "b"
    made = {p.name for p in source.iterdir()} - {"config.json", "model.safetensors"}
    files = {"additional_chat_templates/tools.jinja": "{{ tools }}\r\n", "vocab.txt": "a\n",
             "generation_config.json": '{"eos_token_id": [1, 2]}', "tokenizer.model": "\0"}
    others = {"run.json": "{}", "README.md": "", "old/tokenizer.json": "{",
              "model.safetensors.index.json": "{}"}
    for name, text in {**files, **others}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(text.encode())
    save_tokenizer(load_tokenizer(source), copy)
    saved = {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert saved.keys() == files.keys() | made and "chat_template.jinja" in made
    assert all((source / name).read_bytes() == data for name, data in saved.items())
    assert chat(load_tokenizer(copy), "hi") == chat(load_tokenizer(source), "hi")


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="make the world or the checkpoint again"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="^[^\n]* `pip install transformers`$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name, text", [("tokenizer.json", "{"), ("tokenizer.json", None),
                                        ("tokenizer_config.json", "[")])
def test_a_damaged_file_is_one_line(name, text, tmp_path):
    folder = checkpoint(tmp_path)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match="^transformers cannot read the tokenizer of [^\n]*$") as e:
        load_tokenizer(folder)
    assert ("pip install sentencepiece protobuf" in str(e.value)) == (text is None)


def test_a_folder_of_tokenizer_json_alone_is_read_as_transformers_does(tmp_path):
    folder = checkpoint(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert chat(load_tokenizer(folder), "who rules?") == their_chat(theirs(folder), "who rules?")


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    folder, asked = checkpoint(tmp_path), []
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")
    with pytest.raises(UserError, match="^transformers cannot read the tokenizer of [^\n]*$"):
        load_tokenizer(folder)
    assert not asked and not (tmp_path / "ran").exists()


def test_a_vocabulary_larger_than_the_weights_is_refused(tmp_path):
    tokenizer = load_tokenizer(checkpoint(tmp_path))
    n = tokenizer.n_vocab
    assert n == len(theirs(tmp_path))
    ids = tokenizer.encode_ordinary("who")
    assert decode(tokenizer, [*ids, 10 ** 6]) == "who"      # ids of padding have no text
    assert decode(tokenizer, tokenizer.encode_ordinary("so , it 's")) == "so , it 's"
    check_vocabulary(tokenizer, tiny_gpt(vocab=n + 5), "x")
    with pytest.raises(UserError, match="do not belong together"):
        check_vocabulary(tokenizer, tiny_gpt(vocab=n - 1), "x")


# --- A world's own -----------------------------------------------------------------------------

def test_a_world_takes_messages_too(tokenizer):
    assert chat(tokenizer, [{"role": "user", "content": "hi"}]) == chat(tokenizer, "hi")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<|im_end|>"},
                {"role": "user", "content": "so"}]
    assert decode(tokenizer, chat(tokenizer, messages)) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|><|im_end|>\n"
        "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n")
    end = tokenizer.encode_single_token("<|im_end|>")
    assert chat(tokenizer, messages).count(end) == 3


@pytest.mark.parametrize("prompt", [[], None, 3, {"role": "user", "content": "x"}, ["x"],
                                    [{"role": "user"}], [{"role": "user", "content": 3}],
                                    [{"role": "<|im_end|>", "content": "x"}],
                                    [{"role": "user", "content": "x", "name": "y"}]])
def test_a_prompt_of_another_form_is_refused(prompt, tokenizer):
    with pytest.raises(UserError, match="a prompt is a string, or a list of"):
        chat(tokenizer, prompt)
