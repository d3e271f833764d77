"""One configuration by four ways: flags, environment, TOML, and what the run has stored."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config import FIELDS, Config, parse_value
from job.errors import ConfigError, ResumeError
from job.fields import Interval, flag
from job.settings import from_environment, from_mapping, merge, resolve

NEEDED = {"csv": "/d.csv", "lmdb": "/d.lmdb", "run": "/r"}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("30s", "seconds", 30),
        ("10m", "seconds", 600),
        ("2h", "seconds", 7200),
        ("200", "steps", 200),
        ("1ep", "epochs", 1),
        ("0.5ep", "epochs", 0.5),
        ("auto", "auto", 0),
        ("0", "never", 0),
    ],
)
def test_intervals(text: str, kind: str, value: float) -> None:
    parsed = Interval.parse(text)
    assert (parsed.kind, parsed.value) == (kind, value)
    assert Interval.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["", "10 minutes", "-5", "1.5", "ten", "5d"])
def test_other_intervals_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|whole"):
        Interval.parse(text)


def test_flags_win_over_environment_over_file_over_stored_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('lr = 3e-4\nseed = 3\nthreads = 3\ncsv = "/d.csv"\nlmdb = "/d.lmdb"\nrun = "/r"\n', encoding="utf-8")
    given = merge(flags={"lr": 1e-4}, environ={"CLIPJOB_LR": "2e-4", "CLIPJOB_SEED": "2"}, config_file=str(file))
    config = resolve(given)
    assert (config.lr, config.seed, config.threads, config.epochs) == (1e-4, 2, 3, 10.0)
    stored = Config(**{**NEEDED, "epochs": 7.0, "lr": 1e-4, "seed": 2, "threads": 9}).to_json()
    resumed = resolve(given, stored)
    assert (resumed.epochs, resumed.threads) == (7.0, 3)


def test_config_json_gives_the_same_config_back() -> None:
    config = Config(**NEEDED, checkpoint_every=Interval("seconds", 90), lock_text=True, template="a photo of {}")
    again = resolve(NEEDED, json.loads(json.dumps(config.to_json())))
    assert again == config


def test_a_restart_that_contradicts_the_run_names_every_field_and_both_values() -> None:
    stored = Config(**NEEDED).to_json()
    with pytest.raises(ResumeError) as caught:
        resolve({**NEEDED, "lr": 0.5, "model": "ViT-L-14", "threads": 3}, stored)
    for words in ("--lr was 1e-05, now 0.5", "--model was 'ViT-B-32', now 'ViT-L-14'", "may change"):
        assert words in str(caught.value)
    assert "--threads was" not in str(caught.value)


def test_auto_agrees_with_what_it_was_resolved_to() -> None:
    stored = Config(**NEEDED, precision="bf16", torch_threads=4, csv_separator="|").to_json()
    config = resolve({**NEEDED, "precision": "auto", "torch_threads": 0, "csv_separator": "auto"}, stored)
    assert (config.precision, config.torch_threads, config.csv_separator) == ("bf16", 4, "|")


def test_a_model_file_may_have_moved() -> None:
    stored = Config(**NEEDED, model="/old/place/tiny.json").to_json()
    assert resolve({**NEEDED, "model": "/new/place/tiny.json"}, stored).model == "/old/place/tiny.json"


@pytest.mark.parametrize(
    ("stored", "given", "agrees"),
    [
        ({"seed": 5}, {"seed": 0}, False),
        ({"warmup": 100}, {"warmup": 0}, False),
        ({"lock_image": True}, {"lock_image": False}, False),
        ({"warmup": 100}, {"warmup": -1}, True),
        ({}, {"warmup": 100}, False),
        ({}, {"soft_targets": 0.3}, False),
        ({"csv_separator": "tab"}, {"csv_separator": "\t"}, True),
        ({"csv_separator": "tab"}, {"csv_separator": "\\t"}, True),
        ({"image_column": "FilePath"}, {"image_column": "filepath"}, True),
        ({"evaluate_every": Interval("steps", 1_000_000)}, {"evaluate_every": Interval.parse("1000000")}, True),
    ],
)
def test_only_what_means_the_same_agrees(stored: dict[str, object], given: dict[str, object], agrees: bool) -> None:
    kept = json.loads(json.dumps(Config(**{**NEEDED, **stored}).to_json()))
    if agrees:
        assert resolve({**NEEDED, **given}, kept) == Config(**{**NEEDED, **stored})
    else:
        with pytest.raises(ResumeError, match="was started with other settings"):
            resolve({**NEEDED, **given}, kept)


def test_auto_is_a_word_for_a_number_until_the_job_knows_better() -> None:
    for name in ("warmup", "micro_batch"):
        assert parse_value(name, "auto", origin=name) == getattr(Config(**NEEDED), name) == -1
        with pytest.raises(ConfigError, match="must be at least 0"):
            Config(**{**NEEDED, name: -2})
    with pytest.raises(ConfigError, match="expected a whole number"):
        parse_value("keep_every", "auto", origin="keep_every")
    kept = Config(**NEEDED).to_json()
    with pytest.raises(ResumeError, match="--warmup was auto, now 50"):
        resolve({**NEEDED, "warmup": 50}, kept)
    assert resolve({**NEEDED, "micro_batch": -1}, kept | {"micro_batch": 32}).micro_batch == -1  # tried anew
    for name, choice in (("compile", "on"), ("jpeg_decoder", "gpu")):
        assert getattr(resolve({**NEEDED, name: "auto"}, kept | {name: choice}), name) == choice, "a restart would be another run"
        assert getattr(resolve({**NEEDED, name: "auto"}), name) == "auto"


def test_what_an_older_version_did_not_know_was_as_it_is_by_default() -> None:
    kept = {name: value for name, value in Config(**NEEDED).to_json().items() if name not in ("soft_targets", "patience")}
    assert resolve(NEEDED, kept) == Config(**NEEDED)
    with pytest.raises(ResumeError, match=r"--soft-targets was 0\.0, now 0\.2"):
        resolve({**NEEDED, "soft_targets": 0.2}, kept)


def test_a_setting_that_is_no_more_may_have_had_no_effect() -> None:
    kept = Config(**NEEDED).to_json()
    assert resolve(NEEDED, {**kept, "layer_decay": 1.0}) == Config(**NEEDED)
    with pytest.raises(ResumeError, match="'layer_decay' is not a setting"):
        resolve(NEEDED, {**kept, "layer_decay": 0.7})


@given(st.sampled_from(["seconds", "steps", "epochs"]), st.integers(1, 10**9))
def test_intervals_survive_being_written(kind: str, value: int) -> None:
    assert Interval.parse(str(Interval(kind, value))) == Interval(kind, value)


def test_an_unknown_environment_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"CLIPJOB_MAX_STEP is not a setting.*Did you mean CLIPJOB_MAX_STEPS"):
        from_environment({"CLIPJOB_MAX_STEP": "3"})


def test_what_a_kubernetes_service_injects_is_no_setting() -> None:
    injected = {
        "CLIPJOB_SERVICE_HOST": "10.0.0.1",
        "CLIPJOB_SERVICE_PORT": "80",
        "CLIPJOB_SERVICE_PORT_METRICS": "80",
        "CLIPJOB_PORT": "tcp://10.0.0.1:80",
        "CLIPJOB_PORT_80_TCP": "tcp://10.0.0.1:80",
        "CLIPJOB_PORT_80_TCP_ADDR": "10.0.0.1",
        "CLIPJOB_METRICS_SERVICE_HOST": "10.0.0.1",
    }
    assert from_environment({**injected, "HOME": "/root", "CLIPJOB_LR": "1e-3"}) == {"lr": 1e-3}


def test_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"job.toml: .warmupp. is not .* Did you mean warmup"):
        from_mapping({"warmupp": 3}, origin="job.toml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0.0}, "--epochs must be above 0"),
        ({"global_batch_size": 1}, "--global-batch-size must be at least 2"),
        ({"val_fraction": 0.9}, "--val-fraction must be at most 0.5"),
        ({"lr": float("nan")}, "--lr must be a finite number"),
        ({"precision": "int8"}, "--precision must be one of auto, fp32, bf16, fp16"),
        ({"template": "a photo"}, "--template must contain"),
        ({"evaluate_every": Interval("seconds", 5)}, "--evaluate-every must be counted in steps or epochs"),
        ({"lock_image": True, "lock_text": True}, "nothing to train"),
        ({"patience": 2, "val_fraction": 0.0}, "go with held-out pairs"),
        ({"patience": 2, "evaluate_every": Interval("never")}, "--patience counts evaluations"),
        ({"soft_targets": 0.2, "loss": "siglip"}, "belongs to --loss clip"),
        ({"template": "{} and {}"}, "must contain {} once"),
        ({"init_from": "/a", "pretrained": "openai"}, "both name the first weights"),
    ],
)
def test_bad_values_are_refused_by_name(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**{**NEEDED, **changes})


def test_local_paths_become_absolute_and_uris_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = merge(flags={"csv": "data.csv", "lmdb": "s3://bucket/x.lmdb", "run": "~/r"}, environ={})
    assert given == {"csv": str(tmp_path / "data.csv"), "lmdb": "s3://bucket/x.lmdb", "run": str(Path("~/r").expanduser())}


def test_config_is_frozen_and_flat_with_help_for_every_field() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**NEEDED).lr = 1.0  # type: ignore[misc]
    for name, spec in FIELDS.items():
        assert spec.metadata["help"].rstrip().endswith((".", '"')), name
        assert isinstance(spec.default, str | int | float | bool | Interval), name


SCRIPTS_RELY_ON = {
    "--csv",
    "--lmdb",
    "--run",
    "--init-from",
    "--tag-separator",
    "--keep-every",
    "--model",
    "--pretrained",
    "--val-csv",
    "--val-lmdb",
    "--val-fraction",
    "--epochs",
    "--max-steps",
    "--global-batch-size",
    "--lr",
    "--weight-decay",
    "--warmup",
    "--seed",
    "--precision",
    "--device",
    "--threads",
    "--checkpoint-every",
    "--keep-checkpoints",
    "--evaluate-every",
    "--scratch",
}


def test_flags_that_scripts_rely_on_exist() -> None:
    assert {flag(name) for name in FIELDS} >= SCRIPTS_RELY_ON


@pytest.mark.parametrize(
    "uri", ["s3://key:secret@bucket/run", "https://host/data.csv?X-Amz-Signature=abc", "abfs://c@account/x?sv=1&sig=abc"]
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        merge(flags={"csv": uri}, environ={})
    assert not {"secret", "abc"} & set(str(caught.value).replace("=", " ").split())


def test_several_local_lmdbs_become_absolute_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert merge(flags={"lmdb": "a.lmdb, b.lmdb"}, environ={})["lmdb"] == f"{tmp_path}/a.lmdb,{tmp_path}/b.lmdb"
    (tmp_path / "one,two").mkdir()
    assert merge(flags={"lmdb": "one,two"}, environ={})["lmdb"] == f"{tmp_path}/one,two"


@pytest.mark.parametrize(("text", "expected"), [("200GB", 200 * 10**9), ("1.5 GiB", 3 * 2**29), ("4096", 4096), ("", None)])
def test_scratch_limit_is_read_in_bytes(text: str, expected: int | None) -> None:
    assert Config(scratch_limit=text).scratch_limit_bytes == expected


@pytest.mark.parametrize("settings", [{"scratch_limit": "much"}, {"storage_patience": Interval("steps", 5)}])
def test_limits_that_are_no_limits_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Config(**settings)  # type: ignore[arg-type]
