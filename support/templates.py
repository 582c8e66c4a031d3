"""Chat templates of real checkpoints: jinja2 programs that write a chat as one text."""
import json
from datetime import datetime
from functools import lru_cache

from support.common import UserError
from support.huggingface import CHATML

START, END = CHATML


def templated(tokenizer, messages):
    """The ids of a chat by the checkpoint's own template.

    The template sees a private character in place of each `<` of a content, or whatever special
    tokens begin with. It becomes `<` again once the special tokens of the text have been found: so
    those are the template's, however it cuts and joins the contents.
    """
    contents = "".join(message["content"] for message in messages)
    unused = (c for c in map(chr, range(0x100000, 0x10FFFE)) if c not in contents)
    stand_in = dict(zip(tokenizer.firsts, unused))
    text = render(tokenizer, [disarmed(tokenizer, message, stand_in) for message in messages])
    return tokenizer.encode(text, {ord(c): first for first, c in stand_in.items()})


def disarmed(tokenizer, message, stand_in):
    """A message in which no special token begins. The assistant's may have <think> and the like
    where these are not marked as special: the model wrote them, and templates look for them."""
    content = message["content"]
    if message["role"] == "assistant":
        content = tokenizer.starts.sub(lambda match: stand_in[match[0]], content)
    else:
        content = content.translate(str.maketrans(stand_in))
    return {**message, "content": content}


def render(tokenizer, messages):
    """The text of a chat up to where the response begins, as transformers renders it with
    enable_thinking=False: Qwen3 then answers without thinking first."""
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

    def strftime_now(form):         # the same prompts on every day; Llama 3.2's own default
        return datetime(2024, 7, 26).strftime(form)

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
