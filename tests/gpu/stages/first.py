"""The stages of tests/gpu/first_run.py, the most valuable first, with limits for one H200."""

from __future__ import annotations

from tests.gpu.stages import head, kill, machine, pair, small_model
from tests.gpu.stages.runner import Stage

STAGES = [
    Stage("machine", 20, machine.describe),
    Stage("the head against float64", 60, head.exact),
    Stage("training as on a CPU", 30, small_model.training),
    Stage("a teacher as on a CPU", 30, small_model.teaching_stage),
    Stage("programs as on a CPU", 60, small_model.programs),
    Stage("0.8B with a teacher of 0.4B", 120, pair.both_stages),
    Stage("time of the head", 75, head.times),
    Stage("kill -9 in a write", 90, kill.killed_and_resumed),
    Stage("resuming", 30, small_model.resuming),
    Stage("a freed teacher's memory", 20, small_model.freeing),
    Stage("chunk sizes", 60, pair.chunk_sizes),
    Stage("an odd vocabulary", 45, pair.odd_vocabulary),
]
