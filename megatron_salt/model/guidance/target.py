"""What a microbatch carries of a teacher, to the loss and to a layer of the student."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_salt.model.loss import SoftTarget


@dataclass(frozen=True)
class HiddenTarget:
    """A teacher's last hidden states for a batch, with which the output of a layer of the student is compared."""

    hidden: Tensor
    """[s/(cp*tp), b, h_t] in the student's dtype, after the teacher's final norm: this rank's slice of the sequence, also without
    sequence parallelism."""

    layer: int
    """Layer of the student, counted from 1."""

    weight: float
    """lambda, the weight of the term in the loss of a token, not negative."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The teacher's parts of a microbatch on this rank."""

    soft: SoftTarget | None = None
    """On the last stage, where the teacher gives soft labels."""

    hidden: HiddenTarget | None = None
    """On the stage that holds the guided layer, where the teacher gives hidden states."""


UNTAUGHT = Targets()
"""A microbatch without a teacher, and what ranks carry that need nothing of it."""
