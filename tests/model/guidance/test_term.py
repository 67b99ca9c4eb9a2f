"""The term of hidden-state guidance alone: value and gradient against a float64 computation by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_salt.model.guidance import term
from megatron_salt.model.guidance.term import GUIDE_METRICS, add_gradient


def cosine_distance(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Oracle: 1 - cosine of student [..., h] and teacher [..., h_t], whose normalised vector is stretched to h and normalised again."""
    flat = F.normalize(teacher, dim=-1).reshape(-1, 1, teacher.size(-1))
    target = F.normalize(F.interpolate(flat, size=hidden.size(-1), mode="linear", align_corners=False)[:, 0], dim=-1)
    return 1 - F.cosine_similarity(hidden, target.view(hidden.shape), dim=-1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width, teacher_width", [(64, 48), (64, 64), (64, 16), (48, 100), (7, 3), (1, 5)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunk", [1 << 22, 3 * 64])
def test_value_and_gradient(monkeypatch, width, teacher_width, dtype, tolerance, chunk):
    monkeypatch.setattr(term, "_CHUNK_ELEMENTS", chunk)
    hidden, teacher = draw(6, 2, width, seed=1).to(dtype), draw(6, 2, teacher_width, seed=2).to(dtype) * 30
    grad, mask = draw(6, 2, width, seed=3).to(dtype), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]] * 2)
    exact = hidden.double().requires_grad_()
    distances = cosine_distance(exact, teacher.double()) * mask
    (0.7 * distances.sum()).backward()
    assert exact.grad is not None
    sums = torch.full((len(GUIDE_METRICS),), torch.nan)
    found = add_gradient(grad, hidden, teacher, mask, 0.7, sums)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), grad.double() + exact.grad, rtol=tolerance, atol=tolerance)
    assert sums.tolist() == pytest.approx([8, distances.sum().item()], rel=1e-5)


def test_masked_tokens_may_hold_anything_and_keep_their_gradient_bit_for_bit():
    hidden, teacher, grad = (draw(3, 2, 8, seed=seed).float() for seed in (1, 2, 3))
    hidden[0, 0], teacher[0, 1], teacher[1, 0] = torch.nan, torch.inf, torch.nan
    mask = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = add_gradient(grad, hidden, teacher, mask, 0.5, sums := torch.empty(2))
    assert torch.equal(found[mask == 0], grad[mask == 0]) and bool(found.isfinite().all()) and bool(sums.isfinite().all())
    assert not torch.equal(found[mask == 1], grad[mask == 1]) and sums[0] == 3


def test_a_vector_of_zeros_has_cosine_0_and_no_gradient():
    hidden, teacher, grad = torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4)
    hidden[0, 1], teacher[0, 1] = 1.0, 0.0
    found = add_gradient(grad, hidden, teacher, torch.ones(1, 2), 0.5, sums := torch.empty(2))
    assert torch.equal(found, grad) and sums.tolist() == [2.0, 2.0]


def test_a_weight_of_0_changes_no_bit_and_still_tells_the_distance():
    hidden, teacher = draw(3, 2, 8, seed=1).float(), draw(3, 2, 6, seed=2).float()
    grad = -torch.zeros(3, 2, 8)
    found = add_gradient(grad, hidden, teacher, torch.ones(3, 2), 0.0, sums := torch.empty(2))
    assert found is grad
    assert float(sums[1]) == pytest.approx(float(cosine_distance(hidden.double(), teacher.double()).sum()), rel=1e-5)
