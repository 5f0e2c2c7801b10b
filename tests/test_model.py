"""The whole models: causal order, padding, gradients, streams, traces, precision, copies."""

import copy
import itertools

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

from memformer.model import (
    Memformer,
    MemformerEncoder,
    MemformerLayer,
    MemformerLM,
    memory_of,
    trace,
)
from memformer.segments import (
    Corpus,
    DocumentStreams,
    detach_state,
    reset_state,
    run_segments,
    split_segments,
)
from memformer.writer import MemoryWriter, keep_bias_for

every_model = pytest.mark.parametrize("model", MODELS)
segment_models = pytest.mark.parametrize("model", SEGMENT_MODELS)
inits = pytest.mark.parametrize("init", ["keep", "paper"])
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
    for layer in net.encoder.layers:  # the encoder reads nothing from memory now
        torch.nn.init.zeros_(layer.look.output.weight)
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
    assert not named(net, "writer.norm")
    assert not named(net, "look.norm")
    assert stack_of(net).writer.num_heads == 3  # as many as elsewhere
    assert stack_of(net).forget.strength == 1.0
    v = stack_of(net).forget.strength * stack_of(net).forget.bias
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(5))


@every_model
def test_the_keep_init_starts_every_head_ahead_and_forgets_slowly(model):
    net = model(small_config(keep_bias=2.25, forget_strength=0.125))
    writer = stack_of(net).writer
    assert writer.keep_bias.flatten().tolist() == [2.25] * 2
    assert writer.num_heads == 2
    assert stack_of(net).forget.strength == 0.125
    assert {"writer.norm.weight", "writer.norm.bias"} <= {
        name.removeprefix("stack.").removeprefix("encoder.") for name in named(net, "norm")
    }


def test_at_the_start_the_keep_init_keeps_and_the_paper_init_does_not():
    """What `keep_bias_for` promises of equal scores roughly holds of those at the start."""
    kept = {}
    for init in ("keep", "paper"):
        config = small_config(
            init=init, segment_length=64, dim=48, keep_bias=keep_bias_for(0.9, 64)
        )
        net = MemformerLM(config).eval()
        record = trace(net, tokens_for(net, 8, 64).split(64, 1), net.initial_state(8))
        kept[init] = float(record.self_weight.mean())
    assert kept["keep"] > 0.4 > 0.05 > kept["paper"]  # about 0.77 and 1/65


@every_model
@settings(max_examples=10)
@given(seed=seeds, length=st.integers(1, 40), temperature=st.floats(0.05, 2.0))
def test_without_a_keep_bias_a_slot_keeps_four_fifths_between_equal_scores(
    model, seed, length, temperature
):
    torch.manual_seed(seed)
    net = build(model, keep_bias=None, segment_length=length, temperature=temperature)
    writer = stack_of(net).writer
    torch.nn.init.zeros_(writer.query.weight)
    _, weights = writer(randn(2, 5, 12), randn(2, length, 12), return_weights=True)
    kept = torch.full((2, 2, 5), 0.8).double()
    torch.testing.assert_close(weights[..., 0], kept, rtol=1e-5, atol=0)  # rounded to float32
    assert writer.keep_bias.requires_grad


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
        "keep_bias",
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
    net.stack.causal = False
    tokens = tokens_for(net, 1, 6)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 23
    assert far(run_segments(net, changed, 7)[0][0, :5], run_segments(net, tokens, 7)[0][0, :5])


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
    init = data.draw(choice(["keep", "paper"]))
    batch = data.draw(st.integers(1, 3))
    counts = st.lists(st.integers(0, 7), min_size=batch, max_size=batch)
    lengths = data.draw(st.lists(counts, min_size=1, max_size=4))
    torch.manual_seed(seed)
    net = build(model, positions=where, init=init)
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
    if init == "keep":
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
    net = build(model, keep_bias=2.0)
    state, other = net.initial_state(1), net(tokens_for(net, 1, 7), net.initial_state(1))[1]
    for _ in range(10):
        tokens = tokens_for(net, 1, 3)
        (out, state), (felt, other) = net(tokens, state), net(tokens, other)
    assert not torch.equal(out, felt)


# --- traces ---------------------------------------------------------------------------------


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@every_model
@inits
def test_a_trace_holds_every_read_and_write(model, init):
    net = build(model, init=init)
    lengths = (7, 4, 6)
    segments = [tokens_for(net, 2, n) for n in lengths]
    record = trace(net, segments, net.initial_state(2))
    read_length = written = 7  # the longest
    heads = stack_of(net).writer.num_heads
    assert record.write.shape == (3, 2, heads, 5, 1 + written)
    assert [r.shape for r in record.read] == [(3, 2, 3, read_length, 5)] * 2
    assert record.memories.shape == (4, 2, 5, 12)
    close(record.write.sum(dim=-1), torch.ones(3, 2, heads, 5).double())
    state = net.initial_state(2)
    close(record.memories[0], memory_of(state))
    for t, segment in enumerate(segments):
        state = net(segment, state)[1]
        close(record.memories[t + 1], memory_of(state))
        n = (1, *lengths)[t] if model is Memformer else lengths[t]  # it encodes what was before
        for read in record.read:
            close(read[t, :, :, :n].sum(dim=-1), torch.ones(2, 3, n).double())
            assert not read[t, :, :, n:].any()
    close(record.self_weight, record.write[..., 0].mean(dim=2))
    assert not record.write.requires_grad
    assert hooks_in(net) == 0


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


