"""Open models in and out: transformers computes the same before, every layout computes the same after, and not a bit is lost on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_salt.checkpoint.loading import load_weights
from megatron_salt.checkpoint.state_file import model_of, read_state
from megatron_salt.config import ParallelConfig
from megatron_salt.convert.verify import Outputs, refuse_other_outputs
from megatron_salt.errors import UserError
from megatron_salt.model.gpt import build_model
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import student_layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.salt.teacher_checkpoint import read_teacher
from megatron_salt.train.evaluate import reference_losses
from megatron_salt.train.step import Student
from tests.convert.conftest import convert, convert_in_rank, one_error, refusal
from tests.convert.foreign_models import CONTEXT, IDS, LEAVES_AS, MODELS, ROWS
from tests.support.program import train
from tests.support.ranks import run_ranks

QUICK = ("llama", "qwen2", "gpt-neox")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in MODELS]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory of transformers."""
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_goes_out_as_it_came_in(
    foreign: Path, imported: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Every tensor, bit for bit; and `imported` has seen that transformers computes the same logits and losses."""
    out = tmp_path / "out"
    ended = convert_in_rank("export", imported(name), out, "--dtype", "float32", "--max-shard-gb", "0.001")
    assert ended.status == 0, ended.err
    if name not in LEAVES_AS or name == "mistral":
        before, after = weights(foreign / name), weights(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (out / "tokenizer/tokenizer.json").exists() == (name == "qwen2") == ("the rules of Qwen2's tokenizer" in ended.out)
    told = json.loads((out / "config.json").read_text())
    assert told["vocab_size"] == (IDS if name == "teacher" else ROWS) and told["torch_dtype"] == "float32"
    assert told["architectures"] == [
        LEAVES_AS.get(name) or json.loads((foreign / name / "config.json").read_text())["architectures"][0]
    ]
    again = convert("import", out, "--to", tmp_path / "again")  # transformers loads what was exported
    assert again.returncode == 0 and "computed by transformers and this program" in again.stdout, again.stderr
    first, second = (read_state(next(root.glob("iter_*"))) for root in (imported(name), tmp_path / "again"))
    context = {"mistral": 64}.get(name, CONTEXT)
    assert first.architecture == second.architecture and first.architecture["seq_length"] == context
    assert first.reference_losses == second.reference_losses


def test_bfloat16_is_rounded_once(foreign: Path, tmp_path: Path) -> None:
    ended = convert("import", foreign / "qwen2", "--to", tmp_path / "in", "--dtype", "bfloat16")
    assert ended.returncode == 0 and "computed by transformers and this program" in ended.stdout, ended.stderr
    assert convert_in_rank("export", tmp_path / "in", tmp_path / "out").status == 0
    before, after = weights(foreign / "qwen2"), weights(tmp_path / "out")
    assert all(torch.equal(before[key].to(torch.bfloat16), after[key]) for key in before)


# ---- under any layout --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """Losses of a model on the reference batch."""

    lengths: tuple[int, ...]
    losses: tuple[float | None, ...]


def losses_under(directory: Path, parallel: ParallelConfig, world_size: int) -> Recorded:
    """In every rank: load the checkpoint in a layout, and compute its losses."""
    state = read_state(next(directory.glob("iter_*")))
    model, ids, length = model_of(state.architecture), state.vocabulary_size, state.seq_length
    assert ids is not None and length is not None
    mesh = make_student_mesh(student_layout(parallel, world_size), parallel.virtual_stages)
    seed_everything(1, mesh)
    chunks = build_model(model, parallel, length, ids, torch.float32, length, mesh)
    load_weights(directory, chunks, mesh)
    student = Student(
        chunks=chunks, optimizer=None, scheduler=None, mesh=mesh, seq_length=length, micro_batch_size=1, global_batch_size=1
    )  # type: ignore[arg-type]
    computed = reference_losses(student, ids)
    return Recorded(computed.lengths, computed.losses)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2)])
def test_every_layout_computes_what_was_recorded(imported: Callable[[str], Path], name: str, tp: int, pp: int) -> None:
    recorded = read_state(next(imported(name).glob("iter_*"))).reference_losses
    assert recorded is not None and None not in recorded.losses
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    for computed in run_ranks(tp * pp, losses_under, imported(name), parallel, tp * pp):
        assert computed.lengths == recorded.lengths
        assert computed.losses == pytest.approx(recorded.losses, rel=1e-5)


@pytest.mark.parametrize("name", ["teacher", "qwen2"])
def test_an_imported_model_teaches(imported: Callable[[str], Path], foreign: Path, tmp_path: Path, name: str) -> None:
    """It is admitted through the gate, under a layout of its own, and the run goes through the switch. Also with more rows than ids."""
    import numpy as np

    from tests.support.program import entries, write_tokens

    tokens = np.random.default_rng(0).integers(0, IDS - 1, 8 * 17 * 4).astype(np.uint16)
    data = write_tokens(tmp_path / "bytes", tokens)
    flags = dict(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=foreign / "teacher", data_path=data, train_iters=4, kd_steps=2,
        tensor_model_parallel_size=2, teacher_load=imported(name), teacher_tensor_model_parallel_size=2, save=tmp_path / "run",
        teacher_max_dropped_mass=0.1,
    )  # fmt: skip
    ended = train(2, **flags)
    assert "computed by transformers and this program, came out as" in ended.err
    assert read_teacher(str(imported(name))).imported and not read_teacher(str(tmp_path / "run")).imported
    assert read_state(tmp_path / "run" / "iter_0000004").run.salt is not None
    dropped = [entry["teacher_vocabulary"] for entry in entries(tmp_path / "run", "event") if "teacher_vocabulary" in entry]
    assert [(told["all_ids"], told["shared_ids"]) for told in dropped] == ([] if name == "teacher" else [(ROWS, IDS)])
    assert all(0.001 < told["mean"] < 0.1 for told in dropped)  # 4 / 261 for a model that has learnt nothing


# ---- what is seen ------------------------------------------------------------------------------------------------------


def test_other_outputs_are_refused() -> None:
    logits = torch.tensor([[1.0, -2.0]])
    own = Outputs((1.0, 2.0), logits)
    refuse_other_outputs(own, Outputs((1.00009, 2.0), logits + 1.9e-4), "x")
    with pytest.raises(UserError, match="logits up to 2 differ by up to 0.0003"):
        refuse_other_outputs(own, Outputs((1.0, 2.0), logits.clone().index_fill(1, torch.tensor([0]), 1.0003)), "x")
    with pytest.raises(UserError, match="loss 2.000000, in transformers 2.001000"):
        refuse_other_outputs(own, Outputs((1.0, 2.001), logits), "x")
    with pytest.raises(UserError, match="logits"):
        refuse_other_outputs(Outputs((1.0, 2.0), logits * float("nan")), own, "x")


def damaged(foreign: Path, name: str, copy: Path) -> Path:
    shutil.copytree(foreign / name, copy)
    return copy


def _drop(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, path, metadata={"format": "pt"})


def _add(directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.extra": torch.zeros(2)}, path, metadata={"format": "pt"})


def _not_finite(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def _untied(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path, metadata={"format": "pt"})


def _half(directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def _set(**values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _index_outside(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def _index_of_absent(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))


@pytest.mark.parametrize(
    "change, words",
    [
        (_drop, ["model.layers.1.self_attn.k_proj.bias is missing"]),
        (_add, ["model.layers.0.extra is left over"]),
        (_not_finite, ["model.layers.2.mlp.up_proj.weight has numbers that are not finite"]),
        (_untied, ["tie_word_embeddings is true, and lm_head.weight differs from model.embed_tokens.weight"]),
        (_half, ["holds float16", "--dtype float32 or --dtype bfloat16"]),
        (_cut, ["model.safetensors is damaged"]),
        (_pickled, ["holds pickles (*.bin), which are not opened", "convert it: python -c", "-safetensors')"]),
        (_index_outside, ["model.safetensors.index.json cannot be read"]),
        (_index_of_absent, ["names x.safetensors, and there is no such file"]),
        (_set(intermediate_size=95), ["mlp.gate_proj.weight is [96, 64]", "[95, 64]"]),
        (_set(architectures=["BertModel"]), ["architectures is ['BertModel']", "LlamaForCausalLM"]),
        (_set(hidden_act="relu"), ["hidden_act is 'relu'", "only 'silu'"]),
        (_set(quantization_config={"bits": 4}), ["quantization_config"]),
        (_set(hidden_size="64"), ["hidden_size is '64'", "int"]),
        (_set(rope_parameters={"rope_type": "yarn", "factor": 4.0}), ["rope_parameters", "linear or llama3"]),
        (lambda directory: (directory / "tokenizer.json").unlink(), ["holds no tokenizer", "--tokenizer-type"]),
        (lambda directory: (directory / "config.json").unlink(), ["holds no config.json"]),
        (lambda directory: (directory / "config.json").write_text("{"), ["config.json cannot be read"]),
        (lambda directory: (directory / "model.safetensors").unlink(), ["holds neither model.safetensors nor"]),
    ],
)  # fmt: skip
def test_a_damaged_source_is_refused_and_nothing_is_left(
    foreign: Path, tmp_path: Path, change: Callable[[Path], None], words: list[str]
) -> None:
    source = damaged(foreign, "qwen2", tmp_path / "source")
    change(source)
    message = refusal("import", source, "--to", tmp_path / "out", "--no-verify")
    assert all(word in message for word in words), message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_output_that_exists_is_refused(foreign: Path, imported: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "--to" in refusal("import", foreign / "qwen2", "--to", tmp_path / "there")
    assert "OUT" in refusal("export", imported("qwen2"), tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_mistyped_command_is_refused(tmp_path: Path) -> None:
    """The first as a process: what a user sees."""
    ended = convert("imprt", tmp_path)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and ended.stdout == "", ended
    assert "'imprt' is no command (did you mean import?)" in one_error(ended.stderr)
    assert "no command is given" in refusal()
    assert "unknown flag --form" in refusal("import", tmp_path, "--form", "hf")
