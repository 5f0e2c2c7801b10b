"""Writing against a loop over slots, heads and tokens written from PAPER.md's formula."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import close, far, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memformer.slots import separate_slots
from memformer.writer import MemoryWriter, ShortConvolution, blend, keep_bias_for, slot_weights

seeds = st.integers(0, 2**32 - 1)
temperatures = st.floats(0.05, 4.0)
biases = st.none() | st.floats(-3.0, 3.0)
sizes = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 6),
    "slots": st.integers(1, 5),
    "heads": st.integers(1, 3),
    "width": st.integers(1, 4),
}


def writer_for(heads, width, temperature=0.25, keep_bias=None, normalise=True):
    """As after training: queries of any size, and a bias of its own in every head."""
    writer = MemoryWriter(
        heads * width,
        heads,
        temperature,
        self_weight=None if keep_bias is None else 0.8,
        normalise=normalise,
    )
    writer = writer.double().eval()
    writer.query.reset_parameters()
    if normalise:
        nn.init.normal_(writer.norm.weight)
        nn.init.normal_(writer.norm.bias)
    if keep_bias is not None:  # heads of their own, so that a mixed-up head shows
        with torch.no_grad():
            writer.keep_bias.copy_(keep_bias + torch.randn_like(writer.keep_bias))
    return writer


def layer_norm(norm, slot):
    if isinstance(norm, nn.Identity):
        return slot
    mean = slot.mean()
    variance = ((slot - mean) ** 2).mean()
    return (slot - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias


def naive_write(writer, memory, x, mask=None):
    """Each slot by itself: scores against itself and each token, softmax by hand, mix."""
    batch, slots, dim = memory.shape
    heads, width = writer.num_heads, dim // writer.num_heads
    new = torch.zeros_like(memory)
    weights = memory.new_zeros(batch, heads, slots, 1 + x.shape[1])
    for b in range(batch):
        for i in range(slots):
            slot = memory[b, i]
            seen = layer_norm(writer.norm, slot)
            query, own_key = writer.query.weight @ seen, writer.key.weight @ seen
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                own = query[part] @ own_key[part] / math.sqrt(width)
                if writer.keep_bias is not None:
                    own = own + writer.keep_bias.flatten()[head]
                scores, values, columns = [own], [slot[part]], [0]
                for token in range(x.shape[1]):
                    if mask is not None and not mask[b, token]:
                        continue
                    key = (writer.key.weight @ x[b, token])[part]
                    scores.append(query[part] @ key / math.sqrt(width))
                    values.append((writer.value.weight @ x[b, token])[part])
                    columns.append(1 + token)
                top = max(score.item() for score in scores)
                powers = [torch.exp((score - top) / writer.temperature) for score in scores]
                for power, value, column in zip(powers, values, columns, strict=True):
                    share = power / sum(powers)
                    weights[b, head, i, column] = share
                    new[b, i, part] += share * value
    return new, weights


@given(
    seed=seeds,
    temperature=temperatures,
    keep_bias=biases,
    normalise=st.booleans(),
    masked=st.booleans(),
    **sizes,
)
def test_writing_is_the_loop_over_slots(
    seed, temperature, keep_bias, normalise, masked, batch, length, slots, heads, width
):
    torch.manual_seed(seed)
    writer = writer_for(heads, width, temperature, keep_bias, normalise)
    memory, x = randn(batch, slots, heads * width), randn(batch, length, heads * width)
    mask = torch.rand(batch, length) < 0.6 if masked else None
    new, weights = writer(memory, x, mask, return_weights=True)
    expected, expected_weights = naive_write(writer, memory, x, mask)
    close(new, expected)
    close(weights, expected_weights)
    close(weights.sum(dim=-1), torch.ones(batch, heads, slots).double())
    assert torch.equal(writer(memory, x, mask), new)


def test_the_loop_notices_a_wrong_temperature_a_projected_slot_and_a_swapped_bias():
    writer = writer_for(3, 2, keep_bias=0.5)
    memory, x = randn(2, 4, 6), randn(2, 5, 6)
    expected, _ = naive_write(writer, memory, x)
    close(writer(memory, x), expected)
    writer.temperature *= 1.1
    assert far(writer(memory, x), expected)
    writer.temperature /= 1.1
    _, weights = writer(memory, x, return_weights=True)
    own = weights[..., 0].mT.repeat_interleave(2, dim=-1)
    projected = writer(memory, x) + own * (writer.value(memory) - memory)
    assert far(projected, expected)
    with torch.no_grad():
        writer.keep_bias.copy_(writer.keep_bias.roll(1, dims=0))
    assert far(writer(memory, x), expected)


@given(seed=seeds, keep_bias=biases, normalise=st.booleans(), **sizes)
def test_no_slot_sees_another(seed, keep_bias, normalise, batch, length, slots, heads, width):
    """The derivative of one slot's new content to any other slot is exactly zero."""
    torch.manual_seed(seed)
    writer = writer_for(heads, width, 0.5, keep_bias, normalise)
    memory, x = randn(batch, slots, heads * width), randn(batch, length, heads * width)
    jacobian = torch.autograd.functional.jacobian(lambda m: writer(m, x), memory)
    for b in range(batch):
        for i in range(slots):
            rows = jacobian[b, i]  # (D, B, K, D)
            assert rows[:, b, i].any()
            rows[:, b, i] = 0
            assert not rows.any()


