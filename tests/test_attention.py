"""Attention against torch's own module and against double loops written from the formulas."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import close, far, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memformer.attention import (
    MultiHeadAttention,
    attention_weights,
    merge_heads,
    split_heads,
    visible_positions,
)
from memformer.cache import KeyValueCache
from memformer.positions import RotaryPositions, rotary_table, rotate

seeds = st.integers(0, 2**32 - 1)
sizes = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 6),
    "heads": st.integers(1, 3),
    "half": st.integers(1, 3),
}


MAX_LENGTH = 8


def attention(dim, heads, **settings):
    """With relative positions that are not near zero, as they would be at the start."""
    net = MultiHeadAttention(dim, heads, max_length=MAX_LENGTH, **settings).double().eval()
    if settings.get("positions") == "relative":
        nn.init.normal_(table_of(net))
    return net


def table_of(net):
    """The learned vectors by head and distance: `table[head, n + max_length − 1]` is `R_n`."""
    (table,) = (p for p in net.parameters() if p.ndim == 3)
    return table


def torch_attention(ours):
    """torch's module with our weights."""
    dim = ours.query.weight.shape[0]
    theirs = nn.MultiheadAttention(dim, ours.num_heads, bias=False, batch_first=True)
    theirs = theirs.double().eval()
    with torch.no_grad():
        weights = (ours.query.weight, ours.key_value.weight)
        theirs.in_proj_weight.copy_(torch.cat(weights))
        theirs.out_proj.weight.copy_(ours.output.weight)
    return theirs


