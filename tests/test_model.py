"""The whole models: causal order, padding, gradients, streams, caches, precision, copies."""

import copy
import itertools
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MODELS,
    SEGMENT_MODELS,
    build,
    close,
    far,
    memory_in,
    randn,
    small_config,
    stack_of,
    states_close,
    tokens_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.config import MemformerConfig
from memformer.layers import MemformerLayer, SegmentCache
from memformer.model import Memformer, MemformerEncoder, MemformerLM, memory_of
from memformer.segments import detach_state, reset_state, run_segments, split_segments
from memformer.writer import MemoryWriter, ShortConvolution

every_model = pytest.mark.parametrize("model", MODELS)
segment_models = pytest.mark.parametrize("model", SEGMENT_MODELS)
inits = pytest.mark.parametrize("init", ["learn", "paper"])  # with the convolution, and without
widths = pytest.mark.parametrize("convolution", [1, 2, 4, 6])
positions = pytest.mark.parametrize("positions", ["rotary", "relative", "none"])
seeds = st.integers(0, 2**32 - 1)


def wander(model, state):
    """A state as it is amid a stream: no slot where it began."""
    for _ in range(3):
        length = int(torch.randint(1, model.config.segment_length + 1, ()))
        state = model(tokens_for(model, len(memory_in(state)), length), state)[1]
    return detach_state(state)


# --- what a layer and a step compute --------------------------------------------------------


def test_a_layer_is_three_residual_branches_each_normalised_first():
    layer = MemformerLayer(small_config(), "memory").double().eval()
    for norm in layer.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x, memory = randn(2, 6, 12), randn(2, 5, 12)

    def normed(h, norm):
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
        return (h - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias

    h = x + layer.attention(normed(x, layer.norms[0]), causal=True)
    h = h + layer.look(normed(h, layer.norms[1]), memory)
    first, last = layer.ffn[0], layer.ffn[2]
    hidden = F.gelu(normed(h, layer.norms[2]) @ first.weight.T + first.bias)
    close(layer(x, memory, causal=True), h + hidden @ last.weight.T + last.bias)
    assert far(layer(x, memory, causal=False), layer(x, memory, causal=True))


@every_model
@inits
def test_the_memory_is_written_once_after_the_last_layer_and_then_forgets(model, init):
    net = build(model, init=init)
    stack = stack_of(net)
    tokens, memory = tokens_for(net, 2, 5), F.normalize(randn(2, 5, 12), dim=-1)
    hidden, new = stack(tokens, memory)
    written = stack.writer(memory, hidden)
    moved = written + stack.forget.strength * stack.forget.bias
    close(new, moved / moved.norm(dim=-1, keepdim=True))
    assert sum(isinstance(m, MemoryWriter) for m in net.modules()) == 1
    (touched,) = torch.autograd.grad(hidden.sum(), stack.forget.bias, allow_unused=True)
    assert touched is None  # reading happens before writing


@every_model
@inits
def test_the_memory_stays_of_length_one(model, init):
    net = build(model, init=init)
    state = wander(net, net.initial_state(3))
    close(memory_in(state).norm(dim=-1), torch.ones(3, 5).double())


def test_the_decoder_sees_the_memory_through_the_encoder_alone():
    net = build(Memformer)
    state = wander(net, net.initial_state(2))
    tokens = tokens_for(net, 2, 4)
    other = state._replace(memory=F.normalize(randn(2, 5, 12), dim=-1))
    assert far(net(tokens, state)[0], net(tokens, other)[0])
    for layer in net.encoder.layers.layers:  # the encoder reads nothing from memory now
        torch.nn.init.zeros_(layer.look.attention.output.weight)
    close(net(tokens, state)[0], net(tokens, other)[0])


def test_before_the_first_segment_the_encoder_reads_the_start_token_alone():
    net = build(Memformer, start_token=9)
    state = net.initial_state(3)
    assert state.tokens[state.mask].tolist() == [9, 9, 9]
    after = net(tokens_for(net, 3, 4), state)[1].memory
    close(after, net.encoder(torch.full((3, 1), 9), net.encoder.initial_state(3))[1])
    assert Memformer(small_config()).initial_state(1).tokens[0, 0] == 22  # the last id


@every_model
def test_rows_of_a_batch_do_not_meet(model):
    net = build(model)
    tokens, state = tokens_for(net, 3, 6), net.initial_state(3)
    out, new = net(tokens, state)
    for row in range(3):
        alone, alone_state = net(tokens[row : row + 1], net.initial_state(1))
        close(out[row : row + 1], alone)
        close(memory_in(new)[row : row + 1], memory_in(alone_state))


# --- settings -------------------------------------------------------------------------------


def named(model, part):
    return {name for name, _ in model.named_parameters() if part in name}


@every_model
def test_the_paper_init_is_the_method_as_printed(model):
    net = model(small_config(init="paper"))
    assert not named(net, "keep_bias")
    assert not named(net, "convolution")
    assert named(net, "writer.norm")  # the figure of the paper normalises memory
    assert named(net, "look.norm")
    assert stack_of(net).writer.num_heads == 3  # as many as elsewhere
    assert stack_of(net).forget.strength == 1.0
    v = stack_of(net).forget.strength * stack_of(net).forget.bias
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(5))


