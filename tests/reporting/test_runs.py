import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from mechinterp import manifest as manifest_module
from mechinterp.errors import UserError
from mechinterp.reporting import Report, Run, bars


class Side(Enum):
    CLEAN = "clean"


@dataclass(frozen=True)
class Config:
    model: str = "tiny"
    n: int = 4
    seed: int = 3
    sites: tuple[str, ...] = ("z",)
    out: Path = field(default=Path("a"), metadata={"in_id": False})
    side: Side = Side.CLEAN


def save(value, path):
    path.write_text(json.dumps(value))


def load(path):
    return json.loads(path.read_text())


def never():
    pytest.fail("a finished part was made again")


def read_manifest(run):
    return json.loads((run.path / "manifest.json").read_text())


def test_same_config_same_folder(tmp_path):
    def folder(config, inputs=None, experiment="e"):
        with Run.open(experiment, config, tmp_path, inputs or {}) as run:
            return run.path

    first = folder(Config())
    assert first.parent == tmp_path / "e" and first == folder(Config())
    assert first == folder(Config(out=Path("b")))  # not part of the question
    others = [folder(Config(n=5)), folder(Config(), {"model": "00"}), folder(Config(), experiment="f")]
    assert len({first, *others}) == 4


def test_id_depends_on_the_version(monkeypatch):
    before = manifest_module.run_id("e", Config(), {})
    monkeypatch.setattr(manifest_module.metadata, "version", lambda name: "99")
    assert manifest_module.run_id("e", Config(), {}) != before


def test_second_run_loads_and_says_so(tmp_path, capsys):
    with Run.open("e", Config(), tmp_path) as run:
        assert run.part("heads", lambda: [1, 2], load, save) == [1, 2]
    with Run.open("e", Config(), tmp_path) as run:
        assert run.part("heads", never, load, save) == [1, 2]
    assert "heads: done before, loaded" in capsys.readouterr().out
    log = (run.path / "log.txt").read_text()
    assert log.count("heads: ") == 2 and "heads: done before, loaded" in log
    assert read_manifest(run)["sessions"] == 2


@pytest.mark.parametrize("damage", ["{not json", "[1, 3]", ""])
def test_damaged_part_is_named_and_made_again(tmp_path, capsys, damage):
    with Run.open("e", Config(), tmp_path) as run:
        run.part("heads", lambda: [1, 2], load, save)
        (run.path / "results" / "heads").write_text(damage)  # "[1, 3]" loads, but is not what was written
    with Run.open("e", Config(), tmp_path) as run:
        assert run.part("heads", lambda: [1, 2], load, save) == [1, 2]
        assert "heads: damaged" in capsys.readouterr().out
        assert run.part("heads", never, load, save) == [1, 2]


def test_part_may_be_a_folder(tmp_path):
    def save_folder(value, path):
        path.mkdir()
        save(value, path / "values.json")

    def load_folder(path):
        return load(path / "values.json")

    with Run.open("e", Config(), tmp_path) as run:
        run.part("heads", lambda: [1], load_folder, save_folder)
        (run.path / "results" / "heads" / "values.json").unlink()
        assert run.part("heads", lambda: [1], load_folder, save_folder) == [1]
        assert run.part("heads", never, load_folder, save_folder) == [1]


def test_interrupted_part_leaves_nothing_that_looks_whole(tmp_path):
    def interrupted(value, path):
        path.write_text("[1,")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Run.open("e", Config(), tmp_path) as run:
        run.part("heads", lambda: [1, 2], load, interrupted)
    assert not (run.path / "results" / "heads").exists()
    assert "stopped: KeyboardInterrupt" in (run.path / "log.txt").read_text()
    with Run.open("e", Config(), tmp_path) as run:
        assert run.part("heads", lambda: [1, 2], load, save) == [1, 2]
    assert [item.name for item in (run.path / "results").iterdir()] == ["heads"]


