"""How many tokens have logits at one time follows from flags, rows, dtype and the type of device; its memory is what the head allocates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_salt.config import TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.loss_chunk import (
    FLOPS_PER_BYTE,
    LEAST_GPU_TOKENS,
    chunk_tokens,
    even_chunk,
    gpu_tokens,
    head_memory,
    tokens_within,
)
from megatron_salt.model.vocab_parallel import VocabularyShard
from tests.model.test_loss import Alone


@pytest.mark.parametrize("mib", [1, 4, 256, 1000])
@pytest.mark.parametrize("token_bytes", [6 * 256, 8 * 50304 // 4, 6 * 131072, 8 * 262144])
def test_the_logits_of_a_chunk_fit_the_budget_and_use_it(mib: int, token_bytes: int) -> None:
    tokens = tokens_within(mib, token_bytes)
    assert tokens >= 1
    assert tokens * token_bytes <= max(mib << 20, token_bytes)
    assert (tokens + 128) * token_bytes > mib << 20
    assert tokens % 128 == 0 or (tokens < 128 and tokens % 8 == 0) or tokens < 8


@pytest.mark.parametrize("bf16, itemsize", [(False, 4), (True, 2)])
@pytest.mark.parametrize("rows", [8192, 50304 // 4, 131072, 256000])
def test_a_budget_counts_the_students_logits_and_a_float32_teachers(bf16: bool, itemsize: int, rows: int) -> None:
    of_a_cpu = chunk_tokens(TrainingConfig(bf16=bf16), rows, "cpu")
    assert of_a_cpu == tokens_within(256, rows * (itemsize + 4))
    for device_type in ("cpu", "cuda"):
        asked = TrainingConfig(bf16=bf16, loss_chunk_mib=1000)
        assert chunk_tokens(asked, rows, device_type) == tokens_within(1000, rows * (itemsize + 4))
        assert chunk_tokens(TrainingConfig(bf16=bf16, loss_chunk_tokens=7, loss_chunk_mib=9), rows, device_type) == 7


def test_a_cpu_takes_the_tokens_that_it_always_took_in_float32() -> None:
    """The default of 256 MiB and 8 bytes for a pair of logits, written out."""
    default = TrainingConfig()
    assert [chunk_tokens(default, rows, "cpu") for rows in (8192, 32768, 131072, 262144)] == [4096, 1024, 256, 128]
    assert [chunk_tokens(TrainingConfig(bf16=True), rows, "cpu") for rows in (8192, 32768, 131072)] == [5376, 1280, 256]


def traffic_share(tokens: int, itemsize: int, rows: int, hidden_size: int) -> float:
    """The weight gradient's traffic in the time of products and traffic, on a GPU that moves one byte in a unit of time."""
    products = 6 * rows * hidden_size * tokens / FLOPS_PER_BYTE[itemsize]
    traffic = 8 * rows * hidden_size
    return traffic / (products + traffic)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows, hidden_size", [(256000, 2560), (16032, 4096)])
def test_on_a_gpu_the_traffic_of_the_weight_gradient_takes_under_a_twentieth(
    itemsize: int, rows: int, hidden_size: int
) -> None:
    tokens = gpu_tokens(itemsize)
    assert tokens >= LEAST_GPU_TOKENS and tokens % 128 == 0
    assert traffic_share(tokens, itemsize, rows, hidden_size) < 0.05
    assert tokens == LEAST_GPU_TOKENS or traffic_share(tokens - 128, itemsize, rows, hidden_size) >= 0.05  # no more than that


def test_the_tokens_of_a_gpu_are_those_that_the_help_names() -> None:
    for bf16, tokens in ((True, 5888), (False, 2048)):
        assert {chunk_tokens(TrainingConfig(bf16=bf16), rows, "cuda") for rows in (8192, 256000)} == {tokens}


@pytest.mark.parametrize("value", [0, -1])
def test_a_chunk_without_memory_is_refused(value: int) -> None:
    with pytest.raises(UserError, match=f"--loss-chunk-mib must be at least 1, got {value}"):
        TrainingConfig(loss_chunk_mib=value)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 5000, 6016, 6017, 8192, 100000])
def test_chunks_of_a_microbatch_are_as_few_as_can_be_and_about_equal(num_tokens: int) -> None:
    chunk = even_chunk(num_tokens, 6016)
    assert chunk <= 6016 and -(-num_tokens // chunk) == -(-num_tokens // 6016)
    assert chunk % 16 == 0 and chunk < num_tokens / -(-num_tokens // 6016) + 16


class Largest(TorchDispatchMode):
    """Records the bytes of each new tensor of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default) and result.dim() == 2:
            self.sizes.append(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_the_head_allocates_what_is_told(bf16: bool, taught: bool) -> None:
    training, rows, num_tokens = TrainingConfig(bf16=bf16, loss_chunk_tokens=48), 1024, 100
    memory = head_memory(training, rows, 8, num_tokens, "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    hidden, weight = draw(num_tokens, 1, 8).requires_grad_(), draw(rows, 8).requires_grad_()
    teacher = SoftTarget(draw(num_tokens, 1, 4), draw(rows, 4), 0.5, 0.5) if taught else None
    labels, mask, shard = (
        torch.zeros(num_tokens, dtype=torch.int64),
        torch.ones(num_tokens),
        VocabularyShard(Alone(), rows, rows, False),
    )
    with Largest() as new:
        fused_linear_cross_entropy(hidden, weight, labels, mask, shard, chunk_tokens(training, rows, "cuda"), teacher)
    logits = [memory.tokens * rows * size for size in ([dtype.itemsize, 4] if taught else [dtype.itemsize])]
    assert memory.tokens == 48 and all(new.sizes.count(size) >= 1 for size in (*logits, memory.weight_gradient_bytes))
    assert memory.logits_bytes == memory.tokens * rows * (dtype.itemsize + 4)


def test_the_memory_of_a_large_vocabulary_is_what_it_says() -> None:
    memory = head_memory(TrainingConfig(bf16=True), 256 * 1024, 2560, 4 * 1280, "cuda")
    assert memory.weight_gradient_bytes == 2.5 * 2**30 and memory.logits_bytes == 5120 * 6 * 2**18
    assert str(memory) == ("logits of 5120 tokens at a time, 7680.0 MiB (262144 ids x 2 bytes, and 4 for a teacher), "
                           "float32 weight gradient of 2560.0 MiB")  # fmt: skip