def test_the_paper_init_sets_what_is_not_set_by_hand():
    printed = small_config(init="paper")
    assert (printed.self_weight, printed.forget_strength, printed.convolution) == (None, 1.0, 1)
    assert (printed.writer_heads, printed.reader_start, printed.temperature) == (3, 1.0, 0.25)
    by_hand = {"self_weight": 0.5, "forget_strength": 0.1, "convolution": 3, "writer_heads": 1}
    for name, value in by_hand.items():
        config = small_config(init="paper", **{name: value})
        assert asdict(config) == asdict(printed) | {name: value}


@given(heads=st.integers(1, 4), positional=st.booleans())
def test_the_paper_init_has_a_writer_head_for_every_head(heads, positional):
    """However the heads were given."""
    if positional:
        config = MemformerConfig(23, 12, heads, positions="none", init="paper")
    else:
        config = MemformerConfig(23, dim=12, num_heads=heads, positions="none", init="paper")
    assert config.writer_heads == config.num_heads == heads


@every_model
def test_a_config_by_hand_arrives_in_the_parts(model):
    net = model(
        small_config(
            self_weight=0.6,
            forget_strength=0.125,
            temperature=0.5,
            convolution=3,
            reader_start=0.0,
            normalise=False,
        )
    )
    stack = stack_of(net)
    assert stack.writer.num_heads == 2
    assert stack.writer.temperature == 0.5
    expected = 0.5 * math.log(7 * 0.6 / 0.4)  # τ (ln L + ln(g / (1 − g)))
    assert stack.writer.keep_bias.flatten().tolist() == pytest.approx([expected] * 2)
    assert stack.forget.strength == 0.125
    widths = {m.taps.shape for m in net.modules() if isinstance(m, ShortConvolution)}
    assert widths == {(3, 12)}
    assert not any(layer.look.attention.output.weight.any() for layer in stack.layers.layers)
    assert not named(net, "writer.norm")
    assert not named(net, "look.norm")
    assert named(model(small_config()), "writer.norm")


@every_model
def test_parts_have_their_own_convolution_of_their_own_kind(model):
    """Causal in front of a decoder, centred in front of an encoder, none where width is 1.

    Centred, it reaches as far back as ahead, so an even width gets one more.
    """
    for width, half in ((2, 1), (3, 1), (5, 2), (6, 3)):
        net = build(model, convolution=width)
        found = {
            name: (m.before, m.after)
            for name, m in net.named_modules()
            if isinstance(m, ShortConvolution)
        }
        causal, centred = (width - 1, 0), (half, half)
        expected = {
            MemformerLM: {"stack.layers.convolution": causal},
            MemformerEncoder: {"layers.convolution": centred},
            Memformer: {"encoder.layers.convolution": centred, "decoder.convolution": causal},
        }
        assert found == expected[model]
    plain = build(model, convolution=1)
    assert not any(isinstance(m, ShortConvolution) for m in plain.modules())


