"""What a checkpoint says beside tensors: how far the run is, and how and by whom the tensors were written.

Plain immutable values, without torch and without a disk: `state_file.py` reads and writes them as state.json. A run begins with the
`RunState` of its checkpoint; every step makes a new one, and each save writes the newest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_salt.parallel.layout import Layout

Lineage = tuple[tuple[str, int], ...]
"""Which checkpoints a run comes from: (id, last step before its first), oldest first. See retention.py. Empty: unreadable, nobody's."""

UNNAMED: Lineage = (("", 0),)
"""The lineage of every checkpoint that was written before there were lineages."""

OptimizerForm = Literal["dp_reshardable", "fully_reshardable", "plain"]
"""How the optimizer's state is cut into tensors: see sharded_state.py."""


@dataclass(frozen=True, kw_only=True)
class SaltState:
    """Where a run with a stage 1 is. Kept to the end of the run, also after the teacher has been freed."""

    stage1_end: int
    """Last step of stage 1: --kd-steps, or earlier after a crossover."""
    schedule: dict[str, Any]
    """Values of the kd flags that shape the mathematics, by field name (`Schedule.facts`)."""
    teacher: str | None
    """Fingerprint of the teacher's checkpoint; None: stage 1 has a selection of the data and no teacher."""
    teacher_directory: str | None
    """Where the teacher's checkpoint lay when the run began. For people."""
    crossover: int | None = None
    """Step whose evaluation found that the student had passed the teacher; None: it has not."""
    teacher_held_out: dict[str, float] | None = None
    """The frozen teacher's figures on the held-out data, once they are known: "loss" and "accuracy"."""

    def stage_after(self, step: int) -> int:
        """1 or 2: the stage of the step that follows `step` steps."""
        return 1 if step < self.stage1_end else 2

    def resumes_in(self, step: int, evaluation_due: bool) -> int:
        """The stage in which a run resumed after `step` steps begins: an evaluation that is due at the end of stage 1 is part of it."""
        return 1 if evaluation_due and step == self.stage1_end else self.stage_after(step)


PartDue = Literal["held_out", "tasks"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run is: all that it needs, beside tensors, to go on. The default is a run before its first step."""

    step: int = 0
    """Steps done."""
    consumed_samples: int = 0
    """Samples trained on in all these steps."""
    position: int = 0
    """Samples drawn from the order of this data. It restarts at 0 with --new-data, `consumed_samples` does not."""
    stage2_since: int | None = None
    """The position at which stage 2 began; None: the run has no selection, or is in stage 1."""
    teacher_flops: float | None = 0.0
    """FLOPs of the teacher in all these steps. None: an earlier release made some of them and did not count."""
    nonfinite_in_a_row: int = 0
    """Steps that were skipped one after the other, up to this one, because gradients were not finite."""
    evaluation_due: bool = False
    """Whether the evaluation after this step is still to come. It may decide a crossover, so a resumed run begins with it."""
    due: tuple[PartDue, ...] = ()
    """Parts of that evaluation under the flags of the start that made the step. Empty before the first step."""
    events: tuple[dict[str, Any], ...] = ()
    """What happened to the run and must be remembered, such as a change of data. JSON values; "event" names the kind."""
    salt: SaltState | None = None
    """None: a run without a stage 1."""


@dataclass(frozen=True)
class ReferenceLosses:
    """A model's losses on the reference batch (data/reference_batch.py), by which it is recognised when it is loaded as a teacher."""

    lengths: tuple[int, ...]
    """Positions that each microbatch counts, ascending; the last is the run's context."""
    losses: tuple[float | None, ...]
    """Mean cross entropy of each microbatch; None where it is not finite."""
    dtype: str
    """"float32" or "bfloat16": what the losses were computed in, whatever the run trains in."""
    computed_by: str | None = None
    """Whose losses they are, where a conversion wrote the checkpoint. None: those of the run that saved it."""

    @property
    def origin(self) -> str:
        """Whose losses they are, in words."""
        return self.computed_by or "the run that saved it"


@dataclass(frozen=True)
class OptimizerState:
    """What a checkpoint says of its optimizer beside tensors."""

    form: OptimizerForm
    step: int
    """Updates that the optimizer has made."""
    bucket_plans: dict[str, str]
    """Hash of each model-parallel rank's gradient buckets (`sharded_state.bucket_plan`), by "pp0.tp0" and so on."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """state.json: everything in a checkpoint that is no tensor."""

    name: str | None
    """Why the checkpoint is kept, such as "save-at"; None: a routine one, which makes room for newer ones."""
    saved_at: float
    """Unix time in seconds."""
    lineage: Lineage
    megatron_core: str
    """Release of megatron-core that wrote the tensors."""
    torch: str
    """Release of torch that wrote the tensors."""
    run: RunState
    architecture: dict[str, Any]
    """ModelConfig's fields, and "vocabulary" and "seq_length", by name."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    data_fingerprint: str
    """Names the data and their order."""
    reference_losses: ReferenceLosses | None
    """None: an earlier release wrote the checkpoint, or something else than a training run."""
    layout: Layout
    """The ranks that wrote the tensors."""
    chunks: int
    """Model chunks of each of these ranks."""
    rng: list[tuple[str, int]]
    """Parts of a rank's random state in order: name and bytes (rng.py)."""
    scheduler: dict[str, Any] | None
    """State of megatron-core's OptimizerParamScheduler under its own names; None: saved without one."""
    optimizer: OptimizerState | None
    """None: saved without an optimizer."""

    @property
    def vocabulary_size(self) -> int | None:
        """Real ids of the tokenizer; None where an earlier release did not record it."""
        return self.architecture.get("vocabulary")

    @property
    def seq_length(self) -> int | None:
        """Context that the model was trained on; None where an earlier release did not record it."""
        return self.architecture.get("seq_length")


def lineage_in(content: Any) -> Lineage:
    """The lineage that the JSON of a state.json names; empty where it names none that is possible."""
    try:
        lineage = tuple((name, since) for name, since in content.get("lineage", UNNAMED))
    except (AttributeError, TypeError, ValueError):
        return ()
    steps = [since for _, since in lineage]
    possible = (
        all(isinstance(name, str) and type(since) is int for name, since in lineage)
        and steps[:1] == [0]
        and steps == sorted(steps)
    )
    return lineage if possible else ()


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose state has been read; `loading.open_checkpoint` also verifies its files and its pickles."""

    directory: Path
    state: CheckpointState
    sizes: dict[str, tuple[int, ...]]
    """Global size of every tensor, by key; empty where only the state was read."""
