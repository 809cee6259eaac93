"""Codec: physical units ⇄ model space, both directions, with its statistics as buffers.

Model space is where the networks live: one stacked tensor [B, C, H, W] of every modality's channels
(`modalities.channel_slices`), 0 where nothing is known, and one mask [B, M, H, W]. Continuous
channels are stabilised (`Transform`), centred and brought to a standard deviation of `SPREAD`;
categorical ones are one-hot minus 1/K, so that a softmax minus 1/K is their posterior mean.

A quantity h that `splits_relief` has two channels a band: level = S h and relief = h − S level, S
being the mean over a box. So h = S level + relief, and the noise of a generated level averages out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.errors import DataError, LayerError, UnknownModalityError
from mm_model.modalities import LEVEL_PX, Modality, channel_slices
from mm_model.scene import Scene

SPREAD = 0.65  # measured: 0.55 to 0.8 learns well beside unit noise


class Codec(nn.Module):
    """The only way between physical units and model space.

    Args:
        modalities: the active modalities, in the order of their channels.
        statistics: what the stage `stats` wrote, or None for a codec whose buffers are about to be
            loaded from a bundle (NaN until then).

    Raises:
        DataError: a modality has no pixels in the statistics, or does not vary.
    """

    center: Tensor
    scale: Tensor
    shift: Tensor
    gain: Tensor

    def __init__(
        self, modalities: Sequence[Modality], statistics: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.slices = channel_slices(self.modalities)
        self.by_name = {m.name: m for m in self.modalities}
        rows = [row for m in self.modalities for row in _buffer_rows(m, statistics)]
        columns = torch.tensor(rows, dtype=torch.float64).T.to(torch.float32)
        for name, column in zip(("center", "scale", "shift", "gain"), columns, strict=True):
            self.register_buffer(name, column.clone())

    @property
    def channels(self) -> int:
        """C: channels of all modalities together."""
        return sum(m.channels for m in self.modalities)

    def encode(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Model-space tensor x, float [B, C, H, W], and mask, bool [B, M, H, W].

        x is 0 wherever the mask is False, whatever the scene holds there.

        Raises:
            UnknownModalityError: the scene has a modality that this codec does not know.
            LayerError: the scene is empty, a layer has another number of bands, or a valid pixel
                is not finite or of an unknown class.
        """
        if not scene.values:
            raise LayerError("scene", got="no layer", remedy="use Codec.empty for a blank canvas")
        unknown = sorted(set(scene.values) - set(self.by_name))
        if unknown:
            raise UnknownModalityError("scene", got=unknown, allowed=list(self.by_name))
        first = next(iter(scene.values.values()))
        dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
        batch, _, height, width = first.shape
        x, mask = self.empty(batch, height, width, dtype=dtype, device=first.device)
        for index, modality in enumerate(self.modalities):
            if modality.name not in scene.values:
                continue
            values, valid = scene.values[modality.name], scene.valid[modality.name]
            if values.shape[1] != len(modality.bands):
                raise LayerError(
                    f"bands of {modality.name}", got=values.shape[1], allowed=modality.band_names
                )
            encoded = self._encode_layer(modality, values, valid, dtype)
            x[:, self.slices[modality.name]] = torch.where(valid, encoded, 0)
            mask[:, index] = valid[:, 0]
        return x, mask

    def empty(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """X and mask of a canvas of which nothing is known."""
        device = self.gain.device if device is None else device
        return (
            torch.zeros(batch, self.channels, height, width, dtype=dtype, device=device),
            torch.zeros(
                batch, len(self.modalities), height, width, dtype=torch.bool, device=device
            ),
        )

    def decode(
        self, x: Tensor, names: Sequence[str], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Physical values of the named modalities, [B, bands, H, W], within their valid range.

        Categorical modalities come as uint8 class codes, the likeliest class of each pixel.

        Args:
            x: in model space, [B, C, H, W].
            names: the wanted ones.
            mask: as `encode` gave it, bool [B, M, H, W], where x has gaps: only with it are levels
                averaged over known pixels alone. None where x is complete, as generated.
        """
        everywhere = torch.ones_like(x[:, :1], dtype=torch.bool)
        decoded = {}
        for name in names:
            modality = self._known(name)
            index = self.modalities.index(modality)
            valid = everywhere if mask is None else mask[:, index, None]
            decoded[name] = self._decode_layer(modality, x, valid)
        return decoded

    def class_probabilities(self, x: Tensor, name: str) -> Tensor:
        """Probabilities of a categorical modality's classes, [B, K, H, W], adding up to 1."""
        modality = self._known(name)
        if not modality.is_categorical:
            raise LayerError(f"class probabilities of {name}", got=modality.kind)
        shifted = x[:, self.slices[name]] + 1 / modality.channels
        # Estimates part-way through sampling may leave the simplex by a little.
        shifted = shifted.clamp_min(torch.finfo(x.dtype).tiny)
        return shifted / shifted.sum(1, keepdim=True)

    def _known(self, name: str) -> Modality:
        if name not in self.by_name:
            raise UnknownModalityError("modality", got=name, allowed=list(self.by_name))
        return self.by_name[name]

    def _column(self, buffer: Tensor, name: str, like: Tensor) -> Tensor:
        return buffer[self.slices[name]].to(like)[:, None, None]

    def _encode_layer(
        self, modality: Modality, values: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> Tensor:
        name = modality.name
        if modality.is_categorical:
            codes = torch.tensor(modality.class_codes, device=values.device)[:, None, None]
            one_hot = values == codes
            if bool((valid & ~one_hot.any(1, keepdim=True)).any()):
                strange = torch.unique(values[valid & ~one_hot.any(1, keepdim=True)])
                raise LayerError(
                    f"class codes of {name}",
                    got=strange[:8].tolist(),
                    allowed=modality.class_codes,
                )
            return one_hot.to(dtype) - 1 / modality.channels
        values = values.to(dtype)
        finite = torch.isfinite(values)
        if bool((valid & ~finite).any()):
            raise LayerError(
                f"valid pixels of {name}", got="NaN or infinity", remedy="mask them as invalid"
            )
        if modality.splits_relief:
            level = _box_mean(values, valid)
            values = torch.cat([level, values - _box_mean(level, valid)], 1)
        center, scale, shift, gain = (
            self._column(b, name, values) for b in (self.center, self.scale, self.shift, self.gain)
        )
        stabilised = modality.transform.forward(values, center, scale, torch)
        return (stabilised - shift) * gain  # type: ignore[no-any-return]

    def _decode_layer(self, modality: Modality, x: Tensor, valid: Tensor) -> Tensor:
        name = modality.name
        encoded = x[:, self.slices[name]]
        if modality.is_categorical:
            codes = torch.tensor(modality.class_codes, dtype=torch.uint8, device=x.device)
            return codes[encoded.argmax(1, keepdim=True)]
        center, scale, shift, gain = (
            self._column(b, name, x) for b in (self.center, self.scale, self.shift, self.gain)
        )
        values = modality.transform.inverse(encoded / gain + shift, center, scale, torch)
        if modality.splits_relief:
            level, relief = values.chunk(2, 1)
            # A wild pixel must not carry its whole box out of the range.
            values = _box_mean(level.clamp(*modality.valid_range), valid) + relief
        return values.clamp(*modality.valid_range)  # type: ignore[no-any-return]


def _box_mean(values: Tensor, valid: Tensor) -> Tensor:
    """S: the mean over the valid pixels in a box of `LEVEL_PX` around each pixel, [B, K, H, W].

    Where there are none, that of all valid pixels of the layer; 0 if it has none. `data.stats` has
    the same for numpy.
    """
    known, weight = torch.where(valid, values, 0), valid.to(values.dtype)
    share = _pool(weight)
    overall = known.sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp_min(1)
    return torch.where(share > 0, _pool(known) / share, overall)


def _pool(image: Tensor) -> Tensor:
    """Mean over the part of a box of `LEVEL_PX` that lies within the image, [B, K, H, W].

    So that the weight of a complete layer is exactly 1.
    """
    half = LEVEL_PX // 2
    for kernel, padding in (((LEVEL_PX, 1), (half, 0)), ((1, LEVEL_PX), (0, half))):
        image = F.avg_pool2d(image, kernel, 1, padding, count_include_pad=False)
    return image


def _buffer_rows(
    modality: Modality, statistics: Mapping[str, Any] | None
) -> list[tuple[float, float, float, float]]:
    """(center, scale, shift, gain) of each channel of a modality."""
    if modality.is_categorical:
        return [(0.0, 1.0, 1 / modality.channels, 1.0)] * modality.channels
    if statistics is None:
        return [(math.nan,) * 4] * modality.channels
    record = statistics["modalities"].get(modality.name)
    if record is None or not record["pixels"]:
        raise DataError(
            f"statistics of {modality.name}",
            got="no valid pixel in the training split",
            allowed="at least one patch that has it",
            remedy="leave it out of `modalities` in params.yaml, or prepare data that has it",
        )
    names = [band["name"] for band in record["bands"]]
    if names != list(modality.band_names):
        raise DataError(
            f"bands in the statistics of {modality.name}", got=names, allowed=modality.band_names
        )
    channels = list(record["bands"])
    if modality.splits_relief:
        channels += [
            {"name": f"{band['name']}: relief", "center": 0.0, **band["relief"]}
            for band in record["bands"]
        ]
    rows = []
    for band in channels:
        mean, std = float(band["transformed_mean"]), float(band["transformed_std"])
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise DataError(
                f"statistics of {modality.name}, band {band['name']}",
                got=f"mean {mean}, standard deviation {std}",
                allowed="a finite mean, and a standard deviation over 0",
                remedy="leave out a modality that does not vary",
            )
        rows.append((float(band["center"]), float(band["scale"]), mean, SPREAD / std))
    return rows
