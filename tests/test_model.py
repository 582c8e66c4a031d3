"""The model, its cache, the sampler and the checkpoints."""
import gc
import json
import random
import weakref

import pytest
import torch

from helpers import logp_of, tiny_gpt
from model import (ARCHITECTURES, CHECK_EVERY, GPT, PREFILL_ROWS, GPTConfig, generate,
                   load_checkpoint, rotate, sample, save_checkpoint)
from opct import pick
from support.common import UserError, pick_device
from support.graph import DecodeGraph, latest
from support.packing import pack, pack_documents, pack_responses

FAMILIES = list(ARCHITECTURES)


def prompts_of_many_lengths(n, vocab, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab - 2) for _ in range(rng.randint(1, 12))] for _ in range(n)]


@torch.no_grad()
def naive_generate(model, prompts, max_new_tokens, temperature, generator):
    """The sampler as one would first write it: no cache, no batch, no padding.

    Every token computes the whole row again.
    """
    noise = torch.rand(len(prompts), max_new_tokens, generator=generator).to(model.device)
    out = []
    for row, prompt in enumerate(prompts):
        tokens = list(prompt)
        for t in range(max_new_tokens):
            logits = model(torch.tensor([tokens], device=model.device))[:, -1]
            tokens.append(sample(logits, temperature, noise[row, t:t + 1]).item())
            if tokens[-1] in model.config.ends:
                break
        out.append(tokens[len(prompt):])
    return out


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def as_lists(response, mask):
    return [row[keep].tolist() for row, keep in zip(response, mask)]


# The last logits that transformers 5.24 gives for `formula_gpt` and 40 tokens.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
THEIRS = {
    "llama": [0.8979, 0.0414, -0.8811, -0.3992, 0.7191, 0.6911, -0.4385, -0.8691, 0.0856, 0.9039,
              0.2814],
    "llama 3": [1.1214, -0.1586, -1.1857, -0.3228, 1.0547, 0.751, -0.7497, -1.0554, 0.3212, 1.1858,
                0.1603],
    "qwen2": [0.6548, -0.3122, -0.7816, -0.0051, 0.7795, 0.3216, -0.6489, -0.5851, 0.4114, 0.7521,
              -0.106],
    "qwen3": [1.8256, -0.0125, -1.8307, -0.7307, 1.534, 1.3536, -0.9844, -1.7533, 0.2726, 1.8639,
              0.4842]}


def formula_gpt(kind):
    """Its weights are sines, so that they can be made again anywhere."""
    family, rope = ("llama", LLAMA3) if kind == "llama 3" else (kind, None)
    model = GPT(GPTConfig(
        model_type=family, vocab_size=11, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, rope_theta=500.0, rope_scaling=rope)).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            wave = torch.sin(torch.arange(p.numel()) * 0.7 + i).view(p.shape)
            p.copy_(1 + wave / 2 if "norm" in name else wave / 2)
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_the_logits_are_those_of_transformers_by_numbers_that_were_taken_once(kind):
    """Beside transformers itself, where it is installed: test_checkpoints.py."""
    logits = formula_gpt(kind)(torch.tensor([[i * 7 % 11 for i in range(40)]]))[0, -1]
    assert (logits - torch.tensor(THEIRS[kind])).abs().max() < 2e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0, 1.0, 0.7])
def test_cached_sampling_is_naive_sampling_token_for_token(family, temperature):
    model = tiny_gpt(vocab=11, family=family)
    prompts = prompts_of_many_lengths(40, 11)
    fast = as_lists(*generate(model, prompts, 20, temperature, seeded(7)))
    naive = naive_generate(model, prompts, 20, temperature, seeded(7))
    assert fast == naive
    # Responses of one length would hide the bookkeeping of those that end.
    least = 1 if temperature == 0 else 5
    assert len({len(y) for y in naive}) > least


def test_a_response_holds_its_end_token_once_and_nothing_behind_it():
    model = tiny_gpt(vocab=7)
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    prompts = prompts_of_many_lengths(200, 7)
    response, mask = generate(model, prompts, 6, generator=seeded(0))
    for y, keep in zip(response.tolist(), mask.tolist()):
        n = sum(keep)
        assert keep == [True] * n + [False] * (len(y) - n)
        assert end not in y[:n - 1]
        assert y[n - 1] == end or n == 6        # a response cut at the limit has no end token
        assert all(token == pad for token in y[n:])
    assert any(end not in y for y in response.tolist())
    assert any(end in y for y in response.tolist())


