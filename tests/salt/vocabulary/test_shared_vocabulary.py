"""A teacher with another vocabulary teaches where the ids that the data holds mean the same to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_salt import pretrain
from megatron_salt.config import TokenizerConfig
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.windows import Windows
from megatron_salt.salt.shared_vocabulary import segmentation_difference
from megatron_salt.tokenizer.id_bytes import _byte_level_alphabet
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from tests.support.program import (
    NUM_WINDOWS,
    VOCABULARY,
    argv,
    entries,
    numbers,
    refused,
    refused_at_once,
    run,
    train,
    write_tokens,
)
from tests.support.ranks import run_ranks
from tests.support.scoring import score, table
from tests.tools.test_score_data import full_logits

ADDED = ["<tool>", "<answer>", "<think>"]


def tokenizer_json(path: Path, added: list[str], merges: list[tuple[str, str]] = [], permuted: bool = False) -> Path:  # noqa: B006
    """Bytes by their value, merged pieces after them; the end of a document; added tokens. Without merges the ids are those of the
    byte-level tokenizer."""
    characters = dict(_byte_level_alphabet())
    if permuted:
        characters = {character: (byte + 1) % 256 for character, byte in characters.items()}
    pieces = {left + right: 256 + number for number, (left, right) in enumerate(merges)}
    model = Tokenizer(models.BPE(vocab=characters | pieces, merges=merges))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.add_special_tokens(["<|endoftext|>"])
    model.add_tokens(added)
    model.save(str(path))
    return path


def hugging_face(path: Path) -> dict[str, Any]:
    return dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a teacher of its 257 ids under "plain", and one of three more ids under "more"."""
    home = tmp_path_factory.mktemp("vocabularies")
    write_tokens(home / "data")
    write_tokens(home / "valid", windows=8, seed=1)
    for name, added in (("same", []), ("more", ADDED)):
        tokenizer_json(home / f"{name}.json", added)
    train(data_path=home / "data", train_iters=3, save=home / "more", **hugging_face(home / "more.json"))
    train(data_path=home / "data", train_iters=3, save=home / "plain", save_at=[3])
    return home


def lesson(home: Path, **changes: Any) -> dict[str, Any]:
    """Flags of a student with the byte-level tokenizer and the teacher of more ids. An untrained id has 1 / 260 of the probability."""
    return dict(
        data_path=home / "data", valid_data_path=home / "valid", eval_iters=1, teacher_load=home / "more", kd_steps=4, train_iters=4,
        teacher_max_dropped_mass=0.05,
    ) | changes  # fmt: skip


@pytest.fixture(scope="module")
def taught(home: Path) -> Path:
    ended = train(save=home / "taught", save_interval=2, **lesson(home))
    assert "257 ids mean the same to it and to the student, whose tokenizer has 257; its softmax has 260" in ended.err
    assert "cuts all alike" in ended.err and "MB of the data as text" in ended.err
    return home / "taught"


def dropped(save: Path) -> dict[str, Any]:
    [told] = [entry["teacher_vocabulary"] for entry in entries(save, "event") if "teacher_vocabulary" in entry]
    return told


def test_what_it_gives_to_other_ids_is_told(taught: Path) -> None:
    told = dropped(taught)
    assert (told["all_ids"], told["shared_ids"], told["windows"]) == (260, VOCABULARY, 16)
    assert 0.001 < told["mean"] < told["max_mass"] == 0.05


@pytest.mark.parametrize(
    "world_size, layout",
    [
        (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, teacher_pipeline_model_parallel_size=2)),
        pytest.param(2, dict(tensor_model_parallel_size=2, teacher_tensor_model_parallel_size=2), marks=pytest.mark.long),
    ],
)
def test_every_layout_teaches_the_same(home: Path, taught: Path, tmp_path: Path, world_size: int, layout: dict) -> None:
    begun = dict(load=taught / "iter_0000002", finetune=True, train_iters=2, kd_steps=2)  # first weights depend on the layout
    train(save=tmp_path / "serial", **lesson(home, **begun))
    train(world_size, save=tmp_path / "run", **lesson(home, **begun, **layout))
    for one, other in zip(entries(tmp_path / "serial"), entries(tmp_path / "run"), strict=True):
        for name in ("loss", "kl", "teacher_ce"):
            assert other[name] == pytest.approx(one[name], rel=2e-5), name
    assert dropped(tmp_path / "run")["mean"] == pytest.approx(dropped(taught)["mean"], rel=1e-5)


def test_a_resumed_run_is_the_same_bit_for_bit(home: Path, taught: Path, tmp_path: Path) -> None:
    train(load=taught / "iter_0000002", save=tmp_path / "resumed", **lesson(home))
    assert numbers(tmp_path / "resumed") == numbers(taught)[2:]


