"""The page of a study: what a browser shows on a desk, on a phone and on paper, and without a mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.study.report.content import report_of
from megatron_salt.study.report.page import to_html
from megatron_salt.study.report.selections import selection_section
from tests.metrics.test_page import cells
from tests.study.report.runs import FACTS, STAGE1, study_runs
from tests.support.browser import DESKTOP, PHONE, in_browser, needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly")
    home = tmp_path_factory.mktemp("page")
    runs = study_runs(home / "study")
    output = home / "report.html"
    output.write_text(to_html(report_of(FACTS, runs, selection_section(runs)), FACTS.preparation_of), encoding="utf-8")
    return output


def test_the_page_needs_no_network_and_takes_nothing_for_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert "<h1>Study laptop &lt;b&gt;</h1>" in text
    assert "{kind: salt}  # &lt;/script&gt;\n" in text and text.count("</script>") == 3
    assert cells(text, "accounts")[0][0] == "teacher existed" and "out of memory | on &lt;rank&gt; 0" in text


def test_what_is_exploratory_is_labelled(page: Path) -> None:
    heads = re.findall(r"<h2>(.*?)</h2>", page.read_text(encoding="utf-8"))
    labelled = {head.partition(" <small>exploratory</small>")[0] for head in heads if "exploratory" in head}
    assert {"Curves", "Who passes whom, and when", "What a teacher may cost"} <= labelled
    assert "Differences, seed by seed" in heads


@pytest.fixture(scope="module")
def shown(page: Path) -> Iterator[Any]:
    """The page in a browser, which starts once for all tests."""
    with in_browser(page, DESKTOP) as opened:
        yield opened


def bottom(shown: Any, selector: str) -> float:
    box = shown.locator(selector).first.bounding_box()
    return float(box["y"] + box["height"])


def positions(shown: Any, plot: str) -> dict[str, list[float]]:
    """{name of a line: its positions on the horizontal axis}."""
    script = "name => Object.fromEntries(document.getElementById(name).data.filter(line => line.name).map(line => [line.name, line.x]))"
    return dict(shown.evaluate(script, plot))


@needs_browser
def test_the_first_screen_has_the_answer_the_accounts_and_the_main_curve(shown: Any) -> None:
    """The axis switch moves all curves together, by keyboard too; with the teacher's training SALT begins where that ends."""
    assert shown.locator("#answer").text_content().startswith("Yes: salt against baseline")
    for selector in ("#answer", "#accounts", ".warning", "#curve-0 .main-svg"):
        assert bottom(shown, selector) <= DESKTOP[1], selector
    assert shown.locator("#difference-0 .point").count() >= 6 + 3, "a dot for each seed of three arms, and their means"
    assert positions(shown, "curve-0")["salt"][:2] == [0, 4]
    switch = shown.locator("#curves .axis")
    shown.locator(".first").get_by_label("steps", exact=True).focus()
    shown.keyboard.press("ArrowRight")
    assert {shown.locator(f"#curve-{number} .xtitle").text_content() for number in range(3)} == {"FLOPs"}
    assert switch.get_by_label("FLOPs", exact=True).is_checked(), "both groups of buttons follow"
    switch.get_by_label("FLOPs with the teacher's training").check()
    at = positions(shown, "curve-0")
    assert at["baseline"][:2] == [0, 4 * 0.8e12] and at["salt"][:2] == [4e12, 4e12 + 4 * 0.9e12]
    assert at["salt_ds"][0] == 4e12 + 1e12
    switch.get_by_label("seconds", exact=True).check()
    assert positions(shown, "curve-2")["salt"][3] == STAGE1 * 0.625
    assert shown.locator("#difference-0 .xtitle").text_content().startswith("valid/docs/loss"), "differences stay"
    assert not shown.locator("#ledger-flops").is_visible()
    shown.get_by_text("FLOPs of each run, by phase").first.click()
    assert shown.locator("#ledger-flops").is_visible()
    shown.emulate_media(media="print")
    assert not switch.is_visible()
    shown.emulate_media(media="screen")


@needs_browser
def test_a_phone_shows_the_answer_first_and_nothing_wider_than_itself(shown: Any) -> None:
    shown.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    shown.reload()
    assert bottom(shown, "#answer") <= PHONE[1]
    assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    widths = shown.evaluate(
        "[...document.querySelectorAll('.plot, .scroll, p, li')].map(one => one.getBoundingClientRect().right)"
    )
    assert max(widths) <= PHONE[0]
    unnamed = (
        "[...document.querySelectorAll('.plot')].filter(one => !document.getElementById(one.getAttribute('aria-labelledby')))"
    )
    assert shown.evaluate(f"{unnamed}.length") == 0, "every plot has its text"
