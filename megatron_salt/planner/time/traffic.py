"""What the ranks of a run send in a step: bytes of each collective on each group, and the seconds that its link takes. Pure.

n: tokens of a microbatch on a context-parallel rank; h: hidden size; b: bytes of a number. A message of n h numbers is what a
tensor-parallel group has between two halves of a layer. What a rank sends is that of a ring: 2 (g - 1) / g of the message for an
all-reduce among g ranks, (g - 1) / g for an all-gather or a reduce-scatter. docs/planner.md has the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from megatron_salt.parallel.layout import Layout
from megatron_salt.planner.planned_run import PlannedRun
from megatron_salt.planner.static import GRADIENT_BYTES, stage_tensors, student_bytes
from megatron_salt.planner.time.machine import Machine
from megatron_salt.salt.cost import largest_share, recomputed_layers
from megatron_salt.salt.guidance.layer_place import stages_of_run
from megatron_salt.salt.routing import plan_exchange, teacher_layout

Phase = Literal["forward", "backward", "gradients", "parameters", "teacher", "exchange"]
"""When it is sent: by each pass of a microbatch, once a step, or in the teacher's part of stage 1."""


SUMS, SUMS_TAUGHT = 4, 12
"""Sums of a token's logits that the head gathers, without and with a teacher: those of `model/kernels/passes.py`."""


@cache
def first_group(layout: Layout, *varying: str) -> list[int]:
    """The ranks of the first group of a kind; the others lie alike."""
    return layout.groups(*varying)[0]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A collective of one rank."""

    group: str
    collective: str
    phase: Phase
    ranks: int
    """Ranks of the group"""
    message: float
    """Bytes of the whole message"""
    times: int
    """In a step"""
    link: float
    """Bytes/s of the group's link"""

    @property
    def sent(self) -> float:
        """Bytes that the rank sends in a step."""
        around = (self.ranks - 1) / self.ranks
        share = {"all-reduce": 2 * around, "all-gather": around, "reduce-scatter": around}.get(self.collective, 1.0)
        return share * self.message * self.times

    @property
    def seconds(self) -> float:
        """Seconds of the link in a step."""
        return self.sent / self.link


def student_transfers(run: PlannedRun, machine: Machine, stage: int, layers: int, *, taught: bool) -> list[Transfer]:
    """What the ranks of a pipeline stage send for the student in a step of stage 1 (taught) or stage 2."""
    per_pass = tensor_transfers(run, machine, stage, layers, taught=taught) + context_transfers(
        run, machine, layers, taught=taught
    )
    every = [*per_pass, *pipeline_transfers(run, machine, stage, taught=taught), *data_transfers(run, machine, stage)]
    return [one for one in every if one.ranks > 1 and one.times]


def microbatch_tokens(run: PlannedRun, taught: bool) -> int:
    """Tokens of a microbatch on a context-parallel rank."""
    samples = run.plan.micro_batch_size if taught else run.plan.stage2_micro_batch_size
    return samples * run.config.training.seq_length // run.layout.context


def microbatches(run: PlannedRun, taught: bool) -> int:
    """Microbatches of a replica in a step."""
    return (run.plan if taught else run.plan.in_stage2()).num_microbatches


