"""score_data: the index equals full logits in float64 and does not depend on layout, shards, kills; mistakes are refused by name."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.checkpoint.checkpointer import load_weights
from megatron_salt.cli import run_tool
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.windows import Windows
from megatron_salt.model.attention import attention_mask
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.salt import scorer
from megatron_salt.selection.score_format import columns, content_hashes
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.tools.merge_scores import MergeConfig, merge_scores
from megatron_salt.tools.score_data import ScoreConfig, score_data
from tests.support.program import EOD, SEQ_LENGTH, VOCABULARY, the_error, train, write_tokens
from tests.support.ranks import run_ranks
from tests.support.score_files import files_in

TOP_K = (1, 10, 100)
NUM_SAMPLES = 22 + 9  # of both datasets


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def argv(**flags: Any) -> list[str]:
    words: list[str] = []
    for name, value in (dict(micro_batch_size=2, block_samples=4, score_top_k=TOP_K) | flags).items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-")]
            words += [] if value is True else [str(one) for one in (value if isinstance(value, tuple) else (value,))]
    return words


def main(words: list[str]) -> Ended:
    """In every rank of the pool."""
    out, err = io.StringIO(), io.StringIO()
    in_the_pool = mock.patch("megatron_salt.parallel.launch.distributed", return_value=contextlib.nullcontext())
    with in_the_pool, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_tool(ScoreConfig, score_data, words)
    return Ended(status, out.getvalue(), err.getvalue())


def score(world_size: int = 1, **flags: Any) -> str:
    """What the ranks of a run that succeeds print."""
    ended = run_ranks(world_size, main, argv(**flags))
    assert [one.status for one in ended] == [0] * world_size, ended
    return "".join(one.out for one in ended)


def refused(world_size: int = 1, **flags: Any) -> str:
    ended = run_ranks(world_size, main, argv(**flags))
    assert [one.status for one in ended] == [2] * world_size and not any("Traceback" in one.err for one in ended), ended
    return the_error(ended[0].err)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return write_tokens(folder / "words"), write_tokens(folder / "more", windows=9, seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, str]) -> Path:
    save = tmp_path_factory.mktemp("teacher")
    train(data_path=data[0], untie_embeddings_and_output_weights=True, train_iters=6, lr=3e-2, save=save, save_at=(2,))
    return save


@pytest.fixture(scope="module")
def flags(data: tuple[str, str], teacher: Path) -> dict[str, Any]:
    return dict(teacher_load=teacher, data_path=data, tokenizer_type="ByteLevelTokenizer")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, flags: dict[str, Any]) -> Path:
    """The whole index, by one rank in one go."""
    output = tmp_path_factory.mktemp("scores") / "index"
    assert f"31 of {NUM_SAMPLES} samples in 8 blocks, 0 of them finished before" in score(**flags, output=output)
    return output


def table(directory: Path) -> dict[str, np.ndarray]:
    """All columns, whole."""
    opened = ScoreIndex.open([str(directory)])
    names = columns(opened.manifest.top_k, opened.manifest.seq_length)
    return {name: np.concatenate([part for _, part in opened.chunks(name)]) for name in names}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(one[name].tobytes() == other[name].tobytes() for name in one)


# ---- the numbers --------------------------------------------------------------------------------------------------------


def full_logits(directory: str, tokens: np.ndarray, inside_documents: bool) -> np.ndarray:
    """In one rank: the teacher's logits for each window alone, float32 [n, s, V], by the head's own linear."""
    mesh = make_student_mesh(student_layout(from_yaml(Path(directory, "run.yaml").read_text(), "").parallel, 1))
    seed_everything(0, mesh)
    run = from_yaml(Path(directory, "run.yaml").read_text(), "")
    [model] = build_model(run.model, run.parallel, SEQ_LENGTH, VOCABULARY, torch.float32, 100, mesh)
    load_weights(Path(directory), [model], mesh)
    rows = []
    with torch.no_grad():
        for window in torch.from_numpy(tokens[:, :-1]):
            is_eod = window[None] == EOD
            documents = (is_eod.cumsum(1) - is_eod.long()) if inside_documents else None
            mask = attention_mask(documents, SEQ_LENGTH, model.cp_group, torch.device("cpu"))
            rows.append(model.logits(model(window[None], torch.arange(SEQ_LENGTH)[None], mask))[:, 0, :VOCABULARY].numpy())
    return np.stack(rows)


def slow_scores(logits: np.ndarray, window: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """A window's columns from the definitions, token by token, in float64."""
    losses, ranks, entropies = [], [], []
    for row, label, counted in zip(logits, window[1:], counts, strict=True):
        if counted:
            log_p = Tensor.log_softmax(torch.from_numpy(row.astype(np.float64)), -1).numpy()
            losses.append(-log_p[label])
            ranks.append((row > row[label]).sum())
            entropies.append(-(np.exp(log_p) * log_p).sum())
    told: dict[str, float] = {}
    for k in TOP_K:
        zeroed = [loss if rank < k else 0.0 for loss, rank in zip(losses, ranks, strict=True)]
        dropped = [loss for loss, rank in zip(losses, ranks, strict=True) if rank < k]
        told |= {f"median_zeroed_{k}": np.median(zeroed), f"mean_zeroed_{k}": np.mean(zeroed),
                 f"median_dropped_{k}": np.median(dropped) if dropped else 0.0, f"mean_dropped_{k}": np.mean(dropped) if dropped else 0.0,
                 f"share_{k}": len(dropped) / len(losses)}  # fmt: skip
    return told | {"median": np.median(losses), "mean": np.mean(losses), "entropy": np.mean(entropies), "tokens": len(losses)}