def test_more_than_the_limit_is_refused(home: Path, tmp_path: Path) -> None:
    message = refused(save=tmp_path / "run", **lesson(home, teacher_max_dropped_mass=0.001))
    assert re.search(
        r"the teacher gives 0\.0\d+ of its probability to ids that the student does not share .*ids from 257 to 259", message
    )
    assert "--teacher-max-dropped-mass 0.001" in message
    hot = dict(kd_temperature_schedule=["1:0.25", "2:1000"], teacher_max_dropped_mass=0.0108)  # at 1 and below it is 0.0101
    assert "the teacher gives 0.0115 of its probability" in refused(save=tmp_path / "hot", **lesson(home, **hot))


def test_a_dry_run_tells_the_same(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(argv(dry_run=1, **lesson(home))) == 0
    told = capsys.readouterr().out
    assert "257 ids mean the same to it and to the student" in told and "cuts all alike" in told


def test_scores_are_over_the_shared_ids(home: Path, taught: Path, tmp_path: Path) -> None:
    """Their mean loss on the held-out windows is that of full logits of these ids in float64, and the teacher's in the run's evaluation."""
    flags = dict(teacher_load=home / "more", data_path=home / "valid", tokenizer_type="ByteLevelTokenizer", seq_length=16)
    out = score(output=tmp_path / "index", teacher_max_dropped_mass=0.05, **flags)
    assert "257 ids mean the same" in out
    windows = Windows(TokenFile.open(str(home / "valid")), 16)
    tokens = windows.read_many(np.arange(len(windows)))
    [logits] = run_ranks(1, full_logits, str(home / "more" / "iter_0000003"), tokens, False)
    log_p = torch.from_numpy(logits).double().log_softmax(-1)
    expected = -log_p.gather(-1, torch.from_numpy(tokens[:, 1:, None])).mean().item()
    assert table(tmp_path / "index")["mean"].mean() == pytest.approx(expected, rel=1e-5)
    *_, evaluated = entries(taught, "eval")
    assert evaluated["teacher_loss"] == pytest.approx(expected, rel=1e-5)


def test_without_evaluations_it_is_measured_on_held_out_data_all_the_same(home: Path, taught: Path, tmp_path: Path) -> None:
    train(save=tmp_path / "run", **lesson(home, eval_iters=0, train_iters=2, kd_steps=1))
    assert dropped(tmp_path / "run") == dropped(taught)
    train(save=tmp_path / "none", **lesson(home, eval_iters=0, train_iters=2, kd_steps=1, valid_data_path=None))
    assert dropped(tmp_path / "none")["mean"] != dropped(taught)["mean"]


# ---- a student of more ids ---------------------------------------------------------------------------------------------


def test_a_student_may_have_more_ids_that_its_data_does_not_hold(home: Path, tmp_path: Path) -> None:
    ended = train(save=tmp_path / "run", **lesson(home, teacher_load=home / "plain", **hugging_face(home / "more.json")))
    assert "257 ids mean the same to it and to the student, whose tokenizer has 260; its softmax has 257" in ended.err
    assert not [entry for entry in entries(tmp_path / "run", "event") if "teacher_vocabulary" in entry]  # nothing is dropped
    steps = entries(tmp_path / "run")
    assert all(0 < entry["kl"] < 20 for entry in steps)


def test_data_with_an_id_that_the_teacher_lacks_is_refused(home: Path, tmp_path: Path) -> None:
    tokens = np.full(NUM_WINDOWS * 16 + 1, 97)
    tokens[200] = VOCABULARY + 1
    data = write_tokens(tmp_path / "data", tokens)
    flags = lesson(home, teacher_load=home / "plain", data_path=data, save=tmp_path / "run", **hugging_face(home / "more.json"))
    assert "token 200 is id 258, which the teacher does not have" in refused(**flags)
    assert not (tmp_path / "run").exists()


# ---- the same pieces in another file, and others -----------------------------------------------------------------------


def test_the_same_pieces_in_another_file_are_the_same_teacher(home: Path, tmp_path: Path) -> None:
    """Bit for bit as with the teacher's own kind of file."""
    flags = lesson(home, teacher_load=home / "plain")
    train(save=tmp_path / "own", **flags)
    train(save=tmp_path / "other", **(flags | hugging_face(home / "same.json")))
    assert numbers(tmp_path / "own") == numbers(tmp_path / "other")


def test_ids_that_mean_something_else_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = lesson(home, **hugging_face(tokenizer_json(tmp_path / "permuted.json", [], permuted=True)))
    message = refused_at_once(capsys, tmp_path / "run", **flags)
    assert "256 of 257 ids mean something else to the teacher" in message
    assert "97 is 'a' there and '`' here" in message or "0 is '\\x00' there and '\\xff' here; 1 is '\\x01' there" in message
    assert message.count(" there and ") == 10 and "make the data with the teacher's tokenizer" in message


# ---- a teacher without an output layer ---------------------------------------------------------------------------------


def test_a_teacher_that_only_guides_must_know_the_ids_of_the_data_and_no_others(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two bytes are exchanged in the student's tokenizer, which also has three ids more than the teacher's. A --dry-run reads all data."""
    content = json.loads((home / "more.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = (next(piece for piece, i in vocabulary.items() if i == byte) for byte in (88, 89))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "exchanged.json").write_text(json.dumps(content))
    flags = lesson(
        home, teacher_load=home / "plain", kd_steps=None, guide="hidden", let_steps=4, let_layer=1, teacher_max_dropped_mass=None,
        **hugging_face(tmp_path / "exchanged.json"),
    )  # fmt: skip
    assert pretrain.main(argv(dry_run=1, **flags)) == 0
    told = capsys.readouterr().out
    assert (
        "teacher: 5 of the 260 ids of the student's tokenizer mean something else to it or are no row of its embedding" in told
    )
    assert "renormalised" not in told
    for unlike, why in ((88, "'X' to it and 'Y' to the student"), (259, "no row of its embedding, which has 257")):
        tokens = np.full(NUM_WINDOWS * 16 + 1, 97)
        tokens[200] = unlike
        data = write_tokens(tmp_path / f"data {unlike}", tokens)
        assert pretrain.main(argv(dry_run=1, **(flags | dict(data_path=data)))) == 2
        message = capsys.readouterr().err
        assert f"--data-path {data}: token 200 is id {unlike}, which --teacher-load" in message
        assert f"cannot read: {why}; 5 ids are unlike, and with --guide hidden the data must hold none of them" in message


def test_the_rate_counts_tokens_that_lie_elsewhere(tmp_path: Path) -> None:
    """Both have the pieces; one of them never joins "ab"."""
    one = tokenizer_json(tmp_path / "one.json", [], [("a", "b"), ("c", "d")])
    content = json.loads(one.read_text())
    content["model"]["merges"] = content["model"]["merges"][1:]
    (tmp_path / "two.json").write_text(json.dumps(content))
    [first, second] = [
        build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / name)))
        for name in ("one.json", "two.json")
    ]
    assert segmentation_difference(first, second, ["xabcdab", "cdcd"]) == (2, 6)  # x ab cd ab; cd cd
    assert segmentation_difference(second, first, ["xabcdab", "cdcd"]) == (4, 8)  # x a b cd a b; cd cd
    assert segmentation_difference(first, first, ["xabcdab"]) == (0, 4)


# ---- a student from a model of more ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, layout", [(1, {}), pytest.param(2, dict(tensor_model_parallel_size=2), marks=pytest.mark.long)]
)
def test_a_student_begins_with_the_rows_that_it_has_ids_for(home: Path, tmp_path: Path, world_size: int, layout: dict) -> None:
    """From 384 rows to 384, to 258, and from 258 to 384 and to 258 again: padding and ids that are left out change nothing."""

    def agree(one: str, other: str) -> bool:
        """Bit for bit on one rank. Two ranks divide the rows in another way, and add in another order."""
        pairs = zip(numbers(tmp_path / one), numbers(tmp_path / other), strict=True)
        return all(mine == (pytest.approx(yours, rel=1e-6) if layout else yours) for mine, yours in pairs)

    flags = dict(data_path=home / "data", train_iters=2, finetune=True) | layout
    for name, multiple in (("same", 128), ("cut", 2)):
        ended, *_ = run(world_size, load=home / "more", save=tmp_path / name, make_vocab_size_divisible_by=multiple, **flags)
        assert (
            ended.status == 0
            and "takes the rows of this run's 257 ids; ids 257 to 259 of the checkpoint are left out" in ended.err
        )
    assert agree("same", "cut")
    for name, multiple in (("longer", 128), ("again", 2)):
        train(world_size, load=tmp_path / "cut", save=tmp_path / name, make_vocab_size_divisible_by=multiple, **flags)
    assert agree("longer", "again")
    if world_size == 1:
        message = refused(
            load=tmp_path / "cut",
            save=tmp_path / "run",
            make_vocab_size_divisible_by=4,
            **flags,
            **hugging_face(home / "more.json"),
        )
        assert "embedding.word_embeddings.weight is [258, 32] there and [260, 32] here" in message


def test_a_student_from_a_model_of_another_tokenizer_or_fewer_ids_is_told(home: Path, tmp_path: Path) -> None:
    flags = dict(data_path=home / "data", load=home / "plain", finetune=True, train_iters=2)
    permuted = tokenizer_json(tmp_path / "permuted.json", [], permuted=True)
    told = train(save=tmp_path / "permuted", **flags, **hugging_face(permuted)).err
    assert " was trained with tokenizer " in told and "each id keeps its row, whatever it means there" in told
    told = train(save=tmp_path / "more", **flags, **hugging_face(home / "more.json")).err
    assert "the checkpoint has 257 ids; ids 257 to 259 of this run begin with rows that were never trained" in told
    assert " was trained with tokenizer " not in train(save=tmp_path / "own", **flags).err
