"""Loss, gradients and training do not depend on the layout.

Oracle: one rank with plain flags, from the same checkpoint. Compared are the gradients of all parameters for the first batch, and the
losses and gradient norms of three Adam steps. Norms are compared because Adam hides the scale of gradients from the loss.
Masks differ much between replicas and context-parallel ranks, and one microbatch has no valid token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.config import ParallelConfig
from megatron_salt.train.step import Student, unwrap
from tests.support.gradients import TIED_COPY, whole_gradients
from tests.support.grids import grid
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, Case, Curve, batch, build_student, save_weights, train_student

STEPS = 3
TIED, UNTIED = MODELS["tied"], MODELS["untied"]


def parallel(tp: int = 1, pp: int = 1, vp: int = 1, cp: int = 1, sp: bool = False, **others: object) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vp,
        context_parallel_size=cp, sequence_parallel=sp, **others,
    )  # fmt: skip


OPTIMIZERS = {
    "plain": {},
    "distributed": dict(use_distributed_optimizer=True),
    "overlap reduce": dict(overlap_grad_reduce=True, ddp_bucket_size=20_000),
    "overlap": dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    # Buckets so small that the output head has one of its own.
    "small buckets": dict(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=2_000
    ),
}


@dataclass(frozen=True)
class Reference:
    """What one rank computes for a model. Its weights lie in `w`, its gradients in `g.pt`."""

    directory: Path
    curve: Curve


@dataclass(frozen=True)
class Result:
    """What a layout computes."""

    curve: Curve
    grad_norm: float
    """Of the whole gradient, a shared weight once."""
    error: float
    """Of the whole gradient, relative to its norm."""
    errors: dict[str, float]
    """Of each parameter's gradient, relative to its norm, or to a hundredth of the whole norm where that is more."""
    tied_copies_differ: float
    """Gradients of the copies of a tied embedding."""
    weight_copies_differ: float
    """The copies themselves, after training."""


def run_reference(case: Case, directory: Path) -> Curve:
    student = build_student(case, 1)
    (directory / "w").mkdir()
    save_weights(student, directory / "w")
    torch.save(whole_gradients(student, batch(student, case, 0)), directory / "g.pt")
    return train_student(student, case, STEPS)


def run_case(case: Case, world_size: int, directory: Path) -> Result:
    student = build_student(case, world_size, directory / "w")
    gradients = whole_gradients(student, batch(student, case, 0))
    expected = torch.load(directory / "g.pt")
    copy = gradients.pop(TIED_COPY, None)
    differ = 0.0 if copy is None else float((copy - gradients["embedding.word_embeddings.weight"]).abs().max())
    assert gradients.keys() == expected.keys(), gradients.keys() ^ expected.keys()
    norm = sum(float(gradient.double().square().sum()) for gradient in expected.values()) ** 0.5
    square = sum(float((gradients[name] - expected[name]).double().square().sum()) for name in expected)
    # A bias of keys has no gradient but rounding: softmax does not see it. So small ones count relative to the whole.
    size = {name: max(float(expected[name].norm()), 0.01 * norm) for name in expected}
    errors = {name: float((gradients[name] - expected[name]).norm()) / size[name] for name in expected}
    grad_norm = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    curve = train_student(student, case, STEPS)
    return Result(curve, grad_norm, square**0.5 / norm, errors, differ, copies_differ(student))


def copies_differ(student: Student) -> float:
    """The largest difference between the word embedding of the first stage and the tied copy of the last. Collective over the pipeline."""
    weight = unwrap(student.chunks[-1] if student.mesh.is_last_stage else student.chunks[0]).shared_embedding_or_output_weight()
    copies: list[Tensor | None] = [None] * student.mesh.layout.pipeline
    dist.all_gather_object(copies, None if weight is None else weight.detach(), group=student.mesh.groups.pp)
    return float((copies[0] - copies[-1]).abs().max())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Reference]:
    made: dict[Case, Reference] = {}

    def find(case: Case) -> Reference:
        plain = replace(case, parallel=ParallelConfig(), micro_batch_size=2)
        if plain not in made:
            directory = tmp_path_factory.mktemp("reference")
            made[plain] = Reference(directory, run_ranks(1, run_reference, plain, directory)[0])
        return made[plain]

    return find


