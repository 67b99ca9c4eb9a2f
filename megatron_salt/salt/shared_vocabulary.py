"""Which ids mean the same to teacher and student, and how much their tokenizers differ otherwise.

The same tokenizer is the quick case. Any other one must give the same bytes, or the same role, for every id that both have. The teacher may
have more ids and more rows than that. The student may have more ids too, if its data does not hold them. How the teacher's tokenizer
would cut a text into tokens does not matter: the ids of the data are what they are. It is only told. Not collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from megatron_salt.checkpoint import save_directory
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.manifest import read_manifest
from megatron_salt.data.samples import Samples
from megatron_salt.errors import UserError
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint
from megatron_salt.tokenizer.id_bytes import bytes_of_ids, different_meanings
from megatron_salt.tokenizer.tokenizer import Tokenizer, load_tokenizer

SHOWN = 10
"""Ids that differ and are named in a message."""
TEXT_BYTES = 1_000_000
"""Text of the run's data on which the two tokenizers are compared."""
_TOKENS_READ = 1 << 22  # of a dataset at a time


def shared_ids(teacher: TeacherCheckpoint, tokenizer: Tokenizer) -> int:
    """The number of ids that mean the same to the teacher and to this tokenizer, the student's: those from 0 up to it.

    Reads the tokenizer in the teacher's checkpoint, unless it is the same one. Raises UserError where ids that both have differ.
    """
    if teacher.tokenizer_fingerprint == tokenizer.fingerprint:
        return min(tokenizer.vocabulary_size, teacher.vocabulary_size)
    theirs = tokenizer_of(teacher)
    count = min(tokenizer.vocabulary_size, theirs.vocabulary_size, teacher.vocabulary_size)
    different = different_meanings(theirs, tokenizer, count)
    if different:
        shown = "; ".join(f"{i} is {there} there and {here} here" for i, there, here in different[:SHOWN])
        raise UserError(
            f"--teacher-load {teacher.directory}: {len(different)} of {count} ids mean something else to the teacher than to the student's "
            f"tokenizer: {shown}{'; ...' if len(different) > SHOWN else ''}; make the data with the teacher's tokenizer"
        )
    return count


def tokenizer_of(teacher: TeacherCheckpoint) -> Tokenizer:
    """The tokenizer in the teacher's checkpoint. Raises UserError."""
    directory = teacher.directory / save_directory.TOKENIZER
    try:
        tokenizer = load_tokenizer(directory)
    except UserError as error:
        raise UserError(f"--teacher-load: {error}") from None
    if tokenizer.fingerprint != teacher.tokenizer_fingerprint:
        raise UserError(
            f"--teacher-load {teacher.directory} was trained with tokenizer {teacher.tokenizer_fingerprint}, and {directory} holds "
            f"{tokenizer.fingerprint}"
        )
    return tokenizer


def refuse_other_ids(splits: Iterable[Samples], shared: int, vocabulary_size: int) -> None:
    """Raise UserError where the data holds an id that the student has and the teacher has not. Reads all data, unless there is no such id.

    shared: see `shared_ids`. vocabulary_size: of the student's tokenizer.
    """
    if shared >= vocabulary_size:
        return
    found = first_of_ids(splits, np.arange(vocabulary_size) >= shared)
    if found is not None:
        where, position, unknown = found
        raise UserError(
            f"{where}: token {position} is id {unknown}, which the teacher does not have: it shares {shared} of the {vocabulary_size} "
            f"ids of the student's tokenizer, those below {shared}"
        )


def first_of_ids(splits: Iterable[Samples], wanted: np.ndarray) -> tuple[str, int, int] | None:
    """(data set, its position, its id) of the first token whose id is wanted: bool [ids]. None: there is none. Reads all data."""
    windows = {each.file.prefix: each.file for samples in splits for each in samples.windows}
    for file in windows.values():
        for start in range(0, file.num_tokens, _TOKENS_READ):
            tokens = file.read(np.array([start]), min(_TOKENS_READ, file.num_tokens - start))[0]
            hit = wanted.take(tokens, mode="clip")
            if hit.any():
                at = int(hit.argmax())
                return f"{file.flag} {file.prefix}", start + at, int(tokens[at])
    return None


# ---- a teacher without an output layer ---------------------------------------------------------------------------------


def ids_unlike(teacher: TeacherCheckpoint, tokenizer: Tokenizer) -> dict[int, str]:
    """{id of the student's tokenizer that the teacher cannot read: why}. It means something else there, or is no row of the embedding. Rows
    of the output layer do not matter. Raises UserError."""
    rows, ids = teacher.vocabulary_size, tokenizer.vocabulary_size
    unlike = dict.fromkeys(range(rows, ids), f"no row of its embedding, which has {rows}")
    if teacher.tokenizer_fingerprint == tokenizer.fingerprint:
        return unlike
    theirs = tokenizer_of(teacher)
    known = min(ids, rows, theirs.vocabulary_size)
    different = different_meanings(theirs, tokenizer, known)
    unlike |= dict.fromkeys(range(known, min(ids, rows)), f"no token of its tokenizer, which has {theirs.vocabulary_size}")
    return unlike | {i: f"{there} to it and {here} to the student" for i, there, here in different}


