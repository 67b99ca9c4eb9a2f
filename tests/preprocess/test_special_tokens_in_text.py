"""preprocess_data: the end and the beginning of a document, and what becomes of special tokens that stand in a text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_salt.config import DataConfig, TokenizerConfig
from megatron_salt.data.manifest import manifest_path, read_manifest, tokenizer_directory
from megatron_salt.data.run_tokenizer import tokenizer_of_run
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.tokenizer import load_tokenizer
from megatron_salt.tools import preprocess_data
from tests.support.datasets import BYTES, dataset, files_in, run, write_lines
from tests.tokenizer.test_document_ends import saved, tokenizer_json
from tests.tools.test_merge_datasets import merge

TEXTS = ["plain text", "", "a tag <eod> in <eod> the text", "one more <eod>", "plain again"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Flags of a SentencePiece model with a user-defined <eod>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=285,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        user_defined_symbols=["<eod>"],
    )
    path = tmp_path_factory.mktemp("model") / "sp.model"
    path.write_bytes(model.getvalue())
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(path)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", TEXTS)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("policy, ends_inside", [("split", 0), ("encode", 3)])
def test_a_policy_decides_and_what_stood_in_the_text_is_told_and_recorded(
    tmp_path, corpus, flags, capsys, policy, workers, ends_inside
):
    assert (
        run(corpus, tmp_path / "d", "--append-eod", "--special-tokens-in-text", policy, "--workers", workers, tokenizer=flags)
        == 0
    )
    prefix = f"{tmp_path / 'd'}_text_document"
    manifest, tokenizer = read_manifest(prefix), load_tokenizer(tokenizer_directory(prefix))
    documents = dataset(tmp_path / "d")
    assert all(document[-1] == manifest.eod for document in documents)
    assert sum(document[:-1].count(manifest.eod) for document in documents) == ends_inside
    assert (manifest.special_tokens_in_text, manifest.special_documents, manifest.special_tokens) == (policy, 2, {"<eod>": 3})
    if policy == "split":
        assert [tokenizer.decode(document) for document in documents] == [text for text in TEXTS if text]
    output = capsys.readouterr().out
    assert "special tokens in text: " in output and " of a sample, '<eod>' " in output  # before
    assert f"special tokens in the text of 2 documents ({policy}): '<eod>' 3 times" in output  # and after


def test_split_is_the_default_for_every_type(tmp_path, corpus, flags, capsys):
    for number, tokenizer in enumerate([flags, BYTES]):
        prefix = tmp_path / f"d{number}"
        assert run(corpus, prefix, tokenizer=tokenizer) == 0
        assert read_manifest(f"{prefix}_text_document").special_tokens_in_text == "split"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_refuse_names_document_and_token_and_leaves_nothing(tmp_path, corpus, flags, capsys, workers):
    out = tmp_path / "out"
    more = write_lines(tmp_path / "more.jsonl", ["a", "b", "c"])
    assert run([more, corpus], out / "d", "--special-tokens-in-text", "refuse", "--workers", workers, tokenizer=flags) == 2
    message = capsys.readouterr().err
    assert f"document 3 of {corpus}" in message and "'<eod>' under 'text': 'a tag <eod> in <eod> the text'" in message
    assert "--special-tokens-in-text refuse" in message and len(message.strip().splitlines()) == 1 and not files_in(out)
    assert run(more, out / "d", "--special-tokens-in-text", "refuse", tokenizer=flags) == 0


def test_documents_begin_with_bos_where_that_is_asked_for(tmp_path, corpus, flags):
    assert run(corpus, tmp_path / "with", "--append-eod", "--prepend-bos", tokenizer=flags) == 0
    assert run(corpus, tmp_path / "without", "--append-eod", tokenizer=flags) == 0
    bos = read_manifest(f"{tmp_path / 'with'}_text_document").bos
    assert bos == sentencepiece.SentencePieceProcessor(model_file=flags[-1]).bos_id()
    assert read_manifest(f"{tmp_path / 'without'}_text_document").bos is None
    assert dataset(tmp_path / "with") == [[bos, *document] for document in dataset(tmp_path / "without")]


def test_a_tokenizer_without_bos_or_end_is_refused_with_the_flag(tmp_path, corpus, capsys):
    assert run(corpus, tmp_path / "out/d", "--prepend-bos") == 2
    assert "--prepend-bos: the ByteLevelTokenizer declares no" in capsys.readouterr().err
    saved(tmp_path / "t", tokenizer_json(["<fin>"]))
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "t")]
    assert run(corpus, tmp_path / "out/d", "--append-eod", tokenizer=tokenizer) == 2
    message = capsys.readouterr().err
    assert "--eod-token names one" in message and "'<fin>' (id 31)" in message
    assert run(corpus, tmp_path / "out/d", "--append-eod", "--eod-token", "<fin>", tokenizer=tokenizer) == 0
    assert all(document[-1] == 31 for document in dataset(tmp_path / "out/d"))


@pytest.mark.parametrize("more", [["--prepend-bos"], ["--special-tokens-in-text", "encode"]])
def test_resume_and_merge_know_them(tmp_path, corpus, flags, capsys, more):
    assert run(corpus, tmp_path / "a", "--resume", tokenizer=flags) == 0
    assert run(corpus, tmp_path / "a", "--resume", tokenizer=flags) == 0
    assert "already whole" in capsys.readouterr().out
    assert run(corpus, tmp_path / "a", "--resume", *more, tokenizer=flags) == 2
    assert run(corpus, tmp_path / "b", *more, tokenizer=flags) == 0
    a, b = tmp_path / "a_text_document", tmp_path / "b_text_document"
    assert merge([a, b], tmp_path / "c") == 2
    assert {"--prepend-bos": "bos of", "--special-tokens-in-text": "special_tokens_in_text of"}[
        more[0]
    ] in capsys.readouterr().err


def test_merged_counts_are_the_sums_and_older_parts_do_not_say(tmp_path, corpus, flags):
    for name in "ab":
        assert run(corpus, tmp_path / name, tokenizer=flags) == 0
    parts = [tmp_path / f"{name}_text_document" for name in "ab"]
    assert merge(parts, tmp_path / "c", "--allow-duplicate-inputs") == 0
    merged = read_manifest(str(tmp_path / "c"))
    assert (merged.special_tokens_in_text, merged.special_documents, merged.special_tokens) == ("split", 4, {"<eod>": 6})
    path = manifest_path(str(parts[1]))
    older = json.loads(path.read_text())
    for name in ("bos", "special_tokens_in_text", "special_documents", "special_tokens", "dedup"):
        del older[name]
    path.write_text(json.dumps(older))
    assert merge(parts, tmp_path / "d", "--allow-duplicate-inputs") == 0
    merged = read_manifest(str(tmp_path / "d"))
    assert (merged.special_tokens_in_text, merged.special_documents, merged.bos) == ("", 2, None)
    assert run(corpus, tmp_path / "b", "--resume", tokenizer=flags) == 0  # an older dataset is whole


def test_a_run_with_another_end_than_its_data_is_refused_with_both(tmp_path, corpus):
    saved(tmp_path / "t", tokenizer_json(["<eos>"], ["</s>"]))
    model = str(tmp_path / "t")
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model, "--eod-token", "</s>"]
    assert run(corpus, tmp_path / "d", "--append-eod", tokenizer=words) == 0
    data = DataConfig(data_path=(f"{tmp_path / 'd'}_text_document",))
    for same in (
        TokenizerConfig(),
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model, eod_token="</s>"),
    ):
        assert tokenizer_of_run(same, data, None).eod == 32
    with pytest.raises(UserError, match=r"\(end of a document 32\).*\(end of a document 31\).*--eod-token"):
        tokenizer_of_run(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model), data, None)


@pytest.mark.parametrize("flag", [["--special-tokens-in-text", "refuse"], ["--prepend-bos"]])
def test_a_killed_run_goes_on_with_the_same_settings_alone(tmp_path, corpus, flags, capsys, flag):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess_data, "describe", lambda *facts: (_ for _ in ()).throw(UserError("killed")))
        assert run(corpus, tmp_path / "d", "--resume", tokenizer=flags) == 2
    assert run(corpus, tmp_path / "d", "--resume", *flag, tokenizer=flags) == 2
    assert f"of a run with other {flag[0]}: {flag[0]} was" in capsys.readouterr().err
    assert run(corpus, tmp_path / "d", "--resume", tokenizer=flags) == 0
    manifest = read_manifest(f"{tmp_path / 'd'}_text_document")
    assert (manifest.special_documents, manifest.special_tokens) == (2, {"<eod>": 3})  # once, though it was begun twice
