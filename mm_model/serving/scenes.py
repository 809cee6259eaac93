"""Scenes of any size, from files to files: what `Generator` makes, in memory that is bounded by the
rows in progress and not by the scene.

The latent scene is sampled once for the whole (a byte a pixel, so it is kept), then every
target is decoded from it, row of windows by row of windows, and written as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_model.api import ModelIdentity, Provenance, each
from mm_model.codec import Codec
from mm_model.data.circumstances import complete
from mm_model.data.files import needs_room
from mm_model.data.sidecar import sidecar
from mm_model.data.strips import CogWriter, bounded_cache, strips
from mm_model.errors import RequestError
from mm_model.generative.noise import sample_seeds
from mm_model.generative.plan import plan
from mm_model.generative.rows import RowSampler
from mm_model.generative.windows import Frame
from mm_model.modalities import LEVEL_PX
from mm_model.serving.generator import Generator
from mm_model.serving.observed import MadeFiles, ModelRows, ObservedFiles
from mm_model.serving.overlay import Pixels
from mm_model.serving.requests import SceneRequest, check_request
from mm_model.serving.uncertainty import Moments

MAX_SIDE_PX = 1 << 20
"""Greatest side of a scene: what the offsets of its file can count, not what memory can hold."""

GENERATED = "generated"
"""Name of a filled layer's last band: 1 where a pixel was generated, 0 where it was observed."""

Progress = Callable[[int, int], None]
"""Told of windows done, and of all; may raise to cancel."""


def write_scene(
    generator: Generator,
    request: SceneRequest,
    model: ModelIdentity,
    folder: Path,
    progress: Progress | None = None,
) -> list[Path]:
    """Answer a request with cloud-optimised GeoTIFFs in a folder, which is made.

    `<target>.tif`, or `<target>_<k>.tif` for each of several samples, and with `uncertainty`
    `<target>_uncertainty.tif` (see `Moments`). A pixel where no layer knows anything is nodata,
    but in a layer that is filled. A filled layer has one band more, `GENERATED`.

    Returns:
        The paths that were written.

    Raises:
        RequestError: what is wrong with the request; one of the subclasses where there is one.
        StorageError: there is no room for what is generated.
        RasterError: a file cannot be read or written.
    """
    with bounded_cache(), needs_room("what is generated"):
        return _Job(generator, request, model, folder, progress).run()


