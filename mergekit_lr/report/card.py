"""Model cards: a README with the metadata that the Hub reads, and a text that says what the result is.

Each kind of result has its own text, in a file of its own beside this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_lr.errors import printable


def write_card(folder: Path, body: str, **metadata: Any) -> None:
    """Write ``README.md``: ``metadata`` (``base_model``, ``tags`` ...) as the Hub's ModelCardData, then ``body``.

    Names from files stand in the body; control characters in them are escaped.
    """
    # Of the Hub's library only what is needed, and only now: the whole costs a third of a second.
    from huggingface_hub.repocard_data import ModelCardData

    data = ModelCardData(**{key: value for key, value in metadata.items() if value is not None})
    text = "\n".join(printable(line) for line in body.splitlines())
    (folder / "README.md").write_text(f"---\n{data.to_yaml().strip()}\n---\n\n{text}\n", encoding="utf-8")
