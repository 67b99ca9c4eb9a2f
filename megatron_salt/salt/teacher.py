"""The teacher in use: a frozen, forward-only model over the student's own ranks, and how it is freed.

One step of stage 1 has three phases. Hidden states travel between ranks, logits never do.
A: each replica of the teacher runs its share of the microbatches through the teacher's own pipeline. Samples that a cache holds
(teacher_cache/) take no part in A and B.
B: one all-to-all inside a block (the ranks of one student replica) brings the last hidden states to the stages that use them in this step:
the student's last one for soft labels, that of the guided layer for guidance. Each rank gets its slice of the sequence. A block of one rank
has nothing to send.
C: the student's own schedule runs on microbatches that carry their `Targets`.
Every rank goes through A, B and C in this order. On each rank a phase begins when the one before it has ended.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_salt.config.teaching import Gate
from megatron_salt.data.batch import Microbatch, merge_microbatches
from megatron_salt.model.attention import positions_of
from megatron_salt.model.fp8_teacher import raw_tensors
from megatron_salt.model.gpt import GPT
from megatron_salt.model.guidance.target import UNTAUGHT, HiddenTarget, Targets
from megatron_salt.model.loss import GATED_METRICS, KD_METRICS, SoftTarget
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh, teacher_groups
from megatron_salt.parallel.pipeline import LossFunction, run_pipeline
from megatron_salt.salt.guidance.layer_place import GuidedLayer, stages_that_use
from megatron_salt.salt.routing import ExchangePlan, Piece, plan_exchange
from megatron_salt.salt.schedule import StepWeights
from megatron_salt.salt.teacher_cache.missing import join, missing_microbatches, presence, rows_to_compute

Keep = Callable[[np.ndarray, Tensor], None]
"""Takes sample ids, int64 [n], and their last hidden states [s, n, h_t]. Of the ranks that hold the same ones, one calls."""

_ForwardInput = tuple[Microbatch, list[tuple[slice, slice]], Keep | None]
"""Microbatches of the student, merged into one on this rank's device; the parts of their hidden states that this rank sends, (positions,
samples) of each piece, in the order of the pieces; and what takes all their hidden states, where this rank shall keep them."""


@dataclass(frozen=True)
class TeacherHead:
    """How the teacher's output head is computed: on the student's last stage, cut over ranks as the student's own head is."""

    student: Mesh
    shard: VocabularyShard
    """Which rows of the output weight each rank holds. Always sequence_parallel: each rank has its own slice of the sequence."""
    seq_length: int
    """Tokens of a sample."""
    chunk_tokens: int
    """Tokens whose logits are computed at a time."""
    shared_ids: int
    """Ids that mean the same to teacher and student: those from 0 up to it. The teacher gives no probability to others."""

    @property
    def shared_shard(self) -> VocabularyShard:
        """`shard` with the shared ids alone."""
        return replace(self.shard, vocabulary_size=self.shared_ids)

    def __post_init__(self) -> None:
        assert self.shard.sequence_parallel

    def own_positions(self) -> Tensor:
        """Positions of a sequence that this rank holds under context parallelism: int64 [s/cp], on the CPU."""
        return positions_of(self.seq_length, self.student.layout.context, self.student.at.cp, torch.device("cpu"))


@dataclass(frozen=True)
class _Parts:
    """What `free` gives up."""

    body: GPT | None
    weight: Tensor | None
    mesh: Mesh
    block_group: dist.ProcessGroup


