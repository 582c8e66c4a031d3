"""Text <-> tokens: our word list as a tiktoken.Encoding, a real checkpoint's by transformers."""
import json
from pathlib import Path

import tiktoken

from support.common import UserError, read_json, write_atomically, write_text

PATTERN = r" ?[a-z]+| ?[0-9]| ?[^\sa-z0-9]|\s"              # a word, a digit or a sign, each with
                                                            # the space before it
ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = ENDOFTEXT, IM_START, IM_END, PAD
TOKENIZER = "tiktoken.json"         # Hugging Face's tokenizer.json has another format
ROLES = "system", "user", "assistant", "tool"
# What belongs to a real tokenizer: all text files of its folder but these, and its one subfolder.
TEXTS, TEMPLATES = (".json", ".jinja", ".txt", ".model"), "additional_chat_templates"
OTHERS = "config.json", "run.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}          # tokens of SentencePiece for other text


def make_tokenizer(words):
    """The 256 bytes, one token for each word, the special tokens. Other text splits into bytes."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("opct", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


class Pretrained:
    """The tokenizer of a Hugging Face checkpoint, with what is used of a tiktoken.Encoding.

    tokenizer: transformers' own. special: its special tokens, name -> id. files: those of the
    checkpoint that belong to it, by their paths in the folder, name -> bytes; what is trained from
    it gets them as they are.
    """

    def __init__(self, tokenizer, files):
        self.tokenizer, self.files = tokenizer, files
        ids = tokenizer.get_vocab()
        self.n_vocab = 1 + max(ids.values())
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= set(tokenizer.all_special_tokens)
        special |= {IM_START, IM_END}                       # of a turn, whatever their flag says
        self.special = {token: ids[token] for token in sorted((special - BYTES) & ids.keys())}

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False,
                                     clean_up_tokenization_spaces=False)

    def special_in(self, text):
        """A special token that stands in the text, or that the normalizer makes of it; or None.
        The unknown token counts where it is written: any strange character may become one."""
        ids = set(self.encode_ordinary(text)) - {self.tokenizer.unk_token_id}
        return next((token for token, i in self.special.items() if token in text or i in ids), None)

    def chat(self, messages, prompt=True):
        """The ids of a chat by the checkpoint's own template, without thinking. prompt: up to where
        the response begins. Raises UserError: a content has a special token, which would count as
        one, there is no template, or it fails."""
        for message in messages:
            token = self.special_in(message["content"])
            if token is not None:
                raise UserError(f"the text {message['content']!r:.60} has the special token "
                                f"{token}: take it out")
        if self.tokenizer.chat_template is None:
            raise UserError("this checkpoint has no chat template: take one made for chats")
        try:
            # Llama's template tells the date: the same one always, so that a run can be resumed.
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt, enable_thinking=False, tokenize=True,
                return_dict=False, date_string="26 Jul 2024")
        except Exception as error:                          # a template is somebody's program
            raise UserError(f"the chat template refuses this prompt: {in_a_line(error)}") from error
        if not ids:
            raise UserError("the chat template makes nothing of this prompt")
        return ids


def in_a_line(error):
    """What another library says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def save_tokenizer(tokenizer, folder):
    """Writes the files that `load_tokenizer` and, for a Hugging Face checkpoint, others read."""
    if isinstance(tokenizer, Pretrained):
        for name, data in tokenizer.files.items():
            write_atomically(Path(folder) / name, lambda path, data=data: path.write_bytes(data))
        return
    ids = range(256, tokenizer.eot_token)
    words = [tokenizer.decode_single_token_bytes(i).decode() for i in ids]
    stored = {"pattern": PATTERN, "special": SPECIAL, "words": words}
    write_text(Path(folder) / TOKENIZER, json.dumps(stored))


def load_tokenizer(folder):
    """The tokenizer of a world or checkpoint: a tiktoken.Encoding or a Pretrained. Raises
    UserError: missing, damaged, or transformers is needed and missing."""
    path = Path(folder) / TOKENIZER
    if not path.exists() and any(path.parent.glob("tokenizer*")):
        return load_pretrained(path.parent)
    stored = read_json(path, "make the world or the checkpoint again (it has no tokenizer.json "
                       "either, which a Hugging Face checkpoint has)")
    try:
        if (stored["pattern"], tuple(stored["special"])) != (PATTERN, SPECIAL):
            raise ValueError("it splits text in another way than this version does")
        return make_tokenizer(stored["words"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error


def load_pretrained(folder):
    """What transformers makes of the folder. Nothing is downloaded, and no code in it is run."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"{folder} has a Hugging Face tokenizer: `pip install transformers`"
                        ) from error
    try:
        # False: it would ask on the terminal whether to run code that is in the folder.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True,
                                                  trust_remote_code=False)
    except Exception as error:                              # of many kinds, none of ours
        more = "; without tokenizer.json it needs `pip install sentencepiece protobuf`"
        raise UserError(f"transformers cannot read the tokenizer of {folder}: {in_a_line(error)}"
                        f"{'' if (folder / 'tokenizer.json').exists() else more}") from error
    files = {}
    for path in [*folder.glob("*"), *(folder / TEMPLATES).glob("*")]:
        if path.is_file() and path.suffix in TEXTS and path.name not in OTHERS:
            files[str(path.relative_to(folder))] = path.read_bytes()
    return Pretrained(tokenizer, files)


# --- Chats: a prompt is a string, or a list of {"role": ..., "content": ...} -------------------

def chat(tokenizer, prompt):
    """A prompt in the format of the model, up to where the response begins: token ids.

    The format is the checkpoint's chat template, ChatML for our own worlds. Whatever the contents
    say, they hold no special token. Raises UserError: no prompt, no template, or it fails.
    """
    messages = messages_of(prompt)
    if isinstance(tokenizer, Pretrained):
        return tokenizer.chat(messages)
    start, end = tokenizer.encode_single_token(IM_START), tokenizer.encode_single_token(IM_END)
    ids = []
    for message in messages:
        text = tokenizer.encode_ordinary(f"{message['role']}\n{message['content']}")
        ids += [start, *text, end, *tokenizer.encode_ordinary("\n")]
    return [*ids, start, *tokenizer.encode_ordinary("assistant\n")]


def response_tokens(tokenizer, prompt, text, end):
    """The ids of a response that somebody wrote, with its end token: those that the template gives
    it behind the prompt, if it goes on from there as it is, else those of the text alone."""
    if isinstance(tokenizer, Pretrained):
        messages = [*messages_of(prompt), {"role": "assistant", "content": text}]
        asked, whole = tokenizer.chat(messages[:-1]), tokenizer.chat(messages, prompt=False)
        rest = whole[len(asked):]
        if whole[:len(asked)] == asked and end in rest:
            return rest[:rest.index(end) + 1]
    return [*tokenizer.encode_ordinary(text), end]


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


def decode(tokenizer, ids):
    """Text of token ids. Ids that only the weights know, whose vocabulary may be padded, have no
    text."""
    return tokenizer.decode([i for i in ids if i < tokenizer.n_vocab])


def token_text(tokenizer, i):
    """Text of one token, with the space before it: decoders may leave that out in front."""
    before = tokenizer.encode_ordinary("a")
    return decode(tokenizer, [*before, i])[len(decode(tokenizer, before)):]


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