def test_the_jacobian_would_show_a_slot_that_sees_another():
    memory = randn(1, 3, 4)
    jacobian = torch.autograd.functional.jacobian(
        lambda m: m + 1e-9 * m.roll(1, dims=1), memory
    )
    assert jacobian[0, 0, :, 0, 2].any()


@given(seed=seeds, keep_bias=biases, normalise=st.booleans(), **sizes)
def test_permuting_slots_permutes_what_is_written(
    seed, keep_bias, normalise, batch, length, slots, heads, width
):
    torch.manual_seed(seed)
    writer = writer_for(heads, width, 0.25, keep_bias, normalise)
    memory, x = randn(batch, slots, heads * width), randn(batch, length, heads * width)
    order = torch.randperm(slots)
    new, weights = writer(memory, x, return_weights=True)
    permuted, permuted_weights = writer(memory[:, order], x, return_weights=True)
    close(permuted, new[:, order])
    close(permuted_weights, weights[:, :, order])


@given(seed=seeds, keep_bias=biases, **sizes)
def test_permuting_tokens_changes_nothing(seed, keep_bias, batch, length, slots, heads, width):
    torch.manual_seed(seed)
    writer = writer_for(heads, width, 0.25, keep_bias)
    memory, x = randn(batch, slots, heads * width), randn(batch, length, heads * width)
    close(writer(memory, x[:, torch.randperm(length)]), writer(memory, x))


@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]), **sizes)
def test_a_self_weight_of_one_keeps_a_slot_bit_for_bit(
    seed, dtype, batch, length, slots, heads, width
):
    torch.manual_seed(seed)
    writer = writer_for(heads, width, 0.25, 0.0).to(dtype)
    memory, x = (randn(batch, n, heads * width).to(dtype) for n in (slots, length))
    with torch.no_grad():
        writer.keep_bias.fill_(1e6)
    new, weights = writer(memory, x, return_weights=True)
    assert (weights[..., 0] == 1).all()
    assert torch.equal(new, memory)
    with torch.no_grad():
        writer.keep_bias.fill_(-1e6)
    assert not torch.equal(writer(memory, x), memory)


@given(seed=seeds, keep_bias=biases, normalise=st.booleans(), **sizes)
def test_a_segment_of_padding_keeps_the_memory_bit_for_bit(
    seed, keep_bias, normalise, batch, length, slots, heads, width
):
    torch.manual_seed(seed)
    writer = writer_for(heads, width, 0.25, keep_bias, normalise)
    memory, x = randn(batch, slots, heads * width), randn(batch, length, heads * width)
    nothing = torch.zeros(batch, length, dtype=torch.bool)
    assert torch.equal(writer(memory, x, nothing), memory)


@given(seed=seeds, keep_bias=biases, **sizes)
def test_padding_is_invisible_to_the_writer(
    seed, keep_bias, batch, length, slots, heads, width
):
    torch.manual_seed(seed)
    writer = writer_for(heads, width, 0.25, keep_bias)
    memory, x = randn(batch, slots, heads * width), randn(batch, length, heads * width)
    real = torch.randint(0, length + 1, (batch, 1))
    new = writer(memory, x, torch.arange(length) < real)
    for b, n in enumerate(real.flatten().tolist()):
        row = slice(b, b + 1)
        close(new[row], writer(memory[row], x[row, :n]) if n else memory[row])