def test_the_same_generator_state_gives_the_same_responses_and_another_gives_others():
    model, prompts = tiny_gpt(), [[0, 1]] * 50
    first = generate(model, prompts, 8, generator=seeded(1))[0]
    again = generate(model, prompts, 8, generator=seeded(1))[0]
    other = generate(model, prompts, 8, generator=seeded(2))[0]
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_a_row_cannot_tell_what_it_was_batched_with():
    """Padding is invisible: the same prompt, the same noise, alone and among longer ones.

    A public code was off by up to 34 nats here, because it had no explicit positions.
    """
    model, prompt = tiny_gpt(vocab=11), [1, 2, 3]
    prompts = [prompt] + prompts_of_many_lengths(30, 11)
    alone = as_lists(*generate(model, [prompt], 10, generator=seeded(3)))
    among = as_lists(*generate(model, prompts, 10, generator=seeded(3)))
    assert alone[0] == among[0]


def test_equal_prompts_are_prefilled_once_and_answered_as_if_they_were_not(monkeypatch):
    """Four responses to each of 20 prompts in no order, and one to another: 21 rows, not 81."""
    model, rng = tiny_gpt(vocab=11), random.Random(0)
    distinct = list(dict.fromkeys(map(tuple, prompts_of_many_lengths(30, 11))))[:21]
    prompts = [list(p) for p in distinct[:20] * 4 + distinct[20:]]
    rng.shuffle(prompts)
    monkeypatch.setitem(PREFILL_ROWS, "cpu", 1000)
    rows, forward = [], model.model.forward
    noise = torch.rand(len(prompts), 10, generator=seeded(1))

    def counted(idx, *rest):
        rows.append(len(idx))
        return forward(idx, *rest)

    monkeypatch.setattr(model.model, "forward", counted)
    together = as_lists(*generate(model, prompts, 10, noise=noise))
    assert rows[:2] == [21, 81]
    for i, prompt in enumerate(prompts):
        assert as_lists(*generate(model, [prompt], 10, noise=noise[i:i + 1])) == [together[i]]
    # Parts that cut through a group of equal prompts.
    monkeypatch.setitem(PREFILL_ROWS, "cpu", 7)
    assert as_lists(*generate(model, prompts, 10, noise=noise)) == together


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_prompts_begin_with_is_computed_once(family, monkeypatch):
    """Such as a system message. The responses are those of the naive sampler, token for token."""
    model = tiny_gpt(vocab=11, family=family)
    prompts = [[3, 1, 4, 1, 5, *rest] for rest in prompts_of_many_lengths(30, 11)]
    naive = naive_generate(model, prompts, 15, 1.0, seeded(5))
    assert len({len(y) for y in naive}) > 5
    shapes, forward = [], model.model.forward

    def seen(idx, *rest, **named):
        shapes.append(tuple(idx.shape))
        return forward(idx, *rest, **named)

    monkeypatch.setattr(model.model, "forward", seen)
    monkeypatch.setitem(PREFILL_ROWS, "cpu", 8)
    assert as_lists(*generate(model, prompts, 15, generator=seeded(5))) == naive
    longest = max(map(len, prompts)) - 5
    assert shapes[0] == (1, 5) and all(width <= longest for _, width in shapes[1:])


def test_looking_seldom_at_who_has_ended_changes_no_response(monkeypatch):
    """As on a GPU: rows that have ended run on until the next check, even where all have ended."""
    model, prompts = tiny_gpt(vocab=7), prompts_of_many_lengths(100, 7)
    args = dict(noise=torch.rand(100, 40, generator=seeded(4)))
    expected = as_lists(*generate(model, prompts, 40, **args))
    for every in (7, 16, 100):
        monkeypatch.setitem(CHECK_EVERY, "cpu", every)
        assert as_lists(*generate(model, prompts, 40, **args)) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [1, 4])
def test_the_step_of_a_gpu_samples_the_same(family, every, monkeypatch):
    """The recorded step writes one column and reads all. Here it is called instead of replayed."""
    model, prompts = tiny_gpt(vocab=11, family=family), prompts_of_many_lengths(60, 11)
    expected = as_lists(*generate(model, prompts, 30, generator=seeded(5)))
    recorded = []

    def record(step, device):
        recorded.append(step)
        return False

    def decode_step(model, batch):
        batch.graph = batch.graph or DecodeGraph(model, batch)
        return batch.graph(batch)

    monkeypatch.setattr("support.graph.record", record)
    monkeypatch.setattr("model.decode_step", decode_step)
    monkeypatch.setitem(CHECK_EVERY, "cpu", every)
    assert as_lists(*generate(model, prompts, 30, generator=seeded(5))) == expected
    assert 2 < len(recorded) < 15                           # anew where rows were dropped


