"""Bad models, weights, devices, disks and runs, and the other commands: the rules of `test_bad_input.py` hold."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import ROWS, Case, World, check_message, check_refused, contents, own_logging, sound, table_of, world

from job.launch import run_command
from job.runtime.stop import StopSignal

__all__ = ["own_logging", "sound", "world"]


def run_alone(command: list[str], **environ: str) -> tuple[int, str]:
    """The command in a process of its own. Returns: exit code, what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "job", *command],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """A file system of the test's own. Skips where that is not permitted."""
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, str(place)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.witness, "it ran")


def model(w: World, content: str) -> list[str]:
    """The command with a model config of this content."""
    return w.start(model=w.file("model.json", content))


def weights(w: World, name: str, content: bytes) -> list[str]:
    """The command with a weights file of this content."""
    return w.start(pretrained=w.file(name, content))


def saved(w: World, content: Any) -> list[str]:
    """The command with what torch.save made."""
    torch.save(content, w.folder / "weights.pt")
    return w.start(pretrained=w.folder / "weights.pt")


def scripted(w: World) -> list[str]:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), w.folder / "weights.pt")
    return w.start(pretrained=w.folder / "weights.pt")


def sound_weights(w: World) -> Path:
    return w.sound / "run" / "base" / "open_clip_model.safetensors"


def renamed(w: World) -> list[str]:
    """The command with sound tensors under other names."""
    path = w.folder / "weights.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in load_file(sound_weights(w)).items()}, path)
    return w.start(pretrained=path)


