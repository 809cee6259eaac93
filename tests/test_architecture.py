"""The house rules of docs/architecture.md, held by the build."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from mm_model.modalities import MODALITIES

ROOT = Path(__file__).parents[1]

# Which files may import a vendor: a prefix of the path below the root, or a whole path.
VENDORS = {
    "ray": ("mm_model/adapters/",),
    "mlflow": ("mm_model/adapters/",),
    "prefect": ("flows/",),
    "supervisor": ("mm_model/adapters/",),
    "dvc": ("mm_model/adapters/",),
    "rasterio": (
        "mm_model/data/georeference.py",
        "mm_model/data/raster.py",
        "mm_model/data/remote.py",
        "mm_model/data/strips.py",
    ),
    "obstore": ("mm_model/data/storage.py",),
    "pystac_client": ("mm_model/data/sources/stac/search.py",),
    "pystac": ("mm_model/data/sources/stac/search.py",),
    "markdown_it": ("mm_model/catalogue/page.py",),
    # What pystac_client and MLflow raise.
    "requests": ("mm_model/adapters/", "mm_model/data/sources/stac/search.py"),
    "yaml": ("mm_model/config.py",),
    "fastapi": (
        "mm_model/serving/app.py",
        "mm_model/serving/progress.py",
        "mm_model/serving/jobs/routes.py",
    ),
    "starlette": (
        "mm_model/serving/app.py",
        "mm_model/serving/access.py",
        "mm_model/serving/ahead.py",
        "mm_model/serving/forms.py",
        "mm_model/serving/front.py",
        "mm_model/serving/jobs/routes.py",
        "mm_model/serving/presence.py",
        "mm_model/serving/progress.py",
        "mm_model/serving/web/__init__.py",
        "mm_model/adapters/ray_proxy.py",
    ),
    "sqlalchemy": ("mm_model/serving/jobs/store.py",),
    "prometheus_client": ("mm_model/serving/metrics.py",),
    "opentelemetry": (
        "mm_model/serving/app.py",
        "mm_model/serving/watch.py",
        "mm_model/adapters/traces.py",
    ),
    "great_expectations": ("mm_model/data/validate.py",),
    "pyarrow": ("mm_model/data/", "mm_model/catalogue/"),
    "safetensors": ("mm_model/bundle.py", "mm_model/training/", "mm_model/adapters/"),
    "matplotlib": (
        "mm_model/pictures.py",
        "mm_model/evaluation/",
        "mm_model/catalogue/charts.py",
    ),
    "typer": ("mm_model/cli/",),
    "click": ("mm_model/cli/",),
    # Consoles and progress bars: where something takes long.
    "rich": (
        "mm_model/cli/",
        "mm_model/adapters/",
        "mm_model/catalogue/census.py",
        "mm_model/data/prepare.py",
        "mm_model/data/sources/stac/search.py",
        "mm_model/evaluation/evaluate.py",
    ),
}


def python_files(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [p for name in listing.split("\0") if name and (p := ROOT / name).is_file()]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def imported_modules(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", node


def docstrings(tree: ast.Module) -> set[int]:
    """Identities of the constants that only document."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


# --- imports ---------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as command; command()",
            "--config",
            str(ROOT / "pyproject.toml"),
            "--no-cache",
        ],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_imports_keep_the_contracts_of_pyproject() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contracts_catch_a_deliberate_violation_of_each(tmp_path: Path) -> None:
    for package in ("mm_model", "flows"):
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=lambda _, names: [n for n in names if n == "__pycache__"],
        )
    for module, line in {
        "mm_model/errors.py": "import mm_model.config",
        "mm_model/config.py": "import flows",
        "mm_model/scene.py": "import pandas",
        "mm_model/serving/__init__.py": "import mm_model.training",
        "mm_model/data/__init__.py": "import ray",
        "mm_model/api.py": "import torch",
    }.items():
        with (tmp_path / module).open("a") as file:
            file.write(f"\n{line}\n")
    output = lint_imports(tmp_path).stdout
    assert "0 kept, 6 broken" in output, output


def test_each_vendor_is_imported_only_where_it_belongs() -> None:
    strays = [
        f"{where(path, node)} imports {module}"
        for path in python_files("mm_model", "flows")
        for module, node in imported_modules(tree_of(path))
        if (homes := VENDORS.get(module.split(".")[0])) is not None
        and not path.relative_to(ROOT).as_posix().startswith(homes)
    ]
    assert not strays, "\n".join(strays)


