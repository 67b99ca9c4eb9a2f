"""Refuses held-out data that is training data: the same file under any name, a copy, or a dataset made of the same source.

Datasets are compared by their .bin file, then by their contents, then by the source files in their manifests. Few bytes are read, and
only where two datasets have the same size. Windows that --valid-share holds out of a dataset are not looked at. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence

from megatron_salt.data.manifest import Manifest, read_manifest, sampled_fingerprint
from megatron_salt.errors import UserError


def refuse_training_data(train: Sequence[str], valid: Sequence[str]) -> None:
    """UserError, with both names, where a dataset of `valid` has the data of one of `train`. Their files must exist."""
    manifests = {prefix: read_manifest(prefix) for prefix in (*train, *valid)}
    for held_out in valid:
        for other in train:
            how = _overlap(other, manifests[other], held_out, manifests[held_out])
            if how is not None:
                raise UserError(
                    f"--valid-data-path {held_out} {how} --data-path {other}, so that its loss would be one of training; "
                    "give other data, --valid-share, or allow it with --allow-valid-in-train"
                )


def _overlap(one: str, manifest: Manifest | None, other: str, others: Manifest | None) -> str | None:
    """How dataset `other` repeats dataset `one`, in words; None: it does not."""
    files = [os.stat(prefix + ".bin") for prefix in (one, other)]
    if os.path.samestat(*files):
        return "is the same file as"
    sizes = [(os.path.getsize(prefix + ".bin"), os.path.getsize(prefix + ".idx")) for prefix in (one, other)]
    differ = manifest is not None and others is not None and manifest.fingerprint != others.fingerprint
    if sizes[0] == sizes[1] and not differ and sampled_fingerprint(one) == sampled_fingerprint(other):
        return "holds the same tokens as"
    if manifest is not None and others is not None and (both := _sources(manifest) & _sources(others)):
        return f"was made of the same text ({min(both, key=str)[0]}) as"
    return None


def _sources(manifest: Manifest) -> set[tuple[Hashable, ...]]:
    """Source files of a dataset, as far as they are recorded."""
    return {
        (source.file, source.size_bytes, source.lines, source.text_bytes, manifest.json_key, manifest.shard)
        for source in manifest.sources
        if source.text_bytes
    }
