"""Contrastive pairs: their files, their controls, which of them an update takes."""
import json

from support.common import UserError, read_text, rng, write_text


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_jsonl(path):
    """Reads pairs: a JSON object a line with the strings "clean" and "wrapped"."""
    records = []
    lines = read_text(path, "it has to hold pairs, one JSON object a line").split("\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()     # refuses half a surrogate pair
            forms = [record["clean"], record["wrapped"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            forms = [None]
        if not all(isinstance(form, str) and form for form in forms):
            raise UserError(f'{path}, line {number} is no pair: it wants {{"clean": "...", '
                            '"wrapped": "..."}')
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no pairs")
    return records


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
