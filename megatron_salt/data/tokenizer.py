"""Text to ids and back: SentencePiece, Hugging Face tokenizer.json, GPT-2's vocabulary and merges, or plain bytes.

`encode` adds nothing (no BOS, no EOS) and reads text as text: a document that contains the characters `</s>` or
`<|endoftext|>` gets the ids of those characters, never the special id, so text cannot forge a document's end. (The
exception is a SentencePiece *user-defined* piece, which SentencePiece itself always matches.) Text is normalised only as
the tokenizer's own file says: SentencePiece's rule, prefix space and white space handling, a tokenizer.json's normalizer;
GPT-2 and bytes keep every byte. A Tokenizer holds the bytes it was made of, so it can be saved beside what it made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_salt.config import TokenizerConfig
from megatron_salt.errors import UserError
from megatron_salt.small_files import parse_json, read_json, read_small

if TYPE_CHECKING:
    import tokenizers

DESCRIPTION = "tokenizer_description.json"
"""The file by which `load_tokenizer` knows a saved tokenizer."""

SENTENCEPIECE_EOD = ("<eod>", "<|endoftext|>", "<EOD>")
"""Pieces that end a document in a SentencePiece model, best first; without any of them the model's eos does, and without
an eos nothing."""

HUGGING_FACE_EOD = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that end a document in a tokenizer.json, best first; without any of them nothing does."""

