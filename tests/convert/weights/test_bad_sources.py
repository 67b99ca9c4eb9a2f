"""A directory of transformers that something is wrong with: one line says what, and nothing is left; or the import is what it should be.

Programs run in a rank of the pool, without transformers: test_hugging_face.py compares with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_salt.checkpoint import safe_unpickle
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.convert.hugging_face.families import model_of_config
from megatron_salt.convert.hugging_face.transformers_process import outputs_of_transformers
from megatron_salt.convert.parts import parts_of
from megatron_salt.convert.tensor_files import TensorFiles
from megatron_salt.errors import UserError
from megatron_salt.files import sole_writer
from tests.convert.conftest import convert_in_rank
from tests.convert.weights.test_import_weights import Tensors, whole
from tests.support.mutations import Mutation, kept, mutations
from tests.support.program import Ended

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def imported(source: Path, out: Path, *words: str) -> Ended:
    return convert_in_rank("import", source, "--to", out, "--no-verify", *words)


def refusal(source: Path, out: Path) -> str:
    """The one line of an import that is refused."""
    ended = imported(source, out)
    assert ended.status == 2 and "Traceback" not in ended.err, ended
    lines = ended.err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1 and lines[-1].startswith("error: "), ended.err
    return lines[-1]


def contents(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def source(foreign: Path, tmp_path: Path) -> Path:
    """A copy of a model in one file."""
    shutil.copytree(foreign / "qwen2", tmp_path / "source")
    return tmp_path / "source"


def is_the_source(out: Path, source: Path) -> bool:
    """Whether every tensor of a checkpoint is what the whole tensors of the source make."""
    [directory] = out.glob("iter_*")
    foreign = model_of_config(json.loads((source / "config.json").read_text()), "config.json")
    tensors = Tensors({name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()})
    files = TensorFiles(directory, safe_unpickle.read_metadata(directory))
    for part in parts_of(foreign.architecture, foreign.model, foreign.vocabulary_size, foreign.context):
        front = () if part.layer is None else (part.layer,)
        shape = (*((1,) if front else ()), *part.shape)
        ours = files.read(part.key, (*front, *(0 for _ in part.shape)), shape).view(part.shape)
        if not torch.equal(ours, whole(part, tensors)):
            return False
    return sorted(path.name for path in out.iterdir()) == [directory.name, "latest_checkpointed_iteration.txt"]


# ---- what is right -----------------------------------------------------------------------------------------------------


def test_links_as_in_the_hubs_cache_and_old_buffers_are_read(foreign: Path, tmp_path: Path) -> None:
    """Every file is a link to a blob; and Pythia's files hold masks of another dtype, which are no weights."""
    cache = tmp_path / "models--x"
    snapshot = cache / "snapshots" / "1234"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((foreign / "gpt-neox in sequence").iterdir())):
        shutil.copyfile(path, cache / "blobs" / f"{number:02}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:02}")
    blob = (snapshot / WEIGHTS).resolve()
    masks = {f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool) for i in range(4)}
    save_file(load_file(blob) | masks, blob, metadata={"format": "pt"})
    ended = imported(snapshot, tmp_path / "out")
    assert ended.status == 0 and "computed by this program alone" in ended.out, ended
    assert is_the_source(tmp_path / "out", snapshot)
    recorded = read_state(next((tmp_path / "out").glob("iter_*"))).reference_losses
    assert recorded is not None and recorded.computed_by == "this program alone"


def test_what_a_killed_import_left_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "iter_0000000").mkdir(parents=True)
    (tmp_path / "out.partial" / "iter_0000000" / "x").write_bytes(b"half")
    (tmp_path / "out.lock").write_text("process 1 on another host\n")
    assert imported(source, tmp_path / "out").status == 0
    assert is_the_source(tmp_path / "out", source) and sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# ---- what is wrong -----------------------------------------------------------------------------------------------------


