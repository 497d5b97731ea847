"""Sizes, times and shares as a person reads them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """``nbytes`` in the unit that a person would use."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def to_read(nbytes: float, download: float) -> str:
    """What is going to be read, and what has to be downloaded before."""
    return f"{size(nbytes)} to read" + (f", {size(download)} to download first" if download else "")


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """A share with two decimals, never rounded up to all of it."""
    return "100 %" if share >= 1 else f"{100 * min(share, 0.9999):.2f} %"
