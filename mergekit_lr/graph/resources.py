"""What this machine offers and what the user allows: device, memory, workers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from mergekit_lr.errors import CapacityError, UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Loaded libraries, their thread pools and the allocator's slack, beyond what was resident at the start.
OVERHEAD = 64 << 20
KEPT = 32 << 20  # bytes that the allocator keeps
LARGEST_KEPT = 4 << 20  # bytes of the largest piece that it keeps
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Resources(NamedTuple):
    """device: where to compute. memory: bytes that the whole process may hold. working: of these, the bytes for
    batches in flight. workers: batches computed at the same time."""

    device: torch.device
    memory: int
    working: int
    workers: int


def resources(*, device: str = "auto", memory: str | int | None = None, threads: int | None = None) -> Resources:
    """Resolve what the user asked for against what is there.

    Args:
        device: ``auto`` (the first CUDA device, otherwise the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        memory: budget of the whole process, bytes or ``8GB``; by default what it holds now and half of what is free.
        threads: workers, by default one per core that this process may use; on a CUDA device one.

    Raises:
        UsageError: an unknown device or a size that is none.
        CapacityError: the budget is below what the process holds already.
    """
    place = _device(device)
    resident = resident_bytes()
    total = parse_size(memory, "--memory") if memory is not None else resident + free_memory() // 2
    working = total - resident - OVERHEAD
    if working <= 0:
        raise CapacityError(
            f"--memory {total / 2**20:.0f}MiB: the process with its libraries holds {resident / 2**20:.0f} MiB before "
            "it reads anything; give more"
        )
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1")
    workers = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return Resources(place, total, working, 1 if place.type == "cuda" else workers)


def parse_size(text: str | int, option: str = "") -> int:
    """Bytes from ``200MB``, ``1.5GiB`` or a plain number; MB is 10^6, MiB is 2^20. ``option``: what the text is for.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtKMGT]?i?)[bB]?\s*", str(text))
    if match is None or match[2].upper() not in UNITS:
        raise UsageError(f"{f'{option} {text}'.strip()} is not a size; write 200MB, 8GB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2].upper()])


def free_memory() -> int:
    """Bytes that can still be taken: what the kernel calls available, or what the cgroup's limit leaves."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limits = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit, used in limits:
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # another cgroup version, or no limit ("max")
            continue
    return max(available, 0)


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """The most bytes of memory that this process has held so far."""
    import resource
    import sys

    try:  # of this program alone; getrusage counts what the process held before it became this program
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed, up to ``KEPT`` bytes for each thread, instead of giving it back at once.

    A pass over blocks takes and frees the same few megabytes thousands of times. glibc returns them to the kernel each
    time, and to have every page back, zeroed, costs more than the arithmetic on it. Other C libraries are left alone.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, KEPT)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