@pytest.mark.parametrize("keep_bias", [None, 0.7])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_by_finite_differences(keep_bias, normalise):
    writer = writer_for(2, 2, 0.5, keep_bias, normalise)
    mask = torch.tensor([[True, False, True]])

    def write(memory, x, *parameters):
        names = [name for name, _ in writer.named_parameters()]
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(writer, values, (memory, x, mask))

    inputs = randn(1, 2, 4).requires_grad_(), randn(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(write, (*inputs, *writer.parameters()))


def test_the_printed_form_has_no_bias_to_learn():
    assert writer_for(2, 2).keep_bias is None
    names = {name for name, _ in writer_for(2, 2, normalise=False).named_parameters()}
    assert names == {"query.weight", "key.weight", "value.weight"}  # no output projection


@given(seed=seeds, heads=st.integers(1, 3), width=st.integers(1, 3))
def test_a_low_temperature_writes_the_best_match_alone(seed, heads, width):
    torch.manual_seed(seed)
    writer = writer_for(heads, width, 1e-9)
    _, weights = writer(
        randn(1, 3, heads * width), randn(1, 4, heads * width), return_weights=True
    )
    best = weights.argmax(dim=-1, keepdim=True)
    assert (weights.gather(-1, best) > 1 - 1e-6).all()


@given(
    share=st.floats(0.01, 0.99),
    length=st.integers(1, 200),
    temperature=st.floats(0.05, 4.0),
)
def test_keep_bias_for_gives_the_self_weight_that_was_asked_for(share, length, temperature):
    """Exactly, where no score differs from zero."""
    bias = keep_bias_for(share, length, temperature)
    writer = MemoryWriter(6, 2, temperature, self_weight=share, length=length).double()
    torch.testing.assert_close(
        writer.keep_bias.flatten().detach(),
        torch.full((2,), bias).double(),
        rtol=1e-6,
        atol=1e-7,
    )  # it was drawn up in 32 bits
    with torch.no_grad():
        writer.query.weight.zero_()
        writer.keep_bias.fill_(bias)
    _, weights = writer(randn(1, 3, 6), randn(1, length, 6), return_weights=True)
    close(weights[..., 0], torch.full((1, 2, 3), share, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_weights_still_sum_to_one(dtype):
    """The softmax over self and tokens is taken in 32 bits, so τ does not blow it up."""
    writer = writer_for(2, 4, 0.05, 1.0).to(dtype)
    memory, x = randn(2, 3, 8).to(dtype), randn(2, 60, 8).to(dtype)
    new, weights = writer(memory, x, return_weights=True)
    assert new.dtype == dtype
    assert new.isfinite().all()
    torch.testing.assert_close(weights.float().sum(dim=-1), torch.ones(2, 2, 3))


def test_the_keep_bias_is_learned_in_every_head():
    bias = MemoryWriter(6, 2).keep_bias
    assert bias.shape == (2, 1, 1)
    assert bias.dtype == torch.float32
    assert bias.requires_grad
    writer, target = writer_for(2, 3, keep_bias=0.0), randn(2, 3, 6)
    (writer(randn(2, 3, 6), randn(2, 4, 6)) * target).sum().backward()
    assert writer.keep_bias.grad.all()


def untrained_self_weight(dim, heads, length, target, normalise, tokens):
    """Mean self-weight of new writers, over many slots and streams."""
    shares = []
    for _ in range(2):
        writer = MemoryWriter(
            dim, heads, self_weight=target, length=length, normalise=normalise
        )
        memory = separate_slots(32, dim)[None].expand(2, -1, -1)
        x = tokens(torch.randn(2, length, dim))
        with torch.no_grad():
            shares.append(writer(memory, x, return_weights=True)[1][..., 0].mean())
    return float(torch.stack(shares).mean())


TOKENS = {
    "as the last layer leaves them": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
    "of length one": lambda x: nn.functional.normalize(x, dim=-1),
}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 0.98])
@pytest.mark.parametrize("length", [8, 64, 512])
def test_an_untrained_writer_keeps_what_it_was_told_to(
    length, target, heads, normalise, tokens
):
    """Within .03 of the target, at any length and width: the formula is true at the start."""
    for dim in (32, 128, 512):
        found = untrained_self_weight(dim, heads, length, target, normalise, tokens)
        assert found == pytest.approx(target, abs=0.03), dim


def test_large_queries_would_break_that_promise():
    """Why queries start small: at their usual size scores spread, and tokens win."""
    writer, told = MemoryWriter(128, self_weight=0.8, length=64), 0.8
    x = nn.functional.layer_norm(torch.randn(4, 64, 128), (128,))
    memory = torch.stack([separate_slots(16, 128) for _ in range(4)])
    with torch.no_grad():
        writer.query.reset_parameters()
        found = writer(memory, x, return_weights=True)[1][..., 0].mean()
    assert float(found) < told - 0.05


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_self_weights_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"self_weight is .*between 0 and 1"):
        MemoryWriter(6, 2, self_weight=wrong)
    with pytest.raises(ValueError, match="length is 0"):
        MemoryWriter(6, 2, self_weight=0.5, length=0)


