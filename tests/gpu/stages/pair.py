"""Stages with a student of 0.8B and a teacher of 0.4B parameters in their layers, and 128K ids: how fast both stages are, and why.

Weights are random and so is the text: only time and memory are looked at. All runs are `pretrain.main` in this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType

from benchmarks.precision_steps import FAMILY, LARGE, TINY, Sizes, write_data
from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.model.loss import fused_linear_cross_entropy
from megatron_salt.parallel.device import current_device
from tests.gpu.stages.runner import Report, Setting
from tests.gpu.stages.small_model import run_program

PAIR = replace(LARGE, vocabulary_size=128256)
HALF = replace(LARGE, student=LARGE.student.replace("--num-layers 16", "--num-layers 8"))
"""For comparisons of two vocabularies or two chunk sizes."""
SYNC_STEP, PROFILED = 5, range(10, 12)
"""Steps of stage 1 in which waits for the device are counted, and kernels are profiled."""
SYNC_WARNING = "called a synchronizing CUDA operation"
"""What torch says; c10/cuda/CUDAFunctions.cpp."""
PREDICTION = re.compile(r"a step of stage 1 takes (?:at least )?([\d.]+) x")
"""What start-up says of the cost of stage 1: salt/cost.py."""
TOP = 15
"""Kernels in the table of a profile."""


class StepProbe:
    """Stands where a run has its profiler, and looks into some of its steps.

    It counts torch's warnings of waits for the device in one step, profiles two, and measures the output head in all.
    """

    def __init__(self, sync_step: int = SYNC_STEP, profiled: range = PROFILED, timed: bool = False) -> None:
        self._sync_step, self._profiled, self._timed = sync_step, profiled, timed
        self._open = contextlib.ExitStack()
        self._marks: dict[int, list[tuple[Any, Any]]] = {}
        self._step = 0
        self.waits: Counter[str] = Counter()
        self.kernels: list[dict[str, Any]] = []
        self.head_seconds: dict[int, float] = {}

    def before_step(self, step: int) -> None:
        """End what belonged to the step before, and begin what belongs to this one."""
        self._open.close()
        self._step = step
        if step == self._sync_step and self._timed:
            self._open.enter_context(self._counted_waits())
        if step == self._profiled.start:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if self._timed else []
            profile = torch.profiler.profile(activities=activities, acc_events=True)
            profile.start()
            self._profile = profile
        elif step == self._profiled.stop:
            self._profile.stop()
            self.kernels = top_kernels(self._profile.key_averages(), self._timed)

    def stop(self, next_step: int) -> None:
        """After the last step: read the marks. Until then nothing waits for the device."""
        self._open.close()
        if self._timed:
            torch.cuda.synchronize()
        for step, marks in self._marks.items():
            seconds = (start.elapsed_time(end) / 1e3 if self._timed else end - start for start, end in marks)
            self.head_seconds[step] = sum(seconds)

    @contextlib.contextmanager
    def _counted_waits(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.waits.update(f"{place_of(one.filename)}:{one.lineno}" for one in caught if SYNC_WARNING in str(one.message))

    def head(self, *arguments: Any) -> Any:
        """The head's function, with a mark before and after."""
        start = self._mark()
        found = fused_linear_cross_entropy(*arguments)
        self._marks.setdefault(self._step, []).append((start, self._mark()))
        return found

    def _mark(self) -> Any:
        if not self._timed:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def place_of(file: str) -> str:
    """The part of a path that says which module it is."""
    return re.sub(r"^.*/(?=(megatron_salt|megatron/core|torch|tests)/)", "", file)


def top_kernels(rows: Iterable[Any], timed: bool) -> list[dict[str, Any]]:
    """The kernels (on a CPU: the operations) that took most of the profiled time. rows: of `key_averages`.

    An operation's row repeats the time of the kernels that it launched, so only rows of the device itself count.
    """
    if timed:
        rows = (row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation)
    name = "self_device_time_total" if timed else "self_cpu_time_total"
    timed_rows = sorted((row for row in rows if getattr(row, name) > 0), key=lambda row: -getattr(row, name))
    total = sum(getattr(row, name) for row in timed_rows) or 1.0
    return [
        {"kernel": row.key[:100], "calls": row.count, "ms": getattr(row, name) / 1e3, "share": getattr(row, name) / total}
        for row in timed_rows[:TOP]
    ]


