"""Settings: checked, frozen, and every failure one line that says what is allowed."""

import copy
import dataclasses
import math
import pickle
from typing import Annotated, Any, Literal

import hypothesis
import pytest
from hypothesis import strategies as st

from memformer.settings import Count, Field, Positive, from_mapping, json_schema, settings


class OwnError(ValueError):
    pass


@settings(error=OwnError)
class Some:
    vocab: Count
    dim: Count = 64
    wide: Count | None = None
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rate: Positive = 0.25
    bias: float | None = None
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    word: str = ""
    seeds: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.dim % 2:
            raise ValueError(f"dim is {self.dim}; it must be even")


WRONG = [
    ({"dim": 0}, "dim is 0; it must be at least 1"),
    ({"dim": 2.5}, "dim is 2.5; it must be a whole number, at least 1"),
    ({"dim": True}, "dim is True; it must be a whole number"),
    ({"dim": 3}, "dim is 3; it must be even"),
    ({"wide": "x"}, "wide is 'x'; it must be a whole number, at least 1, or None"),
    ({"drop": 1.0}, "drop is 1.0; it must be finite and in [0, 1)"),
    ({"rate": math.nan}, "rate is nan; it must be finite and above 0"),
    ({"rate": math.inf}, "rate is inf; it must be finite and above 0"),
    ({"rate": True}, "rate is True"),
    ({"rate": 10**400}, "rate is 1"),
    ({"bias": math.inf}, "bias is inf; it must be a finite number, or None"),
    ({"kind": "c"}, "kind is 'c'; it must be one of 'a', 'b'"),
    ({"flag": 1}, "flag is 1; it must be true or false"),
    ({"word": 3}, "word is 3; it must be text"),
    ({"seeds": [1, "x"]}, "seeds[1] is 'x'"),
    ({"dims": 3}, "unknown setting 'dims'; did you mean 'dim'? Known are vocab, dim"),
    ({"vocab": 3, "zzz": 3}, "unknown setting 'zzz'. Known are"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(given, message):
    with pytest.raises(OwnError) as caught:
        Some(**{"vocab": 5} | given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@hypothesis.given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(Some)]),
        st.none()
        | st.text()
        | st.integers()
        | st.floats()
        | st.lists(st.integers() | st.text())
        | st.dictionaries(st.text(), st.integers()),
    )
)
def test_any_value_is_taken_or_refused_in_one_line(given):
    message = ""
    try:
        assert Some(**given)
    except OwnError as error:
        message = str(error)
    assert len(message) < 600
    assert "\n" not in message


def test_they_stay_dataclasses():
    some = Some(5, 6, rate=1)
    assert some.rate == 1.0
    assert dataclasses.asdict(some)["dim"] == 6
    assert dataclasses.replace(some, dim=8).dim == 8
    with pytest.raises(OwnError, match="dim is 7"):
        dataclasses.replace(some, dim=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        some.dim = 8
    assert pickle.loads(pickle.dumps(some)) == some == copy.deepcopy(some)
    for arguments, message in (
        ((), "vocab is missing"),
        ((0,), "vocab is 0"),
        ((1,) * 20, "20"),
    ):
        with pytest.raises(OwnError, match=message):
            Some(*arguments)


def test_a_mapping_knows_where_it_stands():
    assert from_mapping(Some, {"dim": 4}, within="model.", vocab=3).dim == 4
    for mapping, message in (
        ({"vocab": 3}, "unknown setting 'model.vocab'"),
        ({"dimm": 3}, "did you mean 'model.dim'"),
        ({"dim": 0}, "model.dim is 0"),
        ({3: 4}, "unknown setting 'model.3'"),
        ([], r"model is \[\]; it must be a mapping"),
    ):
        with pytest.raises(OwnError, match=message):
            from_mapping(Some, mapping, within="model.", vocab=3)


def test_the_schema_says_the_same():
    schema: dict[str, Any] = json_schema(Some)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["dim"] == {
        "default": 64,
        "minimum": 1,
        "title": "Dim",
        "type": "integer",
    }
    assert schema["properties"]["kind"]["enum"] == ["a", "b"]
