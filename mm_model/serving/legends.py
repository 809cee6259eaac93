"""How modalities are shown, as those learn it who draw them themselves."""

from __future__ import annotations

from collections.abc import Iterable

from mm_model import pictures
from mm_model.api import ChannelInfo, DisplayInfo, ModalityInfo, ModalityList
from mm_model.modalities import Modality


def modality_list(modalities: Iterable[Modality]) -> ModalityList:
    """What files of these modalities hold, and how `pictures.to_rgb` shows them."""
    return ModalityList(
        modalities=tuple(ModalityInfo.of(m, _display(m)) for m in modalities),
        amount_colors=pictures.color_scale(pictures.AMOUNT_COLORS),
    )


def _display(modality: Modality) -> DisplayInfo:
    shown = () if modality.is_categorical else pictures.channels(modality)
    return DisplayInfo(
        channels=tuple(ChannelInfo(name=c.name, weights=c.weights, limits=c.limits) for c in shown),
        gamma=pictures.gamma(modality),
        colors=pictures.color_scale(modality.color_map) if len(shown) == 1 else (),
        relative=pictures.is_relative(modality),
    )
