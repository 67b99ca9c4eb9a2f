"""Where a study keeps what, and the jobs that prepare runs: scores, selections, models to stack. Pure.

OUTPUT/teacher/NAME/                           a teacher that the study trains
OUTPUT/scores/TEACHER[-STEP][-sample_P]/       a score index
OUTPUT/selections/NAME/                        windows.npy and its report
OUTPUT/grow/ARM[/AXIS=VALUE]/seed_N/           source/: the shallower model; stacked/: its layers, stacked
OUTPUT/runs/ARM[/AXIS=VALUE]/seed_N/           a run
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_salt.checkpoint.save_directory import directory_of
from megatron_salt.config import RunConfig, flag
from megatron_salt.config.run import sections
from megatron_salt.errors import UserError
from megatron_salt.study.definition.arms import build, overlaid
from megatron_salt.study.definition.study import Arm, Sections, SelectionRule, Study, Teacher
from megatron_salt.study.job import Job

_TOP_K = (1, 10, 50, 100)
"""As tools/score_data.py has them"""


def trainable(settings: Sections, directory: Path, seed: int) -> RunConfig:
    """The configuration of a training in a directory of the study, which can be stopped and goes on. Raises UserError."""
    return build(overlaid(settings, {"save": str(directory), "seed": seed, "exit_signal_handler": True}))


def checkpoints_of(study: Study, teacher: Teacher) -> Path:
    """Directory of a teacher's checkpoints."""
    return study.output / "teachers" / teacher.name if teacher.load is None else Path(teacher.load)


def score_job(study: Study, teacher: Teacher, arm: Arm, config: RunConfig, needs: Sequence[str]) -> Job:
    """The job that scores the windows of a run's training data. needs: the jobs that make the teacher."""
    rule, data, load = arm.selection, config.data, checkpoints_of(study, teacher)
    assert rule is not None
    name = scoring_name(teacher, rule)
    rules = [one.selection for one in study.arms if one.selection is not None and one.teacher == teacher.name]
    wanted = {one.top_k for one in rules if scoring_name(teacher, one) == name and one.top_k is not None}
    directory = study.output / "scores" / name.removeprefix("score-")
    flags = {
        "teacher_load": str(load if rule.scorer_step is None else directory_of(load, rule.scorer_step)),
        "data_path": data.data_path,
        "output": str(directory / "index"),
        "sample": rule.sample,
        "seq_length": config.training.seq_length,
        "score_top_k": tuple(sorted({*_TOP_K, *wanted})),
        "tensor_model_parallel_size": study.salt.get("teacher_tensor_model_parallel_size", 1),
        "pipeline_model_parallel_size": study.salt.get("teacher_pipeline_model_parallel_size", 1),
        "eod_mask_loss": data.eod_mask_loss,
        "reset_position_ids": data.reset_position_ids,
        "reset_attention_mask": data.reset_attention_mask,
        "verify_data": data.verify_data,
        "allow_duplicate_inputs": data.allow_duplicate_inputs,
        "device": config.parallel.device,
        **vars(config.tokenizer),
    }
    command = ("-m", "megatron_salt.tools.score_data", *words(flags))
    return Job(name=name, kind="score", command=command, ranks=study.ranks, directory=directory, needs=tuple(needs))


def scoring_name(teacher: Teacher, rule: SelectionRule) -> str:
    """Name of the job that scores for a rule."""
    step = [] if rule.scorer_step is None else [str(rule.scorer_step)]
    sample = [] if rule.sample is None else [f"sample_{rule.sample}"]
    return "-".join(["score", teacher.name, *step, *sample])


def select_job(study: Study, arm: Arm, seed: int, config: RunConfig, scoring: Job) -> Job:
    """The job that chooses the windows of a run's stage 1 from the scores of `scoring`."""
    rule, selection = arm.selection, selection_of(study, arm, seed)
    assert rule is not None
    random = arm.kind == "random"
    how = {"rule": "random", "seed": seed} if random else {"rule": "top", "score": rule.score, "allow_ties": rule.allow_ties}
    flags = {
        "scores": str(scoring.directory / "index"),
        "output": str(selection.with_suffix("")),
        **how,
        "fraction": rule.fraction,
        "valid_share": config.data.valid_share or None,
        "exclude_duplicates": rule.exclude_duplicates,
        "allow_duplicate_inputs": config.data.allow_duplicate_inputs,
        "overwrite": True,  # of a job that was killed
    }
    directory = selection.parent
    command = ("-m", "megatron_salt.tools.select_data", *words(flags))
    return Job(
        name=f"select-{directory.name}", kind="select", command=command, ranks=0, directory=directory, needs=(scoring.name,)
    )


def selection_of(study: Study, arm: Arm, seed: int) -> Path:
    """The selection of an arm's run; the same file for all arms and seeds that draw from the same windows."""
    rule, random = arm.selection, arm.kind == "random"
    assert rule is not None
    parts = [
        arm.teacher,
        rule.scorer_step,
        None if rule.sample is None else f"sample_{rule.sample}",
        f"random_{seed}" if random else rule.score,
        rule.fraction,
        "unlike" if rule.exclude_duplicates else None,
        "ties" if rule.allow_ties and not random else None,
    ]
    return study.output / "selections" / "-".join(str(part) for part in parts if part is not None) / "windows.npy"


def shallow_config(study: Study, arm: Arm, config: RunConfig, place: Path) -> RunConfig:
    """The training of the model whose layers a run of kind grow begins with. Raises UserError."""
    assert arm.grow is not None
    layers = arm.grow.num_layers
    if config.model.num_layers % layers:
        raise UserError(f"{layers} layers cannot be stacked to --num-layers {config.model.num_layers}, which is no multiple")
    directory = study.output / "grow" / place / "source"
    flags = {
        **arm.grow.flags,
        "num_layers": layers,
        "train_iters": arm.grow.train_iters,
        "train_samples": None,
        "load": str(directory),
        "finetune": False,
    }
    same: Sections = {name: vars(getattr(config, name)) for name in sections()}
    return trainable(overlaid(same, flags), directory, config.training.seed)


def stack_job(study: Study, config: RunConfig, place: Path, source: str) -> Job:
    """The job that stacks the layers that the job `source` trains."""
    save = stacked_of(study, place)
    load = study.output / "grow" / place / "source"
    flags = {"load": str(load), "num_layers": config.model.num_layers, "save": str(save), "overwrite": True}
    command = ("-m", "megatron_salt.convert.grow_command", *words(flags))
    name = f"stack-{'-'.join(place.parts)}"
    return Job(name=name, kind="grow", command=command, ranks=0, directory=save.parent, needs=(source,))


def stacked_of(study: Study, place: Path) -> Path:
    """The stacked checkpoint of the run at `place`."""
    return study.output / "grow" / place / "stacked" / "checkpoint"


def place_of(arm: Arm, seed: int, setting: Mapping[str, Any]) -> Path:
    """ARM[/AXIS=VALUE]/seed_N of a run, with characters that are safe in names alone."""
    values = (f"{axis}={re.sub(r'[^A-Za-z0-9.+_-]', '_', as_text(value))}" for axis, value in setting.items())
    return Path(arm.name, *values, f"seed_{seed}")


def as_text(value: Any) -> str:
    """A value of an axis as one writes it on a command line or in YAML."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def words(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """{field: value} as the words of a command line. None, False and (): the flag is left out."""
    found: list[str] = []
    for name, value in flags.items():
        if value is not None and value is not False and value != ():
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            found += [flag(name), *map(str, values)]
    return tuple(found)
