"""Small checkpoints and task files on which tools/evaluate.py runs, in the ranks of the pool."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.cli import run_tool
from megatron_salt.config import CheckpointConfig, ParallelConfig, RunConfig, TokenizerConfig, TrainingConfig
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.tools import evaluate as tool
from megatron_salt.tools.flags.evaluate_config import EvaluateConfig
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first run's weights with a context of 32."""
    load = str(tmp_path_factory.mktemp("short") / "short")
    run_ranks(1, write_checkpoint, load, 10, 0, 32)
    return load
