"""What several test files share: float64 tensors, small random models, tolerances."""

from types import SimpleNamespace

import torch

from memformer.config import MemformerConfig
from memformer.model import Memformer, MemformerEncoder, MemformerLM

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
MODELS = (MemformerLM, Memformer, MemformerEncoder)
SEGMENT_MODELS = (MemformerLM, Memformer)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(left, right):
    torch.testing.assert_close(left, right, **TIGHT)


def far(left, right):
    """The two differ by more than rounding: the negative of `close`."""
    return bool((left - right).abs().max() > 1e-6)


def small_config(**changes):
    """Small enough for float64 on one core, with odd sizes wherever they are allowed.

    With a short convolution, and readers that are heard from the start: silent ones would hide
    the memory from every test. `init="paper"` has what the paper says.
    """
    settings = {
        "vocab_size": 23,
        "dim": 12,
        "num_heads": 3,
        "ffn_dim": 17,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_slots": 5,
        "segment_length": 7,
    }
    if changes.get("init") != "paper":
        settings |= {"writer_heads": 2, "convolution": 4, "reader_start": 1.0}
    return MemformerConfig(**(settings | changes))


def build(model, **changes):
    """A float64 model in evaluation mode whose vectors of ones and zeros are random too."""
    net = model(small_config(**changes)).double().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:  # a layer norm at its start would hide a swapped weight
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def stack_of(model):
    """The part of a model that owns the memory."""
    return getattr(model, "stack", getattr(model, "encoder", model))


def tokens_for(model, batch_size, length):
    return torch.randint(model.config.vocab_size, (batch_size, length))


def memory_in(state):
    return state if isinstance(state, torch.Tensor) else state.memory


def states_close(left, right):
    """Nested states agree in their tensors."""
    if isinstance(left, torch.Tensor):
        if left.dtype.is_floating_point:
            close(left, right)
        else:
            assert torch.equal(left, right)
        return
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        states_close(one, other)


def corpus_of(lists, start=10):
    """What `DocumentStreams` asks of a corpus: rows of ids, and the id that opens each."""
    rows = tuple(torch.tensor(ids, dtype=torch.int64) for ids in lists)
    return SimpleNamespace(documents=rows, start=start)
