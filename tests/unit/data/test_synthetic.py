"""The synthetic Earth: physics that must show, units, gaps and determinism."""

import datetime as dt
import itertools
from dataclasses import replace

import numpy as np
import pytest

from mm_model.config import SyntheticConfig
from mm_model.data.sources.synthetic import CRS, Acquisition, SyntheticSource, render
from mm_model.errors import ConfigError
from mm_model.geo.grid import Grid
from mm_model.geo.sun import sun_position
from mm_model.modalities import MODALITIES, Band, LandCoverClass, Modality, Quantity, select

DEFAULT = select(["rgb", "nir", "sar", "dem", "map"])
ALL = tuple(MODALITIES.values())
JULY = Acquisition(dt.date(2024, 7, 10), seed=3)


def config(**changes):
    facts = {"seed": 7, "places": 40, "patches_per_place": 4, "complete_share": 0.2}
    return SyntheticConfig(**{**facts, **changes})


def source(modalities=DEFAULT, patch_px=16, **changes):
    return SyntheticSource(config(**changes), patch_px, 10.0, modalities)


def grids(count, height=96, width=72, seed=7):
    """Some places far from each other, from the tropics to the polar circle."""
    rng = np.random.default_rng(seed)
    for x, y in rng.integers((20_000, 100_000), (60_000, 750_000), (count, 2)) * 10:
        yield Grid(CRS, (10.0, 0.0, float(x), 0.0, -10.0, float(y)), height, width)


@pytest.fixture(scope="module")
def summer_scenes():
    """Two dozen places in July, by all modalities."""
    return [render(7, grid, ALL, JULY) for grid in grids(24)]


def stacked(scenes, name, band=0):
    return np.concatenate([s[name].values[band].ravel() for s in scenes])


def test_every_declared_modality_has_its_shape_type_and_range(summer_scenes):
    for scene in summer_scenes:
        assert set(scene) == set(MODALITIES)
        for modality in ALL:
            layer = scene[modality.name]
            assert layer.values.shape == (len(modality.bands), 96, 72)
            assert layer.values.dtype == modality.dtype
            assert np.isfinite(layer.values).all()
            low, high = modality.valid_range
            assert layer.values.min() >= low
            assert layer.values.max() <= high
            assert layer.valid.all()
            if modality.is_categorical:
                assert set(np.unique(layer.values)) <= set(modality.class_codes)


def test_medians_are_plausible(summer_scenes):
    for modality in ALL:
        median = np.median(stacked(summer_scenes, modality.name))
        low, high = modality.quantity.traits.plausible_median
        assert low <= median <= high


def test_only_what_changes_has_a_date(summer_scenes):
    for modality in ALL:
        timeless = modality.quantity in (Quantity.ELEVATION, Quantity.LAND_COVER)
        expected = None if timeless else "2024-07-10"
        assert summer_scenes[0][modality.name].acquired_at == expected


def test_materials_look_as_they_should(summer_scenes):
    codes = stacked(summer_scenes, "map")
    trees, water, built = codes == 10, codes == 80, codes == 50
    assert min(trees.sum(), water.sum(), built.sum()) > 100
    nir, red = stacked(summer_scenes, "nir"), stacked(summer_scenes, "rgb")
    vv, vh = stacked(summer_scenes, "sar", 0), stacked(summer_scenes, "sar", 1)
    assert np.median(nir[trees]) > 4 * np.median(red[trees])  # the red edge
    assert np.median(nir[water]) < 0.05  # water swallows near infrared
    assert np.median(vv[water]) < np.median(vv[trees]) - 6  # a mirror that faces away
    assert np.median(vh[trees]) > np.median(vh[water]) + 8  # volume scattering
    # Corners; between them lie streets, which send little back.
    assert np.quantile(vv[built], 0.75) > np.quantile(vv[trees], 0.75)
    assert (vv.mean() - vh.mean()) > 4
    tir = stacked(summer_scenes, "tir")
    assert np.median(tir[built]) > np.median(tir[trees]) + 1


def test_speckle_has_the_statistics_of_its_looks(summer_scenes):
    grid = next(grids(1))
    first, second = (
        render(7, grid, select(["sar"]), replace(JULY, seed=s))["sar"].values[1] for s in (1, 2)
    )
    # Two dates differ by speckle alone where nothing is sown: the deviation of the difference of
    # two log-gamma variates of 4 looks is sqrt(2 * 0.2838) * 10 / ln 10 = 3.27 dB.
    code = render(7, grid, select(["map"]), JULY)["map"].values[0]
    difference = (first - second)[(code != 40) & (code != 80)]
    assert difference.size > 1000
    assert np.std(difference) == pytest.approx(3.27, rel=0.1)


