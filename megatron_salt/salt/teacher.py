"""The teacher in use: a frozen, forward-only model over the student's own ranks, and its end.

One step of stage 1 is A, B, C (design: hidden states travel, logits never do). A: each replica of the teacher runs its share of the
microbatches through the teacher's own pipeline. B: one all-to-all inside a block (the ranks of one student replica) brings the
last hidden states, cut as the student's last stage needs them, to that stage. C is the student's own schedule, on microbatches that
carry a `SoftTarget`. Every rank goes through A, B and C in this order, and no phase begins before the one before it has ended here.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_salt.data.batch import Microbatch, merge_microbatches
from megatron_salt.model.fp8_teacher import raw_tensors
from megatron_salt.model.gpt import GPT
from megatron_salt.model.loss import SoftTarget
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh, teacher_groups
from megatron_salt.parallel.pipeline import LossFunction, run_pipeline
from megatron_salt.salt import routing

plan_exchange = cache(routing.plan)


_ForwardInput = tuple[Microbatch, list[tuple[slice, slice]]]
"""Microbatches of the student, merged into one on this rank's device; and what this rank sends of their hidden states: (positions,
samples) of each piece, in the order of the pieces."""


@dataclass(frozen=True)
class Fidelity:
    """How near a teacher in FP8 is to itself in bfloat16, on a fixed batch; the worst of its replicas."""

    kl: float
    """Mean over tokens of KL(bfloat16 || FP8), nats."""
    agreement: float
    """Share of tokens whose likeliest id is the same."""
    tokens: int
    """Of the batch."""
    max_kl: float
    """--teacher-fp8-max-kl, which kl is not above."""

    def __str__(self) -> str:
        return (
            f"teacher in FP8: KL(bfloat16 || FP8) {self.kl:.2e} nats a token on {self.tokens} fixed tokens (--teacher-fp8-max-kl "
            f"{self.max_kl:g}), the same first choice on {self.agreement:.1%}"
        )


class Teacher:
    """What this rank holds of the teacher. Invariant: nothing of it has a gradient, and after `free` nothing of it is left."""

    def __init__(
        self,
        body: GPT,
        weight: Tensor | None,
        mesh: Mesh,
        student: Mesh,
        block_group: dist.ProcessGroup,
        microbatches_per_forward: int,
        temperature: float,
    ) -> None:
        """body: this rank's stage, without output head. weight: output weight [V/tp, h_t], the student's rows of it, on ranks of the
        student's last stage; None elsewhere. block_group: the ranks of this rank's student replica, in rank order."""
        self.body: GPT | None = body.eval().requires_grad_(False)
        self.weight = weight
        self.mesh: Mesh | None = mesh
        self.block_group: dist.ProcessGroup | None = block_group
        self.fidelity: Fidelity | None = None  # of a teacher in FP8, once it is known
        self._student, self._merge, self.temperature = student, microbatches_per_forward, temperature
        self._place = dist.get_rank(block_group)

    @torch.no_grad()
    def annotate(self, microbatches: Sequence[Microbatch], kd_weight: float) -> list[SoftTarget | None]:
        """The teacher's part of each of this student replica's microbatches, all of one shape. Collective over all ranks, both phases;
        only ranks of the student's last stage receive, the others get None for each."""
        return [
            None if hidden is None else SoftTarget(hidden, self._weight, self.temperature, kd_weight)
            for hidden in self.hidden_states(microbatches, self._merge)
        ]

    @torch.no_grad()
    def hidden_states(self, microbatches: Sequence[Microbatch], merge: int) -> list[Tensor | None]:
        """Last hidden states [s/(cp*tp), b, h_t] of each microbatch, this rank's share of the sequence, on ranks of the student's last
        stage; None elsewhere. `merge` microbatches are one of the teacher's. Collective over all ranks."""
        samples, length = microbatches[0].tokens.shape
        plan = plan_exchange(self._student.layout, self._mesh.layout, len(microbatches), merge, length)
        inputs = [
            _forward_input(microbatches, plan, forward, self._place, samples) for forward in plan.forwards_of(self._replica)
        ]
        outputs: list[Tensor] = []
        if inputs:  # on the teacher's last stage, what is to be sent of each forward
            outputs = run_pipeline([self._body], _forward_step, inputs, self._mesh, length, merge * samples, forward_only=True)
        return self._exchange(plan, outputs, len(microbatches), samples)

    def _exchange(self, plan: routing.Plan, outputs: list[Tensor], count: int, samples: int) -> list[Tensor | None]:
        """Phase B. outputs: of each of this rank's forwards its pieces end to end."""
        assert self.block_group is not None
        config = self._body.config
        width, dtype = config.hidden_size, config.params_dtype
        size = plan.piece_length * samples * width
        made = [piece for forward in plan.forwards_of(self._replica) for piece in _pieces(plan, forward, self._place)]
        sent = [part for output in outputs if output.numel() for part in output.split(size)]
        parts = {(piece.target, piece.microbatch): part for piece, part in zip(made, sent, strict=True)}
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
            hidden[piece.microbatch] = part.view(plan.piece_length, samples, width)
        return hidden

    def free(self) -> None:
        """Give up weights, buffers and process groups, once, without touching anything that the student has. Collective over all ranks.

        Nothing of the teacher's may be under way on any rank when the first group goes, hence the barrier; groups go in the order in
        which they were made, the same on all their members.
        """
        groups = [*teacher_groups(self._mesh), self.block_group]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        self.body = self.weight = self.mesh = self.block_group = None
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
        """Of its weights and buffers on this rank; 0 once it is freed."""
        return (0 if self.body is None else tensor_bytes(self.body)) + (0 if self.weight is None else self.weight.nbytes)

    @property
    def _body(self) -> GPT:
        assert self.body is not None, "the teacher has been freed"
        return self.body

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None, "the teacher has been freed"
        return self.mesh

    @property
    def _weight(self) -> Tensor:
        assert self.weight is not None, "the teacher's output weight is on the student's last stage"
        return self.weight

    @property
    def _replica(self) -> int:
        """Of the teacher's replicas in this block, the one that this rank belongs to."""
        return self._mesh.at.dp % self.replicas

    @property
    def replicas(self) -> int:
        """Of the teacher, in each block."""
        return self._mesh.layout.data // self._student.layout.data


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, in FP8 or not, and buffers."""
    return sum(raw.nbytes for tensor in [*module.parameters(), *module.buffers()] for raw in raw_tensors(tensor))


def _pieces(plan: routing.Plan, forward: int, place: int) -> list[routing.Piece]:
    """What a place sends of a forward."""
    microbatches = plan.microbatches_of(forward)
    return [piece for piece in plan.sent_by(place) if piece.microbatch in microbatches]


def _forward_input(
    microbatches: Sequence[Microbatch], plan: routing.Plan, forward: int, place: int, samples: int
) -> _ForwardInput:
    numbers = plan.microbatches_of(forward)
    cuts = []
    for piece in _pieces(plan, forward, place):
        first = (piece.microbatch - numbers.start) * samples
        cuts += [(positions, slice(first, first + samples)) for positions in piece.positions]
    return merge_microbatches([microbatches[number] for number in numbers]).to_device(), cuts


def _forward_step(body: nn.Module, merged: _ForwardInput) -> tuple[Tensor, LossFunction]:
    """-> (hidden states, a "loss" that hands out, as the microbatch's metrics, the pieces of them that this rank sends)."""
    assert isinstance(body, GPT)
    batch, cuts = merged
    hidden = body(*body.inputs(batch))

    def cut(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros((), device=hidden.device)
        parts = [hidden[positions, samples].reshape(-1) for positions, samples in cuts]
        return none, none.int(), torch.cat([hidden.new_empty(0), *parts])

    return hidden, cut
