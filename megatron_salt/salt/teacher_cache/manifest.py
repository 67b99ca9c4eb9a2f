"""What a cache holds, and whether a run may use it. Pure.

A cache is a directory. `cache.json` names teacher, data and everything else that decides what the hidden states are: a run with other
facts is refused. It also names what decides only how they were rounded. A run that would round in another way may read, and is told; it
does not write, so that all samples of a cache were computed in one way. `*.shard` are the hidden states (shards.py). `held_out-*.json` are
the teacher's figures on held-out data, which no run has to compute again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_salt.data.json_records import check_fields, check_types, read_record, write_record
from megatron_salt.data.manifest import DatasetFacts
from megatron_salt.errors import UserError
from megatron_salt.files import whole_file
from megatron_salt.selection.score_format import dataset_differences
from megatron_salt.small_files import one_line, read_json

FORMAT = 1
MANIFEST = "cache.json"
_TEMPORARY = re.compile(re.escape(MANIFEST) + r"\.[0-9a-f]{32}\.tmp(\.tmp)?")
"""Names of a manifest that a run is writing, or that a killed run left."""


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """The contents of `cache.json`."""

    datasets: tuple[DatasetFacts, ...]
    """In --data-path order, by which samples are numbered."""
    seq_length: int
    teacher: str
    """Fingerprint of the teacher's checkpoint."""
    hidden_size: int
    dtype: str
    """float32 or bfloat16."""
    fp8: str | None
    """Format and recipe of the teacher's FP8, or "none". None, in no file: the recipe is the default of a GPU that is not known yet."""
    masking: dict[str, Any]
    """What changes the teacher's input beside tokens: reset_position_ids, reset_attention_mask, and the eod id that they look for."""
    rounding: dict[str, Any]
    """What changes the last bits alone, such as the teacher's tensor-parallel size."""

    def differences(self, other: CacheManifest) -> list[str]:
        """What makes the hidden states of two caches different, a text for each fact. Neither paths nor rounding count."""
        own, others = self._facts(), other._facts()
        if None in (self.fp8, other.fp8):
            own["fp8"] = others["fp8"] = None
        plain = [
            f"{name} is {own.get(name)} there and {others.get(name)} here"
            for name in dict.fromkeys([*own, *others])
            if own.get(name) != others.get(name)
        ]
        return dataset_differences(self.datasets, other.datasets) + plain

    def rounding_differences(self, other: CacheManifest) -> list[str]:
        """What changes the last bits between two caches, a text for each fact."""
        names = dict.fromkeys([*self.rounding, *other.rounding])
        return [
            f"{name} was {self.rounding.get(name)} and is {other.rounding.get(name)} here"
            for name in names
            if self.rounding.get(name) != other.rounding.get(name)
        ]

    @property
    def key(self) -> str:
        """Hex digest of what the hidden states are, rounding included and paths not: every shard of the cache has it."""
        datasets = [{name: value for name, value in asdict(one).items() if name != "prefix"} for one in self.datasets]
        facts = asdict(self) | {"datasets": datasets}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _facts(self) -> dict[str, Any]:
        facts = {name: value for name, value in asdict(self).items() if name not in ("datasets", "masking", "rounding")}
        return {name.replace("_", " "): value for name, value in (facts | self.masking).items()}


def read_manifest(directory: Path) -> CacheManifest | None:
    """The manifest of a cache; None where there is none yet. UserError where the directory holds something else."""
    path = directory / MANIFEST
    try:
        _, raw = read_record(path, (FORMAT,), "give --teacher-cache another directory")
    except FileNotFoundError:
        names = [one.name for one in directory.iterdir()] if directory.is_dir() else []
        if path.exists():  # another run made it just now
            return read_manifest(directory)
        if directory.exists() and (not directory.is_dir() or not all(map(_TEMPORARY.fullmatch, names))):
            raise UserError(
                f"--teacher-cache {directory} is no cache: it has no {MANIFEST} and is not empty; give a new directory"
            ) from None
        return None
    check_fields(CacheManifest, raw, path)
    for facts in raw["datasets"]:
        check_types(DatasetFacts, facts, path)
    try:
        return CacheManifest(**{**raw, "datasets": tuple(DatasetFacts(**facts) for facts in raw["datasets"])})
    except TypeError as error:
        raise UserError(f"{path}: its datasets cannot be read ({error})") from None


def refuse_other(directory: Path, manifest: CacheManifest) -> CacheManifest | None:
    """The manifest of the cache in `directory`, which may be used by a run with `manifest`; None where there is none yet.

    UserError, naming what differs with both values, where it is a cache of something else.
    """
    found = read_manifest(directory)
    if found is not None and (differences := found.differences(manifest)):
        raise UserError(f"--teacher-cache {directory} holds something else: {'; '.join(differences)}; give another directory")
    return found


def claim(directory: Path, manifest: CacheManifest) -> CacheManifest:
    """Make `directory` a cache of `manifest`, unless it is a cache already. Returns its manifest. Any number of runs may call at once.

    UserError as `refuse_other`, and where the directory cannot be written.
    """
    found = refuse_other(directory, manifest)
    if found is None:
        temporary = directory / f"{MANIFEST}.{uuid.uuid4().hex}.tmp"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_record(asdict(manifest), temporary, FORMAT)
            with contextlib.suppress(FileExistsError):
                os.link(
                    temporary, directory / MANIFEST
                )  # a link, unlike a rename, replaces nothing: the first run's file stays
            temporary.unlink()
        except OSError as error:
            raise UserError(f"--teacher-cache {directory} cannot be written: {error.strerror} ({error.filename})") from error
        found = refuse_other(directory, manifest)
        assert found is not None, directory
    return found


# ---- the teacher on held-out data --------------------------------------------------------------------------------------


def held_out_path(directory: Path, facts: Mapping[str, Any]) -> Path:
    """File of the teacher's figures on the held-out data that `facts` describe."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return directory / f"held_out-{key}.json"


def read_held_out(path: Path, names: Sequence[str]) -> dict[str, float] | None:
    """The teacher's figures on held-out data; None where there are none. `names` must be among them. UserError for a damaged file."""
    try:
        figures = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--teacher-cache: {path} cannot be read ({error}); delete it, and the figures are computed again"
        ) from None
    numbers = isinstance(figures, dict) and all(type(value) in (int, float) for value in figures.values())
    if not numbers or not set(names) <= set(figures):
        raise UserError(f"--teacher-cache: {path} is damaged: it holds {one_line(figures, 80)}; delete it")
    return {name: float(value) for name, value in figures.items()}


def write_held_out(path: Path, figures: Mapping[str, float]) -> None:
    """Write the teacher's figures on held-out data. Raises OSError."""
    with whole_file(path, temporary=path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")) as temporary:
        temporary.write_text(json.dumps(dict(figures), indent=1) + "\n")
