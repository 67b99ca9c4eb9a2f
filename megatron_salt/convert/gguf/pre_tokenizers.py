"""How a byte-level tokenizer of a GGUF file cuts text into words before it merges bytes.

A file names the way, and does not describe it. Each name here was compared with the tokenizer.json of a model that has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Cutting:
    """How text is cut into words."""

    pattern: str | None
    """Regular expression of a word; None: GPT-2's, which the library has."""
    digits_alone: bool = False
    """Each digit is a word, before the pattern is applied."""
    nfc: bool = False
    """Text is normalised to NFC first."""
    ignore_merges: bool = False
    """A word that is a token is taken whole, even if no merges lead to it."""


CUTTINGS = {
    "gpt-2": Cutting(None),
    "smollm": Cutting(None, digits_alone=True),
    "llama-bpe": Cutting(_LLAMA3, ignore_merges=True),
    "qwen2": Cutting(_QWEN2, nfc=True),
}
"""By the name in tokenizer.ggml.pre."""


def pre_tokenizer(cutting: Cutting) -> PreTokenizer:
    """The library's form of a cutting: words of byte-level characters."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[PreTokenizer] = []
    if cutting.digits_alone:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if cutting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cutting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cutting.pattern is None))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
