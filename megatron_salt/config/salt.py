"""The teacher, and the two stages of SALT."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_salt.config.checks import above_zero, at_least, flag, representable, within
from megatron_salt.config.teaching import parse_gate, parse_temperatures, parse_weights
from megatron_salt.errors import UserError

_OF_SOFT_LABELS = frozenset({"kd_weight", "kd_teacher_temperature", "kd_stop_margin", "teacher_max_dropped_mass"})
"""Fields with a default that say nothing to a teacher without soft labels."""


@dataclass(frozen=True, kw_only=True)
class SaltConfig:
    """The teacher, and for how long and how strongly it teaches (SALT, arXiv 2410.18779).
    These flags have no effect without --teacher-load or --stage1-selection."""

    teacher_load: str | None = None
    """Directory of the teacher's checkpoints, of which the latest is taken, or one iter_* directory.
    It also gives the teacher's architecture, tokenizer and padding.
    Default: no teacher, plain pretraining."""

    teacher_tensor_model_parallel_size: int = 1
    """Ranks that split each layer of the teacher. Independent of the student's."""

    teacher_pipeline_model_parallel_size: int = 1
    """Pipeline stages of the teacher.
    Its tensor x pipeline size must divide the ranks of one student replica (tp x cp x pp)."""

    teacher_micro_batch_size: int | None = None
    """Samples in one forward pass of the teacher, which merges consecutive microbatches.
    A multiple of --micro-batch-size. Default: --micro-batch-size."""

    teacher_fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply in FP8 in the teacher's layers, and keep their weights in FP8 only.
    Both formats use e4m3 in the forward pass, and a teacher has no other.
    Needs --bf16 and --transformer-impl transformer_engine. Default: bfloat16."""

    teacher_fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    """How the scales of the teacher's FP8 numbers are chosen, see --fp8-recipe. A teacher cannot use delayed.
    Default: mxfp8 on GPUs of compute capability 10, else tensorwise."""

    teacher_fp8_max_kl: float = 0.01
    """Refuse an FP8 teacher that differs more than this from the same teacher in bfloat16.
    Measured: mean KL divergence in nats a token, on the first samples of the run.
    Temperature: the larger of --kd-teacher-temperature and 1. The figure is always logged.
    In emulated FP8, trained models of 3 and 12 layers had 0.0002 to 0.0005 with every recipe.
    With one linear layer zeroed or doubled, half of the models of 12 layers had more than 0.006,
    and all models of 3 layers more than 0.03. Larger models may need a larger limit."""

    teacher_max_dropped_mass: float = 0.01
    """Refuse a teacher that gives more than this share of its probability to ids that the student does not share.
    Such ids are rows above its tokenizer's, and tokens that the student's tokenizer lacks.
    Measured before the first step on 16 windows of the held-out data, else of the training data, and always logged.
    The teacher's distribution is renormalised over the ids that both have."""

    teacher_exchange_max_gib: float = 8.0
    """Refuse a run whose teacher hidden states take more than this in one step, in GiB.
    It counts the rank with most of them, with their copies in the buffers of the exchange."""

    teacher_cache: str | None = None
    """Directory in which the teacher's last hidden states are kept, so that other runs need not compute them.
    A run writes what it computes, and reads what the directory had when the run began.
    A run with the order of the first one has its curves bit for bit, whatever its weight or temperature.
    Other teachers, data or sequence lengths are refused. All ranks must see the directory.
    Size: hidden size x 2 bytes a token in bfloat16, x 4 in float32."""

    guide: Literal["soft-labels", "hidden", "both"] = "soft-labels"
    """What the teacher teaches. soft-labels: its distribution over the next token (SALT, the kd flags).
    hidden: its last hidden states, to an early layer of the student (LET, arXiv 2602.05393, the let flags).
    Then no output layer of the teacher is needed. both: soft labels and hidden states."""

    let_weight: float = 0.1
    """Weight lambda of hidden-state guidance in the first step. It adds to the loss of a token
    lambda x (1 - cosine of the student's residual stream after layer --let-layer and the teacher's last hidden state)."""

    let_layer: int = 3
    """Layer of the student, counted from 1, whose output is guided."""

    let_steps: int | None = None
    """Steps with hidden-state guidance (S_stop), which --guide hidden and both need; at most the run's steps.
    The teacher is freed after them, with --guide both after --kd-steps if that is later."""

    let_decay: Literal["linear", "step"] = "linear"
    """How lambda ends. linear: it falls linearly, from --let-weight in the first step to 0 in the step after --let-steps.
    step: it stays and ends at once."""

    kd_weight: float = 0.667
    """Weight w of the teacher in stage 1. The loss of a token is
    (1 - w) x cross entropy with the label + w x cross entropy with the teacher's distribution."""

    kd_teacher_temperature: float = 0.25
    """The teacher's distribution is softmax(logits / T). Below 1 it is sharper.
    The student has no temperature, and there is no factor T^2.
    The paper gives 0.25 and does not say whether it divides or multiplies. Division was better in our runs."""

    kd_weight_schedule: tuple[str, ...] = ()
    """w by step, in place of --kd-weight: entries STEP:VALUE with ascending steps up to --kd-steps, such as 1:0.9 4000:0.3.
    Between two entries w changes linearly; before the first and after the last it stays.
    A --kd-transition fades the schedule's own w. Default: --kd-weight throughout."""

    kd_temperature_schedule: tuple[str, ...] = ()
    """T by step, in place of --kd-teacher-temperature, written like --kd-weight-schedule.
    Default: --kd-teacher-temperature throughout."""

    kd_gate: str = "none"
    """Which tokens have soft labels. none: all of them; there is no gate.
    The other kinds look at the teacher's distribution at temperature 1, in float32, whatever --kd-teacher-temperature is.
    probability:P: tokens whose label has at least probability P there.
    rank:K: tokens whose label is among the K likeliest ids, as in the scores.
    entropy:E: tokens for which the distribution's entropy is at most E nats.
    For all other tokens the loss is the plain cross entropy, with weight 1."""

    kd_steps: int | None = None
    """Steps of stage 1 (n_KD). After them training is plain, and the teacher is freed.
    With as many as the run has, or more, the teacher teaches to the end (reverse KD).
    With --guide both these are the steps with soft labels, and stage 1 lasts to --let-steps if that is later.
    --guide hidden takes --let-steps in place of it."""

    kd_transition: Literal["step", "linear", "ratio"] = "step"
    """How w ends. step: at once. linear: w falls linearly over the last --kd-transition-steps of stage 1.
    ratio: w / (1 - w) falls linearly over these steps."""

    kd_transition_steps: int = 0
    """Steps of a linear or ratio transition. They belong to stage 1."""

    kd_stop: Literal["steps", "crossover"] = "steps"
    """What ends stage 1. steps: --kd-steps.
    crossover: also an evaluation in which the student's next-token accuracy on held-out data passes the teacher's.
    Accuracy and not loss, because a sharpened teacher raises the student's loss.
    The transition still takes place after a crossover."""

    kd_stop_margin: float = 0.0
    """By how much the student's accuracy must exceed the teacher's for --kd-stop crossover, as a share of tokens.
    A negative margin ends stage 1 earlier."""

    stage1_selection: str | None = None
    """Sample ids that salt-select (tools/select_data.py) wrote. Stage 1 draws only from these samples (SALT_DS).
    Each is drawn once before any is drawn again. With --kd-weight 0 no teacher is needed."""

    stage2_data: Literal["all", "unseen"] = "all"
    """What stage 2 draws from after --stage1-selection.
    all: all samples, in a new order. unseen: the samples that stage 1 did not visit."""

    stage2_micro_batch_size: int | None = None
    """--micro-batch-size of stage 2, when the teacher's memory is free. Default: no change.
    The global batch stays, and so does the mathematics."""

    override_kd_schedule: bool = False
    """On resume in stage 1, take the kd flags as they are now and not the checkpoint's.
    The checkpoint records the change."""

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "teacher_tensor_model_parallel_size",
            "teacher_pipeline_model_parallel_size",
            "teacher_micro_batch_size",
            "kd_steps",
            "let_layer",
            "let_steps",
            "stage2_micro_batch_size",
        )
        at_least(self, 0, "kd_transition_steps", "let_weight")
        within(self, 0.0, 1.0, "kd_weight", "teacher_max_dropped_mass")
        within(self, -1.0, 1.0, "kd_stop_margin")
        above_zero(self, "kd_teacher_temperature", "teacher_exchange_max_gib", "teacher_fp8_max_kl")
        within(self, 0.001, 1000.0, "kd_teacher_temperature")
        representable(self)
        if self.teacher_fp8_recipe == "delayed":
            raise UserError(
                "--teacher-fp8-recipe delayed cannot be used: Transformer Engine updates delayed scales only where gradients are "
                "computed, so a teacher, which has none, would keep those that it started with; use tensorwise, blockwise or mxfp8"
            )
        if self.teacher_fp8_recipe is not None and self.teacher_fp8_format is None:
            raise UserError(f"--teacher-fp8-recipe {self.teacher_fp8_recipe} needs --teacher-fp8-format")
        if self.teacher_fp8_format is not None and self.teacher_load is None:
            raise UserError(f"--teacher-fp8-format {self.teacher_fp8_format} needs --teacher-load")
        self._check_guide()
        self._check_gate_and_schedules()
        if (
            self.teacher_load is None
            and self.kd_steps is not None
            and not (self.stage1_selection is not None and self.kd_weight == 0.0)
        ):
            raise UserError(
                f"--kd-steps {self.kd_steps} needs a teacher: give --teacher-load (or --stage1-selection with --kd-weight 0)"
            )
        if self.teacher_load is not None and self.kd_steps is None and self.has_soft_labels:
            meaning = "the length of stage 1" if self.guide == "soft-labels" else "the steps with soft labels"
            raise UserError(f"--teacher-load {self.teacher_load} needs --kd-steps, {meaning}")
        if self.teacher_cache is not None and self.teacher_load is None:
            raise UserError(
                f"--teacher-cache {self.teacher_cache} needs --teacher-load: it keeps what a teacher computes, and the teacher's "
                "output layer is not in it"
            )
        if self.stage1_selection is not None and self.stage1_steps is None:
            raise UserError(f"--stage1-selection {self.stage1_selection} needs --kd-steps, the length of stage 1")
        if self.stage1_steps is None and self.stage2_micro_batch_size is not None:
            raise UserError(
                f"--stage2-micro-batch-size {self.stage2_micro_batch_size} needs a stage 1: give --teacher-load and --kd-steps"
            )
        if self.stage1_selection is None and self.stage2_data != "all":
            raise UserError(f"--stage2-data {self.stage2_data} needs --stage1-selection")
        if self.teacher_load is None and self.kd_stop == "crossover":
            raise UserError("--kd-stop crossover asks when the student passes its teacher: it needs --teacher-load")
        if self.kd_steps is not None and self.kd_transition_steps > self.kd_steps:
            raise UserError(
                f"--kd-transition-steps {self.kd_transition_steps} is longer than stage 1, --kd-steps {self.kd_steps}"
            )
        if (self.kd_transition == "step") != (self.kd_transition_steps == 0):
            raise UserError(
                f"--kd-transition {self.kd_transition} does not go with --kd-transition-steps {self.kd_transition_steps}: "
                "step takes none, linear and ratio take at least 1"
            )
        if self.kd_transition == "ratio" and self.kd_weight == 1.0 and not self.kd_weight_schedule:
            raise UserError("--kd-transition ratio needs --kd-weight below 1: at 1.0 the ratio w / (1 - w) is infinite")

    @property
    def has_soft_labels(self) -> bool:
        """Whether the teacher's distribution is part of the loss."""
        return self.guide != "hidden"

    @property
    def guides_hidden(self) -> bool:
        """Whether the teacher's last hidden states guide a layer of the student."""
        return self.guide != "soft-labels"

    @property
    def stage1_steps(self) -> int | None:
        """Steps of stage 1, in which the teacher teaches in any way. None: the run has no stage 1."""
        steps = [count for count in (self.kd_steps, self.let_steps) if count is not None]
        return max(steps, default=None)

    def _check_guide(self) -> None:
        """Raise UserError for let flags that do not fit the others."""
        if not self.guides_hidden:
            for leaf in fields(self):
                value = getattr(self, leaf.name)
                if leaf.name.startswith("let_") and value != leaf.default:
                    raise UserError(f"{flag(leaf.name)} {value} needs --guide hidden or both, got --guide {self.guide}")
            return
        if self.teacher_load is None:
            raise UserError(f"--guide {self.guide} needs a teacher: give --teacher-load")
        if self.let_steps is None:
            raise UserError(f"--guide {self.guide} needs --let-steps, the steps with hidden-state guidance")
        if self.kd_stop == "crossover":
            raise UserError(
                f"--kd-stop crossover ends soft labels, and --guide {self.guide} needs the teacher for --let-steps {self.let_steps}: "
                "use --kd-stop steps"
            )
        if self.guide == "hidden" and self.kd_steps is not None:
            raise UserError(
                f"--kd-steps {self.kd_steps} is the length of soft labels, and --guide hidden has none: use --let-steps alone, or "
                "--guide both"
            )
        for leaf in fields(self):
            value = getattr(self, leaf.name)
            if self.guide == "hidden" and leaf.name in _OF_SOFT_LABELS and value != leaf.default:
                raise UserError(f"{flag(leaf.name)} {value} is about soft labels, and --guide hidden has none: leave it out")
        if self.guide == "hidden" and self.teacher_fp8_format is not None:
            raise UserError(
                f"--teacher-fp8-format {self.teacher_fp8_format} is checked by the teacher's distribution, and --guide hidden loads no "
                "output layer: leave it out, or use --guide both"
            )
        if self.guide == "hidden" and self.kd_transition_steps:
            raise UserError(
                f"--kd-transition-steps {self.kd_transition_steps} fades soft labels out, and --guide hidden has none: see --let-decay"
            )

    def _check_gate_and_schedules(self) -> None:
        parse_gate(self.kd_gate)
        weights = parse_weights(self.kd_weight_schedule)
        temperatures = parse_temperatures(self.kd_temperature_schedule)
        given = {
            f"--kd-gate {self.kd_gate}": self.kd_gate != "none",
            f"--kd-weight-schedule {' '.join(self.kd_weight_schedule)}": bool(weights),
            f"--kd-temperature-schedule {' '.join(self.kd_temperature_schedule)}": bool(temperatures),
        }
        for text, is_given in given.items():
            if is_given and not self.has_soft_labels:
                raise UserError(f"{text} is about soft labels, and --guide {self.guide} has none")
        if self.kd_gate != "none" and self.teacher_load is None:
            raise UserError(f"--kd-gate {self.kd_gate} asks what the teacher knows: it needs --teacher-load")
        for name, words, points in (
            ("kd_weight_schedule", self.kd_weight_schedule, weights),
            ("kd_temperature_schedule", self.kd_temperature_schedule, temperatures),
        ):
            if points and self.teacher_load is None:
                raise UserError(f"{flag(name)} {' '.join(words)} needs --teacher-load")
            if points and self.kd_steps is not None and points[-1][0] > self.kd_steps:
                raise UserError(f"{flag(name)} {words[-1]} lies beyond stage 1, which has --kd-steps {self.kd_steps}")
        if self.kd_transition == "ratio" and any(weight == 1.0 for _, weight in weights):
            raise UserError(
                "--kd-transition ratio needs values below 1 in --kd-weight-schedule: at 1.0 the ratio w / (1 - w) is infinite"
            )
