"""Sampling text from a model, token by token.

Each token runs the whole context through the model again; nothing is cached. This is for looking at what a model learned, not
for serving it. Tensor parallelism is allowed; pipeline and context parallelism are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_salt.model.gpt import GPT
from megatron_salt.parallel.device import current_device


@torch.no_grad()
def next_logits(model: GPT, ids: list[int], vocabulary_size: int) -> Tensor:
    """Logits of the token after `ids`: float32 [vocabulary_size], on the CPU.

    Collective over the tensor-parallel group; all its ranks receive.
    """
    tokens = torch.tensor([ids], device=current_device())
    positions = torch.arange(len(ids), device=current_device())[None]
    hidden = model(tokens, positions, None)
    logits = gather_from_tensor_model_parallel_region(model.logits(hidden[-1:]), group=model.pg_collection.tp)
    return logits[0, 0, :vocabulary_size].float().cpu()


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One id from float32 logits [vocabulary_size]: at temperature 0 the most likely id, else a random one of the `top_k` most likely."""
    if temperature == 0:
        return int(logits.argmax())
    kept = logits.topk(min(top_k or logits.numel(), logits.numel()))
    probabilities = (kept.values / temperature).softmax(0)
    return int(kept.indices[torch.multinomial(probabilities, 1, generator=generator)])


def generate(
    model: GPT, prompt: list[int], num_tokens: int, context: int, vocabulary_size: int, eod: int | None, temperature: float,
    top_k: int | None, seed: int,
) -> list[int]:  # fmt: skip
    """Up to `num_tokens` ids that follow `prompt`; it stops before `eod`. Collective over the tensor-parallel group; all its ranks receive.

    prompt: at least one id. The model sees the last `context` ids. The same seed gives the same ids on any number of ranks,
    up to rounding: each rank draws from the same logits.
    """
    assert prompt, "nothing to continue"
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    while len(ids) < len(prompt) + num_tokens:
        chosen = draw(next_logits(model, ids[-context:], vocabulary_size), temperature, top_k, generator)
        if chosen == eod:
            break
        ids.append(chosen)
    return ids[len(prompt) :]
