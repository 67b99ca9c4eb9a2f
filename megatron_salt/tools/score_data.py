"""Let a teacher score the windows of the training data. The result is a score index, from which `select_data.py` chooses (SALT_DS).

The teacher is a checkpoint of this repository. It may have any tensor and pipeline layout; the remaining ranks are data-parallel.
The jobs of an array take one `--shard` each and write into one directory. A killed job continues when it is started again. A finished
job has nothing to do. SIGTERM, SIGUSR1 and --exit-file end a job within two microbatches, with exit status 3; the same command
continues it. `megatron_salt/selection/score_format.py` describes the directory.

    torchrun --nproc-per-node 8 tools/score_data.py --teacher-load /shared/teacher/iter_0020000 --data-path /shared/data/web \
        --output /shared/scores --shard 0/16

The cost is one forward pass of the teacher for each window. For all windows of the paper's run that is 17.9% of the run's FLOPs.
With --sample 0.35, which scores twice as many windows as the paper's stage 1 needs, it is 6.2%.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_salt.cli import run_tool
from megatron_salt.config import DataConfig, ParallelConfig
from megatron_salt.errors import LeftEarly, UserError
from megatron_salt.metrics.progress_bar import ProgressBar
from megatron_salt.parallel.failure import fail_together
from megatron_salt.parallel.hardware import prepare_environment
from megatron_salt.parallel.layout import Layout, student_layout, world_size_from_environment
from megatron_salt.parallel.library_warnings import hide_library_warnings
from megatron_salt.preprocess.sharding import parse_shard
from megatron_salt.salt.cost import scoring_flops
from megatron_salt.selection.score_format import IndexManifest, claim, is_finished, samples_of, shard_blocks
from megatron_salt.selection.score_reader import CHUNK
from megatron_salt.selection.score_writer import ShardWriter
from megatron_salt.tools.flags.score_config import ScoreConfig
from megatron_salt.train.exit import ExitPlan, SignalWatch, leaving_with, reason_alone

if TYPE_CHECKING:
    from megatron_salt.data.samples import Samples
    from megatron_salt.salt.scorer import Rows, Scorer
    from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint


log = logging.getLogger(__name__)

T = TypeVar("T")

LEFT = 3  # exit status of a job that leaves before its shard is finished
SAMPLE_SEED = 1234


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(ScoreConfig, lambda config: fail_together(lambda: score_data(config)), argv)


def score_data(config: ScoreConfig) -> int:
    """Score the shard. Returns the exit status: 0, or LEFT if the shard is not finished. Raises UserError."""
    with leaving_with(LEFT, config.exit_file) as watch:
        return _score_data(config, watch)


def _score_data(config: ScoreConfig, watch: SignalWatch) -> int:
    hide_library_warnings()
    prepare_environment(config.device)
    import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

    from megatron_salt.checkpoint.save_directory import TOKENIZER
    from megatron_salt.data.batch import first_microbatches
    from megatron_salt.data.run_tokenizer import tokenizer_of_run
    from megatron_salt.data.samples import open_training_data
    from megatron_salt.salt.output_weight import WINDOWS
    from megatron_salt.salt.scorer import teacher_flags
    from megatron_salt.salt.shared_vocabulary import describe_vocabularies, missing_bos, refuse_other_ids, shared_ids
    from megatron_salt.salt.teacher_checkpoint import read_teacher, refuse_unfit

    layout = scoring_layout(config, world_size_from_environment())
    teacher = read_teacher(config.teacher_load)
    length = config.seq_length or teacher.seq_length
    data = DataConfig(
        data_path=config.data_path, eod_mask_loss=config.eod_mask_loss, reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask, verify_data=config.verify_data,
        allow_duplicate_inputs=config.allow_duplicate_inputs,
    )  # fmt: skip
    tokenizer = tokenizer_of_run(config.tokenizer, data, teacher.directory / TOKENIZER)
    refuse_unfit(teacher, teacher_flags(layout, config.teacher_max_dropped_mass), length)
    shared = shared_ids(teacher, tokenizer)
    if max(config.score_top_k) > shared:
        raise UserError(f"--score-top-k {max(config.score_top_k)} is more than the {shared} ids of the tokenizer")
    samples, _ = open_training_data(data, length, seed=0, vocabulary_size=tokenizer.vocabulary_size, eod=tokenizer.eod)
    bos = missing_bos(teacher, tokenizer, (samples,), first_microbatches(samples, WINDOWS))

    sample_seed = (SAMPLE_SEED if config.sample_seed is None else config.sample_seed) if config.sample is not None else None

    def manifest() -> IndexManifest:  # after the checks that one rank makes for all
        refuse_other_ids([samples], shared, tokenizer.vocabulary_size)
        for line in describe_vocabularies(teacher, tokenizer, shared, samples):
            print(line, flush=True)
        masking = {name: getattr(config, name) for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")}
        return IndexManifest(
            datasets=samples.dataset_facts(),
            seq_length=length,
            vocabulary=tokenizer.vocabulary_size,
            tokenizer=tokenizer.fingerprint,
            teacher=teacher.fingerprint,
            teacher_step=teacher.step,
            teacher_directory=str(teacher.directory),
            top_k=config.score_top_k,
            masking=masking,
            dtype=config.dtype or teacher.dtype,
            micro_batch_size=config.micro_batch_size,
            block_samples=config.block_samples,
            sample=config.sample,
            sample_seed=sample_seed,
        )

    return score_shard(config, layout, teacher, samples, shared, bos, manifest, watch)


def scoring_layout(config: ScoreConfig, world_size: int) -> Layout:
    """Layout of the teacher over all ranks. Raises UserError."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
    )
    return student_layout(parallel, world_size)


