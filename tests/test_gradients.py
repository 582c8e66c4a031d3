"""The gradients of the objectives, in float64 and without sampling noise: by enumeration.

The first half is the table of gradient identities, the traps included. p is the student's
distribution over five tokens, q the teacher's. An update that is coded for the sampled token v
has the expected gradient sum_v p_v grad(update_v); that p_v says where the sample comes from and
is not differentiated. The rows with k2 and k3, and with k1 as a loss, are of code that stands
nowhere here: they show what it would do.
"""
import copy
from itertools import product

import pytest
import torch

from helpers import logp_of, tiny_gpt
from model import generate
from opct import (Batch, ConsistencyConfig, advantage, forward_kl, nll, opct_step, pick,
                  policy_gradient, reverse_kl, sft_step)

torch.manual_seed(0)
THETA = torch.randn(5, dtype=torch.float64)
Q = torch.randn(5, dtype=torch.float64).log_softmax(-1)
ZERO = torch.zeros(5, dtype=torch.float64)
STEPS = [(opct_step, "exact"), (opct_step, "sampled"), (sft_step, "exact"), (sft_step, "sampled")]


def gradient(scalar_of_logp):
    """d/d theta of a function of log p, where p = softmax(theta)."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(scalar_of_logp(theta.log_softmax(-1)), theta)[0]


def expected_gradient(update, sampled_from=THETA.softmax(-1)):
    """The mean over tokens v ~ sampled_from of the gradient of update(log p_v, log q_v)."""
    return gradient(lambda logp: sum(sampled_from[v] * update(logp[v], Q[v]) for v in range(5)))


# The two KLs, written out once more as the formulas stand.
REVERSE = gradient(lambda logp: (logp.exp() * (logp - Q)).sum())
FORWARD = gradient(lambda logp: (Q.exp() * (Q - logp)).sum())
assert (REVERSE - FORWARD).abs().max() > 0.1, "if they were equal, no test below could fail"


def same(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def k1(p, q):
    """Schulman's estimators of the KL, of log-probabilities: k1, k2 and k3."""
    return p - q


def k2(p, q):
    return (p - q) ** 2 / 2


def k3(p, q):
    return (q - p).exp() - 1 - (q - p)


