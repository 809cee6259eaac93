"""Services and the guard of `dvc repro`, as far as they need no service."""

from __future__ import annotations

import configparser
import datetime
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mm_model.adapters import dvc, environment, services
from mm_model.cli.doctor import _answers
from mm_model.errors import ServiceError

CONFIG = Path(__file__).resolve().parents[3] / "infra/local/supervisord.conf"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MM_PROJECT", str(tmp_path))
    return tmp_path


def programs() -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(inline_comment_prefixes=None)
    parser.read(CONFIG)
    return {
        name.removeprefix("program:"): dict(parser[name])
        for name in parser.sections()
        if name.startswith("program:")
    }


def test_every_service_is_a_program_that_stops_whole_and_waits_to_be_started() -> None:
    found = programs()
    assert set(found) == {service.name for service in services.SERVICES}
    for program in found.values():
        assert program["autostart"] == "false"
        # stopasgroup implies killasgroup
        assert "true" in (program.get("stopasgroup"), program.get("killasgroup"))
        assert int(program["stdout_logfile_backups"]) > 0


def test_the_configuration_holds_no_absolute_path() -> None:
    for program in programs().values():
        assert not any(word.strip('"').startswith("/") for word in program["command"].split())


def test_a_taken_port_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        monkeypatch.setenv("MM_MLFLOW_PORT", str(number))
        with pytest.raises(ServiceError, match=rf"port {number} for mlflow.*MM_MLFLOW_PORT"):
            services._check_ports(services._with_needs(["mlflow"]))


def test_what_a_service_needs_is_started_with_it() -> None:
    names = [s.name for s in services._with_needs(["endpoint"])]
    assert names == ["mlflow", "ray", "endpoint"]
    with pytest.raises(ServiceError, match="no such service"):
        services._with_needs(["grafana"])


def self_signed(folder: Path) -> tuple[Path, Path]:
    """PEM files of a certificate and its key, for 127.0.0.1."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(
        name, name, secret.public_key(), x509.random_serial_number(),
        now - datetime.timedelta(days=1), now + datetime.timedelta(days=1),
    ).sign(secret, hashes.SHA256())  # fmt: skip
    pem = serialization.Encoding.PEM
    certificate.write_bytes(made.public_bytes(pem))
    plain = serialization.NoEncryption()
    key.write_bytes(secret.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return certificate, key


@pytest.mark.parametrize("has_certificate", [False, True])
def test_the_endpoint_is_asked_below_its_route_prefix_and_by_tls_if_it_has_a_certificate(
    has_certificate: bool, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alive(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/earth/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    params = (CONFIG.parents[2] / "params.yaml").read_text()
    (endpoint,) = (s for s in services.SERVICES if s.name == "endpoint")
    with HTTPServer(("127.0.0.1", 0), Alive) as server:
        if has_certificate:
            certificate, key = self_signed(project)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            monkeypatch.setenv("MM_ENDPOINT_TLS_CERT", str(certificate))
            monkeypatch.setenv("MM_ENDPOINT_TLS_KEY", str(key))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MM_ENDPOINT_PORT", str(server.server_port))
        for prefix, answers in (("/earth", True), ("/", False)):
            changed = re.sub("route_prefix: .*", f"route_prefix: {prefix}", params)
            (project / "params.yaml").write_text(changed)
            assert endpoint.answers() is answers
            base = environment.endpoint_url() + prefix.rstrip("/")
            assert (_answers("endpoint", base, "/healthz").found == base) is answers
        server.shutdown()


def test_the_ray_token_is_secret_and_kept(project: Path) -> None:
    services._prepare()
    token = project / "var/ray_token"
    first = token.read_text()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    services._prepare()
    assert token.read_text() == first
    services.ray_temp_dir().rmdir()


def test_down_without_anything_up_is_quiet(project: Path) -> None:
    said: list[str] = []
    services.down(said.append)
    assert said == []
    assert not (project / "var").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["error: first", "x", "error: patch 12; mend it", "ERROR: failed"], "patch 12; mend it"),
        (["ERROR: failed to reproduce 'stats'"], "failed to reproduce 'stats'"),
        (["something"], "dvc repro stats ended with code 3: something"),
        ([], "dvc repro stats ended with code 3: no output"),
    ],
)
def test_the_stages_own_message_comes_first(lines: list[str], message: str) -> None:
    assert dvc.failure_message(lines, ["stats"], 3) == message


STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "300"])
print(child.pid, flush=True)
time.sleep(300)
"""


def guarded(code: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    guard = subprocess.Popen(
        [sys.executable, "-P", dvc.__file__, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdout is not None
    return guard, psutil.Process(int(guard.stdout.readline()))


def gone(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 20
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_guard_ends_grandchildren_when_its_caller_is_gone() -> None:
    guard, grandchild = guarded(STUBBORN)
    assert grandchild.is_running()
    assert guard.stdin is not None
    guard.stdin.close()  # what the kernel does when the caller is killed
    assert guard.wait(20) == 128 + signal.SIGTERM
    assert gone(grandchild)


def test_the_guard_ends_grandchildren_on_sigterm() -> None:
    guard, grandchild = guarded(STUBBORN)
    os.kill(guard.pid, signal.SIGTERM)
    assert guard.wait(20) == 128 + signal.SIGTERM
    assert gone(grandchild)


def test_the_guard_passes_the_code_on_and_leaves_no_background_process() -> None:
    code = "import subprocess\nprint(subprocess.Popen(['sleep', '300']).pid, flush=True)\nexit(7)"
    guard, grandchild = guarded(code)
    assert guard.wait(20) == 7
    assert gone(grandchild)