class _Job:
    def __init__(
        self,
        generator: Generator,
        request: SceneRequest,
        model: ModelIdentity,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self._request, self._folder, self._progress = request, folder, progress
        self._generator, self._codec = generator, generator.model.codec
        self._files = self._observe()
        grid = self._files.grid if self._files else request.grid
        assert grid is not None  # `_observe` refuses a request with neither
        self.grid = grid
        self._names = self._files.names if self._files else ()
        self._conditions = complete(request.conditions, self.grid)
        self._provenance = Provenance(
            model=model.name,
            model_version=model.version,
            run_id=model.run_id,
            observed=self._names,
            estimated_bands=self._files.estimated if self._files else (),
            conditions=self._conditions,
            targets=self._targets,
            samples=request.samples,
            seed=request.seed,
            steps=request.steps,
        )

    def _observe(self) -> ObservedFiles | None:
        """Check the request, by names first, then by headers, then by pixels."""
        asked = self._request
        self._targets = check_request(asked, self._generator)
        if not asked.observed:
            return None
        files = ObservedFiles(asked.observed, self._generator, onto=asked.fill or asked.grid)
        if asked.fill is not None and (missing := files.missing(asked.fill)):
            raise RequestError(
                f"layer {asked.fill}",
                got=f"a file without {', '.join(missing)}",
                allowed="all bands in each file: what is known stays untouched, in every band",
                remedy="ask for the layer itself, beside others, and leave it out",
            )
        if asked.fill is not None and not files.has_hole(asked.fill):
            several = len(each(asked.observed)[asked.fill]) > 1
            raise RequestError(
                f"layer {asked.fill}",
                got="no hole: every pixel is known" + (" to one of its files" if several else ""),
                allowed="a layer with pixels that are nodata, masked or NaN",
                remedy="merge them, the first one last, with gdal_merge.py: nothing is missing"
                if several
                else "declare its nodata value, as gdal_edit.py -a_nodata does",
            )
        return files

    def run(self) -> list[Path]:
        """Draw sample after sample; see `write_scene`."""
        asked, model = self._request, self._generator.model
        self._folder.mkdir(parents=True, exist_ok=True)
        frame = Frame(self.grid.height, self.grid.width, model.patch_px, self.grid.position)
        known = [n for n in self._names if n not in self._targets]
        passes = plan(known, self._targets, model.names, model.seen_sets, model.added_names)
        rows = RowSampler(
            model,
            frame,
            ModelRows(self._files, self._codec, frame),
            torch.from_numpy(self._conditions.features()),
            self._tell,
        )
        self._done, self._work = 0, asked.samples * rows.work(asked.steps, len(passes))
        written: list[Path] = []
        with ExitStack() as stack:
            moments = {}
            if asked.uncertainty:
                for name in self._targets:
                    gathered = Moments(self._generator.modality(name), self.grid, self._folder)
                    moments[name] = stack.enter_context(gathered)
            for sample, seed in enumerate(sample_seeds(asked.samples, asked.seed)):
                z = rows.scene(seed, asked.steps)
                made: dict[str, Path] = {}
                for one in passes:
                    names = [n for n in model.names if n in one.targets]
                    kept = [n for n in names if n == asked.fill]
                    seen = {n: path for n, path in made.items() if n in one.direct}
                    if seen:  # each target sees what leads to it
                        layers = MadeFiles(seen, self._generator, self._files, kept)
                        beside = ModelRows(layers, self._codec, frame)
                        canvas = replace(rows, observed=beside).decode(
                            z, one, seed, asked.steps, kept
                        )
                    else:
                        canvas = rows.decode(z, one, seed, asked.steps, kept)
                    paths = self._write(canvas, frame, names, sample, moments)
                    made |= zip(names, paths, strict=True)
                for name, path in made.items():
                    if name in self._targets:
                        written.append(path)
                    else:  # it led to a target, and nobody asked for it
                        path.unlink()
            written += [self._write_moments(found) for found in moments.values()]
        return [self._folder / name for name in sorted(p.name for p in written)]

    def _write(
        self,
        canvas: Iterator[Tensor],
        frame: Frame,
        names: list[str],
        sample: int,
        moments: Mapping[str, Moments],
    ) -> list[Path]:
        """The files of one pass."""
        with ExitStack() as stack:
            writers = {n: stack.enter_context(self._writer(n, sample)) for n in names}
            for row, x, drawn in decoded(canvas, self._codec, frame, names):
                rows = x.shape[1]
                observed = self._files.read(row, rows) if self._files else {}
                for name, values in drawn.items():
                    if name in moments:
                        moments[name].add(sample, row, self._gathered(name, x, values))
                    writers[name].write(self._pixels(name, values, observed))
            return [writer.finish() for writer in writers.values()]

    def _pixels(
        self, name: str, values: NDArray[np.generic], observed: Mapping[str, Pixels]
    ) -> NDArray[np.generic]:
        """What is written of generated rows: [bands, rows, W]."""
        if name == self._request.fill:
            seen, valid = observed[name]
            # Classes, too, may be stored in a type that holds more than the modality's.
            values = np.where(valid, seen, values).astype(self._generator.modality(name).dtype)
            return np.concatenate([values, ~valid[None]], axis=0, dtype=values.dtype)
        if not observed:
            return values
        known = np.logical_or.reduce([valid for _, valid in observed.values()])
        return np.where(known, values, self._generator.modality(name).nodata)

    def _gathered(self, name: str, x: Tensor, values: NDArray[np.generic]) -> NDArray[np.floating]:
        """What `Moments` gather of rows x [C, rows, W]."""
        if not self._generator.modality(name).is_categorical:
            return values.astype(np.float32)
        shares = self._codec.class_probabilities(x[None].to(self._codec.center.device), name)
        return shares[0].cpu().numpy()

    def _writer(self, name: str, sample: int) -> CogWriter:
        modality, filled = self._generator.modality(name), name == self._request.fill
        stem = f"{name}_{sample}" if self._request.samples > 1 else name
        return CogWriter(
            self._folder / f"{stem}.tif",
            self.grid,
            (*modality.band_names, *((GENERATED,) if filled else ())),
            dtype=modality.dtype,
            nodata=None if filled else modality.nodata,
            units=(*(modality.unit for _ in modality.bands), *(("1",) if filled else ())),
            colors=modality.color_table,
            tags={
                **modality.file_tags,
                **self._provenance.tags(),
                "MM_SAMPLE": str(sample),
            },
            categorical=modality.is_categorical,
            sidecar=sidecar(modality) if name in self._targets else None,
        )

    def _write_moments(self, found: Moments) -> Path:
        path = self._folder / f"{found.modality.name}_uncertainty.tif"
        with found.writer(path, self._provenance.tags()) as writer:
            for row, rows in strips(self.grid.height):
                bands = found.bands(row, rows, self._request.samples)
                if self._files and self._request.fill is None:
                    masks = [valid for _, valid in self._files.read(row, rows).values()]
                    bands = np.where(np.logical_or.reduce(masks), bands, np.float32(np.nan))
                writer.write(bands)
            return writer.finish()

    def _tell(self, windows: int) -> None:
        self._done += windows
        if self._progress is not None:
            self._progress(self._done, self._work)


def decoded(
    canvas: Iterator[Tensor], codec: Codec, frame: Frame, names: list[str]
) -> Iterator[tuple[int, Tensor, dict[str, NDArray[np.generic]]]]:
    """Strips of a canvas as rows of the image: first row, x [C, rows, W], physical values by name.

    A row waits for those below it that its level is the mean of.
    """
    reach, (top, left) = LEVEL_PX // 2, frame.corner
    held = torch.empty(codec.channels, 0, frame.width)
    first = done = 0  # rows of the image: the first that is held, and those that were given out
    seen = -top
    for strip in canvas:
        low = max(0, -seen)
        seen += strip.shape[1]
        high = strip.shape[1] - max(0, seen - frame.height)
        held = torch.cat([held, strip[:, low:high, left : left + frame.width]], 1)
        last = first + held.shape[1]
        ready = last if last == frame.height else last - reach
        if ready <= done:
            continue
        x = held[None].to(codec.center.device)
        inner = slice(done - first, ready - first)
        values = {n: v[0, :, inner].cpu().numpy() for n, v in codec.decode(x, names).items()}
        yield done, held[:, inner], values
        done = ready
        drop = max(0, done - reach - first)
        held, first = held[:, drop:].clone(), first + drop
