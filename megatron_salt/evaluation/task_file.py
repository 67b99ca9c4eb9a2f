"""Likelihood tasks from local JSONL files: one example a line, all lines of a file in one form. Pure.

choices:       {"context": C, "choices": [A, B, ...], "gold": 1}       which choice is likeliest after the context
continuation:  {"context": C, "continuation": " text"}                 whether the model, greedily, would write the continuation
passage:       {"passage": P}                                          the same for the passage's last word
contexts:      {"contexts": [A, B, ...], "continuation": " text", "gold": 0}   after which context the continuation is likeliest

`gold` is the index of the right choice. A choice follows its context after a space; "delimiter" gives another text. Both "context" and
"delimiter" may be empty. "description" is a text before the examples of --shots and the context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_salt.errors import UserError
from megatron_salt.small_files import one_line, parse_json, read_small

Form = Literal["choices", "continuation", "passage", "contexts"]

_KEYS: dict[Form, tuple[set[str], set[str]]] = {  # keys that a line must have, and others that it may have
    "choices": ({"choices", "gold"}, {"context", "delimiter", "description"}),
    "continuation": ({"continuation"}, {"context", "description"}),
    "passage": ({"passage"}, {"description"}),
    "contexts": ({"contexts", "continuation", "gold"}, {"description"}),
}
BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line of a task file."""

    line: int
    """From 1."""
    pairs: tuple[tuple[str, str], ...]
    """(context, continuation) of each answer; the log-likelihood of the continuation is asked for. One pair in the greedy forms."""
    answers: tuple[str, ...]
    """The text of each answer, whose characters and bytes are counted: a choice without its delimiter."""
    gold: int
    """Index of the right answer; 0 in the greedy forms."""
    description: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task file."""

    name: str
    """Name of the file without its suffix."""
    path: str
    form: Form
    examples: tuple[Example, ...]
    sha256: str
    """Of the file."""

    @property
    def is_greedy(self) -> bool:
        """Whether an example has one answer, which the model writes or not, rather than several to choose from."""
        return self.form in ("continuation", "passage")


def read_tasks(paths: Sequence[str], flag_name: str = "--tasks") -> list[Task]:
    """The tasks of these files. Raises UserError: also where two have one name."""
    tasks = [read_task(path, flag_name) for path in paths]
    first: dict[str, str] = {}
    for task in tasks:
        if task.name in first:
            raise UserError(
                f"{flag_name}: {first[task.name]} and {task.path} are both named {task.name}; rename one of the files"
            )
        first[task.name] = task.path
    return tasks


def read_task(path: str, flag_name: str = "--tasks") -> Task:
    """The task in a file. Raises UserError, which names the file and the line."""
    try:
        content = read_small(Path(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{flag_name} {path} cannot be read: {reason}") from None
    form: Form | None = None
    examples = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            own = form_of(record)
            if form not in (None, own):
                raise ValueError(f"it has the form {own!r}, the lines before it {form!r}")
            form = own
            examples.append(example_of(record, own, number))
        except ValueError as error:
            raise UserError(f"{flag_name} {path}, line {number}: {error}") from None
    if form is None:
        raise UserError(f"{flag_name} {path} has no examples")
    return Task(
        name=Path(path).name.removesuffix(".jsonl"), path=path, form=form, examples=tuple(examples),
        sha256=hashlib.sha256(content).hexdigest(),
    )  # fmt: skip


def form_of(record: Any) -> Form:
    """The form of a line. Raises ValueError where it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"an example is a JSON object, not {one_line(record, 40)}")
    names = set(record)
    form: Form = "continuation"
    if "passage" in names:
        form = "passage"
    elif "choices" in names:
        form = "choices"
    elif "contexts" in names:
        form = "contexts"
    needed, others = _KEYS[form]
    if missing := needed - names:
        raise ValueError(f"it lacks {', '.join(map(repr, sorted(missing)))}")
    if unknown := names - needed - others:
        raise ValueError(
            f"{', '.join(map(repr, sorted(unknown)))} do not belong to the form {form!r}, which has "
            f"{', '.join(sorted(needed))} and may have {', '.join(sorted(others))}"
        )
    return form