def check(reference: Callable[[Case], Reference], case: Case, world_size: int) -> Result:
    """A layout on world_size ranks gives what one rank gives, within 1e-6."""
    expected = reference(case)
    results = run_ranks(world_size, run_case, case, world_size, expected.directory)
    result = results[0]
    assert all(other.curve == result.curve for other in results), "ranks tell different losses or norms"
    assert result.curve.losses == pytest.approx(expected.curve.losses, rel=1e-6)
    assert result.curve.grad_norms == pytest.approx(expected.curve.grad_norms, rel=1e-6)
    assert result.curve.grad_norms[0] == pytest.approx(result.grad_norm, rel=1e-6)
    assert result.error < 1e-6
    assert max(result.errors.values()) < 1e-5, max(result.errors.items(), key=lambda item: item[1])
    assert result.tied_copies_differ == 0
    return result


def fits(tp: int, pp: int, vp: int, cp: int, dp: int, sp: bool, **_: object) -> bool:
    return 2 <= tp * pp * cp * dp <= 4 and (vp == 1 or pp > 1) and (vp == 1 or pp == 2) and (not sp or tp > 1)


@pytest.mark.parametrize(
    "tp, pp, vp, cp, dp, sp, tied",
    grid(fits, tp=(1, 2, 4), pp=(1, 2, 4), vp=(1, 2), cp=(1, 2, 4), dp=(1, 2, 4), sp=(False, True), tied=(True, False)),
)
def test_loss_and_gradients_do_not_depend_on_the_layout(reference, tp, pp, vp, cp, dp, sp, tied):
    model = replace(TIED if tied else UNTIED, num_attention_heads=8, num_query_groups=4)
    check(reference, Case(parallel(tp, pp, vp, cp, sp), model), tp * pp * cp * dp)


@pytest.mark.parametrize(
    "tp, pp, vp, sp", [(1, 2, 1, False), (1, 2, 2, False), (2, 2, 1, False), (2, 2, 1, True), (1, 4, 1, False)]
)
def test_tied_embeddings_are_one_weight_over_stages(reference, tp, pp, vp, sp):
    """Both copies have one gradient, which counts once in the norm (`check` compares both). They stay equal during training."""
    result = check(reference, Case(parallel(tp, pp, vp, sp=sp)), tp * pp)
    assert result.weight_copies_differ == 0


@pytest.mark.parametrize("dp, uneven", [
    (1, dict(decoder_first_pipeline_num_layers=1)),
    (1, dict(decoder_last_pipeline_num_layers=1)),
    (2, dict(decoder_first_pipeline_num_layers=3, decoder_last_pipeline_num_layers=1)),
    (1, dict(account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True)),
    (1, dict(account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True, vp=3)),
])  # fmt: skip
def test_pipeline_stages_may_be_uneven(reference, dp, uneven):
    check(reference, Case(parallel(pp=2, **uneven)), 2 * dp)


@pytest.mark.parametrize("model, tp, pp, vp, cp, sp", [
    (model, *layout)
    for model in ("gpt2", "squared relu", "layer-normed queries", "gpt-neox", "qwen2")
    for layout in [(2, 1, 1, 1, False), (2, 1, 1, 1, True), (1, 2, 2, 1, False), (1, 1, 1, 2, False)]
])  # fmt: skip
def test_every_architecture(reference, model, tp, pp, vp, cp, sp):
    check(reference, Case(parallel(tp, pp, vp, cp, sp), MODELS[model]), tp * pp * cp)


