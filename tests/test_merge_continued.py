"""A model joins an earlier merge by opcm: the same as all at once, of models and of adapters; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import lrmerge, refused, save
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter import peft_write
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import LrmergeError
from mergekit_lr.graph.journal import Journal
from mergekit_lr.methods.opcm import Tally

SHAPES = {
    "w.weight": (12, 9),
    "u.weight": (12, 9),
    "experts.weight": (3, 8, 6),
    "conv.weight": (6, 2, 3, 3),
    "n": (12,),
}
MODELS: tuple[str, ...] = ("a", "b", "c", "d")
RANKS: dict[str, int] = dict(zip(MODELS, (3, 2, 4, 1), strict=True))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A base with matrices, a stack of them, a kernel, a vector and a whole number; fine-tunes and adapters of it."""
    folder, random = tmp_path_factory.mktemp("zoo"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    save(folder / "base", base | {"step": torch.tensor([0])}, config=None)
    for i, name in enumerate(MODELS, 1):
        tuned = {n: t + 0.1 * i * torch.randn(t.shape, generator=random) for n, t in base.items()}
        save(folder / name, tuned | {"step": torch.tensor([i])}, config=None)
        (folder / f"{name}-lora").mkdir()
        peft_write.save(adapter(name, random), folder / f"{name}-lora")
    return folder


def adapter(name: str, random: torch.Generator) -> Adapter:
    """Factors of two matrices, the second one in c and d only; and a tensor in full, which is averaged."""
    weights = {}
    for module in ("w", "u") if name in "cd" else ("w",):
        A, B = torch.randn(RANKS[name], 9, generator=random), torch.randn(12, RANKS[name], generator=random)
        weights[f"{module}.weight"] = AdaptedWeight(Kind.LINEAR, LowRank(A, B), (12, 9))
    return Adapter(
        weights, saved={"head.weight": torch.randn(4, 9, generator=random)}, config={"modules_to_save": ["head"]}
    )


def recipe(
    zoo: Path, names, *, key: str = "model", continued: bool = False, alpha: float = 0.5, **more
) -> dict[str, Any]:
    """A recipe of opcm; names are of the zoo, paths of what was merged before."""
    given = [str(name if isinstance(name, Path) else zoo / name) for name in names]
    made = {"version": 1, "merge_method": "opcm", f"{key}s": [{key: name} for name in given], "dtype": "float32"}
    made |= {"base_model": str(zoo / "base")} if key == "model" else {}
    return made | {"parameters": {"alpha": alpha} | ({"continued": True} if continued else {})} | more


def figures(folder: Path) -> dict[str, Any]:
    """What the manifest says of how each tensor was scaled."""
    return {one["name"]: one["opcm"] for one in json.loads((folder / "lrmerge.json").read_text())["tensors"]}


def in_steps(zoo: Path, out: Path, names: Sequence[str | Path], **options) -> Path:
    """The first two merged, then the others joining one after the other."""
    lr.merge(recipe(zoo, names[:2], **options), out / "0")
    for i, name in enumerate(names[2:]):
        lr.merge(recipe(zoo, [out / f"{i}", name], continued=True, **options), out / f"{i + 1}")
    return out / f"{len(names) - 2}"


def deltas(merged: Adapter) -> dict[str, Tensor]:
    return {name: weight.delta.dense() for name, weight in merged.weights.items()}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_figures(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert (found[name] is None) == (one is None), name
        if one is not None:
            assert found[name]["count"] == one["count"] == len(MODELS)
            assert found[name]["scale"] == pytest.approx(one["scale"], rel=1e-5)
            assert found[name]["mean_norm"] == pytest.approx(one["mean_norm"], rel=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_models_that_join_one_by_one_make_the_merge_of_all_at_once(zoo, tmp_path, alpha):
    lr.merge(recipe(zoo, MODELS, alpha=alpha), tmp_path / "once")
    last = in_steps(zoo, tmp_path, MODELS, alpha=alpha)
    close(load_file(last / "model.safetensors"), load_file(tmp_path / "once" / "model.safetensors"), 1e-5)
    found = figures(last)
    same_figures(found, figures(tmp_path / "once"))
    assert {name: len(one["scale"]) for name, one in found.items() if one is not None} == {
        "w.weight": 1, "u.weight": 1, "experts.weight": 3, "conv.weight": 1, "n": 1,
    }  # fmt: skip
    assert found["step"] is None  # whole numbers are the base's


def test_two_may_join_at_once_and_what_joins_changes_the_result(zoo, tmp_path):
    once, before, after = (tmp_path / name for name in ("once", "before", "after"))
    lr.merge(recipe(zoo, MODELS), once)
    lr.merge(recipe(zoo, MODELS[:2]), before)
    lr.merge(recipe(zoo, [before, *MODELS[2:]], continued=True), after)
    close(load_file(after / "model.safetensors"), load_file(once / "model.safetensors"), 1e-5)
    anew = lr.merge(recipe(zoo, [before, *MODELS[2:]])).result
    assert anew is not None
    apart = anew["w.weight"] - load_file(once / "model.safetensors")["w.weight"]
    assert float(apart.abs().max()) > 1e-3  # without continued the earlier merge counts as one model


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_adapters_that_join_one_by_one_make_the_merge_of_all_at_once(zoo, tmp_path, alpha):
    names = tuple(f"{name}-lora" for name in MODELS)
    lr.merge(recipe(zoo, names, key="adapter", alpha=alpha), tmp_path / "once")
    last = in_steps(zoo, tmp_path, names, key="adapter", alpha=alpha)
    found, wanted = (lr.open_adapter(folder).adapter for folder in (last, tmp_path / "once"))
    close(deltas(found), deltas(wanted), 1e-4)
    assert {n: weight.delta.rank for n, weight in found.weights.items()} == {
        n: weight.delta.rank for n, weight in wanted.weights.items()
    }
    torch.testing.assert_close(found.saved["head.weight"], wanted.saved["head.weight"])  # the mean of four
    same_figures(figures(last), figures(tmp_path / "once"))
    assert figures(last)["head.weight (saved)"] == {"count": 4, "scale": [1.0], "mean_norm": [0.0]}


def test_values_are_differences_from_the_base_that_joins_too(zoo, tmp_path):
    random = torch.Generator().manual_seed(2)
    for name in MODELS[:3]:
        A, B = torch.randn(2, 9, generator=random), torch.randn(12, 2, generator=random)
        saved = {"n": torch.randn(12, generator=random)} if name != "b" else {}
        (tmp_path / name).mkdir()
        weights = {"w.weight": AdaptedWeight(Kind.LINEAR, LowRank(A, B), (12, 9))}
        peft_write.save(Adapter(weights, saved=saved), tmp_path / name)
    base = str(zoo / "base")
    paths = [tmp_path / name for name in MODELS[:3]]
    lr.merge(recipe(zoo, paths, key="adapter", base_model=base), tmp_path / "once")
    last = in_steps(zoo, tmp_path, paths, key="adapter", base_model=base)
    found, wanted = (lr.open_adapter(folder).adapter for folder in (last, tmp_path / "once"))
    close(deltas(found), deltas(wanted), 1e-4)
    torch.testing.assert_close(found.saved["n"], wanted.saved["n"], rtol=1e-5, atol=1e-5)
    once = figures(tmp_path / "once")["n (saved)"]
    assert figures(last)["n (saved)"]["scale"] == pytest.approx(once["scale"], rel=1e-5)
    joined = lr.merge_adapters("opcm", [tmp_path / "0", paths[2]], base=zoo / "base", continued=True)
    close(deltas(joined), deltas(wanted), 1e-4)


def test_adapters_in_one_file_have_their_manifest_beside_them(zoo, tmp_path):
    output = {"output": {"format": "diffusers", "component": "unet"}, "targets": {"exclude": ["head"]}}
    names = [f"{name}-lora" for name in MODELS[:3]]
    lr.merge(recipe(zoo, names[:2], key="adapter", **output), tmp_path / "ab.safetensors")
    lr.merge(recipe(zoo, names[2:], key="adapter", **output), tmp_path / "c.safetensors")  # one alone is as it was
    once = lr.merge(recipe(zoo, names, key="adapter", **output)).adapter
    files = [tmp_path / "ab.safetensors", tmp_path / "c.safetensors"]
    joined = lr.merge(recipe(zoo, files, key="adapter", continued=True, **output)).adapter
    assert once is not None
    assert joined is not None
    close(deltas(joined), deltas(once), 1e-4)


def test_a_later_document_continues_an_earlier_one(zoo, tmp_path):
    first = recipe(zoo, MODELS[:2]) | {"name": "ab"}
    second = recipe(zoo, [Path("ab"), "c"], continued=True)
    (tmp_path / "steps.yaml").write_text(yaml.safe_dump_all([first, second]))
    lr.merge(tmp_path / "steps.yaml", tmp_path / "out")
    once = lr.merge(recipe(zoo, MODELS[:3])).result
    assert once is not None
    close(load_file(tmp_path / "out" / "model.safetensors"), once, 1e-5)
    refused("plan", tmp_path / "steps.yaml", code=2, words=("ab is no merge by opcm", "not made yet"))


def test_figures_of_a_tensor_are_in_the_journal(zoo, tmp_path, monkeypatch):
    lines: list[dict[str, Any]] = []

    def closed(journal: Journal, close=Journal.close) -> None:
        lines.extend(map(json.loads, (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()[1:]))
        close(journal)

    monkeypatch.setattr(Journal, "close", closed)
    lr.merge(recipe(zoo, MODELS[:2]), tmp_path / "out")
    kept = {line["name"]: line["figures"].get("opcm") for line in lines}
    assert kept == figures(tmp_path / "out")
    assert kept["w.weight"]["count"] == 2


def test_other_methods_have_no_such_figures(zoo, tmp_path):
    made = recipe(zoo, MODELS[:2]) | {"merge_method": "task_arithmetic", "parameters": {}}
    lr.merge(made, tmp_path / "out")
    assert set(figures(tmp_path / "out").values()) == {None}


def test_plans_know_a_continued_merge(zoo, tmp_path):
    lr.merge(recipe(zoo, MODELS[:2]), tmp_path / "ab")
    plan = lr.plan_merge(recipe(zoo, [tmp_path / "ab", "c"], continued=True))
    assert plan.to_json()["states"] == {"merged": len(SHAPES), "copied": 1}
    assert "continued=True" in plan.rules["w.weight"]
    stacks = recipe(zoo, [tmp_path / "ab", "c"], continued=True, targets={"include": ["experts"]})
    (tmp_path / "stacks.yaml").write_text(yaml.safe_dump(stacks))
    shown = lrmerge("plan", tmp_path / "stacks.yaml")  # tries a step of the plan to say how long it takes
    assert shown.code == 0, shown.err
    assert "1 merged: opcm(alpha=0.5, continued=True)" in shown.out


def test_tensors_by_hand_need_tallies_and_get_them():
    random = torch.Generator().manual_seed(1)
    deltas = [torch.randn(2, 5, 4, generator=random) for _ in range(3)]
    after_two: list[Tally] = []
    after_three: list[Tally] = []
    two = lr.merge_tensors("opcm", deltas[:2], tallies=after_two)
    three = lr.merge_tensors("opcm", [two, deltas[2]], continued=True, earlier=after_two, tallies=after_three)
    torch.testing.assert_close(three, lr.merge_tensors("opcm", deltas), rtol=1e-5, atol=1e-5)
    assert [tally.count for tally in after_three] == [3, 3]
    with pytest.raises(LrmergeError, match=r"needs a tally in 'earlier' for each of the 2 matrices .* got 0"):
        lr.merge_tensors("opcm", [two, deltas[2]], continued=True)


# --- what cannot be continued


def changed(folder: Path, change) -> None:
    file = folder / "lrmerge.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def without_figures(content: dict[str, Any]) -> None:
    for tensor in content["tensors"]:
        del tensor["opcm"]


def without_one(content: dict[str, Any]) -> None:
    content["tensors"] = [one for one in content["tensors"] if one["name"] != "w.weight"]


def unequal(content: dict[str, Any]) -> None:
    for tensor in (one for one in content["tensors"] if one["opcm"] is not None):
        tensor["opcm"]["scale"].append(1.0)


def of_another_method(content: dict[str, Any]) -> None:
    content["method"] = "ties"


def of_another_verb(content: dict[str, Any]) -> None:
    content["verb"] = "apply"


def on_another_base(content: dict[str, Any]) -> None:
    for file in content["inputs"][content["base"]]["files"]:
        file["header_sha256"] = "0" * 64


REFUSED = {
    "older version": (without_figures, 1, ("does not say how opcm scaled what it merged", "merge", "again")),
    "one tensor": (
        without_one,
        1,
        ("does not say how opcm scaled w.weight", "merge it again", "targets: exclude"),
    ),
    "damaged": (unequal, 1, ("tensors.1.opcm: scale and mean_norm are of equally many", "damaged")),
    "method": (of_another_method, 2, ("continue.yaml line 3: parameters.continued: ", "is of merge ties")),
    "verb": (of_another_verb, 2, ("continue.yaml line 3: parameters.continued: ", "is of apply opcm")),
    "base": (on_another_base, 1, ("was merged on another base", "base")),
}


def written(folder: Path, made: dict[str, Any], key: str = "model") -> Path:
    """The recipe as a file whose third line is ``parameters``."""
    entries = ", ".join(f"{{{key}: {one[key]}}}" for one in made[f"{key}s"])
    base = f"base_model: {made['base_model']}\n" if "base_model" in made else ""
    file = folder / "continue.yaml"
    file.write_text(f"version: 1\nmerge_method: opcm\nparameters: {{continued: true}}\n{base}{key}s: [{entries}]\n")
    return file


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_in_the_plan(zoo, tmp_path, case):
    change, code, words = REFUSED[case]
    lr.merge(recipe(zoo, MODELS[:2]), tmp_path / "ab")
    made = written(tmp_path, recipe(zoo, [tmp_path / "ab", "c"]))
    lr.plan_merge(made)
    changed(tmp_path / "ab", change)
    refused("plan", made, code=code, words=words)
    refused("merge", made, tmp_path / "out", code=code, words=words, out=tmp_path / "out")


def test_a_model_that_is_no_merge_cannot_be_continued(zoo, tmp_path):
    words = ("continue.yaml line 3: parameters.continued: ", "is no merge by opcm", "no lrmerge.json lies beside it")
    refused("plan", written(tmp_path, recipe(zoo, ["a", "b"])), code=2, words=words)
    adapters = recipe(zoo, ["a-lora", "b-lora"], key="adapter")
    refused("plan", written(tmp_path, adapters, "adapter"), code=2, words=words)
    base, one = (load_file(zoo / name / "model.safetensors") for name in ("base", "a"))
    with pytest.raises(LrmergeError, match=r"model 0 is no merge by opcm.* of what is in memory"):
        lr.merge_state_dicts("opcm", base, [one, one], continued=True)


def test_something_must_join(zoo, tmp_path):
    lr.merge(recipe(zoo, MODELS[:2]), tmp_path / "ab")
    words = ("continue.yaml line 3: parameters.continued: ", "ab is all there is")
    refused("plan", written(tmp_path, recipe(zoo, [tmp_path / "ab"])), code=2, words=words)


def test_a_merge_with_a_lora_on_it_is_no_merge(zoo, tmp_path):
    lr.merge(recipe(zoo, MODELS[:2]), tmp_path / "ab")
    low = Adapter({"w.weight": AdaptedWeight(Kind.LINEAR, LowRank(torch.ones(1, 9), torch.ones(12, 1)), (12, 9))})
    (tmp_path / "low").mkdir()
    peft_write.save(low, tmp_path / "low")
    words = ("parameters.continued: ", "low is no merge by opcm that can go on: it has a LoRA on it")
    made = written(tmp_path, recipe(zoo, [Path(f"{tmp_path / 'ab'}+{tmp_path / 'low'}"), "c"]))
    refused("plan", made, code=2, words=words)


def test_digests_tell_a_base_and_revisions_where_there_are_none(zoo, tmp_path):
    base = tmp_path / "models--org--base" / "snapshots" / ("a" * 40)
    shutil.copytree(zoo / "base", base)
    lr.merge(recipe(zoo, MODELS[:2], base_model=str(base)), tmp_path / "ab")
    joining = recipe(zoo, [tmp_path / "ab", "c"], continued=True)
    here = joining | {"base_model": str(base)}

    def said(content: dict[str, Any]) -> dict[str, Any]:
        return content["inputs"][str(base)]

    changed(tmp_path / "ab", lambda content: said(content).update(revision="b" * 40))
    lr.plan_merge(here)  # of another commit, whose files are the same
    changed(tmp_path / "ab", lambda content: said(content).update(files=[]))
    with pytest.raises(LrmergeError, match=r"ab: was merged on another base, .*; the files of .* are not the same"):
        lr.plan_merge(here)
    lr.plan_merge(joining)  # a folder is of no commit, so it may be the same
