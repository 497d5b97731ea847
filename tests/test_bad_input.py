"""What a user can get wrong: each mistake ends in one line that says what and where, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from tiny import DOWN, NORM, TABLE, refused

import mergekit_lr as lr
from mergekit_lr.errors import LrmergeError


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny.save(tmp_path / "base", tiny.decoder())


@pytest.fixture
def tuned(tmp_path) -> Path:
    return tiny.save(tmp_path / "tuned", tiny.finetuned(tiny.decoder()))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def changed(folder: Path, edit) -> Path:
    """A fine-tune in ``folder`` after ``edit`` of its tensors."""
    tensors = tiny.finetuned(tiny.decoder())
    edit(tensors)
    return tiny.save(folder, tensors)


def fails(base, tuned, out, *options, code=1, words=()) -> str:
    return refused("extract", base, tuned, "-o", out, "-q", *options, code=code, words=tuple(map(str, words)), out=out)


# Places


@pytest.mark.parametrize("place", ["./nothing", "a/b/nothing", "nothing.safetensors", "n" * 300])
def test_missing_folder(base, out, place):
    fails(base, place, out, words=[place])
    fails(place, base, out, words=[place])


def test_folder_without_checkpoint(base, tmp_path, out):
    (tmp_path / "empty").mkdir()
    fails(base, tmp_path / "empty", out, words=[tmp_path / "empty", "model.safetensors"])


def test_several_files_and_no_index(base, tmp_path, out):
    folder = tiny.save(tmp_path / "two", tiny.decoder())
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    fails(base, folder, out, words=[folder, "one.safetensors", "two.safetensors"])


def test_foreign_file(base, tmp_path, out):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    fails(base, file, out, words=[file, ".safetensors"])


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_unreadable_file(base, out, tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("closed"), tiny.decoder())
    (folder / "model.safetensors").chmod(0)
    temporary = Path(tempfile.gettempdir())
    for parent in (folder, *(p for p in folder.parents if temporary in p.parents)):
        parent.chmod(0o755)
    with tiny.as_nobody(), pytest.raises(LrmergeError, match=r"model\.safetensors: cannot be read"):
        lr.Checkpoint.open(folder)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_adapter_for_a_checkpoint(base, tuned, tmp_path, out, side):
    adapter = tmp_path / "adapter"
    lr.extract(base, tuned, adapter, rank=2)
    for place in (adapter, adapter / "adapter_model.safetensors"):
        sides = (place, tuned) if side == "base" else (base, place)
        fails(*sides, out, words=[place, "adapter", "whole"])


def test_adapter_of_another_dialect_for_a_checkpoint(base, tmp_path, out):
    keys = {"lora_unet_a.lora_down.weight": torch.ones(2, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 2)}
    folder = tiny.save(tmp_path / "kohya", keys, config=None)
    fails(base, folder / "model.safetensors", out, words=["adapter", "model.safetensors"])


# Files


def write(file: Path, header: bytes | dict, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "empty file": (None, b"", ["empty"]),
    "a few bytes": (None, b"abc", ["3 bytes"]),
    "length beyond the file": ({"w": entry(0, 8)}, b"\0" * 8, ["header"]),
    "length of exabytes": ({"w": entry(0, 8)}, b"\0" * 8, ["header"]),
    "not JSON": (b"{ no json", b"", ["JSON"]),
    "not a table": (b"[1, 2]", b"", ["table"]),
    "not text": (b"\xff\xfe\xfd", b"", ["JSON"]),
    "nested without end": (b"[" * 100000, b"", ["JSON"]),
    "duplicate keys": (b'{"w": 1, "w": 1}', b"", ["w", "twice"]),
    "duplicate fields": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', b"", ["dtype", "twice"]),
    "hole": ({"v": entry(0, 8), "w": entry(16, 24)}, b"\0" * 24, ["w", "starts at byte"]),
    "overlap": ({"v": entry(0, 8), "w": entry(4, 12)}, b"\0" * 12, ["w"]),
    "end before begin": ({"w": entry(8, 0)}, b"\0" * 8, ["w"]),
    "negative": ({"w": entry(-8, 0)}, b"\0" * 8, ["w"]),
    "shape and bytes disagree": ({"w": entry(0, 8, (3,))}, b"\0" * 8, ["w", "12", "8"]),
    "dtype and bytes disagree": ({"w": entry(0, 8, (2,), "F64")}, b"\0" * 8, ["w", "16", "8"]),
    "unknown dtype": ({"w": entry(0, 8, (2,), "F99")}, b"\0" * 8, ["w", "F99"]),
    "dtype of another type": ({"w": entry(0, 8, (2,), ["F32"])}, b"\0" * 8, ["w"]),
    "shape of another type": ({"w": entry(0, 8, "12")}, b"\0" * 8, ["w"]),
    "fractional shape": ({"w": entry(0, 8, (2.0,))}, b"\0" * 8, ["w"]),
    "no fields": ({"w": {}}, b"", ["w"]),
    "truncated": ({"w": entry(0, 8)}, b"\0" * 7, ["truncated"]),
    "bytes beyond": ({"w": entry(0, 8)}, b"\0" * 9, ["no tensor owns"]),
    "metadata of another type": ({"__metadata__": [1], "w": entry(0, 8)}, b"\0" * 8, ["metadata"]),
    "no tensors": ({}, b"", ["no tensors"]),
}
LENGTHS = {"length beyond the file": 1000, "length of exabytes": 2**63}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header(base, tmp_path, out, case):
    header, data, words = HEADERS[case]
    folder = tiny.save(tmp_path / "damaged", {})
    file = folder / "model.safetensors"
    if header is None:
        file.write_bytes(data)
    else:
        write(file, header, data, length=LENGTHS.get(case))
    fails(base, folder, out, words=[folder, *words])


def test_truncated_shard(base, tmp_path, out):
    folder = tiny.save(tmp_path / "sharded", tiny.decoder(), shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    fails(base, folder, out, words=[shard, "truncated"])


def test_missing_shard(base, tmp_path, out):
    folder = tiny.save(tmp_path / "sharded", tiny.decoder(), shards=3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    fails(base, folder, out, words=[folder, "model-00003-of-00003.safetensors", "download"])
    (folder / "model.safetensors.index.json").unlink()
    fails(base, folder, out, words=[folder, "model-00003-of-00003.safetensors", "download"])


@pytest.mark.parametrize("place", ["../base/model.safetensors", "/etc/passwd", "..\\model.safetensors", "..", "", 7])
def test_index_that_leaves_the_folder(base, tmp_path, out, place):
    folder = tiny.save(tmp_path / "sharded", tiny.decoder(), shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {DOWN: place}}))
    fails(base, folder, out, words=[index, DOWN, "outside"])


def test_index_and_shards_that_disagree(base, tmp_path, out):
    folder = tiny.save(tmp_path / "sharded", tiny.decoder(), shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.extra.weight": weight_map[DOWN]}}))
    fails(base, folder, out, words=[weight_map[DOWN], "model.extra.weight"])
    index.write_text(json.dumps({"weight_map": {n: f for n, f in weight_map.items() if n != DOWN}}))
    fails(base, folder, out, words=[weight_map[DOWN], DOWN])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_damaged_index(base, tmp_path, out, text):
    folder = tiny.save(tmp_path / "sharded", tiny.decoder(), shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    fails(base, folder, out, words=[folder / "model.safetensors.index.json"])


@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_damaged_config(base, tuned, out, text):
    (tuned / "config.json").write_text(text)
    fails(base, tuned, out, words=[tuned / "config.json"])


class Code:
    """A pickle that runs a command when it is loaded as code."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_pickle_with_code(base, tmp_path, out, save):
    (tmp_path / "evil").mkdir()
    file = tmp_path / "evil" / "pytorch_model.bin"
    save({"w": Code(tmp_path / "executed")}, file)
    fails(base, tmp_path / "evil", out, words=[file, "safetensors"])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 not a zip"])
