"""Token sequences in rows, so that one forward pass scores many of them without padding each."""
from dataclasses import dataclass

import numpy as np
import torch

from support.common import UserError
from support.tokenizer import document_tokens

ROW = 128       # tokens in a row of documents; attention is quadratic in it
LONG = 1024     # responses to one prompt share a row up to so many tokens


@dataclass
class Packed:
    """Rows of tokens, see `pack`. The arrays are (R, W) int64; padding has token 0, segment -1."""
    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    branches: np.ndarray
    starts: list            # of each group's first token in the flattened rows, -1: left out

    def inputs(self, device):
        """tokens, positions (R, W) and mask (R, 1, W, W) for the model. A token sees what stands
        before it in its segment, on the trunk or on its own branch."""
        arrays = self.tokens, self.positions, self.segments, self.branches
        tokens, positions, segments, branches = (torch.from_numpy(x).to(device) for x in arrays)
        mask = (segments[:, :, None] == segments[:, None, :]).tril()
        mask &= (branches[:, None] == 0) | (branches[:, :, None] == branches[:, None])
        return tokens, positions, mask[:, None]

    def rows(self, some):
        """Some of the rows (a slice)."""
        return Packed(self.tokens[some], self.positions[some], self.segments[some],
                      self.branches[some], self.starts)

    def next_tokens(self):
        """What follows each token, -1 where a segment ends: (R, W)."""
        out = np.full_like(self.tokens, -1)
        follows = (self.segments[:, 1:] == self.segments[:, :-1]) & (self.segments[:, 1:] >= 0)
        out[:, :-1][follows] = self.tokens[:, 1:][follows]
        return torch.from_numpy(out)


def pack(groups, width=ROW, max_rows=None):
    """Lays out groups in rows, the longest first, each where it first fits.

    A group is a trunk and the branches that grow from its end: (tokens, [tokens, ...]). A
    prompt and the responses to it make a group; a document is a trunk without branches.

        trunk a b c, branches d e and f g h        tokens     a b c d e f g h
                                                   positions  0 1 2 3 4 3 4 5
                                                   branches   0 0 0 1 1 2 2 2

    Each branch gets the logits that it would get alone, and the trunk is computed once. With
    `max_rows`, what does not fit is left out. Raises UserError: a group exceeds the width.
    """
    lengths = [len(trunk) + sum(map(len, branches)) for trunk, branches in groups]
    if max(lengths) > width:
        raise UserError(f"a sequence of {max(lengths)} tokens does not fit into a row of {width}")
    used, starts = [], [-1] * len(groups)
    for i in sorted(range(len(groups)), key=lambda i: -lengths[i]):
        row = next((r for r, u in enumerate(used) if u + lengths[i] <= width), len(used))
        if row == max_rows:
            continue
        if row == len(used):
            used.append(0)
        starts[i] = row * width + used[row]
        used[row] += lengths[i]
    size = (max_rows or len(used)) * width
    tokens, positions, segments, branches = np.zeros((4, size), dtype=np.int64)
    segments -= 1
    for i, (trunk, grown) in enumerate(groups):
        at, first = starts[i], 0
        for number, part in enumerate([trunk, *grown] if at >= 0 else []):
            span = slice(at, at + len(part))
            tokens[span], segments[span], branches[span] = part, i, number
            positions[span] = np.arange(first, first + len(part))
            at, first = at + len(part), len(trunk)
    shaped = [x.reshape(-1, width) for x in (tokens, positions, segments, branches)]
    return Packed(*shaped, starts)


def pack_documents(world, tokenizer, random, rows):
    """Fresh documents of the world in so many rows, as a Packed."""
    groups, room = [], 0.97 * rows * ROW        # so full, first-fit leaves hardly any of them out
    while room > 0:
        groups.append((document_tokens(tokenizer, *world.document(random)), []))
        room -= len(groups[-1][0])
    return pack(groups[:-1], max_rows=rows)


def pack_responses(prompts, responses):
    """Packs responses behind their prompts; a prompt that several share is one trunk, or more than
    one where they are long.

    Returns the Packed and, response by response, the flat index of what predicts each token:
    the first token is predicted at the prompt's last one.
    """
    sharing = {}                                            # prompt -> its responses
    for i, prompt in enumerate(prompts):
        sharing.setdefault(tuple(prompt), []).append(i)
    shared = [(prompt, part) for prompt, some in sharing.items()
              for part in divided(some, responses, LONG - len(prompt))]
    groups = [(prompt, [responses[i] for i in some]) for prompt, some in shared]
    # Two of the longest share a row, where that keeps rows short: less padding.
    lengths = [len(prompt) + sum(map(len, grown)) for prompt, grown in groups]
    short = max(lengths) <= ROW
    packed = pack(groups, min(2 * max(lengths), sum(lengths)) if short else max(lengths))
    where = [None] * len(prompts)
    for start, (prompt, some) in zip(packed.starts, shared):
        last = at = start + len(prompt) - 1
        for i in some:
            where[i] = [last, *range(at + 1, at + len(responses[i]))]
            at += len(responses[i])
    return packed, [index for some in where for index in some]


def divided(some, responses, room):
    """Divides responses into parts of at most `room` tokens, or of one response. To compute their
    prompt once more costs less than a long row."""
    parts, used = [], 0
    for i in some:
        if not parts or used + len(responses[i]) > room:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += len(responses[i])
    return parts
