"""score_data: the index equals full logits in float64 and does not depend on layout or shards; mistakes are refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_salt.checkpoint.loading import load_weights
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.windows import Windows
from megatron_salt.model.attention import attention_mask
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.selection.score_format import content_hashes
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.tools import score_data
from megatron_salt.tools.merge_scores import MergeConfig, merge_scores
from tests.support.program import EOD, SEQ_LENGTH, VOCABULARY
from tests.support.ranks import run_ranks
from tests.support.scoring import NUM_SAMPLES, TOP_K, argv, refused, same, score, table
from tests.support.selections import files_in


def full_logits(directory: str, tokens: np.ndarray, inside_documents: bool, vocabulary: int = VOCABULARY) -> np.ndarray:
    """In one rank: the teacher's logits of each window, computed alone by the head's linear layer: float32 [n, s, V]."""
    mesh = make_student_mesh(student_layout(from_yaml(Path(directory, "run.yaml").read_text(), "").parallel, 1))
    seed_everything(0, mesh)
    run = from_yaml(Path(directory, "run.yaml").read_text(), "")
    [model] = build_model(run.model, run.parallel, SEQ_LENGTH, vocabulary, torch.float32, 100, mesh)
    load_weights(Path(directory), [model], mesh)
    rows = []
    with torch.no_grad():
        for window in torch.from_numpy(tokens[:, :-1]):
            is_eod = window[None] == EOD
            documents = (is_eod.cumsum(1) - is_eod.long()) if inside_documents else None
            mask = attention_mask(documents, SEQ_LENGTH, model.cp_group, torch.device("cpu"))
            rows.append(model.logits(model(window[None], torch.arange(SEQ_LENGTH)[None], mask))[:, 0, :vocabulary].numpy())
    return np.stack(rows)


def slow_scores(logits: np.ndarray, window: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Columns of a window, computed from the definitions token by token in float64."""
    losses, ranks, entropies = [], [], []
    for row, label, counted in zip(logits, window[1:], counts, strict=True):
        if counted:
            log_p = Tensor.log_softmax(torch.from_numpy(row.astype(np.float64)), -1).numpy()
            losses.append(-log_p[label])
            ranks.append((row > row[label]).sum())
            entropies.append(-(np.exp(log_p) * log_p).sum())
    scores: dict[str, float] = {}
    for k in TOP_K:
        zeroed = [loss if rank < k else 0.0 for loss, rank in zip(losses, ranks, strict=True)]
        dropped = [loss for loss, rank in zip(losses, ranks, strict=True) if rank < k]
        scores |= {f"median_zeroed_{k}": np.median(zeroed), f"mean_zeroed_{k}": np.mean(zeroed),
                 f"median_dropped_{k}": np.median(dropped) if dropped else 0.0, f"mean_dropped_{k}": np.mean(dropped) if dropped else 0.0,
                 f"share_{k}": len(dropped) / len(losses)}  # fmt: skip
    return scores | {"median": np.median(losses), "mean": np.mean(losses), "entropy": np.mean(entropies), "tokens": len(losses)}


@pytest.mark.parametrize("masked", [False, True])
def test_every_column_equals_full_logits_in_float64(
    tmp_path: Path, score_flags: dict[str, Any], score_index: Path, teacher: Path, datasets: tuple[str, str], masked: bool
) -> None:
    if masked:
        score_index = tmp_path / "masked"
        score(**score_flags, output=score_index, eod_mask_loss=True, reset_attention_mask=True)
    found = table(score_index)
    windows = [Windows(TokenFile.open(prefix), SEQ_LENGTH) for prefix in datasets]
    tokens = np.concatenate([one.read_many(np.arange(len(one))) for one in windows])
    [logits] = run_ranks(1, full_logits, str(teacher / "iter_0000006"), tokens, masked)
    for number, window in enumerate(tokens):
        counts = window[:-1] != EOD if masked else np.ones(SEQ_LENGTH, bool)
        for name, value in slow_scores(logits[number], window, counts).items():
            assert found[name][number] == pytest.approx(value, rel=3e-6, abs=3e-6), (number, name)
    assert found["content"].tolist() == content_hashes(tokens).tolist()
    assert (found["tokens"] < SEQ_LENGTH).any() == masked
    assert len(set(found["median_zeroed_10"].tolist())) > 20 and 0 < found["share_1"].mean() < found["share_10"].mean() < 1


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
    tmp_path: Path, score_flags: dict[str, Any], score_index: Path, world_size: int, layout: dict[str, int]
) -> None:
    """Equal bytes if tp is equal, because matrix shapes are equal. Another tp sums in another order."""
    score(world_size, **score_flags, **layout, output=tmp_path / "index")
    one, other = table(score_index), table(tmp_path / "index")
    if "tensor_model_parallel_size" not in layout:
        assert same(one, other)
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5)


