"""Counters of all attempts of a run together, for Prometheus: what earlier ones have a part in, and no kill makes fall."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Totals(Collector):
    """Shows what the run's newest beacon says, nothing before there is one. Later attempts begin from it, so none falls behind."""

    def __init__(self) -> None:
        self.beacon: Mapping[str, Any] | None = None
        """With "step" and "ledger"."""
        self.samples_per_step = 0

    def collect(self) -> Iterator[Metric]:
        if self.beacon is None:
            return
        step, ledger = self.beacon["step"], self.beacon["ledger"]
        seconds = CounterMetricFamily("clipjob_time_seconds", "Wall time of all attempts by what it went into.", labels=["state"])
        for state, value in ledger["seconds"].items():
            seconds.add_metric([state], value)
        yield seconds
        goodput = ledger["seconds"]["productive"] / max(sum(ledger["seconds"].values()), 1e-9)
        yield GaugeMetricFamily("clipjob_goodput_ratio", "Share of the time in which steps were done that counted.", goodput)
        yield CounterMetricFamily("clipjob_restarts", "Attempts after the first.", ledger["restarts"])
        yield CounterMetricFamily("clipjob_preemptions", "Attempts that were asked to stop.", ledger["preemptions"])
        yield CounterMetricFamily("clipjob_lost_steps", "Steps that had to be done again.", ledger["lost_steps"])
        nonfinite = "Steps whose loss or gradient was not finite."
        yield CounterMetricFamily("clipjob_nonfinite_steps", nonfinite, ledger["nonfinite_steps"])
        skipped = CounterMetricFamily("clipjob_skipped_samples", "Samples left out.", labels=["reason"])
        skipped.add_metric(["undecodable"], ledger["skipped_samples"])
        yield skipped
        done = (step + ledger["lost_steps"]) * self.samples_per_step
        yield CounterMetricFamily("clipjob_samples", "Samples consumed, lost ones included.", done)
