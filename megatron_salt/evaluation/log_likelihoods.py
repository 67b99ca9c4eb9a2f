"""Log-likelihoods of continuations, under any layout.

Requests of similar length form batches; each is padded on the right, which a causal model does not see. Batches go to the data-parallel
replicas in turn. The last stage turns hidden states into log-likelihoods with the scorer of the teacher-score index. The order of requests
and the layout change results by rounding alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import LeftEarly
from megatron_salt.evaluation.requests import Request
from megatron_salt.model.gpt import GPT
from megatron_salt.model.loss_chunk import forward_chunk_tokens
from megatron_salt.model.token_scores import TokenScorer
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.pipeline import LossFunction, run_pipeline

PIECE = 2
"""Batches of a replica between two checks for a reason to leave; with pipeline stages 8 for each stage, as in salt/scorer.py."""
_MULTIPLE = 32  # of a batch's length


@dataclass(frozen=True)
class Scored:
    """What a model says of requests."""

    log_likelihoods: np.ndarray
    """float64 [requests]: log p of the scored ids, summed, nats."""
    greedy: np.ndarray
    """bool [requests]: whether no id is likelier than the scored one, at any of its places."""


@dataclass(frozen=True)
class PlannedBatches:
    """Requests that go through the model in batches of one shape."""

    length: int
    """Tokens of each, padding included."""
    size: int
    """Requests of a batch."""
    members: list[np.ndarray]
    """Indices of the requests of each batch; the last may have fewer than `size`."""


def plan_batches(lengths: Sequence[int], longest: int, multiple: int, batch_tokens: int, replicas: int) -> list[PlannedBatches]:
    """Batches for requests of these lengths, the longest first. Pure.

    longest: tokens that the model takes, a multiple of `multiple`. A length is rounded up by at most an eighth, to a multiple of
    `multiple`. A batch has at most `batch_tokens` tokens, but at least one request, and no more than a replica's share.
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        buckets[min(longest, _rounded(lengths[index], multiple))].append(index)
    plan = []
    for length, members in buckets.items():
        size = max(1, min(batch_tokens // length, math.ceil(len(members) / replicas)))
        batches = [np.array(members[first : first + size]) for first in range(0, len(members), size)]
        plan.append(PlannedBatches(length, size, batches))
    return plan


def _rounded(length: int, multiple: int) -> int:
    step = max(multiple, math.ceil((1 << (length - 1).bit_length()) / 8 / multiple) * multiple)
    return math.ceil(length / step) * step


@torch.no_grad()
def log_likelihoods(
    chunks: Sequence[GPT],
    mesh: Mesh,
    requests: Sequence[Request],
    *,
    longest: int,
    batch_tokens: int,
    reason_to_stop: Callable[[], str | None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda num_requests, num_tokens: None,
) -> Scored:
    """The model's log-likelihoods of requests. Collective over all ranks; all receive.

    chunks: this rank's, without data-parallel wrappers. longest: tokens that the model takes; every request has at most one more.
    batch_tokens: tokens in one forward pass of a replica. reason_to_stop: called before each piece, the same on every rank; a reason raises
    LeftEarly on every rank. on_progress: called with what all replicas together have done since the last call.
    """
    layout, was_training = mesh.layout, chunks[0].training
    multiple = math.lcm(_MULTIPLE, layout.tensor, 2 * layout.context)
    sums = torch.zeros(len(requests), 2, dtype=torch.float64, device=current_device())
    scorer = _scorer(chunks[-1]) if mesh.is_last_stage else None
    piece = PIECE if layout.pipeline == 1 else 8 * layout.pipeline
    for chunk in chunks:
        chunk.eval()
    try:
        for planned in plan_batches([len(one.ids) - 1 for one in requests], longest, multiple, batch_tokens, layout.data):
            rounds = math.ceil(len(planned.members) / layout.data)
            for turn in range(0, rounds, piece):
                if (reason := reason_to_stop()) is not None:
                    raise LeftEarly(reason)
                done = planned.members[turn * layout.data : (turn + piece) * layout.data]
                _score_piece(chunks, mesh, requests, planned, done, scorer, sums)
                members = np.concatenate(done)
                on_progress(len(members), sum(len(requests[one].ids) - 1 for one in members))
    finally:
        for chunk in chunks:
            chunk.train(was_training)
    dist.all_reduce(sums, group=mesh.groups.dp_cp)  # a request is zeros on replicas that did not run it
    dist.broadcast(sums, src=dist.get_process_group_ranks(mesh.groups.pp)[-1], group=mesh.groups.pp)
    log_p, num_wrong = sums.cpu().numpy().T
    return Scored(log_p.copy(), num_wrong == 0)


def _scorer(chunk: GPT) -> TokenScorer:
    shard = chunk.output_layer.shard
    on_gpu = current_device().type == "cuda"
    return TokenScorer(chunk.output_weight(), shard, forward_chunk_tokens(shard.rows, on_gpu))


def _score_piece(
    chunks: Sequence[GPT], mesh: Mesh, requests: Sequence[Request], planned: PlannedBatches, batches: list[np.ndarray],
    scorer: TokenScorer | None, sums: Tensor,
) -> None:  # fmt: skip
    """Run batches of one shape and add their sums. Every replica runs equally many: one that has none left runs padding."""
    layout, own = mesh.layout, batches[mesh.at.dp :: mesh.layout.data]
    count = math.ceil(len(batches) / layout.data)
    if len(chunks) > 1:
        count = math.ceil(count / layout.pipeline) * layout.pipeline  # the interleaved schedule takes no other number
    padding = [np.array([], np.int64)] * (count - len(own))
    inputs = [
        _microbatch([requests[one] for one in members], planned).to_device(layout.context, mesh.at.cp)
        for members in (*own, *padding)
    ]

    def step(chunk: nn.Module, batch: Microbatch) -> tuple[Tensor, LossFunction]:
        assert isinstance(chunk, GPT)
        return chunk(*chunk.inputs(batch)), lambda hidden: _sums_of(hidden, batch, scorer, chunk)

    outcomes = run_pipeline(chunks, step, inputs, mesh, planned.length, planned.size, forward_only=True)
    for members, outcome in zip(own, outcomes, strict=False):  # on the last stage
        sums[torch.from_numpy(members).to(sums.device)] += outcome[: len(members)]


def _microbatch(requests: Sequence[Request], planned: PlannedBatches) -> Microbatch:
    """Requests with padding on the right, and rows of padding. The mask is 1 where the label is scored."""
    shape = (planned.size, planned.length)
    tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.float32)
    for row, request in enumerate(requests):
        end = len(request.ids) - 1
        tokens[row, :end], labels[row, :end] = request.ids[:-1], request.ids[1:]
        mask[row, end - request.num_scored : end] = 1
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(mask),
        position_ids=torch.arange(planned.length).repeat(planned.size, 1),
        documents=None,
        sample_ids=np.arange(planned.size),
    )


def _sums_of(hidden_sbh: Tensor, batch: Microbatch, scorer: TokenScorer | None, chunk: GPT) -> tuple[Tensor, Tensor, Tensor]:
    """A "loss" whose metrics are, of each request, (log p of its scored ids, how many of them are not the likeliest): float64 [b, 2]."""
    assert scorer is not None, "the last stage has the output weight"
    if chunk.config.sequence_parallel:
        hidden_sbh = gather_from_sequence_parallel_region(hidden_sbh, group=chunk.pg_collection.tp)
    num = batch.tokens.size(0)
    result = torch.zeros(num, 2, dtype=torch.float64, device=hidden_sbh.device)
    scored = batch.loss_mask.t().flatten().nonzero()[:, 0]  # the head is computed for these alone
    if len(scored):
        labels = batch.labels.t().flatten()[scored]
        of_tokens = scorer.score(hidden_sbh.flatten(0, 1)[scored, None], labels, torch.ones_like(labels))
        columns = torch.stack([-of_tokens.loss.double(), (of_tokens.rank > 0).double()], 1)
        result.index_add_(0, scored % num, columns)
    none = torch.zeros((), device=hidden_sbh.device)
    return none, none.int(), result