@dataclass(frozen=True)
class Ran:
    """What a run left: its steps, its events, its log, and what the probe saw."""

    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    log: list[str]
    probe: StepProbe


def run(folder: Path, name: str, words: list[str], sizes: Sizes, setting: Setting, probe: StepProbe | None = None) -> Ran:
    """Run `pretrain.main` on the data in a folder, in bfloat16."""
    probe = probe or StepProbe(sync_step=0, profiled=range(0), timed=setting.timed)
    jsonl = folder / f"{name}.jsonl"
    common = [
        *FAMILY, "--bf16", "--seq-length", str(sizes.seq_length), "--micro-batch-size", str(sizes.micro_batch_size),
        "--data-path", str(folder / "data"), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
        str(folder / "tokenizer.json"), "--jsonl", str(jsonl), "--log-interval", "1",
    ]  # fmt: skip
    with (
        told() as lines,
        mock.patch("megatron_salt.train.run.Profiler", return_value=probe),
        mock.patch("megatron_salt.model.head.fused_linear_cross_entropy", probe.head),
    ):
        run_program([*common, *words])
    entries = [json.loads(line) for line in jsonl.read_text().splitlines()]
    return Ran(*([one for one in entries if one["kind"] == kind] for kind in ("step", "event")), lines, probe)  # type: ignore[arg-type]


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """The lines that are logged inside."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_salt")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def save_teacher(folder: Path, sizes: Sizes, setting: Setting) -> Path:
    """A teacher after one step, without its optimizer's state, which would be most of the bytes."""

    def without_optimizer(*arguments: Any, **parts: Any) -> Checkpointer:
        return Checkpointer(*arguments, **(parts | {"optimizer": None, "scheduler": None}))

    words = [*sizes.teacher.split(), "--train-iters", "1", "--global-batch-size", str(sizes.micro_batch_size)]
    with mock.patch("megatron_salt.train.build.Checkpointer", without_optimizer):
        run(folder, "teacher", [*words, "--save", str(folder / "teacher")], sizes, setting)
    return folder / "teacher"


def speed(ran: Ran, steps: range) -> dict[str, Any]:
    """Medians over some steps: seconds, tokens/s, model TFLOP/s, share of the peak, the head's share, peak memory."""
    timed = [entry for entry in ran.steps if entry["step"] in steps]
    seconds = statistics.median(entry["seconds"] for entry in timed)
    head = [ran.probe.head_seconds[step] for step in steps if step in ran.probe.head_seconds]
    tflops = statistics.median(entry["tflops_per_rank"] for entry in timed)
    row = {
        "seconds a step": seconds, "fastest": min(entry["seconds"] for entry in timed), "tokens/s": timed[0]["tokens"] / seconds,
        "TFLOP/s": tflops, "head's share": statistics.median(head) / seconds if head else "", "GiB": timed[-1]["memory_gib"],
    }  # fmt: skip
    if peak := peak_tflops():
        row["of the peak"] = tflops / peak
    return row


def peak_tflops() -> float | None:
    """Dense peak of this GPU in bfloat16; None for a CPU, and for a GPU that the table of cards does not have."""
    if current_device().type != "cuda":
        return None
    from megatron_salt.cards import card_named

    card = card_named(torch.cuda.get_device_name())
    return None if card is None else card.bf16_tflops


