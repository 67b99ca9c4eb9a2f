"""Pairs of runs: by seed and settings, and no run is left out in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_salt.config import RunConfig, TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.study.analysis.pairs import pair_runs, unusable
from tests.study.analysis.runs import falling, run

CURVE = falling(5.0, 4.0)


def test_runs_of_one_seed_are_a_pair_whatever_their_order() -> None:
    results = [run("salt", 2, CURVE), run("baseline", 1, CURVE), run("baseline", 2, CURVE), run("salt", 1, CURVE)]
    found = pair_runs(results, "salt", "baseline")
    assert [(pair.seed, pair.arm.kind, pair.against.kind) for pair in found.pairs] == [
        (1, "salt", "baseline"),
        (2, "salt", "baseline"),
    ]
    assert all(pair.arm.seed == pair.against.seed for pair in found.pairs)
    assert found.told == () and found.lost == ()


def test_every_run_that_is_left_out_is_told_with_its_reason() -> None:
    results = [
        *(run("baseline", seed, CURVE) for seed in (1, 2, 3, 4, 6)),
        run("baseline", 5, CURVE, state="failed", reason="killed by signal 9"),
        run("salt", 1, CURVE, state="failed", reason="the loss is not finite"),
        run("salt", 2, CURVE, state="running"),
        run("salt", 3, CURVE, planned=12),
        run("salt", 5, CURVE),
        run("salt", 6, CURVE, logged=False),
        run("salt", 7, CURVE, state="waiting", logged=False),
    ]
    found = pair_runs(results, "salt", "baseline")
    assert found.pairs == ()
    assert found.told == (
        "seed 1: salt failed: the loss is not finite",
        "seed 2: salt is running",
        "seed 3: the log of salt ends at step 10 of 12",
        "seed 4: no run of salt",
        "seed 5: baseline failed: killed by signal 9",
        "seed 6: salt finished, but no step is in its log",
        "seed 7: salt is waiting; no run of baseline",
    )
    assert [pair.seed for pair in found.lost] == [1]


def test_a_partner_has_the_settings_that_the_other_arm_has() -> None:
    """SALT has two axes, the baseline only the learning rate."""
    rates = [run("baseline", 1, CURVE, settings={"lr": rate}) for rate in ("1e-3", "2e-3")]
    salt = [run("salt", 1, CURVE, settings={"lr": rate, "w": w}) for rate in ("1e-3", "2e-3") for w in ("0.5", "1")]
    for one in salt:
        (pair,) = pair_runs([*rates, *salt], one.label, "baseline").pairs
        assert pair.arm is one and pair.against.settings == {"lr": one.settings["lr"]}
    only = run("baseline", 1, CURVE)
    assert pair_runs([only, *salt], "salt lr=1e-3 w=1", "baseline").pairs[0].against is only
    assert pair_runs([only, *rates, *salt], "salt lr=1e-3 w=1", "baseline").pairs[0].against is rates[0]
    assert pair_runs([*rates, *salt], "salt lr=1e-3 w=1", "baseline lr=2e-3").pairs[0].against is rates[1]
    nearest = run("baseline", 1, CURVE, settings={"lr": "1e-3", "w": "1"})
    assert pair_runs([*rates, nearest, *salt], "salt lr=1e-3 w=1", "baseline").pairs[0].against is nearest


def test_a_length_in_samples_is_a_length_too() -> None:
    one = run("salt", 1, CURVE)
    training = TrainingConfig(seq_length=6, global_batch_size=3, train_samples=36)
    assert unusable(replace(one, config=RunConfig(training=training))) == "the log of salt ends at step 10 of 12"
    assert unusable(replace(one, config=None)) == ""


def test_an_unknown_arm_and_a_doubled_seed_are_refused() -> None:
    results = [run("salt", 1, CURVE), run("baseline", 1, CURVE), run("baseline", 1, CURVE, arm="twice")]
    with pytest.raises(UserError, match=r"no run of sallt \(did you mean salt\?\); the study has salt, baseline, twice"):
        pair_runs(results, "sallt", "baseline")
    with pytest.raises(UserError, match="no run of base"):
        pair_runs(results, "salt", "base")
    with pytest.raises(UserError, match="two runs of salt have seed 1: runs/salt/1 and runs/salt/1"):
        pair_runs([results[0], *results], "salt", "baseline")