def test_the_convolution_stands_before_the_layers():
    """The layers of a model with it are those of one without, given mixed embeddings."""
    net = build(MemformerLM, convolution=4)
    tokens, memory = tokens_for(net, 2, 6), F.normalize(randn(2, 5, 12), dim=-1)
    layers, x = net.stack.layers, net.stack.embed(tokens)
    mixed = torch.zeros_like(x)
    for t in range(6):
        for back in range(min(4, t + 1)):
            mixed[:, t] += layers.convolution.taps[3 - back] * x[:, t - back]
    for layer in layers.layers:
        mixed = layer(mixed, memory, causal=True)
    close(net.stack(tokens, memory)[0], layers.norm(mixed))


def self_weights(net, segments, state):
    """What the writer kept of each slot while reading."""
    kept = []
    for tokens in segments:
        hidden, new = net.stack(tokens, state)
        kept.append(net.stack.writer(state, hidden, return_weights=True)[1][..., 0])
        state = new
    return torch.stack(kept)


@torch.no_grad()
def test_at_the_start_a_model_keeps_what_it_was_told_to_and_the_paper_init_does_not():
    """Averaged over models: one small model alone is off by .02 or so."""

    def kept(length, models, **changes):
        shares = []
        for _ in range(models):
            config = small_config(segment_length=length, dim=48, num_slots=16, **changes)
            net = MemformerLM(config).eval()
            pieces = tokens_for(net, 4, 3 * length).split(length, 1)
            shares.append(self_weights(net, pieces, net.initial_state(4)).mean())
        return float(torch.stack(shares).mean())

    for target, length in ((0.5, 16), (0.8, 64), (0.95, 64), (0.8, 128)):
        found = kept(length, 16, self_weight=target, writer_heads=1)
        assert found == pytest.approx(target, abs=0.03)
    assert kept(64, 4, init="paper") < 0.2  # a token or two, of 64, is the best match


@every_model
@settings(max_examples=10)
@given(seed=seeds, length=st.integers(1, 40), temperature=st.floats(0.05, 2.0))
def test_by_default_a_slot_keeps_four_fifths_between_equal_scores(
    model, seed, length, temperature
):
    torch.manual_seed(seed)
    net = build(model, segment_length=length, temperature=temperature)
    writer = stack_of(net).writer
    torch.nn.init.zeros_(writer.query.weight)
    _, weights = writer(randn(2, 5, 12), randn(2, length, 12), return_weights=True)
    kept = torch.full((2, 2, 5), 0.8).double()
    torch.testing.assert_close(weights[..., 0], kept, rtol=1e-5, atol=0)  # rounded to float32
    assert writer.keep_bias.requires_grad


@every_model
def test_a_silent_reader_makes_a_model_that_does_not_know_its_memory_yet(model):
    net = build(model, reader_start=0.0)
    state, tokens = wander(net, net.initial_state(2)), tokens_for(net, 2, 5)
    fresh = net.initial_state(2)
    if model is Memformer:
        fresh = state._replace(memory=fresh.memory)
    close(net(tokens, state)[0], net(tokens, fresh)[0])
    assert far(build(model)(tokens, state)[0], build(model)(tokens, fresh)[0])


@segment_models
def test_the_default_starts_silent_and_after_one_step_every_parameter_learns(model):
    """At first only the readers' outputs feel the memory; they open the way for all others."""
    defaults = MemformerConfig(23, dim=12, num_heads=3, num_slots=5, segment_length=7)
    assert defaults.reader_start == 0.0
    net = model(defaults).double()
    outputs = [layer.look.attention.output.weight for layer in stack_of(net).layers.layers]
    assert not any(weight.any() for weight in outputs)
    loss_of_last(net, tokens_for(net, 4, 28)).backward()
    assert all(weight.grad.any() for weight in outputs)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad()
    loss_of_last(net, tokens_for(net, 4, 28)).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_a_config_is_frozen_and_compares_by_value():
    config = small_config()
    with pytest.raises((AttributeError, TypeError)):
        config.dim = 24
    assert config == small_config()
    assert replace(config, num_slots=9).num_slots == 9
    assert config != replace(config, num_slots=9)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "dim",
        "num_heads",
        "writer_heads",
        "ffn_dim",
        "encoder_layers",
        "decoder_layers",
        "num_slots",
        "segment_length",
        "start_token",
        "convolution",
        "self_weight",
        "forget_strength",
        "reader_start",
        "temperature",
        "dropout",
    ],
)
def test_true_and_false_are_no_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        small_config(**{name: value})


