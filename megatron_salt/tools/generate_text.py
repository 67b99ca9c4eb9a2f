"""Let a checkpoint continue a prompt. Architecture, precision and tokenizer come from the checkpoint, which may have any layout.

Runs in one process, or tensor-parallel over all ranks that torchrun starts. The whole context is computed again for every token.

    python tools/generate_text.py --load runs/quickstart/salt --prompt 'def main(' --max-new-tokens 100
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.config import ParallelConfig, RunConfig
from megatron_salt.config.parallel import Device
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.data.order import SEEDS, is_seed
from megatron_salt.errors import UserError
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.failure import fail_together
from megatron_salt.parallel.hardware import prepare_environment
from megatron_salt.parallel.layout import student_layout, world_size_from_environment
from megatron_salt.parallel.library_warnings import hide_library_warnings
from megatron_salt.small_files import read_small
from megatron_salt.tokenizer.tokenizer import Tokenizer, load_tokenizer

COLDEST = 0.001  # a lower temperature may overflow the logits


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a trained model."""

    load: str
    """Directory of checkpoints, of which the latest is used, or one iter_* directory."""

    prompt: str = ""
    """Text to continue. Empty: begin a new document."""

    prepend_bos: bool = False
    """Begin with the tokenizer's beginning-of-sequence id, for models whose data has it (preprocess_data.py --prepend-bos)."""

    max_new_tokens: int = 100
    """Largest number of tokens to add. The model may end the document earlier."""

    temperature: float = 0.8
    """Divisor of the logits. Below 1 the text becomes more likely; 0 takes the likeliest token each time."""

    top_k: int | None = None
    """Draw only among this many likeliest tokens. Default: among all."""

    seed: int = 1234
    """Seed of the random draws. The same seed gives the same text."""

    device: Device = "auto"
    """Where every rank computes. auto: on a GPU if the process sees one. cuda: a rank that sees no GPU is an error. cpu: on the CPU."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max-new-tokens", self.max_new_tokens, 1),
            ("temperature", self.temperature, 0),
            ("top-k", self.top_k, 1),
        ):
            if value is not None and not least <= value < float("inf"):
                raise UserError(f"--{name} must be at least {least} and finite, got {value}")
        if 0 < self.temperature < COLDEST:
            raise UserError(
                f"--temperature must be 0 or at least {COLDEST}, got {self.temperature}; 0 takes the likeliest token"
            )
        if not is_seed(self.seed):
            raise UserError(f"--seed must be {SEEDS}, got {self.seed}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(GenerateConfig, lambda config: fail_together(lambda: generate_text(config)), argv)


def generate_text(config: GenerateConfig) -> None:
    """Continue the prompt. Every rank calls; rank 0 prints prompt and continuation. Raises UserError."""
    hide_library_warnings()
    prepare_environment(config.device)
    directory = newest_checkpoint(Path(config.load))
    run, tokenizer = read_companions(directory)
    parallel = ParallelConfig(tensor_model_parallel_size=world_size_from_environment())
    check_shapes(run.model, parallel, run.training.seq_length)
    prompt = prompt_ids(config.prompt, tokenizer, config.prepend_bos)
    added = continue_prompt(config, directory, run, parallel, tokenizer, prompt)
    if added is not None:
        print(tokenizer.decode(prompt + added))


def newest_checkpoint(load: Path) -> Path:
    """The iter_* directory that --load names: itself, or the latest in it. Raises UserError."""
    from megatron_salt.checkpoint import save_directory

    candidates = save_directory.candidates(load)
    if not candidates:
        raise UserError(f"--load {load} holds no checkpoint{save_directory.how_to_import(load)}")
    return candidates[0]


def read_companions(directory: Path) -> tuple[RunConfig, Tokenizer]:
    """Configuration of the run that wrote a checkpoint, and its tokenizer. Raises UserError. Not collective."""
    from megatron_salt.checkpoint.save_directory import RUN_YAML, TOKENIZER

    path = directory / RUN_YAML
    try:
        text = read_small(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--load {directory}: {path.name} cannot be read: {error}") from error
    return from_yaml(text, str(path)), load_tokenizer(directory / TOKENIZER)


def ids_in_softmax(directory: Path, tokenizer: Tokenizer) -> int:
    """Ids that a checkpoint's model was trained to choose from: a converted model may have more than its tokenizer. Not collective."""
    from megatron_salt.checkpoint.state_file import read_state

    return read_state(directory).vocabulary_size or tokenizer.vocabulary_size


def prompt_ids(prompt: str, tokenizer: Tokenizer, prepend_bos: bool = False) -> list[int]:
    """Token ids of the prompt, at least one. An empty prompt becomes the end-of-document id, or BOS with `prepend_bos`."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python decodes a command line that is not UTF-8 to lone surrogates
        raise UserError("--prompt is not valid UTF-8") from error
    if prepend_bos and tokenizer.bos is None:
        raise UserError(f"--prepend-bos: the checkpoint's {tokenizer.kind} declares no beginning-of-sequence token, or several")
    ids = tokenizer.encode(prompt)
    if prepend_bos and tokenizer.bos is not None:
        ids.insert(0, tokenizer.bos)
    if ids:
        return ids
    if tokenizer.eod is None:
        raise UserError(f"--prompt is empty, and the checkpoint's {tokenizer.kind} has no end-of-document id to begin with")
    return [tokenizer.eod]


def continue_prompt(
    config: GenerateConfig, directory: Path, run: RunConfig, parallel: ParallelConfig, tokenizer: Tokenizer, prompt: list[int]
) -> list[int] | None:
    """Token ids that the model adds, on rank 0; None on other ranks.

    Every rank calls. Starts and ends torch.distributed, so it must not be running.
    """
    import torch
    import torch.distributed as dist

    from megatron_salt.checkpoint.loading import load_weights
    from megatron_salt.model.generate import generate
    from megatron_salt.model.gpt import build_model
    from megatron_salt.parallel.launch import distributed, seed_everything
    from megatron_salt.parallel.mesh import make_student_mesh

    with distributed(timedelta(minutes=10), device=config.device):
        mesh = make_student_mesh(student_layout(parallel, dist.get_world_size()))
        seed_everything(run.training.seed, mesh)  # building a model uses the random generators
        dtype = torch.bfloat16 if run.training.bf16 else torch.float32
        length, ids = run.training.seq_length, ids_in_softmax(directory, tokenizer)
        [model] = build_model(run.model, parallel, length, ids, dtype, length, mesh)
        load_weights(directory, [model], mesh)
        added = generate(
            model,
            prompt,
            config.max_new_tokens,
            length,
            min(ids, tokenizer.vocabulary_size),  # the others have no text
            tokenizer.eod,
            config.temperature,
            config.top_k,
            config.seed,
        )
        return added if dist.get_rank() == 0 else None
