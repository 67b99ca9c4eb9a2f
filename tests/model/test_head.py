"""The output head inside megatron-core: against mcore's own output layer and loss, under mcore's DDP, and its refusals."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: it makes CUDA literals mean the CPU)

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.errors import UserError
from megatron_salt.model.head import OutputHead
from megatron_salt.model.loss import KD_METRICS, SoftTarget
from tests.support.grids import grid
from tests.support.ranks import run_ranks

SEQUENCE, BATCH, HIDDEN, VOCABULARY = 8, 2, 16, 64


def config_for(tp: int, **options: object) -> TransformerConfig:
    dtype = options.pop("dtype", torch.float32)
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tp,
        **options,
    )


def init(weight: Tensor) -> Tensor:
    return torch.nn.init.normal_(weight, std=0.3)


def start(tp: int) -> None:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def make_head(config: TransformerConfig, **options: object) -> OutputHead:
    options = {"vocabulary_size": VOCABULARY, "chunk_tokens": 5, **options}
    return OutputHead(HIDDEN, VOCABULARY, config=config, init_method=init, **options)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_tokens(seed: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(seed))


# ---- against mcore's ColumnParallelLinear + vocab_parallel_cross_entropy -----------------------------------------------


def both_heads(tp: int, sequence_parallel: bool, dtype: torch.dtype, chunk: int) -> dict[str, tuple[float, float, float]]:
    """Errors of (loss, d_hidden, d_weight) against mcore in float32, by head."""
    start(tp)
    whole, labels, mask = draw(SEQUENCE, BATCH, HIDDEN).to(dtype), draw_tokens(), (draw(BATCH, SEQUENCE) > -0.3).float()
    weight = draw(VOCABULARY, HIDDEN, seed=9).mul(0.4).to(dtype).chunk(tp)[dist.get_rank()]
    results = {}
    for name, kind in (("exact", torch.float32), ("mcore", dtype), ("ours", dtype)):
        config = config_for(tp, sequence_parallel=sequence_parallel, dtype=kind)
        hidden = (whole.chunk(tp)[dist.get_rank()] if sequence_parallel else whole).to(kind).clone().requires_grad_()
        mcore = ColumnParallelLinear(HIDDEN, VOCABULARY, config=config, init_method=init, bias=False)
        layer = make_head(config, chunk_tokens=chunk) if name == "ours" else mcore
        with torch.no_grad():
            layer.weight.copy_(weight)
        if name == "ours":
            loss, metrics = layer(hidden, labels, mask)
            assert metrics.tolist()[:2] == [float(mask.sum()), float(loss)]
        else:
            logits, _ = layer(hidden)
            loss = (tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous()) * mask.t()).sum()
        loss.backward()
        results[name] = [loss.detach().double(), hidden.grad.double(), layer.weight.grad.double()]

    def errors(name: str) -> tuple[float, ...]:
        return tuple(float((a - b).norm() / b.norm()) for a, b in zip(results[name], results["exact"], strict=True))

    return {name: errors(name) for name in ("mcore", "ours")}


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)], ids=["tp1", "tp2", "tp2sp"])
def test_equals_the_output_layer_of_mcore(tp, sequence_parallel):
    for errors in run_ranks(tp, both_heads, tp, sequence_parallel, torch.float32, 5):
        assert max(errors["ours"]) < 1e-6


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_bfloat16_is_as_exact_as_mcore_whatever_the_chunk(chunk):
    (errors,) = run_ranks(1, both_heads, 1, False, torch.bfloat16, chunk)
    for ours, mcore in zip(errors["ours"], errors["mcore"], strict=True):
        assert ours < 1.5 * mcore + 1e-4


def logits_with_gradients(tp: int, tied: bool) -> None:
    start(tp)
    config = config_for(tp)
    layer = ColumnParallelLinear(HIDDEN, VOCABULARY, config=config, init_method=init, bias=False)
    ours = make_head(config, skip_weight_param_allocation=tied)
    given = layer.weight.detach().clone().requires_grad_() if tied else None
    if not tied:
        ours.load_state_dict(layer.state_dict())
    saved = ours.sharded_state_dict("output_layer.", metadata={"dp_cp_group": dist.group.WORLD})
    assert list(saved) == ([] if tied else ["output_layer.weight"])
    results = []
    for head, weight in ((layer, None), (ours, given)):
        hidden = draw(SEQUENCE, BATCH, HIDDEN).requires_grad_()
        logits, bias = head(hidden, weight=weight)
        logits.square().sum().backward()
        results.append((logits, hidden.grad, (head.weight if weight is None else weight).grad))
        assert bias is None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [1, 2])
def test_without_labels_it_is_a_column_parallel_linear(tp, tied):
    run_ranks(tp, logits_with_gradients, tp, tied)


# ---- the gradient's way into main_grad -----------------------------------------------------------------------------------


class TinyModel(torch.nn.Module):
    """Embedding -> norm -> head; where tied, at one pipeline stage as mcore's LanguageModule sets it up."""

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
class Way:
    tied: bool = False
    fusion: bool = False
    overlap: bool = False
    dtype: torch.dtype = torch.float32
    taught: bool = False


def teacher_of(tokens: Tensor, dtype: torch.dtype) -> SoftTarget:
    """A teacher of another hidden size that has something to say about each batch of tokens."""
    hidden = draw(SEQUENCE, BATCH, 24, seed=int(tokens.sum()))
    return SoftTarget(hidden.to(dtype), draw(VOCABULARY, 24, seed=8).mul(0.4).to(dtype), temperature=0.5, kd_weight=0.6)


