"""GGUF files in: every number comes back as it was before llama.cpp's converter, and what cannot be read is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.foreign_model import ForeignModel
from megatron_salt.convert.gguf.architectures import ROPE_FACTORS, config_of_metadata
from megatron_salt.convert.gguf.gguf_file import GgufFile
from megatron_salt.convert.gguf.import_file import import_gguf, output_is_embedding
from megatron_salt.convert.gguf.rope_factors import divisors_of, llama3_scaling
from megatron_salt.convert.gguf.weights import GgufWeights
from megatron_salt.convert.hugging_face.families import model_of_config
from megatron_salt.convert.import_weights import pieces_of
from megatron_salt.convert.parts import parts_of
from megatron_salt.errors import UserError
from tests.convert.conftest import convert
from tests.convert.gguf.gguf_files import CONFIGS, ROWS, random_tensors, write_gguf
from tests.convert.weights.test_import_weights import Tensors, whole


def opened(path: Path) -> tuple[GgufFile, ForeignModel, GgufWeights]:
    file = GgufFile(path)
    tied = output_is_embedding(file)
    divisors = file.read(ROPE_FACTORS).numpy() if ROPE_FACTORS in file.tensors else None
    shapes = {name: stored.shape for name, stored in file.tensors.items()}
    foreign = model_of_config(config_of_metadata(file.metadata, shapes, divisors, tied, "x").config, "x")
    return file, foreign, GgufWeights(file, foreign, tied)


def loaded(weights: GgufWeights, foreign: ForeignModel) -> dict[tuple[str, Any], Tensor]:
    return {(piece.key, piece.offsets): piece.load() for piece in pieces_of(weights, foreign, torch.float32, "x")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_and_number_comes_back(tmp_path: Path, name: str) -> None:
    tensors = random_tensors(CONFIGS[name])
    write_gguf(tmp_path / "x.gguf", CONFIGS[name], tensors)
    _, foreign, weights = opened(tmp_path / "x.gguf")
    expected = model_of_config(CONFIGS[name], "x")
    assert (foreign.architecture, foreign.vocabulary_size, foreign.context) == (expected.architecture, ROWS, expected.context)
    assert foreign.model == expected.model
    assert set(weights.names()) == set(tensors)
    assert all(torch.equal(weights.read(key), tensor) and weights.shape(key) == tensor.shape for key, tensor in tensors.items())
    pieces = loaded(weights, foreign)
    for part in parts_of(foreign.architecture, foreign.model, ROWS, foreign.context):
        here = [
            piece.reshape(-1, *part.shape[1:])
            for (key, offsets), piece in pieces.items()
            if key == part.key and part.layer in (None, offsets[0])
        ]
        assert torch.equal(torch.cat(here), whole(part, Tensors(tensors)))


def q8_0(numbers: np.ndarray) -> np.ndarray:
    """Blocks of 32 numbers, each an int8 times a float16, one number at a time."""
    blocks = numbers.reshape(-1, 32)
    scales = [np.abs(block).max() / np.float32(127) for block in blocks]
    whole = [[float(np.float16(s)) * float(np.round(x / s)) for x in b] for b, s in zip(blocks, scales, strict=True)]
    return np.array(whole, np.float32).reshape(numbers.shape)


def test_quantised_tensors_stand_for_these_numbers(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["llama"])
    kinds = {"attn_q.weight": "Q8_0", "ffn_up.weight": "Q4_0", "ffn_gate.weight": "F16", "token_embd.weight": "Q8_0",
             "ffn_down.weight": "BF16"}  # fmt: skip
    stored = write_gguf(tmp_path / "x.gguf", CONFIGS["llama"], tensors, kinds)
    file, _, weights = opened(tmp_path / "x.gguf")
    assert file.quantised() == {"Q8_0": 3, "Q4_0": 2}
    assert np.allclose(file.read("blk.1.attn_q.weight").numpy(), q8_0(stored["blk.1.attn_q.weight"]), atol=1e-6)
    assert torch.equal(file.read("blk.1.ffn_gate.weight"), tensors["model.layers.1.mlp.gate_proj.weight"].half())
    assert torch.equal(file.read("blk.1.ffn_down.weight"), tensors["model.layers.1.mlp.down_proj.weight"].bfloat16())
    up = weights.read("model.layers.0.mlp.up_proj.weight")
    assert 0 < (up - tensors["model.layers.0.mlp.up_proj.weight"]).abs().max() < 0.05 and up.unique().numel() > 16
    query = weights.read("model.layers.0.self_attn.q_proj.weight")  # rows are put back after they were dequantised
    assert (query - tensors["model.layers.0.self_attn.q_proj.weight"]).abs().max() < 0.003
    whole = weights.read("model.embed_tokens.weight")
    assert torch.equal(weights.read("model.embed_tokens.weight", slice(7, 30)), whole[7:30])
    assert {str(kind) for kind in weights.dtypes().values()} == {"torch.float32", "torch.float16", "torch.bfloat16"}


def test_an_output_weight_that_is_the_embedding_is_one_weight(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["qwen3"])
    write_gguf(tmp_path / "x.gguf", CONFIGS["qwen3"], tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    _, foreign, weights = opened(tmp_path / "x.gguf")
    assert not foreign.model.untie_embeddings_and_output_weights and "output.weight" not in weights.names()
    loaded(weights, foreign)


@pytest.mark.parametrize("numbers", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (3.0, 1.5, 5.0, 1000)])
@pytest.mark.parametrize("count", [32, 64])
def test_the_scaling_of_llama3_is_found_in_its_divisors(numbers: tuple[float, ...], count: int) -> None:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = dict(zip(names, numbers, strict=True))
    divisors = divisors_of(scaling, count, 500000.0).astype(np.float32)
    found = llama3_scaling(divisors, 500000.0)
    assert found is not None and np.allclose(divisors_of(found, count, 500000.0), divisors, rtol=1e-4)
    if numbers[3] == 8192:
        assert found == scaling
    assert llama3_scaling(divisors[::-1].copy(), 500000.0) is None
    assert llama3_scaling(np.linspace(1, 8, count), 500000.0) is None


WITNESSED = ["llama", *(pytest.param(name, marks=pytest.mark.full) for name in CONFIGS if name not in ("llama", "gpt-neox"))]


@pytest.mark.long
@pytest.mark.parametrize("name", WITNESSED)
def test_transformers_computes_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    kinds = {"attn_q.weight": "Q8_0", "ffn_up.weight": "Q4_0"}
    write_gguf(path, CONFIGS[name], random_tensors(CONFIGS[name]), kinds)
    ended = convert("import", "--from", "gguf", path, "--to", tmp_path / "out")
    assert ended.returncode == 0 and "computed by transformers and this program" in ended.stdout, ended
    assert "Q4_0" in ended.stdout and (tmp_path / "out" / "iter_0000000" / "state.json").exists()


# ---- what is refused ----------------------------------------------------------------------------------------------------


def refused(path: Path, **flags: Any) -> str:
    """The message of an import that is refused, which leaves nothing behind."""
    out = path.parent / "out"
    with pytest.raises(UserError) as caught:
        import_gguf(path, out, None, TokenizerConfig(**flags), verify=False)
    assert not out.exists() and str(path) in str(caught.value)
    return str(caught.value)


LLAMA = CONFIGS["llama"]
METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "mamba"}, "general.architecture is 'mamba': known are llama, qwen2"),
    "adapter": ({"general__type": "adapter"}, "general.type is 'adapter'"),
    "split": ({"split__count": 3}, "split.count is 3: join the files first"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count is 8"),
    "scaling": ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
    "softcap": ({"llama__attn_logit_softcapping": 30.0}, "llama.attn_logit_softcapping is 30.0"),
    "values": ({"llama__attention__value_length": 16}, "llama.attention.value_length is 16"),
    "rotary": ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is 8"),
    "heads by layer": ({"llama__attention__head_count": [8, 4]}, "llama.attention.head_count is [8, 4]"),
    "no layers": ({"llama__block_count": None}, "llama.block_count is missing"),
    "sizes": ({"llama__feed_forward_length": 32}, "blk.0.ffn_gate.weight is [96, 64], and the metadata makes it [32, 64]"),
    "more layers": ({"llama__block_count": 3}, "blk.2.attn_norm.weight is missing"),
    "rows": ({"llama__vocab_size": 300}, "llama.vocab_size is 300"),
    "no tokenizer": ({"tokenizer__ggml__model": None}, "holds no tokenizer; give the model's own"),
    "unknown tokenizer": ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "unknown cutting": ({"tokenizer__ggml__pre": "poro-chat"}, "tokenizer.ggml.pre is 'poro-chat'"),
    "no cutting": ({"tokenizer__ggml__pre": None}, "tokenizer.ggml.pre is None"),
    "merges": ({"tokenizer__ggml__merges": ["ab c"]}, "tokenizer.ggml.merges has 'ab c'"),
    "types": ({"tokenizer__ggml__token_type": [1, 1]}, f"tokenizer.ggml.token_type is not {ROWS} values"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_be_taken_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = METADATA[case]
    if case == "architecture":
        changes = {}
    write_gguf(tmp_path / "x.gguf", LLAMA, random_tensors(LLAMA), **changes)
    if case == "architecture":
        content = (tmp_path / "x.gguf").read_bytes()
        (tmp_path / "x.gguf").write_bytes(content.replace(b"llama", b"mamba"))
    assert message in refused(tmp_path / "x.gguf")


def test_files_that_are_damaged_are_refused(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.gguf", random_tensors(LLAMA)
    write_gguf(path, LLAMA, tensors)
    content = path.read_bytes()
    for size in (2, 20, 4000, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        assert "is damaged or no GGUF file" in refused(path)
    path.write_bytes(b"GGML" + content[4:])
    assert "magic" in refused(path)
    path.write_bytes(content[:4] + struct.pack("<I", 9) + content[8:])
    assert "version 9" in refused(path)
    path.write_bytes(content[:8] + struct.pack("<QQ", 1 << 60, 1 << 60) + content[24:])  # counts that no file has
    assert "is damaged" in refused(path)
    kind = content.index(b"general.architecture") + len("general.architecture")
    path.write_bytes(content[:kind] + struct.pack("<IIQ", 9, 8, 1) + content[kind + 4 :])  # the name in a list
    assert "general.architecture is ['llama']" in refused(path)
    path.write_bytes(content[:kind] + struct.pack("<IIQ", 9, 0, 1 << 40) + content[kind + 4 :])
    assert "it claims 1099511627776 values in an array" in refused(path)
    assert "is not a file" in refused(tmp_path)


@pytest.mark.parametrize("base", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_base_of_rotary_frequencies_that_is_no_base_is_refused(tmp_path: Path, base: float) -> None:
    write_gguf(tmp_path / "x.gguf", LLAMA, random_tensors(LLAMA), llama__rope__freq_base=base)
    assert f"llama.rope.freq_base is {base}" in refused(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", ["attention.key_length", "attention.head_count_kv"])
def test_a_size_of_0_is_not_taken_for_a_missing_one(tmp_path: Path, key: str) -> None:
    write_gguf(tmp_path / "x.gguf", LLAMA, random_tensors(LLAMA), **{f"llama__{key.replace('.', '__')}": 0})
    assert f"llama.{key} is 0: expected a number from 1 on" in refused(tmp_path / "x.gguf")


def test_divisors_of_another_number_of_frequencies_are_refused() -> None:
    metadata = {
        "general.architecture": "llama",
        **{f"llama.{key}": 2 for key in _LLAMA_SIZES},
        "llama.attention.key_length": 64,
    }
    metadata["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    with pytest.raises(UserError, match=r"rope_freqs.weight is \[16\], and the head width 64 makes it \[32\]"):
        config_of_metadata(
            metadata, {"token_embd.weight": (ROWS, 64), "rope_freqs.weight": (16,)}, np.full(16, 2.0), False, "x"
        )


_LLAMA_SIZES = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.gguf", random_tensors(LLAMA)
    write_gguf(path, LLAMA, {name: tensor for name, tensor in tensors.items() if "1.self_attn.k_proj" not in name})
    assert "blk.1.attn_k.weight is missing" in refused(path)
    biased = random_tensors(CONFIGS["llama with biases"])
    write_gguf(path, LLAMA, tensors | {k: v for k, v in biased.items() if k == "model.layers.0.mlp.down_proj.bias"})
    assert "blk.0.ffn_down.bias is left over" in refused(path)
    write_gguf(path, LLAMA, tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)})
    assert "attention_bias is True" in refused(path)
    write_gguf(path, LLAMA, tensors | {"model.norm.weight": torch.full((64,), float("nan"))})
    with pytest.raises(UserError, match="model.norm.weight has numbers that are not finite"):
        loaded(*opened(path)[:0:-1])
    write_gguf(path, LLAMA, tensors, {"ffn_up.weight": "F16"})
    assert "say with --dtype" in refused(path)


def test_a_type_without_a_way_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, LLAMA, random_tensors(LLAMA), {"ffn_up.weight": "Q4_0"})

    def unknown(data: np.ndarray, kind: object) -> np.ndarray:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    assert "blk.0.ffn_up.weight is Q4_0, a type whose numbers cannot be read; 2 tensors" in refused(path)