@given(seed=seeds, temperature=temperatures, keep_bias=biases, masked=st.booleans(), **sizes)
def test_the_two_halves_of_a_write(
    seed, temperature, keep_bias, masked, batch, length, slots, heads, width
):
    """`slot_weights` and `blend`, each by its own formula, one number at a time."""
    torch.manual_seed(seed)
    query, own_key, old = (randn(batch, heads, slots, width) for _ in range(3))
    key, value = (randn(batch, heads, length, width) for _ in range(2))
    bias = None if keep_bias is None else keep_bias + randn(heads, 1, 1)
    mask = torch.rand(batch, length) < 0.6 if masked else None
    weights = slot_weights(query, own_key, key, temperature, bias, mask)
    new = blend(weights, old, value)
    for b in range(batch):
        for h in range(heads):
            for i in range(slots):
                own = float(query[b, h, i] @ own_key[b, h, i]) / math.sqrt(width)
                scores = [own + (0.0 if bias is None else float(bias[h, 0, 0]))]
                for t in range(length):
                    seen = float(query[b, h, i] @ key[b, h, t]) / math.sqrt(width)
                    scores.append(seen if mask is None or mask[b, t] else -math.inf)
                top = max(scores)
                powers = [math.exp((score - top) / temperature) for score in scores]
                shares = [power / sum(powers) for power in powers]
                assert weights[b, h, i].tolist() == pytest.approx(shares, abs=1e-10)
                mixed = shares[0] * old[b, h, i]
                mixed = mixed + sum(shares[1 + t] * value[b, h, t] for t in range(length))
                close(new[b, h, i], mixed)


