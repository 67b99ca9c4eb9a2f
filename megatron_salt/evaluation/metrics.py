"""Metrics of likelihood tasks, from the log-likelihoods of their answers. Pure.

Accuracies are those of lm-evaluation-harness 0.4.13: the likeliest answer must be the right one, and of equal answers the first counts.
`acc_norm` divides a log-likelihood by the characters of the choice without its delimiter. The smooth metrics tell models apart long before
their accuracies leave chance (DataDecide, arXiv 2504.11393).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.evaluation.task_file import Example, Form

_SMOOTH = ("logprob_per_byte", "margin_per_byte")
METRICS: Mapping[Form, tuple[str, ...]] = {
    "choices": ("acc", "acc_norm", "acc_norm_bytes", "acc_norm_tokens", *_SMOOTH),
    "contexts": ("acc", *_SMOOTH),
    "continuation": ("acc", "perplexity", "logprob_per_byte"),
    "passage": ("acc", "perplexity", "logprob_per_byte"),
}
"""Metrics of each form. In the greedy forms `acc` says whether each token of the continuation is the model's likeliest."""
KNOWN = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A metric of a task, and the standard error of it by the bootstrap over the task's examples."""

    value: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the model says of one example's answers."""

    log_likelihoods: Sequence[float]
    """Of each continuation, nats."""
    num_tokens: Sequence[int]
    """Of each continuation."""
    greedy: Sequence[bool]
    """Whether each token of the continuation is the likeliest."""


def refuse_unknown(metrics: Sequence[str]) -> None:
    """UserError where --metrics names no metric, or one twice."""
    for name in metrics:
        if name not in KNOWN:
            raise UserError(f"--metrics {name} is no metric{did_you_mean(name, KNOWN)}; known are {', '.join(KNOWN)}")
    if len(set(metrics)) < len(metrics):
        raise UserError(f"--metrics names one twice: {' '.join(metrics)}")


def of_example(example: Example, said: Answers, is_greedy: bool) -> dict[str, float]:
    """Every metric of the form for one example. `perplexity` is still the log-likelihood; `estimates` takes the exponential."""
    log_likelihoods = np.array(said.log_likelihoods, np.float64)
    num_bytes = np.array([len(answer.encode()) for answer in example.answers])
    gold, per_byte = example.gold, log_likelihoods / num_bytes
    if is_greedy:
        return {
            "acc": float(said.greedy[0]),
            "perplexity": float(log_likelihoods[0]),
            "logprob_per_byte": float(per_byte[0]),
        }

    def is_right(scores: np.ndarray) -> float:
        return float(np.argmax(scores) == gold)

    return {
        "acc": is_right(log_likelihoods),
        "acc_norm": is_right(log_likelihoods / [len(answer) for answer in example.answers]),
        "acc_norm_bytes": is_right(per_byte),
        "acc_norm_tokens": is_right(log_likelihoods / np.array(said.num_tokens)),
        "logprob_per_byte": float(per_byte[gold]),
        "margin_per_byte": float(per_byte[gold] - np.delete(per_byte, gold).max()),
    }


def estimates(values: Mapping[str, Sequence[float]], seed: int) -> dict[str, Estimate]:
    """{metric: mean over examples and its standard error}; for perplexity exp(-mean). values: {metric: one value an example}.

    A perplexity is left out where it, or its standard error, is too large for a number.

    Each of RESAMPLES times as many examples as there are are drawn with replacement, the same for all metrics. The standard error is the
    standard deviation of the metric over these draws. The same seed and number of examples give the same draws.
    """
    names = list(values)
    table = np.array([values[name] for name in names], np.float64)
    random = np.random.default_rng(seed)
    num = table.shape[1]
    draws = np.stack([np.take(table, random.integers(0, num, num), axis=1).mean(1) for _ in range(RESAMPLES)], axis=1)

    def figure(name: str, means: np.ndarray) -> np.ndarray:
        return np.exp(-means) if name == "perplexity" else means

    with np.errstate(over="ignore", invalid="ignore"):
        found = {
            name: Estimate(float(figure(name, table[row].mean())), float(figure(name, draws[row]).std(ddof=1)))
            for row, name in enumerate(names)
        }
    return {
        name: one
        for name, one in found.items()
        if name != "perplexity" or (math.isfinite(one.value) and math.isfinite(one.stderr))
    }
