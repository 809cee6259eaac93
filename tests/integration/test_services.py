"""MLflow and Ray under the real supervisord, in a project of its own, from another folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mm_model.adapters import services
from mm_model.adapters.environment import DEFAULT_PORTS, mlflow_url, ray_dashboard_url, ray_temp_dir

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
WANTED = ["mlflow", "ray"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "a project"  # a space in the path must not matter
    shutil.copytree(ROOT / "infra/local", root / "infra/local")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MM_PROJECT", str(root))
    with contextlib.ExitStack() as stack:
        for name in DEFAULT_PORTS:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            monkeypatch.setenv(f"MM_{name.upper()}_PORT", str(probe.getsockname()[1]))
    try:
        yield root
    finally:
        services.down()


def states() -> dict[str, str]:
    return {row.name: row.state for row in services.status() if row.name in WANTED}


def test_services_live_through_a_killed_supervisor_and_leave_nothing(project: Path) -> None:
    services.up(WANTED)
    assert states() == {"mlflow": "ready", "ray": "ready"}
    refused = httpx.get(
        f"{mlflow_url()}/api/2.0/mlflow/experiments/search", headers={"Host": "x.y"}
    )
    assert refused.status_code == 403
    assert httpx.get(f"{ray_dashboard_url()}/api/jobs/").status_code == 401  # no token

    first = {row.name: row.pid for row in services.status()}
    services.up(WANTED)
    assert {row.name: row.pid for row in services.status()} == first

    os.kill(int((project / "var/supervisord.pid").read_text()), signal.SIGKILL)
    assert states() == {"mlflow": "orphan", "ray": "orphan"}
    services.up(["mlflow"])
    assert states() == {"mlflow": "ready", "ray": "stopped"}

    services.down()
    assert services._ours() == []
    assert not ray_temp_dir().exists()
    assert states() == {"mlflow": "stopped", "ray": "stopped"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(mlflow_url())
