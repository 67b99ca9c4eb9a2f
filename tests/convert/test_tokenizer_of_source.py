"""Which token ends documents in the tokenizers of open models: stand-ins with their special tokens and the files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, processors

from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.hugging_face.tokenizer_of_source import note_on_bos, refuse_foreign_ids, tokenizer_of_source
from megatron_salt.errors import UserError

LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = {"chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}"}
SOURCES: dict[str, tuple[list[str], dict[str, Any], list[int], str, str | None]] = {
    # special tokens, tokenizer_config.json, eos_token_id of generation_config.json, end and beginning of a document
    "Llama 3": (LLAMA3, {"bos_token": LLAMA3[0], "eos_token": LLAMA3[1]}, [1], LLAMA3[1], LLAMA3[0]),
    "Llama 3 for chat": (LLAMA3, CHAT | {"bos_token": LLAMA3[0], "eos_token": LLAMA3[2]}, [1, 3, 2], LLAMA3[1], LLAMA3[0]),
    "Llama 2, Mistral": (["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}, [2], "</s>", "<s>"),
    "Qwen": (QWEN, {"bos_token": None, "eos_token": QWEN[0]}, [0], QWEN[0], None),
    "Qwen for chat": (QWEN, CHAT | {"bos_token": None, "eos_token": QWEN[2]}, [2, 0], QWEN[0], None),
    "SmolLM2 for chat": (QWEN, CHAT | {"bos_token": QWEN[1], "eos_token": QWEN[2]}, [2], QWEN[0], QWEN[1]),
    "Pythia": (["<|endoftext|>", "<|padding|>"], dict.fromkeys(("bos_token", "eos_token"), QWEN[0]), [0], QWEN[0], QWEN[0]),
    "GPT-2": (["<|endoftext|>"], {"model_max_length": 1024}, [0], "<|endoftext|>", None),
    "Phi-3": (
        ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>"],
        CHAT | {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, [3, 4, 5], "<|endoftext|>", "<s>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_documents_end_as_in_training_and_not_as_turns_do(tmp_path: Path, name: str) -> None:
    special, config, eos, end, begin = SOURCES[name]
    model = tokenizers.Tokenizer(models.BPE({}, []))
    model.add_special_tokens(special)
    if begin is not None:
        first = (begin, model.token_to_id(begin))
        model.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[first])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    read = tokenizer_of_source(TokenizerConfig(), tmp_path)
    assert (read.eod, read.bos) == (model.token_to_id(end), None if begin is None else model.token_to_id(begin))
    note = note_on_bos(read, "there")
    assert note is None if begin is None else f"there: its tokenizer begins a text with {begin!r}" in str(note)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(model.to_str()) | {"post_processor": None}))
    assert note_on_bos(tokenizer_of_source(TokenizerConfig(), tmp_path), "there") is None
    with pytest.raises(UserError, match=f"has rows for 0 ids, and the tokenizer has {len(special)}"):
        refuse_foreign_ids(read, 0, "x")


def test_another_end_can_be_named(tmp_path: Path) -> None:
    """OPT's and BART's vocab.json has </s>, and no <|endoftext|>."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert tokenizer_of_source(TokenizerConfig(), tmp_path).eod is None
    assert tokenizer_of_source(TokenizerConfig(eod_token="</s>"), tmp_path).eod == 2
