"""Muon, the optimizer of pretraining.

torch.optim.Muon orthogonalises in bfloat16. A CPU that has no arithmetic for it emulates it, and a
step of the preset quick then takes three times as long. This one keeps to float32.
"""
import torch

QUINTIC = 3.4445, -4.7750, 2.0315       # slope as steep as can be at 0, values near 1 elsewhere


def orthogonalised(matrix, steps=5):
    """Roughly U V^T of a matrix U S V^T (r, c): most singular values end between 0.7 and 1.2.

    Newton-Schulz iteration, from X / |X|: X <- a X + b (X X^T) X + c (X X^T)^2 X.
    """
    a, b, c = QUINTIC
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal (Jordan 2024, https://kellerjordan.github.io/posts/muon).

    For matrices. The factor 0.2 sqrt(max(r, c)) gives an update the size that AdamW's has, so one
    learning rate serves both (Liu 2025, arXiv 2502.16982, equation 4). Weight decay as in AdamW.
    """

    def __init__(self, matrices, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