def test_damaged_pickle(base, tmp_path, out, content):
    (tmp_path / "evil").mkdir()
    file = tmp_path / "evil" / "pytorch_model.bin"
    file.write_bytes(content)
    fails(base, tmp_path / "evil", out, words=[file])


# Values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [DOWN, NORM, TABLE])
def test_nan(base, tmp_path, out, name, value):
    damaged = changed(tmp_path / "damaged", lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    fails(base, damaged, out, words=[damaged, name, "NaN"])
    fails(damaged, base, out, words=[damaged, name, "NaN"])


def test_nan_in_what_is_only_saved(base, tmp_path, out):
    def grow(tensors):
        tensors[TABLE] = torch.cat([tensors[TABLE], torch.full((2, tiny.HIDDEN), torch.nan)])

    damaged = changed(tmp_path / "damaged", grow)
    fails(base, damaged, out, "--vocab", "keep", words=[damaged, TABLE, "NaN"])


def test_values_whose_difference_overflows(tmp_path, out):
    base = tiny.save(tmp_path / "low", tiny.decoder() | {DOWN: torch.full((24, 40), -3e38)})
    tuned = tiny.save(tmp_path / "high", tiny.decoder() | {DOWN: torch.full((24, 40), 3e38)})
    fails(base, tuned, out, words=[DOWN, "overflow"])


# Two that do not belong together


def test_different_architectures(base, tmp_path, out):
    config = {"architectures": ["OtherModel"]}
    other = tiny.save(tmp_path / "other", {f"x.{i}.weight": torch.ones(4, 4) for i in range(9)}, config=config)
    line = fails(base, other, out, words=["different architectures", "LlamaForCausalLM", "OtherModel"])
    assert str(base) in line
    assert str(other) in line


def test_missing_parameter(base, tmp_path, out):
    damaged = changed(tmp_path / "damaged", lambda tensors: tensors.pop(DOWN))
    fails(base, damaged, out, words=[damaged, "lacks 1 ", DOWN])


def test_shape_mismatch(base, tmp_path, out):
    damaged = changed(tmp_path / "damaged", lambda tensors: tensors.update({DOWN: torch.ones(24, 41)}))
    fails(base, damaged, out, words=[damaged, DOWN, "[24, 40]", "[24, 41]"])


def test_grown_vocabulary_asks(base, tmp_path, out):
    grown = changed(tmp_path / "grown", lambda tensors: tensors.update({TABLE: torch.ones(60, 24)}))
    fails(base, grown, out, words=[TABLE, "56", "60", "--vocab keep", "--vocab truncate"])


MARKS = {
    "GPTQ or AWQ": {"model.layers.0.mlp.down_proj.qweight": torch.ones(5, 24, dtype=torch.int32)},
    "compressed-tensors": {"model.layers.0.mlp.down_proj.weight_packed": torch.ones(24, 5, dtype=torch.int32)},
    "bitsandbytes 4-bit": {f"{DOWN}.absmax": torch.ones(15), DOWN: torch.ones(480, 1, dtype=torch.uint8)},
    "bitsandbytes 8-bit": {"model.layers.0.mlp.down_proj.SCB": torch.ones(24)},
    "mxfp4": {"model.layers.0.mlp.experts.down_proj_blocks": torch.ones(2, 24, 2, 16, dtype=torch.uint8)},
    "int8": {DOWN: torch.ones(24, 40, dtype=torch.int8)},
    "fp8": {DOWN: torch.ones(2, 24, 40).to(torch.float8_e4m3fn), f"{DOWN}_scale": torch.ones(2)},
}


@pytest.mark.parametrize("kind", MARKS)
def test_quantised(base, tmp_path, out, kind):
    def quantise(tensors):
        del tensors[DOWN]
        tensors |= MARKS[kind]

    quantised = changed(tmp_path / "quantised", quantise)
    fails(base, quantised, out, words=[quantised, "layers.0.mlp", kind, "bf16"])
    fails(quantised, base, out, words=[quantised, "layers.0.mlp", kind, "bf16"])


def test_scale_that_does_not_fit(base, tmp_path, out):
    def quantise(tensors):
        tensors |= {DOWN: torch.ones(24, 40).to(torch.float8_e4m3fn), f"{DOWN}_scale": torch.ones(25)}

    quantised = changed(tmp_path / "quantised", quantise)
    fails(base, quantised, out, words=[quantised, f"{DOWN}_scale", "[25]"])


# The destination


def test_out_exists(base, tuned, out):
    lr.extract(base, tuned, out, rank=2)
    before = tiny.contents(out)
    refused("extract", base, tuned, "-o", out, "-q", code=2, words=(str(out), "--overwrite"))
    assert tiny.contents(out) == before
    assert tiny.lrmerge("extract", base, tuned, "-o", out, "-q", "--rank", 3, "--overwrite").code == 0
    assert json.loads((out / "lrmerge.json").read_text())["options"]["rank"] == 3
    assert not out.with_name("out.old").exists()


def test_out_is_a_foreign_folder(base, tuned, out):
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    refused("extract", base, tuned, "-o", out, "--overwrite", code=2, words=(str(out), "no result of lrmerge"))
    assert (out / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["out.partial", "out.old"])
def test_foreign_neighbour_is_kept(base, tuned, out, name):
    lr.extract(base, tuned, out, rank=2)
    neighbour = out.with_name(name)
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("dear")
    outcome = tiny.lrmerge("extract", base, tuned, "-o", out, "-q", "--overwrite")
    assert (neighbour / "thesis.txt").read_text() == "dear"
    if name == "out.partial":
        assert outcome.code == 2
        assert str(neighbour) in outcome.err


def test_out_is_an_input(base, tuned, tmp_path):
    before = tiny.contents(base) | tiny.contents(tuned)
    for place in (base, tuned, tmp_path):
        refused("extract", base, tuned, "-o", place, "--overwrite", code=2, words=(str(place), "input"))
    assert tiny.contents(base) | tiny.contents(tuned) == before


def test_partial_folder_is_an_input(base, tuned, tmp_path):
    source = tuned.rename(tmp_path / "next.partial")
    (source / "lrmerge.json").write_text("{}")
    refused("extract", base, source, "-o", tmp_path / "next", code=2, words=("next", "input"))
    assert (source / "model.safetensors").exists()


def test_out_is_a_file(base, tuned, out):
    out.write_text("dear")
    refused("extract", base, tuned, "-o", out, "--overwrite", code=2, words=(str(out), "is a file"))
    assert out.read_text() == "dear"


def test_parent_of_out_is_a_file(base, tuned, out):
    out.write_text("dear")
    refused("extract", base, tuned, "-o", out / "in", code=2, words=(str(out), "cannot be written"))


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_out_without_a_name(base, tuned, place, monkeypatch, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    if place == ".":  # the empty folder that one stands in is as good as any other
        assert tiny.lrmerge("extract", base, tuned, "-o", place, "-q").code == 0
        assert (tmp_path / "a" / "b" / "lrmerge.json").exists()
    else:
        refused("extract", base, tuned, "-o", place, code=2, words=("--out",))


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_parent_of_out_is_closed(tmp_path_factory):
    parent = tmp_path_factory.mktemp("closed")
    base = tiny.decoder()
    for each in parent.parents[:2]:
        each.chmod(0o755)
    for mode in (0o555, 0o000):
        parent.chmod(mode)
        with tiny.as_nobody(), pytest.raises(LrmergeError, match="cannot be written"):
            lr.extract(base, tiny.finetuned(base), parent / "out")
    parent.chmod(0o755)
    assert list(parent.iterdir()) == []


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["lrmerge", "extract", *sys.argv[2:], "-q"]
from lrmerge.app import main
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
@pytest.mark.parametrize(("limit", "options"), [(20_000, ["--rank", "8"]), (14_000, ["--embeddings", "full"])])
def test_no_space_left(base, tuned, out, limit, options):
    """First while factors come in, then while the adapter is written: what is saved in full makes it the larger."""
    if "full" in options:
        options += ["--rank", "1"]
    command = [sys.executable, "-c", FULL, str(limit), str(base), str(tuned), "-o", str(out), *options]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 1, ended
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "no space left" in ended.stderr
    assert str(out) in ended.stderr
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


# Options


OPTIONS = {
    "--rank 0": ["--rank"],
    "--rank -3": ["--rank"],
    "--rank x": ["--rank", "auto"],
    "--rank 4 --energy 0.5": ["--rank", "--energy"],
    "--energy 2": ["--energy", "2"],
    "--energy nan": ["--energy"],
    "--error -1": ["--error", "-1"],
    "--size foo": ["--size", "foo", "200MB"],
    "--max-rank 0": ["--max-rank", "0"],
    "--multiple-of 0": ["--multiple-of", "0"],
    "--multiple-of x": ["--multiple-of", "integer"],
    "--dtype int8": ["--dtype", "int8", "bfloat16"],
    "--device cuda:9": ["--device", "cuda:9"],
    "--device tpu": ["--device", "tpu", "cpu"],
    "--threads 0": ["--threads", "0"],
    "--memory some": ["--memory", "some"],
    "--include [": ["--include", "["],
    "--exclude *": ["--exclude", "*"],
    "--include nowhere": ["--include", "nowhere", "lm_head.weight"],
    "--exclude nowhere": ["--exclude", "nowhere"],
    "--rank-pattern mlp": ["--rank-pattern", "REGEX=N"],
    "--rank-pattern mlp=x": ["--rank-pattern", "REGEX=N"],
    "--rank-pattern mlp=0": ["--rank-pattern", "0"],
    "--rank-pattern mlp=0 --energy 0.9": ["--rank-pattern", "0"],
    "--rank-pattern [=4": ["--rank-pattern", "["],
    "--rank-pattern nowhere=4": ["--rank-pattern", "nowhere"],
    "--embeddings some": ["--embeddings", "some", "lora"],
    "--nothing": ["--nothing"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_wrong_option(base, tuned, out, options):
    fails(base, tuned, out, *options.split(), code=2, words=OPTIONS[options])


def test_missing_argument(base, out):
    refused("extract", base, "-o", out, code=2, words=("FINETUNED",), out=out)
    refused("nothing", code=2, words=("nothing",))


def test_memory_below_the_process(base, tuned, out):
    fails(base, tuned, out, "--memory", "1MB", words=["--memory", "MiB"])


def test_memory_below_one_tensor(base, tmp_path, monkeypatch, out):
    from mergekit_lr.graph import resources

    monkeypatch.setattr(resources, "resident_bytes", lambda: 0)
    large = tiny.decoder() | {TABLE: torch.zeros(12000, 24), "lm_head.weight": torch.zeros(12000, 24)}
    sides = [tiny.save(tmp_path / name, large) for name in ("large", "tuned")]
    fails(*sides, out, "--memory", resources.OVERHEAD + (1 << 20), words=["weight", "MiB", "--memory"])


def test_a_budget_below_anything(base, tuned, out):
    fails(base, tuned, out, "--size", "300", code=2, words=["--size 300", "raise"])
    fails(base, tuned, out, "--size", "2kB", "--embeddings", "full", code=2, words=["--size 2kB", "raise"])


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", True])
def test_wrong_rank_in_python(value):
    base = tiny.decoder()
    with pytest.raises(LrmergeError, match="--rank"):
        lr.extract(base, tiny.finetuned(base), rank=value)


# What is printed


@pytest.mark.parametrize("name", ["model.\x1b[31mred.weight", "model.[bold]x[/]y.weight", "model.[/none].weight"])
def test_names_are_printed_as_they_are(tmp_path, name):
    shown = name.replace("\x1b", "\\x1b")
    base = tiny.save(tmp_path / "base", {name: torch.ones(8, 8)}, config=None)
    tuned = tiny.save(tmp_path / "tuned", {name: torch.ones(8, 8) + torch.eye(8)}, config=None)
    damaged = tiny.save(tmp_path / "damaged", {name: torch.full((8, 8), torch.nan)}, config=None)
    left_out = ["--exclude", "model", "-o", tmp_path / "none"]
    for arguments in (
        ["inspect", base, "-v"],
        ["extract", base, tuned, "-v", "--dry-run"],
        ["extract", base, tuned, "-v", "-o", tmp_path / "out"],
        ["inspect", tmp_path / "out", "-v"],
        ["extract", base, tuned, *left_out],
    ):
        outcome = tiny.lrmerge(*arguments)
        assert outcome.code == 0, outcome
        assert "\x1b" not in outcome.out + outcome.err
        assert shown.removesuffix(".weight") in outcome.out
    assert shown in refused("extract", base, damaged, "-o", tmp_path / "x", "-q", code=1)
