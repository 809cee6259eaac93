"""What frozen features know: simple classifiers on them, fitted on training rows alone.

Features are [N, D], a row an image or a cell of one; labels [N] are class codes. Nothing is learned
from a test row, not even a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mm_model.errors import DataError

Features = NDArray[Any]
Labels = NDArray[Any]
Mask = NDArray[np.bool_]
Reals = NDArray[np.float64]

# L2 penalties to choose from, on the mean cross-entropy of standardised features. The strongest
# comes first: it wins a tie, and where too few rows are held out to tell.
_PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_ITERATIONS = 300  # of L-BFGS; the problem is convex, and most end long before
_BLOCK = 2**24  # similarities held at once (128 MB)


def linear_probe(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    *,
    classes: Sequence[int],
    seed: int,
    penalties: Sequence[float] = _PENALTIES,
) -> NDArray[np.int64]:
    """Labels of the test rows by multinomial logistic regression on standardised features.

    The L2 penalty is the one with the least cross-entropy on a random tenth of the training rows;
    then all of them are fitted.

    Args:
        train_features: [N, D].
        train_labels: [N], codes of `classes`.
        test_features: [M, D].
        classes: all codes that a label may have.
        seed: of the choice of the tenth.
        penalties: weights λ of λ/2·|W|²; those before win ties.

    Returns:
        [M], codes of `classes`; one that no training row has is never predicted.
    """
    _check(train_features, train_labels, test_features, classes)
    # The softmax has the classes that occur: the others' logits would be arbitrary.
    codes, targets = np.unique(train_labels, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(targets))
    held, rest = np.split(order, [max(1, len(order) // 10)])
    # A class that is gone from the rest tells nothing of the penalty: all would miss it.
    held = held[np.isin(targets[held], targets[rest])]
    penalty = penalties[0]
    if len(held) and len(penalties) > 1:
        losses = []
        for candidate in penalties:
            tried = _fit(train_features[rest], targets[rest], len(codes), candidate)
            logits = tried.logits(train_features[held])
            losses.append(float(_cross_entropy(logits, torch.as_tensor(targets[held]))))
        penalty = penalties[int(np.argmin(losses))]
    fitted = _fit(train_features, targets, len(codes), penalty)
    chosen = fitted.logits(test_features).argmax(dim=1).numpy()
    return np.asarray(codes[chosen], np.int64)


def knn_probe(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    *,
    classes: Sequence[int],
    k: int = 5,
) -> NDArray[np.int64]:
    """Labels [M] of the test rows by a vote of the k training rows of greatest cosine similarity
    (of all, if there are fewer). Among classes of equally many votes the more similar wins.
    """
    _check(train_features, train_labels, test_features, classes)
    codes, targets = np.unique(train_labels, return_inverse=True)
    train, test = _directions(train_features), _directions(test_features)
    k = min(k, len(train))
    step = max(1, _BLOCK // len(train))
    predicted = []
    for start in range(0, len(test), step):
        similarity = test[start : start + step] @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        # A vote and a little more: k of the latter never outweigh one vote.
        weight = 1 + np.take_along_axis(similarity, nearest, axis=1) / (4 * k)
        votes = np.zeros((len(similarity), len(codes)))
        np.add.at(votes, (np.arange(len(votes))[:, None], targets[nearest]), weight)
        predicted.append(votes.argmax(axis=1))
    return np.asarray(codes[np.concatenate(predicted)], np.int64)


def choose_labels(labels: Labels, share: float, seed: int) -> NDArray[np.int64]:
    """Ascending indices of a random share of the rows, in (0, 1], of each class the same share and
    at least one row. With one seed a smaller share is contained in a larger.
    """
    if not 0 < share <= 1:
        raise DataError("a share of labels is impossible", got=share, allowed="above 0, at most 1")
    rng = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for code in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == code))
        chosen.append(rows[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(chosen))


def pca(features: Features, components: int) -> tuple[Reals, Reals]:
    """Mean [D] and basis [components, D] of the training rows [N, D]: orthonormal directions of
    greatest variance, in descending order. A direction's largest entry is positive.
    """
    most = min(len(features) - 1, features.shape[1])
    if not 1 <= components <= most:
        raise DataError("impossible number of components", got=components, allowed=f"1 to {most}")
    mean = features.mean(axis=0, dtype=np.float64)
    triangle = np.linalg.qr(features - mean, mode="r")  # the same directions, in D rows
    basis = np.linalg.svd(triangle, full_matrices=False)[2][:components]
    largest = np.abs(basis).argmax(axis=1)
    return mean, basis * np.sign(basis[np.arange(components), largest])[:, None]


def project(features: Features, mean: Reals, basis: Reals) -> Reals:
    """Coordinates [N, components] of rows [N, D] about `mean` in `basis`, both from `pca`."""
    return np.asarray((features - mean) @ basis.T)


def cell_labels(codes: NDArray[np.uint8], valid: Mask, side: int) -> tuple[NDArray[np.uint8], Mask]:
    """The class that most valid pixels of each cell have, and which cells are known.

    Args:
        codes: [N, H, W], class codes; H and W multiples of `side`.
        valid: [N, H, W].
        side: of a cell, in pixels.

    Returns:
        [N, H/side, W/side] both. A cell is known if at least half of its pixels are valid; of an
        unknown cell the code is 0, which is no class. Of classes that are level the lowest code.
    """
    n, height, width = codes.shape
    if height % side or width % side:
        raise DataError(
            "images do not divide into cells",
            got=f"{height} × {width} pixels",
            allowed=f"multiples of {side}",
        )
    cells = (n, height // side, side, width // side, side)
    present = np.unique(codes[valid])
    known = np.asarray(2 * valid.reshape(cells).sum(axis=(2, 4)) >= side * side)
    if not present.size:
        return np.zeros(known.shape, np.uint8), known
    counts = [((codes == c) & valid).reshape(cells).sum(axis=(2, 4)) for c in present]
    majority = present[np.argmax(counts, axis=0)]
    return np.where(known, majority, 0).astype(np.uint8), known


class _Regression(NamedTuple):
    """A fitted multinomial logistic regression: standardisation [D] and weights [D + 1, classes],
    the last row the bias.
    """

    mean: Reals
    deviation: Reals
    weights: torch.Tensor

    def logits(self, features: Features) -> torch.Tensor:
        """[N, classes] of rows [N, D]."""
        rows = torch.as_tensor((features - self.mean) / self.deviation, dtype=torch.float32)
        return rows @ self.weights[:-1] + self.weights[-1]


def _fit(
    features: Features, targets: NDArray[np.int64], classes: int, penalty: float
) -> _Regression:
    """The least mean cross-entropy plus penalty/2·|W|², the bias free."""
    mean: Reals = features.mean(axis=0, dtype=np.float64)
    deviation: Reals = features.std(axis=0, dtype=np.float64)
    # A constant feature says nothing here, and must not blow up where it varies.
    deviation = np.where(deviation > 1e-9 * np.abs(mean), deviation, np.inf)
    weights = torch.zeros(features.shape[1] + 1, classes, requires_grad=True)
    model = _Regression(mean, deviation, weights)
    rows = torch.as_tensor((features - mean) / deviation, dtype=torch.float32)
    wanted = torch.as_tensor(targets)
    optimiser = torch.optim.LBFGS(
        [weights],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logits = rows @ weights[:-1] + weights[-1]
        value = _cross_entropy(logits, wanted) + penalty / 2 * weights[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return model._replace(weights=weights.detach())


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets)


def _directions(features: Features) -> Reals:
    """Each row at length 1; a row of zeros stays."""
    rows = features.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))


def _check(train: Features, labels: Labels, test: Features, classes: Sequence[int]) -> None:
    """What would otherwise become a wrong figure is an error."""
    if train.ndim != 2 or train.shape[1:] != test.shape[1:] or labels.shape != train.shape[:1]:
        raise DataError(
            "rows for a probe do not fit together",
            got=f"features {train.shape} with labels {labels.shape}, test features {test.shape}",
            allowed="[N, D] with [N], and [M, D]",
        )
    if not len(labels):
        raise DataError("a probe has no training rows")
    if strangers := sorted({int(c) for c in np.unique(labels)} - set(classes)):
        raise DataError("labels are of no class", got=strangers, allowed=sorted(classes))
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise DataError("features of a probe are not finite")
