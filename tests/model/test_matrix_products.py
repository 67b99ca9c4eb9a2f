"""Both forms of the head's bfloat16 products against float64, on any CPU; and which form a CPU gets."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_salt.errors import UserError
from megatron_salt.model import matrix_products
from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard
from tests.support.ranks import run_ranks

BF16, CPU = torch.bfloat16, torch.device("cpu")
ROUNDING = (
    2.0**-8
)  # bfloat16 has 8 bits: a rounded number is off by at most 2^-9 of itself, by the format's spacing at most 2^-8
FORMS = ("native", "widened")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(matrix_products.FORM, request.param)
    return str(request.param)


def operands(tokens: int = 24, rows: int = 50, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((tokens, width), (rows, width), (tokens, rows))
    hidden, weight, gradient = (torch.randn(shape, generator=generator).to(BF16) for shape in shapes)
    return hidden, weight, gradient


def error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference divided by the norm of the exact result."""
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("band", [1, 7 * 24, 1 << 20], ids=["a row", "7 rows", "all"])
def test_every_product_is_the_exact_one_rounded_once(form: str, band: int) -> None:
    hidden, weight, gradient = operands()
    logits = matrix_products.logits(hidden, weight, torch.full((24, 50), torch.nan, dtype=BF16), band)
    d_hidden = matrix_products.hidden_gradient(gradient, weight, torch.full((24, 16), torch.nan, dtype=BF16), band)
    d_weight = torch.ones(50, 16)
    matrix_products.add_weight_gradient(d_weight, gradient, hidden, band)
    assert error(logits, hidden.double() @ weight.double().t()) < ROUNDING
    assert error(d_hidden, gradient.double() @ weight.double()) < ROUNDING
    assert error(d_weight - 1, gradient.double().t() @ hidden.double()) < (1e-5 if form == "widened" else ROUNDING)


@pytest.mark.parametrize("band", [1, 7 * 24, 1 << 20], ids=["a row", "7 rows", "all"])
@pytest.mark.parametrize("padding", [0, 14], ids=["contiguous", "padded rows"])
def test_float32_logits_of_bfloat16_operands_are_not_rounded(form: str, band: int, padding: int) -> None:
    hidden, weight, _ = operands()
    out = torch.full((24, 50 + padding), torch.nan)
    logits = matrix_products.logits(hidden, weight, out[:, :50], band)
    assert logits.data_ptr() == out.data_ptr() and out[:, 50:].isnan().all()
    assert error(logits, hidden.double() @ weight.double().t()) < 1e-6


def test_a_rank_without_ids_has_no_logits_and_a_gradient_of_0(form: str) -> None:
    hidden, weight, gradient = operands(rows=0)
    for dtype in (BF16, torch.float32):
        assert matrix_products.logits(hidden, weight, torch.empty((24, 0), dtype=dtype)).shape == (24, 0)
    assert not matrix_products.hidden_gradient(gradient, weight, torch.full_like(hidden, torch.nan)).any()


class Sizes(TorchDispatchMode):
    """Records the bytes of the largest storage that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def test_widening_makes_no_tensor_larger_than_a_band_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight has 8 bands; a float32 copy of it would be 16 times as large as one."""
    monkeypatch.setenv(matrix_products.FORM, "widened")
    band, (hidden, weight, gradient) = 64 * 16, operands(tokens=16, rows=512, width=16)
    logits, d_hidden, d_weight = weight.new_empty((16, 512)), torch.empty_like(hidden), torch.zeros(512, 16)
    own = {tensor.untyped_storage().nbytes() for tensor in (hidden, weight, gradient, logits, d_weight)}
    with Sizes() as sizes:
        wide = matrix_products.logits(hidden, weight, logits, band)
    assert wide is logits and sizes.largest == max(own - {d_weight.untyped_storage().nbytes()}) == 16 * 512 * 2
    unrounded = torch.empty(16, 512)
    with Sizes() as sizes:
        matrix_products.logits(hidden, weight, unrounded, band)
    assert sizes.largest == unrounded.untyped_storage().nbytes() == 4 * 8 * band
    with Sizes() as sizes:
        matrix_products.hidden_gradient(gradient, weight, d_hidden, band)
    assert sizes.largest <= max(4 * band, 16 * 512 * 2)
    with Sizes() as sizes:
        matrix_products.add_weight_gradient(d_weight, gradient, hidden, band)
    assert sizes.largest == d_weight.untyped_storage().nbytes()


