"""report: curves, entropies and verdicts out of logs; foreign and damaged files are refused by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.errors import UserError
from megatron_salt.metrics.figures import HEIGHT, chart, smoothed, table
from megatron_salt.metrics.history import Axis, read_curve
from megatron_salt.preprocess.indexed_writer import IndexedWriter
from megatron_salt.tools.report import ReportConfig, main, named_pairs, named_runs, report, unigram_entropy
from tests.metrics.logs import write_log, write_taught_log

STEP = '{"kind": "step", "step": 1, "loss": 3.0, "tokens": 8, "seconds": 1, "memory_gib": 1}'


def write_dataset(prefix: Path, documents: list[list[int]]) -> str:
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    writer.append(np.concatenate(documents).astype(np.uint16), np.array([len(document) for document in documents], np.int32))
    writer.finish()
    return str(prefix)


def test_a_curve_is_what_the_run_logged(tmp_path: Path) -> None:
    curve = read_curve("a", write_log(tmp_path / "a", [4.0, math.nan, 2.0], {3: 2.5}))
    assert curve.steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(curve.losses, [4.0, np.nan, 2.0])
    assert curve.tokens.tolist() == [800, 1600, 2400]
    assert curve.seconds.tolist() == [0.5, 1.0, 1.5]
    assert curve.held_out == {3: 2.5}
    assert curve.unread_lines == 0


def test_of_a_run_with_a_teacher_the_loss_with_the_data_counts_and_the_switch_is_known(tmp_path: Path) -> None:
    curve = read_curve("a", write_taught_log(tmp_path / "a", [4.0, 3.0, 2.0, 1.0], 2, {2: 3.25, 4: 1.5}))
    assert curve.losses.tolist() == [4.0, 3.0, 2.0, 1.0]
    assert (curve.final, curve.accuracy, curve.teacher) == (1.5, 0.04, (3.5, 0.25))
    assert curve.switch is not None
    assert (curve.switch.step, curve.switch.gib_before, curve.switch.gib_after) == (2, 2.5, 2.25)
    message = table([curve], unigram=6.5)
    assert "step 3" in message.splitlines()[2] and "4.00%" in message.splitlines()[2]
    assert "a: its teacher has held-out loss 3.5000, accuracy 25.00%" in message
    assert "a: stage 1 ended after step 2; memory in use 2.500 GiB before the teacher was freed, 2.250 GiB after" in message


def test_a_teacher_that_stays_to_the_end_leaves_no_switch(tmp_path: Path) -> None:
    curve = read_curve("a", write_taught_log(tmp_path / "a", [4.0, 3.0], 5, {2: 3.25}))
    assert curve.switch is None
    assert curve.teacher == (3.5, 0.25)
    assert "stage 1 ended" not in table([curve], None)


def test_a_torn_last_line_is_counted_and_left_out(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a", [4.0, 3.0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    curve = read_curve("a", path)
    assert curve.steps.tolist() == [1]
    assert curve.unread_lines == 1
    assert "a: 1 lines of its log could not be read" in table([curve], None)


def test_of_a_step_told_twice_the_later_counts(tmp_path: Path) -> None:
    path = write_log(tmp_path / "a", [4.0, 3.0])
    again = json.loads(path.read_text().splitlines()[-1]) | {"loss": 1.0}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    assert read_curve("a", path).losses.tolist() == [4.0, 1.0]


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("", "no line in it is a step"),
        ("loss,step\n3.0,1\n", "no line in it is a step"),
        ('{"kind": "step", "step": 1, "loss": 3.0}\n', "lacks or garbles 'tokens'"),
        (f'{STEP}\n{{"kind": "eval", "step": 1, "name": "valid", "loss": "low"}}', "garbles 'loss' at step 1: low"),
        (f'{STEP}\n{{"kind": "task", "step": 1, "name": "piqa", "acc": true}}', "garbles 'acc' at step 1: True"),
        (f'{STEP}\n{{"kind": "eval", "step": 1, "loss": 2.0}}', "lacks or garbles 'name'"),
        (f'{STEP}\n{{"kind": "task", "step": 1, "name": null, "acc": 0.5}}', "garbles 'name' of an evaluation at step 1: None"),
        ('{"kind": "step", "step": 1, "loss": "3.0", "tokens": 8, "seconds": 1}\n', "garbles 'loss' at step 1: 3.0"),
        ('{"kind": "step", "step": 1, "loss": 3, "ce": [], "tokens": 8, "seconds": 1}\n', "garbles 'ce' at step 1: []"),
    ],
)
def test_what_is_no_log_is_refused_by_name(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))) as refusal:
        read_curve("a", path)
    assert complaint in str(refusal.value)


def test_a_missing_log_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read: No such file"):
        read_curve("a", tmp_path / "nowhere.jsonl")


def test_runs_are_called_as_asked_or_by_their_directory(tmp_path: Path) -> None:
    assert named_runs(["plain=a/train.jsonl", "x=y=b/train.jsonl"]) == [
        ("plain", Path("a/train.jsonl")),
        ("x=y", Path("b/train.jsonl")),
    ]
    assert named_runs([str(tmp_path / "best" / "train.jsonl")])[0][0] == "best"
    assert [name for name, _ in named_runs(["a=1", "a=2"])] == ["a", "a"]  # seeds of one arm
    for words in (["=1"], ["runs/a/log", "elsewhere/a/log"], ["a=1", "2/a/log", "3/a/log"]):
        with pytest.raises(UserError, match="needs a name for each run"):
            named_runs(words)
    with pytest.raises(UserError, match="--run names 1 twice"):
        named_runs(["a=1", "b=./1"])


def test_runs_are_compared_by_their_names_even_with_a_colon() -> None:
    assert named_pairs(["salt:plain", "x:y:salt"], ["salt", "plain", "x:y"]) == [("salt", "plain"), ("x:y", "salt")]
    for word in ("salt", "salt:salt", "salt:teacher", "plain"):
        with pytest.raises(UserError, match=f"--below {word} is not .* there are salt, plain"):
            named_pairs([word], ["salt", "plain"])


@pytest.mark.parametrize(
    "flags",
    [
        {"run": ()},
        {"run": ("a",), "below_unigram": 0.5},
        {"run": ("a",), "unigram_of": "p", "below_unigram": math.nan},
        {"run": ("a", "b"), "below_margin": 0.05},
        {"run": ("a", "b"), "below": ("a:b",), "below_margin": math.nan},
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: dict) -> None:
    with pytest.raises(UserError, match="--run|--below-unigram|--below-margin"):
        ReportConfig(**flags)


@pytest.mark.parametrize("block", [3, 1 << 22])
def test_unigram_entropy_is_that_of_the_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("megatron_salt.tools.report.BLOCK", block)
    uniform = write_dataset(tmp_path / "uniform", [[5, 9, 1], [700]])
    assert unigram_entropy(uniform) == pytest.approx(math.log(4))
    skewed = write_dataset(tmp_path / "skewed", [[2, 2, 2, 0], [2, 2, 0, 2]])
    assert unigram_entropy(skewed) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_unigram_entropy_of_nothing_is_refused_by_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--unigram-of .*nothing\.idx does not exist"):
        unigram_entropy(str(tmp_path / "nothing"))


def test_smoothing_averages_the_last_finite_losses() -> None:
    generator = np.random.default_rng(0)
    losses = generator.normal(size=50)
    losses[[0, 7, 8, 9, 30]] = np.nan
    for window in (1, 3, 50, 60):
        slow = [np.mean([x for x in losses[max(0, i - window + 1) : i + 1] if np.isfinite(x)] or [np.nan]) for i in range(50)]
        np.testing.assert_allclose(smoothed(losses, window), slow, atol=1e-12)


def test_the_chart_falls_where_the_loss_falls(tmp_path: Path) -> None:
    falling = read_curve("falling", write_log(tmp_path / "a", [9.0 - 0.01 * i for i in range(600)]))
    flat = read_curve("flat", write_log(tmp_path / "b", [5.0] * 300))
    rows = chart([falling, flat], "steps", unigram=7.0).splitlines()
    assert rows[0] == "training loss: * falling, o flat, - unigram entropy 7.000"
    plot = [row.partition("|")[2] for row in rows[1 : HEIGHT + 1]]
    heights = [next(i for i, row in enumerate(plot) if row.ljust(72)[column] == "*") for column in range(0, 72, 10)]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, HEIGHT - 1)
    assert sum("o" in row for row in plot) == 1
    assert "-" in plot[round((9.0 - 7.0) / 6.0 * (HEIGHT - 1))]
    assert max(row.rfind("o") for row in plot) < 37  # half as many steps, half as wide
    assert rows[-1].endswith("600 steps")


@pytest.mark.parametrize("html", [[], ["--html"]])
def test_losses_as_large_as_a_number_may_be_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], html: list[str]
) -> None:
    if html:
        pytest.importorskip("plotly")
    wild = write_log(tmp_path / "a", [1e308, -1e308, 1e308, 1.7e308, 3.0, 2.0] * 10, {60: 1e308})
    calm = write_log(tmp_path / "b", [4.0] * 60, {60: 3.0})
    words = ["--run", f"wild={wild}", f"wild={calm}", f"calm={calm.parent / '..' / 'c' / 'log.jsonl'}"]
    write_log(tmp_path / "c", [4.0] * 60, {60: 2.0})
    capsys.readouterr()
    with np.errstate(over="raise", invalid="raise"):
        assert main([*words, *html, *([str(tmp_path / "page.html")] if html else ["--output", str(tmp_path / "p.png")])]) == 0
    out = capsys.readouterr().out
    rows = out.splitlines()[1 : HEIGHT + 1]
    assert "*" in rows[0] and "*" in rows[-1] and rows[0].startswith("  1.7e+308 |") and rows[-1].startswith("   -1e+308 |")
    assert len({row.index("|") for row in rows}) == 1
    assert sum("+" in row.partition("|")[2] for row in rows) == 1  # the calm run lies on one row
    assert re.search(r"wild +2 +5e\+307 \(3\.0000 to 1e\+308\)", out)


def test_smoothing_forgets_a_loss_that_was_far_larger() -> None:
    losses = np.array([3.0, 1e30, 5.0, 4.0, 2.0, 1.0])
    assert smoothed(losses, 2)[3:].tolist() == [4.5, 3.0, 1.5]
    assert smoothed(np.full(9, 1.7e308), 4).tolist() == pytest.approx([1.7e308] * 9)


def test_a_perplexity_too_large_for_a_number_is_infinite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log has null for it. Of a loss that is not finite the perplexity is no number either."""
    path = write_log(tmp_path / "a", [4.0] * 3, {1: 800.0, 2: math.nan, 3: 900.0})
    assert '"perplexity": null' in path.read_text()
    found = read_curve("a", path).figure("valid/perplexity")
    assert found[1] == found[3] == math.inf and math.isnan(found[2])
    good = write_log(tmp_path / "b", [4.0] * 3, {1: 800.0, 3: 2.0})
    words = ["--run", f"a={path}", f"b={good}", "--y", "valid/perplexity", "--output", str(tmp_path / "p.png")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"^a +1 +inf$", out, re.MULTILINE) and "b passed a's final valid/perplexity inf at 100.0%" in out