def example_of(record: dict[str, Any], form: Form, line: int) -> Example:
    """The example in a line of this form. Raises ValueError."""
    texts = {name: _text(record, name) for name in ("context", "continuation", "passage", "description")}
    gold = 0
    if form == "choices":
        answers = _texts(record, "choices")
        delimiter = _text(record, "delimiter") if "delimiter" in record else " "
        pairs = tuple((texts["context"], delimiter + answer) for answer in answers)
    elif form == "contexts":
        contexts = _texts(record, "contexts")
        pairs = tuple((context, texts["continuation"]) for context in contexts)
        answers = (texts["continuation"],) * len(contexts)
    elif form == "passage":
        before, space, word = texts["passage"].rpartition(" ")
        if not word.strip():
            raise ValueError("the passage has no last word: it is empty, or ends in white space")
        pairs, answers = ((before, space + word),), (word,)
    else:
        pairs, answers = ((texts["context"], texts["continuation"]),), (texts["continuation"],)
    if form in ("choices", "contexts"):
        gold = record["gold"]
        if type(gold) is not int or not 0 <= gold < len(pairs):
            written = one_line(json.dumps(gold), 40)  # "1" is not 1
            raise ValueError(f"'gold' is {written}, which is no index of the {len(pairs)} {form}, from 0")
    if empty := [number for number, (_, continuation) in enumerate(pairs) if not continuation.strip()]:
        raise ValueError(f"the continuation is empty in answer {empty[0]}" if len(pairs) > 1 else "the continuation is empty")
    if not all(answers):
        raise ValueError(f"answer {answers.index('')} is empty")
    return Example(line=line, pairs=pairs, answers=tuple(answers), gold=gold, description=texts["description"])


def read_shots(count: int, paths: Sequence[str], num_tasks: int, flag_name: str = "--tasks") -> list[Task | None]:
    """The file of solved examples of each task; None for all where `count`, the examples to show, is 0. Raises UserError."""
    if count == 0:
        return [None] * num_tasks
    if len(paths) != num_tasks:
        raise UserError(
            f"{shot_flag('shots', flag_name)} {count} needs a {shot_flag('shot-file', flag_name)} for each of {num_tasks} {flag_name}, "
            f"got {len(paths)}"
        )
    return [read_task(path, shot_flag("shot-file", flag_name)) for path in paths]


def shot_flag(name: str, flag_name: str) -> str:
    """The flag "shots" or "shot-file" of the tasks of a flag: --shots of --tasks, --eval-tasks-shots of --eval-tasks."""
    return f"--{name}" if flag_name == "--tasks" else f"{flag_name}-{name}"


def with_shots(task: Task, shots: Task, count: int, flag_name: str = "--tasks") -> list[tuple[tuple[str, str], ...]]:
    """The pairs of each example with solved examples before its context: the first `count` of `shots` that are not the example itself.

    flag_name: the flag that named the task. Raises UserError where `shots` has fewer, or is of another form.
    """
    file = f"{shot_flag('shot-file', flag_name)} {shots.path}"
    if shots.form != task.form:
        raise UserError(f"{file} has the form {shots.form!r}, {flag_name} {task.path} {task.form!r}")
    kinds = [(shot.pairs, shot.gold) for shot in shots.examples]
    solved = [_solved(shot) for shot in shots.examples]
    result = []
    for example in task.examples:
        own = (example.pairs, example.gold)
        chosen = [text for kind, text in zip(kinds[: count + 1], solved, strict=False) if kind != own]
        if len(chosen) < count and len(kinds) > count + 1:  # the file repeats this example
            chosen = [text for kind, text in zip(kinds, solved, strict=True) if kind != own]
        if len(chosen) < count:
            raise UserError(
                f"{shot_flag('shots', flag_name)} {count}: {file} has {len(chosen)} examples other than line {example.line} of {task.path}"
            )
        before = example.description + "".join(chosen[:count])
        result.append(tuple((before + context, continuation) for context, continuation in example.pairs))
    return result


def without_shots(task: Task) -> list[tuple[tuple[str, str], ...]]:
    """The pairs of each example, after its description."""
    return [tuple((one.description + context, continuation) for context, continuation in one.pairs) for one in task.examples]


def _solved(shot: Example) -> str:
    context, continuation = shot.pairs[shot.gold]
    return context + continuation + BETWEEN_SHOTS


def _text(record: dict[str, Any], name: str) -> str:
    """A text of the record; empty where it has none of this name."""
    value = record.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {one_line(value, 40)}, not a string")
    _refuse_surrogates((value,), name)
    return value


def _texts(record: dict[str, Any], name: str) -> tuple[str, ...]:
    values = record[name]
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name!r} is a list of at least 2 strings, not {one_line(values, 40)}")
    _refuse_surrogates(values, name)
    return tuple(values)


def _refuse_surrogates(values: Iterable[str], name: str) -> None:
    try:
        for value in values:
            value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} has half of a surrogate pair, which is no character") from None
