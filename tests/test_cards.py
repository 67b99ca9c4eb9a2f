"""The table of GPUs."""

from __future__ import annotations

import math

import pytest

from megatron_salt.cards import CARDS, FLOPS_ALONE, card_named, peak_tflops, reached


@pytest.mark.parametrize("name, bf16, fp8, gb_per_s", [
    ("NVIDIA A100-SXM4-80GB", 312, None, 2039),
    ("NVIDIA H100 80GB HBM3", 989.5, 1979, 3350),
    ("NVIDIA H200", 989.5, 1979, 4800),
    ("NVIDIA B200", 2250, 4500, 7700),
    ("NVIDIA L40S", 362.05, 733, 864),
])  # fmt: skip
def test_data_sheets_without_sparsity(name, bf16, fp8, gb_per_s):
    card = card_named(name)
    assert card is not None
    assert (card.tflops("bf16"), card.tflops("fp8"), card.gb_per_s) == (bf16, fp8, gb_per_s)


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA A10G", "NVIDIA A100", "Tesla V100-SXM2-16GB", "nvidia h200", ""])
def test_a_name_that_is_only_alike_is_not_found(name):
    assert card_named(name) is None


def test_the_peak_of_a_device_is_the_given_one_or_the_tables_or_unknown():
    assert peak_tflops("NVIDIA H200", "bf16", None) == 989.5 and peak_tflops("NVIDIA H200", "fp8", None) == 1979
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp8", None) is None  # it has no FP8
    assert peak_tflops("a new card", "bf16", None) is None is peak_tflops(None, "fp32", None)
    assert peak_tflops("NVIDIA H200", "bf16", 900.0) == 900.0 and peak_tflops(None, "fp8", 2.0) == 4.0


def test_every_card_is_plausible():
    for name, card in CARDS.items():
        assert name.startswith("NVIDIA ") and card_named(f" {name} ") == card
        assert 2 * card.fp32_tflops <= 1.01 * card.bf16_tflops <= 1.01 * (card.fp8_tflops or math.inf), name
        assert 20 < card.bf16_tflops * 1e3 / card.gb_per_s < 500 and 24 <= card.memory_gib <= 192, name  # FLOPs for each byte


def test_a_product_takes_its_arithmetic_or_its_memory():
    rates = reached(100.0, 1000.0)
    assert (rates.flops, rates.bytes) == pytest.approx((7e13, 9e11))
    assert rates.product(7e13, 0) == pytest.approx(1.0) and rates.product(0, 9e11) == pytest.approx(1.0)
    assert rates.product(7e13, 9e11) == pytest.approx(1.0)
    assert FLOPS_ALONE.product(5.0, 1e30) == 5.0
