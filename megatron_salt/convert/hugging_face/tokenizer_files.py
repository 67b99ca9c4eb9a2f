"""A tokenizer of ours as the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_salt.errors import UserError
from megatron_salt.tokenizer.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer, checkpoint: Path, context: int) -> Mapping[str, bytes]:
    """{name: contents} of a tokenizer's files. checkpoint: for messages. context: longest text, in tokens.

    No token is added before a text. The end of a document is the end of a text. Raises UserError for a tokenizer that has no such files.
    """
    if tokenizer.as_json is None:
        raise UserError(f"{checkpoint}: the {tokenizer.kind} has no form that transformers reads; --no-tokenizer leaves it out")
    names = {i: name for name, i in tokenizer.special.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eod is not None and tokenizer.eod in names:
        config["eos_token"] = names[tokenizer.eod]
    if tokenizer.bos is not None and tokenizer.bos in names:
        config["bos_token"] = names[tokenizer.bos]
    return {
        "tokenizer.json": _without_added_tokens(tokenizer.as_json()),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _without_added_tokens(content: bytes) -> bytes:
    """tokenizer.json without the step that puts tokens before or after a text: training had none."""
    tree, none = json.loads(content), dict.fromkeys(("post_processor", "padding", "truncation"))
    if none.items() <= tree.items():
        return content  # file for file the same tokenizer
    tree |= none
    return json.dumps(tree, ensure_ascii=False).encode()
