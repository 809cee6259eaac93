"""Training on Ray Train: any number of workers and GPUs, or this very process.

All that a training leaves (checkpoints, journal, pictures) lies in its run's folder, and a worker
that is started anew goes on from there; Ray's own bookkeeping of a run begins empty each time. So a
finished run is never taken up by accident, and a run survives another release of Ray.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_model.adapters import environment
from mm_model.adapters.mlflow_reporter import Journal
from mm_model.adapters.ray_cluster import cluster
from mm_model.bundle import load_bundle
from mm_model.codec import Codec
from mm_model.config import ModelSize, TrainConfig
from mm_model.data.store import PatchStore
from mm_model.errors import MMError, NonFiniteLossError, ServiceError
from mm_model.modalities import Modality
from mm_model.nn.model import SceneModel, Size
from mm_model.training.dataset import PatchDataset
from mm_model.training.loop import make_state, train
from mm_model.training.preview import Preview
from mm_model.training.regress import fit_regressions
from mm_model.training.start import continued, grown
from mm_model.training.state import Checkpoints

# A worker that waits longer than this for another one gives up, and Ray starts both anew.
_COLLECTIVE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Job:
    """All that a worker has to know; paths are absolute and seen by every worker.

    Attributes:
        run: the run's folder, for checkpoints and journal.
        fingerprint: of configuration, data and code; names what may be resumed.
        store: the patch store.
        positions: of the training patches in the store.
        shown: positions of the held-out patches that pictures are made of.
        start: folder of the bundle that the training begins with; None begins with random weights.
        add: the last of the modalities, if it joins that bundle and alone learns.
        statistics: that the model normalises by: of the training split, or of the bundle.
        seen_sets: sets of modalities that the training, and those before it, have seen together.
        modalities: of the model.
        patch_px: side of a patch.
    """

    run: Path
    fingerprint: str
    store: Path
    positions: tuple[int, ...]
    shown: tuple[int, ...]
    start: Path | None
    add: str | None
    statistics: Mapping[str, Any]
    seen_sets: Sequence[Mapping[str, Any]]
    modalities: tuple[Modality, ...]
    size: ModelSize
    patch_px: int
    config: TrainConfig

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run / "checkpoints", self.fingerprint)

    def model(self) -> SceneModel:
        """The model before its first step, the same wherever it is made."""
        if self.start is not None and self.add is not None:
            torch.manual_seed(self.config.seed)
            last = self.modalities[-1]
            return grown(load_bundle(self.start), last, self.statistics, self.seen_sets)
        if self.start is not None:
            bundle = load_bundle(self.start)
            return continued(bundle, self.seen_sets, self.patch_px, self.config.only)
        torch.manual_seed(self.config.seed)
        codec = Codec(self.modalities, self.statistics)
        size = Size(**self.size.model_dump())
        return SceneModel(
            self.modalities,
            size,
            codec,
            self.seen_sets,
            patch_px=self.patch_px,
            regressions=True,
        )


def launch(job: Job) -> None:
    """Train to the end; the result is the run's newest checkpoint.

    Raises:
        NonFiniteLossError: a loss was not finite; names step and patches.
        ServiceError: the workers do not start, or failed more often than `max_failures`.
    """
    if job.config.workers == 0:
        device = "cuda" if job.config.gpus_per_worker else "cpu"
        _work(job, rank=0, world=1, device=torch.device(device))
        return
    with cluster(job.config.workers + 1):
        _fit(job)


def _work(job: Job, *, rank: int, world: int, device: torch.device) -> None:
    store = PatchStore(job.store)
    dataset = PatchDataset(
        store, job.positions, job.modalities, seed=job.config.seed, batch=job.config.batch
    )
    shown = [store.read(i) for i in job.shown] if rank == 0 else []
    model = job.model()
    if job.start is None:
        fit_regressions(model, dataset, job.config.seed)
    train(
        make_state(model.to(device), job.config),
        dataset,
        job.config,
        checkpoints=job.checkpoints,
        reporter=Journal(job.run),
        sheet=Preview(shown, job.modalities) if shown else None,
        rank=rank,
        world=world,
    )


def _work_in_ray(job: Job) -> NonFiniteLossError | None:
    """A worker's whole life; a loss that is not finite would be so again, so it is no failure."""
    import ray.train
    import ray.train.torch

    environment.give_way()
    context = ray.train.get_context()
    world = context.get_world_size()
    if not job.config.gpus_per_worker:
        # Ray gives each worker one thread; the cores that its siblings leave are its own.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    device = ray.train.torch.get_device()
    try:
        _work(job, rank=context.get_world_rank(), world=world, device=device)
    except NonFiniteLossError as error:
        return error
    return None


def _fit(job: Job) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    config = job.config
    resources = {"CPU": 1.0}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    trainer = TorchTrainer(
        _work_in_ray,
        train_loop_config=job,
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"{job.run.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.run / "ray"),
            worker_runtime_env={"env_vars": environment.training_environment()},
            # Without a limit, workers that no machine can hold are waited for without end.
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=1
            ),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {}).values()
        for cause in causes:
            if isinstance(cause, MMError):
                raise cause from error
        said = "; ".join(f"{type(c).__name__}: {c}" for c in causes) or str(error)
        raise ServiceError(
            f"training failed on Ray, after {config.max_failures} new starts",
            got=" ".join(said.split())[-600:],
            remedy="see that the cluster has room for train.workers, or set it to 0",
        ) from error
    if isinstance(result.return_value, NonFiniteLossError):
        raise result.return_value
