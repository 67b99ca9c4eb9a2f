"""The tool evaluates checkpoints of any layout, goes on where it left, and refuses what it cannot use in one line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.cli import run_tool
from megatron_salt.config import CheckpointConfig, ParallelConfig, RunConfig, TokenizerConfig, TrainingConfig
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.evaluation.metrics import METRICS
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.hardware import COMPILE_WORKERS
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.tools import evaluate as tool
from megatron_salt.tools.flags.evaluate_config import EvaluateConfig
from tests.support.program import write_tokens
from tests.support.ranks import run_ranks
from tests.support.small import SMALL

CONTEXT = 48
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
RUN = RunConfig(
    model=replace(SMALL, num_layers=2, hidden_size=32, ffn_hidden_size=64, init_method_std=0.2),
    training=TrainingConfig(seq_length=CONTEXT),
)
WEATHER = [
    {"context": f"Am Tag {number} war es", "choices": ["naß", "trocken wie Stroh", "日照"], "gold": number % 3}
    for number in range(9)
]
PASSAGES = [{"passage": "Nobody had seen the grey cat before it sat down on the old mat"}, {"passage": "two words"}]
BROKEN = [{"contexts": ["The jar fell, so the jar", "The jar fell, so the floor"], "continuation": " broke.", "gold": 0}]


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def write_checkpoint(directory: str, step: int, seed: int, context: int = CONTEXT) -> None:
    """In one rank: write the checkpoint of a run with random weights."""
    run = replace(RUN, training=TrainingConfig(seq_length=context))
    mesh = make_student_mesh(student_layout(ParallelConfig(), 1))
    seed_everything(seed, mesh)
    chunks = build_model(run.model, ParallelConfig(), context, BYTES.vocabulary_size, torch.float32, context, mesh)
    identity = RunIdentity(
        yaml=to_yaml(run), architecture=asdict(run.model), tokenizer_fingerprint=BYTES.fingerprint, data_fingerprint="content:none",
        seed=7,
    )  # fmt: skip
    checkpointer = Checkpointer(
        CheckpointConfig(save=directory), identity, BYTES, mesh, chunks=chunks, optimizer=None, scheduler=None
    )
    checkpointer.save(RunState(step=step, consumed_samples=step), final=True)


def main(words: list[str], stop_at: int | None = None) -> Ended:
    """In every rank of the pool: run the tool. stop_at: the task, from 1, before which SIGTERM comes."""
    out, err = io.StringIO(), io.StringIO()
    count = iter(range(1, 100))

    def stopped(*arguments: Any) -> Any:
        if next(count) == stop_at:
            raise tool.LeftEarly("received SIGTERM")
        return evaluate_one(*arguments)

    evaluate_one = tool.evaluate_one
    in_the_pool = mock.patch("megatron_salt.parallel.launch.distributed", return_value=contextlib.nullcontext())
    stopping = mock.patch.object(tool, "evaluate_one", stopped)
    with in_the_pool, stopping, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_tool(EvaluateConfig, tool.evaluate, words)
    return Ended(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Files:
    """Two runs and three tasks."""

    loads: list[str]
    tasks: list[str]

    def words(self, output: Path, *more: object) -> list[str]:
        return ["--load", *self.loads, "--tasks", *self.tasks, "--output", str(output), *map(str, more)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("evaluate")
    loads = [str(folder / name) for name in ("salt", "plain")]
    for seed, load in enumerate(loads):
        run_ranks(1, write_checkpoint, load, 10 + seed, seed)
    tasks = []
    for name, records in (("weather", WEATHER), ("passages", PASSAGES), ("broken", BROKEN)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        tasks.append(str(path))
    return Files(loads, tasks)


@pytest.fixture(scope="module")
def alone(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one rank."""
    output = tmp_path_factory.mktemp("alone") / "results.json"
    [ended] = run_ranks(1, main, files.words(output))
    assert ended.status == 0, ended
    table = output.with_suffix(".md").read_text()
    assert table in ended.out and f"written to {output}" in ended.out
    assert "weather: 27 requests, " in ended.out
    assert (
        "passages: 1 of 2 requests are longer than the model's 48 tokens; their contexts lose 13 tokens from the left"
        in ended.out
    )
    return output


