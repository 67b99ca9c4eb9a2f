"""Whether this machine and these shapes allow the precision flags. Checked before ranks join and before anything is allocated.

Transformer Engine (2.20) would fail in the middle of the first step, or not at all. From its sources come the compute capability and
the CUDA release of each recipe (`quantization.py`, `_compute_*_support`) and the multiples that dimensions of a quantized product must
be. From megatron-core's `fp8_utils.py` comes the release of Transformer Engine that added a recipe. Pure. Each refusal is a UserError
with the flag, the numbers, and what would work.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.config import ModelConfig, ParallelConfig, flag
from megatron_salt.errors import UserError
from megatron_salt.model.precision import Implementation, Precision
from megatron_salt.parallel.hardware import Capability, Hardware, Version, dotted


@dataclass(frozen=True)
class Requirement:
    """What one FP8 or FP4 recipe needs."""

    capability: Capability
    """Lowest compute capability."""
    below: Capability | None
    """First compute capability that does not have the recipe; None: no limit."""
    cuda: Version
    """Lowest CUDA release of torch."""
    transformer_engine: Version
    """Lowest release of Transformer Engine."""
    multiple: int
    """Every dimension of a product must be a multiple of this."""


REQUIREMENTS = {
    "delayed": Requirement((8, 9), None, (12, 1), (2, 1), 16),
    "tensorwise": Requirement((8, 9), None, (12, 1), (2, 2), 16),
    "blockwise": Requirement((9, 0), None, (12, 9), (2, 3), 128),
    "mxfp8": Requirement((10, 0), (12, 0), (12, 8), (2, 1), 32),
    "nvfp4": Requirement((10, 0), None, (12, 8), (2, 7), 32),
}


def refuse_machine(hardware: Hardware) -> None:
    """Raise UserError if this machine cannot train at all."""
    if hardware.capability is None and hardware.transformer_engine is not None:
        raise UserError(
            f"Transformer Engine {dotted(hardware.transformer_engine)} is installed and this process sees no NVIDIA GPU, which "
            "the optimizer that megatron-core takes from it needs; run on a GPU, or in an environment without it"
        )


def choose_implementation(asked: Implementation | None, hardware: Hardware, bf16: bool) -> Implementation:
    """--transformer-impl or its default: Transformer Engine in bfloat16 on a GPU where it is installed, else torch.

    Raises UserError if Transformer Engine is asked for and cannot be used. In float32 its only attention kernel writes all scores to
    memory.
    """
    if asked is None:
        usable = hardware.capability is not None and hardware.transformer_engine is not None and bf16
        return "transformer_engine" if usable else "torch"
    if asked == "transformer_engine":
        if hardware.transformer_engine is None:
            raise UserError(
                "--transformer-impl transformer_engine: Transformer Engine is not installed; requirements-gpu.txt says how"
            )
        if hardware.capability is None:
            raise UserError("--transformer-impl transformer_engine needs an NVIDIA GPU, and this process sees none; use torch")
        if not bf16:
            raise UserError(
                "--transformer-impl transformer_engine needs --bf16: its fast attention knows no float32; use torch"
            )
    return asked


def refuse_precision(precision: Precision, hardware: Hardware, bf16: bool, distributed_optimizer: bool) -> None:
    """Raise UserError if the flags contradict each other or the machine does not support them."""
    if not precision.quantized:
        return
    name, asked, recipe = _names(precision)
    if not bf16:
        raise UserError(f"{name} {asked} needs --bf16")
    if precision.implementation != "transformer_engine":
        why = (
            "no NVIDIA GPU is seen"
            if hardware.capability is None
            else "Transformer Engine is not installed"
            if hardware.transformer_engine is None
            else "--transformer-impl is torch"
        )
        raise UserError(f"{name} {asked} needs --transformer-impl transformer_engine on a GPU: {why}")
    if precision.fp8_params and not distributed_optimizer:
        raise UserError("--fp8-param-gather needs --use-distributed-optimizer, which holds the float32 main parameters")
    if precision.fp8_params and recipe == "mxfp8":
        raise UserError(
            "--fp8-param-gather cannot be combined with --fp8-recipe mxfp8: its two orientations are quantized apart, so that "
            "megatron-core gathers bfloat16 through the gradient buffers and gains nothing; drop --fp8-param-gather"
        )
    need = REQUIREMENTS[recipe]
    recipe_flag = f"{name.replace('format', 'recipe')} {recipe}"
    capability, cuda, engine = hardware.capability, hardware.cuda, hardware.transformer_engine
    assert capability is not None and cuda is not None and engine is not None, hardware
    if capability < need.capability or (need.below is not None and capability >= need.below):
        below = "" if need.below is None else f" and below {dotted(need.below)}"
        raise UserError(
            f"{recipe_flag} needs a GPU of compute capability {dotted(need.capability)} or higher{below}; "
            f"it has {dotted(capability)}"
        )
    if engine < need.transformer_engine:
        raise UserError(
            f"{recipe_flag} needs Transformer Engine {dotted(need.transformer_engine)} or later, and {dotted(engine)} is "
            "installed"
        )
    if cuda < need.cuda:
        raise UserError(f"{recipe_flag} needs a torch for CUDA {dotted(need.cuda)} or later; this one is for {dotted(cuda)}")


def refuse_bf16_layers(precision: Precision, num_layers: int) -> None:
    """Raise UserError if --first-last-layers-bf16 leaves no layer to quantize."""
    first, last = precision.bf16_layers
    if precision.quantized and first + last >= num_layers:
        raise UserError(
            f"--num-layers-at-start-in-bf16 {first} and --num-layers-at-end-in-bf16 {last} leave none of --num-layers "
            f"{num_layers} to {_names(precision)[0]}"
        )


def product_dimensions(model: ModelConfig, tensor: int) -> dict[str, int]:
    """{description: size} of each dimension that a layer's products have on one of `tensor` tensor-parallel ranks."""
    of_ranks = "" if tensor == 1 else f" / {tensor} tensor-parallel ranks"
    heads = model.num_attention_heads * model.head_width
    return {
        f"--hidden-size {model.hidden_size}": model.hidden_size,
        f"--num-attention-heads {model.num_attention_heads} x head width {model.head_width}{of_ranks}": heads // tensor,
        f"queries, keys and values, {model.num_attention_heads} + 2 x {model.query_groups} heads x head width {model.head_width}{of_ranks}":
            (heads + 2 * model.query_groups * model.head_width) // tensor,
        f"--ffn-hidden-size {model.ffn_width}{of_ranks}": model.ffn_width // tensor,
    }  # fmt: skip


