"""Rasters to checked patches, and whether what has come in is like what was trained on."""

import json
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.steps import DATA_STAGES, folder_of, publish, run_stages
from mm_model.data.drift import HEADS, MOST_DISTANCE, Drift, drift_of_new, seen_layers


@flow(name="data-refresh", flow_run_name="data-refresh of {pipeline}")
def data_refresh(pipeline: str = ".", force: bool = False) -> None:
    """Bring patches, split, validation and statistics up to date, and say whether data drift.

    Args:
        pipeline: folder that holds params.yaml, relative to the project.
        force: run the stages even if nothing changed.
    """
    data = folder_of(pipeline) / "data"
    seen = seen_layers(data / "patches")
    first, *others = DATA_STAGES
    run_stages(pipeline, (first,), force)
    verdict = report_drift(data, seen)  # before the statistics take in what is new
    run_stages(pipeline, tuple(others), force)
    stats = json.loads((data / "stats.json").read_text())
    sets = [f"| {', '.join(s['modalities'])} | {s['patches']} |" for s in stats["sets"]]
    head = f"Training split: {stats['patches']} patches of {stats['places']} places."
    table = "\n".join(["| modalities | patches |", "|---|---|", *sets])
    catalogue = data / "catalogue"
    pages = f"Data Docs: `{data / 'docs'}`", f"Data card: `{catalogue / 'index.html'}`"
    publish("data", "\n\n".join([head, verdict, table, *pages]), (catalogue / "map.png",))


@task(cache_policy=NO_CACHE)
def report_drift(data: Path, seen: frozenset[str]) -> str:
    """A page, and a line in the log; drift is a warning and stops nothing."""
    new, found, lacking = drift_of_new(data, seen)
    drifted = [f"{d.modality} {d.what} ({d.distance:.2f})" for d in found if d.has_drifted]
    if drifted:
        verdict = f"DRIFT in {new} new patches: {', '.join(drifted)}, above {MOST_DISTANCE:g}."
    elif found:
        verdict = f"No drift: {new} new patches are like the training set."
    elif not new:
        verdict = "No drift: no patch is new."
    else:
        verdict = f"Drift was not judged: {new} new patches, nothing to compare them with."
    if lacking:
        verdict += f" Not compared, without statistics yet: {', '.join(lacking)}."
    log = get_run_logger()
    (log.warning if drifted or (new and not found) else log.info)(verdict)
    publish("drift", "\n\n".join([f"**{verdict}**", *_table(found)]))
    return verdict


def _table(found: list[Drift]) -> list[str]:
    rows = [HEADS, ("---",) * len(HEADS), *(one.cells for one in found)]
    return ["\n".join(f"| {' | '.join(row)} |" for row in rows)] if found else []
