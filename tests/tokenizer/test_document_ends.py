"""Documents end in a special token; an open choice is refused with the candidates; earlier choices keep their fingerprints."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, processors

from megatron_salt.config import DataConfig, TokenizerConfig
from megatron_salt.data.run_tokenizer import tokenizer_of_run
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.document_ends import DeclaredEnds, ends_of_post_processor, find_eod
from megatron_salt.tokenizer.tokenizer import DESCRIPTION, build_tokenizer, load_tokenizer, tokenizer_from_files
from tests.tokenizer.test_tokenizer import sentencepiece_model

LETTERS = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz<>/| ")}


def tokenizer_json(special: list[str], ordinary: list[str] = []) -> tokenizers.Tokenizer:  # noqa: B006
    """A model of letters, then special tokens, then ordinary added tokens."""
    model = tokenizers.Tokenizer(models.BPE(LETTERS, []))
    model.add_special_tokens(special)
    model.add_tokens(ordinary)
    return model


def saved(folder: Path, model: tokenizers.Tokenizer, **beside: object) -> TokenizerConfig:
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


def eod_text(config: TokenizerConfig, model: tokenizers.Tokenizer) -> str | None:
    eod = build_tokenizer(config).eod
    return None if eod is None else model.id_to_token(eod)


def test_an_html_tag_among_the_added_tokens_ends_no_document(tmp_path):
    """As in Gemma's tokenizer."""
    model = tokenizer_json(["<pad>", "<eos>", "<bos>"], ["<s>", "</s>"])
    config = saved(tmp_path, model)
    tokenizer = build_tokenizer(config)
    assert tokenizer.eod == model.token_to_id("<eos>") and tokenizer.eod not in tokenizer.encode("old <s>a</s> <eos>")
    assert model.token_to_id("</s>") in tokenizer.encode("old <s>a</s>")


@pytest.mark.parametrize(
    "special, beside, expected",
    [
        (["</s>", "<|endoftext|>"], {}, None),
        (["</s>", "<|endoftext|>"], {"tokenizer_config": {"eos_token": "</s>"}}, "</s>"),
        (["</s>", "<|endoftext|>"], {"tokenizer_config": {"eos_token": {"content": "<|endoftext|>"}}}, "<|endoftext|>"),
        (["</s>", "<|endoftext|>"], {"special_tokens_map": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>"),
        (["</s>", "<|endoftext|>"], {"generation_config": {"eos_token_id": len(LETTERS)}}, "</s>"),
        (
            ["</s>", "<|endoftext|>", "<turn>"],
            {"generation_config": {"eos_token_id": [len(LETTERS) + 1, len(LETTERS) + 2]}},
            "<|endoftext|>",
        ),
        (["</s>", "<|endoftext|>"], {"generation_config": {"eos_token_id": [len(LETTERS), len(LETTERS) + 1]}}, None),
        (
            ["</s>", "<|endoftext|>"],
            {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "special_tokens_map": {"eos_token": "</s>"}},
            None,
        ),
        (["</s>", "<|endoftext|>"], {"tokenizer_config": {"eos_token": None, "model_max_length": 10**30}}, None),
        (["<|endoftext|>", "<|im_end|>"], {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|endoftext|>"),
        (["<fin>", "<turn>"], {"tokenizer_config": {"eos_token": "<fin>"}}, "<fin>"),
        (["<fin>", "<turn>"], {"generation_config": {"eos_token_id": [len(LETTERS), len(LETTERS) + 1]}}, None),
        (["<eod>", "</s>"], {"tokenizer_config": {"eos_token": "</s>"}}, "<eod>"),
    ],
)
def test_names_then_the_files_beside_it_decide_or_the_candidates_are_named(tmp_path, special, beside, expected):
    model = tokenizer_json(special)
    config = saved(tmp_path, model, **beside)
    if expected is None:
        with pytest.raises(UserError, match="--eod-token") as error:
            build_tokenizer(config)
        assert all(f"{token!r} (id {model.token_to_id(token)})" in str(error.value) for token in special[:2])
        config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path), eod_token=special[1])
        assert eod_text(config, model) == special[1]
    else:
        assert eod_text(config, model) == expected


def test_what_the_post_processor_appends_decides_too(tmp_path):
    model = tokenizer_json(["</s>", "<|endoftext|>", "<s>"])
    ids = [(token, model.token_to_id(token)) for token in ("<s>", "<|endoftext|>")]
    model.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=ids)]
    )
    config = saved(tmp_path, model)
    assert (eod_text(config, model), build_tokenizer(config).bos) == ("<|endoftext|>", ids[0][1])
    model.post_processor = processors.BertProcessing(("</s>", 5), ("<s>", 6))
    assert ends_of_post_processor(json.loads(model.post_processor.__getstate__())) == DeclaredEnds(
        frozenset([5]), frozenset([6])
    )
    assert ends_of_post_processor(None) == ends_of_post_processor({"type": "Other"}) == DeclaredEnds()


