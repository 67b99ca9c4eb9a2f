"""Bytes of memory that the output head moves for each logit, counted and never declared. Used by head_roofline.py; needs no GPU.

    python benchmarks/head_bytes.py                       what a CPU runs: torch's operations, block by block
    TRITON_INTERPRET=1 python benchmarks/head_bytes.py    the kernels of a GPU, in Triton's interpreter

Prints JSON: bytes a logit by form of the head and by operation, the matrix products apart. A torch operation moves its inputs and
outputs, as torch's dispatcher sees them; views move nothing. A kernel moves what its loads and stores touch where their mask is set.

Each form runs with two numbers of tokens and two vocabularies. The second difference of the four counts is what grows with both, the
logits' part. It leaves out what grows with one of them, such as the weight's gradient, and needs no list of what a logit is.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import megatron_salt.parallel.cpu_seam

from megatron_salt.config.teaching import Gate
from megatron_salt.model import matrix_products
from megatron_salt.model.kernels import INTERPRETED
from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.token_scores import TokenScorer
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.launch import distributed

TOKENS = (4, 8)
VOCABULARIES = (1024, 4992)
"""Multiples of 64, so that no row is padded; the second is more than one block of a kernel."""
HIDDEN = 8
DTYPE = torch.bfloat16
GATES = {"kd, T 0.25, rank": Gate("rank", 9), "kd, T 0.25, entropy": Gate("entropy", 3.0)}
FORMS = {"kd, T 1": 1.0, "kd, T 0.25": 0.25, "plain": None, "scoring": None} | dict.fromkeys(GATES, 0.25)
"""The forms of the head: the loss with a teacher of this temperature and perhaps a gate, the loss alone, and the scores of tokens."""

PACKAGE = str(Path(megatron_salt.__file__).parent)

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_int_mm", "_scaled_mm")
_NOTHING_MOVES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_")
_WRITTEN_ALONE = ("copy_", "fill_", "zero_", "normal_", "uniform_")
_PICK = ("gather", "index", "index_select", "index_put_", "_index_put_impl_")


LogitTraffic = dict[str, dict[str, float]]
"""Bytes a logit by operation, of the "passes" over logits and of the matrix "products"."""


@dataclass
class Traffic:
    """Bytes by operation, as they are counted."""

    passes: Counter[str] = field(default_factory=Counter)
    """Of everything but the products."""
    products: Counter[str] = field(default_factory=Counter)
    """Of the matrix products, and of what matrix_products.py does around them."""
    launches: int = 0
    """Kernels that the interpreter ran."""


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of all operations and of all kernels while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims", "c10d"):  # an operation of ours: what happens inside it counts
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        name = func.name().removeprefix("aten::").partition(".")[0]
        counts = self.traffic.products if name in _PRODUCTS or _in_products() else self.traffic.passes
        if moved := _moved(func, name, args, kwargs, result):
            counts[name] += moved
        return result

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        """Count operations and, where the interpreter runs kernels, these too."""
        with _kernels_counted(self.traffic) if INTERPRETED else nullcontext(), self:
            yield self.traffic


def _in_products() -> bool:
    """Whether the innermost function of the package is one of matrix_products.py, such as one that widens operands."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == matrix_products.__file__


