"""Rows in the shape of the public data sets, in sentences of our own."""

from __future__ import annotations

from typing import Any

_FLAT = {"text": ["a lamp", "a spoon", "the sun", "a stone"], "label": ["A", "B", "C", "D"]}
_NESTED = [{"text": text, "label": label} for text, label in zip(_FLAT["text"], _FLAT["label"], strict=True)]

ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {
            "activity_label": "Baking", "ctx_a": "[header] How to bake bread [title] Mix the dough.", "ctx_b": "the baker",
            "endings": ["waits an hour.", "sings  a song [step] loudly.", "buys a ship.", "leaves."], "label": "0",
        },
        {
            "activity_label": "Rowing", "ctx_a": "Two women sit in a boat.", "ctx_b": "they", "label": 3,
            "endings": ["fly.", "melt.", "bark.", "row to the shore."],
        },
    ],
    "piqa": [
        {"goal": "To keep bread fresh,", "sol1": "wrap it in a cloth.", "sol2": "wrap it in water.", "label": 0},
        {"goal": "To dry a plate,", "sol1": "use rain.", "sol2": "use a towel.", "label": 1},
    ],
    "arc": [
        {"id": "1", "question": "What gives light by day?", "choices": _FLAT, "answerKey": "C"},
        {"id": "2", "question": {"stem": "What gives light by night?", "choices": _NESTED}, "answerKey": "A"},
    ],
    "openbookqa": [
        {"question_stem": "Soup is eaten with", "choices": _FLAT, "answerKey": "B"},
        {"question": {"stem": "What sinks is", "choices": _NESTED}, "answerKey": "D"},
    ],
    "commonsense_qa": [
        {
            "question": "Where would a cat sleep? ", "answerKey": "E",
            "choices": {"label": list("ABCDE"), "text": ["a river", "a fire", "a shoe rack", "a road", "a basket"]},
        }
    ],
    "siqa": [
        {
            "context": "Kim lent Lou a coat.", "question": "How does Lou feel?", "answerA": "cold", "answerB": "thankful",
            "answerC": "hungry", "label": "2",
        }
    ],
    "boolq": [
        {"passage": "Basalt is a dark rock.", "question": "is basalt white", "label": 0},
        {"passage": "Ebony is a dark wood.", "question": "is ebony dark", "answer": True},
    ],
    "winogrande": [
        {"sentence": "The cup fell on the rug but the _ did not break.", "option1": "cup", "option2": "rug", "answer": "1"}
    ],
    "lambada": [{"text": "He looked for the key all day, and in the evening his daughter found the key"}],
    "sciq": [
        {
            "question": "What do plants take from air?", "distractor1": "sand", "distractor2": "wood", "distractor3": "iron",
            "correct_answer": "carbon dioxide", "support": " Plants breathe too.",
        }
    ],
    "mmlu": [
        {
            "question": " Which number is even?", "choices": ["one", "two", "three", "five"], "answer": 1,
            "subject": "elementary_mathematics",
        }
    ],
    "race": [
        {
            "article": "Ann has a dog. It is old.",
            "problems": (
                "[{'question': 'Ann has a  _  .', 'options': ['cat', 'dog', 'cow', 'hen'], 'answer': 'B'}, "
                "{'question': 'Who is old?', 'options': ['Ann', 'The dog', 'A cat', 'Nobody'], 'answer': 'B'}, "
                "{'question': 'The dog is  _  .', 'options': ['new', 'red', 'old', 'gone'], 'answer': 'C'}]"
            ),
        }
    ],
}  # fmt: skip
