"""What the planner says of memory: bytes of one rank by kind, at the moments when it holds most. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30

KINDS = {
    "parameters": "the student's weights",
    "gradients": "float32 sums of gradients",
    "optimizer": "float32 main parameters and both moments of AdamW, this rank's share",
    "fp8 copies": "FP8 copies of the student's weights, kept between microbatches",
    "activations": "what the student's layers keep for the backward pass, and what they compute with",
    "head": "logits and gradients of the output head",
    "teacher weights": "the teacher's layers, and its output weight on the student's last pipeline stage",
    "teacher activations": "what the teacher's forward pass computes with",
    "exchange": "the teacher's last hidden states, and their copies while they are sent",
    "microbatches": "tokens, labels, masks and positions of a step",
}
"""The kinds of memory, in the order of tables."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The memory of one rank at one moment of a step."""

    at: str
    """Which moment, in words"""
    bytes: Mapping[str, int]
    """{kind of `KINDS`: bytes}; a kind that is not there takes none"""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The peaks of one rank."""

    pipeline_stage: int
    place: int
    """Its number in its block, the ranks of one replica of the student"""
    stage1: Moment | None
    """The peak of a step with a teacher; None without a teacher"""
    stage2: Moment
    """The peak of a step without a teacher"""

    @property
    def most(self) -> int:
        """Bytes of the higher peak."""
        return max(self.stage2.total, 0 if self.stage1 is None else self.stage1.total)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Host memory of the saves, bytes of one rank."""

    staged: int
    """What a save in the background copies from the device before training goes on; 0 without --async-save"""
    gathered: int
    """What a save that loads under any layout gathers: the last one and those of --save-at; 0 where nothing is gathered"""

    @property
    def most(self) -> int:
        """Bytes of the larger save."""
        return max(self.staged, self.gathered)


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """The memory of a run: the fullest rank of each pipeline stage."""

    stages: tuple[RankMemory, ...]
    """One rank for each pipeline stage, in order"""
    host: HostMemory

    @property
    def stage1(self) -> RankMemory | None:
        """The rank with the highest peak of stage 1; None without a teacher."""
        taught = [(rank.stage1.total, -number) for number, rank in enumerate(self.stages) if rank.stage1 is not None]
        return self.stages[-max(taught)[1]] if taught else None

    @property
    def stage2(self) -> RankMemory:
        """The rank with the highest peak of stage 2."""
        return max(self.stages, key=lambda rank: rank.stage2.total)

    @property
    def most(self) -> int:
        """Bytes of the highest peak of any rank."""
        return max(rank.most for rank in self.stages)


ALLOWANCE_SHARE, ALLOWANCE_GIB = 0.03, 2.0
"""What is set aside for what is not modelled: a share of the card for fragmentation and memory that the driver keeps, and GiB for CUDA's
context, the buffers of NCCL's communicators and the workspaces of cuBLAS and cuDNN. Our choice; nothing was measured."""


def usable_gib(card_gib: float) -> float:
    """GiB of a card that a run may use by this plan."""
    return card_gib * (1 - ALLOWANCE_SHARE) - ALLOWANCE_GIB
