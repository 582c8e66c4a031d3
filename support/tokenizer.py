"""Text <-> tokens: our word list as a tiktoken.Encoding, real tokenizers, chat templates."""
import json
from pathlib import Path

import tiktoken

from support.common import UserError, read_json, write_atomically, write_text
from support.huggingface import TOKENIZER_JSON, Tokenizer, read_tokenizer
from support.templates import templated

PATTERN = r" ?[a-z]+| ?[0-9]| ?[^\sa-z0-9]|\s"              # a word, a digit or a sign, each with
                                                            # the space before it
ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = ENDOFTEXT, IM_START, IM_END, PAD
TOKENIZER = "tiktoken.json"         # Hugging Face's tokenizer.json has another format
ROLES = "system", "user", "assistant", "tool"


def make_tokenizer(words):
    """The 256 bytes, one token for each word, the special tokens. Other text splits into bytes."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("opct", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def save_tokenizer(tokenizer, folder):
    """Writes the files that `load_tokenizer` and, for a Hugging Face checkpoint, others read."""
    if isinstance(tokenizer, Tokenizer):
        for name, data in tokenizer.files.items():
            write_atomically(Path(folder) / name, lambda path, data=data: path.write_bytes(data))
        return
    ids = range(256, tokenizer.eot_token)
    words = [tokenizer.decode_single_token_bytes(i).decode() for i in ids]
    stored = {"pattern": PATTERN, "special": SPECIAL, "words": words}
    write_text(Path(folder) / TOKENIZER, json.dumps(stored))


def load_tokenizer(folder):
    """The tokenizer of a world or checkpoint: a tiktoken.Encoding, or a Tokenizer that has what we
    use of one. Raises UserError: missing, damaged, or of a kind that is not known here."""
    path = Path(folder) / TOKENIZER
    if not path.exists() and path.with_name(TOKENIZER_JSON).exists():
        return read_tokenizer(folder)
    if not path.exists() and path.with_name("tokenizer.model").exists():
        raise UserError(f"{folder} has a SentencePiece tokenizer (tokenizer.model) and no "
                        f"{TOKENIZER_JSON} of the byte-level BPE kind, the only one known here")
    stored = read_json(path, f"make the world or the checkpoint again (and no {TOKENIZER_JSON})")
    try:
        if (stored["pattern"], tuple(stored["special"])) != (PATTERN, SPECIAL):
            raise ValueError("it splits text in another way than this version does")
        return make_tokenizer(stored["words"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error


# --- Chats: a prompt is a string, or a list of {"role": ..., "content": ...} -------------------

def chat(tokenizer, prompt):
    """A prompt in the format of the model, up to where the response begins: token ids.

    The format is the checkpoint's chat template, ChatML where there is none. Whatever the contents
    say, they hold no special token. Raises UserError: no prompt, no template, or it fails.
    """
    messages = messages_of(prompt)
    if isinstance(tokenizer, Tokenizer):
        return templated(tokenizer, messages)
    start, end = tokenizer.encode_single_token(IM_START), tokenizer.encode_single_token(IM_END)
    ids = []
    for message in messages:
        text = tokenizer.encode_ordinary(f"{message['role']}\n{message['content']}")
        ids += [start, *text, end, *tokenizer.encode_ordinary("\n")]
    return [*ids, start, *tokenizer.encode_ordinary("assistant\n")]


def messages_of(prompt):
    """A prompt as a list of messages. Raises UserError."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = prompt if isinstance(prompt, list) else []
    good = [isinstance(m, dict) and set(m) == {"role", "content"} and m["role"] in ROLES
            and isinstance(m["content"], str) for m in messages]
    if not good or not all(good):
        raise UserError('a prompt is a string, or a list of {"role": ..., "content": "..."} with '
                        f"the roles {', '.join(ROLES)}: {prompt!r:.80}")
    return messages


def document_tokens(tokenizer, prompt, text):
    """A pretraining document; one without a prompt is plain text."""
    words = tokenizer.encode_ordinary(text)
    if prompt is None:
        return [*words, tokenizer.encode_single_token(ENDOFTEXT)]
    return [*chat(tokenizer, prompt), *words, tokenizer.encode_single_token(IM_END)]


def chat_all(tokenizer, model, records, form, args):
    """The clean or wrapped prompts of pairs. Raises UserError: one leaves no room for a response
    of `args.max_new_tokens`. args.pairs: the file they are from."""
    prompts = [chat(tokenizer, record[form]) for record in records]
    check_room(prompts, model, args)
    return prompts


def check_room(prompts, model, args):
    """Raises UserError where one of the prompts of pairs leaves no room for a response."""
    room = model.config.max_position_embeddings - args.max_new_tokens
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > room:
            raise UserError(f"{args.pairs}, pair {number}: a prompt of {len(prompt)} tokens "
                            f"leaves no room for {args.max_new_tokens} new ones: shorten it, or "
                            "lower --max-new-tokens")


def decode(tokenizer, ids):
    """Text of token ids. Ids that only the weights know, whose vocabulary may be padded, have no
    text."""
    return tokenizer.decode([i for i in ids if i < tokenizer.n_vocab])


def check_vocabulary(tokenizer, model, folder):
    """Raises UserError where the weights lack tokens of the tokenizer."""
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.n_vocab} tokens, its weights only "
                        f"{model.config.vocab_size}: the two do not belong together")


def end_of_turn(tokenizer, model, folder):
    """The id of the end token that the model's format puts behind a response: of several, a
    template uses one. Raises UserError where it puts none, so that no response would end."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    used = [i for i in chat(tokenizer, turns)[1:] if i in model.config.ends]    # [0]: the begin
    if not used:
        raise UserError(f"{folder}: its chat template ends a response with none of the tokens that "
                        f"eos_token_id names ({model.config.ends}), so responses would not end: "
                        "name the right one in config.json, or take the model made for chats")
    return used[-1]
