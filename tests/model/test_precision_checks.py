"""Which precisions are refused before anything is allocated, and that the message says what would work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_salt.config import ModelConfig, ParallelConfig, QuantizationConfig, RunConfig, SaltConfig, TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.model.precision import Precision, default_recipe, student_precision, teacher_precision
from megatron_salt.model.precision_checks import (
    REQUIREMENTS,
    choose_implementation,
    product_dimensions,
    refuse_machine,
    refuse_precision,
    refuse_shapes,
)
from megatron_salt.parallel.hardware import Hardware, order_launches, refuse_connections, release
from megatron_salt.parallel.layout import student_layout
from megatron_salt.train.plan import plan_run
from megatron_salt.train.start import choose_precisions

HOPPER = Hardware((9, 0), (13, 0), (2, 20, 2))
BLACKWELL = replace(HOPPER, capability=(10, 0))
LAPTOP = Hardware(None, None, None)
MODEL = ModelConfig(num_layers=4, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=8)


def fp8(recipe: str, **fields: object) -> Precision:
    return Precision(implementation="transformer_engine", fp8_format="hybrid", fp8_recipe=recipe, **fields)


FP4 = Precision(implementation="transformer_engine", fp4_format="e2m1")


def run(**sections: object) -> RunConfig:
    return RunConfig(model=MODEL, **{"training": TrainingConfig(bf16=True, train_iters=1), **sections})


@pytest.mark.parametrize(
    "precision, hardware, needs",
    [
        (
            fp8("tensorwise"),
            replace(HOPPER, capability=(8, 0)),
            "tensorwise needs a GPU of compute capability 8.9 or higher; it has 8.0",
        ),
        (fp8("delayed"), replace(HOPPER, capability=(8, 6)), "delayed needs a GPU of compute capability 8.9 or higher"),
        (fp8("blockwise"), replace(HOPPER, capability=(8, 9)), "blockwise needs a GPU of compute capability 9.0"),
        (
            fp8("mxfp8"),
            HOPPER,
            "--fp8-recipe mxfp8 needs a GPU of compute capability 10.0 or higher and below 12.0; it has 9.0",
        ),
        (fp8("mxfp8"), replace(HOPPER, capability=(12, 0)), "below 12.0; it has 12.0"),
        (fp8("mxfp8", forward_only=True), HOPPER, "--teacher-fp8-recipe mxfp8 needs"),
        (FP4, HOPPER, "--fp4-recipe nvfp4 needs a GPU of compute capability 10.0"),
        (
            fp8("tensorwise"),
            replace(HOPPER, transformer_engine=(2, 1)),
            "tensorwise needs Transformer Engine 2.2 or later, and 2.1",
        ),
        (
            fp8("blockwise"),
            replace(HOPPER, transformer_engine=(2, 2)),
            "blockwise needs Transformer Engine 2.3 or later, and 2.2",
        ),
        (FP4, replace(BLACKWELL, transformer_engine=(2, 6)), "nvfp4 needs Transformer Engine 2.7"),
        (
            fp8("blockwise"),
            replace(HOPPER, cuda=(12, 8)),
            "blockwise needs a torch for CUDA 12.9 or later; this one is for 12.8",
        ),
    ],
)
def test_a_recipe_that_the_machine_cannot_do_is_refused(precision, hardware, needs):
    with pytest.raises(UserError) as refused:
        refuse_precision(precision, hardware, bf16=True, distributed_optimizer=True)
    assert needs in str(refused.value)


@pytest.mark.parametrize("recipe", REQUIREMENTS)
def test_every_recipe_is_allowed_where_its_requirements_are_met(recipe):
    need = REQUIREMENTS[recipe]
    precision = FP4 if recipe == "nvfp4" else fp8(recipe)
    refuse_precision(
        precision, Hardware(need.capability, need.cuda, need.transformer_engine), bf16=True, distributed_optimizer=False
    )


@pytest.mark.parametrize(
    "precision, hardware, flags, said",
    [
        (replace(fp8("tensorwise"), implementation="torch"), LAPTOP, {}, "no NVIDIA GPU is seen"),
        (replace(fp8("tensorwise"), implementation="torch"), replace(HOPPER, transformer_engine=None), {}, "is not installed"),
        (replace(fp8("tensorwise"), implementation="torch"), HOPPER, {}, "--transformer-impl is torch"),
        (fp8("tensorwise"), HOPPER, {"bf16": False}, "--fp8-format hybrid needs --bf16"),
        (fp8("tensorwise", fp8_params=True), HOPPER, {"distributed_optimizer": False}, "needs --use-distributed-optimizer"),
        (fp8("mxfp8", fp8_params=True), BLACKWELL, {}, "--fp8-param-gather cannot be combined with --fp8-recipe mxfp8"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(precision, hardware, flags, said):
    with pytest.raises(UserError) as refused:
        refuse_precision(precision, hardware, **{"bf16": True, "distributed_optimizer": True, **flags})
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "recipe, model, tensor, seq_length, said",
    [
        ("tensorwise", {"ffn_hidden_size": 4104}, 1, 512, "needs multiples of 16, but --ffn-hidden-size 4104 = 4104"),
        ("tensorwise", {"ffn_hidden_size": 4096 + 64}, 8, 512, "--ffn-hidden-size 4160 / 8 tensor-parallel ranks = 520"),
        ("tensorwise", {}, 1, 500, "tokens of a microbatch, --seq-length 500 x 1 samples = 500"),
        ("mxfp8", {"hidden_size": 1040, "kv_channels": 128}, 1, 512, "multiples of 32, but --hidden-size 1040 = 1040"),
        ("blockwise", {"num_query_groups": 8, "kv_channels": 64}, 8, 512, "head width 64 / 8 tensor-parallel ranks = 64"),
    ],
)
def test_a_dimension_that_is_no_multiple_of_the_blocks_is_refused(recipe, model, tensor, seq_length, said):
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    with pytest.raises(UserError) as refused:
        refuse_shapes(fp8(recipe), replace(MODEL, **model), parallel, seq_length, micro_batch=1)
    assert said in str(refused.value)


def test_tokens_are_counted_as_a_rank_has_them():
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2)
    refuse_shapes(fp8("blockwise"), MODEL, parallel, seq_length=512, micro_batch=1)
    with pytest.raises(UserError, match="--seq-length 256 x 1 samples / 4 ranks that cut the sequence = 64"):
        refuse_shapes(fp8("blockwise"), MODEL, parallel, seq_length=256, micro_batch=1)
    refuse_shapes(fp8("blockwise"), MODEL, parallel, seq_length=256, micro_batch=2)


def test_the_widths_are_those_of_a_layers_weights():
    model = ModelConfig(
        num_layers=1, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6, num_query_groups=2, kv_channels=20
    )
    assert sorted(product_dimensions(model, 2).values()) == sorted([96, 6 * 20 // 2, (6 + 2 * 2) * 20 // 2, 160 // 2])


@pytest.mark.parametrize(
    "asked, hardware, bf16, chosen",
    [(None, HOPPER, True, "transformer_engine"), (None, HOPPER, False, "torch"), (None, LAPTOP, True, "torch"),
     (None, replace(HOPPER, transformer_engine=None), True, "torch"), ("torch", HOPPER, True, "torch"),
     ("transformer_engine", HOPPER, True, "transformer_engine")],
)  # fmt: skip
def test_the_implementation_follows_the_machine_unless_asked_for(asked, hardware, bf16, chosen):
    assert choose_implementation(asked, hardware, bf16) == chosen


@pytest.mark.parametrize(
    "hardware, bf16, said",
    [(LAPTOP, True, "is not installed"), (replace(HOPPER, capability=None), True, "sees none"), (HOPPER, False, "needs --bf16")],
)  # fmt: skip
def test_transformer_engine_is_refused_where_it_cannot_run(hardware, bf16, said):
    with pytest.raises(UserError, match=said):
        choose_implementation("transformer_engine", hardware, bf16)


def test_an_optimizer_that_needs_a_gpu_is_refused_without_one():
    with pytest.raises(UserError, match="in an environment without it"):
        refuse_machine(replace(HOPPER, capability=None))
    refuse_machine(LAPTOP)
    refuse_machine(HOPPER)


@pytest.mark.parametrize(
    "capability, recipe",
    [
        ((8, 9), "tensorwise"),
        ((9, 0), "tensorwise"),
        ((10, 0), "mxfp8"),
        ((10, 3), "mxfp8"),
        ((12, 0), "tensorwise"),
        (None, "tensorwise"),
    ],
)
def test_the_default_recipe_follows_the_device(capability, recipe):
    assert default_recipe(capability) == recipe
    assert student_precision(QuantizationConfig(fp8_format="e4m3"), "torch", capability, False).fp8_recipe == recipe
    assert teacher_precision(SaltConfig(), "torch", capability, False).fp8_recipe == recipe


def test_student_and_teacher_are_chosen_apart():
    salt = SaltConfig(teacher_load="t", kd_steps=1, teacher_fp8_format="e4m3", teacher_fp8_recipe="blockwise")
    config = run(salt=salt, quantization=QuantizationConfig(fp8_format="hybrid", first_last_layers_bf16=True))
    plan = plan_run(config.training, config.parallel, student_layout(config.parallel, 1), salt)
    chosen = choose_precisions(config, plan, MODEL, BLACKWELL)
    assert (chosen.student.fp8_recipe, chosen.student.bf16_layers, chosen.student.forward_only) == ("mxfp8", (1, 1), False)
    assert (chosen.teacher.fp8_recipe, chosen.teacher.bf16_layers, chosen.teacher.forward_only) == ("blockwise", (0, 0), True)
    with pytest.raises(UserError, match="the teacher's --ffn-hidden-size 4112 = 4112"):
        choose_precisions(config, plan, replace(MODEL, ffn_hidden_size=4112), BLACKWELL)
    assert (
        choose_precisions(config, plan, None, BLACKWELL).student == chosen.student
    )  # resumed in stage 2: there is no teacher to check


def test_bfloat16_layers_must_leave_some():
    config = run(quantization=QuantizationConfig(fp8_format="e4m3", first_last_layers_bf16=True, num_layers_at_start_in_bf16=3))
    plan = plan_run(config.training, config.parallel, student_layout(config.parallel, 1), config.salt)
    with pytest.raises(
        UserError, match="--num-layers-at-start-in-bf16 3 and --num-layers-at-end-in-bf16 1 leave none of --num-layers 4"
    ):
        choose_precisions(config, plan, None, HOPPER)


@pytest.mark.parametrize(
    "tensor, context, before, after", [(2, 1, None, "1"), (1, 2, None, "1"), (1, 1, None, None), (2, 1, "8", "8")]
)
def test_one_queue_to_the_device_where_layers_or_sequences_are_cut(monkeypatch, tensor, context, before, after):
    import os

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", before)
    order_launches(tensor, context)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == after
    refuse_connections(tensor, context, (10, 0))
    refuse_connections(tensor, context, None)
    if before == "8":
        with pytest.raises(UserError, match="CUDA_DEVICE_MAX_CONNECTIONS is 8: .* 9.0"):
            refuse_connections(tensor, context, (9, 0))
    else:
        refuse_connections(tensor, context, (9, 0))


@pytest.mark.parametrize(
    "text, numbers", [("2.20.2", (2, 20, 2)), ("2.3.0.dev0+39c0e70", (2, 3, 0)), ("2.14.1+cu130", (2, 14, 1))]
)
def test_a_release_is_its_numbers(text, numbers):
    assert release(text) == numbers
