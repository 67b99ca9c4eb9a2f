"""The planner's answer as text: a table of memory by kind, the verdict, and what would help. Pure.

Only flags that the trainer would take help. Recomputing attention alone is not named: a GPU's attention keeps no scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_salt.config import ParallelConfig, RunConfig, flag
from megatron_salt.errors import UserError
from megatron_salt.model.precision import teacher_precision
from megatron_salt.model.precision_checks import refuse_precision, refuse_shapes
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.hardware import Hardware
from megatron_salt.planner.memory import ALLOWANCE_GIB, ALLOWANCE_SHARE, GIB, KINDS, Moment, PlannedMemory, usable_gib
from megatron_salt.planner.planned_run import RELEASES, PlannedRun
from megatron_salt.train.plan import RunPlan, check


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


def not_modelled() -> str:
    """What the figures leave out."""
    return (
        f"not modelled: fragmentation and memory of the driver ({ALLOWANCE_SHARE:.0%} of the card), CUDA's context, buffers of NCCL and "
        f"workspaces of cuBLAS and cuDNN ({ALLOWANCE_GIB:g} GiB)"
    )


def what_would_help(run: PlannedRun, memory: PlannedMemory) -> list[str]:
    """Flags that take memory from the largest kinds at the highest peak, the largest first. The trainer would take each of them."""
    rank = max(memory.stages, key=lambda rank: rank.most)
    moment = rank.stage1 if rank.stage1 is not None and rank.stage1.total == rank.most else rank.stage2
    largest = sorted(moment.bytes.items(), key=lambda item: -item[1])
    advice = _advice(run)
    return [
        f"{kind}, {size / GIB:.1f} GiB: {advice[kind]}" for kind, size in largest[:4] if advice.get(kind) and size > GIB / 100
    ]


def _advice(run: PlannedRun) -> dict[str, str]:
    """{kind: flags that make it smaller}; "" where no flag does."""
    parallel, plan, salt = run.config.parallel, run.plan, run.config.salt
    tensor, layers = parallel.tensor_model_parallel_size, run.config.model.num_layers
    rows = {} if parallel.sequence_parallel else {"sequence_parallel": True}
    split = _flags(run, parallel={"tensor_model_parallel_size": 2 * tensor} | rows)
    stages = range(parallel.pipeline_model_parallel_size + 1, layers + 1)
    deeper = next(filter(None, (_flags(run, parallel={"pipeline_model_parallel_size": count}) for count in stages)), "")
    micro, whole = "", ""
    if plan.micro_batch_size > 1:
        micro = _flags(run, training={"micro_batch_size": plan.micro_batch_size // 2})
    if parallel.recompute_granularity != "full":
        full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        whole = _flags(run, parallel=full)
    sequences = _flags(run, parallel=rows) if tensor > 1 and rows else ""
    sharded = "" if parallel.use_distributed_optimizer else _flags(run, parallel={"use_distributed_optimizer": True})
    body_split = _flags(run, salt={"teacher_tensor_model_parallel_size": 2 * salt.teacher_tensor_model_parallel_size})
    body_fp8 = "" if salt.teacher_fp8_format else _flags(run, salt={"teacher_fp8_format": "hybrid"})
    more = "more data-parallel ranks"
    return {
        "activations": _either(micro, whole, sequences, split),
        "parameters": _either(split, deeper),
        "gradients": _either(split, deeper),
        "optimizer": _either(more, split) if parallel.use_distributed_optimizer else _either(sharded, split),
        "head": _either("a smaller --loss-chunk-tokens", split),
        "teacher weights": _either(body_split, body_fp8),
        "teacher activations": "a smaller --teacher-micro-batch-size" if plan.teacher_merge > 1 else micro,
        "exchange": _either("a smaller --global-batch-size", more),
    }


def _either(*advice: str) -> str:
    return " or ".join(flags for flags in advice if flags)


def _flags(run: PlannedRun, **changes: dict[str, Any]) -> str:
    """The flags of {section: changed fields}; "" where the trainer would refuse them. Where these ranks cannot be split so, they name as
    many as keep the number of replicas."""
    given = [(flag(name), value) for fields in changes.values() for name, value in fields.items()]
    words = " ".join(name if value is True else f"{name} {value}" for name, value in given)
    try:
        config = replace(run.config, **{name: replace(getattr(run.config, name), **fields) for name, fields in changes.items()})
    except UserError:
        return ""
    parallel, now = config.parallel, run.layout.world_size
    more = run.layout.data * parallel.tensor_model_parallel_size * parallel.context_parallel_size
    more *= parallel.pipeline_model_parallel_size
    for ranks in dict.fromkeys((now, more)):
        try:
            _, plan = check(config, ranks)
            _check_machine(run, config, plan)
        except UserError:
            continue
        return words if ranks == now else f"{words} on {ranks} ranks"
    return ""


def _check_machine(run: PlannedRun, config: RunConfig, plan: RunPlan) -> None:
    """Refuse what GPU, shapes and teacher do not allow. Raises UserError."""
    training, hardware = config.training, Hardware(run.capability, **RELEASES)
    refuse_shapes(run.precision, config.model, config.parallel, training.seq_length, plan.micro_batch_size)
    if run.teacher is None:
        return
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.salt.teacher_tensor_model_parallel_size,
        pipeline_model_parallel_size=config.salt.teacher_pipeline_model_parallel_size,
    )
    check_shapes(run.teacher.model, parallel, training.seq_length)
    masks = config.data.reset_attention_mask
    precision = teacher_precision(config.salt, run.precision.implementation, run.capability, masks)
    refuse_precision(precision, hardware, training.bf16, config.parallel.use_distributed_optimizer)
    samples = plan.micro_batch_size * plan.teacher_merge
    refuse_shapes(precision, run.teacher.model, parallel, training.seq_length, samples)
