"""Metrics of an example by hand, and standard errors against the formula of the mean."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_salt.errors import UserError
from megatron_salt.evaluation.metrics import Answers, estimates, of_example, refuse_unknown
from megatron_salt.evaluation.task_file import Example
from megatron_salt.metrics.figure_text import figure_text


def example(*answers: str, gold: int) -> Example:
    return Example(line=1, pairs=tuple(("", " " + answer) for answer in answers), answers=answers, gold=gold, description="")


def of(
    one: Example, log_likelihoods: list[float], num_tokens: list[int] | None = None, greedy: bool = False
) -> dict[str, float]:
    count = len(log_likelihoods)
    said = Answers(log_likelihoods=log_likelihoods, num_tokens=num_tokens or [1] * count, greedy=[greedy] * count)
    return of_example(one, said, is_greedy=count == 1)


def test_each_norm_divides_by_its_own_length():
    # Lengths: 4 characters, 7 bytes, 2 tokens; and 6 characters, 6 bytes, 5 tokens.
    found = of(example("日éab", "abcdef", gold=0), [-7.0, -9.0], [2, 5])
    assert found["acc"] == 1.0  # -7 > -9
    assert found["acc_norm"] == 0.0  # -7/4 < -9/6
    assert found["acc_norm_bytes"] == 1.0  # -7/7 > -9/6
    assert found["acc_norm_tokens"] == 0.0  # -7/2 < -9/5
    assert found["logprob_per_byte"] == pytest.approx(-7 / 7)
    assert found["margin_per_byte"] == pytest.approx(-7 / 7 + 9 / 6)


def test_the_margin_is_that_over_the_best_wrong_answer():
    assert of(example("aa", "bb", "cc", gold=1), [-2.0, -6.0, -1.0])["margin_per_byte"] == pytest.approx(-3.0 + 0.5)


def test_of_equal_answers_the_first_counts():
    assert [of(example("aa", "bb", gold=gold), [-3.0, -3.0])["acc"] for gold in (0, 1)] == [1.0, 0.0]


def test_a_continuation_counts_where_it_is_greedy():
    one = Example(line=1, pairs=(("a", " bcd"),), answers=(" bcd",), gold=0, description="")
    assert of(one, [-8.0], greedy=True) == {"acc": 1.0, "perplexity": -8.0, "logprob_per_byte": -2.0}
    assert of(one, [-8.0], greedy=False)["acc"] == 0.0


def test_standard_errors_are_those_of_the_mean_and_seeded():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = estimates({"acc": values, "perplexity": values}, seed=1)
    of_mean = values.std(ddof=1) / math.sqrt(400)
    assert found["acc"].value == pytest.approx(values.mean())
    assert found["acc"].stderr == pytest.approx(of_mean, rel=0.1)
    assert found["perplexity"].value == pytest.approx(math.exp(-values.mean()))
    assert found["perplexity"].stderr == pytest.approx(math.exp(-values.mean()) * of_mean, rel=0.15)  # delta method
    assert estimates({"acc": values}, seed=1)["acc"] == found["acc"]
    assert estimates({"acc": values}, seed=2)["acc"].stderr != found["acc"].stderr
    assert estimates({"acc": [1.0]}, seed=1)["acc"].stderr == 0.0


def test_an_unknown_metric_is_refused_by_name():
    with pytest.raises(UserError, match=r"--metrics acc_nrom is no metric \(did you mean acc_norm\?\); known are acc, "):
        refuse_unknown(("acc", "acc_nrom"))
    with pytest.raises(UserError, match="--metrics names one twice: acc acc"):
        refuse_unknown(("acc", "acc"))


def test_a_perplexity_that_is_too_large_for_a_number_is_left_out() -> None:
    column = [-900.0, -2.0, -1000.0]
    assert list(estimates({"acc": [0.0, 1.0, 0.0], "perplexity": [-2.0] * 3}, seed=1)) == ["acc", "perplexity"]
    assert list(estimates({"acc": [0.0, 1.0, 0.0], "perplexity": [-1000.0] * 3}, seed=1)) == ["acc"]
    assert list(estimates({"acc": [0.0, 1.0, 0.0], "perplexity": column}, seed=1)) == ["acc"]  # the standard error is


def test_a_large_figure_is_short() -> None:
    assert [figure_text(value) for value in (-1.23456, 99999.5, 2.16429e35)] == ["-1.2346", "99999.5000", "2.164e+35"]
