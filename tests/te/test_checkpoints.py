"""Checkpoints pass between torch's and Transformer Engine's layers and between precisions, and there is nothing in them to unpickle."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.fp8_utils import get_fp8_context

from megatron_salt.checkpoint import safe_unpickle, save_directory, sharded_state
from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import CheckpointConfig, ModelConfig, ParallelConfig, TokenizerConfig
from megatron_salt.model.fp8_teacher import linears
from megatron_salt.model.gpt import GPT
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.tokenizer.tokenizer import build_tokenizer
from tests.support.ranks import run_ranks
from tests.support.small import MODELS
from tests.te import engine

TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
VP2 = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
ONE = ParallelConfig()
Scales = dict[tuple[int, str], dict[str, Tensor]]
"""(layer, linear) -> Transformer Engine's state of it."""


@dataclass(frozen=True)
class Side:
    """A run that saves, or one that loads."""

    precision: Precision
    parallel: ParallelConfig = ONE
    world_size: int = 1
    model: ModelConfig = MODELS["tied"]


def checkpointer(side: Side, chunks: list[GPT], mesh, save: Path | None = None, load: Path | None = None) -> Checkpointer:
    where = {name: str(path) for name, path in (("save", save), ("load", load)) if path is not None}
    config = CheckpointConfig(**where, no_load_rng=load is not None)
    identity = RunIdentity(
        yaml="", architecture=asdict(side.model), tokenizer_fingerprint="tokenizer", data_fingerprint="data", seed=1234
    )
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    return Checkpointer(config, identity, tokenizer, mesh, chunks=chunks, optimizer=None, scheduler=None)


def scaled(chunks: list[GPT]) -> None:
    """Give every linear scales and maxima as if it had run: of its layer and name, the same on all ranks."""
    for chunk in chunks:
        with engine.gpu_seen(), get_fp8_context(chunk.config):
            for layer in chunk.decoder.layers:
                for name, linear in named_linears(layer):
                    linear.init_fp8_metadata()
                    generator = torch.Generator().manual_seed(layer.layer_number * 1000 + len(name))
                    for key in ("scaling_fwd", "scaling_bwd"):
                        for tensor in (linear.fp8_meta[key].scale, linear.fp8_meta[key].amax_history):
                            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def named_linears(layer):
    wanted = list(map(id, linears(layer)))
    return [(name, module) for name, module in layer.named_modules() if id(module) in wanted]


def scales_of(chunks: list[GPT]) -> Scales:
    def of(linear) -> dict[str, Tensor]:
        states = [(key, linear.fp8_meta[key]) for key in ("scaling_fwd", "scaling_bwd") if key in linear.fp8_meta]
        return {f"{key}.{part}": vars(state)[part].clone() for key, state in states for part in ("scale", "amax_history")}

    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    return {(layer.layer_number, name): of(linear) for layer in layers for name, linear in named_linears(layer)}


def weights_of(chunks: list[GPT], mesh) -> list[tuple[str, tuple[int, ...], tuple, Tensor]]:
    """(key in a checkpoint, global shape, where there, this rank's part), of everything that the model saves."""
    found = []
    for leaf in sharded_state.nested_values(sharded_state.model_state(chunks, mesh.groups)):
        for part in (
            sharded_state.nested_values(leaf.build()) if isinstance(leaf, sharded_state.ShardedTensorFactory) else [leaf]
        ):
            if isinstance(part, sharded_state.ShardedTensor):
                found += [(part.key, part.global_shape, part.global_slice(), part.data.detach().clone())]
    return found


def saving(side: Side, directory: Path) -> tuple[list, Scales]:
    chunks, mesh = engine.build(side.model, side.parallel, side.precision, side.world_size)
    if side.precision.fp8_recipe == "delayed":
        scaled(chunks)
    checkpointer(side, chunks, mesh, save=directory).save(RunState(step=1, consumed_samples=16))
    return weights_of(chunks, mesh), scales_of(chunks)


def loading(side: Side, directory: Path) -> tuple[list, Scales]:
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ
    chunks, mesh = engine.build(side.model, side.parallel, side.precision, side.world_size)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        torch.nn.init.constant_(parameter, 7.0)
    with engine.capability_seen():
        assert checkpointer(side, chunks, mesh, load=directory).load() == RunState(step=1, consumed_samples=16)
    return weights_of(chunks, mesh), scales_of(chunks)


