"""Who may ask the endpoint, what it says to browsers, and what it writes down."""

import asyncio
import logging
import stat
import threading

import httpx
import pytest
from ray.serve.config import HTTPOptions
from serving_fixtures import ask, form, geotiff, make_source, refused, serve_config
from typer.testing import CliRunner

from mm_model import cli
from mm_model.adapters import environment
from mm_model.errors import ConfigError
from mm_model.serving.access import (
    AUDIT,
    KeyScope,
    check_exposure,
    check_kept,
    configured_keys,
    new_key,
    parse_keys,
)
from mm_model.serving.app import build_app

GENERATE, GENERATE_LINE = new_key("field-team", frozenset({KeyScope.GENERATE}))
METRICS, METRICS_LINE = new_key("prometheus", frozenset({KeyScope.METRICS}))
KEYS = parse_keys(f"# ours\n{GENERATE_LINE}\n\n{METRICS_LINE}  # scrapes\n", "here")
OPEN = {"/healthz", "/readyz"}
PATHS = ["/v1/model", "/v1/modalities", "/metrics", "/docs", "/openapi.json", "/nothing", *OPEN]


@pytest.fixture(scope="module")
def source():
    return make_source(max_side_px=64)


@pytest.fixture(scope="module")
def app(source):
    return build_app(source, serve_config(max_side_px=64), KEYS)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def get(app, path, headers=None):
    (answer,) = ask(app, ("GET", path, {"headers": headers or {}}))
    return answer


def generate(app, key=None, path="/v1/generate"):
    fields = {"target": "dem", "steps": 1} if path.endswith("generate") else {}
    headers = bearer(key) if key else {}
    (answer,) = ask(app, form({"sar": geotiff("sar")}, headers, path, **fields))
    return answer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [{}, bearer("mm_guessed"), bearer(""), bearer(GENERATE_LINE.split()[-1]),
     {"Authorization": f"Basic {GENERATE}"}, {"X-Api-Key": GENERATE}],
)  # fmt: skip
def test_without_a_key_only_health_is_told(app, path, headers):
    answer = get(app, path, headers)
    if path in OPEN:
        assert answer.status_code == 200
    else:
        refused(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_opens_what_its_scopes_say(app):
    assert generate(app, GENERATE).status_code == 200
    refused(generate(app, GENERATE, "/v1/embed"), 403, "forbidden")
    refused(get(app, "/metrics", bearer(GENERATE)), 403, "forbidden")
    assert get(app, "/metrics", bearer(METRICS)).status_code == 200
    assert "generate" in refused(generate(app, METRICS), 403, "forbidden").allowed
    for key in (GENERATE, METRICS):
        assert get(app, "/v1/model", bearer(key)).status_code == 200


def test_without_keys_anybody_is_answered(source):
    app = build_app(source, serve_config(max_side_px=64))
    assert generate(app).status_code == 200
    assert get(app, "/metrics").status_code == 200


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1:8000", True), ("localhost", True), ("LOCALHOST:80", True), ("[::1]:8000", True),
     ("[::ffff:127.0.0.1]", True), ("endpoint:8000", True), ("rebound.example:8000", False),
     ("127.0.0.1.example", False), ("localhost.", False), ("[::1].example", False)],
)  # fmt: skip
def test_without_keys_a_public_name_is_not_answered(source, app, host, is_local):
    """It may be of a page that has its name point at this machine."""
    for path in ("/v1/model", "/metrics", f"/v1/jobs/{'a' * 32}/result", "/", "/healthz"):
        answer = get(build_app(source, serve_config()), path, {"Host": host})
        if is_local or path in OPEN:
            assert answer.status_code != 403
        else:
            assert "127.0.0.1" in refused(answer, 403, "forbidden").remedy
    assert get(app, "/v1/model", {"Host": host, **bearer(GENERATE)}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [("http://127.0.0.1:8000", True), ("https://127.0.0.1:8000", True), (None, True),
     ("http://127.0.0.1:8001", False), ("http://127.0.0.1", False), ("null", False), ("", False),
     ("http://elsewhere.example", False), ("http://127.0.0.1:8000.example", False)],
)  # fmt: skip
def test_without_keys_no_page_but_its_own_changes_anything(source, app, origin, is_own):
    headers = {"Host": "127.0.0.1:8000"} | ({} if origin is None else {"Origin": origin})
    open_app = build_app(source, serve_config(max_side_px=64))
    for method, path in (("POST", "/v1/jobs"), ("POST", "/v1/generate"), ("DELETE", "/v1/jobs/a")):
        (answer,) = ask(open_app, (method, path, {"headers": headers}))
        if is_own:
            assert answer.status_code != 403
        else:
            assert "Origin" in refused(answer, 403, "forbidden").got
    assert get(open_app, "/v1/model", headers).status_code == 200
    headers |= bearer(GENERATE)
    (answer,) = ask(app, form({"sar": geotiff("sar")}, headers, target="dem", steps=1))
    assert answer.status_code == 200


