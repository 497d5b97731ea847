"""The graph: batches that depend on nodes alone, stages that overlap within a budget, a journal to be believed."""

from __future__ import annotations

import json
import random
import threading

import pytest
import torch

from mergekit_lr.errors import CapacityError
from mergekit_lr.graph.journal import Journal, fingerprint
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.graph.schedule import BATCH_BYTES, Batch, schedule


def nodes(count: int = 40, *, memory: int = 100, seed: int = 0) -> list[Node]:
    """Nodes of three signatures, one after another in two files."""
    chosen = random.Random(seed)
    return [
        Node(
            f"n{i:03d}",
            chosen.choice("abc"),
            (f"file{i * 2 // count}", i * 1000),
            Cost(10, memory * chosen.randint(1, 9), 1.0),
        )
        for i in range(count)
    ]


def names(batches: tuple[Batch, ...]) -> list[list[str]]:
    return [[node.name for node in batch.nodes] for batch in batches]


# The schedule


def test_a_schedule_depends_on_the_nodes_alone():
    made = nodes(memory=BATCH_BYTES // 8)
    wanted = names(schedule(made, budget=10**9, workers=1).batches)
    shuffled = random.Random(1).sample(made, len(made))
    for budget, workers in ((10**9, 8), (BATCH_BYTES * 2, 2), (10**12, 64)):
        assert names(schedule(made, budget=budget, workers=workers).batches) == wanted
        assert names(schedule(shuffled, budget=budget, workers=workers).batches) == wanted


def test_batches_hold_one_signature_every_node_once_in_the_order_of_the_files():
    made = nodes(memory=BATCH_BYTES // 8)
    batches = schedule(made, budget=10**12, workers=2).batches
    assert sorted(name for batch in names(batches) for name in batch) == sorted(node.name for node in made)
    places = [batch.nodes[0].place for batch in batches]
    assert places == sorted(places)
    for batch in batches:
        assert len({node.signature for node in batch.nodes}) == 1
        assert batch.cost.memory <= BATCH_BYTES or len(batch.nodes) == 1
    assert any(len(batch.nodes) > 1 for batch in batches)


def test_a_node_beyond_the_budget_is_named():
    large = Node("large", "x", ("f", 0), Cost(1, 3 << 20, 1.0))
    with pytest.raises(CapacityError, match=r"large needs 3 MiB .* 2 MiB; raise --memory"):
        schedule([*nodes(), large], budget=2 << 20, workers=1)


def test_what_is_left_keeps_its_batches():
    whole = schedule(nodes(), budget=10**9, workers=2)
    done = {node.name for node in whole.batches[0].nodes} | {whole.batches[1].nodes[0].name}
    left = whole.without(done)
    assert names(left.batches) == names(whole.batches)[1:]
    assert whole.without({node.name for node in nodes()}).batches == ()


def test_no_nodes_are_a_schedule_too():
    steps: list[Progress] = []
    empty = schedule([], budget=1, workers=2)
    run(empty, read=lambda b: 1 / 0, compute=lambda b, x: 1 / 0, write=lambda b, x: None, progress=steps.append)
    assert steps == [Progress(0, 0, "")]


# The run


class Gauge:
    """Memory that batches hold, from the start of their reading to the end of their writing."""

    def __init__(self):
        self.lock, self.held, self.most = threading.Lock(), 0, 0

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.held += nbytes
            self.most = max(self.most, self.held)


@pytest.mark.parametrize("workers", [1, 3])
def test_memory_stays_within_the_budget(workers):
    gauge, written = Gauge(), []
    plan = schedule(nodes(60, memory=BATCH_BYTES // 6), budget=3 * BATCH_BYTES, workers=workers)

    def read(batch: Batch) -> Batch:
        gauge.add(batch.cost.memory)
        return batch

    def write(batch: Batch, result: Batch) -> None:
        assert result is batch
        assert threading.current_thread() is threading.main_thread()
        written.append(batch)
        gauge.add(-batch.cost.memory)

    run(plan, read=read, compute=lambda batch, held: held, write=write)
    assert written == list(plan.batches)
    assert gauge.held == 0
    assert 0 < gauge.most <= plan.peak <= plan.budget


def test_stages_overlap():
    """The first batch is computed until the second has been read and begun: alone it would wait forever."""
    plan = schedule(nodes(memory=BATCH_BYTES), budget=10**12, workers=2)
    begun = threading.Event()

    def compute(batch: Batch, held: int) -> int:
        if batch is plan.batches[0]:
            assert begun.wait(timeout=60)
        begun.set() if batch is plan.batches[1] else None
        return held

    order: list[Batch] = []
    run(plan, read=lambda batch: 1, compute=compute, write=lambda batch, _: order.append(batch))
    assert order == list(plan.batches)


def test_progress_only_grows():
    steps: list[Progress] = []
    plan = schedule(nodes(memory=BATCH_BYTES // 3), budget=10**12, workers=2)
    run(plan, read=lambda b: 0, compute=lambda b, x: x, write=lambda b, x: None, progress=steps.append)
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert {step.total for step in steps} == {plan.cost.read}
    assert (steps[0].done, steps[-1].done) == (0, plan.cost.read)
    assert len(steps) == len(plan.batches) + 1


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_the_first_error_stops_the_run(stage, error):
    plan = schedule(nodes(60, memory=BATCH_BYTES), budget=10**12, workers=2)
    begun: dict[str, list[Batch]] = {"read": [], "compute": [], "write": []}

    def at(name: str, batch: Batch) -> None:
        begun[name].append(batch)
        if name == stage and batch is plan.batches[4]:
            raise error

    with pytest.raises(type(error)) as raised:
        run(
            plan,
            read=lambda batch: at("read", batch),
            compute=lambda batch, _: at("compute", batch),
            write=lambda batch, _: at("write", batch),
        )
    assert raised.value is error
    assert begun["write"] == list(plan.batches)[: 5 if stage == "write" else 4]
    assert len(begun["read"]) <= 5 + plan.workers + 1
    assert threading.active_count() == 1 or not [
        t for t in threading.enumerate() if t.name.startswith(("read", "comp"))
    ]


def test_threads_of_torch_are_given_back():
    before = torch.get_num_threads()
    seen = []
    plan = schedule(nodes(3), budget=10**9, workers=2)
    run(plan, read=lambda b: 0, compute=lambda b, x: seen.append(torch.get_num_threads()), write=lambda b, x: None)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


# The journal

RESULTS = {
    "a": ({"A": torch.arange(6.0).view(2, 3), "B": torch.ones(3, dtype=torch.bfloat16)}, {"norm": 1.5}),
    "b": ({}, {"norm": 0.0}),
    "c": ({"A": torch.zeros(0, 4), "E": torch.tensor([1, 2, 3])}, {"values": [3.0, 1.0]}),
}


def recorded(folder, key: str = "key") -> Journal:
    journal = Journal(folder, key)
    for name, (tensors, figures) in RESULTS.items():
        journal.add(name, tensors, figures)
    return journal


def check(journal: Journal, known: set[str]) -> None:
    assert {name for name in RESULTS if name in journal} == known
    for name in known:
        tensors, figures = RESULTS[name]
        assert journal.figures[name] == figures
        for key, tensor in tensors.items():
            assert torch.equal(journal.tensor(name, key), tensor)


def test_a_journal_remembers(tmp_path):
    check(recorded(tmp_path), set(RESULTS))
    again = Journal(tmp_path, "key", resume=True)
    assert again.resumed == 3
    check(again, set(RESULTS))
    again.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_a_journal_of_something_else_starts_anew(tmp_path, resume):
    recorded(tmp_path)
    again = Journal(tmp_path, "other" if resume else "key", resume=resume)
    assert again.resumed == 0
    check(again, set())
    again.add("b", *RESULTS["b"])
    check(Journal(tmp_path, "other" if resume else "key", resume=True), {"b"})


@pytest.mark.parametrize("torn", [b'{"name": "d", "tens', b"\xff\xfe", b"{}"[:1], b'{"name": "d", "tensors": {}}'])
def test_a_torn_last_line_is_computed_again(tmp_path, torn):
    recorded(tmp_path)
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(torn)
    again = Journal(tmp_path, "key", resume=True)
    check(again, set(RESULTS))
    again.add("d", {"A": torch.ones(2)}, {})
    check(Journal(tmp_path, "key", resume=True), set(RESULTS))
    assert torch.equal(Journal(tmp_path, "key", resume=True).tensor("d", "A"), torch.ones(2))


def test_every_cut_of_both_files_is_survived(tmp_path):
    recorded(tmp_path)
    lines, data = ((tmp_path / name).read_bytes() for name in ("journal.jsonl", "results.bin"))
    for cut in range(0, len(lines) + 1, 7):
        (tmp_path / "journal.jsonl").write_bytes(lines[:cut])
        (tmp_path / "results.bin").write_bytes(data)
        whole = max(lines[:cut].count(b"\n") - 1, 0)
        check(Journal(tmp_path, "key", resume=True), set(list(RESULTS)[:whole]))
    for cut in (0, 10, len(data) - 1):
        (tmp_path / "journal.jsonl").write_bytes(lines)
        (tmp_path / "results.bin").write_bytes(data[:cut])
        known = {name for name in RESULTS if name in Journal(tmp_path, "key", resume=True)}
        assert "b" in known  # it has no tensors
        assert "c" not in known


def test_what_was_forgotten_stays_so(tmp_path):
    journal = recorded(tmp_path)
    journal.forget("a")
    check(journal, {"b", "c"})
    check(Journal(tmp_path, "key", resume=True), {"b", "c"})
    journal = Journal(tmp_path, "key", resume=True)
    journal.add("a", {"A": torch.zeros(1)}, {"norm": 2.0})
    again = Journal(tmp_path, "key", resume=True)
    assert again.figures["a"] == {"norm": 2.0}
    assert torch.equal(again.tensor("a", "A"), torch.zeros(1))


def test_fingerprints_tell_any_difference_and_no_order():
    assert fingerprint({"a": 1, "b": 2}, ["x"]) == fingerprint({"b": 2, "a": 1}, ["x"])
    different = [({"a": 1}, []), ({"a": 2}, []), ({"a": 1}, ["x"]), ({"a": None}, []), ({}, []), ({"a": "1"}, [])]
    assert len({fingerprint(*parts) for parts in different}) == len(different)


def test_a_journal_is_lines_of_json(tmp_path):
    recorded(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert lines[0] == {"fingerprint": "key"}
    assert [line["name"] for line in lines[1:]] == list(RESULTS)
    assert all(offset % 64 == 0 for line in lines[1:] for _, _, offset in line["tensors"].values())
