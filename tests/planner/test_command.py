"""tools/plan.py: its verdict, its refusals, and one run from end to end."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.cli import parse
from megatron_salt.errors import UserError
from megatron_salt.planner.advice import what_would_help
from megatron_salt.planner.command import main, whole_step_lines
from megatron_salt.planner.memory import GIB, HostMemory, Moment, PlannedMemory, RankMemory, usable_gib
from megatron_salt.planner.table import not_modelled, table, verdict
from megatron_salt.planner.trace import Traces
from megatron_salt.train.plan import check
from tests.planner.runs import MODEL, planned

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDENT = ["--config", str(EXAMPLES / "model_2p8b.yaml"), "--vocabulary-size", "256000"]
TEACHER = ["--teacher-load", "none", "--teacher-config", str(EXAMPLES / "model_1p5b.yaml"), "--kd-steps", "36000"]


def rank(stage: int, first: float | None, second: float) -> RankMemory:
    """A rank with so many GiB in each stage, most of it activations."""

    def moment(gib: float) -> Moment:
        return Moment(at="student's backward pass", bytes={"activations": int(gib * GIB) - GIB, "parameters": GIB})

    return RankMemory(pipeline_stage=stage, place=stage, stage1=None if first is None else moment(first), stage2=moment(second))


NO_HOST = HostMemory(staged=0, gathered=0)


def test_the_verdict_is_of_the_fullest_ranks():
    memory = PlannedMemory(stages=(rank(0, 60.0, 50.0), rank(1, 40.0, 55.0)), host=NO_HOST)
    fits, line = verdict(memory, 80)
    assert fits and line.startswith("fits: 60.0 of 80 GiB in stage 1, 55.0 in stage 2") and "unmeasured" in line
    fits, line = verdict(memory, 60.5)  # the allowance counts
    assert not fits and line.startswith("does not fit: 60.0 of 60.5 GiB in stage 1, 55.0 in stage 2")
    assert verdict(PlannedMemory(stages=(rank(0, None, 30.0),), host=NO_HOST), 40)[1].startswith("fits: 30.0 of 40 GiB (")
    assert usable_gib(80) == pytest.approx(75.6)


def test_the_table_has_a_column_for_each_stage_and_names_the_moments():
    lines = table(PlannedMemory(stages=(rank(0, 60.0, 50.0), rank(1, None, 55.0)), host=NO_HOST))
    assert re.split(r"  +", lines[0]) == ["GiB of a rank", "pp 0 stage 1", "pp 0 stage 2", "pp 1 stage 2"]
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in lines}
    assert rows["activations"] == ["59.00", "49.00", "54.00"] and rows["at the peak"] == ["60.00", "50.00", "55.00"]
    assert "pp 0 stage 1: the peak is in the student's backward pass" in lines and "head" not in rows


def test_the_term_of_a_guided_layer_is_told_as_not_modelled():
    assert "guided layer" in not_modelled(True) and "guided layer" not in not_modelled(False)


def test_flags_that_would_help_take_memory_from_the_largest_kinds():
    memory = PlannedMemory(stages=(rank(0, None, 60.0),), host=NO_HOST)
    first, second = what_would_help(planned(1), memory)
    assert first.startswith("activations, 59.0 GiB: --micro-batch-size 1 or --recompute-granularity full")
    assert second.startswith("parameters, 1.0 GiB: --tensor-model-parallel-size 2")
    recomputing = planned(1, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert "recompute" not in what_would_help(recomputing, memory)[0]


@pytest.mark.parametrize("run, gone, named", [
    (planned(2, model=replace(MODEL, num_attention_heads=2), tensor_model_parallel_size=2), "--tensor-model-parallel-size", ""),
    (planned(2, model=replace(MODEL, num_layers=6), pipeline_model_parallel_size=2),
     "--pipeline-model-parallel-size 4", "--pipeline-model-parallel-size 3 on 3 ranks"),
    (planned(1), "", "--tensor-model-parallel-size 2 --sequence-parallel on 2 ranks"),
    (planned(1, (1, 1)), "--teacher-fp8-format", ""),
])  # fmt: skip
def test_flags_that_the_trainer_would_refuse_are_not_named(run, gone, named):
    kinds = dict.fromkeys(["parameters", "gradients", "teacher weights", "activations"], GIB)
    moment = Moment(at="student's forward pass", bytes=kinds)
    memory = PlannedMemory(stages=(RankMemory(pipeline_stage=0, place=0, stage1=None, stage2=moment),), host=NO_HOST)
    told = "\n".join(what_would_help(run, memory))
    assert named in told and (not gone or gone not in told), told


@pytest.mark.parametrize("words, message", [
    (["--gpu", "h100-81", "--world-size", "64"], "--gpu h100-81 is not known (did you mean h100-80?); known are a100-40, "),
    (["--world-size", "64"], "give --gpu, one of a100-40"),
    (["--gpu", "h100-80"], "give --world-size, the ranks of the run"),
    (["--gpu-memory-gib", "0", "--world-size", "1"], "--gpu-memory-gib must be above 0, got 0"),
    (["--gpu", "h100-80", "--world-size", "8", "--teacher-config", "x.yaml"], "--teacher-config x.yaml needs --teacher-load"),
    (["--gpu", "h100-80", "--world-size", "8", "--mfu", "2"], "--mfu must be above 0 and at most 1, got 2"),
    (["--gpu", "h100-80", "--world-size", "8", "--reached-at", "0"], "--reached-at must be above 0 and at most 1, got 0"),
    (["--gpu", "h100-80", "--world-size", "8", "--cached-share", "1"], "--cached-share 1 needs --teacher-cache"),
    (["--gpu", "h100-80", "--world-size", "8", "--search-layouts", "0"], "--search-layouts must be at least 1, got 0"),
    (["--gpu", "h100-80", "--world-size", "8", "--picture", "x.pdf"], "--picture x.pdf must end in .png or .svg"),
    (["--gpu", "h100-80", "--world-size", "8", "--picture", "no/x.svg"], "--picture no/x.svg: there is no directory no"),
    (["--gpu", "h100-80", "--world-size", "8", "--hidden-sise", "1"], "unknown flag --hidden-sise (did you mean --hidden-size?)"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(words, message, capsys):
    assert main([*STUDENT, *words]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and told.out == ""


@pytest.mark.parametrize("world, words", [
    (65, ["--tensor-model-parallel-size", "2"]),
    (60, []),
    (64, ["--pipeline-model-parallel-size", "3"]),
    (64, ["--sequence-parallel"]),
])  # fmt: skip
def test_what_the_trainer_refuses_is_refused_with_its_words(world, words, capsys):
    with pytest.raises(UserError) as trainers:
        check(parse([*STUDENT[:2], *words]), world)
    assert main([*STUDENT, "--gpu", "h100-80", "--world-size", str(world), *words]) == 2
    assert capsys.readouterr().err == f"error: {trainers.value}\n"


@pytest.mark.long
def test_the_2p8b_run_is_planned_without_a_gpu(capsys):
    words = [*STUDENT, *TEACHER, "--world-size", "64"]
    assert main([*words, "--gpu", "h100-80"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^fits: [\d.]+ of 80 GiB in stage 1, [\d.]+ in stage 2", out, re.MULTILINE)
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in out.splitlines()}
    assert float(rows["parameters"][0]) == pytest.approx(2.82e9 * 2 / GIB, rel=0.02)
    assert float(rows["teacher weights"][0]) == pytest.approx((1.49e9 + 256000 * 2048) * 2 / GIB, rel=0.02)
    head = (
        5120 * 256000 * (2 + 4) + 256000 * 2560 * 4
    ) / GIB  # both models' logits of a microbatch; the float32 weight gradient
    assert float(rows["head"][0]) == pytest.approx(head, rel=0.02)


@pytest.mark.full
def test_a_run_that_does_not_fit_names_flags(capsys):
    assert main([*STUDENT, "--world-size", "64", "--gpu-memory-gib", "24"]) == 1
    out = capsys.readouterr().out
    assert "would help: activations" in out and out.splitlines()[-1].startswith("does not fit: ")


def test_each_whole_step_is_told_as_soon_as_it_is_traced(monkeypatch):
    memory = PlannedMemory(stages=(rank(0, 3.0, 2.0), rank(1, None, 1.0)), host=NO_HOST)
    told: list[str] = []

    def peaks(run, steps):
        assert steps == [(0, True), (0, False), (1, False)]
        for number in range(3):
            assert len(told) == 1 + number  # a line for each that was traced before
            yield GIB * (3 - number)

    monkeypatch.setattr("megatron_salt.planner.command.compose", lambda *_: memory)
    monkeypatch.setattr("megatron_salt.planner.command.trace_whole_steps", peaks)
    lines = whole_step_lines(planned(1), Traces(student={}, teacher=None))
    while (line := next(lines, None)) is not None:
        told.append(line)
    assert told[0] == "tracing 3 whole steps"
    assert re.fullmatch(r"2 of 3, after \d+ s: pp 0 stage 2: .* takes 2.00 GiB at its peak, 2.00 were composed", told[2])
