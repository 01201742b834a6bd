"""YAML as experiments are written in: a key once in a mapping, 1e-4 a number, 12:30 a text."""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

from amt_ray.section import ConfigError

INTEGER = re.compile(r"^[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


def parse(text: str, where: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ConfigError: With one line: ``where``, and what is wrong.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none is a ValueError
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} must be valid YAML ({reason}).") from error
    except RecursionError as error:
        raise ConfigError(f"{where} must be valid YAML (nested too deeply).") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for numbers, which are those of YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """A mapping; one with a key twice, of which the first would be lost, is no YAML."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                where = f"lines {lines[name]} and {line}" if line > lines[name] else f"line {line} twice"
                raise yaml.YAMLError(f"every key must be written once, got {key.value} in {where}")
            lines[name] = line
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; one that is part of itself is no experiment."""
        alias = self.peek_event().anchor if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if alias is not None and getattr(node, "end_mark", None) is None:
            raise yaml.YAMLError(f"a value must not contain itself, got *{alias}")
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