def _footprint(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: a dimension of stride 0 is there once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride or not size else 1
    return numbers * tensor.element_size()


def _moved(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operation reads and writes."""
    schema = func._schema
    if name in _NOTHING_MOVES or any(value.alias_info and not value.alias_info.is_write for value in schema.returns):
        return 0  # an allocation or a view
    if name in _PICK:
        return _picked(name, args, result)
    moved, written = 0, set()
    for number, argument in enumerate(schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            read = not changed or not (argument.kwarg_only or name in _WRITTEN_ALONE)
            moved += (read + changed) * _footprint(tensor)
            if changed:
                written.add(id(tensor))
    new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in written]
    return moved + sum(map(_footprint, new))


def _picked(name: str, args: tuple[Any, ...], result: Tensor) -> int:
    """Bytes of an operation that touches some elements of its first argument: indices, elements read, elements written."""
    tensors = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor)]
    if "put" in name:
        values = args[2]
        return sum(map(_footprint, tensors)) + values.numel() * args[0].element_size()
    return sum(map(_footprint, tensors)) + 2 * _footprint(result)


@contextmanager
def _kernels_counted(traffic: Traffic) -> Iterator[None]:
    """Count the loads, stores and atomic operations of Triton's interpreter, by kernel."""
    from triton.runtime import interpreter

    builder, running = interpreter.interpreter_builder, ["?"]
    touch: dict[str, Callable[..., tuple[Any, Any, int]]] = {  # pointers, mask, passes over memory
        "create_masked_load": lambda pointers, mask, *rest: (pointers, mask, 1),
        "create_masked_store": lambda pointers, value, mask, *rest: (pointers, mask, 1),
        "create_atomic_rmw": lambda operation, pointers, value, mask, *rest: (pointers, mask, 2),
        "create_atomic_cas": lambda pointers, *rest: (pointers, None, 2),
    }

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(builder, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            pointers, mask, times = touch[name](*args, **kwargs)
            lanes = pointers.data.size if mask is None else int(mask.data.sum())
            traffic.passes[running[0]] += times * lanes * pointers.get_element_ty().primitive_bitwidth // 8
            return original(*args, **kwargs)

        return call

    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        running[0] = self.fn.__name__
        traffic.launches += 1
        with _disable_current_modes():  # the interpreter's own work on tensors is no work of the head
            return launch(self, *args, **kwargs)

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launched))
        for name in touch:
            patched.enter_context(mock.patch.object(builder, name, counted(name)))
        yield


def run_form(form: str, tokens: int, vocabulary_size: int) -> Traffic:
    """The traffic of one forward and backward pass, or of scoring, in one chunk. Needs torch.distributed."""
    generator, temperature = torch.Generator().manual_seed(3), FORMS[form]
    group = dist.group.WORLD
    assert group is not None

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DTYPE)

    hidden, weight = draw(tokens, 1, HIDDEN).requires_grad_(), draw(vocabulary_size, HIDDEN).requires_grad_()
    labels, mask = torch.randint(0, vocabulary_size, (tokens,), generator=generator), torch.ones(tokens)
    teacher = None
    if temperature is not None:
        teacher = SoftTarget(draw(tokens, 1, HIDDEN), draw(vocabulary_size, HIDDEN), temperature, 0.667, gate=GATES.get(form))
    shard = VocabularyShard(group, vocabulary_size, vocabulary_size, False)
    with ByteCounter().counting() as traffic:
        if form == "scoring":
            TokenScorer(weight.detach(), shard, tokens).score(hidden.detach(), labels, mask)
        else:
            fused_linear_cross_entropy(hidden, weight, labels, mask, shard, tokens, teacher)[0].backward()
    return traffic


def bytes_a_logit(form: str, vocabularies: tuple[int, int] = VOCABULARIES) -> LogitTraffic:
    """The part of the traffic that grows with the tokens and with the vocabulary, for each logit. Needs torch.distributed."""
    (few, many), (small, large) = TOKENS, vocabularies
    signs = {(many, large): 1, (many, small): -1, (few, large): -1, (few, small): 1}
    runs = [(sign, run_form(form, *sizes)) for sizes, sign in signs.items()]
    if INTERPRETED and not all(traffic.launches for _, traffic in runs):
        raise RuntimeError(f"no kernel ran in the form {form!r}, although TRITON_INTERPRET is 1")
    logits = (many - few) * (large - small)

    def difference(counts: list[tuple[int, Counter[str]]]) -> dict[str, float]:
        names = {name for _, count in counts for name in count}
        moved = {name: sum(sign * count[name] for sign, count in counts) / logits for name in names}
        return {name: moved[name] for name in sorted(names, key=lambda name: -moved[name]) if moved[name]}

    return {
        "passes": difference([(sign, traffic.passes) for sign, traffic in runs]),
        "products": difference([(sign, traffic.products) for sign, traffic in runs]),
    }


def main() -> None:
    os.environ.setdefault("MEGATRON_SALT_BFLOAT16_PRODUCTS", "native")  # the same products on every CPU
    with distributed(timedelta(minutes=5)):
        print(json.dumps({form: bytes_a_logit(form) for form in FORMS}))


if __name__ == "__main__":
    main()
