"""What Ray Serve is told of the endpoint, by its own schema; it runs in tests/integration."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from serving_fixtures import serve_config

from mm_model.adapters.ray_serve import application
from mm_model.config import ServeConfig, parse
from mm_model.errors import ConfigError


def deployment(**changes):
    return application(serve_config(**changes), "m")._bound_deployment


def test_there_are_as_many_replicas_as_declared_or_more_with_the_load():
    fixed = deployment(replicas=2)
    assert fixed.num_replicas == 2
    assert fixed._deployment_config.autoscaling_config is None
    growing = deployment(replicas=2, max_replicas=5, max_batch=4)._deployment_config
    scale = growing.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas) == (2, 5)
    assert scale.target_ongoing_requests == 8
    with pytest.raises(ConfigError, match="max_replicas"):
        parse(ServeConfig, {**serve_config().model_dump(), "replicas": 3, "max_replicas": 2}, "x")


def test_what_runs_may_end_and_what_comes_is_bounded():
    config = deployment(deadline_s=77, max_queued=10)._deployment_config
    assert config.graceful_shutdown_timeout_s == 77
    assert config.max_ongoing_requests < 100
    assert config.max_queued_requests < 100
    assert config.max_surge_percent == 100
    assert config.logging_config["encoding"] == "JSON"
