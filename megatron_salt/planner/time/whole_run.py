"""Hours and GPU-hours of the whole run, with and without SALT, and when the teacher pays. Estimates. Pure.

Three things that a plan cannot know are asked for, or left out: the tokens that the teacher was trained on, the share of all windows that
it scores for a selection, and the share of its steps at which SALT reaches the baseline's final figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_salt.data.blend import parse_valid_data_path
from megatron_salt.model.flops import flops_per_token, forward_flops_per_token
from megatron_salt.planner.planned_run import PlannedRun
from megatron_salt.planner.time.machine import Machine
from megatron_salt.planner.time.payback import runs_to_share
from megatron_salt.planner.time.roofline import RunTime, step_time

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What the flags say of the work before a run."""

    teacher_tokens: float | None
    """Tokens that the teacher was trained on; None: not said"""
    scored_share: float
    """Windows that are scored / samples of the run"""
    reached_at: float
    """Share of the baseline's steps at which SALT is supposed to reach its final figure"""


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """Hours of GPUs of a run and of its baseline."""

    steps: int
    ranks: int
    stage1: tuple[tuple[int, float], ...]
    """(steps, GPU-hours of a step) of the parts of stage 1 in their order, see `PlannedRun.stage1_parts`"""
    stage2_step: float
    """GPU-hours of a step of stage 2, or of the baseline"""
    scoring: float
    """GPU-hours of scoring as many windows as the run has samples"""
    scored_share: float
    """0 for a run without a selection"""
    teacher: float | None
    """GPU-hours of the teacher's training; None: its tokens are not known"""
    teacher_token: float
    """GPU-hours of a token in the teacher's training"""
    tokens: int
    """Tokens of the run"""

    @property
    def baseline(self) -> float:
        """GPU-hours of the same steps without a teacher."""
        return self.steps * self.stage2_step

    @property
    def salt(self) -> float:
        """GPU-hours of the run with its teacher, its preparation left out."""
        return self.until(self.steps)

    @property
    def scores(self) -> float:
        """GPU-hours of the scores of the selection."""
        return self.scoring * self.scored_share

    def until(self, step: float) -> float:
        """GPU-hours of the run with its teacher up to a step."""
        spent, left = 0.0, step
        for count, cost in self._parts:
            spent += min(left, count) * cost
            left -= min(left, count)
        return spent

    def break_even_step(self, preparation: float) -> float | None:
        """The step by which the run must reach the baseline's final figure to have cost no more, with GPU-hours of preparation; None
        where the preparation alone costs more than the baseline."""
        left = self.baseline - preparation
        if left < 0:
            return None
        step = 0.0
        for count, cost in self._parts:
            if left < count * cost:
                return step + left / cost
            step, left = step + count, left - count * cost
        raise AssertionError(step)

    @property
    def _parts(self) -> tuple[tuple[float, float], ...]:
        return (*self.stage1, (math.inf, self.stage2_step))

    def saved(self, reached_at: float) -> float:
        """GPU-hours that a run saves, scores and teacher left out, where it reaches the figure at this share of the steps."""
        return self.baseline - self.until(reached_at * self.steps)


def whole_run(run: PlannedRun, machine: Machine, times: RunTime, preparation: Preparation) -> WholeRun:
    """The run's hours. Its steps are those of the flags. Scores and the teacher's training take FLOPs alone, at the rates of the layers."""
    assert run.teacher is not None
    world, salt, length = run.layout.world_size, run.config.salt, run.config.training.seq_length
    tokens = run.plan.total_samples * length
    model, padded = run.teacher.model, run.config.model.padded_vocabulary_size(run.vocabulary_size)
    forward, whole = forward_flops_per_token(model, length, padded), flops_per_token(model, length, padded)
    teacher_token = whole / machine.rates.teacher_layers.flops / HOUR
    taught = preparation.teacher_tokens
    return WholeRun(
        steps=run.plan.total_steps, ranks=world, stage2_step=times.stage2.total * world / HOUR,
        stage1=tuple((steps, step_time(part, machine, taught=True).total * world / HOUR) for steps, part in run.stage1_parts()),
        scoring=tokens * forward / machine.rates.teacher_layers.flops / HOUR,
        scored_share=preparation.scored_share if salt.stage1_selection is not None else 0.0,
        teacher=None if taught is None else taught * teacher_token, teacher_token=teacher_token, tokens=tokens,
    )  # fmt: skip