def naive_attention(ours, x, context, causal, mask, score_and_value):
    """One query, one key, one head at a time; `score_and_value(q, k, v, i, j, head)`."""
    batch, length, dim = x.shape
    width = dim // ours.num_heads
    weight_key, weight_value = ours.key_value.weight.split(dim)
    query = x @ ours.query.weight.T
    key, value = context @ weight_key.T, context @ weight_value.T
    mixed = torch.zeros_like(x)
    for b in range(batch):
        for head in range(ours.num_heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(length):
                scores, values = [], []
                for j in range(context.shape[1]):
                    if (causal and j > i) or (mask is not None and not mask[b, j]):
                        continue
                    score, content = score_and_value(
                        query[b, i, part], key[b, j, part], value[b, j, part], i, j, head
                    )
                    scores.append(score / math.sqrt(width))
                    values.append(content)
                weights = torch.stack(scores).softmax(0)
                mixed[b, i, part] = sum(w * v for w, v in zip(weights, values, strict=True))
    return mixed @ ours.output.weight.T


def padding(batch, length, generator):
    """Right padding that leaves every row at least one real position."""
    real = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return torch.arange(length) < real


@given(seed=seeds, causal=st.booleans(), padded=st.booleans(), cross=st.booleans(), **sizes)
def test_plain_attention_is_that_of_torch(
    seed, causal, padded, cross, batch, length, heads, half
):
    generator = torch.manual_seed(seed)
    ours = attention(2 * half * heads, heads)
    theirs = torch_attention(ours)
    x = randn(batch, length, 2 * half * heads)
    context = randn(batch, length + 2, 2 * half * heads) if cross and not causal else x
    mask = padding(batch, context.shape[1], generator) if padded else None
    expected, _ = theirs(
        x,
        context,
        context,
        key_padding_mask=None if mask is None else ~mask,
        attn_mask=torch.ones(length, length).triu(1).bool() if causal else None,
        need_weights=False,
    )
    close(ours(x, None if context is x else context, causal=causal, mask=mask), expected)


def test_the_comparison_with_torch_notices_a_missing_mask():
    ours = attention(6, 3)
    x = randn(2, 5, 6)
    expected, _ = torch_attention(ours)(
        x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool(), need_weights=False
    )
    assert far(ours(x), expected)
    close(ours(x, causal=True), expected)


def relative_terms(table):
    """`A_ij = Q_i·K_j + Q_i·R_{i−j}`, and `V_j + R_{i−j}` to be mixed."""

    def terms(query, key, value, i, j, head):
        r = table[head, i - j + MAX_LENGTH - 1]
        return query @ key + query @ r, value + r

    return terms


def rotary_terms(half):
    """Only the distance turns: the query by i − j, the key not at all (Su et al. 2021).

    Feature `pair` of the first half turns together with its fellow in the second half.
    """

    def terms(query, key, value, i, j, head):
        turned = query.clone()
        for pair in range(half):
            angle = (i - j) * 10_000.0 ** (-2 * pair / (2 * half))
            left, right = query[pair], query[half + pair]
            turned[pair] = left * math.cos(angle) - right * math.sin(angle)
            turned[half + pair] = left * math.sin(angle) + right * math.cos(angle)
        return turned @ key, value

    return terms


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@given(
    seed=seeds,
    causal=st.booleans(),
    padded=st.booleans(),
    other=st.none() | st.integers(1, MAX_LENGTH),
    **sizes,
)
def test_attention_with_positions_is_the_double_loop(
    positions, seed, causal, padded, other, batch, length, heads, half
):
    """Over its own positions, or over those of another text, counted from its start."""
    generator = torch.manual_seed(seed)
    dim = 2 * half * heads
    ours = attention(dim, heads, positions=positions)
    x = randn(batch, length, dim)
    context = x if other is None else randn(batch, other, dim)
    mask = padding(batch, context.shape[1], generator) if padded else None
    out = ours(x, None if other is None else context, causal=causal, mask=mask)
    terms = relative_terms(table_of(ours)) if positions == "relative" else rotary_terms(half)
    close(out, naive_attention(ours, x, context, causal, mask, terms))


def test_the_double_loop_notices_a_swapped_distance():
    def swapped(terms):
        return lambda q, k, v, i, j, head: terms(q, k, v, j, i, head)

    x, ours = randn(1, 4, 6), attention(6, 3, positions="relative")
    terms = swapped(relative_terms(table_of(ours)))
    assert far(ours(x), naive_attention(ours, x, x, False, None, terms))
    ours = attention(6, 3, positions="rotary")
    assert far(ours(x), naive_attention(ours, x, x, False, None, swapped(rotary_terms(1))))


def test_relative_attention_has_one_vector_per_head_and_distance():
    assert table_of(attention(12, 3, positions="relative")).shape == (3, 2 * MAX_LENGTH - 1, 4)


@given(seed=seeds, half=st.integers(1, 4), length=st.integers(2, 40))
def test_rotary_scores_depend_on_distance_alone(seed, half, length):
    torch.manual_seed(seed)
    table = rotary_table(length, 2 * half, torch.zeros((), dtype=torch.float64))
    query, key = (
        rotate(randn(1, 1, 1, 2 * half).expand(-1, -1, length, -1), table) for _ in "qk"
    )
    scores = (query @ key.mT)[0, 0]
    for distance in range(1 - length, length):
        line = scores.diagonal(distance)
        close(line, line[:1].expand_as(line))
    assert far(scores[0], scores[0, :1].expand(length))  # and distance matters


@given(seed=seeds, **sizes)
def test_rotation_keeps_lengths_and_leaves_position_zero(seed, batch, length, heads, half):
    torch.manual_seed(seed)
    x = randn(batch, heads, length, 2 * half)
    turned = rotate(x, rotary_table(length, 2 * half, x))
    close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


@given(seed=seeds, **sizes)
def test_heads_are_slices_of_the_width(seed, batch, length, heads, half):
    torch.manual_seed(seed)
    x = randn(batch, length, heads * half)
    cut = split_heads(x, heads)
    assert cut.shape == (batch, heads, length, half)
    for head in range(heads):
        assert torch.equal(cut[:, head], x[..., head * half : (head + 1) * half])
    assert torch.equal(merge_heads(cut), x)


@pytest.mark.parametrize("positions", ["none", "rotary", "relative"])
def test_later_tokens_do_not_reach_earlier_ones(positions):
    ours = attention(12, 3, positions=positions)
    x = randn(2, 7, 12).requires_grad_()
    for i in range(7):
        (gradient,) = torch.autograd.grad(ours(x, causal=True)[:, i].sum(), x)
        assert not gradient[:, i + 1 :].any()
        assert gradient[:, : i + 1].abs().sum(dim=(0, 2)).all()


@pytest.mark.parametrize("positions", ["none", "rotary", "relative"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_row_of_padding_alone_is_finite_forward_and_backward(positions, causal):
    ours = attention(12, 3, positions=positions)
    x = randn(2, 5, 12).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = ours(x, causal=causal, mask=mask)
    out[0].sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    assert not x.grad[1].any()


@pytest.mark.parametrize("positions", ["none", "rotary", "relative"])
def test_dropout_acts_in_training_only(positions):
    ours = attention(12, 3, positions=positions, dropout=0.5)
    x = randn(2, 6, 12)
    assert torch.equal(ours(x), ours(x))
    ours.train()
    assert far(ours(x), ours(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("positions", ["none", "rotary", "relative"])
def test_narrow_numbers_come_back_narrow_and_near(positions, dtype):
    ours = attention(12, 3, positions=positions).to(dtype)
    x, mask = randn(2, 7, 12).to(dtype), torch.arange(7) < torch.tensor([[7], [4]])
    out = ours(x, causal=True, mask=mask)
    assert out.dtype == dtype
    expected = ours.double()(x.double(), causal=True, mask=mask)
    assert (out - expected).abs().max() < 40 * torch.finfo(dtype).eps * (
        1 + expected.abs().max()
    )


@pytest.mark.parametrize("positions", ["none", "rotary", "relative"])
@given(seed=seeds, shift=st.integers(1, MAX_LENGTH - 1), causal=st.booleans())
def test_padding_on_the_left_is_a_shift(positions, seed, shift, causal):
    torch.manual_seed(seed)
    ours, length = attention(12, 3, positions=positions), MAX_LENGTH - shift
    x, noise = randn(2, length, 12), randn(2, shift, 12)
    mask = (torch.arange(MAX_LENGTH) >= shift).expand(2, -1)
    out = ours(torch.cat((noise, x), dim=1), causal=causal, mask=mask)
    close(out[:, shift:], ours(x, causal=causal))


@given(seed=seeds, start=st.integers(0, 10_000), half=st.integers(1, 4))
def test_rotary_positions_can_begin_anywhere(seed, start, half):
    torch.manual_seed(seed)
    x, turn = randn(1, 2, 9, 2 * half), RotaryPositions(4, 2 * half)
    later = torch.cat((torch.zeros(1, 2, start % 50, 2 * half).double(), x), dim=2)
    close(turn(x, start % 50), turn(later)[:, :, start % 50 :])
    scores, moved = (turn(x, s) @ turn(x, s).mT for s in (0, start))
    torch.testing.assert_close(moved, scores, rtol=1e-8, atol=1e-8)


@given(length=st.integers(1, 300), half=st.integers(1, 5), base=st.floats(10, 1e6))
def test_the_rotary_table_holds_the_angle_of_every_position_and_pair(length, half, base):
    table = rotary_table(length, 2 * half, torch.zeros((), dtype=torch.float64), base)
    assert table.shape == (2, length, half)
    position, pair = length - 1, half - 1
    angle = position * base ** (-2 * pair / (2 * half))
    assert float(table[0, position, pair]) == pytest.approx(math.cos(angle), abs=1e-9)
    assert float(table[1, position, pair]) == pytest.approx(math.sin(angle), abs=1e-9)


@given(seed=seeds, lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_a_kept_rotary_table_follows_length_and_dtype(seed, lengths):
    """Whatever it met before: longer or shorter rows, in 64, 32 or 16 bits."""
    torch.manual_seed(seed)
    turn = RotaryPositions(8, 6)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for i, length in enumerate(lengths):
        x = torch.randn(2, length, 6, dtype=dtypes[(seed + i) % 4])
        out = turn(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        exact = rotate(x.to(wide), rotary_table(length, 6, x))
        assert out.dtype == x.dtype
        torch.testing.assert_close(out, exact.to(x.dtype))


def test_the_rotary_table_is_no_part_of_a_saved_model():
    net = attention(12, 3, positions="rotary")
    assert not list(net.buffers())
    assert set(net.state_dict()) == {"query.weight", "key_value.weight", "output.weight"}


def test_a_position_beyond_256_is_itself_in_16_bits():
    """bfloat16 has eight bits, and takes 257 for 256: angles are computed in 32."""
    x = torch.ones(1, 300, 2, dtype=torch.bfloat16)
    assert not torch.equal(
        RotaryPositions(300, 2)(x)[0, 256], RotaryPositions(300, 2)(x)[0, 257]
    )


def test_a_head_of_odd_width_cannot_turn():
    with pytest.raises(ValueError, match=r"3 features.*pairs"):
        RotaryPositions(8, 3)
    with pytest.raises(ValueError, match=r"3 features.*pairs"):
        MultiHeadAttention(6, 2, max_length=8, positions="rotary")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("positions", ["none", "rotary", "relative"])
def test_a_mask_is_boolean(positions, dtype):
    ours, x = attention(12, 3, positions=positions), randn(2, 5, 12)
    for causal in (True, False):
        with pytest.raises(ValueError, match=rf"{dtype}.*torch\.bool \(2, 5\)"):
            ours(x, causal=causal, mask=torch.ones(2, 5, dtype=dtype))


# --- a cache --------------------------------------------------------------------------------


KINDS = ["none", "rotary", "relative"]


def cut(length, cuts):
    """Pieces of a row: `(begin, end)`, one after another."""
    borders = sorted({0, length, *(c for c in cuts if c < length)})
    return list(pairwise(borders))


def in_pieces(net, x, cuts, mask=None, size=MAX_LENGTH):
    """Causal attention token by token, or by any pieces, with a cache."""
    cache, parts = KeyValueCache(size), []
    with torch.no_grad():
        for begin, end in cut(x.shape[1], cuts):
            seen = None if mask is None else mask[:, :end]
            parts.append(net(x[:, begin:end], causal=True, mask=seen, cache=cache))
            assert cache.filled == end
    return torch.cat(parts, dim=1)


cuts_in_a_row = st.sets(st.integers(1, MAX_LENGTH - 1))


@pytest.mark.parametrize("positions", KINDS)
@given(
    seed=seeds,
    cuts=cuts_in_a_row,
    masked=st.sampled_from(["no", "right", "left", "holes"]),
    **(sizes | {"length": st.integers(1, MAX_LENGTH)}),
)
def test_pieces_with_a_cache_are_the_whole(
    positions, seed, cuts, masked, batch, length, heads, half
):
    generator = torch.manual_seed(seed)
    ours, x = attention(2 * half * heads, heads, positions=positions), None
    x = randn(batch, length, 2 * half * heads)
    mask = {
        "no": None,
        "right": padding(batch, length, generator),
        "left": padding(batch, length, generator).flip(1),
        "holes": torch.rand(batch, length, generator=generator) < 0.7,
    }[masked]
    whole, pieces = ours(x, causal=True, mask=mask), in_pieces(ours, x, cuts, mask)
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    close(pieces[real], whole[real])  # what stands at padding means nothing
    assert pieces.isfinite().all()


@pytest.mark.parametrize("positions", KINDS)
@given(seed=seeds, cuts=cuts_in_a_row, length=st.integers(1, MAX_LENGTH))
def test_pieces_with_a_cache_are_the_double_loop(positions, seed, cuts, length):
    torch.manual_seed(seed)
    ours, x = attention(12, 3, positions=positions), randn(2, length, 12)
    terms = {
        "none": lambda q, k, v, i, j, head: (q @ k, v),
        "rotary": rotary_terms(2),
        "relative": relative_terms(table_of(ours)) if positions == "relative" else None,
    }[positions]
    close(in_pieces(ours, x, cuts), naive_attention(ours, x, x, True, None, terms))


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_pieces_that_forgot_where_they_stand_would_be_noticed(positions, monkeypatch):
    ours, x = attention(12, 3, positions=positions), randn(2, 6, 12)
    whole = ours(x, causal=True)
    close(in_pieces(ours, x, {3}), whole)
    if positions == "rotary":
        right = ours.mix.rotary.forward
        monkeypatch.setattr(ours.mix.rotary, "forward", lambda x, start=0: right(x, 0))
    else:
        right = ours.mix.forward
        monkeypatch.setattr(
            ours.mix, "forward", lambda q, k, v, seen: right(q, k, v, seen._replace(start=0))
        )
    assert far(in_pieces(ours, x, {3})[:, 3:], whole[:, 3:])


@given(seed=seeds, cuts=cuts_in_a_row, padded=st.booleans())
def test_pieces_that_look_at_a_cached_context_are_the_whole(seed, cuts, padded):
    """The context's keys and values are computed once, and pieces may differ in length."""
    generator = torch.manual_seed(seed)
    ours, x, context = attention(12, 3), randn(2, MAX_LENGTH, 12), randn(2, 5, 12)
    mask = padding(2, 5, generator) if padded else None
    cache, whole = KeyValueCache(5), ours(x, context, mask=mask)
    with torch.no_grad():
        for begin, end in cut(MAX_LENGTH, cuts):
            close(ours(x[:, begin:end], context, mask=mask, cache=cache), whole[:, begin:end])
            assert cache.filled == 5


def test_a_cache_holds_what_it_was_given_in_order_and_no_more_than_its_length():
    cache, rows = KeyValueCache(6), randn(2, 2, 3, 6, 4)
    for begin, end in ((0, 1), (1, 4), (4, 6)):
        key, value = cache.extend(rows[0, :, :, begin:end], rows[1, :, :, begin:end])
        assert torch.equal(key, rows[0, :, :, :end])
        assert torch.equal(value, rows[1, :, :, :end])
    room = cache.store.data_ptr()
    with pytest.raises(ValueError, match=r"7 positions.*room for 6"):
        cache.extend(rows[0, :, :, :1], rows[1, :, :, :1])
    assert torch.equal(cache.held()[0], rows[0])  # a refusal changes nothing
    cache.clear()
    assert cache.filled == 0
    cache.extend(rows[1, :, :, :2], rows[0, :, :, :2])
    assert torch.equal(cache.held()[1], rows[0, :, :, :2])
    assert cache.store.data_ptr() == room  # the room stays


def test_an_empty_cache_holds_nothing():
    with pytest.raises(ValueError, match="empty"):
        KeyValueCache(3).held()


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    start=st.integers(0, 4),
    more=st.integers(0, 3),
    causal=st.booleans(),
    masked=st.booleans(),
)
def test_visible_positions_by_the_rule(batch, length, start, more, causal, masked):
    """Query i stands at start + i; it sees real keys, in causal order up to its own."""
    size = start + length + more
    query, key = torch.zeros(batch, 1, length, 2), torch.zeros(batch, 1, size, 2)
    mask = torch.rand(batch, size) < 0.6 if masked else None
    found = visible_positions(query, key, causal, mask, start)
    for b in range(batch):
        for i in range(length):
            rule = [
                (not causal or j <= start + i) and (mask is None or bool(mask[b, j]))
                for j in range(size)
            ]
            rule = rule if any(rule) else [True] * size  # padding alone sees everything
            row = [True] * size if found is None else found.expand(batch, 1, -1, -1)[b, 0, i]
            assert [bool(seen) for seen in row] == rule


@pytest.mark.parametrize("positions", ["", "Rotary", "learned", None])
def test_positions_of_another_kind(positions):
    with pytest.raises(ValueError, match=r"positions is .*rotary"):
        MultiHeadAttention(6, 2, max_length=4, positions=positions)


@given(seed=seeds, **sizes, other=st.integers(1, 6))
def test_the_weights_that_the_kernel_hides(seed, batch, length, heads, half, other):
    """Those of torch's module, which can show them."""
    torch.manual_seed(seed)
    ours = attention(2 * half * heads, heads)
    x, context = randn(batch, length, 2 * half * heads), randn(batch, other, 2 * half * heads)
    _, expected = torch_attention(ours)(x, context, context, average_attn_weights=False)
    close(attention_weights(ours, x, context), expected)
