"""What a checkpoint computes on the reference batch, computed with one layer in memory at a time. One process, on the CPU, in float32.

A run recognises a model as its teacher by these losses (data/reference_batch.py). A model that was converted was never in memory as a
whole, and need not fit there: the hidden states of the whole batch go through the embedding, each layer and the head, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.convert.verify import PROMPT, Outputs
from megatron_salt.data.batch import Microbatch
from megatron_salt.data.reference_batch import fixed_batch, prefix_lengths
from megatron_salt.model.gpt import GPT, build_model
from megatron_salt.model.loss import METRICS
from megatron_salt.parallel.mesh import Mesh

LONGEST = 1024
"""Tokens of a sequence. A longer context would take long on a CPU, and would recognise the model no better."""
_LAYERS = "decoder.layers."


@torch.no_grad()
def outputs_of_checkpoint(
    tensors: TensorFiles, model: ModelConfig, vocabulary_size: int, context: int, mesh: Mesh, done: Callable[[], None]
) -> Outputs:
    """What a model in torch_dist files computes on the reference batch, see `lengths_of`.

    mesh: of one rank, which builds a layer. done: called after each layer. Memory: embedding, output weight and one layer, in float32.
    """
    lengths = lengths_of(context)
    length = lengths[-1]
    batch = fixed_batch(vocabulary_size, length, lengths)
    short = replace(model, num_layers=1, max_position_embeddings=model.max_position_embeddings or context)
    [chunk] = build_model(short, ParallelConfig(), length, vocabulary_size, torch.float32, length, mesh)
    chunk.eval()
    keys = _keys(chunk)
    _fill(chunk, tensors, [name for name, key in keys.items() if not key.startswith(_LAYERS)], keys, None)
    hidden = [chunk.embedding(input_ids=part.tokens, position_ids=part.position_ids) for part in batch]
    layer_names = [name for name, key in keys.items() if key.startswith(_LAYERS)]
    for layer in range(model.num_layers):
        _fill(chunk, tensors, layer_names, keys, layer)
        hidden = [_through_layer(chunk, states, part) for states, part in zip(hidden, batch, strict=True)]
        done()
    losses, normed = [], [chunk.decoder.final_layernorm(states) for states in hidden]
    for states, part in zip(normed, batch, strict=True):
        sums = chunk.loss(states, part.labels, part.loss_mask)[1].double()
        losses.append(float(sums[METRICS.index("loss")] / sums[METRICS.index("tokens")]))
    return Outputs(tuple(losses), chunk.logits(normed[0][:PROMPT])[:, 0, :vocabulary_size].float())


def lengths_of(context: int) -> tuple[int, ...]:
    """The lengths of the reference batch on which a converted model records its losses: up to `LONGEST` tokens."""
    return tuple(prefix_lengths(min(context, LONGEST)))


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


def _through_layer(chunk: GPT, states: Tensor, part: Microbatch) -> Tensor:
    mask = chunk.attention_mask(None, part.tokens.size(1), states.device)
    rotary = None if chunk.rotary_pos_emb is None else chunk.rotary_pos_emb(part.tokens.size(1))
    with chunk.forward_context():
        return chunk.decoder.layers[0](hidden_states=states, attention_mask=mask, rotary_pos_emb=rotary)[0]