def test_files_beside_a_file_of_another_name_are_not_its_own(tmp_path):
    model = tokenizer_json(["<fin>"])
    saved(tmp_path, model, tokenizer_config={"eos_token": "<fin>"})
    model.save(str(tmp_path / "other.json"))
    assert (
        eod_text(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "other.json")), model)
        is None
    )
    assert (
        eod_text(
            TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json")), model
        )
        == "<fin>"
    )


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\udcff"])
def test_a_damaged_file_beside_it_is_named(tmp_path, content):
    config = saved(tmp_path, tokenizer_json(["</s>"]))
    (tmp_path / "generation_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"--tokenizer-model .*generation_config.json cannot be read"):
        build_tokenizer(config)


@pytest.mark.parametrize(
    "make, token",
    [
        (lambda home: saved(home, tokenizer_json(["</s>"])), "<fin>"),
        (
            lambda home: TokenizerConfig(
                tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model(home / "m"))
            ),
            "<fin>",
        ),
        (lambda home: TokenizerConfig(tokenizer_type="ByteLevelTokenizer"), "</s>"),
    ],
)
def test_a_token_that_is_not_there_is_refused_with_the_special_ones(tmp_path, make, token):
    config = make(tmp_path)
    with pytest.raises(UserError, match=rf"--eod-token '{token}': .* has no such token"):
        build_tokenizer(
            TokenizerConfig(tokenizer_type=config.tokenizer_type, tokenizer_model=config.tokenizer_model, eod_token=token)
        )


@pytest.mark.parametrize("token", ["<unk>", "<0x0A>"])
def test_what_any_text_gives_ends_no_document(tmp_path, token):
    model = str(sentencepiece_model(tmp_path / "m"))
    with pytest.raises(UserError, match=f"--eod-token '{token}' .* ordinary text gives"):
        build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model, eod_token=token))


def test_a_single_letter_ends_no_document_where_text_needs_it(tmp_path):
    config = saved(tmp_path, tokenizer_json(["</s>"]))
    with pytest.raises(UserError, match="--eod-token 'q': .* cannot spell text"):
        build_tokenizer(
            TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=config.tokenizer_model, eod_token="q")
        )


