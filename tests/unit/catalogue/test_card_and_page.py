"""What people read and look at."""

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from catalogue_fixtures import LICENCES, MODALITIES_OF_ODD
from data_fixtures import make_store
from PIL import Image

from mm_model.catalogue import sheets as looking
from mm_model.catalogue.card import distances, table
from mm_model.catalogue.charts import rebinned, view
from mm_model.catalogue.page import page
from mm_model.catalogue.write import page_of, write_catalogue
from mm_model.data.stats import BandSummary
from mm_model.errors import DataError


class Links(HTMLParser):
    """What a page would load or run."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.targets += [v for k, v in attributes if k in {"src", "href", "srcset", "action"}]


def test_the_card_says_what_the_store_holds(catalogue, store, census):
    card = (catalogue / "card.md").read_text()
    assert f"{len(store):,} patches of {store.index['place_id'].nunique():,} places" in card
    for modality in MODALITIES_OF_ODD:
        layers = int((store.index["modality"] == modality.name).sum())
        (line,) = re.findall(
            rf"^\| `{modality.name}` \| {re.escape(modality.title)} .*$", card, re.M
        )
        assert f"| {layers} |" in line
        assert f"| {modality.unit if modality.unit != '1' else '–'} |" in line
    for members, patches, places in census.sets:
        names = ", ".join(f"`{n}`" for n in census.names(members))
        assert re.search(rf"^\| {names} \| {patches} \| .* \| {places} \|$", card, re.M)
    for name, terms in LICENCES.items():
        assert f"| `{name}` | {terms['licence']} |" in card
    for modality in MODALITIES_OF_ODD:
        for entry in modality.classes:
            n = census.values[modality.name].classes[entry.code]
            assert f"| {entry.code} | {entry.name} | {n:,} |" in card
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card)
    assert set(pictures) == {p.name for p in catalogue.glob("*.png")}
    for name in pictures:
        assert np.asarray(Image.open(catalogue / name)).std() > 1


def test_what_the_card_tells_to_run_runs(catalogue, store, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (catalogue / "card.md").read_text(), re.DOTALL)
    monkeypatch.chdir(catalogue)
    found = {}
    exec(code, found)
    wanted = store.read(0, [MODALITIES_OF_ODD[0].name]).layers[MODALITIES_OF_ODD[0].name]
    np.testing.assert_array_equal(found["values"], wanted.values)
    assert isinstance(found["table"], pa.Table)


def test_the_page_needs_nothing_but_itself(catalogue):
    text = (catalogue / "index.html").read_text()
    links = Links(text)
    outside = [t for t in links.targets if not t.startswith(("data:image/png;base64,", "#"))]
    assert len(links.targets) > len(MODALITIES_OF_ODD)
    assert not outside
    assert not {"script", "link", "iframe", "object", "embed"} & set(links.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "<b>2024</b>" not in text  # of an attribution: shown, not used
    assert "&lt;b&gt;2024&lt;/b&gt;" in text
    seen = Links('<script src="https://example.org/x.js"></script>')
    assert "script" in seen.tags
    assert seen.targets == ["https://example.org/x.js"]


def test_the_richest_patch_of_each_place_is_shown(catalogue, store, census):
    text = (catalogue / "index.html").read_text()
    shown = [store.read(i) for i in looking.shown_positions(census)]
    keys = [(p.source, p.place_id) for p in shown]
    assert keys == sorted(set(zip(store.index["source"], store.index["place_id"], strict=True)))
    every = [store.read(i) for i in range(len(store))]
    for patch in shown:
        assert f"<code>{patch.patch_id}</code>" in text
        assert len(patch.layers) == max(
            len(p.layers) for p in every if p.place_id == patch.place_id
        )


def test_no_more_places_are_shown_than_fit(census, store, monkeypatch):
    monkeypatch.setattr(looking, "PLACES", 2)
    assert looking.sheets(store, census).count("<code>") == 2


def test_html_in_names_is_shown():
    text = page("<i>", "# <script>1</script>\n\n![m](m.png)\n", {"m.png": b"x"}, "<p>s</p>")
    assert "<script>" not in text
    assert "<i>" not in text
    assert 'src="data:image/png;base64,eA=="' in text
    assert table(("a",), [("x|y\nz",)]).splitlines()[2] == "| x\\|y z |"


def test_the_same_data_make_the_same_bytes(folder, store, catalogue):
    again = folder / "again"
    write_catalogue(
        again, "odd-data", store, folder / "splits.parquet", MODALITIES_OF_ODD, LICENCES
    )
    names = sorted(p.name for p in catalogue.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert not [n for n in names if (catalogue / n).read_bytes() != (again / n).read_bytes()]


def test_a_page_of_other_data_is_refused(folder, catalogue, tmp_path):
    patches, splits = folder / "patches", folder / "splits.parquet"
    assert page_of(catalogue, patches, splits) == catalogue / "index.html"
    other = make_store(tmp_path / "data" / "patches", 2)
    with pytest.raises(DataError, match="other patches or splits"):
        page_of(catalogue, other.path, splits)
    with pytest.raises(DataError, match="is no catalogue; run the stage catalogue"):
        page_of(tmp_path, patches, splits)


def test_the_map_holds_all_places_and_stays_on_the_earth():
    rng = np.random.default_rng(3)
    for spread_deg in (0.0, 0.01, 3.0, 60.0, 170.0):
        for middle in ((10.0, 50.0), (179.0, -60.0), (-100.0, 84.0)):
            lon = np.clip(middle[0] + rng.uniform(-1, 1, 40) * spread_deg, -180, 180)
            lat = np.clip(middle[1] + rng.uniform(-1, 1, 40) * spread_deg / 2, -90, 90)
            west, east, south, north = view(lon, lat)
            assert -180 <= west <= lon.min()
            assert lon.max() <= east <= 180
            assert -90 <= south <= lat.min()
            assert lat.max() <= north <= 90
    assert view(np.empty(0), np.empty(0)) == (-180, 180, -90, 90)


def test_bins_hold_every_pixel_of_their_range():
    rng = np.random.default_rng(5)
    values = rng.uniform(0.1, 0.7, 5000).astype(np.float32)
    band = BandSummary.of(values, (0.0, 2.0))
    edges, shares = rebinned(band, 0.0, 1.0)
    assert shares.sum() == pytest.approx(1)
    wanted, _ = np.histogram(values, edges)
    np.testing.assert_allclose(shares, wanted / values.size, atol=3 / values.size)
    narrow = BandSummary.of(np.full(9, 0.5), (0.0, 2.0))
    edges, shares = rebinned(narrow, 0.5, 0.5)
    assert shares.sum() == 1
    assert (np.diff(edges) > 0).all()


def test_distances_that_differ_by_their_latitude_alone_are_one():
    assert distances([25.3336, 25.3392, 25.3364]) == "25.3 m"
    assert distances([1200.0, 10.0, 7.6]) == "7.6, 10 and 1200 m"
