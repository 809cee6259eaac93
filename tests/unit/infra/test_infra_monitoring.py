"""Prometheus and Grafana files: they parse, and every metric and job that they name exists."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mm_model.serving.metrics import Metrics

MONITORING = Path(__file__).parents[3] / "infra/monitoring"
DASHBOARD = MONITORING / "grafana/dashboards/endpoint.json"
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "gauge": ("",),
}


@cache
def own_metrics() -> frozenset[str]:
    """Sample names that the endpoint's /metrics can show."""
    source: Any = SimpleNamespace(served=None, refused={}, registry_error=None)
    families = text_string_to_metric_families(Metrics().page(source).decode())
    return frozenset(f.name + s for f in families for s in SUFFIXES.get(f.type, ()))


@cache
def ray_metrics() -> frozenset[str]:
    """Names that Ray itself declares (Serve) or draws in its own dashboards (nodes)."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    ray = Path(str(spec.origin)).parent
    names: set[str] = set()
    for path in (ray / "serve/_private").rglob("*.py"):
        declared = re.findall(r"\"(serve_[a-z_]+)\"", path.read_text())
        names |= {f"ray_{name}" for name in declared}
        names |= {f"ray_{name}_total" for name in declared if name.endswith("counter")}
    for path in (ray / "dashboard/modules/metrics/dashboards").glob("*_panels.py"):
        names |= set(re.findall(r"\bray_node_[a-z_]+\b", path.read_text()))
    return frozenset(names)


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for path in (MONITORING / "rules").glob("*.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    assert isinstance(found, list)
    return found


def expressions() -> list[str]:
    return [r["expr"] for r in rules()] + [t["expr"] for p in panels() for t in p["targets"]]


def faults(expression: str) -> list[str]:
    """What is wrong with a query: its syntax, or names of metrics that nobody exports."""
    try:
        promql_parser.parse(expression)
    except ValueError as error:
        return [str(error)]
    named = set(re.findall(r"\b(?:mm|ray)_[a-z_]+\b", expression))
    return sorted(named - own_metrics() - ray_metrics())


def test_there_is_something_to_check() -> None:
    assert len(own_metrics()) >= 10
    assert len(expressions()) >= 15


@pytest.mark.parametrize("expression", expressions())
def test_queries(expression: str) -> None:
    assert faults(expression) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(mm_requests_total[5m])",
        "rate(mm_generate_request_total[5m])",
        "ray_serve_deployment_replica_health",
    ],
)
def test_a_wrong_query_is_seen(wrong: str) -> None:
    assert faults(wrong)


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "remedy"}, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule["alert"]
        assert re.fullmatch(r"\d+[smh]", rule["for"]), rule["alert"]


def test_scraped_targets_are_services_of_the_compose_file() -> None:
    compose = MONITORING.parent / "compose/compose.yaml"
    services = yaml.safe_load(compose.read_text())["services"]
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    for job in config["scrape_configs"]:
        for group in job["static_configs"]:
            for target in group["targets"]:
                assert target.split(":")[0] in services, target
    for expression in expressions():
        assert set(re.findall(r'job="([^"]+)"', expression)) <= jobs, expression
    mounted = [v.split(":")[1] for v in services["prometheus"]["volumes"]]
    for pattern in config["rule_files"]:
        assert str(Path(pattern).parent) in mounted


def test_dashboard_draws_every_panel_from_the_provisioned_source() -> None:
    provisioned = MONITORING / "grafana/provisioning/datasources/prometheus.yml"
    source = yaml.safe_load(provisioned.read_text())["datasources"][0]
    assert len({p["id"] for p in panels()}) == len(panels())
    for panel in panels():
        assert panel["title"], panel["id"]
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for drawn in [panel, *panel["targets"]]:
            assert drawn["datasource"] == {"type": source["type"], "uid": source["uid"]}
    places = [p["gridPos"] for p in panels()]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/mm.yml").read_text())[
        "providers"
    ][0]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
