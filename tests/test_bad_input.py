"""Bad input, through the whole program: exit status 2, one line that names flag, file and numbers, and nothing written."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_salt import pretrain
from megatron_salt.train import loop
from tests.support.checkpoint_runs import flip, rewrite
from tests.support.program import SMALL, argv, checkpoints, losses, refused, run, the_error, train, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


def refused_at_once(capsys: pytest.CaptureFixture[str], save: Path, **flags: Any) -> str:
    """The message with which the program ends before it joins a world, in this process; nothing is written, not even --save."""
    assert pretrain.main(argv(save=save, **flags)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert not save.exists()
    return err


# ---- flags that cannot be -----------------------------------------------------------------------------------------------

TP2 = dict(tensor_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
VP2 = dict(PP2, num_virtual_stages_per_pipeline_rank=2)

KD = dict(teacher_load="/nowhere", kd_steps=3)


@pytest.mark.parametrize(
    "world_size, flags, words",
    [
        (6, TP2 | PP2, ["6 ranks", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "4 ranks"]),
        (3, dict(context_parallel_size=2), ["3 ranks", "--context-parallel-size 2"]),
        (3, dict(tensor_model_parallel_size=3), ["--num-attention-heads 4", "--tensor-model-parallel-size = 3"]),
        (4, dict(tensor_model_parallel_size=4), ["--num-query-groups 2", "--tensor-model-parallel-size = 4"]),
        (2, dict(TP2, ffn_hidden_size=63), ["--ffn-hidden-size 63", "--tensor-model-parallel-size = 2"]),
        (
            2,
            dict(TP2, make_vocab_size_divisible_by=33),
            ["--make-vocab-size-divisible-by 33", "--tensor-model-parallel-size = 2"],
        ),
        (1, dict(hidden_size=30), ["--hidden-size 30", "--num-attention-heads 4"]),
        (1, dict(num_query_groups=3), ["--num-attention-heads 4", "--num-query-groups 3"]),
        (2, dict(PP2, num_layers=3), ["--num-layers 3", "--pipeline-model-parallel-size", "= 2"]),
        (2, VP2, ["--num-layers 2", "--num-virtual-stages-per-pipeline-rank", "= 4"]),
        (2, dict(PP2, decoder_first_pipeline_num_layers=2), ["--num-layers 2", "--pipeline-model-parallel-size 2", "[2, 0]"]),
        (2, dict(context_parallel_size=2, seq_length=18), ["--seq-length 18", "2 x --context-parallel-size = 4"]),
        (2, dict(TP2, sequence_parallel=True, seq_length=17), ["--seq-length 17", "--tensor-model-parallel-size", "= 2"]),
        (1, dict(sequence_parallel=True), ["--sequence-parallel", "--tensor-model-parallel-size above 1"]),
        (1, dict(max_position_embeddings=8), ["--seq-length 16", "--max-position-embeddings 8"]),
        (1, dict(global_batch_size=9), ["--global-batch-size 9", "--micro-batch-size 2 x 1"]),
        (2, dict(global_batch_size=6), ["--global-batch-size 6", "--micro-batch-size 2 x 2"]),
        (
            2,
            dict(VP2, num_layers=4, global_batch_size=6),
            ["3 microbatches", "--global-batch-size 6", "--pipeline-model-parallel-size 2"],
        ),
        (1, dict(train_iters=None, train_samples=50), ["--train-samples 50", "--global-batch-size 8"]),
        (1, dict(train_iters=None), ["--train-iters", "--train-samples"]),
        (1, dict(train_samples=80), ["--train-iters 4", "--train-samples 80"]),
        (1, dict(train_iters=0), ["--train-iters must be at least 1, got 0"]),
        (1, dict(lr="nan"), ["--lr must be at least 0, got nan"]),
        (1, dict(overlap_param_gather=True), ["--overlap-param-gather needs --use-distributed-optimizer"]),
        (1, dict(reset_position_ids=True), ["--reset-position-ids", "--position-embedding-type rope"]),
        (1, dict(tensor_parallel_size=2), ["unknown flag --tensor-parallel-size", "--tensor-model-parallel-size"]),
        (1, dict(seq_length="long"), ["--seq-length", "long"]),
        (1, dict(config="/nowhere/run.yaml"), ["--config /nowhere/run.yaml cannot be read"]),
        (1, dict(finetune=True), ["--finetune needs --load"]),
        (1, dict(eval_iters=2), ["--eval-iters 2", "--valid-data-path", "--valid-share"]),
        (1, dict(tokenizer_type=None), ["--tokenizer-type is not given", "words"]),
        (
            1,
            dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model="/nowhere/sp.model"),
            ["--tokenizer-model /nowhere/sp.model"],
        ),
        (1, dict(data_path=[]), ["--data-path"]),
        (1, dict(save_at=[2, 5]), ["--save-at 5", "last step, 4"]),
        (1, dict(kd_steps=3), ["--kd-steps 3", "--teacher-load"]),
        (1, dict(teacher_load="/nowhere"), ["--teacher-load /nowhere", "--kd-steps"]),
        (1, dict(KD, kd_weight=1.5), ["--kd-weight must lie in [0.0, 1.0], got 1.5"]),
        (1, dict(KD, kd_weight=-0.5), ["--kd-weight must lie in [0.0, 1.0], got -0.5"]),
        (1, dict(KD, kd_teacher_temperature=0), ["--kd-teacher-temperature must be above 0", "got 0"]),
        (1, dict(KD, kd_transition="linear", kd_transition_steps=4), ["--kd-transition-steps 4", "--kd-steps 3"]),
        (1, dict(KD, kd_transition="cosine"), ["--kd-transition", "cosine"]),
        (2, dict(TP2, **KD, teacher_tensor_model_parallel_size=4), ["--teacher-tensor-model-parallel-size 4", "the 2 ranks"]),
        (2, dict(KD, teacher_pipeline_model_parallel_size=2), ["--teacher-pipeline-model-parallel-size 2", "the 1 ranks"]),
        (2, dict(TP2, **KD, seq_length=15), ["--seq-length 15", "--tensor-model-parallel-size", "= 2"]),
        (1, dict(KD, teacher_micro_batch_size=3), ["--teacher-micro-batch-size 3", "--micro-batch-size 2"]),
        (2, dict(KD, teacher_micro_batch_size=8), ["--teacher-micro-batch-size 8", "4 samples", "--global-batch-size 8 / 2"]),
        (2, dict(KD, stage2_micro_batch_size=8), ["--global-batch-size 8", "--stage2-micro-batch-size 8 x 2"]),
        (2, dict(VP2, **KD, num_layers=4, stage2_micro_batch_size=8), ["1 microbatches", "--stage2-micro-batch-size 8"]),
        (1, dict(KD, kd_stop="crossover"), ["--kd-stop crossover", "--eval-iters"]),
        (
            1,
            dict(KD, kd_stop="crossover", eval_iters=1, valid_share=0.1, eval_interval=3),
            ["--kd-stop crossover", "--eval-interval 3"],
        ),
        (
            1,
            dict(transformer_impl="transformer_engine", bf16=True),
            ["--transformer-impl transformer_engine", "is not installed"],
        ),
        (
            1,
            dict(fp8_format="hybrid", bf16=True),
            ["--fp8-format hybrid needs --transformer-impl transformer_engine", "no NVIDIA GPU"],
        ),
        (
            1,
            dict(fp4_format="e2m1", bf16=True),
            ["--fp4-format e2m1 needs --transformer-impl transformer_engine", "no NVIDIA GPU"],
        ),
        (1, dict(fp8_format="hybrid", fp4_format="e2m1"), ["--fp8-format hybrid", "--fp4-format e2m1"]),
        (1, dict(fp8_recipe="mxfp8"), ["--fp8-recipe needs --fp8-format"]),
        (1, dict(fp8_param_gather=True), ["--fp8-param-gather needs --fp8-format"]),
        (
            1,
            dict(fp8_format="e4m3", fp8_recipe="delayed", first_last_layers_bf16=True),
            ["--first-last-layers-bf16", "delayed"],
        ),
        (1, dict(fp8_format="e4m3", fp8_recipe="mxfp8", fp8_margin=1), ["--fp8-margin", "--fp8-recipe delayed", "mxfp8"]),
        (1, dict(first_last_layers_bf16=True), ["--first-last-layers-bf16 needs --fp8-format or --fp4-format"]),
        (1, dict(KD, teacher_fp8_format="e4m3", teacher_fp8_recipe="delayed"), ["--teacher-fp8-recipe delayed", "gradients"]),
        (1, dict(KD, teacher_fp8_recipe="mxfp8"), ["--teacher-fp8-recipe mxfp8 needs --teacher-fp8-format"]),
        (1, dict(teacher_fp8_format="e4m3"), ["--teacher-fp8-format e4m3 needs --teacher-load"]),
        (1, dict(KD, teacher_fp8_max_kl=0), ["--teacher-fp8-max-kl must be above 0"]),
    ],
)
def test_flags_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, world_size: int,
    flags: dict[str, Any], words: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    message = refused_at_once(capsys, tmp_path / "save", **(dict(data_path=data, train_iters=4) | flags))
    assert all(word in message for word in words), message


# ---- data that cannot be ------------------------------------------------------------------------------------------------


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def no_index(prefix: Path) -> list[str]:
    prefix.with_suffix(".idx").unlink()
    return [f"{prefix}.idx does not exist"]


def no_tokens(prefix: Path) -> list[str]:
    prefix.with_suffix(".bin").unlink()
    return [f"{prefix}.bin does not exist"]


def truncated_tokens(prefix: Path) -> list[str]:
    damage(prefix.with_suffix(".bin"), lambda content: content[:600])
    return [f"{prefix}.bin is truncated", "it has 600 bytes", "353 uint16 tokens", "706 bytes"]


def truncated_index(prefix: Path) -> list[str]:
    size = prefix.with_suffix(".idx").stat().st_size
    damage(prefix.with_suffix(".idx"), lambda content: content[:-3])
    return [f"{prefix}.idx is truncated", f"it has {size - 3} bytes", f"take {size}"]


def truncated_header(prefix: Path) -> list[str]:
    damage(prefix.with_suffix(".idx"), lambda content: content[:20])
    return [f"{prefix}.idx is truncated", "20 bytes"]


def tokens_of_another_dataset(prefix: Path) -> list[str]:
    write_tokens(prefix.with_name("other"), windows=30)
    prefix.with_name("other.bin").rename(prefix.with_suffix(".bin"))
    return [f"{prefix}.bin is longer than its index says", "962 bytes", "706 bytes"]


def not_an_index(prefix: Path) -> list[str]:
    damage(prefix.with_suffix(".idx"), lambda content: b"PK" + content[2:])
    return [f"{prefix}.idx is not a Megatron index"]


def empty(prefix: Path) -> list[str]:
    prefix.with_suffix(".bin").write_bytes(b"")
    damage(
        prefix.with_suffix(".idx"),
        lambda content: content[:18] + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(8),
    )
    return ["the dataset is empty", f"{prefix}.idx lists 0 sequences"]


def shorter_than_a_window(prefix: Path) -> list[str]:
    write_tokens(prefix, np.arange(97, 113))
    return [str(prefix), "16 tokens", "--seq-length 16", "17"]


def ids_beyond_the_vocabulary(prefix: Path) -> list[str]:
    tokens = np.arange(353) % 26 + 97
    tokens[-5] = 300
    write_tokens(prefix, tokens)
    return [str(prefix), "token id 300 at window 21, token 12 of it", "the vocabulary of 257"]


@pytest.mark.parametrize(
    "spoil",
    [no_index, no_tokens, truncated_tokens, truncated_index, truncated_header, tokens_of_another_dataset, not_an_index, empty,
     shorter_than_a_window, ids_beyond_the_vocabulary],
)  # fmt: skip
@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path"])
def test_data_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, flag: str, spoil: Callable[[Path], list[str]]
) -> None:
    prefix = write_tokens(tmp_path / "spoilt")
    words = spoil(Path(prefix))
    paths = dict(data_path=prefix) if flag == "--data-path" else dict(data_path=data, valid_data_path=prefix)
    message = refused_at_once(capsys, tmp_path / "save", train_iters=4, **paths)
    assert flag in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "paths, words",
    [
        (["nowhere"], ["nowhere.idx does not exist"]),
        (["0.5"], ["--data-path"]),
        (["0.5", "{data}", "0.5"], ["--data-path"]),
        (["-1", "{data}"], ["--data-path", "-1"]),
    ],
)
def test_a_data_path_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, paths: list[str], words: list[str]
) -> None:
    paths = [path.format(data=data) for path in paths]
    message = refused_at_once(capsys, tmp_path / "save", train_iters=4, data_path=paths)
    assert all(word in message for word in words), message


def test_too_little_data_to_hold_a_share_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "one", windows=1)
    message = refused_at_once(capsys, tmp_path / "save", train_iters=4, data_path=prefix, valid_share=0.1)
    assert "--valid-share 0.1" in message and prefix in message and "1 window" in message


# ---- teachers that cannot be ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A directory with one checkpoint of the small run."""
    save = tmp_path_factory.mktemp("teacher")
    train(data_path=data, train_iters=2, save=save)
    return save


