"""What SALT costs: the time of a step of stage 1 over that of stage 2, and the FLOPs of scoring. Pure.

Time is FLOPs / (FLOP/s) plus bytes of memory / (bytes/s): of the layers of both models, of the output head (`head_cost.py`), of the
embedding and of the optimizer (`layer_cost.py`). On a device of unknown rates FLOPs alone are compared.
All ranks of a block share the teacher's body. The student's last stage computes the teacher's head, so this stage decides how long the
pipeline takes if it has as many layers as the others. Communication, and the filling and draining of both pipelines, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_salt.cards import FLOPS_ALONE, REACHED_BYTES, REACHED_FLOPS, Products, Rates, card_named, peak_tflops, reached
from megatron_salt.config import LoggingConfig, ModelConfig, ParallelConfig
from megatron_salt.errors import UserError
from megatron_salt.model.flops import core_attention_flops, forward_flops_per_token
from megatron_salt.model.shapes import layers_per_stage
from megatron_salt.salt.head_cost import HeadShape, head_seconds
from megatron_salt.salt.layer_cost import embedding_bytes, layer_seconds, update_bytes
from megatron_salt.selection.score_format import IndexManifest


@dataclass(frozen=True, kw_only=True)
class ModelRates:
    """Rates of the products of each part of both models, and of passes over memory. They are those of one rank."""

    layers: Rates
    head: Rates
    teacher_layers: Rates
    teacher_head: Rates
    source: str
    """Where the rates come from, for the log."""

    @property
    def known(self) -> bool:
        """Whether times are seconds. False: FLOPs."""
        return self.layers != FLOPS_ALONE


BY_FLOPS = ModelRates(layers=FLOPS_ALONE, head=FLOPS_ALONE, teacher_layers=FLOPS_ALONE, teacher_head=FLOPS_ALONE, source="")
"""For a device of unknown rates."""


def rates_of_gpu(name: str, flags: LoggingConfig, student: Products, teacher: Products, itemsize: int) -> ModelRates:
    """Rates by the flags, which go first, and the table of GPUs; FLOPs alone, and why, where neither has a figure.

    itemsize: bytes of a number of the head, which multiplies in the run's dtype also where layers use FP8.
    """
    card = card_named(name)
    own: Products = "bf16" if itemsize == 2 else "fp32"
    gb_per_s = flags.device_peak_gb_per_s or (None if card is None else card.gb_per_s)
    tflops = {products: peak_tflops(name, products, flags.device_peak_tflops) for products in (own, student, teacher)}
    missing = [
        text
        for text, known in (("--device-peak-tflops", all(tflops.values())), ("--device-peak-gb-per-s", gb_per_s))
        if not known
    ]
    if missing or gb_per_s is None:
        return replace(BY_FLOPS, source=f"the peaks of {name} are not known; {' and '.join(missing)} would tell them")
    rates = {products: reached(peak, gb_per_s) for products, peak in tflops.items() if peak is not None}
    figures = ", ".join(f"{peak:g} TFLOP/s in {products}" for products, peak in tflops.items())
    return ModelRates(
        layers=rates[student], head=rates[own], teacher_layers=rates[teacher], teacher_head=rates[own],
        source=f"{name}: {REACHED_FLOPS:g} of {figures} and {REACHED_BYTES:g} of {gb_per_s:g} GB/s",
    )  # fmt: skip


@dataclass(frozen=True)
class StepTimes:
    """Time of a step in each stage on the busiest rank: seconds, or FLOPs where rates are unknown."""

    stage1: float
    stage2: float
    body: float
    """The part of stage 1 that the teacher's forward passes take."""

    @property
    def ratio(self) -> float:
        """Time of a step of stage 1 over that of stage 2; at least 1."""
        return self.stage1 / self.stage2


@dataclass(frozen=True)
class Hint:
    """Another number of layers in the student's last pipeline stage, with which a step of stage 1 is fastest."""

    layers: int
    times: StepTimes


@dataclass(frozen=True)
class Prediction:
    """The cost of stage 1, as start-up tells it."""

    last_stage_layers: int
    times: StepTimes
    hint: Hint | None
    """None where the present number of layers is the best."""
    rates: ModelRates
    soft_labels: bool = True
    """Whether the teacher's head is computed."""

    @property
    def ratio(self) -> float:
        """Time of a step of stage 1 over that of stage 2."""
        return self.times.ratio

    def lines(self) -> list[str]:
        """Lines for the log."""
        now, body = self.times, self.times.body / self.times.stage2
        basis = "by time" if self.rates.known else "by FLOPs alone"
        head = f", its head and the mixed loss, on the last stage, {self.ratio - 1 - body:.3f}" if self.soft_labels else ""
        lines = [
            (
                f"a step of stage 1 takes {self.ratio:.3f} x one of stage 2, {basis} ({self.rates.source}): "
                f"the teacher's body, on all ranks, adds {body:.3f}{head}"
            )
        ]
        if self.hint is not None:
            then = self.hint.times
            lines.append(
                f"--decoder-last-pipeline-num-layers {self.hint.layers} (now {self.last_stage_layers}) would change a step of stage 1 by "
                f"{then.stage1 / now.stage1 - 1:+.1%}, of stage 2 by {then.stage2 / now.stage2 - 1:+.1%}"
            )
        return lines


