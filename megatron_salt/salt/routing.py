"""Which rank runs the teacher on which microbatch, and who sends whom which positions of the hidden states.

The ranks of one student data-parallel replica are a block, in (pp, cp, tp) order, tp fastest; a rank's index in it is its place.
The block hosts R teacher replicas at coordinates (replica, pp, tp), tp fastest, over the same places. Nothing leaves a block.
Arithmetic on ints: every rank computes the same plan, once, and only carries it out (`salt/teacher.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.parallel.hardware import GIB
from megatron_salt.parallel.layout import Layout, context_slice


def teacher_layout(student: Layout, tensor: int, pipeline: int) -> Layout:
    """The teacher over the student's ranks: dp = block * R + replica, no context parallelism. Raises UserError where it does not fit.

    tensor, pipeline: the teacher's own sizes; their product must divide the block, tp x cp x pp ranks of the student.
    """
    blocks = np.array(student.groups("tp", "cp", "pp"))  # [block, place]
    if blocks.shape[1] % (tensor * pipeline):
        raise UserError(
            f"--teacher-tensor-model-parallel-size {tensor} x --teacher-pipeline-model-parallel-size {pipeline} = {tensor * pipeline} "
            f"does not divide the {blocks.shape[1]} ranks of a student replica (--tensor-model-parallel-size {student.tensor} x "
            f"--context-parallel-size {student.context} x --pipeline-model-parallel-size {student.pipeline})"
        )
    ranks = blocks.reshape(student.data, -1, pipeline, tensor).transpose(
        2, 0, 1, 3
    )  # [pp, block, replica, tp], a Layout's order
    return Layout(tensor, 1, ranks.shape[1] * ranks.shape[2], pipeline, tuple(ranks.ravel().tolist()))


def layout_warnings(student: Layout, teacher: Layout, num_forwards: int) -> list[str]:
    """What is allowed and costs time. num_forwards: teacher forwards of a block in one step."""
    told, replicas = [], teacher.data // student.data
    if num_forwards % replicas:
        told.append(
            f"the {num_forwards} teacher forwards of a step are not a multiple of the {replicas} teacher replicas of a block: "
            f"some idle while others run the last of {-(-num_forwards // replicas)}"
        )
    near = {rank: number for number, group in enumerate(student.groups("tp", "cp")) for rank in group}
    torn = [group for group in teacher.groups("tp") if len({near[rank] for rank in group}) > 1]
    if torn:
        more = f" (and {len(torn) - 1} more such groups)" if torn[1:] else ""
        told.append(
            f"the teacher's tensor-parallel group of ranks {torn[0]}{more} spans more than one tp x cp group of the student, "
            f"whose ranks may sit on several nodes: --teacher-tensor-model-parallel-size {teacher.tensor} against "
            f"--tensor-model-parallel-size {student.tensor} x --context-parallel-size {student.context}"
        )
    return told


def exchange_gib(
    student: Layout, num_microbatches: int, micro_batch_size: int, seq_length: int, hidden_size: int, itemsize: int
) -> float:
    """Teacher hidden states that a rank of the student's last stage receives in one step, GiB. hidden_size: the teacher's."""
    return num_microbatches * micro_batch_size * seq_length * hidden_size * itemsize / (student.tensor * student.context) / GIB


@dataclass(frozen=True)
class Piece:
    """One slice of one microbatch's hidden states on its way from a place of the block to another, or to itself."""

    microbatch: int
    source: int
    target: int
    positions: tuple[slice, ...]
    """Positions of the sequence, to be concatenated in this order."""


