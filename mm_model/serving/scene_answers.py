"""Requests that are answered by what `write_scene` writes, within one request's limits."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_model.api import Provenance
from mm_model.data import raster
from mm_model.data.files import needs_room
from mm_model.errors import RequestError
from mm_model.serving.answers import Answer
from mm_model.serving.batching import Lane, Served
from mm_model.serving.copies import copy_uploads
from mm_model.serving.decoders import DecoderPool
from mm_model.serving.generator import Check
from mm_model.serving.requests import SceneRequest
from mm_model.serving.results import pack
from mm_model.serving.scenes import write_scene
from mm_model.serving.uploads import FILL_FIELDS, Part, in_memory, read_scene_request
from mm_model.serving.watch import Watch


@dataclass(frozen=True, eq=False)
class _Work:
    served: Served
    request: SceneRequest
    folder: Path
    zipped: bool

    @property
    def batch_key(self) -> Hashable:
        return self  # it shares a batch with nothing else


@dataclass(frozen=True)
class SceneAnswer:
    """What is sent, how it was made, and how many values of each target it has."""

    answer: Answer
    provenance: Provenance
    pixels: int


async def answer_scene(
    parts: Sequence[Part],
    fields: Mapping[str, str],
    lane: Lane,
    decoders: DecoderPool,
    watch: Watch,
    *,
    zipped: bool,
) -> SceneAnswer:
    """The answer to a form; cancelling this call ends the work between two windows.

    Args:
        parts: of the form.
        fields: that it may have.
        lane: who answers.
        decoders: read the files.
        watch: follows the request.
        zipped: whether a lone GeoTIFF is zipped, too.

    Raises:
        RequestError: what is wrong with the form; one of the subclasses where there is one.
    """
    with (
        needs_room("what is generated"),
        tempfile.TemporaryDirectory(prefix="mm-", ignore_cleanup_errors=True) as name,
    ):
        folder = Path(name)
        with watch.stage("decode"):
            request = await decoders.run(_copied, parts, fields, lane.served, decoders, folder)
        watch.note(samples=request.samples, steps=request.steps, observed=len(request.observed))
        work = _Work(lane.served, request, folder / "out", zipped)
        return await lane.batcher.submit(_answer, work, watch.took, watch.tell)


def _copied(
    parts: Sequence[Part],
    fields: Mapping[str, str],
    served: Served,
    decoders: DecoderPool,
    folder: Path,
) -> SceneRequest:
    request, files = read_scene_request(parts, fields, served.generator)
    if fields is FILL_FIELDS and request.fill is None:
        raise RequestError("field fill is missing", allowed="the layer to be filled")
    if not files:
        return request
    with decoders.decoder() as decoder:
        return copy_uploads(request, in_memory(files), served.generator, decoder, folder)


def _answer(works: Sequence[_Work], check: Check) -> list[SceneAnswer]:
    return [_answer_one(work, check) for work in works]


def _answer_one(work: _Work, check: Check) -> SceneAnswer:
    generator = work.served.generator
    written = write_scene(
        generator,
        work.request,
        work.served.identity,
        work.folder,
        lambda done, of: check(done / of),
    )
    height, width = raster.read_header(written[0]).grid.shape
    path, media_type, provenance = pack(
        written, list(generator.modalities.values()), zipped=work.zipped
    )
    answer = Answer(path.read_bytes(), media_type, path.name)
    return SceneAnswer(answer, provenance, work.request.samples * height * width)
