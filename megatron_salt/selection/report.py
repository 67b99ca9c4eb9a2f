"""The report of a selection, for people who will train on it: PREFIX.txt and PREFIX.png.

Counts are of all samples. The histogram of the score, the overlap with other scores, and the examples are of a random part of 2^20
samples where there are more; the report says so. The random part depends on the number of samples alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.data.order import permute
from megatron_salt.errors import UserError
from megatron_salt.files import whole_file
from megatron_salt.selection.eligibility import dataset_ranges
from megatron_salt.selection.rules import Choice, cuts, not_scored, order_keys
from megatron_salt.selection.selection_file import Selection
from megatron_salt.selection.ties import tie_ranks
from megatron_salt.selection.window_text import WindowText

SAMPLED = 1 << 20
BARS, WIDTH = 20, 60
EXCERPT = 400  # characters of an example
TIES_TOLD = 0.01  # the report tells of ties that decided this share of the chosen samples, or more
MAX_TIE_SHARE = 0.05  # a choice of which ties decide more is refused, unless --allow-ties


@dataclass(frozen=True)
class Sampled:
    """The eligible samples among a random part of all samples."""

    of: int
    """Size of the random part: 2^20, or all samples where they are fewer."""
    ids: np.ndarray
    """int64 [n], ascending"""
    chosen: np.ndarray
    """bool [n]"""
    scores: dict[str, np.ndarray]
    """float32 [n] for every column that is a score"""

    @property
    def name(self) -> str:
        """What the figures are of, for the report."""
        return (
            f"{len(self.ids)} eligible samples of a random sample of {self.of}"
            if self.of == SAMPLED
            else "all eligible samples"
        )


def sample(choice: Choice, selection: Selection, size: int = SAMPLED) -> Sampled:
    """A random part of at most `size` samples, always the same for the same number of samples."""
    num, ids, scores = _sample_scores(choice, size)
    place = np.minimum(np.searchsorted(selection.ids, ids.astype(selection.ids.dtype)), len(selection.ids) - 1)
    return Sampled(num, ids, selection.ids[place] == ids, scores)


def _sample_scores(choice: Choice, size: int) -> tuple[int, np.ndarray, dict[str, np.ndarray]]:
    """(of, ids, scores) as in `Sampled`."""
    index = choice.index
    num = min(index.num_samples, size)
    ids = np.arange(num) if num == index.num_samples else np.sort(permute(np.arange(num), index.num_samples, 0))
    ids = ids[choice.eligible.have(ids)]
    return num, ids, index.rows(ids, [name for name, dtype in index.columns.items() if dtype.kind == "f"])


def refuse_ties(choice: Choice, size: int = SAMPLED) -> None:
    """Raise UserError where ties decide more than `MAX_TIE_SHARE` of a choice. The message names the scores by which they decide less."""
    if choice.tie_share <= MAX_TIE_SHARE:
        return
    shares = tie_shares(choice, size)
    good = [f"{name} ({share:.1%})" for name, share in shares.items() if share <= MAX_TIE_SHARE]
    others = (
        f"with as many by another --score ties decide less: {', '.join(good)}"
        if good
        else "no other score of the index does better"
    )
    raise UserError(
        f"--score {choice.column} does not tell the samples apart: {choice.tied} of the {choice.count} that would be chosen, "
        f"{choice.tie_share:.1%}, have the very score of a cut, as others have; above {MAX_TIE_SHARE:.0%} that is refused; "
        f"{others}; or --allow-ties, which lets --tie-seed {choice.rule.tie_seed} choose among them"
    )


def tie_shares(choice: Choice, size: int = SAMPLED) -> dict[str, float]:
    """For every other score without NaN: the share of the chosen samples that ties would decide if the same rule went by that score.
    Measured on a random part of at most `size` samples."""
    _, ids, columns = _sample_scores(choice, size)
    shares = {}
    for name, scores in columns.items():
        if name != choice.column and not np.isnan(scores).any():
            tied = count = 0
            for part in choice.ranges:
                keys = np.sort(order_keys(scores[slice(*np.searchsorted(ids, [part.first, part.end]))]))
                keys = keys if choice.rule.name == "bottom" else keys[::-1]
                taken = round(part.count * len(keys) / max(part.eligible, 1))
                skip = min(int(choice.rule.skip * len(keys) + 0.5), len(keys) - taken)
                edges = np.concatenate([keys[:skip][-1:], keys[skip + taken :][:1]])
                tied, count = tied + int(np.isin(keys[skip : skip + taken], edges).sum()), count + taken
            shares[name] = tied / max(count, 1)
    return shares


def report(choice: Choice, selection: Selection, sampled: Sampled, num_examples: int, text: WindowText | str) -> str:
    """The text of PREFIX.txt. text: decodes the examples, or says why there are none."""
    parts = [
        _summary(choice, selection),
        _datasets(choice, selection),
        _histogram(choice, sampled),
        _overlap(choice, sampled),
        _examples(choice, sampled, num_examples, text),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _summary(choice: Choice, selection: Selection) -> list[str]:
    scores, rule, eligible = selection.manifest.scores, selection.manifest.rule, choice.eligible
    num_eligible = sum(part.eligible for part in choice.ranges)
    shown = ", ".join(f"{name} {value}" for name, value in rule.items() if value is not None and value is not False)
    doubles = f"{eligible.duplicates} duplicates" if rule["exclude_duplicates"] else "duplicates were not looked for"
    share, tokens = f"{choice.count / num_eligible:.2%} of the {num_eligible} eligible ones", choice.count * scores.seq_length
    doubles += not_scored(eligible)
    held_out = f"{eligible.held_out} held out (--valid-share {selection.manifest.valid_share})"
    return [
        f"{selection.path}: {choice.count} of {choice.index.num_samples} samples, {share}; {tokens} tokens",
        f"chosen by {shown}",
        f"scored by {scores.teacher_directory}, step {scores.teacher_step}, {scores.teacher}",
        f"not eligible: {held_out}, {eligible.empty} without a token that counts, {doubles}; no eligible sample has NaN as its score",
    ]


def _datasets(choice: Choice, selection: Selection) -> list[str]:
    """A line for each dataset: its counts, and the score at its cut."""
    lines = [f"{'samples':>12}{'eligible':>12}{'chosen':>12}{'share':>9}  {'cut':20}  dataset"]
    for dataset, (first, end) in zip(selection.manifest.scores.datasets, dataset_ranges(choice.index.manifest), strict=True):
        places, eligible = selection.between(first, end), choice.eligible.count(first, end)
        chosen = places.stop - places.start
        part = next(part for part in choice.ranges if part.first <= first < part.end)
        at = " to ".join(f"{cut:.6g}" for cut in cuts(choice, part))
        lines.append(
            f"{end - first:12}{eligible:12}{chosen:12}{chosen / max(eligible, 1):9.2%}  {at or 'none':20}  {dataset.prefix}"
        )
    return lines


def _all_cuts(choice: Choice) -> list[float]:
    return sorted({cut for part in choice.ranges for cut in cuts(choice, part)})


def _edges(scores: np.ndarray) -> np.ndarray:
    """The edges of BARS bars over the finite scores: float64 [BARS + 1]."""
    finite = scores[np.isfinite(scores)]
    return np.histogram_bin_edges(finite.astype(np.float64) if finite.size else np.zeros(1), BARS)


def _histogram(choice: Choice, sampled: Sampled) -> list[str]:
    scores = sampled.scores[choice.column]
    edges = _edges(scores)
    all_of, chosen = (np.histogram(values, edges)[0] for values in (scores, scores[sampled.chosen]))
    at = _all_cuts(choice)
    lines = [f"{choice.column} of {sampled.name}: # chosen, . not, > at a cut"]
    for low, high, count, taken in zip(edges[:-1], edges[1:], all_of.tolist(), chosen.tolist(), strict=True):
        width = -(-count * WIDTH // max(int(all_of.max()), 1))
        marks = round(taken / max(count, 1) * width)
        is_cut = any(low <= cut < high or (cut == high == edges[-1]) for cut in at)
        lines.append(f"{low:10.4f} {'>' if is_cut else '|'}{'#' * marks}{'.' * (width - marks)} {taken} of {count}")
    infinite = int((~np.isfinite(scores)).sum())
    return [*lines, *([f"and {infinite} infinite ones"] if infinite else []), *_ties(choice)]


def _ties(choice: Choice) -> list[str]:
    """Lines about ties, where they decided TIES_TOLD of the chosen samples or more."""
    if choice.tie_share < TIES_TOLD:
        return []
    taken = f"{choice.tied} of the {choice.count} chosen ones, {choice.tie_share:.2%},"
    lines = [
        f"{taken} have the very score of a cut, as others have that were not chosen: --tie-seed {choice.rule.tie_seed} decided"
    ]
    if choice.column.startswith("median_zeroed") and 0.0 in _all_cuts(choice):
        lines.append(
            "a zeroed median is 0 where half of the tokens or more are outside the top k: with a teacher this young, a larger "
            "--score-top-k, the dropped reading or a mean tells more samples apart"
        )
    return lines


def overlaps(choice: Choice, sampled: Sampled) -> dict[str, float]:
    """For every other score without NaN: the share of the chosen samples that the same rule would choose by that score. For threshold and
    random: the share that is among as many samples with the highest values of that score."""
    rule, shares = choice.rule, {}
    for name, scores in sampled.scores.items():
        if (name != choice.column or rule.name == "random") and not np.isnan(scores).any():
            both = 0
            for part in choice.ranges:
                own = slice(*np.searchsorted(sampled.ids, [part.first, part.end]))
                chosen, keys = sampled.chosen[own], order_keys(scores[own])
                order = np.lexsort((tie_ranks(sampled.ids[own], rule.tie_seed), keys if rule.name == "bottom" else ~keys))
                count = int(chosen.sum())
                skip = min(int(rule.skip * len(order) + 0.5), len(order) - count)
                both += int(chosen[order[skip : skip + count]].sum())
            shares[name] = both / max(int(sampled.chosen.sum()), 1)
    return shares


def _overlap(choice: Choice, sampled: Sampled) -> list[str]:
    chance = sampled.chosen.mean() if len(sampled.ids) else 0.0
    lines = [f"overlap with as many by another score, of {sampled.name} (by chance {chance:.1%}):"]
    shares = overlaps(choice, sampled)
    lines += [f"{share:9.1%}  {name}" for name, share in shares.items()]
    unread = [name for name in sampled.scores if name not in shares and name != choice.column]
    return [*lines, *([f"not compared, for some are NaN: {', '.join(unread)}"] if unread else [])]


# --- examples ---------------------------------------------------------------------------------------------------------


def examples(choice: Choice, sampled: Sampled, num: int) -> dict[str, np.ndarray]:
    """Positions in `sampled` of examples, at most `num` of a kind: the highest and lowest scores, and those on either side of the cut."""
    keys = order_keys(sampled.scores[choice.column]).astype(np.int64)
    order = np.argsort(-keys, kind="stable")
    distance = np.full(len(keys), -1)  # from the cut of the sample's range
    for part in choice.ranges:
        own = slice(*np.searchsorted(sampled.ids, [part.first, part.end]))
        for cut in cuts(choice, part)[:1]:
            distance[own] = np.abs(keys[own] - int(order_keys(np.array([cut], np.float32))[0]))
    nearest = order[np.argsort(distance[order], kind="stable")]
    nearest = nearest[distance[nearest] >= 0]
    return {
        "highest scores": order[:num],
        "chosen, next to the cut": nearest[sampled.chosen[nearest]][:num],
        "not chosen, next to the cut": nearest[~sampled.chosen[nearest]][:num],
        "lowest scores": order[::-1][:num],
    }


def _examples(choice: Choice, sampled: Sampled, num: int, text: WindowText | str) -> list[str]:
    if isinstance(text, str):
        return [f"no examples: {text}"]
    lines = [f"examples, of {sampled.name}"]
    for title, places in examples(choice, sampled, num).items():
        lines += ["", f"{title}:" if len(places) else f"{title}: none"]
        ids, scores, taken = sampled.ids[places], sampled.scores[choice.column][places], sampled.chosen[places]
        for dataset, window, sample_id, score, chosen, content in zip(
            *text.locate(ids), ids, scores, taken, text.of(ids), strict=True
        ):
            excerpt = " ".join(content[: 2 * EXCERPT].split())[:EXCERPT]
            lines.append(
                f"  sample {sample_id} ({text.windows[dataset].file.prefix}, window {window}), {score:.6g}, "
                f"{'chosen' if chosen else 'not chosen'}: {excerpt}"
            )
    return lines


# --- files ------------------------------------------------------------------------------------------------------------


def write_text(content: str, path: Path) -> None:
    """Write a text file, which appears whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def draw(choice: Choice, sampled: Sampled, path: Path) -> None:
    """Draw the histogram of the score: all samples, the chosen ones in front, cuts as vertical lines. The file appears whole or not at
    all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores = sampled.scores[choice.column]
    edges = (
        np.histogram_bin_edges(scores[np.isfinite(scores)].astype(np.float64), 100)
        if np.isfinite(scores).any()
        else np.arange(2.0)
    )
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.hist(scores[np.isfinite(scores)], edges, color="lightgray", label=sampled.name)
    axes.hist(scores[np.isfinite(scores) & sampled.chosen], edges, color="C0", label=f"chosen ({choice.rule.name})")
    for cut in _all_cuts(choice)[:20]:
        axes.axvline(cut, color="C3", linestyle="--", linewidth=1, label=f"cut at {cut:.6g}")
    axes.set_xlabel(choice.column)
    axes.set_ylabel("samples")
    axes.legend()
    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