def microbatches(rank: int) -> list[tuple[Tensor, Tensor]]:
    tokens = [draw_tokens(seed=10 * rank + i) % 50 for i in range(3)]
    masks = [torch.ones(BATCH, SEQUENCE), (draw(BATCH, SEQUENCE, seed=rank) > 0).float(), torch.zeros(BATCH, SEQUENCE)]
    return list(zip(tokens, masks, strict=True))


def torch_gradients(model: TinyModel, rank: int, way: Way) -> dict[str, Tensor]:
    """Plain torch, full logits, float64, all microbatches in one sum."""
    names = dict(model.named_parameters())
    parameters = {name: parameter.detach().double().requires_grad_() for name, parameter in names.items()}
    table = parameters["embedding.weight"]
    for tokens, mask in microbatches(rank):
        hidden = torch.nn.functional.layer_norm(table[tokens], (HIDDEN,), parameters["norm.weight"], parameters["norm.bias"])
        log_p = (hidden @ (table if model.tied else parameters["head.weight"])[:50].t()).log_softmax(-1)
        loss = -log_p.gather(-1, tokens.roll(-1, 1)[..., None])[..., 0]
        if way.taught:
            teacher = teacher_of(tokens, way.dtype)
            logits = teacher.hidden.transpose(0, 1).double() @ teacher.weight[:50].double().t()
            loss = 0.4 * loss - 0.6 * ((logits / teacher.temperature).softmax(-1) * log_p).sum(-1)
        (loss * mask).sum().backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def weight_gradients_alive() -> int:
    """Float32 [V/tp, h] tensors that are neither parameters nor their gradients: the head's."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (VOCABULARY, HIDDEN) and t.dtype == torch.float32]
    return sum(t._base is None for t in alive)


def main_grads(way: Way) -> tuple[dict[str, float], list[int]]:
    """Relative errors of each main_grad after three microbatches under mcore's DDP, and weight gradients alive on the way."""
    start(1)
    config = config_for(1, gradient_accumulation_fusion=way.fusion, dtype=way.dtype)
    model = TinyModel(config, way.tied)
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=way.overlap, grad_reduce_in_fp32=True, bucket_size=100 if way.overlap else None
    )
    ddp = DistributedDataParallel(config, ddp_config, model)
    ddp.zero_grad_buffer()
    base = weight_gradients_alive()
    alive = []
    batches = [
        (tokens, mask, teacher_of(tokens, way.dtype) if way.taught else None) for tokens, mask in microbatches(dist.get_rank())
    ]
    for batch in batches[:-1]:
        with ddp.no_sync():
            loss, _ = ddp(*batch)
            alive.append(weight_gradients_alive() - base)
            loss.backward()
            alive.append(weight_gradients_alive() - base)
    ddp(*batches[-1])[0].backward()
    ddp.finish_grad_sync()
    exact = torch_gradients(model, dist.get_rank(), way)
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
    for errors, alive in run_ranks(2, main_grads, Way(tied, fusion, overlap, dtype, taught)):
        assert max(errors.values()) < (2e-6 if dtype == torch.float32 else 2e-2), errors
        assert alive == [1, 0, 1, 0]


def protocol(zero_out: bool, main_dtype: torch.dtype) -> None:
    """As in mcore's tensor_parallel/layers.py: forward leaves main_grad alone, backward adds, flags it, returns a dummy."""
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
    assert head.weight.grad_added_to_main_grad and head.weight.grad.shape == head.weight.shape
    assert not zero_out or not head.weight.grad.any()
    head.weight.grad = None
    del head.weight.grad_added_to_main_grad  # nobody's hook waits: no dummy
    head(hidden, labels)[0].backward()
    assert head.weight.grad is None
    torch.testing.assert_close(head.weight.main_grad.float(), 2 + 1.3 * exact, **close)


@pytest.mark.parametrize("zero_out", [False, True], ids=["", "zero_out_wgrad"])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=["main fp32", "main bf16"])
def test_main_grad_protocol(main_dtype, zero_out):
    run_ranks(1, protocol, zero_out, main_dtype)


def waits_for_parameters() -> list[str]:
    """Names of parameters whose gather is waited for, in order, while the model runs."""
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


# ---- refusals ------------------------------------------------------------------------------------------------------------


def refuse(case: str) -> None:
    start(1)
    if case == "float16":
        with pytest.raises(UserError, match="float16.*--bf16"):
            make_head(config_for(1, dtype=torch.float16))
    elif case == "fsdp":
        head = make_head(config_for(1))
        head.weight.__fsdp_param__ = True
        with pytest.raises(ValueError, match="FSDP"):
            head(draw(SEQUENCE, BATCH, HIDDEN), draw_tokens())
    elif case == "vocabulary":
        with pytest.raises(ValueError, match="65 .* 64"):
            make_head(config_for(1), vocabulary_size=65)
    else:
        config = config_for(1)
        setattr(config, case, True)
        with pytest.raises(ValueError, match=case):
            make_head(config)


MCORE_FEATURES = ["defer_embedding_wgrad_compute", "overlap_moe_expert_parallel_comm"]


@pytest.mark.parametrize("case", ["float16", "fsdp", "vocabulary", *MCORE_FEATURES])
def test_refuses_what_would_give_wrong_gradients(case):
    run_ranks(1, refuse, case)


def test_metrics_have_distinct_names():
    assert len(set(KD_METRICS)) == len(KD_METRICS)
