"""Processes of their own that do one piece of work: to be killed in the middle of it, or given little memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# Imports once, then does the work of each line of its input in a process of its own.
FORKING = """
import os, sys, time
import torch, mergekit_lr as lr
from mergekit_lr.graph import schedule
from mergekit_lr.verbs import apply, merge
schedule.BATCH_BYTES = 1 << 18  # many small batches
def step(progress):
    print("step", flush=True)
    time.sleep(0.01)
print("ready", flush=True)
for _ in iter(sys.stdin.readline, ""):
    child = os.fork()
    if child == 0:
        {work}
        os._exit(0)
    print("child", child, flush=True)
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""

# Does it once, when it is told to.
ALONE = """
import sys
import torch, mergekit_lr as lr
from mergekit_lr.verbs import apply, merge
print("ready", flush=True)
sys.stdin.readline()
{work}
print("done", flush=True)
"""

GROUP = Path("/sys/fs/cgroup/memory")
ROOM = 96 << 20  # bytes beyond what the process holds when it is ready


def forking(work: str) -> subprocess.Popen:
    """A process that does ``work``, one line of Python in which ``step`` is the progress, as often as it is told."""
    return python(FORKING.format(work=work))


def python(code: str) -> subprocess.Popen:
    """A process that runs ``code``, which prints "ready" once it has imported what it needs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def killed(process: subprocess.Popen, steps: int, delay: float) -> int:
    """Start one run, kill it ``delay`` seconds after so many steps, and return its exit status."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    pid = seen = 0
    for line in process.stdout:
        word, *rest = line.split()
        pid = int(rest[0]) if word == "child" else pid
        seen += word == "step"
        if word == "ended":
            return int(rest[0])
        if pid and seen == steps:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
    raise AssertionError("the process that forks ended")


def in_a_group(process: subprocess.Popen) -> Path:
    """Let the kernel give ``process`` no more than ROOM beyond what it holds, its libraries, already."""
    group = GROUP / f"lrmerge-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(ROOM))
        (group / "cgroup.procs").write_text(str(process.pid))
    except OSError:
        process.kill()
        process.communicate()
        pytest.skip("no memory control group of version 1 can be made here")
    return group


def with_a_limit(process: subprocess.Popen) -> None:
    """The same for anonymous memory alone, which needs no privileges."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    data = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (data + ROOM, data + ROOM))


def finish_within(limit: Callable[[subprocess.Popen], Path | None], work: str) -> None:
    """Do ``work``, one line of Python, in a process with that limit of memory; it must end well."""
    process = python(ALONE.format(work=work))
    group = limit(process)
    try:
        told, _ = process.communicate("go\n")
    finally:
        process.wait()
        if group is not None:
            group.rmdir()
    assert process.returncode == 0
    assert told == "done\n"
