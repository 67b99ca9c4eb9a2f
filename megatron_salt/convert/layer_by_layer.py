"""What a checkpoint computes on the reference batch, computed with one layer in memory at a time. One process, on the CPU, in float32.

A run recognises a model as its teacher by these losses (data/reference_batch.py). A model that was converted was never in memory as a
whole, and need not fit there: the hidden states of the whole batch go through the layers, one after the other. Of the embedding only the
rows of the batch's ids are kept, and the output weight is read a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.convert.parts import EMBEDDING, OUTPUT
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.convert.verify import PROMPT, Outputs
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.reference_batch import fixed_batch, prefix_lengths
from megatron_salt.model.gpt import GPT, transformer_config
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.mesh import Mesh

LONGEST = 1024
"""Tokens of a sequence. A longer context would take long on a CPU, and would recognise the model no better."""
LOGITS_BYTES = 64 << 20
"""Logits of a few rows of the output weight for all tokens of the batch take so many bytes."""
_LAYERS = "decoder.layers."


@torch.no_grad()
def outputs_of_checkpoint(
    tensors: TensorFiles, model: ModelConfig, vocabulary_size: int, context: int, mesh: Mesh, done: Callable[[], None]
) -> Outputs:
    """What a model in torch_dist files computes on the reference batch, see `lengths_of`.

    mesh: of one rank, which builds a layer. done: called after each layer. Memory: one layer in float32, and stored pieces of the
    embedding and the output weight one at a time.
    """
    lengths = lengths_of(context)
    # Attention is causal: positions behind those that a sequence counts change nothing.
    batch = [_prefix(part, n) for part, n in zip(fixed_batch(vocabulary_size, lengths[-1], lengths), lengths, strict=True)]
    ids, places = torch.unique(torch.cat([part.tokens[0] for part in batch]), return_inverse=True)
    chunk = _body_of_one_layer(replace(model, max_position_embeddings=model.max_position_embeddings or context), len(ids), mesh)
    keys = _keys(chunk)
    _fill(chunk, tensors, [name for name, key in keys.items() if not key.startswith(_LAYERS) and key != EMBEDDING], keys, None)
    for first, rows in _vocabulary_rows(tensors, EMBEDDING, vocabulary_size, model.hidden_size):
        here = (ids >= first) & (ids < first + len(rows))
        chunk.embedding.word_embeddings.weight[: len(ids)][here] = rows[ids[here] - first].float()
    hidden = [
        chunk.embedding(input_ids=tokens[None], position_ids=part.position_ids)
        for tokens, part in zip(places.split(lengths), batch, strict=True)
    ]
    layer_names = [name for name, key in keys.items() if key.startswith(_LAYERS)]
    for layer in range(model.num_layers):
        _fill(chunk, tensors, layer_names, keys, layer)
        hidden = [_through_layer(chunk, states, part) for states, part in zip(hidden, batch, strict=True)]
        done()
    normed = torch.cat([chunk.decoder.final_layernorm(states)[:, 0] for states in hidden])
    labels = torch.cat([part.labels[0] for part in batch])
    key = OUTPUT if model.untie_embeddings_and_output_weights else EMBEDDING
    losses, logits = _head(_vocabulary_rows(tensors, key, vocabulary_size, model.hidden_size), normed, labels)
    return Outputs(tuple(float(each.mean()) for each in losses.split(lengths)), logits)


def lengths_of(context: int) -> tuple[int, ...]:
    """The lengths of the reference batch on which a converted model records its losses: up to `LONGEST` tokens."""
    return tuple(prefix_lengths(min(context, LONGEST)))


def _prefix(part: Microbatch, length: int) -> Microbatch:
    tokens, labels = part.tokens[:, :length], part.labels[:, :length]
    return replace(
        part, tokens=tokens, labels=labels, loss_mask=part.loss_mask[:, :length], position_ids=part.position_ids[:, :length]
    )


def _body_of_one_layer(model: ModelConfig, rows: int, mesh: Mesh) -> GPT:
    """A model of one layer without a head, whose embedding has only so many rows."""
    parallel = ParallelConfig()
    assert model.max_position_embeddings is not None
    check_shapes(model, parallel, model.max_position_embeddings)
    config = transformer_config(replace(model, num_layers=1), parallel, torch.float32)
    chunk = GPT(
        config, model,
        vocabulary_size=rows, seq_length=model.max_position_embeddings, chunk_tokens=1, groups=mesh.groups, pre_process=True,
        post_process=True, vp_stage=None, has_head=False,
    )  # fmt: skip
    return chunk.eval()


def _keys(chunk: GPT) -> dict[str, str]:
    """{parameter: its key in a checkpoint}."""
    state = chunk.sharded_state_dict()
    parameters = dict(chunk.named_parameters())
    return {name: entry.key for name, entry in state.items() if name in parameters}


def _fill(chunk: GPT, tensors: TensorFiles, names: Sequence[str], keys: dict[str, str], layer: int | None) -> None:
    """Put tensors of the checkpoint into these parameters; a layer's come from its place in front."""
    parameters = dict(chunk.named_parameters())
    for name in names:
        parameter = parameters[name]
        shape = tuple(parameter.shape)
        front: tuple[int, ...] = () if layer is None else (1,)
        offsets = (*(() if layer is None else (layer,)), *(0 for _ in shape))
        parameter.copy_(tensors.read(keys[name], offsets, (*front, *shape)).view(shape))


def _vocabulary_rows(tensors: TensorFiles, key: str, vocabulary_size: int, width: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, width]) of a weight with a row for each id, piece by piece as it was saved, without the padding."""
    for first, end in tensors.row_ranges(key):
        end = min(end, vocabulary_size)
        if first < end:
            yield first, tensors.read(key, (first, 0), (end - first, width))


def _through_layer(chunk: GPT, states: Tensor, part: Microbatch) -> Tensor:
    mask = chunk.attention_mask(None, part.tokens.size(1), states.device)
    rotary = None if chunk.rotary_pos_emb is None else chunk.rotary_pos_emb(part.tokens.size(1))
    with chunk.forward_context():
        return chunk.decoder.layers[0](hidden_states=states, attention_mask=mask, rotary_pos_emb=rotary)[0]


def _head(weight: Iterator[tuple[int, Tensor]], normed: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross entropy of each token, float64 [n]; logits of the first `PROMPT` or fewer, float32 [., vocabulary]).

    weight: (first row, rows [., h]) ascending. normed: float32 [n, h]. labels: int64 [n].
    """
    log_sum_exp = torch.full(labels.shape, -torch.inf, dtype=torch.float64)
    at_label = torch.zeros(labels.shape, dtype=torch.float64)
    prompt = []
    for start, piece in weight:
        first = start
        for rows in piece.split(max(1, LOGITS_BYTES // (4 * len(labels)))):
            logits = normed @ rows.float().t()
            log_sum_exp = torch.logaddexp(log_sum_exp, logits.logsumexp(-1).double())
            here = (labels >= first) & (labels < first + len(rows))
            at_label[here] = logits[here, labels[here] - first].double()
            prompt.append(logits[:PROMPT].clone())
            first += len(rows)
    return log_sum_exp - at_label, torch.cat(prompt, dim=1)
