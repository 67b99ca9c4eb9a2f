"""FP8 without an FP8 GPU: numbers are rounded to torch's float8 types, and products are computed in float32 from the rounded numbers.

Each recipe of Transformer Engine scales differently: one scale a tensor from its present maximum (tensorwise) or from a history of
maxima (delayed), a power of two for each block of 128 or 128 x 128 values (blockwise), or for each 32 values (mxfp8). `emulate` puts a
recipe into megatron-core's parallel linears, forward and backward; weights and keys stay. It cannot show how a kernel accumulates, and
not its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.tensor_parallel import layers, mappings

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK, MX_BLOCK = 128, 32
Group = dist.ProcessGroup | None


class Quantized(NamedTuple):
    """A tensor in FP8: value = payload / scale."""

    payload: Tensor
    """float8, of the tensor's shape."""
    scale: Tensor
    """float32, broadcastable to it."""

    def back(self) -> Tensor:
        """The value in float32."""
        return self.payload.float() / self.scale


# ---- scales ---------------------------------------------------------------------------------------------------------------


def largest_of(dtype: torch.dtype) -> float:
    """The largest number of an FP8 type: 448 or 57344."""
    return torch.finfo(dtype).max


def amax_of(tensor: Tensor, group: Group = None) -> Tensor:
    """The largest magnitude over the ranks of a group, a float32 scalar. Collective over the group."""
    amax = tensor.detach().float().abs().amax()
    if group is not None:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    return amax


def scale_from(amax: Tensor, dtype: torch.dtype, margin: int = 0, instead: Tensor | float = 1.0) -> Tensor:
    """The float32 scale that maps amax to the type's largest number over 2^margin; `instead` where amax is 0 or not finite."""
    scale = largest_of(dtype) / amax.float() / 2**margin
    scale = torch.where((amax > 0) & torch.isfinite(amax), scale, torch.as_tensor(instead, dtype=torch.float32))
    return scale.clamp(max=torch.finfo(torch.float32).max)  # a tiny amax


def power_of_two_at_most(scale: Tensor) -> Tensor:
    """float32 values rounded down to powers of two, so that nothing is scaled beyond the type's largest number."""
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)


