"""The page of a comparison: no network, every figure in it, and what a browser makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest

from megatron_salt.errors import UserError
from megatron_salt.tools.report import ReportConfig, report
from tests.metrics.logs import write_run
from tests.support.browser import PHONE, in_browser, needs_browser, screenshot_of


def falling(shift: float) -> dict[int, dict[str, float]]:
    losses = {0: 6.0, 2: 5.0 - shift, 4: 4.0 - shift}
    return {step: {"loss": loss, "bits_per_byte": loss / 2} for step, loss in losses.items()}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two arms, one with two seeds and an odd name."""
    pytest.importorskip("plotly")
    home = tmp_path_factory.mktemp("page")
    figures = {name: {"valid/prose": falling(shift)} for name, shift in (("a", 0.0), ("b", 0.5), ("c", 1.5))}
    logs = {name: write_run(home / name, [6.0, 5.0, 4.5, 4.25], found, teacher_steps=2) for name, found in figures.items()}
    runs = (f"plain<i>={logs['a']}", f"plain<i>={logs['b']}", f"salt={logs['c']}")
    output = home / "runs.html"
    assert report(ReportConfig(runs, html=str(output), x="flops", y=("valid/prose/bits_per_byte", "train/loss"))) == 0
    return output


def cells(text: str, table: str) -> list[list[str]]:
    """The rows of a table of the page, without its head."""
    _, found, rest = text.replace("'", '"').partition(f'<table id="{table}">')
    assert found
    rows = rest.partition("</table>")[0].partition("<tbody>")[2].split("</tr>")
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows if "<td>" in row]


FINALS = [["plain&lt;i&gt;", "2", "1.8750 (1.7500 to 2.0000)", "4.2500 (4.2500 to 4.2500)"], ["salt", "1", "1.2500", "4.2500"]]
PASSED = (
    "salt passed plain&lt;i&gt;'s final valid/prose/bits_per_byte 1.8750 at 50.0% of plain&lt;i&gt;'s steps, 60.0% of its FLOPs, "
    "50.0% of its seconds"
)


def test_the_page_has_every_figure_and_needs_no_network(page: Path) -> None:
    text = page.read_text()
    assert cells(text, "finals") == FINALS
    assert PASSED in text.replace("&#x27;", "'")
    assert [row[0] for row in cells(text, "runs")] == ["plain&lt;i&gt; (1)", "plain&lt;i&gt; (2)", "salt"]
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text) and text.count("class='plot' id='panel-") == 2


@needs_browser
def test_a_browser_draws_the_page_and_its_figures_can_be_read(page: Path, tmp_path: Path) -> None:
    """Every plot, on the axis that was asked for and on another one; nothing but a plot is wider than a phone."""
    with in_browser(page, PHONE) as shown:
        assert cells(shown.content(), "finals") == FINALS
        legend = shown.locator(".legendtext").all_text_contents()
        assert legend == ["plain<i>", "salt"] * 2, "Plotly has drawn both plots"
        ticks = shown.locator("#panel-0 .ytick").all_text_contents()
        assert {"2", "3"} <= set(ticks)
        title = shown.locator("#panel-0 .xtitle")
        assert title.text_content() == "FLOPs of student and teacher"
        shown.get_by_label("seconds of training").focus()
        shown.keyboard.press("ArrowUp")
        assert title.text_content() == "tokens"
        assert shown.locator("#panel-1 .xtitle").text_content() == "tokens"
        assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    picture = screenshot_of(page, PHONE).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_without_plotly_the_flag_is_refused_before_a_log_is_read(tmp_path: Path) -> None:
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UserError, match="--html needs the package plotly"),
    ):
        report(ReportConfig((f"a={tmp_path}/nothing.jsonl",), html=str(tmp_path / "page.html")))
