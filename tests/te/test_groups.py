"""Which ranks FP8 asks for their maxima: never the world, where that is more than a model's own ranks of a pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ModelConfig, ParallelConfig, SaltConfig
from megatron_salt.model.fp8_teacher import in_bfloat16, linears
from megatron_salt.model.gpt import GPT
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_teacher_mesh
from megatron_salt.salt.load_teacher import build_body
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint
from tests.support.ranks import run_ranks
from tests.te import engine

MODEL = ModelConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, normalization="RMSNorm", swiglu=True,
    position_embedding_type="rope", disable_bias_linear=True,
)  # fmt: skip
LENGTH = 32


@contextmanager
def recorded() -> Iterator[list[list[int]]]:
    """The ranks of every reduction of a maximum while the block runs."""
    asked: list[list[int]] = []
    all_reduce = dist.all_reduce

    def record(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op == dist.ReduceOp.MAX:
            asked.append(dist.get_process_group_ranks(group or dist.group.WORLD))
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    with mock.patch.object(dist, "all_reduce", record):
        yield asked


def forward(model: GPT) -> torch.Tensor:
    """One pass of this rank's layers alone, with rubbish for what earlier stages would have sent."""
    torch.manual_seed(dist.get_rank())
    if not model.pre_process:
        model.set_input_tensor(torch.randn(LENGTH, 1, MODEL.hidden_size, dtype=torch.bfloat16, requires_grad=True))
    tokens = torch.randint(0, 250, (1, LENGTH))
    return model(tokens, torch.arange(LENGTH)[None], None)


def student_step(
    parallel: ParallelConfig, precision: engine.Precision, world_size: int
) -> tuple[list[list[int]], list[int], list[bool]]:
    """-> (ranks asked, this stage's ranks, whether each linear's scales are the same on all of them and have moved)."""
    chunks, mesh = engine.build(MODEL, parallel, precision, world_size)
    with engine.gpu_seen(), engine.books_alone(), recorded() as asked:
        for chunk in chunks:
            for _ in range(2):
                forward(chunk).float().sum().backward()
    stage = [rank for rank in range(world_size) if mesh.layout.coordinates(rank).pp == mesh.at.pp]
    agree = []
    for linear in (linear for chunk in chunks for linear in linears(chunk)):
        for key in ("scaling_fwd", "scaling_bwd") if precision.fp8_recipe == "delayed" else ():
            scale = linear.fp8_meta[key].scale
            everyone = [torch.empty_like(scale) for _ in stage]
            dist.all_gather(everyone, scale, group=mesh.groups.tp_dp_cp)
            agree.append(all(torch.equal(scale, other) for other in everyone) and bool((scale != 1).any()))
    return asked, stage, agree


@pytest.mark.parametrize(
    "tensor, pipeline, virtual, world_size", [(1, 1, 1, 2), (2, 1, 1, 4), (1, 4, 1, 4), (2, 2, 1, 4), (1, 2, 2, 4)]
)
def test_delayed_scaling_asks_the_ranks_of_its_pipeline_stage(tensor, pipeline, virtual, world_size):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, num_virtual_stages_per_pipeline_rank=virtual
    )
    for asked, stage, agree in run_ranks(
        world_size, student_step, parallel, engine.fp8("delayed", amax_history_len=4), world_size
    ):
        if len(stage) == 1:
            assert asked == []
        else:
            assert len(asked) == 2 * 2 * virtual  # forward and backward of each pass
            assert all(sorted(ranks) == stage for ranks in asked)
        assert agree and all(agree)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_other_recipes_remember_nothing_and_ask_nobody(recipe):
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    for asked, _, _ in run_ranks(4, student_step, parallel, engine.fp8(recipe), 4):
        assert asked == []


def without_a_group() -> tuple[list[list[int]], list[int]]:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    chunks, mesh = engine.build(MODEL, ParallelConfig(pipeline_model_parallel_size=2), engine.ENGINE, 4)
    with (
        engine.gpu_seen(),
        engine.books_alone(),
        recorded() as asked,
        te.fp8_autocast(enabled=True, fp8_recipe=DelayedScaling()),
    ):
        forward(chunks[0])
    return asked, dist.get_process_group_ranks(mesh.groups.tp_dp_cp)


def test_without_a_group_it_would_ask_the_world():
    for asked, stage in run_ranks(4, without_a_group):
        assert asked == [[0, 1, 2, 3]]
        assert len(stage) == 2


CHECKPOINT = TeacherCheckpoint(
    directory="",
    model=MODEL,
    vocabulary_size=250,
    seq_length=LENGTH,
    tokenizer_fingerprint="",
    fingerprint="",
    lengths=(),
    losses=(),
    dtype="bfloat16",
    step=0,
)  # type: ignore[arg-type]


def taught(recipe: str, tensor: int, pipeline: int) -> dict[str, object]:
    """A student of delayed scaling on tp 2, pp 2, a teacher of another layout beside it, and one pass of each in turn."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    [student], _ = engine.build(MODEL, parallel, engine.fp8("delayed"), 4)
    layout = Layout(tensor, 1, 4 // (tensor * pipeline), pipeline)
    mesh = make_teacher_mesh(layout)
    precision = engine.fp8(recipe, forward_only=True)
    salt = SaltConfig(
        teacher_load="t", kd_steps=1, teacher_tensor_model_parallel_size=tensor, teacher_pipeline_model_parallel_size=pipeline
    )
    with engine.gpu_seen((10, 0)):
        body = build_body(CHECKPOINT, salt, mesh, torch.bfloat16, precision).eval().requires_grad_(False)
    engine.unfused(body)
    for parameter in body.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with engine.gpu_seen((10, 0)), engine.books_alone():
        forward(student).float().sum().backward()
        before = [linear.fp8_meta["scaling_fwd"].scale.clone() for linear in linears(student)]
        with recorded() as asked, torch.no_grad():
            forward(body)
            in_fp8 = [linear.fp8 for linear in linears(body)]
            groups = [dist.get_process_group_ranks(linear.fp8_meta["fp8_group"]) for linear in linears(body)]
            with in_bfloat16(body):
                forward(body)
            in_bf16 = [linear.fp8 for linear in linears(body)]
        after = [linear.fp8_meta["scaling_fwd"].scale for linear in linears(student)]
    return {
        "asked": asked, "in_fp8": in_fp8, "in_bf16": in_bf16, "untouched": all(map(torch.equal, before, after)),
        "groups": groups, "own": dist.get_process_group_ranks(mesh.groups.tp),
    }  # fmt: skip


@pytest.mark.parametrize(
    "recipe, tensor, pipeline", [("tensorwise", 1, 1), ("tensorwise", 4, 1), ("mxfp8", 1, 4), ("blockwise", 2, 2)]
)
def test_a_teacher_asks_nobody_and_is_given_a_group_of_its_own(recipe, tensor, pipeline):
    for found in run_ranks(4, taught, recipe, tensor, pipeline):
        assert found["asked"] == []
        assert found["in_fp8"] and all(found["in_fp8"])
        assert not any(found["in_bf16"])
        assert found["untouched"]
        assert all(ranks == found["own"] for ranks in found["groups"])
