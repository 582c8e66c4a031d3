"""Chat templates of real checkpoints: jinja2 programs that write a chat as one text."""
import json
from datetime import datetime
from functools import lru_cache

from support.common import UserError
from support.huggingface import CHATML

START, END = CHATML


def templated(tokenizer, messages):
    """The ids of a chat by the checkpoint's own template.

    The template sees one private character in place of each special token that a content spells;
    it gets its spelling back once the template's own special tokens have been found. Tokens such
    as <think>, which are special only to the template, are safe too, but for the assistant's: those
    the model has written, and templates look for them.
    """
    contents = "".join(m["content"] for m in messages)
    free = (c for c in map(chr, range(0x100000, 0x10FFFE)) if c not in contents)
    border, stand_ins, safe = next(free), {}, []
    for message in messages:
        text = message["content"]
        tokens = tokenizer.special if message["role"] == "assistant" else tokenizer.tags
        for token in [token for token in tokens if token in text]:
            character = next(free)
            text, stand_ins[ord(character)] = text.replace(token, character), token
        # Nor may a part of a token become a whole one by what the template puts beside it.
        core, (firsts, seconds) = text.strip(), halves(tuple(tokens))
        inside = any(core in token for token in tokens)
        if core and (core.endswith(firsts) or core.startswith(seconds) or inside):
            text = text.replace(core, border + core + border)
        safe.append({**message, "content": text})
    stand_ins[ord(border)] = ""
    return tokenizer.encode(render(tokenizer, safe), stand_ins)


@lru_cache
def halves(tokens):
    """Every way in which a token may begin, and every way in which it may end."""
    cuts = [(token, i) for token in tokens for i in range(1, len(token))]
    return tuple({token[:i] for token, i in cuts}), tuple({token[i:] for token, i in cuts})


def render(tokenizer, messages):
    """The text of a chat up to where the response begins, as transformers renders it."""
    if tokenizer.template is None:
        if not {START, END} <= set(tokenizer.added):
            raise UserError("this checkpoint has neither a chat template nor the tokens of ChatML "
                            f"({START}, {END}): take a model that is made for chats")
        text = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)
        return f"{text}{START}assistant\n"
    template = compiled(tokenizer.template)
    try:
        return template.render(messages=messages, tools=None, documents=None,
                               add_generation_prompt=True, enable_thinking=False,
                               **tokenizer.names)
    except Exception as error:                              # a template is somebody's program
        raise UserError(f"the chat template refuses this prompt: {error}") from error


@lru_cache
def compiled(template):
    """A jinja2 template with the settings and helpers of transformers, in a sandbox."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("this checkpoint has a chat template: `pip install jinja2`") from error

    class Generation(Extension):
        """{% generation %} marks the assistant's text for a trainer; here it does nothing."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        return datetime.now().strftime(form)

    def tojson(value, ensure_ascii=False, **settings):
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is damaged: {error}") from error
