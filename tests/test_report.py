"""A page that says all of a run, whatever the run and its captions are like, and a table of several."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import HOSTILE, a_gallery, write_run

from job.cli import cli
from job.errors import ConfigError
from job.report import compare
from job.report.charts import Series, buckets, line_chart, ticks
from job.report.facts import gather
from job.report.page import POLICY, rates_of, render


def page_of(folder: Path, **arguments: Any) -> str:
    return render(gather(str(write_run(folder / "run", **arguments))))


def test_the_page_says_what_the_run_gained(tmp_path: Path) -> None:
    page = page_of(tmp_path, gallery=a_gallery(), lr=3e-5)
    for told in ("ViT-B-32 (laion2b_s34b_b79k)", "products.csv", "complete", "Text → image, recall@5", "Goodput"):
        assert told in page
    facts = gather(str(tmp_path / "run"))
    for value in (facts.before["image_retrieval_recall@5"], facts.after["image_retrieval_recall@5"]):
        assert f"{100 * value:.1f}\u202f%" in page
    assert "<code>lr</code></td><td>3e-05</td><td>1e-05" in page
    assert f"local-dir:{tmp_path}/run/export/best" in page


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(tmp_path, gallery=a_gallery())
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' in page
    assert "default-src 'none'" in POLICY
    assert not re.findall(r"<script|<link(?! rel=\"icon\" href=\"data:,\")|url\(|@import|javascript:", page)
    assert set(re.findall(r'(?:src|href)="([^"]{0,22})', page)) == {"data:image/jpeg;base64", "data:,"}


def test_captions_are_text_and_nothing_else(tmp_path: Path) -> None:
    page = page_of(tmp_path, gallery=a_gallery())
    for caption in HOSTILE[:2]:
        assert caption not in page
    assert "&lt;script&gt;document.title=&#x27;broken in&#x27;&lt;/script&gt;" in page
    assert "lone ? surrogate" in page
    assert page.count('dir="auto"') > 100
    page.encode()  # every letter of it


def test_a_run_without_held_out_images_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, evaluations=0, val_fraction=0.0)
    assert "Nothing was held out" in page
    assert "recall@5" not in page


def test_a_run_of_one_step_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, steps=1, attempts=[(0, 1, 0)], evaluations=2)
    assert "for one step in one attempt" in page
    assert 'class="dot' in page


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_steps_without_a_finite_loss_are_left_out_and_counted(tmp_path: Path, loss: float | None) -> None:
    page = page_of(tmp_path, losses={7: loss, 8: loss})
    assert "2 steps without a finite loss" in page
    assert not re.search(r"\b(nan|inf)\b", page)


def test_nothing_but_bad_losses_is_said_so(tmp_path: Path) -> None:
    assert "There are no values to show." in page_of(tmp_path, losses=dict.fromkeys(range(41)))


def test_thousands_of_steps_and_many_attempts_make_no_large_page(tmp_path: Path) -> None:
    attempts: list[tuple[int, int, int | None]] = [(at * 100, at * 100 + 100, None if at % 3 else 75) for at in range(150)]
    page = page_of(tmp_path, steps=15000, attempts=attempts, evaluations=400, gallery=a_gallery(quality=95))
    assert len(page.encode()) < 3_000_000
    assert max(path.count("L") for path in re.findall(r'<path class="(?:line|band)[^>]*d="([^"]+)"', page)) <= 2 * 600
    assert "The 110 attempts before are not drawn." in page


def test_attempts_show_their_exit_codes_and_what_was_lost(tmp_path: Path) -> None:
    page = page_of(tmp_path, attempts=[(0, 10, 75), (10, 20, None), (20, 20, 69), (20, 40, 0)])
    for told in ("exit 75", "killed", "exit 69", "exit 0", "steps 21 to 23 were not saved and had to be done again"):
        assert told in page
    assert "node-3" in page


def test_a_run_under_way_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, attempts=[(0, 10, 75), (10, 20, None)], complete=False)
    assert "not complete: step 23" in page
    assert "running, or killed" in page
    assert "Use the model" not in page


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run"):
        gather(str(tmp_path))


def test_a_damaged_gallery_costs_only_the_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", gallery=a_gallery())
    (run / "eval" / "gallery.json").write_text("{", encoding="utf-8")
    assert "no pictures of held-out images" in render(gather(str(run)))


# Curves


def test_buckets_keep_the_mean_and_the_extremes() -> None:
    points = [(float(x), float(x % 10)) for x in range(1000)]
    found = buckets(points, 100)
    assert len(found) == 100
    assert {(item.mean, item.low, item.high) for item in found} == {(4.5, 0.0, 9.0)}
    assert [item.x for item in found[:2]] == [4.5, 14.5]
    assert len(buckets(points[:7], 100)) == 7
    assert buckets([(1.0, None), (2.0, math.nan)]) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3000), (-1e-6, 1e-6), (0.91, 0.92), (5, 5), (0, 7e9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high) for value in found)
    assert found == sorted(set(found))


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-12])
def test_a_line_that_stays_where_it_is_can_be_drawn(value: float) -> None:
    chart = line_chart([Series("flat", [(x, value) for x in range(5)])], label="flat")
    assert "nan" not in chart
    assert 'class="line' in chart


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_there_are_no_fractions_of_steps(tmp_path: Path, steps: int) -> None:
    page = page_of(tmp_path, steps=steps, attempts=[(0, steps, 0)], evaluations=2)
    below = re.findall(r'y="(?:14|211)" text-anchor="\w+">(?:step )?([^<]+)</text>', page)
    assert len(below) >= 8
    assert all(text.isdigit() for text in below)


def test_series_differ_by_more_than_colour() -> None:
    chart = line_chart([Series("a", [(0, 1), (1, 2)], 0, 0), Series("b", [(0, 2), (1, 3)], 1, 1)], label="two")
    assert chart.count("stroke-dasharray") == 2  # in the plot and in the legend
    assert "a: 1\nb: 2" in chart


def test_throughput_is_samples_over_time_not_a_mean_of_rates() -> None:
    rows = [{"step": at + 1, "seconds": 1.9 if at % 2 else 0.1} for at in range(10)]
    assert [rate for _, rate in rates_of(rows, 10)] == pytest.approx([50 / 4.1, 50 / 5.9])
    assert rates_of([], 10) == []


# Several runs


def sweep(folder: Path) -> list[Path]:
    gains = {"low": 0.2, "high": 0.7, "middle": 0.5}
    rates = {"low": 1e-6, "high": 1e-5, "middle": 1e-4}
    return [write_run(folder / name, gain=gain, lr=rates[name], gallery=a_gallery()) for name, gain in gains.items()]


def test_compare_shows_what_differs_and_the_best_first(tmp_path: Path) -> None:
    runs = [*sweep(tmp_path), write_run(tmp_path / "nothing", evaluations=0, lr=1e-3)]
    shown = CliRunner().invoke(cli, ["compare", *map(str, runs)])
    assert shown.exit_code == 0, shown.output
    head, *lines = shown.output.splitlines()
    assert head.split()[:3] == ["run", "lr", "step"]
    assert [line.split()[0] for line in lines] == ["high", "middle", "low", "nothing"]
    assert "0.065 → " in lines[0]
    rows = json.loads(CliRunner().invoke(cli, ["compare", "--json", *map(str, runs)]).output)
    assert [row["settings"]["lr"] for row in rows] == [1e-5, 1e-4, 1e-6, 1e-3]
    assert rows[0]["export"] == f"{tmp_path}/high/export/best"


def test_compare_shows_what_the_guard_kept_of_runs_that_have_one(tmp_path: Path) -> None:
    runs = [gather(str(write_run(tmp_path / "with", guarded=True))), gather(str(write_run(tmp_path / "without", gain=0.2)))]
    head, guarded, bare = compare.to_text(rows := compare.rows_of(runs)).splitlines()
    assert "guard: text→image @5" in head
    assert "guard:" not in compare.to_text(compare.rows_of(runs[1:]))
    after = rows[0]["after"]["guard_image_retrieval_recall@5"]
    assert f"→ {after:.3f}" in guarded
    assert bare.count("– → –") == 2
    page = compare.render(runs)
    assert "Guard: text → image @5" in page
    assert f"{100 * after:.1f}" in page


def test_runs_of_the_same_name_can_be_told_apart(tmp_path: Path) -> None:
    runs = [gather(str(write_run(tmp_path / name / "run"))) for name in ("a", "b")]
    assert compare.short_names(runs) == ["a/run", "b/run"]
    assert len(set(compare.short_names([runs[0], runs[0]]))) == 2


def test_several_runs_make_one_page(tmp_path: Path) -> None:
    out = tmp_path / "sweep.html"
    shown = CliRunner().invoke(cli, ["report", *map(str, sweep(tmp_path)), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    page = out.read_text(encoding="utf-8")
    assert "<b>high</b> scores best" in page
    assert page.index("high</td>") < page.index("middle</td>") < page.index("low</td>")
    assert len(page) < 3_000_000


def test_report_writes_one_page_where_it_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", gallery=a_gallery())
    out = tmp_path / "page.html"
    assert CliRunner().invoke(cli, ["report", str(run), "--out", str(out)]).exit_code == 0
    printed = CliRunner().invoke(cli, ["report", str(run), "--out", "-"]).output
    assert re.sub(r"Made [^<]+", "", printed) == re.sub(r"Made [^<]+", "", out.read_text(encoding="utf-8"))
