"""Prints the Grafana dashboard: python monitoring/dashboard.py > monitoring/dashboard.json"""

import json
from typing import Any

SELECTOR = '{job=~"$job", instance=~"$instance"}'
RATE = "$__rate_interval"
GPU = "GPU (DCGM exporter, and the job's own)"

PANELS: dict[str, list[tuple[str, str, str, dict[str, str]]]] = {
    "Run": [
        ("Step", "stat", "none", {"step": f"clipjob_step{SELECTOR}", "of": f"clipjob_steps_planned{SELECTOR}"}),
        ("To the end", "stat", "s", {"": f"clipjob_eta_seconds{SELECTOR}"}),
        ("Goodput", "stat", "percentunit", {"": f"clipjob_goodput_ratio{SELECTOR}"}),
        ("Restarts, lost steps", "stat", "none", {
            "restarts": f"clipjob_restarts_total{SELECTOR}",
            "preempted": f"clipjob_preemptions_total{SELECTOR}",
            "steps lost": f"clipjob_lost_steps_total{SELECTOR}",
        }),
        ("Loss", "timeseries", "none", {"loss": f"clipjob_train_loss{SELECTOR}"}),
        ("Matches within the batch", "timeseries", "percentunit", {
            "{{direction}}": f"clipjob_train_accuracy_ratio{SELECTOR}",
            "probability of the right caption": f"clipjob_right_caption_probability_ratio{SELECTOR}",
        }),
        ("Held-out recall", "timeseries", "percentunit", {"{{direction}} @{{k}}": f"clipjob_eval_recall_ratio{SELECTOR}"}),
        ("Recall on the guard", "timeseries", "percentunit", {"{{direction}} @{{k}}": f"clipjob_guard_recall_ratio{SELECTOR}"}),
        ("Learning rate", "timeseries", "sci", {"lr": f"clipjob_learning_rate{SELECTOR}"}),
        ("Gradient norm, logit scale", "timeseries", "none", {
            "gradient norm": f"clipjob_gradient_norm{SELECTOR}", "logit scale": f"clipjob_logit_scale{SELECTOR}",
        }),
    ],
    "Goodput": [
        ("Where the time goes", "timeseries", "percentunit", {
            "{{state}}": f"sum by (state) (rate(clipjob_time_seconds_total{SELECTOR}[{RATE}]))",
        }),
        ("Time of all attempts", "piechart", "s", {"{{state}}": f"sum by (state) (clipjob_time_seconds_total{SELECTOR})"}),
        ("Start to first step", "stat", "s", {"": f"clipjob_resume_duration_seconds{SELECTOR}"}),
        ("Heartbeat age", "stat", "s", {"": f"time() - clipjob_last_heartbeat_timestamp_seconds{SELECTOR}"}),
    ],
    "Data path": [
        ("Samples per second", "timeseries", "none", {
            "last step": f"clipjob_samples_per_second{SELECTOR}",
            "mean": f"rate(clipjob_samples_total{SELECTOR}[{RATE}])",
        }),
        ("Time of a step", "timeseries", "s", {
            "median": f"histogram_quantile(0.5, sum by (le) (rate(clipjob_step_duration_seconds_bucket{SELECTOR}[{RATE}])))",
            "95 %": f"histogram_quantile(0.95, sum by (le) (rate(clipjob_step_duration_seconds_bucket{SELECTOR}[{RATE}])))",
        }),
        ("Samples left out, steps without a gradient", "timeseries", "none", {
            "{{reason}}": f"clipjob_skipped_samples_total{SELECTOR}", "not finite": f"clipjob_nonfinite_steps_total{SELECTOR}",
        }),
        ("Staged", "timeseries", "bytes", {
            "here": f"clipjob_staging_bytes_total{SELECTOR}", "planned": f"clipjob_staging_bytes_planned{SELECTOR}",
        }),
    ],
    "Checkpoints": [
        ("Age of the last durable one", "timeseries", "s", {
            "age": f"time() - (clipjob_checkpoint_last_success_timestamp_seconds{SELECTOR} > 0)",
        }),
        ("Steps at risk", "timeseries", "none", {
            "steps": f"clipjob_step{SELECTOR} - clipjob_checkpoint_last_success_step{SELECTOR}",
        }),
        ("Stall and upload", "timeseries", "s", {
            name: f"rate({name_of}_sum{SELECTOR}[5m]) / rate({name_of}_count{SELECTOR}[5m])"
            for name in ("stall", "upload")
            for name_of in (f"clipjob_checkpoint_{name}_seconds",)
        }),
        ("Saves", "timeseries", "none", {
            "{{result}}": f"clipjob_checkpoint_saves_total{SELECTOR}", "waiting": f"clipjob_checkpoints_waiting{SELECTOR}",
        }),
        ("Size", "stat", "bytes", {"": f"clipjob_checkpoint_bytes{SELECTOR}"}),
    ],
    GPU: [
        ("Arithmetic used (MFU)", "timeseries", "percentunit", {"of the peak": f"clipjob_mfu_ratio{SELECTOR}"}),
        ("Memory of the job", "timeseries", "bytes", {"{{kind}}": f"clipjob_device_memory_bytes{SELECTOR}"}),
        ("Tensor cores busy", "timeseries", "percentunit", {"{{gpu}}": "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"}),
        ("Power", "timeseries", "watt", {"{{gpu}}": "DCGM_FI_DEV_POWER_USAGE"}),
        ("Errors (XID)", "timeseries", "none", {"{{gpu}}": "DCGM_FI_DEV_XID_ERRORS"}),
    ],
}  # fmt: skip
"""Row -> (title, kind, unit, legend -> query)."""


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it: four panels in a line, a row for each part."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, content in PANELS.items():
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "collapsed": False}
        )
        y += 1
        for at, (title, kind, unit, queries) in enumerate(content):
            if at and at % 4 == 0:
                y += 7
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": kind,
                    "title": title,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "gridPos": {"x": at % 4 * 6, "y": y, "w": 6, "h": 7},
                    "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                    "targets": [
                        {
                            "refId": chr(ord("A") + number),
                            "expr": query,
                            "legendFormat": legend or "__auto",
                            "datasource": {"type": "prometheus", "uid": "${datasource}"},
                        }
                        for number, (legend, query) in enumerate(queries.items())
                    ],
                }
            )
        y += 7
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        *(
            {
                "name": name,
                "type": "query",
                "datasource": source,
                "query": f"label_values({metric}, {name})",
                "refresh": 2,
                "multi": True,
                "includeAll": True,
            }
            for name, metric in (("job", "clipjob_step"), ("instance", 'clipjob_step{job=~"$job"}'))
        ),
    ]
    return {
        "title": "clipjob",
        "uid": "clipjob",
        "schemaVersion": 39,
        "tags": ["clipjob", "training"],
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "timezone": "browser",
        "templating": {"list": variables},
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
