"""Mappings from YAML and JSON files, and from `key=value` overrides.

Numbers follow YAML 1.2: 1e-4 and 5e8 are numbers, 1:30 and 010 are not. A key given twice in a mapping is an error, in
JSON too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from softmask.lfs import NOT_THE_FILE, is_pointer


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers, which refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which `_Loader` would read as numbers."""


FLOAT, INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
_NUMBER = r"[-+]?(\.\d+|(0|[1-9][\d_]*)(\.[\d_]*)?)([eE][-+]?\d+)?"
_RESOLVERS = {
    first: [pair for pair in resolvers if pair[0] not in (FLOAT, INT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _one in (_Loader, _Dumper):
    _one.yaml_implicit_resolvers = {first: list(resolvers) for first, resolvers in _RESOLVERS.items()}
    _one.add_implicit_resolver(INT, re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+)$"), list("-+0123456789"))
    _one.add_implicit_resolver(
        FLOAT, re.compile(rf"(?:{_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), list("-+0123456789.")
    )


def parse(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 a SafeLoader


def dump(tree: dict[str, Any]) -> str:
    """YAML that `parse` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


# UnicodeDecodeError and JSON's errors are ValueErrors; tags such as !!int raise whatever their constructors raise.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, IndexError, AttributeError, TypeError)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in a JSON file if the name ends in .json.

    Raises:
        ConfigError: no such file, not YAML or JSON, or not a mapping. The message starts with `what`.
    """
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if is_pointer(text[:100].encode()):
            raise ConfigError(f"{what}: {path} {NOT_THE_FILE}")
        tree = json.loads(text, object_pairs_hook=_unique) if kind == "JSON" else parse(text)
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path}: {error.strerror}") from error
    except ConfigError:
        raise
    except NOT_YAML as error:
        raise ConfigError(f"{what}: {path} is not {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{what}: expected keys and values in {path}, got {describe(tree)}")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def override(tree: dict[str, Any], overrides: list[str]) -> None:
    """Apply `key=value` texts, with YAML values, to the tree.

    Raises:
        ConfigError: not key=value, not YAML, a key below a value, or a key given twice.
    """
    seen: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override: expected key=value such as train.steps=100, got {text!r}")
        if key in seen:
            hint = "; the shell expands braces and stars without quotes" if key.startswith("data.") else ""
            raise ConfigError(f"{key}: given twice, as {seen[key]!r} and {value!r}{hint}")
        seen[key] = value
        _put(tree, key, value)


def _put(tree: dict[str, Any], key: str, text: str) -> None:
    try:
        value = parse(text)
    except NOT_YAML as error:
        raise ConfigError(f"{key}: the value {text!r} of the override is not YAML") from error
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {name} is {describe(node)}, it has no keys to override")
    node[last] = "" if value is None else value


def describe(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"
