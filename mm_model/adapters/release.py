"""From a trained pipeline folder to a version that answers over HTTP: the steps of a release."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from mm_model.adapters import mlflow_registry
from mm_model.adapters.mlflow_registry import Verdict
from mm_model.adapters.mlflow_reporter import flush_backlog
from mm_model.api import MIN_SIDE_PX, ModelInfo
from mm_model.bundle import load_bundle
from mm_model.config import load_params
from mm_model.data.split import TEST, load_split
from mm_model.data.store import PatchStore
from mm_model.errors import ServiceError
from mm_model.evaluation.evaluate import evaluate

# A refusal of before its gate passed stands until the endpoint looks at the alias again.
_FOLLOWS_S = 30.0


@dataclass(frozen=True)
class Candidate:
    """A registered version and what the gate found."""

    model: str
    version: int
    verdict: Verdict


def register_and_gate(folder: Path, flow_run_id: str = "") -> Candidate:
    """Register the evaluated bundle of a pipeline folder and put it through the gate.

    Args:
        folder: holds params.yaml, models/ and reports/.
        flow_run_id: the Prefect flow run that asks, for the version's lineage.
    """
    params = load_params(folder / "params.yaml")
    register = params.register_

    def evaluate_champion(bundle_dir: Path) -> Mapping[str, Any]:
        store = PatchStore(folder / "data/patches")
        held_out = load_split(folder / "data/splits.parquet", store.patch_ids)[TEST]
        return evaluate(load_bundle(bundle_dir), store, held_out, params.evaluate).metrics

    trained = json.loads((folder / "models/train.json").read_text())
    version = mlflow_registry.register(
        folder / "models/bundle",
        folder / "reports",
        register,
        # What was logged while MLflow was away comes first: the version points at that run.
        run_id=flush_backlog(Path(trained["run_dir"])) or trained["run_id"],
        lineage=mlflow_registry.collect_lineage(folder, flow_run_id),
    )
    verdict = mlflow_registry.gate(
        register.model, version, register.gate, evaluate_champion=evaluate_champion
    )
    return Candidate(register.model, version, verdict)


def wait_until_served(url: str, model: str, version: int, within_s: float) -> tuple[str, ...]:
    """Wait until the endpoint at a URL is ready and serves just this version.

    Returns:
        The modalities that the version knows.

    Raises:
        ServiceError: it refused the version, or does not serve it in time.
    """
    deadline = time.monotonic() + within_s
    seen = "no answer"
    refused_at: float | None = None
    while time.monotonic() < deadline:
        try:
            info = ModelInfo.model_validate(_get(f"{url}/v1/model").json())
            serving = info.serving
            seen = f"{serving.name} version {serving.version}" if serving else "no model yet"
            if serving and (serving.name, serving.version) == (model, str(version)):
                _get(f"{url}/readyz")
                return info.modalities
            for refusal in info.refused:
                if refusal.version != str(version):
                    continue
                refused_at = refused_at or time.monotonic()
                if time.monotonic() - refused_at > _FOLLOWS_S:
                    raise ServiceError(
                        f"the endpoint refused version {version} of {model}",
                        got=refusal.reason,
                        remedy="it still serves the one before; mend the version and promote again",
                    )
        except (httpx.HTTPError, ValidationError) as error:
            seen = str(error).splitlines()[0]
        time.sleep(0.5)
    raise ServiceError(
        f"{url} does not serve version {version} of {model} after {within_s:.0f} s",
        got=seen,
        remedy="look at `mm status`, at var/log/endpoint.log and into Ray's dashboard",
    )


def ask_endpoint(url: str, target: str) -> str:
    """One small request, from nothing to one modality; returns what answered.

    Raises:
        ServiceError: the endpoint does not answer with an image.
    """
    side = str(max(MIN_SIDE_PX, 32))
    form = {"target": target, "width": side, "height": side, "seed": "0", "steps": "1"}
    try:
        answer = httpx.post(
            f"{url}/v1/generate",
            files={name: (None, value) for name, value in form.items()},
            timeout=120,
        )
    except httpx.HTTPError as error:
        raise ServiceError(f"{url} does not answer", got=error) from error
    if answer.status_code != 200:
        raise ServiceError(
            f"the endpoint answers {answer.status_code} to a request for {target}",
            got=answer.text[:300],
            remedy="look at var/log/endpoint.log",
        )
    return f"{len(answer.content)} bytes by version {answer.headers['X-Model-Version']}"


def _get(url: str) -> httpx.Response:
    answer = httpx.get(url, timeout=10)
    answer.raise_for_status()
    return answer
