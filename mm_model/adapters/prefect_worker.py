"""The Prefect worker of this machine, as supervisord runs it.

One run at a time is the worker's own limit: the slot is given back when the run's process ends,
however it ends. A limit of the server's would stay taken for minutes, or for ever, by a run whose
process was killed. For the same reason a worker that starts anew first ends what an earlier one has
left: its processes, and its runs that still read Running.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import httpx
import psutil

from mm_model.adapters.environment import prefect_api_url, project_root
from mm_model.adapters.services import MARK, WORK_POOL

FLOW_RUN = "PREFECT__FLOW_RUN_ID"


def end_left_processes() -> None:
    """SIGKILL the flow runs, and all below them, of an earlier worker of this project."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == str(project_root()) and FLOW_RUN in environment:
                process.kill()


def close_left_runs() -> None:
    """Mark the pool's runs that no process works on any more: Crashed, or Cancelled if asked."""
    with httpx.Client(base_url=prefect_api_url(), timeout=30) as client:
        runs = client.post(
            "/flow_runs/filter",
            json={
                "flow_runs": {
                    "state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}},
                },
                "work_pools": {"name": {"any_": [WORK_POOL]}},
            },
        )
        runs.raise_for_status()
        for run in runs.json():
            final = "CANCELLED" if run["state_type"] == "CANCELLING" else "CRASHED"
            client.post(
                f"/flow_runs/{run['id']}/set_state",
                json={
                    "state": {
                        "type": final,
                        "message": "Its worker ended before it did; run it again.",
                    },
                    "force": True,
                },
            ).raise_for_status()


def _wait_for_server() -> None:
    """After a restart of everything the worker may be there first."""
    for _ in range(120):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{prefect_api_url()}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)


def main() -> None:
    end_left_processes()
    _wait_for_server()
    close_left_runs()
    worker = ["prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"]
    options = ["--name", WORK_POOL, "--limit", "1", "--install-policy", "never"]
    os.execv(sys.executable, [sys.executable, "-m", *worker, *options])


if __name__ == "__main__":
    main()