def test_a_key_cannot_take_all_places(source, monkeypatch):
    """One more than a key may have is refused at once, before its body; another key is answered."""
    config = serve_config(max_side_px=64, max_per_key=2, max_batch=1)
    other, other_line = new_key("others", frozenset({KeyScope.GENERATE}))
    app = build_app(source, config, parse_keys(f"{GENERATE_LINE};{other_line}", "here"))
    generator, opened, entered = source.served.generator, threading.Event(), threading.Event()
    real = generator.sample

    def sample(requests, check=None):
        entered.set()
        assert opened.wait(20)
        return real(requests, check)

    monkeypatch.setattr(generator, "sample", sample)

    def request(key):
        fields = {"target": "dem", "steps": 1}
        return form({"sar": geotiff("sar")}, bearer(key), **fields)

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            def send(key):
                method, path, keywords = request(key)
                return asyncio.create_task(http.request(method, path, **keywords))

            mine = [send(GENERATE), send(GENERATE)]
            await asyncio.to_thread(entered.wait, 20)
            third = await send(GENERATE)
            shown = await http.get("/v1/model", headers=bearer(GENERATE))
            theirs = send(other)
            await asyncio.sleep(0)
            opened.set()
            fourth = [(await answer).status_code for answer in (*mine, theirs)]
            return third, shown, fourth, await send(GENERATE)

    third, shown, answered, later = asyncio.run(run())
    problem = refused(third, 429, "overloaded")
    assert (problem.got, problem.allowed) == ("2", "2")
    assert third.headers["retry-after"] == "1"
    assert shown.status_code == 200
    assert answered == [200, 200, 200]
    assert later.status_code == 200


