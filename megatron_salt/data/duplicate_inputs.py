"""Whether several inputs are the same data twice: under two names, through a link, or as a copy.

Files are told apart by device and inode, then by their bytes, which are read only of files of one size. Datasets are told apart by their
.bin file, by what they hold, and by the files that their manifests say they were made of. What is found is a UserError
that names the first pair, unless --allow-duplicate-inputs is given. Pure.
"""

from __future__ import annotations

import filecmp
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from megatron_salt.data.manifest import Manifest, read_manifest, sampled_fingerprint, sampled_hash
from megatron_salt.errors import UserError

WAY_OUT = "leave one out, or allow it with --allow-duplicate-inputs"


def refuse_repeated_files(flag_name: str, paths: Sequence[str], compare_bytes: Callable[[str], bool]) -> None:
    """UserError where two paths are one file, or two regular files with the same bytes. compare_bytes: of which paths."""
    _refuse(flag_name, _first_pair(paths, lambda path: path), "names {0} twice")
    _refuse(flag_name, _first_pair(paths, _identity), "names one file twice, as {0} and as {1}")
    copied = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) and compare_bytes(path)]
    try:
        for sizes in _groups(copied, os.path.getsize):
            for group in _groups(sizes, lambda path: sampled_hash(Path(path))):
                same = next((pair for pair in itertools.pairwise(group) if filecmp.cmp(*pair, shallow=False)), None)
                _refuse(flag_name, same, "names {0} and {1}, which hold the same bytes")
    except OSError as error:
        raise UserError(f"{flag_name} {error.filename} cannot be read: {error.strerror}") from None


def refuse_repeated_directories(flag_name: str, paths: Sequence[str]) -> None:
    """UserError where two paths are one directory."""
    _refuse(flag_name, _first_pair(paths, _identity), "names one directory twice, as {0} and as {1}")


def refuse_repeated_datasets(flag_name: str, prefixes: Sequence[str]) -> None:
    """UserError where two prefixes are of one dataset, of two with the same tokens, or made of one source file. Their files are there."""
    _refuse(flag_name, _first_pair(prefixes, lambda prefix: prefix), "names {0} twice")
    _refuse(
        flag_name,
        _first_pair(prefixes, lambda prefix: _identity(prefix + ".bin")),
        "names one dataset twice, as {0} and as {1}",
    )
    if len(prefixes) < 2:
        return
    manifests = {prefix: read_manifest(prefix) for prefix in prefixes}
    for group in _groups(prefixes, lambda prefix: (os.path.getsize(prefix + ".bin"), os.path.getsize(prefix + ".idx"))):
        pairs = (
            (one, other) for found in _groups(group, sampled_fingerprint) for i, other in enumerate(found) for one in found[:i]
        )
        same = next((pair for pair in pairs if not _differ(manifests[pair[0]], manifests[pair[1]])), None)
        _refuse(flag_name, same, "names {0} and {1}, which hold the same tokens")
    _refuse_shared_sources(flag_name, manifests)


def _refuse_shared_sources(flag_name: str, manifests: dict[str, Manifest | None]) -> None:
    made: dict[Hashable, str] = {}
    for prefix, manifest in manifests.items():
        for source in manifest.sources if manifest else ():
            key = (manifest.json_key if manifest else "", source.file, source.size_bytes, source.lines, source.text_bytes)
            other = made.setdefault(key, prefix)
            if other != prefix and source.text_bytes:
                raise UserError(f"{flag_name} names {other} and {prefix}, which were both made of {source.file}; {WAY_OUT}")


def _refuse(flag_name: str, pair: tuple[str, str] | None, found: str) -> None:
    if pair is not None:
        raise UserError(f"{flag_name} {found.format(*pair)}; {WAY_OUT}")


def _identity(path: str) -> Hashable:
    """What all names of a file have in common."""
    try:
        state = os.stat(path)
    except OSError:  # whoever opens it will say what is wrong
        return os.path.realpath(path)
    return state.st_dev, state.st_ino


def _first_pair(names: Iterable[str], key: Callable[[str], Hashable]) -> tuple[str, str] | None:
    """The first two names with one key."""
    seen: dict[Hashable, str] = {}
    for name in names:
        found = key(name)
        if found in seen:
            return seen[found], name
        seen[found] = name
    return None


def _groups(names: Iterable[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    """Names with one key, wherever there are several."""
    found: dict[Hashable, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return [group for group in found.values() if len(group) > 1]


def _differ(one: Manifest | None, other: Manifest | None) -> bool:
    """Whether manifests tell apart what the samples of blocks do not."""
    return one is not None and other is not None and one.fingerprint != other.fingerprint
