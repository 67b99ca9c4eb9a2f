"""Any value of any JSON file beside data or a checkpoint may be wrong: its reader succeeds, or gives an error of one line."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_salt.checkpoint.compatibility import RunIdentity, state_from
from megatron_salt.checkpoint.run_state import OpenedCheckpoint, SaltState
from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.config import ModelConfig
from megatron_salt.data.manifest import DatasetFacts, Manifest, Source, manifest_path, read_manifest, write_manifest
from megatron_salt.errors import UserError
from megatron_salt.metrics.history import read_curve
from megatron_salt.salt.schedule import Schedule
from megatron_salt.selection.score_format import IndexManifest, columns
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.selection.selection_file import Selection, write_selection
from megatron_salt.tools.inspect_checkpoint import _about
from tests.support.mutations import paths_in, value_at
from tests.support.selections import write_index

OTHERS: tuple[Any, ...] = (None, True, -1, 0, 3, 1.5, 1e308, 2**63, "", "../x", "float128", [], [None], [[1]], {}, {"a": {}})
SCORES = IndexManifest(
    datasets=(DatasetFacts("web", "content:1", 12),),
    seq_length=8,
    vocabulary=256,
    tokenizer="t",
    teacher="sha256:0",
    teacher_step=10,
    teacher_directory="teacher",
    top_k=(2,),
    masking={"eod_mask_loss": False},
    dtype="float32",
    micro_batch_size=1,
    block_samples=4,
)


def mutations(tree: Any) -> Iterator[Any]:
    """Copies of `tree`: each has one value replaced, one key left out, or one unknown key."""
    for path in paths_in(tree):
        for other in OTHERS:
            changed = copy.deepcopy(tree)
            value_at(changed, path[:-1])[path[-1]] = other
            yield changed
        if isinstance(value_at(tree, path[:-1]), dict):
            changed = copy.deepcopy(tree)
            del value_at(changed, path[:-1])[path[-1]]
            yield changed
            changed = copy.deepcopy(tree)
            value_at(changed, path[:-1])["unknown"] = 1
            yield changed


def dataset(folder: Path) -> tuple[Path, Callable[[], Any]]:
    source = Source(
        file="a.jsonl",
        size_bytes=10,
        lines=1,
        documents=1,
        empty_documents=0,
        rejected_lines=0,
        text_bytes=8,
        reasons={"empty": 1},
    )
    manifest = Manifest(
        documents=1,
        tokens=8,
        dtype="uint16",
        bin_bytes=16,
        idx_bytes=42,
        bin_hash="a",
        idx_hash="b",
        sampled="sampled:c",
        tokenizer_type="ByteLevelTokenizer",
        tokenizer_fingerprint="t",
        vocab_size=257,
        eod=256,
        append_eod=True,
        json_key="text",
        sources=(source,),
    )
    write_manifest(manifest, manifest_path(str(folder / "data")))
    return manifest_path(str(folder / "data")), lambda: read_manifest(str(folder / "data"))


def score_index(folder: Path) -> tuple[Path, Callable[[], Any]]:
    kinds = columns(SCORES.top_k, SCORES.seq_length)
    write_index(folder / "scores", SCORES, {name: np.ones(12, kind) for name, kind in kinds.items()})
    return folder / "scores" / "index.json", lambda: ScoreIndex.open([str(folder / "scores")])


def part_of_scores(folder: Path) -> tuple[Path, Callable[[], Any]]:
    part = dataclasses.replace(SCORES, sample=0.5, sample_seed=1)
    write_index(folder / "part", part, {name: np.ones(12, kind) for name, kind in columns(part.top_k, part.seq_length).items()})
    return folder / "part" / "index.json", lambda: ScoreIndex.open([str(folder / "part")])


def score_shard(folder: Path) -> tuple[Path, Callable[[], Any]]:
    _, consumer = score_index(folder)
    return next((folder / "scores").glob("*/shard.json")), consumer


def selection(folder: Path) -> tuple[Path, Callable[[], Any]]:
    ids = np.array([1, 3, 5], np.int64)
    write_selection(str(folder / "chosen"), [ids], num_selected=3, scores=SCORES, rule={"rule": "by hand"}, valid_share=0.0)
    return folder / "chosen.json", lambda: Selection.open(str(folder / "chosen"))


def log(folder: Path) -> tuple[Path, Callable[[], Any]]:
    entry = {"kind": "step", "step": 1, "loss": 2.5, "tokens": 8, "seconds": 0.5, "memory_gib": 1.0}
    (folder / "train.jsonl").write_text(json.dumps(entry))
    return folder / "train.jsonl", lambda: read_curve("run", folder / "train.jsonl")


def checkpoint(folder: Path) -> tuple[Path, Callable[[], Any]]:
    schedule = Schedule(
        kd_steps=5, kd_weight=0.5, kd_teacher_temperature=1.0, kd_transition="step", kd_transition_steps=0, kd_stop="never",
        kd_stop_margin=0.0,
    )  # fmt: skip
    salt = SaltState(
        stage1_end=5, schedule=schedule.facts(), teacher="sha256:0", teacher_directory="/teacher", crossover=3,
        teacher_held_out={"loss": 2.5, "accuracy": 0.5},
    )  # fmt: skip
    content = {
        "format": 1, "name": None, "saved_at": 1.5, "megatron_core": "0.16.1", "torch": "2.13", "step": 4,
        "consumed_samples": 32, "data": {"position": 32}, "events": [{"event": "new_data", "step": 0}],
        "extra": {"nonfinite_in_a_row": 0, "evaluation_due": True}, "salt": asdict(salt),
        "architecture": asdict(ModelConfig()) | {"vocabulary": 257, "seq_length": 16}, "tokenizer": "t", "data_fingerprint": "content:1",
        "probe": {"lengths": [8, 16], "losses": [5.5, None], "dtype": "float32"},
        "layout": {"tensor": 1, "context": 1, "data": 1, "pipeline": 1}, "chunks": 1, "rng": [["cpu", 16]],
        "scheduler": {"num_steps": 4, "max_lr": 0.1, "lr_decay_style": "cosine"},
        "optimizer": {"form": "plain", "step": 4, "bucket_plans": {"pp0.tp0": "0"}},
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(content))
    return folder / "state.json", lambda: go_on_from(folder)


def go_on_from(directory: Path) -> None:
    """Use every value of state.json in the same arithmetic as a run."""
    saved = read_state(directory)
    identity = RunIdentity(
        yaml="", architecture=saved.architecture, tokenizer_fingerprint=saved.tokenizer, data_fingerprint=saved.data_fingerprint, seed=1
    )  # fmt: skip
    state = state_from(OpenedCheckpoint(directory, saved, {}), identity, new_data=False)
    assert state.step >= 0 and state.position >= 0 and state.nonfinite_in_a_row >= 0
    assert state.salt is None or state.salt.stage_after(state.step) in (1, 2)
    assert model_of(saved.architecture).head_width >= 1
    assert "\n" not in "".join(_about(directory, saved, {})), "what inspect_checkpoint prints"


@pytest.mark.parametrize("make", [dataset, score_index, part_of_scores, score_shard, selection, log, checkpoint])
def test_no_value_of_a_description_ends_its_reader_with_a_traceback(tmp_path: Path, make: Any) -> None:
    path, consumer = make(tmp_path)
    consumer()
    told: list[str] = []
    for changed in mutations(json.loads(path.read_text())):
        path.write_text(json.dumps(changed))
        try:
            consumer()
        except UserError as error:
            told.append(str(error))
    assert len(told) > 20
    assert [line for line in told if str(path.parent) not in line or "\n" in line or len(line) > 900] == []
