"""Compiled models and replays are the eager ones. A file of its own: compiling takes long."""

import pytest
import torch
import torch.nn.functional as F
from helpers import SEGMENT_MODELS, build, close, memory_in, stack_of, tokens_for
from test_mrbp import WAYS, apart, assert_same, by_reference, draw, gradients, outcome, sizes
from torch import nn

from memformer.model import Memformer, MemformerLM

segment_models = pytest.mark.parametrize("model", SEGMENT_MODELS)


@segment_models
def test_a_compiled_model_is_the_eager_one(model):
    """Traced as one graph without a break; this backend needs no C++ compiler."""
    torch.compiler.reset()
    net = build(model, encoder_layers=1, decoder_layers=1)
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


@pytest.mark.parametrize("model", [MemformerLM, Memformer])
def test_compiled(model):
    """The whole model, without `advance`; gradients are those of the compiled reference."""
    torch.compiler.reset()  # what was compiled before only slows this down
    net = model(sizes(0.1, encoder_layers=1, decoder_layers=1))
    segments = draw(3, [True] * 3)
    net.compile(backend="aot_eager")
    expected = outcome(by_reference, net, segments)
    for way in WAYS:
        assert_same(outcome(way, net, segments), expected, 1e-5)


def test_compiled_by_the_default_backend():
    """A small cell: compiling a whole model takes a minute."""
    torch.compiler.reset()
    net = nn.Linear(4, 4)

    @torch.compile
    def cell(x, memory):
        return F.dropout(torch.tanh(net(x) + memory), 0.3)

    inputs = [torch.randn(2, 4) for _ in range(4)]

    def step(x, memory):
        memory = cell(x, memory)
        return memory.square().sum(), memory

    results = []
    for way in (by_reference, *WAYS):
        net.zero_grad()
        torch.manual_seed(3)
        try:
            way(step, inputs, torch.zeros(2, 4))
        except torch._dynamo.exc.BackendCompilerFailed as error:  # no compiler for C++ here
            pytest.skip(str(error)[:100])
        results.append(gradients(net))
    for found in results[1:]:
        assert apart(found, results[0]) <= 1e-5
