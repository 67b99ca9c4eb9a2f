"""Builds the teacher of a run over the student's ranks, and says what it costs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta

from megatron_salt.cards import Products
from megatron_salt.config import ModelConfig, RunConfig
from megatron_salt.config.teaching import gate_kind
from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import Look, UserError
from megatron_salt.model.kernels.passes import kernels_for
from megatron_salt.model.loss_chunk import chunk_tokens
from megatron_salt.model.precision import Precision
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.hardware import GIB
from megatron_salt.parallel.layout import Layout
from megatron_salt.salt.cost import Prediction, predict
from megatron_salt.salt.device_rates import LayerShape, find_rates
from megatron_salt.salt.guidance.layer_place import guided_layer, stages_of_run
from megatron_salt.salt.head_cost import HeadShape
from megatron_salt.salt.load_teacher import Admitted, admit, refuse_trainable
from megatron_salt.salt.routing import layout_warnings, plan_exchange, teacher_layout
from megatron_salt.salt.schedule import is_tempered
from megatron_salt.salt.teacher import TeacherHead
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint
from megatron_salt.train.build_model import dtype_of
from megatron_salt.train.plan import RunPlan
from megatron_salt.train.step import Student

log = logging.getLogger(__name__)


def refuse_large_exchange(config: RunConfig, plan: RunPlan, layout: Layout, teacher: ModelConfig) -> float:
    """GiB that the exchange of the teacher's hidden states takes in a step, on the rank where it takes most. Pure.

    That is the first step, in which everything is taught. Raises UserError where that is above --teacher-exchange-max-gib.
    """
    salt, training = config.salt, config.training
    size, hidden = dtype_of(training).itemsize, teacher.hidden_size
    taught = teacher_layout(layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)
    stages = stages_of_run(config)
    exchanged = plan_exchange(layout, taught, plan.num_microbatches, plan.teacher_merge, training.seq_length, stages)
    positions = exchanged.peak_positions
    exchange = positions * plan.micro_batch_size * hidden * size / GIB
    if exchange > salt.teacher_exchange_max_gib:
        raise UserError(
            f"the teacher's hidden states of a step would take {exchange:.3f} GiB on one rank ({positions} positions, counted with "
            f"their copies for the exchange, x {plan.micro_batch_size} samples x {hidden} x {size} bytes; a replica has "
            f"{plan.num_microbatches} microbatches of {training.seq_length} tokens on tp {layout.tensor} x cp {layout.context} x pp "
            f"{layout.pipeline}), more than --teacher-exchange-max-gib {salt.teacher_exchange_max_gib:g}"
        )
    return exchange


def predict_cost(
    config: RunConfig, plan: RunPlan, teacher: ModelConfig, vocabulary_size: int, precision: Precision
) -> Prediction:
    """The cost of stage 1 on this rank's device, whose rates `find_rates` gives. Not collective. precision: the teacher's."""
    salt, parallel, training, model = config.salt, config.parallel, config.training, config.model
    tensor = parallel.tensor_model_parallel_size
    own: Products = "bf16" if training.bf16 else "fp32"
    dtype, rows = dtype_of(training), model.padded_vocabulary_size(vocabulary_size) // tensor
    chunk = chunk_tokens(training, rows, current_device().type)
    head = HeadShape(
        rows=rows, hidden=model.hidden_size, teacher_hidden=teacher.hidden_size,
        tokens=plan.micro_batch_size * training.seq_length // parallel.context_parallel_size, chunk_tokens=chunk,
        itemsize=dtype.itemsize, kernels=kernels_for(current_device()) is not None,
        tempered=is_tempered(salt), gate=gate_kind(salt.kd_gate),
    )  # fmt: skip
    student = LayerShape(
        hidden=model.hidden_size, width=model.ffn_width * (1 + model.swiglu) // tensor,
        products="fp8" if config.quantization.fp8_format is not None else own,
    )  # fmt: skip
    taught = LayerShape(
        hidden=teacher.hidden_size, width=teacher.ffn_width * (1 + teacher.swiglu) // salt.teacher_tensor_model_parallel_size,
        products="fp8" if precision.fp8_format is not None else own,
    )  # fmt: skip
    return predict(
        model, parallel, teacher, teacher_tensor=salt.teacher_tensor_model_parallel_size,
        teacher_pipeline=salt.teacher_pipeline_model_parallel_size, num_microbatches=plan.num_microbatches,
        microbatch_tokens=plan.micro_batch_size * training.seq_length, merge=plan.teacher_merge, seq_length=training.seq_length,
        head=head, fused_layers=precision.implementation == "transformer_engine",
        rates=find_rates(config.logging, student, taught, head), soft_labels=salt.has_soft_labels,
    )  # fmt: skip


def build_teacher(
    config: RunConfig, plan: RunPlan, checkpoint: TeacherCheckpoint, student: Student, vocabulary_size: int, *, timeout: timedelta,
    shared_ids: int, precision: Precision, text: Sequence[Microbatch], windows: Sequence[Microbatch], bos: int | None,
    with_body: bool, look: Look,
) -> Admitted:  # fmt: skip
    """The teacher over the student's ranks, after logging what it will cost. Collective over all ranks. Raises UserError.

    shared_ids: see `Inputs`. text: samples on which a teacher in FP8 is tried. windows: samples on which the probability of other ids is
    measured. Both are the same on every rank. bos: see `shared_vocabulary.missing_bos`. with_body: see `admit`. look: raises
    LeftEarly between the phases.
    """
    salt, mesh, training = config.salt, student.mesh, config.training
    dtype, rows = dtype_of(training), config.model.padded_vocabulary_size(vocabulary_size) // mesh.layout.tensor
    layout = teacher_layout(mesh.layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)
    exchange = refuse_large_exchange(config, plan, mesh.layout, checkpoint.model)
    for line in layout_warnings(mesh.layout, layout, plan.num_teacher_forwards):
        log.warning("%s", line)
    chunk = chunk_tokens(training, rows, current_device().type)
    if with_body:  # the prediction counts the teacher's layers
        for line in predict_cost(config, plan, checkpoint.model, vocabulary_size, precision).lines():
            log.info("%s", line)
    shard = VocabularyShard(mesh.groups.tp, rows, vocabulary_size, sequence_parallel=True)
    admitted = admit(
        checkpoint,
        salt,
        TeacherHead(mesh, shard, training.seq_length, chunk, shared_ids),
        dtype=dtype,
        microbatches_per_forward=plan.teacher_merge,
        timeout=timeout,
        precision=precision,
        text=text,
        windows=windows,
        bos=bos,
        with_body=with_body,
        guided=guided_layer(salt, config.model, config.parallel),
        look=look,
    )
    groups = student.optimizer.param_groups
    refuse_trainable(admitted.teacher, (tensor for group in groups for tensor in group["params"]))
    log.info(
        "teacher %s: tp %d, pp %d, %d replicas; a step's hidden states take at most %.4f GiB on a rank, copies included",
        checkpoint.directory,
        layout.tensor,
        layout.pipeline,
        layout.data,
        exchange,
    )
    return admitted
