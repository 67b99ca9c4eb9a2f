"""What a report says of a study beside its runs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.study.analysis.ledger import PreparationOf
from megatron_salt.study.definition.study import Figures, PrimaryQuestion


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """A study as its report needs it."""

    name: str
    primary: PrimaryQuestion | None
    """The one question that stands in STUDY.yaml; None: all of the study is exploratory"""
    figures: Figures
    preparation_of: PreparationOf
    definition: str
    """Text of STUDY.yaml"""
    machine: tuple[str, ...]
    """Lines about the machine and the versions of its libraries, see `this_machine`"""
