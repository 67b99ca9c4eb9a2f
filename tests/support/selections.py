"""A selection of chosen ids, as tools/select_data.py would have written it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_salt.config import TokenizerConfig
from megatron_salt.data.indexed_dataset import TokenFile
from megatron_salt.data.manifest import DatasetFacts, fingerprint
from megatron_salt.data.windows import Windows
from megatron_salt.selection.score_format import IndexManifest
from megatron_salt.selection.selection_file import write_selection
from megatron_salt.tokenizer.tokenizer import build_tokenizer


def write_ids(prefix: object, data_path: Sequence[str], seq_length: int, ids: Sequence[int], valid_share: float = 0.0) -> str:
    """Write PREFIX.npy and PREFIX.json for byte-level data; returns PREFIX.npy."""
    datasets = tuple(DatasetFacts(one, fingerprint(one), len(Windows(TokenFile.open(one), seq_length))) for one in data_path)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    scores = IndexManifest(
        datasets, seq_length, tokenizer.vocabulary_size, tokenizer.fingerprint, "sha256:0", 10, "teacher/iter_0000010", (10,), {},
        "float32", micro_batch_size=1, block_samples=1,
    )  # fmt: skip
    write_selection(str(prefix), [np.array(sorted(ids), np.int64)], len(ids), scores, {"rule": "by hand"}, valid_share)
    return f"{prefix}.npy"
