"""Season from radar: do samples differ as a place does over its year, and does a date move them?

Places of the synthetic Earth, which can be rendered on any day: what a place shows on several days
is what its radar leaves open, but for what that radar tells of its day. Levels are mean
reflectances of a patch, over pixels and bands.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.model.methods import SceneMethod
from benchmarks.model.regimes import BOX_PLANET, RGB, SAR, Regime
from mm_model.conditions import Conditions, stack_features
from mm_model.data.circumstances import complete
from mm_model.data.patch import Patch
from mm_model.data.sources.synthetic.sensors import Acquisition
from mm_model.data.sources.synthetic.source import render
from mm_model.evaluation.evaluate import _in_parallel
from mm_model.generative.noise import sample_seeds
from mm_model.generative.sampler import sample
from mm_model.training.dataset import collate

_DAYS, _SAMPLES = 4, 4
_WINTER, _SUMMER = dt.date(2024, 1, 15), dt.date(2024, 7, 15)

Reals = NDArray[np.float64]


def evaluate_season(
    method: SceneMethod, regime: Regime, *, places: int, seed: int
) -> dict[str, float]:
    """Figures over the held-out places; spreads are standard deviations.

    Args:
        method: trained with conditions.
        regime: of the planet `BOX_PLANET`, since its places are rendered anew.
        places: of the held-out ones, at most; of each its first patch.
        seed: of the samples.

    Returns:
        spread, real_spread: root mean square over places of the spread over samples from one
        radar image, and over days of the same place; `mean_…` the mean over places.
        spread_share, mean_spread_share: quotients of these.
        moved, real_moved: root mean square of July − January, asked for beside one radar image,
        and rendered. moved_share: slope of the former on the latter through 0.
        moved_correlation: of the two over places.
    """
    first = {}
    for position in regime.test_at:
        patch = regime.test.read(position, regime.names)
        first.setdefault(patch.place_id, patch)
    chosen = list(first.values())[:places]

    def judge(patch: Patch) -> tuple[Reals, Reals, Reals]:
        return _judge(method, regime, patch, seed)

    rows = list(_in_parallel(judge, chosen))
    made, real, moves = (np.stack(part) for part in zip(*rows, strict=True))
    asked, rendered = moves.T
    found = {}
    for name, levels in (("spread", made), ("real_spread", real)):
        variance = levels.var(-1, ddof=1).reshape(len(chosen), -1).mean(1)
        found[name] = float(np.sqrt(variance.mean()))
        found[f"mean_{name}"] = float(np.sqrt(variance).mean())
    with np.errstate(invalid="ignore"):  # where nothing moves, there is none
        correlation = float(np.corrcoef(asked, rendered)[0, 1])
    return {
        **found,
        "spread_share": found["spread"] / found["real_spread"],
        "mean_spread_share": found["mean_spread"] / found["mean_real_spread"],
        "moved": float(np.sqrt((asked**2).mean())),
        "real_moved": float(np.sqrt((rendered**2).mean())),
        "moved_share": float((asked * rendered).sum() / (rendered**2).sum()),
        "moved_correlation": correlation,
        "places": len(chosen),
    }


def _judge(
    method: SceneMethod, regime: Regime, patch: Patch, seed: int
) -> tuple[Reals, Reals, Reals]:
    """Levels of samples [days, samples] and of the days [days]; July − January asked and real."""
    latitude = complete(Conditions(), patch.grid).latitude_deg or 0.0
    days = [Acquisition.draw(s, latitude) for s in _seeds(_DAYS, "day", patch.place_id)]
    shown = [_rendered(regime, patch, when) for when in days]
    seeds = _seeds(_SAMPLES, "season", seed, patch.place_id)
    unknown = [Conditions()] * _DAYS
    made = _levels_from_radar(method, regime, shown, unknown, seeds)
    real = np.array([_level(p) for p in shown])
    # On one day's radar image, with one day's weather: the date alone differs.
    asked = [complete(Conditions(date=day), patch.grid) for day in (_WINTER, _SUMMER)]
    levels = _levels_from_radar(method, regime, [shown[0]] * 2, asked, seeds).mean(1)
    winter, summer = (
        _level(_rendered(regime, patch, replace(days[0], date=day))) for day in (_WINTER, _SUMMER)
    )
    return made, real, np.array([levels[1] - levels[0], summer - winter])


def _seeds(count: int, *key: int | str) -> list[int]:
    """Independent ones, without mirror images."""
    return sample_seeds(2 * count, *key)[::2]


def _rendered(regime: Regime, patch: Patch, when: Acquisition) -> Patch:
    """The same patch on another day."""
    return replace(patch, layers=render(BOX_PLANET, patch.grid, regime.modalities, when))


def _level(patch: Patch) -> float:
    return float(patch.layers[RGB].values.mean())


def _levels_from_radar(
    method: SceneMethod,
    regime: Regime,
    patches: Sequence[Patch],
    known: Sequence[Conditions],
    seeds: Sequence[int],
) -> Reals:
    """[patches, seeds]: levels of colour generated from radar."""
    x, mask = regime.codec.encode(collate(patches, regime.modalities).only(SAR))
    count = len(seeds)
    made = sample(
        method.model,
        x.repeat_interleave(count, 0),
        mask.repeat_interleave(count, 0),
        [RGB],
        list(seeds) * len(patches),
        conditions=torch.from_numpy(stack_features(known)).repeat_interleave(count, 0),
    )
    levels = regime.codec.decode(made, [RGB])[RGB].double().mean((1, 2, 3))
    return levels.view(len(patches), count).numpy()
