"""A picture of a plan: memory of each pipeline stage against the card, and when each stage computes in a step. PNG or SVG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_salt.files import whole_file
from megatron_salt.planner.memory import GIB, KINDS, Moment, PlannedMemory
from megatron_salt.planner.time.roofline import StepTime
from megatron_salt.planner.time.timeline import timeline

SUFFIXES = (".png", ".svg")
MICROBATCHES = 4
"""Microbatches a stage whose passes are drawn, at most"""
PHASES = {"teacher": "#9467bd", "exchange": "#8c564b", "forward": "#1f77b4", "backward": "#2ca02c"}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A stacked bar of memory."""

    label: str
    parts: tuple[tuple[str, float], ...]
    """(kind, GiB), from the bottom"""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A time in which a stage computes or sends. Between blocks it waits."""

    phase: str
    start: float
    seconds: float


def bars(memory: PlannedMemory) -> list[Bar]:
    """The peaks of both stages of SALT on each pipeline stage."""

    def bar(label: str, moment: Moment) -> Bar:
        return Bar(label=label, parts=tuple((kind, moment.bytes[kind] / GIB) for kind in KINDS if moment.bytes.get(kind)))

    result = []
    for rank in memory.stages:
        if rank.stage1 is not None:
            result.append(bar(f"pp {rank.pipeline_stage}\nstage 1", rank.stage1))
        result.append(bar(f"pp {rank.pipeline_stage}" + ("\nstage 2" if memory.stage1 else ""), rank.stage2))
    return result


def blocks(step: StepTime, num_microbatches: int) -> list[list[Block]]:
    """What each pipeline stage does in a step: the teacher, the exchange, and the student's passes of `num_microbatches` microbatches."""
    before = [Block(phase="teacher", start=0.0, seconds=step.teacher)] if step.teacher else []
    if step.exchange:
        before.append(Block(phase="exchange", start=step.teacher, seconds=step.exchange))
    begin = step.teacher + step.exchange
    return [
        before + [Block(phase=one.kind, start=begin + one.start, seconds=one.end - one.start) for one in passes]
        for passes in timeline([stage.chunks for stage in step.stages], num_microbatches, step.delay)
    ]


def drawn_microbatches(step: StepTime, num_microbatches: int) -> int:
    """So many microbatches that the picture shows the filling, the middle and the draining of the pipeline."""
    return min(num_microbatches, MICROBATCHES * len(step.stages))


def draw(
    memory: PlannedMemory, card_gib: float, usable: float, step: StepTime | None, num_microbatches: int, output: Path
) -> None:
    """Draw the picture; the suffix gives its format. step: None where no times are known. The file appears whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(
        1 if step is None else 2, figsize=(10, 5 if step is None else 9), layout="constrained", squeeze=False
    )
    _draw_memory(plots[0, 0], bars(memory), card_gib, usable)
    if step is not None:
        _draw_timeline(plots[1, 0], step, num_microbatches)
    with whole_file(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:].lower(), dpi=120)
    pyplot.close(figure)


def _draw_memory(axes: Any, stacks: list[Bar], card_gib: float, usable: float) -> None:
    from matplotlib import colormaps

    colours = {kind: colormaps["tab10"](number) for number, kind in enumerate(KINDS)}
    labelled: set[str] = set()
    for place, bar in enumerate(stacks):
        bottom = 0.0
        for kind, gib in bar.parts:
            axes.bar(place, gib, bottom=bottom, color=colours[kind], label=None if kind in labelled else kind)
            labelled.add(kind)
            bottom += gib
    axes.axhline(card_gib, color="black", linewidth=1, label="the card")
    axes.axhline(usable, color="black", linewidth=1, linestyle="--", label="less what is set aside")
    axes.set_xticks(range(len(stacks)), [bar.label for bar in stacks])
    axes.set_ylabel("GiB of the fullest rank")
    axes.set_title("Memory at the peak, unmeasured on a GPU")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")


def _draw_timeline(axes: Any, step: StepTime, num_microbatches: int) -> None:
    drawn = drawn_microbatches(step, num_microbatches)
    labelled: set[str] = set()
    rows = blocks(step, drawn)
    for row, stage in enumerate(rows):
        for block in stage:
            axes.barh(
                row, 1e3 * block.seconds, left=1e3 * block.start, height=0.8, color=PHASES[block.phase], edgecolor="white",
                linewidth=0.5, label=None if block.phase in labelled else block.phase,
            )  # fmt: skip
            labelled.add(block.phase)
    axes.set_yticks(range(len(rows)), [f"pp {row}" for row in range(len(rows))])
    axes.invert_yaxis()
    axes.set_xlabel("ms; a stage waits where nothing is drawn")
    more = "" if drawn == num_microbatches else f", {drawn} of {num_microbatches} microbatches of the student"
    axes.set_title(f"A step{' of stage 1' if step.teacher else ''}, estimated{more}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
