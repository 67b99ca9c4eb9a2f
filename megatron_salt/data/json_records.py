"""JSON files that describe data: how they are written, read and checked against a dataclass. Pure.

The manifest of a dataset, of a score index and of a selection is such a file. It names the version of its format. The checks are
our own and not msgspec's, because their messages name the field, its type and the value that was found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_salt import small_files
from megatron_salt.errors import UserError, file_error
from megatron_salt.files import whole_file

_JSON_TYPES = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
}


def write_record(facts: Mapping[str, Any], path: Path, version: int) -> None:
    """Write `facts` and the version of their format as JSON. The file appears whole or not at all."""
    # Durable: the caller may delete files that this one replaces.
    with whole_file(path, durable=True) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        json.dump({"format": version, **facts}, stream, indent=2)
        stream.write("\n")


def read_record(path: Path, versions: Sequence[int], remedy: str) -> tuple[int, dict[str, Any]]:
    """(version, facts) of a file that `write_record` wrote in one of `versions`.

    Raises FileNotFoundError where there is no file. Raises UserError where it cannot be understood; `remedy` says what to do then.
    """
    try:
        raw = small_files.read_json(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise file_error(f"{path} is not a readable manifest ({error}); {remedy}", error) from None
    except ValueError as error:
        raise UserError(f"{path} is not a readable manifest ({error}); {remedy}") from None
    if not isinstance(raw, dict) or raw.get("format") not in versions:
        version = small_files.one_line(raw.get("format"), 24) if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{path} has manifest format {version}, this version reads {' and '.join(map(str, versions))}")
    return int(raw.pop("format")), raw


def check_fields(kind: type, raw: Mapping[str, Any], path: Path) -> None:
    """UserError unless `raw`, which was read from `path`, has exactly the fields of the dataclass `kind`, with the right types."""
    expected = {each.name for each in fields(kind)}
    if set(raw) != expected:
        raise UserError(f"{path}: fields missing {sorted(expected - set(raw))}, unknown {sorted(set(raw) - expected)}")
    check_types(kind, raw, path)


def check_types(kind: type, raw: Mapping[str, Any], path: Path) -> None:
    """UserError unless those fields that `raw` has are of the types of the dataclass `kind`. Missing fields have defaults.

    A tuple is a list in JSON; any type that JSON has no word for is a mapping. A count or a size is at least 0.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: {kind.__name__} should be a mapping, it is {str(raw)[:80]!r}")
    for each in fields(kind):
        if each.name not in raw:
            continue
        if type(raw[each.name]) is int and raw[each.name] < 0 and each.name != "shuffle_seed":
            raise UserError(f"{path}: {each.name} is {raw[each.name]}, less than 0")
        types = (list,) if str(each.type).startswith("tuple") else _JSON_TYPES.get(str(each.type), (dict,))
        if type(raw[each.name]) not in types:
            raise UserError(f"{path}: {each.name} should be {each.type}, it is {str(raw[each.name])[:80]!r}")
