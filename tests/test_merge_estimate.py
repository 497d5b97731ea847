"""How a plan's estimate of time grows, with trials that all take one second; and that every method can be tried."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import HEAD, TABLE, decoder, finetuned, lrmerge, save
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import UsageError
from mergekit_lr.methods.explanation import example
from mergekit_lr.verbs.merge import estimate
from mergekit_lr.verbs.merge.estimate import Trial, seconds
from mergekit_lr.verbs.merge.verb import plan_documents

MODELS = ("org/base", "org/math", "org/code")
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What trials were made of; doing one once takes one second of all workers."""
    steps: list[Any] = []

    def measured(trial: Trial, rounds: int, workers: int) -> float:
        steps.append(trial.batches[0].nodes[0].work)
        return float(rounds * workers)

    monkeypatch.setattr(estimate, "measured", measured)
    monkeypatch.setattr(estimate, "LONG", 0.0)
    return steps


def planned(method: str, tensors: dict[str, Tensor], models: tuple[str, ...] = MODELS[1:], **more: Any) -> Any:
    """The plan of merging models of such tensors; the first of ``MODELS`` is the base, where the method has one."""
    based = {} if method in ("linear", "passthrough") else {"base_model": "org/base"}
    made = {"version": 1, "merge_method": method, "models": [{"model": name} for name in models], **based, **more}
    given = {name: Checkpoint.from_tensors(tensors, ref=name) for name in MODELS}
    return plan_documents(made, given=given, threads=2)[0]


def numbers(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def layers(count: int) -> dict[str, Tensor]:
    """Layers alone, without tables."""
    return {name: tensor for name, tensor in decoder(layers=count).items() if name not in (TABLE, HEAD)}


def of_matrices(tensors: dict[str, Tensor], work) -> list[float]:
    return [work(*tensor.shape) for tensor in tensors.values() if tensor.ndim == 2]


@pytest.mark.parametrize("method", ["linear", "ties", "iso_c"])
def test_twice_the_layers_take_twice_as_long(method, tried):
    assert seconds(planned(method, layers(4))) == 2 * seconds(planned(method, layers(2)))


@pytest.mark.parametrize(
    ("method", "work"), [("linear", lambda m, n: m * n), ("iso_c", lambda m, n: m * n * min(m, n))]
)
def test_time_grows_with_elements_or_with_what_an_svd_takes(method, work, tried):
    found = of_matrices(decoder(), work)
    assert seconds(planned(method, decoder())) == pytest.approx(sum(found) / max(found))
    assert len(tried) == 1


def test_large_matrices_are_tried_smaller_in_proportion(tried, monkeypatch):
    monkeypatch.setattr(estimate, "SIDES", {"cpu": 8})
    assert seconds(planned("iso_c", numbers({"w": (64, 32)}))) == pytest.approx((32 / 8) ** 3)
    assert tried[0].template.header[1] == (16, 8)
    monkeypatch.setattr(estimate, "WHOLE", 8 * 16)
    monkeypatch.setattr(estimate, "step_on", lambda device: 1)
    assert seconds(planned("linear", numbers({"w": (32, 64)}))) == pytest.approx(4 * 4)
    assert tried[1].template.header[1] == (8, 16)


def test_large_elementwise_merges_are_tried_in_blocks(tried):
    plan = planned("linear", numbers({"w": (1 << 12, 1 << 10)}))
    assert seconds(plan) == pytest.approx((1 << 22) / estimate.BLOCKS, rel=1e-2)
    assert math.prod(tried[0].template.header[1]) == pytest.approx(estimate.BLOCKS, rel=1e-2)


def test_a_stack_counts_as_its_matrices_and_a_kernel_as_one(tried):
    assert seconds(planned("iso_c", numbers({"experts": (6, 8, 4), "w": (8, 4)}))) == pytest.approx(7)
    assert tried[0].template.header[1] == (8, 4)


def test_copies_and_vectors_take_no_time(tried):
    assert seconds(planned("passthrough", decoder(), ("org/math",))) == 0
    assert seconds(planned("linear", numbers({"norm": (64,), "empty": (0, 8)}))) == 0
    some: dict[str, Any] = {"targets": {"include": ["mlp.up_proj"]}}
    assert seconds(planned("linear", layers(2), **some)) == 2
    assert [step.name for step in tried] == ["model.layers.0.mlp.up_proj.weight"]


def test_kinds_of_inputs_are_tried_apart_and_add_up(tried):
    mixed = numbers({"a": (8, 8), "b": (8, 8)}) | numbers({"c": (16, 8), "d": (8, 8)}, torch.bfloat16)
    assert seconds(planned("linear", mixed)) == pytest.approx(2 + 1.5)
    assert [step.name for step in tried] == ["a", "c"]


def adapter(seed: int, shapes: Shapes, rank: int = 2) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (m, n) in shapes.items():
        factors = LowRank(torch.randn(rank, n, generator=random), torch.randn(m, rank, generator=random))
        weights[name] = AdaptedWeight(Kind.LINEAR, factors, (m, n))
    return Adapter(weights, config={"peft_type": "LORA", "r": rank})


PROJECTIONS: Shapes = {
    f"model.layers.{layer}.self_attn.{name}_proj.weight": shape
    for layer in range(3)
    for name, shape in {"q": (24, 24), "k": (12, 24), "v": (12, 24)}.items()
}


def planned_adapters(method: str, shapes: Shapes = PROJECTIONS, rank: int = 2, **more: Any) -> Any:
    given: dict[str, Any] = {f"org/{i}": adapter(i, shapes, rank) for i in range(2)}
    if "base_model" in more:
        given[more["base_model"]] = Checkpoint.from_tensors(decoder(layers=3), ref="org/base")
    made = {"version": 1, "merge_method": method, "adapters": [{"adapter": ref} for ref in list(given)[:2]], **more}
    return plan_documents(made, given=given, threads=2)[0]


def test_factors_of_one_size_are_tried_once(tried):
    assert seconds(planned_adapters("ties", space="core")) == 9
    assert [step.size for step in tried] == [(24, 24), (12, 24)]


def test_whole_changes_of_adapters_are_tried_together(tried, monkeypatch):
    monkeypatch.setattr(estimate, "WHOLE", 12 * 12)
    monkeypatch.setattr(estimate, "step_on", lambda device: 1)
    assert seconds(planned_adapters("ties", output={"rank": 2})) == pytest.approx(4 * (3 + 6 / 2))
    assert [step.size for step in tried] == [(12, 12)]


def test_a_model_of_adapters_takes_what_going_onto_the_base_takes_besides(tried):
    options: dict[str, Any] = {"space": "core", "base_model": "org/base"}
    alone = seconds(planned_adapters("ties", **options))
    whole = seconds(planned_adapters("ties", output={"kind": "model"}, **options))
    assert whole == alone + 3 + 6 / 2  # in matrices of the largest size


def test_changes_that_are_computed_are_computed_for_a_trial(tried):
    case = Path(__file__).parent / "vectors" / "peft" / "loha-llama"
    made = {"version": 1, "merge_method": "linear", "adapters": [{"adapter": str(case / "adapter")}]}
    made |= {"base_model": str(case / "base"), "output": {"rank": 2}}
    assert seconds(plan_documents(made)[0]) > 0
    assert not any(callable(one) for step in tried for one in step.given)


def test_what_the_method_refuses_is_refused():
    with pytest.raises(UsageError, match="'rank' must be 1 or more"):
        seconds(planned("svd", layers(1), parameters={"rank": 0}))


@pytest.mark.parametrize(("once", "rounds"), [(1e-3, [1, 8]), (0.025, [1, 4]), (0.3, [1, 1]), (1.5, [1])])
def test_a_short_trial_is_done_more_often_and_a_long_one_once(once, rounds, monkeypatch):
    done = []

    def measured(trial: Trial, rounds: int, workers: int) -> float:
        done.append(rounds)
        return once * rounds

    monkeypatch.setattr(estimate, "measured", measured)
    assert seconds(planned("linear", numbers({"w": (8, 8)}))) == once
    assert done == rounds


def in_files(folder: Path) -> Path:
    base = decoder()
    for name, model in {"base": base, "a": finetuned(base, seed=1), "b": finetuned(base, seed=2)}.items():
        save(folder / name, model)
    models = [{"model": str(folder / name)} for name in "ab"]
    first = {"name": "half", "merge_method": "linear", "models": models}
    last = {"merge_method": "iso_c", "base_model": str(folder / "base"), "models": [{"model": "half"}]}
    (folder / "two.yaml").write_text(yaml.safe_dump_all([first, last]))
    (folder / "one.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    (folder / "copy.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "models": models[:1]}))
    return folder


