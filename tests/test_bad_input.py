"""Bad flags, settings and data: one paragraph that names the thing and the remedy, the right exit code, and nothing lost.

Each case is a real command line. `test_bad_runs.py` goes on with models, weights, devices, disks, runs and the other commands.
"""

import gzip
import hashlib
import logging
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny

from job.launch import run_command
from job.runtime.stop import StopSignal

ROWS = 24
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class World:
    """Sound things that a case spoils one of."""

    sound: Path
    """data.csv, images.lmdb, tiny-model.json and `run`, whose job was killed between its last step and its export."""
    folder: Path
    """The case's own."""
    environ: dict[str, str] = field(default_factory=dict)

    def resume(self, *more: str, **settings: Any) -> list[str]:
        """The command that would go on with the sound run."""
        return self._train(*more, **{"run": self.sound / "run", **settings})

    def start(self, *more: str, **settings: Any) -> list[str]:
        """The command of a small new run."""
        given = {"run": self.folder / "run", "model": self.sound / "tiny-model.json", "global_batch_size": 4, "max_steps": 2}
        return self._train(*more, **{**given, "val_fraction": 0, **settings})

    def _train(self, *more: str, **settings: Any) -> list[str]:
        data = {"csv": self.sound / "data.csv", "lmdb": self.sound / "images.lmdb", "scratch": self.folder / "scratch"}
        given = {name: value for name, value in {**data, **settings}.items() if value is not None}
        return ["train", *(part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))), *more]

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def table(self, content: bytes | str) -> list[str]:
        """The command with a CSV of this content."""
        return self.resume(csv=self.file("bad.csv", content))

    def keys(self, change: Callable[[str], str], stored: Callable[[str], str] = str) -> list[str]:
        """The command with keys that are changed in the CSV and in the LMDB."""
        names = [f"images/Zoë {number}.jpg" for number in range(ROWS)]
        csv = tiny.write_csv(self.folder / "data.csv", [(change(name), "a thing") for name in names])
        lmdb = tiny.write_lmdb(self.folder / "images.lmdb", {stored(name): tiny.picture(0) for name in names})
        return self.resume(csv=csv, lmdb=lmdb)

    def toml(self, content: bytes | str) -> list[str]:
        """The command with a config file of this content."""
        return self.resume(config=self.file("job.toml", content))

    def cut_lmdb(self, size: int) -> list[str]:
        """The command with an LMDB of which only the first bytes were copied."""
        return self.resume(lmdb=self.file("cut.lmdb", (self.sound / "images.lmdb" / "data.mdb").read_bytes()[:size]))

    def set(self, **variables: str) -> list[str]:
        """The command with environment variables."""
        self.environ.update(variables)
        return self.resume()

    def made(self, path: str) -> Path:
        """An empty folder."""
        folder = self.folder / path
        folder.mkdir(parents=True)
        return folder


@dataclass(frozen=True)
class Case:
    name: str
    code: int
    thing: str
    """What the message must call by its name."""
    remedy: str
    """The words of the message that say what to do."""
    command: Callable[[World], list[str]]
    grows: bool = False
    """The refusal itself is noted in the run, so files may be added."""


def table_of(*cases: Case) -> Any:
    """A test's parameter `case`."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def contents(folder: Path) -> dict[str, str]:
    """Every file -> sha256, every folder -> "", but for scratch."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if not (name := str(path.relative_to(folder))).startswith("scratch")
    }


def check_message(text: str, *, thing: str, remedy: str) -> None:
    """What a person needs of the last thing that a job says."""
    lines = [line for line in text.splitlines() if not line.startswith("{")]  # the log is JSON
    message = "\n".join(lines)
    assert len(lines) == 1, f"not one paragraph:\n{message}"
    assert message.startswith("clipjob: ")
    assert "Traceback" not in text
    assert len(message) <= 900, f"{len(message)} characters:\n{message}"
    assert thing in message, f"does not name {thing!r}:\n{message}"
    assert remedy in message, f"does not say {remedy!r}:\n{message}"


