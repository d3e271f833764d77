"""The report as a browser shows it, on a phone and on a desk, by day and by night."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import CHROMIUM, WHY_NOT, browse, console
from PIL import Image, ImageStat
from report_runs import a_gallery, write_run

from job.report import compare
from job.report.facts import gather
from job.report.page import POLICY, render

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)

ATTEMPTS = [(0, 800, 75), (800, 1500, None), (1500, 1500, 69), (1500, 3000, 0)]
MEASURE = """<script>
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const wide = document.documentElement.clientWidth;
  const outside = [...document.querySelectorAll("body *")].filter(part => !part.closest(".scroll, pre, svg, .said, .caption, .key")
    && part.getBoundingClientRect().right > wide + 0.5).map(part => part.tagName + "." + part.className);
  const asked = performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"));
  document.title = JSON.stringify([document.documentElement.scrollWidth, wide, outside, asked]);
});
</script>"""


def one(folder: Path) -> str:
    return render(gather(str(write_run(folder / "run", steps=3000, attempts=ATTEMPTS, gallery=a_gallery(), losses={9: None}))))


def several(folder: Path) -> str:
    long = "a-run-with-a-long-name-that-nobody-would-want-to-read-on-a-phone"
    runs = [write_run(folder / f"{long}-{at}", gain=0.2 * at, lr=1e-5 * (at + 1)) for at in range(4)]
    return compare.render([gather(str(run)) for run in runs])


def bare(folder: Path) -> str:
    return render(gather(str(write_run(folder / "run", steps=1, attempts=[(0, 1, 0)], evaluations=0))))


PAGES = pytest.mark.parametrize("make", [one, several, bare], ids=["one", "several", "bare"])


@PAGES
def test_the_browser_complains_of_nothing(make: Callable[[Path], str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(make(tmp_path), encoding="utf-8")
    shown, log = browse(page, "--dump-dom", width=1280)
    assert "</main>" in shown
    assert not console(log)


def test_the_check_for_complaints_would_see_one(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        bare(tmp_path).replace("<main>", '<main><img src="https://example.com/x.png"><script>1</script>'), encoding="utf-8"
    )
    _, log = browse(page, "--dump-dom", width=375)
    assert any("Content Security Policy" in line for line in console(log))


def laid_out(html: str, *, width: int, folder: Path) -> list[str]:
    """[its width, the screen's, what sticks out, what it asked for], in JSON. A narrow frame stands for a phone: a browser's own
    window is never so narrow."""
    inner = html.replace(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">', MEASURE)
    (folder / "inner.html").write_text(inner, encoding="utf-8")
    outer = (
        f'<!doctype html><body style="margin:0"><iframe src="inner.html" width="{width}" height="4000" style="border:0">'
        "</iframe><script>"
        'addEventListener("load", () => setTimeout(() => { document.body.dataset.found = '
        "document.querySelector('iframe').contentDocument.title }, 200))</script>"
    )
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    shown, _ = browse(
        folder / "outer.html", "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=3000", width=max(width, 800)
    )
    return re.findall(r'data-found="([^"]*)"', shown)


@PAGES
@pytest.mark.parametrize("width", [375, 768, 1280])
def test_no_page_is_wider_than_its_screen_or_asks_for_anything(make: Callable[[Path], str], width: int, tmp_path: Path) -> None:
    assert laid_out(make(tmp_path), width=width, folder=tmp_path) == [f"[{width},{width},[],[]]"]


@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1280, False), (1280, True)])
def test_it_is_drawn_by_day_and_by_night(width: int, dark: bool, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(one(tmp_path), encoding="utf-8")
    browse(page, f"--screenshot={picture}", width=width, height=3000, dark=dark)
    with Image.open(picture) as image:
        brightness = ImageStat.Stat(image.convert("L")).median[0]
        colours = len(image.convert("RGB").getcolors(1 << 24) or [])
    assert brightness < 60 if dark else brightness > 200
    assert colours > 200  # curves and pictures, not an empty page
