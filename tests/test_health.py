"""The health of slots on memories made by hand, and gradients by age against the full graph."""

import pytest
import torch
import torch.nn.functional as F
from helpers import build, tokens_for

from memformer.lab.health import GradientByAge, slot_health
from memformer.model import MemformerLM
from memformer.mrbp import memory_replay_backward
from memformer.segments import Segment


def segments_for(model, count, streams=3):
    found = []
    for t in range(count):
        tokens = tokens_for(model, streams, 7)
        begins = torch.full((streams,), t == 0)
        found.append(Segment(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), begins))
    return found


def test_slots_that_keep_everything_and_slots_that_keep_nothing():
    model = build(MemformerLM, writer_heads=1)
    with torch.no_grad():
        model.stack.writer.keep_bias.fill_(1e4)
    health = slot_health(model, segments_for(model, 3))
    assert health["self_weight"] == pytest.approx(1)
    assert (health["keepers"], health["overwriters"]) == (1, 0)
    length = model.stack.forget.strength * model.stack.forget.bias.norm(dim=-1).mean()
    assert health["v"] == pytest.approx(float(length))
    with torch.no_grad():
        model.stack.writer.keep_bias.fill_(-1e4)
    health = slot_health(model, segments_for(model, 3))
    assert (health["keepers"], health["overwriters"]) == (0, 1)


def test_slots_at_right_angles_and_slots_alike():
    model = build(MemformerLM, writer_heads=1)
    with torch.no_grad():
        model.stack.writer.keep_bias.fill_(1e4)
        model.stack.forget.bias.copy_(torch.eye(5, 12))
    health = slot_health(model, segments_for(model, 2))
    assert health["cosine"] == pytest.approx(0, abs=1e-4)
    assert health["slots"] == pytest.approx(5, rel=1e-3)
    with torch.no_grad():
        model.stack.forget.bias.copy_(torch.eye(12)[0].expand(5, 12))
    health = slot_health(model, segments_for(model, 2))
    assert health["cosine"] == pytest.approx(1, abs=1e-4)
    assert health["slots"] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients_by_age_are_those_of_the_full_graph(count):
    model, memories = build(MemformerLM), []
    pieces = [tokens_for(model, 2, 7) for _ in range(count)]

    def step(tokens, memory):
        logits, memory = model(tokens, memory)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), memory

    ages = GradientByAge()
    memory_replay_backward(step, pieces, model.initial_state(2), watch=ages)
    state, losses = model.initial_state(2), []
    for piece in pieces:
        state.retain_grad()
        memories.append(state)
        loss, state = step(piece, state)
        losses.append(loss)
    torch.autograd.backward(losses)
    assert ages.result() == pytest.approx([float(m.grad.norm()) for m in memories[::-1]])


def test_a_loss_that_was_scaled_does_not_scale_the_report():
    model, found = build(MemformerLM), []
    pieces = [tokens_for(model, 2, 7) for _ in range(2)]
    for scale in (1.0, 64.0):

        def step(tokens, memory, scale=scale):
            logits, memory = model(tokens, memory)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            return scale * loss, memory

        ages = GradientByAge(scale)
        memory_replay_backward(step, pieces, model.initial_state(2), watch=ages)
        found.append(ages.result())
    assert found[1] == pytest.approx(found[0])