def both_stages(setting: Setting, report: Report) -> None:
    """30 steps of each stage: times, memory at the switch, waits for the device, kernels; stage 1's cost beside its prediction."""
    sizes = TINY if setting.tiny else PAIR
    stage1, warm = (12, 3) if setting.tiny else (30, 13)  # later than the steps that the probe slows down
    write_data(setting.scratch, sizes)
    teacher = save_teacher(setting.scratch, sizes, setting)
    batch = str(sizes.micro_batch_size * sizes.microbatches)
    words = [*sizes.student.split(), "--train-iters", str(2 * stage1), "--global-batch-size", batch, "--kd-steps", str(stage1),
             "--teacher-load", str(teacher), "--transformer-impl", "torch"]  # fmt: skip
    ran = run(setting.scratch, "both", words, sizes, setting, StepProbe(timed=setting.timed))
    rows = [{"stage": 1} | speed(ran, range(warm, stage1 + 1)), {"stage": 2} | speed(ran, range(stage1 + warm, 2 * stage1 + 1))]
    ratio = rows[0]["seconds a step"] / rows[1]["seconds a step"]
    predicted = [float(found[1]) for line in ran.log if (found := PREDICTION.search(line))]
    [switch] = [event for event in ran.events if event.get("stage") == 2]
    report.note(
        speed=rows, stage_1_over_stage_2=ratio, predicted=predicted, over_prediction=[ratio / one for one in predicted],
        waits_in_a_step=sum(ran.probe.waits.values()),
        memory_at_the_switch_gib=[switch["memory_gib_before"], switch["memory_gib_after"]],
        phases=[{"step": entry["step"]} | entry["phases"] for entry in (ran.steps[stage1 - 1], ran.steps[-1])],
        waits=[{"place": place, "times": times} for place, times in ran.probe.waits.most_common()], kernels=ran.probe.kernels,
    )  # fmt: skip
    report.require(len(ran.steps) == 2 * stage1, f"{len(ran.steps)} steps were logged, not {2 * stage1}")
    if setting.timed:
        report.require(switch["memory_gib_after"] < switch["memory_gib_before"], "the switch gave no memory back")


def compare_runs(setting: Setting, sizes: Sizes, ways: dict[str, tuple[int, list[str]]]) -> list[dict[str, Any]]:
    """Short runs without a teacher. ways: the vocabulary and the flags of each, by name."""
    steps, rows = (4 if setting.tiny else 12), []
    for name, (vocabulary_size, words) in ways.items():
        sized = replace(sizes, vocabulary_size=vocabulary_size)
        folder = setting.scratch / name.replace(" ", "-")
        folder.mkdir()
        write_data(folder, sized)
        batch = str(sizes.micro_batch_size * sizes.microbatches)
        flags = [
            *sizes.student.split(),
            "--train-iters",
            str(steps),
            "--global-batch-size",
            batch,
            "--transformer-impl",
            "torch",
            *words,
        ]
        rows.append({"run": name} | speed(run(folder, "run", flags, sized, setting), range(steps // 2, steps + 1)))
    return rows


def odd_vocabulary(setting: Setting, report: Report) -> None:
    """A vocabulary that is no multiple of 8 takes no longer than the next multiple of 64."""
    odd, even = (1003, 1024) if setting.tiny else (50257, 50304)
    rows = compare_runs(setting, TINY if setting.tiny else HALF, {f"{size} ids": (size, []) for size in (odd, even)})
    report.note(runs=rows, odd_over_even=rows[0]["seconds a step"] / rows[1]["seconds a step"])
    if setting.timed:
        report.require(
            rows[0]["seconds a step"] < 1.05 * rows[1]["seconds a step"], f"{odd} ids take over 1.05 x the time of {even}"
        )


def chunk_sizes(setting: Setting, report: Report) -> None:
    """Step times with two sizes of a chunk of the head, and with the one that the program chooses."""
    size = 1003 if setting.tiny else 128256
    ways = {
        f"{tokens} tokens": (size, ["--loss-chunk-tokens", str(tokens)])
        for tokens in ((32, 128) if setting.tiny else (512, 4096))
    }
    report.note(runs=compare_runs(setting, TINY if setting.tiny else HALF, ways | {"the program's choice": (size, [])}))