def test_a_run_without_a_finite_loss_still_has_a_report(tmp_path: Path) -> None:
    curve = read_curve("lost", write_log(tmp_path / "a", [math.nan]))
    assert chart([curve], "steps", None) == "no finite loss"
    assert "nan" in table([curve], None)


def test_the_table_has_the_last_figures(tmp_path: Path) -> None:
    curve = read_curve("a", write_log(tmp_path / "a", [8.0] * 38 + [3.0, 2.0], {20: 5.0, 40: 2.25}))
    lines = table([curve], unigram=6.5).splitlines()
    assert lines[2].split()[:9] == ["a", "40", "32000", "2.5000", "2.2500", "-", "-", "1600", "20.0"]
    one_slow = replace(curve, seconds=np.cumsum([0.1] * 39 + [100.0]))
    assert table([one_slow], None).splitlines()[2].split()[8:12] == ["103.9", "s", "100", "ms"], (
        "a median stands beside wall-clock"
    )
    assert lines[-1] == "unigram entropy of held-out tokens: 6.5000"


@pytest.mark.parametrize("x", ["steps", "tokens", "seconds", "flops"])
def test_a_picture_of_several_runs_is_written_whole(tmp_path: Path, x: Axis) -> None:
    taught = write_taught_log(tmp_path / "c", [5.0, 4.0, 3.0], 1, {2: 4.5})
    runs = [f"{name}={write_log(tmp_path / name, [5.0, 4.0, 3.0], {2: 4.5})}" for name in "ab"] + [f"c={taught}"]
    picture = tmp_path / "new" / "loss.png"
    assert report(ReportConfig(tuple(runs), str(picture), x=x)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["loss.png"]


def test_a_figure_that_a_log_lacks_is_refused_before_anything_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "a", [3.0], {1: 2.0})
    capsys.readouterr()
    with pytest.raises(UserError, match="--y valid/lss is not in the log of a "):
        report(ReportConfig((f"a={log}",), y=("valid/loss", "valid/lss")))
    assert capsys.readouterr().out == ""


