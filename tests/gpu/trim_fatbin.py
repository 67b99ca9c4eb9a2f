"""Blank the machine code for other GPUs in a CUDA library, so that it packs small: for carrying it, never for shipping.

    python tests/gpu/trim_fatbin.py libtransformer_engine.so small.so --keep 90

A library holds fat binaries: a header (magic number, version, its own size, the size of what follows), then entries, each with a header
(kind: 1 PTX, 2 machine code; the architecture) and its code. The code of every entry but machine code of the kept architectures becomes
zeros; nothing moves. Read from libraries that nvcc 13.0 made. A trimmed library has not been loaded on a GPU yet.
"""

from __future__ import annotations

import argparse
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = struct.Struct("<4sHHQ")
"""Magic number, version, size of this header, bytes of all entries."""
ENTRY = struct.Struct("<HHIQ")
"""Kind, version, size of this header, bytes of the code. The architecture is a 32-bit number at byte 28."""
MACHINE_CODE = 2
KINDS = {1: "PTX", MACHINE_CODE: "machine code"}


@dataclass(frozen=True)
class Code:
    """One entry of a fat binary."""

    kind: int
    architecture: int
    """Compute capability without its dot, such as 90."""
    start: int
    size: int


def codes(library: bytes | bytearray) -> Iterator[Code]:
    """Every entry of every fat binary in a library."""
    position = library.find(MAGIC)
    while position >= 0:
        if position + HEADER.size > len(library):
            return
        _, version, header, size = HEADER.unpack_from(library, position)
        entry, end = position + header, position + header + size
        if (version, header) != (1, HEADER.size) or end > len(library):
            position = library.find(MAGIC, position + len(MAGIC))  # the number by chance
            continue
        while entry + 32 <= end:
            kind, _, own, length = ENTRY.unpack_from(library, entry)
            if own < 32 or entry + own + length > end:
                break
            yield Code(kind, struct.unpack_from("<I", library, entry + 28)[0], entry + own, length)
            entry += own + length
        position = library.find(MAGIC, end)


def trim(library: bytearray, keep: Collection[int]) -> Counter[tuple[int, int]]:
    """Blank all code but machine code for `keep`, in place. Returns the bytes of each (kind, architecture) that were there."""
    sizes: Counter[tuple[int, int]] = Counter()
    for code in list(codes(library)):
        sizes[code.kind, code.architecture] += code.size
        if code.kind != MACHINE_CODE or code.architecture not in keep:
            library[code.start : code.start + code.size] = bytes(code.size)
    return sizes


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("library", type=Path)
    asked.add_argument("output", type=Path)
    asked.add_argument("--keep", type=int, nargs="+", required=True, help="compute capabilities without the dot, such as 90")
    flags = asked.parse_args()
    library = bytearray(flags.library.read_bytes())
    sizes = trim(library, flags.keep)
    if not any((MACHINE_CODE, architecture) in sizes for architecture in flags.keep):
        asked.error(f"{flags.library} has no machine code for --keep {' '.join(map(str, flags.keep))}")
    for (kind, architecture), size in sorted(sizes.items()):
        kept = kind == MACHINE_CODE and architecture in flags.keep
        print(f"{KINDS.get(kind, f'kind {kind}'):12} {architecture:4} {size / 2**20:8.1f} MiB  {'kept' if kept else 'blanked'}")
    flags.output.write_bytes(library)


if __name__ == "__main__":
    main()
