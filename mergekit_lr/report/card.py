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
    # Imported here: half a second that a run should not wait for before its first byte.
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(**{key: value for key, value in metadata.items() if value is not None})
    text = "\n".join(printable(line) for line in body.splitlines())
    ModelCard(f"---\n{data.to_yaml().strip()}\n---\n\n{text}\n").save(folder / "README.md")
