"""YAML with the core schema of version 1.2, on top of PyYAML, which follows version 1.1.

`1e-3` is a number; `yes`, `10:20` and `2024-01-01` are strings; `010` is ten; a key that is given twice is an error.
`dump` quotes a string that either version would read as something else, so load(dump(x)) == x.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


def load(text: str) -> Any:
    """The single document in `text`; None if it is empty. Raises ValueError with the position of an error in the text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


def dump(tree: Any) -> str:
    """`tree` of dicts, lists and scalars as text. Keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # the base class refuses keys that are not hashable
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key} is given twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_CORE_SCHEMA = (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "float",
        re.compile(r"""(?x) (?: [-+]? (?: \.[0-9]+ | [0-9]+(?:\.[0-9]*)? ) (?:[eE][-+]?[0-9]+)?
                              | [-+]? \.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )$"""),
        list("-+.0123456789"),
    ),
)

_Loader.yaml_implicit_resolvers = {}  # drop those of version 1.1
for _name, _pattern, _first_characters in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first_characters)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first_characters)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
