"""Refuses the same data twice: under two names, through a link, or as a copy; and held-out data that is training data.

Files are compared by device and inode, and files of equal size by their bytes. Datasets are compared by their .bin file, by their contents,
and by the source files in their manifests. Few bytes are read, and only where sizes are equal. A UserError names the first pair of
equals, unless --allow-duplicate-inputs or --allow-valid-in-train is given. Windows that --valid-share holds out are not looked at. Pure.
"""

from __future__ import annotations

import filecmp
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from megatron_salt.data.manifest import Manifest, read_manifest, sampled_fingerprint, sampled_hash
from megatron_salt.errors import UserError, file_error
from megatron_salt.files import real_path

WAY_OUT = "leave one out, or allow it with --allow-duplicate-inputs"


def refuse_repeated_files(flag_name: str, paths: Sequence[str], compare_bytes: Callable[[str], bool]) -> None:
    """UserError where two paths are one file, or regular files with the same bytes. compare_bytes: path -> whether its bytes count."""
    _refuse(flag_name, _first_pair(paths, lambda path: path), "names {0} twice")
    _refuse(flag_name, _first_pair(paths, _identity), "names one file twice, as {0} and as {1}")
    copied = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) and compare_bytes(path)]
    try:
        for sizes in _groups(copied, os.path.getsize):
            for group in _groups(sizes, lambda path: sampled_hash(Path(path))):
                same = next((pair for pair in itertools.pairwise(group) if filecmp.cmp(*pair, shallow=False)), None)
                _refuse(flag_name, same, "names {0} and {1}, which hold the same bytes")
    except OSError as error:
        raise file_error(f"{flag_name} {error.filename or ', '.join(copied)} cannot be read: {error.strerror}", error) from None


def refuse_repeated_directories(flag_name: str, paths: Sequence[str]) -> None:
    """UserError where two paths are one directory."""
    _refuse(flag_name, _first_pair(paths, _identity), "names one directory twice, as {0} and as {1}")


def refuse_repeated_datasets(flag_name: str, prefixes: Sequence[str]) -> None:
    """UserError where two prefixes name one dataset, datasets with the same tokens, or datasets made of one source file.

    Their files must exist.
    """
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
            (one, other)
            for equals in _groups(group, sampled_fingerprint)
            for i, other in enumerate(equals)
            for one in equals[:i]
        )
        same = next((pair for pair in pairs if not _differ(manifests[pair[0]], manifests[pair[1]])), None)
        _refuse(flag_name, same, "names {0} and {1}, which hold the same tokens")
    _refuse_shared_sources(flag_name, manifests)


def refuse_training_data(train: Sequence[str], valid: Sequence[str]) -> None:
    """UserError, with both names, where a dataset of `valid` has the data of one of `train`. Their files must exist."""
    manifests = {prefix: read_manifest(prefix) for prefix in (*train, *valid)}
    for held_out in valid:
        for other in train:
            how = _overlap(other, manifests[other], held_out, manifests[held_out])
            if how is not None:
                raise UserError(
                    f"--valid-data-path {held_out} {how} --data-path {other}, so that its loss would be one of training; "
                    "give other data, --valid-share, or allow it with --allow-valid-in-train"
                )


def _refuse_shared_sources(flag_name: str, manifests: dict[str, Manifest | None]) -> None:
    made: dict[Hashable, str] = {}
    for prefix, manifest in manifests.items():
        for source in manifest.sources if manifest else ():
            key = (manifest.json_key if manifest else "", source.file, source.size_bytes, source.lines, source.text_bytes)
            other = made.setdefault(key, prefix)
            if other != prefix and source.text_bytes:
                raise UserError(f"{flag_name} names {other} and {prefix}, which were both made of {source.file}; {WAY_OUT}")


def _refuse(flag_name: str, pair: tuple[str, str] | None, message: str) -> None:
    if pair is not None:
        raise UserError(f"{flag_name} {message.format(*pair)}; {WAY_OUT}")


def _identity(path: str) -> Hashable:
    """Equal for all names of one file: its device and inode."""
    try:
        state = os.stat(path)
    except OSError:  # opening it will give the error
        return real_path(path)
    return state.st_dev, state.st_ino


def _first_pair(names: Iterable[str], key: Callable[[str], Hashable]) -> tuple[str, str] | None:
    """The first two names with the same key."""
    seen: dict[Hashable, str] = {}
    for name in names:
        value = key(name)
        if value in seen:
            return seen[value], name
        seen[value] = name
    return None


def _groups(names: Iterable[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    """Groups of two or more names with the same key."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _differ(one: Manifest | None, other: Manifest | None) -> bool:
    """Whether the manifests show that two datasets differ, although their sampled blocks are equal."""
    return one is not None and other is not None and one.fingerprint != other.fingerprint


def _overlap(one: str, manifest: Manifest | None, other: str, others: Manifest | None) -> str | None:
    """How dataset `other` repeats dataset `one`, in words; None: it does not."""
    files = [os.stat(prefix + ".bin") for prefix in (one, other)]
    if os.path.samestat(*files):
        return "is the same file as"
    sizes = [(os.path.getsize(prefix + ".bin"), os.path.getsize(prefix + ".idx")) for prefix in (one, other)]
    if sizes[0] == sizes[1] and not _differ(manifest, others) and sampled_fingerprint(one) == sampled_fingerprint(other):
        return "holds the same tokens as"
    if manifest is not None and others is not None and (both := _sources(manifest) & _sources(others)):
        return f"was made of the same text ({min(both, key=str)[0]}) as"
    return None


def _sources(manifest: Manifest) -> set[tuple[Hashable, ...]]:
    """Source files of a dataset, as far as they are recorded."""
    return {
        (source.file, source.size_bytes, source.lines, source.text_bytes, manifest.json_key, manifest.shard)
        for source in manifest.sources
        if source.text_bytes
    }