@given(pairs=st.integers(0, 4), heads=st.integers(1, 4))
def test_rotary_positions_of_odd_heads_are_refused_with_the_settings(pairs, heads):
    odd = 2 * pairs + 1
    sizes = {"dim": odd * heads, "num_heads": heads, "writer_heads": 1}
    with pytest.raises(ValueError, match=f"{odd} features a head.*even"):
        small_config(**sizes, positions="rotary")
    for positions in ("relative", "none"):
        small_config(**sizes, positions=positions)


# --- order in time --------------------------------------------------------------------------


@segment_models
@positions
@inits
def test_a_changed_token_changes_no_logit_before_it(model, positions, init):
    net = build(model, positions=positions, init=init)
    tokens = tokens_for(net, 2, 16)  # segments of 7, 7 and 2
    before, state = run_segments(net, tokens, 7)
    for j in (0, 3, 6, 7, 10, 13, 15):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % net.config.vocab_size
        after, new_state = run_segments(net, changed, 7)
        close(after[0, :j], before[0, :j])
        close(after[1], before[1])
        assert far(after[0, j], before[0, j])
        assert j == 15 or not torch.equal(
            after[0, 15], before[0, 15]
        )  # it does reach later ones
        if model is MemformerLM:
            assert not torch.equal(new_state[0], state[0])


@positions
def test_the_encoder_looks_both_ways(positions):
    net = build(MemformerEncoder, positions=positions)
    tokens = tokens_for(net, 1, 6)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 23
    state = net.initial_state(1)
    assert far(net(changed, state)[0][0, 0], net(tokens, state)[0][0, 0])


@positions
def test_a_decoder_that_looked_ahead_would_be_noticed(positions):
    net = build(MemformerLM, positions=positions)
    net.stack.layers.causal = False
    tokens = tokens_for(net, 1, 6)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 23
    assert far(run_segments(net, changed, 7)[0][0, :5], run_segments(net, tokens, 7)[0][0, :5])


@segment_models
@widths
@given(seed=seeds, place=st.integers(0, 6))
@settings(max_examples=6)
def test_another_suffix_changes_no_logit_before_it_whatever_the_convolution(
    model, convolution, seed, place
):
    torch.manual_seed(seed)
    net = build(model, convolution=convolution)
    state, tokens = wander(net, net.initial_state(2)), tokens_for(net, 2, 7)
    edited = tokens.clone()
    edited[:, place:] = (tokens[:, place:] + torch.randint(1, 23, (2, 7 - place))) % 23
    before, after = net(tokens, state)[0], net(edited, state)[0]
    close(after[:, :place], before[:, :place])
    assert far(after[:, place], before[:, place])


@widths
def test_the_convolution_ends_at_the_border_of_a_segment(convolution):
    """What it mixes lies in one segment: the next knows the last one by the memory alone."""
    net = build(MemformerLM, convolution=convolution)
    memory, tokens = net.initial_state(2), tokens_for(net, 2, 14)
    scores, _ = run_segments(net, tokens, 7, memory)
    after = net.advance(tokens[:, :7], memory)
    assert torch.equal(scores[:, 7:], net(tokens[:, 7:], after)[0])


# --- padding --------------------------------------------------------------------------------


def padded_run(net, lengths, state, filler):
    """Segments in which row b holds `lengths[t][b]` real tokens, and then `filler`."""
    batch, size = len(lengths[0]), net.config.segment_length
    tokens, outputs, states = [], [], []
    for counts in lengths:
        width = int(torch.randint(max(1, *counts), size + 1, ()))
        real = torch.arange(width) < torch.tensor(counts)[:, None]
        segment = tokens_for(net, batch, width)
        tokens.append(segment)
        out, state = net(torch.where(real, segment, filler), state, real)
        outputs.append(out)
        states.append(state)
    return tokens, outputs, states


