"""One training step at full size: a published recipe, written plainly, beside this library.

    python -m benchmarks.step.bench_step [--method softmask_pp | sycoca] [--batch 8] [--bf16] [--turns 5]

Both have the same weights, captions, masked tokens, words and negatives, and dropout is off. First, every loss term and
gradient is compared with the plain recipe's in fp64. Then whole steps (momentum update, forward, backward, AdamW) are
timed in turns, by part, and their memory and products are measured. `make bench` runs it too.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import softmask
from benchmarks import harness
from benchmarks.step.cases import Case, make_case
from benchmarks.step.sides import VIT, Side, make_side, make_sides
from softmask.models import SoftMaskPPConfig, SyCoCaConfig
from softmask.training.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
METHODS = {"softmask_pp": "softmask_base.yaml", "sycoca": "sycoca_base.yaml"}
REST = "all but the image encoder"


def published(method: str) -> SoftMaskPPConfig | SyCoCaConfig:
    """The method's configuration at its published size."""
    return load_config(CONFIGS / METHODS[method]).model


# -- values ------------------------------------------------------------------------------------------------------------


def values(name: str, case: Case) -> dict[str, Tensor]:
    """Loss terms and gradients of a side. A layer's weight and bias count as one, because the true gradient of some
    biases is 0."""
    side = make_side(name, case)
    losses = side.losses()
    losses["total"].backward()
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for parameter, tensor in side.model.named_parameters():
        if tensor.grad is not None:
            layers[parameter.rpartition(".")[0] or parameter].append(tensor.grad.flatten())
            tensor.grad = None
    found = {f"loss {term}": loss.detach().reshape(1) for term, loss in losses.items()}
    return found | {f"gradient {layer}": torch.cat(layers.pop(layer)) for layer in list(layers)}


def check_values(case: Case) -> str:
    """Compares this library's error with the plain recipe's, both against the plain recipe in fp64.

    It may be twice the plain recipe's in fp32 plus one rounding unit; for a loss, whose error is a single draw, plus
    four. The model is converted to fp64 and back.

    Raises:
        AssertionError: a loss term or a layer's gradient exceeds this.
    """
    case.model.double()
    truth = values("plain", replace(case, batch=replace(case.batch, images=case.batch.images.double())))
    case.model.float()
    in_plain, ours = errors("plain", case, truth), errors("softmask", case, truth)
    ratios = {}
    for name, exact in truth.items():
        units = (4 if exact.numel() == 1 else 1) * torch.finfo(torch.float32).eps
        ratios[name] = ours[name] / (2 * in_plain[name] + units)
    worst = max(ratios, key=lambda name: (not ratios[name] <= 1, ratios[name]))  # NaN ranks above all numbers
    assert ratios[worst] <= 1, f"{worst}: error {ratios[worst]:.2f} of what is allowed"
    return f"{len(ratios)} loss terms and layers' gradients within the error budget; closest to it: {worst}"


def errors(name: str, case: Case, truth: dict[str, Tensor]) -> dict[str, float]:
    """Distance of a side's values from the true ones, relative to these."""
    found = values(name, case)
    assert found.keys() == truth.keys(), f"{name}: {sorted(found.keys() ^ truth.keys())} only on one side"
    tiny = torch.finfo(torch.float32).tiny
    return {
        key: ((found[key].double() - exact).norm() / exact.norm().clamp_min(tiny)).item()
        for key, exact in truth.items()
    }


# -- time, memory, products --------------------------------------------------------------------------------------------


