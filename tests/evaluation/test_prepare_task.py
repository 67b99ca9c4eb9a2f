"""Public data sets become task files: the prompts of lm-evaluation-harness, from every kind of file in which the sets are distributed."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.evaluation.public_tasks.formats import FORMATS
from megatron_salt.evaluation.task_file import Task, read_task
from megatron_salt.tools import prepare_task as tool
from tests.evaluation.public_rows import ROWS


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(name: str, output: Path, *words: object) -> Task:
    assert tool.main([name, "--output", str(output), *map(str, words)]) == 0
    return read_task(str(output))


def prepared(name: str, folder: Path) -> Task:
    return prepare(name, folder / f"{name}.jsonl", "--input", write_jsonl(folder / "rows.jsonl", ROWS[name]))


# ---- prompts -----------------------------------------------------------------------------------------------------------

PROMPTS: dict[str, tuple[str, list[str], int]] = {
    "hellaswag": ("Baking: How to bake bread. Mix the dough. The baker",
                  [" waits an hour.", " sings a song loudly.", " buys a ship.", " leaves."], 0),
    "piqa": ("Question: To keep bread fresh,\nAnswer:", [" wrap it in a cloth.", " wrap it in water."], 0),
    "arc": ("Question: What gives light by day?\nAnswer:", [" a lamp", " a spoon", " the sun", " a stone"], 2),
    "openbookqa": ("Soup is eaten with", [" a lamp", " a spoon", " the sun", " a stone"], 1),
    "commonsense_qa": ("Question: Where would a cat sleep?\nA. a river\nB. a fire\nC. a shoe rack\nD. a road\nE. a basket\nAnswer:",
                       [" A", " B", " C", " D", " E"], 4),
    "siqa": ("Q: Kim lent Lou a coat. How does Lou feel?\nA:", [" cold", " thankful", " hungry"], 1),
    "boolq": ("Basalt is a dark rock.\nQuestion: is basalt white?\nAnswer:", [" no", " yes"], 0),
    "lambada": ("He looked for the key all day, and in the evening his daughter found the", [" key"], 0),
    "sciq": ("Plants breathe too.\nQuestion: What do plants take from air?\nAnswer:", [" sand", " wood", " iron", " carbon dioxide"], 3),
    "mmlu": ("Which number is even?\nA. one\nB. two\nC. three\nD. five\nAnswer:", [" A", " B", " C", " D"], 1),
    "race": ("Article: Ann has a dog. It is old.\n\nAnn has a dog\nQuestion: Who is old?\nAnswer: The dog\nThe dog is  _  .",
             [" new", " red", " old", " gone"], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_is_that_of_the_table(name: str, tmp_path: Path) -> None:
    context, continuations, gold = PROMPTS[name]
    example = prepared(name, tmp_path).examples[0]
    assert example.pairs == tuple((context, continuation) for continuation in continuations)
    assert example.gold == gold


def test_winogrande_asks_for_the_rest_of_the_sentence_after_both_options(tmp_path: Path) -> None:
    task = prepared("winogrande", tmp_path)
    assert task.form == "contexts" and task.examples[0].gold == 0
    assert task.examples[0].pairs == tuple(
        (f"The cup fell on the rug but the {option}", " did not break.") for option in ("cup", "rug")
    )


def test_mmlu_begins_with_its_subject(tmp_path: Path) -> None:
    described = prepared("mmlu", tmp_path).examples[0].description
    assert described == "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"


# ---- against lm-evaluation-harness -------------------------------------------------------------------------------------

YAML = {
    "hellaswag": "hellaswag/hellaswag.yaml", "piqa": "piqa/piqa.yaml", "arc": "arc/arc_easy.yaml", "race": "race/race.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml", "commonsense_qa": "commonsense_qa/default.yaml", "siqa": "siqa/siqa.yaml",
    "boolq": "super_glue/boolq/default.yaml", "winogrande": "winogrande/default.yaml", "lambada": "lambada/lambada_openai.yaml",
    "sciq": "sciq/sciq.yaml", "mmlu": "mmlu/default/_default_template_yaml",
}  # fmt: skip


def lm_eval_folder() -> Path:
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None or importlib.util.find_spec("jinja2") is None:
        pytest.skip("lm-eval is not installed")
    return Path(found.origin).parent / "tasks"


def resolver(file: Path) -> Callable[[Any, Mapping[str, Any]], Any]:
    """How lm-eval resolves a field of the task in a file: a function beside it, a column, or a template."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)

    def resolve(field: Any, row: Mapping[str, Any]) -> Any:
        if isinstance(field, str) and field.startswith("!function "):
            module_name, _, function = field.removeprefix("!function ").partition(".")
            spec = importlib.util.spec_from_file_location(module_name, file.parent / f"{module_name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, function)(row)
        if isinstance(field, str) and field in row:
            return row[field]
        rendered = environment.from_string(field).render(**row) if isinstance(field, str) else field
        if isinstance(rendered, str) and rendered.startswith("["):
            return environment.compile_expression(field.strip("{} "))(**row)
        return int(rendered) if isinstance(rendered, str) and rendered.isdigit() else rendered

    return resolve


@pytest.mark.parametrize("name", YAML)
def test_lm_evaluation_harness_asks_the_same(name: str, tmp_path: Path) -> None:
    folder = lm_eval_folder()
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML in which a function stays a name."""

    Loader.add_constructor("!function", lambda loader, node: "!function " + loader.construct_scalar(node))
    file = folder / YAML[name]
    fields, resolve = yaml.load(file.read_text(), Loader), resolver(file)
    if name == "hellaswag":
        pytest.importorskip("datasets")
    task = prepared(name, tmp_path)
    for row, example in zip(ROWS[name], task.examples, strict=True):
        if isinstance(row.get("question"), dict) or (name == "boolq" and "answer" in row):
            continue  # as the authors distribute it; lm-eval reads the hub's form
        if name == "hellaswag":
            row = OneRow(row).map_by(resolve(fields["process_docs"], OneRow(row)))
        choices = resolve(fields.get("doc_to_choice"), row) if "doc_to_choice" in fields else None
        asked, target = resolve(fields["doc_to_text"], row), resolve(fields["doc_to_target"], row)
        if name == "winogrande":
            assert example.pairs == tuple((context, " " + target) for context in choices) and example.gold == asked
        elif choices is None:
            assert example.pairs == ((asked, target),)
        else:
            assert example.pairs == tuple((asked, " " + choice) for choice in choices)
            assert example.gold == (choices.index(target) if target in choices else int(target))


class OneRow(dict):
    """A data set of one row, as a process_docs function takes it."""

    def map(self, function: Callable[[dict], dict]) -> dict:
        return dict(self) | function(dict(self))

    def map_by(self, found: dict) -> dict:
        return found


# ---- files on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_parquet_gives_the_same_as_json_lines(name: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    flat = [row for row in ROWS[name] if not isinstance(row.get("question"), dict)][:1]
    path = tmp_path / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(flat), path)
    assert prepare(name, tmp_path / "task.jsonl", "--input", path).examples == prepared(name, tmp_path).examples[:1]


@pytest.mark.parametrize(
    "name, key, labels", [("piqa", "label", "0\n1\n"), ("siqa", "label", "2\n"), ("winogrande", "answer", "1\n")]
)
def test_labels_may_stand_in_a_file_of_their_own(name: str, key: str, labels: str, tmp_path: Path) -> None:
    rows = [{field: value for field, value in row.items() if field != key} for row in ROWS[name]]
    (tmp_path / "dev-labels.lst").write_text(labels)
    source = write_jsonl(tmp_path / "dev.jsonl", rows)
    task = prepare(name, tmp_path / "task.jsonl", "--input", source, "--labels", tmp_path / "dev-labels.lst")
    assert task.examples == prepared(name, tmp_path).examples


def test_mmlu_is_read_from_its_authors_files(tmp_path: Path) -> None:
    path = tmp_path / "elementary_mathematics_test.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerow([" Which number is even?", "one", "two", "three", "five", "B"])
    assert prepare("mmlu", tmp_path / "task.jsonl", "--input", path).examples == prepared("mmlu", tmp_path).examples


@pytest.mark.parametrize("header", ["question,A,B,C,D,answer", ",Question,Subject,A,B,C,D,Answer"])
def test_a_header_in_a_file_of_mmlu_is_named(header: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "anatomy_test.csv", tmp_path / "task.jsonl"
    path.write_text(f"\ufeff{header}\nWhich?,one,two,three,five,B\n", encoding="utf-8")
    assert tool.main(["mmlu", "--input", str(path), "--output", str(output)]) == 2
    err = capsys.readouterr().err
    assert f"{path}, line 1 is a header ({header.replace(',', ', ')}); this data set" in err and err.count("\n") == 1
    path.write_text("question,answer it,two,three,five,B\nWhich?,Question,two,three,Answer now,B\n")
    assert len(prepare("mmlu", output, "--input", path).examples) == 2


def test_race_is_read_from_its_authors_files_and_from_the_hubs(tmp_path: Path) -> None:
    questions = ["Ann has a  _  .", "Who is old?", "The dog is  _  ."]
    options = [["cat", "dog", "cow", "hen"], ["Ann", "The dog", "A cat", "Nobody"], ["new", "red", "old", "gone"]]
    own = {
        "id": "high1.txt",
        "article": ROWS["race"][0]["article"],
        "questions": questions,
        "options": options,
        "answers": list("BBC"),
    }
    (tmp_path / "1.txt").write_text(json.dumps(own))
    rows = [
        {"example_id": "high1.txt", "article": own["article"], "question": question, "options": choices, "answer": answer}
        for question, choices, answer in zip(questions, options, "BBC", strict=True)
    ]
    expected = prepared("race", tmp_path).examples
    assert prepare("race", tmp_path / "own.jsonl", "--input", tmp_path / "1.txt").examples == expected
    hub = write_jsonl(tmp_path / "rows2.jsonl", rows)
    assert prepare("race", tmp_path / "hub.jsonl", "--input", hub).examples == expected


def test_a_text_is_a_passage_a_line_and_json_may_be_an_array(tmp_path: Path) -> None:
    (tmp_path / "lambada.txt").write_text("one two\n\nthree four\n")
    task = prepare("lambada", tmp_path / "l.jsonl", "--input", tmp_path / "lambada.txt")
    assert [one.pairs for one in task.examples] == [(("one", " two"),), (("three", " four"),)]
    (tmp_path / "test.json").write_text(json.dumps(ROWS["sciq"]))
    assert (
        prepare("sciq", tmp_path / "s.jsonl", "--input", tmp_path / "test.json").examples == prepared("sciq", tmp_path).examples
    )


# ---- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        (
            "piqa",
            '{"goal": "x", "sol1": "a", "sol2": "b"}',
            "rows.jsonl, line 1: it has no 'label'; it has 'goal', 'sol1', 'sol2'",
        ),
        ("hellaswag", json.dumps(ROWS["hellaswag"][0] | {"label": ""}), "line 1: its label is '', no whole number"),
        ("hellaswag", json.dumps(ROWS["hellaswag"][0] | {"label": 1.6}), "line 1: its label is '1.6', no whole number"),
        ("arc", json.dumps(ROWS["arc"][0] | {"answerKey": "E"}), "line 1: its answer 'E' is none of the labels A B C D"),
        ("winogrande", json.dumps(ROWS["winogrande"][0] | {"sentence": "No blank."}), "line 1: its sentence has no _ to fill"),
        ("piqa", json.dumps(ROWS["piqa"][0] | {"label": 2}), "line 1: 'gold' is 2, which is no index of the 2 choices"),
        ("piqa", json.dumps(ROWS["piqa"][0]) + "\nnot JSON", "line 2 is not JSON"),
        ("piqa", "[1]", "line 1 is not a JSON object"),
        ("piqa", "", "has no rows"),
        ("race", json.dumps({"article": "x", "problems": "[("}), "line 1: "),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(
    name: str, content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert tool.main([name, "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "task.jsonl")]) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1, err
    assert not (tmp_path / "task.jsonl").exists()


def test_flags_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", ROWS["piqa"])
    (tmp_path / "labels").write_text("0\n")
    output, folder = tmp_path / "task.jsonl", tmp_path / "folder.jsonl"
    folder.mkdir()
    for words, complaint in (
        (["piqqa", "--input", source, "--output", output], "piqqa is no data set (did you mean piqa?)"),
        (["piqa", "--input", source, "--output", tmp_path / "task"], "must end in .jsonl: the task is named after it"),
        (["piqa", "--input", source, "--output", output, "--labels", tmp_path / "labels"], "has 1 labels, --input"),
        (
            ["arc", "--input", source, "--output", output, "--labels", tmp_path / "labels"],
            "--labels: the labels of arc stand in its own",
        ),
        (
            ["piqa", "--input", source, "--output", output, "--labels", tmp_path / "no.lst"],
            f"--labels {tmp_path / 'no.lst'} cannot be",
        ),
        (["piqa", "--input", tmp_path / "absent", "--output", output], "absent: no such file"),
        (["piqa", "--input", source, "--output", folder], "folder.jsonl is a directory; give the name of a file"),
        (["piqa", "--input", source, "--output", folder, "--overwrite"], "folder.jsonl is a directory"),
        (["piqa", "--input", source, "--output", source], "rows.jsonl exists; --overwrite replaces it"),
    ):
        assert tool.main([str(word) for word in words]) == 2
        assert complaint in capsys.readouterr().err
    assert len(FORMATS) == len(ROWS) == 12
