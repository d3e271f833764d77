"""Alerts and dashboard against the real thing: promtool, and a Prometheus that scrapes a real run through a kill and a resume."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import CHROMIUM
from dashboard_picture import write_picture
from system import Job, newest_step, removed_afterwards, train_command

from job.checkpoint.store import RunStore
from job.demo import FOLDER
from job.demo import settings as demo_settings
from job.runtime.metrics import Metrics

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "monitoring"
sys.path.insert(0, str(MONITORING))
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="needs Debian's package prometheus"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        found: str = reply.read().decode()
    return found


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def promtool(*words: str, given: str = "") -> str:
    found = subprocess.run(["promtool", *words], input=given, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


@needs_prometheus
def test_alerts_are_valid_and_fire_when_they_should() -> None:
    promtool("check", "rules", str(MONITORING / "alerts.yaml"))
    promtool("test", "rules", str(MONITORING / "alerts_test.yaml"))


def test_every_alert_has_a_test_of_firing() -> None:
    rules, tests = ((MONITORING / name).read_text(encoding="utf-8") for name in ("alerts.yaml", "alerts_test.yaml"))
    alerts = [line.split(":")[1].strip() for line in rules.splitlines() if line.strip().startswith("- alert:")]
    assert len(alerts) == 9
    assert not [alert for alert in alerts if f"alertname: {alert}\n        exp_alerts:\n" not in tests]


@needs_prometheus
def test_metrics_follow_the_conventions() -> None:
    metrics = Metrics(port=free_port())
    try:
        said = promtool("check", "metrics", given=scraped(metrics.port))
    finally:
        metrics.close()
    assert said.strip() == ""


@pytest.mark.skipif(shutil.which("prometheus-node-exporter") is None, reason="needs Debian's package prometheus-node-exporter")
def test_two_runs_of_one_node_stand_beside_each_other_in_node_exporter(tmp_path: Path) -> None:
    for run, step in (("first", 7), ("second", 8)):
        metrics = Metrics(port=0, run=run, textfile=tmp_path / f"{run}.prom")
        metrics.start_run(model="m", pretrained="", step=step, steps=10, samples_per_step=16)
        metrics.complete()
        metrics.close()
    port = free_port()
    words = [f"--web.listen-address=127.0.0.1:{port}", "--collector.disable-defaults", "--collector.textfile"]
    exporter = subprocess.Popen(
        ["prometheus-node-exporter", *words, f"--collector.textfile.directory={tmp_path}"], stderr=subprocess.DEVNULL
    )
    try:
        said = until(lambda: answers(port) and scraped(port), "node_exporter")
    finally:
        exporter.kill()
        exporter.wait()
    assert 'clipjob_step{run="first"} 7\n' in said
    assert 'clipjob_step{run="second"} 8\n' in said


def test_the_dashboard_is_what_its_script_prints_and_every_panel_is_complete() -> None:
    from dashboard import dashboard  # type: ignore[import-not-found]

    found = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    assert found == dashboard()
    panels = [panel for panel in found["panels"] if panel["type"] != "row"]
    assert [variable["name"] for variable in found["templating"]["list"]] == ["datasource", "job", "instance"]
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found["panels"]]
    assert len(set(places)) == len(places)
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"


class Prometheus:
    """A server of its own, with its data in a temporary folder."""

    def __init__(self, folder: Path, *, target: int) -> None:
        self.port = free_port()
        folder.mkdir()
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\n"
            "scrape_configs:\n"
            f"  - {{job_name: clipjob, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}\n"
        )
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def query(self, expression: str, *, path: str = "query", **more: Any) -> list[dict[str, Any]]:
        """The result of an instant query; of a range with start, end and step."""
        words = urllib.parse.urlencode({"query": expression, **more})
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}?{words}", timeout=10) as reply:
                found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
                return found
        except OSError:
            return []

    def range(self, expression: str, *, start: float) -> list[dict[str, Any]]:
        """What a panel of the dashboard shows from then until now."""
        filled = expression.replace("$job", ".*").replace("$instance", ".*").replace("$__rate_interval", "10s")
        return self.query(filled, path="query_range", start=start, end=time.time(), step=1)

    def value(self, expression: str) -> float | None:
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with removed_afterwards(tmp_path / "runs") as place:
        yield place


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 90
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


COUNTERS_OF_ALL_ATTEMPTS = (
    "samples",
    "lost_steps",
    "time_seconds",
    "restarts",
    "preemptions",
    "nonfinite_steps",
    "skipped_samples",
)


def guard(path: Path) -> Path:
    """The first 50 pairs of the demo. Returns: the path."""
    lines = Path(demo_settings()["csv"]).read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:51]), encoding="utf-8")
    return path


def with_broken_images(path: Path) -> Path:
    """The demo's LMDB, of whose images every 150th can't be decoded. Returns: the path."""
    shutil.copytree(FOLDER / "openmoji" / "images.lmdb", path)
    lines = Path(demo_settings()["csv"]).read_text(encoding="utf-8").splitlines()
    return tiny.write_lmdb(path, {line.split("|")[0]: b"broken" for line in lines[1::150]})


def steps_at_risk(run: Path) -> int:
    """What a kill of the first attempt would cost, as far as the run knows."""
    beacon = json.loads((run / "attempts" / "000001-beacon.json").read_text(encoding="utf-8"))
    return int(beacon["step"]) - newest_step(run)


def stopped_at_risk(job: Job, run: Path) -> bool:
    """Whether a kill would cost steps; if so, the job stands still."""
    job.send(signal.SIGSTOP)
    if steps_at_risk(run) > 0:
        return True
    job.send(signal.SIGCONT)
    return False


def value_of(said: str, name: str) -> float:
    """Of a series without labels, in what was scraped."""
    return float(next(line for line in said.splitlines() if line.startswith(f"{name} ")).split()[1])


@needs_prometheus
@pytest.mark.system
def test_prometheus_follows_a_run_through_a_kill(folder: Path) -> None:
    from dashboard import GPU, PANELS

    port, run = free_port(), folder / "run"
    settings = {"global_batch_size": 16, "val_fraction": 0.02, "evaluate_every": 100, "checkpoint_every": 20, "torch_threads": 1}
    settings |= {"guard_csv": guard(folder / "guard.csv"), "guard_lmdb": demo_settings()["lmdb"]}
    settings |= {"lmdb": with_broken_images(folder / "images.lmdb"), "metrics_port": port, "metrics_host": "127.0.0.1"}
    command = train_command(run, scratch=folder / "scratch", max_steps=100000, **settings)
    prometheus = Prometheus(folder / "prometheus", target=port)
    try:
        began = time.time()
        with Job(*command) as job:
            until(lambda: (prometheus.value("clipjob_checkpoint_last_success_step") or 0) >= 20, "a checkpoint of step 20")
            before = until(lambda: prometheus.value("clipjob_samples_total"), "samples")
            until(lambda: prometheus.value("clipjob_skipped_samples_total"), "samples left out")
            until(lambda: stopped_at_risk(job, run), "steps that a kill costs")
            job.send(signal.SIGKILL)
            job.end()
        lost, newest = steps_at_risk(run), RunStore(str(run)).commits()[0]
        rarely = train_command(run, scratch=folder / "scratch", max_steps=100000, **{**settings, "checkpoint_every": 100000})
        with Job(*rarely) as job:  # it is a while until its own first one
            job.wait_for("resumed", step=newest.step)
            saved_at = partial(value_of, name="clipjob_checkpoint_last_success_timestamp_seconds")
            until(lambda: saved_at(scraped(port)) == newest.info["at"], "the age of the checkpoint that was restored")
            until(lambda: prometheus.value("clipjob_restarts_total") == 1, "the second attempt")
            assert prometheus.value("clipjob_lost_steps_total") == lost > 0
            until(lambda: (prometheus.value("clipjob_samples_total") or 0) > before, "more samples than before the kill")
            time.sleep(6)  # rates want a few scrapes
            for row, panels in PANELS.items():
                for title, _, _, queries in panels if row != GPU else ():
                    for query in queries.values():
                        filled = query.replace("$job", ".*").replace("$instance", ".*").replace("$__rate_interval", "10s")
                        assert prometheus.query(filled.replace("[5m]", "[60s]")), f"{title}: {filled}"
            assert prometheus.value("clipjob_goodput_ratio") > 0
            if CHROMIUM:
                shown = {row: panels for row, panels in PANELS.items() if row != GPU}
                picture = folder / "dashboard.png"
                ask = partial(prometheus.range, start=began)
                assert write_picture(picture, shown, ask) == sum(map(len, shown.values()))
                assert picture.stat().st_size > 50_000
                if place := os.environ.get("DASHBOARD_PNG"):
                    shutil.copy(picture, place)
            assert promtool("check", "metrics", given=scraped(port)).strip() == ""
            for counter in COUNTERS_OF_ALL_ATTEMPTS:
                found = prometheus.query(f"clipjob_{counter}_total", path="query_range", start=began, end=time.time(), step=1)
                assert found, counter
                for series in found:
                    values = [float(value) for _, value in series["values"]]
                    assert values == sorted(values), (counter, series["metric"])
            (steps,) = prometheus.range("clipjob_checkpoint_last_success_step", start=began)
            known = [float(value) for _, value in steps["values"] if not math.isnan(float(value))]
            assert known == sorted(known)
            job.send(signal.SIGTERM)
            assert job.end() == 75
    finally:
        prometheus.process.kill()
        prometheus.process.wait()
