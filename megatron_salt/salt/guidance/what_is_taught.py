"""What the teacher of a run teaches, and until when, in words. Pure."""

from __future__ import annotations

from megatron_salt.config import RunConfig
from megatron_salt.salt.guidance.layer_place import guided_layer


def lesson_lines(config: RunConfig, total_steps: int) -> tuple[str, ...]:
    """Lines for the user; none without a teacher. total_steps: of the run. Raises UserError where the guided layer does not exist."""
    salt, lines = config.salt, []
    if salt.teacher_load is None or salt.stage1_steps is None:
        return ()
    at_most = " at most" if salt.kd_stop == "crossover" else ""
    if salt.kd_steps is not None:
        weight, temperature = (
            f"{value:g}" if not schedule else " ".join(schedule)
            for value, schedule in (
                (salt.kd_weight, salt.kd_weight_schedule),
                (salt.kd_teacher_temperature, salt.kd_temperature_schedule),
            )
        )
        gate = "" if salt.kd_gate == "none" else f", for tokens inside --kd-gate {salt.kd_gate}"
        lines.append(
            f"stage 1: soft labels in steps 1 to {min(salt.kd_steps, total_steps)}{at_most}, with weight {weight} and "
            f"temperature {temperature}{gate}"
        )
    guided = guided_layer(salt, config.model, config.parallel)
    if guided is not None and salt.let_steps is not None:
        chunk = "" if config.parallel.virtual_stages is None else f", chunk {guided.place.chunk}"
        fall = f" at first, {salt.let_decay}" if salt.let_decay == "linear" else ""
        lines.append(
            f"stage 1: the teacher's last hidden states in steps 1 to {min(salt.let_steps, total_steps)}, to layer {guided.layer} on "
            f"pipeline stage {guided.place.stage}{chunk}, with weight {salt.let_weight:g}{fall}"
        )
    end = f"is freed after step {salt.stage1_steps}{at_most}" if salt.stage1_steps < total_steps else "teaches to the last step"
    return (*lines, f"stage 1: the teacher {end}")