@inits
def test_traced_writes_rebuild_the_memory(init):
    """What the trace says was mixed is what was mixed."""
    net = build(MemformerLM, init=init)
    tokens, start = tokens_for(net, 2, 6), F.normalize(randn(2, 5, 12), dim=-1)
    record = trace(net, [tokens], start)
    hidden, _ = net.stack(tokens, start)
    values = net.stack.writer.value(hidden)
    for head, part in enumerate(torch.arange(12).chunk(net.stack.writer.num_heads)):
        weights = record.write[0, :, head]
        new = weights[..., :1] * start[..., part] + weights[..., 1:] @ values[..., part]
        moved = new + net.stack.forget.strength * net.stack.forget.bias[:, part]
        after = record.memories[1][..., part]
        scale = after.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        close(moved * scale, after)


@segment_models
@settings(max_examples=8)
@given(seed=seeds, lengths=st.lists(st.integers(1, 25), min_size=2, max_size=6))
def test_a_trace_of_document_streams_is_the_loop_with_masks_and_resets(model, seed, lengths):
    torch.manual_seed(seed)
    net = build(model)
    documents = tuple(torch.randint(22, (n,)) for n in lengths)
    segments = list(DocumentStreams(Corpus("made up", "train", documents, 22), 2, 7))
    record = trace(net, segments, wander(net, net.initial_state(2)))  # resets begin all afresh
    lanes, resets = [net.initial_state(1)] * 2, 0
    for t, segment in enumerate(segments):
        for lane in range(2):  # each lane alone, so that nothing can be mixed up
            row = slice(lane, lane + 1)
            before = net.initial_state(1) if segment.reset[lane] else lanes[lane]
            lanes[lane] = net(segment.tokens[row], before, segment.mask[row])[1]
            close(record.memories[t + 1][row], memory_in(lanes[lane]))
            resets += int(segment.reset[lane])
    close(record.memories[0], memory_in(net.initial_state(2)))
    assert resets == len(documents)


def test_padding_is_not_written_in_a_trace():
    net = build(Memformer)
    record = trace(net, [tokens_for(net, 2, 3)] * 2, net.initial_state(2))
    assert not record.write[0, ..., 2:].any()  # the start token alone
    assert not record.write[1, ..., 4:].any()  # three tokens
    assert record.write[1, ..., 1:4].all()


@every_model
def test_a_trace_leaves_no_hook_after_an_error_and_changes_nothing(model):
    net = build(model)
    tokens, bad = tokens_for(net, 2, 4), torch.full((2, 4), 99)
    expected = net(tokens, net.initial_state(2))[0]
    with pytest.raises(ValueError, match="99"):
        trace(net, [tokens, bad], net.initial_state(2))
    assert hooks_in(net) == 0
    assert torch.equal(net(tokens, net.initial_state(2))[0], expected)


@every_model
def test_a_trace_gives_every_module_its_own_training_flag_back(model):
    net = build(model, dropout=0.5).train()
    stack_of(net).layers[0].eval()  # frozen, as in fine-tuning
    stack_of(net).writer.eval()
    flags = {name: module.training for name, module in net.named_modules()}
    assert len(set(flags.values())) == 2
    tokens, bad = tokens_for(net, 2, 4), torch.full((2, 4), 99)
    once, again = (trace(net, [tokens], net.initial_state(2)) for _ in range(2))
    assert torch.equal(once.memories, again.memories)  # no dropout inside
    assert flags == {name: module.training for name, module in net.named_modules()}
    with pytest.raises(ValueError, match="99"):
        trace(net, [tokens, bad], net.initial_state(2))
    assert flags == {name: module.training for name, module in net.named_modules()}


# --- copies, precision, compilation ---------------------------------------------------------


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


@segment_models
def test_a_compiled_model_is_the_eager_one(model):
    """Traced as one graph without a break; this backend needs no C++ compiler."""
    torch.compiler.reset()
    net = build(model)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    state = other = net.initial_state(2)
    for _ in range(2):
        tokens = tokens_for(net, 2, 7)
        out, state = net(tokens, state)
        same, other = compiled(tokens, other)
        close(same, out)
        close(memory_in(other), memory_in(state))
    (gradient,) = torch.autograd.grad(out.sum(), stack_of(net).forget.bias, retain_graph=True)
    (compiled_gradient,) = torch.autograd.grad(same.sum(), stack_of(net).forget.bias)
    close(compiled_gradient, gradient)


@every_model
def test_dropout_acts_in_training_only(model):
    net = build(model, dropout=0.5)
    tokens, state = tokens_for(net, 2, 7), net.initial_state(2)
    assert torch.equal(net(tokens, state)[0], net(tokens, state)[0])
    net.train()
    assert far(net(tokens, state)[0], net(tokens, state)[0])


def test_every_combination_of_settings_runs():
    options = itertools.product(MODELS, ("keep", "paper"), (1, 3), (1, 9), (1, 2))
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
@pytest.mark.parametrize("changes", [{}, {"init": "paper", "positions": "relative"}])
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
