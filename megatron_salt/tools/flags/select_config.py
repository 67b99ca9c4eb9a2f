"""Flags of tools/select_data.py, and which of them each rule takes. Docstrings of fields are their help texts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from megatron_salt.config import flag
from megatron_salt.data.order import SEEDS, is_seed
from megatron_salt.errors import UserError
from megatron_salt.selection.rules import RuleName

_SHARED = ("fraction", "num_samples", "per_dataset")
_RANKED = (*_SHARED, "tie_seed", "allow_ties")
FLAGS_OF = {
    "top": _RANKED,
    "bottom": _RANKED,
    "band": (*_RANKED, "band_skip"),
    "random": (*_SHARED, "seed"),
    "threshold": ("min_score", "max_score"),
}


@dataclass(frozen=True)
class SelectConfig:
    """Choose samples of the training data by their scores."""

    scores: tuple[str, ...]
    """Directory of a score index, or the directories that hold its shards."""

    output: str
    """PREFIX of the output files PREFIX.npy, .json, .txt and .png."""

    score: str | None = None
    """Column to choose by. The paper's formula is median_zeroed_10. Default: median_dropped_10, the variant of it that differs between
    samples even for a young teacher. No score has beaten a random choice in our runs."""

    fraction: float | None = None
    """Share of the eligible samples to choose, above 0 and up to 1. Either this or --num-samples, except with --rule threshold."""

    num_samples: int | None = None
    """Number of samples to choose."""

    rule: RuleName = "top"
    """top: the highest scores, as in the paper. band: the highest scores after the first --band-skip share, which may be noise.
    threshold: all scores from --min-score to --max-score. bottom (the lowest scores) and random are controls."""

    band_skip: float | None = None
    """With --rule band: leave out this share of the eligible samples, those with the highest scores."""

    min_score: float | None = None
    """With --rule threshold: the lowest score to choose."""

    max_score: float | None = None
    """With --rule threshold: the highest score to choose. Default: no limit."""

    per_dataset: bool = False
    """Choose the same share of the eligible samples of each dataset, so that a blend keeps its proportions. Default: all compete."""

    exclude_duplicates: bool = False
    """Leave out samples that have the same tokens as a sample with a lower id."""

    valid_share: float = 0.0
    """The training run's --valid-share. The last windows of each dataset, which the run holds out, are never chosen."""

    seed: int | None = None
    """With --rule random: the seed of the choice. Default: 1234."""

    tie_seed: int | None = None
    """Seed of the order among samples with equal scores, if only some of them are chosen. Default: 1234."""

    allow_ties: bool = False
    """Accept a choice in which ties decide about more than 5% of the chosen samples. --tie-seed orders them."""

    data_path: tuple[str, ...] = ()
    """Where the data is now, in the order of the index. Examples and --export-documents read it. Default: where it was scored."""

    examples: int = 5
    """Examples in the report: this many of the highest scores, of the lowest scores, and on each side of the cut."""

    export_documents: str | None = None
    """JSON lines file to write: text, id, dataset, window and score of every chosen window. An empty line marks the end of a document."""

    overwrite: bool = False
    """Replace an existing selection."""

    allow_duplicate_inputs: bool = False
    """Accept a shard that is named twice (it counts once), and scores of datasets that hold the same data."""

    max_memory_gib: float = 1.5
    """GiB of memory for --exclude-duplicates. With less memory it reads the hashes more often."""

    def __post_init__(self) -> None:
        flags = {name: getattr(self, name) for names in FLAGS_OF.values() for name in names}
        given = {name for name, value in flags.items() if value is not None and value is not False}
        for name in sorted(given - set(FLAGS_OF[self.rule])):
            raise UserError(
                f"{flag(name)} does not go with --rule {self.rule}, which takes {' '.join(map(flag, FLAGS_OF[self.rule]))}"
            )
        if self.rule != "threshold" and (self.fraction is None) == (self.num_samples is None):
            raise UserError(f"--rule {self.rule} takes either --fraction or --num-samples")
        for name in {"threshold": ("min_score",), "band": ("band_skip",)}.get(self.rule, ()):
            if getattr(self, name) is None:
                raise UserError(f"--rule {self.rule} needs {flag(name)}")
        self._check_numbers()
        if os.path.basename(self.output.removesuffix(".npy").removesuffix(".json")) in ("", ".", ".."):
            raise UserError(f"--output {self.output!r} names no selection; give a PREFIX, such as selections/top_half")

    def _check_numbers(self) -> None:
        for name, value, valid, expected in (
            ("fraction", self.fraction, lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("num_samples", self.num_samples, lambda x: x >= 1, "at least 1"),
            ("band_skip", self.band_skip, lambda x: 0 < x < 1, "above 0 and below 1"),
            ("min_score", self.min_score, math.isfinite, "a finite number"),
            (
                "max_score",
                self.max_score,
                lambda x: math.isfinite(x) and x >= (x if self.min_score is None else self.min_score),
                f"finite and at least --min-score {self.min_score}",
            ),
            ("seed", self.seed, lambda x: is_seed(int(x)), SEEDS),
            ("tie_seed", self.tie_seed, lambda x: is_seed(int(x)), SEEDS),
            ("valid_share", self.valid_share, lambda x: 0 <= x <= 0.5, "in [0, 0.5]"),
            ("examples", self.examples, lambda x: x >= 0, "at least 0"),
            ("max_memory_gib", self.max_memory_gib, lambda x: 0 < x <= 1 << 20, "above 0 and at most 2^20"),
        ):
            if value is not None and not valid(value):
                raise UserError(f"{flag(name)} must be {expected}, got {value}")