def test_manifest_says_what_made_the_numbers(tmp_path):
    with Run.open("e", Config(), tmp_path, {"model": "abc"}) as run:
        run.part("heads", lambda: [1], load, save)
        assert read_manifest(run)["finished"] is None
        assert run.finish() == run.path
    manifest = read_manifest(run)
    assert manifest.keys() >= {"started", "finished", "seconds", "peak_memory_bytes"}
    assert manifest.keys() >= {"argv", "git", "platform", "threads"}
    assert manifest["versions"].keys() == {"python", "torch", "transformers", "transformer-lens", "mechinterp"}
    assert manifest["seeds"] == {"seed": 3} and manifest["inputs"] == {"model": "abc"}
    assert manifest["peak_memory_bytes"] > 1e6 and manifest["finished"] >= manifest["started"]
    assert manifest["parts"]["heads"].keys() == {"seconds", "finished", "sha256", "commit"}
    assert os.uname().nodename not in json.dumps(manifest["platform"])
    config = json.loads((run.path / "config.json").read_text())
    assert config == {"model": "tiny", "n": 4, "seed": 3, "sites": ["z"], "out": "a", "side": "clean"}


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_of_this_process_not_of_the_one_that_started_it():
    held = bytearray(1_000_000_000)
    program = "from mechinterp.manifest import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert manifest_module.peak_memory_bytes() > len(held) > 1.5 * int(done.stdout)


def test_commit_and_uncommitted_changes(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    checkout.mkdir()

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", checkout, *identity, *arguments], check=True, capture_output=True)

    git("init")
    (checkout / "a.py").write_text("one\n")
    git("add", "a.py")
    git("commit", "-m", "one")
    monkeypatch.chdir(checkout)
    # The package's own checkout comes first: pretend that it is installed elsewhere.
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "site" / "manifest.py"))
    with Run.open("e", Config(), "runs") as run:
        clean = read_manifest(run)["git"]
    assert len(clean["commit"]) == 40 and not clean["dirty"]
    assert not (run.path / "uncommitted.diff").exists()
    (checkout / "a.py").write_text("two\n")
    with Run.open("e", Config(), "runs") as run:
        assert read_manifest(run)["git"]["dirty"]
    assert "+two" in (run.path / "uncommitted.diff").read_text()


def test_no_checkout_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "manifest.py"))
    with Run.open("e", Config(), tmp_path) as run:
        assert read_manifest(run)["git"] is None


def test_two_processes_cannot_share_a_run(tmp_path):
    with Run.open("e", Config(), tmp_path) as run, pytest.raises(UserError, match="open already"):
        Run.open("e", Config(), tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (run.path / "lock").write_text(str(other.pid))
        with pytest.raises(UserError, match=rf"pid {other.pid}.*delete .*lock"):
            Run.open("e", Config(), tmp_path)
        other.communicate(b"\n")
    Run.open("e", Config(), tmp_path).close()  # that process is gone: its lock is stale
    assert not (run.path / "lock").exists()


@pytest.mark.parametrize("text", ["", "not a pid", str(os.getpid())], ids=["empty", "no pid", "this process"])
def test_stale_locks_are_ignored(tmp_path, text):
    with Run.open("e", Config(), tmp_path) as run:
        pass
    (run.path / "lock").write_text(text)
    Run.open("e", Config(), tmp_path).close()


def test_finish_writes_the_report_with_the_manifest(tmp_path):
    report = Report("t", "q?", "a.", "h", "command")
    with Run.open("e", Config(), tmp_path, {"model": "abc"}) as run:
        figure = run.figure("top", bars(["a"], [1.0]))
        page = run.finish(report)
    assert page == run.path / "report.html" and page.is_file()
    assert json.loads((run.path / "report.json").read_text())["manifest"]["inputs"] == {"model": "abc"}
    assert json.loads(figure.read_text())["data"][0]["type"] == "bar"
    assert not list(run.path.rglob(".partial-*"))


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden"])
def test_names_stay_in_the_folder(tmp_path, name):
    with Run.open("e", Config(), tmp_path) as run, pytest.raises(UserError, match="not a name"):
        run.part(name, lambda: 1, load, save)


@dataclass(frozen=True)
class Loose:
    value: object


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_configs_that_json_cannot_hold(tmp_path, value):
    with pytest.raises(UserError, match="a config holds"):
        Run.open("e", Loose(value), tmp_path)
