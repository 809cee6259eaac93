"""`mm register`, `promote`, `challenge` and `rollback`: where the pipeline is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mm_model.adapters import mlflow_registry, release
from mm_model.config import load_params
from mm_model.errors import GateError


def register_and_promote() -> None:
    """Register the evaluated bundle and judge it; passing makes it the champion.

    Raises:
        GateError: it did not pass; it stays registered, and the champion stays champion.
    """
    candidate = release.register_and_gate(Path.cwd(), "")
    console = Console(soft_wrap=True)
    for reason in candidate.verdict.reasons:
        console.print(f"  {reason}")
    name = f"version {candidate.version} of {candidate.model}"
    if not candidate.verdict.passed:
        raise GateError(f"{name} did not pass its gate", remedy="the reasons stand above")
    mlflow_registry.promote(candidate.model, candidate.version)
    console.print(f"{name} passed its gate and is champion")


def promote(version: int) -> None:
    """Make a version that passed its gate the champion."""
    model = load_params().register_.model
    mlflow_registry.promote(model, version)
    Console(soft_wrap=True).print(f"version {version} of {model} is champion")


def challenge(version: int | None) -> None:
    """Try a version that passed its gate beside the champion, or none any more."""
    model = load_params().register_.model
    mlflow_registry.challenge(model, version)
    said = "has no challenger" if version is None else f"is challenged by version {version}"
    Console(soft_wrap=True).print(f"the champion of {model} {said}")


def rollback() -> None:
    """Make the champion before this one the champion again."""
    model = load_params().register_.model
    version = mlflow_registry.rollback(model)
    Console(soft_wrap=True).print(f"version {version} of {model} is champion again")