def one_token(logp_student, logp_teacher, gamma=0.0):
    """The sampled-token update of `opct_step` for a response of one token."""
    student, teacher = logp_student.view(1), logp_teacher.view(1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    return policy_gradient(student, student.detach(),
                           advantage(student, teacher, mask, gamma)).sum()


def test_the_exact_objective_is_the_reverse_kl_in_value_and_gradient():
    assert same(gradient(lambda logp: reverse_kl(logp, Q)), REVERSE)
    p = THETA.softmax(-1)
    by_hand = sum(p[v] * (p[v] / Q[v].exp()).log() for v in range(5))
    assert same(reverse_kl(p.log(), Q), by_hand)


def test_the_exact_sft_objective_is_the_forward_kl():
    assert same(gradient(lambda logp: forward_kl(logp, Q)), FORWARD)


def test_cross_entropy_on_the_teachers_samples_is_the_forward_kl_in_expectation():
    assert same(expected_gradient(lambda p, q: nll(p), sampled_from=Q.exp()), FORWARD)


def test_k1_as_an_advantage_is_the_reverse_kl_unbiased():
    assert same(expected_gradient(one_token), REVERSE)


def test_k1_with_the_ratio_is_unbiased_where_the_sampler_is_an_older_student():
    moved = torch.tensor([0.3, -0.2, 0.5, 0.0, -0.4], dtype=torch.float64)
    older = (THETA + moved).log_softmax(-1)

    def update(logp, v):        # A_t from the student as it is; the ratio corrects the sampling
        return policy_gradient(logp[v], older[v], -(logp[v] - Q[v]).detach())

    found = gradient(lambda logp: sum(older[v].exp() * update(logp, v) for v in range(5)))
    assert same(found, REVERSE)


def test_k2_as_a_loss_is_the_reverse_kl():
    assert same(expected_gradient(k2), REVERSE)


def test_trap_k1_as_a_loss_has_no_gradient():
    assert same(expected_gradient(k1), ZERO)


def test_trap_k3_as_a_loss_is_the_forward_kl():
    assert same(expected_gradient(k3), FORWARD)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_or_k3_times_the_ratio_is_the_reverse_kl(estimator):
    """Some frameworks multiply a loss by the ratio, which is 1 and has a gradient."""
    def update(p, q):
        return (p - p.detach()).exp() * estimator(p, q)

    assert same(expected_gradient(update), REVERSE)


def test_trap_k2_times_the_ratio_is_biased():
    """k2 is right without the ratio, and the ratio adds the mean of k2 grad log p."""
    def update(p, q):
        return (p - p.detach()).exp() * k2(p, q)

    extra = expected_gradient(lambda p, q: p * k2(p, q).detach())
    assert same(expected_gradient(update), REVERSE + extra) and extra.abs().max() > 0.01


def test_trap_k3_as_an_advantage_is_the_reverse_kl_minus_the_forward_one():
    """To first order that is nothing where student and teacher agree."""
    def update(p, q):
        return policy_gradient(p, p.detach(), -k3(p, q).detach())

    assert same(expected_gradient(update), REVERSE - FORWARD)


@pytest.mark.parametrize("top", [5, 3])
def test_trap_the_kl_itself_as_an_advantage_has_no_gradient(top):
    p = THETA.log_softmax(-1)
    best = p.topk(top).indices
    kl = (p[best].exp() * (p[best] - Q[best])).sum()
    found = expected_gradient(lambda logp, q: policy_gradient(logp, logp.detach(), -kl))
    assert same(found, ZERO)


@pytest.mark.parametrize("kl", [reverse_kl, forward_kl])
def test_where_student_and_teacher_agree_the_gradient_is_zero_to_the_last_bit(kl):
    """In float32 the plain sum of p (log p - log q) leaves rounding noise, and Adam makes a full
    step of it: clean-to-clean training drifted."""
    torch.manual_seed(0)
    logits = torch.randn(100, 850, requires_grad=True)
    logp = logits.log_softmax(-1)
    kl(logp, logp.detach()).sum().backward()
    assert (logits.grad == 0).all() and (kl(logp, logp.detach()) == 0).all()
    assert (kl(logp, torch.randn(100, 850).log_softmax(-1)) > 0).all()


def test_trap_the_top_of_the_vocabulary_alone_is_biased_and_can_be_negative():
    def partial(logp_student, logp_teacher):
        return (logp_student.exp() * (logp_student - logp_teacher)).sum()

    best = THETA.topk(3).indices
    assert (gradient(lambda logp: partial(logp[best], Q[best])) - REVERSE).abs().max() > 0.01
    student = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    teacher = torch.tensor([0.45, 0.45, 0.1], dtype=torch.float64).log()
    assert reverse_kl(student, teacher) > 0 > partial(student[:2], teacher[:2])


@pytest.mark.parametrize("doubt, reverse_ends", [(1e-4, 0.90), (1e-8, 0.99)])
def test_opct_rounds_to_the_majority_where_the_wrapped_prompt_hides_what_the_clean_one_tells(
        doubt, reverse_ends):
    """Two pairs look alike to the student, and their teachers are certain of opposite answers, in
    shares of .62 and .38. The mean forward KL (SFT) is least at the teachers' arithmetic mean, .62;
    the mean reverse KL (OPCT) at the normalised geometric mean: the surer, the nearer to 1."""
    share = 0.62
    first = torch.tensor([1 - doubt, doubt], dtype=torch.float64)
    teachers, weights = (first, first.flip(0)), (share, 1 - share)

    def gradient_at(p, kl):
        theta = p.log().requires_grad_()
        logp = theta.log_softmax(-1)
        loss = sum(w * kl(logp, q.log()) for w, q in zip(weights, teachers))
        return torch.autograd.grad(loss, theta)[0]

    arithmetic = sum(w * q for w, q in zip(weights, teachers))
    geometric = sum(w * q.log() for w, q in zip(weights, teachers)).softmax(-1)
    assert geometric[0].item() == pytest.approx(reverse_ends, abs=0.005)
    assert arithmetic[0].item() == pytest.approx(0.62, abs=0.001)
    for kl, ends, other in ((reverse_kl, geometric, arithmetic),
                            (forward_kl, arithmetic, geometric)):
        assert gradient_at(ends, kl).abs().max() < 1e-9 < gradient_at(other, kl).abs().max()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_trap_greedy_or_sharpened_samples_are_biased(temperature):
    sampler = torch.nn.functional.one_hot(THETA.argmax(), 5).double()
    if temperature:
        sampler = (THETA / temperature).softmax(-1)
    assert (expected_gradient(one_token, sampled_from=sampler) - REVERSE).abs().max() > 0.01


def test_gradcheck():
    """PyTorch's own check, by finite differences, of every objective."""
    a = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    b = torch.randn(2, 3, 5, dtype=torch.float64).log_softmax(-1)
    for objective in (reverse_kl, forward_kl):
        assert torch.autograd.gradcheck(lambda x: objective(x.log_softmax(-1), b), a)
    weights = torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: nll(x.log_softmax(-1)[..., 0]), a)
    assert torch.autograd.gradcheck(
        lambda x: policy_gradient(x.log_softmax(-1)[..., 0], b[..., 0], weights), a)


