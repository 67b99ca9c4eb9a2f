"""Choose stage 1's samples by a teacher's scores (SALT_DS): an index of `score_data.py` in, a file for --stage1-selection out.

PREFIX.npy lists the chosen samples, PREFIX.json says what they are, PREFIX.txt and PREFIX.png show what was chosen, with examples of
the text. The choice is exact, a keyed order decides between equal scores, and memory stays bounded at any number of samples.
Held-out windows are never chosen: give the training run's --valid-share. In our runs no score has beaten a random choice yet: train
on one of those too (--rule random).

    python tools/select_data.py --scores scores --output selections/top_half --fraction 0.5 --per-dataset --exclude-duplicates
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.config import flag
from megatron_salt.data.blend import parse_data_path
from megatron_salt.data.manifest import tokenizer_directory
from megatron_salt.data.order import SEEDS, is_seed
from megatron_salt.errors import UserError
from megatron_salt.files import refuse_present, sole_writer, whole_file
from megatron_salt.selection.eligibility import duplicates, find_eligible
from megatron_salt.selection.report import draw, refuse_ties, report, sample, write_text
from megatron_salt.selection.rules import Choice, Rule, RuleName, choose
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.selection.selection_file import Selection, selection_paths, write_selection
from megatron_salt.selection.ties import TIE_SEED
from megatron_salt.selection.window_text import WindowText, find_tokenizer, open_windows

DEFAULT_SCORE = "median_dropped_10"
EXPORTED = 256  # windows that are decoded together
_SHARED = ("fraction", "num_samples", "per_dataset")
_RANKED = (*_SHARED, "tie_seed", "allow_ties")
FLAGS_OF = {
    "top": _RANKED,
    "bottom": _RANKED,
    "band": (*_RANKED, "band_skip"),
    "random": (*_SHARED, "seed"),
    "threshold": ("min_score", "max_score"),
}


@dataclass(frozen=True)
class SelectConfig:
    """Choose samples by their scores."""

    scores: tuple[str, ...]
    """Directory of a score index, or several that hold its shards."""

    output: str
    """PREFIX of what is written: PREFIX.npy, .json, .txt and .png."""

    score: str | None = None
    """Column to choose by. Default: median_dropped_10, the reading of the paper's score that tells the samples of a young teacher apart;
    its formula is median_zeroed_10. None has beaten a random choice in our runs."""

    fraction: float | None = None
    """Share of the eligible samples to choose, above 0 and up to 1. Either this or --num-samples, except with --rule threshold."""

    num_samples: int | None = None
    """How many samples to choose."""

    rule: RuleName = "top"
    """top: the highest scores, as in the paper. band: those after the highest --band-skip share, which may be noise. threshold: all from
    --min-score to --max-score. Controls: bottom, the lowest scores, and random."""

    band_skip: float | None = None
    """With --rule band: share of the eligible samples, those with the highest scores, that is left out."""

    min_score: float | None = None
    """With --rule threshold: the lowest score that is chosen."""

    max_score: float | None = None
    """With --rule threshold: the highest score that is chosen. Default: no limit."""

    per_dataset: bool = False
    """Each dataset gives the same share of its eligible samples, so that a blend keeps its proportions. Default: all are one pool."""

    exclude_duplicates: bool = False
    """Leave out samples whose tokens are those of a sample with a lower id."""

    valid_share: float = 0.0
    """The training run's --valid-share: each dataset's last windows that it holds out are never chosen."""

    seed: int | None = None
    """With --rule random: another seed chooses other samples. Default: 1234."""

    tie_seed: int | None = None
    """Orders samples of one score, of which a rule takes some: with another seed it takes others. Default: 1234."""

    allow_ties: bool = False
    """Choose although more than 5% of the chosen have the very score of a cut, as others have: --tie-seed decides among them."""

    data_path: tuple[str, ...] = ()
    """Where the data is now, in the index's order, for examples and --export-documents. Default: where it was scored."""

    examples: int = 5
    """Samples whose text the report shows: so many of the highest scores, of the lowest, and on either side of the cut."""

    export_documents: str | None = None
    """JSON lines file for the text of every chosen window, with its id, dataset, window and score; an empty line where a document ends."""

    overwrite: bool = False
    """Replace a selection that is already there."""

    allow_duplicate_inputs: bool = False
    """Take shards that are named twice, of which one counts, and scores of datasets that hold the same windows twice."""

    max_memory_gib: float = 1.5
    """Memory for the search of --exclude-duplicates; with less it reads the hashes more often."""

    def __post_init__(self) -> None:
        flags = {name: getattr(self, name) for names in FLAGS_OF.values() for name in names}
        given = {name for name, value in flags.items() if value is not None and value is not False}
        for name in sorted(given - set(FLAGS_OF[self.rule])):
            raise UserError(
                f"{flag(name)} does not go with --rule {self.rule}, which takes {' '.join(map(flag, FLAGS_OF[self.rule]))}"
            )
        if self.rule != "threshold" and (self.fraction is None) == (self.num_samples is None):
            raise UserError(f"--rule {self.rule} takes either --fraction or --num-samples")
        for name in {"threshold": ("min_score",), "band": ("band_skip",)}.get(self.rule, ()):
            if getattr(self, name) is None:
                raise UserError(f"--rule {self.rule} needs {flag(name)}")
        self._check_numbers()
        if os.path.basename(self.output.removesuffix(".npy").removesuffix(".json")) in ("", ".", ".."):
            raise UserError(f"--output {self.output!r} names no selection; give a PREFIX, such as selections/top_half")

    def _check_numbers(self) -> None:
        for name, value, good, told in (
            ("fraction", self.fraction, lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("num_samples", self.num_samples, lambda x: x >= 1, "at least 1"),
            ("band_skip", self.band_skip, lambda x: 0 < x < 1, "above 0 and below 1"),
            ("min_score", self.min_score, math.isfinite, "a finite number"),
            (
                "max_score",
                self.max_score,
                lambda x: math.isfinite(x) and x >= (x if self.min_score is None else self.min_score),
                f"finite and at least --min-score {self.min_score}",
            ),
            ("seed", self.seed, lambda x: is_seed(int(x)), SEEDS),
            ("tie_seed", self.tie_seed, lambda x: is_seed(int(x)), SEEDS),
            ("valid_share", self.valid_share, lambda x: 0 <= x <= 0.5, "in [0, 0.5]"),
            ("examples", self.examples, lambda x: x >= 0, "at least 0"),
            ("max_memory_gib", self.max_memory_gib, lambda x: 0 < x <= 1 << 20, "above 0 and at most 2^20"),
        ):
            if value is not None and not good(value):
                raise UserError(f"{flag(name)} must be {told}, got {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(SelectConfig, select_data, argv)


def select_data(config: SelectConfig) -> None:
    """The whole tool: check what can be known, choose, write, report. Raises UserError."""
    index = ScoreIndex.open(config.scores, allow_duplicates=config.allow_duplicate_inputs)
    if not config.allow_duplicate_inputs:
        refuse_equal_datasets(index)
    column = score_column(index, config.score)
    outputs = [Path(f"{selection_prefix(config)}{suffix}") for suffix in (".json", ".npy", ".txt", ".png")]
    if config.export_documents:
        refuse_shared_names(Path(config.export_documents), [*outputs, Path(selection_prefix(config))], config.scores)
        outputs.append(Path(config.export_documents))
    refuse_present("--output", config.output, outputs, config.overwrite)
    text = window_text(config, index)
    if isinstance(text, str) and config.export_documents:
        raise UserError(f"--export-documents {config.export_documents}: {text}")
    for name in (column, "tokens", *(["content"] if config.exclude_duplicates else [])):
        index.verify(name)

    repeated = duplicates(index, int(config.max_memory_gib * (1 << 30))) if config.exclude_duplicates else None
    choice = choose(index, column, rule_of(config), find_eligible(index, config.valid_share, repeated))
    if not config.allow_ties:
        refuse_ties(choice)
    facts = {"score": column, **asdict(choice.rule), "exclude_duplicates": config.exclude_duplicates}
    del facts["tie_seed"]  # it has a place of its own, and is none of rules that rank nothing
    tie_seed = choice.rule.tie_seed if "tie_seed" in FLAGS_OF[choice.rule.name] else None
    held = ExitStack()
    try:
        for output in (selection_prefix(config), *([config.export_documents] if config.export_documents else [])):
            held.enter_context(sole_writer("--output", output))
        refuse_present("--output", config.output, outputs, config.overwrite)
        write_selection(
            selection_prefix(config),
            choice.ids(),
            num_selected=choice.count,
            scores=index.manifest,
            rule=facts,
            valid_share=config.valid_share,
            tie_seed=tie_seed,
            tie_share=choice.tie_share,
        )
        for path in outputs[2:]:
            path.unlink(missing_ok=True)  # they tell of the selection that was there
        selection = Selection.open(config.output, "--output")
        sampled = sample(choice, selection)
        told = report(choice, selection, sampled, config.examples, text)
        write_text(told, outputs[2])
        draw(choice, sampled, outputs[3])
        if config.export_documents:
            assert isinstance(text, WindowText)
            export(choice, text, Path(config.export_documents))
    except OSError as error:
        raise UserError(
            f"--output {config.output} cannot be written: {error.strerror} ({error.filename or 'while writing'})"
        ) from error
    finally:
        held.close()
    print(told, end="")
    print("\nwrote", *outputs[1:2], *outputs[:1], *outputs[2:])


def refuse_equal_datasets(index: ScoreIndex) -> None:
    """Raise UserError where two datasets of the index are equal: each of their windows would be chosen twice."""
    seen: dict[str, str] = {}
    for dataset in index.manifest.datasets:
        if dataset.fingerprint in seen:
            raise UserError(
                f"--scores are of {seen[dataset.fingerprint]} and {dataset.prefix}, which hold the same tokens; score one of "
                "them alone, or allow it with --allow-duplicate-inputs"
            )
        seen[dataset.fingerprint] = dataset.prefix


def refuse_shared_names(exported: Path, outputs: Sequence[Path], scores: Sequence[str]) -> None:
    """Raise UserError where --export-documents would replace another output, or a file of --scores."""
    if exported.resolve() in [path.resolve() for path in outputs]:
        raise UserError(f"--export-documents {exported} is a name that --output writes itself; take another")
    if any(Path(directory).resolve() in exported.resolve().parents for directory in scores):
        raise UserError(f"--export-documents {exported} lies among --scores; take another directory")


def selection_prefix(config: SelectConfig) -> str:
    """--output without the suffix of a file of it."""
    return str(selection_paths(config.output)[0]).removesuffix(".npy")


def score_column(index: ScoreIndex, name: str | None) -> str:
    """The column to choose by. Raises UserError where it is none, or no score."""
    known = [column for column, dtype in index.columns.items() if dtype.kind == "f"]
    if name is None and DEFAULT_SCORE not in known:
        raise UserError(f"--score is not given, and the index has no {DEFAULT_SCORE}: it has {', '.join(known)}")
    column = name or DEFAULT_SCORE
    if column not in known:
        raise UserError(f"--score {column} is not a score of the index: it has {', '.join(known)}")
    return column


def rule_of(config: SelectConfig) -> Rule:
    """The rule that the flags ask for."""
    seed = (1234 if config.seed is None else config.seed) if config.rule == "random" else None
    return Rule(
        config.rule,
        fraction=config.fraction,
        num_samples=config.num_samples,
        per_dataset=config.per_dataset,
        skip=config.band_skip or 0.0,
        minimum=config.min_score,
        maximum=config.max_score,
        seed=seed,
        tie_seed=TIE_SEED if config.tie_seed is None else config.tie_seed,
    )


def window_text(config: SelectConfig, index: ScoreIndex) -> WindowText | str:
    """What decodes the samples, or why nothing does. Raises UserError where data is there, but is not what was scored."""
    manifest = index.manifest
    if not config.examples and not config.export_documents:
        return "--examples 0"
    prefixes = (
        parse_data_path(config.data_path, "--data-path")[0] if config.data_path else [d.prefix for d in manifest.datasets]
    )
    missing = [path for prefix in prefixes for path in (f"{prefix}.idx", f"{prefix}.bin") if not os.path.isfile(path)]
    if missing and not config.data_path:
        return f"{missing[0]} is not there (--data-path says where the data is now)"
    windows = open_windows(manifest, prefixes)
    tokenizer = find_tokenizer(manifest.tokenizer, [tokenizer_directory(prefix) for prefix in prefixes])
    if tokenizer is None and os.path.isdir(manifest.teacher_directory):
        from megatron_salt.checkpoint.save_directory import TOKENIZER

        tokenizer = find_tokenizer(manifest.tokenizer, [Path(manifest.teacher_directory) / TOKENIZER])
    if tokenizer is None:
        return f"no tokenizer {manifest.tokenizer} beside the data or in {manifest.teacher_directory}"
    return WindowText(windows, tokenizer)


def export(choice: Choice, text: WindowText, path: Path) -> None:
    """Write the text of every chosen window; the file appears whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for chosen in choice.ids():
            for start in range(0, len(chosen), EXPORTED):
                ids = chosen[start : start + EXPORTED]
                scores = choice.index.rows(ids, [choice.column])[choice.column]
                columns = (ids.tolist(), *(found.tolist() for found in text.locate(ids)), scores.tolist(), text.of(ids))
                for sample_id, dataset, window, score, content in zip(*columns, strict=True):
                    row = {
                        "id": sample_id,
                        "dataset": text.windows[dataset].file.prefix,
                        "window": window,
                        choice.column: score,
                        "text": content,
                    }
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
