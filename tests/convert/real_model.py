"""What transformers says of the models of examples/foreign_teacher.sh. A program of its own, without the CPU seam.

python -m tests.convert.real_model perplexity GGUF DATASET TRAIN_JSONL
    The loss on the held-out windows that a run read, which must be the teacher's in its log, to 1%. The perplexity must be below 40.
python -m tests.convert.real_model generate DIRECTORY PROMPT
    Continues a prompt with an exported model.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_salt.config import DataConfig
from megatron_salt.convert.hugging_face.transformers_outputs import model_of_gguf
from megatron_salt.data.samples import open_training_data

LENGTH, WINDOWS = 256, 16
"""Of examples/foreign_teacher.yaml: --seq-length, and --eval-iters times --global-batch-size."""


@torch.no_grad()
def loss_of(gguf: Path, dataset: str, length: int, windows: int) -> float:
    """The mean loss over the first windows of held-out data, in nats a token."""
    import transformers

    transformers.logging.disable_progress_bar()
    model = model_of_gguf(gguf, {}).eval()
    data = DataConfig(data_path=(dataset,), valid_data_path=(dataset,), allow_valid_in_train=True)
    [valid] = open_training_data(data, length, 0, model.config.vocab_size, None)[1].values()
    _, tokens = valid.read(np.arange(windows))
    losses = []
    for window in torch.from_numpy(tokens.astype(np.int64)):
        logits = model(window[None, :-1]).logits[0].float()
        losses.append(float(F.cross_entropy(logits, window[1:]).double()))
    return sum(losses) / len(losses)


def perplexity(gguf: str, dataset: str, log: str) -> None:
    """Compare, and raise AssertionError where it is not the same model."""
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    [logged] = {record["teacher_loss"] for record in records if "teacher_loss" in record and record["kind"] != "step"}
    theirs = loss_of(Path(gguf), dataset, LENGTH, WINDOWS)
    print(f"teacher's held-out perplexity: {math.exp(logged):.4f} in the run's log, {math.exp(theirs):.4f} by transformers")
    assert abs(math.exp(logged - theirs) - 1) < 0.01, "the teacher is not the model that transformers computes"
    assert math.exp(logged) < 40, "the teacher does not know this text"


def generate(directory: str, prompt: str) -> None:
    """Print what the model writes."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert len(written) > inputs["input_ids"].shape[1], "transformers generated nothing"
    print(f"{type(model).__name__} continues: {tokenizer.decode(written)!r}")


if __name__ == "__main__":
    {"perplexity": perplexity, "generate": generate}[sys.argv[1]](*sys.argv[2:])
