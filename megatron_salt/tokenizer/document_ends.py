"""Which tokens stand between documents: the one that ends them (eod) and the one that may begin them (BOS).

Only a special token can end documents: `</s>` may be an HTML tag. The first of these rules that gives one token decides:
1) --eod-token. 2) The special token named <eod> or <EOD>. 3) The special token with another usual name of an end.
4) The token that the tokenizer declares, if rule 3 gives several candidates or none. It is declared by eos_token in
tokenizer_config.json or special_tokens_map.json, by eos_token_id in generation_config.json, or by the post-processor of a
tokenizer.json. Names come first because a chat tokenizer declares the end of a turn. A list of ids decides if exactly one of
them is a candidate. Otherwise UserError names the candidates. SentencePiece declares its eos.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_salt.errors import UserError, file_error
from megatron_salt.small_files import read_small

DOCUMENT = ("<eod>", "<EOD>")
"""Names that always mean the end of a document."""
TEXT = ("<|endoftext|>",)
"""Names that usually mean the end of a document."""
OTHERS = ("<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")  # noqa: RUF001  (DeepSeek's)


@dataclass(frozen=True)
class Ends:
    """Ids of the tokens that end and begin documents; None: the tokenizer has none."""

    eod: int | None
    bos: int | None


@dataclass(frozen=True)
class DeclaredEnds:
    """Ids that files declare as end (eos) or beginning (bos) of a text."""

    eos: frozenset[int] = frozenset()
    bos: frozenset[int] = frozenset()

    def __or__(self, other: DeclaredEnds) -> DeclaredEnds:
        return DeclaredEnds(self.eos | other.eos, self.bos | other.bos)


@dataclass(frozen=True)
class ConfigEnds:
    """Ends that the configuration files beside a tokenizer.json declare, as tokens or ids."""

    eos: tuple[str | int, ...] = field(default=())
    bos: tuple[str | int, ...] = field(default=())


def find_eod(special: Mapping[str, int], names: Iterable[tuple[str, ...]], declared: frozenset[int], origin: str) -> int | None:
    """The id that ends documents, by rules 2 to 4. special: all special tokens. names: groups of names, the best group first.

    Raises UserError, with the candidates, where the rules leave several. origin: the tokenizer's name in the message.
    """
    for group in names:
        candidates = {special[name] for name in group if name in special}
        if len(candidates) == 1:
            return candidates.pop()
        if candidates:
            return _only(candidates & declared or candidates, special, origin)
    return _only(set(declared), special, origin)


def _only(candidates: set[int], special: Mapping[str, int], origin: str) -> int | None:
    if len(candidates) > 1:
        raise UserError(f"{origin}: documents may end in {in_words(special, candidates)}; --eod-token says in which")
    return candidates.pop() if candidates else None


def in_words(special: Mapping[str, int], ids: Iterable[int], at_most: int = 8) -> str:
    """Tokens with their ids, for a message; the first `at_most` of them."""
    names = {i: repr(token) for token, i in special.items()}
    listed = sorted(set(ids))
    words = [f"{names[i]} (id {i})" if i in names else f"id {i}" for i in listed[:at_most]]
    return " or ".join(words) + (f" or {len(listed) - at_most} more" if len(listed) > at_most else "")


def ends_of_post_processor(post_processor: Any) -> DeclaredEnds:
    """Ids that the post-processor of a tokenizer.json puts after a text (eos) and before it (bos)."""
    declared = DeclaredEnds()
    if not isinstance(post_processor, dict):
        return declared
    for each in post_processor.get("processors") or []:
        declared |= ends_of_post_processor(each)
    if post_processor.get("type") == "TemplateProcessing":
        ids = {name: token["ids"] for name, token in post_processor["special_tokens"].items()}
        parts = [ids[part["SpecialToken"]["id"]] if "SpecialToken" in part else None for part in post_processor["single"]]
        declared |= DeclaredEnds(
            frozenset(parts[-1] or []) if parts else frozenset(), frozenset(parts[0] or []) if parts else frozenset()
        )
    if post_processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        declared |= DeclaredEnds(frozenset([post_processor["sep"][1]]), frozenset([post_processor["cls"][1]]))
    return declared


def read_config_ends(folder: Path, flag: str) -> ConfigEnds:
    """Ends that the configuration files in `folder` declare. UserError for a damaged file."""
    eos: list[str | int] = []
    bos: list[str | int] = []
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        path = folder / name
        try:
            content = json.loads(read_small(path))  # Hugging Face writes 10^30 as an integer, which parse_json refuses
            eos += _tokens(content.get("eos_token")) + _tokens(content.get("eos_token_id"))
            bos += _tokens(content.get("bos_token")) + _tokens(content.get("bos_token_id"))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise file_error(f"{flag} {folder}: {name} cannot be read: {error.strerror}", error) from None
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{flag} {folder}: {name} cannot be read: {str(error).splitlines()[0]}; mend it or take it away"
            ) from None
    return ConfigEnds(tuple(eos), tuple(bos))


def _tokens(value: Any) -> list[str | int]:
    """Tokens and ids in a JSON value: a token, an id, an AddedToken, or a list of them."""
    if isinstance(value, dict):
        value = value.get("content")
    values = value if isinstance(value, list) else [value]
    return [each for each in values if type(each) in (str, int)]
