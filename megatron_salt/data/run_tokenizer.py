"""The tokenizer of a run, and whether the data of the run was made with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_salt.config import DataConfig, TokenizerConfig
from megatron_salt.data.blend import parse_data_path, parse_valid_data_path
from megatron_salt.data.indexed_dataset import refuse_missing
from megatron_salt.data.manifest import read_manifest, tokenizer_directory
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.document_ends import in_words
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer, load_tokenizer


def tokenizer_of_run(config: TokenizerConfig, data: DataConfig, checkpoint_tokenizer: Path | None) -> Tokenizer:
    """The tokenizer of the flags. Without --tokenizer-type the one beside the data, else the one of the checkpoint.

    UserError where there is none, or where the manifest of a dataset names another one.
    """
    named = [
        (prefix, flag)
        for words, flag in (
            (data.data_path, "--data-path"),
            *((words, "--valid-data-path") for words in parse_valid_data_path(data.valid_data_path).values()),
        )
        for prefix in _prefixes(words, flag)
    ]
    for prefix, flag in named:  # missing data is a better message than a missing tokenizer
        refuse_missing(prefix, flag)
    prefixes = [prefix for prefix, _ in named]
    kept = [tokenizer_directory(prefix) for prefix in prefixes if tokenizer_directory(prefix).is_dir()]
    if config.tokenizer_type is not None:
        tokenizer = build_tokenizer(config)
    elif kept:
        tokenizer = load_tokenizer(kept[0])
        refuse_other_eod(config.eod_token, tokenizer, str(kept[0]))
    elif checkpoint_tokenizer is not None and checkpoint_tokenizer.is_dir():
        tokenizer = load_tokenizer(checkpoint_tokenizer)
        refuse_other_eod(config.eod_token, tokenizer, str(checkpoint_tokenizer))
    else:
        data_path = " ".join(prefixes) or "--data-path"
        raise UserError(
            f"--tokenizer-type is not given, and none of {data_path} has a .tokenizer directory beside it, as "
            "tools/preprocess_data.py leaves; give the --tokenizer-type and --tokenizer-model that made the data"
        )
    for prefix in prefixes:
        made = read_manifest(prefix)
        if made is not None and made.tokenizer_fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{prefix} was made with {made.tokenizer_type} {made.tokenizer_fingerprint} (end of a document {made.eod}), the run's "
                f"tokenizer is {tokenizer.kind} {tokenizer.fingerprint} (end of a document {tokenizer.eod}); give the --tokenizer-type, "
                "--tokenizer-model and --eod-token that made the data, or none of them, for the tokenizer that is kept beside it"
            )
        if made is not None and made.append_eod and made.eod != tokenizer.eod:
            raise UserError(
                f"{prefix}: documents end in id {made.eod}, with the run's tokenizer in {tokenizer.eod}; give the --eod-token "
                "that made the data"
            )
    return tokenizer


def refuse_without_ends(tokenizer: Tokenizer, append_eod: bool, prepend_bos: bool) -> None:
    """UserError where the tokenizer lacks an id that --append-eod or --prepend-bos asks for."""
    if append_eod and tokenizer.eod is None:
        special = in_words(tokenizer.special, tokenizer.special.values())
        raise UserError(
            f"--append-eod: the {tokenizer.kind} has no end-of-document token; --eod-token names one"
            + (f", perhaps {special}" if special else "")
        )
    if prepend_bos and tokenizer.bos is None:
        raise UserError(
            f"--prepend-bos: the {tokenizer.kind} declares no beginning-of-sequence token, or several; leave the flag out"
        )


def describe_ends(tokenizer: Tokenizer, append_eod: bool, prepend_bos: bool) -> str:
    """Line for the start of preprocessing: the tokens between documents."""
    names = {i: repr(name) for name, i in tokenizer.special.items()}
    end = "nothing ends documents" + ("" if append_eod else ", --append-eod does")
    if append_eod and tokenizer.eod is not None:
        end = f"documents end in {names.get(tokenizer.eod, 'an id of no text')} (id {tokenizer.eod})"
    if tokenizer.bos is None:
        return end
    bos = f"{names.get(tokenizer.bos, '')} (id {tokenizer.bos})"
    return f"{end} and begin with {bos}" if prepend_bos else f"{end}; nothing begins them, --prepend-bos puts {bos} there"


def refuse_other_eod(eod_token: str | None, tokenizer: Tokenizer, where: str) -> None:
    """UserError where --eod-token names another token than the end of a document of the tokenizer kept in `where`."""
    if eod_token is not None and (tokenizer.eod is None or tokenizer.id_of(eod_token) != tokenizer.eod):
        raise UserError(
            f"--eod-token {eod_token!r} is id {tokenizer.id_of(eod_token)}; with the tokenizer kept in {where} documents end "
            f"in id {tokenizer.eod}; leave the flag out"
        )


def _prefixes(paths: Sequence[str], flag_name: str) -> Sequence[str]:
    return parse_data_path(paths, flag_name)[0] if paths else ()
