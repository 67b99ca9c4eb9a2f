"""A model comes in, is trained, goes out, and comes in again: transformers computes what the run recorded, and it teaches the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.convert.hugging_face.transformers_process import outputs_of_transformers
from tests.convert.conftest import convert_in_rank
from tests.convert.foreign_models import IDS
from tests.support.program import losses, train, write_tokens

MODEL: dict[str, Any] = dict(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=2, disable_bias_linear=True,
    untie_embeddings_and_output_weights=True, norm_epsilon=1e-6, seq_length=64,
)  # fmt: skip
"""The flags of `foreign_models`' "teacher"; the rest are those of the small run."""
STEPS = 20


@dataclass(frozen=True)
class Trained:
    """A run that went on from an imported model."""

    home: Path
    data: str
    tokenizer: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.home / "run"


@pytest.fixture(scope="module")
def trained(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("trained")
    assert convert_in_rank("import", foreign / "teacher", "--to", home / "in", "--no-verify").status == 0
    tokenizer = dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=foreign / "teacher")
    data = write_tokens(home / "words", windows=100)
    train(
        data_path=data,
        load=home / "in",
        finetune=True,
        train_iters=STEPS,
        save=home / "run",
        jsonl=home / "log",
        **MODEL,
        **tokenizer,
    )
    return Trained(home, data, tokenizer)


def out_and_in(trained: Trained, dtype: str) -> Path:
    """The run's model exported in a dtype, and imported again."""
    for words in (
        ("export", trained.run, trained.home / f"out-{dtype}", "--dtype", dtype),
        ("import", trained.home / f"out-{dtype}", "--to", trained.home / f"again-{dtype}", "--no-verify"),
    ):
        ended = convert_in_rank(*words)
        assert ended.status == 0, ended
    return trained.home / f"again-{dtype}"


def stage1_curve(trained: Trained, teacher: Path, save: Path) -> list[float]:
    train(
        data_path=trained.data, train_iters=6, kd_steps=5, kd_weight=0.7, teacher_load=teacher, save=save, **trained.tokenizer
    )
    return list(losses(save).values())


def test_a_trained_model_is_the_same_in_transformers_and_as_a_teacher(trained: Trained, tmp_path: Path) -> None:
    [directory] = trained.run.glob(f"iter_*{STEPS}")
    recorded = read_state(directory).reference_losses
    assert recorded is not None and recorded.computed_by is None and recorded.lengths == (16, 64)
    before = read_state(next((trained.home / "in").glob("iter_*"))).reference_losses
    assert before is not None and recorded.losses[0] != pytest.approx(before.losses[0], rel=1e-2), "it did not learn"
    again = out_and_in(trained, "float32")
    theirs = outputs_of_transformers(trained.home / "out-float32", torch.float32, IDS, recorded.lengths)
    assert theirs is not None and theirs.losses == pytest.approx(recorded.losses, rel=1e-5)
    curve = stage1_curve(trained, trained.run, tmp_path / "own")
    assert stage1_curve(trained, again, tmp_path / "again") == pytest.approx(curve, rel=1e-5)
    rounded = stage1_curve(trained, out_and_in(trained, "bfloat16"), tmp_path / "rounded")
    # A weight in bfloat16 is off by up to 2^-9 of itself; the target's share of the loss is off by about as much.
    assert rounded[0] != curve[0] and rounded == pytest.approx(curve, rel=2**-9)