def score_shard(
    config: ScoreConfig, layout: Layout, teacher: TeacherCheckpoint, samples: Samples, shared: int, bos: int | None,
    manifest: Callable[[], IndexManifest], watch: SignalWatch,
) -> int:  # fmt: skip
    """Join torch.distributed and score the missing blocks of the shard. Every rank calls. Raises UserError.

    shared: ids that mean the same to the teacher and in the data. bos: see `missing_bos`. manifest: makes the index's manifest; only rank 0
    calls it. Returns the exit status, as `score_data`.
    """
    import torch.distributed as dist

    from megatron_salt.parallel.collectives import begin_largest, from_rank_0
    from megatron_salt.parallel.launch import distributed
    from megatron_salt.salt.scorer import make_scorer, teacher_flags

    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    with distributed(timeout, leaving=lambda: reason_alone(watch, config.exit_file), device=config.device):
        rank = dist.get_rank()
        logging.basicConfig(level=logging.INFO if rank == 0 else logging.CRITICAL, format="%(message)s")
        facts = from_rank_0(lambda: claim_index(Path(config.output), manifest()))
        blocks = shard_blocks(facts.num_blocks, parse_shard(config.shard))
        nothing_to_do = from_rank_0(lambda: why_nothing_to_do(Path(config.output), facts, blocks))
        if nothing_to_do is not None:
            if rank == 0:
                say(config, nothing_to_do)
            return 0
        if rank == 0:
            print(cost(facts, teacher), flush=True)
        if facts.block_samples % (facts.micro_batch_size * layout.data):
            log.warning(
                "--block-samples %d is not a multiple of --micro-batch-size %d x %d data-parallel replicas: some idle at the end "
                "of each block",
                facts.block_samples,
                facts.micro_batch_size,
                layout.data,
            )
        exit_plan = ExitPlan(
            exit_interval=None, exit_duration_in_mins=None, watch=watch, begin=begin_largest, started=0.0, exit_file=config.exit_file,
            looks=rank == 0,
        )  # fmt: skip
        try:
            scorer = make_scorer(
                teacher,
                layout,
                samples,
                flags=teacher_flags(layout, config.teacher_max_dropped_mass),
                shared_ids=shared,
                dtype=facts.dtype,
                micro_batch_size=config.micro_batch_size,
                top_k=config.score_top_k,
                chunk_mib=config.loss_chunk_mib,
                timeout=timeout,
                bos=bos,
                look=exit_plan.look,
            )
        except LeftEarly as left:
            if rank == 0:
                say(config, f"left before the first window of this start: {left}; the same command goes on")
            return LEFT
        finished = fill_shard(config, scorer, facts, blocks, exit_plan.reason_to_stop_now)
        exit_plan.finish()
        return 0 if finished else LEFT


def why_nothing_to_do(output: Path, facts: IndexManifest, blocks: range) -> str | None:
    """Why a shard of `blocks` has nothing to score; None if it has."""
    if not blocks:
        return f"none of the {facts.num_blocks} blocks of --block-samples {facts.block_samples}"
    return f"all its {len(blocks)} blocks were finished before" if is_finished(output, facts, blocks) else None


def cost(facts: IndexManifest, teacher: TeacherCheckpoint) -> str:
    """A line about the cost of the whole index, shown at start-up."""
    tokens = facts.num_samples * facts.seq_length * (facts.sample or 1.0)
    flops = scoring_flops(facts, teacher.model)
    part = "all" if facts.sample is None else f"about {facts.sample:.2%}"
    advice = "; --sample scores a part" if facts.sample is None else ""
    return (
        f"the index: {part} of {facts.num_samples} windows, {tokens:.3g} tokens, {flops:.3g} FLOPs of the teacher's forward pass "
        f"(training a student takes 3 of its own a token){advice}"
    )


