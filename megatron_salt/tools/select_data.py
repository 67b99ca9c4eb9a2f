"""Choose the samples of stage 1 by a teacher's scores (SALT_DS). Reads the index of `score_data.py`, writes --stage1-selection's file.

PREFIX.npy lists the chosen samples. PREFIX.json says from which data and by which rule. PREFIX.txt and PREFIX.png are a report, with
examples of the text. The choice is exact; a seeded order decides between equal scores; memory is bounded for any number of samples.

Held-out windows are never chosen if you give the training run's --valid-share. In our runs no score has beaten a random choice yet,
so train on a random choice too (--rule random).

    python tools/select_data.py --scores scores --output selections/top_half --fraction 0.5 --per-dataset --exclude-duplicates
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from megatron_salt.cli import run_tool
from megatron_salt.data.blend import parse_data_path
from megatron_salt.data.manifest import tokenizer_directory
from megatron_salt.errors import UserError
from megatron_salt.files import real_path, refuse_present, sole_writer, whole_file
from megatron_salt.selection.eligibility import duplicates, find_eligible
from megatron_salt.selection.report import draw, refuse_ties, report, sample, write_text
from megatron_salt.selection.rules import Choice, Rule, choose
from megatron_salt.selection.score_reader import ScoreIndex
from megatron_salt.selection.selection_file import Selection, selection_paths, write_selection
from megatron_salt.selection.ties import TIE_SEED
from megatron_salt.selection.window_text import WindowText, find_tokenizer, open_windows
from megatron_salt.tools.flags.select_config import FLAGS_OF, SelectConfig

DEFAULT_SCORE = "median_dropped_10"
EXPORTED = 256  # windows decoded at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv`, by default the process's own. Returns the exit status."""
    return run_tool(SelectConfig, select_data, argv)


def select_data(config: SelectConfig) -> None:
    """Check the inputs, choose, write the selection and its report. Raises UserError."""
    started = time.monotonic()
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
    try:
        with ExitStack() as locks:
            for output in (selection_prefix(config), *([config.export_documents] if config.export_documents else [])):
                locks.enter_context(sole_writer("--output", output))
            refuse_present("--output", config.output, outputs, config.overwrite)
            written = write_outputs(config, choice, outputs, text)
    except OSError as error:
        raise UserError(
            f"--output {config.output} cannot be written: {error.strerror} ({error.filename or 'while writing'})"
        ) from error
    print(written, end="")
    print("\nwrote", *outputs[1:2], *outputs[:1], *outputs[2:])
    print(f"chosen in {time.monotonic() - started:.1f} s")


def write_outputs(config: SelectConfig, choice: Choice, outputs: Sequence[Path], text: WindowText | str) -> str:
    """Write selection, report, picture and exported documents. Returns the report.

    outputs: PREFIX.json, .npy, .txt, .png and --export-documents. text: see `window_text`.
    """
    facts = {"score": choice.column, **asdict(choice.rule), "exclude_duplicates": config.exclude_duplicates}
    del facts["tie_seed"]  # the selection's manifest has a field for it, which is None for rules that do not rank
    tie_seed = choice.rule.tie_seed if "tie_seed" in FLAGS_OF[choice.rule.name] else None
    write_selection(
        selection_prefix(config),
        choice.ids(),
        num_selected=choice.count,
        scores=choice.index.manifest,
        rule=facts,
        valid_share=config.valid_share,
        tie_seed=tie_seed,
        tie_share=choice.tie_share,
    )
    for path in outputs[2:]:
        path.unlink(missing_ok=True)  # they describe the selection that was replaced
    selection = Selection.open(config.output, "--output")
    sampled = sample(choice, selection)
    written = report(choice, selection, sampled, config.examples, text)
    write_text(written, outputs[2])
    draw(choice, sampled, outputs[3])
    if config.export_documents:
        assert isinstance(text, WindowText)
        export(choice, text, Path(config.export_documents))
    return written


def refuse_equal_datasets(index: ScoreIndex) -> None:
    """Raise UserError if two datasets of the index hold the same tokens: each window would be chosen twice."""
    seen: dict[str, str] = {}
    for dataset in index.manifest.datasets:
        if dataset.fingerprint in seen:
            raise UserError(
                f"--scores are of {seen[dataset.fingerprint]} and {dataset.prefix}, which hold the same tokens; score one of "
                "them alone, or allow it with --allow-duplicate-inputs"
            )
        seen[dataset.fingerprint] = dataset.prefix


def refuse_shared_names(exported: Path, outputs: Sequence[Path], scores: Sequence[str]) -> None:
    """Raise UserError if --export-documents would replace another output or a file of --scores."""
    if real_path(exported) in [real_path(path) for path in outputs]:
        raise UserError(f"--export-documents {exported} is a name that --output writes itself; take another")
    if any(real_path(directory) in real_path(exported).parents for directory in scores):
        raise UserError(f"--export-documents {exported} lies among --scores; take another directory")


def selection_prefix(config: SelectConfig) -> str:
    """PREFIX of --output, which may be given as PREFIX, PREFIX.npy or PREFIX.json."""
    return str(selection_paths(config.output)[0]).removesuffix(".npy")


def score_column(index: ScoreIndex, name: str | None) -> str:
    """Column to choose by. Raises UserError if the index has no such score."""
    known = [column for column, dtype in index.columns.items() if dtype.kind == "f"]
    if name is None and DEFAULT_SCORE not in known:
        raise UserError(f"--score is not given, and the index has no {DEFAULT_SCORE}: it has {', '.join(known)}")
    column = name or DEFAULT_SCORE
    if column not in known:
        raise UserError(f"--score {column} is not a score of the index: it has {', '.join(known)}")
    return column


def rule_of(config: SelectConfig) -> Rule:
    """Rule that the flags describe."""
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
    """Decoder of the samples' text, or, as a str, why there is none. Raises UserError if the data is not what was scored."""
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
    """Write the text of every chosen window to `path`. The file appears whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for chosen in choice.ids():
            for start in range(0, len(chosen), EXPORTED):
                ids = chosen[start : start + EXPORTED]
                scores = choice.index.rows(ids, [choice.column])[choice.column]
                columns = (ids.tolist(), *(numbers.tolist() for numbers in text.locate(ids)), scores.tolist(), text.of(ids))
                for sample_id, dataset, window, score, content in zip(*columns, strict=True):
                    row = {
                        "id": sample_id,
                        "dataset": text.windows[dataset].file.prefix,
                        "window": window,
                        choice.column: score,
                        "text": content,
                    }
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":  # torchrun -m, and the jobs of a study
    sys.exit(main())
