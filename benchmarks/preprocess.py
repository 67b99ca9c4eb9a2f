"""preprocess_data.py against plain batch encoding by the same tokenizers on as many processes; its memory with 1x and 10x input.

    python benchmarks/preprocess.py                                                the text of this Python installation
    python benchmarks/preprocess.py --input corpus.jsonl --tokenizer-model t.model   your own text and tokenizer (.model or .json)
    python benchmarks/preprocess.py --megatron Megatron-LM                         also against the two tools of a checkout

Raw: each of --workers processes has its share of the same texts in memory and encodes them in batches. Time runs from the first to the
last batch; nothing is read, parsed or written. The tool: time from its start to its end, minus the time for the first few MB, which
every process needs to start (imports, tokenizer, comparison of backends) and which is printed separately. Rates are MB of UTF-8 text
a second, the best of --rounds, in turns. On shared cores, CPU seconds of all processes say more than wall-clock seconds.
Megatron-LM's preprocess_data.py and preprocess_data_fast.py, and ours beside them, are timed from start to end. preprocess_data.py
encodes the text of the reference backends, the others ten times as much. Megatron-LM's tools need the packages of their checkout
(transformers): --megatron-python. Memory is the peak of all resident memory of the tool's processes, shared pages once, plus files
in memory.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import result

from megatron_salt.preprocess.tokenizer_backends import without_special
from megatron_salt.tokenizer.tokenizer import Tokenizer, tokenizer_from_files

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
NAMES = {"SentencePieceTokenizer": "tokenizer.model", "HuggingFaceTokenizer": "tokenizer.json"}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--input", help="JSON lines with `text`")
    asked.add_argument(
        "--tokenizer-model", nargs="+", help="SentencePiece .model, tokenizer.json; default: trained on the input"
    )
    asked.add_argument(
        "--megabytes", type=float, default=20, help="of text for the reference backends; gigatoken gets 10 times as much"
    )
    asked.add_argument("--workers", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=2)
    asked.add_argument("--megatron", help="a checkout of Megatron-LM")
    asked.add_argument("--megatron-python", default=sys.executable, help="what runs its tools")
    flags = asked.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = read_texts(flags.input, folder)
        models = [Path(model) for model in flags.tokenizer_model or train(texts, folder)]
        tiny = write(texts, folder / "tiny.jsonl", 2 * flags.workers)
        small, large = (write(texts, folder / f"{size}.jsonl", flags.megabytes * size) for size in (1, 10))
        print(f"{small[1] / 1e6:.1f} MB of text, {flags.workers} workers")
        for model in models:
            kind = "HuggingFaceTokenizer" if model.suffix == ".json" else "SentencePieceTokenizer"
            speed(kind, model, "reference", small, tiny, flags.workers, flags.rounds)
            speed(kind, model, "gigatoken", large, tiny, flags.workers, flags.rounds)
            grown(kind, model, small, large, flags.workers)
            if flags.megatron and kind == "HuggingFaceTokenizer":
                against_megatron(
                    flags.megatron_python, Path(flags.megatron).resolve(), model, small, large, flags.workers, flags.rounds
                )


def speed(
    kind: str, model: Path, backend: str, source: tuple[Path, int], tiny: tuple[Path, int], workers: int, rounds: int
) -> None:
    """Measure one backend of one tokenizer, alone and in the tool."""
    raw, whole, start = Cost(1e9, 1e9), Cost(1e9, 1e9), Cost(1e9, 1e9)
    for _ in range(rounds):
        raw = raw.least(raw_cost(kind, model, backend, source, workers))
        start = start.least(tool(kind, model, backend, tiny, workers)[0])
        whole = whole.least(tool(kind, model, backend, source, workers)[0])
    inside = Cost(whole.wall - start.wall, whole.cpu - start.cpu)
    label, size, more = f"{kind.removesuffix('Tokenizer').lower()}_{backend}", source[1] / 1e6, (source[1] - tiny[1]) / 1e6
    print(
        f"{kind} by {backend}: raw {size / raw.wall:.2f} MB/s, {size / raw.cpu:.2f} MB a CPU second; the tool "
        f"{more / inside.wall:.2f} and {more / inside.cpu:.2f}; its first {tiny[1] / 1e6:.0f} MB, with its start, {start.wall:.1f} s"
    )
    if backend == "reference":  # beside gigatoken, reading and writing take as long as encoding
        result(f"tool_over_raw_{label}", more / size * raw.wall / inside.wall, 0.9)
        result(f"tool_over_raw_cpu_{label}", more / size * raw.cpu / inside.cpu, 0.9)


def against_megatron(
    python: str, checkout: Path, model: Path, small: tuple[Path, int], large: tuple[Path, int], workers: int, rounds: int
) -> None:
    """Measure whole runs of ours with gigatoken, and of Megatron-LM's two tools."""
    ours, theirs, fast = Cost(1e9, 1e9), Cost(1e9, 1e9), Cost(1e9, 1e9)
    for _ in range(rounds):
        ours = ours.least(tool("HuggingFaceTokenizer", model, "gigatoken", large, workers)[0])
        fast = fast.least(megatron_tool(python, checkout, "preprocess_data_fast.py", model, large, ["--use-gigatoken"]))
        theirs = theirs.least(megatron_tool(python, checkout, "preprocess_data.py", model, small, ["--workers", str(workers)]))
    rates = [source[1] / 1e6 / cost.wall for source, cost in ((large, ours), (large, fast), (small, theirs))]
    print(
        f"from start to end: ours with gigatoken {rates[0]:.2f} MB/s ({ours.wall:.1f} s), Megatron-LM's preprocess_data_fast.py "
        f"{rates[1]:.2f} ({fast.wall:.1f} s), its preprocess_data.py {rates[2]:.2f} ({theirs.wall:.1f} s)"
    )
    result("whole_run_over_megatrons_gigatoken", rates[0] / rates[1], 1)
    result("whole_run_over_megatron", rates[0] / rates[2], 20)


