"""Grow a model: stack a trained model of few layers to one of more layers, which trains on from there (G_stack, arXiv 2405.15319).

    python tools/grow_checkpoint.py --load runs/shallow --num-layers 24 --save runs/grown
    python -m megatron_salt.pretrain --config deep.yaml --load runs/grown --finetune --save runs/deep

Layer i of the grown model is layer i mod n of the n layers of the source: the whole stack, one copy on the other. Embedding, positions,
final norm and output weight are those of the source. Only weights are taken: the grown model is at step 0, and its optimizer and learning
rate begin anew. The paper's authors train a grown model on in the same way, and recommend four times as many layers. One process, on the
CPU. Memory is bounded by a layer, not by the model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class GrowConfig:
    """Stack the layers of a checkpoint to a deeper model."""

    load: str
    """The trained model: a directory of checkpoints, of which the latest is used, or one iter_* directory. Of any layout."""

    num_layers: int
    """Layers of the grown model: a multiple of the source's."""

    save: str
    """Directory of checkpoints to make. It must not exist, unless --overwrite replaces it."""

    overwrite: bool = False
    """Replace a directory that holds a grown or imported checkpoint and nothing else."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"--num-layers must be at least 1, got {self.num_layers}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(GrowConfig, grow, argv)


def grow(config: GrowConfig) -> None:
    """Write the grown checkpoint. Raises UserError."""
    from megatron_salt.convert.grow import grow_checkpoint  # torch

    grow_checkpoint(Path(config.load), config.num_layers, Path(config.save), config.overwrite)


if __name__ == "__main__":  # the jobs of a study
    sys.exit(main())