def test_fingerprints_stay_where_the_end_is_the_one_that_was_always_taken(tmp_path):
    """Another end gives another fingerprint, so data with another end is refused."""
    html = saved(tmp_path / "html", tokenizer_json(["<eos>"], ["</s>"]))  # </s> was taken
    plain = saved(tmp_path / "plain", tokenizer_json(["</s>", "<|endoftext|>"]))  # <|endoftext|> was taken
    unknown = saved(tmp_path / "unknown", tokenizer_json(["<fin>"]))  # none was

    def fingerprint(config: TokenizerConfig, eod_token: str | None) -> str:
        return build_tokenizer(
            TokenizerConfig(tokenizer_type=config.tokenizer_type, tokenizer_model=config.tokenizer_model, eod_token=eod_token)
        ).fingerprint

    def of_the_files(config: TokenizerConfig) -> str:
        """The fingerprint as the first releases computed it."""
        import hashlib

        content = (Path(str(config.tokenizer_model)) / "tokenizer.json").read_bytes()
        head = f"HuggingFaceTokenizer\ntokenizer.json {len(content)}\n".encode()
        return hashlib.blake2b(head + content, digest_size=32).hexdigest()

    assert fingerprint(html, "</s>") == of_the_files(html) != fingerprint(html, None) == fingerprint(html, "<eos>")
    assert fingerprint(plain, "<|endoftext|>") == of_the_files(plain) != fingerprint(plain, "</s>")
    assert fingerprint(unknown, None) == of_the_files(unknown) != fingerprint(unknown, "<fin>")


def test_a_saved_tokenizer_keeps_the_end_that_was_named_and_one_of_an_older_version_its_own(tmp_path):
    config = saved(tmp_path / "from", tokenizer_json(["<eos>", "<bos>"], ["</s>"]), tokenizer_config={"bos_token": "<bos>"})
    named = build_tokenizer(
        TokenizerConfig(tokenizer_type=config.tokenizer_type, tokenizer_model=config.tokenizer_model, eod_token="</s>")
    )
    named.save(tmp_path / "kept")
    loaded = load_tokenizer(tmp_path / "kept")
    assert (loaded.eod, loaded.bos, loaded.fingerprint) == (named.eod, named.bos, named.fingerprint) and named.bos is not None
    path = tmp_path / "kept" / DESCRIPTION
    older = json.loads(path.read_text())
    del older["bos"]
    path.write_text(json.dumps(older))
    assert load_tokenizer(tmp_path / "kept").eod == named.eod
    path.write_text(json.dumps({**older, "eod": 10**6}))
    with pytest.raises(UserError, match="outside of its vocabulary"):
        load_tokenizer(tmp_path / "kept")


def test_a_runs_flag_cannot_ask_a_kept_tokenizer_for_another_end(tmp_path):
    tokenizer_from_files("ByteLevelTokenizer", {}, "test").save(tmp_path)
    assert tokenizer_of_run(TokenizerConfig(eod_token="<eod>"), DataConfig(), tmp_path).eod == 256
    with pytest.raises(UserError, match="--eod-token '</s>' .* documents end in id 256"):
        tokenizer_of_run(TokenizerConfig(eod_token="</s>"), DataConfig(), tmp_path)


def test_a_special_token_with_no_name_of_an_end_ends_nothing():
    assert find_eod({"<a>": 1}, (("<eod>",),), frozenset(), "") is None
    assert find_eod({"<a>": 1}, (("<eod>",),), frozenset([1]), "") == 1


def test_a_piece_of_text_with_the_name_of_an_end_ends_no_document():
    """SentencePiece learnt such a piece from text. A user-defined or control piece was put there on purpose."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["<eod>"] * 50 + ["a b"]),
        model_writer=model,
        vocab_size=272,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        minloglevel=2,
        split_by_unicode_script=False,
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    learnt = library.piece_to_id("<eod>")
    assert library.id_to_piece(learnt) == "<eod>" and not library.is_control(learnt)
    tokenizer = tokenizer_from_files("SentencePieceTokenizer", {"tokenizer.model": model.getvalue()}, "test")
    assert tokenizer.eod == library.eos_id() and tokenizer.encode("<eod>") == [learnt]


def test_candidates_that_are_not_special_are_named_by_their_ids():
    with pytest.raises(UserError, match=r"documents may end in id 4 or '<a>' \(id 9\); --eod-token"):
        find_eod({"<a>": 9}, (), frozenset([9, 4]), "x")