def read(output: Path) -> list[dict[str, Any]]:
    return json.loads(output.read_text())["results"]


def metrics(output: Path) -> list[float]:
    return [figure["value"] for one in read(output) for figure in one["metrics"].values()]


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


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first run's weights with a context of 32."""
    load = str(tmp_path_factory.mktemp("short") / "short")
    run_ranks(1, write_checkpoint, load, 10, 0, 32)
    return load


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


def test_windows_longer_than_a_model_takes_name_the_checkpoint(
    files: Files, short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--load", files.loads[0], short, "--data", "a=x", "--seq-length", "48", "--output", str(tmp_path / "r.json")]
    assert tool.main(words) == 2
    assert f"--seq-length 48 is longer than the 32 tokens that the model of --load {short} takes" in capsys.readouterr().err


def test_of_several_checkpoints_the_message_names_the_one_that_cannot(
    files: Files, short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "long.jsonl"
    task.write_text(json.dumps({"context": "a", "continuation": "b" * 40}))
    more = ["--tasks", str(task), "--output", str(tmp_path / "r.json")]
    assert tool.main(["--load", files.loads[0], short, *more]) == 2
    err = capsys.readouterr().err
    assert f"long.jsonl, line 1: the continuation has 40 tokens, the model takes 32 (with --load {short})\n" in err
    assert tool.main(["--load", short, *more]) == 2
    assert capsys.readouterr().err.endswith("the model takes 32\n")


@pytest.mark.parametrize("spelled", ["", "/iter_0000010", "/../salt"])
def test_one_checkpoint_under_two_names_is_refused(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], spelled: str
) -> None:
    load = files.loads[0]
    words = ["--load", load, load + spelled, "--tasks", files.tasks[0], "--output", str(tmp_path / "r.json")]
    assert tool.main(words) == 2
    err = capsys.readouterr().err
    assert f"--load {load} and {load}{spelled} are the same checkpoint, iter_0000010; give it once" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, more", [("", []), ("", ["--overwrite"]), ("r.json", [])])
def test_an_output_that_is_a_directory_is_refused_as_such(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, more: list[str]
) -> None:
    (tmp_path / "r.md").mkdir()
    assert tool.main(files.words(tmp_path / name, *more)) == 2
    err = capsys.readouterr().err
    assert f"--output {tmp_path / (name and 'r.md')} is a directory" in err and "--overwrite" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["r.md"]


@pytest.mark.parametrize(
    "more, complaint",
    [
        (["--metrics", "f1"], "--metrics f1 is no metric"),
        (["--shots", "2"], "--shots 2 needs a --shot-file for each of 3 --tasks, got 0"),
        (["--shot-file", "x.jsonl"], "--shot-file needs --shots"),
        (["--add-bos", "yes"], "--add-bos yes: the ByteLevelTokenizer declares no beginning-of-sequence token"),
        (["--add-bos", "maybe"], "--add-bos maybe is not one of auto, no, yes"),
        (["--data", "prose"], "--data prose is not of the form NAME=PREFIX"),
        (["--data", "a=x", "a=y"], "--data a=y: a is the name of another set too"),
        (["--data", "weather=x"], "--data weather=x: weather is the name of a task too"),
        (["--data", "a=/nowhere/x"], "--data /nowhere/x"),
        (["--seq-length", "8"], "--seq-length 8 needs --data"),
        (["--data", "a=x", "--seq-length", "0"], "--seq-length must be at least 1, got 0"),
        (["--batch-tokens", "0"], "--batch-tokens must be at least 1, got 0"),
        (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert tool.main(files.words(tmp_path / "r.json", *more)) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_no_results_is_not_replaced(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    output.write_text('{"format": 9}')
    [ended] = run_ranks(1, main, files.words(output))
    assert ended.status == 2 and "r.json exists and cannot be added to: it holds no results of this format" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_the_tool_bounds_the_processes_that_compile_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILE_WORKERS, "")
    monkeypatch.delenv(COMPILE_WORKERS)
    words = ["--load", str(tmp_path), "--tasks", str(tmp_path / "absent.jsonl"), "--output", str(tmp_path / "results.json")]
    assert tool.main(words) == 2
    assert os.environ[COMPILE_WORKERS] == "4"
