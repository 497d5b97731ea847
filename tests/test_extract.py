"""What extraction promises: the least error, ranks by every rule, one state for every tensor, the same bytes again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny import DOWN, HEAD, NORM, TABLE
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.errors import LrmergeError

TOLERANCE = 0.01
ADAPTER = "adapter_model.safetensors"


def deltas(base: tiny.Tensors, tuned: tiny.Tensors) -> dict[str, Tensor]:
    """Every change as a dense float64 matrix, by parameter."""
    found = {name: tuned[name].double() - base[name].double() for name in base if base[name].dim() == 2}
    return {name: delta for name, delta in found.items() if delta.any()}


def least(delta: Tensor, rank: int) -> float:
    """The least Frobenius error of any matrix of this rank (Eckart-Young)."""
    return float(torch.linalg.svdvals(delta)[rank:].square().sum().sqrt())


def extracted(base, tuned, **options) -> tuple[lr.ExtractReport, dict[str, Tensor]]:
    """The report and the dense deltas of an extraction in memory."""
    report = lr.extract(base, tuned, **options)
    assert report.adapter is not None
    found = {}
    for name, weight in report.adapter.weights.items():
        dense = weight.delta.scaling * weight.delta.B.double() @ weight.delta.A.double()
        found[name] = dense.mT if str(weight.kind) in ("embedding", "transposed") else dense
    return report, found


def check_states(report: lr.ExtractReport, base: tiny.Tensors, tuned: tiny.Tensors) -> dict[str, str]:
    """Every parameter of both sides has exactly one state; returned by name."""
    names = [m.name for m in report.modules] + [o.name for o in report.others]
    assert sorted(names) == sorted({*base, *tuned})
    assert sum(report.states.values()) == len(names)
    return dict.fromkeys((m.name for m in report.modules), "decomposed") | {o.name: o.state for o in report.others}


def in_memory(tensors: tiny.Tensors, **config: object) -> lr.Checkpoint:
    return lr.Checkpoint.from_tensors(tensors, config=tiny.CONFIG | config)


# Errors and ranks


@pytest.mark.parametrize("rank", [1, 5, 16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_is_within_a_percent_of_the_best(rank, dtype):
    base = tiny.decoder(dtype=dtype)
    tuned = tiny.finetuned(base)
    wanted = deltas(base, tuned)
    report, found = extracted(base, tuned, rank=rank, dtype="float32")
    assert found.keys() == wanted.keys()
    figures = {m.name: m for m in report.modules}
    for name, delta in wanted.items():
        error = float((delta - found[name]).norm())
        assert error <= (1 + TOLERANCE) * least(delta, rank) + 1e-6 * float(delta.norm()), name
        assert figures[name].rank == min(rank, *delta.shape)
        # The report's figures are those of the factors themselves.
        assert figures[name].squared_norm == pytest.approx(float(delta.square().sum()), rel=1e-5)
        assert figures[name].error == pytest.approx(error / float(delta.norm()), abs=2e-3)
    total = sum(float(delta.square().sum()) for delta in wanted.values())
    lost = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
    assert report.energy == pytest.approx(1 - lost / total, abs=1e-5)


def test_large_matrices_are_within_a_percent_too():
    """Beyond the size below which the exact decomposition is taken; a flat spectrum, the hardest."""
    base = {"model.layers.0.mlp.up_proj.weight": torch.zeros(400, 300)}
    tuned = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for name, t in base.items()}
    _, found = extracted(base, tuned, rank=16)
    ((name, delta),) = deltas(base, tuned).items()
    assert float((delta - found[name]).norm()) <= (1 + TOLERANCE) * least(delta, 16)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy(energy):
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    report, found = extracted(base, tuned, energy=energy)
    for module in report.modules:
        delta = deltas(base, tuned)[module.name]
        lost = float((delta - found[module.name]).square().sum() / delta.square().sum())
        assert lost <= 1 - energy + 1e-6
        assert module.energy >= energy - 1e-6
        total = torch.linalg.svdvals(delta).square()
        needed = int((total.cumsum(0) < energy * total.sum() * (1 - 1e-9)).sum()) + 1
        assert module.rank <= needed + 1


@pytest.mark.parametrize("error", [0.5, 0.1])
def test_error(error):
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    report, found = extracted(base, tuned, error=error)
    for module in report.modules:
        delta = deltas(base, tuned)[module.name]
        assert float((delta - found[module.name]).norm() / delta.norm()) <= error + 1e-6
        assert module.rank < min(delta.shape) or error < 0.2


@pytest.mark.parametrize("rank", [None, 3])
def test_error_zero_is_lossless(rank):
    base = tiny.decoder()
    tuned = tiny.finetuned(base, rank=rank)
    report, found = extracted(base, tuned, error=0)
    for module in report.modules:
        again = base[module.name].double() + found[module.name]
        torch.testing.assert_close(again, tuned[module.name].double(), rtol=0, atol=1e-5)
    assert report.energy > 1 - 1e-6
    if rank:
        # Rounding the fine-tune to float32 is noise of full rank, 1e-7 of the weights.
        own = [torch.linalg.svdvals(d) for d in deltas(base, tuned).values()]
        assert all(int((s > s[0] * 1e-4).sum()) == rank for s in own)


def test_auto_finds_the_rank_above_rounding():
    base = tiny.decoder(hidden=120, layers=1, dtype=torch.bfloat16)
    tuned = tiny.finetuned(base, rank=8, scale=0.02)
    report, _ = extracted(base, tuned, rank="auto")
    ranks = {m.name: m.rank for m in report.modules if min(m.shape) > 56}
    assert len(ranks) == 7
    assert all(7 <= rank <= 9 for rank in ranks.values()), ranks


def test_limits_and_patterns():
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    report, _ = extracted(base, tuned, energy=0.9, max_rank=7, rank_pattern={r"down_proj": 3, r"mlp": 5})
    for module in report.modules:
        expected = 3 if "down_proj" in module.name else 5 if "mlp" in module.name else None
        assert module.rank <= 7
        assert expected is None or module.rank == expected
    report, _ = extracted(base, tuned, energy=0.5, multiple_of=4)
    assert all(m.rank % 4 == 0 for m in report.modules)


@pytest.mark.parametrize(
    "options", [{}, {"embeddings": "full"}, {"rank_pattern": {"down_proj": 6}}, {"multiple_of": 4}]
)
@pytest.mark.parametrize("size", ["24kB", 40_000, "1MB"])
def test_size_is_that_of_the_whole_file(tmp_path, size, options):
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    tuned[NORM] = tuned[NORM] + 1
    out = tmp_path / "out"
    report = lr.extract(base, tuned, out, size=size, **options)
    limit = {"24kB": 24_000, "1MB": 1_000_000}.get(str(size), size)
    used = (out / ADAPTER).stat().st_size
    assert used <= limit
    assert report.adapter_bytes == used
    assert NORM in tiny.saved(out)
    ranks = {m.name: m.rank for m in report.modules}
    if "rank_pattern" in options:
        assert {rank for name, rank in ranks.items() if "down_proj" in name} == {6}
    if size == "1MB":  # enough for all of it
        assert all(m.rank == min(m.shape) for m in report.modules if m.name not in (DOWN, DOWN.replace("0", "1"))), (
            ranks
        )
    else:  # what is left could not hold one more unit of rank and its share of the header
        step = options.get("multiple_of", 1) * 4 * max(sum(m.shape) for m in report.modules)
        assert limit - used < step + 450 * len(tuned)


def test_size_goes_where_the_energy_is(tmp_path):
    """One module holds nearly all of the change: the budget goes to it, far beyond an equal share."""
    base = tiny.decoder(hidden=96)
    tuned = tiny.finetuned(base, scale=1e-4)
    tuned[DOWN] = base[DOWN] + torch.randn(base[DOWN].shape, generator=torch.Generator().manual_seed(5))
    report = lr.extract(base, tuned, tmp_path / "out", size="110kB")
    ranks = {m.name: m.rank for m in report.modules}
    assert ranks[DOWN] == 96
    assert (tmp_path / "out" / ADAPTER).stat().st_size <= 110_000


# What is a change, and what becomes of it


def test_what_did_not_change_is_no_target(tmp_path):
    base = tiny.decoder()
    tuned = dict(base) | {DOWN: base[DOWN] + 1, NORM: base[NORM] + 1}
    report = lr.extract(base, tuned, tmp_path / "out", rank=4)
    assert list(tiny.factors(tmp_path / "out")) == [DOWN]
    assert list(tiny.saved(tmp_path / "out")) == [NORM]
    states = check_states(report, base, tuned)
    assert states.pop(DOWN) == "decomposed"
    assert states.pop(NORM) == "saved"
    assert set(states.values()) == {"unchanged"}


def test_the_same_values_in_another_dtype_are_no_change():
    base = tiny.decoder(dtype=torch.bfloat16)
    wide = {name: tensor.float() for name, tensor in base.items()}
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tiny.decoder().items()}
    for old, new in ((base, wide), (wide, base), (tiny.decoder(), half)):
        report = lr.extract(old, new, rank=4)
        assert report.modules == ()
        assert report.states == {"unchanged": len(base)}


def test_include_and_exclude():
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    tuned[NORM] = tuned[NORM] + 2
    report, found = extracted(base, tuned, rank=4, include=[r"layers\.0", "norm"], exclude=["q_proj"])
    assert all("layers.0" in name and "q_proj" not in name for name in found)
    states = check_states(report, base, tuned)
    left = {o.name: o for o in report.others if o.state == "left out"}
    query = "model.layers.0.self_attn.q_proj.weight"
    assert left[query].reason == "--exclude q_proj"
    assert left[query].squared_norm == pytest.approx(float(deltas(base, tuned)[query].square().sum()), rel=1e-5)
    assert left["model.layers.1.mlp.up_proj.weight"].reason == "not in --include"
    assert states[NORM] == "saved"
    assert report.energy < 0.9


@pytest.mark.parametrize(("embeddings", "state"), [("lora", "decomposed"), ("full", "saved"), ("skip", "left out")])
def test_embeddings(tmp_path, embeddings, state):
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    report = lr.extract(in_memory(base), in_memory(tuned), tmp_path / "out", rank=4, embeddings=embeddings)
    states = check_states(report, base, tuned)
    assert {states[TABLE], states[HEAD]} == {state}
    full = tiny.saved(tmp_path / "out")
    assert (TABLE in full) == (HEAD in full) == (state == "saved")
    if state == "saved":
        assert torch.equal(full[TABLE], tuned[TABLE])


def test_rest_skip_is_named_with_its_norm():
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    tuned[NORM] = tuned[NORM] + 3
    report = lr.extract(base, tuned, rank=4, rest="skip")
    (left,) = [o for o in report.others if o.state == "left out"]
    assert (left.name, left.reason) == (NORM, "--rest skip")
    assert left.squared_norm == pytest.approx(9 * tiny.HIDDEN, rel=1e-5)


@pytest.mark.parametrize("vocab", ["keep", "truncate"])
def test_grown_vocabulary(tmp_path, vocab):
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    new = torch.randn(4, tiny.HIDDEN, generator=torch.Generator().manual_seed(2))
    grown = tuned | {name: torch.cat([tuned[name], new]) for name in (TABLE, HEAD)}
    out = tmp_path / "out"
    report = lr.extract(base, grown, out, rank=4, vocab=vocab)
    check_states(report, base, grown)
    if vocab == "keep":
        assert torch.equal(tiny.saved(out)[TABLE], grown[TABLE])
        assert torch.equal(tiny.saved(out)[HEAD], grown[HEAD])
    else:
        found = tiny.factors(out)
        for name in (TABLE, HEAD):
            delta = deltas(base, tuned)[name]
            assert found[name].shape == delta.shape
            assert float((delta - found[name]).norm()) <= (1 + TOLERANCE) * least(delta, 4) + 1e-5


# The same model under other names and in other files


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_mean_nothing(prefix):
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    wrapped = {prefix + name: tensor for name, tensor in tuned.items()}
    _, plain = extracted(base, tuned, rank=4)
    for old, new in ((base, wrapped), ({prefix + name: t for name, t in base.items()}, tuned)):
        report, found = extracted(old, new, rank=4)
        assert len(report.modules) == len(plain)
        stripped = {name.removeprefix(prefix): delta for name, delta in found.items()}
        assert all(torch.equal(stripped[name], plain[name]) for name in plain)


def test_wrappers_inside_names():
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    inside = {name.replace("mlp.", "_checkpoint_wrapped_module.mlp."): t for name, t in tuned.items()}
    assert extracted(base, inside, rank=4)[1].keys() == base.keys() - {n for n in base if base[n].dim() == 1}


def test_backbone_against_model_with_head(tmp_path):
    base = {name.removeprefix("model."): t for name, t in tiny.decoder().items() if name != HEAD}
    tuned = {name: t for name, t in tiny.finetuned(tiny.decoder()).items() if name != HEAD}
    tuned |= {"score.weight": torch.ones(3, tiny.HIDDEN)}
    old = tiny.save(tmp_path / "base", base, config=tiny.CONFIG | {"architectures": ["LlamaModel"]})
    config = tiny.CONFIG | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    out = tmp_path / "out"
    report = lr.extract(old, tiny.save(tmp_path / "tuned", tuned, config=config), out, rank=4)
    assert {m.name for m in report.modules} == {n for n in tuned if tuned[n].dim() == 2 and n != "score.weight"}
    assert torch.equal(tiny.saved(out)["score.weight"], tuned["score.weight"])
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    # Every tensor of both sides by the names of the fine-tune's class.
    check_states(report, {f"model.{name}": t for name, t in base.items()}, tuned)


def test_a_tie_that_the_fine_tune_broke(tmp_path):
    base = {name: t for name, t in tiny.decoder().items() if name != HEAD}
    tuned = tiny.finetuned(base)
    tuned[HEAD] = base[TABLE] + 0.1 * torch.ones(tiny.VOCABULARY, tiny.HIDDEN)
    sides = (
        tiny.save(tmp_path / "base", base, config=tiny.CONFIG | {"tie_word_embeddings": True}),
        tiny.save(tmp_path / "tuned", tuned),
    )
    report, found = extracted(*sides, error=0)
    assert {TABLE, HEAD} <= found.keys()
    check_states(report, base, tuned)
    for name in (TABLE, HEAD):
        torch.testing.assert_close(found[name], tuned[name].double() - base[TABLE].double(), rtol=0, atol=1e-5)
    lr.extract(*sides, tmp_path / "out", error=0)
    written = tiny.factors(tmp_path / "out")
    torch.testing.assert_close(written[HEAD], found[HEAD])


def test_a_tie_that_both_keep():
    base = {name: t for name, t in tiny.decoder().items() if name != HEAD}
    tuned = tiny.finetuned(base)
    report = lr.extract(in_memory(base, tie_word_embeddings=True), in_memory(tuned), rank=4)
    states = {o.name: o for o in report.others}
    assert states[HEAD].state == "tied"
    assert states[HEAD].reason == TABLE


def test_files_do_not_matter(tmp_path):
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    single = tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "tuned", tuned)
    sharded = tiny.save(tmp_path / "base3", base, shards=3), tiny.save(tmp_path / "tuned4", tuned, shards=4)
    pickled: list[Path] = []
    for name, tensors in (("base.bin", base), ("tuned.bin", tuned)):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "config.json").write_text(json.dumps(tiny.CONFIG))
        pickled.append(tmp_path / name)
    memory = [in_memory(tensors) for tensors in (base, tuned)]
    written = []
    for i, (old, new) in enumerate((single, sharded, pickled, memory, (single[0], sharded[1]))):
        lr.extract(old, new, tmp_path / str(i), rank=4)
        written.append((tmp_path / str(i) / ADAPTER).read_bytes())
    assert written == [written[0]] * len(written)


# Runs


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    base, tuned = (tiny.save(tmp_path / n, t) for n, t in large_pair().items())
    for name, options in {"a": {}, "b": {}, "one": {"threads": 1}, "two": {"threads": 2}, "seed": {"seed": 9}}.items():
        lr.extract(base, tuned, tmp_path / name, rank=8, **options)
    a, *same = ((tmp_path / name / ADAPTER).read_bytes() for name in ("a", "b", "one", "two"))
    assert same == [a, a, a]
    assert (tmp_path / "seed" / ADAPTER).read_bytes() != a


def large_pair() -> dict[str, tiny.Tensors]:
    """A pair that is large enough for random sketches, and for a run that can be cut off."""
    base = tiny.decoder(hidden=192, layers=3)
    return {"base": base, "tuned": tiny.finetuned(base)}


def finished(journal: Path) -> int:
    """How many nodes a journal knows as finished."""
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


# Waits, after so many nodes, to be cut off.
WAITING = """
import sys, time
from mergekit_lr.graph.journal import Journal
add, left = Journal.add, int(sys.argv[1])
def waiting(*arguments):
    global left
    add(*arguments)
    left -= 1
    if left <= 0:
        time.sleep(60)
