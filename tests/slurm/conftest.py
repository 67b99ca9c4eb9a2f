"""One cluster for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import running_cluster, why_not
from tests.slurm.jobs import BYTES, ON_ONE_NODE, TINY, Site
from tests.support.program import write_tokens


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = why_not()
    if reason is not None:
        pytest.fail(f"there is no Slurm here: {reason}")
    work = tmp_path_factory.mktemp("jobs")
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield Site(cluster, work)


@pytest.fixture(scope="session")
def data(site: Site) -> str:
    return write_tokens(site.work / "words", windows=200)


@pytest.fixture(scope="session")
def teacher(site: Site, data: str) -> Path:
    """What teacher_1p5b.sh trains, with an early checkpoint of step 2."""
    run = site.work / "teacher"
    job = site.submit("teacher_1p5b.sh", *TINY, *BYTES, "--hidden-size", "16", "--global-batch-size", "4", "--train-iters", "4",
                      options=ON_ONE_NODE, RUN_DIR=run, DATA=data, EARLY_STEP=2)  # fmt: skip
    job.complete()
    return run
