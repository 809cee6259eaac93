"""Prometheus and Grafana files: they parse, and every metric and job that they name exists."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from serving_fixtures import ask, form, geotiff, make_source, serve_config

from mm_model.api import ModelIdentity
from mm_model.data.drift import MOST_DISTANCE
from mm_model.serving.app import build_app
from mm_model.serving.batching import Served
from mm_model.serving.drift import LEAST_LAYERS
from mm_model.serving.jobs.routes import JobsPlace
from mm_model.serving.metrics import FAULTS, Metrics

MONITORING = Path(__file__).parents[3] / "infra/monitoring"
DASHBOARD = MONITORING / "grafana/dashboards/endpoint.json"
OF_THE_SCRAPE = frozenset({"job", "instance"})


@cache
def own_metrics() -> Mapping[str, frozenset[str]]:
    """Samples that an endpoint in use shows → their labels, those of a scrape among them."""
    source, counted = make_source(max_side_px=64), Metrics()
    other = ModelIdentity(name="mm-test", version="4")
    source = replace(source, challenger=Served(source.served.generator, other))

    async def gather() -> Mapping[str, Any]:
        return {"one": counted.snapshot(source)}

    config = serve_config(challenger={"mode": "shadow", "share": 1.0})
    with tempfile.TemporaryDirectory() as folder:
        jobs = JobsPlace(Path(folder), "", "mm-test")
        app = build_app(source, config, jobs=jobs, counted=counted, gather=gather)
        found = _samples_in_use(app)
        asyncio.run(_closed(app))
    return {name: OF_THE_SCRAPE | labels for name, labels in found.items()}


async def _closed(app: FastAPI) -> None:
    """Ends its threads: a process that ends while one of them computes is aborted."""
    async with app.router.lifespan_context(app):
        pass


def _samples_in_use(app: FastAPI) -> Mapping[str, set[str]]:
    request = form({"sar": geotiff("sar")}, target="dem", steps=1)
    job = form({}, None, "/v1/jobs", target="dem", width=32, height=24, steps=1)
    ask(app, job, *[request] * LEAST_LAYERS, form({"sar": b"no"}))
    (page,) = ask(app, ("GET", "/metrics", {}))
    give_up = time.monotonic() + 120
    # They come after the answer.
    while not all(name in page.text for name in ("mm_shadow_difference_sum", "mm_job_seconds_sum")):
        assert time.monotonic() < give_up
        (page,) = ask(app, ("GET", "/metrics", {}))
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


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
    """What is wrong with a query: its syntax, or metrics or labels that nobody exports."""
    try:
        parsed = promql_parser.parse(expression)
    except ValueError as error:
        return [str(error)]
    found = []
    for selector, grouped in selectors(parsed, frozenset()):
        labels = own_metrics().get(selector.name)
        if labels is not None:
            used = {matcher.name for matcher in selector.matchers.matchers} | grouped
            found += [f"{selector.name}: {label}" for label in sorted(used - labels)]
        elif selector.name not in ray_metrics() | {"up"}:
            found.append(selector.name)
    return found


def selectors(node: Any, grouped: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Each selector of series below a node, and the labels that its series are grouped by."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node, grouped
        return
    if isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector, grouped
        return
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        grouped |= set(node.modifier.labels)
    below = [getattr(node, name, None) for name in ("expr", "lhs", "rhs")]
    for child in [*below, *getattr(node, "args", ())]:
        if child is not None:
            yield from selectors(child, grouped)


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
        "sum by (state) (rate(mm_requests_total[5m]))",
        'mm_stage_seconds_count{step="read"} / 2',
    ],
)
def test_a_wrong_query_is_seen(wrong: str) -> None:
    assert faults(wrong)


@pytest.mark.parametrize("expression", expressions())
def test_what_replicas_say_of_themselves_is_one_figure(expression: str) -> None:
    """A replica more or less must not change a line into two."""
    for selector, _ in selectors(promql_parser.parse(expression), frozenset()):
        if selector.name in own_metrics():
            assert re.search(r"\b(sum|min|max|avg|count)\b", expression), expression


def test_every_figure_of_the_endpoint_is_drawn_or_alerts() -> None:
    drawn = " ".join(expressions())
    figures = {re.sub("_(total|bucket|sum|count|created)$", "", name) for name in own_metrics()}
    assert [name for name in sorted(figures) if name.startswith("mm_") and name not in drawn] == []


def test_drift_alerts_where_a_batch_would_be_called_drifted() -> None:
    (rule,) = (rule for rule in rules() if rule["alert"] == "InputDrift")
    assert rule["expr"].endswith(f"> {MOST_DISTANCE}")


def test_operators_are_told_of_every_alert() -> None:
    page = (MONITORING.parents[1] / "docs/alarms.md").read_text()
    told = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert told == [rule["alert"] for rule in rules()]


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


def test_a_first_fault_of_a_job_raises_its_alarm():
    """Prometheus sees no increase in a series that begins with the first event."""
    (rule,) = (r for r in rules() if r["alert"] == "JobsFailing")
    (named,) = re.findall(r'outcome=~"([a-z_|]+)"', rule["expr"])
    assert set(named.split("|")) == set(FAULTS)
    counted = {
        sample.labels["outcome"]: sample.value
        for family in Metrics().snapshot(make_source(max_side_px=64))
        for sample in family.samples
        if sample.name == "mm_job_seconds_count"
    }
    assert counted == dict.fromkeys(FAULTS, 0.0)
