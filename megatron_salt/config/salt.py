"""The teacher, and the two stages of SALT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import above_zero, at_least, representable, within
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class SaltConfig:
    """The teacher, and how long and how strongly it teaches (SALT, arXiv 2410.18779).
    Nothing of it without --teacher-load or --stage1-selection."""

    teacher_load: str | None = None
    """Directory of the teacher's checkpoints (its latest is taken), or one iter_* directory.
    Its architecture, tokenizer and padding come from there.
    Default: no teacher, plain pretraining."""

    teacher_tensor_model_parallel_size: int = 1
    """Ranks that split each of the teacher's layers; independent of the student's."""

    teacher_pipeline_model_parallel_size: int = 1
    """Pipeline stages of the teacher.
    With the tensor-parallel size it must divide the ranks of one student replica (tp x cp x pp)."""

    teacher_micro_batch_size: int | None = None
    """Samples of one forward pass of the teacher: a multiple of --micro-batch-size, whose consecutive microbatches it merges.
    Default: --micro-batch-size."""

    teacher_fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply in FP8 in the teacher's layers (forward alone, where both formats are e4m3), and keep their weights in FP8 alone.
    Needs --bf16 and --transformer-impl transformer_engine.
    Default: bfloat16."""

    teacher_fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    """How the teacher's scales are chosen, see --fp8-recipe; delayed is refused for a teacher.
    Default: mxfp8 on GPUs of compute capability 10, else tensorwise."""

    teacher_fp8_max_kl: float = 0.01
    """Refuse an FP8 teacher whose distributions are further than this from its own in bfloat16: mean KL divergence, nats a token, at --kd-teacher-temperature or at 1, whichever is larger, on the run's first samples.
    In emulated FP8 trained models of 3 and 12 layers had 0.0002 to 0.0005 by every recipe; with one linear zeroed or at twice its scale, half of those of 12 layers had more than 0.006 and all of those of 3 more than 0.03.
    Larger models may need more room; the figure is told either way."""

    teacher_exchange_max_gib: float = 8.0
    """Refuse a run whose teacher hidden states would take more than this on a rank of the student's last stage in one step."""

    kd_weight: float = 0.667
    """Weight w of the teacher's soft labels in stage 1: the loss of a token is (1 - w) x cross entropy with the label + w x cross entropy with the teacher's distribution."""

    kd_teacher_temperature: float = 0.25
    """The teacher's distribution is softmax(logits / T); the student has no temperature, and no factor T^2 is applied.
    Below 1 it sharpens.
    The paper gives 0.25 and does not say which way it reads it; division sharpens, and did best in our runs."""

    kd_steps: int | None = None
    """Steps of stage 1, n_KD.
    From the next step on training is plain and the teacher is freed; as many as the run has, or more: it teaches to the end (reverse KD)."""

    kd_transition: Literal["step", "linear", "ratio"] = "step"
    """How w ends: at once, or over the last --kd-transition-steps of stage 1 linearly in w, or linearly in w / (1 - w)."""

    kd_transition_steps: int = 0
    """Length of a linear or ratio transition; it lies inside stage 1."""

    kd_stop: Literal["steps", "crossover"] = "steps"
    """What ends stage 1: --kd-steps alone, or also the student's held-out next-token accuracy passing the teacher's, asked at each evaluation (accuracy and not loss, because a sharpened teacher inflates the student's loss).
    After a crossover the transition still takes place."""

    kd_stop_margin: float = 0.0
    """How far, as a share of tokens, the student's accuracy must be above the teacher's for --kd-stop crossover.
    May be negative: stop that much before."""

    stage1_selection: str | None = None
    """What tools/select_data.py wrote: stage 1 draws from these samples alone (SALT_DS), each once before any comes again.
    With --kd-weight 0 no teacher is needed."""

    stage2_data: Literal["all", "unseen"] = "all"
    """What stage 2 draws from after a --stage1-selection: everything, from the beginning of an order of its own, or what stage 1 did not visit."""

    stage2_micro_batch_size: int | None = None
    """--micro-batch-size from the end of stage 1 on, when the teacher's memory is free.
    The global batch stays, so the mathematics does.
    Default: no change."""

    override_kd_schedule: bool = False
    """On resume inside stage 1 take the kd flags as they are now, where the checkpoint has others; the change is recorded in the checkpoint."""

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "teacher_tensor_model_parallel_size",
            "teacher_pipeline_model_parallel_size",
            "teacher_micro_batch_size",
            "kd_steps",
            "stage2_micro_batch_size",
        )
        at_least(self, 0, "kd_transition_steps")
        within(self, 0.0, 1.0, "kd_weight")
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
        if (
            self.teacher_load is None
            and self.kd_steps is not None
            and not (self.stage1_selection is not None and self.kd_weight == 0.0)
        ):
            raise UserError(
                f"--kd-steps {self.kd_steps} needs a teacher: give --teacher-load (or --stage1-selection with --kd-weight 0)"
            )
        if self.teacher_load is not None and self.kd_steps is None:
            raise UserError(f"--teacher-load {self.teacher_load} needs --kd-steps, the length of stage 1")
        if self.stage1_selection is not None and self.kd_steps is None:
            raise UserError(f"--stage1-selection {self.stage1_selection} needs --kd-steps, the length of stage 1")
        if self.kd_steps is None and self.stage2_micro_batch_size is not None:
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
        if self.kd_transition == "ratio" and self.kd_weight == 1.0:
            raise UserError("--kd-transition ratio needs --kd-weight below 1: at 1.0 the ratio w / (1 - w) is infinite")