@pytest.mark.parametrize("masked", [False, True])
def test_every_column_equals_full_logits_in_float64(
    tmp_path: Path, flags: dict[str, Any], index: Path, teacher: Path, data: tuple[str, str], masked: bool
) -> None:
    if masked:
        index = tmp_path / "masked"
        score(**flags, output=index, eod_mask_loss=True, reset_attention_mask=True)
    found = table(index)
    windows = [Windows(TokenFile.open(prefix), SEQ_LENGTH) for prefix in data]
    tokens = np.concatenate([one.read_many(np.arange(len(one))) for one in windows])
    [logits] = run_ranks(1, full_logits, str(teacher / "iter_0000006"), tokens, masked)
    for number, window in enumerate(tokens):
        counts = window[:-1] != EOD if masked else np.ones(SEQ_LENGTH, bool)
        for name, value in slow_scores(logits[number], window, counts).items():
            assert found[name][number] == pytest.approx(value, rel=3e-6, abs=3e-6), (number, name)
    assert found["content"].tolist() == content_hashes(tokens).tolist()
    assert (found["tokens"] < SEQ_LENGTH).any() == masked
    assert len(set(found["median_zeroed_10"].tolist())) > 20 and 0 < found["share_1"].mean() < found["share_10"].mean() < 1


# ---- the same index -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, layout",
    [
        (2, {}),
        (3, {}),
        (2, dict(pipeline_model_parallel_size=2)),
        (4, dict(pipeline_model_parallel_size=2)),
        (2, dict(tensor_model_parallel_size=2)),
        (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    ],
)
def test_the_index_does_not_depend_on_the_layout(
    tmp_path: Path, flags: dict[str, Any], index: Path, world_size: int, layout: dict[str, int]
) -> None:
    """Byte for byte where tp is the same: nobody's matrices change their shape. Another tp sums in another order."""
    score(world_size, **flags, **layout, output=tmp_path / "index")
    one, other = table(index), table(tmp_path / "index")
    if "tensor_model_parallel_size" not in layout:
        assert same(one, other)
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5)


def test_shards_by_independent_jobs_are_the_whole(tmp_path: Path, flags: dict[str, Any], index: Path) -> None:
    """More shards than blocks too: some have nothing to do. A job that is started twice does nothing the second time."""
    for n, world_size in ((3, 2), (11, 1)):
        output = tmp_path / str(n)
        for i in reversed(range(n)):
            told = score(world_size, **flags, output=output, shard=f"{i}/{n}")
            assert "finished" in told or "none of the 8 blocks" in told
        again = score(world_size, **flags, output=output, shard=f"{n - 1}/{n}")
        assert "blocks were finished before" in again or (n == 11 and "none of the 8 blocks" in again)
        assert same(table(output), table(index))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_job_goes_on_and_the_index_is_the_same(
    tmp_path: Path, flags: dict[str, Any], index: Path, world_size: int
) -> None:
    """kill -9 after some blocks, twice, and the rest under another number of replicas. What was finished is not done again."""
    done = 0
    for stop in (2, 5):
        with contextlib.ExitStack() as stack:
            process = start(world_size, **flags, output=tmp_path / "index")
            stack.callback(kill, process)
            assert process.stdout is not None
            for line in process.stdout:
                if "finished before" in line:
                    assert finished_before(line) >= done
                if f": {stop - done} blocks, " in line:
                    break
            else:
                raise AssertionError("it ended before it could be killed")
        done = stop
    told = score(3 - world_size, **flags, output=tmp_path / "index")
    assert 5 <= finished_before(told) < 8, told
    assert same(table(tmp_path / "index"), table(index))


