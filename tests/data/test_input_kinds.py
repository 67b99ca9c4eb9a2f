"""Which columns of a table hold texts."""

from __future__ import annotations

import pytest

from megatron_salt.data import reading


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"])
def test_every_string_like_column_packs_to_the_same_texts(kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = ["a", None, "a text longer than the twelve bytes that a view holds itself", ""]
    values = texts if "string" in kind else [text if text is None else text.encode() for text in texts]
    batch = pyarrow.record_batch({"text": pyarrow.array(values, getattr(pyarrow, kind)())})
    reading._check_columns("t.parquet", batch.schema, ["text"])
    assert reading.unpack(reading._packed(batch, ["text"]), 1) == [[t if t is None else t.encode() for t in texts]]