def test_flows_compute_nothing() -> None:
    heavy = {"numpy", "torch", "pandas", "pyarrow", "rasterio", "ray", "mlflow"}
    strays = [
        f"{where(path, node)} imports {module}"
        for path in python_files("flows")
        for module, node in imported_modules(tree_of(path))
        if module.split(".")[0] in heavy
    ]
    assert not strays, "\n".join(strays)


IMPORT_ALL = """
import importlib, sys

FORBIDDEN = ("socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.fork")
vendors, modules = (line.split() for line in sys.stdin)
current = None

def guard(event, args):
    if event in FORBIDDEN:
        raise RuntimeError(f"{event}{args!r:.120} while importing {current}")

# What vendors do when imported is theirs: have them loaded before the guard stands.
for vendor in vendors:
    importlib.import_module(vendor)
sys.addaudithook(guard)
failed = []
for current in modules:
    try:
        importlib.import_module(current)
    except BaseException as error:
        failed.append(f"{current}: {type(error).__name__}: {error}")
if failed:
    sys.exit("\\n".join(failed))
"""


def import_all(
    root: Path, folder: Path, vendors: list[str], modules: list[str]
) -> subprocess.CompletedProcess[str]:
    """Import in an empty folder, without network, processes or parameters."""
    cwd, home = folder / "empty", folder / "home"
    cwd.mkdir()
    home.mkdir()
    result = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL],
        input=f"{' '.join(vendors)}\n{' '.join(modules)}\n",
        cwd=cwd,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(home),
            "PYTHONPATH": str(root),
            "PREFECT_HOME": str(home / "prefect"),
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        text=True,
    )
    assert not list(cwd.iterdir())
    return result


def test_every_module_imports_without_side_effects(tmp_path: Path) -> None:
    vendors = ["torch", "pandas", "ray.train.torch", "ray.serve", "mlflow", "prefect"]
    vendors += ["great_expectations", "matplotlib.figure", "rasterio", "fastapi"]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in python_files("mm_model", "flows")
        if path.stem != "__main__"
    ]
    result = import_all(ROOT, tmp_path, vendors, modules)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize(
    "line",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "import os; os.system('true')",
    ],
)
def test_a_side_effect_would_be_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "wrong.py").write_text(line)
    result = import_all(tmp_path, tmp_path, [], ["wrong"])
    assert "while importing wrong" in result.stderr


# --- names, sizes, forms ---------------------------------------------------------------------


def modality_literals(path: Path, tree: ast.Module) -> list[str]:
    documents = docstrings(tree)
    return [
        f"{where(path, node)}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in MODALITIES and id(node) not in documents
    ]


def test_no_modality_is_named_outside_the_registry() -> None:
    strays = [
        stray
        for path in python_files("mm_model", "flows")
        if path != ROOT / "mm_model/modalities.py"
        for stray in modality_literals(path, tree_of(path))
    ]
    assert not strays, "\n".join(strays)


def test_a_named_modality_would_be_seen() -> None:
    name = next(iter(MODALITIES))
    tree = ast.parse(f'"""{name}"""\nif modality.name == "{name}":\n    pass\n')
    assert len(modality_literals(ROOT / "x.py", tree)) == 1


@pytest.mark.parametrize(
    ("folders", "limit"),
    [
        (("mm_model", "flows", "tests", "benchmarks", "examples"), 500),
        (("flows",), 60),
        (("mm_model/stages",), 40),
    ],
)
def test_files_stay_short(folders: tuple[str, ...], limit: int) -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in python_files(*folders)}
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > limit}
    assert not long, f"over {limit} lines: {long}"


def test_names_say_what_a_thing_is() -> None:
    vague = re.compile(r"(Manager|Handler|Helper|Processor|Utils?)$")
    classes = [
        f"{where(path, node)}: {node.name}"
        for path in python_files("mm_model", "flows")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and vague.search(node.name)
    ]
    modules = [
        str(p) for p in python_files("mm_model", "flows") if re.search("util|helper", p.stem)
    ]
    assert not classes + modules


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword_is(call: ast.Call, name: str, value: object) -> bool:
    return any(
        k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value
        for k in call.keywords
    )