def interrupted(words: list[str], how: str) -> Ended:
    """In every rank: the last one gets a signal, or makes the file, when it comes to its fifth microbatch."""
    from megatron_salt.salt.scorer import Scorer

    original, numbers = Scorer._microbatch, iter(range(1, 100))

    def microbatch(scorer: Scorer, ids: np.ndarray) -> Any:
        if next(numbers) == 5 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1) if how == "signal" else Path(how).touch()
        return original(scorer, ids)

    with mock.patch.object(Scorer, "_microbatch", microbatch), mock.patch.object(scorer, "PIECE", 1):
        return main(words)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_job_that_is_told_to_leave_says_how_far_it_is_and_the_same_command_goes_on(
    tmp_path: Path, flags: dict[str, Any], index: Path, how: str, world_size: int
) -> None:
    """A block is 2 microbatches, and each round of them one look at whether to leave: one rank leaves in its third block, two, of which
    each has one microbatch of a block, after their fifth. It does not end as one that is finished."""
    file = tmp_path / "leave"
    flags = flags | dict(output=tmp_path / "index", exit_file=file)
    ended = run_ranks(world_size, interrupted, argv(**flags), "signal" if how == "signal" else str(file))
    assert [one.status for one in ended] == [3] * world_size, ended
    reason = "SIGUSR1 received" if how == "signal" else f"--exit-file {file} has appeared"
    told = "".join(one.out for one in ended)
    found = re.search(rf"left after (\d+) of {NUM_SAMPLES} windows: {reason}; the same command goes on\n", told)
    assert found and int(found[1]) == {1: 8, 2: 20}[world_size] and "finished:" not in told, told
    if how == "file":
        assert f"--exit-file {file} is there" in refused(world_size, **flags)
        file.unlink()
    assert finished_before(score(world_size, **flags)) == int(found[1]) // 4
    assert same(table(tmp_path / "index"), table(index))


def finished_before(told: str) -> int:
    """What a job says it found."""
    return int(told.partition(" of them finished before")[0].split()[-1])


def start(world_size: int, **flags: Any) -> subprocess.Popen[str]:
    """The tool as a process of its own, slowed down so that it can be killed in the middle."""
    slowly = (
        "import sys, time; from megatron_salt.salt import scorer; whole = scorer.Scorer.score\n"
        "def score(*arguments):\n    time.sleep(0.3)\n    return whole(*arguments)\n"
        "scorer.Scorer.score = score\n"
        "from megatron_salt.cli import run_tool; from megatron_salt.tools.score_data import ScoreConfig, score_data\n"
        "sys.exit(run_tool(ScoreConfig, score_data, sys.argv[1:]))"
    )
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world_size),
        "--no-python",
        sys.executable,
    ]
    return subprocess.Popen(
        [sys.executable, *(launcher if world_size > 1 else []), "-c", slowly, *argv(**flags)], text=True, start_new_session=True,
        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """The launcher and all that it started."""
    of = psutil.Process(process.pid)
    everyone = [of, *of.children(recursive=True)]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everyone)


def test_an_early_checkpoint_gives_other_scores(tmp_path: Path, flags: dict[str, Any], index: Path, teacher: Path) -> None:
    score(**flags | dict(teacher_load=teacher / "iter_0000002"), output=tmp_path / "early")
    assert not same(table(tmp_path / "early"), table(index))
    assert ScoreIndex.open([str(tmp_path / "early")]).manifest.teacher_step == 2


# ---- a part of the windows ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory, flags: dict[str, Any]) -> Path:
    """An index of some of the windows, by one rank in one go."""
    output = tmp_path_factory.mktemp("part") / "index"
    told = score(**flags, output=output, sample=0.4)
    count = int(ScoreIndex.open([str(output)]).manifest.scored(0, NUM_SAMPLES).sum())
    assert f"31 of {NUM_SAMPLES} samples, {count} of them by --sample 0.4 in 8 blocks" in told
    assert f"the index: about 40.00% of {NUM_SAMPLES} windows, {0.4 * NUM_SAMPLES * SEQ_LENGTH:.3g} tokens, " in told
    return output


def test_a_part_has_the_rows_of_the_whole_and_zeros(index: Path, part: Path) -> None:
    whole, found = table(index), table(part)
    scored = ScoreIndex.open([str(part)]).manifest.scored(0, NUM_SAMPLES)
    assert 4 < scored.sum() < 22
    for name in whole:  # another microbatch rounds otherwise
        assert found[name][scored] == pytest.approx(whole[name][scored], rel=1e-5, abs=1e-5), name
        assert not found[name][~scored].any()
    assert found["content"][scored].tolist() == whole["content"][scored].tolist()


@pytest.mark.parametrize("n, world_size", [(3, 2), (11, 1)])
def test_shards_of_a_part_are_the_part(tmp_path: Path, flags: dict[str, Any], part: Path, n: int, world_size: int) -> None:
    """More shards than blocks too; a block may have no window of the part."""
    for i in reversed(range(n)):
        score(world_size, **flags, output=tmp_path / "index", sample=0.4, shard=f"{i}/{n}")
    assert same(table(tmp_path / "index"), table(part))
    merge_scores(MergeConfig((str(tmp_path / "index"),), str(tmp_path / "merged")))
    assert files_in(tmp_path / "merged") == files_in(part)


