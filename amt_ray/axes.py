"""What a sweep's axes must be: values of their keys' types, and conditions that can hold."""

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from amt_ray import options, plugins
from amt_ray.config import ConfigError, Experiment, first_line, unknown_key
from amt_ray.core.encoder_names import encoder_sizes
from amt_ray.protocols import protocol
from amt_ray.section import Section, shown
from amt_ray.sections import DECIDED_AT_START
from amt_ray.sweep_section import Axis, Sweep

# free-form keys of a plug-in -> its kind, the key that names it, and what is not an option of it
PLUG_INS = {
    "masking.options": ("masking", "masking.strategy", ("mask_ratio", "throw_ratio", "grid")),
    "model.options": ("methods", "model.method", ("img_size", "in_chans")),
    "data.options": ("datasets", "data.name", ("root",)),
}


def check_axes(experiment: Experiment, sweep: Sweep) -> None:
    """Look at every axis by itself.

    Raises:
        ConfigError: If a key is unknown, a value is not of its key's type, or a condition can never hold.
    """
    flat = experiment.dotted()
    for key, axis in sweep.space.items():
        where = f"sweep.space.{key}"
        _of_a_trial(where, {key: axis.values or ()})
        for value in axis.values or axis.span or ():
            check_value(key, value, _names(key, axis, sweep, flat))
        _whole(where, key, axis, _names(key, axis, sweep, flat))
        for other, told in axis.when.items():
            values = told if isinstance(told, list) else [told]
            for value in values:
                check_value(other, value, _names(other, axis, sweep, flat), f"{where}.when.")
            _can_hold(where, other, values, sweep, flat)
    for point in (*sweep.baselines, sweep.retrain_best or {}):
        _of_a_trial("a point", {key: (value,) for key, value in point.items()})


def check_value(key: str, value: Any, named: Sequence[str] = (), where: str = "") -> None:
    """Refuse a value that is not of its key's type, whatever the other keys are.

    Args:
        key: Dotted.
        value: Of the key.
        named: The plug-ins of which it may be an option.
        where: Before the key in the message.

    Raises:
        ConfigError: If the key is unknown, or the value is not of its type.
    """
    section, name, inner = _field_at(key)
    try:
        if inner:
            _check_option(f"{key[: -len(inner) - 1]}", inner, value, named)
        elif key == "model.encoder" and isinstance(value, str):
            encoder_sizes(value)
        else:
            _alone(section, name).model_validate({name: value})
    except ValidationError as error:
        raise ConfigError(f"{where}{key.removesuffix(name)}{first_line(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error


def _field_at(key: str) -> tuple[type[Section], str, str]:
    """The section and the name of a field, and what lies below it in a free-form value."""
    section: type[BaseModel] = Experiment
    parts = key.split(".")
    for i, name in enumerate(parts):
        field = section.model_fields.get(name)
        if field is None:
            break
        below = _section_of(field)
        if i + 1 == len(parts) or (below is None and dict in _origins(field)):
            return section, name, ".".join(parts[i + 1 :])  # type: ignore[return-value]
        if below is None:
            break
        section = below
    raise ConfigError(unknown_key(key))


def _origins(field: FieldInfo) -> tuple[Any, ...]:
    return (getattr(field.annotation, "__origin__", None),)


def _section_of(field: FieldInfo) -> type[Section] | None:
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


@functools.cache
def _alone(section: type[Section], name: str) -> type[Section]:
    """A section of one of another's fields, without the rules between fields."""
    field = copy.copy(section.model_fields[name])
    fields: Any = {name: (field.annotation, field)}
    return create_model(section.__name__, __base__=Section, **fields)


def _check_option(section: str, inner: str, value: Any, named: Sequence[str]) -> None:
    """Of the plug-ins that may be meant, one must take the option."""
    if section == "eval.options":
        name, _, setting = inner.rpartition(".")
        protocol(name or inner, {setting: value} if name else value)
        return
    if section not in PLUG_INS:
        return
    kind, _, fixed = PLUG_INS[section]
    wrong: ValueError | None = None
    for name in named:
        try:
            options.checked(section.partition(".")[0], name, plugins.load(kind, name), {inner: value}, fixed)
            return
        except ValueError as error:
            wrong = error
    if wrong is not None:
        raise wrong


def _names(key: str, axis: Axis, sweep: Sweep, flat: Mapping[str, Any]) -> list[str]:
    """The plug-ins whose option a key may be: those that its condition names, else all that are tried."""
    about = next((PLUG_INS[section] for section in PLUG_INS if key.startswith(f"{section}.")), None)
    if about is None:
        return []
    told = axis.when.get(about[1], _possible(about[1], sweep, flat))
    return [name for name in (told if isinstance(told, list) else [told]) if isinstance(name, str)]


def _whole(where: str, key: str, axis: Axis, named: Sequence[str]) -> None:
    """Refuse a range of fractions for a key that takes whole numbers."""
    if axis.span is None or axis.integers is not None:
        return
    try:
        check_value(key, axis.span[0] + (axis.span[1] - axis.span[0]) / math.pi, named)
    except ConfigError as error:
        raise ConfigError(
            f"{where} must be integers or listed values, since {key} takes whole numbers, got {list(axis.span)} "
            "to draw fractions from."
        ) from error


def _possible(key: str, sweep: Sweep, flat: Mapping[str, Any]) -> list[Any]:
    """The values that a key can have in a point, as far as they are listed."""
    axis = sweep.space.get(key)
    own = [flat[key]] if key in flat else []
    if axis is None:
        return own
    return [*(axis.values or ()), *(own if axis.when else [])]


def _can_hold(where: str, key: str, values: Sequence[Any], sweep: Sweep, flat: Mapping[str, Any]) -> None:
    axis = sweep.space.get(key)
    if axis is not None and axis.span is not None:
        low, high = axis.span
        if any(isinstance(value, int | float) and low <= value <= high for value in values):
            return
        possible = f"{low} to {high}"
    else:
        there = _possible(key, sweep, flat)
        if any(value in values for value in there):
            return
        possible = ", ".join(map(str, there)) or "nothing"
    got = ", ".join(map(shown, values)) or "no value"
    raise ConfigError(f"{where}.when must hold in some point: {key} can be {possible}, got {got}.")


def _of_a_trial(where: str, values: Mapping[str, Sequence[Any]]) -> None:
    for key, some in values.items():
        if key.partition(".")[0] == "sweep":
            raise ConfigError(f"{where} must be about what a trial is, which is no sweep itself, got {key}.")
        if key in DECIDED_AT_START and "auto" in some:
            raise ConfigError(f"{where} must say what {key} is, got auto, which is decided once for the whole sweep.")
