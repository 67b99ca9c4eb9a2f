"""Which tokenizer a run has, and whether its data was made with that one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_salt.config import DataConfig, TokenizerConfig
from megatron_salt.data.blend import parse_data_path
from megatron_salt.data.manifest import read_manifest, tokenizer_directory
from megatron_salt.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from megatron_salt.errors import UserError


def tokenizer_of_run(config: TokenizerConfig, data: DataConfig, checkpoint_tokenizer: Path | None) -> Tokenizer:
    """The tokenizer of the flags; without --tokenizer-type the one kept beside the data, else the checkpoint's.

    Raises UserError where there is none, or where a dataset's manifest names another one than the run has.
    """
    prefixes = [*_prefixes(data.data_path, "--data-path"), *_prefixes(data.valid_data_path, "--valid-data-path")]
    kept = [tokenizer_directory(prefix) for prefix in prefixes if tokenizer_directory(prefix).is_dir()]
    if config.tokenizer_type is not None:
        tokenizer = build_tokenizer(config)
    elif kept:
        tokenizer = load_tokenizer(kept[0])
    elif checkpoint_tokenizer is not None and checkpoint_tokenizer.is_dir():
        tokenizer = load_tokenizer(checkpoint_tokenizer)
    else:
        data_path = " ".join(prefixes) or "--data-path"
        raise UserError(f"--tokenizer-type is not given, and none of {data_path} has a .tokenizer directory beside it")
    for prefix in prefixes:
        made = read_manifest(prefix)
        if made is not None and made.tokenizer_fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{prefix} was made with {made.tokenizer_type} {made.tokenizer_fingerprint}, the run's tokenizer is {tokenizer.kind} "
                f"{tokenizer.fingerprint}; give the --tokenizer-type and --tokenizer-model that made the data"
            )
    return tokenizer


def _prefixes(paths: Sequence[str], flag_name: str) -> Sequence[str]:
    return parse_data_path(paths, flag_name)[0] if paths else ()
