"""A Hugging Face tokenizer.json of the byte-level BPE kind; tiktoken does the merging.

A text becomes tokens in four steps. Each is checked against the file, and what is not known here is
refused by its name:

    added tokens    split the text: <|im_end|>, and tokens that are not special, such as <think>
    normalizer      none, or NFC
    pre-tokenizer   cuts the rest into pieces, "it's 42" -> "it" "'s" " " "4" "2", step by step
    BPE             merges the bytes of a piece: always the pair that makes the token of lowest id
"""
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import regex
import tiktoken

from support.common import UserError, read_json, read_text

TOKENIZER_JSON = "tokenizer.json"
# The files of a checkpoint that are about text; they go wherever its tokenizer goes.
FILES = (TOKENIZER_JSON, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json")
CHATML = "<|im_start|>", "<|im_end|>"
TAG = re.compile(r"<.+>|\[.+\]", re.DOTALL)                 # <think>, [INST], but no run of blanks
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Byte-level files write each byte as one character: a byte that prints as itself, any other as
# U+0100 and on, in order.
PRINTS = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in PRINTS}
BYTE_OF.update({chr(256 + n): byte
                for n, byte in enumerate(sorted(set(range(256)) - set(PRINTS)))})


class Tokenizer:
    """Has what calls need of a tiktoken.Encoding: encode_ordinary, encode_single_token, decode,
    n_vocab. Besides, `encode` takes the added tokens in a text for what they are.

    `special` are the tokens that no text contains as such, `tags` those and all others that look
    like mark-up. For chats: `template` (a string or None), `names` of special tokens in it,
    `firsts`, the first characters of tags, `starts`, which finds the first character of each
    special token. `files` are those of the checkpoint, name -> bytes.
    """

    def __init__(self, stored, names):
        model, listed = stored["model"], stored.get("added_tokens") or []
        refuse_other_kinds(model, listed)
        self.names, self.template, self.files = names, None, {}
        self.nfc = is_nfc(stored.get("normalizer"))
        self.steps = steps_of(stored.get("pre_tokenizer"))
        self.added = {t["content"]: t["id"] for t in listed if t["content"]}
        marked = {*CHATML, *names.values()}                 # special whatever their flag says
        self.special = [t["content"] for t in listed if t["special"] or t["content"] in marked]
        self.tags = [t for t in self.added if t in self.special or TAG.fullmatch(t)]
        self.firsts = sorted({token[0] for token in self.tags})
        self.starts = re.compile(f"(?={any_of(self.special).pattern}).", re.DOTALL)
        self.every = any_of(self.added)
        self.ordinary = any_of(set(self.added) - set(self.special))
        written = {token: as_bytes(token) for token in model["vocab"]}
        tokens = {written[token]: i for token, i in model["vocab"].items()
                  if token not in self.tags}
        self.bytes_of = {i: token for token, i in tokens.items()}
        self.bytes_of.update({i: token.encode() for token, i in self.added.items()})
        self.n_vocab = max(self.bytes_of) + 1
        self.without = bytes(b for b in range(256) if bytes([b]) not in tokens)
        # `ignore_merges`: a piece that is in the vocabulary is one token, even one of no merge.
        self.whole = tokens if model.get("ignore_merges") else {}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        merges = [(written[left], written[right]) for left, right in merges
                  if left + right not in self.tags]
        ranks = ranks_of(tokens, merges)
        self.bpe = tiktoken.Encoding("tokenizer.json", pat_str=GPT2, mergeable_ranks=ranks,
                                     special_tokens={})

    def encode_ordinary(self, text):
        """The ids of a text. Special tokens in it are plain text. Added tokens that are not special
        (a run of blanks, <think>) are tokens, as in transformers."""
        return self.split(self.ordinary, text, {})

    def encode(self, text, stand_ins):
        """The ids of a text with special tokens. Once these are found, each character of
        `stand_ins` (its number -> another) becomes that other one."""
        return self.split(self.every, text, stand_ins)

    def split(self, tokens, text, stand_ins):
        ids = []
        for number, part in enumerate(tokens.split(text)):
            if number % 2:                                  # odd: what `tokens` found
                ids.append(self.added[part])
            else:
                ids += self.merge(part.translate(stand_ins))
        return ids

    def merge(self, text):
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for step in self.steps:
            pieces = [piece for whole in pieces for piece in step.cut(whole)]
        ids = []
        for piece in pieces:
            data = piece.encode("utf-8", "replace")
            data = data.translate(None, self.without)       # a byte without a token is left out
            if data in self.whole:
                ids.append(self.whole[data])
            elif data:
                ids += self.bpe._encode_single_piece(data)
        return ids

    def encode_single_token(self, name):
        """The id of an added token. Raises KeyError."""
        return self.added[name]

    def decode(self, ids):
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")


def any_of(tokens):
    """Finds the tokens in a text, the longest where several begin; `split` returns them at odd
    places."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def as_bytes(token):
    """The bytes of a token as the file writes it. What is not written in bytes is text."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


def refuse_other_kinds(model, added):
    """What would give other tokens silently is refused."""
    kind = model.get("type") or ("BPE" if "merges" in model else "without a name")
    if kind != "BPE":
        raise ValueError(f"it is of the kind {kind}, and only byte-level BPE is known here")
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ValueError(f"its {name} = {model[name]!r} is not known here")
    for token in added:
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                raise ValueError(f"{name} of its token {token['content']!r} is not known here")


def is_nfc(normalizer):
    """Whether texts are normalised to NFC, the one normalizer that is known here."""
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        return sum(is_nfc(each) for each in normalizer["normalizers"]) > 0      # checks them all
    if normalizer["type"] != "NFC":
        raise ValueError(f"its normalizer {normalizer['type']} is not known here")
    return True