@every_model
@settings(max_examples=12)
@given(seed=seeds, data=st.data())
def test_padding_is_invisible(model, seed, data):
    """Each row equals the stream of its real tokens read alone; empty segments do nothing."""
    choice = st.sampled_from
    where = data.draw(choice(["rotary", "relative", "none"]))
    width = data.draw(choice([1, 2, 4, 6]))
    init = data.draw(choice(["learn", "paper"]))
    batch = data.draw(st.integers(1, 3))
    counts = st.lists(st.integers(0, 7), min_size=batch, max_size=batch)
    lengths = data.draw(st.lists(counts, min_size=1, max_size=4))
    torch.manual_seed(seed)
    net = build(model, positions=where, init=init, convolution=width)
    start = net.initial_state(batch)
    tokens, outputs, states = padded_run(net, lengths, start, data.draw(st.integers(0, 22)))
    for row in range(batch):
        state = net.initial_state(1)
        for t, segment in enumerate(tokens):
            n = lengths[t][row]
            if n:
                out, state = net(segment[row : row + 1, :n], state)
                close(outputs[t][row : row + 1, :n], out)
            assert outputs[t].isfinite().all()
            close(memory_in(states[t])[row : row + 1], memory_in(state))
            if isinstance(net, Memformer):
                kept, alone = states[t].tokens[row], state.tokens[0]
                assert torch.equal(states[t].mask[row], state.mask[0])
                assert torch.equal(kept[state.mask[0]], alone[state.mask[0]])


@every_model
def test_an_all_padding_segment_keeps_the_state_bit_for_bit(model):
    net = build(model)
    state = wander(net, net.initial_state(2))
    mask = torch.tensor([[True] * 4, [False] * 4])
    new = net(tokens_for(net, 2, 4), state, mask)[1]
    assert torch.equal(memory_in(new)[1], memory_in(state)[1])
    assert not torch.equal(memory_in(new)[0], memory_in(state)[0])
    if model is Memformer:
        assert torch.equal(new.tokens[1], state.tokens[1])
        assert torch.equal(new.mask[1], state.mask[1])


@every_model
@positions
def test_padding_that_is_not_masked_is_seen(model, positions):
    """Without the mask, other tokens in the padding change the memory; with it, they do not."""
    net = build(model, positions=positions)
    one, other = tokens_for(net, 1, 6), tokens_for(net, 1, 6)
    other[:, :4], other[:, 4:] = one[:, :4], (one[:, 4:] + 1) % 23
    mask = torch.arange(6)[None] < 4

    def after(tokens, mask):
        state = net(tokens, net.initial_state(1), mask)[1]
        return memory_in(net(one, state)[1])

    assert far(after(one, None), after(other, None))
    close(after(one, mask), after(other, mask))


@every_model
@positions
def test_padding_gives_and_takes_no_gradient(model, positions):
    net = build(model, positions=positions)
    net.train()
    tokens = torch.arange(12).view(2, 6)  # every id once, so that embeddings tell positions
    mask = torch.tensor([[True] * 3 + [False] * 3, [False] * 6])
    out, state = net(tokens, net.initial_state(2), mask)
    again, state = net(tokens_for(net, 2, 6) % 12 + 11, state)
    (out[mask].sum() + memory_in(state).sum() + again.sum()).backward()
    gradient = stack_of(net).embed.weight.grad
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    real = tokens[mask].tolist()
    assert gradient[real].abs().sum(dim=-1).all()
    assert not gradient[[i for i in range(11) if i not in real]].any()


@every_model
@widths
def test_padding_anywhere_is_invisible(model, convolution):
    """On the left too, where it shifts a row."""
    net = build(model, convolution=convolution)
    state, tokens = wander(net, net.initial_state(2)), tokens_for(net, 2, 4)
    filled = torch.cat((tokens_for(net, 2, 2), tokens, tokens_for(net, 2, 1)), dim=1)
    mask = torch.tensor([[False] * 2 + [True] * 4 + [False]]).expand(2, -1)
    out, new = net(tokens, state)
    padded, after = net(filled, state, mask)
    if model is not Memformer:  # its decoder too, but that would need a state shifted alike
        close(memory_in(after), memory_in(new))
    close(padded[:, 2:6], out)


# --- gradients ------------------------------------------------------------------------------


def loss_of_last(net, tokens):
    """A loss on the last segment only; what came before is felt through the state alone."""
    state = net.initial_state(len(tokens))
    for segment in split_segments(tokens, 7):
        out, state = net(segment, state)
    if isinstance(net, MemformerEncoder):
        return (out * randn(*out.shape)).sum()
    return F.cross_entropy(out.flatten(0, 1), tokens_for(net, *out.shape[:2]).flatten())


