"""How much an update's gradient varies with the luck of what was sampled.

The loss of one sampled token does not vanish where student and teacher agree: SFT's gradient is
then pure noise, which an optimizer follows for as long as it runs. OPCT's sampled loss is zero for
every sample there, since both log-probabilities are equal.
"""
import torch

from model import generate
from opct import Batch, opct_step, sft_step
from support.common import generator


def gradient_noise(student, teacher, prompts, method, config, draws, seed):
    """The noise and the size of the gradient of one update, over `draws` of its responses.

    Args:
        prompts: (clean, wrapped) token ids of the update's responses, the same in all draws.
        method: "sft", on fresh responses of the teacher, or "opct". config: loss, max_new_tokens.
    Returns {"noise": the root of the summed variances of all its entries, "size": the length of
    its mean, less what noise adds to that in so many draws, "kl": nats a token between the two
    models, on the responses of the last draw}.
    """
    clean, wrapped = (list(side) for side in zip(*prompts))
    trained = [p for p in student.parameters() if p.requires_grad]
    total, squares = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64), 0.0
    for draw in range(draws):
        noise = torch.rand(len(clean), config.max_new_tokens,
                           generator=generator(seed, "gradient noise", draw))
        batch = Batch(clean, wrapped, noise=noise)
        if method == "sft":
            batch.response, batch.mask = generate(teacher, clean, config.max_new_tokens,
                                                  noise=noise)
        loss, values = {"sft": sft_step, "opct": opct_step}[method](student, teacher, batch, config)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
        gradient = gradient.double().cpu()
        total += gradient
        squares += gradient.square().sum().item()
    length = (total / draws).square().sum().item()
    variance = max(0.0, (squares - draws * length) / (draws - 1))
    return {"noise": variance ** 0.5, "size": max(0.0, length - variance / draws) ** 0.5,
            "kl": values["kl_exact"].mean().item()}
