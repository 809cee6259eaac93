"""The model registry: bundles as MLflow model versions, their gate, and the alias that serves.

A version's tags say where it comes from (commit, data, parameters, run), what it reached on which
held-out patches, and the gate's verdict. The alias `champion` is what the endpoint serves; the
alias `previous-champion` is what `rollback` returns to; the alias `challenger` names a version that
is tried beside the champion.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import requests
from mlflow.entities import LifecycleStage
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from mm_model.adapters import environment, mlflow_pyfunc
from mm_model.bundle import load_bundle, load_manifest
from mm_model.config import GateConfig, RegisterConfig, read_yaml
from mm_model.errors import BundleError, GateError, RegistryError
from mm_model.evaluation.card import model_card

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous-champion", "challenger"
VERDICT, REASONS = "gate.verdict", "gate.reasons"
PASSED, FAILED = "passed", "failed"
# The gate looks at the mean of the samples: a single sample's figures are the worse, the more the
# samples differ, and they should differ where the observed leaves it open.
PSNR, MIOU = "mean_psnr_of_mean_db", "mean_miou_of_mean"
_FIGURE = "metrics."  # tags of a version's summary figures begin with this
_MODALITIES = "modalities"
_CARD = "model_card.md"  # artefact of the run
_LONGEST = 5000  # characters of a description in MLflow's database
_CUT = f"\n\n… the whole card is `{_CARD}` of the run."


@dataclass(frozen=True)
class Champion:
    """The version that the alias `champion`, or `challenger`, names.

    Attributes:
        run_id: the MLflow run it was logged in.
    """

    version: int
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Verdict:
    """What the gate found: one reason a check, whether or not it was passed."""

    passed: bool
    reasons: tuple[str, ...]


def collect_lineage(folder: Path, flow_run_id: str = "") -> dict[str, str]:
    """Tags that say where the artefacts of a pipeline folder come from.

    Args:
        folder: holds params.yaml and, once DVC has run there, dvc.lock.
        flow_run_id: the Prefect flow run that asks, if one does.
    """
    params = folder / "params.yaml"
    lineage = {
        "git_commit": _git("rev-parse", "HEAD", folder=folder),
        "git_dirty": str(
            bool(_git("status", "--porcelain", "--untracked-files=no", folder=folder))
        ).lower(),
        "params_sha256": sha256(params.read_bytes()).hexdigest(),
        "data_source": str(read_yaml(params)["prepare"]["source"]),
        "flow_run_id": flow_run_id,
    }
    if (folder / "dvc.lock").exists():
        for stage, record in sorted(read_yaml(folder / "dvc.lock").get("stages", {}).items()):
            for out in record.get("outs", ()):
                lineage[f"dvc.{stage}.{Path(out['path']).name}"] = out.get("md5", "")
    return {key: value for key, value in lineage.items() if value}


def register(
    bundle_dir: Path,
    reports_dir: Path,
    config: RegisterConfig,
    *,
    run_id: str | None,
    lineage: Mapping[str, str],
) -> int:
    """Register an evaluated bundle, with its report, as a version of the model.

    Args:
        bundle_dir: what the stage train wrote.
        reports_dir: what the stage evaluate wrote.
        config: names the registered model.
        run_id: the MLflow run that trained it; None, or one that this MLflow does not have, makes a
            run of its own.
        lineage: further tags, as `collect_lineage` makes them.

    Returns:
        The new version, or the one that this bundle already is.

    Raises:
        RegistryError: the report is of another bundle, or MLflow refuses or is away.
    """
    bundle = load_bundle(bundle_dir)
    metrics = read_metrics(reports_dir)
    bundle_id = bundle.manifest.bundle_id
    if metrics["bundle_id"] != bundle_id:
        raise RegistryError(
            f"{reports_dir} reports on another bundle than {bundle_dir}",
            got=metrics["bundle_id"],
            allowed=bundle_id,
            remedy="evaluate this bundle first",
        )
    with connected() as client:
        _ensure_model(client, config.model)
        figures = {k: v for k, v in metrics.items() if isinstance(v, int | float | None)}
        judged = {
            "held_out": str(metrics["held_out"]),
            **{_FIGURE + k: "nan" if v is None else f"{v:.6g}" for k, v in figures.items()},
        }
        for known in client.search_model_versions(f"name='{config.model}'"):
            if known.tags.get("bundle_id") == bundle_id:
                # The same weights may have been evaluated anew, otherwise than before.
                for key, value in judged.items():
                    if known.tags.get(key) != value:
                        client.set_model_version_tag(config.model, known.version, key, value)
                return int(known.version)
        if run_id is None or not _is_active(client, run_id):
            run_id = client.create_run(experiment(client, config.model)).info.run_id
        with mlflow.start_run(run_id) as run:
            mlflow.log_artifacts(str(reports_dir), "reports")
            known = {f"test_{k}": float(v) for k, v in figures.items() if v is not None}
            mlflow.log_metrics(known)
            example = mlflow_pyfunc.input_example(reports_dir / "example.json")
            logged = mlflow.pyfunc.log_model(
                name="bundle",
                python_model=mlflow_pyfunc.__file__,
                artifacts={"bundle": str(bundle_dir)},
                signature=mlflow_pyfunc.signature(bundle.manifest.modalities),
                input_example=example,
                pip_requirements=_requirements(),
                metadata={"bundle_id": bundle_id},
            )
            card = model_card(bundle.manifest, bundle.model.modalities, metrics, lineage)
            mlflow.log_text(card, _CARD)
            tags = {
                **lineage,
                "bundle_id": bundle_id,
                "weights_sha256": bundle.manifest.weights_sha256,
                "run_id": run.info.run_id,
                _MODALITIES: ", ".join(m.name for m in bundle.manifest.modalities),
                **judged,
            }
            created = client.create_model_version(
                config.model,
                logged.model_uri,
                run.info.run_id,
                tags=tags,
                description=card if len(card) <= _LONGEST else card[: _LONGEST - len(_CUT)] + _CUT,
                model_id=logged.model_id,
            )
    return int(created.version)


def gate(
    model: str,
    version: int,
    config: GateConfig,
    *,
    evaluate_champion: Callable[[Path], Mapping[str, Any]],
) -> Verdict:
    """Judge a version by its figures, against the champion, and by loading it; write the verdict.

    Args:
        model: registered model's name.
        version: the candidate.
        config: thresholds.
        evaluate_champion: evaluates the bundle in a folder on the held-out patches of the candidate
            and returns the content of its metrics.json; called only if the champion was evaluated
            on others.
    """
    with connected() as client:
        candidate = _version(client, model, version)
        checks = _thresholds(candidate.tags, config)
        current = champion(model)
        if current is not None and current.version != version:
            checks += _comparison(model, candidate, current, config, evaluate_champion)
        checks.append(_loads(model, version))
        verdict = Verdict(all(ok for ok, _ in checks), tuple(reason for _, reason in checks))
        client.set_model_version_tag(model, str(version), REASONS, "; ".join(verdict.reasons))
        # The verdict last: a gate that was killed half-way has not judged.
        client.set_model_version_tag(
            model, str(version), VERDICT, PASSED if verdict.passed else FAILED
        )
    return verdict


def promote(model: str, version: int) -> None:
    """Make a version that passed its gate the champion; the present one becomes the previous.

    Raises:
        GateError: the version did not pass.
        RegistryError: there is no such version, or MLflow is away.
    """
    with connected() as client:
        _require_passed(client, model, version)
        current = champion(model)
        if current is not None and current.version == version:
            return
        # One that was made champion by hand and has not passed was never served.
        if current is not None and current.tags.get(VERDICT) == PASSED:
            client.set_registered_model_alias(model, PREVIOUS, str(current.version))
        client.set_registered_model_alias(model, CHAMPION, str(version))
        if _aliases(client, model).get(CHALLENGER) == str(version):  # it has won
            client.delete_registered_model_alias(model, CHALLENGER)


def challenge(model: str, version: int | None) -> None:
    """Make a version that passed its gate the challenger; None: there is none any more.

    Raises:
        GateError: the version did not pass.
        RegistryError: there is no such version, it is the champion, or MLflow is away.
    """
    with connected() as client:
        if version is None:
            client.delete_registered_model_alias(model, CHALLENGER)
            return
        _require_passed(client, model, version)
        if _aliases(client, model).get(CHAMPION) == str(version):
            raise RegistryError(
                f"version {version} of {model} is champion", remedy="name another version"
            )
        client.set_registered_model_alias(model, CHALLENGER, str(version))


def rollback(model: str) -> int:
    """Make the previous champion the champion again; returns its version.

    Raises:
        GateError: its verdict is no longer that it passed.
        RegistryError: there is no previous champion, or MLflow is away.
    """
    with connected() as client:
        previous = _aliases(client, model).get(PREVIOUS)
        if previous is None:
            raise RegistryError(
                f"{model} has no previous champion",
                remedy="promote a version by its number instead",
            )
        if previous == _aliases(client, model).get(CHAMPION):
            # Somebody has moved the alias by hand, to where this would bring it.
            raise RegistryError(
                f"version {previous} of {model} is champion already",
                remedy="promote a version by its number instead",
            )
        _require_passed(client, model, int(previous))
        client.set_registered_model_alias(model, CHAMPION, previous)
        # One step back, not two: a second rollback must not bring back what was rolled back.
        client.delete_registered_model_alias(model, PREVIOUS)
    return int(previous)


def champion(model: str) -> Champion | None:
    """The version that the alias names now; None if no version is champion."""
    return _named(model, CHAMPION)


def challenger(model: str) -> Champion | None:
    """The version to try beside the champion; None if there is none, or it is the champion."""
    return _named(model, CHALLENGER)


def _named(model: str, alias: str) -> Champion | None:
    with connected() as client:
        aliases = _aliases(client, model)
        number = aliases.get(alias)
        if number is None or (alias == CHALLENGER and number == aliases.get(CHAMPION)):
            return None
        found = _version(client, model, int(number))
        return Champion(int(found.version), found.run_id or "", dict(found.tags))


def fetch_bundle(model: str, version: int, into: Path) -> Path:
    """Download a version's bundle below a folder; returns the bundle's folder.

    Raises:
        RegistryError: there is no such version, what came is not what was registered, or MLflow is
            away.
        BundleError: what came is no bundle.
    """
    with connected() as client:
        expected = _version(client, model, version).tags.get("bundle_id")
        uri = f"models:/{model}/{version}"
        flavor = Model.load(uri).flavors["python_function"]
        path = Path(
            mlflow.artifacts.download_artifacts(
                f"{uri}/{flavor['artifacts']['bundle']['path']}", dst_path=str(into)
            )
        )
    got = load_manifest(path).bundle_id
    if got != expected:
        raise RegistryError(f"bundle of {model} version {version}", got=got, allowed=expected)
    return path


def read_metrics(reports_dir: Path) -> dict[str, Any]:
    """The content of metrics.json; raises RegistryError if there is none."""
    file = reports_dir / "metrics.json"
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise RegistryError(f"{file} cannot be read", got=error, remedy="evaluate first") from error
    return content


@contextmanager
def connected() -> Iterator[mlflow.MlflowClient]:
    """A client of the registry; all that goes wrong with it is a RegistryError."""
    # MLflow's own defaults retry for minutes; models are loaded without pickle or not at all.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    url = environment.mlflow_url()
    try:
        if url.startswith("http"):
            requests.get(f"{url}/health", timeout=10).raise_for_status()
        mlflow.set_tracking_uri(url)
        yield mlflow.MlflowClient(url)
    except requests.RequestException as error:
        raise RegistryError(
            f"MLflow does not answer at {url}", got=error, remedy="start it with `mm up`"
        ) from error
    except MlflowException as error:
        raise RegistryError(
            "MLflow refused", got=error.message, remedy="look at var/log/mlflow.log"
        ) from error


def _ensure_model(client: mlflow.MlflowClient, model: str) -> None:
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def experiment(client: mlflow.MlflowClient, model: str) -> str:
    """The id of the model's experiment, which bears its name."""
    found = client.get_experiment_by_name(model)
    return str(found.experiment_id if found else client.create_experiment(model))


