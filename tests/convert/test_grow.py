"""A grown model is the source's stack of layers, repeated: every number, its loss, and what a run makes of it under any layout."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_salt.checkpoint import loading
from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.convert import grow as grow_module
from megatron_salt.convert.grow_command import main
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.train.evaluate import reference_losses
from tests.convert.megatron.conftest import tensors_of
from tests.support.program import SEQ_LENGTH, VOCABULARY, Ended, losses, train, write_tokens
from tests.support.ranks import run_ranks

LAYERS, DEEP, STEPS = 2, 6, 10
SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    # ranks, and flags beside those of the small run
    "stages": (2, dict(pipeline_model_parallel_size=2, untie_embeddings_and_output_weights=True)),
    "bfloat16, tied, learned positions": (
        2,
        dict(
            tensor_model_parallel_size=2, use_distributed_optimizer=True, bf16=True, swiglu=False, normalization="LayerNorm",
            position_embedding_type="learned_absolute", qk_layernorm=True,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Grown:
    """A source and what the tool made of it."""

    data: str
    flags: dict[str, Any]
    source: Path
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.out / "iter_0000000"


def grow_in_rank(*words: object) -> Ended:
    """Run the tool in a rank of the pool, which has made its imports."""
    (ended,) = run_ranks(1, _grow, list(map(str, words)))
    return ended


def _grow(words: list[str]) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    in_the_pool = mock.patch("megatron_salt.convert.import_checkpoint.distributed", return_value=contextlib.nullcontext())
    with in_the_pool, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return Ended(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module", params=SOURCES)
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    home = tmp_path_factory.mktemp("grown")
    ranks, flags = SOURCES[request.param]
    data = write_tokens(home / "words", windows=100)
    train(ranks, data_path=data, train_iters=STEPS, num_layers=LAYERS, save=home / "source", **flags)
    ended = grow_in_rank("--load", home / "source", "--num-layers", DEEP, "--save", home / "grown")
    assert ended.status == 0, ended
    assert f"iter_0000000: {DEEP} layers, {LAYERS} of {home / 'source'}/iter_{STEPS:07d} repeated" in ended.out
    return Grown(data, flags, home / "source", home / "grown")


def test_layer_i_is_layer_i_mod_n_of_the_source_bit_for_bit(grown: Grown) -> None:
    source, deep = tensors_of(grown.source), tensors_of(grown.out)
    assert deep.keys() == {key for key in source if key.startswith(("embedding.", "decoder.", "output_layer."))}
    of_layers = {key for key in deep if key.startswith("decoder.layers.")}
    assert len(of_layers) >= 6 and len(deep) > len(of_layers) + 1
    for key, tensor in deep.items():
        expected = torch.cat([source[key]] * (DEEP // LAYERS)) if key in of_layers else source[key]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), key
    layers = source["decoder.layers.mlp.linear_fc1.weight"]
    assert not torch.equal(layers[0], layers[1]), "no test of the order"


def hand_stacked_losses(grown: Grown, model: ModelConfig) -> tuple[float | None, ...]:
    """Losses of the source's layers put one after the other into a deep model, parameter by parameter. In one rank, in float32."""
    mesh = make_student_mesh(Layout(tensor=1, context=1, data=1, pipeline=1))
    seed_everything(1, mesh)
    shallow, deep = (
        build_model(
            replace(model, num_layers=layers), ParallelConfig(), SEQ_LENGTH, VOCABULARY, torch.float32, 24, mesh
        )[0]
        for layers in (LAYERS, DEEP)
    )  # fmt: skip
    loading.load_weights(grown.source, [shallow], mesh)
    parameters = dict(shallow.named_parameters())
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                words[2] = str(int(words[2]) % LAYERS)
            parameter.copy_(parameters[".".join(words)])
    student: Any = SimpleNamespace(chunks=[deep], mesh=mesh, seq_length=SEQ_LENGTH)
    return reference_losses(student, VOCABULARY).losses


def test_its_loss_is_that_of_a_hand_stacked_model(grown: Grown) -> None:
    state = read_state(grown.checkpoint)
    model = model_of(state.architecture)
    assert model == replace(model_of(read_state(next(grown.source.glob("iter_*"))).architecture), num_layers=DEEP)
    recorded = state.reference_losses
    assert recorded is not None and recorded.computed_by == "this program alone"
    (by_hand,) = run_ranks(1, hand_stacked_losses, grown, model)
    assert recorded.losses == pytest.approx(by_hand, rel=1e-5)


