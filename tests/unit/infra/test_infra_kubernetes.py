"""Kubernetes objects against their schemas, offline.

Core objects, and the pod templates inside KubeRay's, are checked by kubernetes-validate. The schema
of KubeRay's own resources (1 MB of generated YAML) is not vendored: the models below are written by
hand after its API reference, hold only the fields that are in use here, and forbid every other one.
What they cannot know is whether a field was renamed in a later KubeRay: they follow 1.6.
"""

# ruff: noqa: N815  (the fields are named as Kubernetes names them)
from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

BASE = Path(__file__).parents[3] / "infra/k8s/base"
CORE = ["namespace.yaml", "environment.yaml", "project-volume.yaml", "network-policies.yaml"]
Count = Annotated[int, Field(strict=True, ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(Strict):
    name: str


class AuthOptions(Strict):
    mode: Literal["token", "disabled"]
    secretName: str


class HeadGroup(Strict):
    rayStartParams: dict[str, Annotated[str, Field(strict=True)]]
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: Count
    minReplicas: Count
    maxReplicas: Count


class RayCluster(Strict):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Strict):
    entrypoint: str
    runtimeEnvYAML: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    submitterPodTemplate: dict[str, Any]
    backoffLimit: Count
    activeDeadlineSeconds: Count
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    rayClusterSpec: RayCluster


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Strict):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy
    rayClusterDeletionDelaySeconds: Count
    excludeHeadPodFromServeSvc: bool
    rayClusterConfig: RayCluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((BASE / name).read_text()))


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def pod(template: dict[str, Any]) -> dict[str, Any]:
    assert set(template) <= {"metadata", "spec"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod", **template.get("metadata", {})},
        "spec": template["spec"],
    }


def job() -> RayJob:
    return RayJob.model_validate(documents("rayjob-train.yaml")[0])


def service() -> RayService:
    return RayService.model_validate(documents("rayservice-endpoint.yaml")[0])


def pods() -> list[dict[str, Any]]:
    clusters = [job().spec.rayClusterSpec, service().spec.rayClusterConfig]
    return [
        pod(job().spec.submitterPodTemplate),
        *(pod(g.template) for c in clusters for g in [c.headGroupSpec, *c.workerGroupSpecs]),
    ]


def test_kustomization_lists_every_file_and_only_those() -> None:
    listed = documents("kustomization.yaml")[0]["resources"]
    assert sorted(listed) == sorted(
        p.name for p in BASE.glob("*.yaml") if p.name != "kustomization.yaml"
    )


@pytest.mark.parametrize("name", CORE)
def test_core_objects(name: str) -> None:
    for document in documents(name):
        validate(document)


def test_pods_of_both_ray_clusters() -> None:
    assert len(pods()) == 5
    for document in pods():
        validate(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "containers", 0, "imagge"), "x"),
        (("spec", "containers", 0, "ports"), "8000"),
        (("spec", "volumes", 0, "emptyDir"), []),
    ],
)
def test_a_typo_in_a_pod_is_seen(path: tuple[str | int, ...], value: object) -> None:
    document: Any = copy.deepcopy(pods()[1])
    *parents, last = path
    node = document
    for key in parents:
        node = node[key]
    node[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backofLimit"), 1),
        (("spec", "backoffLimit"), "one"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replica"), 2),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_a_typo_in_a_ray_resource_is_seen(path: tuple[str | int, ...], value: object) -> None:
    document: Any = documents("rayjob-train.yaml")[0]
    *parents, last = path
    node = document
    for key in parents:
        node = node[key]
    node[last] = value
    with pytest.raises(ValidationError):
        RayJob.model_validate(document)


def test_pods_run_restricted_and_within_limits() -> None:
    for document in pods():
        spec = document["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}


def test_secrets_are_only_referred_to() -> None:
    kinds = {d["kind"] for path in BASE.glob("*.yaml") for d in documents(path.name)}
    assert "Secret" not in kinds
    for document in pods():
        for container in document["spec"]["containers"]:
            assert all("valueFrom" in variable for variable in container.get("env", []))
    assert job().spec.rayClusterSpec.authOptions.mode == "token"
    assert service().spec.rayClusterConfig.authOptions.mode == "token"


def test_nothing_is_open_by_default() -> None:
    deny = documents("network-policies.yaml")[0]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_references_between_the_objects_hold() -> None:
    named = {(d["kind"], d["metadata"]["name"]) for f in CORE for d in documents(f)}
    for document in pods():
        assert ("ServiceAccount", document["spec"]["serviceAccountName"]) in named
        for volume in document["spec"].get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in named
        for container in document["spec"]["containers"]:
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in named


def test_ray_version_is_the_tested_one() -> None:
    import ray

    assert job().spec.rayClusterSpec.rayVersion == ray.__version__
    assert service().spec.rayClusterConfig.rayVersion == ray.__version__


def unknown_keys(data: Any, parsed: Any, where: str = "") -> list[str]:
    """Keys of `data` that the parsed model dropped: Serve accepts misspelt ones in silence."""
    if isinstance(data, dict) and isinstance(parsed, dict):
        return [
            fault
            for key, value in data.items()
            for fault in (
                unknown_keys(value, parsed[key], f"{where}.{key}")
                if key in parsed
                else [f"{where}.{key}"]
            )
        ]
    if isinstance(data, list) and isinstance(parsed, list):
        pairs = zip(data, parsed, strict=True)
        return [f for i, (d, p) in enumerate(pairs) for f in unknown_keys(d, p, f"{where}[{i}]")]
    return []


def serve_faults(config: Any) -> list[str]:
    from ray.serve.schema import ServeDeploySchema

    return unknown_keys(config, ServeDeploySchema.model_validate(config).model_dump())


def test_serve_config() -> None:
    config = yaml.safe_load(service().spec.serveConfigV2)
    assert serve_faults(config) == []
    config["http_optionz"] = {}
    config["applications"][0]["import_pth"] = "x"
    assert sorted(serve_faults(config)) == [".applications[0].import_pth", ".http_optionz"]


def test_the_serve_application_is_importable_and_a_builder() -> None:
    import importlib

    config = yaml.safe_load(service().spec.serveConfigV2)
    module, _, name = config["applications"][0]["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
