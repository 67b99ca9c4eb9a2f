"""A run's configuration as YAML text, and back.

YAML is nested by section and uses the names of the fields. Unknown names are refused, with a suggestion.
Types are checked here. The sections' own checks run when the sections are constructed.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin

from megatron_salt import yaml_core
from megatron_salt.config.data import NAMED_SETS
from megatron_salt.config.run import RunConfig, field_types, sections
from megatron_salt.errors import UserError, did_you_mean


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; `from_yaml` reads it back to an equal RunConfig."""
    tree = {name: {key: _listed(value) for key, value in vars(getattr(config, name)).items()} for name in sections()}
    return yaml_core.dump(tree)


def from_yaml(text: str, source: str) -> RunConfig:
    """The checked configuration in a YAML text, with defaults for what it does not set. `source` names the text in a UserError."""
    values = read_sections(text, source)
    try:
        return RunConfig(**{name: section(**values.get(name, {})) for name, section in sections().items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_sections(text: str, source: str) -> dict[str, dict[str, Any]]:
    """{section: {field: value}} of what a YAML text sets. Types are checked; the sections' own checks have not run."""
    tree = _load(text, source)
    for name in tree:
        if name not in sections():
            home = next((section for section, members in sections().items() if name in field_types(members)), None)
            hint = f" (it belongs under {home}:)" if home else did_you_mean(str(name), sections())
            raise UserError(f"{source}: unknown section {name}{hint}; sections are {', '.join(sections())}")
    return {name: _section_values(name, sections()[name], entries, source) for name, entries in tree.items()}


def typed_leaf(name: Any, value: Any, where: str, known: Iterable[type] = ()) -> tuple[str, Any]:
    """(section, value with the field's type) of one setting, `name: value`, outside of its section.

    known: sections that may be named; default all. where: begins the message. Raises UserError.
    """
    allowed = {section: field_types(kind) for section, kind in sections().items() if not known or kind in known}
    home = next((section for section, members in allowed.items() if name in members), None)
    if home is None:
        names = [leaf for members in allowed.values() for leaf in members]
        raise UserError(f"{where}: unknown flag {name}{did_you_mean(str(name).replace('-', '_').lstrip('_'), names)}")
    if name in NAMED_SETS:
        value = _words_of_sets(value)
    return home, typed_value(value, field_types(sections()[home])[name], f"{where}.{name}")


def _load(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml_core.load(text)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected sections ({', '.join(sections())}) at the top, got {_described(tree)}")
    return tree


def _section_values(name: str, section: type, entries: Any, source: str) -> dict[str, Any]:
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise UserError(f"{source}: {name}: expected a mapping of settings, got {_described(entries)}")
    hints = field_types(section)
    for key in entries:
        if key not in hints:
            home = next((other for other, members in sections().items() if key in field_types(members)), None)
            hint = f" (it belongs under {home}:)" if home else did_you_mean(str(key), hints)
            raise UserError(f"{source}: unknown key {name}.{key}{hint}")
    words = {key: _words_of_sets(value) if key in NAMED_SETS else value for key, value in entries.items()}
    return {key: typed_value(value, hints[key], f"{source}: {name}.{key}") for key, value in words.items()}


def _words_of_sets(value: Any) -> Any:
    """{NAME: prefix or [weight, prefix, ...]} as the words of a command line, NAME=prefix; anything else as it is."""
    if not isinstance(value, dict):
        return value
    sets = {name: words if isinstance(words, list) else [words] for name, words in value.items()}
    return [
        f"{name}={word}" if number == 0 and isinstance(word, (str, int, float)) else word
        for name, words in sets.items()
        for number, word in enumerate(words or [""])
    ]


def typed_value(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; an int may stand for a float, a list for a tuple. `where` begins the error message."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = next(choice for choice in choices if choice is not type(None))
        return None if value is None else typed_value(value, inner, where)
    if origin is Literal:
        if value in choices:
            return value
        raise UserError(
            f"{where}: expected one of {', '.join(choices)}, got {_described(value)}{did_you_mean(str(value), choices)}"
        )
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list such as [a, b], got {_described(value)}")
        return tuple(typed_value(_as_word(item, choices[0]), choices[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    expected = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]
    raise UserError(
        f"{where}: expected {expected}, got {_described(value)}"
        + ("; put it in quotes" if hint is str and isinstance(value, (int, float)) else "")
    )


def _as_word(item: Any, kind: type) -> Any:
    """A number in a list of strings as a string: YAML may have [0.7, web, 0.3, code], as a command line has."""
    return str(item) if kind is str and type(item) in (int, float) else item


def _described(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def unchecked(section: type, values: Mapping[str, Any]) -> Any:
    """A section with `values` over its defaults, without its checks: flags may still complete it."""
    instance: Any = object.__new__(section)
    for field in fields(section):
        assert field.name in values or field.default is not MISSING, f"{section.__name__}.{field.name} has no default"
        object.__setattr__(instance, field.name, values.get(field.name, field.default))
    return instance