def test_advantage_by_hand():
    """Two responses, the second one token shorter: Delta = (1, -2, 3) and (0.5, 4)."""
    student = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    for gamma, expected in ((0.0, [-1, 2, -3, -0.5, -4]), (0.5, [-0.75, 0.5, -3, -2.5, -4]),
                            (1.0, [-2, -1, -3, -4.5, -4])):
        found = advantage(student, torch.zeros(5), mask, gamma)
        assert torch.equal(found, torch.tensor(expected))


# --- Whole responses of a real, tiny model -----------------------------------------------------

LIMIT, END = 3, 4
WRAPPED, CLEAN = [0, 1, 2, 1], [0, 1]


@pytest.fixture(scope="module")
def models():
    student = tiny_gpt(vocab=6)                             # tokens 0..3, end token 4, padding 5
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.1)
    return student, teacher


@pytest.fixture(scope="module")
def everything(models):
    """Every response that can be sampled: those that end in time and those that are cut. Padding,
    which the model may say as well, is a token like any other here. Returns the mask (B, T), the
    log-probabilities of both models over the vocabulary, (N, V), and of the tokens, (N,)."""
    rows = [y for n in range(1, LIMIT + 1) for y in product(range(6), repeat=n)
            if END not in y[:-1] and (y[-1] == END or n == LIMIT)]
    response = torch.tensor([list(y) + [5] * (LIMIT - len(y)) for y in rows])
    mask = torch.tensor([[True] * len(y) + [False] * (LIMIT - len(y)) for y in rows])
    student, teacher = models
    p = logp_of(student, [WRAPPED] * len(rows), response, mask)
    q = logp_of(teacher, [CLEAN] * len(rows), response, mask)
    return mask, p, q, pick(p, response[mask]), pick(q, response[mask])


def of_response(mask, values):
    """Sums token values (N,) over each response: (B,)."""
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values).sum(1)