def baseline_line(run: PlannedRun, times: RunTime) -> str:
    """The hours of a run without a teacher."""
    hours = run.plan.total_steps * times.stage2.total / HOUR
    return (
        f"{run.plan.total_steps} steps: about {hours:,.0f} h on {run.layout.world_size} GPUs, "
        f"{hours * run.layout.world_size:,.0f} GPU-hours"
    )


def evaluation_lines(run: PlannedRun, times: RunTime) -> list[str]:
    """The hours of evaluations on held-out sets; none for a run without."""
    training, data, steps = run.config.training, run.config.data, run.plan.total_steps
    sets = len(parse_valid_data_path(data.valid_data_path)) or (1 if data.valid_share else 0)
    if not sets * training.eval_iters:
        return []
    count = 1 + -(-steps // training.eval_interval)  # before the first step, at the interval, after the last
    hours = count * sets * training.eval_iters * times.evaluation / HOUR
    share = hours * HOUR / (steps * times.stage2.total)
    told = (
        f"evaluations: at most {hours:,.1f} h, {hours * run.layout.world_size:,.0f} GPU-hours ({share:.1%} of the baseline): {count} times "
        f"{training.eval_iters} batches of {sets} held-out set{'s' * (sets > 1)}; they are in no other figure"
    )
    return [told]


def whole_run_lines(whole: WholeRun, reached_at: float) -> list[str]:
    """Hours, and the economics of the teacher."""
    taught = sum(count for count, _ in whole.stage1)
    lines = [
        f"{name}, {whole.steps} steps: about {hours / whole.ranks:,.0f} h on {whole.ranks} GPUs, {hours:,.0f} GPU-hours{more}"
        for name, hours, more in (
            ("baseline", whole.baseline, ""),
            ("this run", whole.salt, f" ({whole.salt / whole.baseline - 1:+.1%}; {taught} steps of stage 1)"),
        )
    ]
    if whole.scored_share:
        lines.append(
            f"scores of all windows of the run: {whole.scoring:,.0f} GPU-hours; of a share of {whole.scored_share:g}: "
            f"{whole.scores:,.0f}, which saves {whole.scoring - whole.scores:,.0f} ({(whole.scoring - whole.scores) / whole.baseline:.1%} "
            "of the baseline)"
        )
    lines.append(_break_even(whole, "a teacher that is there already", whole.scores))
    if whole.teacher is not None:
        lines.append(
            _break_even(
                whole, f"a teacher trained for this run alone ({whole.teacher:,.0f} GPU-hours)", whole.scores + whole.teacher
            )
        )
    lines.append(_may_cost(whole, reached_at))
    return lines


def _break_even(whole: WholeRun, of: str, preparation: float) -> str:
    step = whole.break_even_step(preparation)
    if step is None:
        return f"break-even with {of}: none, its preparation costs more than the baseline"
    return (
        f"break-even with {of}: this run must reach the baseline's final figure by step {step:,.0f} of {whole.steps} "
        f"({step / whole.steps:.1%})"
    )


def _may_cost(whole: WholeRun, reached_at: float) -> str:
    """What the teacher's training may cost where SALT reaches the baseline's figure early."""
    beside = whole.saved(reached_at)
    head = f"if it reaches that at {reached_at:.0%} of the steps"
    if beside <= whole.scores:
        return f"{head}, it saves nothing: no teacher pays, however cheap"
    saved = beside - whole.scores
    tokens = saved / whole.teacher_token
    text = (
        f"{head}, the teacher's training may cost {saved:,.0f} GPU-hours ({saved / whole.baseline:.1%} of the baseline), about "
        f"{tokens:.3g} tokens ({tokens / whole.tokens:.1%} of the student's)"
    )
    if whole.teacher is None:
        return text
    number = runs_to_share(beside, whole.teacher + whole.scores)
    return f"{text}; with {whole.teacher:,.0f} GPU-hours it must be shared by at least {number} run{'s' if number != 1 else ''}"
