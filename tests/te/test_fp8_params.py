"""Weights in FP8 alone in a student, main parameters in float32 in the distributed optimizer: built, saved, and loaded with and without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import CheckpointConfig, OptimizerConfig, ParallelConfig, TokenizerConfig
from megatron_salt.errors import UserError
from megatron_salt.model.fp8_teacher import linears, raw_tensors
from megatron_salt.model.gpt import GPT
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from megatron_salt.train.build_model import build_optimizer, build_scheduler, wrap_in_ddp
from tests.support.ranks import run_ranks
from tests.support.small import SMALL
from tests.te import engine

SHARDED = ParallelConfig(use_distributed_optimizer=True)
FP8_ALONE = engine.fp8("tensorwise", fp8_params=True)
State = dict[str, tuple[Tensor, Tensor]]
"""Name of a parameter -> its value, in bfloat16 whatever it is kept in, and its float32 main parameter."""


@dataclass(frozen=True)
class Started:
    model: GPT
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    checkpointer: Checkpointer


def start(precision: Precision, **where: str) -> Started:
    [model], mesh = engine.build(SMALL, SHARDED, precision, 1)
    [ddp] = wrap_in_ddp([model], SHARDED, mesh, precision)
    optimizer = build_optimizer([ddp], OptimizerConfig(), SHARDED, torch.bfloat16, mesh, precision)
    scheduler = build_scheduler(optimizer, OptimizerConfig(), 100, 1)
    config = CheckpointConfig(**where, no_load_rng="load" in where)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    identity = RunIdentity(
        yaml="", architecture=asdict(SMALL), tokenizer_fingerprint="tokenizer", data_fingerprint="data", seed=1234
    )
    return Started(
        model,
        ddp,
        optimizer,
        Checkpointer(config, identity, tokenizer, mesh, chunks=[ddp], optimizer=optimizer, scheduler=scheduler),
    )


def is_fp8(parameter: Tensor) -> bool:
    return raw_tensors(parameter)[0] is not parameter


def mains_of(student: Started) -> Iterable[Tensor]:
    return (
        param
        for part in student.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for param in group["params"]
    )


def state_of(student: Started) -> State:
    """On one rank a main parameter is its parameter's whole."""
    names = {id(parameter): name for name, parameter in student.model.named_parameters()}
    found = {}
    for part in student.optimizer.chained_optimizers:
        for models, mains in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups), (part.model_fp32_groups, part.shard_fp32_groups),
        ):  # fmt: skip
            for model, main in zip(chain.from_iterable(models), chain.from_iterable(mains), strict=True):
                value = model.dequantize() if is_fp8(model) else model.detach().clone()
                found[names[id(model)]] = value, main.detach().clone().view(value.shape)
    assert found.keys() == set(names.values())
    return found


def saved(precision: Precision, directory: Path, final: bool) -> State:
    with engine.casts_in_torch(), engine.capability_seen():
        student = start(precision, save=str(directory))
        assert all(is_fp8(linear.weight) == precision.fp8_params for linear in linears(student.model))
        dtypes = {buffer.param_data.dtype for buffer in student.ddp.buffers}
        assert dtypes == ({torch.uint8, torch.bfloat16} if precision.fp8_params else {torch.bfloat16})
        student.checkpointer.save(RunState(step=1, consumed_samples=16), final=final)
        return state_of(student)


def loaded(precision: Precision, directory: Path) -> State:
    with engine.casts_in_torch(), engine.capability_seen():
        student = start(precision, load=str(directory))
        for tensor in [
            *(raw for parameter in student.model.parameters() for raw in raw_tensors(parameter)),
            *mains_of(student),
        ]:
            tensor.data.fill_(3)
        assert student.checkpointer.load() == RunState(step=1, consumed_samples=16)
        return state_of(student)


@pytest.mark.parametrize(
    "one, other, final",
    [(FP8_ALONE, FP8_ALONE, False), (FP8_ALONE, FP8_ALONE, True), (FP8_ALONE, TORCH, True), (TORCH, FP8_ALONE, True)],
    ids=["fp8 to fp8, in buckets", "fp8 to fp8", "fp8 to torch", "torch to fp8"],
)  # fmt: skip
def test_weights_in_fp8_alone_are_saved_and_loaded(tmp_path, one, other, final):
    [before] = run_ranks(1, saved, one, tmp_path, final)
    [after] = run_ranks(1, loaded, other, tmp_path)
    of_linears = {name for name in before if "linear_" in name and "norm" not in name}
    assert len(of_linears) == 4 * SMALL.num_layers and of_linears <= after.keys()
    for name in of_linears | {"embedding.word_embeddings.weight"}:
        (value, main), (value_after, main_after) = before[name], after[name]
        assert torch.equal(main, main_after), name
        rounded = name in of_linears and (one, other) == (TORCH, FP8_ALONE)
        assert torch.equal(value_after, in_fp8(value) if rounded else value), name


def in_fp8(value: Tensor) -> Tensor:
    """What a bfloat16 weight is after tensorwise FP8."""
    scale = torch.finfo(torch.float8_e4m3fn).max / value.float().abs().amax()
    return ((value.float() * scale).to(torch.float8_e4m3fn).float() * scale.reciprocal()).to(torch.bfloat16)


def test_buckets_of_weights_in_another_form_are_refused(tmp_path):
    run_ranks(1, saved, FP8_ALONE, tmp_path, False)
    with pytest.raises(Exception, match="gradient buckets") as refused:
        run_ranks(1, loaded, TORCH, tmp_path)
    assert isinstance(refused.value.__cause__, UserError)
