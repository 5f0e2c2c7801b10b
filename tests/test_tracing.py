"""Traces: every read and every write of a memory, and a model that is left as it was."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MODELS,
    SEGMENT_MODELS,
    build,
    close,
    memory_in,
    randn,
    stack_of,
    tokens_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.lab.tracing import trace
from memformer.model import Memformer, MemformerLM, memory_of
from memformer.segments import DocumentStreams, detach_state

every_model = pytest.mark.parametrize("model", MODELS)
segment_models = pytest.mark.parametrize("model", SEGMENT_MODELS)
inits = pytest.mark.parametrize("init", ["learn", "paper"])
seeds = st.integers(0, 2**32 - 1)


def wander(model, state):
    """A state as it is amid a stream: no slot where it began."""
    for _ in range(3):
        length = int(torch.randint(1, model.config.segment_length + 1, ()))
        state = model(tokens_for(model, len(memory_in(state)), length), state)[1]
    return detach_state(state)


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
    segments = list(DocumentStreams(SimpleNamespace(documents=documents, start=22), 2, 7))
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
    stack_of(net).layers.layers[0].eval()  # frozen, as in fine-tuning
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


def test_weights_that_were_asked_for_are_not_computed_twice():
    net, asked = build(MemformerLM), []
    for module in net.modules():
        if type(module).__name__ == "MemoryWriter":
            forward = module.forward
            module.forward = lambda *a, f=forward, **k: asked.append(k) or f(*a, **k)
    trace(net, [tokens_for(net, 2, 4)], net.initial_state(2))
    assert sum("return_weights" in options for options in asked) == 1


def test_what_has_no_writer_and_what_has_no_segments_is_refused():
    with pytest.raises(ValueError, match="0 MemoryWriter"):
        trace(torch.nn.Linear(2, 2), [torch.zeros(1, 1).long()], torch.zeros(1, 1, 2))
    net = build(MemformerLM)
    with pytest.raises(ValueError, match="no segments"):
        trace(net, [], net.initial_state(1))
