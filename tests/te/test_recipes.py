"""Every recipe through megatron-core's own context, and our gates against Transformer Engine's own checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.errors import UserError
from megatron_salt.model.gpt import transformer_config
from megatron_salt.model.layers import te_recipe
from megatron_salt.model.precision import Precision
from megatron_salt.model.precision_checks import refuse_precision
from megatron_salt.parallel.hardware import Hardware
from megatron_salt.parallel.launch import find_hardware
from tests.te import engine

MODEL = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4)
CLASSES = {
    "tensorwise": "Float8CurrentScaling", "delayed": "DelayedScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling",
}  # fmt: skip
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
FP4 = Precision(implementation="transformer_engine", fp4_format="e2m1")


def config(precision: Precision) -> TransformerConfig:
    return transformer_config(MODEL, ParallelConfig(), torch.bfloat16, precision)


def in_context(precision: Precision, layer: int) -> tuple[bool, str]:
    """Whether megatron-core's context for a layer turns quantization on, and Transformer Engine's recipe there."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron.core.fp4_utils import get_fp4_context
    from megatron.core.fp8_utils import get_fp8_context

    context = get_fp4_context if precision.fp4_format else get_fp8_context
    with context(config(precision), layer):
        enabled = FP8GlobalStateManager.is_fp8_enabled()
        return enabled, type(FP8GlobalStateManager.get_fp8_recipe()).__name__.removeprefix("TE") if enabled else ""


@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", CLASSES)
def test_a_recipe_becomes_transformer_engines(recipe: str, fp8_format: str) -> None:
    precision = replace(engine.fp8(recipe), fp8_format=fp8_format)
    with engine.gpu_seen((10, 0)):
        assert in_context(precision, 0) == (True, CLASSES[recipe])


def test_fp4_becomes_transformer_engines() -> None:
    with engine.gpu_seen((10, 0)):
        assert in_context(FP4, 0) == (True, "NVFP4BlockScaling")


@pytest.mark.parametrize("precision", [engine.fp8("tensorwise", bf16_layers=(1, 2)), replace(FP4, bf16_layers=(1, 2))])
def test_the_first_and_last_layers_stay_in_bfloat16(precision: Precision) -> None:
    with engine.gpu_seen((10, 0)):
        assert [in_context(precision, layer)[0] for layer in range(4)] == [False, True, False, False]


def test_delayed_scaling_is_as_the_flags_say() -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(config(engine.fp8("delayed", amax_history_len=16, amax_compute_algo="max", margin=2)))
    assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.margin, recipe.reduce_amax) == (16, "max", 2, True)
    assert not recipe.fp8_dpa and not recipe.fp8_mha


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_a_teachers_recipe_is_the_students(recipe: str) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    of_student = get_fp8_recipe(config(engine.fp8(recipe)))
    of_teacher = te_recipe(engine.fp8(recipe, forward_only=True))
    assert type(of_teacher) is type(of_student)
    assert repr(of_teacher) == repr(of_student)
    assert (
        config(engine.fp8(recipe, forward_only=True)).fp8 is None
    )  # megatron-core must not open a context over the student's group


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("recipe", [*CLASSES, "nvfp4"])
def test_the_gates_say_what_transformer_engine_would(recipe: str, capability: tuple[int, int]) -> None:
    from transformer_engine.pytorch.quantization import check_recipe_support, is_nvfp4_available

    precision = FP4 if recipe == "nvfp4" else engine.fp8(recipe)
    hardware = replace(find_hardware(), capability=capability)
    assert hardware.cuda is not None and hardware.transformer_engine is not None
    ours = theirs = True
    try:
        refuse_precision(precision, hardware, bf16=True, distributed_optimizer=True)
    except UserError:
        ours = False
    with engine.gpu_seen(capability):
        if recipe == "nvfp4":
            theirs = is_nvfp4_available()
        else:
            try:
                check_recipe_support(te_recipe_of(recipe))
            except RuntimeError:
                theirs = False
    assert ours == theirs


def te_recipe_of(recipe: str):
    from transformer_engine.common import recipe as recipes

    return vars(recipes)[CLASSES[recipe]]()


def test_the_releases_are_found() -> None:
    import transformer_engine

    found = find_hardware()
    assert isinstance(found, Hardware) and found.capability is None
    assert found.transformer_engine is not None
    assert ".".join(map(str, found.transformer_engine)) == transformer_engine.__version__.split("+")[0]
    assert torch.version.cuda is not None and ".".join(map(str, found.cuda or ())) == torch.version.cuda