Journal.add = waiting
sys.argv = ["lrmerge", *sys.argv[2:]]
from lrmerge.app import main
main()
"""


def cut_off(sides, out: Path, options: list[str], nodes: int, how: signal.Signals) -> subprocess.CompletedProcess:
    """Start an extraction and end it by ``how`` once ``nodes`` nodes are finished."""
    command = [sys.executable, "-c", WAITING, str(nodes), "extract", *map(str, sides), "-o", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and finished(out.with_name(out.name + ".partial") / "journal.jsonl") < nodes:
        time.sleep(0.01)
    running.send_signal(how)
    printed, said = running.communicate()
    return subprocess.CompletedProcess(command, running.returncode, printed, said)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(("options", "nodes"), [(["--rank", "8"], 5), (["--size", "110kB"], 24)])
def test_killed_and_resumed(tmp_path, options, nodes):
    """The second is killed in its deeper look: one module takes most of the budget."""
    pair = large_pair()
    if "--size" in options:
        pair = {"base": tiny.decoder(hidden=96), "tuned": tiny.finetuned(tiny.decoder(hidden=96), scale=1e-4)}
        for name in (DOWN, DOWN.replace("0", "1")):
            pair["tuned"][name] = pair["tuned"][name] + torch.randn(
                pair["base"][name].shape, generator=torch.Generator().manual_seed(5)
            )
    sides = [tiny.save(tmp_path / name, tensors) for name, tensors in pair.items()]
    before = tiny.contents(sides[0]) | tiny.contents(sides[1])
    killed = cut_off(sides, tmp_path / "out", options, nodes, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    assert finished(partial / "journal.jsonl") >= nodes
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"name": "model.layers.0.mlp.down')  # as if killed while writing a line

    assert tiny.lrmerge("extract", *sides, "-o", tmp_path / "out", "-q", "--resume", *options).code == 0
    assert tiny.lrmerge("extract", *sides, "-o", tmp_path / "whole", "-q", *options).code == 0
    for file in (ADAPTER, "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert tiny.contents(sides[0]) | tiny.contents(sides[1]) == before
    assert not partial.exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_interrupted(tmp_path):
    sides = [tiny.save(tmp_path / name, tensors) for name, tensors in large_pair().items()]
    ended = cut_off(sides, tmp_path / "out", ["-q"], 3, signal.SIGINT)
    assert ended.returncode == 130, ended
    assert len(ended.stderr.splitlines()) == 1, ended
    assert "--resume" in ended.stderr
    assert not (tmp_path / "out").exists()
    assert finished(tmp_path / "out.partial" / "journal.jsonl") >= 3


def test_other_options_do_not_resume(tmp_path, monkeypatch):
    """A journal of other options, or of a fine-tune that changed since, is not continued."""
    base = tiny.save(tmp_path / "base", tiny.decoder())
    tuned = tiny.save(tmp_path / "tuned", tiny.finetuned(tiny.decoder()))
    computed = []
    monkeypatch.setattr("mergekit_lr.verbs.extract.verb.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    def count(rank: int) -> int:
        computed.clear()
        with pytest.raises(KeyboardInterrupt):
            lr.extract(
                base, tuned, tmp_path / "out", rank=rank, resume=True, progress=lambda step: computed.append(step)
            )
        return computed[0].total

    everything = count(4)
    assert count(4) == 0
    assert count(5) == everything
    assert count(5) == 0
    os.utime(tuned / "model.safetensors", ns=(1, 1))
    assert count(5) == everything


def test_no_input_is_written_through_a_view():
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    copies = [{name: tensor.clone() for name, tensor in side.items()} for side in (base, tuned)]
    lr.extract(base, tuned, rank=4)
    for side, copy in zip((base, tuned), copies, strict=True):
        assert all(torch.equal(side[name], copy[name]) for name in side)


PEAK = """
import sys
import mergekit_lr as lr
from mergekit_lr.graph.resources import peak_bytes
plan = lr.plan_extract(sys.argv[1], sys.argv[2], rank=16, memory="2GB", threads=2)
report = lr.extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=16, memory="2GB", threads=2)
print(plan.peak, peak_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's count of pages")
def test_memory_is_what_the_plan_said(tmp_path):
    base = tiny.decoder(hidden=1200, layers=2, dtype=torch.bfloat16)
    sides = [tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "tuned", tiny.finetuned(base))]
    command = [sys.executable, "-c", PEAK, *map(str, sides), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    planned, measured = map(int, ended.stdout.split())
    assert measured <= planned


def test_nothing_left_at_out_when_a_write_fails(tmp_path, monkeypatch):
    base = tiny.decoder()

    def fail(*_):
        raise LrmergeError("broken")

    monkeypatch.setattr("mergekit_lr.verbs.extract.verb.write", fail)
    with pytest.raises(LrmergeError, match="broken"):
        lr.extract(base, tiny.finetuned(base), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