GPT2_EOD = "<|endoftext|>"
BYTE_LEVEL_EOD = 256


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of any kind. Made by `build_tokenizer`, `load_tokenizer` or `tokenizer_from_files`."""

    kind: str
    """The --tokenizer-type."""
    vocab_size: int
    """Largest id + 1."""
    eod: int | None
    """End-of-document id; None: this tokenizer has none."""
    fingerprint: str
    """Hash of the kind and of the contents of its files: the same wherever and under whatever name they lie."""
    files: Mapping[str, bytes] = field(repr=False)
    """What it was made of, under the names that `save` uses."""
    encode_ids: Callable[[list[str]], list[list[int]]] = field(repr=False)
    decode_ids: Callable[[list[int]], str] = field(repr=False)
    as_json: Callable[[], bytes] | None = field(default=None, repr=False)
    """The same as a tokenizer.json, for other libraries; None: there is none."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text, nothing added."""
        return self.encode_ids([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in order: `encode` of each, in the tokenizer's native code.
        Texts must be valid Unicode (no lone surrogates)."""
        return self.encode_ids(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids in [0, vocab_size). Special ids, eod among them, give nothing; invalid UTF-8 gives U+FFFD."""
        assert all(0 <= i < self.vocab_size for i in ids), f"an id outside [0, {self.vocab_size})"
        return self.decode_ids([int(i) for i in ids if i != self.eod])

    def save(self, directory: Path) -> None:
        """Write its files and a description into `directory` (made when missing); the description comes last."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            _write(directory / name, content)
        description = {"kind": self.kind, "files": list(self.files), "vocab_size": self.vocab_size, "eod": self.eod,
                       "fingerprint": self.fingerprint}
        _write(directory / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the flags ask for. UserError when files are missing, damaged, or belong to another kind."""
    kind = config.tokenizer_type
    if kind is None:
        raise UserError("--tokenizer-type is missing: SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer "
                        "or ByteLevelTokenizer")
    given = {"--tokenizer-model": config.tokenizer_model, "--vocab-file": config.vocab_file,
             "--merge-file": config.merge_file}
    names = _file_names(kind)
    for flag, path in given.items():
        if path is not None and flag not in names:
            raise UserError(f"{flag} {path} does not belong to --tokenizer-type {kind}, "
                            f"which takes {' and '.join(names) or 'no file'}")
    contents = {name: _read(flag, given[flag], kind) for flag, name in names.items()}
    return tokenizer_from_files(kind, contents, origin=", ".join(f"{flag} {given[flag]}" for flag in names))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `directory`. UserError when files are missing or were changed since."""
    path = Path(directory) / DESCRIPTION
    try:
        description = read_json(path)
        kind, names, recorded = description["kind"], list(description["files"]), description["fingerprint"]
        if not isinstance(kind, str) or set(names) != set(_file_names(kind).values()):
            raise ValueError(f"it lists the files {names}")
        contents = {name: read_small(Path(directory) / name) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no usable tokenizer in {directory}: {path.name}: {error}") from None
    tokenizer = tokenizer_from_files(kind, contents, origin=str(directory))
    if tokenizer.fingerprint != recorded:
        raise UserError(f"the tokenizer in {directory} was changed: its files give the fingerprint "
                        f"{tokenizer.fingerprint}, {path.name} says {recorded}")
    return tokenizer


def tokenizer_from_files(kind: str, files: Mapping[str, bytes], origin: str) -> Tokenizer:
    """A tokenizer of `kind` from its files' contents; `origin` names them in errors (UserError when they are damaged)."""
    makers = {"SentencePieceTokenizer": _sentencepiece, "HuggingFaceTokenizer": _hugging_face,
              "GPT2BPETokenizer": _gpt2, "ByteLevelTokenizer": _byte_level}
    return makers[kind](files, origin)


def _file_names(kind: str) -> dict[str, str]:
    """{flag that names a file of this kind of tokenizer: the name it is saved under}."""
    names = {"SentencePieceTokenizer": {"--tokenizer-model": "tokenizer.model"},
             "HuggingFaceTokenizer": {"--tokenizer-model": "tokenizer.json"},
             "GPT2BPETokenizer": {"--vocab-file": "vocab.json", "--merge-file": "merges.txt"},
             "ByteLevelTokenizer": {}}
    if kind not in names:
        raise UserError(f"unknown tokenizer type {kind}; known are {', '.join(names)}")
    return names[kind]


def _read(flag: str, path: str | None, kind: str) -> bytes:
    if path is None:
        raise UserError(f"--tokenizer-type {kind} needs {flag}")
    file = Path(path)
    if kind == "HuggingFaceTokenizer" and file.is_dir():  # what save_pretrained leaves
        file = file / "tokenizer.json"
    try:
        content = read_small(file)
    except OSError as error:
        raise UserError(f"{flag} {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{flag} {file} cannot be read: {error}") from None
    if not content:
        raise UserError(f"{flag} {file} is empty")
    return content


def _write(path: Path, content: bytes) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_bytes(content)
    os.replace(tmp, path)


def _fingerprint(kind: str, files: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=32)
    for name in sorted(files):
        digest.update(f"\n{name} {len(files[name])}\n".encode() + files[name])
    return digest.hexdigest()


# --- the kinds --------------------------------------------------------------------------------------------------------

def _refuse_tiktoken(content: bytes, origin: str) -> None:
    """UserError for lines of a token in base64 and its rank, which Llama 3 calls tokenizer.model."""
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content[:4096]):
        raise UserError(f"{origin} is a tiktoken vocabulary, as Llama 3's tokenizer.model is, which lacks the rules that split text; take "
                        "the tokenizer.json beside it: --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json")


def _sentencepiece(files: Mapping[str, bytes], origin: str) -> Tokenizer:
    import sentencepiece

    _refuse_tiktoken(files["tokenizer.model"], origin)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(files["tokenizer.model"])
    except RuntimeError as error:
        raise UserError(f"{origin} is not a SentencePiece model: {error}") from None
    found = (processor.piece_to_id(piece) for piece in SENTENCEPIECE_EOD)  # the id of <unk> for a piece it lacks
    eod = next((i for i in found if processor.id_to_piece(i) in SENTENCEPIECE_EOD), processor.eos_id())
    # One thread: whoever wants more runs several processes, and a pool of threads per call would cost more than it gives.
    return Tokenizer("SentencePieceTokenizer", processor.vocab_size(), eod if eod >= 0 else None,
                     _fingerprint("SentencePieceTokenizer", files), files,
                     encode_ids=lambda texts: processor.encode(texts, out_type=int, num_threads=1),
                     decode_ids=lambda ids: processor.decode(ids), as_json=lambda: _json_of_sentencepiece(files["tokenizer.model"]))


def _json_of_sentencepiece(model: bytes) -> bytes:
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    content = sentencepiece_to_tokenizer_json(model)
    return content.encode() if isinstance(content, str) else content


def _hugging_face(files: Mapping[str, bytes], origin: str) -> Tokenizer:
    import tokenizers

    _refuse_tiktoken(files["tokenizer.json"], origin)
    try:
        model = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except ValueError as error:
        raise UserError(f"{origin} is not a tokenizer.json: {error}") from None
    model.encode_special_tokens = True  # special tokens that stand in the text are text
    model.no_padding()  # a tokenizer.json may carry both, and either would change documents
    model.no_truncation()
    eod = next((i for i in map(model.token_to_id, HUGGING_FACE_EOD) if i is not None), None)
    size = max(model.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes
    return Tokenizer("HuggingFaceTokenizer", size, eod, _fingerprint("HuggingFaceTokenizer", files), files,
                     encode_ids=_rust_encode(model), decode_ids=lambda ids: model.decode(ids),
                     as_json=lambda: files["tokenizer.json"])


def _gpt2(files: Mapping[str, bytes], origin: str) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        vocabulary = {str(token): int(i) for token, i in parse_json(files["vocab.json"]).items()}
        lines = files["merges.txt"].decode("utf-8").removeprefix("\ufeff").split("\n")
        lines = [line.rstrip("\r") for line in lines[1 if lines[0].startswith("#version") else 0:]]
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"{origin} are not GPT-2's vocabulary and merges: {error}") from None
    for left, right in pairs:
        if not {left, right, left + right} <= vocabulary.keys():
            raise UserError(f"{origin} do not belong together: the vocabulary lacks a part of the merge {left!r} {right!r}")
    missing = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if symbol not in vocabulary]
    if missing:  # bytes without an id would vanish from the text without a word
        raise UserError(f"{origin} are not byte-level: {len(missing)} of 256 bytes have no id, such as {missing[0]!r}")
    model = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return Tokenizer("GPT2BPETokenizer", max(vocabulary.values()) + 1, vocabulary.get(GPT2_EOD),
                     _fingerprint("GPT2BPETokenizer", files), files,
                     encode_ids=_rust_encode(model), decode_ids=lambda ids: model.decode(ids),
                     as_json=lambda: model.to_str().encode())


def _rust_encode(model: tokenizers.Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]


def _byte_level(files: Mapping[str, bytes], origin: str) -> Tokenizer:
    return Tokenizer("ByteLevelTokenizer", BYTE_LEVEL_EOD + 1, BYTE_LEVEL_EOD, _fingerprint("ByteLevelTokenizer", files), files,
                     encode_ids=lambda texts: [list(text.encode()) for text in texts],
                     decode_ids=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