def test_a_batch_is_freed_once_it_is_sampled(monkeypatch):
    """By reference counts alone: until Python looks for cycles, caches would fill a GPU."""
    made = []

    def decode_step(model, batch):
        if batch.graph is None:
            batch.graph = DecodeGraph(model, batch)
            made.append(weakref.ref(batch.graph))
        return batch.graph(batch)

    monkeypatch.setattr("support.graph.record", lambda step, device: False)
    monkeypatch.setattr("model.decode_step", decode_step)
    gc.disable()
    try:
        generate(tiny_gpt(vocab=7), prompts_of_many_lengths(40, 7), 20, generator=seeded(3))
        assert len(made) > 1 and not any(graph() for graph in made)
    finally:
        gc.enable()


def test_without_an_end_token_every_response_has_all_tokens():
    response, mask = generate(tiny_gpt(eos_token_id=None), [[0, 1], [2]], 9)
    assert response.shape == (2, 9) and mask.all()


def test_a_checkpoint_without_a_padding_token_samples_the_same():
    """Many of Hugging Face's have none."""
    prompts = prompts_of_many_lengths(20, 7)
    model = tiny_gpt(pad_token_id=6)
    with_pad = as_lists(*generate(model, prompts, 10, generator=seeded(7)))
    model.config.pad_token_id = None
    without = as_lists(*generate(model, prompts, 10, generator=seeded(7)))
    assert with_pad == without
    assert len({len(y) for y in without}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_does_not_change_logits(family):
    model, prompt = tiny_gpt(family=family), [3, 1, 4, 1, 2]
    alone = model(torch.tensor([prompt]))
    for pads in (1, 9):
        idx = torch.tensor([[0] * pads + prompt])
        S = idx.shape[1]
        mask = torch.ones(S, S, dtype=torch.bool).tril()
        mask[pads:, :pads] = False
        positions = (torch.arange(S) - pads).clamp(min=0)[None]
        assert torch.allclose(model(idx, positions, mask)[:, pads:], alone, rtol=1e-12, atol=1e-12)


def test_rotary_positions_by_hand():
    """A quarter turn takes the first half of a head to the second.

    (1, 0) at position p has turned by the angle p * pi / 2.
    """
    angle = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1) * torch.pi / 2
    x = torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2)
    turned = rotate(x, angle.cos(), torch.cat((-angle.sin(), angle.sin()), -1))
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert torch.allclose(turned[0, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_have_the_logits_they_have_alone(family):
    model, sequences = tiny_gpt(family=family), prompts_of_many_lengths(20, 7)
    packed = pack([(sequence, []) for sequence in sequences], 16)
    hidden = model.model(*packed.inputs("cpu")).flatten(0, 1)
    assert len(packed.tokens) < len(sequences)
    for start, sequence in zip(packed.starts, sequences):
        alone = model.model(torch.tensor([sequence]))[0]
        assert torch.allclose(hidden[start:start + len(sequence)], alone, rtol=1e-11, atol=1e-12)


def test_packing_keeps_every_sequence_whole():
    rng = random.Random(0)
    sequences = [[rng.randrange(1, 99) for _ in range(rng.randint(1, 20))] for _ in range(100)]
    packed = pack([(sequence, []) for sequence in sequences], 20)
    for i, (start, sequence) in enumerate(zip(packed.starts, sequences)):
        span = slice(start, start + len(sequence))
        assert packed.tokens.flat[span].tolist() == sequence
        assert packed.positions.flat[span].tolist() == list(range(len(sequence)))
        assert (packed.segments.flat[span] == i).all()
        assert start % 20 + len(sequence) <= 20
    assert (packed.segments >= 0).sum() == sum(map(len, sequences))
    with pytest.raises(UserError, match="21 tokens does not fit into a row of 20"):
        pack([([1] * 21, [])], 20)


def test_packing_leaves_out_what_does_not_fit_into_so_many_rows():
    packed = pack([([1] * 6, []), ([2] * 9, []), ([3] * 4, []), ([4] * 5, [])], 10, 2)
    assert packed.tokens.tolist() == [[2] * 9 + [0], [1] * 6 + [3] * 4]
    assert packed.starts == [10, 0, 16, -1]


def test_packing_a_trunk_and_its_branches_by_hand():
    """The picture in the docstring of `pack`."""
    packed = pack([([1, 2, 3], [[4, 5], [6, 7, 8]])], 10)
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 0]]
    assert packed.branches.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 0, 0]]
    assert packed.segments.tolist() == [[0] * 8 + [-1] * 2]
    assert packed.starts == [0]


