"""What a plug-in takes beside what the schema names: its own arguments, by their names and types."""

import functools
import inspect
import typing
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticUserError

from amt_ray.section import Section, given, shown, typed

EVERYTHING = "**"  # among the names of what a plug-in takes: it takes whatever it is given


@functools.cache
def parameters(kind: Any) -> Mapping[str, Any]:
    """Name -> type of the arguments by which a plug-in's class is made; `EVERYTHING` where it takes any.

    What ``**kwargs`` hands on to a parent's ``__init__`` is the parent's to name.
    """
    found: dict[str, Any] = {}
    takes_any = False
    for parent in kind.__mro__:
        if "__init__" not in vars(parent) or parent is object:
            continue
        own = list(inspect.signature(parent.__init__).parameters.values())[1:]
        types = _types(parent.__init__)
        named = [p.name for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found = {name: types.get(name, Any) for name in named} | found
        takes_any = any(p.kind is p.VAR_KEYWORD for p in own)
        if not takes_any:
            break
    return found | ({EVERYTHING: Any} if takes_any else {})


def checked(section: str, name: str, kind: Any, options: Mapping[str, Any], fixed: Collection[str]) -> dict[str, Any]:
    """The options as the plug-in's types have them.

    Args:
        section: Which part of the configuration they are of.
        name: The plug-in's.
        kind: Its class.
        options: As they were written.
        fixed: Arguments that are not options.

    Raises:
        ValueError: If the plug-in does not take one, or a value is not of its type.
    """
    known = {key: type_ for key, type_ in parameters(kind).items() if key not in fixed}
    for key in options:
        if key not in known and EVERYTHING not in known:
            raise ValueError(f"{section}.options of {name} must be of: {', '.join(known) or 'none'}, got {key}.")
    return of_types(f"{section}.options", {key: known.get(key, Any) for key in options}, options)


def of_types(where: str, types: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, each as its type has it: numbers are finite, and neither text nor true or false.

    Raises:
        ValueError: If one is not of its type; ``where`` says in which part of the configuration.
    """
    try:
        return given(_section(tuple(types.items())).model_validate(values))
    except ValidationError as error:
        first = error.errors()[0]
        key, message = first["loc"][0], first["msg"]
        got = values.get(str(key))
        raise ValueError(f"{where}.{key}: {message[0].lower()}{message[1:]}, got {shown(got)}.") from error


def _section(types: tuple[tuple[str, Any], ...]) -> type[Section]:
    try:
        return _made(types)
    except (PydanticUserError, TypeError):  # a type that pydantic does not know, as one's own plug-in may have
        return _made(tuple((name, Any) for name, _ in types))


@functools.cache
def _made(types: tuple[tuple[str, Any], ...]) -> type[Section]:
    return typed(dict(types))


def _types(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that is not there when the program runs
        return {}
