"""transformers reads an exported tokenizer as this program does: the same ids for many scripts, and no token that training lacked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers

from megatron_salt.config import TokenizerConfig
from megatron_salt.convert.hugging_face.tokenizer_files import read_as_another, tokenizer_files
from megatron_salt.errors import UserError
from megatron_salt.tokenizer.tokenizer import Tokenizer, build_tokenizer, tokenizer_from_files

TEXTS = [
    "The quick brown fox jumps over the lazy dog's back, doesn't it?",
    "  two spaces, a tab\tand\n\n two lines  ",
    "Größe, naïve café, l'été à Orléans; ¿qué tal? Œuvre",
    "Съешь же ещё этих мягких французских булок",
    "東京都に住んでいます。你好，世界！한국어 문장입니다.",  # noqa: RUF001
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🙂👩‍👩‍👧‍👦 e\u0301 \u200b\ufeffx ﬁ ½",  # noqa: RUF001
    "def f(x):\n    return x**2  # 3.14159, 1234567890\r\n",
    "",
    " ",
    "x .",
]
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox")
READ = """
import json, sys
import transformers
texts, answers = json.load(open(sys.argv[1])), {}
for directory in sys.argv[2:]:
    read = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ids = [read(text)["input_ids"] for text in texts]
    answers[directory] = dict(ids=ids, decoded=[read.decode(each) for each in ids], eos=read.eos_token_id, bos=read.bos_token_id,
                              longest=read.model_max_length)
json.dump(answers, open(sys.argv[1] + ".answers", "w"))
"""


def byte_level(directory: Path) -> Path:
    """A tokenizer.json as Llama 3's: it puts a token before each text. Returns the directory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    model = Tokenizer(models.BPE())
    words = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(TEXTS * 3, trainer)
    model.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B", special_tokens=[(special[0], 0)]
    )
    directory.mkdir()
    model.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": special[0],
        "eos_token": special[2],
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return directory