def unsafe_loads(path: Path, tree: ast.Module) -> list[str]:
    """Ways by which a file could run code when it is read."""
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    found = [
        f"{where(path, node)} imports {module}"
        for module, node in imported_modules(tree)
        if module.split(".")[0] in banned
    ]
    for name, call in calls(tree):
        if (
            (name == "torch.load" and not keyword_is(call, "weights_only", True))
            or (name in {"np.load", "numpy.load"} and keyword_is(call, "allow_pickle", True))
            or name in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}
            or name in {"eval", "exec"}
        ):
            found.append(f"{where(path, call)} calls {name}")
    return found


def test_nothing_that_is_loaded_can_run_code() -> None:
    found = [f for p in python_files("mm_model", "flows") for f in unsafe_loads(p, tree_of(p))]
    assert not found, "\n".join(found)


def test_unsafe_loads_would_be_seen() -> None:
    source = "import pickle\ntorch.load(p)\ntorch.load(p, weights_only=True)\nyaml.load(s)\n"
    assert len(unsafe_loads(ROOT / "x.py", ast.parse(source))) == 3


def test_the_library_prints_nothing() -> None:
    """Commands and stages speak to people; everything else logs or returns."""
    speaking = ("mm_model/cli/", "mm_model/stages/")
    found = [
        where(path, call)
        for path in python_files("mm_model", "flows")
        if not path.relative_to(ROOT).as_posix().startswith(speaking)
        for name, call in calls(tree_of(path))
        if name == "print" and not any(k.arg == "file" for k in call.keywords)
    ]
    assert not found, "\n".join(found)


def test_no_broad_except_outside_the_rim() -> None:
    rim = ("mm_model/adapters/", "mm_model/cli/", "flows/")
    # Hands what it catches to the callers whose requests were in the batch.
    rim += ("mm_model/serving/batching.py",)
    # Whatever a challenger raises, the champion answers.
    rim += ("mm_model/serving/challenge.py",)
    # Hands what a job raised to its owner, and lives on when the database is away.
    rim += ("mm_model/serving/jobs/worker.py",)
    # A file that nobody foresaw fails its unit, which is named at the end, and not the run.
    rim += ("mm_model/data/parts.py",)
    found = [
        where(path, node)
        for path in python_files("mm_model", "flows")
        if not path.relative_to(ROOT).as_posix().startswith(rim)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]
    assert not found, "\n".join(found)


# --- texts -----------------------------------------------------------------------------------

# Assembled, so that this file does not hold what it looks for.
FOREIGN_PATH = re.compile(
    r"(?<![\w.$}/~-])/(?:" + "|".join(["work", "home", "Users", "mnt"]) + r")/\w"
)


def test_no_file_knows_the_machine_that_it_was_written_on() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip():.100}"
            for number, line in enumerate(text.splitlines(), 1)
            if FOREIGN_PATH.search(line)
        ]
    assert not found, "\n".join(found)


def markdown_links(text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text)


def test_links_in_the_documents_lead_somewhere() -> None:
    broken = []
    for path in tracked_files():
        if path.suffix != ".md":
            continue
        for link in markdown_links(path.read_text(encoding="utf-8")):
            target = link.split("#")[0]
            outside = "://" in link or link.startswith("mailto:")
            if target and not outside and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {link}")
    assert not broken, "\n".join(broken)


def parameter_keys(section: object, prefix: str = "") -> set[str]:
    """Dotted keys of the leaves; a declared size stands for all sizes."""
    if not isinstance(section, dict):
        return {prefix}
    keys: set[str] = set()
    for key, value in section.items():
        name = "<size>" if prefix == "model.sizes" else key
        keys |= parameter_keys(value, f"{prefix}.{name}".lstrip("."))
    return keys


def test_every_parameter_is_documented_and_no_other() -> None:
    wanted = parameter_keys(yaml.safe_load((ROOT / "params.yaml").read_text()))
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/parameters.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(wanted)


def test_the_index_of_decisions_is_complete() -> None:
    records = {p.name for p in (ROOT / "docs/adr").glob("[0-9]*.md")}
    listed = set(markdown_links((ROOT / "docs/adr/README.md").read_text()))
    assert records == listed
