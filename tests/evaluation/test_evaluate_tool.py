"""The tool evaluates checkpoints of any layout, and goes on where it left."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_salt.config import ParallelConfig
from megatron_salt.evaluation.metrics import METRICS
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from tests.evaluation.conftest import BYTES, CONTEXT, RUN, Files, main, metrics, read
from tests.support.program import write_tokens
from tests.support.ranks import run_ranks


def test_there_is_a_result_for_each_checkpoint_and_task(files: Files, alone: Path) -> None:
    results = read(alone)
    assert [(one["load"], one["name"]) for one in results] == [
        (load, name) for load in files.loads for name in ("weather", "passages", "broken")
    ]
    assert [one["step"] for one in results] == [10] * 3 + [11] * 3
    assert [one["examples"] for one in results[:3]] == [9, 2, 1]
    assert [one["cut"] for one in results[:3]] == [0, 1, 0]
    for one, form in zip(results, ("choices", "passage", "contexts") * 2, strict=True):
        assert tuple(one["metrics"]) == METRICS[form]
    table = alone.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + sum(len(METRICS[form]) for form in ("choices", "passage", "contexts"))
    assert table[0].startswith("| task | metric | ") and table[0].endswith(
        "/salt (step 10) | " + files.loads[1] + " (step 11) |"
    )
    assert results[0]["metrics"]["logprob_per_byte"] != results[3]["metrics"]["logprob_per_byte"]  # other weights


@pytest.mark.long
@pytest.mark.parametrize(
    "flags, world_size", [(["--tensor-model-parallel-size", 2], 2), (["--pipeline-model-parallel-size", 2], 4)]
)
def test_results_do_not_depend_on_the_layout(files: Files, alone: Path, tmp_path: Path, flags: list, world_size: int) -> None:
    ended = run_ranks(world_size, main, files.words(tmp_path / "r.json", "--batch-tokens", 64, *flags))
    assert [one.status for one in ended] == [0] * world_size, ended
    assert metrics(tmp_path / "r.json") == pytest.approx(metrics(alone), rel=1e-4, abs=1e-4)


def test_a_start_goes_on_after_the_last_finished_task(files: Files, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    [left] = run_ranks(1, main, files.words(output), 3)
    assert left.status == 3 and "left: received SIGTERM; the same command goes on" in left.out
    assert [one["name"] for one in read(output)] == ["weather", "passages"]
    [ended] = run_ranks(1, main, files.words(output))
    assert ended.status == 0 and "step 10, 3 results, 2 of them finished before" in ended.out
    assert "weather: 27 requests, " in ended.out.partition("step 11")[2]
    assert "weather: 27 requests, " not in ended.out.partition("step 11")[0]
    assert metrics(output) == metrics(alone)
    [again] = run_ranks(1, main, files.words(output))
    assert again.status == 0 and "requests, " not in again.out and output.with_suffix(".md").read_text() in again.out


def test_a_later_start_may_spell_paths_and_metrics_otherwise(files: Files, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    output.write_bytes(alone.read_bytes())
    load, other = files.loads[0] + "/", files.loads[1]
    words = ["--load", load, other, "--tasks", *files.tasks, "--output", str(output), "--metrics", "acc"]
    [ended] = run_ranks(1, main, words)
    assert ended.status == 0 and "requests, " not in ended.out, ended
    table = output.with_suffix(".md").read_text().splitlines()
    assert table[0] == f"| task | metric | {load} (step 10) | {other} (step 11) |" and len(table) == 5
    assert [one["load"] for one in read(output)] == [load] * 3 + [other] * 3
    assert metrics(output) == metrics(alone)


def test_other_results_are_not_replaced_unasked(files: Files, alone: Path) -> None:
    before = alone.read_bytes()
    words = ["--load", files.loads[0], "--tasks", files.tasks[0], "--output", str(alone)]
    [ended] = run_ranks(1, main, words)
    assert ended.status == 2 and f"--output {alone} has 5 results that these flags do not ask for" in ended.err
    assert alone.read_bytes() == before


def test_shots_and_bos_are_part_of_a_result(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    words = ["--load", files.loads[0], "--tasks", files.tasks[0], "--output", str(output), "--metrics", "acc"]
    [ended] = run_ranks(1, main, [*words, "--shots", "1", "--shot-file", files.tasks[0]])
    assert ended.status == 0, ended
    [result] = read(output)
    assert result["identity"]["shots"] == 1 and result["identity"]["shot_file_sha256"] == result["identity"]["sha256"]
    assert len(output.with_suffix(".md").read_text().splitlines()) == 3  # --metrics acc
    assert len(result["metrics"]) == len(METRICS["choices"])
    [ended] = run_ranks(1, main, words)
    assert ended.status == 2 and "has 1 results that these flags do not ask for" in ended.err


def plain_losses(load: str, prefix: str) -> tuple[float, float, int]:
    """In one rank: (loss, accuracy, bytes of labels) of all windows from whole logits, one window at a time."""
    from megatron_salt.checkpoint.loading import load_weights

    mesh = make_student_mesh(student_layout(ParallelConfig(), 1))
    seed_everything(0, mesh)
    chunks = build_model(RUN.model, ParallelConfig(), CONTEXT, BYTES.vocabulary_size, torch.float32, CONTEXT, mesh)
    load_weights(Path(load), chunks, mesh)
    tokens = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64)
    losses, right, num_bytes = [], [], 0
    for first in range(0, (len(tokens) - 1) // CONTEXT * CONTEXT, CONTEXT):
        window = torch.from_numpy(tokens[first : first + CONTEXT + 1])
        with torch.no_grad():
            hidden = chunks[0].eval()(window[None, :-1], torch.arange(CONTEXT)[None], None)
            logits = chunks[0].logits(hidden)[:, 0, : BYTES.vocabulary_size].double()
        losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
        right += (logits.argmax(1) == window[1:]).tolist()
        num_bytes += int((window[1:] != BYTES.eod).sum())
    return float(np.mean(losses)), float(np.mean(right)), num_bytes


@pytest.mark.parametrize("flags, world_size", [([], 3), (["--pipeline-model-parallel-size", 2], 2), ([], 1)])
def test_every_window_of_a_dataset_counts_once_in_every_layout(
    files: Files, tmp_path: Path, flags: list, world_size: int
) -> None:
    prefix = write_tokens(tmp_path / "words", windows=19)
    output = tmp_path / "results.json"
    words = ["--load", files.loads[0], "--data", f"prose={prefix}", "--output", str(output), "--batch-tokens", "100"]
    ended = run_ranks(world_size, main, [*words, *map(str, flags)])
    assert [one.status for one in ended] == [0] * world_size, ended
    [(loss, accuracy, num_bytes)] = run_ranks(1, plain_losses, files.loads[0], prefix)
    [result] = read(output)
    figures = {name: figure["value"] for name, figure in result["metrics"].items()}
    assert "prose: 6 windows, 288 tokens in " in ended[0].out
    assert (result["windows"], result["tokens"]) == (19 * 16 // CONTEXT, 19 * 16 // CONTEXT * CONTEXT)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5) and figures["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(loss * result["tokens"] / math.log(2) / num_bytes, rel=1e-5)
    assert "| prose | bits_per_byte | " in output.with_suffix(".md").read_text()


def test_all_checkpoints_of_a_call_have_windows_of_one_length(files: Files, short: str, tmp_path: Path) -> None:
    """Of the same weights, so with the same figures; by default in windows of the shorter context."""
    prefix, output = write_tokens(tmp_path / "words", windows=19), tmp_path / "results.json"
    words = ["--load", files.loads[0], short, "--data", f"prose={prefix}", "--output", str(output)]
    [ended] = run_ranks(1, main, words)
    assert ended.status == 0, ended
    assert [one["identity"]["seq_length"] for one in read(output)] == [32, 32]
    assert "windows of --data have 32 tokens, the model takes 48\n" in ended.out
    assert "windows of --data have 32 tokens, the model takes 32\n" in ended.out
    long, own = (one["metrics"] for one in read(output))
    assert {name: one["value"] for name, one in long.items()} == pytest.approx(
        {name: one["value"] for name, one in own.items()}, rel=1e-5
    )  # sums of float32 in another order
    [other] = run_ranks(1, main, [*words, "--seq-length", "16"])
    assert other.status == 2 and "has 2 results that these flags do not ask for" in other.err
    [asked] = run_ranks(1, main, [*words, "--seq-length", "16", "--overwrite"])
    assert asked.status == 0 and [one["windows"] for one in read(output)] == [19, 19]
    assert read(output)[0]["metrics"]["loss"] != long["loss"]