def sentence_piece(path: Path, model_type: str, byte_fallback: bool = True, **settings: Any) -> Path:
    """A SentencePiece model, with bytes for what it has no piece for, or none. Returns its file."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXTS[0], TEXTS[2], TEXTS[3]]), model_prefix=str(path), model_type=model_type,
        vocab_size=340 if byte_fallback else 80, byte_fallback=byte_fallback, hard_vocab_limit=False, minloglevel=2, **settings,
    )  # fmt: skip
    return path.with_suffix(".model")


@pytest.fixture(scope="module")
def tokenizers_of_all_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    folder = byte_level(root / "byte level")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (root / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": len(model["vocab"])}))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (root / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    unigram, bpe = (str(sentence_piece(root / kind, kind)) for kind in ("unigram", "bpe"))
    configs = {
        "HuggingFaceTokenizer": dict(tokenizer_model=str(folder)),
        "GPT2BPETokenizer": dict(vocab_file=str(root / "vocab.json"), merge_file=str(root / "merges.txt")),
        "SentencePieceTokenizer unigram": dict(tokenizer_model=unigram),
        "SentencePieceTokenizer bpe": dict(tokenizer_model=bpe),
    }
    return {
        name: build_tokenizer(TokenizerConfig(tokenizer_type=name.split()[0], **files))  # type: ignore[arg-type]
        for name, files in configs.items()
    }


@pytest.fixture(scope="module")
def as_transformers_reads(
    tokenizers_of_all_kinds: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], SimpleNamespace]:
    """(kind, family of models, or "begins" for an export with --prepend-bos) -> what transformers says of the exported files."""
    root = tmp_path_factory.mktemp("exported")
    folders = []
    for name, tokenizer in tokenizers_of_all_kinds.items():
        for family in (*FAMILIES, *(["begins"] if tokenizer.bos is not None else [])):
            folder = root / name / family
            folder.mkdir(parents=True)
            for file, content in tokenizer_files(tokenizer, root, 77, family == "begins").items():
                (folder / file).write_bytes(content)
            if family != "qwen2":  # see test_a_qwen2_model_with_another_tokenizer_has_it_in_a_folder_of_its_own
                (folder / "config.json").write_text(json.dumps({"model_type": "llama" if family == "begins" else family}))
            folders.append(str(folder))
    texts = root / "texts.json"
    texts.write_text(json.dumps(TEXTS))
    ended = subprocess.run([sys.executable, "-c", READ, str(texts), *folders], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    answers: dict[str, Any] = json.loads((root / "texts.json.answers").read_text())
    return lambda name, family: SimpleNamespace(**answers[str(root / name / family)])


KINDS = ("HuggingFaceTokenizer", "GPT2BPETokenizer", "SentencePieceTokenizer unigram", "SentencePieceTokenizer bpe")


@pytest.mark.parametrize("name", KINDS)
def test_transformers_encodes_as_training_did(
    tokenizers_of_all_kinds: dict[str, Tokenizer], as_transformers_reads: Callable[[str, str], SimpleNamespace], name: str
) -> None:
    tokenizer = tokenizers_of_all_kinds[name]
    for family in FAMILIES:
        read = as_transformers_reads(name, family)
        assert read.ids == tokenizer.encode_batch(TEXTS), family
        assert read.decoded == [tokenizer.decode(ids) for ids in read.ids], family
        assert (read.eos, read.bos, read.longest) == (tokenizer.eod, None, 77), family


@pytest.mark.parametrize("name", [name for name in KINDS if name != "GPT2BPETokenizer"])
def test_a_model_whose_data_had_bos_gets_it(
    tokenizers_of_all_kinds: dict[str, Tokenizer], as_transformers_reads: Callable[[str, str], SimpleNamespace], name: str
) -> None:
    tokenizer, read = tokenizers_of_all_kinds[name], as_transformers_reads(name, "begins")
    assert tokenizer.bos is not None and read.bos == tokenizer.bos
    assert read.ids == [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(TEXTS)]


def test_bos_is_refused_where_there_is_none(tokenizers_of_all_kinds: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--prepend-bos: the GPT2BPETokenizer in .* declares no beginning-of-sequence token"):
        tokenizer_files(tokenizers_of_all_kinds["GPT2BPETokenizer"], tmp_path, 77, True)


UNKNOWN = ["x .", "東京", "🙂 x", "zzZQ#@ ~", "ﬁ ½ e\u0301", " x ⁇ y "]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_text_is_decoded_as_sentencepiece_decodes_it(tmp_path: Path, model_type: str) -> None:
    """By SentencePiece's default settings, without bytes: an unknown piece is its own sign, a space before a text comes and goes."""
    import sentencepiece

    path = sentence_piece(tmp_path / "model", model_type, byte_fallback=False)
    oracle = sentencepiece.SentencePieceProcessor(str(path))
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path)))
    written = tokenizers.Tokenizer.from_buffer(tokenizer_files(tokenizer, tmp_path, 77, False)["tokenizer.json"])
    texts = [*TEXTS, *UNKNOWN]
    ids = [written.encode(text).ids for text in texts]
    assert ids == oracle.encode(texts) and sum(oracle.unk_id() in each for each in ids) > 5
    assert [written.decode(each, skip_special_tokens=False) for each in ids] == oracle.decode(ids)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_user_defined_pieces_are_matched_or_the_model_is_refused(tmp_path: Path, model_type: str) -> None:
    """Text is cut at them, so <sep> keeps its id. SentencePiece keeps one of spaces whole where it removes other spaces: refused."""
    for pieces, refused in ((["<sep>", "er"], False), (["    "], True)):
        path = sentence_piece(tmp_path / str(refused), model_type, user_defined_symbols=pieces)
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path)))
        if refused:
            with pytest.raises(UserError, match="as a tokenizer.json .* --no-tokenizer"):
                tokenizer_files(tokenizer, tmp_path, 77, False)
            continue
        written = tokenizers.Tokenizer.from_buffer(tokenizer_files(tokenizer, tmp_path, 77, False)["tokenizer.json"])
        texts = [*TEXTS, "over<sep>there <sep>", "<sep>"]
        assert [written.encode(text).ids for text in texts] == tokenizer.encode_batch(texts)
        assert written.token_to_id("<sep>") in written.encode("over<sep>").ids


def test_plain_bytes_have_no_form_for_transformers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the ByteLevelTokenizer has no form that transformers reads; --no-tokenizer"):
        tokenizer_files(tokenizer_from_files("ByteLevelTokenizer", {}, "x"), tmp_path, 77, False)


def test_a_qwen2_model_with_another_tokenizer_has_it_in_a_folder_of_its_own(
    tokenizers_of_all_kinds: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """transformers reads the folder without config.json by the file's own rules: that is family "qwen2" above."""
    files = tokenizer_files(tokenizers_of_all_kinds["HuggingFaceTokenizer"], tmp_path, 77, False)
    assert read_as_another(files, "Qwen2ForCausalLM") and not read_as_another(files, "Qwen3ForCausalLM")
    tree = json.loads(files["tokenizer.json"])
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tree["normalizer"], tree["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"type": "NFC"}, {"Regex": words}
    assert not read_as_another(files | {"tokenizer.json": json.dumps(tree).encode()}, "Qwen2ForCausalLM")
