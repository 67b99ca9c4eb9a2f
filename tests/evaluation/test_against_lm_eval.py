"""lm-evaluation-harness on an exported model gives the log-likelihoods and accuracies that evaluate.py gives on the checkpoint."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import CheckpointConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.evaluation.evaluate_task import figures
from megatron_salt.evaluation.log_likelihoods import log_likelihoods
from megatron_salt.evaluation.task_file import read_tasks
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.tokenizer.tokenizer import Tokenizer, tokenizer_from_files
from megatron_salt.tools.evaluated.candidate import load_model, open_candidate
from megatron_salt.tools.flags.evaluate_config import EvaluateConfig
from tests.convert.conftest import convert_in_rank
from tests.support.ranks import run_ranks
from tests.support.small import SMALL

ROOT = Path(__file__).parents[2]
CONTEXT = 64
RUN = RunConfig(
    model=replace(SMALL, num_layers=2, hidden_size=32, ffn_hidden_size=64, init_method_std=0.2),
    training=TrainingConfig(seq_length=CONTEXT),
)
WORDS = ["Straße", "naß", "日照り", "the boat", "über Nacht", "a dry field", "café", "snow 🙂", "no", "yes it was raining"]
CHOICES = [
    {
        "context": f"Question {number}: how was the weather on day {number * 7}?\nAnswer:" + " " * (number % 3 == 2),
        "choices": [WORDS[(number * step + shift) % len(WORDS)] for step, shift in ((1, 0), (3, 1), (7, 2))],
        "gold": number % 3,
    }
    for number in range(20)
] + [{"context": "", "choices": ["A text", "begins"], "gold": 0}]
PASSAGES = [
    {"passage": "Nobody had seen the grey cat before it sat down on the old mat"},
    {"passage": "Le café était fermé, so they walked along the straße and drank their own café"},
    {"passage": " ".join(f"{number} boats lay in the harbour." for number in range(12)) + " The last one was a boat"},
]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "local_choices": (
        CHOICES,
        {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "gold", "doc_to_choice": "choices",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
        },
    ),
    "local_passages": (
        PASSAGES,
        {
            "output_type": "loglikelihood", "doc_to_text": "{{passage.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' ' + passage.split(' ')[-1]}}", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    ),
}  # fmt: skip
OURS = {"acc": "acc", "acc_norm": "acc_norm", "acc_bytes": "acc_norm_bytes", "perplexity": "perplexity"}


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE that has learnt the tasks' own words."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator([json.dumps(records, ensure_ascii=False) for records, _ in TASKS.values()], trainer)
    return tokenizer_from_files("HuggingFaceTokenizer", {"tokenizer.json": model.to_str().encode()}, "test")


def write_checkpoint(directory: str) -> None:
    """In one rank: write the checkpoint of a run with random weights."""
    mesh = make_student_mesh(student_layout(ParallelConfig(), 1))
    seed_everything(5, mesh)
    tokenizer = make_tokenizer()
    chunks = build_model(RUN.model, ParallelConfig(), CONTEXT, tokenizer.vocabulary_size, torch.float32, CONTEXT, mesh)
    identity = RunIdentity(
        yaml=to_yaml(RUN), architecture=asdict(RUN.model) | {"vocabulary": tokenizer.vocabulary_size, "seq_length": CONTEXT},
        tokenizer_fingerprint=tokenizer.fingerprint, seed=7,
        data_fingerprint="content:none",
    )  # fmt: skip
    checkpointer = Checkpointer(
        CheckpointConfig(save=directory), identity, tokenizer, mesh, chunks=chunks, optimizer=None, scheduler=None
    )
    checkpointer.save(RunState(step=1, consumed_samples=1), final=True)


def ours(load: str, files: list[str]) -> dict[str, dict[str, Any]]:
    """In one rank: what evaluate.py computes, in the form of lm_eval_process."""
    config = EvaluateConfig(load=(load,), tasks=tuple(files), output="unused")
    candidate = open_candidate(load, config, ParallelConfig(), read_tasks(files), [None] * len(files))
    mesh = make_student_mesh(student_layout(ParallelConfig(), 1))
    chunks = load_model(candidate, ParallelConfig(), mesh)
    result = {}
    for prepared, _ in candidate.work:
        scored = log_likelihoods(chunks, mesh, prepared.requests, longest=CONTEXT, batch_tokens=200)
        result[prepared.task.name] = {
            "log_likelihoods": scored.log_likelihoods.tolist(),
            "greedy": scored.greedy.tolist(),
            "metrics": {name: estimate.value for name, estimate in figures(prepared, scored, 0).items()},
        }
    return result


@pytest.mark.long
def test_lm_evaluation_harness_finds_the_same_on_the_exported_model(tmp_path: Path) -> None:
    for package in ("lm_eval", "transformers", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder, files = tmp_path / "tasks", []
    folder.mkdir()
    for name, (records, fields) in TASKS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | data | fields))  # JSON is YAML
        files.append(str(path))
    run_ranks(1, write_checkpoint, str(tmp_path / "run"))
    [found] = run_ranks(1, ours, str(tmp_path / "run"), files)

    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}

    def call(*words: object) -> str:
        ended = subprocess.run(
            [sys.executable, *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    exported = convert_in_rank("export", tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    assert exported.status == 0, exported
    expected = json.loads(call("-m", "tests.evaluation.lm_eval_process", tmp_path / "out", folder, *TASKS).splitlines()[-1])
    for name in TASKS:
        theirs, mine = expected[name], found[name]
        np.testing.assert_allclose(mine["log_likelihoods"], theirs["log_likelihoods"], atol=1e-4, rtol=0)
        assert mine["greedy"] == theirs["greedy"]
        for metric, value in theirs["metrics"].items():
            assert mine["metrics"][OURS[metric]] == pytest.approx(value, abs=1e-4 if metric == "perplexity" else 1e-9, rel=1e-4)
    assert 0 < found["local_choices"]["metrics"]["acc"] < 1  # there is something to agree on
