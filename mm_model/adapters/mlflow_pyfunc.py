"""A bundle as an MLflow model: `mlflow.pyfunc.load_model("models:/mm-scene@champion")`.

MLflow copies this file beside the bundle and runs it to load the model (models from code), so that
nothing is pickled. A request is a row of a table with one optional column a modality: nested lists
[bands][H][W] in physical units, NaN (0 for classes) where nothing is known; a cell that is None
means the modality is not observed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

from mm_model.bundle import load_bundle
from mm_model.conditions import RANGES, parse_conditions
from mm_model.errors import LayerError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality
from mm_model.serving.generator import Generator, ObservedLayer, Request


class SceneGenerator(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Answers each row with `samples` rows: all wanted modalities, generated jointly."""

    def load_context(self, context: Any) -> None:
        bundle = load_bundle(Path(context.artifacts["bundle"]))
        self._modalities = {m.name: m for m in bundle.manifest.modalities}
        self._side = bundle.manifest.patch_px
        self._generator = Generator(bundle)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Columns `row` (of the input), `sample`, and one for each generated modality."""
        options = {**_DEFAULTS, **(params or {})}
        requests = [self._request(row, options) for row in model_input.to_dict("records")]
        answers = []
        for index, result in enumerate(self._generator.generate(requests)):
            for sample in range(options["samples"]):
                layers = {name: v[sample].tolist() for name, v in result.values.items()}
                answers.append({"row": index, "sample": sample, **layers})
        return pd.DataFrame(answers)

    def _request(self, row: Mapping[Any, Any], options: Mapping[str, Any]) -> Request:
        observed = {
            name: _layer(cell, self._modalities[name])
            for name, cell in row.items()
            if isinstance(cell, list | np.ndarray)
        }
        blank = None if observed else _grid(self._side, self._side)
        known = {n: str(options[n]) for n in _CONDITIONS if options[n] is not None}
        return Request(
            observed=observed,
            targets=tuple(options["targets"]),
            samples=int(options["samples"]),
            seed=int(options["seed"]),
            steps=int(options["steps"]),
            grid=blank,
            conditions=parse_conditions(known),
        )


# What is known besides: a table tells neither place nor resolution, so that nothing is by default.
_CONDITIONS = {"date": DataType.string, **dict.fromkeys(RANGES, DataType.double)}
_DEFAULTS: Mapping[str, Any] = {
    "targets": [], "samples": 1, "seed": 0, "steps": 8, **dict.fromkeys(_CONDITIONS),
}  # fmt: skip


def signature(modalities: Iterable[Modality]) -> ModelSignature:
    """Optional inputs, since any subset may be observed; options as parameters."""
    columns = [ColSpec(_cell(m), m.name, required=False) for m in modalities]
    numbers = [ColSpec(DataType.long, name) for name in ("row", "sample")]
    params = [
        ParamSpec("targets", DataType.string, [], shape=(-1,)),
        *(ParamSpec(k, DataType.long, _DEFAULTS[k]) for k in ("samples", "seed", "steps")),
        *(ParamSpec(name, kind, None) for name, kind in _CONDITIONS.items()),
    ]
    return ModelSignature(Schema(columns), Schema(numbers + columns), ParamSchema(params))


def input_example(path: Path) -> pd.DataFrame:
    """One row from the file that the evaluation wrote: modality name → nested lists."""
    return pd.DataFrame([json.loads(path.read_bytes())])


def _cell(modality: Modality) -> Array:
    number = DataType.long if modality.is_categorical else DataType.double
    return Array(Array(Array(number)))


def _grid(height: int, width: int) -> Grid:
    """A grid that lies nowhere: a table carries no georeference."""
    return Grid("", (1, 0, 0, 0, -1, 0), height, width)


def _layer(cell: Any, modality: Modality) -> ObservedLayer:
    try:
        values = np.asarray([[list(line) for line in band] for band in cell], modality.dtype)
    except (TypeError, ValueError) as error:
        raise LayerError(
            f"cell {modality.name}", got=error, allowed="nested lists [bands][H][W]"
        ) from error
    known = values != 0 if modality.is_categorical else np.isfinite(values)
    return ObservedLayer(values, known.all(axis=0), _grid(*values.shape[1:]))


mlflow.models.set_model(SceneGenerator())
