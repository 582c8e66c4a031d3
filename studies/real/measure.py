"""What one checkpoint says to all questions of the test, one letter an answer.

    python -m studies.real.measure RUN --base BASE --questions DIR --out FILE

    r  right: an accepted answer, and not the hint      h  the hint, and no accepted answer
    b  both of them                                     o  neither

Letters are all that the report needs: every share, and every difference of two checkpoints
question by question, is counted from them.
"""
import time
from pathlib import Path

from eval import contains, respond, samples_of
from model import load_checkpoint
from support.common import (Parser, about, add_number, guarded, number_of, pick_device, show,
                            write_json)
from support.pairs import read_jsonl
from support.statistics import ratio
from support.tokenizer import chat, load_tokenizer

LIMIT = 20                              # tokens of an answer
SAMPLED = 2                             # every second wrong hint also gets a sampled answer


def letter(record, text):
    """One letter for one answer; the docstring of this file says which."""
    right = contains(text, record["expect"])
    hint = contains(text, record["avoid"])
    return "orhb"[right + 2 * hint]


def letters(records, texts):
    return "".join(letter(record, text) for record, text in zip(records, texts))


def distinct(records):
    """One record for each clean prompt, without its hint."""
    found = {}
    for record in records:
        found.setdefault(record["clean"], {**record, "avoid": []})
    return list(found.values())


def groups(test, plain):
    """The records that each string of letters is about."""
    return {"wrapped": test, "sampled": [r for r in test if r["fails"]][::SAMPLED],
            "clean": distinct(test), "plain": [r for r in plain if r["expect"]]}


def fingerprint(test, plain):
    """A number that stands for these records: letters about others say nothing."""
    return number_of((test, plain))


def measure(model, base, tokenizer, test, plain, seed=0):
    """The letters of a checkpoint, its KLs, and its greedy answers to the wrapped prompts."""
    asked, out = groups(test, plain), {"questions": fingerprint(test, plain)}

    def prompts_of(records, form):
        return [chat(tokenizer, r[form]) for r in records]

    for name, form in (("wrapped", "wrapped"), ("clean", "clean"), ("plain", "clean")):
        prompts = [r[form] for r in asked[name]]
        said = respond(model, tokenizer, prompts, (seed, name), 0.0, LIMIT)
        out[name] = letters(asked[name], said)
        if name == "wrapped":
            out["said"] = said
    # KL(model on wrapped || base on clean), on the model's own samples.
    prompts = [prompts_of(asked["sampled"], form) for form in ("wrapped", "clean")]
    texts, nats, length, *_ = samples_of(model, base, tokenizer, *prompts, LIMIT, (seed, "wrapped"))
    out["kl"], out["sampled"] = ratio(nats, length), letters(asked["sampled"], texts)
    # KL(base || model), on the base's samples, as the drift of `eval.py compare`.
    prompts = prompts_of(plain, "clean")
    _, nats, length, *_ = samples_of(base, model, tokenizer, prompts, prompts, LIMIT,
                                     (seed, "drift"))
    out["drift_kl"] = ratio(nats, length)
    return out


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--base", required=True)
    parser.add_argument("--questions", required=True, help="the folder that questions.py wrote")
    add_number(parser, "every", 1, "only every so many questions")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    began, device, folder = time.time(), pick_device(), Path(args.questions)
    test, plain = (read_jsonl(folder / f"{name}.jsonl")[::args.every]
                   for name in ("test", "plain"))
    model, base = load_checkpoint(args.run, device), load_checkpoint(args.base, device)
    found = measure(model, base, load_tokenizer(args.base), test, plain)
    write_json(args.out, {**found, "seconds": time.time() - began, "about": about(device)})
    show(f"{args.run}: {len(test)} prompts in {time.time() - began:.0f} s")


if __name__ == "__main__":
    guarded(main)
