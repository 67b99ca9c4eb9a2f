"""The words in which start-up tells what the teacher teaches, and until when."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_salt.config import ModelConfig, ParallelConfig, RunConfig, SaltConfig
from megatron_salt.salt.guidance.what_is_taught import lesson_lines

SOFT = "stage 1: soft labels in steps 1 to 3, with weight 0.667 and temperature 0.25"


@pytest.mark.parametrize("salt, expected", [
    (dict(), ()),
    (dict(teacher_load="t", kd_steps=3), (SOFT, "stage 1: the teacher is freed after step 3")),
    (dict(teacher_load="t", kd_steps=3, kd_stop="crossover"),
     (SOFT.replace("3,", "3 at most,"), "stage 1: the teacher is freed after step 3 at most")),
    (dict(teacher_load="t", kd_steps=3, kd_gate="rank:5", kd_weight_schedule=("1:0.9", "3:0.3"), kd_temperature_schedule=("1:1",)),
     (SOFT.replace("0.667", "1:0.9 3:0.3").replace("0.25", "1:1, for tokens inside --kd-gate rank:5"),
      "stage 1: the teacher is freed after step 3")),
    (dict(teacher_load="t", guide="hidden", let_steps=8, let_layer=2),
     (("stage 1: the teacher's last hidden states in steps 1 to 8, to layer 2 on pipeline stage 1, chunk 0, with weight 0.1 at first, "
      "linear"),
      "stage 1: the teacher is freed after step 8")),
    (dict(teacher_load="t", guide="both", kd_steps=3, let_steps=10, let_decay="step"),
     (SOFT, "stage 1: the teacher's last hidden states in steps 1 to 10, to layer 3 on pipeline stage 0, chunk 1, with weight 0.1",
      "stage 1: the teacher teaches to the last step")),
])  # fmt: skip
def test_start_up_tells_what_is_taught_and_until_when(salt: dict[str, Any], expected: tuple[str, ...]) -> None:
    model = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=2)
    parallel = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
    assert lesson_lines(RunConfig(model=model, parallel=parallel, salt=SaltConfig(**salt)), 10) == expected
