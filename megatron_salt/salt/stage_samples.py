"""The samples of each stage, in a run whose stage 1 has a selection (SALT_DS).

Stage 1 visits the selection in a keyed order of its own, each sample once an epoch. Stage 2 begins the order of another pool: of all
samples, or of those that stage 1 did not visit. With weights, each dataset is a pool of its own in both stages. Where stage 2 begins
depends on one integer that checkpoints hold: how many samples of its order stage 1 has passed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from megatron_salt.data.samples import Samples
from megatron_salt.data.subsets import Selected, Unseen
from megatron_salt.data.windows import Windows
from megatron_salt.errors import UserError
from megatron_salt.selection.selection_file import Selection

COUNTED = 1 << 20  # samples of stage 2 that are looked up in stage 1, at most


@dataclass(frozen=True)
class StageSamples:
    """The training data of a run with a selection."""

    everything: Samples
    """The training split."""
    selection: Selection
    stage2_data: Literal["all", "unseen"]

    def stage1(self) -> Samples:
        """The samples of stage 1: the selection. A selection of all samples has the order of a run without a selection."""
        return self._stage1

    def stage2(self, passed: int) -> Samples:
        """The samples of stage 2, after stage 1 has passed `passed` samples of its order."""
        if self.stage2_data == "all":
            return self.everything.drawing_from(f"{self.everything.split}/all", self.everything.id_ranges)
        return self.everything.drawing_from(f"{self.everything.split}/unseen", self._unseen(passed))

    @property
    def fingerprint(self) -> str:
        """Names the samples of both stages."""
        return f"stage 1 from {self.selection.fingerprint}, stage 2 from --stage2-data {self.stage2_data}"

    def repeats(self, passed: int, num_samples: int) -> str | None:
        """A message where stage 2 draws samples in its first epoch that stage 1 has visited; None where it draws none.

        passed: samples that stage 1 has passed in its order. num_samples: samples that stage 2 will draw. Above `COUNTED` samples the
        number is an estimate.
        """
        if self.stage2_data != "all":
            return None
        seen = self._unseen(passed)
        draws = min(num_samples, len(self.everything))
        stride = -(-max(draws, 1) // COUNTED)
        ids = self.stage2(passed).ids(np.arange(0, draws, stride))
        count = sum(int(pool.saw(ids[self._of_pool(number, ids)]).sum()) for number, pool in enumerate(seen)) * stride
        if not count:
            return None
        about = "about " if stride > 1 else ""
        return f"{about}{count} of the {num_samples} samples of stage 2 were in stage 1 too (--stage2-data unseen avoids that)"

    def refuse_unfit(self, global_batch_size: int, passed: int, has_stage2: bool) -> None:
        """Raise UserError where a stage has too few samples. passed: samples that stage 1 passes in its order by --kd-steps."""
        name, ids, samples = f"--stage1-selection {self.selection.path}", self.selection.ids, self.everything
        if len(ids) < global_batch_size:
            raise UserError(f"{name} has {len(ids)} samples, fewer than one --global-batch-size {global_batch_size}")
        for windows, first, held_out in self._held_out:
            chosen = self.selection.between(first, first + held_out)
            if chosen.stop > chosen.start:
                raise UserError(
                    f"{name} has {chosen.stop - chosen.start} of the {held_out} windows of {windows.file.prefix} that --valid-share holds "
                    "out: select again with the same --valid-share"
                )
        if samples.weighted:
            for windows, chosen_of in zip(samples.windows, self._chosen, strict=True):
                if not chosen_of.size:
                    raise UserError(
                        f"{name} has no sample of {windows.file.prefix}, to which --data-path gives a weight; select with "
                        "--per-dataset, or leave it out of the selection's blend and this one's"
                    )
        if has_stage2 and self.stage2_data == "unseen":
            for number, pool in enumerate(self._unseen(passed)):
                if not pool.size:
                    of = samples.windows[number].file.prefix if samples.weighted else "the data"
                    raise UserError(
                        f"--stage2-data unseen: stage 1 visits all {pool.everything.size} samples of {of} in --kd-steps, and "
                        "nothing is left for stage 2"
                    )

    @cached_property
    def _stage1(self) -> Samples:
        return self.everything.drawing_from(self.everything.split, self._chosen)

    @cached_property
    def _chosen(self) -> list[Selected]:
        """The selected ids of each pool."""
        ids = self.selection.ids
        if not self.everything.weighted:
            return [Selected(ids)]
        return [Selected(ids[self.selection.between(first, end)]) for first, end in itertools.pairwise(self._first_ids)]

    @property
    def _first_ids(self) -> list[int]:
        """Id of each dataset's first window, and after them the number of all windows."""
        return self.everything.first_ids.tolist()

    @property
    def _held_out(self) -> list[tuple[Windows, int, int]]:
        """(windows, first held-out id, number of held-out ids) of each dataset."""
        samples = self.everything
        ends = zip(samples.windows, self._first_ids, samples.first, samples.sizes, strict=False)
        return [(windows, offset + first + size, len(windows) - first - size) for windows, offset, first, size in ends]

    def _unseen(self, passed: int) -> list[Unseen]:
        blend = self._stage1.blend
        parts = zip(self.everything.id_ranges, self._chosen, blend.pools, blend.progress(passed), strict=True)
        return [Unseen(ranges, chosen, pool, progress.drawn) for ranges, chosen, pool, progress in parts]

    def _of_pool(self, number: int, ids: np.ndarray) -> np.ndarray:
        """Which of the ids belong to a pool: bool [n]."""
        if not self.everything.weighted:
            return np.ones(len(ids), bool)
        return (ids >= self._first_ids[number]) & (ids < self._first_ids[number + 1])
