"""A program of its own: what transformers computes for token ids.

python -m megatron_salt.convert.hugging_face.transformers_outputs DIR DTYPE IN OUT

IN: npz with int64 `tokens` and `labels` [n, s], float32 `mask` [n, s] that is 1 and from some position on 0, and `prompt`, a number of
tokens. OUT: npz with float64 `losses` [n], the mean over the mask, and float32 `logits` [prompt, vocabulary] of the first row. Weights
are rounded to DTYPE; arithmetic is float32.

It shares no process with the rest: the CPU seam patches torch in ways that transformers does not expect, and this process gives the
memory of the whole model back when it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
def outputs(directory: Path, dtype: torch.dtype, tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray, prompt: int) -> dict:
    """The arrays of OUT."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",
    )
    model.eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).float())
    losses, first = [], None
    for row in range(len(tokens)):
        counted = int(mask[row].sum())  # attention is causal: the positions behind them change nothing
        logits = model(torch.from_numpy(tokens[row : row + 1, :counted])).logits.float()[0]
        each = F.cross_entropy(logits, torch.from_numpy(labels[row, :counted]), reduction="none")
        losses.append(float(each.double().mean()))
        if first is None:
            first = logits[:prompt].numpy()
    return {"losses": np.array(losses), "logits": first}


def main(directory: str, dtype: str, inputs: str, out: str) -> None:
    """Write OUT."""
    given = np.load(inputs)
    computed = outputs(
        Path(directory), getattr(torch, dtype), given["tokens"], given["labels"], given["mask"], int(given["prompt"])
    )
    np.savez(out, **computed)


if __name__ == "__main__":
    main(*sys.argv[1:])
