"""Fixtures of this folder."""

from tests.support.datasets import write_dataset

__all__ = ["write_dataset"]
