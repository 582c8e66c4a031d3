"""Contrastive pairs: their files, their controls, which of them an update takes."""
import json
import re

import torch

from support.common import UserError, read_text, rng, write_text
from support.statistics import rate
from support.tokenizer import end_of_turn, messages_of


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


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


def read_jsonl(path):
    """Reads pairs: a JSON object a line with the prompts "clean" and "wrapped", each a string or a
    list of messages; "response", "expect" and "avoid" may stand beside them."""
    records = []
    lines = read_text(path, "it has to hold pairs, one JSON object a line").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
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


def contains(text, wanted):
    """Whether one of the strings stands in the text, in upper or lower case, and not as a part of
    a longer word or number. A script without upper case, such as Chinese, has no such borders."""
    def inside(a, b):
        return all(c.isdigit() or c.lower() != c.upper() for c in (a, b))

    for w in wanted:
        for match in re.finditer(re.escape(w), text, re.IGNORECASE):
            before, after = text[:match.start()][-1:] or " ", text[match.end():][:1] or " "
            if not inside(before, match[0][0]) and not inside(match[0][-1], after):
                return True
    return False


def shares(records, answers):
    """The figures `expect_*` and `avoid_*` of those records that have such lists. answers: "wrapped
    greedy", "wrapped sampled", "clean greedy", "clean sampled" -> one text a record."""
    out = {}
    for field in ("expect", "avoid"):
        some = [i for i, r in enumerate(records) if r.get(field)]   # an empty list asks nothing
        clusters = [repr(records[i]["clean"]) for i in some]
        for form in ("wrapped", "clean"):
            for how, suffix in (("greedy", ""), ("sampled", "_sampled")):
                texts = answers[f"{form} {how}"]
                if some:
                    flags = [contains(texts[i], records[i][field]) for i in some]
                    out[f"{field}_{form}{suffix}"] = rate(flags, clusters)
    return out


def pair_transcripts(records, answers):
    """Six pairs to which the base answers differently, with the greedy answers to the wrapped."""
    base, out = next(iter(answers.values())), []
    differ = [base["wrapped greedy"][i] != base["clean greedy"][i] for i in range(len(records))]
    for i in sorted(range(len(records)), key=lambda i: not differ[i])[:6]:
        said = {"clean": base["clean greedy"][i],
                **{name: texts["wrapped greedy"][i] for name, texts in answers.items()}}
        width = max(map(len, said))
        out += [shown(records[i]),
                *(f"    {name:{width}}  {' '.join(text.split())}" for name, text in said.items()),
                ""]
    return "\n".join(out)


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


def controlled(records, config):
    """The records of a control: no wrapped prompts, or clean prompts of other pairs."""
    if config.control == "clean":       # nothing to learn: what changes now, training itself does
        return [{**r, "wrapped": r["clean"]} for r in records]
    if config.control == "none":
        return records
    # Nothing to be consistent with. Each pair gets the clean prompt of the next in a random ring.
    n, out = len(records), list(records)
    ring = rng(config.seed, "shuffled").sample(range(n), n)
    for i, j in zip(ring, ring[1:] + ring[:1]):
        out[i] = {**records[i], "clean": records[j]["clean"]}
    return out


def rows_of_update(step, n, config):
    """The rows of an update, (pair, number of its response) each. An epoch takes each of the n
    pairs once, in a random order of its own, so in epoch k a pair has its k-th turn, with the
    responses k * samples, k * samples + 1, ..., which stand side by side."""
    orders, rows = {}, []
    for at in range(step * config.batch, (step + 1) * config.batch):
        epoch, place = divmod(at, n)
        if epoch not in orders:
            orders[epoch] = rng(config.seed, "epoch", epoch).sample(range(n), n)
        first = epoch * config.samples
        rows += [(orders[epoch][place], first + i) for i in range(config.samples)]
    return rows


def given_responses(tokenizer, model, records, config):
    """The records' own responses, one each, as `generate` returns responses: token ids (rows,
    max_new_tokens) and the mask. None where records have no response. Raises UserError: one is too
    long, or no response of this model would end."""
    end = end_of_turn(tokenizer, model, config.base)
    if "response" not in records[0]:
        return None
    given = [[*tokenizer.encode_ordinary(record["response"]), end] for record in records]
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