@every_model
@inits
@positions
def test_every_parameter_receives_a_gradient(model, init, positions):
    net = build(model, init=init, positions=positions).train()
    loss_of_last(net, tokens_for(net, 4, 28)).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    forget = stack_of(net).forget.bias.grad
    assert forget.abs().sum(dim=-1).all()  # every slot's start is learned
    if init == "learn":
        assert stack_of(net).writer.keep_bias.grad.all()  # in every head


def test_a_writer_whose_memory_is_cut_off_would_be_noticed():
    net = build(MemformerLM)
    original = net.stack.forward

    def cut(tokens, memory, mask=None):
        hidden, new = original(tokens, memory, mask)
        return hidden, new.detach()

    net.stack.forward = cut
    loss_of_last(net, tokens_for(net, 2, 21)).backward()
    without = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert "stack.writer.value.weight" in without


@every_model
@inits
def test_the_initial_memory_receives_a_gradient(model, init):
    net = build(model, init=init)
    state = wander(net, net.initial_state(2))
    memory = memory_in(state).clone().requires_grad_()
    start = state._replace(memory=memory) if model is Memformer else memory
    out, state = net(tokens_for(net, 2, 7), start)
    out, state = net(tokens_for(net, 2, 7), state)
    (gradient,) = torch.autograd.grad((out * randn(*out.shape)).sum(), memory)
    assert gradient.abs().sum(dim=-1).all()


def test_the_gradient_through_segments_is_that_of_finite_differences():
    net = build(MemformerLM, dim=6, num_heads=3, positions="relative", num_slots=2, ffn_dim=4)
    tokens = tokens_for(net, 1, 6)
    weights = randn(1, 3, 23)

    def run(memory):
        logits, after = net(tokens[:, :3], memory)
        logits, after = net(tokens[:, 3:], after)
        return (logits * weights).sum(), after

    assert torch.autograd.gradcheck(
        run, (F.normalize(randn(1, 2, 6), dim=-1).requires_grad_(),)
    )


# --- streams --------------------------------------------------------------------------------


