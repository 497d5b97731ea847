"""Real fine-tunes merged: the order of the methods in accuracy, and that Core Space loses nothing.

The zoo's README has the order for three models; two of them have stored weights, and the third is trained in a minute,
so here are two. Accuracies are of the first examples of each task, the same for every method.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import zoo_merge
from zoo_extract import script

import mergekit_lr as lr

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "zoo"
ZOO = Path(os.environ.get("LRMERGE_ZOO", BESIDE))

pytestmark = pytest.mark.skipif(not ZOO.exists(), reason="needs LRMERGE_ZOO, the folder of real fine-tunes")


def row(method: str, space: str = "full", **parameters) -> zoo_merge.Row:
    return zoo_merge.Row(method, space, parameters, None)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> list[Path]:
    """The full fine-tunes whose weights the zoo holds."""
    return zoo_merge.finetunes(ZOO, ["half", "roletail"], tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def loras() -> list[Path]:
    return [ZOO / "lora" / task for task in json.loads((ZOO / "zoo.json").read_text())["tasks"]]


def merged(given: zoo_merge.Row, loras: list[Path], out: Path) -> dict[str, torch.Tensor]:
    """The weights of the base with the merged LoRAs."""
    lr.merge(zoo_merge.recipe(given, ZOO / "base", loras, adapters=True), out)
    return script(ZOO, "evaluate").load_encoder(out).state_dict()


def test_full_fine_tunes_are_best_with_tsv_then_ties_then_the_average(finetuned):
    average, ties, tsv = (
        zoo_merge.measured(ZOO, given, finetuned, adapters=False, limit=80)["average"]
        for given in (row("linear"), row("ties", density=0.2), row("tsv_m"))
    )
    assert tsv > ties > average


@pytest.mark.parametrize(
    "given", [row("task_arithmetic", weight=0.25), row("tsv_m", scale=0.48)], ids=lambda given: given.method
)
def test_a_space_changes_nothing_of_a_rule_that_does_not_depend_on_the_basis(given, loras, tmp_path):
    base = script(ZOO, "evaluate").load_encoder(ZOO / "base").state_dict()
    wanted = merged(given, loras, tmp_path / "full")
    changed = [name for name, weight in wanted.items() if not torch.equal(weight, base[name])]

    assert len(changed) == 36
    for space in ("core", "knots"):
        found = merged(given._replace(space=space), loras, tmp_path / space)
        for name in wanted:
            # Rounded to float32 once: a few units in the last place of the largest weight may differ.
            atol = 8 * torch.finfo(torch.float32).eps * wanted[name].abs().max().item() if name in changed else 0
            torch.testing.assert_close(found[name], wanted[name], atol=atol, rtol=0)


def test_two_thirds_of_iso_c_over_all_directions_are_of_no_adapter(loras, tmp_path):
    # Eight adapters of rank 16 span 128 of every module's 384 directions. "full" makes all of them equal, and with
    # three times the scale at Core Space's level: the same 128 directions, and 256 null ones.
    core, full = (
        lr.merge(zoo_merge.recipe(given, ZOO / "base", loras, adapters=True), tmp_path / given.space).norm
        for given in (row("iso_c", "core"), row("iso_c", support="full", scale=3.0))
    )
    assert full == pytest.approx(math.sqrt(3) * core, rel=1e-4)