def claim_index(output: Path, manifest: IndexManifest) -> IndexManifest:
    """Make `output` the directory of this index, and return the manifest. Raises UserError if it holds another index."""
    num = manifest.num_samples
    if not any(manifest.scored(first, min(first + CHUNK, num)).any() for first in range(0, num, CHUNK)):
        raise UserError(f"--sample {manifest.sample} takes none of {num} windows: give a larger one, or another --sample-seed")
    claim(output, manifest)
    return manifest


def fill_shard(
    config: ScoreConfig, scorer: Scorer, facts: IndexManifest, blocks: range, reason_to_stop: Callable[[], str | None]
) -> bool:
    """Score and write the missing blocks. Returns False if there was a reason to leave before the end.

    Every rank calls; one of them, scorer.writer, writes. Raises UserError if that rank cannot write.
    """
    from megatron_salt.parallel.collectives import from_rank
    from megatron_salt.salt.scorer import score_block

    writers: list[ShardWriter] = []  # one element on the rank that writes, none on the others

    def open_shard() -> list[int]:
        writers.append(ShardWriter(Path(config.output), facts, blocks))
        return list(writers[0].todo)

    def write(block: int, rows: Rows | None) -> None:
        assert rows is not None
        writers[0].write(block, rows)

    def on_writer(action: Callable[[], T]) -> T:
        try:
            return from_rank(scorer.writer, action)
        except OSError as error:
            raise UserError(
                f"--output {config.output} cannot be written: {error.strerror} ({error.filename}); finished blocks stay"
            ) from None

    todo = on_writer(open_shard)
    progress = begin_progress(config, facts, blocks, len(todo)) if writers else None
    not_finite = 0
    for block in todo:
        try:
            rows = score_block(scorer, facts, block, reason_to_stop)
        except LeftEarly as left:
            if progress is not None:
                progress.close()
                say(config, left_after(facts, blocks, writers[0].todo, str(left)))
            return False
        on_writer(partial(write, block, rows))
        if progress is not None and rows is not None:
            windows = num_scored(facts, range(block, block + 1))
            not_finite += num_not_finite(rows)
            progress.add(progress.done + 1, (1, windows, windows * facts.seq_length))
    on_writer(lambda: writers[0].finish())
    if progress is not None:
        summary = progress.close()
        if not_finite:
            say(config, f"the teacher's loss is not finite in {not_finite} samples; select_data.py will refuse them")
        say(config, f"finished: {summary}")
    return True


def begin_progress(config: ScoreConfig, facts: IndexManifest, blocks: range, todo: int) -> ProgressBar:
    """Print what the shard holds, and start its progress bar. todo: how many blocks are not scored yet."""
    first, end = samples_of(facts, blocks)
    part = "" if facts.sample is None else f", {num_scored(facts, blocks)} of them by --sample {facts.sample}"
    say(
        config,
        f"{end - first} of {facts.num_samples} samples{part} in {len(blocks)} blocks, {len(blocks) - todo} of them finished before",
    )
    return ProgressBar(
        ("blocks", "windows", "tokens"),
        total=todo,
        unit=" blocks",
        log_interval=config.log_interval,
        label=f"shard {config.shard}: ",
    )


def left_after(facts: IndexManifest, blocks: range, todo: Iterable[int], reason: str) -> str:
    """A line about a shard that is left unfinished. todo: numbers of the blocks that are not written."""
    first, end = samples_of(facts, blocks)
    sizes = (samples_of(facts, range(block, block + 1)) for block in todo)
    done = end - first - sum(stop - start for start, stop in sizes)
    return f"left after {done} of {end - first} windows: {reason}; the same command goes on"


def num_scored(facts: IndexManifest, blocks: range) -> int:
    """Number of windows in `blocks` that get scores: all, or those of --sample."""
    first, end = samples_of(facts, blocks)
    return sum(int(facts.scored(start, min(start + CHUNK, end)).sum()) for start in range(first, end, CHUNK))


def num_not_finite(rows: Rows) -> int:
    """Number of windows whose mean loss is not finite."""
    return sum(not math.isfinite(loss) for loss in rows["mean"].tolist())


def say(config: ScoreConfig, text: str) -> None:
    """Print a line about this job's shard."""
    print(f"shard {config.shard}: {text}", flush=True)


if __name__ == "__main__":  # torchrun -m, and the jobs of a study
    sys.exit(main())
