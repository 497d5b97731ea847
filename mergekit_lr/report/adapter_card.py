"""What the cards of all adapters share: the base that they go onto, and the picture of their spectrum."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_lr.report.inputs import Input
from mergekit_lr.report.loading import Base
from mergekit_lr.report.markdown import code
from mergekit_lr.report.spectrum import FILE, Spectrum, lines_of, spectrum_svg, spectrum_table

WORST = 8  # rows of a table of modules


def base_of(base: Input, *, config: Mapping[str, Any]) -> Base:
    """Where a reader of the card loads ``base`` from."""
    return Base(base.hub or f"path/to/{base.name}", base.asked, base.subfolder, config)


def unread(hub: str) -> str:
    """What to know of a base that only the adapters name."""
    return f"The base {code(hub)} was not read. Its licence may set terms as well."


def named_base(text: str | None, hub: str | None) -> Base:
    """The base that only an adapter's configuration names, where that is no Hub id by the end of somebody's path."""
    last = re.split(r"[/\\]", (text or "").rstrip("/\\"))[-1]
    return Base(hub or f"path/to/{last or 'base'}")


def spectrum(spectra: Iterable[Spectrum], folder: Path) -> list[str]:
    """The picture, as a file in ``folder``, and the table under it; nothing where no spectrum is known."""
    lines = lines_of(spectra)
    if not lines:
        return []
    (folder / FILE).write_text(spectrum_svg(lines), encoding="utf-8")
    head = "What share of the change each rank keeps, by kind of module, those with the largest change first"
    return [f"{head}:\n\n![{head}]({FILE})\n\n{spectrum_table(lines)}"]