def refuse_shapes(
    precision: Precision, model: ModelConfig, parallel: ParallelConfig, seq_length: int, micro_batch: int
) -> None:
    """Raise UserError if a dimension of a product is not a multiple of the recipe's block size.

    Dimensions: widths after the tensor-parallel split, and the tokens of a microbatch (`micro_batch` samples) after context and sequence
    parallelism have split the sequence.
    """
    if not precision.quantized:
        return
    name, _, recipe = _names(precision)
    multiple = REQUIREMENTS[recipe].multiple
    slices = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    tokens = seq_length * micro_batch // slices
    split = "" if slices == 1 else f" / {slices} ranks that cut the sequence"
    dimensions = product_dimensions(model, parallel.tensor_model_parallel_size) | {
        f"tokens of a microbatch, --seq-length {seq_length} x {micro_batch} samples{split}": tokens
    }
    wrong = [f"{what} = {size}" for what, size in dimensions.items() if size % multiple]
    if wrong:
        whose = "the teacher's " if precision.forward_only else ""
        raise UserError(
            f"{name.replace('format', 'recipe')} {recipe} multiplies in blocks and needs multiples of {multiple}, but "
            f"{whose}{'; '.join(wrong)}"
        )


def _names(precision: Precision) -> tuple[str, str, str]:
    """(flag, its value, recipe) of the precision."""
    if precision.fp8_format is not None:
        field = "teacher_fp8_format" if precision.forward_only else "fp8_format"
        return flag(field), precision.fp8_format, precision.fp8_recipe
    assert precision.fp4_format is not None
    return flag("fp4_format"), precision.fp4_format, precision.fp4_recipe
