"""Compose file, container files, CI: held offline against their schemas and linters."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
COMPOSE = ROOT / "infra/compose/compose.yaml"
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    return run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def load(path: Path = COMPOSE) -> dict[str, Any]:
    data = yaml.safe_load(path.read_text())
    assert isinstance(data, dict)
    return data


def services() -> dict[str, dict[str, Any]]:
    return load()["services"]


def test_compose_files_keep_their_schema() -> None:
    for path in (COMPOSE, COMPOSE.with_name("compose.gpu.yaml")):
        result = check_compose(path)
        assert result.returncode == 0, result.stdout


def test_a_misspelt_compose_key_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("    ports:", "    portz:", 1))
    assert check_compose(wrong).returncode != 0


def test_compose_services_wait_for_health_and_keep_to_the_loopback() -> None:
    for name, service in services().items():
        if service.get("restart") != "no":
            assert "healthcheck" in service, name
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}, f"{name} -> {other}"
            assert "healthcheck" in services()[other], f"{name} -> {other}"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"
        # A published port needs a network that is not internal.
        assert not service.get("ports") or "default" in service.get("networks", ["default"]), name


def test_only_servers_reach_the_stores() -> None:
    assert load()["networks"]["stores"] == {"internal": True}
    inside = {name for name, s in services().items() if "stores" in s.get("networks", [])}
    assert inside == {"postgres", "objects", "mlflow", "prefect"}
    assert all(services()[name]["networks"] == ["stores"] for name in ("postgres", "objects"))


def test_compose_pins_images_and_declares_its_volumes() -> None:
    data = load()
    for name, service in data["services"].items():
        assert re.search(r":v?\d+(\.\d+)+", service["image"]), f"{name}: {service['image']}"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith((".", "/")) or source in data["volumes"], f"{name}: {volume}"


def test_compose_has_no_password_and_env_example_names_every_variable() -> None:
    text = COMPOSE.read_text()
    variables = dict(re.findall(r"(?<!\$)\$\{([A-Z_]+)([^}]*)\}", text))
    example = dict(
        line.split("=", 1)
        for line in (COMPOSE.parent / ".env.example").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    assert set(variables) == set(example)
    for name in variables:
        if re.search("PASSWORD|TOKEN|KEY", name):
            assert example[name] == "", f"{name} has a value in .env.example"
            assert not re.search(rf"\$\{{{name}:-[^}}]", text), f"{name} has a default"
    secret = re.compile(r"(password|token|secret|_key)", re.IGNORECASE)
    for name, service in services().items():
        for key, value in service.get("environment", {}).items():
            if secret.search(key) and not key.startswith("GIT_CONFIG_"):
                assert str(value).startswith("${"), f"{name}: {key} is written out"


def test_compose_keeps_what_was_learnt_of_these_versions() -> None:
    all_of = services()
    assert any(a.startswith("--allowed-hosts=mlflow:5000") for a in all_of["mlflow"]["command"])
    assert all_of["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert all_of["prefect"]["environment"]["PREFECT_SERVER_UI_API_URL"].endswith("4200/api")
    for name in ("ray-head", "prefect-worker", "endpoint"):
        assert all_of[name]["environment"]["RAY_AUTH_MODE"] == "token", name
        assert all_of[name]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), name
        assert "shm_size" in all_of[name], name


def test_environment_names_exist_in_the_tools_that_read_them() -> None:
    """A misspelt variable is ignored in silence, so the names are looked up in the packages."""
    import mlflow.environment_variables as mlflow_variables
    import prefect.settings

    text = COMPOSE.read_text() + "".join(
        p.read_text() for p in (ROOT / "infra/docker").glob("*.Dockerfile")
    )
    text += (ROOT / "infra/k8s/base/environment.yaml").read_text()
    known = {
        variable.name
        for variable in vars(mlflow_variables).values()
        if isinstance(variable, mlflow_variables._EnvironmentVariable)
    } | {"MLFLOW_TRACKING_URI"}
    known |= set(prefect.settings.get_current_settings().to_environment_variables())
    known |= prefect_setting_names(prefect.settings.Settings)
    unknown = set(re.findall(r"\b(?:MLFLOW|PREFECT)_[A-Z0-9_]+\b", text)) - known
    assert not unknown


def prefect_setting_names(model: Any) -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        choices = getattr(alias, "choices", [alias] if alias else [])
        names |= {str(c).upper() for c in choices}
        prefix = model.model_config.get("env_prefix", "")
        names.add(f"{prefix}{name}".upper())
        if hasattr(field.annotation, "model_fields"):
            names |= prefect_setting_names(field.annotation)
    return names


CONTAINER_FILES = sorted((ROOT / "infra/docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", CONTAINER_FILES, ids=lambda p: p.stem)
def test_container_files(path: Path) -> None:
    result = run(BIN / "hadolint", "--no-color", path)
    assert result.returncode == 0, result.stdout
    text = path.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2, "a build stage and a slim one"
    assert all(re.search(r":\d+\.\d+\.\d+-slim", base) for base in bases), bases
    final = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER [1-9]\d*", final, re.MULTILINE), "a numeric user that is not root"
    assert re.search(r"^HEALTHCHECK ", final, re.MULTILINE)
    installs = re.findall(r"^RUN (\S*pip install(?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert installs
    assert all("constraints.txt" in install for install in installs), installs


def test_container_files_copy_what_the_build_context_holds() -> None:
    allowed = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    for path in CONTAINER_FILES:
        for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE):
            for source in [w for w in line.split() if not w.startswith("--")][:-1]:
                assert (ROOT / source).exists(), f"{path.name}: {source}"
                assert any(source == a or source.startswith(f"{a}/") for a in allowed), (
                    f"{path.name}: {source} is not in the build context"
                )


def test_a_bad_container_file_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python:latest\nRUN cd /srv && sudo pip install torch\n")
    assert run(BIN / "hadolint", wrong).returncode != 0


def test_ci_runs_the_one_script_and_the_script_is_sound() -> None:
    workflow = ROOT / ".github/workflows/ci.yml"
    schema = "vendor.github-workflows"
    result = run(BIN / "check-jsonschema", "--builtin-schema", schema, workflow)
    assert result.returncode == 0, result.stdout
    steps = yaml.safe_load(workflow.read_text())["jobs"]["all"]["steps"]
    assert [s["run"] for s in steps if "run" in s] == [".ci/run"]
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    checked = run(BIN / "shellcheck", script)
    assert checked.returncode == 0, checked.stdout


def test_yaml_is_tidy(tmp_path: Path) -> None:
    lint = [BIN / "yamllint", "--strict", "-c", ROOT / "infra/yamllint.yaml"]
    result = run(*lint, ROOT / "infra", ROOT / ".github")
    assert result.returncode == 0, result.stdout
    shutil.copy(COMPOSE, wrong := tmp_path / "compose.yaml")
    wrong.write_text(wrong.read_text() + "volumes: {}\n")  # a second key of the same name
    assert run(*lint, wrong).returncode != 0
