"""What a run asks of a cache: the facts by which it is recognised, and whether the teacher's layers are needed beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from megatron_salt.config import SaltConfig
from megatron_salt.data.samples import Samples
from megatron_salt.model.precision import Precision
from megatron_salt.parallel.device import device_name
from megatron_salt.parallel.mcore_compat import megatron_core_version
from megatron_salt.salt.teacher_cache.manifest import CacheManifest
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint


def manifest_of(
    salt: SaltConfig,
    teacher: TeacherCheckpoint,
    train: Samples,
    dtype: torch.dtype,
    rounding: Mapping[str, Any],
    recipe: str | None,
) -> CacheManifest:
    """The manifest of the cache that a run can use. Reads blocks of each dataset: call it on one rank. rounding: see `rounding_of`.
    recipe: of the teacher's FP8 where no flag names it; None: the GPU that decides it is not known yet.

    --eod-mask-loss is no part of it, because it does not change what the teacher reads.
    """
    masking = train.masking
    looks = masking.reset_position_ids or masking.reset_attention_mask
    recipe = salt.teacher_fp8_recipe or recipe
    fp8 = None if recipe is None else f"{salt.teacher_fp8_format} {recipe}"
    return CacheManifest(
        datasets=train.dataset_facts(),
        seq_length=train.windows[0].seq_length,
        teacher=teacher.fingerprint,
        hidden_size=teacher.model.hidden_size,
        dtype=str(dtype).removeprefix("torch."),
        fp8="none" if salt.teacher_fp8_format is None else fp8,
        masking={
            "reset_position_ids": masking.reset_position_ids,
            "reset_attention_mask": masking.reset_attention_mask,
            "eod": masking.eod if looks else None,
        },
        rounding=dict(rounding),
    )


def rounding_of(salt: SaltConfig, forward_samples: int, precision: Precision) -> dict[str, Any]:
    """What changes the last bits of the teacher's hidden states, by name. Its pipeline stages and the student's layout do not.

    forward_samples: of one forward pass of the teacher. precision: the teacher's."""
    device = device_name() or f"a CPU with {torch.get_num_threads()} threads"
    return {
        "--teacher-tensor-model-parallel-size": salt.teacher_tensor_model_parallel_size,
        "samples of a forward pass (--teacher-micro-batch-size)": forward_samples,
        "precision": str(precision),
        "device": device,
        "torch": torch.__version__,
        "megatron-core": megatron_core_version(),
    }


def held_out_facts(sets: Mapping[str, tuple[Samples, int]], shared_ids: int) -> dict[str, Any]:
    """What the teacher's figures on held-out data depend on, beside the manifest. sets: {name: (samples, how many are evaluated)}.

    Reads blocks of each dataset: call it on one rank."""
    return {
        "shared_ids": shared_ids,
        "sets": {name: [samples.fingerprint, count, asdict(samples.masking)] for name, (samples, count) in sets.items()},
    }


def why_layers_are_needed(holds_all: bool, precision: Precision, own_ids: bool, bos: int | None, evaluates: bool) -> str | None:
    """Why the teacher's layers must be loaded beside a cache; None where the output weight alone will do. Pure.

    holds_all: the cache has every sample that is left of stage 1. own_ids: the teacher's distribution has ids that are not shared.
    evaluates: the teacher will be evaluated on held-out data.
    """
    reasons: Sequence[tuple[bool, str]] = (
        (not holds_all, "it does not hold all samples of stage 1"),
        (evaluates, "it has no figures of the teacher on this held-out data"),
        (precision.fp8_format is not None, "the teacher's FP8 is checked"),
        (own_ids, "what the teacher gives to ids that are not shared is checked"),
        (bos is not None, "the teacher's loss with and without BOS is measured"),
    )
    return next((reason for holds, reason in reasons if holds), None)
