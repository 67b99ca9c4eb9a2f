"""Warnings of the libraries are hidden, everybody else's are not."""

from __future__ import annotations

import warnings

import pytest

from megatron_salt.parallel.library_warnings import hide_library_warnings


@pytest.mark.parametrize(
    "module, category, shown",
    [
        ("megatron.core.optimizer.optimizer", UserWarning, 0),
        ("torch.distributed.c10d_logger", FutureWarning, 0),
        ("torch.distributed.c10d_logger", UserWarning, 1),
        ("megatron.core.optimizer.optimizer", RuntimeWarning, 1),
        ("megatron_salt.model.loss", UserWarning, 1),
        ("torch.nn", UserWarning, 1),
    ],
)
def test_what_is_hidden(module: str, category: type[Warning], shown: int) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_library_warnings()
        warnings.warn_explicit("text", category, "file.py", 1, module=module)
    assert len(seen) == shown
