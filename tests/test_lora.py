"""LoRA: the student is the base and an adapter, the teacher the same weights with it off."""
import copy

import pytest
import torch

from helpers import tiny_gpt
from model import ARCHITECTURES, generate, load_checkpoint, save_checkpoint
from opct import Batch, reverse_kl, score
from support.lora import LORA_SCALE, Linear, add_lora, adapted, merge_lora, without_lora

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDX = torch.tensor([[0, 1, 2, 3, 4, 1, 0], [3, 3, 1, 0, 2, 4, 4]])
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def with_lora(model, trained=False):
    """`trained`: as after some updates, with B no longer zero."""
    add_lora(model, rank=2, seed=3)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted(model) if trained else []:
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draws) * 0.1)
    return model


def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_linear_layer_of_attention_and_mlp_has_an_adapter_and_no_other(family):
    model = with_lora(tiny_gpt(family=family))
    expected = [f"model.layers.{i}.{part}.{name}.lora_{x}" for i in (0, 1) for name in NAMES
                for part in (["mlp"] if name in NAMES[4:] else ["self_attn"]) for x in "AB"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(expected)
    for layer in adapted(model):
        assert layer.lora_A.shape == (2, layer.in_features)
        assert layer.lora_B.shape == (layer.out_features, 2)
        assert layer.lora_A.abs().min() > 0 and not layer.lora_B.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_at_step_0_student_and_teacher_are_the_base_to_the_bit(family, dtype):
    base = tiny_gpt(family=family, dtype=dtype)
    model = with_lora(copy.deepcopy(base))
    assert torch.equal(model(IDX), base(IDX))
    with without_lora(model) as teacher:
        assert torch.equal(teacher(IDX), base(IDX))
    prompts = [[0, 1, 2], [3], [2, 2]]
    ours, theirs = (generate(m, prompts, 9, generator=seeded(1)) for m in (model, base))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    own, ref, kl = score(model, model, Batch(prompts, prompts), *ours, reverse_kl)
    assert torch.equal(own, ref) and not kl.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_teacher_is_the_base_to_the_bit_however_far_the_adapter_has_gone(dtype):
    base = tiny_gpt(dtype=dtype)
    model = with_lora(copy.deepcopy(base), trained=True)
    before = model(IDX)
    assert not torch.allclose(before, base(IDX), atol=0.1)
    with without_lora(model):
        assert torch.equal(model(IDX), base(IDX))
    assert torch.equal(model(IDX), before)                  # and on again


def test_an_error_within_leaves_the_adapter_on_and_one_teacher_may_stand_in_another():
    model = with_lora(tiny_gpt(), trained=True)
    on = model(IDX)
    with without_lora(model):
        off = model(IDX)
        with without_lora(model):
            pass
        assert torch.equal(model(IDX), off)
    with pytest.raises(KeyError), without_lora(model):
        raise KeyError
    assert torch.equal(model(IDX), on)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_gradients_of_the_adapter_follow_from_those_of_the_weights(family):
    """With G the gradient of the weight W + s B A, that of A is s B^T G, and that of B s G A^T."""
    model = with_lora(tiny_gpt(family=family), trained=True)
    whole = copy.deepcopy(model)
    merge_lora(whole)
    whole.requires_grad_(True)
    for m in (model, whole):
        m(IDX).log_softmax(-1)[..., 3].sum().backward()
    for layer, merged in zip(adapted(model), linear_layers(whole), strict=True):
        A, B, G = layer.lora_A, layer.lora_B, merged.weight.grad
        assert G.abs().max() > 1e-3
        assert torch.allclose(A.grad, LORA_SCALE * B.T @ G, rtol=1e-9, atol=1e-12)
        assert torch.allclose(B.grad, LORA_SCALE * G @ A.T, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_merged_it_is_the_same_function_and_a_plain_model(dtype, rounding, tmp_path):
    model = with_lora(tiny_gpt(dtype=dtype), trained=True)
    expected = model(IDX)
    with pytest.raises(ValueError, match="merge_lora"):
        save_checkpoint(model, tmp_path)
    merge_lora(model)
    assert (model(IDX) - expected).abs().max() < rounding
    assert model.state_dict().keys() == tiny_gpt().state_dict().keys()
    save_checkpoint(model, tmp_path)
    assert torch.equal(load_checkpoint(tmp_path)(IDX), model.float()(IDX))


def test_over_a_bfloat16_base_the_adapter_is_float32_and_a_small_step_is_not_lost():
    """A weight of 1 in bfloat16 ignores a step of 1e-3; B does not."""
    model = with_lora(tiny_gpt(dtype=torch.bfloat16))
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "lora" in name else torch.bfloat16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    before = [p.clone() for p in parameters]
    model(IDX).float().log_softmax(-1)[..., 3].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    moved = [(p - b).abs() for p, b in zip(parameters, before)]
    assert all(0.9e-5 < m.max() < 1.1e-5 for m in moved[1::2])      # each B
    assert not any(m.any() for m in moved[::2])             # A's gradient is zero where B is
    expected = with_lora(tiny_gpt(dtype=torch.bfloat16), trained=True)
    merged = copy.deepcopy(expected)
    merge_lora(merged)
    for layer, plain in zip(adapted(expected), linear_layers(merged), strict=True):
        exact = layer.weight.float() + LORA_SCALE * layer.lora_B @ layer.lora_A
        assert torch.equal(plain.weight, exact) and plain.weight.dtype == torch.float32
    error = (merged.float()(IDX) - expected(IDX)).abs().mean()
    assert error < 0.02 * expected(IDX).abs().mean()


def test_memory_holds_one_copy_of_the_weights():
    model = tiny_gpt()
    before = {p.data_ptr() for p in model.parameters()}
    with_lora(model)
    kept = {p.data_ptr() for name, p in model.named_parameters() if "lora" not in name}
    with without_lora(model) as teacher:
        assert teacher is model and {p.data_ptr() for p in teacher.parameters()} > before
    assert kept == before


def test_the_seed_alone_decides_the_adapter():
    one, same = with_lora(tiny_gpt()), with_lora(tiny_gpt(dtype=torch.float32))
    other = tiny_gpt()
    add_lora(other, rank=2, seed=4)
    for a, b, c in zip(adapted(one), adapted(same), adapted(other)):
        assert torch.equal(a.lora_A, b.lora_A.double())
        assert not torch.equal(a.lora_A, c.lora_A)
