"""Hidden-state guidance in every layout against a float64 oracle of the whole model: gradients of all parameters, and the metrics.

The oracle is the decoder in plain torch. The teacher's hidden states are random numbers, which each rank cuts as the exchange would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.model.guidance.target import HiddenTarget, Targets
from megatron_salt.parallel.layout import context_slice
from megatron_salt.salt.guidance.distance import mean_distance
from megatron_salt.train.step import Student, train_step, unwrap
from tests.model.guidance.test_term import cosine_distance
from tests.support.gradients import whole_gradients, whole_tensors
from tests.support.plain_model import norm as plain_norm
from tests.support.plain_model import streams
from tests.support.ranks import run_ranks
from tests.support.small import GLOBAL_BATCH, MODELS, SEQ_LENGTH, VOCABULARY, Case, batch, build_student, save_weights

TEACHER_WIDTH = 48
WEIGHT = 0.7


def hidden_states() -> Tensor:
    """float64 [samples, s, h_t], which float32 holds."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(GLOBAL_BATCH, SEQ_LENGTH, TEACHER_WIDTH, generator=generator).double()


def targets_of(student: Student, microbatches: Sequence[Microbatch], layer: int, weight: float) -> list[Targets]:
    """What the exchange would leave with each microbatch on this rank."""
    numbers = {module.layer_number for chunk in student.chunks for module in unwrap(chunk).decoder.layers}
    if layer not in numbers:
        return [Targets()] * len(microbatches)
    layout, at = student.mesh.layout, student.mesh.at
    own = torch.cat([torch.arange(SEQ_LENGTH)[part] for part in context_slice(SEQ_LENGTH, layout.context, at.cp)])
    own = own.chunk(layout.tensor)[at.tp]
    hidden = hidden_states().float()
    return [
        Targets(hidden=HiddenTarget(hidden[torch.from_numpy(one.sample_ids)][:, own].transpose(0, 1), layer, weight))
        for one in microbatches
    ]


class Guiding:
    """Stands for a teacher."""

    def __init__(self, targets: list[Targets]) -> None:
        self._targets = targets

    def annotate(self, *_: Any) -> list[Targets]:
        return self._targets


@dataclass(frozen=True)
class Oracle:
    """float64, for a model and a layer."""

    gradients: dict[str, Tensor]
    distance: float
    """Mean 1 - cosine."""
    tokens: float
    """Valid ones."""


def in_float64(model: ModelConfig, weights: dict[str, Tensor], microbatches: Sequence[Microbatch], layer: int) -> Oracle:
    """(sum of the cross entropy + WEIGHT x sum of 1 - cosine) / valid tokens, and its gradients by autograd."""
    exact = {name: value.double().requires_grad_() for name, value in weights.items()}
    tokens, labels, mask, positions = (
        torch.cat([getattr(one, name) for one in microbatches]) for name in ("tokens", "labels", "loss_mask", "position_ids")
    )
    causal = torch.ones(SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool).tril()[None]
    found = streams(model, exact, tokens, positions, causal)
    last = plain_norm(model, exact, "decoder.final_layernorm", found[-1])
    logits = (last @ exact["output_layer.weight"].T)[..., :VOCABULARY]
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    distance = (cosine_distance(found[layer], hidden_states()) * mask).sum() / mask.sum()
    ((ce * mask.flatten()).sum() / mask.sum() + WEIGHT * distance).backward()
    gradients = {name: value.grad for name, value in exact.items() if value.grad is not None}
    assert gradients.keys() == exact.keys()
    return Oracle(gradients, distance.item(), float(mask.sum()))


def run_oracle(model: ModelConfig, directory: Path) -> list[Oracle]:
    """Oracles of every layer; the weights lie in `directory`."""
    student = build_student(Case(model=model), 1)
    directory.mkdir()
    save_weights(student, directory)
    microbatches, weights = batch(student, Case(model=model), 0), whole_tensors(student)
    return [in_float64(model, weights, microbatches, layer) for layer in range(1, model.num_layers + 1)]


@dataclass(frozen=True)
class Result:
    gradients: dict[str, Tensor]
    plain: bool
    """Whether a weight of 0 gives the gradients of no guidance, bit for bit, and another weight does not."""
    tokens: float
    """That all ranks tell of."""
    distance: float
    """Mean 1 - cosine."""


