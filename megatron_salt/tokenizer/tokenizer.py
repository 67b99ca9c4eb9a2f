"""Text to ids and back: SentencePiece, Hugging Face tokenizer.json, GPT-2's vocabulary and merges, or plain bytes.

`encode` adds no BOS and no EOS, and reads special tokens in a text as ordinary characters. So a document that contains `</s>` cannot
forge the end of a document. A Tokenizer that `matches_special` gives special ids instead, as its library does.
Text is normalised only as the tokenizer's own file says; GPT-2's and bytes keep every byte. A Tokenizer holds the bytes of its files, so
it can be saved beside the data that it made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_salt.config import TokenizerConfig
from megatron_salt.errors import UserError, file_error
from megatron_salt.files import write_whole
from megatron_salt.small_files import read_json, read_small
from megatron_salt.tokenizer.document_ends import ConfigEnds, DeclaredEnds, Ends, in_words, read_config_ends
from megatron_salt.tokenizer.hugging_face_library import open_gpt2, open_tokenizer_json
from megatron_salt.tokenizer.library import Library, open_byte_level
from megatron_salt.tokenizer.sentencepiece_library import open_sentencepiece

DESCRIPTION = "tokenizer_description.json"
"""File that `load_tokenizer` reads first."""


_OPENERS: Mapping[str, Callable[[Mapping[str, bytes], str], Library]] = {
    "SentencePieceTokenizer": open_sentencepiece,
    "HuggingFaceTokenizer": open_tokenizer_json,
    "GPT2BPETokenizer": open_gpt2,
    "ByteLevelTokenizer": open_byte_level,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """A tokenizer of any kind. `build_tokenizer`, `load_tokenizer` and `tokenizer_from_files` make one."""

    kind: str
    """The --tokenizer-type."""
    vocabulary_size: int
    """Largest id + 1."""
    eod: int | None
    """End-of-document id; None: the tokenizer has none."""
    bos: int | None
    """Id that --prepend-bos puts before a document; None: the tokenizer declares none."""
    special: Mapping[str, int]
    """Special tokens as they would be written in a text, and their ids. The end-of-document token is among them."""
    forbidden: frozenset[int]
    """Ids that no text gives: the special ones. Empty if `matches_special`."""
    matches_special: bool
    """Whether special tokens in a text become their ids, as in the tokenizer's own library."""
    fingerprint: str
    """Hash of the kind and of the contents of the files; their paths do not count. The end-of-document id is hashed too, unless it is
    the one that the first releases took from these files."""
    files: Mapping[str, bytes] = field(repr=False)
    """Contents of its files, under the names that `save` uses."""
    encode_ids: Callable[[list[str]], list[list[int]]] = field(repr=False)
    decode_ids: Callable[[list[int]], str] = field(repr=False)
    id_of: Callable[[str], int | None] = field(repr=False)
    """Token -> id; None: there is no such token."""
    as_json: Callable[[], bytes] | None = field(default=None, repr=False)
    """Gives the same tokenizer as a tokenizer.json, for other libraries; None: it has no such form."""

    @property
    def ends(self) -> Ends:
        return Ends(self.eod, self.bos)

    def encode(self, text: str) -> list[int]:
        """The ids of one text; nothing is added."""
        return self.encode_ids([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in order. Texts must be valid Unicode (no lone surrogates)."""
        return self.encode_ids(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids in [0, vocabulary_size). Special ids and eod give no text; invalid UTF-8 gives U+FFFD."""
        assert all(0 <= i < self.vocabulary_size for i in ids), f"an id outside [0, {self.vocabulary_size})"
        return self.decode_ids([int(i) for i in ids if i != self.eod])

    def save(self, directory: Path) -> None:
        """Write the files and a description into `directory`, which is made if missing. The description comes last."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_whole(directory / name, content)
        description = {
            "kind": self.kind,
            "files": list(self.files),
            "vocab_size": self.vocabulary_size,
            "eod": self.eod,
            "bos": self.bos,
            "fingerprint": self.fingerprint,
        }
        write_whole(directory / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def build_tokenizer(config: TokenizerConfig, matches_special: bool = False) -> Tokenizer:
    """The tokenizer that the flags ask for.

    UserError when files are missing, damaged or of another kind, and when they leave open which token ends documents.
    """
    kind = config.tokenizer_type
    if kind is None:
        raise UserError(
            "--tokenizer-type is missing: SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer or ByteLevelTokenizer"
        )
    given = {"--tokenizer-model": config.tokenizer_model, "--vocab-file": config.vocab_file, "--merge-file": config.merge_file}
    names = _file_names(kind)
    for flag, path in given.items():
        if path is not None and flag not in names:
            raise UserError(
                f"{flag} {path} does not belong to --tokenizer-type {kind}, which takes {' and '.join(names) or 'no file'}"
            )
    contents = {name: _read(flag, given[flag], kind) for flag, name in names.items()}
    origin = ", ".join(f"{flag} {given[flag]}" for flag in names) or f"--tokenizer-type {kind}"
    config_ends = ConfigEnds()
    if kind == "HuggingFaceTokenizer" and (folder := _folder_of(Path(str(config.tokenizer_model)))) is not None:
        config_ends = read_config_ends(folder, "--tokenizer-model")
    return tokenizer_of_contents(kind, contents, config.eod_token, config_ends, origin, matches_special)


def tokenizer_of_contents(
    kind: str, contents: Mapping[str, bytes], eod_token: str | None, declared: ConfigEnds, origin: str, matches_special: bool = False
) -> Tokenizer:  # fmt: skip
    """A tokenizer of `kind` from the contents of its files. declared: the ends that other files declare. origin: for messages.

    UserError when the files are damaged, and when they and `eod_token` leave open which token ends documents.
    """
    library = _OPENERS[kind](contents, origin)
    return _tokenizer(kind, contents, library, _ends(library, eod_token, declared, origin), matches_special)


def _folder_of(model: Path) -> Path | None:
    """The folder whose configuration files belong to --tokenizer-model; None: the file stands alone."""
    if model.is_dir():
        return model
    return model.parent if model.name == "tokenizer.json" else None


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `directory`. UserError when files are missing or have changed since."""
    path = Path(directory) / DESCRIPTION
    try:
        description = read_json(path)
        kind, names, recorded = description["kind"], list(description["files"]), description["fingerprint"]
        if not isinstance(kind, str) or set(names) != set(_file_names(kind).values()):
            raise ValueError(f"it lists the files {names}")
        contents = {name: read_small(Path(directory) / name) for name in names}
        ends = Ends(description["eod"], description.get("bos"))  # descriptions of older releases lack bos
        if any(type(i) is not int and i is not None for i in (ends.eod, ends.bos)):
            raise ValueError(f"its ids are {ends}")
    except OSError as error:
        raise file_error(f"no usable tokenizer in {directory}: {path.name}: {error}", error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"no usable tokenizer in {directory}: {path.name}: {error}") from None
    tokenizer = tokenizer_from_files(kind, contents, origin=str(directory), ends=ends)
    if tokenizer.fingerprint != recorded:
        raise UserError(
            f"the tokenizer in {directory} was changed: its files give the fingerprint "
            f"{tokenizer.fingerprint}, {path.name} says {recorded}"
        )
    return tokenizer


def tokenizer_from_files(
    kind: str, files: Mapping[str, bytes], origin: str, ends: Ends | None = None, matches_special: bool = False
) -> Tokenizer:
    """A tokenizer of `kind` from the contents of its files. UserError, which names `origin`, when they are damaged.

    ends: as recorded earlier. None: as the files say; without an end of a document where they leave it open.
    """
    library = _OPENERS[kind](files, origin)
    for i in () if ends is None else (ends.eod, ends.bos):
        if i is not None and not 0 <= i < library.vocabulary_size:
            raise UserError(f"{origin}: id {i} lies outside of its vocabulary of {library.vocabulary_size}")
    if ends is None:
        ends = Ends(library.eod_alone(), _single(library.declared.bos))
    return _tokenizer(kind, files, library, ends, matches_special)


def _ends(library: Library, eod_token: str | None, config_ends: ConfigEnds, origin: str) -> Ends:
    """The ends that flags and files ask for. UserError where they leave it open or name a token that does not exist."""
    declared = DeclaredEnds(_ids(library, config_ends.eos), _ids(library, config_ends.bos))
    bos = library.declared.bos or declared.bos
    if eod_token is None:
        eod = library.eod(declared, origin)
    else:
        eod = library.id_of(eod_token)
        if eod is None:
            raise UserError(
                f"--eod-token {eod_token!r}: {origin} has no such token; special are "
                f"{in_words(library.special, library.special.values(), 4) or 'none'}"
            )
        if eod in library.unknown:
            raise UserError(
                f"--eod-token {eod_token!r} of {origin} is what ordinary text gives; name a token that text does without"
            )
    return Ends(eod, _single(bos))


def _single(ids: frozenset[int]) -> int | None:
    return next(iter(ids)) if len(ids) == 1 else None


def _ids(library: Library, tokens: tuple[str | int, ...]) -> frozenset[int]:
    ids = [library.id_of(token) if isinstance(token, str) else token for token in tokens]
    return frozenset(i for i in ids if i is not None and 0 <= i < library.vocabulary_size)


def _tokenizer(kind: str, files: Mapping[str, bytes], library: Library, ends: Ends, matches_special: bool) -> Tokenizer:
    special, name = dict(library.special), None if ends.eod is None else library.text_of(ends.eod)
    if ends.eod is not None and name is not None:
        special[name] = ends.eod
    encode_ids, as_json = library.encoder(ends.eod, matches_special)
    if name is not None and name not in library.special and not matches_special and not encode_ids([name])[0]:
        raise UserError(f"--eod-token {name!r}: without this token the {kind} cannot spell text any more; name another")
    forbidden = frozenset({*special.values(), *(i for i in [ends.eod] if i is not None)} - set(library.unknown))
    usual = library.first_eod if library.first_eod is not None else library.eod_alone()
    return Tokenizer(
        kind=kind,
        vocabulary_size=library.vocabulary_size,
        eod=ends.eod,
        bos=ends.bos,
        special=special,
        forbidden=frozenset() if matches_special else forbidden,
        matches_special=matches_special,
        fingerprint=_fingerprint(kind, files, None if ends.eod in (usual, None) else ends.eod),
        files=files,
        encode_ids=encode_ids,
        decode_ids=library.decode_ids,
        id_of=library.id_of,
        as_json=as_json,
    )


def _file_names(kind: str) -> dict[str, str]:
    """Files of a kind of tokenizer: {flag that names the file: name under which it is saved}."""
    names = {
        "SentencePieceTokenizer": {"--tokenizer-model": "tokenizer.model"},
        "HuggingFaceTokenizer": {"--tokenizer-model": "tokenizer.json"},
        "GPT2BPETokenizer": {"--vocab-file": "vocab.json", "--merge-file": "merges.txt"},
        "ByteLevelTokenizer": {},
    }
    if kind not in names:
        raise UserError(f"unknown tokenizer type {kind}; known are {', '.join(names)}")
    return names[kind]


_FILES = {
    "SentencePieceTokenizer": "a SentencePiece model, as tools/train_tokenizer.py makes one",
    "HuggingFaceTokenizer": "a tokenizer.json, or the directory that holds it",
    "GPT2BPETokenizer": "GPT-2's vocab.json, and its merges.txt",
}


def _read(flag: str, path: str | None, kind: str) -> bytes:
    if path is None:
        raise UserError(f"--tokenizer-type {kind} needs {flag}: {_FILES.get(kind, kind)}")
    file = Path(path)
    if kind == "HuggingFaceTokenizer" and file.is_dir():  # a directory that save_pretrained wrote
        file = file / "tokenizer.json"
    try:
        content = read_small(file)
    except OSError as error:
        raise file_error(f"{flag} {file} cannot be read: {error.strerror}; it takes {_FILES.get(kind, kind)}", error) from None
    except ValueError as error:
        raise UserError(f"{flag} {file} cannot be read: {error}") from None
    if not content:
        raise UserError(f"{flag} {file} is empty")
    return content


def _fingerprint(kind: str, files: Mapping[str, bytes], eod: int | None) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=32)
    for name in sorted(files):
        digest.update(f"\n{name} {len(files[name])}\n".encode() + files[name])
    if eod is not None:
        digest.update(f"\neod {eod}\n".encode())
    return digest.hexdigest()
