"""An output folder that appears whole or not at all.

Work goes to ``OUT.partial`` beside it and is renamed when complete. What stood at OUT before is moved aside first and
removed last, so no moment of a crash loses it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from mergekit_lr.checkpoint.writer import out_of_space
from mergekit_lr.errors import UsageError

# A folder that holds one of these was made by a tool of this field and may be replaced on request.
RESULTS = ("lrmerge.json", "adapter_config.json")


class OutputFolder:
    """``OUT.partial`` until ``finish`` makes it OUT.

    Args:
        out: the destination. overwrite: whether a result that stands there may be replaced. resume: whether an
            earlier ``OUT.partial`` is continued rather than begun anew. inputs: folders and files that the work
            reads, which it must never replace.

    Raises:
        UsageError: OUT exists, is an input, or is no result that may be replaced.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, resume: bool = False, inputs: Iterable[Path] = ()):
        self.out = Path(out).expanduser()
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._old = self.out.with_name(self.out.name + ".old")
        self._check(overwrite, inputs)
        try:
            if self.partial.exists() and not resume:
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if (full := out_of_space(error, self.partial)) is not error:
                raise full from None
            raise UsageError(f"{self.partial}: cannot be written ({error.strerror}); choose another --out") from None

    def finish(self) -> Path:
        """Put the finished folder at OUT and return its path."""
        if self.out.exists():
            if self._old.exists():
                shutil.rmtree(self._old)
            self.out.rename(self._old)
        self.partial.rename(self.out)
        if self._old.exists():
            shutil.rmtree(self._old)
        return self.out

    def discard(self) -> None:
        """Remove the unfinished work."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _check(self, overwrite: bool, inputs: Iterable[Path]) -> None:
        target = self.out.resolve()
        for path in inputs:
            source = path.resolve()
            if target == source or target in source.parents:
                raise UsageError(f"{self.out}: is an input of this run; choose another --out")
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise UsageError(f"{self.out}: is a file; --out names a folder")
        held = [path.name for path in self.out.iterdir()]
        if not held:
            return
        if not overwrite:
            raise UsageError(f"{self.out}: exists already; add --overwrite to replace it, or choose another --out")
        if not any(name in held for name in RESULTS):
            raise UsageError(
                f"{self.out}: holds no result of lrmerge, so --overwrite does not replace it; remove it first"
            )
