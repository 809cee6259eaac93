"""The report: flat figures, tables of methods × regimes, and what ours does not help with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks import record
from benchmarks.model import measures, sheets
from benchmarks.model.cells import Bench, Cell
from benchmarks.model.joint import OTHER_STEPS
from benchmarks.model.methods import STEPS
from benchmarks.model.pairs import key
from benchmarks.model.regimes import BOX, NIR, RGB, SAR, UNSEEN
from benchmarks.model.tables import BySeed, Results, flat, mean, mean_of, minus, over, shown, table
from mm_model.data.files import write_atomically

OURS, JOINT = "ours", "no_scene"
SPLIT = ("unet_split", "pix2pix_split")
MAKERS = (("complete", OURS), ("complete", JOINT), (BOX, BOX))
"""Regime and method of whoever makes sets from nothing."""
PSNR, MIOU = "pairs_psnr_of_mean_db", "pairs_miou_of_mean"
IMAGES = record.ROOT / "docs" / "images"


def write_report(
    bench: Bench, cells: Sequence[Cell], *, publish: bool, any_code: bool = False
) -> None:
    """Write report.md and its pictures below the bench's folder.

    Args:
        bench: whose records are read; cells without one are left out.
        cells: what to report.
        any_code: take records of older code, too; the report names their commits.
        publish: also write benchmarks/results/model.json, the page and docs/images.
    """
    found = [r for c in cells if (r := bench.find(c, any_code=any_code)) is not None]
    if not found:
        print("nothing to report: no cell is there")
        return
    results = Results(found)
    figures = flat(headline(results))
    pictures = sheets.draw(bench, results, IMAGES if publish else bench.folder)
    prefix = "images/" if publish else ""
    text = markdown(bench, results, [f"{prefix}{p.name}" for p in pictures])
    write_atomically(bench.folder / "report.md", f"# Report\n\n{text}\n".encode())
    for name, value in figures.items():
        print(f"{name:52} {value:.4g}")
    if publish:
        record.write("model", figures, {"": text, **NOTES})
        record.write_page()
    print(bench.folder / "report.md")


NOTES = {
    "pairs_psnr_mean_db": "continuous pairs, mean of all samples",
    "pairs_miou_mean": "pairs to land cover, class of the largest summed probability",
    "pairs_psnr_gain_over_split_specialists_db": "all five seen; against the better kind",
    "pairs_only_psnr_gain_over_no_scene_db": "nothing but pairs seen, radar and NIR never together",
    "real_psnr_gain_over_no_scene_db": "public rasters",
    "rgb_to_nir_gap_to_specialist_db": "U-Net with the whole budget for this pair, minus ours",
    "unseen_pair_gain_share": "gain over a constant where the pair was never seen, over that where "
    "it was; both directions",
    "season_spread_share": "the bundle in the box: spread of the level of colour over samples from "
    "one radar image, over that of the same places on other days (root mean squares)",
    "season_moved_share": "the same level, July asked for − January asked for, beside one radar "
    "image: slope on what the place itself shows then",
    "joint_one_nn_accuracy": "the bundle in the box, as all `joint_`; 0.5 cannot be told from real",
    "real_frechet": "real of other places: the floor",
    "steps_4_over_32_psnr_gap_percent": "the bundle in the box; below 0: four steps are better",
    "steps_4_over_32_frechet_gap_percent": "the bundle in the box; above 0: four steps are worse",
    "probe_accuracy_z_1_percent": "the bundle in the box; cells of 8 px, land cover",
    "retrieval_rgb_to_sar_top1": "the bundle in the box",
}


def headline(results: Results) -> dict[str, BySeed]:
    """The flat figures, by seed."""
    complete = "complete"

    def ours(*path: str) -> BySeed:
        return results.of(complete, OURS, *path)

    def box(*path: str) -> BySeed:
        return results.of(BOX, BOX, *path)

    def sets(*path: str) -> BySeed:
        return box("joint", "features", *path)

    gains = {}
    for regime, prefix in (("complete", "pairs"), ("pairs", "pairs_only"), ("real", "real")):
        for measure, name in ((PSNR, "psnr_gain"), (MIOU, "miou_gain")):
            unit = "_db" if measure == PSNR else ""
            best = max(SPLIT, key=lambda m: _or_low(mean(results.of(regime, m, measure))))
            for other, method in (("no_scene", JOINT), ("split_specialists", best)):
                gains[f"{prefix}_{name}_over_{other}{unit}"] = minus(
                    results.of(regime, OURS, measure), results.of(regime, method, measure)
                )
    colour_to_nir = ("pairs", key(RGB, NIR), "psnr_of_mean_db")
    few, many = (box("steps", str(s), PSNR) for s in (STEPS, *OTHER_STEPS))
    loss = over(minus(many, few), many)
    far, near = (box("joint", "steps", str(s)) for s in (STEPS, *OTHER_STEPS))
    farther = over(minus(far, near), near)
    probe = ("scenes", "probes", "cover")
    return {
        "pairs_psnr_mean_db": ours(PSNR),
        "pairs_miou_mean": ours(MIOU),
        **gains,
        "rgb_to_nir_gap_to_specialist_db": minus(
            results.of(complete, "unet_whole", *colour_to_nir), ours(*colour_to_nir)
        ),
        "unseen_pair_gain_share": over(
            unseen_gain(results, "pairs", OURS), unseen_gain(results, "pairs_control", OURS)
        ),
        "joint_one_nn_accuracy": sets("generated", "one_nn_accuracy"),
        "real_one_nn_accuracy": sets("real", "one_nn_accuracy"),
        "joint_precision": sets("generated", "precision"),
        "joint_recall": sets("generated", "recall"),
        "joint_frechet": sets("generated", "frechet"),
        "real_frechet": sets("real", "frechet"),
        "season_spread_share": box("season", "spread_share"),
        "season_moved_share": box("season", "moved_share"),
        "steps_4_over_32_psnr_gap_percent": {s: 100 * v for s, v in loss.items()},
        "steps_4_over_32_frechet_gap_percent": {s: 100 * v for s, v in farther.items()},
        "probe_accuracy_z_1_percent": box(*probe, "z", "linear_1"),
        "probe_accuracy_pixels_1_percent": box(*probe, "pixels", "linear_1"),
        "retrieval_rgb_to_sar_top1": box("scenes", "retrieval", "rgb_to_sar_top1"),
    }


def _or_low(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def unseen_gain(results: Results, regime: str, method: str) -> BySeed:
    """How far both directions of the unseen pair are above a constant, in dB."""
    ways = (key(SAR, NIR), key(NIR, SAR))
    assert {SAR, NIR} == UNSEEN
    # The constant is that of the regime that does show the pair: both gains count from one zero.
    return mean_of(
        minus(
            results.of(regime, method, "pairs", way, "psnr_of_mean_db"),
            results.of("pairs_control", "mean", "pairs", way, "psnr_of_mean_db")
            or results.of(regime, "mean", "pairs", way, "psnr_of_mean_db"),
        )
        for way in ways
    )


def markdown(bench: Bench, results: Results, pictures: Sequence[str]) -> str:
    """All sections that there are records for."""
    seeds = len({r["cell"]["seed"] for r in results.records})
    sections = [
        f"Ours beside what people would use instead: every trained model gets {bench.minutes:g} "
        f"minutes of CPU time (one thread), reading of batches included, on the same data; ± is "
        f"the standard deviation over {seeds} seed{'s' * (seeds > 1)} of training. One synthetic "
        f"Earth, held-out places; `real` are 1,027 patches of 17 places of public rasters, many of "
        f"which lack most layers: 36 patches of three places are what pairs are judged on. "
        f"`no_scene` is our decoder without encoder and flow (joint diffusion with a time for each "
        f"modality); `*_split` are U-Nets and pix2pix, one for each ordered pair, the budget "
        f"split evenly; `unet_whole` spends all of it on {key(RGB, NIR)}; `nearest_colour` "
        f"averages the training pixels with the nearest values; `{BOX}` is the bundle in the box, "
        f"trained for hours, on places of a planet that it never saw, where ± is over draws of "
        f"samples. PSNR and mIoU are of the mean of "
        f"{bench.scale.samples} samples (physical values; summed class probabilities), in "
        f"brackets of one sample.",
        _overview(results),
        _by_pair(results),
        measures.by_target(results),
        _unseen(results),
        _sets(results),
        measures.distributions(results, MAKERS),
        _season(results),
        _scene(results),
        _downstream(results),
        _behind(results),
        _made_at(results),
        *(f"![{p}]({p})" for p in pictures),
    ]
    return "\n\n".join(s for s in sections if s)


def _overview(results: Results) -> str:
    rows = []
    for regime in results.regimes():
        for method in results.methods(regime):
            if method == "unet_whole":
                continue
            cpu_s = mean(results.of(regime, method, "effort", "cpu_s"))

            def of(*path: str, regime: str = regime, method: str = method) -> BySeed:
                return results.of(regime, method, *path)

            rows.append(
                [
                    regime,
                    f"`{method}`",
                    f"{shown(of(PSNR))} ({mean(of('pairs_psnr_db')):.2f})",
                    f"{shown(of(MIOU), 3)} ({mean(of('pairs_miou')):.3f})",
                    shown(of("pairs_ssim_of_mean"), 3),
                    "–" if math.isnan(cpu_s) else f"{cpu_s:.0f}",
                    f"{mean(of('effort', 'samples')):,.0f}",
                    f"{mean(of('parameters')) / 1e6:.1f}",
                ]
            )
    head = ["regime", "method", "PSNR dB", "mIoU", "SSIM", "CPU s", "samples seen", "M weights"]
    return table(head, rows)


def _by_pair(results: Results) -> str:
    parts = []
    for regime in results.regimes():
        methods = results.methods(regime)
        rows = []
        for pair in results.pairs(regime):
            columns = [
                (results.of(regime, m, "pairs", pair, "psnr_of_mean_db"), 1)
                if results.of(regime, m, "pairs", pair, "psnr_of_mean_db")
                else (results.of(regime, m, "pairs", pair, "miou_of_mean"), 3)
                for m in methods
            ]
            rows.append([pair, *(shown(values, digits) for values, digits in columns)])
        head = [f"{regime}: PSNR dB, or mIoU", *(f"`{m}`" for m in methods)]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _unseen(results: Results) -> str:
    rows = [
        [f"`{m}`", *(shown(unseen_gain(results, r, m)) for r in ("pairs", "pairs_control"))]
        for m in results.methods("pairs")
    ]
    if not rows:
        return ""
    head = [f"{NIR} and {SAR}: dB above a constant", "never seen together", "seen together"]
    return table(head, rows) + (
        "\n\nNobody was taught the unseen pair: specialists, `no_scene` and ours go through a "
        "modality that was seen with both, ours and `no_scene` through the last declared one."
    )


def _sets(results: Results) -> str:
    sources = [(r, f"`{m}`", m, "generated") for r, m in MAKERS]
    for regime, method in (("complete", OURS), (BOX, BOX)):
        sources.append((regime, "real, other places", method, "real"))
        sources.append((regime, "real, shuffled", method, "shuffled"))
    columns = ("frechet", "kernel", "one_nn_accuracy", "precision", "recall", "pairwise_distance")
    rows = []
    for regime, title, method, group in sources:

        def of(*path: str, regime: str = regime, method: str = method) -> BySeed:
            return results.of(regime, method, "joint", *path)

        if of("features", group, "frechet"):
            judged = [shown(of("features", group, c), 3) for c in columns]
            agreement = [of("consistency", group, c) for c in ("nir_mae", "map_accuracy")]
            rows.append([f"{regime}: {title}", *judged, *(shown(a, 3) for a in agreement)])
    if not rows:
        return ""
    head = ["sets from nothing", "Fréchet", "kernel", "1-NN", "precision", "recall", "distance"]
    steps = []
    for regime, method in MAKERS:
        for count in map(str, sorted((*OTHER_STEPS, STEPS))):
            distance = results.of(regime, method, "joint", "steps", count)
            psnr = results.of(regime, method, "steps", count, PSNR)
            if distance:
                about = f"Fréchet {shown(distance, 1)}, pairs {shown(psnr)} dB"
                steps.append(f"- `{method}`, {count} steps: {about}")
    return (
        table([*head, "NIR − f(RGB)", "map = f(RGB)"], rows)
        + "\n\nFeatures are of a small network that learnt land cover from real patches; f are "
        "U-Nets that learnt from real ones.\n\n" + "\n".join(steps)
    )


def _season(results: Results) -> str:
    def of(name: str) -> BySeed:
        return results.of(BOX, BOX, "season", name)

    if not of("spread"):
        return ""
    return (
        f"Season under the bundle in the box, {mean(of('places')):.0f} places that it never saw, "
        f"rendered anew on other days: the mean reflectance of a patch in colour varies by "
        f"{shown(of('spread'), 3)} over samples from one radar image, by "
        f"{shown(of('real_spread'), 3)} over days (root mean squares over places; means "
        f"{shown(of('mean_spread'), 3)} and {shown(of('mean_real_spread'), 3)}). July asked for "
        f"beside that image, instead of January, moves it by {shown(of('moved'), 3)}, where the "
        f"places themselves move by {shown(of('real_moved'), 3)}: slope "
        f"{shown(of('moved_share'))}, correlation {shown(of('moved_correlation'))}."
    )


def _scene(results: Results) -> str:
    return "\n\n".join(
        part for r, m in (("complete", OURS), (BOX, BOX)) if (part := _scene_of(results, r, m))
    )


def _scene_of(results: Results, regime: str, method: str) -> str:
    def of(*path: str) -> BySeed:
        return results.of(regime, method, *path)

    rows = [
        [
            f"`{method}`: {task}, `{name}`",
            *(
                shown(of("scenes", "probes", task, name, f"{kind}_{share}"), 1)
                for kind in ("linear", "knn")
                for share in ("1", "10", "100")
            ),
        ]
        for task in ("cover", "water")
        for name in ("z", "encoded_z", "random_z", "pixels", "pca")
        if of("scenes", "probes", task, name, "linear_1")
    ]
    if not rows:
        return ""
    radar, found = ("pairs", key(SAR, RGB)), of("scenes", "misregistration", "found")
    moved = (
        ""
        if not found
        else (
            f" Of radar moved by up to a cell to all sides, that which is not moved fits best in "
            f"{shown(found)} (chance {shown(of('scenes', 'misregistration', 'chance'))})."
        )
    )
    head = ["cells of 8 px, accuracy %", "linear 1 %", "10 %", "100 %", "k-NN 1 %", "10 %", "100 %"]
    return table(head, rows) + (
        f"\n\n`{method}`: scene from colour, nearest scene from radar: "
        f"{shown(of('scenes', 'retrieval', 'rgb_to_sar_top1'))} of places are the same (chance "
        f"{shown(of('scenes', 'retrieval', 'chance'), 3)}).{moved} Colour from radar: truth lies "
        f"within the samples' central interval in {shown(of(*radar, 'coverage'))} of pixels "
        f"(calibrated: {shown(of(*radar, 'nominal_coverage'))}); the mean colour of a patch "
        f"varies by "
        f"{shown(of(*radar, 'level_spread'), 3)} over samples, by "
        f"{shown(of(*radar, 'real_level_spread'), 3)} over real scenes."
    )


def _downstream(results: Results) -> str:
    titles = {
        "few_miou": "colour → map, few real patches",
        "few_and_generated_miou": "… and colour generated from further maps",
        "few_and_as_many_real_miou": "… and the real colour of those (bound)",
        "gap_real_miou": "colour and NIR → map, both real (bound)",
        "gap_filled_miou": "… NIR generated from colour",
        "gap_left_miou": "… NIR left empty",
    }
    rows = [
        [title, *(shown(results.of(r, m, "downstream", k), 3) for r, m in MAKERS)]
        for k, title in titles.items()
        if results.of("complete", OURS, "downstream", k)
    ]
    head = ["segmentation, mIoU", *(f"{r}: `{m}`" for r, m in MAKERS)]
    return table(head, rows) if rows else ""


def _behind(results: Results) -> str:
    """Where another method is better than ours, in words that follow from the figures."""
    lines = []
    for regime in (r for r in results.regimes() if r != BOX):
        rivals = [m for m in results.methods(regime) if m != OURS]
        for pair in results.pairs(regime):
            for figure, unit in (("psnr_of_mean_db", " dB"), ("miou_of_mean", "")):
                read = _reader(results, regime, pair, figure)
                own = mean(read(OURS))
                best = max(rivals, key=lambda m: _or_low(mean(read(m))), default=None)
                if best is not None and mean(read(best)) > own:
                    ahead = mean(read(best)) - own
                    lines.append(f"{regime} {pair} (`{best}`, by {ahead:.2g}{unit})")
    if not lines:
        return "No other method is better than ours in any pair of any regime."
    return "**Where ours does not help.** Another method is better in: " + "; ".join(lines) + "."


def _made_at(results: Results) -> str:
    """Which regimes were run at which commit, if not all at one."""
    regimes: dict[str, dict[str, None]] = {}
    for found in results.records:
        regimes.setdefault(found["commit"], {})[found["cell"]["regime"]] = None
    if len(regimes) < 2:
        return ""
    runs = "; ".join(f"{', '.join(names)} at {commit}" for commit, names in regimes.items())
    return f"Not all were run at one commit: {runs}."


def _reader(
    results: Results, regime: str, pair: str, figure: str
) -> Callable[[str], Mapping[int, float]]:
    return lambda method: results.of(regime, method, "pairs", pair, figure)