def grown(kind: str, model: Path, small: tuple[Path, int], large: tuple[Path, int], workers: int) -> None:
    """Memory that ten times the input takes in addition."""
    few, many = (tool(kind, model, "gigatoken", source, workers)[1] for source in (small, large))
    print(
        f"{kind} by gigatoken: {few / 1e6:.0f} MB resident for {small[1] / 1e6:.0f} MB of text, "
        f"{many / 1e6:.0f} MB for {large[1] / 1e6:.0f} MB"
    )
    result(f"grown_mb_{kind.removesuffix('Tokenizer').lower()}_gigatoken", (many - few) / 1e6, 50, lower_is_better=True)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds, and CPU seconds of all processes."""

    wall: float
    cpu: float

    def least(self, other: Cost) -> Cost:
        return Cost(min(self.wall, other.wall), min(self.cpu, other.cpu))


def tool(kind: str, model: Path, backend: str, source: tuple[Path, int], workers: int) -> tuple[Cost, int]:
    """A run of the tool from start to end; the bytes of memory at its peak."""
    with tempfile.TemporaryDirectory(dir=source[0].parent) as out:
        command = [
            sys.executable,
            "tools/preprocess_data.py",
            "--input",
            str(source[0]),
            "--output-prefix",
            f"{out}/d",
            "--append-eod",
            "--tokenizer-type",
            kind,
            "--tokenizer-model",
            str(model.resolve()),
            "--tokenizer-backend",
            backend,
            "--workers",
            str(workers),
            "--log-interval",
            "1000000000",
        ]
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        memory = Memory(process.pid)
        if process.wait():
            sys.exit(f"{' '.join(command)} failed")
        return since(started, before), memory.highest()


def megatron_tool(python: str, checkout: Path, script: str, model: Path, source: tuple[Path, int], more: list[str]) -> Cost:
    """A run of one of Megatron-LM's tools from start to end, without ends of documents, which would need a special token."""
    with tempfile.TemporaryDirectory(dir=source[0].parent) as out:
        (Path(out) / "tokenizer.json").write_bytes(model.read_bytes())  # transformers takes a directory
        (Path(out) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        command = [
            python,
            f"tools/{script}",
            "--input",
            str(source[0]),
            "--output-prefix",
            f"{out}/d",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            out,
            *more,
        ]
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return since(started, before)


def since(started: float, before: resource.struct_rusage) -> Cost:
    """CPU seconds of child processes since then."""
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(time.monotonic() - started, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


class Memory(threading.Thread):
    """Measures ten times a second the resident memory of a process and its children, until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._highest = pid, 0
        self.start()

    def run(self) -> None:
        while Path(f"/proc/{self._pid}").exists():
            try:
                children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
                self._highest = max(self._highest, sum(map(proportional, [str(self._pid), *children])) + in_files(self._pid))
            except OSError:  # one of them ended meanwhile
                pass
            time.sleep(0.1)

    def highest(self) -> int:
        self.join()
        return self._highest


def proportional(pid: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def in_files(pid: int) -> int:
    """Bytes of the files in memory that a process holds open."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return sum(link.stat().st_size for link in links if "memfd:slot" in str(link.readlink()))


def raw_cost(kind: str, model: Path, backend: str, source: tuple[Path, int], workers: int) -> Cost:
    """The cost of `workers` processes that only encode."""
    context = multiprocessing.get_context("spawn")
    ready, go, seconds = context.Barrier(workers + 1), context.Barrier(workers + 1), context.SimpleQueue()
    processes = [
        context.Process(target=encode_share, args=(kind, str(model), backend, str(source[0]), i, workers, ready, go, seconds))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    started = time.monotonic()
    go.wait()
    cpu = sum(seconds.get() for _ in processes)
    wall = time.monotonic() - started
    for process in processes:
        process.join()
    return Cost(wall, cpu)


def encode_share(kind: str, model: str, backend: str, path: str, i: int, workers: int, ready, go, seconds) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizer_from_files(kind, {NAMES[kind]: Path(model).read_bytes()}, model)
    encode = tokenizer.encode_batch if backend == "reference" else gigatoken_of(tokenizer)
    with open(path, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for number, line in enumerate(stream) if number % workers == i]
    ready.wait()
    go.wait()
    started = time.process_time()
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > 1 << 18:
            encode(batch)
            batch, size = [], 0
    encode(batch)
    seconds.put(time.process_time() - started)


def gigatoken_of(tokenizer: Tokenizer):
    """gigatoken without our code, its growing caches included."""
    import gigatoken

    encode = gigatoken.Tokenizer.from_json(without_special(tokenizer.as_json())).encode
    return lambda texts: [encode(text) for text in texts]


# --- text and tokenizers ----------------------------------------------------------------------------------------------


def read_texts(path: str | None, folder: Path) -> list[str]:
    if path is None:
        subprocess.run(
            [sys.executable, "tools/python_corpus.py", "--output-dir", str(folder)],
            cwd=ROOT,
            env=ENVIRONMENT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        path = str(folder / "train.jsonl")
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def write(texts: list[str], path: Path, megabytes: float) -> tuple[Path, int]:
    """Write the texts, repeated if they are too few, up to that size: (file, bytes of text)."""
    size, number = 0, 0
    with open(path, "w", encoding="utf-8") as out:
        while size < megabytes * 1e6:
            text = texts[number % len(texts)]
            out.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")
            size, number = size + len(text.encode()), number + 1
    return path, size


def train(texts: list[str], folder: Path) -> list[Path]:
    """Train a SentencePiece model and a byte-level tokenizer.json on the texts."""
    import sentencepiece
    import tokenizers

    some = [line for text in texts[:: max(len(texts) // 500, 1)] for line in text.splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some), model_writer=model, vocab_size=8000, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    (folder / "t.model").write_bytes(model.getvalue())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        some,
        tokenizers.trainers.BpeTrainer(
            vocab_size=32000, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet
        ),
    )
    bpe.save(str(folder / "t.json"))
    return [folder / "t.model", folder / "t.json"]


if __name__ == "__main__":
    main()
