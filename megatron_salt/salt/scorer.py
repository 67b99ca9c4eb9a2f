"""Scoring samples with the teacher: samples in, rows of the score index out.

The forward pass is that of stage 1. The last stage reduces the hidden states to scores (`model/token_scores.py`).
The samples of a block that are scored are cut into microbatches in their order, whatever the shard and the number of replicas; replicas
take turns. The last microbatch of a block is filled up by repeating its last sample, so that all matrices have the same shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_salt.config import SaltConfig
from megatron_salt.data.batch import Microbatch, first_microbatches, make_microbatch
from megatron_salt.data.samples import Samples
from megatron_salt.errors import LeftEarly, Look, stay
from megatron_salt.model.gpt import GPT
from megatron_salt.model.loss_chunk import forward_chunk_tokens
from megatron_salt.model.token_scores import TokenScorer, TokenScores, window_scores
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh
from megatron_salt.parallel.pipeline import LossFunction, run_pipeline
from megatron_salt.salt.load_teacher import admit
from megatron_salt.salt.output_weight import WINDOWS
from megatron_salt.salt.teacher import TeacherHead
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint
from megatron_salt.selection.score_format import IndexManifest, columns, content_hashes, samples_of

log = logging.getLogger(__name__)

Rows = dict[str, np.ndarray]
"""Columns of the score index, by name: one value for each of some samples."""


PIECE = 2
"""Microbatches of a replica between two checks for a reason to leave. A check drains the pipeline: with pipeline stages there are 8
microbatches for each stage instead."""


class Scorer:
    """This rank's part of a teacher that scores, and the data that it reads."""

    def __init__(
        self,
        body: GPT,
        weight: Tensor | None,
        mesh: Mesh,
        *,
        shard: VocabularyShard,
        samples: Samples,
        micro_batch_size: int,
        top_k: tuple[int, ...],
        chunk_tokens: int,
    ) -> None:
        """body: this rank's stage, without output head. weight: this rank's rows of the output weight [V/tp, h], on the last stage; None
        elsewhere. shard: how these rows are cut. chunk_tokens: tokens whose logits are computed at a time."""
        self._body, self._mesh, self._samples = body.eval(), mesh, samples
        self._micro, self._top_k = micro_batch_size, top_k
        self._dtypes = columns(top_k, self.seq_length)
        chunk_tokens = min(chunk_tokens, micro_batch_size * self.seq_length)
        self._tokens = None if weight is None else TokenScorer(weight, shard, chunk_tokens)

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""
        return self._samples.windows[0].seq_length

    @property
    def is_writer(self) -> bool:
        """Whether this rank receives the rows: the first tensor-parallel rank of the first replica's last stage."""
        at = self._mesh.at
        return self._mesh.is_last_stage and at.tp == 0 and at.dp == 0

    @property
    def writer(self) -> int:
        """The global rank that receives the rows."""
        layout = self._mesh.layout
        return layout.groups("tp", "cp", "dp")[layout.pipeline - 1][0]

    @torch.no_grad()
    def score(self, ids: np.ndarray, reason_to_stop: Callable[[], str | None] = lambda: None) -> Rows | None:
        """The rows of these samples, int64 [n], n > 0. Collective over all ranks; the writer receives, the others get None.

        reason_to_stop: called before each piece, the same on every rank. A reason raises LeftEarly on every rank."""
        replicas, replica = self._mesh.layout.data, self._mesh.at.dp
        starts = range(0, len(ids), self._micro)
        rounds, own_starts = -(-len(starts) // replicas), starts[replica::replicas]
        scored: list[Tensor] = []
        stages = self._mesh.layout.pipeline
        for turn in range(0, rounds, size := PIECE if stages == 1 else 8 * stages):
            if (reason := reason_to_stop()) is not None:
                raise LeftEarly(reason)
            if batches := [self._microbatch(ids[start : start + self._micro]) for start in own_starts[turn : turn + size]]:
                scored += run_pipeline(
                    [self._body], self._step, batches, self._mesh, self.seq_length, self._micro, forward_only=True
                )
        if not self._mesh.is_last_stage:
            return None
        own = torch.zeros(rounds, len(self._dtypes) - 1, self._micro, dtype=torch.float64, device=current_device())
        if scored:
            own[: len(scored)] = torch.stack(scored)
        every = own.new_empty((replicas * rounds, *own.shape[1:]))
        dist.all_gather_into_tensor(every, own, group=self._mesh.groups.dp)
        if not self.is_writer:
            return None
        by_turn = every.view(replicas, rounds, *own.shape[1:]).permute(2, 1, 0, 3).flatten(1)[:, : len(ids)].cpu().numpy()
        contents = content_hashes(self._samples.tokens(ids))
        names = [name for name in self._dtypes if name != "content"]
        rows = {name: values.astype(self._dtypes[name]) for name, values in zip(names, by_turn, strict=True)}
        return rows | {"content": contents}

    def _microbatch(self, ids: np.ndarray) -> Microbatch:
        """These samples on this rank's device. The last one is repeated until the microbatch is full."""
        ids = np.pad(ids, (0, self._micro - len(ids)), mode="edge")
        return make_microbatch(ids, self._samples.tokens(ids), self._samples.masking).to_device()

    def _step(self, body: nn.Module, batch: Microbatch) -> tuple[Tensor, LossFunction]:
        """-> (hidden states, a "loss" function). Its metrics are the columns of the score index."""
        assert isinstance(body, GPT)
        hidden = body(*body.inputs(batch))

        def scores(hidden_sbh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert self._tokens is not None
            of_tokens = self._tokens.score(hidden_sbh, batch.labels.t().flatten(), batch.loss_mask.t().flatten())
            by_window = (
                values.view(-1, batch.tokens.size(0)).t() for values in (of_tokens.loss, of_tokens.rank, of_tokens.entropy)
            )
            none = torch.zeros((), device=hidden_sbh.device)
            return none, none.int(), window_scores(TokenScores(*by_window), batch.loss_mask, self._top_k)

        return hidden, scores


def score_block(
    scorer: Scorer, facts: IndexManifest, block: int, reason_to_stop: Callable[[], str | None] = lambda: None
) -> Rows | None:
    """The rows of a block, 0 for samples that are not scored. Collective over all ranks; the writer receives, the others get None. Raises
    LeftEarly."""
    first, end = samples_of(facts, range(block, block + 1))
    scored = facts.scored(first, end)
    scored_rows = scorer.score(first + np.flatnonzero(scored), reason_to_stop) if scored.any() else {}
    if scored_rows is None or not scorer.is_writer:
        return None
    rows = {name: np.zeros(end - first, dtype) for name, dtype in columns(facts.top_k, facts.seq_length).items()}
    for name, values in scored_rows.items():
        rows[name][scored] = values
    return rows


def teacher_flags(layout: Layout, max_dropped_mass: float) -> SaltConfig:
    """The flags of a training run whose teacher has this layout. max_dropped_mass: --teacher-max-dropped-mass."""
    return SaltConfig(
        teacher_load="",
        kd_steps=1,
        teacher_tensor_model_parallel_size=layout.tensor,
        teacher_pipeline_model_parallel_size=layout.pipeline,
        teacher_max_dropped_mass=max_dropped_mass,
    )


def make_scorer(
    teacher: TeacherCheckpoint,
    layout: Layout,
    samples: Samples,
    *,
    flags: SaltConfig,
    shared_ids: int,
    dtype: str,
    micro_batch_size: int,
    top_k: tuple[int, ...],
    chunk_mib: int | None,
    timeout: timedelta,
    bos: int | None = None,
    look: Look = stay,
) -> Scorer:
    """The teacher over all ranks, loaded and verified as in a training run. Collective over all ranks. Raises UserError.

    flags: from `teacher_flags`. shared_ids: ids that mean the same to the teacher and in the data, those from 0 up to it. Scores are over
    these, as the teacher's distribution is in training. chunk_mib: memory for logits; None: 256 MiB, on a GPU at least 2,048 tokens.
    bos: see `shared_vocabulary.missing_bos`.
    There is no student: the layout that admission asks for is the teacher's own.
    """
    mesh = make_student_mesh(layout, timeout=timeout)
    seed_everything(0, mesh)  # megatron-core's layers need generators, though nothing is drawn
    rows = -(-teacher.model.padded_vocabulary_size(shared_ids) // layout.tensor)
    shard = VocabularyShard(mesh.groups.tp, rows, shared_ids, sequence_parallel=False)
    chunk_tokens = forward_chunk_tokens(rows, current_device().type == "cuda", chunk_mib)
    head = TeacherHead(mesh, replace(shard, sequence_parallel=True), samples.windows[0].seq_length, chunk_tokens, shared_ids)
    admitted = admit(
        teacher,
        flags,
        head,
        dtype=getattr(torch, dtype),
        microbatches_per_forward=1,
        timeout=timeout,
        windows=first_microbatches(samples, WINDOWS),
        bos=bos,
        look=look,
    )
    for measured in (admitted.dropped, admitted.bos_losses):
        if measured is not None:
            log.info("%s", measured)
    scoring = admitted.teacher
    return Scorer(
        scoring.body,
        scoring.weight,
        scoring.mesh,
        shard=shard,
        samples=samples,
        micro_batch_size=micro_batch_size,
        top_k=top_k,
        chunk_tokens=chunk_tokens,
    )
