"""Merge the shards of a score index, from one or several directories, into an index of one shard.

No other tool needs this: all of them read shards, also from several directories. Use it to move an index, or to have fewer files.
The result has the same bytes as the index of a single job.

    python tools/merge_scores.py --scores jobs/a jobs/b --output scores
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.errors import UserError
from megatron_salt.files import real_path, refuse_present, sole_writer
from megatron_salt.selection.score_format import INDEX
from megatron_salt.selection.score_reader import ScoreIndex, merge


@dataclass(frozen=True)
class MergeConfig:
    """Merge the shards of a score index."""

    scores: tuple[str, ...]
    """Directories that together hold all shards of one index."""

    output: str
    """Directory of the merged index."""

    overwrite: bool = False
    """Replace an existing index."""

    allow_duplicate_inputs: bool = False
    """Accept directories and shards that are named twice, and copies. Of equal shards one counts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(MergeConfig, merge_scores, argv)


def merge_scores(config: MergeConfig) -> None:
    """Check the shards and write the merged index. Raises UserError."""
    output = Path(config.output)
    if any(real_path(directory) == real_path(output) for directory in config.scores):
        raise UserError(
            f"--output {output} is one of --scores; take a new directory, and delete the old ones when you are content"
        )
    inside = next((directory for directory in config.scores if real_path(output) in real_path(directory).parents), None)
    if inside is not None:
        raise UserError(f"--output {output} holds --scores {inside}, which would be deleted with it; take another directory")
    refuse_present("--output", output, [output], config.overwrite)
    if output.exists() and not (output / INDEX).exists():
        raise UserError(f"--output {output} is no score index, it has no {INDEX}; --overwrite does not delete anything else")
    index = ScoreIndex.open(config.scores, allow_duplicates=config.allow_duplicate_inputs)
    try:
        with sole_writer("--output", output):
            refuse_present("--output", output, [output], config.overwrite)
            merge(index, output)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written: {error.strerror} ({error.filename or 'while writing'})"
        ) from error
    print(f"wrote {output}: {index.num_samples} samples of {len(index.shards)} shards")