def test_snow_is_bright_in_visible_and_dark_in_shortwave_infrared():
    january = Acquisition(dt.date(2024, 1, 15))
    seen = 0
    for grid in grids(12):
        scene = render(7, grid, select(["rgb", "ms", "map"]), january)
        # Not roofs, nor sand, which are bright as well.
        snow = scene["rgb"].values.min(axis=0) > 0.5
        snow &= ~np.isin(scene["map"].values[0], (50, 60))
        seen += snow.sum()
        if snow.any():
            assert np.median(scene["ms"].values[4][snow]) < 0.3
    assert seen > 1000


def test_radar_does_not_know_the_season():
    """Optics change from summer to winter, the radar does not: the translation is ambiguous."""
    winter = replace(JULY, date=dt.date(2024, 1, 10))
    for grid in grids(3):
        a, b = (render(7, grid, DEFAULT, when) for when in (JULY, winter))
        np.testing.assert_array_equal(a["sar"].values, b["sar"].values)
        np.testing.assert_array_equal(a["map"].values, b["map"].values)
        np.testing.assert_array_equal(a["dem"].values, b["dem"].values)
    assert np.abs(a["rgb"].values - b["rgb"].values).mean() > 0.01


def test_the_north_is_colder_and_its_sun_lower():
    def median_c(y, name):
        scenes = [render(7, Grid(CRS, (10.0, 0.0, x, 0.0, -10.0, y), 40, 56), select([name]), JULY)
                  for x in np.arange(200_000.0, 800_000.0, 50_000.0)]  # fmt: skip
        return np.median(stacked(scenes, name)) - 273.15

    tropics, temperate, polar = (median_c(y, "tir") for y in (1e6, 5e6, 7.7e6))
    assert tropics > temperate + 5 > polar + 10
    for day in (dt.date(2024, 1, 5), dt.date(2024, 9, 9)):
        suns = np.array([replace(JULY, date=day).sun(latitude) for latitude in range(0, 91, 15)])
        np.testing.assert_allclose(np.linalg.norm(suns, axis=1), 1)
        assert (np.diff(suns[:, 2]) <= 0).all()
        assert suns[-1, 2] > 0.1  # a night is drawn with a low sun


def test_places_are_seen_by_day():
    made = source(places=300, patches_per_place=1, modalities=DEFAULT[:1])
    seen = []
    for unit in made.units():
        patch = next(made.read(unit))
        date = dt.date.fromisoformat(patch.layers["rgb"].acquired_at)
        seen.append((patch.grid.transform[5] / 110_574, date))
        assert sun_position(date, seen[-1][0])[0] >= 10
    assert not [d for latitude, d in seen if latitude > 65 and d.month == 12]
    assert {d.month for latitude, d in seen if latitude < 40} == set(range(1, 13))
    assert {d.month for latitude, d in seen if latitude > 65} >= set(range(4, 9))


def test_shadows_lie_away_from_the_sun():
    """Slopes that face the morning sun (south-east) are brighter than those that face away."""
    lit, dark = [], []
    for grid in grids(8):
        scene = render(7, grid, select(["nir", "dem"]), replace(JULY, date=dt.date(2024, 3, 1)))
        down, right = np.gradient(scene["dem"].values[0], 10.0)
        rise = (right + -down * -1.0) / np.sqrt(2)  # uphill towards the south-east
        nir = scene["nir"].values[0]
        if min((rise < -0.1).sum(), (rise > 0.1).sum()) > 200:
            lit.append(nir[rise < -0.1].mean())
            dark.append(nir[rise > 0.1].mean())
    assert lit
    assert np.mean(lit) > np.mean(dark)


def test_a_user_declared_wavelength_renders_between_its_neighbours():
    user = Modality(
        "edge",
        "A band of one's own",
        Quantity.REFLECTANCE,
        (Band("e725", center_nm=725, width_nm=10),),
        gsd_m=10,
        display_range=(0, 0.5),
    )
    grid = next(grids(1))
    scene = render(7, grid, (user, MODALITIES["ms"]), JULY)
    own = scene["edge"].values[0].mean()
    assert scene["ms"].values[0].mean() < own < scene["ms"].values[1].mean()