@pytest.mark.parametrize(
    "optimizer, tp, pp, vp, cp, tied, micro_batch_size",
    grid(
        lambda tp, pp, vp, cp, **_: tp * pp * cp <= 2 and (vp == 1 or pp == 2),
        optimizer=[name for name in OPTIMIZERS if name != "plain"],
        tp=(1, 2), pp=(1, 2), vp=(1, 2), cp=(1, 2), tied=(True, False), micro_batch_size=(1, 2, 4),
    ),
)  # fmt: skip
def test_sharding_the_optimizer_overlaps_and_accumulation_change_nothing(
    reference, optimizer, tp, pp, vp, cp, tied, micro_batch_size
):
    sizes = parallel(tp, pp, vp, cp, tp > 1, **OPTIMIZERS[optimizer])
    check(reference, Case(sizes, TIED if tied else UNTIED, micro_batch_size=micro_batch_size), 2 * tp * pp * cp)


def test_a_head_with_a_bucket_of_its_own_waits_for_its_weight(reference):
    """In a bucket with the final norm the weight would be gathered anyway."""
    check(reference, Case(parallel(**OPTIMIZERS["small buckets"]), UNTIED), 2)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 16])
def test_gradient_accumulation_on_one_rank(reference, micro_batch_size):
    check(reference, Case(micro_batch_size=micro_batch_size), 1)


RECOMPUTE = {
    "selective": dict(recompute_granularity="selective"),
    "uniform": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    "block": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
}


@pytest.mark.long
@pytest.mark.parametrize("recompute, tp, pp, cp, documents", [
    (recompute, *layout)
    for recompute in RECOMPUTE
    for layout in [(1, 1, 1, True), (2, 1, 1, False), (1, 2, 2, True)]
])  # fmt: skip
def test_recomputing_activations_changes_nothing(reference, recompute, tp, pp, cp, documents):
    sizes = parallel(tp, pp, cp=cp, sp=tp > 1, **RECOMPUTE[recompute])
    check(reference, Case(sizes, documents=documents), tp * pp * cp)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputing_a_parallel_residual_changes_nothing(reference, recompute):
    check(reference, Case(parallel(**RECOMPUTE[recompute]), MODELS["gpt-neox"]), 1)


@pytest.mark.long
@pytest.mark.parametrize("tp, pp, cp, sp", [(2, 1, 1, True), (1, 2, 1, False), (1, 1, 2, False), (2, 1, 2, True)])
def test_attention_inside_documents(reference, tp, pp, cp, sp):
    check(reference, Case(parallel(tp, pp, cp=cp, sp=sp), documents=True), tp * pp * cp)


@pytest.mark.parametrize("optimizer, tp, pp, vp, cp, tolerance", [
    ("plain", 1, 2, 2, 1, 1e-6),  # the same arithmetic on other ranks
    ("overlap", 1, 1, 1, 1, 1e-5),  # float32 gradients are summed in another order
    ("small buckets", 2, 1, 1, 1, 2e-2),  # sums over tp and cp are rounded to bfloat16: 8 bits
    ("distributed", 1, 1, 1, 2, 2e-2),
])  # fmt: skip
def test_bfloat16_agrees_as_far_as_it_rounds_the_same(reference, optimizer, tp, pp, vp, cp, tolerance):
    case = Case(parallel(tp, pp, vp, cp, tp > 1, **OPTIMIZERS[optimizer]), dtype=torch.bfloat16)
    world_size = tp * pp * cp * (1 if optimizer == "plain" else 2)
    expected = reference(case)
    result = run_ranks(world_size, run_case, case, world_size, expected.directory)[0]
    print(result.curve.losses, expected.curve.losses, result.curve.grad_norms, expected.curve.grad_norms, result.error)
    assert result.curve.losses == pytest.approx(expected.curve.losses, rel=tolerance)
    assert result.curve.grad_norms == pytest.approx(expected.curve.grad_norms, rel=tolerance)
    assert result.error < tolerance


def test_bfloat16_is_near_float32(reference):
    """8 bits give 3 significant digits."""
    single, half = reference(Case()), reference(Case(dtype=torch.bfloat16))
    assert half.curve.losses == pytest.approx(single.curve.losses, rel=5e-3)
    assert half.curve.grad_norms == pytest.approx(single.curve.grad_norms, rel=5e-2)
    assert half.curve.losses != single.curve.losses
