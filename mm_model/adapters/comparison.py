"""Champion and challenger side by side, as figures of a run in MLflow.

Each pair of versions has one run in the model's experiment. Its metrics are sums over all replicas
since the challenger came, and what follows from them; whichever replica writes goes on with them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

import mlflow
from mlflow.entities import Metric

from mm_model.adapters import mlflow_registry
from mm_model.modalities import MODALITIES
from mm_model.serving.metrics import Snapshot

RUN_TAG = "challenger.run_id"
"""Tag of a version that is or was challenger: the run that compares it."""

_PAIR = "mm.versions"  # tag of a run: champion and challenger


class Comparison:
    """Brings what replicas have counted to MLflow.

    Args:
        model: registered model's name, which its experiment bears.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._pair: tuple[str, str] | None = None
        self._seen: dict[str, dict[str, float]] = {}

    def take(
        self, champion: str, challenger: str, replicas: Mapping[str, Snapshot]
    ) -> dict[str, float]:
        """What was counted since the last call; nothing at the first of a pair of versions."""
        counts = {name: _counts(s, champion, challenger) for name, s in replicas.items()}
        is_new, seen = self._pair != (champion, challenger), self._seen
        self._pair, self._seen = (champion, challenger), counts
        fresh: defaultdict[str, float] = defaultdict(float)
        if not is_new:
            for name, now in counts.items():
                for figure, number in now.items():
                    fresh[figure] += number - seen.get(name, {}).get(figure, 0.0)
        return dict(fresh)

    def write(self, fresh: Mapping[str, float]) -> str:
        """Add to the pair's figures; returns the id of its run.

        Raises:
            RegistryError: MLflow is away.
        """
        assert self._pair is not None
        with mlflow_registry.connected() as client:
            run = self._run(client, *self._pair)
            known = run.data.metrics
            sums = {k: known.get(k, 0.0) + v for k, v in fresh.items()}
            figures = sums | _means({**known, **sums})
            now_ms = int(time.time() * 1000)
            step = (now_ms - run.info.start_time) // 1000  # seconds
            metrics = [Metric(k, v, now_ms, step) for k, v in sorted(figures.items())]
            client.log_batch(run.info.run_id, metrics)
        return str(run.info.run_id)

    def _run(
        self, client: mlflow.MlflowClient, champion: str, challenger: str
    ) -> mlflow.entities.Run:
        experiment = mlflow_registry.experiment(client, self._model)
        pair = f"{champion},{challenger}"
        found = client.search_runs([experiment], f"tags.`{_PAIR}` = '{pair}'", max_results=1)
        if found:
            return found[0]
        run = client.create_run(
            experiment,
            run_name=f"challenger {challenger} beside champion {champion}",
            tags={_PAIR: pair},
        )
        client.set_model_version_tag(self._model, challenger, RUN_TAG, run.info.run_id)
        # It is written on for as long as both are there, and no process is its own.
        client.set_terminated(run.info.run_id)
        return run


def _counts(snapshot: Snapshot, champion: str, challenger: str) -> dict[str, float]:
    """The sums of a replica that tell of the two versions."""
    roles = {champion: "champion", challenger: "challenger"}
    found: defaultdict[str, float] = defaultdict(float)
    for metric in snapshot:
        for sample in metric.samples:
            labels, name = sample.labels, sample.name
            role = roles.get(labels.get("version", ""))
            if role is None:
                continue
            if name == "mm_requests_total" and labels["operation"] in _BOTH:
                kind = {"4": "refused", "5": "failed"}.get(labels["status"][0], "answered")
                found[f"{role}.{kind}"] += sample.value
            elif name == "mm_request_seconds_sum" and labels["operation"] in _BOTH:
                found[f"{role}.seconds"] += sample.value
            elif name == "mm_challenger_requests_total":
                found[f"outcomes.{labels['outcome']}"] += sample.value
            elif name == "mm_shadow_seconds_sum":
                found["shadow.seconds"] += sample.value
            elif name.startswith("mm_shadow_difference_") and name.endswith(("sum", "count")):
                found[f"shadow.{labels['modality']}.{name.rpartition('_')[2]}"] += sample.value
    return found


_BOTH = ("generate", "fill")  # operations that a challenger takes part in


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for role in ("champion", "challenger"):
        requests = sum(sums.get(f"{role}.{k}", 0) for k in ("answered", "refused", "failed"))
        if requests:
            found[f"{role}.mean_s"] = sums.get(f"{role}.seconds", 0) / requests
    compared = max((v for k, v in sums.items() if k.endswith(".count")), default=0)
    if compared:
        found["shadow.mean_s"] = sums.get("shadow.seconds", 0) / compared
    for modality in MODALITIES.values():
        count = sums.get(f"shadow.{modality.name}.count", 0)
        if count:
            what = "differing_share" if modality.is_categorical else "difference_" + modality.unit
            mean = sums[f"shadow.{modality.name}.sum"] / count
            found[f"shadow.{modality.name}.{what}"] = mean
    return found