def test_the_command_says_it(tmp_path):
    folder = in_files(tmp_path)
    assert json.loads(lrmerge("plan", folder / "one.yaml", "--json").out)["seconds"] > 0
    assert " s of arithmetic, peak memory" in lrmerge("plan", folder / "one.yaml").out
    assert "no arithmetic, peak memory" in lrmerge("merge", folder / "copy.yaml", "--dry-run").out
    half, last = json.loads(lrmerge("plan", folder / "two.yaml", "--json").out)
    assert half["seconds"] > 0
    assert last["seconds"] > 0  # of a model that is not there yet
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "base", "copy.yaml", "one.yaml", "two.yaml"]


def test_a_plan_stays_as_it_is(tmp_path):
    plan = lr.plan_merge(in_files(tmp_path) / "one.yaml")
    before = json.dumps(plan.to_json())
    state = torch.get_rng_state()
    seconds(plan)
    assert json.dumps(plan.to_json()) == before
    assert "seconds" not in plan.to_json()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(lr.methods()))
def test_every_method_can_be_tried(name):
    made = {"version": 1} | yaml.safe_load(example(lr.methods()[name]))
    given: dict[str, Any] = {ref: Checkpoint.from_tensors(decoder(layers=1), ref=ref) for ref in MODELS}
    given |= {ref: adapter(i, PROJECTIONS, rank=8) for i, ref in enumerate(("org/math-lora", "org/code-lora"))}
    found = seconds(plan_documents(made, given=given)[0])
    assert found > 0