def _is_active(client: mlflow.MlflowClient, run_id: str) -> bool:
    """Whether a run is there: what was trained may outlive the database it was logged in."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _version(client: mlflow.MlflowClient, model: str, version: int) -> ModelVersion:
    return client.get_model_version(model, str(version))


def _require_passed(client: mlflow.MlflowClient, model: str, version: int) -> None:
    tags = _version(client, model, version).tags
    if tags.get(VERDICT) != PASSED:
        raise GateError(
            f"version {version} of {model} has not passed its gate",
            got=tags.get(REASONS, "no verdict"),
            remedy="run the gate on it, or promote one that passed",
        )


def _aliases(client: mlflow.MlflowClient, model: str) -> dict[str, str]:
    try:
        # Versions are int from a database and str over HTTP.
        aliases = client.get_registered_model(model).aliases
        return {alias: str(version) for alias, version in aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


Check = tuple[bool, str]


def _figure(tags: Mapping[str, str], name: str) -> float | None:
    """A summary figure; None if the model has no modality that it could be of."""
    text = tags.get(_FIGURE + name)
    return None if text is None else float(text)


def _thresholds(tags: Mapping[str, str], config: GateConfig) -> list[Check]:
    checks = []
    for name, least in (
        (PSNR, config.min_mean_psnr_db),
        (MIOU, config.min_mean_miou),
    ):
        value = _figure(tags, name)
        if value is not None:
            # What no held-out patch could tell is NaN, and is not enough.
            checks.append((value >= least, f"{name} {value:.4g}, at least {least:g} wanted"))
    return checks


def _comparison(
    model: str,
    candidate: ModelVersion,
    current: Champion,
    config: GateConfig,
    evaluate_champion: Callable[[Path], Mapping[str, Any]],
) -> list[Check]:
    """The candidate's figures beside the champion's, on the same held-out patches.

    Means over other modalities say nothing about each other: then it is said, and not compared.
    """
    held_out = candidate.tags["held_out"]
    knows, knew = candidate.tags.get(_MODALITIES), current.tags.get(_MODALITIES)
    if knows and knew and knows != knew:
        text = f"champion (version {current.version}) knows other modalities ({knew})"
        return [(True, f"{text}: not compared, judged by thresholds alone")]
    if current.tags.get("held_out") == held_out:
        tagged = {k: _figure(current.tags, k) for k in (PSNR, MIOU)}
        figures = {k: v for k, v in tagged.items() if v is not None}
    else:
        try:
            with TemporaryDirectory() as folder:
                measured = evaluate_champion(fetch_bundle(model, current.version, Path(folder)))
        except (BundleError, KeyError) as error:
            # Of a format that this code no longer knows: no successor could ever be compared.
            text = f"champion (version {current.version}) cannot be loaded: {error}"
            return [(True, f"{text}: judged by thresholds alone")]
        if measured["held_out"] != held_out:
            raise RegistryError(
                "the champion was evaluated on other patches than the candidate",
                got=measured["held_out"],
                allowed=held_out,
                remedy="evaluate the candidate again",
            )
        figures = {k: measured[k] for k in (PSNR, MIOU) if k in measured}
    checks = []
    for name, drop in (
        (PSNR, config.max_psnr_drop_db),
        (MIOU, config.max_miou_drop),
    ):
        mine, theirs = _figure(candidate.tags, name), figures.get(name)
        if mine is not None and theirs is not None and not math.isnan(theirs):
            text = f"{name} {mine:.4g}, champion (version {current.version}) {theirs:.4g}"
            checks.append((mine >= theirs - drop, f"{text}, a drop of {drop:g} allowed"))
    return checks


def _loads(model: str, version: int) -> Check:
    """Whether the version, as it lies in the registry, loads and answers its own example."""
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{model}/{version}")
        loaded.predict(loaded.input_example, params={"steps": 1})
    except Exception as error:  # a broken bundle can break in any way
        return False, f"does not load from the registry: {error}"
    return True, "loads from the registry and answers its example"


def _requirements() -> list[str]:
    """What loading a version needs; this package itself included."""
    names = ("torch", "numpy", "pandas", "pydantic", "pyyaml", "safetensors", "rasterio", "mlflow")
    return [f"{name}=={installed(name)}" for name in (*names, "mm-model")]


def _git(*arguments: str, folder: Path) -> str:
    """What git says, or nothing outside a repository (an unpacked archive has no commit)."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