@segment_models
@settings(max_examples=10)
@given(seed=seeds, pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_streaming_is_one_call_with_the_state_carried(model, seed, pieces):
    torch.manual_seed(seed)
    net = build(model)
    tokens = tokens_for(net, 2, 7 * sum(pieces) - 3)
    whole, end = run_segments(net, tokens, 7)
    state, scores, position = net.initial_state(2), [], 0
    for piece in pieces:
        part = tokens[:, position : position + 7 * piece]
        score, state = run_segments(net, part, 7, state)
        scores.append(score)
        position += 7 * piece
    assert torch.equal(torch.cat(scores, dim=1), whole)
    states_close(state, end)
    if len(pieces) > 1:  # a stream whose state is lost is another stream
        assert far(run_segments(net, tokens[:, 7 * pieces[0] :], 7)[0][:, 0], scores[1][:, 0])


@every_model
def test_a_reset_amid_a_batch_starts_a_fresh_stream(model):
    net = build(model)
    first, second = tokens_for(net, 3, 7), tokens_for(net, 3, 5)
    carried = net(first, net.initial_state(3))[1]
    reset = torch.tensor([False, True, False])
    out, state = net(second, reset_state(carried, net.initial_state(3), reset))
    for row in range(3):
        alone = net.initial_state(1)
        if not reset[row]:
            alone = net(first[row : row + 1], alone)[1]
        expected, expected_state = net(second[row : row + 1], alone)
        close(out[row : row + 1], expected)
        close(memory_in(state)[row : row + 1], memory_in(expected_state))
    assert far(out[1], net(second, carried)[0][1])


def cache_for(net):
    config = net.config
    source = config.num_slots if isinstance(net, MemformerLM) else config.segment_length
    return SegmentCache(config.decoder_layers, config.segment_length, source)


def decode(net, tokens, state, cache, mask):
    """Scores of a piece that goes on from what the cache holds; `mask` covers all of it."""
    if isinstance(net, MemformerLM):
        return net.output(net.stack.read(tokens, memory_of(state), mask, cache))
    filled = cache.layers[0].tokens.filled + tokens.shape[1]
    hidden, real, _ = net.encode(tokens_for(net, len(tokens), filled), state)
    return net.output(net.decoder(net.encoder.embed(tokens), hidden, mask, real, cache))


@segment_models
@positions
@widths
@settings(max_examples=6)
@given(
    seed=seeds,
    cuts=st.sets(st.integers(1, 6)),
    masked=st.sampled_from(["no", "right", "left", "holes"]),
)
def test_a_segment_in_pieces_with_a_cache_is_the_segment(
    model, positions, convolution, seed, cuts, masked
):
    """For two segments on one cache, cleared between them: the same layers, the same scores."""
    torch.manual_seed(seed)
    net = build(model, positions=positions, convolution=convolution)
    state, cache = wander(net, net.initial_state(3)), cache_for(net)
    for length in (7, int(torch.randint(1, 8, ()))):
        tokens = tokens_for(net, 3, length)
        right = torch.arange(length) < torch.randint(1, length + 1, (3, 1))
        holes = torch.rand(3, length) < 0.7
        mask = {"no": None, "right": right, "left": right.flip(1), "holes": holes}[masked]
        whole, after = net(tokens, state, mask)
        real = torch.ones(3, length, dtype=torch.bool) if mask is None else mask
        borders = sorted({0, length, *(cut for cut in cuts if cut < length)})
        with torch.no_grad():
            for begin, end in itertools.pairwise(borders):
                seen = None if mask is None else mask[:, :end]
                out = decode(net, tokens[:, begin:end], state, cache, seen)
                part = real[:, begin:end]
                close(out[part], whole[:, begin:end][part])
        cache.clear()
        state = detach_state(after)


@widths
def test_a_cache_that_is_not_cleared_at_a_border_would_be_noticed(convolution):
    net = build(MemformerLM, convolution=convolution)
    cache, memory = cache_for(net), net.initial_state(2)
    one, two = tokens_for(net, 2, 3), tokens_for(net, 2, 3)
    with torch.no_grad():
        decode(net, one, memory, cache, None)
        after = net.advance(one, memory)
        assert far(decode(net, two, after, cache, None), net(two, after)[0])
        cache.clear()
        close(decode(net, two, after, cache, None), net(two, after)[0])


@every_model
@inits
def test_a_stack_is_a_read_and_a_write(model, init):
    """The two halves of its forward, with a mask too."""
    net = build(model, init=init)
    stack = stack_of(net)
    tokens, memory = tokens_for(net, 3, 6), F.normalize(randn(3, 5, 12), dim=-1)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    for real in (None, mask):
        hidden, new = stack(tokens, memory, real)
        read = stack.read(tokens, memory, real)
        assert torch.equal(read, hidden)
        assert torch.equal(stack.write(memory, read, real), new)
    assert torch.equal(new[2], memory[2])


@segment_models
@settings(max_examples=10)
@given(seed=seeds, length=st.integers(1, 7), masked=st.booleans())
def test_advance_gives_the_state_of_the_full_call(model, seed, length, masked):
    torch.manual_seed(seed)
    net = build(model)
    state = wander(net, net.initial_state(2))
    tokens = tokens_for(net, 2, length)
    mask = torch.arange(length) < torch.randint(0, length + 1, (2, 1)) if masked else None
    states_close(net.advance(tokens, state, mask), net(tokens, state, mask)[1])


@every_model
@inits
def test_permuting_slots_permutes_the_memory_and_changes_no_output(model, init):
    net = build(model, init=init)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = copy.deepcopy(net)
    with torch.no_grad():
        bias = stack_of(shuffled).forget.bias
        bias.copy_(bias[order].clone())
    state, other = net.initial_state(2), shuffled.initial_state(2)
    for _ in range(3):
        tokens = tokens_for(net, 2, 6)
        out, state = net(tokens, state)
        same, other = shuffled(tokens, other)
        close(same, out)
        close(memory_in(other), memory_in(state)[:, order])
    assert far(memory_in(other), memory_in(state))


@every_model
def test_the_memory_is_felt_ten_segments_on(model):
    net = build(model, self_weight=0.99)
    state, other = net.initial_state(1), net(tokens_for(net, 1, 7), net.initial_state(1))[1]
    for _ in range(10):
        tokens = tokens_for(net, 1, 3)
        (out, state), (felt, other) = net(tokens, state), net(tokens, other)
    assert not torch.equal(out, felt)


@inits
def test_padding_at_the_end_of_a_state_is_left_out_and_changes_nothing(init, monkeypatch):
    """On the CPU; compiled code and other devices run over it under its mask."""
    net, results = build(Memformer, init=init), []
    segments = [tokens_for(net, 3, n) for n in (4, 7, 2, 5)]
    mask = torch.rand(3, 2) < 0.5
    mask[0] = False  # keeps its state, which is longer than the others'
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda flag=compiling: flag)
        state = net.initial_state(3)
        scores = []
        for segment in segments:
            masked = (mask,) if segment.shape[1] == 2 else ()
            logits, state = net(segment, state, *masked)
            scores.append(logits[mask] if masked else logits)
        results.append((tuple(scores), state))
    states_close(results[0][0], results[1][0])
    states_close(results[0][1], results[1][1])


