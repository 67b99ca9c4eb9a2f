"""Backends that encode: the tokenizer's own library, or gigatoken (optional, many times faster) where it gives the same ids.

The tokenizer's own library is the reference. gigatoken is used only after it gave the reference's ids for a sample of the user's text and
for texts that are known to be hard. Texts with code points that libraries may treat differently (`code_points.py`) always go to the
reference. A backend returns arrays: the ids of all texts end to end, and the lengths of the texts.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.preprocess.code_points import unsettled_texts
from megatron_salt.tokenizer.tokenizer import Tokenizer

Backend = Literal["reference", "gigatoken"]
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts -> (ids end to end, int64 lengths)."""

CACHE_BYTES = 56 << 20  # gigatoken's caches grow with the text; above this they are dropped
_LOOK_EVERY = 1 << 20  # characters between two looks at the memory

HARD = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "a",
    " a",
    "a ",
    "  a  b",
    "a\nb",
    "a \n b",
    "\x00",
    "\x00a",
    "\x7f\x80\x9f",
    "\u2028",
    "\ufeff",
    "\ufeffa",
    "é",
    "e\u0301",
    "日本語",
    "🎉👨\u200d👩\u200d👧",
    "\U0010ffff",
    "\ufffd",
    "\ufffe",
    "\ud7a3",
    "</s>",
    "<s>",
    "a</s>b",
    " <s> ",
    "<unk>",
    "<pad>",
    "<eod>",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|im_start|>",
    "[INST]",
    "<0x0A>",
    "\u2581",
    "\u2581\u2581a",
    "a\u2581b",
    "\u0130",
    "\ufb01",
    "\u2460",
    "\u00bd",
    "\uff11\uff12\uff13",
    "\uff21",
    "ß",
    "\u01c5",
    "12345678901",
    "3.14e-5",
    "don't I'LL we've 'S",
    "don\u2019t",
    "x" * 3000,
    " " * 3000,
    "a" + "\n" * 300,
    "ab" * 2000,
    "\u00a0a\u00a0",
    "\u3000",
    "\u200b",
    "مرحبا",
    "नमस्ते",
    "ไทย",
    "_",
    "__init__",
    "a_b-c",
    "http://a.b/c?d=e#f",
    "    def f(x):\n\t\treturn x  # \n",
    "\r",
    "a\rb",
    "".join(map(chr, range(32, 0x250))),
    "".join(map(chr, range(0x1F300, 0x1F700))),
    " ".join(map(chr, range(0x370, 0x700))),
)
"""Texts that tokenizers have encoded differently."""


def encode_with(tokenizer: Tokenizer, backend: Backend) -> Encode:
    """The function by which a backend encodes for a tokenizer."""
    return _Gigatoken(tokenizer) if backend == "gigatoken" else reference(tokenizer)


def choose_backend(
    wanted: Literal["auto", "reference", "gigatoken"], tokenizer: Tokenizer, sample: Sequence[str]
) -> tuple[Backend, str]:
    """(backend to use, a line that says why). sample: some of the user's texts; without any, auto takes the reference.

    UserError where the wanted backend is not installed, cannot do this tokenizer, or gives other ids.
    """
    if wanted == "reference":
        return "reference", f"the {tokenizer.kind}'s own library"
    if wanted == "auto" and not sample and tokenizer.as_json is not None:
        return "reference", f"the {tokenizer.kind}'s own library (the input gives no sample to compare another one on)"
    fault = _fault(tokenizer, sample)
    if fault is None:
        size = sum(map(len, sample)) / 1e6
        return "gigatoken", (
            f"gigatoken, which gave the ids of the {tokenizer.kind}'s own library for {len(sample)} texts of the input "
            f"({size:.1f} million characters) and {len(HARD)} hard ones"
        )
    if wanted == "gigatoken":
        raise UserError(f"--tokenizer-backend gigatoken: {fault}")
    return "reference", f"the {tokenizer.kind}'s own library ({fault})"


def _fault(tokenizer: Tokenizer, sample: Sequence[str]) -> str | None:
    """Why gigatoken cannot replace the tokenizer's own library; None: it can."""
    if tokenizer.as_json is None:
        return f"gigatoken has nothing for a {tokenizer.kind}"
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return "gigatoken, which may be many times faster, is not installed: pip install gigatoken"
    try:
        encode = encode_with(tokenizer, "gigatoken")
        special = [
            text for name in itertools.islice(tokenizer.special, 256) for text in (name, f"a{name}b {name} c", f"<{name}>")
        ]
        return first_difference(tokenizer, encode, itertools.chain(HARD, special, sample))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return f"gigatoken cannot do this tokenizer: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        _give_back()


def first_difference(tokenizer: Tokenizer, encode: Encode, texts: Iterable[str]) -> str | None:
    """A message about the first text for which `encode` gives other ids than the tokenizer's own library; None: all agree."""
    for text in texts:
        expected = tokenizer.encode(text)
        ids = encode([text])[0].tolist()
        if ids != expected:
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected))
            )
            at = len(tokenizer.decode(expected[:same]))
            return (
                f"it gives other ids than the {tokenizer.kind}'s own library for {text[max(at - 30, 0) : at + 50]!r}: "
                f"{ids[same : same + 5]} after {same} equal ones instead of {expected[same : same + 5]}"
            )
    return None


def reference(tokenizer: Tokenizer) -> Encode:
    """Encode with the tokenizer's own library."""

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return np.fromiter(itertools.chain.from_iterable(documents), np.int32, int(lengths.sum())), lengths

    return encode


class _Gigatoken:
    """Encodes with gigatoken on the calling thread; texts with unsettled code points go to the reference.

    Its memory stays bounded: gigatoken is made anew when the process has grown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.as_json is not None
        self._json = (texts_alone if tokenizer.matches_special else without_special)(tokenizer.as_json())
        self._since = self._limit = 0
        self._vocabulary_size = tokenizer.vocabulary_size
        self._reference = tokenizer.encode
        self._make()

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        unsettled = set(unsettled_texts(texts))
        arrays = [
            self._encode(text) if number not in unsettled else np.array(self._reference(text), np.uint32)
            for number, text in enumerate(texts)
        ]
        self._since += sum(map(len, texts))
        if self._since >= _LOOK_EVERY:
            self._since = 0
            if resident_bytes() > self._limit:
                self._make()
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        ids = np.concatenate(arrays) if arrays else np.empty(0, np.uint32)
        assert ids.max(initial=0) < self._vocabulary_size
        return ids, lengths

    def _make(self) -> None:
        import gigatoken

        # Free the old one before the new one is made.
        self._encode: Callable[[str], np.ndarray] = lambda text: np.empty(0, np.uint32)
        _give_back()
        self._encode = gigatoken.Tokenizer.from_json(self._json).encode
        _give_back()
        self._since = 0
        if not self._limit:
            self._limit = resident_bytes() + CACHE_BYTES
        self._limit = max(self._limit, resident_bytes() + CACHE_BYTES // 2)  # where freed memory does not return to the system


def without_special(tokenizer_json: bytes) -> bytes:
    """The tokenizer.json changed: special tokens in a text are ordinary text; nothing is added, padded or cut."""
    content = json.loads(tokenizer_json)
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    return texts_alone(json.dumps(content).encode())


def texts_alone(tokenizer_json: bytes) -> bytes:
    """The tokenizer.json changed: nothing is added, padded or cut."""
    content = json.loads(tokenizer_json)
    content["post_processor"] = content["padding"] = content["truncation"] = None
    return json.dumps(content).encode()


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_back() -> None:
    """Return freed memory to the system. Only glibc has to be asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
