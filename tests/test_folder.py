"""One run at a time writes to OUT: a second one ends in a line, a killed one leaves nothing that stops the next."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from processes import python

import mergekit_lr as lr
from mergekit_lr.checkpoint.folder import OutputFile, OutputFolder
from mergekit_lr.checkpoint.lock import LOCK, locked
from mergekit_lr.errors import LrmergeError, UsageError

# Extracts, and waits for a line of its input after the first batch.
WAITING = """
import sys
import mergekit_lr as lr
from mergekit_lr.graph import schedule
schedule.BATCH_BYTES = 1 << 12
waited = []
def step(progress):
    if not waited:
        waited.append(progress)
        print("step", flush=True)
        sys.stdin.readline()
print("ready", flush=True)
lr.extract({base!r}, {tuned!r}, {out!r}, rank=2, resume={resume}, progress=step)
print("done", flush=True)
"""


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path]:
    base = tiny.decoder()
    return tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "tuned", tiny.finetuned(base))


def started(models: tuple[Path, Path], out: Path, *, resume: bool = False) -> subprocess.Popen:
    """A process in the middle of an extraction."""
    base, tuned = map(str, models)
    process = python(WAITING.format(base=base, tuned=tuned, out=str(out), resume=resume))
    assert process.stdout is not None
    assert process.stdout.readline() == "step\n"
    return process


def extract(models: tuple[Path, Path], out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lrmerge", "extract", *map(str, models), "-o", str(out), "--rank", "2", "-q"]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def test_a_second_run_to_the_same_place_ends_and_the_first_goes_on(models, tmp_path):
    out = tmp_path / "out"
    lr.extract(*models, tmp_path / "alone", rank=2)
    first = started(models, out)
    for options in ((), ("--resume",), ("--overwrite",)):
        before = tiny.contents(tmp_path / "out.partial")
        second = extract(models, out, *options)
        assert second.returncode == 1, second
        assert second.stderr.count("\n") == 1, second.stderr
        assert f"{out}: another run is writing there" in second.stderr
        assert tiny.contents(tmp_path / "out.partial") == before
    told, _ = first.communicate("go\n")
    assert (first.returncode, told) == (0, "done\n")
    alone, result = tiny.contents(tmp_path / "alone"), tiny.contents(out)
    assert result.keys() == alone.keys()
    assert result["adapter_model.safetensors"] == alone["adapter_model.safetensors"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("options", [("--resume",), ()])
def test_a_killed_run_leaves_no_lock(options, models, tmp_path):
    out = tmp_path / "out"
    first = started(models, out)
    first.kill()
    first.communicate()
    assert (tmp_path / "out.partial" / LOCK).exists()
    again = extract(models, out, *options)
    assert again.returncode == 0, again.stderr
    assert LOCK not in tiny.contents(out)


def test_a_second_file_to_the_same_place_is_told_as_well(models, tmp_path):
    lr.extract(*models, tmp_path / "adapter", rank=2)
    out = tmp_path / "file.safetensors"
    with OutputFile(out) as folder:
        options = ["--to", "kohya", "--component", "unet", "-o", str(out)]
        command = [sys.executable, "-m", "lrmerge", "convert", str(tmp_path / "adapter"), *options]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert "another run is writing there" in second.stderr
        for name in ("lrmerge.json", OutputFile.FILE):
            (folder.partial / name).write_bytes(b"{}")
    assert {path.name for path in tmp_path.glob("file*")} == {"file.safetensors", "file.lrmerge.json"}


def begun(out: Path, error: BaseException) -> None:
    with OutputFolder(out) as folder:
        (folder.partial / "journal.jsonl").write_text("{}\n")
        raise error


def test_an_interrupted_or_failed_run_lets_go(tmp_path):
    out = tmp_path / "out"
    for error, left in ((KeyboardInterrupt(), True), (ValueError(), False)):
        with pytest.raises(type(error)):
            begun(out, error)
        assert (tmp_path / "out.partial").exists() is left
    with OutputFolder(out) as folder:
        (folder.partial / "lrmerge.json").write_text("{}")
    assert list(out.iterdir()) == [out / "lrmerge.json"]


def test_what_an_earlier_run_left_is_gone_unless_resumed(tmp_path):
    partial = tmp_path / "out.partial"
    for resume in (True, False):
        (partial / "deep").mkdir(parents=True, exist_ok=True)
        (partial / "journal.jsonl").write_text("{}\n")
        folder = OutputFolder(tmp_path / "out", resume=resume)
        assert {path.name for path in partial.iterdir()} == ({"deep", "journal.jsonl", LOCK} if resume else {LOCK})
        folder.discard()
        assert not partial.exists()


def test_a_result_that_came_while_the_lock_was_taken_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def late(partial: Path):
        out.mkdir()
        (out / "lrmerge.json").write_text("{}")
        return locked(partial)

    monkeypatch.setattr("mergekit_lr.checkpoint.folder.locked", late)
    with pytest.raises(UsageError, match="exists already"):
        OutputFolder(out)
    assert (out / "lrmerge.json").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_that_is_moved_away_meanwhile_is_made_anew(tmp_path, monkeypatch):
    partial, flock = tmp_path / "out.partial", fcntl.flock

    def late(file, how):
        if not (tmp_path / "out").exists():
            partial.rename(tmp_path / "out")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(partial):
        assert (partial / LOCK).exists()
        with pytest.raises(BlockingIOError):
            locked(partial)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on_with_a_warning(number, models, tmp_path, monkeypatch, caplog):
    def refused(file, how):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    lr.extract(*models, tmp_path / "out", rank=2)
    assert [record.getMessage().count("has no locks") for record in caplog.records] == [1]
    assert LOCK not in tiny.contents(tmp_path / "out")


def test_any_other_refusal_of_a_lock_is_an_error(models, tmp_path, monkeypatch):
    def broken(file, how):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(LrmergeError, match=r"cannot be written \(broken disk\)"):
        lr.extract(*models, tmp_path / "out", rank=2)
