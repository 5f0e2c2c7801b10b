"""Models and states that leave Python: torch.export, saved states, vmap, compiled, pickled."""

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    MODELS,
    build,
    close,
    memory_in,
    small_config,
    states_close,
    tokens_for,
)
from torch.export import Dim

from memformer.model import Memformer, MemformerEncoder, MemformerLM, MemformerState
from memformer.segments import detach_state, map_state, run_segments

EVERY = pytest.mark.parametrize("kind", MODELS)


def exported(model):
    """The model as a graph for any batch size, and segments of five tokens."""
    batch = Dim("batch", min=1, max=1024)
    with torch.no_grad():
        state = model.initial_state(3)
        rows = {0: batch}
        inner = rows if isinstance(state, torch.Tensor) else MemformerState(*[rows] * 3)
        return torch.export.export(
            model, (tokens_for(model, 3, 5), state), dynamic_shapes=(rows, inner)
        )


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def same_stream(model, other, lengths, batch_size=4):
    """Both read the same segments, each with its own state."""
    with torch.no_grad():
        left = right = model.initial_state(batch_size)
        for length in lengths:
            tokens = tokens_for(model, batch_size, length)
            (out, left), (same, right) = model(tokens, left), other(tokens, right)
            close(same, out)
            states_close(right, left)
    assert type(right) is type(left)


@pytest.mark.parametrize(
    ("kind", "positions"),
    [*((kind, "rotary") for kind in MODELS), (MemformerLM, "relative"), (MemformerLM, "none")],
)
def test_an_exported_model_takes_any_batch(kind, positions):
    model = build(kind, positions=positions, num_heads=2)
    program = exported(model)
    for batch_size in (1, 4, 9):
        same_stream(model, program.module(), [5, 5, 5], batch_size)


@EVERY
def test_an_exported_model_comes_back_from_its_file(kind):
    model = build(kind, num_heads=2)
    same_stream(model, saved_and_loaded(exported(model)).module(), [5, 5, 5])


@EVERY
def test_a_state_is_saved_and_loaded_without_pickle(kind, tmp_path):
    model = build(kind)
    state = detach_state(run_segments(model, tokens_for(model, 2, 17), 7)[1])
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    states_close(again, state)
    assert type(again) is type(state)
    tokens = tokens_for(model, 2, 5)
    close(model(tokens, again)[0], model(tokens, state)[0])


@EVERY
def test_a_state_is_copied_and_pickled(kind):
    """The first one belongs to the graph of the bias that it starts from, until detached."""
    model = build(kind)
    first = model.initial_state(2)
    assert memory_in(first).requires_grad
    for state in (detach_state(first), detach_state(model(tokens_for(model, 2, 5), first)[1])):
        for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            states_close(twin, state)
            assert memory_in(twin).data_ptr() != memory_in(state).data_ptr()
    with torch.no_grad():
        states_close(copy.deepcopy(model.initial_state(2)), first)


@EVERY
def test_a_model_is_copied_and_pickled(kind):
    model = build(kind, num_heads=2)
    model(tokens_for(model, 2, 7), model.initial_state(2))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same_stream(model, twin, [7, 3])


@pytest.mark.parametrize("kind", [MemformerLM, MemformerEncoder])
def test_streams_under_vmap_are_streams_one_by_one(kind):
    model = build(kind, num_heads=2)
    tokens = torch.stack([tokens_for(model, 2, 5) for _ in range(3)])
    state = map_state(lambda t: t.expand(3, *t.shape), detach_state(model.initial_state(2)))
    # Ids and memory are checked by value, which vmap does not allow: as in compiled code.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        out, after = torch.vmap(model)(tokens, state)
    for i in range(3):
        alone, state_alone = model(tokens[i], state[i])
        close(out[i], alone)
        close(after[i], state_alone)


@pytest.mark.filterwarnings("error:.*assigned during export")
def test_a_model_as_it_was_made_exports_without_a_warning():
    exported(MemformerLM(small_config(num_heads=2)).eval())


@pytest.mark.parametrize("positions", ["relative", "none"])  # rotary: in test_model.py
def test_a_compiled_model_is_one_graph_for_every_segment(positions):
    torch.compiler.reset()
    model = build(MemformerLM, positions=positions, num_heads=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same_stream(model, compiled, [7, 7, 7], batch_size=2)


def test_models_of_other_types_export_too():
    """The tables of positions follow the dtype of the weights."""
    model = build(Memformer, num_heads=2).float()
    tokens = tokens_for(model, 3, 5)
    with torch.no_grad():
        out, _ = exported(model).module()(tokens, model.initial_state(3))
        torch.testing.assert_close(out, model(tokens, model.initial_state(3))[0])
