"""The weight gradient of the output head, under megatron-core's DDP: it reaches main_grad, once, with tied embeddings too."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: it makes CUDA literals mean the CPU)

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.model import loss
from megatron_salt.model.loss import SoftTarget
from tests.model.test_head import BATCH, HIDDEN, SEQUENCE, VOCABULARY, config_for, draw, draw_tokens, init, make_head, start
from tests.support.grids import grid
from tests.support.ranks import run_ranks


class TinyModel(torch.nn.Module):
    """Embedding -> norm -> head. If tied, the weight is shared as in megatron-core's LanguageModule on one pipeline stage."""

    def __init__(self, config: TransformerConfig, tied: bool) -> None:
        super().__init__()
        self.config = config
        self.embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, init_method=init, config=config)
        self.norm = torch.nn.LayerNorm(HIDDEN, dtype=config.params_dtype)
        self.head = make_head(config, vocabulary_size=50, skip_weight_param_allocation=tied)
        self.tied = tied
        if tied:
            self.embedding.weight.zero_out_wgrad = True

    def forward(self, tokens: Tensor, mask: Tensor, teacher: SoftTarget | None) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.embedding(tokens).transpose(0, 1).contiguous())
        return self.head(hidden, tokens.roll(-1, 1), mask, self.embedding.weight if self.tied else None, teacher)


@dataclass(frozen=True)
class Setup:
    tied: bool = False
    fusion: bool = False
    overlap: bool = False
    dtype: torch.dtype = torch.float32
    taught: bool = False


def teacher_of(tokens: Tensor, dtype: torch.dtype) -> SoftTarget:
    """A teacher with another hidden size, whose target differs for each batch of tokens."""
    hidden = draw(SEQUENCE, BATCH, 24, seed=int(tokens.sum()))
    return SoftTarget(hidden.to(dtype), draw(VOCABULARY, 24, seed=8).mul(0.4).to(dtype), temperature=0.5, kd_weight=0.6)


def microbatches(rank: int) -> list[tuple[Tensor, Tensor]]:
    tokens = [draw_tokens(seed=10 * rank + i) % 50 for i in range(3)]
    masks = [torch.ones(BATCH, SEQUENCE), (draw(BATCH, SEQUENCE, seed=rank) > 0).float(), torch.zeros(BATCH, SEQUENCE)]
    return list(zip(tokens, masks, strict=True))


def torch_gradients(model: TinyModel, rank: int, setup: Setup) -> dict[str, Tensor]:
    """Oracle: plain torch with full logits in float64, all microbatches in one sum."""
    names = dict(model.named_parameters())
    parameters = {name: parameter.detach().double().requires_grad_() for name, parameter in names.items()}
    table = parameters["embedding.weight"]
    for tokens, mask in microbatches(rank):
        hidden = torch.nn.functional.layer_norm(table[tokens], (HIDDEN,), parameters["norm.weight"], parameters["norm.bias"])
        log_p = (hidden @ (table if model.tied else parameters["head.weight"])[:50].t()).log_softmax(-1)
        loss = -log_p.gather(-1, tokens.roll(-1, 1)[..., None])[..., 0]
        if setup.taught:
            teacher = teacher_of(tokens, setup.dtype)
            logits = teacher.hidden.transpose(0, 1).double() @ teacher.weight[:50].double().t()
            loss = 0.4 * loss - 0.6 * ((logits / teacher.temperature).softmax(-1) * log_p).sum(-1)
        (loss * mask).sum().backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def weight_gradients_alive() -> int:
    """Number of float32 [V/tp, h] tensors that are neither parameters nor their gradients: the head's weight gradients."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (VOCABULARY, HIDDEN) and t.dtype == torch.float32]
    return sum(t._base is None for t in alive)


def main_grads(setup: Setup) -> tuple[dict[str, float], list[int]]:
    """Relative error of each main_grad after three microbatches under megatron-core's DDP, and the weight gradients alive after each."""
    start(1)
    config = config_for(1, gradient_accumulation_fusion=setup.fusion, dtype=setup.dtype)
    model = TinyModel(config, setup.tied)
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=setup.overlap, grad_reduce_in_fp32=True, bucket_size=100 if setup.overlap else None
    )
    ddp = DistributedDataParallel(config, ddp_config, model)
    ddp.zero_grad_buffer()
    base = weight_gradients_alive()
    alive = []
    batches = [
        (tokens, mask, teacher_of(tokens, setup.dtype) if setup.taught else None)
        for tokens, mask in microbatches(dist.get_rank())
    ]
    for batch in batches[:-1]:
        with ddp.no_sync():
            loss, _ = ddp(*batch)
            alive.append(weight_gradients_alive() - base)
            loss.backward()
            alive.append(weight_gradients_alive() - base)
    ddp(*batches[-1])[0].backward()
    ddp.finish_grad_sync()
    exact = torch_gradients(model, dist.get_rank(), setup)
    for gradient in exact.values():
        dist.all_reduce(gradient)
    world = dist.get_world_size()
    errors = {
        name: float((parameter.main_grad.double() * world - exact[name]).norm() / exact[name].norm())
        for name, parameter in model.named_parameters()
    }
    assert all(p.grad is None for p in model.parameters())
    return errors, alive


@pytest.mark.parametrize(
    "dtype, tied, fusion, overlap, taught",
    grid(
        dtype=(torch.float32, torch.bfloat16),
        tied=(False, True),
        fusion=(False, True),
        overlap=(False, True),
        taught=(False, True),
    ),
)
def test_main_grad_is_the_sum_of_all_uses_of_the_weight(dtype, tied, fusion, overlap, taught):
    for errors, alive in run_ranks(2, main_grads, Setup(tied, fusion, overlap, dtype, taught)):
        assert max(errors.values()) < (2e-6 if dtype == torch.float32 else 2e-2), errors
        assert alive == [1, 0, 1, 0]


