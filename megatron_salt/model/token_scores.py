"""Scores of each token and of each window: the last step of scoring data with a teacher.

The forward pass is that of distillation; only the reduction at its end differs. It turns hidden states into the loss of each label, its
rank among all ids and the entropy, chunk by chunk (no logits outlive a chunk). `window_scores` sorts and counts these into the columns of
`selection/score_format.py`. Logits are float32, so that rounding does not decide a rank; products of bfloat16 have float32 results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_salt.model import matrix_products
from megatron_salt.model.kernels.passes import Blocks, new_logits, slices
from megatron_salt.model.vocab_parallel import VocabularyShard, judge


@dataclass(frozen=True)
class TokenScores:
    """Scores of each token, float32 [n] each. Where the mask is 0 they are arbitrary, but not NaN."""

    loss: Tensor
    """-log p of the label, nats."""
    rank: Tensor
    """How many ids are more likely than the label. The label is among the top k if rank < k."""
    entropy: Tensor
    """Entropy of the model's distribution, nats."""


class TokenScorer:
    """Scores tokens with the output weight of a model. It keeps one buffer for the logits of a chunk."""

    def __init__(self, weight: Tensor, shard: VocabularyShard, chunk_tokens: int) -> None:
        """weight: [V/tp, h], this rank's rows. chunk_tokens: tokens that have logits at one time."""
        self._weight = weight[: shard.real_rows]
        self._buffer = new_logits(chunk_tokens, shard.real_rows, torch.float32, weight.device)
        self._blocks = Blocks.of(self._buffer)
        self._shard, self._chunk_tokens = shard, chunk_tokens

    def logits(self, hidden_nh: Tensor) -> Tensor:
        """float32 [n, real ids of this rank] of hidden_nh [n, h], at most one chunk. The next call overwrites them."""
        return matrix_products.logits(hidden_nh, self._weight, self._buffer[: hidden_nh.size(0)])

    @torch.no_grad()
    def score(self, hidden_sbh: Tensor, labels_sb: Tensor, mask_sb: Tensor) -> TokenScores:
        """The scores of all tokens. Collective over the tensor-parallel group; all its ranks receive.

        hidden_sbh: [s, b, h], the whole sequence on every rank; labels_sb: int64 [s*b], s-major; mask_sb: [s*b].
        """
        hidden_nh = hidden_sbh.reshape(-1, hidden_sbh.size(-1))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for chunk in slices(hidden_nh.size(0), self._chunk_tokens):
            valid = mask_sb[chunk] > 0
            label_column = self._shard.column_of(torch.where(valid, labels_sb[chunk], 0))
            judgement = judge(self.logits(hidden_nh[chunk]), label_column, self._shard.group, self._blocks)
            parts.append((-judgement.softmax.log_p, judgement.rank, judgement.entropy))
        return TokenScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def window_scores(scores: TokenScores, mask_bs: Tensor, top_k: Sequence[int]) -> Tensor:
    """The score columns of each window except "content", in the order of `selection.score_format.columns`: float64 [columns, b].

    scores: [b, s] each, of the windows' tokens. mask_bs [b, s]: 1 where a token counts; other tokens have no influence. A window without
    such a token has 0 in all columns. Medians are numpy's: the mean of the two middle values if their number is even.
    """
    valid = mask_bs > 0
    num_valid = valid.sum(-1)
    loss, entropy = (torch.where(valid, values, 0) for values in (scores.loss, scores.entropy))
    columns: list[Tensor] = []
    for k in top_k:
        inside = valid & (scores.rank < k)
        num_inside = inside.sum(-1)
        total = torch.where(inside, loss, 0).sum(-1, dtype=torch.float64)
        ascending = torch.where(inside, loss, torch.inf).sort(-1).values
        columns += [
            _median(ascending, num_valid, num_valid - num_inside),
            _ratio(total, num_valid),
            _median(ascending, num_inside, torch.zeros_like(num_inside)),
            _ratio(total, num_inside),
            _ratio(num_inside, num_valid),
        ]
    ascending = torch.where(valid, loss, torch.inf).sort(-1).values
    columns += [
        _median(ascending, num_valid, torch.zeros_like(num_valid)),
        _ratio(loss.sum(-1, dtype=torch.float64), num_valid),
        _ratio(entropy.sum(-1, dtype=torch.float64), num_valid),
        num_valid.double(),
    ]
    return torch.stack(columns)


def _median(ascending_bs: Tensor, count_b: Tensor, zeros_b: Tensor) -> Tensor:
    """The median of `zeros` zeros followed by the first values of `ascending`, `count` values in all; 0 if count is 0: float64 [b].

    Losses are never below 0, so zeros come first. One sort therefore serves both kinds of columns, with and without zeros.
    """

    def value(place_b: Tensor) -> Tensor:
        index = place_b - zeros_b
        values = ascending_bs.gather(1, index.clamp(0, ascending_bs.size(1) - 1)[:, None])[:, 0].double()
        return torch.where(index < 0, 0.0, values)

    middle = (value((count_b - 1).clamp(min=0) // 2) + value(count_b // 2)) / 2
    return torch.where(count_b > 0, middle, 0.0)


def _ratio(total_b: Tensor, count_b: Tensor) -> Tensor:
    """total / count, 0 where count is 0: float64 [b]."""
    return torch.where(count_b > 0, total_b.double() / count_b.clamp(min=1), 0.0)
