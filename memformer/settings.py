"""Settings that are checked: frozen dataclasses whose every failure is one line that helps.

`@settings` turns a class with annotations into a pydantic dataclass. It stays a dataclass in
every other way: `fields`, `asdict`, `replace`, pickle and positional arguments work as usual.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

__all__ = [
    "Count",
    "Field",
    "Positive",
    "Share",
    "check_known",
    "from_mapping",
    "json_schema",
    "setting_names",
    "settings",
]

T = TypeVar("T")

# The three kinds of number that most settings are.
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

CONFIG = ConfigDict(
    extra="forbid",  # an unknown setting is a mistake, never ignored
    strict=True,  # no "3" for 3, no True for 1
    allow_inf_nan=False,
)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def settings(*, error: type[ValueError] = ValueError) -> Callable[[type[T]], type[T]]:
    """Decorate a class to make it frozen settings that raise `error`, and nothing else.

    Ranges are annotations, `dim: Annotated[int, Field(ge=1)] = 64`; what takes several
    settings to judge stands in `__post_init__`, which raises `ValueError` with a whole
    sentence. A message reads "num_slots is 0; it must be at least 1". Raises `error` also for
    an unknown or missing setting.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = dataclass(cls, frozen=True, config=CONFIG)
        checked = made.__init__

        @wraps(checked)
        def construct(self: Any, *args: Any, **given: Any) -> None:
            names = [field.name for field in dataclasses.fields(made) if field.init]
            if len(args) > len(names):
                raise error(f"{len(args)} settings are given; there are {len(names)}")
            check_known(list(given), names, error)
            try:
                checked(self, *args, **given)
            except ValidationError as failure:
                raise error(explain(made, failure)) from None

        made.__init__ = construct  # type: ignore[method-assign]
        made.__settings_error__ = error  # type: ignore[attr-defined]
        return made  # type: ignore[return-value]  # pydantic's protocol hides the class

    return decorate


def setting_names(cls: type) -> list[str]:
    """The names of all settings of a class, in order."""
    return [field.name for field in dataclasses.fields(cls)]


def check_known(
    names: Sequence[object],
    known: Sequence[str],
    error: type[ValueError] = ValueError,
    within: str = "",
) -> None:
    """Raise `error` for a name that is not `known`, and say which one is near."""
    for name in names:
        if name in known:
            continue
        near = get_close_matches(str(name), known, 1)
        hint = f"; did you mean {within + near[0]!r}?" if near else "."
        there = ", ".join(within + other for other in known)
        raise error(f"unknown setting {shown(f'{within}{name}')}{hint} Known are {there}")


def from_mapping(
    cls: type[T], mapping: Mapping[str, Any], *, within: str = "", **given: Any
) -> T:
    """Settings from a mapping and those that are `given`, which the mapping may not hold.

    `within` is put before names in messages, as in "model." for "unknown setting model.dimm".
    Raises the error of the class.
    """
    error: type[ValueError] = getattr(cls, "__settings_error__", ValueError)
    if not isinstance(mapping, Mapping):
        what = within.rstrip(".") or "what is given"
        raise error(f"{what} is {shown(mapping)}; it must be a mapping of settings")
    known = [name for name in setting_names(cls) if name not in given]
    check_known(list(mapping), known, error, within)
    try:
        return cls(**given, **mapping)
    except error as failure:
        raise error(f"{within}{failure}") from None


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema of settings, with which an editor completes and checks a file of them."""
    schema: dict[str, Any] = TypeAdapter(cls).json_schema()
    return schema


def explain(cls: type, failure: ValidationError) -> str:
    """The first fault of a validation as one line."""
    first = failure.errors(include_url=False)[0]
    if first["type"] in ("value_error", "assertion_error"):  # raised by a check of the class
        return str(first["ctx"]["error"]) if "ctx" in first else str(first["msg"])
    name, *rest = [str(part) for part in first["loc"]] or [""]
    if name.isdigit():  # a positional argument
        name = setting_names(cls)[int(name)]
    if first["type"] in ("missing", "missing_argument"):
        return f"{name} is missing; it must be {allowed(cls, name)}"
    inside = [f"[{part}]" for part in rest if part.isdigit()]  # of a list of numbers, say
    if inside:
        return f"{name}{inside[0]} is {shown(first['input'])}; {first['msg'].lower()}"
    ranged = first["type"].startswith(("greater", "less", "literal"))
    return f"{name} is {shown(first['input'])}; it must be {allowed(cls, name, ranged)}"


def shown(value: object) -> str:
    """A value in a message: on one line, and never pages of it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; endless nesting
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}…"


def allowed(cls: type, name: str, only_range: bool = False) -> str:
    """What a setting may be, read off its annotation."""
    hints = get_type_hints(cls, include_extras=True)
    return describe(hints[name], only_range) if name in hints else "something else"


def describe(kind: Any, only_range: bool = False) -> str:
    """What values an annotation allows, in words."""
    bounds: dict[str, Any] = {}
    if get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
        for extra in extras:
            rules = extra.metadata if isinstance(extra, FieldInfo) else [extra]
            for rule in rules:
                for bound in ("ge", "gt", "le", "lt"):
                    if getattr(rule, bound, None) is not None:
                        bounds[bound] = getattr(rule, bound)
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        words = " or ".join(describe(option, only_range) for option in options)
        return f"{words}, or None" if type(None) in get_args(kind) else words
    words = range_in_words(bounds)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if kind is int:
        return words if words and only_range else ", ".join(filter(None, [WHOLE, words]))
    if kind is float:
        return "a finite number" if not words else f"finite and {words}"
    names = {bool: "true or false", str: "text"}
    origin = get_origin(kind) or kind
    kinds = {dict: "a mapping", list: "a list", tuple: "a tuple"}
    return names.get(kind) or kinds.get(origin) or str(origin)


WHOLE = "a whole number"


def range_in_words(bounds: Mapping[str, Any]) -> str:
    """`{"ge": 0, "lt": 1}` → "in [0, 1)"."""
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        return (
            f"in {'[' if 'ge' in bounds else '('}{low}, {high}{']' if 'le' in bounds else ')'}"
        )
    if low is not None:
        return f"at least {low}" if "ge" in bounds else f"above {low}"
    if high is not None:
        return f"at most {high}" if "le" in bounds else f"below {high}"
    return ""
