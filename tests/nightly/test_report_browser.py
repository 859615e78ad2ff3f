"""The report in a real browser (Chromium, headless): its text, its layout on a desk and on a phone, light and dark.

Content is asserted, not pixels.

python -m pytest tests/nightly/test_report_browser.py
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.measures import HELD_OUT
from mipo_ray.report.page import render_report
from tests.helpers.chromium import CHROMIUM, Chromium
from tests.helpers.page_measures import MEASURE
from tests.helpers.report_data import JUDGE_PROMPT, USERS, rich_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)")

SECTIONS = [
    *("flow", "tasks", "judge", "matrix", "scores", "drift", "results", "effects", "gains", "training", "answers"),
    *("pairs", "examples", "cost", "configuration"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render_report(rich_run()), encoding="utf-8")
    return file


def measure(chromium: Chromium, file: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What MEASURE finds, with everything unfolded."""
    chromium.open(file, width, dark=dark)
    chromium.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    found: dict[str, Any] = chromium.evaluate(f"(() => {{{MEASURE}}})()")
    return found


def test_the_story_is_told_in_the_rendered_text(chromium: Chromium, page: Path) -> None:
    chromium.open(page, 1200, dark=False)
    text = chromium.evaluate("document.body.innerText")
    places = [
        text.index(shown)
        for shown in (
            "mipo-ray: embedded, missing_context",
            "After 2 rounds, the mutual information between answer and user context",
            "Against the base, round 1 is better in arc_easy_likelihood accuracy",
            "From prompts to answers",
            "chosen_truncated: 1",
            "Tasks\n",
            "The judge\n",
            "What answers depend on",
            "Length and diversity",
            "Held-out results",
            "Held-out answers, before and after",
            "Cost\n",
            "All finished stages together",
        )
    ]
    assert places == sorted(places)
    for name in HELD_OUT:
        assert name in text
    for shown in ("not distinguishable", "win 60%", "position bias", "self consistency", "unreadable", "GPUs at most"):
        assert shown in text, shown
    assert JUDGE_PROMPT not in text  # folded away
    chromium.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    unfolded = chromium.evaluate("document.body.innerText")
    assert JUDGE_PROMPT in unfolded
    assert all(user in unfolded for user in USERS)


def test_nothing_is_asked_of_a_network_and_nothing_is_logged(chromium: Chromium, page: Path) -> None:
    chromium.open(page, 1200, dark=False)
    asked = [event["params"]["request"]["url"] for event in chromium.events
             if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert asked == [page.as_uri()]
    logs = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in chromium.events if event["method"] in logs] == []
    dom = chromium.evaluate("document.documentElement.outerHTML")
    assert not re.search(r"(?:src|href)=|https?:|url\(|<script", dom)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 800, 1200])
def test_everything_fits_and_can_be_read(chromium: Chromium, page: Path, width: int, dark: bool) -> None:
    measures = measure(chromium, page, width, dark=dark)
    assert measures["inner"] == width
    assert measures["scroll"] <= measures["client"]
    assert list(measures["sections"]) == SECTIONS
    assert all(0 < section[0] <= width and section[1] > 40 for section in measures["sections"].values())
    for name in ("empty", "outside", "faint", "unnamed"):
        assert measures[name] == [], name
    brightness = sum(map(int, re.findall(r"\d+", measures["background"])[:3]))
    assert brightness < 150 if dark else brightness > 600


def test_a_wide_table_scrolls_in_its_own_box(chromium: Chromium, page: Path) -> None:
    chromium.open(page, 390, dark=False)
    boxes = chromium.evaluate(
        "[...document.querySelectorAll('.scroll')].map((each) => [each.scrollWidth, each.clientWidth, each.tabIndex])"
    )
    assert any(scroll > client for scroll, client, _ in boxes)
    assert all(tab_index == 0 for _, _, tab_index in boxes)  # the keyboard reaches what is hidden


def test_the_measures_notice_what_is_wrong(chromium: Chromium, page: Path, tmp_path: Path) -> None:
    broken = (
        '<div style="width:2000px">wide</div><p style="color:#eee;background:#fff">faint</p>'
        '<div role="img"></div><section aria-labelledby="none" style="margin:0;padding:0;border:0"></section>'
        '<svg viewBox="0 0 10 10" style="width:10px"><text x="9">beyond</text></svg>'
        '<figure style="display:none"></figure>'
    )
    file = tmp_path / "broken.html"
    file.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{broken}"), encoding="utf-8")
    measures = measure(chromium, file, 390, dark=False)
    assert measures["scroll"] > measures["client"]
    assert measures["sections"]["none"][1] == 0
    for name in ("empty", "outside", "faint", "unnamed"):
        assert len(measures[name]) >= 1, name


@pytest.mark.parametrize(("width", "height", "dark"), [(390, 844, True), (1200, 900, False)])
def test_a_screenshot_is_a_picture_of_the_asked_size(
    chromium: Chromium, page: Path, width: int, height: int, dark: bool
) -> None:
    chromium.open(page, width, dark=dark, height=height)
    data = chromium.screenshot()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (width, height)
    assert len(data) > 20_000  # bytes; a picture of nothing is far smaller


def test_it_prints(chromium: Chromium, page: Path) -> None:
    chromium.open(page, 1200, dark=False)
    paper = chromium.pdf()
    assert paper.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", paper)) > 3
