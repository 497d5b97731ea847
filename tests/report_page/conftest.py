"""Results of every verb on tiny checkpoints, and a page about each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import decoder, finetuned, save

import mergekit_lr as lr


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Path:
    """A folder with a result of each verb, under its name, and ``compare.json``."""
    root = tmp_path_factory.mktemp("results")
    base = decoder()
    save(root / "in" / "base", base)
    for seed, name in enumerate(("math", "code", "talk"), 1):
        save(root / "in" / name, finetuned(base, seed=seed))
        lr.extract(root / "in" / "base", root / "in" / name, root / "in" / f"{name}-lora", rank=4 + seed)
    lr.extract(root / "in" / "base", root / "in" / "math", root / "in" / "layers-lora", rank=3, exclude=["embed"])
    given = [str(root / "in" / name) for name in ("math", "code", "talk")]
    loras = [f"{path}-lora" for path in given]
    lr.extract(root / "in" / "base", given[0], root / "extract", rank=6)
    lr.compress(loras[0], root / "compress", rank=2)
    lr.convert(loras[0], root / "convert", to="peft")
    lr.apply(root / "in" / "base", [(loras[0], 0.5)], root / "apply", dtype="bfloat16")
    models = {"merge_method": "ties", "base_model": str(root / "in" / "base"), "parameters": {"density": 0.5}}
    lr.merge(models | {"models": [{"model": path} for path in given]}, root / "models", compare_inputs=True)
    adapters = {"merge_method": "linear", "adapters": [{"adapter": path} for path in loras]}
    lr.merge(adapters, root / "adapters", compare_inputs=True)
    lr.merge(adapters, root / "plain")
    return root
