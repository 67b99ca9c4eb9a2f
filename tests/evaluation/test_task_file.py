"""Task files: four forms, solved examples before a context, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_salt.errors import UserError
from megatron_salt.evaluation.task_file import read_task, read_tasks, with_shots, without_shots


def write(path: Path, *records: object) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


CHOICES = {"context": "Q: Is it dry?\nA:", "choices": ["no", "yes"], "gold": 1}


def test_choices_follow_the_context_after_a_space(tmp_path):
    task = read_task(
        write(tmp_path / "dry.jsonl", CHOICES, "", {"context": "Le", "choices": ["é", "a"], "gold": 0, "delimiter": ""})
    )
    assert (task.name, task.form, task.is_greedy) == ("dry", "choices", False)
    first, second = task.examples
    assert first.pairs == (("Q: Is it dry?\nA:", " no"), ("Q: Is it dry?\nA:", " yes"))
    assert first.answers == ("no", "yes") and first.gold == 1 and first.line == 1
    assert second.pairs == (("Le", "é"), ("Le", "a")) and second.line == 3


def test_a_continuation_is_taken_as_it_stands(tmp_path):
    task = read_task(write(tmp_path / "next.jsonl", {"context": "one two", "continuation": " three"}, {"continuation": "x"}))
    assert (task.form, task.is_greedy) == ("continuation", True)
    assert [one.pairs for one in task.examples] == [(("one two", " three"),), (("", "x"),)]


def test_of_a_passage_the_last_word_is_asked(tmp_path):
    task = read_task(write(tmp_path / "last.jsonl", {"passage": "The cat sat\non the mat"}, {"passage": "Ende"}))
    assert [one.pairs for one in task.examples] == [(("The cat sat\non the", " mat"),), (("", "Ende"),)]
    assert task.examples[0].answers == ("mat",)


def test_several_contexts_share_one_continuation(tmp_path):
    record = {
        "contexts": ["The jar broke since the jar", "The jar broke since the floor"],
        "continuation": " was hard.",
        "gold": 1,
    }
    [example] = read_task(write(tmp_path / "hard.jsonl", record)).examples
    assert example.pairs == tuple((context, " was hard.") for context in record["contexts"])
    assert example.gold == 1


def test_shots_stand_before_the_context_and_never_hold_the_example_itself(tmp_path):
    records = [
        {"context": f"{number}?", "choices": ["a", "b"], "gold": number % 2, "description": "Letters.\n\n"}
        for number in range(4)
    ]
    task = read_task(write(tmp_path / "letters.jsonl", *records))
    assert without_shots(task)[0][0] == ("Letters.\n\n0?", " a")
    shown = [pairs[0][0] for pairs in with_shots(task, task, 2)]
    zero, one, two = "0? a\n\n", "1? b\n\n", "2? a\n\n"
    assert shown == [
        f"Letters.\n\n{before}{number}?" for number, before in enumerate((one + two, zero + two, zero + one, zero + one))
    ]
    with pytest.raises(UserError, match=r"--shots 4: --shot-file .* has 3 examples other than line 1 of .*letters\.jsonl"):
        with_shots(task, task, 4)
    other = read_task(write(tmp_path / "other.jsonl", {"continuation": "x"}))
    with pytest.raises(UserError, match=r"--shot-file .*other\.jsonl has the form 'continuation', --tasks .* 'choices'"):
        with_shots(task, other, 1)


def test_a_shot_file_that_repeats_an_example_still_gives_others(tmp_path):
    task = read_task(write(tmp_path / "one.jsonl", CHOICES))
    others = [CHOICES | {"context": f"{number}"} for number in range(2)]
    shots = read_task(write(tmp_path / "shots.jsonl", CHOICES, CHOICES, *others))
    assert with_shots(task, shots, 2)[0][0][0] == "0 yes\n\n1 yes\n\nQ: Is it dry?\nA:"


@pytest.mark.parametrize(
    "record, complaint",
    [
        ("{", "line 2: "),
        ("[1]", r"line 2: an example is a JSON object, not \[1\]"),
        ({"context": "x", "choices": ["a", "b"]}, "line 2: it lacks 'gold'"),
        ({"context": "x"}, "line 2: it lacks 'continuation'"),
        (CHOICES | {"gold": 2}, "line 2: 'gold' is 2, which is no index of the 2 choices, from 0"),
        (CHOICES | {"gold": "1"}, "line 2: 'gold' is \"1\", which is no index"),
        (CHOICES | {"gold": True}, "line 2: 'gold' is true, which is no index"),
        (CHOICES | {"choices": ["a"]}, "line 2: 'choices' is a list of at least 2 strings"),
        (CHOICES | {"choices": ["a", ""]}, "line 2: the continuation is empty in answer 1"),
        (CHOICES | {"choices": ["a", ""], "delimiter": "A"}, "line 2: answer 1 is empty"),
        (CHOICES | {"label": 1}, "line 2: 'label' do not belong to the form 'choices'"),
        (CHOICES | {"context": 3}, "line 2: 'context' is 3, not a string"),
        ('{"context": "\\ud800", "choices": ["a", "b"], "gold": 1}', "line 2: 'context' has half of a surrogate pair"),
        ({"context": "x", "continuation": ""}, "line 1: the continuation is empty"),
        ({"passage": "ends in "}, "line 1: the passage has no last word"),
        ({"continuation": "x"}, "line 2: it has the form 'continuation', the lines before it 'choices'"),
    ],
)
def test_a_mistake_is_refused_with_file_and_line(tmp_path, record, complaint):
    path = write(tmp_path / "task.jsonl", *[CHOICES] * complaint.startswith("line 2"), record)
    with pytest.raises(UserError, match=rf"--tasks {path}, {complaint}") as refused:
        read_task(path)
    assert "\n" not in str(refused.value)


def test_tasks_have_different_names_and_at_least_one_example(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write(folder / "same.jsonl", CHOICES) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(UserError, match=r"--tasks: .*same\.jsonl and .*other/same\.jsonl are both named same; rename"):
        read_tasks(paths)
    with pytest.raises(UserError, match=r"--tasks .*empty\.jsonl has no examples"):
        read_tasks([write(tmp_path / "empty.jsonl", "", "  ")])
    with pytest.raises(UserError, match=r"--tasks .*absent\.jsonl cannot be read: No such file"):
        read_tasks([str(tmp_path / "absent.jsonl")])