def gradients(model, scalar):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(scalar, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def test_the_enumeration_is_complete(everything):
    mask, _, _, p_y, q_y = everything
    for logp in (p_y, q_y):
        assert abs(of_response(mask, logp).exp().sum().item() - 1) < 1e-12


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_what_the_sampled_update_minimises(models, everything, gamma):
    """gamma = 1: the KL between whole responses. gamma = 0: the sum over prefixes of the KL at
    the next token, the prefix held fixed, which is also what the exact objective minimises."""
    student = models[0]
    mask, p, q, p_y, q_y = everything
    weight = of_response(mask, p_y).exp().detach()          # how often each response is sampled
    each = weight[:, None].expand_as(mask)[mask]            # the same for each of its tokens
    update = (each * policy_gradient(p_y, p_y.detach(), advantage(p_y, q_y, mask, gamma))).sum()
    exact = (each * reverse_kl(p, q)).sum()
    whole = (of_response(mask, p_y).exp() * of_response(mask, p_y - q_y)).sum()
    assert abs(exact.item() - whole.item()) < 1e-12         # the chain rule: one number, and yet
    assert (gradients(student, exact) - gradients(student, whole)).abs().max() > 1e-3
    target = whole if gamma else exact
    assert torch.allclose(gradients(student, update), gradients(student, target), rtol=1e-9,
                          atol=1e-11)


def opct_exact(p, q, token):
    return (p.exp() * (p - q)).sum()


def opct_sampled(p, q, token):
    return (p[token] - q[token]).detach() * (p[token] - p[token].detach()).exp()


def sft_exact(p, q, token):
    return (q.exp() * (q - p)).sum()


def sft_sampled(p, q, token):
    return -p[token]


FORMULAS = {(opct_step, "exact"): opct_exact, (opct_step, "sampled"): opct_sampled,
            (sft_step, "exact"): sft_exact, (sft_step, "sampled"): sft_sampled}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("step, loss", STEPS)
def test_the_steps_take_the_mean_over_responses_of_the_sum_over_tokens(models, step, loss, device):
    """Each step's loss and gradient against its formula, token by token over the response."""
    student, teacher = (copy.deepcopy(model).to(device) for model in models)
    wrapped, clean = [WRAPPED, [3, 2], WRAPPED], [CLEAN, [3], CLEAN]
    sampler, prompts = (student, wrapped) if step is opct_step else (teacher, clean)
    response, mask = generate(sampler, prompts, 8, generator=torch.Generator().manual_seed(5))
    config = ConsistencyConfig(loss=loss, max_new_tokens=8)
    noise = torch.rand(3, 8, generator=torch.Generator().manual_seed(5))
    found, values = step(student, teacher, Batch(clean, wrapped, response, mask, noise), config)
    expected = 0.0
    for i in range(3):
        y = response[i, :mask[i].sum()].tolist()
        for t, token in enumerate(y):
            p = student(torch.tensor([wrapped[i] + y[:t]], device=device))[0, -1].log_softmax(-1)
            q = teacher(torch.tensor([clean[i] + y[:t]], device=device))[0, -1].log_softmax(-1)
            expected = expected + FORMULAS[step, loss](p, q, token) / 3
    assert abs(found.item() - expected.item()) < 1e-12 and values["tokens"] == mask.sum()
    ends = [END in response[i, mask[i]].tolist() for i in range(3)]
    assert values["cut"].tolist() == [not end for end in ends]
    assert torch.allclose(gradients(student, found), gradients(student, expected), rtol=1e-9,
                          atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_sampled_step_charges_a_token_for_later_ones_discounted_by_gamma(models, gamma):
    student, teacher = models
    wrapped, clean = [WRAPPED, [3, 2], WRAPPED], [CLEAN, [3], CLEAN]
    noise = torch.rand(3, 8, generator=torch.Generator().manual_seed(5))
    config = ConsistencyConfig(loss="sampled", gamma=gamma, max_new_tokens=8)
    found, _ = opct_step(student, teacher, Batch(clean, wrapped, noise=noise), config)
    response, mask = generate(student, wrapped, 8, noise=noise)
    expected = 0.0
    for i in range(3):
        y = response[i:i + 1, :mask[i].sum()]
        some = torch.ones_like(y, dtype=torch.bool)
        p = pick(logp_of(student, wrapped[i:i + 1], y, some), y[0])
        q = pick(logp_of(teacher, clean[i:i + 1], y, some), y[0])
        for t in range(len(p)):
            cost = sum(gamma ** (u - t) * (p - q)[u].item() for u in range(t, len(p)))
            expected = expected + cost * p[t] / 3
    assert mask.sum() > 6
    assert torch.allclose(gradients(student, found), gradients(student, expected), rtol=1e-9,
                          atol=1e-12)


@pytest.mark.parametrize("loss", ["exact", "sampled"])
def test_same_prompt_and_same_weights_leave_nothing_to_learn(models, loss):
    """A dropout left on, or rows that are out of line, would show here."""
    teacher = models[1]
    student = copy.deepcopy(teacher).requires_grad_(True)
    prompts = [WRAPPED, [3, 2], CLEAN]
    found, values = opct_step(student, teacher, Batch(prompts, prompts),
                              ConsistencyConfig(loss=loss, max_new_tokens=8))
    assert abs(found.item()) < 1e-12 and values["kl_exact"].sum() < 1e-12
    assert gradients(student, found).abs().max() < 1e-12


@pytest.mark.parametrize("step, loss", STEPS)
def test_the_teacher_gets_no_gradient_and_the_student_gets_one_in_every_weight(models, step, loss):
    student, teacher = models[0], copy.deepcopy(models[1]).requires_grad_(True)
    response, mask = torch.tensor([[1, 2, END]]), torch.tensor([[True, True, True]])
    pairs = Batch([CLEAN], [WRAPPED], response, mask)
    student.zero_grad()
    step(student, teacher, pairs, ConsistencyConfig(loss=loss, max_new_tokens=8))[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().max() > 0 for p in student.parameters())


def test_prompt_and_padding_do_not_count_and_the_end_token_does_once(models):
    """Stories of public code: the end token masked out because it was the padding, prompt tokens
    inside the mean."""
    student, _ = models
    response, mask = torch.tensor([[1, END, 5, 5]]), torch.tensor([[True, True, False, False]])
    logp = logp_of(student, [WRAPPED], response, mask)
    assert logp.shape == (2, 6)                             # the token 1 and the end token
    other = torch.tensor([[1, END, 3, 0]])                  # whatever stands in the padding
    assert torch.equal(logp_of(student, [WRAPPED], other, mask), logp)
    alone = student(torch.tensor([WRAPPED + [1]]))[0, -2:].log_softmax(-1)
    assert torch.allclose(logp, alone, rtol=1e-12, atol=1e-12)
    assert torch.allclose(pick(logp, response[mask])[1], alone[1, END])


@pytest.mark.parametrize("step, loss", STEPS)
def test_in_pieces_the_loss_and_its_gradient_are_the_same(models, step, loss, monkeypatch):
    """The pieces are computed again in the backward pass; four of them make no difference."""
    student, teacher = models
    response = torch.tensor([[1, 2, END], [3, END, 5], [0, 1, 2]])
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    noise = torch.rand(3, 3, generator=torch.Generator().manual_seed(3))
    pairs = Batch([CLEAN] * 3, [WRAPPED] * 3, response, mask, noise)
    config, found = ConsistencyConfig(loss=loss, max_new_tokens=3), []
    for size in (10**6, 6 * 2):                             # two tokens of a vocabulary of 6
        monkeypatch.setattr("opct.PIECE", size)
        value, values = step(student, teacher, pairs, config)
        found.append((value, gradients(student, value), values["kl_exact"]))
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
