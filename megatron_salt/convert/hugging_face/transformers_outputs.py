"""A program of its own: what transformers computes for token ids.

python -m megatron_salt.convert.hugging_face.transformers_outputs SOURCE DTYPE IN OUT [KEYS]

SOURCE: a directory, or a GGUF file, whose config gets the keys of the JSON object KEYS. IN: npz with int64 `tokens` and `labels` [n, s],
float32 `mask` [n, s] that is 1 and from some position on 0, and `prompt`, a number of tokens. OUT: npz with float64 `losses` [n], the
mean over the mask, and float32 `logits` [prompt, vocabulary] of the first row. Weights are rounded to DTYPE; arithmetic is float32.

It shares no process with the rest: the CPU seam patches torch in ways that transformers does not expect, and this process gives the
memory of the whole model back when it ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
def outputs(model: Any, dtype: torch.dtype, tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray, prompt: int) -> dict:
    """The arrays of OUT. model: a causal language model of transformers, in float32; its weights are rounded in place."""
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


def model_of_directory(directory: Path) -> Any:
    """The model of a directory with safetensors."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",
    )


def model_of_gguf(path: Path, keys: dict[str, Any]) -> Any:
    """The model of a GGUF file, as transformers reads its metadata and tensors.

    keys: of the config, for what transformers leaves out of a file. from_pretrained(gguf_file=...) does the same, but needs accelerate.
    """
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    for key, value in keys.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, _ = model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    left_out = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if left_out:
        raise ValueError(f"transformers found no tensor for {sorted(left_out)[0]}")
    return model


def main(source: str, dtype: str, inputs: str, out: str, keys: str = "{}") -> None:
    """Write OUT."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(source)
    model = model_of_gguf(path, json.loads(keys)) if path.is_file() else model_of_directory(path)
    given = np.load(inputs)
    computed = outputs(model, getattr(torch, dtype), given["tokens"], given["labels"], given["mask"], int(given["prompt"]))
    np.savez(out, **computed)


if __name__ == "__main__":
    main(*sys.argv[1:])
