"""One step of decoding as a CUDA graph: one call starts all of its kernels.

Started one by one from Python, the kernels of a small model wait: on an H100 a step of the preset
full, at batch 64, takes 5.6 ms that way and 0.8 ms as a graph.

A graph does the same work on the same addresses again. So the column that is written is a tensor,
and attention reads the whole cache, of which the columns that are still to come are masked.
"""
import torch

# device -> its last graph and the stream: the next one uses their memory, that of the kernels'
# workspace too. So no graph may be replayed once the next one is recorded.
latest = {}


def record(step, device):
    """Records what a call of `step` starts, without running it. Returns what to call instead, or
    False where memory is too short to record."""
    before, stream = latest.get(device) or (None, torch.cuda.Stream(device))
    latest[device] = None, stream
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            graph.capture_begin(before and before.pool())
            try:
                step()
            finally:
                graph.capture_end()
    except torch.OutOfMemoryError:      # a recording cannot free what is cached
        return False
    latest[device] = graph, stream
    return graph.replay


class OneColumn:
    """A KVCache as such a step sees it: `column` (1,) is written and all columns are read."""

    def __init__(self, cache):
        self.layers, self.length = cache.layers, cache.length
        self.column = torch.tensor([cache.length], device=cache.layers[0].device)

    def update(self, layer, k, v):
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        return keys, values


class DecodeGraph:
    """The decode step of a SamplerState (see model.py), for as long as its rows stay the same. One
    at a time, see `latest`."""

    def __init__(self, model, state):
        self.model, self.padding, self.visible = model, state.padding, state.visible
        self.token, self.cache = state.token.clone(), OneColumn(state.cache)
        self.columns = torch.arange(state.visible.shape[1], device=state.visible.device)
        self.replay, self.logits = None, None

    def step(self):
        column = self.cache.column
        mask = self.visible & (self.columns <= column)
        self.logits = self.model(self.token[:, None], (column - self.padding)[:, None],
                                 mask[:, None, None], self.cache)[:, -1]
        column += 1

    def __call__(self, state):
        """Adds state.token (B,) to the cache. Returns the next logits (B, V), valid until the next
        call. The first call is not recorded: it loads the kernels, which a graph must not do."""
        self.token.copy_(state.token)
        if self.logits is not None and self.replay is None:
            self.replay = record(self.step, self.token.device)
        (self.replay or self.step)()
        state.cache.length += 1
        return self.logits