@pytest.mark.parametrize("keep_bias", [None, 0.7])
@pytest.mark.parametrize("normalise", [True, False])
def test_rows_of_padding_alone_are_kept_and_give_finite_gradients(keep_bias, normalise):
    writer = writer_for(2, 3, 0.25, keep_bias, normalise)
    memory, x = randn(3, 4, 6).requires_grad_(), randn(3, 5, 6).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5, [True, False, True, False, False]])
    new = writer(memory, x, mask)
    assert torch.equal(new[1], memory[1])
    assert not torch.equal(new[0], memory[0])
    upstream = randn(3, 4, 6)
    new.backward(upstream)
    close(memory.grad[1], upstream[1])  # a copy hands its gradient on as it is
    assert not x.grad[~mask].any()
    assert x.grad[mask].abs().sum(dim=-1).all()
    gradients = [memory.grad, x.grad, *(p.grad for p in writer.parameters())]
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_writing_is_near_the_exact(dtype):
    writer = writer_for(2, 4, 1.0, 0.5)
    memory, x = randn(2, 3, 8).to(dtype), randn(2, 6, 8).to(dtype)
    exact, _ = naive_write(writer.to(dtype).double(), memory.double(), x.double())
    new, weights = writer.to(dtype)(memory, x, return_weights=True)
    assert (new.dtype, weights.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(new.double(), exact, rtol=0.1, atol=0.15)


def test_under_autocast_memory_and_weights_stay_float32():
    writer = writer_for(2, 4, 1.0, 0.5).float()
    memory, x = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        new, weights = writer(memory, x, return_weights=True)
        kept = writer(memory, x, torch.zeros(2, 6, dtype=torch.bool))
    assert new.dtype == weights.dtype == torch.float32
    assert torch.equal(kept, memory)  # not even rounded
    exact, _ = naive_write(writer, memory, x)
    torch.testing.assert_close(new, exact, rtol=0.1, atol=0.15)


def test_heads_of_a_slot_may_take_different_tokens_and_one_head_cannot():
    """Two segments that pair the same halves otherwise leave one memory, with two heads."""
    left, right = randn(2, 2, 3)  # two vectors for each half
    pairings = torch.tensor([[0, 1], [1, 0]])
    segments = [torch.cat((left, right[order]), dim=-1)[None] for order in pairings]
    memory = torch.cat((left, right / 2), dim=-1)[None]
    written = {}
    for heads in (1, 2):
        writer = MemoryWriter(6, heads, normalise=False).double()
        nn.init.constant_(writer.keep_bias, -1e9)
        for layer in (writer.query, writer.key, writer.value):
            nn.init.eye_(layer.weight)
        hard = 1e6 * torch.linalg.pinv(torch.block_diag(left.T @ left, right.T @ right))
        with torch.no_grad():  # x · hard · y is 1e6 where halves are the same, else 0
            writer.query.weight.copy_(hard.T)
        written[heads] = [writer(memory, segment) for segment in segments]
    close(*written[2])
    close(written[1][0], segments[0])
    close(written[1][1], segments[1])
    assert far(*written[1])


# --- the short convolution ------------------------------------------------------------------

shapes = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 9),
    "dim": st.integers(1, 4),
    "width": st.integers(1, 8),
}


def convolution_for(dim, width, causal=True):
    net = ShortConvolution(dim, width, causal=causal).double()
    nn.init.normal_(net.taps)
    return net


def naive_convolution(net, x, width, causal, mask=None, past=None):
    """One token, one tap, one feature at a time: `y_t = Σ_i taps_i · x_{t + i − before}`."""
    row = x if past is None else torch.cat((past, x), dim=1)
    begin = row.shape[1] - x.shape[1]
    before = width - 1 if causal else width // 2
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(width):
                place = begin + t + i - before
                if not 0 <= place < row.shape[1]:
                    continue
                if mask is not None and not mask[b, place]:
                    continue
                for d in range(x.shape[2]):
                    out[b, t, d] += net.taps[i, d] * row[b, place, d]
    return out


@given(
    seed=seeds, causal=st.booleans(), masked=st.booleans(), before=st.integers(0, 5), **shapes
)
def test_the_convolution_is_the_double_loop(
    seed, causal, masked, before, batch, length, dim, width
):
    torch.manual_seed(seed)
    net, x = convolution_for(dim, width, causal), randn(batch, length, dim)
    past = randn(batch, before, dim) if before else None
    mask = torch.rand(batch, before + length) < 0.6 if masked else None
    close(net(x, mask, past), naive_convolution(net, x, width, causal, mask, past))


def test_the_double_loop_notices_taps_in_the_wrong_order():
    net, x = convolution_for(2, 3), randn(1, 6, 2)
    expected = naive_convolution(net, x, 3, True)
    close(net(x), expected)
    with torch.no_grad():
        net.taps.copy_(net.taps.flip(0).clone())
    assert far(net(x), expected)


@given(seed=seeds, **(shapes | {"length": st.integers(2, 9)}))
def test_a_causal_convolution_does_not_know_what_comes(seed, batch, length, dim, width):
    torch.manual_seed(seed)
    net, x = convolution_for(dim, width), randn(batch, length, dim)
    for place in range(length):
        edited = x.clone()
        edited[:, place:] = randn(batch, length - place, dim)
        assert torch.equal(net(edited)[:, :place], net(x)[:, :place])
        assert far(net(edited)[:, place], net(x)[:, place])
        reached = (net(edited) - net(x)).abs().amax(dim=(0, 2)) > 0
        assert reached[place:].all()
    edited = x.clone()
    edited[:, 0] += 1
    reached = (net(edited) - net(x)).abs().amax(dim=(0, 2)) > 0
    assert reached.tolist() == [place < width for place in range(length)]  # and no further


