"""What generated images are worth to another network: more to learn from, and gaps filled.

A small segmentation network learns land cover from colour. Few patches have both; of more only the
map is there, and colour is generated from it. And one learns from colour and near infrared, the
latter missing where it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.model.methods import SceneMethod
from benchmarks.model.pairs import PATCHES_AT_ONCE, ask
from benchmarks.model.regimes import MAP, NIR, RGB, Regime
from benchmarks.model.specialists import UNet, reconstruction
from benchmarks.model.training import teach
from mm_model.data.patch import Patch
from mm_model.evaluation import metrics
from mm_model.evaluation.evaluate import _in_parallel, choose_patches
from mm_model.training.dataset import collate

_WIDTH = 16
_BATCH = 16
_FILL_SAMPLES = 4  # whose mean fills a gap


def evaluate_downstream(
    method: SceneMethod,
    regime: Regime,
    *,
    patches: int,
    labelled: int,
    maps: int,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Mean IoU on held-out patches; every network gets the same number of steps.

    Args:
        method: trained; its images are taught from, and fill gaps.
        regime: with complete training patches.
        patches: held-out ones, at most.
        labelled: training patches with colour and map.
        maps: reference patches, of which only the map is there.
        steps: of each segmentation network.
        seed: of their start and batches.
    """
    at = choose_patches(regime.train, regime.positions_with(regime.names), labelled, seed)
    train = [regime.train.read(i, regime.names) for i in at]
    # Of places that the method never saw: it might remember their colour.
    further = list(itertools.chain(*regime.reference_at))[:maps]
    train += [regime.reference.read(i, regime.names) for i in further]
    whole = set(regime.names)
    test = [regime.test.read(i, regime.names) for i in regime.test_at]
    test = [p for p in test if set(p.layers) == whole][:patches]
    x, test_x = (regime.codec.encode(collate(p, regime.modalities))[0] for p in (train, test))
    few, many = x[:labelled], x[labelled:]
    colours = [RGB, NIR]

    def score(learnt: Sequence[Tensor], seen: Sequence[str], shown: Tensor) -> float:
        network = _segment(regime, torch.cat(list(learnt)), seen, steps, seed)
        return _mean_iou(regime, network, seen, shown, test)

    made = _generate(method, regime, train[labelled:], MAP, RGB, 1)
    dreamt = many.clone()
    dreamt[:, regime.codec.slices[RGB]] = made
    both = _segment(regime, few, colours, steps, seed)
    filled, absent = test_x.clone(), test_x.clone()
    filled[:, regime.codec.slices[NIR]] = _generate(method, regime, test, RGB, NIR, _FILL_SAMPLES)
    absent[:, regime.codec.slices[NIR]] = 0
    return {
        "few_miou": score([few], [RGB], test_x),
        "few_and_generated_miou": score([few, dreamt], [RGB], test_x),
        "few_and_as_many_real_miou": score([few, many], [RGB], test_x),
        "gap_real_miou": _mean_iou(regime, both, colours, test_x, test),
        "gap_filled_miou": _mean_iou(regime, both, colours, filled, test),
        "gap_left_miou": _mean_iou(regime, both, colours, absent, test),
    }


def _generate(
    method: SceneMethod,
    regime: Regime,
    patches: Sequence[Patch],
    source: str,
    target: str,
    samples: int,
) -> Tensor:
    """The target from the source of each patch, mean of the samples, in model space."""

    def make(batch: Sequence[Patch]) -> Tensor:
        made = method.answer(ask(regime, batch, source, [target], samples=samples))
        return made[:, :, regime.codec.slices[target]].mean(1)

    parts = [patches[i : i + PATCHES_AT_ONCE] for i in range(0, len(patches), PATCHES_AT_ONCE)]
    return torch.cat(list(_in_parallel(make, parts)))


def _segment(regime: Regime, x: Tensor, seen: Sequence[str], steps: int, seed: int) -> UNet:
    """A network that tells land cover from the seen modalities, taught on sets x."""
    torch.manual_seed(seed)
    modality = regime.codec.by_name[MAP]
    inputs = _channels(regime, seen)
    network = UNet(len(inputs), modality.channels, width=_WIDTH)
    rng = np.random.default_rng(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            picked = x[torch.from_numpy(rng.integers(0, len(x), _BATCH))]
            yield picked[:, inputs], picked[:, regime.codec.slices[MAP]]

    def loss(raw: Tensor, truth: Tensor, _: Tensor) -> Tensor:
        return reconstruction(raw, truth, torch.ones_like(truth[:, :1]), modality)

    teach(network, batches(), loss, steps)
    return network


@torch.no_grad()
def _mean_iou(
    regime: Regime,
    network: Callable[[Tensor], Tensor],
    seen: Sequence[str],
    x: Tensor,
    patches: Sequence[Patch],
) -> float:
    modality = regime.codec.by_name[MAP]
    codes = np.array(modality.class_codes, np.uint8)
    guesses = codes[network(x[:, _channels(regime, seen)]).argmax(1).numpy()]
    counts = [
        metrics.confusion(guess, p.layers[MAP].values[0], p.layers[MAP].valid, codes.tolist())
        for guess, p in zip(guesses, patches, strict=True)
    ]
    return metrics.mean_iou(np.sum(counts, axis=0))


def _channels(regime: Regime, names: Sequence[str]) -> list[int]:
    slices = [regime.codec.slices[n] for n in names]
    return [c for s in slices for c in range(s.start, s.stop)]
