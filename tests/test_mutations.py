"""Each small file of a good run is mutated by hypothesis. Its reader says in one line what is wrong, or gives the same result.

Programs run by main(argv) in a rank of the pool, so that a program that hangs is found too. Plain damage does not change the checksums.
An attacker makes them match (`sealed`); then a changed value may be as valid as the original.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import math
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_salt import pretrain
from megatron_salt.checkpoint import integrity, owner, save_directory
from megatron_salt.cli import parse, run_tool
from megatron_salt.config.yaml_text import to_yaml
from tests.support.mutations import Mutation, copied, kept, mutations
from tests.support.program import Ended, argv
from tests.support.ranks import run_ranks

SECONDS = 10.0  # of computing, for a program that reads a small file; it never waits for long
TOOLS = {
    "inspect_checkpoint": ("InspectConfig", "inspect_checkpoint"),
    "generate_text": ("GenerateConfig", "generate_text"),
    "merge_datasets": ("MergeConfig", "merge_datasets"),
    "merge_scores": ("MergeConfig", "merge_scores"),
    "preprocess_data": ("PreprocessConfig", "preprocess"),
    "report": ("ReportConfig", "report"),
    "score_data": ("ScoreConfig", "score_data"),
    "select_data": ("SelectConfig", "select_data"),
}


def program(name: str, words: list[str]) -> Ended:
    """Run a whole program. Called in the rank."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for module in ("megatron_salt.train.run", "megatron_salt.parallel.launch"):
            stack.enter_context(mock.patch(f"{module}.distributed", return_value=contextlib.nullcontext()))
        stack.enter_context(mock.patch("megatron_salt.train.build.acquire", partial(owner.acquire, watch=0.2)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if name == "pretrain":
            status = pretrain.main(words)
        else:
            module, (config, main) = importlib.import_module(f"megatron_salt.tools.{name}"), TOOLS[name]
            status = run_tool(getattr(module, config), getattr(module, main), words)
    return Ended(status, out.getvalue(), err.getvalue())


def stopped(name: str, words: list[str], before: str) -> Ended:
    """Run a whole program, with Ctrl-C where it calls the function `before`. Called in the rank."""
    with mock.patch(before, side_effect=KeyboardInterrupt):
        return program(name, words)


def timed(name: str, words: list[str]) -> tuple[Ended, float]:
    """Run a whole program and measure its CPU seconds. Called in the rank."""
    started = time.process_time()
    return program(name, words), time.process_time() - started


@dataclass(frozen=True)
class Good:
    """A run and its inputs, all in one folder."""

    home: Path

    @property
    def data(self) -> str:
        return str(self.home / "words_text_document")

    @property
    def checkpoint(self) -> Path:
        return save_directory.directory_of(self.home / "run", 2)

    def path(self, *parts: str) -> str:
        return str(self.home.joinpath(*parts))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    made = Good(tmp_path_factory.mktemp("good"))
    lines = [
        json.dumps({"text": f"line {number} says {word} and {word * 3}"})
        for number in range(8)
        for word in ("one", "two", "three")
    ]
    made.home.joinpath("words.jsonl").write_text("\n".join(lines))
    whole = ["--input", made.path("words.jsonl"), "--append-eod", "--tokenizer-type", "ByteLevelTokenizer"]
    for name, words in (
        ("preprocess_data", ["--input", made.path("words.jsonl"), "--output-prefix", made.path("words"), "--append-eod",
                             "--tokenizer-type", "ByteLevelTokenizer"]),
        ("pretrain", argv(data_path=made.data, untie_embeddings_and_output_weights=True, train_iters=2, save=made.path("run"), save_at=1)),
        ("score_data", score_words(made, made.home / "scores")),
        ("select_data", ["--scores", made.path("scores"), "--output", made.path("chosen"), "--rule", "random", "--fraction", "0.5"]),
    ):  # fmt: skip
        (ended,) = run_ranks(1, program, name, words)
        assert ended.status == 0, ended
    for name, words, before in (
        ("preprocess_data", [*whole, "--output-prefix", made.path("half", "words"), "--resume"],
         "megatron_salt.tools.preprocess_data.publish"),
        ("score_data", score_words(made, made.home / "half_scores"), "megatron_salt.selection.score_writer.ShardWriter.finish"),
    ):  # fmt: skip
        (ended,) = run_ranks(1, stopped, name, words, before)
        assert ended.status == 130, ended
    shutil.copytree(made.home / "run", made.home / "owned")
    gone = replace(owner.myself({}), started="of a process that is gone")
    made.home.joinpath("owned", owner.LOCK).write_text(json.dumps({**asdict(gone), "beat": f"{7:012}"}) + "\n")
    made.home.joinpath("run.yaml").write_text(to_yaml(parse(run_words(made))))
    return made


# ---- who reads what: the words of a command line, and what it comes to ----------------------------------------------------


@dataclass(frozen=True)
class Consumer:
    """A program that reads the file. `words` gets the good run and a folder for output."""

    program: str
    words: Callable[[Good, Path], list[str]]
    result: Callable[[Path], bytes] = lambda output: b""
    """What must be the same where damage is not noticed."""
    copies: str | None = None
    """A folder of the good run that the program writes into; it gets a copy in the folder for output."""


def losses(output: Path) -> bytes:
    entries = [json.loads(line) for line in (output / "log").read_text().splitlines()]
    return repr([(entry["step"], entry["loss"]) for entry in entries if entry["kind"] == "step"]).encode()


def written(*names: str) -> Callable[[Path], bytes]:
    return lambda output: b"".join(next(output.glob(name)).read_bytes() for name in names)


def score_words(good: Good, output: Path) -> list[str]:
    return ["--teacher-load", good.path("run"), "--data-path", good.data, "--output", str(output), "--score-top-k", "10",
            "--block-samples", "16", "--tokenizer-type", "ByteLevelTokenizer"]  # fmt: skip


def run_words(good: Good, **flags: Any) -> list[str]:
    return argv(**(dict(data_path=good.data, untie_embeddings_and_output_weights=True, train_iters=3) | flags))


TEACHING = dict(kd_steps=2, kd_weight=0.5)
INSPECT = Consumer(
    "inspect_checkpoint", lambda good, output: ["--load", good.path("run"), "--verify", "--tensors", "--print-config"]
)
GLANCE = Consumer("inspect_checkpoint", lambda good, output: ["--load", good.path("run"), "--tensors", "--print-config"])
RESUME = Consumer("pretrain", lambda good, output: run_words(good, load=good.path("run"), jsonl=output / "log"), losses)
REHEARSE = Consumer("pretrain", lambda good, output: [*run_words(good, load=good.path("run")), "--dry-run", "1"])
GENERATE = Consumer(
    "generate_text", lambda good, output: ["--load", good.path("run"), "--max-new-tokens", "2", "--prompt", "a"]
)
TEACH = Consumer(
    "pretrain", lambda good, output: run_words(good, teacher_load=good.path("run"), jsonl=output / "log", **TEACHING), losses
)
MAY_TEACH = Consumer(
    "pretrain", lambda good, output: [*run_words(good, teacher_load=good.path("run"), **TEACHING), "--dry-run", "1"]
)
PLAIN = Consumer("pretrain", lambda good, output: [*run_words(good), "--dry-run", "1"])
MERGE = Consumer("merge_datasets", lambda good, output: ["--input", good.data, "--output-prefix", str(output / "merged")],
                 written("merged.bin", "merged.idx"))  # fmt: skip
SELECT = Consumer("select_data", lambda good, output: ["--scores", good.path("scores"), "--output", str(output / "new"), "--rule", "random",
                                                       "--fraction", "0.5"], written("new.npy"))  # fmt: skip
MERGE_SCORES = Consumer("merge_scores", lambda good, output: ["--scores", good.path("scores"), "--output", str(output / "scores")],
                        written("scores/samples-*/*.npy"))  # fmt: skip
WITH_SELECTION = Consumer("pretrain", lambda good, output: [
    *run_words(good, stage1_selection=good.path("chosen"), kd_steps=2, kd_weight=0), "--dry-run", "1"])  # fmt: skip
SCORE = Consumer("score_data", lambda good, output: score_words(good, output / "scores"), written("scores/samples-*/*.npy"))
SCORE_ON = Consumer("score_data", lambda good, output: score_words(good, output / "half_scores"),
                    written("half_scores/samples-*/*.npy", "half_scores/samples-*/shard.json"), copies="half_scores")  # fmt: skip
SCORE_AGAIN = Consumer("score_data", lambda good, output: score_words(good, output / "scores"), copies="scores")
PREPROCESS_ON = Consumer("preprocess_data", lambda good, output: [
    "--input", good.path("words.jsonl"), "--append-eod", "--tokenizer-type", "ByteLevelTokenizer", "--resume",
    "--output-prefix", str(output / "half" / "words")], written("half/*.bin", "half/*.idx"), copies="half")  # fmt: skip
OWN = Consumer("pretrain", lambda good, output: run_words(good, save=output / "owned", load=output / "owned", jsonl=output / "log"),
               losses, copies="owned")  # fmt: skip
MAY_OWN = Consumer("pretrain", lambda good, output: [*OWN.words(good, output), "--dry-run", "1"], copies="owned")
REPORT = Consumer("report", lambda good, output: ["--run", "a=" + good.path("run", "train.jsonl")])
CONFIGURED = Consumer("pretrain", lambda good, output: ["--config", good.path("run.yaml"), "--dry-run", "1"])

OF_A_CHECKPOINT = (INSPECT, RESUME, TEACH)
SIDECARS: dict[str, tuple[Consumer, ...]] = {
    "run/latest_checkpointed_iteration.txt": (INSPECT, RESUME, REHEARSE, GENERATE, MAY_TEACH, SCORE),
    "run/iter_0000002/state.json": (*OF_A_CHECKPOINT, GLANCE, REHEARSE, MAY_TEACH, GENERATE, SCORE),
    "run/iter_0000002/checksums.json": (*OF_A_CHECKPOINT, GLANCE, MAY_TEACH, GENERATE, SCORE),
    "run/iter_0000002/.metadata": (*OF_A_CHECKPOINT, GLANCE, GENERATE),
    "run/iter_0000002/common.pt": OF_A_CHECKPOINT,
    "run/iter_0000002/metadata.json": OF_A_CHECKPOINT,
    "run/iter_0000002/run.yaml": (*OF_A_CHECKPOINT, GLANCE, GENERATE),
    "run/iter_0000002/tokenizer/tokenizer_description.json": (*OF_A_CHECKPOINT, GENERATE),
    "run/train.jsonl": (REPORT,),
    "owned/owner.json": (OWN, MAY_OWN),
    "half/words.tmp.journal": (PREPROCESS_ON,),
    "words_text_document.manifest.json": (PLAIN, MERGE, SELECT, SCORE),
    "words_text_document.idx": (PLAIN, MERGE, SCORE),
    "words_text_document.tokenizer/tokenizer_description.json": (MERGE,),
    "scores/index.json": (SELECT, MERGE_SCORES, SCORE_AGAIN),
    "scores/samples-*/shard.json": (SELECT, MERGE_SCORES, SCORE_AGAIN),
    "half_scores/index.json": (SCORE_ON,),
    "half_scores/samples-*/blocks.journal": (SCORE_ON,),
    "chosen.json": (WITH_SELECTION,),
    "run.yaml": (CONFIGURED,),
}
STRUCTURED = (".json", ".jsonl")
SEALED = ("state.json", "run.yaml", "metadata.json", "tokenizer_description.json")
"""Files of a checkpoint that a stranger may change and seal. The pickles have tests of their own."""


def read_mutated(good: Good, sidecar: str, consumer: Consumer, mutation: Mutation, sealed: bool) -> str:
    """Let the consumer read the mutated file and check the law. Returns "refused" or "read"."""
    (path,) = good.home.glob(sidecar)
    folder = good.checkpoint
    output = good.home / "output"
    good_result(good, consumer)  # of the good file, before it is mutated
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept(path))
        mutation.apply(path)
        if sealed and path.is_file() and not path.is_symlink():
            stack.enter_context(kept(folder / integrity.CHECKSUMS))
            sums = integrity.read_checksums(folder)
            integrity.write_checksums(folder, sums | {str(path.relative_to(folder)): integrity.sum_of_file(path)})
        make_output(good, consumer, output)
        stack.callback(shutil.rmtree, output)
        ((ended, seconds),) = run_ranks(1, timed, consumer.program, consumer.words(good, output), timeout=4 * SECONDS)
        assert seconds < SECONDS
        assert "Traceback" not in ended.out + ended.err, ended.err
        if ended.status == 0:
            assert sealed or sidecar == "run.yaml" or consumer.result(output) == good_result(good, consumer)
            return "read"
    assert ended.status == 2, ended
    lines = [line for line in ended.err.splitlines() if line]
    assert sum(line.startswith("error: ") for line in lines) == 1 and lines[-1].startswith("error: "), ended.err
    names = [
        path.name,
        str(path.parent),
        *(["--"] if consumer is CONFIGURED else []),
    ]  # what flags can say too is told of flags
    assert any(name in lines[-1] for name in names), f"{lines[-1]} does not name {path}"
    return "refused"


def make_output(good: Good, consumer: Consumer, output: Path) -> None:
    output.mkdir(exist_ok=True)  # hypothesis repeats a failure
    if consumer.copies is not None:
        copied(good.home / consumer.copies, output / consumer.copies)


def good_result(good: Good, consumer: Consumer) -> bytes:
    """The consumer's result for the good run, computed once for each consumer."""
    name = hashlib.sha256(repr((consumer.copies, consumer.words(good, Path("x")))).encode()).hexdigest()
    cached = good.home / f"result-{name}"
    if not cached.exists():
        output = good.home / f"output-{name}"
        make_output(good, consumer, output)
        (ended,) = run_ranks(1, program, consumer.program, consumer.words(good, output))
        assert ended.status == 0, ended
        cached.write_bytes(consumer.result(output))
    return cached.read_bytes()


def law(good: Good, sidecar: str, examples: int, seconds: float = math.inf) -> str:
    """Check the law for a number of mutations of a file, or as many as time allows. Returns counts. Mutations are the same in every run."""
    told: list[str] = []
    end = time.monotonic() + seconds

    @seed(zlib.crc32(sidecar.encode()))
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(SIDECARS[sidecar]), mutations(sidecar.endswith(STRUCTURED)), st.booleans())
    def holds(consumer: Consumer, mutation: Mutation, stranger: bool) -> None:
        if time.monotonic() > end:
            return
        sealed = stranger and sidecar.startswith("run/iter") and sidecar.endswith(SEALED)
        told.append(read_mutated(good, sidecar, consumer, mutation, sealed))

    holds()
    assert "refused" in told or sidecar.endswith("journal"), told  # what a journal has lost is done again
    return f"{len(told)} mutations, {told.count('refused')} refused, {told.count('read')} read without harm"


@pytest.mark.parametrize("sidecar", SIDECARS)
def test_a_mutated_file_is_refused_in_one_line_or_makes_no_difference(good: Good, sidecar: str) -> None:
    law(good, sidecar, 8)


@pytest.mark.faults
@pytest.mark.parametrize("sidecar", SIDECARS)
def test_many_mutations_are_refused_in_one_line_or_make_no_difference(
    good: Good, record_property: Callable[[str, object], None], sidecar: str
) -> None:
    record_property("counts", law(good, sidecar, 60, seconds=20.0))