def test_the_pretraining_stream_is_packed_with_little_waste_and_loses_no_document(world,
                                                                                  tokenizer):
    for seed in range(5):
        packed = pack_documents(world, tokenizer, random.Random(seed), 24)
        assert packed.tokens.shape == (24, 128)
        assert (packed.segments >= 0).mean() > 0.95
        assert min(packed.starts) >= 0


def test_the_last_token_of_a_document_predicts_nothing_of_the_next():
    packed = pack([([1, 2, 3], []), ([4, 5], [])], 8)
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert packed.next_tokens().tolist() == [[2, 3, -1, 5, -1, -1, -1, -1]]


def test_causality():
    """The gradient of a token's logits with respect to later embeddings is zero."""
    model = tiny_gpt()
    x = model.model.embed_tokens(torch.tensor([[0, 1, 2, 3, 4]])).detach().requires_grad_()
    model.model.embed_tokens.forward = lambda idx: x
    logits = model(torch.tensor([[0, 1, 2, 3, 4]]))
    for t in range(5):
        grad = torch.autograd.grad(logits[0, t].sum(), x, retain_graph=True)[0]
        size = grad[0].abs().sum(-1)
        assert (size[t + 1:] == 0).all()
        assert (size[:t + 1] > 0).all()


def test_the_sampler_draws_from_the_softmax():
    """400,000 draws against the softmax by a chi-squared statistic.

    With 10 degrees of freedom it exceeds 45 by chance once in 500,000 runs. Drawing at
    temperature 0.9 gives more than 1,000.
    """
    logits = torch.randn(11, generator=seeded(0))
    n = 400_000

    def statistic(temperature):
        drawn = sample(logits.expand(n, 11), temperature, torch.rand(n, generator=seeded(1)))
        expected = logits.softmax(-1) * n
        return ((torch.bincount(drawn, minlength=11) - expected) ** 2 / expected).sum().item()

    assert statistic(1.0) < 45
    assert statistic(0.9) > 1000


def test_the_sampler_at_the_edges_of_its_noise():
    """Noise just under 1 must not give an impossible token at the end, nor noise 0 one in front."""
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert sample(logits, 1.0, torch.tensor([0.0])).item() == 1
    assert sample(logits, 1.0, torch.tensor([1 - 2 ** -24])).item() == 2
    wide = torch.zeros(1, 50_000)
    wide[:, -100:] = -torch.inf
    assert sample(wide, 1.0, torch.tensor([1 - 2 ** -24])).item() < 49_900


def test_scoring_agrees_with_sampling():
    """To the scorer, a greedy response's tokens are the likeliest ones: both see one model."""
    model, prompts = tiny_gpt(vocab=11), prompts_of_many_lengths(30, 11)
    response, mask = generate(model, prompts, 10, temperature=0)
    logp = logp_of(model, prompts, response, mask)
    assert torch.equal(pick(logp, response[mask]), logp.max(-1).values)


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_that_share_their_prompt_are_scored_as_if_alone(family, monkeypatch):
    """Each prompt three times: packed it stands once, its responses must not see one another."""
    model, prompts = tiny_gpt(vocab=11, family=family), prompts_of_many_lengths(5, 11) * 3
    response, mask = generate(model, prompts, 10, generator=seeded(0))
    sizes, model_forward = [], model.model.forward

    def counted(idx, *rest):
        sizes.append(idx.numel())
        return model_forward(idx, *rest)

    monkeypatch.setattr(model.model, "forward", counted)
    together = logp_of(model, prompts, response, mask).split(mask.sum(1).tolist())
    monkeypatch.undo()
    # Rows that held each prompt three times would be larger.
    assert sizes[0] < 2 * (mask.sum() + sum(map(len, prompts[:5])))
    for i, logp in enumerate(together):
        sequence = prompts[i] + response[i][mask[i]].tolist()
        alone = model(torch.tensor([sequence]))[0, len(prompts[i]) - 1:-1].log_softmax(-1)
        assert torch.allclose(logp, alone, rtol=1e-11, atol=1e-12)