def refuse_unlike_ids(splits: Iterable[Samples], teacher: TeacherCheckpoint, tokenizer: Tokenizer) -> None:
    """Raise UserError where the data holds an id of `ids_unlike`. Reads all data, unless there is no such id."""
    unlike = ids_unlike(teacher, tokenizer)
    if not unlike:
        return
    found = first_of_ids(splits, np.isin(np.arange(tokenizer.vocabulary_size), list(unlike)))
    if found is not None:
        where, position, i = found
        why = unlike.get(i, f"beyond the {tokenizer.vocabulary_size} ids of the student's tokenizer")
        raise UserError(
            f"{where}: token {position} is id {i}, which --teacher-load {teacher.directory} cannot read: {why}; {len(unlike)} ids are "
            "unlike, and with --guide hidden the data must hold none of them"
        )


def missing_bos(
    teacher: TeacherCheckpoint, tokenizer: Tokenizer, samples: Iterable[Samples], windows: Sequence[Microbatch]
) -> int | None:
    """The id with which an imported teacher's own tokenizer begins a text, where the run's data does not begin its documents so.

    None for a teacher that this program trained, for a tokenizer without such an id, and where a manifest of `samples` or a token of
    `windows` shows the id. tokenizer: the student's. Raises UserError.
    """
    if not teacher.imported:
        return None
    same = teacher.tokenizer_fingerprint == tokenizer.fingerprint
    bos = (tokenizer if same else tokenizer_of(teacher)).bos
    if bos is None or bos >= teacher.vocabulary_size:
        return None
    if any(bool((window.tokens == bos).any()) for window in windows):
        return None
    manifests = [read_manifest(prefix) for prefix in {each.file.prefix for one in samples for each in one.windows}]
    return None if any(manifest is not None and manifest.bos == bos for manifest in manifests) else bos


# ---- what is told ------------------------------------------------------------------------------------------------------


def describe_vocabularies(
    teacher: TeacherCheckpoint, tokenizer: Tokenizer, shared: int | None, samples: Samples
) -> tuple[str, ...]:
    """Lines for the user where the vocabularies are not the same; none where they are. Reads 1 MB of `samples` as text. shared: see
    `shared_ids`; None: the teacher gives no soft labels."""
    lines = []
    if shared is None:
        unlike = ids_unlike(teacher, tokenizer)
        if unlike:
            lines.append(
                f"teacher: {len(unlike)} of the {tokenizer.vocabulary_size} ids of the student's tokenizer mean something else to it or "
                "are no row of its embedding; data that holds one of them is refused"
            )
    elif not teacher.vocabulary_size == tokenizer.vocabulary_size == shared:
        lines.append(
            f"teacher: {shared} ids mean the same to it and to the student, whose tokenizer has {tokenizer.vocabulary_size}; its softmax "
            f"has {teacher.vocabulary_size}, and its distribution is renormalised over those that are shared"
        )
    if teacher.tokenizer_fingerprint != tokenizer.fingerprint:
        theirs = tokenizer_of(teacher)
        texts = list(texts_of(samples, tokenizer, TEXT_BYTES))
        differ, tokens = segmentation_difference(tokenizer, theirs, texts)
        size = sum(len(text.encode()) for text in texts)
        rate = f"cuts {differ} of {tokens} tokens ({differ / max(tokens, 1):.3%}) differently" if differ else "cuts all alike"
        lines.append(
            f"teacher: its tokenizer is another {theirs.kind} than the student's with the same ids; on {size / 1e6:.2f} MB of the data as "
            f"text it {rate}"
        )
    return tuple(lines)


def texts_of(samples: Samples, tokenizer: Tokenizer, num_bytes: int) -> Iterator[str]:
    """Texts of the first samples of the order, cut at ends of documents: about `num_bytes` of UTF-8, or all that there is."""
    size = 0
    for position in range(len(samples)):
        ids = samples.read(np.array([position]))[1][0]
        for part in np.split(ids, np.flatnonzero(ids == (-1 if tokenizer.eod is None else tokenizer.eod))):
            text = tokenizer.decode(part.tolist()).strip("\ufffd")
            if text:
                size += len(text.encode())
                yield text
        if size >= num_bytes:
            return


def segmentation_difference(one: Tokenizer, other: Tokenizer, texts: Sequence[str]) -> tuple[int, int]:
    """(tokens of `one` that `other` does not put at the same place, all tokens of `one`) for these texts."""
    differ = tokens = 0
    lengths = [[len(content) for content in bytes_of_ids(tokenizer)] for tokenizer in (one, other)]
    for mine, theirs in zip(one.encode_batch(texts), other.encode_batch(texts), strict=True):
        tokens += len(mine)
        if mine != theirs:
            differ += len(_placed(mine, lengths[0]) - _placed(theirs, lengths[1]))
    return differ, tokens


def _placed(ids: list[int], lengths: Sequence[int]) -> set[tuple[int, int, int]]:
    """(bytes from the token's end to the text's, number among tokens of that place, id) of each token. From the end, because some
    tokenizers put a space before the text."""
    after = [0, *accumulate(lengths[i] for i in reversed(ids))]
    seen: dict[int, int] = {}
    placed = set()
    for place, i in zip(after, reversed(ids), strict=False):
        placed.add((place, seen.get(place, 0), i))
        seen[place] = seen.get(place, 0) + 1
    return placed
