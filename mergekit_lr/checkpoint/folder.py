"""An output folder that appears whole or not at all.

Work goes to ``OUT.partial`` beside it and is renamed when complete. What stood at OUT before is moved aside first and
removed last, so no moment of a crash loses it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from mergekit_lr.checkpoint.writer import out_of_space
from mergekit_lr.errors import UsageError

# A folder that holds one of these was made by a tool of this field and may be replaced on request.
RESULTS = ("lrmerge.json", "adapter_config.json")
# One that holds one of these is our own unfinished work.
UNFINISHED = (*RESULTS, "journal.jsonl")


class OutputFolder:
    """``OUT.partial`` until ``finish`` makes it OUT.

    Args:
        out: the destination. overwrite: whether a result that stands there may be replaced. resume: whether an
            earlier ``OUT.partial`` is continued rather than begun anew. inputs: folders and files that the work
            reads, which it must never replace.

    Raises:
        UsageError: OUT exists, is an input, is no result that may be replaced, or cannot be written.
        CapacityError: the disk is full.
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
            if self.partial.exists() and not resume:
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
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
        if isinstance(error, OSError):
            raise out_of_space(error, self.out) from None

    def finish(self) -> Path:
        """Put the finished folder at OUT and return its path."""
        old = None
        if self.out.exists():
            old = next(place for i in range(1000) if not (place := self._aside(i)).exists())
            self.out.rename(old)
        self.partial.rename(self.out)
        if old is not None:
            shutil.rmtree(old)
        return self.out

    def discard(self) -> None:
        """Remove the unfinished work."""
        shutil.rmtree(self.partial, ignore_errors=True)

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
        shutil.rmtree(self.partial)
        return self.out

    def _check_earlier(self, overwrite: bool) -> None:
        if self.out.suffix != ".safetensors" or self.out.is_dir():
            raise UsageError(f"{self.out}: is written as one file; --out ends in .safetensors")
        if self.out.exists() and not overwrite:
            raise UsageError(f"{self.out}: exists already; add --overwrite to replace it, or choose another --out")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