def predict(
    student: ModelConfig, parallel: ParallelConfig, teacher: ModelConfig, *, teacher_tensor: int, teacher_pipeline: int,
    num_microbatches: int, microbatch_tokens: int, merge: int, seq_length: int, head: HeadShape, fused_layers: bool, rates: ModelRates,
    soft_labels: bool = True,
) -> Prediction:  # fmt: skip
    """Compare the two stages of a run. Raises UserError where the student's layers cannot be spread as the flags say.

    num_microbatches: of one replica in stage 1 (another size in stage 2 makes for the same work); microbatch_tokens: of one of them.
    merge: microbatches of one teacher forward. head: the head's work for one microbatch; the teacher's output weight has as many rows.
    fused_layers: whether Transformer Engine makes the layers. soft_labels: whether the teacher's head is computed. A guided layer's term
    multiplies no matrices and counts as nothing.
    """
    replicas = parallel.replica_ranks // (teacher_tensor * teacher_pipeline)
    busiest = largest_share(num_microbatches, merge, replicas) * microbatch_tokens
    forward = layer_seconds(teacher, seq_length, head.itemsize, fused_layers, rates.teacher_layers)
    body = busiest * teacher.num_layers * forward / (teacher_tensor * teacher_pipeline)
    tokens = microbatch_tokens / (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    moved = embedding_bytes(student, head.rows, head.itemsize) / rates.layers.bytes
    plain = head_seconds(head, rates.head, None)
    taught = head_seconds(head, rates.head, rates.teacher_head) if soft_labels else plain

    def times(parallel: ParallelConfig) -> StepTimes:
        counts = layers_per_stage(student, parallel)
        stages = [
            tokens * stage_seconds(student, parallel, layers, seq_length, head.itemsize, fused_layers, rates.layers)
            for layers in counts
        ]
        stages[0] += moved
        update = update_bytes(student, parallel, counts, head.rows) / rates.layers.bytes
        stages[-1] += plain
        stage2 = num_microbatches * max(stages) + update
        stages[-1] += taught - plain
        return StepTimes(stage1=body + num_microbatches * max(stages) + update, stage2=stage2, body=body)

    present, last = times(parallel), layers_per_stage(student, parallel)[-1]
    hints = [Hint(layers, times(other)) for layers, other in _other_last_stages(student, parallel)]
    better = [hint for hint in hints if hint.times.stage1 < present.stage1]
    best = min(better, key=lambda hint: (hint.times.stage1, hint.times.stage2, abs(hint.layers - last)), default=None)
    return Prediction(last, present, best, rates, soft_labels)


def largest_share(num_microbatches: int, merge: int, replicas: int) -> int:
    """Microbatches of the busiest teacher replica. Forwards are dealt out as `ExchangePlan.forwards_of` (routing.py) does."""
    sizes = [min(merge, num_microbatches - first) for first in range(0, num_microbatches, merge)]
    return max(sum(sizes[replica::replicas]) for replica in range(replicas))


def stage_seconds(
    student: ModelConfig, parallel: ParallelConfig, layers: int, seq_length: int, itemsize: int, fused: bool, rates: Rates
) -> float:
    """Seconds per token of a stage's layers: forward, backward and recomputation."""
    layer = layer_seconds(student, seq_length, itemsize, fused, rates)
    again = recomputed_layers(parallel, layers) * layer
    if parallel.recompute_granularity == "selective":
        again = layers * core_attention_flops(student, seq_length) / rates.flops
    return layers * 3 * layer + again


def recomputed_layers(parallel: ParallelConfig, layers: int) -> int:
    """Of the layers of a stage, those whose forward pass is computed again as a whole."""
    if parallel.recompute_granularity != "full":
        return 0
    if parallel.recompute_method == "block":
        return min(layers, parallel.num_virtual_stages_per_pipeline_rank * (parallel.recompute_num_layers or 0))
    return layers


def _other_last_stages(student: ModelConfig, parallel: ParallelConfig) -> list[tuple[int, ParallelConfig]]:
    """Every number of layers that the last stage may have, with the flags for it; the first stage's flag stays. Empty without a
    pipeline."""
    splits = []
    for layers in range(1, student.num_layers):
        other = replace(
            parallel, decoder_last_pipeline_num_layers=layers, account_for_embedding_in_pipeline_split=False,
            account_for_loss_in_pipeline_split=False,
        )  # fmt: skip
        try:
            layers_per_stage(student, other)
        except UserError:
            continue
        splits.append((layers, other))
    return splits


# --- the scores of a selection ----------------------------------------------------------------------------------------


def scoring_flops(scores: IndexManifest, teacher: ModelConfig) -> float:
    """FLOPs of scoring an index: a forward pass of the teacher for every window that has scores."""
    tokens = scores.num_samples * scores.seq_length * (scores.sample or 1.0)
    padded_vocabulary_size = teacher.padded_vocabulary_size(scores.vocabulary)
    return tokens * forward_flops_per_token(teacher, scores.seq_length, padded_vocabulary_size)


def scoring_line(scoring: float, training: float) -> str:
    """What start-up says of the scores behind --stage1-selection. Both figures are FLOPs, training those of the whole run."""
    share = f"{scoring / training:.1%} of the {training:.3g} that this run takes"
    return f"the scores behind --stage1-selection took {scoring:.3g} FLOPs, {share}"