@given(seed=seeds, half=st.integers(0, 3), **(shapes | {"length": st.integers(1, 9)}))
def test_a_centred_convolution_is_symmetrical(seed, half, batch, length, dim, width):
    """Reversed taps on a reversed row are the reversed result, for odd widths."""
    torch.manual_seed(seed)
    net, x = convolution_for(dim, 2 * half + 1, causal=False), randn(batch, length, dim)
    assert net.before == net.after == half
    forward = net(x)
    with torch.no_grad():
        net.taps.copy_(net.taps.flip(0).clone())
    close(net(x.flip(1)).flip(1), forward)


@given(seed=seeds, causal=st.booleans(), **shapes)
def test_padding_is_invisible_to_the_convolution(seed, causal, batch, length, dim, width):
    """On either side: what stands there is neither seen nor felt in a gradient."""
    torch.manual_seed(seed)
    net, x = convolution_for(dim, width, causal), randn(batch, length, dim)
    real = torch.randint(1, length + 1, (batch,))
    for left in (False, True):
        mask = torch.arange(length) < real[:, None]
        mask = mask.flip(1) if left else mask
        padded = x.masked_scatter(~mask[:, :, None], 100 * randn(batch, length, dim))
        padded.requires_grad_()
        out = net(padded, mask)
        for b in range(batch):
            row = slice(b, b + 1)
            close(out[b][mask[b]], net(x[row, mask[b]])[0])
        out[mask].sum().backward()
        assert not padded.grad[~mask].any()


@given(seed=seeds, cuts=st.sets(st.integers(1, 8)), masked=st.booleans(), **shapes)
def test_pieces_with_their_past_are_the_whole(seed, cuts, masked, batch, length, dim, width):
    torch.manual_seed(seed)
    net, x = convolution_for(dim, width), randn(batch, length, dim)
    mask = torch.rand(batch, length) < 0.7 if masked else None
    whole, past = net(x, mask), None
    borders = sorted({0, length, *(cut for cut in cuts if cut < length)})
    for begin, end in pairwise(borders):
        seen = None if mask is None else mask[:, :end]
        close(net(x[:, begin:end], seen, past), whole[:, begin:end])
        past = net.reach(x[:, begin:end], past)
        assert past.shape[1] == min(end, width - 1)  # never more than the next token meets
        assert torch.equal(past, x[:, end - past.shape[1] : end])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_reach_is_never_longer_than_what_the_next_token_meets(width):
    net, x = convolution_for(3, width), randn(2, 6, 3)
    for past in (None, randn(2, 5, 3)):
        assert net.reach(x, past).shape == (2, width - 1, 3)
        assert torch.equal(net.reach(x, past), x[:, 6 - (width - 1) :])
    assert net.reach(x[:, :1]).shape == (2, min(1, width - 1), 3)


def test_a_lost_past_would_be_noticed():
    net, x = convolution_for(3, 4), randn(2, 6, 3)
    assert far(net(x[:, 3:]), net(x)[:, 3:])
    close(net(x[:, 3:], None, x[:, :3]), net(x)[:, 3:])


@given(seed=seeds, width=st.integers(1, 8), causal=st.booleans())
def test_the_convolution_starts_random_and_the_token_itself_ahead(seed, width, causal):
    torch.manual_seed(seed)
    net = ShortConvolution(10_000, width, causal=causal)
    mean, spread = net.taps.mean(dim=1), net.taps.std(dim=1)
    own = [float(i == net.before) for i in range(width)]
    assert mean.tolist() == pytest.approx(own, abs=0.06)  # six deviations of the mean
    assert spread.tolist() == pytest.approx([1.0] * width, abs=0.06)
    assert net.before + net.after + 1 == width


def test_a_convolution_of_one_tap_scales_features():
    net, x = convolution_for(3, 1), randn(2, 5, 3)
    close(net(x), x * net.taps[0])


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_the_convolution_by_finite_differences(causal):
    net, mask = convolution_for(2, 3, causal), torch.tensor([[True, False, True, True]])

    def run(x, past, taps):
        return torch.func.functional_call(net, {"taps": taps}, (x, mask, past))

    inputs = randn(1, 3, 2).requires_grad_(), randn(1, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(run, (*inputs, net.taps))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 2)])
def test_a_convolution_of_no_tokens_or_no_features(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        ShortConvolution(*sizes)
