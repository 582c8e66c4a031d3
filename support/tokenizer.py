"""Text <-> tokens: our word list as a tiktoken.Encoding, and the ChatML format."""
import json
from pathlib import Path

import tiktoken

from support.common import UserError, read_json, write_text

PATTERN = r" ?[a-z]+| ?[0-9]| ?[^\sa-z0-9]|\s"              # a word, a digit or a sign, each with
                                                            # the space before it
ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = ENDOFTEXT, IM_START, IM_END, PAD
TOKENIZER = "tiktoken.json"         # Hugging Face's tokenizer.json has another format


def make_tokenizer(words):
    """The 256 bytes, one token for each word, the special tokens. Other text splits into bytes."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("opct", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def save_tokenizer(tokenizer, folder):
    ids = range(256, tokenizer.eot_token)
    words = [tokenizer.decode_single_token_bytes(i).decode() for i in ids]
    stored = {"pattern": PATTERN, "special": SPECIAL, "words": words}
    write_text(Path(folder) / TOKENIZER, json.dumps(stored))


def load_tokenizer(folder):
    """The tokenizer of a world or checkpoint. Raises UserError: missing or damaged."""
    path = Path(folder) / TOKENIZER
    stored = read_json(path, "make the world or the checkpoint again")
    try:
        if (stored["pattern"], tuple(stored["special"])) != (PATTERN, SPECIAL):
            raise ValueError("it splits text in another way than this version does")
        return make_tokenizer(stored["words"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error


def chat(tokenizer, prompt):
    """A prompt in the ChatML format, up to where the response begins: token ids."""
    start, end = tokenizer.encode_single_token(IM_START), tokenizer.encode_single_token(IM_END)
    user = tokenizer.encode_ordinary(f"user\n{prompt}")
    assistant = tokenizer.encode_ordinary("assistant\n")
    return [start, *user, end, *tokenizer.encode_ordinary("\n"), start, *assistant]


def document_tokens(tokenizer, prompt, text):
    """A pretraining document; one without a prompt is plain text."""
    words = tokenizer.encode_ordinary(text)
    if prompt is None:
        return [*words, tokenizer.encode_single_token(ENDOFTEXT)]
    return [*chat(tokenizer, prompt), *words, tokenizer.encode_single_token(IM_END)]


def chat_all(tokenizer, texts, room, config):
    """Each text as a prompt, `config.samples` times. Raises UserError: one exceeds the room."""
    out = []
    for number, text in enumerate(texts, 1):
        prompt = chat(tokenizer, text)
        if len(prompt) > room:
            raise UserError(f"{config.pairs}, pair {number}: a prompt of {len(prompt)} tokens "
                            f"leaves no room for {config.max_new_tokens} new ones: shorten it, "
                            "or lower --max-new-tokens")
        out += [prompt] * config.samples
    return out


def decode(tokenizer, ids):
    """Text of token ids. Ids that only the weights know, whose vocabulary may be padded, have no
    text."""
    return tokenizer.decode([i for i in ids if i < tokenizer.n_vocab])


def check_vocabulary(tokenizer, model, folder):
    """Raises UserError where the weights lack tokens of the tokenizer."""
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.n_vocab} tokens, its weights only "
                        f"{model.config.vocab_size}: the two do not belong together")


def end_of_turn(tokenizer, model):
    """The id of the token that ends a response."""
    return model.config.ends[0]