def test_long_responses_to_one_prompt_do_not_make_one_row(monkeypatch):
    """Attention is quadratic in a row: 16 long responses in one cost eleven times as much."""
    model, prompts = tiny_gpt(vocab=11), [[1, 2, 3]] * 7 + [[4] * 20] * 2
    response, mask = generate(model, prompts, 10, generator=seeded(0))
    mask[:] = True
    whole = logp_of(model, prompts, response, mask)
    monkeypatch.setattr("support.packing.LONG", 25)
    responses = response.tolist()
    packed, _ = pack_responses(prompts, responses)
    assert packed.tokens.shape[1] <= 2 * 30                 # one response may exceed it
    groups = sorted(packed.segments[packed.branches > 0].tolist())
    assert sorted(groups.count(g) for g in set(groups)) == [10, 10, 10, 20, 20, 20]
    assert torch.allclose(logp_of(model, prompts, response, mask), whole, rtol=1e-11, atol=1e-12)


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="60 tokens and 5 new ones do not fit into the"):
        generate(tiny_gpt(), [[0] * 60, [0]], 5)
    with pytest.raises(ValueError, match="65 tokens do not fit"):
        tiny_gpt()(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_round_trip(family, tied, tmp_path):
    model = tiny_gpt(family=family, dtype=torch.float32, tie_word_embeddings=tied)
    save_checkpoint(model, tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a")
    idx = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(model(idx), loaded(idx))
    assert loaded.config == model.config
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["config.json", "model.safetensors"]    # nothing temporary stays


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_a_checkpoint_and_gives_the_same_logits(family, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_gpt(vocab=50, family=family, dtype=torch.float32, tie_word_embeddings=tied,
                     rope_theta=5000.0, rms_norm_eps=1e-5)
    save_checkpoint(model, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path,
                                                                     output_loading_info=True)
    # No tensor is missing, unexpected or of another shape.
    assert not any(info.values()), info
    idx = torch.randint(0, 50, (3, 40), generator=seeded(0))
    assert (theirs(idx).logits - model(idx)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "back")               # and the other way round
    assert (load_checkpoint(tmp_path / "back")(idx) - model(idx)).abs().max() < 1e-4


def damage(folder, kind):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "missing":
        weights.unlink()
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "config":
        config.write_text(config.read_text()[:40])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **kind}))


@pytest.mark.parametrize("kind, message", [
    ("missing", "has no model.safetensors"),
    ("cut", "damaged"),
    ("config", "damaged"),
    ({"hidden_size": 32}, "do not belong together"),
    ({"model_type": "mamba"}, "model_type = 'mamba'"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type = 'linear'"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_bias": True}, "attention_bias")])
def test_a_checkpoint_that_is_damaged_or_of_another_kind_is_refused(kind, message, tmp_path):
    """An unknown architecture once gave a silent loss of zero."""
    save_checkpoint(tiny_gpt(dtype=torch.float32), tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:2 is not there"):
        pick_device("cuda:2")
    # torchrun with more processes than devices
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="cuda:2 is not there"):
        pick_device()


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_agrees_with_the_cpu(family):
    model, prompts = tiny_gpt(vocab=11, family=family), prompts_of_many_lengths(100, 11)
    naive = naive_generate(model, prompts, 40, 1.0, seeded(7))
    for _ in range(3):
        assert as_lists(*generate(model.cuda(), prompts, 40, generator=seeded(7))) == naive


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_step_that_cannot_be_recorded_is_called(monkeypatch):
    """Where what is free lies in the cache of the allocator, which a recording cannot use. And the
    recording has ended: the next one succeeds."""
    model, prompts = tiny_gpt(vocab=20000).cuda(), prompts_of_many_lengths(40, 11)
    latest.clear()
    torch.cuda.empty_cache()
    with monkeypatch.context() as never:
        never.setattr("support.graph.record", lambda step, device: False)
        expected = as_lists(*generate(model, prompts, 20, generator=seeded(7)))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        assert as_lists(*generate(model, prompts, 20, generator=seeded(7))) == expected
        assert latest[model.device][0] is None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert as_lists(*generate(model, prompts, 20, generator=seeded(7))) == expected
    assert latest[model.device][0] is not None


@pytest.mark.cuda
def test_recorded_steps_do_not_pile_up_in_memory():
    model, prompts = tiny_gpt(vocab=20000).cuda(), prompts_of_many_lengths(64, 11)
    used = []
    for _ in range(6):
        for rows in (64, 40, 56, 24):
            generate(model, prompts[:rows], 40, generator=seeded(7))
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_reserved())
    assert used[-1] <= used[2]
