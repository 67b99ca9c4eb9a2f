"""generate_text: a checkpoint of any layout continues a prompt, alone or tensor-parallel; bad input is refused by name."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.loading import load_weights
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import CheckpointConfig, ParallelConfig, RunConfig, TokenizerConfig, TrainingConfig
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.errors import UserError
from megatron_salt.model.generate import draw, generate, next_logits
from megatron_salt.model.gpt import GPT, build_model
from megatron_salt.parallel.hardware import COMPILE_WORKERS
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.tools import generate_text as module
from megatron_salt.tools.generate_text import GenerateConfig, generate_text, newest_checkpoint, prompt_ids, read_companions
from tests.support.ranks import run_ranks
from tests.support.small import SMALL

CONTEXT = 16
BYTES = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
RUN = RunConfig(
    model=replace(SMALL, num_layers=2, hidden_size=32, ffn_hidden_size=64, init_method_std=0.2),
    training=TrainingConfig(seq_length=CONTEXT),
)
PROMPT = BYTES.encode("def f(x)")
MORE = 300
"""Ids of a model that has more than its tokenizer."""


def build(parallel: ParallelConfig, world_size: int) -> tuple[list[GPT], object]:
    mesh = make_student_mesh(student_layout(parallel, world_size))
    seed_everything(7, mesh)
    return build_model(RUN.model, parallel, CONTEXT, BYTES.vocabulary_size, torch.float32, CONTEXT, mesh), mesh


def write_more_ids(directory: str) -> None:
    """In one rank: write a checkpoint whose model has more ids than its tokenizer, all of them likelier."""
    parallel, model = (
        ParallelConfig(),
        replace(RUN.model, make_vocab_size_divisible_by=4, untie_embeddings_and_output_weights=True),
    )
    mesh = make_student_mesh(student_layout(parallel, 1))
    seed_everything(7, mesh)
    chunks = build_model(model, parallel, CONTEXT, MORE, torch.float32, CONTEXT, mesh)
    with torch.no_grad():
        chunks[0].output_layer.weight[BYTES.vocabulary_size :] *= 100
    identity = RunIdentity(
        yaml=to_yaml(replace(RUN, model=model)), architecture=asdict(model) | {"vocabulary": MORE},
        tokenizer_fingerprint=BYTES.fingerprint, data_fingerprint="content:none", seed=7,
    )  # fmt: skip
    checkpointer = Checkpointer(
        CheckpointConfig(save=directory), identity, BYTES, mesh, chunks=chunks, optimizer=None, scheduler=None
    )
    checkpointer.save(RunState(step=1), final=True)


def continued_by_tool(directory: str) -> list[int]:
    """In one rank: what the tool adds to the prompt."""
    saved = newest_checkpoint(Path(directory))
    run, tokenizer = read_companions(saved)
    with mock.patch("megatron_salt.parallel.launch.distributed", return_value=contextlib.nullcontext()):
        added = module.continue_prompt(
            GenerateConfig(load=directory, temperature=5.0), saved, run, ParallelConfig(), tokenizer, PROMPT
        )
    assert added is not None
    return added


def test_ids_beyond_the_tokenizer_are_never_drawn(tmp_path: Path) -> None:
    run_ranks(1, write_more_ids, str(tmp_path / "more"))
    [added] = run_ranks(1, continued_by_tool, str(tmp_path / "more"))
    assert added and max(added) < BYTES.vocabulary_size


def write_checkpoint(directory: str, parallel: ParallelConfig, world_size: int) -> None:
    """In every rank: write the checkpoint of a run with random weights."""
    chunks, mesh = build(parallel, world_size)
    identity = RunIdentity(
        yaml=to_yaml(RUN), architecture=asdict(RUN.model), tokenizer_fingerprint=BYTES.fingerprint, data_fingerprint="content:none",
        seed=7,
    )  # fmt: skip
    checkpointer = Checkpointer(
        CheckpointConfig(save=directory), identity, BYTES, mesh, chunks=chunks, optimizer=None, scheduler=None
    )
    checkpointer.save(RunState(step=1, consumed_samples=1), final=True)


def greedy(directory: str, tensor: int) -> list[int]:
    """In every rank: generate the likeliest continuation, longer than the context."""
    [model], mesh = build(ParallelConfig(tensor_model_parallel_size=tensor), tensor)
    load_weights(Path(directory), [model], mesh)
    return generate(model, PROMPT, 2 * CONTEXT, CONTEXT, BYTES.vocabulary_size, None, 0.0, None, seed=0)


def samples(directory: str) -> list[list[int]]:
    """In one rank: continue a prompt with seeds 1, 1 and 2, then with one token to draw from, then with a document that ends at once."""
    [model], mesh = build(ParallelConfig(), 1)
    load_weights(Path(directory), [model], mesh)

    def sample(seed: int, top_k: int | None, eod: int | None) -> list[int]:
        return generate(model, PROMPT, 12, CONTEXT, BYTES.vocabulary_size, eod, 1.0, top_k, seed)

    first = sample(1, None, None)
    return [first, sample(1, None, None), sample(2, None, None), sample(1, 1, None), sample(1, None, first[5])]


def logits_of_prefixes(directory: str) -> tuple[torch.Tensor, torch.Tensor]:
    """In one rank: next_logits of each prefix of the prompt, and the logits of one forward pass over the whole prompt."""
    [model], mesh = build(ParallelConfig(), 1)
    load_weights(Path(directory), [model], mesh)
    one_by_one = torch.stack([next_logits(model, PROMPT[:end], BYTES.vocabulary_size) for end in range(1, len(PROMPT) + 1)])
    with torch.no_grad():
        hidden = model(torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None], None)
        return one_by_one, model.logits(hidden)[:, 0, : BYTES.vocabulary_size].clone()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that two pipeline stages wrote."""
    directory = str(tmp_path_factory.mktemp("generate") / "checkpoints")
    run_ranks(2, write_checkpoint, directory, ParallelConfig(pipeline_model_parallel_size=2), 2)
    return directory


