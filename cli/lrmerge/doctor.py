"""``lrmerge doctor``: what this installation can do, and what it lacks."""

from __future__ import annotations

from lrmerge import options as opt


def doctor(as_json: opt.Json = False) -> None:
    """Show versions, devices, linear algebra, free memory and the Hub login."""
    from rich.table import Table

    from lrmerge.console import emit_json, out

    found = examine()
    if as_json:
        emit_json(found)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in found.items():
        table.add_row(name, "\n".join(value) if isinstance(value, list) else str(value))
    out.print(table)


def examine() -> dict[str, str | list[str]]:
    """The state of the installation by topic; nothing secret."""
    import os
    import shutil
    import tempfile

    import torch

    from lrmerge.console import size
    from mergekit_lr.graph.resources import free_memory
    from mergekit_lr.report.manifest import versions

    known = versions()
    packages = [f"{name} {version}" for name, version in known.items()]
    missing = [name for name in ("transformers", "peft") if name not in known]
    if missing:
        packages.append(f"not installed: {', '.join(missing)} (pip install 'lrmerge[peft]' reads any architecture)")
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [f"cpu: {count} cores, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        devices.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {size(memory)}")
    return {
        "packages": packages,
        "devices": devices,
        "linear algebra": _blas(),
        "free memory": size(free_memory()),
        "free disk": [f"{size(shutil.disk_usage(path).free)} in {path}" for path in (".", tempfile.gettempdir())],
        "Hub": _hub(),
    }


def _blas() -> str:
    import torch

    text = torch.__config__.show()
    name = "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or other"
    lapack = "LAPACK" if torch._C.has_lapack else "no LAPACK"
    openmp = "OpenMP" if torch.backends.openmp.is_available() else "no OpenMP"
    return f"{name}, {lapack}, {openmp}" + (", oneDNN" if "USE_MKLDNN=ON" in text or "MKL-DNN" in text else "")


def _hub() -> str:
    from huggingface_hub import HfApi, constants, errors, get_token

    where = f"endpoint {constants.ENDPOINT}, cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return f"offline (HF_HUB_OFFLINE); {where}"
    if get_token() is None:
        return f"not logged in (hf auth login); {where}"
    try:
        return f"logged in as {HfApi().whoami()['name']}; {where}"
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        return f"a token is set, but the Hub did not confirm it ({type(error).__name__}); {where}"