def passed(tmp_path: Path, one: Side, other: Side) -> tuple[Scales, Scales]:
    """Save as one, load as the other; all weights must have arrived bit for bit. -> the scales of each."""
    saved = run_ranks(one.world_size, saving, one, tmp_path)
    loaded = run_ranks(other.world_size, loading, other, tmp_path)
    whole = [whole_of([weights for weights, _ in ranks]) for ranks in (saved, loaded)]
    assert whole[0].keys() == whole[1].keys() and len(whole[0]) >= 8
    assert all(torch.equal(whole[0][key], whole[1][key]) for key in whole[0])
    return merged(saved), merged(loaded)


def whole_of(ranks: list[list[tuple[str, tuple[int, ...], tuple, Tensor]]]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, from the parts of all ranks."""
    whole: dict[str, Tensor] = {}
    for key, shape, where, part in (entry for rank in ranks for entry in rank):
        whole.setdefault(key, torch.full(shape, torch.nan, dtype=part.dtype))[where] = part
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def merged(ranks: list[tuple[list, Scales]]) -> Scales:
    return {key: state for _, scales in ranks for key, state in scales.items()}


DELAYED = engine.fp8("delayed", amax_history_len=4)
TENSORWISE = engine.fp8("tensorwise")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "one, other", [(TORCH, engine.ENGINE), (engine.ENGINE, TORCH)], ids=["torch to engine", "engine to torch"]
)
def test_weights_pass_between_torch_and_transformer_engine(tmp_path, one, other, model):
    passed(tmp_path, Side(one, model=MODELS[model]), Side(other, TP2, 2, MODELS[model]))


@pytest.mark.parametrize(
    "one, other",
    [(DELAYED, TORCH), (DELAYED, engine.ENGINE), (DELAYED, TENSORWISE), (TORCH, DELAYED), (TENSORWISE, DELAYED)],
    ids=["delayed to torch", "delayed to bfloat16", "delayed to tensorwise", "torch to delayed", "tensorwise to delayed"],
)  # fmt: skip
def test_fp8_can_be_turned_on_and_off(tmp_path, one, other):
    _, scales = passed(tmp_path, Side(one), Side(other))
    assert not any(scales.values())  # they begin anew, or there are none


@pytest.mark.parametrize("parallel, world_size", [(ONE, 1), (TP2, 4), (PP2, 2), (VP2, 2)])
def test_delayed_scales_load_under_any_layout(tmp_path, parallel, world_size):
    saved, loaded = passed(tmp_path, Side(DELAYED, TP2, 2), Side(DELAYED, parallel, world_size))
    assert len(saved) == 4 * 4
    assert saved.keys() == loaded.keys()
    for key in saved:
        assert saved[key].keys() == loaded[key].keys() and len(saved[key]) == 4
        assert all(torch.equal(saved[key][part], loaded[key][part]) for part in saved[key])


@pytest.mark.parametrize("length", [2, 7])
def test_a_history_of_another_length_keeps_what_fits(tmp_path, length):
    saved, loaded = passed(tmp_path, Side(DELAYED), Side(engine.fp8("delayed", amax_history_len=length)))
    for key in saved:
        for of in ("scaling_fwd", "scaling_bwd"):
            assert torch.equal(saved[key][f"{of}.scale"], loaded[key][f"{of}.scale"])
            before, after = saved[key][f"{of}.amax_history"], loaded[key][f"{of}.amax_history"]
            assert len(after) == length
            assert torch.equal(before[:length], after[:4]) and not after[4:].any()


def test_nothing_in_a_checkpoint_is_a_pickle_of_transformer_engines(tmp_path):
    run_ranks(2, saving, Side(DELAYED, TP2, 2), tmp_path)
    metadata = safe_unpickle.read_metadata(save_directory.directory_of(tmp_path, 1)).state_dict_metadata
    assert {key for key in metadata if key.startswith("fp8.")} == {
        f"fp8.{name}"
        for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    }
    assert [key for key, entry in metadata.items() if isinstance(entry, BytesStorageMetadata)] == []
    assert [key for key in metadata if "_extra_state" in key] == []
