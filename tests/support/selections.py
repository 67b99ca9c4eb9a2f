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


def write_ids(
    prefix: object,
    data_path: Sequence[str],
    seq_length: int,
    ids: Sequence[int],
    valid_share: float = 0.0,
    teacher: str = "sha256:0",
) -> str:
    """Write PREFIX.npy and PREFIX.json for byte-level data; returns PREFIX.npy. teacher: fingerprint of the one that scored."""
    datasets = tuple(DatasetFacts(one, fingerprint(one), len(Windows(TokenFile.open(one), seq_length))) for one in data_path)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    scores = IndexManifest(
        datasets=datasets,
        seq_length=seq_length,
        vocabulary=tokenizer.vocabulary_size,
        tokenizer=tokenizer.fingerprint,
        teacher=teacher,
        teacher_step=10,
        teacher_directory="teacher/iter_0000010",
        top_k=(10,),
        masking={},
        dtype="float32",
        micro_batch_size=1,
        block_samples=1,
    )
    write_selection(
        str(prefix),
        [np.array(sorted(ids), np.int64)],
        num_selected=len(ids),
        scores=scores,
        rule={"rule": "by hand"},
        valid_share=valid_share,
    )
    return f"{prefix}.npy"
