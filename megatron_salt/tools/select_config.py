"""Flags of select_data."""

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
    """Choose samples by their scores."""

    scores: tuple[str, ...]
    """Directory of a score index, or several that hold its shards."""

    output: str
    """PREFIX of what is written: PREFIX.npy, .json, .txt and .png."""

    score: str | None = None
    """Column to choose by. Default: median_dropped_10, the reading of the paper's score that tells the samples of a young teacher apart;
    its formula is median_zeroed_10. None has beaten a random choice in our runs."""

    fraction: float | None = None
    """Share of the eligible samples to choose, above 0 and up to 1. Either this or --num-samples, except with --rule threshold."""

    num_samples: int | None = None
    """How many samples to choose."""

    rule: RuleName = "top"
    """top: the highest scores, as in the paper. band: those after the highest --band-skip share, which may be noise. threshold: all from
    --min-score to --max-score. Controls: bottom, the lowest scores, and random."""

    band_skip: float | None = None
    """With --rule band: share of the eligible samples, those with the highest scores, that is left out."""

    min_score: float | None = None
    """With --rule threshold: the lowest score that is chosen."""

    max_score: float | None = None
    """With --rule threshold: the highest score that is chosen. Default: no limit."""

    per_dataset: bool = False
    """Each dataset gives the same share of its eligible samples, so that a blend keeps its proportions. Default: all are one pool."""

    exclude_duplicates: bool = False
    """Leave out samples whose tokens are those of a sample with a lower id."""

    valid_share: float = 0.0
    """The training run's --valid-share: each dataset's last windows that it holds out are never chosen."""

    seed: int | None = None
    """With --rule random: another seed chooses other samples. Default: 1234."""

    tie_seed: int | None = None
    """Orders samples of one score, of which a rule takes some: with another seed it takes others. Default: 1234."""

    allow_ties: bool = False
    """Choose although more than 5% of the chosen have the very score of a cut, as others have: --tie-seed decides among them."""

    data_path: tuple[str, ...] = ()
    """Where the data is now, in the index's order, for examples and --export-documents. Default: where it was scored."""

    examples: int = 5
    """Samples whose text the report shows: so many of the highest scores, of the lowest, and on either side of the cut."""

    export_documents: str | None = None
    """JSON lines file for the text of every chosen window, with its id, dataset, window and score; an empty line where a document ends."""

    overwrite: bool = False
    """Replace a selection that is already there."""

    allow_duplicate_inputs: bool = False
    """Take shards that are named twice, of which one counts, and scores of datasets that hold the same windows twice."""

    max_memory_gib: float = 1.5
    """Memory for the search of --exclude-duplicates; with less it reads the hashes more often."""

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
        for name, value, good, told in (
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
            if value is not None and not good(value):
                raise UserError(f"{flag(name)} must be {told}, got {value}")
