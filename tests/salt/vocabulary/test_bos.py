"""An imported teacher that knows texts with a BOS tells its loss with and without it, where the data has none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_salt.config import DataConfig
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.samples import open_training_data
from megatron_salt.data.windows import Windows
from megatron_salt.salt import scorer
from megatron_salt.salt.output_weight import BosLosses
from megatron_salt.salt.shared_vocabulary import missing_bos, tokenizer_of
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint, read_teacher
from tests.salt.vocabulary.test_shared_vocabulary import hugging_face, tokenizer_json
from tests.support import scoring
from tests.support.datasets import run, write_lines
from tests.support.program import VOCABULARY, entries, train, write_tokens
from tests.support.ranks import run_ranks
from tests.tools.test_score_data import full_logits

BOS = VOCABULARY  # the id after all that the byte-level tokenizer has
RUN: dict[str, Any] = dict(kd_steps=1, train_iters=2, eval_iters=0, teacher_max_dropped_mass=0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data without BOS, and a teacher whose tokenizer puts one before a text."""
    home = tmp_path_factory.mktemp("bos")
    write_tokens(home / "data")
    write_tokens(home / "valid", windows=16, seed=1)
    content = json.loads(tokenizer_json(home / "bos.json", ["<s>"]).read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    for added in content["added_tokens"]:
        added["special"] = True
    (home / "bos.json").write_text(json.dumps(content))
    train(data_path=home / "data", train_iters=3, save=home / "teacher", **hugging_face(home / "bos.json"))
    return home


@contextlib.contextmanager
def imported() -> Iterator[None]:
    """Takes the teacher for one that was imported."""

    def read(load: str) -> TeacherCheckpoint:
        return replace(read_teacher(load), imported=True)

    with mock.patch("megatron_salt.train.inputs.read_teacher", read):
        yield


def told(save: Path) -> list[dict[str, Any]]:
    return [entry["teacher_bos"] for entry in entries(save, "event") if "teacher_bos" in entry]


def loss(home: Path, first: int | None) -> float:
    """Of the teacher on the held-out windows, in float64 from full logits. first: takes the place of the first token."""
    tokens = Windows(TokenFile.open(str(home / "valid")), 16).read_many(np.arange(16))
    inputs = tokens.copy()
    if first is not None:
        inputs[:, 0] = first
    [logits] = run_ranks(1, full_logits, str(home / "teacher" / "iter_0000003"), inputs, False, VOCABULARY + 1)
    log_p = torch.from_numpy(logits).double().log_softmax(-1)
    return float(-log_p.gather(-1, torch.from_numpy(tokens[:, 1:, None])).mean())


@pytest.mark.parametrize(
    "world_size, layout",
    [
        (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, teacher_pipeline_model_parallel_size=2)),
        pytest.param(1, {}, marks=pytest.mark.long),
        pytest.param(2, dict(context_parallel_size=2), marks=pytest.mark.long),
    ],
)
def test_both_losses_are_those_of_full_logits(home: Path, tmp_path: Path, world_size: int, layout: dict[str, Any]) -> None:
    flags = dict(data_path=home / "data", valid_data_path=home / "valid", teacher_load=home / "teacher", save=tmp_path / "run")
    ended = train(world_size, within=imported, **flags, **RUN, **layout)
    [found] = told(tmp_path / "run")
    assert (found["bos"], found["windows"]) == (BOS, 16)
    assert found["without"] == pytest.approx(loss(home, None), rel=1e-5)
    assert found["beginning"] == pytest.approx(loss(home, BOS), rel=1e-5)
    assert found["without"] != pytest.approx(found["beginning"], rel=1e-3)
    assert f"its tokenizer begins a text with BOS (id {BOS}), and the data has none" in ended.out


def test_nothing_is_told_of_a_teacher_of_this_program_or_where_the_data_has_it(home: Path, tmp_path: Path) -> None:
    assert not read_teacher(str(home / "teacher")).imported
    flags = dict(data_path=home / "data", teacher_load=home / "teacher")
    train(save=tmp_path / "own", **flags, **RUN)
    assert told(tmp_path / "own") == []
    tokens = np.full(40 * 16 + 1, 97)
    tokens[::16] = BOS
    flags["data_path"] = write_tokens(tmp_path / "data", tokens)
    train(save=tmp_path / "has", within=imported, **flags, **RUN, **hugging_face(home / "bos.json"))
    assert told(tmp_path / "has") == []


@pytest.mark.parametrize("prepend", [True, False])
def test_a_manifest_tells_of_bos_in_data_whose_first_windows_have_none(home: Path, tmp_path: Path, prepend: bool) -> None:
    teacher = replace(read_teacher(str(home / "teacher")), imported=True)
    corpus = write_lines(tmp_path / "corpus.jsonl", ["a text that fills some windows of the data"] * 3)
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(home / "bos.json")]
    assert run(corpus, tmp_path / "d", "--append-eod", *["--prepend-bos"] * prepend, tokenizer=words) == 0
    data, tokenizer = DataConfig(data_path=(f"{tmp_path / 'd'}_text_document",)), tokenizer_of(teacher)
    samples, _ = open_training_data(data, 16, seed=0, vocabulary_size=tokenizer.vocabulary_size, eod=tokenizer.eod)
    assert missing_bos(teacher, tokenizer, (samples,), ()) == (None if prepend else BOS)


def score_imported(words: list[str]) -> tuple[int, list[BosLosses]]:
    """In one rank: score_data with a teacher that was imported; the exit status, and the losses that it tells."""

    def read(load: str) -> TeacherCheckpoint:
        return replace(read_teacher(load), imported=True)

    with (
        mock.patch("megatron_salt.salt.teacher_checkpoint.read_teacher", read),
        mock.patch.object(scorer.log, "info") as told_of,
    ):
        ended = scoring.main(words)
    return ended.status, [call.args[1] for call in told_of.call_args_list if isinstance(call.args[1], BosLosses)]


def test_scoring_tells_both_losses(home: Path, tmp_path: Path) -> None:
    flags = dict(teacher_load=home / "teacher", data_path=home / "valid", tokenizer_type="ByteLevelTokenizer")
    words = scoring.argv(**flags, output=tmp_path / "index", teacher_max_dropped_mass=0.05)
    [(status, [found])] = run_ranks(1, score_imported, words)
    assert (status, found.bos, found.windows) == (0, BOS, 16)
    assert found.without == pytest.approx(loss(home, None), rel=1e-5)
    assert found.beginning == pytest.approx(loss(home, BOS), rel=1e-5)
