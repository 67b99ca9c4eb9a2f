"""Whether the runs of a study will have the figures that STUDY.yaml names. Pure.

A name that no run logs would be found out only after all of them.
"""

from __future__ import annotations

from collections.abc import Collection

from megatron_salt.config import RunConfig
from megatron_salt.data.blend import VALID, parse_valid_data_path
from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.study.definition.study import Figures, Study

OF_A_SET = ("loss", "perplexity", "accuracy", "bits_per_byte")


def refuse_unknown_figures(study: Study, config: RunConfig) -> None:
    """Raise UserError where the study names a figure that a run with `config` does not evaluate."""
    named = [("primary.figure", study.primary.figure)] if study.primary is not None else []
    for key in ("in_domain", "out_of_domain", "tasks"):
        figures = getattr(study.figures, key)
        if figures != getattr(Figures(), key):  # the default is no name that the user gave
            named += [(f"figures.{key}", figure) for figure in figures]
    known = known_figures(config)
    for where, figure in named:
        if figure.startswith("task/") and config.training.eval_tasks:
            continue  # names of tasks and their metrics stand in the task files
        if figure not in known:
            raise UserError(f"{where} {figure}: the runs have no such figure{_advice(figure, known, config)}")


def known_figures(config: RunConfig) -> tuple[str, ...]:
    """Names of the figures of held-out data that a run evaluates."""
    if not config.training.eval_iters:
        return ()
    sets = list(parse_valid_data_path(config.data.valid_data_path)) or ([VALID] if config.data.valid_share else [])
    return tuple(f"{name}/{figure}" for name in sets for figure in OF_A_SET)


def _advice(figure: str, known: Collection[str], config: RunConfig) -> str:
    if figure.startswith("task/"):
        return "; --eval-tasks names no task"
    if known:
        return f"{did_you_mean(figure, known)}; they have {', '.join(known)}"
    if not config.training.eval_iters:
        return ": --eval-iters is 0, so nothing is evaluated"
    return ": neither --valid-data-path nor --valid-share names held-out data"
