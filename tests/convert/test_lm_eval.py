"""lm-eval reads what is exported: it finds the same log-likelihoods in the export of an imported model as in its source.

lm-eval runs as from its command line, in a process of its own, without a network, on the tasks of lm_eval_tasks/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.conftest import convert_in_rank, run_module

TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ("local_questions", "local_last_words", "local_whole_texts")
LM_EVAL = """
import sys
from lm_eval.__main__ import cli_evaluate

for model, out in zip(sys.argv[1::2], sys.argv[2::2]):  # one process, since its imports take longer than its work
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--include_path", ".",
                "--tasks", TASKS, "--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", out]
    cli_evaluate()
"""


def log_likelihoods(out: Path) -> dict[tuple[str, int], list[float]]:
    """{(task, document): a log-likelihood for each answer} that lm-eval wrote below `out`."""
    found = {}
    for name in NAMES:
        [path] = out.rglob(f"samples_{name}_*.jsonl")
        for row in map(json.loads, path.read_text().splitlines()):
            answers = [
                answer for [answer] in row["resps"]
            ]  # of a whole text a number, else a number and whether it is the likeliest
            found[name, row["doc_id"]] = [float(answer if isinstance(answer, str) else answer[0]) for answer in answers]
    return found


@pytest.mark.long
def test_lm_eval_finds_the_same_in_an_export_as_in_the_source(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron-salt[eval]'")
    source, export = tmp_path / "llama", tmp_path / "export"
    made = run_module("tests.convert.foreign_models", tmp_path, "llama")
    assert made.returncode == 0, made.stderr
    for words in (("import", source, "--to", tmp_path / "run", "--no-verify"), ("export", tmp_path / "run", export)):
        ended = convert_in_rank(*words, "--dtype", "float32")
        assert ended.status == 0, ended
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    program = LM_EVAL.replace("TASKS", repr(",".join(NAMES)))
    directories = [source, tmp_path / "of source", export, tmp_path / "of export"]
    evaluated = subprocess.run(
        [sys.executable, "-c", program, *map(str, directories)], cwd=TASKS, env=environment, capture_output=True, text=True
    )
    assert evaluated.returncode == 0, evaluated.stderr
    of_source, of_export = log_likelihoods(tmp_path / "of source"), log_likelihoods(tmp_path / "of export")
    answers = [value for values in of_source.values() for value in values]
    assert len(of_source) == 5 + 6 + 6 and len(set(answers)) == len(answers) == 3 * 5 + 6 + 6
    assert of_export == {key: pytest.approx(values, abs=1e-4) for key, values in of_source.items()}
