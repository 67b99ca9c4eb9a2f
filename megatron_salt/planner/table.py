"""The planner's answer as text: a table of memory by kind, and the verdict. Pure."""

from __future__ import annotations

from megatron_salt.planner.memory import ALLOWANCE_GIB, ALLOWANCE_SHARE, GIB, KINDS, Moment, PlannedMemory, usable_gib


def table(memory: PlannedMemory) -> list[str]:
    """A row for each kind of memory, two columns for each pipeline stage: the peaks of stage 1 and stage 2, GiB."""
    columns: list[tuple[str, Moment]] = []
    for rank in memory.stages:
        if rank.stage1 is not None:
            columns.append((f"pp {rank.pipeline_stage} stage 1", rank.stage1))
        columns.append((f"pp {rank.pipeline_stage} stage 2" if memory.stage1 else f"pp {rank.pipeline_stage}", rank.stage2))
    kinds = [kind for kind in KINDS if any(moment.bytes.get(kind) for _, moment in columns)]
    rows = [["GiB of a rank", *(name for name, _ in columns)]]
    rows += [[kind, *(f"{moment.bytes.get(kind, 0) / GIB:.2f}" for _, moment in columns)] for kind in kinds]
    rows.append(["at the peak", *(f"{moment.total / GIB:.2f}" for _, moment in columns)])
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines += [f"{name}: the peak is in the {moment.at}" for name, moment in columns]
    return lines


def verdict(memory: PlannedMemory, card_gib: float) -> tuple[bool, str]:
    """(whether the run fits a GPU, in one line)."""
    fits = memory.most / GIB <= usable_gib(card_gib)
    second = memory.stage2.stage2.total / GIB
    used = f"{second:.1f} of {card_gib:g} GiB"
    if memory.stage1 is not None and memory.stage1.stage1 is not None:
        used = f"{memory.stage1.stage1.total / GIB:.1f} of {card_gib:g} GiB in stage 1, {second:.1f} in stage 2"
    allowed = f"{card_gib - usable_gib(card_gib):.1f} GiB are set aside for what is not modelled"
    return fits, f"{'fits' if fits else 'does not fit'}: {used} ({allowed}; unmeasured)"


def not_modelled(guides_hidden: bool) -> str:
    """What the figures leave out. guides_hidden: whether the run has hidden-state guidance."""
    return (
        f"not modelled: fragmentation and memory of the driver ({ALLOWANCE_SHARE:.0%} of the card), CUDA's context, buffers of NCCL and "
        f"workspaces of cuBLAS and cuDNN ({ALLOWANCE_GIB:g} GiB)"
        + (", the term of the guided layer (nothing is set aside for it)" if guides_hidden else "")
    )
