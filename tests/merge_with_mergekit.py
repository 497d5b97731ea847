"""Run by mergekit's own Python: merges every recipe of a JSON file, ``[[recipe, out], ...]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mergekit.config import MergeConfiguration  # pyright: ignore[reportMissingImports]
from mergekit.merge import MergeOptions, run_merge  # pyright: ignore[reportMissingImports]

for recipe, out in json.loads(Path(sys.argv[1]).read_text()):
    run_merge(MergeConfiguration.model_validate(recipe), out, MergeOptions(copy_tokenizer=False, quiet=True))
