"""From (context, continuation) to token ids, split as lm-evaluation-harness splits them.

White space at the end of the context moves to the continuation. Both are encoded as one text, and the continuation's ids are those after
as many as the context alone has. An empty context is one id: BOS where texts begin with BOS, else the end-of-document id. A request that
is longer than the model's context loses ids from the left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.tokenizer.document_ends import ends_of_post_processor
from megatron_salt.tokenizer.tokenizer import Tokenizer

AddBos = Literal["auto", "yes", "no"]
_AT_A_TIME = 4096  # texts that are encoded together


@dataclass(frozen=True)
class Request:
    """Ids whose last ones are scored, each given those before it."""

    ids: np.ndarray
    """int64: the context's, at least one, then the continuation's."""
    num_scored: int
    """Ids of the continuation."""
    num_cut: int
    """Ids that the context lost from the left, because the model's context is shorter."""


def first_id(tokenizer: Tokenizer, add_bos: AddBos) -> int | None:
    """The id that every text begins with; None: no id. auto: as the tokenizer's own file does. Raises UserError."""
    if add_bos == "no":
        return None
    if add_bos == "yes":
        if tokenizer.bos is None:
            raise UserError(f"--add-bos yes: the {tokenizer.kind} declares no beginning-of-sequence token, or several")
        return tokenizer.bos
    if tokenizer.kind != "HuggingFaceTokenizer":
        return None
    processor = json.loads(tokenizer.files["tokenizer.json"]).get("post_processor")
    begins = ends_of_post_processor(processor).bos
    return next(iter(begins)) if len(begins) == 1 else None


def encode(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, bos: int | None, longest: int, places: Sequence[str]
) -> list[Request]:
    """The requests of these pairs, in order. longest: tokens that the model takes. places: of each pair, for messages. Raises UserError."""
    split = [_split(context, continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in split))
    length_of = dict(zip(contexts, map(len, _encode_all(tokenizer, contexts)), strict=True))
    wholes = _encode_all(tokenizer, [context + continuation for context, continuation in split])
    begin = [] if bos is None else [bos]
    result = []
    for (context, continuation), whole, place in zip(split, wholes, places, strict=True):
        num_scored = len(whole) - length_of[context]
        if num_scored < 1:
            raise UserError(f"{place}: {continuation!r} has no tokens of its own: the tokenizer joins it with the context")
        if num_scored > longest:
            raise UserError(f"{place}: the continuation has {num_scored} tokens, the model takes {longest}")
        ids = begin + whole
        if len(ids) == num_scored:  # the context is empty
            if tokenizer.eod is None:
                raise UserError(
                    f"{place}: the context is empty, and the {tokenizer.kind} has no end-of-document id to begin with"
                )
            ids = [tokenizer.eod, *whole]
        num_cut = max(0, len(ids) - (longest + 1))
        result.append(Request(np.array(ids[num_cut:], np.int64), num_scored, num_cut))
    return result


def _split(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    parts = [tokenizer.encode_batch(texts[first : first + _AT_A_TIME]) for first in range(0, len(texts), _AT_A_TIME)]
    return [ids for part in parts for ids in part]