def test_shards_by_independent_jobs_are_the_whole(tmp_path: Path, score_flags: dict[str, Any], score_index: Path) -> None:
    """Also with more shards than blocks, so that some have nothing to do. A finished job that starts again does nothing."""
    for n, world_size in ((3, 2), (11, 1)):
        output = tmp_path / str(n)
        for i in reversed(range(n)):
            printed = score(world_size, **score_flags, output=output, shard=f"{i}/{n}")
            assert "finished" in printed or "none of the 8 blocks" in printed
        again = score(world_size, **score_flags, output=output, shard=f"{n - 1}/{n}")
        assert "blocks were finished before" in again or (n == 11 and "none of the 8 blocks" in again)
        assert same(table(output), table(score_index))


def test_an_early_checkpoint_gives_other_scores(
    tmp_path: Path, score_flags: dict[str, Any], score_index: Path, teacher: Path
) -> None:
    score(**score_flags | dict(teacher_load=teacher / "iter_0000002"), output=tmp_path / "early")
    assert not same(table(tmp_path / "early"), table(score_index))
    assert ScoreIndex.open([str(tmp_path / "early")]).manifest.teacher_step == 2


def test_a_part_has_the_rows_of_the_whole_and_zeros(score_index: Path, part_index: Path) -> None:
    whole, found = table(score_index), table(part_index)
    scored = ScoreIndex.open([str(part_index)]).manifest.scored(0, NUM_SAMPLES)
    assert 4 < scored.sum() < 22
    for name in whole:  # another microbatch rounds otherwise
        assert found[name][scored] == pytest.approx(whole[name][scored], rel=1e-5, abs=1e-5), name
        assert not found[name][~scored].any()
    assert found["content"][scored].tolist() == whole["content"][scored].tolist()


@pytest.mark.parametrize("n, world_size", [(3, 2), (11, 1)])
def test_shards_of_a_part_are_the_part(
    tmp_path: Path, score_flags: dict[str, Any], part_index: Path, n: int, world_size: int
) -> None:
    """Also with more shards than blocks. Some blocks have no window of the part."""
    for i in reversed(range(n)):
        score(world_size, **score_flags, output=tmp_path / "index", sample=0.4, shard=f"{i}/{n}")
    assert same(table(tmp_path / "index"), table(part_index))
    merge_scores(MergeConfig((str(tmp_path / "index"),), str(tmp_path / "merged")))
    assert files_in(tmp_path / "merged") == files_in(part_index)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(score_top_k=(1, 10)), ["is an index of other scores (index.json): top k is (1, 10, 100) there and (1, 10) here"]),
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
def test_mistakes_are_refused_by_name(
    score_flags: dict[str, Any], score_index: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    before = sorted(score_index.rglob("*"))
    message = refused(**score_flags | dict(output=score_index) | changes)
    assert all(words in message for words in expected), message
    assert sorted(score_index.rglob("*")) == before


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_a_rank_that_must_have_a_gpu_does_not_fall_back_to_the_cpu(
    score_flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score_data.main(argv(**score_flags | dict(output=tmp_path / "scores", device="cuda"))) == 2
    assert "error: --device cuda: torch" in capsys.readouterr().err and not (tmp_path / "scores").exists()


def test_another_teacher_or_dataset_is_refused(
    tmp_path: Path, score_flags: dict[str, Any], score_index: Path, teacher: Path, datasets: tuple[str, str]
) -> None:
    assert "teacher step is 6 there and 2 here" in refused(
        **score_flags | dict(teacher_load=teacher / "iter_0000002"), output=score_index
    )
    message = refused(2, **score_flags | dict(data_path=datasets[::-1]), output=score_index)
    assert datasets[0] in message and datasets[1] in message
    shutil.copytree(teacher, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "iter_0000006").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "--teacher-load: " in refused(**score_flags | dict(teacher_load=tmp_path / "damaged"), output=tmp_path / "new")
    assert "holds no checkpoint" in refused(**score_flags | dict(teacher_load=tmp_path), output=tmp_path / "new")
