"""From a row of a public data set to a line of a task file, with the prompt of lm-evaluation-harness 0.4.13.

Each function takes one row as the data set distributes it: as JSON or CSV of its authors, or as the parquet files on the Hugging Face hub.
ValueError says what a row lacks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_salt.small_files import one_line

Values = Mapping[str, Any]
Record = dict[str, Any]
LETTERS = "ABCDE"


# ---- what rows hold ----------------------------------------------------------------------------------------------------


def value(row: Values, *names: str) -> Any:
    """The value under the first of these names that the row has."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"it has no {' or '.join(map(repr, names))}; it has {', '.join(map(repr, row))}")


def text(row: Values, *names: str) -> str:
    """The same, which must be a string."""
    found = value(row, *names)
    if not isinstance(found, str):
        raise ValueError(f"{names[0]!r} is {one_line(found, 40)}, not a string")
    return found


def texts(found: Any, name: str) -> list[str]:
    """A list of strings."""
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{name!r} is {one_line(found, 40)}, not a list of strings")
    return found


def index(label: Any, first: int = 0) -> int:
    """The index that a label names, counted from `first`: a whole number, also as text, or a truth value."""
    if isinstance(label, bool):
        return int(label)
    try:
        if isinstance(label, float) and label != int(label):  # a soft label names no choice
            raise ValueError
        return int(label) - first
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"its label is {one_line(label, 40)!r}, no whole number: a split without labels cannot be scored; --labels names their file"
        ) from None


def of_letter(label: Any, labels: Sequence[str]) -> int:
    """The index of a label among the labels of the choices."""
    name = str(label).strip()
    if name not in labels:
        raise ValueError(f"its answer {one_line(label, 40)!r} is none of the labels {' '.join(labels)}")
    return list(labels).index(name)


def labelled_choices(row: Values) -> tuple[str, list[str], list[str]]:
    """(question, texts of the choices, their labels) of the AI2 sets: nested in `question` as distributed, flat on the hub."""
    nested = row.get("question")
    if isinstance(nested, Mapping):
        options = value(nested, "choices")
        return text(nested, "stem"), [text(one, "text") for one in options], [text(one, "label") for one in options]
    options = value(row, "choices")
    return (
        text(row, "question_stem", "question"),
        texts(value(options, "text"), "text"),
        texts(value(options, "label"), "label"),
    )


def lettered(question: str, choices: Sequence[str], gold: int) -> Record:
    """A question with its choices spelled out, whose answer is a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return {
        "context": "\n".join([question.strip(), *lines, "Answer:"]),
        "choices": list(LETTERS[: len(choices)]),
        "gold": gold,
    }


# ---- the data sets -----------------------------------------------------------------------------------------------------


def hellaswag(row: Values) -> Record:
    context = f"{text(row, 'activity_label')}: {text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}"
    endings = texts(value(row, "endings"), "endings")
    return {
        "context": _without_brackets(context),
        "choices": [_without_brackets(ending) for ending in endings],
        "gold": index(value(row, "label")),
    }


def _without_brackets(part: str) -> str:
    """WikiHow's parts carry marks in brackets, such as [header]; a [title] ends a sentence."""
    return re.sub(r"\[.*?\]", "", part.strip().replace(" [title]", ". ")).replace("  ", " ")


def piqa(row: Values) -> Record:
    choices = [text(row, "sol1"), text(row, "sol2")]
    return {"context": f"Question: {text(row, 'goal')}\nAnswer:", "choices": choices, "gold": index(value(row, "label"))}


def arc(row: Values) -> Record:
    question, choices, labels = labelled_choices(row)
    return {"context": f"Question: {question}\nAnswer:", "choices": choices, "gold": of_letter(value(row, "answerKey"), labels)}


def openbookqa(row: Values) -> Record:
    question, choices, labels = labelled_choices(row)
    return {"context": question, "choices": choices, "gold": of_letter(value(row, "answerKey"), labels)}


def commonsense_qa(row: Values) -> Record:
    question, choices, labels = labelled_choices(row)
    return lettered(f"Question: {question.strip()}", choices, of_letter(value(row, "answerKey"), labels))


def siqa(row: Values) -> Record:
    answers = [text(row, name) for name in ("answerA", "answerB", "answerC")]
    label = value(row, "label", "correct")
    gold = of_letter(label, LETTERS[:3]) if str(label).strip() in tuple(LETTERS[:3]) else index(label, first=1)
    return {"context": f"Q: {text(row, 'context')} {text(row, 'question')}\nA:", "choices": answers, "gold": gold}


def boolq(row: Values) -> Record:
    context = f"{text(row, 'passage')}\nQuestion: {text(row, 'question')}?\nAnswer:"
    return {"context": context, "choices": ["no", "yes"], "gold": index(value(row, "label", "answer"))}


def winogrande(row: Values) -> Record:
    before, blank, after = text(row, "sentence").partition("_")
    if not blank:
        raise ValueError("its sentence has no _ to fill")
    contexts = [before + text(row, option) for option in ("option1", "option2")]
    return {"contexts": contexts, "continuation": f" {after.strip()}", "gold": index(value(row, "answer"), first=1)}


def lambada(row: Values) -> Record:
    return {"passage": text(row, "text")}


def sciq(row: Values) -> Record:
    choices = [text(row, name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    context = f"{text(row, 'support').lstrip()}\nQuestion: {text(row, 'question')}\nAnswer:"
    return {"context": context, "choices": choices, "gold": 3}


def mmlu(row: Values) -> Record:
    """`subject` is the file's name where the row has none."""
    choices = texts(value(row, "choices"), "choices") if "choices" in row else [text(row, letter) for letter in LETTERS[:4]]
    answer = value(row, "answer")
    gold = of_letter(answer, LETTERS[:4]) if str(answer).strip() in tuple(LETTERS[:4]) else index(answer)
    subject = text(row, "subject").replace("_", " ")
    description = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return lettered(text(row, "question"), choices, gold) | {"description": description}


def race(row: Values) -> Record:
    """All questions on an article; the last is asked, the others come before it with their answers."""
    problems = value(row, "problems")
    problems = ast.literal_eval(problems) if isinstance(problems, str) else problems
    *solved, asked = [
        (text(one, "question"), texts(value(one, "options"), "options"), value(one, "answer")) for one in problems
    ]
    context = f"Article: {text(row, 'article')}\n\n"
    for question, options, answer in solved:
        right = options[of_letter(answer, LETTERS[: len(options)])]
        if question.endswith("  _  ."):  # the blank at the end of a sentence is filled
            context += f"{question[:-5]}{right}\n"
        else:
            context += f"Question: {question}\nAnswer: {right}\n"
    question, options, answer = asked
    return {"context": context + question, "choices": options, "gold": of_letter(answer, LETTERS[: len(options)])}


def race_articles(rows: Sequence[Values]) -> list[Values]:
    """Rows with all questions on an article each, from files with a question a row (the hub's) or lists of each part (the authors')."""
    articles: dict[str, Record] = {}
    for row in rows:
        if "problems" in row:
            articles[f"{len(articles)}"] = dict(row)
            continue
        name = text(row, "id", "example_id")
        article = articles.setdefault(name, {"article": text(row, "article"), "problems": []})
        questions = value(row, "questions", "question")
        options, answers = value(row, "options"), value(row, "answers", "answer")
        if isinstance(questions, str):
            questions, options, answers = [questions], [options], [answers]
        article["problems"] += [
            {"question": question, "options": list(choices), "answer": answer}
            for question, choices, answer in zip(questions, options, answers, strict=True)
        ]
    return list(articles.values())