# --- Pre-tokenizers: how a text is cut into pieces ---------------------------------------------

class Step(NamedTuple):
    """One pre-tokenizer. `pattern` None cuts nothing; `gaps`: what no match covers is kept too."""
    pattern: regex.Pattern = None
    gaps: bool = True
    prefix: bool = False                                    # a blank in front where there is none

    def cut(self, text):
        if self.prefix and text and not text.startswith(" "):
            text = " " + text
        if self.pattern is None:
            return [text]
        pieces, at = [], 0
        for match in self.pattern.finditer(text):
            if self.gaps:
                pieces.append(text[at:match.start()])
            pieces.append(match[0])
            at = match.end()
        if self.gaps:
            pieces.append(text[at:])
        return [piece for piece in pieces if piece]


def steps_of(stored):
    """The steps of a pre-tokenizer. Raises ValueError unless ByteLevel is the last of them."""
    if stored is None:
        stored = {"type": "Sequence", "pretokenizers": []}
    listed = stored["pretokenizers"] if stored["type"] == "Sequence" else [stored]
    kinds = [each["type"] for each in listed]
    if "ByteLevel" not in kinds[-1:]:
        raise ValueError(f"its pre-tokenizer is {' + '.join(kinds) or 'none'}; only byte-level BPE "
                         "is known here, whose last step is ByteLevel")
    return [step_of(each) for each in listed]


def step_of(stored):
    """The step of one pre-tokenizer. Raises ValueError: not known here."""
    kind = stored["type"]
    if kind == "ByteLevel":
        pattern = regex.compile(GPT2) if stored.get("use_regex", True) else None
        return Step(pattern, prefix=stored["add_prefix_space"])
    if kind == "Digits":
        return Step(regex.compile(r"\p{N}" if stored["individual_digits"] else r"\p{N}+"))
    if kind != "Split":
        raise ValueError(f"its pre-tokenizer {kind} is not known here")
    [(how, pattern)] = stored["pattern"].items()
    pattern = regex.compile(pattern if how == "Regex" else regex.escape(pattern))
    behavior = stored["behavior"], stored["invert"]
    if behavior[0] != "Isolated" and behavior != ("Removed", True):
        raise ValueError(f"its pre-tokenizer Split with {behavior[0]} is not known here")
    return Step(pattern, gaps=behavior[0] == "Isolated")


# --- Merges ----------------------------------------------------------------------------------

def ranks_of(tokens, merges):
    """The tokens that merging can reach, bytes -> id, for tiktoken.

    The file lists pairs in the order of their merging. tiktoken knows tokens only and merges the
    pair that makes the lowest id. The two agree if ids grow along the list and no token is in
    `ranks` that its own pair does not make out of its bytes: such a token is left out.
    Raises ValueError: the ids are not in the order of the merges.
    """
    ranks = {token: i for token, i in tokens.items() if len(token) == 1}
    halves, last = {}, -1                                   # halves: token -> the pair it is from
    for left, right in merges:
        token, rank = left + right, tokens[left + right]
        if rank < last:
            raise ValueError("its ids are not in the order of its merges (first at "
                             f"{token!r}), so that tiktoken would merge in another order")
        last = rank
        if token not in ranks and left in ranks and right in ranks:
            if meet(left, right, rank, ranks, halves):
                ranks[token], halves[token] = rank, (left, right)
    return ranks


def meet(left, right, limit, ranks, halves):
    """Whether two tokens come to stand side by side when their bytes are merged, below rank
    `limit`. Goes back in time: undoes the younger token of those at the border, and looks whether
    the border itself would have been merged over before that."""
    while True:
        if ranks.get(left + right, limit) < limit:
            return False
        if left not in halves and right not in halves:      # single bytes
            return True
        if right not in halves or left in halves and ranks[left] > ranks[right]:
            limit, left = ranks[left], halves[left][1]
        else:                           # of two equal pairs the left one is merged first: + 1
            limit, right = ranks[right] + 1, halves[right][0]


# --- Files -----------------------------------------------------------------------------------

def read_tokenizer(folder):
    """The tokenizer of a Hugging Face checkpoint, with its chat template.

    Raises UserError: damaged, or of a kind that is not known here.
    """
    path, hint = Path(folder) / TOKENIZER_JSON, f"get {folder} again"
    stored = read_json(path, hint)
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):       # the later one counts
        if path.with_name(name).exists():
            config.update(read_json(path.with_name(name), hint))
    try:
        tokenizer = Tokenizer(stored, names_of(config))
        tokenizer.template = template_of(config)
    except KeyError as error:
        raise UserError(f"cannot read the tokenizer {path}: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
            regex.error) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error
    if path.with_name("chat_template.jinja").exists():
        tokenizer.template = read_text(path.with_name("chat_template.jinja"), hint)
    there = [name for name in FILES if path.with_name(name).is_file()]
    tokenizer.files = {name: path.with_name(name).read_bytes() for name in there}
    return tokenizer


def template_of(config):
    """The chat template in a tokenizer_config.json: a string, a list of named ones, or None."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}["default"]
    if not isinstance(template, str | None):
        raise ValueError("its chat_template is neither a string nor a list of named ones")
    return template


def names_of(config):
    """What a template may call the special tokens: bos_token -> "<s>" and so on."""
    names = {key: value["content"] if isinstance(value, dict) else value
             for key, value in config.items() if key.endswith("_token")}
    return {key: value for key, value in names.items() if isinstance(value, str)}