@pytest.mark.long
def test_the_likeliest_text_does_not_depend_on_the_layout(checkpoint: str) -> None:
    [alone] = run_ranks(1, greedy, checkpoint, 1)
    assert len(alone) == 2 * CONTEXT
    assert len(set(alone)) > 2  # the model is not stuck, so agreement says something
    assert run_ranks(2, greedy, checkpoint, 2) == [alone, alone]


@pytest.mark.long
def test_each_token_is_predicted_from_those_before_it(checkpoint: str) -> None:
    [(one_by_one, at_once)] = run_ranks(1, logits_of_prefixes, checkpoint)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_the_seed_decides_the_text_and_the_end_of_the_document_ends_it(checkpoint: str) -> None:
    [(first, again, other, top_1, ended)] = run_ranks(1, samples, checkpoint)
    [likeliest] = run_ranks(1, greedy, checkpoint, 1)
    assert first == again
    assert first != other
    assert top_1 == likeliest[:12]
    assert ended == first[: first.index(first[5])]


def test_ids_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k, expected in (
        (0.5, None, (logits / 0.5).softmax(0)),
        (2.0, 2, torch.tensor([-math.inf, 1.0, 0.5, -math.inf]).softmax(0)),
    ):
        drawn = torch.tensor([draw(logits, temperature, top_k, generator) for _ in range(4000)])
        torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, expected, atol=0.03, rtol=0)
    assert draw(logits, 0.0, None, generator) == 1
    assert draw(logits, 1.0, 100, generator) in range(4)  # more than there are


@pytest.mark.long
def test_the_tool_prints_prompt_and_continuation(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def continued(config: object, directory: Path, run: RunConfig, parallel: ParallelConfig, *rest: object) -> list[int]:
        seen.update(directory=directory, run=run, parallel=parallel)
        return BYTES.encode(": pass")

    monkeypatch.setattr(module, "continue_prompt", continued)
    generate_text(GenerateConfig(load=checkpoint, prompt="def f(x)"))
    assert capsys.readouterr().out == "def f(x): pass\n"
    assert seen == {"directory": Path(checkpoint) / "iter_0000001", "run": RUN, "parallel": ParallelConfig()}


def test_an_empty_prompt_is_the_beginning_of_a_document() -> None:
    assert prompt_ids("", BYTES) == [BYTES.eod]
    with pytest.raises(UserError, match="--prompt is empty, and the checkpoint's ByteLevelTokenizer has no end-of-document id"):
        prompt_ids("", replace(BYTES, eod=None))
    assert prompt_ids("", replace(BYTES, bos=7), prepend_bos=True) == [7]


def test_a_prompt_begins_with_bos_where_that_is_asked_for() -> None:
    assert prompt_ids("ab", replace(BYTES, bos=7), prepend_bos=True) == [7, 97, 98]
    assert prompt_ids("ab", replace(BYTES, bos=7)) == [97, 98]
    with pytest.raises(UserError, match="--prepend-bos: the checkpoint's ByteLevelTokenizer declares no"):
        prompt_ids("ab", BYTES, prepend_bos=True)


def test_a_prompt_that_is_not_text_is_refused() -> None:
    with pytest.raises(UserError, match="--prompt is not valid UTF-8"):
        prompt_ids("caf\udce9", BYTES)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"top_k": 0}, "--top-k"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=f"{complaint} must be at least"):
        GenerateConfig(load="x", **flags)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ({"seed": 10**30}, "--seed must be from 0"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"temperature": 1e-300}, "--temperature must be 0 or at least"),
    ],
)
def test_what_the_draw_could_not_use_is_refused(flags: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        GenerateConfig(load="x", **flags)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"--load {path} holds no checkpoint"):
            newest_checkpoint(path)
    (tmp_path / "iter_0000001").mkdir()
    with pytest.raises(UserError, match=r"run\.yaml cannot be read"):
        read_companions(newest_checkpoint(tmp_path))


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_a_rank_that_must_have_a_gpu_does_not_fall_back_to_the_cpu(checkpoint: str) -> None:
    with pytest.raises(UserError, match="--device cuda: torch .* is built without CUDA"):
        generate_text(GenerateConfig(load=checkpoint, prompt="x", device="cuda"))


@pytest.mark.long
def test_ranks_that_cannot_split_the_model_are_refused(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"--num-attention-heads 4 is not divisible by --tensor-model-parallel-size = 3"):
        generate_text(GenerateConfig(load=checkpoint))


def test_the_tool_bounds_the_processes_that_compile_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPILE_WORKERS, "")
    monkeypatch.delenv(COMPILE_WORKERS)
    with pytest.raises(UserError, match="no checkpoint"):
        generate_text(GenerateConfig(load=str(tmp_path)))
    assert os.environ[COMPILE_WORKERS] == "4"
