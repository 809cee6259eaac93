"""State of a training: averaged weights, and checkpoints from which it goes on bit for bit.

All randomness of a training is a function of (seed, step), so that weights, averages, the
optimiser's moments and the step are the whole state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_model.errors import DataError


class Ema:
    """Exponential moving average of a module's parameters.

    The first updates weigh more, (1 + n) / (10 + n) instead of `decay`, so that a short training is
    not an average with its random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Take in the parameters after `updates` earlier updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        current = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the averages."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weights[name])


@dataclass
class TrainState:
    """What a training changes.

    Attributes:
        step: number of steps done.
    """

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, under a name of its own."""
        found = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        found |= {f"ema/{n}": t for n, t in self.ema.weights.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{key}/{name}"] = value
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over the tensors that another state's `tensors` gave."""
        part = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
        self.model.load_state_dict(part)
        for name, average in self.ema.weights.items():
            average.copy_(tensors[f"ema/{name}"])
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for full_name, tensor in tensors.items():
            if full_name.startswith("optimizer/"):
                _, key, name = full_name.split("/", 2)
                parameter = parameters[name]
                moved = tensor.to(parameter.device, copy=True)
                self.optimizer.state[parameter][key] = moved
        self.step = step


class Checkpoints:
    """The checkpoint files of one run, `step-<number>.safetensors`; the last two are kept.

    Args:
        folder: absolute; workers on other machines must see it under the same path.
        fingerprint: of the configuration and data; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def files(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, whole or not at all, and drop all but the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step-{state.step:09d}.safetensors"
        partial = file.with_suffix(".partial")
        about = {"fingerprint": self.fingerprint, "step": state.step}
        tensors = {n: t.detach().cpu().contiguous() for n, t in state.tensors().items()}
        # One key of metadata: safetensors writes several in no fixed order.
        save_file(tensors, partial, metadata={"state": json.dumps(about, sort_keys=True)})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
        for old in self.files()[:-2]:
            old.unlink()
        return file

    @torch.no_grad()
    def load_average(self, module: nn.Module) -> None:
        """Overwrite a module's parameters with the averages of the newest checkpoint, and what is
        no parameter with what it is there.
        """
        averaged = {n for n, _ in module.named_parameters()}
        with safe_open(self.files()[-1], framework="pt") as content:
            for name, tensor in module.state_dict().items():
                kind = "ema" if name in averaged else "model"
                tensor.copy_(content.get_tensor(f"{kind}/{name}"))

    def restore(self, state: TrainState) -> bool:
        """Go on from the newest checkpoint; False where there is none.

        Raises:
            DataError: it is damaged, or of another configuration.
        """
        files = self.files()
        if not files:
            return False
        file = files[-1]
        try:
            with safe_open(file, framework="pt") as content:
                about = json.loads(content.metadata()["state"])
                if about["fingerprint"] != self.fingerprint:
                    raise DataError(
                        f"checkpoint {file} is of another configuration or data",
                        got=about["fingerprint"],
                        allowed=self.fingerprint,
                        remedy="train under another run name",
                    )
                state.restore({n: content.get_tensor(n) for n in content.keys()}, about["step"])  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"checkpoint {file}", got=error, remedy="delete it") from error
        return True
