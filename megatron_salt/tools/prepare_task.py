"""Turn a public data set on disk into a task file for evaluate.py, with the prompt of lm-evaluation-harness.

    python tools/prepare_task.py piqa --input piqa/valid.jsonl --labels piqa/valid-labels.lst --output piqa.jsonl
    python tools/prepare_task.py mmlu --input 'data/test/*.csv' --output mmlu.jsonl

Nothing is downloaded. docs/tasks.md lists the data sets, their prompts, and where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_salt.cli import run_tool
from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.evaluation.public_tasks.formats import FORMATS, task_lines
from megatron_salt.files import refuse_directory, refuse_present, write_whole
from megatron_salt.preprocess.inputs import input_files


@dataclass(frozen=True)
class PrepareTaskConfig:
    """Make a task file of a public data set."""

    name: tyro.conf.Positional[str]
    """The data set: hellaswag, piqa, arc, openbookqa, commonsense_qa, siqa, boolq, winogrande, lambada, sciq, mmlu or race."""

    input: tuple[str, ...]
    """Its files or patterns, as it is distributed: JSON, JSON lines, CSV, parquet or text. One split."""

    output: str
    """The task file to write, NAME.jsonl. The task is named after it."""

    labels: tuple[str, ...] = ()
    """Files with a label a line, one for each input file, where a data set keeps its labels apart (PIQA, SIQA, WinoGrande)."""

    overwrite: bool = False
    """Replace an existing --output."""

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise UserError(f"{self.name} is no data set{did_you_mean(self.name, FORMATS)}; known are {', '.join(FORMATS)}")
        if not self.output.endswith(".jsonl"):
            raise UserError(f"--output {self.output} must end in .jsonl: the task is named after it")
        if not self.input:
            raise UserError("--input names no file")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(PrepareTaskConfig, prepare_task, argv)


def prepare_task(config: PrepareTaskConfig) -> None:
    """Write the task file. Raises UserError."""
    output = Path(config.output)
    refuse_directory("--output", output)
    refuse_present("--output", config.output, [output], config.overwrite)
    files = input_files(config.input, allow_duplicates=False)
    lines = task_lines(config.name, files, config.labels)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "".join(line + "\n" for line in lines).encode())
    print(f"{output}: {len(lines)} examples of {config.name} from {len(files)} files")
