"""Losses of evaluate.py on tokenized data: every window of a dataset once, as a training run evaluates it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_salt.config import DataConfig
from megatron_salt.data.manifest import read_manifest, tokenizer_directory
from megatron_salt.data.samples import Samples, open_samples
from megatron_salt.errors import LeftEarly, UserError
from megatron_salt.tokenizer.id_bytes import different_meanings
from megatron_salt.tokenizer.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron_salt.model.gpt import GPT
    from megatron_salt.parallel.mesh import Mesh

SHOWN = 10
"""Ids that differ and are named in a message"""


@dataclass(frozen=True, kw_only=True)
class NamedData:
    """A dataset in windows of one length, masked as in a checkpoint's training."""

    name: str
    prefix: str
    samples: Samples
    facts: dict[str, Any]
    """All that decides the figures beside the model, ready for JSON."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model without an optimizer, as `train.evaluate.evaluate` takes it."""

    chunks: Sequence[GPT]
    mesh: Mesh
    seq_length: int
    micro_batch_size: int
    global_batch_size: int


def parse_data(words: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """{name: prefix} of --data. taken: names of tasks. Raises UserError."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, prefix = word.partition("=")
        if not (name and equals and prefix):
            raise UserError(f"--data {word} is not of the form NAME=PREFIX")
        if name in found or name in taken:
            raise UserError(f"--data {word}: {name} is the name of {'another set' if name in found else 'a task'} too")
        found[name] = prefix
    return found


def window_length(asked: int | None, contexts: Mapping[str, int]) -> int:
    """Tokens of a window of --data, the same for all checkpoints. asked: --seq-length; None: the shortest context.

    contexts: {checkpoint as --load names it: tokens that its model takes}. Raises UserError."""
    load = min(contexts, key=lambda one: contexts[one])
    if asked is not None and asked > contexts[load]:
        raise UserError(
            f"--seq-length {asked} is longer than the {contexts[load]} tokens that the model of --load {load} takes"
        )
    return contexts[load] if asked is None else asked


def open_data(name: str, prefix: str, tokenizer: Tokenizer, data: DataConfig, seq_length: int) -> NamedData:
    """Open a dataset for a checkpoint. data: the flags of its training, which say how documents are masked. seq_length: of a window.

    Raises UserError."""
    samples = open_samples(prefix, "--data", data, seq_length, tokenizer.vocabulary_size, tokenizer.eod)
    refuse_other_ids(name, prefix, tokenizer)
    masking = {flag: getattr(data, flag) for flag in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")}
    facts = {"data": name, "fingerprint": samples.fingerprint, "seq_length": seq_length, **masking}
    return NamedData(name=name, prefix=prefix, samples=samples, facts=facts)


def refuse_other_ids(name: str, prefix: str, tokenizer: Tokenizer) -> None:
    """Raise UserError where the ids of a dataset mean something else to a checkpoint's tokenizer than to the one that made them.

    Two tokenizers may have other fingerprints and the same ids, as that of a model that went out to another program and came back.
    """
    made = read_manifest(prefix)
    if made is None or made.tokenizer_fingerprint == tokenizer.fingerprint:
        return
    told = f"--data {name}={prefix} was made with tokenizer {made.tokenizer_fingerprint}, the checkpoint's is {tokenizer.fingerprint}"
    if made.append_eod and made.eod != tokenizer.eod:
        raise UserError(f"{told}: its documents end in id {made.eod}, those of the checkpoint in {tokenizer.eod}")
    kept = tokenizer_directory(prefix)
    if not kept.is_dir():
        raise UserError(f"{told}, and whether their ids mean the same cannot be seen without {kept}")
    maker = load_tokenizer(kept)
    if maker.fingerprint != made.tokenizer_fingerprint:
        raise UserError(f"{told}, and {kept} holds {maker.fingerprint}")
    count = min(maker.vocabulary_size, tokenizer.vocabulary_size)  # higher ids are refused where they occur
    different = different_meanings(tokenizer, maker, count)
    if different:
        shown = "; ".join(f"{i} is {there} there and {here} here" for i, there, here in different[:SHOWN])
        raise UserError(
            f"{told}: {len(different)} of {count} ids mean something else to the checkpoint (there) than in the data (here): {shown}"
            + ("; ..." if len(different) > SHOWN else "")
        )


def evaluate_data(
    data: NamedData,
    tokenizer: Tokenizer,
    chunks: Sequence[GPT],
    mesh: Mesh,
    *,
    batch_tokens: int,
    reason_to_stop: Callable[[], str | None],
    on_progress: Callable[[int, int], None] = lambda num_windows, num_tokens: None,
) -> dict[str, Any]:
    """The figures of all windows, ready for JSON. Collective over all ranks; all receive. Raises LeftEarly.

    on_progress: called with the windows and tokens that all replicas together have done since the last call."""
    from megatron_salt.data.batch import Batches
    from megatron_salt.train.build import byte_counts
    from megatron_salt.train.evaluate import CutShort, evaluate
    from megatron_salt.train.state import ValidationSet

    samples, replicas = data.samples, mesh.layout.data
    length, count = samples.windows[0].seq_length, len(samples)
    micro = max(1, min(batch_tokens // length, math.ceil(count / replicas)))
    stages = mesh.layout.pipeline
    share = micro * stages  # so many microbatches that the pipeline is not mostly idle
    model = LoadedModel(chunks=chunks, mesh=mesh, seq_length=length, micro_batch_size=micro, global_batch_size=share * replicas)
    batches = Batches(
        samples,
        global_batch_size=model.global_batch_size,
        micro_batch_size=micro,
        replica=mesh.at.dp,
        num_replicas=replicas,
        end=count,
    )
    num_batches = math.ceil(count / model.global_batch_size)
    held_out = ValidationSet(name=data.name, batches=batches, num_batches=num_batches, byte_counts=byte_counts(tokenizer))

    def batch_done(number: int) -> None:
        num_windows = min(count, (number + 1) * model.global_batch_size) - number * model.global_batch_size
        on_progress(num_windows, num_windows * length)

    try:
        found = evaluate(model, held_out, reason_to_stop=reason_to_stop, on_batch=batch_done)
    except CutShort as cut:
        raise LeftEarly(cut.reason) from None
    perplexity = math.exp(found["loss"]) if found["loss"] < 700 else math.inf
    figures = {"loss": found["loss"], "perplexity": perplexity} | {key: found[key] for key in ("accuracy", "bits_per_byte")}
    return {
        "windows": count,
        "tokens": int(found["tokens"]),
        "metrics": {name: {"value": value} for name, value in figures.items() if math.isfinite(value)},
    }
