"""Named validation sets and the evaluation before the first step: what they log, and that training does not see them. Whole program."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_salt.cli import parse
from megatron_salt.config import TokenizerConfig
from megatron_salt.config.yaml_text import from_yaml, to_yaml
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.samples import open_training_data
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.train import evaluate
from megatron_salt.train.build import byte_counts
from tests.support.program import (
    DROPOUT,
    EOD,
    GLOBAL_BATCH,
    SEQ_LENGTH,
    VOCABULARY,
    argv,
    entries,
    numbers,
    refused,
    state_of,
    tensors,
    train,
    write_tokens,
)  # fmt: skip
from tests.tokenizer.test_tokenizer import TEXT, sentencepiece_model

STEPS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets: words to train on, prose and code to evaluate on, and few, which has less than a batch."""
    home = tmp_path_factory.mktemp("data")
    for seed, (name, windows) in enumerate(
        [("words", 22), ("prose", 3 * GLOBAL_BATCH), ("code", GLOBAL_BATCH + 1), ("few", 7)]
    ):
        write_tokens(home / name, windows=windows, seed=seed)
    return home


def flags(home: Path, **more: Any) -> dict[str, Any]:
    sets = [f"prose={home}/prose", f"code={home}/code"]
    return (
        dict(data_path=home / "words", train_iters=STEPS, valid_data_path=sets, eval_iters=2, eval_interval=2, **DROPOUT) | more
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A run with two sets that saved every step."""
    save = tmp_path_factory.mktemp("evaluated")
    train(**flags(home), save=save, save_interval=1)
    return save


def figures(save: Path) -> list[tuple[Any, ...]]:
    """All figures of every evaluation but times."""
    return [
        tuple(entry[key] for key in ("step", "name", "loss", "perplexity", "accuracy", "bits_per_byte", "tokens"))
        for entry in entries(save, "eval")
    ]


def test_each_set_has_an_entry_of_its_own_from_step_0_on(evaluated: Path, home: Path) -> None:
    """Of a set with fewer batches than --eval-iters each sample counts once."""
    found = entries(evaluated, "eval")
    assert [(entry["step"], entry["name"]) for entry in found] == [
        (step, f"valid/{name}") for step in (0, 2, 4) for name in ("prose", "code")
    ]
    for entry in found:
        batches = {"valid/prose": 2, "valid/code": 1}[entry["name"]]
        assert entry["tokens"] == batches * GLOBAL_BATCH * SEQ_LENGTH
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
    for start in found[:2]:
        assert start["loss"] == pytest.approx(math.log(VOCABULARY), abs=0.15), "an untrained model knows nothing"
    assert found[-1]["loss"] < found[1]["loss"] - 0.05


def test_bits_per_byte_are_those_of_the_labels(evaluated: Path, home: Path) -> None:
    """Of the byte-level tokenizer a label is one byte, the end of a document none."""
    config = parse(argv(**flags(home)))
    _, sets = open_training_data(config.data, SEQ_LENGTH, 1, VOCABULARY, EOD)
    for entry in entries(evaluated, "eval"):
        _, tokens = sets[entry["name"]].read(np.arange(entry["tokens"] // SEQ_LENGTH))
        num_bytes = int((tokens[:, 1:] != EOD).sum())
        assert num_bytes < entry["tokens"] or entry["name"] != "valid/prose", "the end of a document is among the labels"
        assert entry["bits_per_byte"] == pytest.approx(entry["loss"] * entry["tokens"] / math.log(2) / num_bytes, rel=1e-6)


def test_each_set_is_a_group_of_curves_in_tensorboard(evaluated: Path) -> None:
    events = EventAccumulator(str(evaluated / "tensorboard"))
    events.Reload()
    for name in ("prose", "code"):
        losses = [entry["loss"] for entry in entries(evaluated, "eval") if entry["name"] == f"valid/{name}"]
        assert [scalar.value for scalar in events.Scalars(f"valid-{name}/loss")] == pytest.approx(losses)
        assert {f"valid-{name}/accuracy", f"valid-{name}/bits_per_byte"} <= set(events.Tags()["scalars"])


def test_a_run_without_evaluations_trains_the_same_bit_for_bit(tmp_path: Path, evaluated: Path, home: Path) -> None:
    train(**flags(home, eval_iters=0), save=tmp_path, save_interval=1)
    assert numbers(tmp_path) == numbers(evaluated) and tensors(tmp_path, STEPS) == tensors(evaluated, STEPS)
    assert not entries(tmp_path, "eval")


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_neither_repeats_nor_loses_an_evaluation(tmp_path: Path, evaluated: Path, home: Path, step: int) -> None:
    train(**flags(home), load=evaluated / f"iter_{step:07d}", save=tmp_path)
    assert figures(tmp_path) == [found for found in figures(evaluated) if found[0] > step]


@contextlib.contextmanager
def stopping(file: Path) -> Iterator[None]:
    """Make the file in the first batch of an evaluation. The run sees it one batch later, and leaves before the third."""

    def forward_input(*arguments: Any) -> Any:
        file.touch()
        return original(*arguments)

    original = evaluate.forward_input
    with mock.patch.object(evaluate, "forward_input", forward_input):
        yield


def test_an_evaluation_at_the_start_that_is_cut_short_says_so_and_comes_with_the_next_start(
    tmp_path: Path, evaluated: Path, home: Path
) -> None:
    """A run that must leave in its second set logs neither."""
    stop = tmp_path / "stop"
    train(**flags(home), save=tmp_path / "run", exit_file=stop, within=partial(stopping, stop))
    (cut,) = [entry["message"] for entry in entries(tmp_path / "run", "event") if "cut short" in entry["message"]]
    assert cut.startswith("evaluation cut short after 2 of 3 batches: ") and not entries(tmp_path / "run", "eval")
    stop.unlink()
    train(**flags(home), save=tmp_path / "run", load=tmp_path / "run")
    assert figures(tmp_path / "run") == figures(evaluated)


def test_no_evaluation_at_the_start_where_none_is_asked_for(tmp_path: Path, home: Path, evaluated: Path) -> None:
    """The old form of the flag: one set without a name. A given peak of the device gives an MFU; a CPU alone has none."""
    train(**flags(home, valid_data_path=[home / "prose"]), no_eval_at_start=True, device_peak_tflops=0.5, save=tmp_path)
    assert [(entry["step"], entry["name"]) for entry in entries(tmp_path, "eval")] == [(2, "valid"), (4, "valid")]
    assert numbers(tmp_path) == numbers(evaluated)
    assert [entry["mfu"] for entry in entries(tmp_path)] == pytest.approx(
        [e["tflops_per_rank"] / 0.5 for e in entries(tmp_path)]
    )
    assert not any("mfu" in entry for entry in entries(evaluated))


def test_the_teacher_is_evaluated_once_on_every_set(tmp_path: Path, evaluated: Path, home: Path) -> None:
    """Before the first step, and again by a resumed run. The teacher is the student of the plain run, whose figures are known."""
    teacher = {entry["name"]: entry for entry in entries(evaluated, "eval")[-2:]}
    taught = flags(home, teacher_load=evaluated, kd_steps=3)
    train(**taught, save=tmp_path / "one", save_interval=1)
    train(**taught, load=tmp_path / "one" / "iter_0000001", save=tmp_path / "two")
    assert figures(tmp_path / "two") == [found for found in figures(tmp_path / "one") if found[0] > 1]
    for save, steps in ((tmp_path / "one", [0, 0, 2, 2]), (tmp_path / "two", [2, 2])):
        found = [entry for entry in entries(save, "eval") if "teacher_loss" in entry]
        assert [entry["step"] for entry in found] == steps
        for entry in found:
            expected = teacher[entry["name"]]
            assert (entry["teacher_loss"], entry["teacher_accuracy"]) == pytest.approx(
                (expected["loss"], expected["accuracy"]), rel=1e-5
            )
    held_out = state_of(tmp_path / "one", 3)["salt"]["teacher_held_out"]
    tokens = {name: entry["tokens"] for name, entry in teacher.items()}
    assert set(held_out) == {"loss", "accuracy", *(f"{name}/{key}" for name in teacher for key in ("loss", "accuracy"))}
    assert held_out["accuracy"] == pytest.approx(
        sum(entry["accuracy"] * tokens[name] for name, entry in teacher.items()) / sum(tokens.values())
    )


def test_a_set_that_is_smaller_than_a_batch_is_refused(home: Path) -> None:
    line = refused(1, **flags(home, valid_data_path=[f"prose={home}/prose", f"few={home}/few"]))
    assert line.startswith("--valid-data-path few has 7 samples of --seq-length 16, fewer than --global-batch-size 8")


def test_yaml_names_sets_by_a_mapping() -> None:
    text = "data:\n  valid_data_path:\n    prose: p\n    mix: [0.7, a, 0.3, b]\n"
    config = from_yaml(text, "run.yaml")
    assert config.data.valid_data_path == ("prose=p", "mix=0.7", "a", "0.3", "b")
    assert from_yaml(to_yaml(config), "again") == config
    for wrong in ("prose: {a: b}", "prose: [[a]]", "prose: [null]"):
        with pytest.raises(UserError, match=r"run.yaml: data.valid_data_path\[0\]: expected a string"):
            from_yaml(f"data:\n  valid_data_path:\n    {wrong}\n", "run.yaml")


def test_one_text_has_as_many_bytes_by_any_tokenizer(tmp_path: Path) -> None:
    """So bits per byte can be compared between models with different tokenizers."""
    pieces = sentencepiece_model(tmp_path / "sp.model", eos_piece="</s>", add_dummy_prefix=False)
    totals = []
    for config in (
        TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
        TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(pieces)),
    ):
        tokenizer = build_tokenizer(config)
        labels = torch.tensor([[*tokenizer.encode(TEXT[1]), tokenizer.eod]])
        mask = torch.ones_like(labels)
        batch = cast(Microbatch, SimpleNamespace(labels=labels, loss_mask=mask))
        totals.append(evaluate.label_bytes(batch, byte_counts(tokenizer)))
    assert totals == [len(TEXT[1].encode())] * 2
