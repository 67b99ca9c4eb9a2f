"""Which runs may use a cache, and how; and which samples a teacher computes beside one. Without ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_salt.config import SaltConfig
from megatron_salt.data.manifest import DatasetFacts
from megatron_salt.data.masking import Masking
from megatron_salt.errors import UserError
from megatron_salt.model.precision import Precision
from megatron_salt.salt.teacher_cache import manifest as manifest_module
from megatron_salt.salt.teacher_cache.manifest import (
    MANIFEST,
    CacheManifest,
    claim,
    held_out_path,
    read_held_out,
    read_manifest,
    refuse_other,
    write_held_out,
)
from megatron_salt.salt.teacher_cache.missing import num_computed, rows_to_compute
from megatron_salt.salt.teacher_cache.of_run import manifest_of, why_layers_are_needed
from tests.salt.test_load_teacher import FITTING

FACTS = CacheManifest(
    datasets=(DatasetFacts("words", "content:aaaa", 80),), seq_length=16, teacher="sha256:aaaa", hidden_size=16, dtype="float32",
    fp8="none", masking={"reset_position_ids": False, "reset_attention_mask": False, "eod": None},
    rounding={"samples of a forward pass": 2, "device": "a CPU with 1 threads"},
)  # fmt: skip


def test_the_first_run_makes_the_cache_and_the_next_one_uses_it(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "cache"
    assert read_manifest(directory) is None and not directory.parent.exists()
    moved = replace(FACTS, datasets=(replace(FACTS.datasets[0], prefix="elsewhere"),), rounding={"device": "another"})
    assert claim(directory, FACTS) == claim(directory, moved) == refuse_other(directory, moved) == FACTS
    assert [path.name for path in directory.iterdir()] == [MANIFEST]
    prefix_alone = replace(FACTS, datasets=moved.datasets)
    assert len({one.key for one in (FACTS, prefix_alone, claim(directory, moved))}) == 1 < len({FACTS.key, moved.key})
    assert FACTS.rounding_differences(moved) == [
        "samples of a forward pass was 2 and is None here",
        "device was a CPU with 1 threads and is another here",
    ]


def test_runs_that_start_at_once_make_one_cache(tmp_path: Path) -> None:
    """One finds a directory that another one has just made, with a manifest that is not there yet: as a kill leaves it too."""
    directory, write = tmp_path / "cache", manifest_module.write_record

    def late(facts: Mapping[str, Any], path: Path, version: int) -> None:
        write(facts, path, version)
        with mock.patch.object(manifest_module, "write_record", write):
            others.append(claim(directory, replace(FACTS, rounding={"device": "another"})))

    others: list[CacheManifest] = []
    with mock.patch.object(manifest_module, "write_record", late):
        found = claim(directory, FACTS)
    assert [found] == others and found.rounding == {"device": "another"}
    (directory / MANIFEST).rename(directory / f"{MANIFEST}.{32 * 'a'}.tmp")  # killed
    assert claim(directory, FACTS) == FACTS


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(teacher="sha256:bbbb"), "teacher is sha256:aaaa there and sha256:bbbb here"),
        (dict(seq_length=32), "seq length is 16 there and 32 here"),
        (dict(hidden_size=32), "hidden size is 16 there and 32 here"),
        (dict(dtype="bfloat16"), "dtype is float32 there and bfloat16 here"),
        (dict(fp8="hybrid mxfp8"), "fp8 is none there and hybrid mxfp8 here"),
        (dict(masking={"reset_position_ids": True, "reset_attention_mask": False, "eod": 256}),
         "reset position ids is False there and True here; eod is None there and 256 here"),
        (dict(masking={**FACTS.masking, "of a later release": 1}), "of a later release is None there and 1 here"),
        (dict(datasets=(DatasetFacts("words", "content:bbbb", 80),)),
         "fingerprint of dataset 1, words, is content:aaaa there and content:bbbb here"),
        (dict(datasets=(*FACTS.datasets, DatasetFacts("more", "content:cccc", 3))), "dataset 2, more, is here alone"),
    ],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused_with_both_values(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    claim(tmp_path, FACTS)
    with pytest.raises(UserError) as refused:
        claim(tmp_path, replace(FACTS, **change))
    assert str(refused.value) == f"--teacher-cache {tmp_path} holds something else: {told}; give another directory"
    assert read_manifest(tmp_path) == FACTS
    claim(tmp_path / "other", replace(FACTS, **change))
    with pytest.raises(UserError, match="holds something else: "):
        claim(tmp_path / "other", FACTS)


def test_the_recipe_of_fp8_is_the_one_that_is_used_whether_or_not_a_flag_names_it(tmp_path: Path) -> None:
    """A GPU decides the default; before it is known nothing is refused for it."""
    train = SimpleNamespace(
        masking=Masking(256, False, False, False),
        dataset_facts=lambda: FACTS.datasets,
        windows=[SimpleNamespace(seq_length=16)],
    )

    def fp8(recipe: str | None, **flags: Any) -> str | None:
        salt = SaltConfig(teacher_load="teacher", kd_steps=1, **flags)
        return manifest_of(salt, FITTING, train, torch.bfloat16, {}, recipe).fp8  # type: ignore[arg-type]

    assert fp8("mxfp8") == "none"
    assert fp8("mxfp8", teacher_fp8_format="hybrid") == "hybrid mxfp8"
    assert fp8("mxfp8", teacher_fp8_format="hybrid", teacher_fp8_recipe="tensorwise") == "hybrid tensorwise"
    assert fp8(None, teacher_fp8_format="hybrid") is None
    claim(tmp_path, replace(FACTS, fp8="hybrid mxfp8"))
    refuse_other(tmp_path, replace(FACTS, fp8=None))
    with pytest.raises(UserError, match="fp8 is hybrid mxfp8 there and hybrid tensorwise here"):
        refuse_other(tmp_path, replace(FACTS, fp8="hybrid tensorwise"))


def test_what_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is no cache: it has no cache.json and is not empty"):
        claim(tmp_path, FACTS)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"cache.json is not a readable manifest .*; give --teacher-cache another directory"):
        claim(tmp_path, FACTS)
    (tmp_path / MANIFEST).write_text('{"format": 1, "teacher": "sha256:aaaa"}')
    with pytest.raises(UserError, match=r"cache.json: fields missing \['datasets'"):
        claim(tmp_path, FACTS)
    with pytest.raises(UserError, match="thesis.txt/cache.*Not a directory"):
        claim(tmp_path / "thesis.txt" / "cache", FACTS)


def test_figures_on_held_out_data_are_found_by_what_they_are_of(tmp_path: Path) -> None:
    path = held_out_path(tmp_path, {"sets": {"valid": ["a", 8]}})
    assert path != held_out_path(tmp_path, {"sets": {"valid": ["a", 16]}})
    assert read_held_out(path, ("loss",)) is None
    write_held_out(path, {"loss": 1 / 3, "accuracy": 0.25})
    assert read_held_out(path, ("loss", "accuracy")) == {"loss": 1 / 3, "accuracy": 0.25}
    for damaged in ("", '{"loss": 1.0}', '{"loss": "1", "accuracy": 1}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match=rf"{path.name} .*delete it"):
            read_held_out(path, ("loss", "accuracy"))


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(), None),
        (dict(holds_all=False), "it does not hold all samples of stage 1"),
        (dict(evaluates=True), "it has no figures of the teacher on this held-out data"),
        (dict(precision=Precision(fp8_format="hybrid")), "the teacher's FP8 is checked"),
        (dict(own_ids=True), "what the teacher gives to ids that are not shared is checked"),
        (dict(bos=1), "the teacher's loss with and without BOS is measured"),
    ],
)
def test_the_teachers_layers_are_loaded_where_something_needs_them(change: dict[str, Any], reason: str | None) -> None:
    asked: dict[str, Any] = dict(
        holds_all=True,
        precision=Precision(),
        own_ids=False,
        bos=None,
        evaluates=False,
    )
    assert why_layers_are_needed(**(asked | change)) == reason


# ---- what the teacher computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "present, forward, rows",
    [
        ("....", 2, [0, 1, 2, 3]),
        ("xxxx", 2, []),
        ("..xx..", 2, [0, 1, 4, 5]),  # whole passes keep their samples
        ("x.x.x.", 2, [1, 3, 5, 5]),
        ("xx.xxxxx", 4, [2, 2, 2, 2]),
    ],
)
def test_missing_samples_are_packed_into_whole_passes(present: str, forward: int, rows: list[int]) -> None:
    has = np.array([one == "x" for one in present])
    assert rows_to_compute(has, forward).tolist() == rows
    assert num_computed(np.concatenate([has, ~has]), 2, forward) == len(rows) + len(rows_to_compute(~has, forward))
