"""Input files to chunks. A chunk is a bounded piece of a file that holds whole documents, as raw bytes.

The name of a file, in lower or upper case, says how it is read. .gz and .zst are decompressed; then .parquet is a table, .txt plain text,
and everything else JSON lines. A chunk of a plain file is only a range of bytes: the worker that parses it reads it. Other files are read
in order, in pieces, never whole. A position (bytes of the decompressed text, or rows) is enough to go on in the middle of a file. A bad
file is a UserError.
"""

from __future__ import annotations

import gzip
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

from megatron_salt.errors import UserError
from megatron_salt.preprocess.inputs import STDIN, refuse_encoding
from megatron_salt.preprocess.parquet import read_rows, unpack

Form = Literal["jsonl", "text", "file", "columns"]
"""JSON lines; text with one document a line; text that is one document; packed columns of a table."""

LARGEST_DOCUMENT = 1 << 28
"""Default for the bytes that one document may have. It is in memory whole, several times."""
_PIECE = 1 << 18  # bytes that are decompressed at a time
_COMPRESSED_PIECE = 1 << 14  # bytes of .zst at a time; its decompressor returns all they decompress to


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive documents of one file."""

    file: int
    """Number of the file, from 0."""
    path: str
    form: Form
    start: int
    end: int
    """[start, end): bytes of the decompressed file, or rows of the table."""
    on_disk: int
    """Bytes of the file on disk that were read up to `end`."""
    data: bytes | None
    """The bytes; None: they are [start, end) of the file itself."""

    def read(self) -> bytes:
        """The bytes, from `data` or from the file. UserError when the file has changed."""
        data = self.data
        if data is None:
            try:
                with open(self.path, "rb", buffering=0) as stream:
                    stream.seek(self.start)
                    data = stream.read(self.end - self.start) or b""
            except OSError as error:
                raise UserError(f"--input {self.path} cannot be read after byte {self.start}: {error.strerror}") from None
            if len(data) < self.end - self.start:
                raise UserError(f"--input {self.path} became shorter while it was read")
        if self.start > 0 or self.form == "columns":
            return data
        refuse_encoding(self.path, data, by_lines=self.form != "file")
        return data.removeprefix(b"\xef\xbb\xbf")  # byte order mark


def form_of(path: str, text_documents: Literal["line", "file"]) -> Form:
    """How a file is read, by its name."""
    name = uncompressed_name(path)
    if path.lower().endswith(".parquet"):
        return "columns"
    return ("text" if text_documents == "line" else "file") if name.endswith(".txt") else "jsonl"


def uncompressed_name(path: str) -> str:
    """The name in lower case, without the suffix of a compression."""
    return path.lower().removesuffix(".gz").removesuffix(".zst")


def _is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".zst"))


def chunks(
    number: int, path: str, form: Form, keys: Sequence[str], start: int, chunk_bytes: int, largest: int = LARGEST_DOCUMENT
) -> Iterator[Chunk]:
    """The documents of a file from position `start` on, about `chunk_bytes` at a time. A longer document is a chunk by itself.

    number: of the file. keys: columns of a table. largest: bytes that a document may have. UserError when the file cannot be read.
    """
    at = start
    try:
        if form == "columns":
            pieces = _table(number, path, keys, start, chunk_bytes, largest)
        elif path != STDIN and not _is_compressed(path) and stat.S_ISREG(os.stat(path).st_mode):
            pieces = _ranges(number, path, form, start, chunk_bytes, largest)
        else:
            pieces = _stream(number, path, form, start, chunk_bytes, largest)
        for chunk in pieces:
            at = chunk.end
            yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--input {path} is damaged or truncated after byte {at} of its text: {error}") from None
    except OSError as error:
        raise UserError(
            f"--input {path} cannot be read after {'row' if form == 'columns' else 'byte'} {at}: {error.strerror or error}"
        ) from None


def sample_chunks(
    files: Sequence[str],
    forms: Sequence[Form],
    keys: Sequence[str],
    num_files: int,
    num_positions: int,
    chunk_bytes: int,
    largest: int = LARGEST_DOCUMENT,
) -> Iterator[Chunk]:
    """A sample of chunks from up to `num_files` files.

    A plain file gives chunks from `num_positions` positions at most, another file its first chunk, a pipe none.
    """
    step = max(len(files) / num_files, 1)
    for number in sorted({int(i * step) for i in range(min(num_files, len(files)))}):
        path, form = files[number], forms[number]
        if not os.path.isfile(path):
            continue
        starts = {0}
        if form in ("jsonl", "text") and not _is_compressed(path):
            with open(path, "rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                positions = [size * i // num_positions for i in range(1, num_positions)]
                starts |= {_line_end(path, stream.fileno(), position, size, largest) for position in positions} - {size}
        for start in sorted(starts):
            for chunk in chunks(number, path, form, keys, start, chunk_bytes, largest):
                yield chunk
                break


def _refuse_larger(path: str, position: str, size: int, largest: int) -> None:
    """UserError where `size` bytes of a document, which begins at `position`, are more than allowed."""
    if size > largest:
        raise UserError(
            f"--input {path}: a document at {position} has more than {largest} bytes; it would lie in memory whole: cut it (is "
            "a document on each line?), or allow more with --max-document-mib (and with --max-memory, if it is given)"
        )


def _ranges(number: int, path: str, form: Form, start: int, chunk_bytes: int, largest: int) -> Iterator[Chunk]:
    """Chunks of a plain file: ranges of bytes."""
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        while start < size:
            end = size if form == "file" else _line_end(path, stream.fileno(), start + chunk_bytes - 1, size, largest)
            if form == "file":
                _refuse_larger(path, "byte 0", size, largest)
            yield Chunk(file=number, path=path, form=form, start=start, end=end, on_disk=end, data=None)
            start = end


def _line_end(path: str, descriptor: int, position: int, size: int, largest: int) -> int:
    """The end of the line that the byte at `position` belongs to."""
    begin = position
    while position < size:
        _refuse_larger(path, f"byte {begin}", position - begin, largest)
        block = os.pread(descriptor, 1 << 16, position)
        line_feed = block.find(b"\n")
        if line_feed >= 0 or not block:
            end = position + line_feed + 1 if block else size
            _refuse_larger(path, f"byte {begin}", end - begin, largest)
            return end
        position += len(block)
    return size


def _stream(number: int, path: str, form: Form, start: int, chunk_bytes: int, largest: int) -> Iterator[Chunk]:
    """Chunks of a compressed file or a pipe, cut after line feeds."""
    parts: list[bytes] = []
    held, skip, on_disk = 0, start, 0
    for piece, on_disk in _pieces(path, max(64, min(chunk_bytes, _PIECE))):
        passed = min(skip, len(piece))  # bytes that an earlier run has done
        skip -= passed
        parts.append(piece[passed:])
        held += len(parts[-1])
        if held >= chunk_bytes and form != "file" and (cut := parts[-1].rfind(b"\n") + 1):
            rest = parts[-1][cut:]
            parts[-1] = parts[-1][:cut]
            end = start + held - len(rest)
            yield Chunk(file=number, path=path, form=form, start=start, end=end, on_disk=on_disk, data=b"".join(parts))
            start = end
            parts, held = [rest], len(rest)
        _refuse_larger(path, f"byte {start} of its text", held - (chunk_bytes if form != "file" else 0), largest)
    if skip:
        raise EOFError("an earlier run read further")
    if held:
        yield Chunk(file=number, path=path, form=form, start=start, end=start + held, on_disk=on_disk, data=b"".join(parts))


def _pieces(path: str, size: int) -> Iterator[tuple[bytes, int]]:
    """(decompressed bytes, bytes of the file on disk that were read so far)."""
    if path == STDIN:
        yield from _read(sys.stdin.buffer, size, None)
        return
    with open(path, "rb") as raw:
        if path.lower().endswith(".zst"):
            yield from _zstandard(raw)
        elif path.lower().endswith(".gz"):
            with gzip.open(raw) as stream:
                yield from _read(stream, size, raw)  # type: ignore[arg-type]
        else:
            yield from _read(raw, size, None)


def _read(stream: BinaryIO, size: int, raw: BinaryIO | None) -> Iterator[tuple[bytes, int]]:
    done = 0
    while piece := stream.read(size):
        done += len(piece)
        yield piece, raw.tell() if raw else done


def _zstandard(raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Decompress frame after frame. zstandard's own file reader would not notice that a file ends inside a frame."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, inside = decompressor.decompressobj(), False
    try:
        while data := raw.read(_COMPRESSED_PIECE):
            while data:
                inside = True
                if piece := frame.decompress(data):
                    yield piece, raw.tell()
                data = b""
                if frame.eof:
                    data, inside = frame.unused_data, False
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if inside:
        raise EOFError("it ends in the middle of a frame")


def _table(number: int, path: str, keys: Sequence[str], start: int, chunk_bytes: int, largest: int) -> Iterator[Chunk]:
    """Rows of a parquet file, from row `start` on."""
    for rows in read_rows(path, keys, start, chunk_bytes):
        if len(rows.data) > largest:
            sizes = [len(value or b"") for column in unpack(rows.data, len(keys)) for value in column]
            _refuse_larger(path, f"a row from {rows.first} on", max(sizes), largest)
        yield Chunk(
            file=number, path=path, form="columns", start=rows.first, end=rows.end, on_disk=rows.on_disk, data=rows.data
        )
