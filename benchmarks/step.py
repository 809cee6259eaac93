"""The bare training step and the product's peak, on any device.

`python -m benchmarks.step --device cuda --size base --patch-px 128 --batch 64` prints samples a
second, the share of the device's own matrix product, and seconds a sampled patch, of a model
with random weights on random images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import setting
from mm_model.codec import Codec
from mm_model.conditions import FEATURES
from mm_model.config import TrainConfig
from mm_model.generative.precision import autocast, used_precision
from mm_model.generative.sampler import sample
from mm_model.nn.model import SceneModel, Size
from mm_model.training.loop import clip_gradients, make_state
from mm_model.training.state import TrainState
from mm_model.training.step import Draws, TrainingStep, draw

Batch = tuple[Tensor, Tensor, Tensor, Draws]
MATRIX = {"cpu": 2048, "cuda": 8192}
_WINDOW = 10  # steps that are timed together


def training_step(
    state: TrainState, batches: Sequence[Batch], config: TrainConfig
) -> tuple[Callable[[], None], int]:
    """One step on batches (x, mask, conditions, draws) that lie on the model's device, in turn;
    and its floating-point operations.
    """
    objective = TrainingStep(state.model)  # type: ignore[arg-type]
    device = batches[0][0].device
    state.model.train()
    done = 0

    def step() -> None:
        nonlocal done
        inputs = batches[done % len(batches)]
        done += 1
        state.optimizer.zero_grad()
        with autocast(device, config.precision):
            loss = objective(*inputs).total
        loss.backward()
        clip_gradients(state.model, config.gradient_clip)  # type: ignore[arg-type]
        state.optimizer.step()

    # The counter knows no fused kernel of attention; as plain products it is counted, too.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return step, counter.get_total_flops()


def samples_per_s(step: Callable[[], None], batch: int, steps: int, device: str = "cpu") -> float:
    """Median over windows of some steps each."""
    rates = []
    for _ in range(max(1, steps // _WINDOW)):
        _settle(device)
        began = time.perf_counter()
        for _ in range(_WINDOW):
            step()
        _settle(device)
        rates.append(_WINDOW * batch / (time.perf_counter() - began))
    return statistics.median(rates)


def matmul_flops_per_s(device: str = "cpu", precision: str | None = None) -> float:
    """Of the product of two square matrices in `train.precision`: the fastest of several."""
    side = MATRIX[torch.device(device).type]
    kind = (
        torch.bfloat16
        if used_precision(precision, torch.device(device)) == "bf16"
        else torch.float32
    )
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))

    def product() -> None:
        a @ b
        _settle(device)

    product()
    return 2 * side**3 / min(setting.take_turns({"product": product}, repeats=9)["product"])


def _settle(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", default="tiny", help="of model.sizes in params.yaml")
    add("--patch-px", type=int, default=64)
    add("--batch", type=int, default=16)
    add("--steps", type=int, default=30)
    add("--compile", action="store_true", help="the decoder and the flow through torch.compile")
    chosen = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    params = setting.params()
    size = Size(**params.model.sizes[chosen.size].model_dump())
    names = [{"modalities": [m.name for m in params.selected], "patches": 1}]
    model = SceneModel(
        params.selected,
        size,
        Codec(params.selected, None),
        names,
        chosen.patch_px,
        regressions=True,
    )
    model.to(chosen.device)
    state = make_state(model, params.train)
    if chosen.compile:
        model.decoder.compile()
        model.flow.compile()
    source = torch.Generator().manual_seed(0)
    shape = (chosen.batch, model.codec.channels, chosen.patch_px, chosen.patch_px)
    batches = []
    for number in range(4):
        x = torch.randn(shape, generator=source).to(chosen.device)
        mask = torch.ones(chosen.batch, len(model.names), *shape[2:], dtype=torch.bool)
        mask = mask.to(chosen.device)
        known = x.new_zeros(chosen.batch, FEATURES)
        draws = draw(model, 0, number, range(chosen.batch), mask).to(chosen.device)
        batches.append((x, mask, known, draws))
    step, flops = training_step(state, batches, params.train)
    for _ in range(5):
        step()
    rate = samples_per_s(step, chosen.batch, chosen.steps, chosen.device)
    precision = used_precision(params.train.precision, torch.device(chosen.device))
    peak = matmul_flops_per_s(chosen.device, precision)
    model.eval()
    x, mask = batches[0][:2]
    seen = mask.clone()
    seen[:, 1:] = False

    def generate() -> None:
        sample(model, x, seen, model.names[1:], list(range(chosen.batch)))
        _settle(chosen.device)

    generate()
    began = time.perf_counter()
    generate()
    seconds = (time.perf_counter() - began) / chosen.batch
    each = flops / chosen.batch
    parameters = sum(p.numel() for p in model.parameters())
    device = chosen.device
    if torch.device(device).type == "cuda":
        device = torch.cuda.get_device_name()
    print(
        f"{chosen.size}: {parameters / 1e6:.1f} M parameters, {chosen.patch_px} px, batch "
        f"{chosen.batch}, {precision}, on {device}\n"
        f"training            {rate:.1f} samples/s, {each / 1e9:.2f} GFLOP a sample\n"
        f"matrix product      {peak / 1e12:.2f} TFLOP/s\n"
        f"share of the peak   {each * rate / peak:.3f}\n"
        f"sampling            {seconds:.4f} s a patch, {len(model.names) - 1} targets from one"
    )


if __name__ == "__main__":
    main()