def test_it_says_where_it_comes_from(grown: Grown) -> None:
    source = next(grown.source.glob("iter_*"))
    run = read_state(grown.checkpoint).run
    assert run.step == run.consumed_samples == 0
    fingerprint = loading.checkpoint_fingerprint(source)
    assert run.events == (
        {"event": "grow", "from": str(source), "checkpoint": fingerprint, "step": STEPS, "num_layers": LAYERS},
    )
    assert {path.name for path in (grown.checkpoint / "tokenizer").iterdir()} == {
        path.name for path in (source / "tokenizer").iterdir()
    }
    assert (grown.out / "latest_checkpointed_iteration.txt").read_text().strip() == "0"


@pytest.mark.parametrize("grown", ["stages"], indirect=True)
def test_a_run_goes_on_from_it_under_any_layout(grown: Grown, tmp_path: Path) -> None:
    """Its first loss is that of the grown weights; it begins at step 0 with an optimizer of its own, and resumes as any other run."""
    flags = {name: value for name, value in grown.flags.items() if "parallel_size" not in name} | {
        "bf16": False, "data_path": grown.data, "num_layers": DEEP, "micro_batch_size": 2, "use_distributed_optimizer": True,
    }  # fmt: skip
    layouts = {"one": (1, 1, 1), "tp2 pp2": (4, 2, 2)}
    for name, (ranks, tp, pp) in layouts.items():
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        train(ranks, load=grown.out, finetune=True, train_iters=2, save=tmp_path / name, **flags, **sizes)
    one, four = (list(losses(tmp_path / name).values()) for name in layouts)
    assert len(one) == 2 and four == pytest.approx(one, rel=1e-4)
    assert one[0] < math.log(VOCABULARY) - 0.3, "the grown weights were not loaded"
    train(1, load=tmp_path / "one", train_iters=3, save=tmp_path / "one", **flags)
    assert list(losses(tmp_path / "one")) == [1, 2, 3]


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("source")
    train(data_path=write_tokens(home / "words"), train_iters=1, lr_warmup_iters=0, save=home / "source", num_layers=4)
    return home / "source"


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a start that is refused."""
    assert main(list(map(str, words))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, out + err
    return err.removeprefix("error: ").strip()


def test_depths_that_are_no_multiple_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layers in (6, 4, 2):
        told = refusal(capsys, "--load", source, "--num-layers", layers, "--save", tmp_path / "out")
        assert told == f"--num-layers {layers} must be a multiple of the 4 layers of {source}/iter_0000001, such as 8"
    assert refusal(capsys, "--load", source, "--num-layers", 0, "--save", tmp_path / "out") == (
        "--num-layers must be at least 1, got 0"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        told = refusal(capsys, "--load", tmp_path / name, "--num-layers", 8, "--save", tmp_path / "out")
        assert told == f"--load {tmp_path / name} holds no checkpoint"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_tensor_that_the_model_does_not_have_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the experts of a later release."""
    sizes = TensorFiles.sizes
    expert = "decoder.layers.mlp.experts.linear_fc1.weight"
    monkeypatch.setattr(grow_module.TensorFiles, "sizes", lambda self: {**sizes(self), expert: ((4, 8, 8), torch.float32)})
    told = refusal(capsys, "--load", source, "--num-layers", 8, "--save", tmp_path / "out")
    assert told == f"{source}/iter_0000001: {expert} is no tensor of the model in its state.json, so it cannot be stacked"


def test_only_a_grown_checkpoint_is_replaced_and_only_when_asked(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--load", source, "--num-layers", 8, "--save", out)
    assert grow_in_rank(*words).status == 0
    before = (out / "iter_0000000" / "state.json").read_bytes()
    assert refusal(capsys, *words).startswith(f"--save {out} exists; ")
    assert (out / "iter_0000000" / "state.json").read_bytes() == before
    assert grow_in_rank("--load", source, "--num-layers", 12, "--save", out, "--overwrite").status == 0
    assert model_of(read_state(out / "iter_0000000").architecture).num_layers == 12
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "iter_0000001").mkdir()  # a run saved here
    assert refusal(capsys, *words, "--overwrite") == (
        f"--save {out} holds iter_0000001, which this program did not write; --overwrite does not replace it"
    )
    assert refusal(capsys, "--load", source, "--num-layers", 8, "--save", source / "iter_0000001" / "in").endswith(
        "give another directory"
    )
    assert refusal(capsys, "--load", out / "iter_0000000", "--num-layers", 24, "--save", out).startswith(f"--save {out} exists")


def test_it_does_not_replace_its_own_source(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert grow_in_rank("--load", source, "--num-layers", 8, "--save", out).status == 0
    told = refusal(capsys, "--load", out, "--num-layers", 16, "--save", out, "--overwrite")
    assert told.startswith(f"--load {out / 'iter_0000000'} lies inside of {out}")
