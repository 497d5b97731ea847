"""One run per folder: a lock on a file in it, which the kernel lets go when the process ends, however it ends.

A killed run so leaves a file behind, but no lock. Source: flock(2).
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

LOCK = ".lrmerge.lock"
# What a file system answers that has no such locks, as some network ones.
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def locked(folder: Path) -> IO[str]:
    """The lock of ``folder``, which is made where it is not there; it holds until the file is closed.

    Where there are no locks the work goes on with a warning: to refuse it would help nobody who runs once.

    Raises:
        BlockingIOError: another process, or another part of this one, holds it.
        OSError: the folder cannot be made or written.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK).open("w", encoding="utf-8")
        except FileNotFoundError:
            continue  # the run that held the folder has just moved it to its place
        try:
            _take(file, folder)
        except OSError:
            file.close()
            raise
        if _is_at(file, folder / LOCK):
            return file
        file.close()  # moved away between opening and locking


def _take(file: IO[str], folder: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as problem:
        if problem.errno not in _UNKNOWN:
            raise
        logging.getLogger(__name__).warning(
            "%s: this file system has no locks; see to it yourself that no other run writes there", folder
        )


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open ``file`` is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