class Stepper:
    """Whole steps of a side. The learning rate is 0, so the weights do not change."""

    def __init__(self, side: Side, optimizer: torch.optim.Optimizer, *, bf16: bool) -> None:
        self.side, self.optimizer, self.bf16 = side, optimizer, bf16

    def __call__(self) -> None:
        clock = self.side.clock
        with clock.part("momentum update"):
            self.side.update_momentum()
        self.side.add_gradients(bf16=self.bf16)
        with clock.part("AdamW"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients keep their memory between steps

    def seconds(self) -> dict[str, float]:
        return self.side.clock.measure(self)


def make_steppers(case: Case, *, bf16: bool) -> dict[str, Stepper]:
    """All sides on one set of weights, gradients and moments: at full size, two sets need much of a machine's
    memory."""
    trained = (parameter for parameter in case.model.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    return {name: Stepper(side, optimizer, bf16=bf16) for name, side in make_sides(case).items()}


class FlopCounter(TorchDispatchMode):
    """The total of FlopCounterMode, whose hooks on modules fail for a slice that is read without gradient, as masks
    are."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        out = function(*arguments, **options)
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*arguments, **options, out_val=out)
        return out


def products(side: Side) -> dict[str, float]:
    """GFLOP of products by part."""
    with softmask.backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        counted = side.clock.measure(side.add_gradients, now=lambda: counter.total)
    return {part: flop / 1e9 for part, flop in counted.items() if flop}


def matrix_rate() -> float:
    """GFLOP/s of a large product, the best of several."""
    a, b = torch.randn(2, 2048, 2048, device=harness.DEVICE)
    times = [harness.seconds(lambda: a @ b) for _ in range(5)]
    return 2 * 2048**3 / min(times) / 1e9


@dataclass
class Measured:
    """Medians over the turns, in seconds, and medians of the ratios within a turn."""

    parts: dict[str, dict[str, float]]  # side -> part -> seconds
    whole: dict[str, float]
    rest: dict[str, float]  # everything but the image encoder
    faster: float  # the plain step's time over softmask's
    rest_faster: float
    memory: dict[str, float]  # peak MiB beyond weights, gradients and optimizer state
    masks_cost: float | None = None  # of softmask's step, relative to one without soft masks

    def lines(self) -> Iterator[str]:
        yield from table("seconds", self.parts, {REST: self.rest, "step": self.whole, "peak MiB": self.memory})
        yield f"step {self.faster:.2f} x faster, {REST} {self.rest_faster:.2f} x"
        if self.masks_cost is not None:
            yield f"soft masks cost {self.masks_cost:.1%} of the step without them"
        yield f"memory {self.memory['softmask'] / self.memory['plain']:.2f} of the plain recipe's"


def table(unit: str, parts: dict[str, dict[str, float]], more: dict[str, dict[str, float]]) -> Iterator[str]:
    """A column per side, and a row per part and per name in `more`."""
    rows = {part: None for of_side in parts.values() for part in of_side}
    rows = {part: {name: of_side.get(part, 0.0) for name, of_side in parts.items()} for part in rows} | more
    yield f"{unit:<28}" + "".join(f"{name:>10}" for name in parts)
    for label, row in rows.items():
        yield f"{label:<28}" + "".join(f"{row[name]:10.3f}" for name in parts)


def _rest(parts: dict[str, float]) -> float:
    return sum(taken for part, taken in parts.items() if not part.startswith(VIT))


def _whole(parts: dict[str, float]) -> float:
    return sum(parts.values())


def measure(steppers: dict[str, Stepper], *, turns: int) -> Measured:
    for stepper in steppers.values():
        stepper()
    taken = [{name: stepper.seconds() for name, stepper in steppers.items()} for _ in range(turns)]

    def median(value: Callable[[dict[str, dict[str, float]]], float]) -> float:
        return statistics.median(value(turn) for turn in taken)

    masks_cost = None
    if "no masks" in steppers:
        masks_cost = median(lambda turn: _whole(turn["softmask"]) / _whole(turn["no masks"])) - 1.0
    return Measured(
        parts={
            name: {part: median(lambda turn, n=name, p=part: turn[n][p]) for part in taken[0][name]}
            for name in steppers
        },
        whole={name: median(lambda turn, n=name: _whole(turn[n])) for name in steppers},
        rest={name: median(lambda turn, n=name: _rest(turn[n])) for name in steppers},
        faster=median(lambda turn: _whole(turn["plain"]) / _whole(turn["softmask"])),
        rest_faster=median(lambda turn: _rest(turn["plain"]) / _rest(turn["softmask"])),
        memory={name: harness.peak_mib(stepper) for name, stepper in steppers.items()},
        masks_cost=masks_cost,
    )


def compare(
    config: SoftMaskPPConfig | SyCoCaConfig,
    *,
    batch_size: int = 8,
    bf16: bool = False,
    turns: int = 5,
    check: bool = True,
) -> Iterator[str]:
    """Lines of the report, as soon as they are known."""
    with torch.device(harness.DEVICE):
        case = make_case(config, batch_size)
    mask = case.batch.attention_mask
    yield f"{harness.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    masked = "" if case.draws is None else f", {int((case.draws.masked.labels >= 0).sum())} masked"
    yield f"batch {batch_size}: {int(mask.sum())} tokens in {mask.numel()} positions{masked}"
    if check:
        yield check_values(case)
    rate = matrix_rate()
    steppers = make_steppers(case, bf16=bf16)
    measured = measure(steppers, turns=turns)
    yield from measured.lines()
    gflop = {name: products(stepper.side) for name, stepper in steppers.items()}
    rest = {name: _rest(parts) for name, parts in gflop.items()}
    yield from table("GFLOP", gflop, {REST: rest, "step": {name: _whole(parts) for name, parts in gflop.items()}})
    for name in steppers:
        used = rest[name] / (measured.rest[name] * rate)
        yield f"{name}: {REST} at {used:.0%} of the {rate:.0f} GFLOP/s of a large product"


@pytest.mark.parametrize("method", METHODS)
def test_step(report: Callable[[str], None], method: str) -> None:
    for line in compare(published(method), turns=3):
        report(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--method", choices=METHODS, default="softmask_pp", help="at its published size")
    model.add_argument("--config", type=Path, help="the model of this configuration instead")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="products in bf16, by autocast")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--skip-check", action="store_true", help="time without comparing values first")
    chosen = parser.parse_args()
    config = load_config(chosen.config).model if chosen.config else published(chosen.method)
    options = {"batch_size": chosen.batch, "bf16": chosen.bf16, "turns": chosen.turns, "check": not chosen.skip_check}
    for line in compare(config, **options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
