"""Whether held-out data is training data: the same file under any name, a copy of it, or a dataset made of the same source.

Datasets are told apart by their .bin file, then by what they hold, then by the files that their manifests say they were made of. Few
bytes are read, and only of datasets of one size. Parts that --valid-share cuts off one dataset are no matter of this. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence

from megatron_salt.data.manifest import Manifest, read_manifest, sampled_fingerprint
from megatron_salt.errors import UserError


def refuse_training_data(train: Sequence[str], valid: Sequence[str]) -> None:
    """Raise UserError, with both names, where a prefix of `valid` holds the data of one of `train`. Their files are there."""
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
    """What a dataset was made of, where it is recorded."""
    return {
        (source.file, source.size_bytes, source.lines, source.text_bytes, manifest.json_key, manifest.shard)
        for source in manifest.sources
        if source.text_bytes
    }