def test_a_picture_takes_names_with_dollar_signs(tmp_path: Path) -> None:
    log = write_log(tmp_path / "a", [4.0, 3.0])
    assert main(["--run", rf"a$\x$={log}", "--output", str(tmp_path / "loss.png")]) == 0


def test_a_picture_that_cannot_be_written_is_refused_by_flag(tmp_path: Path) -> None:
    log = write_log(tmp_path / "a", [3.0])
    with pytest.raises(UserError, match="--output .* cannot be written"):
        report(ReportConfig((str(log),), str(log / "loss.png")))


def test_a_page_that_cannot_be_written_leaves_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    log, picture = write_log(tmp_path / "a", [3.0]), tmp_path / "loss.png"
    for page, told in (
        (log / "runs.html", "error: --html .* cannot be written"),
        (picture, "error: --output and --html both name"),
    ):
        assert main(["--run", str(log), "--output", str(picture), "--html", str(page)]) == 2
        assert re.match(told, capsys.readouterr().err)
        assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_log_that_is_a_link_to_itself_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "log.jsonl")
    assert main(["--run", str(tmp_path / "log.jsonl")]) == 2
    assert str(tmp_path / "log.jsonl") in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--output", "--html"])
def test_a_directory_is_no_picture_and_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    log = write_log(tmp_path / "a", [3.0])
    assert main(["--run", str(log), flag, str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{flag} {tmp_path} is a directory" in err and "--overwrite" not in err


@pytest.mark.parametrize("held_out, share, status", [({2: 9.0, 3: 1.0}, 0.8, 0), ({2: 0.1, 3: 1.3}, 0.8, 1), ({}, 0.8, 1)])
def test_the_verdict_is_on_the_last_held_out_loss(
    tmp_path: Path, held_out: dict[int, float], share: float, status: int
) -> None:
    log = write_log(tmp_path / "a", [5.0, 4.0, 3.0], held_out)
    four_tokens = write_dataset(tmp_path / "d", [[1, 2, 3, 4]])  # entropy log 4 = 1.386
    assert report(ReportConfig((f"a={log}",), unigram_of=four_tokens, below_unigram=share)) == status


@pytest.mark.parametrize(
    "held_out, status, message",
    [
        (
            {1: 3.0, 2: 1.9, 3: 1.5},
            0,
            "ok: held-out loss of salt is 1.5000, 0.5000 below plain's 2.0000, which it passed by step 2 of 3",
        ),
        (
            {1: 1.0, 3: 2.0},
            1,
            "FAILED: held-out loss of salt is 2.0000, 0.0000 not below plain's 2.0000, which it passed by step 1 of 3",
        ),
        ({3: 2.5}, 1, "FAILED: held-out loss of salt is 2.5000, 0.5000 not below plain's 2.0000\n"),
        ({}, 1, "FAILED: salt has no held-out loss"),
    ],
)
def test_a_run_is_held_to_end_below_another(
    tmp_path: Path, capsys: pytest.CaptureFixture, held_out: dict[int, float], status: int, message: str
) -> None:
    plain = write_log(tmp_path / "plain", [5.0, 4.0, 3.0], {3: 2.0})
    salt = write_taught_log(tmp_path / "salt", [5.0, 4.0, 3.0], 1, held_out)
    assert report(ReportConfig((f"plain={plain}", f"salt={salt}"), below=("salt:plain",))) == status
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("last, status", [(2.04, 0), (2.06, 1), (1.9, 0)])
def test_a_margin_lets_a_run_end_a_little_above_another(tmp_path: Path, last: float, status: int) -> None:
    plain = write_log(tmp_path / "plain", [5.0, 4.0, 3.0], {3: 2.0})
    salt = write_taught_log(tmp_path / "salt", [5.0, 4.0, 3.0], 1, {3: last})
    runs = (f"plain={plain}", f"salt={salt}")
    assert report(ReportConfig(run=runs, below=("salt:plain",), below_margin=0.05)) == status
