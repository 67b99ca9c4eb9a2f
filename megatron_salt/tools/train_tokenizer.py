"""Train a SentencePiece tokenizer on JSON lines or plain text, for --tokenizer-type SentencePieceTokenizer.

The tokenizer is lossless: text is not normalised, white space and line feeds are kept, and characters without a piece become byte
pieces. (U+2581, SentencePiece's sign for a space, is decoded as a space.) Each digit is a piece of its own. Id 0 is <unk>. Id 1 is
<eod>, which ends documents and which no text can produce. There is no padding piece, and no BOS without --bos. The same text and
flags give the same bytes.

    python tools/train_tokenizer.py --input 'corpus/*.jsonl' --output web.model --vocab-size 32000
"""

from __future__ import annotations

import io
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_salt.cli import run_tool
from megatron_salt.errors import UserError
from megatron_salt.files import refuse_directory, refuse_present, sole_writer, whole_file
from megatron_salt.preprocess.inputs import BadLines, input_files
from megatron_salt.preprocess.parse import Parser
from megatron_salt.preprocess.readers import chunks, form_of, uncompressed_name

CHUNK_BYTES = 1 << 20
SENTENCE_CHARACTERS = 4096
THREADS = 4  # constant, because the sums of the unigram model, and so the file, depend on it
_LINES = re.compile(r"[^\n]+\n*|\n+")
_REPORTED_AT = re.compile(r"^[A-Z_]+: \S+\(\d+\) \[.*?\] (?=[A-Z])")  # a place in SentencePiece's source


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Train a SentencePiece tokenizer."""

    input: tuple[str, ...]
    """Files or patterns: JSON lines (.jsonl, .json), tables (.parquet), or plain text (all others); also as .gz or .zst."""

    output: str
    """Model file to write, for --tokenizer-model."""

    vocab_size: int = 32000
    """Number of pieces, including <unk>, <eod> and 256 bytes."""

    model_type: Literal["bpe", "unigram"] = "bpe"
    """bpe: byte-pair encoding. unigram: SentencePiece's unigram language model."""

    json_keys: tuple[str, ...] = ("text",)
    """JSON keys or table columns whose strings are read."""

    bos: bool = False
    """Add the piece <bos> as id 2, for --prepend-bos of preprocess_data.py. No text can produce it."""

    byte_fallback: bool = True
    """Encode characters without a piece as bytes, so that nothing is lost. Without this flag they become <unk>."""

    character_coverage: float = 0.9995
    """Share of the characters of the text that get a piece of their own."""

    max_sentences: int = 1000000
    """Largest number of lines to train on, which bounds memory and time. Of more lines a random sample is used, always the same."""

    overwrite: bool = False
    """Replace an existing model."""

    allow_duplicate_inputs: bool = False
    """Accept the same file under two names, and copies of a file. Their text then counts twice."""

    max_document_mib: int = 256
    """Largest document in MiB; a longer one is refused. A document is held in memory as a whole, several times over."""

    max_bad_lines: int = 0
    """Number of bad lines that may be left out: malformed JSON, a missing key, a value that is not a string, invalid UTF-8."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("vocab-size", self.vocab_size, 4 if self.bos else 3),
            ("max-sentences", self.max_sentences, 1),
            ("max-bad-lines", self.max_bad_lines, 0),
        ):
            if value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if not 1 <= self.max_document_mib < 2048:
            raise UserError(f"--max-document-mib must be at least 1 and below 2048, got {self.max_document_mib}")
        if not 0.9 <= self.character_coverage <= 1.0:
            raise UserError(f"--character-coverage must lie in [0.9, 1], got {self.character_coverage}")
        if not self.json_keys:
            raise UserError("--json-keys names no key")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(TrainTokenizerConfig, train_tokenizer, argv)


def train_tokenizer(config: TrainTokenizerConfig) -> None:
    """Read the text, train, write the model. Raises UserError."""
    files = input_files(config.input, config.allow_duplicate_inputs)
    output = Path(config.output)
    refuse_directory("--output", output)
    refuse_present("--output", output, [output], config.overwrite)
    bad_lines = BadLines(config.max_bad_lines)
    texts = itertools.chain.from_iterable(
        read_texts(file, config.json_keys, bad_lines, config.max_document_mib << 20) for file in files
    )
    chosen = choose(itertools.chain.from_iterable(map(sentences, texts)), config.max_sentences)
    if not chosen:
        raise UserError(f"--input {' '.join(config.input)} holds no text")
    print(f"training on {len(chosen)} lines of {len(files)} files", flush=True)
    try:
        with sole_writer("--output", output):
            refuse_present("--output", output, [output], config.overwrite)
            size = write_model(config, chosen, output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    print(f"wrote {output}: {config.model_type}, {config.vocab_size} pieces, {size} bytes")


def write_model(config: TrainTokenizerConfig, chosen: list[str], output: Path) -> int:
    """Train and write the model, whole or not at all. Returns its size in bytes. Raises OSError before training if it cannot write."""
    with whole_file(output) as temporary, open(temporary, "wb") as stream:
        return stream.write(train(chosen, config))


def read_texts(file: str, keys: tuple[str, ...], bad_lines: BadLines, largest: int) -> Iterator[str]:
    """Strings under `keys` of JSON lines or of a table, or the lines of plain text with their line feeds.

    largest: bytes that a document may have.
    """
    form = form_of(file, "line")
    if form == "jsonl" and not uncompressed_name(file).endswith((".jsonl", ".json")):
        form = "text"
    parse, first = Parser(keys[:1] if form == "text" else keys), 1
    for chunk in chunks(0, file, form, keys, 0, CHUNK_BYTES, largest):
        parsed = parse(form, chunk.read())
        bad_lines.add(file, [(first + line, reason) for line, _, reason in parsed.bad])
        first += parsed.lines
        for texts in zip(*parsed.texts, strict=True):
            yield from (text + "\n" for text in texts) if form == "text" else texts


def sentences(text: str) -> Iterator[str]:
    """Cut a text after its line feeds, and long lines every SENTENCE_CHARACTERS. The parts joined are the text."""
    for match in _LINES.finditer(text):
        line = match.group()
        for start in range(0, len(line), SENTENCE_CHARACTERS):
            yield line[start : start + SENTENCE_CHARACTERS]


def choose(lines: Iterable[str], bound: int) -> list[str]:
    """All of `lines`, or `bound` of them by reservoir sampling: each is equally likely, and every call gives the same ones."""
    source = iter(lines)
    kept = list(itertools.islice(source, bound))
    generator = random.Random(0)
    for seen, line in enumerate(source, start=bound + 1):
        slot = int(generator.random() * seen)
        if slot < bound:
            kept[slot] = line
    return kept


def train(lines: list[str], config: TrainTokenizerConfig) -> bytes:
    """Model file that SentencePiece trains on `lines`. Raises UserError if the vocabulary size does not fit the text."""
    import sentencepiece

    model = io.BytesIO()
    # The model file records each option that is given, so bos_piece is given only with --bos.
    bos = {"bos_id": 2, "bos_piece": "<bos>"} if config.bos else {"bos_id": -1}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * SENTENCE_CHARACTERS,
            unk_id=0,
            eos_id=1,
            eos_piece="<eod>",
            **bos,
            pad_id=-1,
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"--vocab-size {config.vocab_size} does not fit this text: {_REPORTED_AT.sub('', str(error))}"
        ) from None
    return model.getvalue()
