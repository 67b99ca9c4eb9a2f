"""Which tokens stand between documents: the one that ends them (eod) and the one that may begin them (BOS).

A token that only looks like an end, such as `</s>` where it is an HTML tag, is none: candidates are special tokens. In this order:
1) --eod-token. 2) The one special token named <eod> or <EOD>. 3) The one special token with another name of an end. 4) Of several
such, or without any, the one that the tokenizer declares: eos_token in tokenizer_config.json or special_tokens_map.json,
eos_token_id in generation_config.json, the token that a tokenizer.json's post-processor appends. A chat tokenizer declares the end
of a turn, so one that has a name of an end keeps it; a list of ids decides if exactly one of them is a candidate.
Whatever that leaves open is refused with the candidates. SentencePiece declares its eos; a piece named as an end comes before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_salt.errors import UserError
from megatron_salt.small_files import read_small

DOCUMENT = ("<eod>", "<EOD>")
"""Names that mean nothing but the end of a document."""
TEXT = ("<|endoftext|>",)
OTHERS = ("<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")  # noqa: RUF001  (DeepSeek's)


@dataclass(frozen=True)
class Ends:
    """Ids; None: the tokenizer has none."""

    eod: int | None
    bos: int | None


@dataclass(frozen=True)
class Declared:
    """What files say about a tokenizer's ends, as ids."""

    eos: frozenset[int] = frozenset()
    bos: frozenset[int] = frozenset()

    def __or__(self, other: Declared) -> Declared:
        return Declared(self.eos | other.eos, self.bos | other.bos)


@dataclass(frozen=True)
class Beside:
    """What the files beside a tokenizer.json declare: tokens, or ids."""

    eos: tuple[str | int, ...] = field(default=())
    bos: tuple[str | int, ...] = field(default=())


def find_eod(special: Mapping[str, int], names: Iterable[tuple[str, ...]], declared: frozenset[int], origin: str) -> int | None:
    """The id that ends documents, by rules 2 to 4. special: all special tokens; names: groups of names of ends, best first.

    Raises UserError, with the candidates, where several are as good as each other.
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
    """Tokens with their ids, for a message."""
    names = {i: repr(token) for token, i in special.items()}
    listed = sorted(set(ids))
    words = [f"{names[i]} (id {i})" if i in names else f"id {i}" for i in listed[:at_most]]
    return " or ".join(words) + (f" or {len(listed) - at_most} more" if len(listed) > at_most else "")


def of_template(post_processor: Any) -> Declared:
    """What a tokenizer.json's post-processor puts after a text and before it."""
    found = Declared()
    if not isinstance(post_processor, dict):
        return found
    for each in post_processor.get("processors") or []:
        found |= of_template(each)
    if post_processor.get("type") == "TemplateProcessing":
        ids = {name: token["ids"] for name, token in post_processor["special_tokens"].items()}
        parts = [ids[part["SpecialToken"]["id"]] if "SpecialToken" in part else None for part in post_processor["single"]]
        found |= Declared(
            frozenset(parts[-1] or []) if parts else frozenset(), frozenset(parts[0] or []) if parts else frozenset()
        )
    if post_processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        found |= Declared(frozenset([post_processor["sep"][1]]), frozenset([post_processor["cls"][1]]))
    return found


def read_beside(folder: Path, flag: str) -> Beside:
    """What a folder's configuration files declare. UserError for one that is damaged."""
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
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{flag} {folder}: {name} cannot be read: {str(error).splitlines()[0]}; mend it or take it away"
            ) from None
    return Beside(tuple(eos), tuple(bos))


def _tokens(value: Any) -> list[str | int]:
    """A token, an id, an AddedToken as JSON, or a list of any."""
    if isinstance(value, dict):
        value = value.get("content")
    values = value if isinstance(value, list) else [value]
    return [each for each in values if type(each) in (str, int)]