def check_refused(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a case's command. It must end with the case's code and message and leave everything as it was."""
    command = case.command(world)
    for name, value in world.environ.items():
        monkeypatch.setenv(name, value)
    before, sound_before = contents(world.folder), contents(world.sound)
    capsys.readouterr()
    code = run_command(command, StopSignal())
    told = capsys.readouterr()
    assert code == case.code, told.err
    check_message(told.err, thing=case.thing, remedy=case.remedy)
    after = contents(world.folder)
    assert {name: after.get(name) for name in before} == before
    assert case.grows or after == before
    assert contents(world.sound) == sound_before


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set up logging for their whole process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny.write_config(folder, text_cfg=SMALL_TEXT)
    tiny.write_data(folder, ROWS)
    assert run_command([*World(folder, folder).start(), "--threads", "1", "--checkpoint-every", "1"], StopSignal()) == 0
    (folder / "run" / "result.json").unlink()
    shutil.rmtree(folder / "run" / "export")
    shutil.rmtree(folder / "scratch")
    return folder


@pytest.fixture
def world(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return World(sound, tmp_path)


@table_of(
    Case("unknown command", 2, "trian", "--help", lambda w: ["trian"]),
    Case("unknown flag", 2, "--learning-speed", "--help", lambda w: w.resume(learning_speed=1)),
    Case("flag with a typo", 2, "--max-step", "--max-steps", lambda w: w.resume(max_step=1)),
    Case("flag without its value", 2, "--lr", "--help", lambda w: w.resume("--lr")),
    Case("stray argument", 2, "data.csv", "--help", lambda w: w.resume("data.csv")),
    Case("text for a number", 2, "--lr", "expected a number", lambda w: w.resume(lr="fast")),
    Case("fraction of a step", 2, "--max-steps", "expected a whole number", lambda w: w.resume(max_steps=1.5)),
    Case("no interval", 2, "--checkpoint-every", "10m", lambda w: w.resume(checkpoint_every="10 minutes")),
    Case("too small", 2, "--global-batch-size", "at least 2", lambda w: w.start(global_batch_size=1)),
    Case("too large", 2, "--val-fraction", "at most 0.5", lambda w: w.start(val_fraction=0.9)),
    Case("zero lr", 2, "--lr", "above 0", lambda w: w.start(lr=0)),
    Case("NaN lr", 2, "--lr", "finite number", lambda w: w.start(lr="nan")),
    Case("infinite lr", 2, "--lr", "finite number", lambda w: w.start(lr="inf")),
    Case("unknown choice", 2, "--precision", "one of auto, fp32, bf16, fp16", lambda w: w.start(precision="int8")),
    Case("evaluation by the clock", 2, "--evaluate-every", "steps or epochs", lambda w: w.start(evaluate_every="10m")),
    Case("nothing to train", 2, "--lock-image", "give one of them", lambda w: w.start("--lock-image", "--lock-text")),
    Case("two first weights", 2, "--init-from", "give one", lambda w: w.start(init_from=w.sound / "run", pretrained="openai")),
    Case("template without {}", 2, "--template", "must contain {} once", lambda w: w.start(template="a photo")),
    Case("long separator", 2, "--csv-separator", "one character", lambda w: w.start(csv_separator="||")),
    Case("nonsense device", 2, "--device", "must be auto, cuda", lambda w: w.resume(device="gpu")),
    Case("endless epochs", 2, "--epochs", "at most", lambda w: w.start(epochs="1e300")),
    Case("no tag separator", 2, "--tag-separator", "such as a comma", lambda w: w.start(tag_separator="")),
    Case("half a URI", 2, "--run s3://", "s3://bucket/folder", lambda w: w.start(run="s3://")),
    Case("no --csv", 2, "--csv", "Missing --csv", lambda w: w.start(csv=None)),
    Case("no --lmdb", 2, "--lmdb", "Missing --lmdb", lambda w: w.start(lmdb=None)),
    Case("no --run", 2, "--run", "the same for every attempt", lambda w: w.start(run=None)),
    Case("bad value in the environment", 2, "CLIPJOB_LR", "expected a number", lambda w: w.set(CLIPJOB_LR="fast")),
    Case("typo in the environment", 2, "CLIPJOB_MAX_STEP ", "CLIPJOB_MAX_STEPS", lambda w: w.set(CLIPJOB_MAX_STEP="3")),
    Case("unknown name in the environment", 2, "CLIPJOB_ZZZ", "Remove it", lambda w: w.set(CLIPJOB_ZZZ="3")),
    Case("no config file", 2, "job.toml", "Check --config", lambda w: w.resume(config=w.folder / "job.toml")),
    Case("no config file, by environment", 2, "job.toml", "CLIPJOB_CONFIG", lambda w: w.set(CLIPJOB_CONFIG="job.toml")),
    Case("config file is a folder", 2, "conf", "Check --config", lambda w: w.resume(config=w.made("conf"))),
    Case("broken TOML", 2, "job.toml", "line 2", lambda w: w.toml("lr = 1e-4\nseed = = 3\n")),
    Case("TOML not in UTF-8", 2, "job.toml", "UTF-8", lambda w: w.toml('template = "Zoë {}"'.encode("latin-1"))),
    Case("unknown TOML key", 2, "'warmupp'", "Did you mean warmup?", lambda w: w.toml("warmupp = 3\n")),
    Case("TOML with sections", 2, "[train]", "Remove that line", lambda w: w.toml("[train]\nlr = 1e-4\n")),
    Case("wrong type in TOML", 2, "job.toml: lr", "expected a number", lambda w: w.toml('lr = "fast"\n')),
    Case("list in TOML", 2, "job.toml: epochs", "expected a number", lambda w: w.toml("epochs = [1, 2]\n")),
)
def test_bad_settings(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(case, world, capsys, monkeypatch)


GOOD_ROWS = "path|tags\na.jpg|cat\nb.jpg|dog\n"


@table_of(
    Case("missing", 65, "none.csv", "Check", lambda w: w.resume(csv=w.folder / "none.csv")),
    Case("folder", 65, "a folder", "Name the file inside", lambda w: w.resume(csv=w.made("csvs"))),
    Case("empty", 65, "bad.csv is empty", "must begin with a line of column names", lambda w: w.table("")),
    Case("blank", 65, "bad.csv is empty", "must begin with a line of column names", lambda w: w.table("\n \n\n")),
    Case("header only", 65, "but no rows", "Check that it was written to its end", lambda w: w.table("path|tags\n")),
    Case("Latin-1", 65, "bad.csv, line 3", "iconv", lambda w: w.table(GOOD_ROWS.replace("dog", "Zoë").encode("latin-1"))),
    Case("UTF-16", 65, "UTF-16", "iconv", lambda w: w.table(GOOD_ROWS.encode("utf-16"))),
    Case("gzip", 65, "gzip", "gunzip", lambda w: w.table(gzip.compress(GOOD_ROWS.encode()))),
    Case("Parquet", 65, "Parquet", "to_csv", lambda w: w.table(b"PAR1" + bytes(99))),
    Case("NUL", 65, "bad.csv, line 4", "save it as UTF-8", lambda w: w.table(GOOD_ROWS + "c.jpg|\0\n")),
    Case(
        "unknown columns",
        65,
        "'picture', 'words'",
        "--image-column",
        lambda w: w.start(csv=w.file("bad.csv", "picture|words\na.jpg|cat\n")),
    ),
    Case("other column", 65, "'title'", "--caption-column", lambda w: w.start(caption_column="title")),
    Case("same column twice", 65, "named 'tags'", "Rename", lambda w: w.table("path|tags|tags\na.jpg|cat|dog\n")),
    Case("no header", 65, "'a.jpg', 'cat'", "above it", lambda w: w.start(csv=w.file("bad.csv", "a.jpg|cat\nb.jpg|dog\n"))),
    Case("ragged row", 65, "bad.csv, line 4", "Complete or remove it", lambda w: w.table(GOOD_ROWS + "c.jpg\n")),
    Case("open quote", 65, "bad.csv, line 4", "must be closed", lambda w: w.table('path|tags\na|"x"\nb|"y"\nc|"z\nd|cat\n')),
    Case("no key", 65, "bad.csv, line 4", "Complete or remove", lambda w: w.table(GOOD_ROWS + "|dog\n")),
    Case("empty captions", 65, "captions are empty", "--caption-column", lambda w: w.table("path|tags\na.jpg|\nb.jpg|\n")),
    Case("held-out missing", 65, "none.csv", "Check", lambda w: w.resume(val_csv=w.folder / "none.csv")),
    Case("held-out ragged", 65, "bad.csv, line 4", "Complete", lambda w: w.resume(val_csv=w.file("bad.csv", GOOD_ROWS + "c\n"))),
    Case("held-out keys", 65, "--val-csv", "belong together", lambda w: w.resume(val_csv=w.file("held.csv", GOOD_ROWS))),
    Case("too few rows", 65, "24 training rows", "Lower --global-batch-size", lambda w: w.start(global_batch_size=25)),
)
def test_bad_csv(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(case, world, capsys, monkeypatch)


@table_of(
    Case("missing", 65, "none.lmdb", "Check --lmdb, --val-lmdb, --guard-lmdb", lambda w: w.resume(lmdb=w.folder / "none.lmdb")),
    Case("no data.mdb", 65, "holds no data.mdb", "Check the path", lambda w: w.resume(lmdb=w.made("images"))),
    Case("another file", 65, "is no LMDB", "clipjob pack", lambda w: w.resume(lmdb=w.sound / "data.csv")),
    Case("tail cut off", 65, "cut short", "Copy it again", lambda w: w.cut_lmdb(20_000)),
    Case("cut in its header", 65, "cut.lmdb", "opy", lambda w: w.cut_lmdb(5000)),
    Case("nearly nothing copied", 65, "has 10 bytes", "Copy it again", lambda w: w.cut_lmdb(10)),
    Case("empty file", 65, "has 0 bytes", "Copy it again", lambda w: w.cut_lmdb(0)),
    Case("no entries", 65, "is empty", "clipjob pack", lambda w: w.resume(lmdb=tiny.write_lmdb(w.folder / "none", {}))),
    Case("keys without folder", 65, "'Zoë 0.jpg'", "--key-prefix 'images/'", lambda w: w.keys(lambda key: key[7:])),
    Case("keys with folder", 65, "'./images/Zoë 0.jpg'", "remove it from the CSV", lambda w: w.keys(lambda key: f"./{key}")),
    Case("keys in NFD", 65, "NFD", "normalize the CSV to NFC", lambda w: w.keys(lambda key: unicodedata.normalize("NFD", key))),
    Case("stored in NFD", 65, "NFD", "to NFD", lambda w: w.keys(str, stored=lambda key: unicodedata.normalize("NFD", key))),
    Case("keys in capitals", 65, "lower case", "change the CSV", lambda w: w.keys(str.upper, stored=str.lower)),
    Case("other keys", 65, "'x0.jpg'", "belong together", lambda w: w.keys(lambda key: f"x{key[11:]}")),
    Case("wrong --key-prefix", 65, "'img/images/", "--key-prefix", lambda w: w.start(key_prefix="img/")),
)
def test_bad_lmdb(case: Case, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(case, world, capsys, monkeypatch)


def test_a_held_out_csv_is_read_like_the_training_csv(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(w: World) -> list[str]:
        good, torn = "picture!words\n" + "images/0000.jpg!cat\n" * 4, "picture!words\nimages/0000.jpg!cat\nb.jpg\n"
        columns = {"csv_separator": "!", "image_column": "picture", "caption_column": "words"}
        return w.start(csv=w.file("good.csv", good), val_csv=w.file("torn.csv", torn), **columns)

    check_refused(Case("", 65, "torn.csv, line 3", "Complete", command), world, capsys, monkeypatch)


def test_what_kubernetes_injects_is_tolerated(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPJOB_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("CLIPJOB_SERVICE_HOST", "10.0.0.1")
    check_refused(Case("", 65, "none.csv", "Check", lambda w: w.resume(csv=w.folder / "none.csv")), world, capsys, monkeypatch)


def test_check_finds_what_would_end_the_job(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", *world.keys(lambda key: key[7:])[1:], "--model", str(world.sound / "tiny-model.json")]
    assert run_command(command, StopSignal()) == 65
    assert "--key-prefix 'images/'" in " ".join(capsys.readouterr().out.split())
