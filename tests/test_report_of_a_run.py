"""The page that a real run leaves behind."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, WHY_NOT, browse, console
from system import Job, finish, removed_afterwards, train_command
from test_report_in_browser import laid_out

from job.checkpoint.store import RunStore
from job.report.facts import gather

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of the demo's data; interrupted after its first step."""
    with removed_afterwards(tmp_path_factory.mktemp("page") / "runs") as folder:
        command = train_command(
            folder / "run", max_steps=4, global_batch_size=8, val_fraction=0.03, precision="fp32", torch_threads=1
        )
        with Job(*command) as job:
            job.wait_for("step", step=1)
            job.send(signal.SIGTERM)
            assert job.end() == 75, job.tail()
        assert not (folder / "run" / "report.html").exists()
        done = finish(command)
        assert done.seen("report"), done.tail()
        yield folder / "run"


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_it_and_complains_of_nothing(run: Path, width: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_bytes((run / "report.html").read_bytes())
    shown, log = browse(page, "--dump-dom", width=width)
    assert "Worst mistakes" in shown
    assert not console(log)
    assert laid_out(page.read_text(encoding="utf-8"), width=width, folder=tmp_path) == [f"[{width},{width},[],[]]"]


def test_an_interrupted_run_ends_with_a_page_about_both_attempts(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    for told in (
        "exit 75",
        "exit 0",
        "in 2 attempts",
        "data:image/jpeg;base64,",
        "openmoji/",
        "Worst mistakes",
        "calibration error",
    ):
        assert told in page
    assert len(page.encode()) < 3_000_000
    gallery = json.loads((run / "eval" / "gallery.json").read_text(encoding="utf-8"))
    assert len(gallery["gallery"]) == 24
    result = RunStore(str(run)).result()
    assert result is not None
    facts = gather(str(run))
    assert facts.after == result["best"]
    for when, scores in (("before", facts.before), ("after", facts.after)):
        first = gallery["reliability"][when]["accuracy"]  # all held-out images are in the sample, so both are the same number
        assert first == pytest.approx(scores["text_retrieval_recall@1"], abs=1e-4)
    assert [item["end"]["exit_code"] for item in facts.attempts] == [75, 0]
    assert all(item["started_at"] < item["end"]["ended_at"] for item in facts.attempts)
