"""Muon, the optimizer of pretraining.

torch.optim.Muon orthogonalises in bfloat16. A CPU that has no arithmetic for it emulates it, and a
step of the preset quick then takes three times as long. This one keeps to float32.
"""
import torch

QUINTIC = 3.4445, -4.7750, 2.0315       # slope as steep as can be at 0, values near 1 elsewhere


def orthogonalised(matrices, steps=5):
    """Roughly U V^T of each matrix U S V^T: (n, r, c) -> the same. Most singular values end between
    0.7 and 1.2.

    Newton-Schulz iteration, from X / |X|: X <- a X + b (X X^T) X + c (X X^T)^2 X.
    """
    a, b, c = QUINTIC
    high = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if high else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if high else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal (Jordan 2024, https://kellerjordan.github.io/posts/muon).

    For matrices. The factor 0.2 sqrt(max(r, c)) gives an update the size that AdamW's has, so one
    learning rate serves both (Liu 2025, arXiv 2502.16982, equation 4). Weight decay as in AdamW.
    """

    def __init__(self, matrices, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def average(self, p, momentum):
        """Puts the gradient into the running average, and returns what a step goes along."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        average = self.state[p]["momentum_buffer"]
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, alike = group["lr"], {}                     # shape -> its matrices
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            # All of a shape at once: on a GPU one by one takes six times as long.
            for shape, some in alike.items():
                updates = [self.average(p, group["momentum"]) for p in some]
                for p, update in zip(some, orthogonalised(torch.stack(updates))):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)
