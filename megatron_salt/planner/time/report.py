"""The estimated times as text. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_salt.planner.memory import GIB
from megatron_salt.planner.planned_run import PlannedRun
from megatron_salt.planner.time.machine import Machine
from megatron_salt.planner.time.roofline import RunTime, StepTime
from megatron_salt.planner.time.traffic import Transfer


def time_lines(run: PlannedRun, machine: Machine, times: RunTime) -> list[str]:
    """The times of a step, its stages, its transfers and the teacher's cost."""
    world = run.layout.world_size
    lines = [f"times are estimates, no GPU has confirmed them: {machine.stated}"]
    taught = times.stage1 is not None
    for name, step in (("a step of stage 1", times.stage1), ("a step of stage 2" if taught else "a step", times.stage2)):
        if step is not None:
            lines.append(_step_line(name, step, times, machine, world))
    lines += _columns(_stage_rows(times))
    lines += _columns(_transfer_rows(times))
    if times.stage1 is not None and times.balance is not None:
        ratio = times.stage1.total / times.stage2.total
        flops = times.teacher_flops / times.model_flops
        lines.append(
            f"a step of stage 1 takes {ratio:.3f} x one of stage 2 with communication and bubbles; the teacher adds {flops:.1%} to the "
            "student's FLOPs"
        )
        lines += [f"start-up will say: {line}" for line in times.balance.lines()]
    return lines


def _step_line(name: str, step: StepTime, times: RunTime, machine: Machine, world: int) -> str:
    parts = [
        ("teacher", step.teacher), ("exchange", step.exchange), ("student", step.passes - step.bubble), ("bubble", step.bubble),
        ("gradients and parameters", step.gradients), ("optimizer", step.update),
    ]  # fmt: skip
    shown = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts if seconds >= 0.0005)
    rate, mfu = times.tokens / step.total, times.model_flops / step.total / world / machine.peak_flops
    return (
        f"{name}: about {step.total:.3f} s ({shown}); {rate:,.0f} tokens/s, {rate / world:,.0f} a GPU, MFU {mfu:.1%} of the "
        "student's FLOPs"
    )


def _stage_rows(times: RunTime) -> list[list[str]]:
    """A row for each pipeline stage, with the rank that is busiest there."""
    rows = [["stage of the pipeline", "layers", "TFLOP a step", "ms forward", "ms backward", "s on links"]]
    for name, step in (("stage 1", times.stage1), ("stage 2" if times.stage1 else "", times.stage2)):
        for number, stage in enumerate(() if step is None else step.stages):
            forward, backward = (
                sum(chunk.forward for chunk in stage.chunks),
                sum(chunk.backward for chunk in stage.chunks),
            )
            rows.append(
                [f"pp {number} {name}".rstrip(), str(stage.layers), f"{stage.flops / 1e12:.1f}", f"{1e3 * forward:.2f}",
                 f"{1e3 * backward:.2f}", f"{sum(one.seconds for one in stage.transfers):.3f}"]
            )  # fmt: skip
    return rows


def _transfer_rows(times: RunTime) -> list[list[str]]:
    """A row for each group and collective: what the rank that sends most sends in a step, over all stages."""
    rows = [["group", "collective", "for", "ranks", "MiB each", "times a step", "GiB sent", "s"]]
    busiest: dict[tuple[str, str, str], Transfer] = {}
    first = times.stage2 if times.stage1 is None else times.stage1
    for stage in first.stages:
        for total in added(stage.transfers):
            key = (total.group, total.collective, total.phase)
            if key not in busiest or busiest[key].sent < total.sent:
                busiest[key] = total
    rows += [
        [one.group, one.collective, one.phase, str(one.ranks), f"{one.message / 2**20:.2f}", str(one.times),
         f"{one.sent / GIB:.2f}", f"{one.seconds:.3f}"]
        for one in [*busiest.values(), *times.teacher_transfers]
    ]  # fmt: skip
    return rows if rows[1:] else []


def added(transfers: Sequence[Transfer]) -> list[Transfer]:
    """Transfers of one group, collective and phase as one, with their mean message."""
    grouped: dict[tuple[str, str, str], list[Transfer]] = {}
    for one in transfers:
        grouped.setdefault((one.group, one.collective, one.phase), []).append(one)
    result = []
    for parts in grouped.values():
        times = sum(one.times for one in parts)
        first = parts[0]
        result.append(
            Transfer(
                group=first.group, collective=first.collective, phase=first.phase, ranks=first.ranks, times=times, link=first.link,
                message=sum(one.message * one.times for one in parts) / times,
            )
        )  # fmt: skip
    return result


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, the first column to the left and the others to the right."""
    if not rows:
        return []
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
