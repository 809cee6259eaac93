"""SceneModel: codec, scene encoder E, scene flow F and decoder D of one set of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mm_model.codec import Codec
from mm_model.conditions import FEATURES
from mm_model.errors import ConfigError
from mm_model.modalities import Modality
from mm_model.nn import posterior
from mm_model.nn.added import Added
from mm_model.nn.decoders import Context, Decoder
from mm_model.nn.regressions import Regressions
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
        added: names of modalities that are learnt after the others, beside networks that stay; the
            last of `modalities`, in that order.
        regressions: whether the decoder has what values tell in closed form, which
            `decoder.regressions.fit` solves for before training. Older bundles have none.
    """

    owner: Tensor
    settled: Tensor
    is_class: Tensor

    def __init__(
        self,
        modalities: Sequence[Modality],
        size: Size,
        codec: Codec,
        seen_sets: Sequence[Mapping[str, Any]],
        patch_px: int = 64,
        added: Sequence[str] = (),
        *,
        regressions: bool = False,
    ) -> None:
        super().__init__()
        if tuple(modalities) != codec.modalities:
            raise ConfigError(
                "modalities of the model",
                got=[m.name for m in modalities],
                allowed=f"those of its codec, {list(codec.by_name)}",
            )
        first = len(modalities) - len(added)
        if not first or [m.name for m in modalities[first:]] != list(added):
            raise ConfigError(
                "added modalities",
                got=list(added),
                allowed=f"the last of {[m.name for m in modalities]}, but not all of them",
            )
        self.modalities = codec.modalities
        self.added_names = tuple(added)
        self.names = tuple(m.name for m in codec.modalities)
        self.size = size
        self.seen_sets = tuple((frozenset(s["modalities"]), int(s["patches"])) for s in seen_sets)
        self.patch_px = patch_px
        self.scene_channels = size.scene_channels
        self.token_width = size.dim
        self.codec = codec
        channels, count = sum(m.channels for m in modalities[:first]), first
        self.encoder = SceneEncoder(
            channels,
            count,
            size.encoder_width,
            size.dim,
            size.encoder_depth,
            size.heads,
            size.scene_channels,
        )
        self.flow = SceneFlow(
            count, FEATURES, size.dim, size.flow_depth, size.heads, size.scene_channels
        )
        owner = torch.tensor([i for i, m in enumerate(modalities) for _ in range(m.channels)])
        classes = torch.tensor([m.is_categorical for m in self.modalities])
        self.decoder = Decoder(
            owner[:channels],
            Regressions(owner[:channels], classes[owner][:channels]) if regressions else None,
            FEATURES,
            size.decoder_width,
            size.dim,
            size.decoder_depth,
            size.heads,
            size.scene_channels,
        )
        self.added = nn.ModuleDict(
            {
                m.name: Added(
                    m.channels,
                    size.encoder_width,
                    size.decoder_width,
                    self.decoder.fine_width,
                    size.dim,
                    size.scene_channels,
                    owner[:channels],
                )
                for m in self.modalities[first:]
            }
        )
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("is_class", classes[owner][:, None, None], persistent=False)
        settled = torch.tensor([m.name not in added for m in self.modalities])
        self.register_buffer("settled", settled, persistent=False)

    def parts(self) -> list[list[nn.Parameter]]:
        """The parameters, by what they learn from: gradients of one part tell nothing of the size
        of another's (docs/experiments.md).
        """
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            part, *inner = name.split(".")
            pixels = {"pixel_networks", "sureness"}.intersection(inner)
            found.setdefault("pixels" if pixels else part, []).append(parameter)
        return list(found.values())

    @property
    def config(self) -> dict[str, Any]:
        """All that `from_config` needs, ready for JSON."""
        return {
            "modalities": [m.to_dict() for m in self.modalities],
            "size": asdict(self.size),
            "patch_px": self.patch_px,
            "added": list(self.added_names),
            "regressions": self.decoder.regressions is not None,
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
                modalities,
                size,
                Codec(modalities, None),
                config["seen_sets"],
                config["patch_px"],
                config["added"],
                regressions=bool(config.get("regressions", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("model configuration", got=repr(error)) from error

    def add(
        self,
        modality: Modality,
        statistics: Mapping[str, Any],
        seen_sets: Sequence[Mapping[str, Any]],
    ) -> SceneModel:
        """This model with one more modality, whose inputs and heads alone can learn.

        Everything that stands is copied and frozen: what it makes of other modalities stays what
        it was, bit for bit.

        Args:
            modality: not one of the model's.
            statistics: of all modalities, this one included, as `Codec` takes them.
            seen_sets: sets with the new modality that its training data hold, beside those that
                the model has seen.
        """
        sets = [*self.config["seen_sets"], *seen_sets]
        grown = SceneModel(
            (*self.modalities, modality),
            self.size,
            Codec((*self.modalities, modality), statistics),
            sets,
            self.patch_px,
            (*self.added_names, modality.name),
            regressions=self.decoder.regressions is not None,
        )
        kept = {n: t for n, t in self.state_dict().items() if not n.startswith("codec.")}
        grown.load_state_dict(kept, strict=False)
        fresh = grown.added[modality.name]
        grown.requires_grad_(False)
        fresh.requires_grad_(True)
        return grown.to(self.owner.device)

    def channelwise(self, by_modality: Tensor) -> Tensor:
        """[B, M, ...] → [B, C, ...]: what belongs to a modality, for each of its channels."""
        return by_modality[:, self.owner]

    def encode(self, x: Tensor, mask: Tensor) -> Encoded:
        """Tokens h and scene z of what the mask [B, M, H, W] shows of x [B, C, H, W]."""
        x = torch.where(self.channelwise(mask), x, 0)
        return self.encoder(x, mask, self.added.values())  # type: ignore[no-any-return]

    def estimate_scene(
        self, z_t: Tensor, t: Tensor, h: Tensor, seen: Tensor, conditions: Tensor
    ) -> Tensor:
        """F: the expected clean scene; see `SceneFlow.forward`."""
        first = seen[:, : self.encoder.modalities]  # what is learnt later shows in h alone
        return self.flow(z_t, t, h, first, conditions)  # type: ignore[no-any-return]

    def decode(
        self,
        x: Tensor,
        t: Tensor,
        present: Tensor,
        wanted: Tensor,
        z: Tensor,
        conditions: Tensor,
    ) -> Tensor:
        """D: raw outputs [B, C, H, W], float32: expected clean values, class logits.

        Arguments as in `Decoder.forward`, but x is not scaled where it is wanted.
        """
        context = self.understand(x, t, present, wanted, z, conditions)
        return self.conclude(context, x, t, wanted)

    def understand(
        self,
        x: Tensor,
        t: Tensor,
        present: Tensor,
        wanted: Tensor,
        z: Tensor,
        conditions: Tensor,
    ) -> Context:
        """What everything but x_t as a measurement tells; arguments as in `decode`."""
        noisy = self.channelwise(wanted)
        times = torch.where(noisy, self.channelwise(t)[:, :, None, None], 0)
        shown = torch.where(noisy, posterior.wiener(times, posterior.DATA_VARIANCE) * x, x)
        return self.decoder(  # type: ignore[no-any-return]
            shown, t, present, wanted, z, conditions, self.added.values()
        )

    def conclude(self, context: Context, x: Tensor, t: Tensor, wanted: Tensor) -> Tensor:
        """Raw outputs: what the context tells, with what x_t measures."""
        noisy = self.channelwise(wanted)
        times = self.channelwise(t)[:, :, None, None]
        x_t = torch.where(noisy, x, 0)
        scales = context.log_scales.exp()
        # Block by block: what is learnt later changes no digit of what is there.
        made, first = [], 0
        heads = cast("list[Decoder | Added]", [self.decoder, *self.added.values()])
        for mixing in (head.mixing for head in heads):
            own = slice(first, first + len(mixing[0]))
            made.append(
                posterior.with_measurement(
                    context.mean[:, own],
                    scales[:, own],
                    mixing,
                    x_t[:, own],
                    times[:, own],
                    noisy[:, own],
                    self.is_class[own],
                )
            )
            first = own.stop
        return torch.cat(made, 1)

    def estimate(self, raw: Tensor) -> Tensor:
        """The expected clean x of raw outputs: logits become softmax − 1/K, the rest stays."""
        classes = [
            (s, m.channels)
            for m, s in zip(self.modalities, self.codec.slices.values(), strict=True)
            if m.is_categorical
        ]
        estimate = raw.clone() if classes else raw
        for channels, count in classes:
            estimate[:, channels] = raw[:, channels].softmax(1) - 1 / count
        return estimate
