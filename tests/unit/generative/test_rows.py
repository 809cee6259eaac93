from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_fixtures import NAMES, make_model, make_scene

from mm_model.conditions import FEATURES
from mm_model.generative.plan import plan
from mm_model.generative.rows import RowSampler, column_bytes
from mm_model.generative.sampler import sample
from mm_model.generative.windows import Frame, Windows

MODEL = make_model()
SLICES = MODEL.codec.slices


class Shown:
    """What is observed of a scene in memory, row by row, and how far back anybody looked."""

    def __init__(self, x: torch.Tensor, mask: torch.Tensor, frame: Frame) -> None:
        self.x, self.mask = frame.pad(x[0]), frame.pad(mask[0])
        self.rows: list[tuple[int, int]] = []

    def __call__(self, row: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows.append((row, rows))
        return self.x[:, row : row + rows], self.mask[:, row : row + rows]


def by_rows(x, mask, targets, seed, steps, *, origin=(0, 0), kept=(), model=MODEL, **how):
    frame = Frame(x.shape[2], x.shape[3], model.patch_px, origin)
    shown = Shown(x, mask, frame)
    rows = RowSampler(model, frame, shown, **how)
    z = rows.scene(seed, steps)
    known = [n for n, k in zip(NAMES, mask.any(-1).any(-1)[0].tolist(), strict=True) if k]
    known = [n for n in known if n not in targets]
    made = torch.zeros(MODEL.codec.channels, frame.windows.height, frame.windows.width)
    for one in plan(known, targets, NAMES, model.seen_sets, model.added_names):
        made += torch.cat(list(rows.decode(z, one, seed, steps, kept)), 1)
    return frame.crop(made)[None], shown


def observed(names=("sar",), height=100, width=44):
    return MODEL.codec.encode(make_scene(batch=1, height=height, width=width).only(*names))


@pytest.mark.parametrize(
    ("shape", "origin", "steps"),
    [
        ((100, 44), (0, 0), 3),
        ((100, 44), (-37, 1234), 2),
        ((28, 20), (5, 3), 2),
        ((41, 130), (99_999, 8), 1),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_make_what_memory_makes(
    shape: tuple[int, int], origin: tuple[int, int], steps: int, precision: str
) -> None:
    x, mask = observed(("sar", "dem"), *shape)
    known = torch.randn(1, FEATURES)
    targets = ["rgb", "map"]
    whole = sample(
        MODEL, x, mask, targets, [5], steps, origins=[origin], conditions=known,
        precision=precision,
    )  # fmt: skip
    made, shown = by_rows(
        x, mask, targets, 5, steps, origin=origin, conditions=known[0], precision=precision
    )
    # Bitwise but where images do not fill the processor's vectors; bf16 where it is emulated.
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert torch.allclose(made, whole, rtol=0, atol=tolerance)
    for earlier, later in zip(shown.rows, shown.rows[1:], strict=False):
        assert later[0] >= earlier[0] or later[0] == 0  # only downwards, once for each network


def test_passes_apart_make_what_memory_makes() -> None:
    sets = [
        {"modalities": ["rgb", "sar"], "patches": 3},
        {"modalities": ["sar", "map"], "patches": 2},
    ]
    model = make_model(sets=sets)
    x, mask = observed(("sar",), 60, 36)
    whole = sample(model, x, mask, ["rgb", "dem", "map"], [1], 2, precision="fp32")
    made, _ = by_rows(x, mask, ["rgb", "dem", "map"], 1, 2, model=model, precision="fp32")
    assert torch.equal(made, whole)


def test_progress_counts_every_window_and_can_cancel() -> None:
    x, mask = observed(height=60, width=50)
    frame = Frame(60, 50, MODEL.patch_px)
    told: list[int] = []
    rows = RowSampler(MODEL, frame, Shown(x, mask, frame), progress=told.append)
    z = rows.scene(1, 2)
    (one,) = plan(["sar"], ["rgb"], NAMES, MODEL.seen_sets)
    list(rows.decode(z, one, 1, 2))
    assert sum(told) == rows.work(2, 1)

    def stop(_: int) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        RowSampler(MODEL, frame, Shown(x, mask, frame), progress=stop).scene(1, 2)


def live_bytes() -> int:
    """Of all tensors that somebody holds."""
    held = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


@pytest.mark.parametrize(
    ("height", "width", "steps", "targets"),
    [(31, 500, 6, ["map"]), (150, 400, 2, ["rgb", "map"]), (130, 200, 8, ["dem"])],
)
def test_memory_is_what_is_said_of_it(height, width, steps, targets) -> None:
    """No more, and not far less: gaps of the allocator are half of it."""
    x, mask = observed(("sar",), height, width)
    frame = Frame(height, width, MODEL.patch_px)
    shown, before, most, calls = Shown(x, mask, frame), live_bytes(), 0, 0

    def look(_: int) -> None:
        nonlocal most, calls
        calls += 1
        if calls % 7 == 0:
            most = max(most, live_bytes() - before)

    rows = RowSampler(MODEL, frame, shown, progress=look, precision="bf16")
    z = rows.scene(1, steps)
    passes = plan(["sar"], targets, NAMES, MODEL.seen_sets)
    for one in passes:
        for _ in rows.decode(z, one, 1, steps):
            pass
    said = width * column_bytes(MODEL, height, passes, (), steps)
    assert said / 6 < most < said


def test_the_same_place_gives_the_same_picture_in_any_canvas() -> None:
    """Out of nothing, whatever is further off than the windows of all steps does not matter."""
    large, small = (232, 72), (136, 72)
    down = 96  # of the small one below the large one, as no multiple of the tiles of noise
    origin = (1000, 40)
    whole = sample(
        MODEL, *MODEL.codec.empty(1, *large), ["rgb"], [3], 1, origins=[origin], precision="fp32"
    )
    part = sample(
        MODEL,
        *MODEL.codec.empty(1, *small),
        ["rgb"],
        [3],
        1,
        origins=[(origin[0] + down, origin[1])],
        precision="fp32",
    )
    # The first and last window of a canvas lie at its edge; between them all are shared.
    inner = slice(64, small[0] - 64)
    assert torch.equal(part[..., inner, :], whole[..., down:, :][..., inner, :])
    assert not torch.allclose(part, whole[..., : small[0], :], atol=1e-3)


@pytest.mark.parametrize("kept", [(), ("rgb",)])
def test_observed_pixels_of_a_target_are_kept_and_felt(kept: tuple[str, ...]) -> None:
    x, mask = observed(("rgb", "sar"), 60, 40)
    mask[:, 0, 20:40, 10:30] = False
    made, _ = by_rows(x, mask, ["rgb"], 2, 3, kept=kept, precision="fp32")
    known = mask[:, [0]].expand(-1, 3, -1, -1)
    same = made[:, SLICES["rgb"]] == x[:, SLICES["rgb"]]
    assert bool(same[known].all()) == bool(kept)
    assert not same[~known].any()
    free, _ = by_rows(x, mask, ["rgb"], 2, 3, precision="fp32")
    holes = (made - free)[:, SLICES["rgb"]][~known].abs().max()
    assert bool(holes > 1e-3) == bool(kept)


def test_windows_inside_lie_where_those_of_any_other_canvas_lie() -> None:
    step = 24
    for origin in (0, 8, -64, 1024):
        inner = Windows.cover(200, 32, 32, (origin, 0)).rows[1:-1]
        assert inner
        assert all((origin + row) % step == 0 for row in inner)
