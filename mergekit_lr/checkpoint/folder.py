"""An output folder that appears whole or not at all.

Work goes to ``OUT.partial`` beside it and is renamed when complete. What stood at OUT before is moved aside first and
removed last, so no moment of a crash loses it. One run at a time has ``OUT.partial``: it holds the lock of that folder,
whose file goes last, so that nobody else begins in a folder that is still being moved or emptied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mergekit_lr.checkpoint.lock import LOCK, locked
from mergekit_lr.checkpoint.writer import out_of_space
from mergekit_lr.errors import LrmergeError, UsageError

# A folder that holds one of these was made by a tool of this field and may be replaced on request.
RESULTS = ("lrmerge.json", "adapter_config.json")
# One that holds one of these is our own unfinished work.
UNFINISHED = (*RESULTS, "journal.jsonl", LOCK)


class OutputFolder:
    """``OUT.partial`` until ``finish`` makes it OUT.

    Args:
        out: the destination. overwrite: whether a result that stands there may be replaced. resume: whether an
            earlier ``OUT.partial`` is continued rather than begun anew. inputs: folders and files that the work
            reads, which it must never replace.

    Raises:
        UsageError: OUT exists, is an input, is no result that may be replaced, or cannot be written.
        CapacityError: the disk is full. LrmergeError: another run is writing to OUT.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, resume: bool = False, inputs: Iterable[Path] = ()):
        # Absolute, so that "." has a name; through links, so that what they point to is replaced and not they.
        self.out = Path(os.path.realpath(Path(out).expanduser()))
        if not self.out.name:
            raise UsageError(f"{out}: --out names a folder to make, this is the root of the disk")
        self.partial = self.out.with_name(self.out.name + ".partial")
        try:
            self._check_free([path.resolve() for path in inputs])
            self._check_earlier(overwrite)
            self._lock = locked(self.partial)
            self._check_again(overwrite)
            if not resume:
                self._empty()
        except BlockingIOError:
            raise LrmergeError(
                f"{self.out}: another run is writing there; wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:
            if (full := out_of_space(error, self.partial)) is not error:
                raise full from None
            raise UsageError(f"{self.partial}: cannot be written ({error.strerror}); choose another --out") from None

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Finish. After an error remove the unfinished work; Ctrl-C, like a kill, leaves it to be resumed."""
        if error is None:
            self.finish()
            return
        if isinstance(error, Exception):
            self.discard()
        self._lock.close()
        if isinstance(error, OSError):
            raise out_of_space(error, self.out) from None

    def finish(self) -> Path:
        """Put the finished folder at OUT and return its path."""
        old = None
        if self.out.exists():
            old = next(place for i in range(1000) if not (place := self._aside(i)).exists())
            self.out.rename(old)
        self.partial.rename(self.out)
        (self.out / LOCK).unlink(missing_ok=True)
        self._lock.close()
        if old is not None:
            shutil.rmtree(old)
        return self.out

    def discard(self) -> None:
        """Remove the unfinished work."""
        with suppress(OSError):
            self._empty()
        shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()

    def _empty(self) -> None:
        """Remove everything but the lock."""
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _aside(self, count: int) -> Path:
        return self.out.with_name(f"{self.out.name}.old{count or ''}")

    def _check_free(self, inputs: list[Path]) -> None:
        """Stop where an input, or something that is not ours, lies in the way of the work."""
        for path in inputs:
            if path in (self.out, self.partial) or self.out in path.parents or self.partial in path.parents:
                raise UsageError(f"{self.out}: is or holds an input of this run; choose another --out")
        if self.partial.exists():
            held = _names(self.partial)
            if held and not any(name in held for name in UNFINISHED):
                raise UsageError(
                    f"{self.partial}: is needed for unfinished work and holds something else; move it, or choose "
                    "another --out"
                )

    def _check_again(self, overwrite: bool) -> None:
        """Stop at the result of a run that held the lock until now."""
        try:
            self._check_earlier(overwrite)
        except UsageError:
            self.discard()
            raise

    def _check_earlier(self, overwrite: bool) -> None:
        """Stop at what stands at OUT already, unless it may be replaced."""
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise UsageError(f"{self.out}: is a file; --out names a folder")
        held = _names(self.out)
        if not held:
            return
        if not overwrite:
            raise UsageError(f"{self.out}: exists already; add --overwrite to replace it, or choose another --out")
        if not any(name in held for name in RESULTS):
            raise UsageError(
                f"{self.out}: holds no result of lrmerge, so --overwrite does not replace it; remove it first"
            )


class OutputFile(OutputFolder):
    """One file ``NAME.safetensors`` with its manifest ``NAME.lrmerge.json``; the work on both goes to a folder.

    Raises:
        UsageError: as for a folder; or OUT does not end in ``.safetensors``.
    """

    FILE = "adapter.safetensors"  # in the folder

    def finish(self) -> Path:
        """Put the finished file and its manifest at their places and return the file's path."""
        os.replace(self.partial / "lrmerge.json", self.out.with_suffix(".lrmerge.json"))
        os.replace(self.partial / self.FILE, self.out)
        self.discard()
        return self.out

    def _check_earlier(self, overwrite: bool) -> None:
        if self.out.suffix != ".safetensors" or self.out.is_dir():
            raise UsageError(f"{self.out}: is written as one file; --out ends in .safetensors")
        if self.out.exists() and not overwrite:
            raise UsageError(f"{self.out}: exists already; add --overwrite to replace it, or choose another --out")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