def test_a_part_is_resumed_as_it_was_begun(tmp_path: Path, flags: dict[str, Any], part: Path) -> None:
    for one in run_ranks(2, out_of_space, argv(**flags, output=tmp_path / "index", sample=0.4)):
        assert one.status == 2, one
    for changes, told in (
        (dict(sample=0.5), "sample is 0.4 there and 0.5 here"),
        (dict(), "sample is 0.4 there and None here"),
        (dict(sample=0.4, sample_seed=7), "sample seed is 1234 there and 7 here"),
    ):
        assert told in refused(**flags, output=tmp_path / "index", **changes)
    assert "2 of them finished before" in score(**flags, output=tmp_path / "index", sample=0.4)
    assert same(table(tmp_path / "index"), table(part))


# ---- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(score_top_k=(1, 10)), ["is an index of other scores: top k is (1, 10, 100) there and (1, 10) here"]),
        (dict(micro_batch_size=4), ["micro batch size is 2 there and 4 here"]),
        (dict(block_samples=8), ["block samples is 4 there and 8 here"]),
        (dict(seq_length=8), ["recorded its loss on 16 tokens at least, and --seq-length is 8"]),
        (dict(dtype="bfloat16"), ["dtype is float32 there and bfloat16 here"]),
        (dict(eod_mask_loss=True), ["eod_mask_loss is False there and True here"]),
        (dict(shard="1/2"), ["overlaps", "the same n in --shard i/n"]),
        (dict(shard="2/2"), ["--shard takes i/n", "got 2/2"]),
        (dict(block_samples=3), ["--block-samples 3 is not a multiple of --micro-batch-size 2"]),
        (dict(score_top_k=(10, 10)), ["--score-top-k takes different numbers of at least 1, got 10 10"]),
        (dict(sample=1.0), ["--sample must be above 0 and below 1, got 1.0"]),
        (dict(sample=1e-6), ["--sample 1e-06 takes none of 31 windows"]),
        (dict(sample_seed=3), ["--sample-seed 3 needs --sample"]),
        (dict(sample=0.5, sample_seed=10**30), ["--sample-seed 1000000", "from 0 to 2^63 - 1"]),
        (dict(sample=0.5), ["sample is None there and 0.5 here"]),
        (dict(score_top_k=(300,)), ["--score-top-k 300 is more than the 257 ids"]),
        (dict(seq_length=32), ["--seq-length 16, shorter than this run's --seq-length 32"]),
        (dict(tensor_model_parallel_size=3), ["1 ranks cannot hold whole replicas", "--tensor-model-parallel-size 3"]),
    ],
)
def test_mistakes_are_refused_by_name(flags: dict[str, Any], index: Path, changes: dict[str, Any], told: list[str]) -> None:
    before = sorted(index.rglob("*"))
    message = refused(**flags | dict(output=index) | changes)
    assert all(words in message for words in told), message
    assert sorted(index.rglob("*")) == before


def test_another_teacher_or_dataset_is_refused(
    tmp_path: Path, flags: dict[str, Any], index: Path, teacher: Path, data: tuple[str, str]
) -> None:
    assert "teacher step is 6 there and 2 here" in refused(**flags | dict(teacher_load=teacher / "iter_0000002"), output=index)
    message = refused(2, **flags | dict(data_path=data[::-1]), output=index)
    assert data[0] in message and data[1] in message
    shutil.copytree(teacher, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "iter_0000006").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "--teacher-load: " in refused(**flags | dict(teacher_load=tmp_path / "damaged"), output=tmp_path / "new")
    assert "holds no checkpoint" in refused(**flags | dict(teacher_load=tmp_path), output=tmp_path / "new")


def test_a_full_disk_ends_every_rank_and_keeps_what_is_finished(tmp_path: Path, flags: dict[str, Any], index: Path) -> None:
    for one in run_ranks(2, out_of_space, argv(**flags, output=tmp_path / "index")):
        assert one.status == 2, one
    assert "cannot be written: No space left on device" in one.err and "finished blocks stay" in one.err
    assert "2 of them finished before" in score(**flags, output=tmp_path / "index")
    assert same(table(tmp_path / "index"), table(index))


def out_of_space(words: list[str]) -> Ended:
    """In every rank: the third block finds no space."""
    from megatron_salt.selection.score_writer import ShardWriter

    whole = ShardWriter.write

    def write(writer: ShardWriter, block: int, rows: Any) -> None:
        if block == 2:
            raise OSError(28, "No space left on device", "mean.npy")
        whole(writer, block, rows)

    with mock.patch.object(ShardWriter, "write", write):
        return main(words)
