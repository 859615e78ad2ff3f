"""The report in a real browser (Chromium, headless): its text, its layout on a desk and on a phone, light and dark.

Content is asserted, not pixels. Chromium measures a copy of the page that has a script; the page itself has none.

python -m pytest tests/integration/test_report_browser.py
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import struct
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.evaluation.results import UNITS
from mipo_ray.report import render_report
from tests.report_data import JUDGE_PROMPT, USERS, rich_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
DARK = "--blink-settings=preferredColorScheme=0"
SECTIONS = [
    *("flow", "tasks", "judge", "matrix", "scores", "drift", "results", "training", "answers", "pairs", "examples"),
    *("cost", "configuration"),
]

# Written into a copy of the page before </body>; leaves what it measured as JSON in the document.
MEASURE = """
<script>
const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const blend = (top, below, opacity) => [0, 1, 2].map((i) => opacity * top[i] + (1 - opacity) * below[i]);
const luminance = (color) => color.slice(0, 3)
  .map((value) => value / 255)
  .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
  .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = rgb(getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const faint = [];
const outside = [];
for (const element of document.querySelectorAll('body *')) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !element.getClientRects().length || element.closest('script, title')) continue;
  const svg = element.closest('svg');
  let back = behind(element);
  if (element.classList.contains('cell-number')) {
    const cell = element.previousElementSibling;
    back = blend(rgb(getComputedStyle(cell).fill), back, Number(cell.getAttribute('fill-opacity')));
  }
  const color = rgb(getComputedStyle(element)[svg ? 'fill' : 'color']);
  if (contrast(color, back) < 4.5) faint.push([element.outerHTML.slice(0, 120), contrast(color, back)]);
  const [inner, outer] = [element.getBoundingClientRect(), (svg || document.body).getBoundingClientRect()];
  const far = inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
  if (svg && far) outside.push(element.outerHTML.slice(0, 120));
}
const measures = {
  inner: innerWidth,
  scroll: document.documentElement.scrollWidth,
  client: document.documentElement.clientWidth,
  background: getComputedStyle(document.body).backgroundColor,
  resources: performance.getEntriesByType('resource').map((entry) => entry.name),
  sections: Object.fromEntries([...document.querySelectorAll('section')].map((section) =>
    [section.getAttribute('aria-labelledby'), [section.offsetWidth, section.offsetHeight]])),
  empty: [...document.querySelectorAll('figure, .bar span, .flow li, table')]
    .filter((each) => !each.offsetWidth || !each.offsetHeight).map((each) => each.outerHTML.slice(0, 120)),
  unnamed: [...document.querySelectorAll('[role=img], [role=region]')]
    .filter((each) => !each.getAttribute('aria-label')
      && !document.getElementById(each.getAttribute('aria-labelledby'))).map((each) => each.outerHTML.slice(0, 120)),
  faint, outside,
  text: document.body.innerText,
};
const result = document.createElement('pre');
result.id = 'measures';
result.textContent = JSON.stringify(measures);
document.body.append(result);
</script>
</body>
"""


@functools.cache
def page() -> str:
    return render_report(rich_run())


def browse(directory: Path, html: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens a page in a Chromium of its own, with a new profile; fails unless it ends well."""
    file = directory / "report.html"
    file.write_text(html, encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={directory / 'profile'}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def measure(directory: Path, html: str, width: int, *options: str) -> dict[str, Any]:
    """What MEASURE finds in the page in a window of this width."""
    allowed = html.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    copy = allowed.replace("</body>", MEASURE)
    assert allowed != html != copy
    dom = browse(directory, copy, f"--window-size={width},844", "--dump-dom", *options).stdout
    found = re.search(r'<pre id="measures">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(tmp_path_factory.mktemp("phone"), page(), 390)


@pytest.fixture(scope="module")
def dark_desk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(tmp_path_factory.mktemp("desk"), page(), 1200, DARK)


def test_the_story_is_told_in_the_rendered_text(dark_desk: dict[str, Any]) -> None:
    text = dark_desk["text"]
    places = [
        text.index(shown)
        for shown in (
            "mipo-ray: embedded, missing_context",
            "Against the base, the newest policy is better in arc_easy_likelihood accuracy",
            "After 2 rounds, the mutual information between answer and user context",
            "From prompts to answers",
            "chosen_truncated: 1",
            "Tasks",
            "arc_easy_likelihood",
            "The judge",
            "What answers depend on",
            "Length and diversity",
            "Held-out results",
            "Held-out answers, before and after",
            "Cost",
            "All finished stages together",
        )
    ]
    assert places == sorted(places)
    for name in UNITS:
        assert name in text
    for shown in ("not distinguishable", "win 5", "position bias", "self consistency", "unreadable", "GPUs at most"):
        assert shown in text, shown
    assert "{{" not in text
    assert JUDGE_PROMPT not in text  # folded away, but there:
    assert USERS[0] in text


def test_the_judges_prompt_is_there_whole_and_nothing_is_logged(tmp_path: Path) -> None:
    done = browse(tmp_path, page(), "--dump-dom")
    assert JUDGE_PROMPT in unescape(done.stdout)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert not re.search(r"(?:src|href)=|https?:|url\(", done.stdout)


@pytest.mark.parametrize(("layout", "width"), [("phone", 390), ("dark_desk", 1200)])
def test_everything_fits_and_can_be_read(layout: str, width: int, request: pytest.FixtureRequest) -> None:
    measures = request.getfixturevalue(layout)
    assert measures["inner"] == width
    assert measures["scroll"] <= measures["client"]
    assert list(measures["sections"]) == SECTIONS
    assert all(0 < section[0] <= width and section[1] > 40 for section in measures["sections"].values())
    assert measures["empty"] == []
    assert measures["outside"] == []
    assert measures["faint"] == []
    assert measures["unnamed"] == []
    assert measures["resources"] == []


def test_dark_and_light_have_other_backgrounds(phone: dict[str, Any], dark_desk: dict[str, Any]) -> None:
    light, dark = (sum(map(int, re.findall(r"\d+", each["background"])[:3])) for each in (phone, dark_desk))
    assert light > 600
    assert dark < 150


def test_the_measures_notice_what_is_wrong(tmp_path: Path) -> None:
    broken = (
        '<div style="width:2000px">wide</div><p style="color:#eee;background:#fff">faint</p><figure></figure>'
        '<div role="img"></div><section aria-labelledby="none"></section>'
        '<svg viewBox="0 0 10 10" width="10"><text x="9">beyond</text></svg>'
    )
    html = page().replace("<main>", f"<main>{broken}")
    measures = measure(tmp_path, html, 390)
    assert measures["scroll"] > measures["client"]
    assert measures["sections"]["none"][1] < 60
    for name in ("faint", "outside", "unnamed"):
        assert len(measures[name]) >= 1, name


@pytest.mark.parametrize(("width", "height", "option"), [(390, 844, DARK), (1200, 900, "")])
def test_a_screenshot_is_a_picture_of_the_asked_size(width: int, height: int, option: str, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    options = [f"--screenshot={picture}", f"--window-size={width},{height}", *filter(None, [option])]
    browse(tmp_path, page(), *options)
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (width, height)
    assert len(data) > 20_000  # bytes; a picture of nothing is far smaller


def test_it_prints(tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    browse(tmp_path, page(), f"--print-to-pdf={paper}")
    data = paper.read_bytes()
    assert data.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", data)) > 3
