"""Contrastive pairs: reading and checking what a user wrote, and their tokens."""
import json

import torch

from support.common import UserError, read_text
from support.tokenizer import chat, end_of_turn, messages_of, response_tokens


def check_pair(record):
    """Raises ValueError or UserError where a record is no contrastive pair; other fields that it
    has are left alone."""
    if not isinstance(record, dict) or not {"clean", "wrapped"} <= record.keys():
        raise ValueError('it wants {"clean": "...", "wrapped": "..."}')
    for form in ("clean", "wrapped"):
        if not record[form]:
            raise ValueError(f'"{form}" is empty')
        if messages_of(record[form])[-1]["role"] == "assistant":
            raise ValueError(f'"{form}" ends with an answer: that belongs into "response"')
    if not isinstance(record.get("response", ""), str):
        raise ValueError('"response" is no string')
    for name in ("expect", "avoid"):
        some = record.get(name, [])
        if not isinstance(some, list) or not all(isinstance(s, str) and s for s in some):
            raise ValueError(f'"{name}" is no list of strings')


def without_doubles(items):
    """The object of these (key, value). Raises ValueError where a key stands twice."""
    found = dict(items)
    if len(found) < len(items):
        twice = [key for key, _ in items if [k for k, _ in items].count(key) > 1]
        raise ValueError(f'"{twice[0]}" stands in it twice')
    return found


def read_jsonl(path):
    """Reads pairs: a JSON object a line with the prompts "clean" and "wrapped", each a string or a
    list of messages; "response", "expect" and "avoid" may stand beside them."""
    records = []
    lines = read_text(path, "it has to hold pairs, one JSON object a line").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=without_doubles)
            json.dumps(record, ensure_ascii=False).encode()     # refuses half a surrogate pair
            check_pair(record)
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(f"{path}, line {number} is no pair: {error}") from error
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no pairs")
    if len({"response" in r for r in records}) > 1:
        raise UserError(f"{path}: some pairs have a response and others have none: give one to "
                        "all, or to none")
    return records


def shown(record):
    """A pair as two lines on the screen; of messages, the last one."""
    forms = [record[form] if isinstance(record[form], str) else record[form][-1]["content"]
             for form in ("clean", "wrapped")]
    return "  clean     {}\n  wrapped   {}".format(*forms)


def check_use(records, config, stage, size):
    """Raises UserError where flags and pairs do not go together, for `size` processes."""
    if config.gamma and config.loss == "exact":
        raise UserError("--gamma needs --loss sampled: only there do later tokens count")
    if config.control == "clean" and config.dtype == "bfloat16" and not config.lora:
        raise UserError("--control clean has nothing to fix only where teacher and student are "
                        "equal: leave out --dtype bfloat16, or train with --lora")
    if config.control == "shuffled" and len({repr(r["clean"]) for r in records}) < 2:
        raise UserError("--control shuffled needs two clean prompts or more")
    if config.stored is not None and "response" in records[0]:
        raise UserError(f"--stored samples the teacher, but {config.pairs} has responses: leave "
                        "out one of the two")
    if "response" in records[0] and stage == "opct":
        raise UserError(f"{config.pairs} has responses, which are for `sft`: `opct` samples its "
                        "own, so take them out")
    if "response" in records[0] and config.loss == "exact":
        raise UserError(f"{config.pairs} has responses, which `--loss exact` would not learn: give "
                        "--loss sampled, or take them out")
    if "response" in records[0] and config.control == "shuffled":
        raise UserError("--control shuffled changes the teacher's prompt, but the responses are "
                        "given: take them out")
    if config.batch * config.samples % size:
        raise UserError(f"{config.batch} x {config.samples} responses do not divide by {size}")


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


def check_forms(records, clean, wrapped, pairs):
    """A warning where the tokens of both forms of a pair are the same and its texts are not; None
    where all is well. Raises UserError: it is so in all pairs. pairs: the file they are from."""
    same = [number for number, record in enumerate(records, 1)
            if record["clean"] != record["wrapped"] and clean[number - 1] == wrapped[number - 1]]
    if not same:
        return None
    text = (f"{pairs}: the chat template gives both forms of {len(same)} of {len(records)} pairs "
            f"the same tokens (first pair {same[0]}): does it leave out system messages?")
    if len(same) == len(records):
        raise UserError(text)
    return f"warning: {text}"


def given_responses(tokenizer, model, records, config):
    """The records' own responses, one each, as `generate` returns responses: token ids (rows,
    max_new_tokens) and the mask. None where records have no response. Raises UserError: one is too
    long, or no response of this model would end."""
    end = end_of_turn(tokenizer, model, config.base)
    if "response" not in records[0]:
        return None
    given = [response_tokens(tokenizer, record["wrapped"], record["response"], end)
             for record in records]
    limit = config.max_new_tokens
    if max(map(len, given)) > limit:
        raise UserError(f"{config.pairs} has a response of {max(map(len, given))} tokens: raise "
                        f"--max-new-tokens from {limit} to that, or shorten it")
    response = torch.zeros(len(given), limit, dtype=torch.long)
    mask = torch.zeros_like(response, dtype=torch.bool)
    for row, ids in enumerate(given):
        response[row, :len(ids)] = torch.tensor(ids)
        mask[row, :len(ids)] = True
    return response.to(model.device), mask.to(model.device)
