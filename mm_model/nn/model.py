"""SceneModel: codec, scene encoder E, scene flow F and decoder D of one set of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_model.codec import Codec
from mm_model.errors import ConfigError
from mm_model.modalities import Modality
from mm_model.nn.decoders import Decoder
from mm_model.nn.scene_encoder import Encoded, SceneEncoder
from mm_model.nn.scene_flow import SceneFlow


@dataclass(frozen=True)
class Size:
    """Widths and depths, as in `model.sizes` of params.yaml.

    Attributes:
        encoder_width, decoder_width: channels of the convolutions at a quarter of the resolution.
        dim, heads: width and attention heads of the tokens at an eighth of it.
        encoder_depth, flow_depth, decoder_depth: transformer blocks.
        scene_channels: channels of the scene z.
    """

    encoder_width: int
    decoder_width: int
    dim: int
    encoder_depth: int
    flow_depth: int
    decoder_depth: int
    heads: int
    scene_channels: int


class SceneModel(nn.Module):
    """One latent scene from any subset of modalities, and every other modality from it.

    Args:
        modalities: active modalities, in the order of the codec.
        size: widths and depths.
        codec: made from the training statistics.
        seen_sets: sets of modalities that occurred together in training, as `sets` of the
            statistics: [{"modalities": [name, ...], "patches": count}, ...].
        patch_px: side of the windows it was trained on, and samples in.
    """

    owner: Tensor

    def __init__(
        self,
        modalities: Sequence[Modality],
        size: Size,
        codec: Codec,
        seen_sets: Sequence[Mapping[str, Any]],
        patch_px: int = 64,
    ) -> None:
        super().__init__()
        if tuple(modalities) != codec.modalities:
            raise ConfigError(
                "modalities of the model",
                got=[m.name for m in modalities],
                allowed=f"those of its codec, {list(codec.by_name)}",
            )
        self.modalities = codec.modalities
        self.names = tuple(m.name for m in codec.modalities)
        self.size = size
        self.seen_sets = tuple((frozenset(s["modalities"]), int(s["patches"])) for s in seen_sets)
        self.patch_px = patch_px
        self.scene_channels = size.scene_channels
        self.codec = codec
        channels, count = codec.channels, len(self.modalities)
        self.encoder = SceneEncoder(
            channels,
            count,
            size.encoder_width,
            size.dim,
            size.encoder_depth,
            size.heads,
            size.scene_channels,
        )
        self.flow = SceneFlow(count, size.dim, size.flow_depth, size.heads, size.scene_channels)
        self.decoder = Decoder(
            channels,
            count,
            size.decoder_width,
            size.dim,
            size.decoder_depth,
            size.heads,
            size.scene_channels,
        )
        owner = [i for i, m in enumerate(self.modalities) for _ in range(m.channels)]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """All that `from_config` needs, ready for JSON."""
        return {
            "modalities": [m.to_dict() for m in self.modalities],
            "size": asdict(self.size),
            "patch_px": self.patch_px,
            "seen_sets": [{"modalities": sorted(s), "patches": n} for s, n in self.seen_sets],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SceneModel:
        """A model of the same structure, whose weights and codec are yet to be loaded.

        Raises:
            ConfigError: a key is missing or unknown.
        """
        try:
            modalities = tuple(Modality.from_dict(m) for m in config["modalities"])
            size = Size(**config["size"])
            return cls(
                modalities, size, Codec(modalities, None), config["seen_sets"], config["patch_px"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("model configuration", got=repr(error)) from error

    def channelwise(self, by_modality: Tensor) -> Tensor:
        """[B, M, ...] → [B, C, ...]: what belongs to a modality, for each of its channels."""
        return by_modality[:, self.owner]

    def encode(self, x: Tensor, mask: Tensor) -> Encoded:
        """Tokens h and scene z of what the mask [B, M, H, W] shows of x [B, C, H, W]."""
        return self.encoder(torch.where(self.channelwise(mask), x, 0), mask)  # type: ignore[no-any-return]

    def estimate_scene(self, z_t: Tensor, t: Tensor, h: Tensor, seen: Tensor) -> Tensor:
        """F: the expected clean scene; see `SceneFlow.forward`."""
        return self.flow(z_t, t, h, seen)  # type: ignore[no-any-return]

    def decode(self, x: Tensor, t: Tensor, present: Tensor, wanted: Tensor, z: Tensor) -> Tensor:
        """D: raw outputs (clean values, class logits); see `Decoder.forward`."""
        return self.decoder(x, t, present, wanted, z)  # type: ignore[no-any-return]

    def estimate(self, raw: Tensor) -> Tensor:
        """The expected clean x of raw outputs: logits become softmax − 1/K, the rest stays."""
        parts = [
            raw[:, s].softmax(1) - 1 / m.channels if m.is_categorical else raw[:, s]
            for m, s in zip(self.modalities, self.codec.slices.values(), strict=True)
        ]
        return torch.cat(parts, 1)
