"""What a search found, as text. Pure."""

from __future__ import annotations

from megatron_salt.config import RunConfig
from megatron_salt.planner.memory import GIB
from megatron_salt.planner.search.search import Found, SearchResult
from megatron_salt.planner.search.space import flags_of

SHOWN = 5
"""Messages of the trainer that are shown."""


def search_lines(result: SearchResult, given: RunConfig, usable: float) -> list[str]:
    """The best layouts with the flags to add to those of `given`, and why the others do not fit."""
    lines = []
    for number, found in enumerate(result.best, 1):
        lines += [f"{number}. {_figures(found)}", f"   {' '.join(flags_of(found.timed.run.config, given)) or 'as it is'}"]
    lines.append(f"{result.fit} of the layouts that were traced fit {usable:.1f} GiB")
    for cause, count, gib in result.too_large:
        lines.append(f"{count} do not fit, {cause}; the smallest of them needs {gib:.1f} GiB")
    if result.slower:
        lines.append(f"{result.slower} were timed alone: they are slower than all of these (--search-layouts traces more)")
    for message, count in result.refused[:SHOWN]:
        lines.append(f"{count} are refused by the trainer, such as: {message}")
    rest = sum(count for _, count in result.refused[SHOWN:])
    return [*lines, f"{rest} are refused for other reasons"] if rest else lines


def _figures(found: Found) -> str:
    timed, run = found.timed, found.timed.run
    times = f"{timed.stage2:.3f} s a step"
    if timed.stage1:
        times = f"{' then '.join(f'{seconds:.3f}' for _, seconds in timed.stage1)} s a step of stage 1, {timed.stage2:.3f} of stage 2"
    sizes = ", ".join(f"{name} {size}" for name, size in run.layout.sizes.items())
    return (
        f"about {timed.seconds / 3600:,.0f} h ({times}), {found.memory.most / GIB:.1f} GiB: {sizes}, "
        f"micro-batch {run.plan.micro_batch_size}"
    )
