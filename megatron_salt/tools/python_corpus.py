"""Write a corpus that every machine with Python has: the source of the standard library and the prose of `help()`, as JSON lines.

It is for examples that run without a network. Each module and each help topic is a document. The hash of a module's path decides whether
it is held out, so all machines hold out the same modules. Help topics are never held out, because they quote one another. Tests, tables
of character encodings and installed packages are left out, so the same release of Python gives the same text on all machines.

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
from megatron_salt.files import real_path, refuse_present, sole_writer, whole_file

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SMALLEST = 1_000_000
"""With fewer characters than this, Python was installed without the sources of its library."""


@dataclass(frozen=True)
class CorpusConfig:
    """Write the text of this Python installation to train.jsonl and held_out.jsonl."""

    output_dir: str
    """Directory of the two files."""

    held_out_share: float = 0.04
    """Share of the modules to hold out."""

    overwrite: bool = False
    """Replace existing files."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise UserError(f"--held-out-share must lie between 0 and 1, got {self.held_out_share}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(CorpusConfig, write_corpus, argv)


def write_corpus(config: CorpusConfig) -> None:
    """Write both files. Raises UserError if this Python has no sources, or the directory cannot be written."""
    paths = {split: Path(config.output_dir) / f"{split}.jsonl" for split in ("train", "held_out")}
    refuse_present("--output-dir", config.output_dir, paths.values(), config.overwrite)
    library = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[tuple[str, str]]] = {"train": [], "held_out": []}
    for name, text in modules(library):
        files["held_out" if is_held_out(name, config.held_out_share) else "train"].append((name, text))
    characters = sum(len(text) for _, text in files["train"])
    if characters < SMALLEST or not files["held_out"]:
        raise UserError(
            f"{library} holds {characters} characters of source, too few to train on: this Python came without its library's source"
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
    """(path below the library, text) of each module, in the order of paths. Files that cannot be decoded are left out."""
    seen: set[Path] = set()
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if real_path(path) in seen:
            continue  # a link to a module that was read
        seen.add(real_path(path))
        if LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                with tokenize.open(path) as source:  # uses the encoding that the module declares
                    text = source.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            if text.strip():
                yield name.as_posix(), text


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is held out. Depends only on its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < share * 2**64


def write_lines(path: Path, documents: list[tuple[str, str]]) -> None:
    """Write a JSON object with `name` and `text` for each document. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for name, text in documents:
            out.write(json.dumps({"name": name, "text": text}) + "\n")