PP3 = dict(pipeline_model_parallel_size=3, num_layers=3)


def another_tokenizer(root: Path) -> list[str]:
    rewrite(root / "iter_0000002", tokenizer="sha256:other")
    return [f"{root}/iter_0000002 was trained with tokenizer sha256:other, this run has "]


def more_ids(root: Path) -> list[str]:
    facts = json.loads((root / "iter_0000002" / "state.json").read_bytes())
    rewrite(root / "iter_0000002", architecture=facts["architecture"] | {"vocabulary": 300})
    return [f"{root}/iter_0000002 has a vocabulary of 300 ids", "the student's tokenizer has 257"]


def no_checkpoint(root: Path) -> list[str]:
    shutil.rmtree(root)
    return [f"{root} holds no checkpoint"]


def no_probe(root: Path) -> list[str]:
    rewrite(root / "iter_0000002", probe=None)
    return [f"{root}/iter_0000002 has no record of its own loss"]


def no_table(root: Path) -> list[str]:
    (root / "iter_0000002" / "checksums.json").unlink()
    return [f"{root}/iter_0000002/checksums.json: is missing", "no whole checkpoint of megatron_salt"]


def as_it_was(root: Path) -> list[str]:
    return [f"{root}"]


@pytest.mark.parametrize(
    "world_size, spoil, flags, words",
    [
        (1, another_tokenizer, {}, []),
        (1, more_ids, {}, []),
        (1, no_checkpoint, {}, []),
        (1, no_probe, {}, []),
        (1, no_table, {}, []),
        (1, as_it_was, dict(seq_length=20), ["--seq-length 16", "--seq-length 20"]),
        (3, as_it_was, dict(PP3, teacher_tensor_model_parallel_size=3),
         ["--num-attention-heads 4 is not divisible by --teacher-tensor-model-parallel-size = 3"]),
        (3, as_it_was, dict(PP3, teacher_pipeline_model_parallel_size=3),
         ["--num-layers 2 is not divisible by --teacher-pipeline-model-parallel-size", "= 3"]),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, teacher: Path, world_size: int,
    spoil: Callable[[Path], list[str]], flags: dict[str, Any], words: list[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    root = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    words = [*spoil(root), *words]
    flags = dict(data_path=data, train_iters=4, teacher_load=root, kd_steps=3) | flags
    message = refused_at_once(capsys, tmp_path / "save", **flags)
    assert "--teacher-load" in message and all(word in message for word in words), message


def test_what_is_found_of_a_teacher_once_ranks_have_met(tmp_path: Path, data: str, teacher: Path) -> None:
    """A damaged file, an exchange beyond its limit: refused by every rank before a step, with nothing written."""
    root = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    flags = dict(PP2, data_path=data, train_iters=4, teacher_load=root, kd_steps=3, save=tmp_path / "save")
    message = refused(2, **flags, teacher_exchange_max_gib=1e-6)
    for word in ("--teacher-exchange-max-gib 1e-06", "4 microbatches x 2 samples x 16 tokens x 32 x 4 bytes", "GiB"):
        assert word in message, message
    (shard,) = (root / "iter_0000002").glob("*.distcp")
    flip(shard, 1000)
    message = refused(2, **flags)
    assert message.startswith("--teacher-load: ") and f"{shard}: has sha256" in message and "--load-fallback" not in message
    assert list((tmp_path / "save").iterdir()) == []


def test_a_run_goes_on_with_its_own_teacher_or_not_at_all(tmp_path: Path, data: str, teacher: Path) -> None:
    """Inside stage 1. And a plain run has none, though a run with a teacher may begin with its weights."""
    train(data_path=data, train_iters=2, save=tmp_path / "other")
    flags = dict(data_path=data, train_iters=4, kd_steps=3, save=tmp_path / "save")
    train(**flags, teacher_load=teacher, exit_interval=2)
    before = sorted(tmp_path.rglob("*"))
    message = refused(**flags, load=tmp_path / "save", teacher_load=tmp_path / "other")
    there, here = f"(then in {teacher}/iter_0000002)", f"--teacher-load {tmp_path / 'other'}/iter_0000002 is sha256:"
    for word in (there, here, "step 2 is in stage 1"):
        assert word in message, message
    message = refused(**flags, load=tmp_path / "other", teacher_load=teacher)
    assert "was trained without a teacher up to step 2" in message and "--finetune" in message and "--teacher-load" in message
    assert sorted(tmp_path.rglob("*")) == before
    train(**flags | dict(save=tmp_path / "tuned"), load=tmp_path / "other", finetune=True, teacher_load=teacher)
    assert losses(tmp_path / "tuned").keys() == {1, 2, 3, 4}


# ---- places that cannot be written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["save", "jsonl", "tensorboard_dir"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_place_that_cannot_be_written(tmp_path: Path, data: str, flag: str, world_size: int) -> None:
    """A directory that is a file. (Permissions stop nobody where tests run as root.)"""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "inside"
    message = refused(world_size, **(dict(data_path=data, train_iters=4, save=tmp_path / "save") | {flag: path}))
    assert f"--{flag.replace('_', '-')} {path} cannot be written: " in message, message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


def test_a_profile_needs_a_place(data: str) -> None:
    assert "--tensorboard-dir or --save" in refused(2, data_path=data, train_iters=4, profile=True)


def test_skipped_ranges_that_make_no_sense(tmp_path: Path, data: str) -> None:
    message = refused(1, data_path=data, train_iters=4, skip_samples="30:20", save=tmp_path)
    assert "--skip-samples" in message and "30:20" in message and list(tmp_path.iterdir()) == []


# ---- a disk that fills up ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_from_step_3_on(size: int) -> Iterator[None]:
    """For the last rank: from step 3 on no file may grow beyond `size` bytes."""
    steps = iter(range(1, 100))

    def train_step(*arguments: Any) -> Any:
        if next(steps) == 3 and dist.get_rank() == dist.get_world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return original(*arguments)

    original = loop.train_step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with mock.patch.object(loop, "train_step", train_step):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_room_for_a_shard() -> contextlib.AbstractContextManager[None]:
    return full_from_step_3_on(40_000)


def no_room_for_a_log() -> contextlib.AbstractContextManager[None]:
    return full_from_step_3_on(100)


@pytest.mark.long
@pytest.mark.parametrize(
    "world_size, flags",
    [(1, {}), (1, dict(async_save=True)), (2, dict(use_distributed_optimizer=True, async_save=True)), (2, {})],
)
def test_a_disk_that_fills_up_ends_the_run_or_not_and_the_last_good_checkpoint_stands(
    tmp_path: Path, data: str, world_size: int, flags: dict[str, Any]
) -> None:
    flags = dict(flags, data_path=data, train_iters=6, save_interval=2, tensor_model_parallel_size=world_size, hidden_size=64)
    ended = run(world_size, **flags, save=tmp_path / "stop", within=no_room_for_a_shard)
    assert [one.status for one in ended] == [3] * world_size, ended
    message = the_error(ended[0].err)
    told = ["saving step 4", f"--save {tmp_path / 'stop'}", "GiB free", "iter_0000002 stands", "--on-save-error continue"]
    assert all(word in message for word in told), message
    assert checkpoints(tmp_path / "stop") == [2]
    assert sorted(path.name for path in (tmp_path / "stop").iterdir()) == [
        "iter_0000002", "latest_checkpointed_iteration.txt", "tensorboard", "train.jsonl"]  # fmt: skip

    ended = run(world_size, **flags, save=tmp_path / "go on", on_save_error="continue", within=no_room_for_a_shard)
    assert [one.status for one in ended] == [3] * world_size, ended  # the last step is done, and its checkpoint is not there
    assert "the run ended at step 6, which is not saved" in ended[0].err and "iter_0000002 stands" in ended[0].err
    assert sum(one.err.count("saving step 4") for one in ended) == sum(one.err.count("saving step 6") for one in ended) == 1
    assert checkpoints(tmp_path / "go on") == [2] and losses(tmp_path / "go on").keys() == {1, 2, 3, 4, 5, 6}
    for name in ("stop", "go on"):
        train(world_size, **flags, save=tmp_path / name, load=tmp_path / name)
    assert losses(tmp_path / "go on") == losses(tmp_path / "stop")


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=4, jsonl=tmp_path / "log.jsonl", tensorboard_dir=tmp_path)
    (ended,) = run(1, **flags, within=no_room_for_a_log)
    assert ended.status == 0 and "step 4/4" in ended.out
    assert [ended.err.count(f"warning: {flag} cannot be written") for flag in ("--jsonl", "--tensorboard-dir")] == [1, 1], (
        ended.err
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_bytes().splitlines()]
    assert steps[-1] == 2


def test_the_small_run_itself_is_fine(tmp_path: Path, data: str) -> None:
    """Else everything above would pass for the wrong reason."""
    train(data_path=data, train_iters=4, save=tmp_path)
    assert checkpoints(tmp_path) == [4] and SMALL["num_layers"] == 2