def protocol(zero_out: bool, main_dtype: torch.dtype) -> None:
    """As in megatron-core's tensor_parallel/layers.py: forward leaves main_grad alone; backward adds to it, sets its flag
    and returns a dummy, unless the embedding's gradient of the same weight follows."""
    start(1)
    head = make_head(config_for(1))
    hidden, labels = draw(SEQUENCE, BATCH, HIDDEN), draw_tokens()
    head(hidden, labels)[0].backward()
    exact = head.weight.grad.clone()
    head.weight.grad = None
    head.weight.main_grad = torch.full((VOCABULARY, HIDDEN), 2.0, dtype=main_dtype)
    close = {"rtol": 1e-6, "atol": 1e-6} if main_dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.01}
    head.weight.grad_added_to_main_grad = False
    head.weight.zero_out_wgrad = zero_out
    loss, _ = head(hidden, labels)
    assert (head.weight.main_grad == 2).all() and not head.weight.grad_added_to_main_grad
    (loss * 0.3).backward()
    torch.testing.assert_close(head.weight.main_grad.float(), 2 + 0.3 * exact, **close)
    assert head.weight.grad_added_to_main_grad
    assert head.weight.grad is None if zero_out else head.weight.grad.shape == head.weight.shape
    head.weight.grad = None
    del head.weight.grad_added_to_main_grad  # no hook waits, so backward returns no dummy
    head(hidden, labels)[0].backward()
    assert head.weight.grad is None
    torch.testing.assert_close(head.weight.main_grad.float(), 2 + 1.3 * exact, **close)


@pytest.mark.parametrize("zero_out", [False, True], ids=["", "zero_out_wgrad"])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=["main fp32", "main bf16"])
def test_main_grad_protocol(main_dtype, zero_out):
    run_ranks(1, protocol, zero_out, main_dtype)


class Tables(TorchDispatchMode):
    """Names the operations that make a new tensor as large as the tied weight."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.makers: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if isinstance(result, Tensor) and result.numel() >= VOCABULARY * HIDDEN:
            storage = result.untyped_storage().data_ptr()
            if storage not in self.seen:
                self.makers.append(operation.overloadpacket.__name__)
            self.seen.add(storage)
        return result


def with_zeros(weight: Tensor, d_weight: Tensor, scale: Tensor) -> Tensor:
    """megatron-core's protocol for a weight with two uses on one stage: the head returns zeros."""
    assert deliver(weight, d_weight, scale) is None
    return torch.zeros_like(weight)


deliver = loss._deliver


def tied_steps(dtype: torch.dtype, zeros: bool) -> tuple[list[Tensor], list[int], list[str]]:
    """Two steps of two microbatches with overlapped reduction: main_grads after each, reductions of each, what its last backward made."""
    start(1)
    config = config_for(1, dtype=dtype)
    model = TinyModel(config, tied=True)
    buckets = DistributedDataParallelConfig(overlap_grad_reduce=True, grad_reduce_in_fp32=True, bucket_size=8)
    ddp = DistributedDataParallel(config, buckets, model)
    gradients, makers, reductions = [], [], list[int]()
    for group in ddp.bucket_groups:

        def start_now(force_all_reduce: bool = False, begin=group.start_grad_sync) -> None:
            reductions[-1] += 1
            begin(force_all_reduce)

        group.start_grad_sync = start_now
    for _ in range(2):
        ddp.zero_grad_buffer()
        [first, second, _] = microbatches(dist.get_rank())
        with ddp.no_sync():
            ddp(*first, None)[0].backward()
        total = ddp(*second, None)[0]
        known = [model.embedding.weight, model.embedding.weight.main_grad, total.grad_fn.d_weight]
        reductions.append(0)
        with pytest.MonkeyPatch.context() as patch, Tables(known) as tables:
            if zeros:
                patch.setattr(loss, "_deliver", with_zeros)
            total.backward()
        early = reductions[-1]
        ddp.finish_grad_sync()
        makers = tables.makers
        gradients += [parameter.main_grad.clone() for parameter in model.parameters()]
    assert early == reductions[-1] == len(ddp.bucket_groups) > 1, (early, reductions)  # started by hooks, once each
    return gradients, reductions, makers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_weight_gets_no_zeros_from_the_head(dtype):
    """Oracle: zeros, as megatron-core's own layers return them. The embedding's gradient alone runs the hook, once."""
    ours, protocols = (run_ranks(2, tied_steps, dtype, zeros) for zeros in (False, True))
    for (gradients, reductions, makers), (expected, also_reduced, also_made) in zip(ours, protocols, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
        assert reductions == also_reduced and makers == ["embedding_dense_backward"]
        assert also_made == ["zeros_like", *makers, "add"]


def waits_for_parameters() -> list[str]:
    """Names of the parameters whose gather the model waits for, in order."""
    start(1)
    config = config_for(1)
    model = TinyModel(config, tied=False)
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=True, overlap_param_gather=True, use_distributed_optimizer=True, bucket_size=100
    )
    ddp = DistributedDataParallel(config, ddp_config, model)
    waited: list[str] = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in ddp.bucket_groups:

        def finish(skip_next_bucket_dispatch: bool = False, group=group) -> None:
            waited.extend(names[parameter] for parameter in group.params)

        group.finish_param_sync = finish
    with torch.no_grad():
        ddp(*microbatches(0)[0], None)
    return waited


def test_calling_the_head_waits_for_its_parameter_gather():
    for waited in run_ranks(2, waits_for_parameters):
        assert waited[-1] == "head.weight", waited