def test_what_cannot_be_rendered_is_refused():
    grid = next(grids(1))
    other = replace(MODALITIES["map"], classes=(LandCoverClass(1, "yes", "#ffffff"),), name="other")
    with pytest.raises(ConfigError, match="WorldCover"):
        render(7, grid, (other,), JULY)
    blind = replace(MODALITIES["nir"], bands=(Band("nir"),))
    with pytest.raises(ConfigError, match="center_nm"):
        render(7, grid, (blind,), JULY)
    turned = Grid(CRS, (10.0, 1.0, 0.0, 1.0, -10.0, 0.0), 8, 9)
    with pytest.raises(ConfigError, match="north up"):
        render(7, turned, DEFAULT, JULY)


def test_another_seed_is_another_world():
    grid = next(grids(1))
    a, b = (render(seed, grid, select(["dem"]), JULY)["dem"].values for seed in (7, 8))
    assert np.abs(a - b).mean() > 1


def test_units_are_sorted_stable_and_change_with_what_they_yield():
    units = source().units()
    assert [u.unit_id for u in units] == sorted(u.unit_id for u in units)
    assert len({u.fingerprint for u in units}) == len(units) == 40
    assert units == source().units()
    prints = {u.fingerprint for u in units}
    for other in (source(seed=8), source(patch_px=24)):
        assert prints.isdisjoint(u.fingerprint for u in other.units())
    assert prints != {u.fingerprint for u in source(modalities=DEFAULT[:3]).units()}


def test_patches_of_a_place_are_the_slices_of_one_rendering():
    made = source(modalities=DEFAULT, places=2, complete_share=1.0)
    unit = made.units()[1]
    patches = list(made.read(unit))
    assert len({p.patch_id for p in patches}) == 4
    assert [p.patch_id for p in patches] == [p.patch_id for p in made.read(unit)]
    for patch in patches:
        assert patch.grid.shape == (16, 16)
        assert patch.grid.crs == CRS
        date = dt.date.fromisoformat(patch.layers["rgb"].acquired_at)
        assert date.year == 2024
    left, right = patches[0].grid.bounds, patches[1].grid.bounds
    assert left[2] == right[0]
    mosaic = np.block([[p.layers["dem"].values[0] for p in patches[i : i + 2]] for i in (0, 2)])
    whole = render(7, patches[0].grid.window(0, 0, 32, 32), select(["dem"]), JULY)
    np.testing.assert_array_equal(mosaic, whole["dem"].values[0])


def test_gaps_leave_two_modalities_and_every_pair_together():
    made = source()
    kept = [frozenset(next(made.read(u)).layers) for u in made.units()]
    assert sum(len(k) == len(DEFAULT) for k in kept) == 8
    assert min(map(len, kept)) == 2
    for pair in itertools.combinations((m.name for m in DEFAULT), 2):
        assert sum(set(pair) <= k for k in kept) >= 8


def test_two_modalities_are_never_thinned():
    made = source(modalities=DEFAULT[:2], complete_share=0.0, places=3)
    assert all(len(next(made.read(u)).layers) == 2 for u in made.units())


def test_clouds_hide_light_and_not_radar():
    made = source(places=60, complete_share=1.0)
    cloudy = edged = 0
    for unit in made.units():
        for patch in made.read(unit):
            layers = patch.layers
            np.testing.assert_array_equal(layers["rgb"].valid, layers["nir"].valid)
            assert layers["dem"].valid.all()
            assert layers["map"].valid.all()
            hidden = ~layers["rgb"].valid
            if hidden.any():
                cloudy += 1
                assert layers["rgb"].values[:, hidden].min() > 0.5
            edged += not layers["sar"].valid.all()
    assert cloudy > 0
    assert edged > 0


def test_too_many_or_too_large_places_are_refused():
    with pytest.raises(ConfigError, match="size of the synthetic source"):
        source(places=100_000)
    with pytest.raises(ConfigError, match="size of the synthetic source"):
        source(patch_px=1024, patches_per_place=16)


def test_places_do_not_touch_and_stay_when_more_are_asked_for():
    few, many = source(places=10), source(places=30)
    at = [next(iter(many.read(u))).grid.bounds[:2] for u in many.units()]
    distance = min(np.hypot(a[0] - b[0], a[1] - b[1]) for a, b in itertools.combinations(at, 2))
    assert distance > 20_000
    assert [next(iter(few.read(u))).grid.bounds[:2] for u in few.units()] == at[:10]