@dataclass(frozen=True)
class ExchangePlan:
    """What one block does in one step; the same in every block, on every rank and in every step."""

    num_microbatches: int
    merge: int
    """Microbatches of one teacher forward."""
    num_replicas: int
    """R, teacher replicas of the block."""
    num_places: int
    """Ranks of the block."""
    piece_length: int
    """Positions of a piece: seq_length / (tp * cp) of the student."""
    pieces: tuple[Piece, ...]
    """By source, then target, then microbatch: the order of the values in every send and receive buffer."""

    @property
    def num_forwards(self) -> int:
        """Teacher forwards of the block in one step."""
        return -(-self.num_microbatches // self.merge)

    def forwards_of(self, replica: int) -> list[int]:
        """Numbers of the forwards that a teacher replica runs; possibly none."""
        assert 0 <= replica < self.num_replicas, (replica, self.num_replicas)
        return list(range(replica, self.num_forwards, self.num_replicas))

    def microbatches_of(self, forward: int) -> range:
        """The consecutive microbatches that a forward takes together; the last one may take fewer."""
        assert 0 <= forward < self.num_forwards, (forward, self.num_forwards)
        return range(forward * self.merge, min((forward + 1) * self.merge, self.num_microbatches))

    def sent_by(self, place: int) -> list[Piece]:
        """In the order of the place's send buffer: by target, then microbatch."""
        return [piece for piece in self.pieces if piece.source == place]

    def received_by(self, place: int) -> list[Piece]:
        """In the order of the place's receive buffer: by source, then microbatch."""
        return [piece for piece in self.pieces if piece.target == place]

    def send_sizes(self, place: int) -> list[int]:
        """Positions for each place of the block, in order; times samples times hidden size they are split sizes in elements."""
        return self._positions[place].tolist()

    def receive_sizes(self, place: int) -> list[int]:
        """Positions from each place of the block, in order."""
        return self._positions[:, place].tolist()

    @cached_property
    def _positions(self) -> np.ndarray:
        """[source, target] -> positions."""
        table = np.zeros((self.num_places, self.num_places), np.int64)
        for piece in self.pieces:
            table[piece.source, piece.target] += self.piece_length
        return table


@cache
def plan_exchange(student: Layout, teacher: Layout, num_microbatches: int, merge: int, seq_length: int) -> ExchangePlan:
    """The plan of every block. Raises UserError, naming --seq-length, where the sequence cannot be cut.

    merge: microbatches of one teacher forward. Forward f = microbatches [f * merge, (f + 1) * merge) runs on replica f mod R. The
    student's last stage receives: its rank (tp j, cp c) slice j of tp equal ones of the positions that cp rank c holds, from the
    teacher's last stage, whose tp ranks all hold everything and take turns in sending: tp rank (j + c * tp) mod ttp.
    """
    tp, cp, ttp, tpp = student.tensor, student.context, teacher.tensor, teacher.pipeline
    check_sequence(student, seq_length)
    replicas = teacher.data // student.data
    pieces = [
        Piece(
            microbatch,
            source=(j + c * tp) % ttp + ttp * (tpp - 1 + tpp * (microbatch // merge % replicas)),
            target=j + tp * (c + cp * (student.pipeline - 1)),
            positions=tuple(_cut(context_slice(seq_length, cp, c), j, tp)),
        )
        for microbatch in range(num_microbatches) for c in range(cp) for j in range(tp)
    ]  # fmt: skip
    return ExchangePlan(
        num_microbatches, merge, replicas, tp * cp * student.pipeline, seq_length // (tp * cp),
        tuple(sorted(pieces, key=lambda piece: (piece.source, piece.target, piece.microbatch))),
    )  # fmt: skip


def check_sequence(student: Layout, seq_length: int) -> None:
    """Raise UserError where a sequence does not fall into equal slices, one for each rank of a tp x cp group."""
    if seq_length % (student.context * student.tensor):
        raise UserError(
            f"--seq-length {seq_length} is not divisible by --context-parallel-size x --tensor-model-parallel-size (with a teacher) "
            f"= {student.context * student.tensor}"
        )


def _cut(slices: list[slice], part: int, parts: int) -> list[slice]:
    """Part `part` of `parts` equal ones of the slices' concatenation, as slices of what the slices index."""
    length = sum(piece.stop - piece.start for piece in slices) // parts
    begin, end, found = part * length, (part + 1) * length, []
    for piece in slices:
        start, stop = piece.start + max(begin, 0), min(piece.start + end, piece.stop)
        if start < stop:
            found.append(slice(start, stop))
        begin, end = begin - (piece.stop - piece.start), end - (piece.stop - piece.start)
    return found
