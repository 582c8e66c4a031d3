"""What one checkpoint says to all questions of a split, one letter an answer.

    python -m studies.real.measure RUN --base BASE --questions DIR --split test --out FILE

    r  right: an accepted answer, and not the hint      h  the hint, and no accepted answer
    b  both of them                                     o  neither

Letters are all that the report needs: every share, and every difference of two checkpoints
question by question, is counted from them. Answers end at a limit of 24 tokens.
"""
import argparse
import time
from pathlib import Path

import torch

from model import generate, load_checkpoint
from opct import reverse_kl, score
from studies.real.questions import mentions
from support.common import generator, guarded, pick_device, show, write_json
from support.pairs import read_jsonl
from support.tokenizer import chat, decode, load_tokenizer

MAX_NEW_TOKENS = 24
BATCH = 64


def letter(record, text):
    """One letter for one answer; the docstring of this file says which."""
    right = any(mentions(text, answer) for answer in record.get("expect", ()))
    hint = any(mentions(text, answer) for answer in record.get("avoid", ()))
    return "orhb"[right + 2 * hint]


def answers(model, tokenizer, prompts, temperature, seed):
    """One answer to each prompt, as text."""
    tokens = [chat(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))   # like lengths, one batch
    out = [None] * len(prompts)
    for at in range(0, len(order), BATCH):
        rows = order[at:at + BATCH]
        response, mask = generate(model, [tokens[i] for i in rows], MAX_NEW_TOKENS, temperature,
                                  generator(seed, "answers", at))
        for i, ids, keep in zip(rows, response, mask):
            out[i] = decode(tokenizer, [t for t in ids[keep].tolist()
                                        if t not in model.config.ends])
    return out


@torch.no_grad()
def kl_per_token(model, base, tokenizer, records, seed):
    """KL(model on the wrapped || base on the clean prompt), nats a token of the model's answers.

    What consistency training lowers. Where the two prompts are the same, it is the drift.
    """
    total, n = 0.0, 0
    for at in range(0, len(records), BATCH):
        some = records[at:at + BATCH]
        wrapped, clean = ([chat(tokenizer, r[form]) for r in some] for form in ("wrapped", "clean"))
        response, mask = generate(model, wrapped, MAX_NEW_TOKENS, 1.0, generator(seed, "kl", at))
        kl = reverse_kl(score(model, wrapped, response, mask), score(base, clean, response, mask))
        total, n = total + kl.sum().item(), n + len(kl)
    return {"value": total / n, "n": n}


def letters(records, texts):
    return "".join(letter(record, text) for record, text in zip(records, texts))


def distinct(records):
    """One record for each clean prompt, without its hint."""
    found = {}
    for record in records:
        found.setdefault(record["clean"], {**record, "avoid": []})
    return list(found.values())


def measure(model, base, tokenizer, records, plain, seed):
    """All letters of a checkpoint, its two KLs, and its greedy answers to the wrapped prompts."""
    wrong, clean = [r for r in records if r.get("fails")], distinct(records)
    said = answers(model, tokenizer, [r["wrapped"] for r in records], 0, seed)
    sampled = answers(model, tokenizer, [r["wrapped"] for r in wrong], 1.0, seed)
    unhinted = answers(model, tokenizer, [r["clean"] for r in clean], 0, seed)
    judged = [r for r in plain if "expect" in r]
    others = answers(model, tokenizer, [r["clean"] for r in judged], 0, seed)
    return {"wrapped": letters(records, said), "wrapped_sampled": letters(wrong, sampled),
            "clean": letters(clean, unhinted), "plain": letters(judged, others),
            "kl": kl_per_token(model, base, tokenizer, wrong[::5], seed),
            "drift_kl": kl_per_token(model, base, tokenizer, plain, seed), "said": said}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--base", required=True)
    parser.add_argument("--questions", required=True, help="the folder that questions.py wrote")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--every", type=int, default=1, help="only every so many questions")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    began, device, folder = time.time(), pick_device(), Path(args.questions)
    records = read_jsonl(folder / f"{args.split}.jsonl")[::args.every]
    plain = read_jsonl(folder / "plain.jsonl")[::args.every]
    model, base = load_checkpoint(args.run, device), load_checkpoint(args.base, device)
    found = measure(model, base, load_tokenizer(args.base), records, plain, 0)
    write_json(args.out, {**found, "seconds": time.time() - began})
    show(f"{args.run}: {len(records)} questions in {time.time() - began:.0f} s")


if __name__ == "__main__":
    guarded(main)
