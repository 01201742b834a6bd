"""What every part of the configuration is, and how it says what is wrong."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

MAX_INTEGER = 2**32 - 1  # of a number without a bound of its own
MAX_NUMBER, LEAST_NUMBER = 1e9, 1e-12
BOUNDED = object()
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # what torch and the hash of `amt_ray.core.noise` take
SHOWN = 200  # letters of a wrong value


class ConfigError(ValueError):
    """A configuration that breaks a rule; the message is one line for the user."""


class InfeasiblePointError(ConfigError):
    """A point of a search whose values are sound, but not together."""


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to unknown keys.

    A number is a number, neither text nor true or false. It is finite, not below 1e-12 in size unless it is 0, and at
    most 1e9, or as an integer below 2 ** 32, where the field has no bound of its own. Text has no control characters. A
    free-form value is what JSON can hold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Section):
            return value
        kinds, sections = _asked(cls, str(info.field_name))
        for leaf in _leaves(value, into_mappings=not sections):  # a section looks at its own values
            if rule := _broken(leaf, kinds):
                raise PydanticCustomError("plain", "Input should be {rule}", {"rule": rule})
        return value


def typed(annotations: Mapping[str, Any]) -> type[Section]:
    """A section made of names and types, none of which must be given; its values are by name in `given`."""
    fields: Any = {f"f{i}": (kind, Field(None, alias=name)) for i, (name, kind) in enumerate(annotations.items())}
    return create_model("Options", __base__=Section, **fields)


def given(section: Section) -> dict[str, Any]:
    """The values that were set in a section of `typed`, by name."""
    fields = type(section).model_fields
    return {str(fields[key].alias): getattr(section, key) for key in fields if key in section.model_fields_set}


def shown(value: Any) -> str:
    """A value as it is written in YAML, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@functools.cache
def _asked(section: type[Section], name: str) -> tuple[frozenset[Any], bool]:
    """The kinds of value that a field takes, and whether a section is among them."""
    field = section.model_fields[name]
    annotation: Any = field.annotation
    kinds = _kinds(annotation) | ({BOUNDED} if _bounds(field.metadata) else set())
    return kinds, any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)


@functools.cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types and literal values in an annotation, at any depth, and BOUNDED where an integer has its own bound."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return frozenset(inner)
    if origin is Annotated:
        rules = [rule for part in inner[1:] for rule in (part, *getattr(part, "metadata", ()))]
        return _kinds(inner[0]) | ({BOUNDED} if _bounds(rules) else set())
    if origin is None:
        return frozenset([annotation])
    return frozenset().union(*(_kinds(part) for part in inner if part is not Ellipsis))


def _bounds(rules: Iterable[Any]) -> bool:
    return any(hasattr(rule, "le") or hasattr(rule, "lt") for rule in rules)


def _leaves(value: Any, into_mappings: bool) -> Iterator[Any]:
    """All plain values in lists and mappings, and the mappings' keys."""
    if isinstance(value, dict):
        for key, inner in value.items() if into_mappings else ():
            yield key
            yield from _leaves(inner, into_mappings)
    elif isinstance(value, Section):
        return
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, into_mappings)
    else:
        yield value


def _broken(leaf: Any, kinds: frozenset[Any]) -> str | None:
    """The rule that a plain value breaks where these kinds are asked for, or None; the rest is pydantic's."""
    if isinstance(leaf, str) and not leaf.isprintable():
        return "text without control characters"
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return "a finite number"
    if not (leaf is None or isinstance(leaf, bool | int | float | str)):
        return "what JSON can hold"
    if Any in kinds:
        return None
    words = [kind for kind in kinds if isinstance(kind, str)]
    if leaf in words or (isinstance(leaf, str) and str in kinds) or (isinstance(leaf, bool) and bool in kinds):
        return None
    if isinstance(leaf, str | bool) and kinds & {int, float}:
        return " or ".join(["a valid number" if float in kinds else "a valid integer", *words])
    if isinstance(leaf, str | int | float) and bool in kinds and not kinds & {int, float}:
        return " or ".join(["true or false", *words])
    if isinstance(leaf, int) and abs(leaf) > MAX_INTEGER and not kinds >= {int, BOUNDED}:
        return f"at most {MAX_INTEGER} in size"
    greatest = math.inf if BOUNDED in kinds else MAX_NUMBER
    if isinstance(leaf, float) and leaf and not LEAST_NUMBER <= abs(leaf) <= greatest:
        return f"0 or between {LEAST_NUMBER:g} and {MAX_NUMBER:g} in size"
    return None
