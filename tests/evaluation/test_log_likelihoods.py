"""Log-likelihoods of requests equal a float64 computation of one request at a time, under every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_salt.config import ParallelConfig
from megatron_salt.errors import LeftEarly
from megatron_salt.evaluation.log_likelihoods import Scored, log_likelihoods, plan_batches
from megatron_salt.evaluation.requests import Request
from megatron_salt.train.step import unwrap
from tests.support import plain_model
from tests.support.ranks import run_ranks
from tests.support.small import MODELS, SEQ_LENGTH, VOCABULARY, Case, build_student, make_weights

CASE = Case(model=replace(MODELS["tied"], init_method_std=0.2))  # far from uniform, so that the likeliest id is clear


def requests() -> list[Request]:
    """23 requests of many lengths, the longest one token longer than the model's context."""
    random = np.random.default_rng(0)
    lengths = [SEQ_LENGTH + 1, SEQ_LENGTH, 2, 3, *random.integers(2, SEQ_LENGTH + 2, 19)]
    ids = [random.integers(0, VOCABULARY, length) for length in lengths]
    return [Request(one, int(random.integers(1, len(one))), 0) for one in ids]


def slowly(weights: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """In one rank: log-likelihoods and greediness from the plain model in float64, one request at a time; and the likeliest first ids."""
    [chunk] = build_student(CASE, 1, weights).chunks
    parameters = {name: value.detach().double() for name, value in unwrap(chunk).named_parameters()}
    sums, greedy, likeliest = [], [], []
    for request in requests():
        tokens = torch.from_numpy(request.ids[:-1])[None]
        seen = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).tril()[None]
        positions = torch.arange(tokens.size(1))[None]
        log_p = plain_model.logits(CASE.model, parameters, tokens, positions, seen)[0, :, :VOCABULARY].log_softmax(-1)
        labels, log_p = torch.from_numpy(request.ids[-request.num_scored :]), log_p[-request.num_scored :]
        sums.append(log_p.gather(1, labels[:, None]).sum().item())
        greedy.append(bool((log_p.argmax(1) == labels).all()))
        likeliest.append(int(log_p[0].argmax()))
    return np.array(sums), np.array(greedy), likeliest


def quickly(weights: Path, case: Case, world_size: int, greedy_ids: dict[int, int]) -> tuple[Scored, list[int]]:
    """In every rank: the same by `log_likelihoods`, with the last ids of some requests replaced; and what on_progress counted."""
    student = build_student(case, world_size, weights)
    asked = [
        replace(one, ids=np.append(one.ids[: -one.num_scored], greedy_ids[number]), num_scored=1)
        if number in greedy_ids
        else one
        for number, one in enumerate(requests())
    ]
    counts = [0, 0]

    def count(num_requests: int, num_tokens: int) -> None:
        counts[0] += num_requests
        counts[1] += num_tokens

    chunks = [unwrap(chunk) for chunk in student.chunks]
    scored = log_likelihoods(chunks, student.mesh, asked, longest=SEQ_LENGTH, batch_tokens=100, on_progress=count)
    assert all(chunk.training for chunk in chunks)
    return scored, counts


def stopped(weights: Path) -> tuple[str, bool]:
    """In one rank: what is raised where there is a reason to leave before the second piece, and whether the model trains on."""
    student = build_student(CASE, 1, weights)
    reasons = iter([None, "received SIGTERM"])
    chunks = [unwrap(chunk) for chunk in student.chunks]
    with pytest.raises(LeftEarly) as left:
        log_likelihoods(
            chunks, student.mesh, requests(), longest=SEQ_LENGTH, batch_tokens=1, reason_to_stop=lambda: next(reasons)
        )
    return str(left.value), chunks[0].training


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small"
    run_ranks(1, make_weights, CASE, path)
    return path


@pytest.fixture(scope="module")
def expected(weights: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    [result] = run_ranks(1, slowly, weights)
    return result


@pytest.mark.parametrize(
    "parallel, world_size",
    [
        pytest.param(dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2), 2, marks=pytest.mark.full),
        pytest.param(dict(context_parallel_size=2), 4, marks=pytest.mark.full),
        pytest.param(dict(tensor_model_parallel_size=2, sequence_parallel=True), 2, marks=pytest.mark.long),
        pytest.param(dict(), 3, marks=pytest.mark.full),
        pytest.param(dict(), 1),
        pytest.param(dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4, marks=pytest.mark.long),
        pytest.param(dict(pipeline_model_parallel_size=2), 2),
    ],
)
def test_they_equal_a_float64_computation_in_every_layout(weights, expected, parallel, world_size):
    sums, greedy, likeliest = expected
    replaced = {3: likeliest[3], 7: likeliest[7]}
    case = replace(CASE, parallel=ParallelConfig(**parallel))
    results = run_ranks(world_size, quickly, weights, case, world_size, replaced)
    kept = [number for number in range(len(sums)) if number not in replaced]
    for scored, (num_requests, num_tokens) in results:  # every rank receives
        np.testing.assert_allclose(scored.log_likelihoods[kept], sums[kept], atol=1e-4, rtol=0)
        assert scored.greedy[list(replaced)].all()
        assert scored.greedy[kept].tolist() == greedy[kept].tolist()
        assert num_requests == len(sums)
        assert num_tokens == sum(len(one.ids) - 1 for one in requests()) - sum(
            requests()[one].num_scored - 1 for one in replaced
        )


@pytest.mark.long
def test_in_bfloat16_a_token_differs_between_layouts_by_less_than_two_hundredths(tmp_path):
    case = Case(dtype=torch.bfloat16)
    run_ranks(1, make_weights, case, tmp_path / "small")
    [(alone, _)] = run_ranks(1, quickly, tmp_path / "small", case, 1, {})
    split = replace(case, parallel=ParallelConfig(tensor_model_parallel_size=2))
    (shared, _), _ = run_ranks(2, quickly, tmp_path / "small", split, 2, {})
    num_scored = np.array([one.num_scored for one in requests()])
    np.testing.assert_allclose(shared.log_likelihoods / num_scored, alone.log_likelihoods / num_scored, atol=2e-2, rtol=0)


def test_a_reason_to_leave_ends_them_between_two_pieces(weights):
    [(reason, training)] = run_ranks(1, stopped, weights)
    assert reason == "received SIGTERM" and training


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_request_is_in_one_batch_that_it_fits(replicas):
    lengths = np.random.default_rng(1).integers(1, 1025, 300).tolist()
    plan = plan_batches(lengths, longest=1024, multiple=32, batch_tokens=4096, replicas=replicas)
    members = np.concatenate([batch for planned in plan for batch in planned.members])
    assert sorted(members) == list(range(300))
    assert [planned.length for planned in plan] == sorted({planned.length for planned in plan}, reverse=True)
    for planned in plan:
        assert planned.length % 32 == 0 and planned.length <= 1024
        for batch in planned.members:
            assert 0 < len(batch) <= planned.size and planned.size * planned.length <= 4096
            assert all(lengths[one] <= planned.length <= max(32, lengths[one] * 1.25 + 32) for one in batch)
    one_long = plan_batches([70], longest=70, multiple=2, batch_tokens=8, replicas=1)
    assert (one_long[0].length, one_long[0].size) == (70, 1)