def quantize(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """The tensor scaled, clamped to the type's largest number, and rounded to nearest."""
    largest = largest_of(dtype)
    return Quantized((tensor.detach().float() * scale).clamp(-largest, largest).to(dtype), scale)


def block_amax(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """For each value the largest magnitude of its block: float32 [n, m]. Blocks at the ends may be smaller."""
    n, m = tensor.shape
    padded = F.pad(tensor.detach().float().abs(), (0, -m % columns, 0, -n % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :m]


def quantize_blocks(tensor: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Quantized:
    """A tensor [n, m] quantized with a power of two for each block, as float8_e8m0fnu could hold it."""
    return quantize(tensor, power_of_two_at_most(scale_from(block_amax(tensor, rows, columns), dtype)), dtype)


# ---- recipes: a tensor [n, m] to what a product over its last dimension reads, and one over its first ---------------------------


class Quantizer(Protocol):
    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]: ...
    def rows(self, tensor: Tensor) -> Quantized:
        """The quantized tensor in its memory order."""

    def update(self) -> None:
        """Add the maxima seen since the last call to the history. Collective where maxima are reduced."""


@dataclass
class Tensorwise:
    """Current scaling: the scale comes from the tensor's own maximum."""

    dtype: torch.dtype
    group: Group = None

    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        back = self.rows(tensor).back()
        return back, back

    def rows(self, tensor: Tensor) -> Quantized:
        return quantize(tensor, scale_from(amax_of(tensor, self.group), self.dtype), self.dtype)

    def update(self) -> None: ...


class Delayed:
    """Delayed scaling: the scale comes from maxima of earlier steps."""

    def __init__(
        self, dtype: torch.dtype, length: int, algorithm: Literal["max", "most_recent"], margin: int, group: Group = None
    ) -> None:
        self.dtype, self.algorithm, self.margin, self.group = dtype, algorithm, margin, group
        self.scale, self.history = torch.ones(()), torch.zeros(length)  # history[0] is of now

    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        self.history[0] = torch.maximum(self.history[0], amax_of(tensor))
        back = self.rows(tensor).back()
        return back, back

    def rows(self, tensor: Tensor) -> Quantized:
        return quantize(tensor, self.scale, self.dtype)

    def update(self) -> None:
        if self.group is not None:
            dist.all_reduce(self.history[0], op=dist.ReduceOp.MAX, group=self.group)
        amax = self.history.max() if self.algorithm == "max" else self.history[0].clone()
        self.scale = scale_from(amax, self.dtype, self.margin, instead=self.scale)
        if len(self.history) > 1:
            self.history = self.history.roll(-1)
        self.history[0] = 0.0


@dataclass
class Blocks:
    """Blocks of `height` x `width`. The transposed form is quantized from the tensor itself, not from its quantized form."""

    dtype: torch.dtype
    height: int
    width: int

    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows(tensor).back(), quantize_blocks(tensor, self.width, self.height, self.dtype).back()

    def rows(self, tensor: Tensor) -> Quantized:
        return quantize_blocks(tensor, self.height, self.width, self.dtype)

    def update(self) -> None: ...


@dataclass
class Kept:
    """A weight that exists only in FP8: what is passed in is ignored."""

    quantized: Quantized

    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        back = self.quantized.back()
        return back, back

    def rows(self, tensor: Tensor) -> Quantized:
        return self.quantized

    def update(self) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """How the linears of a model quantize."""

    kind: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    hybrid: bool = True
    """Gradients in e5m2."""
    history: int = 16
    algorithm: Literal["max", "most_recent"] = "max"
    margin: int = 0

    def quantizers(self, group: Group) -> tuple[Quantizer, Quantizer, Quantizer]:
        """Quantizers of a linear's input, weight and output gradient. group: the ranks over which maxima are reduced."""
        gradients = E5M2 if self.hybrid else E4M3
        return self._quantizer(E4M3, 1, group), self._quantizer(E4M3, BLOCK, group), self._quantizer(gradients, 1, group)

    def _quantizer(self, dtype: torch.dtype, height: int, group: Group) -> Quantizer:
        match self.kind:
            case "tensorwise":
                return Tensorwise(dtype, group)
            case "delayed":
                return Delayed(dtype, self.history, self.algorithm, self.margin, group)
            case "blockwise":
                return Blocks(dtype, height, BLOCK)
            case "mxfp8":
                return Blocks(dtype, 1, MX_BLOCK)


# ---- a model's linears ------------------------------------------------------------------------------------------------------


class Fp8Product(torch.autograd.Function):
    """x [..., n] @ weight [m, n]^T. All three products, of forward and backward pass, have quantized operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantizers: tuple[Quantizer, Quantizer, Quantizer]) -> Tensor:
        (x_rows, x_columns), (w_rows, w_columns) = quantizers[0](x.flatten(0, -2)), quantizers[1](weight)
        ctx.save_for_backward(x_columns, w_columns)
        ctx.gradient, ctx.dtype = quantizers[2], weight.dtype
        return (x_rows @ w_rows.t()).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x_columns, w_columns = ctx.saved_tensors
        d_rows, d_columns = ctx.gradient(d_y.flatten(0, -2))
        d_x = (d_rows @ w_columns).to(d_y.dtype).unflatten(0, d_y.shape[:-1])
        return d_x, (d_columns.t() @ x_columns).to(ctx.dtype), None


class Column(layers.ColumnParallelLinear):
    """A ColumnParallelLinear that multiplies in FP8 while its `emulation` is on."""

    emulation: Emulation
    quantizers: tuple[Quantizer, Quantizer, Quantizer]

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Any]:
        if not self.emulation.active:
            return super().forward(input_, weight, runtime_gather_output)
        bring = (mappings.gather_from_sequence_parallel_region if self.sequence_parallel
                 else mappings.copy_to_tensor_model_parallel_region)  # fmt: skip
        return _with_bias(Fp8Product.apply(bring(input_, group=self.tp_group), self.weight, self.quantizers), self)


class Row(layers.RowParallelLinear):
    """A RowParallelLinear that multiplies in FP8 while its `emulation` is on."""

    emulation: Emulation
    quantizers: tuple[Quantizer, Quantizer, Quantizer]

    def forward(self, input_: Tensor) -> tuple[Tensor, Any]:
        if not self.emulation.active:
            return super().forward(input_)
        part = Fp8Product.apply(input_, self.weight, self.quantizers)
        add_up = (mappings.reduce_scatter_to_sequence_parallel_region if self.sequence_parallel
                  else mappings.reduce_from_tensor_model_parallel_region)  # fmt: skip
        return _with_bias(add_up(part, group=self.tp_group), self)


def _with_bias(output: Tensor, linear: Column | Row) -> tuple[Tensor, Any]:
    if linear.skip_bias_add or linear.bias is None:
        return output, linear.bias
    return output + linear.bias, None


class Emulation:
    """FP8 in the linears of one model. It is on inside `products`."""

    def __init__(self, linears: list[Any]) -> None:
        self.linears, self.active = linears, False

    @contextmanager
    def products(self) -> Iterator[None]:
        """Like Transformer Engine's autocast: scales are updated at the end, and only where gradients are enabled."""
        if torch.is_grad_enabled():
            self._update(2)  # of the backward before
        self.active = True
        try:
            yield
        finally:
            self.active = False
        if torch.is_grad_enabled():
            self._update(0, 1)

    @torch.no_grad()
    def keep_fp8_alone(self) -> None:
        """Keep only the FP8 form of the linears' weights, in a model that only runs forward."""
        for linear in self.linears:
            kept = linear.quantizers[1].rows(linear.weight)
            linear.register_buffer("payload", kept.payload)
            linear.quantizers = (linear.quantizers[0], Kept(kept), linear.quantizers[2])
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)

    def _update(self, *which: int) -> None:
        for linear in self.linears:
            for number in which:
                linear.quantizers[number].update()


def emulate(model: nn.Module, recipe: Recipe, reduce_amax: bool = True) -> Emulation:
    """Emulate FP8 in every parallel linear but the output head. reduce_amax: maxima are of whole tensors, not of a rank's part."""
    linears: list[Any] = []
    for module in model.modules():
        for plain, emulated in ((layers.ColumnParallelLinear, Column), (layers.RowParallelLinear, Row)):
            if type(module) is plain:
                module.__class__ = emulated
                linears.append(module)
    assert linears, "nothing to emulate"
    emulation = Emulation(linears)
    for linear in linears:
        linear.emulation, linear.quantizers = emulation, recipe.quantizers(linear.tp_group if reduce_amax else None)
    return emulation
