"""`mm doctor`: what is installed, reachable and wrong, each with its remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from mm_model.adapters import environment
from mm_model.config import load_params
from mm_model.data.sources.stac.places import places_of
from mm_model.data.sources.stac.request import load_request
from mm_model.errors import MMError

# One package for each seam; their exact versions stand in constraints.txt.
PACKAGES = (
    "torch", "rasterio", "ray", "mlflow", "prefect", "dvc", "great-expectations", "supervisor",
)  # fmt: skip
NEEDED_DISK_GB = 4
NEEDED_MEMORY_GB = 6


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is None where nothing is wrong."""

    subject: str
    found: str
    remedy: str | None = None
    is_fault: bool = True


def examine() -> int:
    """Print the report; the exit status is 1 if there is a fault (a stopped service is none)."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    faults = 0
    for check in (_python, _packages, _tools, _machine, _pipeline, _services):
        for finding in check():
            if finding.remedy is None:
                mark = "[green]ok[/]"
            elif finding.is_fault:
                mark, faults = "[red]no[/]", faults + 1
            else:
                mark = "[yellow]--[/]"
            table.add_row(mark, finding.subject, finding.found, finding.remedy or "")
    console = Console()
    console.print(table)
    console.print("nothing is wrong" if not faults else f"{faults} to mend")
    return 1 if faults else 0


def _python() -> Iterator[Finding]:
    # Installed packages need 3.11; whoever reads this has at least something that starts.
    yield Finding("python", platform.python_version())


def _packages() -> Iterator[Finding]:
    pinned = _constraints(environment.project_root() / "constraints.txt")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "make setup")
            continue
        tested = pinned.get(name)
        differs = tested is not None and version.split("+")[0] != tested
        yield Finding(
            name,
            version,
            f"{tested} is what was tested: make setup" if differs else None,
            is_fault=False,
        )


def _constraints(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def _tools() -> Iterator[Finding]:
    git = shutil.which("git")
    if git is None:
        yield Finding("git", "missing", "install git: DVC and the lineage of models need it")
    else:
        commit = subprocess.run(
            [git, "-C", str(environment.project_root()), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        yield Finding(
            "git",
            commit.stdout.strip() or "not a repository",
            None if commit.returncode == 0 else "clone the project with git",
        )
    has_dvc = (environment.project_root() / ".dvc").is_dir()
    yield Finding("dvc repository", "yes" if has_dvc else "no", None if has_dvc else "run dvc init")


def _machine() -> Iterator[Finding]:
    free_gb = shutil.disk_usage(environment.project_root()).free / 1e9
    yield Finding(
        "disk",
        f"{free_gb:.0f} GB free",
        None if free_gb >= NEEDED_DISK_GB else f"free at least {NEEDED_DISK_GB} GB",
    )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding(
        "memory",
        f"{memory_gb:.0f} GB",
        None if memory_gb >= NEEDED_MEMORY_GB else f"the demo wants {NEEDED_MEMORY_GB} GB",
        is_fault=False,
    )
    import torch

    devices = torch.cuda.device_count()
    yield Finding("processors", f"{os.cpu_count()} cores, {devices} GPUs")


def _pipeline() -> Iterator[Finding]:
    path = Path("params.yaml")
    if not path.is_file():
        yield Finding("params.yaml", "none here", "go to a pipeline folder", is_fault=False)
        return
    try:
        params = load_params(path)
    except MMError as error:
        yield Finding("params.yaml", "wrong", str(error))
        return
    yield Finding("params.yaml", f"source {params.prepare.source}, model {params.register_.model}")
    geotiff = params.prepare.geotiff
    if params.prepare.source == "geotiff" and geotiff is not None:
        there = geotiff.manifest.is_file()
        yield Finding(
            "manifest",
            str(geotiff.manifest),
            None if there else "write it, or correct prepare.geotiff.manifest",
        )
    stac = params.prepare.stac
    if params.prepare.source == "stac" and stac is not None:
        try:
            request = load_request(stac.search, params.selected)
            yield Finding("search", f"{len(places_of(request))} places, {request.catalogue.url}")
        except MMError as error:
            yield Finding("search", "wrong", str(error))


def _services() -> Iterator[Finding]:
    endpoint = environment.endpoint_url()
    with suppress(MMError):  # said above
        endpoint += load_params().serve.route_prefix.rstrip("/")
    checks: tuple[tuple[str, str, str], ...] = (
        ("MLflow", environment.mlflow_url(), "/health"),
        ("Prefect", environment.prefect_api_url(), "/health"),
        ("Ray", environment.ray_dashboard_url(), "/api/gcs_healthz"),
        ("endpoint", endpoint, "/healthz"),
        ("model in the endpoint", endpoint, "/readyz"),
    )
    for name, base, path in checks:
        yield _answers(name, base, path)


def _answers(name: str, base: str, path: str) -> Finding:
    try:
        # Whether it is alive: no secret is sent, and who signed does not matter.
        status = httpx.get(base + path, timeout=3, verify=False).status_code
    except httpx.HTTPError:
        return Finding(name, f"no answer at {base}", "mm up", is_fault=False)
    # Ray answers 401 without its token: it is there.
    if status in (200, 401):
        return Finding(name, base)
    remedy = "promote a version: mm promote VERSION" if status == 503 else "see var/log"
    return Finding(name, f"{base} answers {status}", remedy, is_fault=False)
