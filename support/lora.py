"""LoRA (2106.09685): W x becomes W x + LORA_SCALE * B A x, and only A and B are trained.

    add_lora(model, rank, seed)     # freezes W; A is random, B zero: the same function as before
    with without_lora(model):       # the teacher: the model as it was, on the same weights
        ...
    merge_lora(model)               # W + LORA_SCALE * B A, as a plain model, to be saved
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

LORA_SCALE = 2.0        # alpha / r: how much the adapter counts, whatever its rank


class Linear(nn.Linear):
    """A linear layer that may have an adapter: A (rank, in), B (out, rank)."""
    lora_on = False

    def forward(self, x):
        y = super().forward(x)
        if self.lora_on:
            low = F.linear(x.to(self.lora_A.dtype), self.lora_A)        # (..., rank)
            y = y + (LORA_SCALE * F.linear(low, self.lora_B)).to(y.dtype)
        return y


def adapted(model):
    """The layers that have an adapter, on or off, in the model's order."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    return [layer for layer in layers if hasattr(layer, "lora_A")]


def add_lora(model, rank, seed):
    """Freezes the model and gives each layer of the class `Linear` an adapter of this rank.

    The adapter is in float32 whatever the weights are: in bfloat16, small steps would round away.
    """
    model.requires_grad_(False)
    draws = torch.Generator().manual_seed(seed)
    for layer in [module for module in model.modules() if isinstance(module, Linear)]:
        A = torch.randn(rank, layer.in_features, generator=draws) / layer.in_features ** 0.5
        A = A.to(layer.weight.device, torch.promote_types(layer.weight.dtype, torch.float32))
        layer.lora_A = nn.Parameter(A)
        layer.lora_B = nn.Parameter(A.new_zeros(layer.out_features, rank))
        layer.lora_on = True


@contextmanager
def without_lora(model):
    """Within it the adapter is off: the model is what it was before `add_lora`."""
    layers = [layer for layer in adapted(model) if layer.lora_on]
    try:
        for layer in layers:
            layer.lora_on = False
        yield model
    finally:
        for layer in layers:
            layer.lora_on = True


@torch.no_grad()
def merge_lora(model):
    """Adds the adapter to the weights, which are in its dtype then, and removes it."""
    for layer in adapted(model):
        layer.weight = nn.Parameter(layer.weight + LORA_SCALE * layer.lora_B @ layer.lora_A)
        del layer.lora_A, layer.lora_B, layer.lora_on