def tensor_transfers(run: PlannedRun, machine: Machine, stage: int, layers: int, *, taught: bool) -> list[Transfer]:
    """Those of a tensor-parallel group: two halves of each layer, the embedding and the head."""
    layout, parallel, model = run.layout, run.config.parallel, run.config.model
    tokens, count = microbatch_tokens(run, taught), microbatches(run, taught)
    ranks, again = first_group(layout, "tp"), recomputed_layers(parallel, layers)
    hidden, gather, scatter = tokens * model.hidden_size * run.itemsize, "all-gather", "reduce-scatter"

    def one(collective: str, phase: Phase, message: float, times: int) -> Transfer:
        return Transfer(
            group="tp", collective=collective, phase=phase, ranks=layout.tensor, message=message, times=times * count,
            link=machine.link(ranks),
        )  # fmt: skip

    if parallel.sequence_parallel:  # backward gathers inputs once more, for the gradients of the weights
        body = [
            one(gather, "forward", hidden, 2 * layers), one(scatter, "forward", hidden, 2 * layers),
            one(gather, "backward", hidden, 4 * layers + 2 * again), one(scatter, "backward", hidden, 2 * layers + 2 * again),
        ]  # fmt: skip
    else:
        body = [
            one("all-reduce", "forward", hidden, 2 * layers),
            one("all-reduce", "backward", hidden, 2 * layers + 2 * again),
        ]
    if stage == 0:
        ends = [one(scatter, "forward", hidden, 1), one(gather, "backward", hidden, 1)]
        body += ends if parallel.sequence_parallel else [one("all-reduce", "forward", hidden, 1)]
    if stage == layout.pipeline - 1:  # the loss computes its gradient in the forward pass
        soft = run.head_teacher if taught else None
        body.append(one(gather, "forward", 4 * tokens * (SUMS if soft is None else SUMS_TAUGHT) * layout.tensor, 1))
        body += [one(gather, "forward", hidden, 1)] if parallel.sequence_parallel else []
        body.append(one(scatter if parallel.sequence_parallel else "all-reduce", "forward", hidden, 1))
        if soft is not None:
            body.append(one(gather, "forward", tokens * soft.model.hidden_size * run.itemsize, 1))
    return body


def context_transfers(run: PlannedRun, machine: Machine, layers: int, *, taught: bool) -> list[Transfer]:
    """Those of a context-parallel group: keys and values of the whole sequence, and their gradients."""
    layout, parallel, model = run.layout, run.config.parallel, run.config.model
    count, ranks = microbatches(run, taught), first_group(layout, "cp")
    width = 2 * model.head_width * model.query_groups // layout.tensor
    message = microbatch_tokens(run, taught) * layout.context * width * run.itemsize
    again = layers if parallel.recompute_granularity == "selective" else recomputed_layers(parallel, layers)
    ring = (
        run.precision.implementation == "transformer_engine"
    )  # it sends the keys and values around once more, and keeps its own

    def one(collective: str, phase: Phase, times: int) -> Transfer:
        return Transfer(
            group="cp", collective=collective, phase=phase, ranks=layout.context, message=message, times=times * count,
            link=machine.link(ranks),
        )  # fmt: skip

    return [
        one("all-gather", "forward", layers),
        one("all-gather", "backward", again + (layers if ring else 0)),
        one("reduce-scatter", "backward", layers),
    ]


def pipeline_transfers(run: PlannedRun, machine: Machine, stage: int, *, taught: bool) -> list[Transfer]:
    """Those between pipeline stages: hidden states of each chunk, and their gradients."""
    layout, chunks = run.layout, run.config.parallel.num_virtual_stages_per_pipeline_rank
    ranks = first_group(layout, "pp")
    count = microbatches(run, taught)

    def one(phase: Phase, times: int) -> Transfer:
        return Transfer(
            group="pp", collective="send", phase=phase, ranks=layout.pipeline, message=boundary_bytes(run, taught),
            times=times * count, link=machine.link(ranks),
        )  # fmt: skip

    return [one("forward", chunks - (stage == layout.pipeline - 1)), one("backward", chunks - (stage == 0))]


def boundary_bytes(run: PlannedRun, taught: bool) -> float:
    """Bytes of a microbatch's hidden states between two pipeline stages, on one rank."""
    own = microbatch_tokens(run, taught) * run.config.model.hidden_size * run.itemsize
    return own / run.layout.tensor if run.config.parallel.sequence_parallel else own


