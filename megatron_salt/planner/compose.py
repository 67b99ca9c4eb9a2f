"""The memory of a run: what every rank of a replica holds, and the peaks of a step in both stages, from traces of its parts. Pure.

A step of stage 1 has a teacher's forward pass, an exchange, the student's passes and the optimizer. Each is a moment with a peak of its
own; the highest counts.
"""

from __future__ import annotations

from collections import Counter

from megatron_salt.config import ParallelConfig
from megatron_salt.parallel.layout import Layout
from megatron_salt.planner.chunk_memory import ACTIVATIONS, Bytes, ChunkMemory, chunk_memory, chunks_of_stage, in_fp8
from megatron_salt.planner.memory import HostMemory, Moment, PlannedMemory, RankMemory
from megatron_salt.planner.planned_run import PlannedRun, PlannedTeacher
from megatron_salt.planner.schedule import passes
from megatron_salt.planner.static import microbatch_bytes, stage_tensors, student_bytes, teacher_body_bytes
from megatron_salt.planner.trace import ChunkTrace, Traces
from megatron_salt.salt.guidance.layer_place import stages_of_run
from megatron_salt.salt.routing import plan_exchange, teacher_layout


def compose(run: PlannedRun, traces: Traces, host: HostMemory) -> PlannedMemory:
    """The fullest rank of each pipeline stage."""
    held = _held(run)
    stage2 = [_steps(run, traces, held, stage, taught=False) for stage in range(run.layout.pipeline)]
    ranks = []
    taught = _taught(run, traces, held)
    for stage in range(run.layout.pipeline):
        places = [place for place in range(run.layout.world_size // run.layout.data) if _stage_of(run.layout, place) == stage]
        peaks = [
            RankMemory(pipeline_stage=stage, place=place, stage1=taught.get(place), stage2=stage2[stage]) for place in places
        ]
        ranks.append(max(peaks, key=lambda rank: (rank.most, 0 if rank.stage1 is None else rank.stage1.total, -rank.place)))
    return PlannedMemory(stages=tuple(ranks), host=host)


def held_bytes(run: PlannedRun) -> int:
    """Bytes that the fullest pipeline stage holds of the student through all of a step. No trace is needed."""
    return max(held.total() for held in _held(run))


def _stage_of(layout: Layout, place: int) -> int:
    """The student's pipeline stage at a place of a block."""
    return place // (layout.tensor * layout.context)


def _held(run: PlannedRun) -> list[Bytes]:
    """What a rank of each pipeline stage holds of the student through all of a step, by kind."""
    config = run.config
    tensors = stage_tensors(
        config.model, config.parallel, rows=run.rows, seq_length=config.training.seq_length, precision=run.precision
    )
    samples = run.plan.num_microbatches * run.plan.micro_batch_size
    batches = microbatch_bytes(
        samples, config.training.seq_length, run.layout.context, documents=config.data.reset_attention_mask
    )
    return [
        Counter(
            student_bytes(
                stage, config.parallel, run.layout, itemsize=run.itemsize, precision=run.precision, capability=run.capability
            )
            | {"microbatches": batches}
        )
        for stage in tensors
    ]


def _steps(run: PlannedRun, traces: Traces, held: list[Bytes], stage: int, *, taught: bool) -> Moment:
    """The peak of the student's passes on a pipeline stage."""
    config, layout = run.config, run.layout
    requests = run.student_requests(taught)
    tokens = next(iter(requests.values())).samples * config.training.seq_length // layout.context
    tensors = stage_tensors(
        config.model, config.parallel, rows=run.rows, seq_length=config.training.seq_length, precision=run.precision
    )
    share = tensors[stage].quantized_layers / tensors[stage].layers
    memories, kept = [], 0
    for chunk in chunks_of_stage(config.model, config.parallel, stage):
        ends = (True, True) if layout.pipeline == 1 else (not chunk.last, chunk.last)
        trace = in_fp8(traces.student[requests[ends]], config.model, config.parallel, run.precision, tokens, share)
        kept = max(kept, trace.kept)
        memories.append(chunk_memory(chunk, trace, config.parallel, frees_outputs=run.device == "cuda"))
    plan = run.plan if taught else run.plan.in_stage2()
    at, peak = _highest(memories, config.parallel, stage, plan.num_microbatches)
    peak[ACTIVATIONS] += kept
    return Moment(at=at, bytes=held[stage] + peak)


def _highest(memories: list[ChunkMemory], parallel: ParallelConfig, stage: int, num_microbatches: int) -> tuple[str, Bytes]:
    """(when, bytes by kind) at the peak of a step's passes."""
    in_flight: Bytes = Counter()
    highest, at = Bytes(), "before the first pass"
    for one in passes(stage, parallel.pipeline_model_parallel_size, len(memories), num_microbatches):
        memory = memories[one.chunk]
        if one.kind == "backward":
            in_flight.subtract(memory.kept)
        now = Bytes(in_flight)
        now.update(memory.forward if one.kind == "forward" else memory.backward)
        if now.total() > highest.total():
            highest, at = now, f"student's {one.kind} pass"
        if one.kind == "forward":
            in_flight.update(memory.kept)
    return at, highest


def _taught(run: PlannedRun, traces: Traces, held: list[Bytes]) -> dict[int, Moment]:
    """{place of a block: peak of a step of stage 1}; empty without a teacher."""
    teacher, salt, training = run.teacher, run.config.salt, run.config.training
    if teacher is None or traces.teacher is None:
        return {}
    layout = teacher_layout(run.layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)
    stages = stages_of_run(run.config)
    exchange = plan_exchange(run.layout, layout, run.plan.num_microbatches, run.plan.teacher_merge, training.seq_length, stages)
    position = run.plan.micro_batch_size * teacher.model.hidden_size * run.itemsize
    body = _teacher_weights(run, teacher)
    steps = [_steps(run, traces, held, stage, taught=True) for stage in range(run.layout.pipeline)]
    kept = traces.teacher.kept if run.loads_teacher_layers else 0
    moments = {}
    for place in range(exchange.num_places):
        stage = _stage_of(run.layout, place)
        own = _teacher_stage(layout, run.layout, place)
        weights = body[own] if run.loads_teacher_layers else 0
        if stage == run.layout.pipeline - 1 and run.head_teacher is not None:
            weights += run.rows * teacher.model.hidden_size * run.itemsize
        always: Bytes = held[stage] + Counter({"teacher weights": weights})
        alone = exchange.num_places == 1
        sent = sum(exchange.send_sizes(place)) * position
        received = sent if alone else sum(exchange.receive_sizes(place)) * position
        working = _teacher_activations(traces.teacher, own, layout.pipeline)
        at_exchange = sent if alone else max(2 * sent, sent + received)
        # The student's step holds the microbatches of all kinds beside what the teacher sent, or the cache held.
        of_student = Moment(
            at=steps[stage].at,
            bytes=Counter(steps[stage].bytes)
            + Counter({"teacher weights": weights, "teacher activations": kept, "exchange": received}),
        )
        if not run.loads_teacher_layers:
            moments[place] = of_student
            continue
        moments[place] = max(
            (
                Moment(at="teacher's forward pass", bytes=always + Counter({"teacher activations": working, "exchange": sent})),
                Moment(
                    at="exchange of hidden states",
                    bytes=always + Counter({"teacher activations": kept, "exchange": at_exchange}),
                ),
                of_student,
            ),
            key=lambda moment: moment.total,
        )
    return moments


def _teacher_weights(run: PlannedRun, teacher: PlannedTeacher) -> list[int]:
    """Bytes of the teacher's layers on a rank of each of its pipeline stages."""
    salt, model = run.config.salt, teacher.model
    parallel = ParallelConfig(
        tensor_model_parallel_size=salt.teacher_tensor_model_parallel_size,
        pipeline_model_parallel_size=salt.teacher_pipeline_model_parallel_size,
    )
    stages = stage_tensors(
        model, parallel, rows=model.padded_vocabulary_size(teacher.vocabulary_size) // parallel.tensor_model_parallel_size,
        seq_length=run.config.training.seq_length, precision=teacher.precision, has_head=False,
    )  # fmt: skip
    return [teacher_body_bytes(stage, run.itemsize, teacher.precision) for stage in stages]


def _teacher_stage(teacher: Layout, student: Layout, place: int) -> int:
    """The teacher's pipeline stage at a place of the first block. Replicas of the teacher follow one another; tp is fastest."""
    return place // teacher.tensor % teacher.pipeline


def _teacher_activations(trace: ChunkTrace, stage: int, stages: int) -> int:
    """The most bytes that a forward pass takes on a stage of the teacher."""
    levels = [trace.before_layer + trace.layer.peak]
    if stage == 0:
        levels.append(trace.embedding.peak)
    if stage == stages - 1:
        levels.append(trace.before_layer + trace.head.peak)
    return trace.kept + max(levels)