@table_of(
    Case("unknown model", 2, "--model ViT-B-23", "Did you mean", lambda w: w.start(model="ViT-B-23")),
    Case("no model config", 2, "none.json", "Check --model", lambda w: w.start(model=w.folder / "none.json")),
    Case("broken model config", 2, "model.json", "not valid JSON", lambda w: model(w, '{"embed_dim": 16,')),
    Case("no model in it", 2, "model.json", "must have embed_dim", lambda w: model(w, '{"lr": 1}')),
    Case("a list for a model", 2, "model.json", "must hold one JSON object", lambda w: model(w, "[1, 2]")),
    Case("model without text tower", 2, "model.json", "must have", lambda w: model(w, json.dumps({**tiny.CONFIG, "text_cfg": 3}))),
    Case("impossible model", 2, "model.json", "Check --model", lambda w: model(w, json.dumps({**tiny.CONFIG, "embed_dim": "x"}))),
    Case("folder without model", 2, "open_clip_config.json", "Check --model", lambda w: w.start(model=w.made("empty"))),
    Case("unknown tag", 2, "laion2b", "tags are openai", lambda w: w.start(model="ViT-B-32", pretrained="laion2b")),
    Case("tag for a config file", 2, "openai", "give a weights file", lambda w: w.start(pretrained="openai")),
    Case(
        "no weights file", 65, "none.safetensors", "Check --pretrained", lambda w: w.start(pretrained=w.folder / "none.safetensors")
    ),
    Case("folder without weights", 2, "open_clip_config.json", "--pretrained", lambda w: w.start(pretrained=w.made("empty"))),
    Case("empty weights", 65, "w.safetensors", "Fetch it again", lambda w: weights(w, "w.safetensors", b"")),
    Case(
        "weights cut short",
        65,
        "w.safetensors",
        "Fetch it again",
        lambda w: weights(w, "w.safetensors", sound_weights(w).read_bytes()[:-9]),
    ),
    Case(
        "Git LFS pointer",
        65,
        "w.safetensors",
        "Fetch it again",
        lambda w: weights(w, "w.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    ),
    Case("weights of another model", 65, "tiny-model.json", "Check --model and --pretrained", renamed),
    Case("text for weights", 65, "w.pt", "Fetch it again", lambda w: weights(w, "w.pt", b"<html>404 Not Found</html>")),
    Case(
        "hostile weights",
        65,
        "weights.pt",
        "convert it to safetensors",
        lambda w: saved(w, {"visual.proj": Hostile(w.folder / "witness")}),
    ),
    Case("no tensors in it", 65, "weights.pt", "Check --model and --pretrained", lambda w: saved(w, [1, 2])),
    Case("TorchScript", 65, "weights.pt", "state_dict()", scripted),
    Case("fetch over something", 2, "is not an empty folder", "Choose another", lambda w: ["fetch", "openai", str(w.sound)]),
    Case("fetch into a file", 2, "data.csv", "Choose another", lambda w: ["fetch", "openai", str(w.sound / "data.csv")]),
    Case("fetch an unknown tag", 2, "laion2b", "tags are openai", lambda w: ["fetch", "laion2b", str(w.folder / "new")]),
)
@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
def test_bad_model(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(case, world, capsys, monkeypatch)
    assert not (world.folder / "witness").exists()


def copy_of_run(w: World) -> Path:
    return Path(shutil.copytree(w.sound / "run", w.folder / "run"))


def other_config(w: World, change: str, to: str) -> list[str]:
    """The command with a run whose config.json was changed."""
    path = copy_of_run(w) / "config.json"
    text = path.read_text(encoding="utf-8")
    assert change in text
    path.write_text(text.replace(change, to, 1), encoding="utf-8")
    return w.resume(run=path.parent)


def damaged(w: World, pattern: str) -> list[str]:
    """The command with a run in which some files have lost their second half."""
    run = copy_of_run(w)
    found = sorted(run.glob(pattern))
    assert found
    for path in found:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return w.resume(run=run)


def foreign(w: World) -> list[str]:
    """The command with a folder for a run that holds a person's own files under the names that a run uses."""
    w.made("photos/base").joinpath("me.jpg").write_bytes(tiny.picture(0))
    return w.start(run=w.folder / "photos")


def without_config(w: World) -> list[str]:
    run = copy_of_run(w)
    (run / "config.json").unlink()
    return w.start(run=run)


def other_csv(w: World) -> list[str]:
    text = (w.sound / "data.csv").read_text(encoding="utf-8")
    return w.resume(csv=w.file("data.csv", text.replace("thing number 3", "another thing")))


def larger_lmdb(w: World) -> list[str]:
    keys = [f"images/{number:04}.jpg" for number in range(ROWS + 1)]
    return w.resume(lmdb=tiny.write_lmdb(w.folder / "images.lmdb", {key: tiny.picture(0) for key in keys}))


@table_of(
    Case("another lr", 78, "--lr was 1e-05, now 0.1", "Leave these out", lambda w: w.resume(lr=0.1)),
    Case("another CSV", 78, "the CSV's sha256", "Give it the same data", other_csv),
    Case("another LMDB", 78, "the LMDB: {'entries': 24", "Give it the same data", larger_lmdb),
    Case("broken config.json", 78, "config.json", "another --run", lambda w: damaged(w, "config.json")),
    Case("newer config.json", 78, "newer than 1", "version of clipjob", lambda w: other_config(w, '"format": 1', '"format": 2')),
    Case("config.json of another program", 78, "config.json", "another --run", lambda w: other_config(w, '"format"', '"f"')),
    Case("config.json without settings", 78, "config.json", "another --run", lambda w: other_config(w, '"config"', '"c"')),
    Case("config.json without data", 78, "config.json", "another --run", lambda w: other_config(w, '"data"', '"d"')),
    Case(
        "unknown setting in config.json", 78, "config.json: 'lrr'", "version of clipjob", lambda w: other_config(w, '"lr"', '"lrr"')
    ),
    Case(
        "bad value in config.json",
        78,
        "config.json: lr",
        "version of clipjob",
        lambda w: other_config(w, '"lr": 1e-05', '"lr": "x"'),
    ),
    Case("config.json gone", 78, "no config.json", "another --run", without_config),
    Case("someone's folder", 78, "photos", "another --run", foreign),
    Case("no whole checkpoint", 78, "checkpoints", "another --run", lambda w: damaged(w, "data/*/weights.safetensors"), grows=True),
    Case("no readable commit", 78, "checkpoints", "another --run", lambda w: damaged(w, "commits/*.json"), grows=True),
    Case("damaged base", 78, "base", "another --run", lambda w: damaged(w, "base/*.safetensors")),
    Case("first weights from nowhere", 65, "--init-from", "clipjob inspect", lambda w: w.start(init_from=w.folder / "none")),
    Case("first weights of an unfinished run", 65, "--init-from", "complete run", lambda w: w.start(init_from=w.sound / "run")),
)
def test_bad_run(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(case, world, capsys, monkeypatch)


@table_of(
    Case("no such GPU", 71, "--device cuda:99", "--device cpu", lambda w: w.resume(device="cuda:99")),
    Case("fp16 without GPU", 71, "--precision fp16", "bf16", lambda w: w.start(precision="fp16", device="cpu")),
    Case("scratch on a bucket", 2, "--scratch", "must be a local folder", lambda w: w.resume(scratch="s3://bucket/x")),
    Case("scratch below a file", 69, "data.csv", "writable local folder", lambda w: w.resume(scratch=w.sound / "data.csv" / "x")),
    Case("run in an unknown place", 2, "nfs4://", "local path or s3://", lambda w: w.start(run="nfs4://host/run")),
    Case("CSV in an unknown place", 2, "nfs4://", "local path or s3://", lambda w: w.start(csv="nfs4://host/data.csv")),
    Case(
        "CSV from a dead server", 69, "http://localhost:9", "start the server", lambda w: w.start(csv="http://localhost:9/data.csv")
    ),
    Case("run is a file", 77, "data.csv", "Choose another path", lambda w: w.start(run=w.sound / "data.csv")),
)
def test_bad_place(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(case, world, capsys, monkeypatch)


def pack(w: World, *more: str, source: str = "pictures") -> list[str]:
    """The command that packs a folder of three images."""
    if not (w.folder / "pictures").exists():
        w.made("pictures/cats")
        for number in range(3):
            w.file(f"pictures/cats/{number}.jpg", tiny.picture(number))
    return ["pack", str(w.folder / source), str(w.folder / "out.lmdb"), *more]


def spoiled(w: World, *more: str) -> list[str]:
    """The command that packs a folder in which one of four images is none."""
    command = pack(w, *more)
    w.file("pictures/cats/bad.jpg", b"not an image")
    return command


@table_of(
    Case("no source", 65, "none", "folder of images or a CSV", lambda w: pack(w, source="none")),
    Case("no images", 65, "empty", "Check the source folder", lambda w: [w.made("empty") and "pack", "empty", "out.lmdb"]),
    Case(
        "CSV of absent images",
        65,
        "images/0000.jpg",
        "Replace or remove",
        lambda w: ["pack", str(w.sound / "data.csv"), "out.lmdb"],
        grows=True,
    ),
    Case(
        "someone's output",
        2,
        "out.lmdb exists",
        "choose another output",
        lambda w: [w.file("out.lmdb", "mine") and part for part in pack(w)],
    ),
    Case(
        "someone's output folder",
        2,
        "out.lmdb exists",
        "choose another output",
        lambda w: [w.made("out.lmdb") and "pack", *pack(w)[1:]],
    ),
    Case("someone's CSV", 2, "mine.csv exists", "another name", lambda w: pack(w, "--csv", str(w.file("mine.csv", "mine")))),
    Case("bad image", 65, "cats/bad.jpg", "Replace or remove", lambda w: spoiled(w), grows=True),
    Case("text for a number", 2, "'--resize'", "--help", lambda w: pack(w, "--resize", "small")),
    Case("negative size", 2, "--resize", "0", lambda w: pack(w, "--resize", "-5")),
    Case("impossible quality", 2, "--quality", "1", lambda w: pack(w, "--quality", "500")),
    Case("impossible share", 2, "--max-bad-samples", "1", lambda w: pack(w, "--max-bad-samples", "7")),
    Case("inspect nothing", 2, "none", "--run", lambda w: ["inspect", str(w.folder / "none")]),
    Case("inspect a folder", 2, "mine", "--run", lambda w: ["inspect", str(w.made("mine"))]),
    Case(
        "inspect a broken run",
        78,
        "config.json",
        "another --run",
        lambda w: ["inspect", str(damaged(w, "config.json") and w.folder / "run")],
    ),
    Case("remove nothing", 2, "none", "Nothing done", lambda w: ["rm", "--yes", str(w.folder / "none")]),
    Case("remove someone's folder", 2, "mine", "Nothing done", lambda w: ["rm", "--yes", str(w.made("mine/data").parent)]),
    Case("remove without saying so", 2, "run", "--yes", lambda w: ["rm", str(w.sound / "run")]),
)
def test_bad_command(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    check_refused(case, world, capsys, monkeypatch)


def test_rm_takes_no_for_an_answer(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    check_refused(Case("", 2, "run", "--yes", lambda w: ["rm", str(w.sound / "run")]), world, capsys, monkeypatch)


@pytest.mark.parametrize("what", ["tag", "hf-hub", "fetch"])
def test_an_unreachable_hub_is_told_with_the_way_around(world: World, what: str) -> None:
    command = {
        "tag": world.start(model="ViT-B-32", pretrained="laion2b_s34b_b79k"),
        "hf-hub": world.start(model="hf-hub:timm/ViT-B-16-SigLIP"),
        "fetch": ["fetch", "laion2b_s34b_b79k", str(world.folder / "fetched")],
    }[what]
    code, told = run_alone(command, HF_HUB_OFFLINE="1", HF_HOME=str(world.folder / "hf"))
    assert code == 69, told
    check_message(told, thing="ViT-B", remedy="clipjob fetch")
    assert not (world.folder / "run").exists()


def test_a_gpu_that_is_asked_for_and_absent_ends_the_job(world: World) -> None:
    before = contents(world.sound)
    code, told = run_alone(world.resume(device="cuda"), CUDA_VISIBLE_DEVICES="-1")
    assert code == 71, told
    check_message(told, thing="--device cuda", remedy="--device cpu")
    assert contents(world.sound) == before


def test_too_many_bad_images_end_the_job_with_the_run_saved(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"images/{number:04}.jpg" for number in range(ROWS)]
    images = tiny.write_lmdb(world.folder / "half.lmdb", {key: tiny.picture(n) if n % 2 else b"x" for n, key in enumerate(keys)})
    command = world.start(lmdb=images, epochs=2, max_steps=0)
    check_refused(
        Case("", 65, "could not be decoded", "--max-bad-samples", lambda w: command, grows=True), world, capsys, monkeypatch
    )
    assert list((world.folder / "run" / "commits").iterdir())
    assert run_command([*command, "--max-bad-samples", "1"], StopSignal()) == 0


def test_a_read_only_run_ends_the_job(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(world.folder / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        case = Case("", 77, str(disk), "not mounted read-only", lambda w: w.start(run=disk / "run"))
        check_refused(case, world, capsys, monkeypatch)
    with mounted(world.folder / "disk", "--bind", "-o", "ro", str(world.sound)) as disk:
        case = Case("", 77, str(disk), "not mounted read-only", lambda w: w.resume(run=disk / "run"))
        check_refused(case, world, capsys, monkeypatch)


def test_read_only_scratch_ends_the_job(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(world.folder / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        case = Case("", 69, str(disk), "writable local folder", lambda w: w.resume(scratch=disk / "scratch"))
        check_refused(case, world, capsys, monkeypatch)


def test_fetching_into_a_read_only_place_is_refused(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(world.folder / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        command = ["fetch", str(sound_weights(world)), str(disk / "new"), "--model", str(world.sound / "tiny-model.json")]
        check_refused(Case("", 77, str(disk), "not mounted read-only", lambda w: command), world, capsys, monkeypatch)


def test_full_scratch_ends_the_job(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(world.folder / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        case = Case("", 69, str(disk), "Free some space", lambda w: w.start(scratch=disk / "scratch"), grows=True)
        check_refused(case, world, capsys, monkeypatch)


def test_data_on_a_read_only_disk_are_no_problem(world: World) -> None:
    with mounted(world.folder / "disk", "--bind", "-o", "ro", str(world.sound)) as disk:
        assert run_command(world.start(csv=disk / "data.csv", lmdb=disk / "images.lmdb"), StopSignal()) == 0


def test_a_full_disk_costs_nothing_that_was_saved(world: World) -> None:
    size = sum(path.stat().st_size for path in (world.sound / "run").rglob("*") if path.is_file())
    with mounted(world.folder / "disk", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(64 * 2**20 - size * 3 // 4))
        command = world.start(run=disk / "run", max_steps=6, checkpoint_every=1)
        code, told = run_alone(command)
        assert code == 69, told
        check_message(told, thing=str(disk), remedy="Free some space")
        committed = {path.name: path.read_bytes() for path in (disk / "run" / "commits").iterdir()}
        assert committed
        ballast.unlink()
        code, told = run_alone(command)
        assert code == 0, told
        assert '"event": "resumed"' in told


def test_a_bug_of_ours_exits_70_with_its_traceback() -> None:
    program = "import job.launch as launch; launch.run_command = lambda *_: 1 / 0; launch.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr


def test_held_out_images_that_are_none_make_no_model_the_best(world: World) -> None:
    keys = [f"images/{number:04}.jpg" for number in range(ROWS)]
    broken = tiny.write_lmdb(world.folder / "broken.lmdb", dict.fromkeys(keys, b"x"))
    assert run_command(world.start(val_csv=world.sound / "data.csv", val_lmdb=broken), StopSignal()) == 0
    result = json.loads((world.folder / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["best_step"] is None
    assert result["export"].endswith("/export/final")


def test_the_hostile_weights_are_hostile(world: World) -> None:
    saved(world, {"visual.proj": Hostile(world.folder / "witness")})
    torch.load(world.folder / "weights.pt", weights_only=False)
    assert (world.folder / "witness").read_text(encoding="utf-8") == "it ran"
