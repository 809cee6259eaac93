"""Rasters to checked patches."""

import json

from prefect import flow

from flows.steps import DATA_STAGES, folder_of, publish, run_stages


@flow(name="data-refresh", flow_run_name="data-refresh of {pipeline}")
def data_refresh(pipeline: str = ".", force: bool = False) -> None:
    """Bring patches, split, validation and statistics up to date.

    Args:
        pipeline: folder that holds params.yaml, relative to the project.
        force: run the stages even if nothing changed.
    """
    run_stages(pipeline, DATA_STAGES, force)
    folder = folder_of(pipeline)
    stats = json.loads((folder / "data/stats.json").read_text())
    sets = [f"| {', '.join(s['modalities'])} | {s['patches']} |" for s in stats["sets"]]
    head = f"Training split: {stats['patches']} patches of {stats['places']} places."
    docs = f"Data Docs: `{folder / 'data/docs'}`"
    catalogue = folder / "data/catalogue"
    card = f"Data card: `{catalogue / 'index.html'}`"
    text = [head, "", "| modalities | patches |", "|---|---|", *sets, "", docs, "", card]
    publish("data", "\n".join(text), (catalogue / "map.png",))
