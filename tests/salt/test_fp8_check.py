"""The check of an FP8 teacher, on a trained teacher with emulated FP8: which teachers pass, which do not, and what the check changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_salt.checkpoint import rng
from megatron_salt.config import ModelConfig, ParallelConfig, SaltConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.reference_batch import fixed_batch
from megatron_salt.errors import UserError
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.model.fp8_teacher import in_bfloat16
from megatron_salt.model.loss import METRICS
from megatron_salt.salt.fp8_check import Fidelity, refuse_unfaithful
from megatron_salt.salt.teacher import Teacher
from megatron_salt.train.step import Student, train_step
from tests.support.fp8_emulation import Emulation, Quantized, Recipe, emulate
from tests.support.ranks import run_ranks
from tests.support.small import SEQ_LENGTH, VOCABULARY, Case, build_student
from tests.support.teaching import TEACHER, TIED_TEACHER, Lesson, admit, head_of, lessons, save_teacher

DEFAULT = SaltConfig().teacher_fp8_max_kl
TP2PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
BF16 = Case(dtype=torch.bfloat16)
EVERYWHERE = (0, 1, 2, 3)
TOKENS = 7 * SEQ_LENGTH // 2
"""Tokens of the text that count."""
LINEARS = 4
"""Linear modules of a layer."""
TIGHT = 2e-3
"""A tight bound for this small teacher: its embeddings, which are not in FP8, decide as much as its layers."""


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("school")
    for name, model in (("untied", TEACHER), ("tied", TIED_TEACHER)):
        [accuracy] = run_ranks(1, make_teacher, root / name, model)
        assert accuracy > 0.8
    return root


def make_teacher(directory: Path, model: ModelConfig, steps: int = 100) -> float:
    """Train a teacher of a rule that holds for any text: after x comes 7 x + 3, nine times in ten. Returns its accuracy. One rank."""
    student = build_student(Case(model=model, dtype=torch.bfloat16, learning_rate=1e-2, micro_batch_size=16), 1, seed=77)
    sums = None
    for step in range(steps):
        sums = train_step(student, [succession(step)], PhaseTimer()).sums
    save_teacher(student, directory, model, steps)
    assert sums is not None
    return float(sums[0, METRICS.index("accuracy")] / sums[0, METRICS.index("tokens")])


def succession(step: int) -> Microbatch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (16, SEQ_LENGTH + 1), generator=generator)
    surprising = torch.rand(tokens.shape, generator=generator) < 0.1
    for place in range(SEQ_LENGTH):
        tokens[:, place + 1] = torch.where(
            surprising[:, place + 1], tokens[:, place + 1], (7 * tokens[:, place] + 3) % VOCABULARY
        )
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(SEQ_LENGTH).expand(16, -1).contiguous()
    return Microbatch(
        tokens=inputs,
        labels=labels,
        loss_mask=torch.ones(16, SEQ_LENGTH),
        position_ids=positions,
        documents=None,
        sample_ids=np.arange(16),
    )


def in_fp8(lesson: Lesson, student: Student, recipe: Recipe) -> tuple[Teacher, Emulation]:
    """The lesson's teacher, loaded and verified. Its linear modules then multiply in emulated FP8."""
    teacher = admit(lesson, student)
    emulation = emulate(teacher.body, recipe)
    teacher.body.forward_context = emulation.products
    return teacher, emulation


