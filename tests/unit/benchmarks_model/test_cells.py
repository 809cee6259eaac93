"""A cell is made once for as long as the code is the same."""

import json
import math

import numpy as np
import pytest
from bench_fixtures import make_regime

from benchmarks.model import cells
from benchmarks.model.cells import Bench, Cell, code_digest, run_all
from benchmarks.model.measures import distributions
from benchmarks.model.regimes import SMALL
from benchmarks.model.report import headline, markdown
from benchmarks.model.tables import Results, flat, mean, minus, over, spread

CODE = '"""What it is."""\n\n\ndef f(x):\n    """Text."""\n    return x + 1  # why\n'


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path / "bench", 0.001, SMALL)
    bench._regimes["complete"] = make_regime(tmp_path)
    return bench


def test_the_digest_is_of_what_code_does(tmp_path):
    file = tmp_path / "code.py"

    def digest(text):
        file.write_text(text)
        return code_digest([file])

    first = digest(CODE)
    assert digest(CODE.replace("Text", "Other").replace("  # why", "")) == first
    assert digest(CODE.replace("x + 1", "x + 2")) != first


def test_a_cell_is_reused_and_a_changed_digest_reruns_it(bench, monkeypatch):
    cell = Cell("complete", "unet_whole", 0)
    first = bench.run(cell)
    file = bench.folder / "cells" / f"{cell}.json"
    written = file.stat().st_mtime_ns
    assert bench.run(cell) == json.loads(file.read_text()) == json.loads(json.dumps(first))
    assert file.stat().st_mtime_ns == written

    original = cells._digest_of
    monkeypatch.setattr(
        cells,
        "_digest_of",
        lambda what, method="": original(what, method) + "x" * (what == "record"),
    )
    assert bench.find(cell) is None
    assert bench.find(cell, any_code=True)["digest"] == first["digest"]
    assert bench.has_weights(cell)
    judged_again = bench.run(cell)
    assert file.stat().st_mtime_ns > written
    # Judging changed, training did not: the weights are those that were there.
    assert judged_again["effort"] == first["effort"]
    assert judged_again["pairs"] == first["pairs"]

    monkeypatch.setattr(cells, "_digest_of", lambda *of: original(*of) + "y")
    assert not bench.has_weights(cell)
    assert bench.run(cell)["effort"] != first["effort"]


def test_a_run_goes_on_where_it_was_cut_off(bench, capsys):
    wanted = [Cell("complete", "mean", 0), Cell("complete", "nearest_colour", 0)]
    bench.run(wanted[0])
    records = run_all(bench, wanted, 1)
    said = capsys.readouterr().err
    assert "2 cells, 1 of them are there" in said
    assert "complete-nearest_colour-0, 1 of 1" in said
    assert [r["cell"]["method"] for r in records] == ["mean", "nearest_colour"]


def test_figures_are_paired_by_seed():
    a, b = {0: 1.0, 1: 3.0, 2: 9.0}, {0: 0.5, 2: -1.0}
    assert minus(a, b) == {0: 0.5, 2: 10.0}
    assert over(a, b) == {0: 2.0}
    assert mean(a) == pytest.approx(13 / 3)
    assert spread(a) == pytest.approx(np.std([1, 3, 9], ddof=1))
    assert math.isnan(spread({0: 1.0}))
    assert set(flat({"x": a, "y": {}, "z": {0: 1.0}})) == {"x", "x_spread", "z"}


def test_a_report_needs_no_more_than_what_is_there(bench):
    records = [bench.run(Cell("complete", m, 0)) for m in ("mean", "nearest_colour")]
    results = Results(records)
    assert flat(headline(results)) == {}
    text = markdown(bench, results, [])
    assert "nearest_colour" in text
    assert "nan" not in text.lower()


def test_errors_stand_in_their_unit_and_runs_of_two_commits_are_told_apart(bench):
    records = [bench.run(Cell("complete", m, 0)) for m in ("mean", "nearest_colour")]
    text = markdown(bench, Results(records), [])
    to_radar = [p for p in records[0]["pairs"] if p.endswith("→sar")]
    errors = [np.mean([r["pairs"][p]["mae_of_mean"] for p in to_radar]) for r in records]
    line = next(x for x in text.splitlines() if x.startswith("| → sar: mean absolute error, dB"))
    assert [float(c) for c in line.split("|")[2:4]] == pytest.approx(errors, abs=0.006)
    assert "→ map: accuracy" in text
    assert "→ rgb: spectral angle" in text
    assert "→ nir: spectral angle" not in text
    assert "one commit" not in text

    records[1] |= {"commit": "0123abc"}
    assert "complete at 0123abc" in markdown(bench, Results(records), [])


def test_values_and_spectra_of_sets_stand_beside_the_real_ones():
    def of(values, spectrum):
        about = {
            "bands": ["VV"],
            "unit": "dB",
            "wasserstein": [values],
            "spectrum_log10": [spectrum],
        }
        return {"sar": about}

    made = {"pixels": {"generated": of(1.25, 0.5), "real": of(0.25, 0.125)}}
    cell = {"regime": "box", "method": "box", "seed": 0}
    results = Results([{"cell": cell, "joint": made}])
    text = distributions(results, [("complete", "ours"), ("box", "box")])
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[:4]]
    assert lines[0] == ["sets from nothing", "box: `box`", "box: real, other places"]
    assert lines[2] == ["sar VV: values, dB", "1.25", "0.25"]
    assert lines[3] == ["sar VV: spectrum, log10", "0.500", "0.125"]
    assert distributions(results, [("complete", "ours")]) == ""
