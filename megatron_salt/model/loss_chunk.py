"""How many tokens have logits at one time in the output head, and the memory that the head takes. Pure.

The chunk decides how sums are rounded. It follows from flags, the rows of the output weight on a rank, the dtype and the type of device.
A teacher and the size of a microbatch do not matter: training without a teacher must equal, bit for bit, training after one is freed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_salt.cards import CARDS, reached
from megatron_salt.config import TrainingConfig

CPU_MIB = 256
"""The default of --loss-chunk-mib on a CPU."""
LEAST_GPU_TOKENS = 2048
"""Products of fewer rows leave parts of a GPU without work."""
TRAFFIC_SHARE = 0.05
"""The largest share of the head's time on a GPU that reading and writing the weight gradient may take."""
_CARD = CARDS["NVIDIA H100 80GB HBM3"]
_RATES = {2: reached(_CARD.bf16_tflops, _CARD.gb_per_s), 4: reached(_CARD.fp32_tflops, _CARD.gb_per_s)}
FLOPS_PER_BYTE = {itemsize: rates.flops / rates.bytes for itemsize, rates in _RATES.items()}
"""{bytes of a number: FLOPs that a GPU multiplies in the time in which it moves one byte of its memory}, for `gpu_tokens`.

bfloat16 and float32 on the H100 SXM, by the table of cards. One figure serves all GPUs, so that a run rounds alike on each. Where a GPU
does less for each byte, as A100 and H200 do, the traffic's share is smaller; on B200 it is larger by a quarter.
"""
_TEACHER_BYTES = 4
"""Bytes of a teacher's logit: float32."""


def chunk_tokens(training: TrainingConfig, rows: int, device_type: str) -> int:
    """Tokens whose logits exist at one time. rows: of the output weight on a rank. device_type: cpu or cuda."""
    itemsize = bytes_of_a_number(training)
    if training.loss_chunk_tokens is not None:
        return training.loss_chunk_tokens
    if training.loss_chunk_mib is None and device_type == "cuda":
        return gpu_tokens(itemsize)
    return tokens_within(training.loss_chunk_mib or CPU_MIB, rows * (itemsize + _TEACHER_BYTES))


def bytes_of_a_number(training: TrainingConfig) -> int:
    """Bytes of a weight, a hidden state and a student's logit."""
    return 2 if training.bf16 else 4


def tokens_within(mib: int, token_bytes: int) -> int:
    """Tokens that fit into `mib` MiB: a multiple of 128 if so many fit, else of 8, at least 1."""
    tokens = (mib << 20) // token_bytes
    for multiple in (128, 8):
        if tokens >= multiple:
            return tokens // multiple * multiple
    return max(1, tokens)


def forward_chunk_tokens(rows: int, on_gpu: bool, mib: int | None = None) -> int:
    """Tokens whose float32 logits exist at one time where a model only scores. rows: of the output weight on a rank. mib: memory for
    them; None: 256 MiB, on a GPU at least 2,048 tokens."""
    tokens = tokens_within(mib or CPU_MIB, rows * 4)
    return max(LEAST_GPU_TOKENS, tokens) if on_gpu and mib is None else tokens


def gpu_tokens(itemsize: int) -> int:
    """Tokens of a chunk C on a GPU: at least 2,048, and so many that the weight gradient's traffic takes under 5% of the head's time.

    The products take 6 V h FLOPs a token: logits, gradient of the hidden states, gradient of the weight. Each chunk reads and writes
    the float32 weight gradient: 8 V h / C bytes a token. With F FLOP/s and B bytes/s the second takes the share s of both at

        C = (1 / s - 1) (8 / 6) (F / B),

    without V and h. A teacher, the passes over the logits and the optimizer's gradient only make the head's time longer. itemsize: bytes
    of a number of the operands. Rounded up to a multiple of 128.
    """
    fewest = (1 / TRAFFIC_SHARE - 1) * 8 / 6 * FLOPS_PER_BYTE[itemsize]
    return max(LEAST_GPU_TOKENS, math.ceil(fewest / 128) * 128)


def even_chunk(num_tokens: int, most: int) -> int:
    """Tokens of a chunk, at most `most`: the fewest chunks of about equal size; a multiple of 16 if that fits."""
    num_chunks = max(1, -(-num_tokens // most))
    return min(most, -(-num_tokens // (16 * num_chunks)) * 16)


@dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """What the output head allocates on a rank of the last stage for a microbatch, beside hidden states."""

    tokens: int
    """Tokens of a chunk."""
    rows: int
    """Rows of the output weight on a rank."""
    hidden_size: int
    itemsize: int
    """Bytes of a student's logit."""

    @property
    def logits_bytes(self) -> int:
        """Both models' logits of a chunk; without a teacher only its part is not there."""
        return self.tokens * self.rows * (self.itemsize + _TEACHER_BYTES)

    @property
    def weight_gradient_bytes(self) -> int:
        """The float32 weight gradient that exists between the head's forward and backward pass. There is one at a time."""
        return 4 * self.rows * self.hidden_size

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens at a time, {self.logits_bytes / 2**20:.1f} MiB "
            f"({self.rows} ids x {self.itemsize} bytes, and {_TEACHER_BYTES} for a teacher), "
            f"float32 weight gradient of {self.weight_gradient_bytes / 2**20:.1f} MiB"
        )


def head_memory(training: TrainingConfig, rows: int, hidden_size: int, num_tokens: int, device_type: str) -> HeadMemory:
    """The memory of the head for a microbatch of `num_tokens` tokens on a rank. rows, device_type: as in `chunk_tokens`."""
    tokens = even_chunk(num_tokens, chunk_tokens(training, rows, device_type))
    return HeadMemory(tokens=tokens, rows=rows, hidden_size=hidden_size, itemsize=bytes_of_a_number(training))