def run_case(case: Case, world_size: int, layer: int, weights: Path) -> Result:
    student = build_student(case, world_size, weights)
    microbatches = batch(student, case, 0)
    none = whole_gradients(student, microbatches)
    zero = whole_gradients(student, microbatches, targets_of(student, microbatches, layer, 0.0))
    found = whole_gradients(student, microbatches, targets_of(student, microbatches, layer, WEIGHT))
    plain = all(torch.equal(none[name], zero[name]) for name in none) and any(
        not torch.equal(none[name], found[name]) for name in none
    )
    teacher: Any = Guiding(targets_of(student, microbatches, layer, WEIGHT))
    sums = train_step(student, microbatches, PhaseTimer(), teacher).guide_sums
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, 0.0 if sums is None else float(sums[0]))
    return Result(found, plain, sum(told), float(mean_distance(sums, student.mesh)))


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, tuple[list[Oracle], Path]] = {}

    def of(model: str) -> tuple[list[Oracle], Path]:
        if model not in made:
            directory = tmp_path_factory.mktemp("oracle") / "w"
            made[model] = run_ranks(1, run_oracle, MODELS[model], directory)[0], directory
        return made[model]

    return of


def parallel(tp: int = 1, pp: int = 1, vp: int = 1, cp: int = 1, sp: bool = False, **others: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vp,
        context_parallel_size=cp, sequence_parallel=sp, **others,
    )  # fmt: skip


SELECTIVE = dict(recompute_granularity="selective")
BLOCK = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)


def uniform(layers: int) -> dict[str, Any]:
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=layers)


def check(
    oracles: Any, sizes: ParallelConfig, ranks: int, layer: int, model: str = "untied", micro_batch_size: int = 4
) -> None:
    of_layers, weights = oracles(model)
    oracle = of_layers[layer - 1]
    case = Case(sizes, MODELS[model], micro_batch_size=micro_batch_size)
    for result in run_ranks(ranks, run_case, case, ranks, layer, weights):
        norm = sum(float(gradient.square().sum()) for gradient in oracle.gradients.values()) ** 0.5
        for name, exact in oracle.gradients.items():
            error = float((result.gradients[name].double() - exact).norm()) / max(float(exact.norm()), 0.01 * norm)
            assert error < 2e-5, (name, error)
        assert result.plain
        assert result.tokens == oracle.tokens and result.distance == pytest.approx(oracle.distance, rel=1e-6)


@pytest.mark.parametrize("layer, recompute, model", [
    (1, {}, "untied"), (4, {}, "untied"), (2, SELECTIVE, "untied"),
    (1, uniform(2), "untied"), (2, uniform(2), "untied"), (1, BLOCK, "untied"), (3, uniform(4), "gpt-neox"),
])  # fmt: skip
def test_on_one_rank_at_any_layer_and_with_any_recomputation(oracles, layer, recompute, model):
    check(oracles, parallel(**recompute), 1, layer, model)


@pytest.mark.parametrize("layer, sizes", [
    (2, parallel(pp=2)), (1, parallel(pp=2, **uniform(1))), (3, parallel(pp=2, vp=2, **uniform(1))), (2, parallel(cp=2)), (2, parallel(2)),
    (1, parallel(2, sp=True, **uniform(2))),
])  # fmt: skip
def test_in_any_layout_of_two_ranks(oracles, layer, sizes):
    check(oracles, sizes, 2, layer)


@pytest.mark.long
@pytest.mark.parametrize("layer, ranks, sizes", [
    (3, 2, parallel(pp=2, **uniform(2))), (2, 2, parallel(pp=2, vp=2)), (2, 2, parallel(2, sp=True)), (3, 2, parallel(2, **SELECTIVE)),
    (2, 2, parallel()), (2, 4, parallel(2, cp=2)), (2, 4, parallel(2, cp=2, sp=True, **BLOCK)),
    (3, 4, parallel(2, pp=2, sp=True, **uniform(2))), (3, 4, parallel(cp=2, pp=2)), (2, 4, parallel(4)), (2, 4, parallel(2, pp=2, vp=2)),
    (2, 4, parallel(pp=2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)),
])  # fmt: skip
def test_in_more_layouts(oracles, layer, ranks, sizes):
    check(oracles, sizes, ranks, layer, "squared relu" if sizes.tensor_model_parallel_size == 4 else "untied")