def test_a_body_is_not_read_before_the_key(app):
    async def never():
        raise AssertionError("the body was read")

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": []}
    asyncio.run(app({**scope, "query_string": b"", "app": app}, never, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_security_headers(app, path):
    for headers in ({}, bearer(METRICS)):
        answer = get(app, path, headers)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"


def test_the_audit_log_has_no_contents(app, caplog):
    caplog.set_level(logging.INFO, AUDIT.name)
    answer = generate(app, GENERATE)
    get(app, "/secret-of-the-caller?token=hidden", bearer("mm_wrong"))
    first, second = (vars(r) for r in caplog.records if r.name == AUDIT.name)
    # A formatter of an earlier test may have left its texts on the record.
    usual = {*vars(logging.makeLogRecord({})), "asctime", "message"}
    line = {name: fact for name, fact in first.items() if name not in usual}
    assert line.pop("seconds") > 0
    assert line.pop("received_bytes") > len(geotiff("sar"))
    assert line == {
        "client": "127.0.0.1", "key": "field-team", "method": "POST", "path": "/v1/generate",
        "status": 200, "sent_bytes": len(answer.content),
        "request_id": answer.headers["x-request-id"],
    }  # fmt: skip
    assert second["status"] == 401
    assert second["key"] is None
    for text in ("secret-of", "hidden", "mm_wrong", GENERATE):
        assert text not in f"{first}{second}"


def test_keys_are_long_random_and_kept_as_hashes():
    keys = {new_key("n", frozenset(KeyScope))[0] for _ in range(50)}
    assert len(keys) == 50
    assert min(map(len, keys)) >= 43
    assert GENERATE not in GENERATE_LINE


@pytest.mark.parametrize(
    "text",
    ["field-team", f"a generate {GENERATE}", "a admin " + "0" * 64, "a generate " + "0" * 63,
     f"{GENERATE_LINE};{GENERATE_LINE}", f"{GENERATE_LINE}\nfield-team embed {'1' * 64}"],
)  # fmt: skip
def test_lines_that_are_no_keys_are_refused_without_repeating_them(text):
    with pytest.raises(ConfigError) as refusal:
        parse_keys(text, "there")
    assert GENERATE not in str(refusal.value)


def test_keys_come_from_the_environment_or_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(GENERATE_LINE)
    assert configured_keys({}) == ""
    both = {"MM_API_KEYS": f"{GENERATE_LINE};{METRICS_LINE}"}
    assert parse_keys(configured_keys(both), "") == KEYS
    assert len(parse_keys(configured_keys({"MM_API_KEYS_FILE": str(file)}), "")) == 1
    assert configured_keys({}) == configured_keys({"MM_API_KEYS": "# none"}) == ""
    file.write_text("# none\n")
    for wrong in (
        {"MM_API_KEYS_FILE": str(file)},
        {"MM_API_KEYS_FILE": str(tmp_path / "absent")},
        {"MM_API_KEYS_FILE": str(file), "MM_API_KEYS": GENERATE_LINE},
    ):
        with pytest.raises(ConfigError):
            configured_keys(wrong)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_on_this_machine_alone_no_key_is_needed(host):
    check_exposure(host, {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "endpoint.example", ""])
def test_elsewhere_a_key_is_needed(host):
    check_exposure(host, KEYS)
    with pytest.raises(ConfigError, match="mm key new"):
        check_exposure(host, {})


def test_what_had_keys_is_not_opened_by_a_shell_that_names_none(tmp_path):
    records = [tmp_path / "one.json", tmp_path / "two.json"]
    for locked in ([], records):
        check_kept(locked, KEYS)
    check_kept([], {})
    with pytest.raises(ConfigError, match=r"one\.json.*two\.json.*MM_API_KEYS_FILE.*mm down"):
        check_kept(records, {})


def test_mm_key_new_writes_what_the_endpoint_reads(tmp_path):
    file = tmp_path / "keys"
    for name, scopes in (("one", "generate"), ("two", "embed,metrics")):
        done = CliRunner().invoke(
            cli.app, ["key", "new", name, "--scopes", scopes, "--file", str(file)]
        )
        assert done.exit_code == 0, done.output
        key = done.output.split()[-1]
        assert key.startswith("mm_")
        assert key not in file.read_text()
    keys = parse_keys(configured_keys({"MM_API_KEYS_FILE": str(file)}), "")
    assert [key.name for key in keys.values()] == ["one", "two"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = CliRunner().invoke(cli.app, ["key", "new", "one", "--file", str(file)])
    assert isinstance(again.exception, ConfigError)
    wrong = CliRunner().invoke(cli.app, ["key", "new", "x", "--scopes", "root"])
    assert isinstance(wrong.exception, ConfigError)


def test_tls_files_are_both_there_or_neither(tmp_path, monkeypatch):
    assert environment.endpoint_tls() == {}
    monkeypatch.delenv("MM_ENDPOINT_URL", raising=False)
    assert environment.endpoint_url().startswith("http://127.0.0.1:")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    monkeypatch.setenv("MM_ENDPOINT_TLS_CERT", str(certificate))
    certificate.touch()
    with pytest.raises(ConfigError, match="got nothing"):
        environment.endpoint_tls()
    monkeypatch.setenv("MM_ENDPOINT_TLS_KEY", str(key))
    with pytest.raises(ConfigError, match=r"key\.pem"):
        environment.endpoint_tls()
    key.touch()
    found = environment.endpoint_tls()
    assert found == {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    assert set(found) <= set(HTTPOptions.model_fields)
    assert environment.endpoint_url().startswith("https://127.0.0.1:")