# --- copies and precision -------------------------------------------------------------------


@every_model
def test_a_copy_is_equal_and_apart(model):
    net = build(model)
    tokens, state = tokens_for(net, 2, 5), wander(net, net.initial_state(2))
    twin = copy.deepcopy(net)
    assert torch.equal(twin(tokens, state)[0], net(tokens, state)[0])
    states_close(twin(tokens, copy.deepcopy(state))[1], net(tokens, state)[1])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert far(twin(tokens, state)[0], net(tokens, state)[0])


@every_model
@inits
@positions
def test_a_state_dict_makes_the_same_model(model, init, positions, tmp_path):
    net = build(model, init=init, positions=positions)
    other = build(model, init=init, positions=positions)
    tokens, state = tokens_for(net, 2, 5), net.initial_state(2)
    assert far(other(tokens, state)[0], net(tokens, state)[0])
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(tokens, state)[0], net(tokens, state)[0])
    states_close(other.initial_state(2), net.initial_state(2))


@every_model
@inits
@positions
def test_under_bf16_autocast_the_memory_stays_float32(model, init, positions):
    net = build(model, init=init, positions=positions).float().train()
    tokens, state = tokens_for(net, 2, 21), net.initial_state(2)
    outputs, exact_outputs, exact = [], [], net.initial_state(2)
    for segment in split_segments(tokens, 7):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, state = net(segment, state)
        assert memory_in(state).dtype == torch.float32
        outputs.append(out)
        close_out, exact = net(segment, exact)
        exact_outputs.append(close_out)
    out = torch.cat(outputs, dim=1).float()
    assert out.isfinite().all()
    (out.square().mean() + memory_in(state).sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    out = out.detach()
    error = (out - torch.cat(exact_outputs, dim=1).detach()).abs().mean()
    assert 0 < float(error) < 0.1 * float(out.abs().mean())


@every_model
def test_dropout_acts_in_training_only(model):
    net = build(model, dropout=0.5)
    tokens, state = tokens_for(net, 2, 7), net.initial_state(2)
    assert torch.equal(net(tokens, state)[0], net(tokens, state)[0])
    net.train()
    assert far(net(tokens, state)[0], net(tokens, state)[0])


def test_every_combination_of_settings_runs():
    options = itertools.product(MODELS, ("learn", "paper"), (1, 3), (1, 9), (1, 2))
    for model, init, layers, slots, heads in options:
        net = build(
            model,
            init=init,
            encoder_layers=layers,
            decoder_layers=layers,
            num_slots=slots,
            num_heads=heads,
            writer_heads=heads,
            dim=4 * heads,
            ffn_dim=None,
        )
        out, state = net(tokens_for(net, 2, 1), net.initial_state(2))
        assert out.isfinite().all()
        assert memory_in(state).shape == (2, slots, 4 * heads)


# --- as published models are used -----------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "changes", [{}, {"init": "paper", "positions": "relative"}, {"convolution": 1}]
)
def test_a_saved_model_comes_back_with_its_configuration(model, changes, tmp_path):
    net = model(small_config(**changes))
    net.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    again = model.from_pretrained(tmp_path)
    assert again.config == net.config
    assert not again.training
    tokens = tokens_for(net, 2, 7)
    left = net.eval()(tokens, net.initial_state(2))
    right = again(tokens, again.initial_state(2))
    assert torch.equal(left[0], right[0])


def test_what_is_no_saved_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Exception, match=r"(?i)vocab_size|model\.safetensors|not found"):
        MODELS[0].from_pretrained(tmp_path)