def data_transfers(run: PlannedRun, machine: Machine, stage: int) -> list[Transfer]:
    """Those of the data-parallel group, cp included: gradients in float32, and with the distributed optimizer the new parameters.

    With a pipeline the first and the last stage add the gradients of a weight that embedding and head share."""
    config, layout = run.config, run.layout
    tensors = stage_tensors(
        config.model, config.parallel, rows=run.rows, seq_length=config.training.seq_length, precision=run.precision
    )
    held = student_bytes(
        tensors[stage], config.parallel, layout, itemsize=run.itemsize, precision=run.precision, capability=run.capability
    )
    ranks = first_group(layout, "dp", "cp")

    def one(collective: str, phase: Phase, message: float) -> Transfer:
        return Transfer(
            group="dp", collective=collective, phase=phase, ranks=len(ranks), message=message, times=1, link=machine.link(ranks)
        )

    if config.parallel.use_distributed_optimizer:
        found = [
            one("reduce-scatter", "gradients", held["gradients"]),
            one("all-gather", "parameters", held["parameters"]),
        ]
    else:
        found = [one("all-reduce", "gradients", held["gradients"])]
    tied = not config.model.untie_embeddings_and_output_weights
    if tied and layout.pipeline > 1 and stage in (0, layout.pipeline - 1):
        ends = first_group(layout, "pp")
        found.append(
            Transfer(
                group="embedding", collective="all-reduce", phase="gradients", ranks=2,
                message=GRADIENT_BYTES * run.rows * config.model.hidden_size, times=1, link=machine.link([ends[0], ends[-1]]),
            )
        )  # fmt: skip
    return found


def teacher_transfers(run: PlannedRun, machine: Machine) -> list[Transfer]:
    """Those of the teacher in a step of stage 1, on the busiest rank: its layers, its pipeline, and the exchange of hidden states."""
    teacher = run.teacher
    if teacher is None:
        return []
    layout = planned_teacher_layout(run)
    plan, model = run.plan, teacher.model
    replicas = layout.data // run.layout.data
    tokens = plan.micro_batch_size * run.config.training.seq_length
    share = largest_share(plan.num_microbatches, plan.teacher_merge, replicas)
    message = tokens * model.hidden_size * run.itemsize  # of a microbatch; merged ones send as much together

    def one(group: str, collective: str, ranks: list[int], times: int) -> Transfer:
        return Transfer(
            group=group, collective=collective, phase="teacher", ranks=len(ranks), message=message, times=times * share,
            link=machine.link(ranks),
        )  # fmt: skip

    halves = 2 * -(-model.num_layers // layout.pipeline) + 1  # and the embedding
    exchange = plan_exchange(
        run.layout, layout, plan.num_microbatches, plan.teacher_merge, run.config.training.seq_length, stages_of_run(run.config)
    )
    block = first_group(run.layout, "tp", "cp", "pp")
    found = [
        one("teacher tp", "all-reduce", first_group(layout, "tp"), halves),
        one("teacher pp", "send", first_group(layout, "pp"), 1),
        Transfer(
            group="exchange", collective="all-to-all", phase="exchange", ranks=len(block), times=1, link=machine.link(block),
            message=_most_exchanged([exchange.send_sizes(place) for place in range(exchange.num_places)])
            * plan.micro_batch_size * model.hidden_size * run.itemsize,
        ),
    ]  # fmt: skip
    return [transfer for transfer in found if transfer.ranks > 1]


def planned_teacher_layout(run: PlannedRun) -> Layout:
    """The teacher over the student's ranks."""
    salt = run.config.salt
    return teacher_layout(run.layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)


def _most_exchanged(sizes: Sequence[Sequence[int]]) -> int:
    """Positions that the busiest place sends or receives, those that it keeps left out. sizes: [source][target]."""
    places = range(len(sizes))
    sent = [sum(row) - row[place] for place, row in enumerate(sizes)]
    received = [sum(sizes[source][place] for source in places) - sizes[place][place] for place in places]
    return max(max(sent), max(received))
