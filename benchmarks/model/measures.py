"""Tables of errors in physical units, and of distances of whole sets in values and spectra."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.model.tables import BySeed, Results, mean, mean_of, shown, table

_FIGURES = (
    ("mae_of_mean", "mean absolute error"),
    ("spectral_angle_of_mean_deg", "spectral angle, °"),
    ("accuracy_of_mean", "accuracy"),
)


def by_target(results: Results) -> str:
    """Errors of each target in its unit, mean over its sources, for each regime and method."""
    parts = []
    for regime in results.regimes():
        # One pair's figures do not stand beside means over all.
        methods = [m for m in results.methods(regime) if m != "unet_whole"]
        pairs = results.pairs(regime)
        rows = []
        for target in dict.fromkeys(p.split("→")[0] for p in pairs):
            to_it = [p for p in pairs if p.split("→")[1] == target]
            for figure, title in _FIGURES:
                found = [_mean_over(results, regime, m, to_it, figure) for m in methods]
                if any(found):
                    unit = _unit(results, regime, to_it) if figure == "mae_of_mean" else ""
                    digits = _digits(found)
                    rows.append([f"→ {target}: {title}{unit}", *(shown(f, digits) for f in found)])
        parts.append(table([f"{regime}, mean over sources", *(f"`{m}`" for m in methods)], rows))
    return "\n\n".join(parts)


def _mean_over(
    results: Results, regime: str, method: str, pairs: Sequence[str], figure: str
) -> BySeed:
    columns = [results.of(regime, method, "pairs", pair, figure) for pair in pairs]
    return mean_of(c for c in columns if c)


def _unit(results: Results, regime: str, pairs: Sequence[str]) -> str:
    here = [r["pairs"] for r in results.records if r["cell"]["regime"] == regime]
    unit = next(rows[p]["unit"] for rows in here for p in pairs if p in rows)
    return "" if unit == "1" else f", {unit}"


def _digits(columns: Sequence[BySeed]) -> int:
    """Three or four that count, of the largest."""
    largest = max(mean(c) for c in columns if c)
    return 4 if largest < 0.2 else 3 if largest < 1 else 2 if largest < 20 else 1


def distributions(results: Results, cells: Sequence[tuple[str, str]]) -> str:
    """Wasserstein distance and departure of the power spectrum for each band of joint sets, beside
    those of real sets of other places.

    Args:
        results: whose records hold sets.
        cells: regime and method of whoever made sets.
    """
    sources = [(r, f"`{m}`", m, "generated") for r, m in cells]
    sources += [(r, "real, other places", m, "real") for r, m in dict(cells).items()]
    sources = [s for s in sources if _bands(results, s[0], s[2])]
    if not sources:
        return ""
    rows = []
    for name, band, number, unit in _bands(results, sources[0][0], sources[0][2]):
        of = name if band == name else f"{name} {band}"
        distance = "values" if unit == "1" else f"values, {unit}"
        for figure, title in (("wasserstein", distance), ("spectrum_log10", "spectrum, log10")):
            found = [
                results.of(regime, method, "joint", "pixels", group, name, figure, number)
                for regime, _, method, group in sources
            ]
            rows.append([f"{of}: {title}", *(shown(f, _digits(found)) for f in found)])
    return table(["sets from nothing", *(f"{r}: {title}" for r, title, *_ in sources)], rows) + (
        "\n\nFor each band the Wasserstein distance of all values in its unit (reflectance "
        "has none), and the mean absolute difference of the logarithms of radial power spectra."
    )


def _bands(results: Results, regime: str, method: str) -> list[tuple[str, str, int, str]]:
    """Modality, band, its number and unit of each band that sets are judged on."""
    for record in results.records:
        cell = record["cell"]
        if (cell["regime"], cell["method"]) == (regime, method) and "joint" in record:
            pixels = record["joint"]["pixels"]["generated"]
            return [
                (name, band, number, about["unit"])
                for name, about in pixels.items()
                for number, band in enumerate(about["bands"])
            ]
    return []