def text() -> list[Microbatch]:
    """The samples of the check. This teacher knows what follows each token in any text."""
    return fixed_batch(VOCABULARY, SEQ_LENGTH, [SEQ_LENGTH, SEQ_LENGTH // 2, SEQ_LENGTH, SEQ_LENGTH])


def gate(lesson: Lesson, student: Student, teacher: Teacher, max_kl: float = DEFAULT) -> Fidelity:
    """The check that `admit` makes of an FP8 teacher."""
    return refuse_unfaithful(teacher, max_kl, text(), head_of(student, lesson.case))


# ---- damage ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Spoiled:
    """Damage: a weight is quantized wrongly."""

    damage: Callable[[Tensor], Tensor]

    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        back = self.rows(tensor).back()
        return back, back

    def rows(self, tensor: Tensor) -> Quantized:
        return Quantized(self.damage(tensor.detach().float()), torch.ones(()))

    def update(self) -> None: ...


def zeroed(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight)


def of_twice_the_scale(weight: Tensor) -> Tensor:
    return 2 * weight


def with_a_nan(weight: Tensor) -> Tensor:
    return torch.where(torch.arange(weight.numel()).view_as(weight) == 7, torch.nan, weight)


def examined(
    lesson: Lesson, world_size: int, recipe: Recipe, damage: Callable[[Tensor], Tensor] | None = None, ranks: tuple[int, ...] = (),
    max_kl: float = DEFAULT,
) -> Fidelity | str:  # fmt: skip
    """The message of the check where the weights of a layer are damaged on some ranks; None where it passes."""
    student = build_student(lesson.case, world_size)
    teacher, emulation = in_fp8(lesson, student, recipe)
    if damage is not None and student.mesh.rank in ranks:
        for linear in emulation.linears[:LINEARS]:
            linear.quantizers = (linear.quantizers[0], Spoiled(damage), linear.quantizers[2])
    try:
        return gate(lesson, student, teacher, max_kl)
    except UserError as error:
        return str(error)


# ---- who passes ------------------------------------------------------------------------------------------------------------------


ONE, PP, TP = ("untied", ParallelConfig(), (1, 1)), ("tied", TP2PP2, (1, 2)), ("untied", TP2PP2, (2, 1))


@pytest.mark.parametrize("kind, which, parallel, teacher", [
    pytest.param("blockwise", *ONE, id="blockwise"),
    pytest.param("mxfp8", *ONE, id="mxfp8"),
    pytest.param("tensorwise", *ONE, id="tensorwise"),
    pytest.param("mxfp8", *PP, id="mxfp8, tp2pp2, teacher pp2 twice", marks=pytest.mark.full),
    pytest.param("blockwise", *TP, id="blockwise, tp2pp2, teacher tp2 twice", marks=pytest.mark.full),
    pytest.param("tensorwise", "tied", ParallelConfig(context_parallel_size=2), (1, 2), id="tensorwise, cp2, teacher pp2"),
    pytest.param("tensorwise", *PP, id="tensorwise, tp2pp2, teacher pp2 twice"),
    pytest.param("tensorwise", *TP, id="tensorwise, tp2pp2, teacher tp2 twice"),
])  # fmt: skip
def test_fp8_of_a_trained_teacher_passes_at_the_default(
    school: Path, kind: Any, which: str, parallel: ParallelConfig, teacher: tuple[int, int]
) -> None:
    lesson = Lesson(replace(BF16, parallel=parallel), str(school / which), teacher)
    told = run_ranks(parallel.replica_ranks, examined, lesson, parallel.replica_ranks, Recipe(kind))
    assert isinstance(told[0], Fidelity) and len(set(told)) == 1, told
    assert 1e-6 < told[0].kl < TIGHT / 2 < DEFAULT and told[0].agreement > 0.95 and told[0].tokens == TOKENS


def test_the_figure_is_the_models_and_not_the_layouts(school: Path) -> None:
    """Where scales are of whole tensors: to what bfloat16 leaves of it."""
    one = run_ranks(1, examined, Lesson(BF16, str(school / "untied")), 1, Recipe())[0]
    lesson = Lesson(replace(BF16, parallel=TP2PP2), str(school / "untied"), (2, 2))
    four = run_ranks(4, examined, lesson, 4, Recipe())[0]
    assert four.kl == pytest.approx(one.kl, rel=0.2)


def by_full_logits(lesson: Lesson, sureness: float) -> tuple[float, list[float]]:
    """(the figure of the check, the same figure from full logits in float64 at the temperature, and at 1), on one rank."""
    student = build_student(lesson.case, 1)
    teacher, _ = in_fp8(lesson, student, Recipe())
    assert teacher.weight is not None
    teacher.weight.mul_(sureness)
    weight = teacher.weight[:VOCABULARY].double()
    with torch.no_grad():
        exact = torch.zeros(2, dtype=torch.float64)
        for sample in text():
            in_fp8_nv = teacher.body(sample.tokens, sample.position_ids, None).double() @ weight.t()
            with in_bfloat16(teacher.body):
                in_bf16_nv = teacher.body(sample.tokens, sample.position_ids, None).double() @ weight.t()
            counts = sample.loss_mask.view(1, -1, 1).transpose(0, 1)
            for number, temperature in enumerate((lesson.temperature, 1.0)):
                p, q = ((logits / temperature).log_softmax(-1) for logits in (in_bf16_nv, in_fp8_nv))
                exact[number] += ((p.exp() * (p - q)).sum(-1, keepdim=True) * counts).sum() / TOKENS
    return gate(lesson, student, teacher).kl, exact.tolist()


@pytest.mark.parametrize("which", ["untied", "tied"])
@pytest.mark.parametrize("sureness, larger", [(1.0, 1), (0.05, 0)], ids=["sure", "hesitating"])
def test_the_figure_is_the_larger_of_that_of_full_logits_in_float64_at_the_temperature_and_at_1(
    school: Path, which: str, sureness: float, larger: int
) -> None:
    """A low temperature hides the effect of FP8 on a teacher that is sure, and shows it on one that hesitates."""
    [(figure, exact)] = run_ranks(1, by_full_logits, Lesson(BF16, str(school / which)), sureness)
    assert exact[larger] > 2 * exact[1 - larger]
    assert figure == pytest.approx(exact[larger], rel=1e-5, abs=1e-6)


# ---- who does not ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage, ranks, max_kl",
    [
        (zeroed, EVERYWHERE, TIGHT),
        (of_twice_the_scale, EVERYWHERE, DEFAULT),
        (with_a_nan, (1,), DEFAULT),
        (of_twice_the_scale, (2,), DEFAULT),
        (zeroed, (3,), TIGHT),
    ],
)
def test_the_gate_sees_spoiled_weights_of_one_layer(school: Path, damage: Any, ranks: tuple[int, ...], max_kl: float) -> None:
    """On any rank, and all ranks get the same message."""
    lesson = Lesson(replace(BF16, parallel=TP2PP2), str(school / "untied"))
    told = run_ranks(4, examined, lesson, 4, Recipe(), damage, ranks, max_kl)
    assert len(set(told)) == 1 and isinstance(told[0], str), told
    assert f"--teacher-fp8-max-kl {max_kl:g}" in told[0] and "nats a token" in told[0]
    assert ("nan" in told[0]) == (damage is with_a_nan)


def scaled_up(teacher: Teacher, factor: float) -> None:
    """The same function with other numbers: the inner activations of each MLP are larger, its output weight is smaller."""
    with torch.no_grad():
        for layer in teacher.body.decoder.layers:
            fc1, fc2 = layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight
            fc1[fc1.size(0) // 2 :] *= factor
            fc2 /= factor


def stale(lesson: Lesson, kind: Any, factor: float) -> Fidelity | str:
    student = build_student(lesson.case, 1)
    teacher, _ = in_fp8(lesson, student, Recipe(kind))
    scaled_up(teacher, factor)
    try:
        return gate(lesson, student, teacher, TIGHT)
    except UserError as error:
        return str(error)


def test_the_gate_sees_scales_that_are_never_updated(school: Path) -> None:
    """Delayed scaling in a forward-only model: scales stay 1, and weights that are too small for e4m3 become 0."""
    lesson = Lesson(BF16, str(school / "untied"))
    [delayed] = run_ranks(1, stale, lesson, "delayed", 256.0)
    [tensorwise] = run_ranks(1, stale, lesson, "tensorwise", 256.0)
    assert isinstance(delayed, str) and "--teacher-fp8-max-kl" in delayed
    assert isinstance(tensorwise, Fidelity) and tensorwise.kl < TIGHT / 4


def test_what_is_wrong_in_one_block_is_told_in_all(school: Path) -> None:
    """Two student replicas of two ranks. Each has two teacher replicas."""
    lesson = Lesson(replace(BF16, parallel=ParallelConfig(tensor_model_parallel_size=2)), str(school / "untied"))
    sound = run_ranks(4, examined, lesson, 4, Recipe())
    assert len(set(sound)) == 1 and isinstance(sound[0], Fidelity)
    spoiled = run_ranks(4, examined, lesson, 4, Recipe(), of_twice_the_scale, (3,))
    assert len(set(spoiled)) == 1 and isinstance(spoiled[0], str) and "rank 2: " in spoiled[0]


def test_the_bound_is_the_flags(school: Path) -> None:
    lesson = Lesson(BF16, str(school / "untied"))
    [passed] = run_ranks(1, examined, lesson, 1, Recipe())
    assert isinstance(passed, Fidelity)
    [refused] = run_ranks(1, examined, lesson, 1, Recipe(), None, (), passed.kl / 2)
    assert isinstance(refused, str) and f"{passed.kl:.3g} nats" in refused


# ---- what it changes -------------------------------------------------------------------------------------------------------------


def bits(student: Student) -> list[bytes]:
    """The bytes of parameters, optimizer state and random state."""
    optimized = [tensor for group in student.optimizer.param_groups for tensor in group["params"]]
    tensors = [*(parameter for chunk in student.chunks for parameter in chunk.parameters()), *optimized, rng.capture()[1]]
    return [tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def untouched(lesson: Lesson, world_size: int) -> bool:
    student = build_student(lesson.case, world_size)
    lessons(student, None, lesson, 1)
    before = bits(student)
    teacher, _ = in_fp8(lesson, student, Recipe())
    gate(lesson, student, teacher)
    return bits(student) == before


def test_the_student_is_bit_for_bit_what_it_was(school: Path) -> None:
    assert run_ranks(4, untouched, Lesson(replace(BF16, parallel=TP2PP2), str(school / "tied"), (1, 2)), 4) == [True] * 4


def same_in_bfloat16(lesson: Lesson) -> tuple[bool, bool]:
    """Whether a teacher gives the same bits as before it used FP8: (outside `in_bfloat16`, inside it)."""
    student = build_student(lesson.case, 1)
    batch = fixed_batch(VOCABULARY, SEQ_LENGTH, [SEQ_LENGTH])
    teacher = admit(lesson, student)
    [before] = teacher.hidden_states(batch, merge=1)
    teacher.body.forward_context = emulate(teacher.body, Recipe()).products
    [outside] = teacher.hidden_states(batch, merge=1)
    with in_bfloat16(teacher.body):
        [inside] = teacher.hidden_states(batch, merge=1)
    assert before is not None and inside is not None and outside is not None
    return torch.equal(before, outside), torch.equal(before, inside)


def test_the_reference_is_the_teacher_without_fp8(school: Path) -> None:
    assert run_ranks(1, same_in_bfloat16, Lesson(BF16, str(school / "untied"))) == [(False, True)]
