"""Contrastive pairs: their files, their controls, which of them an update takes."""
import json
import re

import torch

from support.common import UserError, read_text, rng, write_text
from support.statistics import rate
from support.tokenizer import end_of_turn, messages_of


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def is_pair(record):
    """Whether a record is a contrastive pair; other fields that it has are left alone."""
    for form in ("clean", "wrapped"):
        messages_of(record[form])
    lists = [record[name] for name in ("expect", "avoid") if name in record]
    return (record["clean"] and record["wrapped"] and isinstance(record.get("response", ""), str)
            and all(isinstance(some, list) and all(isinstance(s, str) and s for s in some)
                    for some in lists))


def read_jsonl(path):
    """Reads pairs: a JSON object a line with the prompts "clean" and "wrapped", each a string or a
    list of messages; "response", "expect" and "avoid" may stand beside them."""
    records = []
    lines = read_text(path, "it has to hold pairs, one JSON object a line").split("\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()     # refuses half a surrogate pair
            whole = is_pair(record)
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            whole = False
        if not whole:
            raise UserError(f'{path}, line {number} is no pair: it wants {{"clean": "...", '
                            '"wrapped": "..."}, each a string or a list of messages; "response" '
                            'is a string, "expect" and "avoid" are lists of strings')
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
    """Whether one of the strings stands in the text, as whole words, in upper or lower case."""
    return any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in wanted)


def shares(records, answers):
    """The figures `expect_*` and `avoid_*` of those records that have such lists. answers: "wrapped
    greedy", "wrapped sampled", "clean greedy", "clean sampled" -> one text a record."""
    out = {}
    for field in ("expect", "avoid"):
        some = [i for i, r in enumerate(records) if field in r]
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
    if config.gamma and (stage == "sft" or config.loss == "exact"):
        raise UserError("--gamma goes with `opct --loss sampled`: it discounts the KL of that")
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


def pairs_of_update(step, n, config):
    """The rows of an update: of n pairs in a new random order in every epoch, each with all its
    responses, which stand side by side."""
    orders, rows = {}, []
    for at in range(step * config.batch, (step + 1) * config.batch):
        epoch = at // n
        if epoch not in orders:
            orders[epoch] = rng(config.seed, "epoch", epoch).sample(range(n), n)
        first = orders[epoch][at % n] * config.samples
        rows += range(first, first + config.samples)
    return rows


def given_responses(tokenizer, model, records, config):
    """The records' own responses, `samples` times each, as `generate` returns responses: token ids
    (rows, max_new_tokens) and the mask. None where records have no response."""
    if "response" not in records[0]:
        return None
    rows, limit = len(records) * config.samples, config.max_new_tokens
    response = torch.zeros(rows, limit, dtype=torch.long)
    mask = torch.zeros_like(response, dtype=torch.bool)
    end = end_of_turn(tokenizer, model)
    for i, record in enumerate(records):
        ids = [*tokenizer.encode_ordinary(record["response"]), end][:limit]
        for row in range(i * config.samples, (i + 1) * config.samples):
            response[row, :len(ids)] = torch.tensor(ids)
            mask[row, :len(ids)] = True
    return response.to(model.device), mask.to(model.device)