def loss_and_gradients(
    form: str, hidden: Tensor, weight: Tensor, teacher_weight: Tensor, kd_weight: float | None
) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(matrix_products.FORM, form)
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        teacher = None if kd_weight is None else SoftTarget(hidden.detach(), teacher_weight, 0.5, kd_weight)
        shard = VocabularyShard(dist.group.WORLD, 50, 50, False)
        labels, mask = torch.arange(24), torch.ones(24)
        loss, _ = fused_linear_cross_entropy(hidden, weight, labels, mask, shard, 16, teacher)
        loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_and_its_gradients_are_full_logits_in_float64(form: str) -> None:
    """Bound: logits, their gradient and each product are rounded once.
    An error of z 2^-9 in a logit z, |z| < 4, changes p by that share."""
    hidden_nh, weight, teacher_weight = (part * 0.25 for part in (*operands()[:2], operands(rows=50)[1].flip(0)))
    hidden = hidden_nh[:, None]
    exact_hidden, exact_weight = hidden_nh.double().requires_grad_(), weight.double().requires_grad_()
    p = (2 * hidden_nh.double() @ teacher_weight.double().t()).softmax(-1)
    q = 0.4 * torch.eye(50, dtype=torch.float64)[:24] + 0.6 * p
    exact = -(q * (exact_hidden @ exact_weight.t()).log_softmax(-1)).sum()
    exact.backward()
    assert exact_hidden.grad is not None and exact_weight.grad is not None
    [(loss, d_hidden, d_weight)] = run_ranks(1, loss_and_gradients, form, hidden, weight, teacher_weight, 0.6)
    assert abs(float(loss) - exact.item()) < ROUNDING * exact.item()
    assert error(d_hidden[:, 0], exact_hidden.grad) < 4 * ROUNDING
    assert error(d_weight, exact_weight.grad) < 4 * ROUNDING


@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_of_weight_0_changes_no_bit(form: str) -> None:
    hidden, weight, _ = operands()
    [plain] = run_ranks(1, loss_and_gradients, form, hidden[:, None], weight, weight, None)
    [taught] = run_ranks(1, loss_and_gradients, form, hidden[:, None], weight, weight.flip(0), 0.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, taught, strict=True))


@pytest.mark.parametrize("machine, has, cap, widened", [
    ("x86_64", True, "", False),
    ("x86_64", False, "", True),
    ("x86_64", True, "AVX2", True),
    ("x86_64", True, "avx512_core", True),
    ("x86_64", True, "AVX512_CORE_BF16", False),
    ("x86_64", False, "ALL", True),
    ("aarch64", False, "", False),
])  # fmt: skip
def test_bfloat16_is_widened_where_the_cpu_has_no_products_of_it(
    machine: str, has: bool, cap: str, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    caps = {"ONEDNN_MAX_CPU_ISA": cap}
    assert matrix_products.widens(BF16, CPU, caps) == widened
    assert matrix_products.widens(BF16, CPU, {**caps, matrix_products.FORM: "widened"})
    assert not matrix_products.widens(BF16, CPU, {**caps, matrix_products.FORM: "native"})
    assert not matrix_products.widens(torch.float32, CPU, {matrix_products.FORM: "widened"})
    assert not matrix_products.widens(BF16, torch.device("cuda"), {matrix_products.FORM: "widened"})


def test_another_form_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=f"{matrix_products.FORM} is float64: it is native, widened or unset"):
        matrix_products.widens(BF16, CPU, {matrix_products.FORM: "float64"})