def _config(**values: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda source: save_file(change(load_file(source / WEIGHTS)), source / WEIGHTS, metadata={"format": "pt"})


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        content = (source / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        (source / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return apply


def _same_place(header: dict[str, Any]) -> None:
    one, other = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    header[one]["data_offsets"] = header[other]["data_offsets"]


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        make(source / name)

    return change


def _index(file: str) -> Callable[[Path], None]:
    return lambda source: (source / INDEX).write_text(json.dumps({"weight_map": {"a": file}})) and None


QUERY = "model.layers.1.self_attn.q_proj.weight"
WRONG: list[tuple[Callable[[Path], None], str]] = [
    (_config(hidden_size=10**12), "hidden_size is 1000000000000: expected a number from 1 to 2147483647"),
    (_config(num_hidden_layers=10**9), "1000000000 layers, and it holds"),
    (_config(num_attention_heads=-8), "num_attention_heads is -8"),
    (_config(intermediate_size=96.0), "intermediate_size is 96.0: expected a value of type int"),
    (_config(vocab_size=True), "vocab_size is True"),
    (_config(max_position_embeddings=2**40), "max_position_embeddings is 1099511627776"),
    (_config(rms_norm_eps=-1.0), "config.json: .*norm-epsilon"),
    (_config(rope_parameters={"rope_theta": "x", "rope_type": "default"}), "rope_parameters is .*rope_theta is no number"),
    (_config(rope_parameters={"rope_theta": 0, "rope_type": "default"}), "config.json: .*rotary-base"),
    (_config(rope_parameters=[1]), "rope_parameters is .1.: expected a value of type dict"),
    (
        _tensors(lambda tensors: tensors | {QUERY: tensors[QUERY].to(torch.float8_e4m3fn)}),
        f"{QUERY} is of kind F8_E4M3: quantised",
    ),
    (_tensors(lambda tensors: tensors | {QUERY: tensors[QUERY].to(torch.int8)}), f"{QUERY} is of kind I8: quantised"),
    (_tensors(lambda tensors: tensors | {"x.scale": torch.zeros(3, dtype=torch.uint8)}), "x.scale is of kind U8: quantised"),
    (_tensors(lambda tensors: tensors | {"x": torch.zeros(0, 64)}), "x is left over"),
    (_tensors(lambda tensors: tensors | {QUERY: torch.zeros(0, 64)}), rf"{QUERY} is \[0, 64\]"),
    (_header(_same_place), "model.safetensors is damaged"),
    (_header(lambda header: header[QUERY].update(shape=[2**62, 2**62])), "model.safetensors is damaged"),
    (_instead(WEIGHTS, lambda path: path.write_bytes((2**62).to_bytes(8, "little") + b"{}")), "model.safetensors is damaged"),
    (_instead(WEIGHTS, os.mkfifo), "model.safetensors cannot be read: it is not a regular file"),
    (
        _instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
        "model.safetensors cannot be read: it is not a regular file",
    ),
    (_instead(WEIGHTS, lambda path: path.symlink_to("blobs/1")), "model.safetensors cannot be read: .* or a link to nothing"),
    (_instead(INDEX, lambda path: path.symlink_to("blobs/2")), "model.safetensors.index.json cannot be read: No such file"),
    (_instead("config.json", os.mkfifo), "config.json cannot be read: it is not a regular file"),
    (_index("/etc/passwd"), "'/etc/passwd', which does not lie below"),
    (_index("a/../../x"), "'a/../../x', which does not lie below"),
]


@pytest.mark.parametrize("change, words", WRONG, ids=[words[:40] for _, words in WRONG])
def test_a_bad_source_is_refused_in_one_line(source: Path, tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    change(source)
    before = contents(tmp_path)
    message = refusal(source, tmp_path / "new" / "out")
    assert re.search(words, message), message
    assert contents(tmp_path) == before


def test_an_output_that_cannot_be_made_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    before = contents(tmp_path)
    for out, words in (
        (source / "out", f"--to {source / 'out'} lies inside of {source}"),
        (source / ".." / "source" / "a" / "out", "lies inside of"),
        (tmp_path / "file" / "out", f"{tmp_path / 'file'} is not a directory"),
        (tmp_path / "link", "exists"),
        (tmp_path / ("x" * 253), "cannot be made: File name too long"),  # the name itself would do
        (tmp_path / ("x" * 300), "cannot be made: File name too long"),
    ):
        assert words in refusal(source, out)
    for wrong in (tmp_path / "file", tmp_path / "link", tmp_path / "none"):
        assert f"{wrong} is not a directory" in refusal(wrong, tmp_path / "out")
    with sole_writer("--to", tmp_path / "out"):
        assert f"--to {tmp_path / 'out'} is being written by process {os.getpid()}" in refusal(source, tmp_path / "out")
    assert contents(tmp_path) == before


# ---- mutations ---------------------------------------------------------------------------------------------------------


def of_header(mutation: Mutation) -> Mutation:
    """The same damage to the JSON in front of the tensors."""

    def apply(path: Path) -> None:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        scratch = path.with_suffix(".header")
        scratch.write_bytes(content[8:end])
        mutation.apply(scratch)
        text = scratch.read_bytes() if scratch.is_file() and not scratch.is_symlink() else b""
        shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink(missing_ok=True)
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return Mutation(f"header: {mutation.name}", apply)


DRAWN: dict[str, st.SearchStrategy[Mutation]] = {
    "config.json": mutations(True),
    INDEX: mutations(True),
    "model-00001-of-*.safetensors": st.one_of(mutations(False), mutations(True).map(of_header), mutations(True).map(of_header)),
    "tokenizer.json": mutations(True),
}


def law(source: Path, name: str, examples: int, check: Callable[[Path, Path], None]) -> None:
    """Check the law for a number of mutations of a file. check: gets output and source of each import that was not refused."""
    [path] = source.glob(name)
    out = source.parent / "out"
    told: list[str] = []

    @seed(zlib.crc32(name.encode()))
    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(DRAWN[name])
    def holds(mutation: Mutation) -> None:
        with kept(path):
            mutation.apply(path)
            ended = imported(source, out)
            assert "Traceback" not in ended.err, ended.err
            if ended.status == 0:
                told.append("read")
                check(out, source)
                shutil.rmtree(out)
                return
            lines = ended.err.splitlines()
            assert ended.status == 2 and sum(line.startswith("error: ") for line in lines) == 1, ended
            assert str(source) in lines[-1], lines[-1]
            assert sorted(entry.name for entry in source.parent.iterdir()) == ["source"]
            told.append("refused")

    holds()
    assert "refused" in told, told


@pytest.mark.parametrize("name", DRAWN)
def test_a_mutated_source_is_refused_in_one_line_or_read_as_it_is(foreign: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(foreign / "llama", tmp_path / "source")

    def check(out: Path, source: Path) -> None:
        assert is_the_source(out, source)

    law(tmp_path / "source", name, 10, check)


@pytest.mark.full
def test_a_mutated_config_that_is_read_is_the_model_that_transformers_computes(foreign: Path, tmp_path: Path) -> None:
    shutil.copytree(foreign / "llama", tmp_path / "source")

    def check(out: Path, source: Path) -> None:
        state = read_state(next(out.glob("iter_*")))
        recorded = state.reference_losses
        assert recorded is not None and state.vocabulary_size is not None
        try:
            theirs = outputs_of_transformers(source, torch.float32, state.vocabulary_size, recorded.lengths)
        except UserError:
            return  # transformers cannot load it
        assert theirs is not None and recorded.losses == pytest.approx(theirs.losses, rel=1e-4)

    law(tmp_path / "source", "config.json", 60, check)
