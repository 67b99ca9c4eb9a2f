"""The output head in megatron-core: equal to megatron-core's output layer and loss; and what the head refuses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: it makes CUDA literals mean the CPU)

from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.errors import UserError
from megatron_salt.model.head import OutputHead
from megatron_salt.model.loss import KD_METRICS
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


def both_heads(tp: int, sequence_parallel: bool, dtype: torch.dtype, chunk: int) -> dict[str, tuple[float, float, float]]:
    """{head: relative errors of (loss, d_hidden, d_weight)} against megatron-core in float32."""
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