class Teacher:
    """This rank's part of the teacher. Invariants: none of its tensors has a gradient; after `free` it holds no tensor and no group."""

    def __init__(
        self,
        body: GPT | None,
        weight: Tensor | None,
        mesh: Mesh,
        student: Mesh,
        block_group: dist.ProcessGroup,
        *,
        microbatches_per_forward: int,
        temperature: float,
        shared_ids: int | None = None,
        gate: Gate | None = None,
        guided: GuidedLayer | None = None,
    ) -> None:
        """body: this rank's stage, without output head; None where a cache holds all that it would compute. weight: output weight
        [V/tp, h_t], the student's rows of it, on ranks of the student's last stage; None elsewhere, and without soft labels. block_group:
        the ranks of this rank's student replica, in rank order. temperature: of steps that have no other; with a schedule the lowest.
        shared_ids, gate: see `SoftTarget`. guided: the layer that the hidden states guide; None without guidance."""
        body = None if body is None else body.eval().requires_grad_(False)
        self._parts: _Parts | None = _Parts(body, weight, mesh, block_group)
        self._student, self._merge, self.temperature = student, microbatches_per_forward, temperature
        self._shared_ids, self._gate = shared_ids, gate
        self._place = dist.get_rank(block_group)
        self.guided = guided

    @property
    def _held(self) -> _Parts:
        assert self._parts is not None, "the teacher has been freed"
        return self._parts

    @property
    def body(self) -> GPT:
        """This rank's stage, without output head."""
        assert self._held.body is not None, "the teacher's layers were not loaded: a cache holds what they would compute"
        return self._held.body

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters and buffers that this rank holds."""
        body, weight = self._held.body, self.weight
        of_body = [] if body is None else [*body.parameters(), *body.buffers()]
        return of_body + ([] if weight is None else [weight])

    @property
    def weight(self) -> Tensor | None:
        """Output weight [V/tp, h_t], the student's rows of it, on ranks of the student's last stage; None elsewhere."""
        return self._held.weight

    def replace_weight(self, weight: Tensor) -> None:
        """Take another output weight, and give up the one before."""
        assert self.weight is not None
        self._parts = replace(self._held, weight=weight.requires_grad_(False))

    @property
    def mesh(self) -> Mesh:
        """The teacher's own groups, over the student's ranks."""
        return self._held.mesh

    @property
    def block_group(self) -> dist.ProcessGroup:
        """The ranks of this rank's student replica, in rank order."""
        return self._held.block_group

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that come with the loss of its soft labels."""
        return KD_METRICS if self._gate is None else GATED_METRICS

    @torch.no_grad()
    def annotate(self, microbatches: Sequence[Microbatch], weights: StepWeights, keep: Keep | None = None) -> list[Targets]:
        """Phases A and B: the teacher's parts of each microbatch of this student replica, all of one shape. Collective over all ranks.

        weights: of the step. Ranks of the stages that use hidden states in this step receive them; the others get empty targets. keep: see
        `hidden_states`."""
        stages = stages_that_use(weights, self._student.layout.pipeline, self.guided)
        present = presence(microbatches)
        if not present.any():
            hidden = self.hidden_states(microbatches, self._merge, keep, stages)
        else:
            hidden = self._with_cached(microbatches, present, keep, stages)
        return [UNTAUGHT if one is None else self._targets(one, weights) for one in hidden]

    def _with_cached(
        self, microbatches: Sequence[Microbatch], present: np.ndarray, keep: Keep | None, stages: frozenset[int]
    ) -> list[Tensor | None]:
        """Hidden states as `hidden_states` returns them. The teacher computes those alone that no cache holds."""
        size = len(microbatches[0].sample_ids)
        rows = rows_to_compute(present, self._merge * size)
        missing = missing_microbatches(microbatches, rows) if len(rows) else []
        computed = self.hidden_states(missing, self._merge, keep, stages) if missing else []
        if self._student.at.pp not in stages:
            return [None] * len(microbatches)
        hidden = []
        for number, one in enumerate(microbatches):
            assert one.cached is not None, "all microbatches of a step have been looked up, or none"
            hidden.append(join(one.cached, number * size, rows, computed))
        return hidden

    def _targets(self, hidden: Tensor, weights: StepWeights) -> Targets:
        """What this rank's chunks need of a microbatch. hidden: what this rank has received of it."""
        soft, guide = None, None
        if weights.soft_labels is not None and self._student.is_last_stage:
            assert self.weight is not None, "the teacher's output weight is on the student's last stage"
            temperature = self.temperature if weights.temperature is None else weights.temperature
            soft = SoftTarget(hidden, self.weight, temperature, weights.soft_labels, self._shared_ids, self._gate)
        if weights.hidden is not None and self.guided is not None and self.guided.place.stage == self._student.at.pp:
            guide = HiddenTarget(hidden, self.guided.layer, weights.hidden)
        return Targets(soft=soft, hidden=guide)

    @torch.no_grad()
    def hidden_states(
        self, microbatches: Sequence[Microbatch], merge: int, keep: Keep | None = None, stages: frozenset[int] | None = None
    ) -> list[Tensor | None]:
        """Last hidden states of each microbatch, this rank's share of the sequence [s/(cp*tp), b, h_t], on ranks of these stages of the
        student; None elsewhere. One forward of the teacher takes `merge` microbatches. Collective over all ranks.

        stages: None: the last one. keep: gets the hidden states of every forward once, on one rank of the teacher's last stage."""
        samples, length = microbatches[0].tokens.shape
        plan = plan_exchange(self._student.layout, self.mesh.layout, len(microbatches), merge, length, stages)
        inputs = [
            _forward_input(microbatches, plan, forward, self._place, samples, keep if self._keeps(turn) else None)
            for turn, forward in enumerate(plan.forwards_of(self._replica))
        ]
        outputs: list[Tensor] = []
        if inputs:  # on the teacher's last stage: for each forward the values to send
            outputs = run_pipeline([self.body], _forward_step, inputs, self.mesh, length, merge * samples, forward_only=True)
        return self._exchange(plan, outputs, len(microbatches), samples)

    def _keeps(self, turn: int) -> bool:
        """Whether this rank keeps the hidden states of its replica's forward number `turn`: the ranks that hold them take turns."""
        return self.mesh.is_last_stage and self.mesh.at.tp == turn % self.mesh.layout.tensor

    def _exchange(self, plan: ExchangePlan, outputs: list[Tensor], count: int, samples: int) -> list[Tensor | None]:
        """Phase B. outputs: for each forward of this rank the values of its pieces, concatenated."""
        config = self.body.config
        width, dtype = config.hidden_size, config.params_dtype
        size = plan.piece_length * samples * width
        made = [piece for forward in plan.forwards_of(self._replica) for piece in _pieces(plan, forward, self._place)]
        sent = [part for output in outputs if output.numel() for part in output.split(size)]
        parts = {(piece.target, piece.microbatch): part for piece, part in zip(made, sent, strict=True)}
        shape = (plan.piece_length, samples, width)
        if plan.num_places == 1:  # what the only rank of a block would send to itself it keeps
            return [parts[0, number].view(shape) for number in range(count)]
        empty = torch.empty(0, dtype=dtype, device=current_device())
        outbox = torch.cat([empty, *(parts[piece.target, piece.microbatch] for piece in plan.sent_by(self._place))])
        parts.clear()
        sent.clear()
        outputs.clear()
        send = [positions * samples * width for positions in plan.send_sizes(self._place)]
        receive = [positions * samples * width for positions in plan.receive_sizes(self._place)]
        inbox = torch.empty(sum(receive), dtype=dtype, device=current_device())
        dist.all_to_all_single(inbox, outbox, receive, send, group=self.block_group)
        hidden: list[Tensor | None] = [None] * count
        for piece, part in zip(
            plan.received_by(self._place), inbox.split(size), strict=False
        ):  # nothing splits into one empty part
            hidden[piece.microbatch] = part.view(shape)
        return hidden

    def free(self) -> None:
        """Free weights, buffers and process groups, once; nothing of the student changes. Collective over all ranks.

        Nothing of the teacher's may be under way on any rank when the first group goes, hence the barrier; groups go in the order in
        which they were made, the same on all their members.
        """
        groups = [*teacher_groups(self.mesh), self.block_group]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        self._parts = None
        RotaryEmbedding.forward.cache_clear()  # an lru_cache on a method, which keeps the module and its groups; the student's refills
        gc.collect()
        while groups:
            dist.destroy_process_group(groups.pop(0))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        dist.barrier()

    @property
    def num_bytes(self) -> int:
        """Bytes of the teacher's weights and buffers on this rank; 0 once it is freed."""
        if self._parts is None:
            return 0
        body = self._parts.body
        return (0 if body is None else tensor_bytes(body)) + (0 if self.weight is None else self.weight.nbytes)

    @property
    def _replica(self) -> int:
        """Number, in this block, of the teacher's replica that this rank belongs to."""
        return self.mesh.at.dp % self.replicas

    @property
    def replicas(self) -> int:
        """Replicas of the teacher in each block."""
        return self.mesh.layout.data // self._student.layout.data


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, in FP8 or not, and of its buffers."""
    return sum(raw.nbytes for tensor in [*module.parameters(), *module.buffers()] for raw in raw_tensors(tensor))


def _pieces(plan: ExchangePlan, forward: int, place: int) -> list[Piece]:
    """The pieces of a forward that a place sends."""
    microbatches = plan.microbatches_of(forward)
    return [piece for piece in plan.sent_by(place) if piece.microbatch in microbatches]


def _forward_input(
    microbatches: Sequence[Microbatch], plan: ExchangePlan, forward: int, place: int, samples: int, keep: Keep | None
) -> _ForwardInput:
    numbers = plan.microbatches_of(forward)
    cuts = []
    for piece in _pieces(plan, forward, place):
        first = (piece.microbatch - numbers.start) * samples
        cuts += [(positions, slice(first, first + samples)) for positions in piece.positions]
    return merge_microbatches([microbatches[number] for number in numbers]).to_device(), cuts, keep


def _forward_step(body: nn.Module, merged: _ForwardInput) -> tuple[Tensor, LossFunction]:
    """-> (hidden states, a "loss" function). Its metrics are the pieces of the hidden states that this rank sends."""
    assert isinstance(body, GPT)
    batch, cuts, keep = merged
    hidden = body(*body.inputs(batch))

    def cut(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros((), device=hidden.device)
        if keep is not None:
            keep(batch.sample_ids, hidden)
        parts = [hidden[positions, samples].reshape(-1) for positions, samples in cuts]
        return none, none.int(), torch.cat([hidden.new_empty(0), *parts])

    return hidden, cut
