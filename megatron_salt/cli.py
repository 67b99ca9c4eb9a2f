"""From a command line and a YAML file to a checked RunConfig.

Precedence: defaults < `--config file.yaml` < flags. YAML is nested by section, flags are flat; both use the field names of
`config/`. Unknown names are refused, with a suggestion. Checks run once, on the merged result, because a flag may complete
what a file begins. Mistakes of the user are UserErrors; `exit_status` prints them in one line on stderr and exits with
status 2. Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import tyro

import megatron_salt
from megatron_salt.config import RunConfig, flag
from megatron_salt.config.run import field_types, sections
from megatron_salt.config.yaml_text import read_sections, to_yaml, unchecked
from megatron_salt.errors import LeftEarly, UserError, did_you_mean
from megatron_salt.files import refusing_file_errors
from megatron_salt.small_files import read_small

T = TypeVar("T")
R = TypeVar("R", bound=RunConfig)


@dataclass(frozen=True)
class CommandLine(RunConfig):
    """Pretrain a language model. Precedence: defaults < --config file.yaml < flags."""

    config: str | None = None
    """YAML file with the same names as the flags, nested by section (model:, parallel:, training: ...)."""

    print_config: bool = False
    """Print the resolved configuration as YAML for --config, and exit."""

    dry_run: int | None = None
    """Check the run as this many ranks would start it, and exit. One process, no GPU; no file stays written.
    Checked: flags, data, teacher, --save and its free space, the checkpoint in --load, versions."""

    gpu: str | None = None
    """With --dry-run: also plan memory and time on this GPU, such as h100-80, and refuse a run that would not fit.
    It is unmeasured, see docs/planner.md."""

    def __post_init__(self) -> None:
        if self.dry_run is not None and self.dry_run < 1:
            raise UserError(f"--dry-run must be at least 1 rank, got {self.dry_run}")
        if self.gpu is not None and self.dry_run is None:
            raise UserError(f"--gpu {self.gpu} needs --dry-run: a start takes the GPUs that there are")


@dataclass(frozen=True)
class DryRun:
    """A check of a run that does not start."""

    ranks: int
    """Of the run"""
    gpu: str | None
    """GPU for which memory and time are planned, as --gpu names it; None: they are not"""


def parse(argv: Sequence[str]) -> RunConfig:
    """The configuration that `argv` (without the program's name) asks for: see `parse_command`."""
    return parse_command(argv)[0]


def parse_command(argv: Sequence[str]) -> tuple[RunConfig, DryRun | None]:
    """The configuration that `argv` (without the program's name) asks for, and what --dry-run asks for (None without it).

    Raises UserError for mistakes of the user. --help and --print-config print to stdout and raise SystemExit(0).
    """
    command_line = parse_over_file(CommandLine, argv)
    run = RunConfig(**{name: getattr(command_line, name) for name in sections()})
    if command_line.print_config:
        print(to_yaml(run), end="")
        raise SystemExit(0)
    ranks = command_line.dry_run
    return run, None if ranks is None else DryRun(ranks, command_line.gpu)


def parse_over_file(config_class: type[R], argv: Sequence[str]) -> R:
    """A run's configuration and what `config_class` adds to it, from flags over the YAML file of --config. Raises UserError."""
    path = _config_path(argv)
    values: Mapping[str, Mapping[str, Any]] = {}
    if path is not None:
        try:
            text = read_small(Path(path)).decode("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--config {path} cannot be read: {error}") from error
        values = read_sections(text, path)
    defaults = config_class(**{name: unchecked(section, values.get(name, {})) for name, section in sections().items()})
    return parse_flags(config_class, argv, defaults)


def run_tool(config_class: type[T], main: Callable[[T], int | None], argv: Sequence[str] | None = None) -> int:
    """Parse flags into `config_class`, call `main` with it, and return the exit status, see `exit_status`.

    config_class: a frozen dataclass; its field docstrings are help texts. argv: default sys.argv[1:]. An OSError of a file system
    ends the tool with one line that names the file.
    """
    words = sys.argv[1:] if argv is None else argv

    def action() -> int | None:
        with refusing_file_errors():
            return main(parse_flags(config_class, words))

    return exit_status(action)


def exit_status(action: Callable[[], int | None]) -> int:
    """Run `action` and return the exit status.

    It is the status that `action` returns (None means 0), or that of a UserError, which is printed on stderr. Ctrl-C gives 130 and one
    line. A closed stdout (`--help | head`) gives 141, as for a process that SIGPIPE ended. A signal of the hardware, such as SIGBUS where
    a mapped file was cut short, prints the stack before it ends the process.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)
    if signal.getsignal(signal.SIGINT) is megatron_salt.leave_imports:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            return action() or 0
        finally:
            sys.stdout.flush()
    except UserError as error:
        sys.stdout.flush()
        print(error if isinstance(error, LeftEarly) else f"error: {error}", file=sys.stderr, flush=True)
        return error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return 141


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout. If so, the rest of the output goes to /dev/null, and Python ends without an error message."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in watched.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def parse_flags(config_class: type[T], argv: Sequence[str], defaults: T | None = None) -> T:
    """A `config_class` from flags, over its own defaults or `defaults`. Nested dataclasses become flat flags. Raises UserError."""
    _refuse_unknown_flags(config_class, argv)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = tyro.cli(config_class, args=list(argv), default=defaults, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as leaving:
        if leaving.code in (None, 0):  # --help
            raise
        raise (_user_error_behind(leaving) or UserError(_message_in(stderr.getvalue()))) from None
    assert parsed is not None
    return parsed


def leaves(config_class: type) -> list[tuple[str, Any]]:
    """(name, type) of every leaf field, depth first, over nested dataclasses."""
    result: list[tuple[str, Any]] = []
    for name, hint in field_types(config_class).items():
        result.extend(leaves(hint) if is_dataclass(hint) and isinstance(hint, type) else [(name, hint)])
    return result


def known_flags(config_class: type) -> list[str]:
    """Every flag of `config_class`; a boolean has --NAME and --no-NAME."""
    return ["--help"] + [
        word
        for name, hint in leaves(config_class)
        for word in ([flag(name), flag("no_" + name)] if hint is bool else [flag(name)])
    ]


def _refuse_unknown_flags(config_class: type, argv: Iterable[str]) -> None:
    known = known_flags(config_class)
    for word in argv:
        if word.startswith("--") and not word.startswith("--tyro-"):
            name = word.partition("=")[0].replace("_", "-")
            if name not in known:
                raise UserError(f"unknown flag {word.partition('=')[0]}{did_you_mean(name, known)}; --help lists all flags")


def _config_path(argv: Sequence[str]) -> str | None:
    """The value of --config. It is needed before the other flags, which are read over the file's values."""
    paths = [value for word, value in pairwise([*argv, "--"]) if word == "--config" and value[:2] != "--"]
    paths += [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if len(paths) > 1:
        raise UserError(f"--config is given {len(paths)} times ({', '.join(paths)}); give one file")
    return paths[0] if paths else None


def _user_error_behind(leaving: BaseException) -> UserError | None:
    """The UserError of a dataclass's own check that made tyro exit; None if there was none."""
    cause: BaseException | None = leaving
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _message_in(box: str) -> str:
    """tyro's error box as one line of ours: the flag, the value that was given, and what it can be."""
    rows = [row.strip("│| ") for row in box.splitlines()]
    first = next((i for i, row in enumerate(rows[1:], 1) if not _RULER.match(row)), len(rows))
    message = " ".join(rows[first : next((i for i, row in enumerate(rows[first:], first) if _RULER.match(row)), len(rows))])
    if message.startswith("Missing from") and (absent := _ABSENT.findall(box)):
        return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} required; --help says what to give"
    if choice := _CHOICE.match(message):
        given, name, known = choice.groups()
        choices = sorted(set(re.findall(r"'([^']*)'", known)) - {"None"})
        return f"{name} {given} is not one of {', '.join(choices)}{did_you_mean(given, choices)}"
    if bare := _NO_VALUE.match(message):
        return f"{bare.group(1)} needs a value; --help tells which"
    if odd := _NO_TYPE.match(message):
        name, wanted, given = odd.groups()
        return f"{name} {given} is no {wanted.replace('{None}|', '')}"
    return message.removeprefix("Error parsing ") or "the flags could not be read; --help lists them"


_RULER = re.compile(r"[─╰╭]|[+-]-{3}")  # three dashes: a flag begins with two
_ABSENT = re.compile(r"^[│| ] {5}(--(?!help\b)[\w-]+)", re.MULTILINE)  # the description of a flag is indented further
_CHOICE = re.compile(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)")
_NO_VALUE = re.compile(r"Missing value for argument '(--\S+)'\.")
_NO_TYPE = re.compile(r"(?:Error parsing )?(--\S+): no type matching (\S+) could be instantiated from \['(.*?)'\]")
