"""Which rank runs the teacher on which microbatch, and which positions of the hidden states each rank sends to which rank.

Soft labels need them on the student's last stage, hidden-state guidance on the stage of the guided layer. A stage that needs them for both
gets them once.

The ranks of one student data-parallel replica are a block, in (pp, cp, tp) order, tp fastest. A rank's index in its block is its place.
The block hosts R teacher replicas at coordinates (replica, pp, tp), tp fastest, over the same places. Nothing leaves a block.
This is arithmetic on ints: every rank computes the same plan once, and `salt/teacher.py` carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from megatron_salt.errors import UserError
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
    """Warnings about layouts that are allowed and cost time. num_forwards: teacher forwards of a block in one step."""
    messages, replicas = [], teacher.data // student.data
    if num_forwards % replicas:
        messages.append(
            f"the {num_forwards} teacher forwards of a step are not a multiple of the {replicas} teacher replicas of a block: "
            f"some idle while others run the last of {-(-num_forwards // replicas)}"
        )
    near = {rank: number for number, group in enumerate(student.groups("tp", "cp")) for rank in group}
    torn = [group for group in teacher.groups("tp") if len({near[rank] for rank in group}) > 1]
    if torn:
        more = f" (and {len(torn) - 1} more such groups)" if torn[1:] else ""
        messages.append(
            f"the teacher's tensor-parallel group of ranks {torn[0]}{more} spans more than one tp x cp group of the student, "
            f"whose ranks may sit on several nodes: --teacher-tensor-model-parallel-size {teacher.tensor} against "
            f"--tensor-model-parallel-size {student.tensor} x --context-parallel-size {student.context}"
        )
    return messages


@dataclass(frozen=True)
class Piece:
    """A slice of one microbatch's hidden states, which one place of the block sends to another, or to itself."""

    microbatch: int
    source: int
    target: int
    positions: tuple[slice, ...]
    """Positions of the sequence. The slice is their concatenation, in this order."""


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """The teacher forwards and the exchange of one block in one step. The same in every block, on every rank and in every step."""

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
    """Sorted by source, then target, then microbatch: the order of the values in every send and receive buffer."""

    @property
    def num_forwards(self) -> int:
        """Teacher forwards of the block in one step."""
        return -(-self.num_microbatches // self.merge)

    def forwards_of(self, replica: int) -> list[int]:
        """Numbers of the forwards that a teacher replica runs. There may be none."""
        assert 0 <= replica < self.num_replicas, (replica, self.num_replicas)
        return list(range(replica, self.num_forwards, self.num_replicas))

    def microbatches_of(self, forward: int) -> range:
        """The consecutive microbatches of one forward. The last forward may have fewer than the others."""
        assert 0 <= forward < self.num_forwards, (forward, self.num_forwards)
        return range(forward * self.merge, min((forward + 1) * self.merge, self.num_microbatches))

    def sent_by(self, place: int) -> list[Piece]:
        """The pieces that a place sends, in the order of its send buffer: by target, then microbatch."""
        return [piece for piece in self.pieces if piece.source == place]

    def received_by(self, place: int) -> list[Piece]:
        """The pieces that a place receives, in the order of its receive buffer: by source, then microbatch."""
        return [piece for piece in self.pieces if piece.target == place]

    def send_sizes(self, place: int) -> list[int]:
        """How many positions a place sends to each place of the block. Times samples times hidden size: split sizes in elements."""
        return self._positions[place].tolist()

    def receive_sizes(self, place: int) -> list[int]:
        """How many positions a place receives from each place of the block."""
        return self._positions[:, place].tolist()

    @property
    def peak_positions(self) -> int:
        """Positions that the fullest place holds at one time. Times samples times hidden size: elements.

        First they are those that it computed and their copy in the send buffer, then that copy and those that it receives. A block of one
        place keeps what it computed, without a copy.
        """
        sent, received = self._positions.sum(1), self._positions.sum(0)
        return int(sent.max() if self.num_places == 1 else np.maximum(2 * sent, sent + received).max())

    @cached_property
    def _positions(self) -> np.ndarray:
        """int64 [source, target]: positions that one place sends to another."""
        table = np.zeros((self.num_places, self.num_places), np.int64)
        for piece in self.pieces:
            table[piece.source, piece.target] += self.piece_length
        return table


@cache
def plan_exchange(
    student: Layout, teacher: Layout, num_microbatches: int, merge: int, seq_length: int, stages: frozenset[int] | None = None
) -> ExchangePlan:
    """The plan of every block. Raises UserError, naming --seq-length, where the sequence cannot be cut.

    merge: microbatches of one teacher forward. Forward f takes microbatches [f * merge, (f + 1) * merge) and runs on replica f mod R.
    stages: pipeline stages of the student that need the hidden states; None: the last one, for soft labels.
    Receiver: rank (tp j, cp c) of each of these stages. It gets slice j, of tp equal slices, of the positions that cp rank c holds.
    Sender: tp rank (j + c * tp) mod ttp of the teacher's last stage. All tp ranks there hold the full hidden states and take turns.
    """
    tp, cp, ttp, tpp = student.tensor, student.context, teacher.tensor, teacher.pipeline
    check_sequence(student, seq_length)
    replicas = teacher.data // student.data
    pieces = [
        Piece(
            microbatch,
            source=(j + c * tp) % ttp + ttp * (tpp - 1 + tpp * (microbatch // merge % replicas)),
            target=j + tp * (c + cp * stage),
            positions=tuple(received_positions(student, seq_length, c, j)),
        )
        for stage in (frozenset({student.pipeline - 1}) if stages is None else stages)
        for microbatch in range(num_microbatches) for c in range(cp) for j in range(tp)
    ]  # fmt: skip
    return ExchangePlan(
        num_microbatches=num_microbatches,
        merge=merge,
        num_replicas=replicas,
        num_places=tp * cp * student.pipeline,
        piece_length=seq_length // (tp * cp),
        pieces=tuple(sorted(pieces, key=lambda piece: (piece.source, piece.target, piece.microbatch))),
    )


def received_positions(student: Layout, seq_length: int, cp_rank: int, tp_rank: int) -> list[slice]:
    """Positions of a sequence whose hidden states a rank takes, in its order, on every stage that takes them."""
    return _cut(context_slice(seq_length, student.context, cp_rank), tp_rank, student.tensor)


def check_sequence(student: Layout, seq_length: int) -> None:
    """Raise UserError unless a sequence can be cut into equal slices, one for each rank of a tp x cp group."""
    if seq_length % (student.context * student.tensor):
        raise UserError(
            f"--seq-length {seq_length} is not divisible by --context-parallel-size x --tensor-model-parallel-size (with a teacher) "
            f"= {student.context * student.tensor}"
        )


def _cut(slices: list[slice], part: int, parts: int) -> list[slice]:
    """Cut the concatenation of the slices into `parts` equal parts, and return part `part` of it, as slices of the sequence."""
    length = sum(piece.stop - piece.start for piece in slices) // parts
    begin, end, cut = part * length, (part + 1) * length, []
    for piece in slices:
        start, stop = piece.start + max(begin, 0), min(piece.start + end, piece.stop)
        if start < stop:
            cut.append(slice(start, stop))
        begin, end = begin - (piece.stop - piece.start), end - (piece.stop - piece.start)
    return cut
