"""The shipped students and teachers, at their layouts, of Transformer Engine's layers: built whole on meta, with the torch layers' keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state

from megatron_salt.checkpoint import sharded_state
from megatron_salt.config import ModelConfig, ParallelConfig, SaltConfig
from megatron_salt.errors import UserError
from megatron_salt.model.fp8_teacher import linears
from megatron_salt.model.gpt import GPT, build_model
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.model.precision_checks import refuse_shapes
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout, student_layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh, make_teacher_mesh
from megatron_salt.salt.load_teacher import build_body
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint
from tests.te import engine

VOCABULARY, LENGTH = 256_000, 1280


def llama(layers: int, hidden: int, ffn: int, heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, position_embedding_type="rope",
        normalization="RMSNorm", swiglu=True, disable_bias_linear=True,
    )  # fmt: skip


MODELS = {"1.5B": llama(20, 2048, 5120, 16), "2.8B": llama(28, 2560, 6656, 20), "8.6B": llama(36, 4096, 11520, 32)}
LAYOUTS = [("1.5B", 1, 1, 1), ("2.8B", 1, 1, 1), ("2.8B", 2, 2, 1), ("8.6B", 4, 1, 1), ("8.6B", 4, 4, 3), ("8.6B", 8, 2, 1)]
"""Model, tensor, pipeline, virtual stages."""
RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a world whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def parallel_of(tensor: int, pipeline: int, virtual: int) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, num_virtual_stages_per_pipeline_rank=virtual,
        sequence_parallel=tensor > 1,
    )  # fmt: skip


def student(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> tuple[list[GPT], Mesh]:
    mesh = make_student_mesh(student_layout(parallel, dist.get_world_size()), parallel.virtual_stages)
    seed_everything(1, mesh)
    with engine.gpu_seen((10, 0), meta=True):
        chunks = build_model(model, parallel, LENGTH, VOCABULARY, torch.bfloat16, 64, mesh, precision)
    assert all(parameter.is_meta for chunk in chunks for parameter in chunk.parameters())
    return chunks, mesh


def keys_of(chunks: list[GPT], mesh: Mesh) -> dict[str, tuple]:
    """Key in a checkpoint -> its global shape, and this rank's part of it."""
    found: dict[str, tuple] = {}
    for leaf in sharded_state.nested_values(sharded_state.model_state(chunks, mesh.groups)):
        parts = sharded_state.nested_values(leaf.build()) if isinstance(leaf, sharded_state.ShardedTensorFactory) else [leaf]
        for part in parts:
            if isinstance(part, sharded_state.ShardedTensor):
                found.setdefault(part.key, (part.global_shape, set()))[1].add((part.global_offset, part.local_shape))
    return found


@pytest.mark.parametrize("name, tensor, pipeline, virtual", LAYOUTS)
def test_a_student_has_the_keys_of_the_torch_layers(name: str, tensor: int, pipeline: int, virtual: int) -> None:
    parallel, ranks = parallel_of(tensor, pipeline, virtual), 2 * tensor * pipeline
    parameters: dict[str, int] = {}
    for stage in range(pipeline):
        of_layers = []
        for precision in (TORCH, Precision(implementation="transformer_engine")):
            with rank_of(stage * 2 * tensor, ranks):
                chunks, mesh = student(MODELS[name], parallel, precision)
                assert bool(list(linears(chunks[0]))) == (precision is not TORCH)
                of_layers.append(keys_of(chunks, mesh))
        assert of_layers[0] == of_layers[1]
        parameters |= {key: math.prod(shape) for key, (shape, _) in of_layers[1].items()}
    assert sum(parameters.values()) == pytest.approx(float(name.removesuffix("B")) * 1e9, rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name, tensor, pipeline, virtual", LAYOUTS[:1] + LAYOUTS[-1:])
def test_a_student_is_built_for_every_recipe(name: str, tensor: int, pipeline: int, virtual: int, recipe: str) -> None:
    parallel = parallel_of(tensor, pipeline, virtual)
    with rank_of(0, tensor * pipeline):
        [chunk], _ = student(
            MODELS[name], parallel, Precision(implementation="transformer_engine", fp8_format="hybrid", fp8_recipe=recipe)
        )  # type: ignore[arg-type]
        assert chunk.config.fp8 == "hybrid" and chunk.config.fp8_recipe == recipe
        assert all(linear.fuse_wgrad_accumulation for linear in linears(chunk))
        assert all(
            linear.tp_group is chunk.pg_collection.tp and linear.sequence_parallel == (tensor > 1) for linear in linears(chunk)
        )
        assert len(list(linears(chunk))) == 4 * len(chunk.decoder.layers)


@pytest.mark.parametrize("recipe", [None, "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("name, tensor, pipeline", [("1.5B", 1, 1), ("1.5B", 2, 1), ("2.8B", 1, 2), ("2.8B", 4, 1)])
def test_a_teacher_is_built_on_its_own_mesh_over_the_students_ranks(
    name: str, tensor: int, pipeline: int, recipe: str | None
) -> None:
    precision = (
        Precision(implementation="transformer_engine", forward_only=True)
        if recipe is None
        else Precision(implementation="transformer_engine", fp8_format="e4m3", fp8_recipe=recipe, forward_only=True)
    )  # type: ignore[arg-type]
    facts = TeacherCheckpoint(
        directory=Path(),
        model=MODELS[name],
        vocabulary_size=VOCABULARY,
        seq_length=LENGTH,
        tokenizer_fingerprint="",
        fingerprint="",
        lengths=(),
        losses=(),
        dtype="bfloat16",
        step=0,
    )
    salt = SaltConfig(
        teacher_load="t", kd_steps=1, teacher_tensor_model_parallel_size=tensor, teacher_pipeline_model_parallel_size=pipeline
    )
    with rank_of(0, 16):
        student_mesh = make_student_mesh(student_layout(parallel_of(4, 2, 1), 16))
        seed_everything(1, student_mesh)
        mesh = make_teacher_mesh(Layout(tensor, 1, 16 // (tensor * pipeline), pipeline))
        with engine.gpu_seen((10, 0), meta=True):
            body = build_body(facts, salt, mesh, torch.bfloat16, precision)
        assert all(parameter.is_meta for parameter in body.parameters())
        assert body.config.fp8 is None
        assert all(linear.tp_group is mesh.groups.tp for linear in linears(body))
        assert len(body.decoder.layers) == MODELS[name].num_layers // pipeline
        assert not any(key.startswith("output_layer") for key in keys_of([body], mesh))


@pytest.mark.parametrize(
    "name, tensor, refused",
    [("1.5B", 1, []), ("2.8B", 1, []), ("2.8B", 2, []), ("8.6B", 4, ["blockwise"]), ("8.6B", 8, ["blockwise"]), ("8.6B", 2, [])],
)  # fmt: skip
def test_the_recipes_that_the_shipped_shapes_allow(name: str, tensor: int, refused: list[str]) -> None:
    found = []
    for recipe in RECIPES:
        try:
            refuse_shapes(engine.fp8(recipe), MODELS[name], parallel_of(tensor, 1, 1), LENGTH, micro_batch=4)
        except UserError:
            found.append(recipe)
    assert found == refused
