"""Arrays and chains: scores with an element killed, the whole pipeline, and a pipeline whose first job fails."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.selection.score_reader import ScoreIndex
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import ON_ONE_NODE, ROOT, TINY, Job, Site
from tests.support.program import checkpoints, entries

pytestmark = [pytest.mark.slurm, pytest.mark.long]

ON_CPUS = ("--cpus-per-task=1", "--mem=100M")


def score(site: Site, data: str, teacher: Path, scores: Path, *, array: str = "0-1") -> list[Job]:
    """score.sh in two parts; its elements."""
    options = (*ON_ONE_NODE, f"--array={array}", f"--output={scores}-%a.log")
    job = site.submit("score.sh", "--micro-batch-size", "4", "--block-samples", "8", options=options,
                      SCORES=scores, DATA=data, TEACHER=teacher, EARLY_STEP=2, SHARDS=2, SEQ_LENGTH=16)  # fmt: skip
    return [Job(site.cluster, f"{job.number}_{element}", Path(f"{scores}-{element}.log")) for element in (0, 1)]


def columns(scores: Path) -> dict[str, bytes]:
    return {path.relative_to(scores).as_posix(): path.read_bytes() for path in sorted(scores.rglob("*.npy"))}


def test_a_killed_element_of_the_scores_goes_on_and_the_index_is_the_same(site: Site, data: str, teacher: Path) -> None:
    whole = site.work / "scores"
    for element in score(site, data, teacher, whole):
        element.complete()
    killed = site.work / "scores-killed"
    first, second = score(site, data, teacher, killed)
    wait_for(lambda: list(killed.glob("*/*.npy")) and site.tiny_processes("--shard"), 60, "no element writes")
    os.kill(site.tiny_processes("--shard")[0], signal.SIGKILL)
    first.complete()
    second.complete()
    assert columns(whole) == columns(killed) != {}
    assert np.isfinite(ScoreIndex.open((str(killed),)).manifest.num_samples)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of JSON lines, and a tokenizer of their words."""
    directory = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(60)]
    for number in (1, 2):
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=40))}) for _ in range(60)]
        (directory / f"part{number}.jsonl").write_text("\n".join(lines) + "\n")
    subprocess.run([sys.executable, "tools/train_tokenizer.py", "--input", f"{directory}/part*.jsonl", "--output",
                    f"{directory}/words.model", "--vocab-size", "300"], cwd=ROOT, check=True, capture_output=True)  # fmt: skip
    return directory


def submit_pipeline(site: Site, text: Path, name: str, **environment: str) -> dict[str, Job]:
    """The whole chain, tiny; its jobs by name."""
    base = site.work / name
    base.mkdir()  # for the logs
    flags = " ".join((*TINY, "--global-batch-size", "4", "--train-iters"))
    printed = site.pipeline(
        "--time=10", f"--output={base}/%x-%j.log", INPUT=f"{text}/part*.jsonl", TOKENIZER=text / "words.model", OUTPUT=base / "data",
        NAME="words", SHARDS="2", SCORES=base / "scores", SELECTION=base / "selection", TEACHER=base / "teacher",
        STUDENT=base / "salt_ds", EARLY_STEP="2", SEQ_LENGTH="16",
        KD_STEPS="4", CPU_OPTIONS=" ".join(ON_CPUS), TEACHER_OPTIONS=" ".join(ON_ONE_NODE), SCORE_OPTIONS=" ".join(ON_ONE_NODE),
        STUDENT_OPTIONS=" ".join(ON_ONE_NODE), TEACHER_FLAGS=f"{flags} 4 --hidden-size 16",
        STUDENT_FLAGS=f"{flags} 8 --teacher-micro-batch-size 1",
        SCORE_FLAGS="--micro-batch-size 4 --block-samples 8", SELECT_FLAGS="--valid-share 0 --score mean", **environment,
    )  # fmt: skip
    found = re.findall(r"^(\w+) +job (\S+) +after (\S+)", printed, re.MULTILINE)
    assert [name for name, _, _ in found] == ["preprocess", "merge", "teacher", "score", "select", "salt_ds"]
    assert [after for _, _, after in found] == ["-", *(number for _, number, _ in found[:-1])]
    return {name: Job(site.cluster, number, base / f"{name}-{number}.log") for name, number, _ in found}


def test_the_pipeline_makes_a_student_out_of_text(site: Site, text: Path) -> None:
    jobs = submit_pipeline(site, text, "chain")
    wait_for(lambda: jobs["salt_ds"].state in ("COMPLETED", "FAILED", "CANCELLED"), 300, "the chain does not end")
    states = {name: job.state for name, job in jobs.items()}
    assert set(states.values()) == {"COMPLETED"}, states
    assert checkpoints(site.work / "chain/salt_ds") == [8] and len(entries(site.work / "chain/salt_ds")) == 8


def test_when_an_element_fails_nothing_after_it_runs(site: Site, text: Path) -> None:
    broken = site.work / "broken-text"
    broken.mkdir()
    for number in (1, 2):
        good = (text / f"part{number}.jsonl").read_text()
        (broken / f"part{number}.jsonl").write_text(good if number == 1 else good + "no json\n")
    (broken / "words.model").write_bytes((text / "words.model").read_bytes())
    jobs = submit_pipeline(site, broken, "broken")
    wait_for(lambda: jobs["salt_ds"].state == "CANCELLED", 90, "the last job waits for ever")
    elements = [Job(site.cluster, f"{jobs['preprocess'].number}_{number}", Path("/dev/null")).state for number in (0, 1)]
    assert sorted(elements) == ["COMPLETED", "FAILED"]
    assert {jobs[name].state for name in ("merge", "teacher", "score", "select")} == {"CANCELLED"}


def test_a_rehearsal_says_what_it_would_submit_and_submits_nothing(site: Site, text: Path) -> None:
    before = site.cluster.ask("squeue", "--noheader", "--states=all", "--format=%i")
    printed = site.pipeline(INPUT=f"{text}/part*.jsonl", TOKENIZER=text / "words.model", DRY_RUN=1, SELECT=0)
    assert re.findall(r"^(\w+) +job \S+ +after (\S+)", printed, re.MULTILINE) == [
        ("preprocess", "-"), ("merge", "preprocess"), ("teacher", "merge"), ("salt", "teacher")]  # fmt: skip
    assert site.cluster.ask("squeue", "--noheader", "--states=all", "--format=%i") == before
