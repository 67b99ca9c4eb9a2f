"""Text that every machine with Python has: the source of its standard library, and the prose of `help()`, as JSON lines.

For examples that must run without a network. One module or help topic is a document. Modules whose path hashes low are held
out: the same ones wherever the same files lie, and never a help topic, since topics quote one another. Tests, tables of
character encodings and whatever was installed later are left out, so two machines with one release of Python give the same text.

    python tools/python_corpus.py --output-dir runs/corpus
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from megatron_salt.cli import run_tool
from megatron_salt.errors import UserError
from megatron_salt.files import refuse_present, sole_writer, whole_file

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SMALLEST = 1_000_000
"""Characters below which this Python came without its sources."""


@dataclass(frozen=True)
class CorpusConfig:
    """Write the text of this Python installation to train.jsonl and held_out.jsonl."""

    output_dir: str
    """Where the two files go."""

    held_out_share: float = 0.04
    """Share of the modules that is held out."""

    overwrite: bool = False
    """Replace files that are already there."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise UserError(f"--held-out-share must lie between 0 and 1, got {self.held_out_share}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(CorpusConfig, write_corpus, argv)


def write_corpus(config: CorpusConfig) -> None:
    """The whole tool. UserError where this Python has no sources or the directory cannot be written."""
    paths = {split: Path(config.output_dir) / f"{split}.jsonl" for split in ("train", "held_out")}
    refuse_present("--output-dir", config.output_dir, paths.values(), config.overwrite)
    library = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[tuple[str, str]]] = {"train": [], "held_out": []}
    for name, text in modules(library):
        files["held_out" if is_held_out(name, config.held_out_share) else "train"].append((name, text))
    found = sum(len(text) for _, text in files["train"])
    if found < SMALLEST or not files["held_out"]:
        raise UserError(
            f"{library} holds {found} characters of source, too few to train on: this Python came without its library's source"
        )
    files["train"] += [(f"help/{name}", text) for name, text in sorted(topics.items())]
    try:
        with sole_writer("--output-dir", config.output_dir):
            refuse_present("--output-dir", config.output_dir, paths.values(), config.overwrite)
            for split, documents in files.items():
                write_lines(paths[split], documents)
                characters = sum(len(text) for _, text in documents)
                print(f"wrote {paths[split]}: {len(documents)} documents, {characters / 1e6:.1f} million characters")
    except OSError as error:
        raise UserError(f"--output-dir {config.output_dir} cannot be written: {error.strerror}") from error


def modules(library: Path) -> Iterator[tuple[str, str]]:
    """(path below the library, text) of each module, in the order of the paths; what cannot be decoded is left out."""
    seen: set[Path] = set()
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if path.resolve() in seen:
            continue  # a link
        seen.add(path.resolve())
        if LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                with tokenize.open(path) as source:  # heeds the encoding that the module declares
                    text = source.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            if text.strip():
                yield name.as_posix(), text


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is held out; depends on its name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < share * 2**64


def write_lines(path: Path, documents: list[tuple[str, str]]) -> None:
    """One JSON object with `name` and `text` a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for name, text in documents:
            out.write(json.dumps({"name": name, "text": text}) + "\n")
