"""One training step at full size: the published recipe written plainly (plain_recipe) and the engine, side by side.

    python benchmarks/bench_step.py [--config train/configs/softmask_base.yaml] [--batch 8] [--bf16] [--turns 5]

Same weights, same captions, same masked tokens, words and negatives, dropout off. First every loss term and gradient is
compared with the plain recipe's in fp64, then whole steps (momentum update, forward, backward, AdamW) are timed in
turns, by part, and their memory and products are counted. `make bench` runs it too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import torch
from plain_recipe import PlainRecipe
from step_cases import Draws, draw, fixed, make_batch, make_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import softmask
from softmask.data import Batch
from softmask.models import SoftMaskPP

CONFIG = Path(__file__).parent.parent / "train" / "configs" / "softmask_base.yaml"
ALPHA = 0.4
VIT = "image encoder"


class Clock:
    """Seconds by part; a part within another is not counted in that one too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[tuple[str, float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._pause()
        self._running.append((name, time.perf_counter()))
        try:
            yield
        finally:
            self._pause()
            self._running.pop()
            if self._running:
                self._running[-1] = (self._running[-1][0], time.perf_counter())

    def _pause(self) -> None:
        if self._running:
            name, since = self._running[-1]
            self.seconds[name] += time.perf_counter() - since

    def becomes(self, name: str) -> None:
        """What runs now, if anything, is a part of another name from here on."""
        self._pause()
        if self._running:
            self._running[-1] = (name, time.perf_counter())

    def wrap(self, owner: object, names: str, part: str) -> None:
        """Count calls of owner's functions; a module's, of its forward."""
        for name in names.split():
            function = getattr(owner, name)

            def timed(*arguments, _function=function, **options):
                with self.part(part):
                    return _function(*arguments, **options)

            setattr(owner, name, timed)


@dataclass
class Side:
    """One of the two recipes: `losses()` of a step, and what comes before it."""

    model: SoftMaskPP
    batch: Batch
    losses: Callable[[], dict[str, Tensor]]
    update_momentum: Callable[[], None]
    clock: Clock


def engine(model: SoftMaskPP, batch: Batch, draws: Draws) -> Side:
    clock = Clock()
    clock.wrap(model, "_contrastive _hard_negatives", "contrastive loss")
    clock.wrap(model, "_soft_mask _map_source", "map")
    clock.wrap(model, "_mlm", "masked tokens")
    for network in (model.backbone, model.twin):
        clock.wrap(network.vision, "forward", VIT)
        clock.wrap(network.text, "forward", "text encoder")
        clock.wrap(network.fusion, "forward start project", "fusion")

    def losses() -> dict[str, Tensor]:
        with fixed(draws):
            output = model(batch, alpha=ALPHA)
        return {"total": output.loss, **output.terms}

    return Side(model, batch, losses, model.update_momentum, clock)


def plain(model: SoftMaskPP, batch: Batch, draws: Draws) -> Side:
    recipe, clock = PlainRecipe(model), Clock()
    clock.wrap(recipe, "contrastive", "contrastive loss")
    clock.wrap(recipe, "image_weight", "map")
    clock.wrap(recipe, "masked_tokens", "masked tokens")
    clock.wrap(recipe, "text", "text encoder")
    clock.wrap(recipe, "fuse", "fusion")
    for network in (model.backbone, model.twin):
        clock.wrap(network.vision, "forward", VIT)

    def losses() -> dict[str, Tensor]:
        terms = recipe.losses(batch, draws, alpha=ALPHA)
        return {"total": sum(terms.values()), **terms}

    return Side(model, batch, losses, recipe.update_momentum, clock)


def engine_without_masks(model: SoftMaskPP, batch: Batch, draws: Draws) -> Side:
    model.config = replace(model.config, soft_mask=False)
    return engine(model, batch, draws)


SIDES = {"plain": plain, "engine": engine, "no masks": engine_without_masks}


# -- values ------------------------------------------------------------------------------------------------------------


def values(name: str, model: SoftMaskPP, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    """Loss terms and gradients of a side. A layer's weight and bias are one: of some biases the true gradient is 0."""
    side = SIDES[name](copy.deepcopy(model), batch, draws)
    terms = side.losses()
    terms["total"].backward()
    found = {f"loss {term}": terms[term].detach().reshape(1) for term in ("total", "itc", "itm", "itm_soft", "mlm")}
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for parameter, tensor in side.model.named_parameters():
        if tensor.grad is not None:
            layers[parameter.rpartition(".")[0] or parameter].append(tensor.grad.flatten())
    return found | {f"gradient {layer}": torch.cat(parts) for layer, parts in layers.items()}


def check_values(model: SoftMaskPP, batch: Batch, draws: Draws) -> str:
    """The engine's error against the plain recipe in fp64: at most twice that of the plain recipe in fp32, and a unit
    of rounding; a loss, whose error is a single draw, has four.

    Raises:
        AssertionError: a loss term or a layer's gradient beyond it.
    """
    truth = values("plain", copy.deepcopy(model).double(), replace(batch, images=batch.images.double()), draws)
    in_plain, ours = values("plain", model, batch, draws), values("engine", model, batch, draws)
    assert truth.keys() == ours.keys() == in_plain.keys()
    ratios = {}
    for name, exact in truth.items():
        size = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
        error, allowed = ((found[name].double() - exact).norm() / size for found in (ours, in_plain))
        units = (4 if exact.numel() == 1 else 1) * torch.finfo(torch.float32).eps
        ratios[name] = (error / (2 * allowed + units)).item()
    worst = max(ratios, key=ratios.__getitem__)
    assert ratios[worst] <= 1, f"{worst}: error {ratios[worst]:.2f} of what is allowed"
    return f"{len(ratios)} loss terms and layers' gradients within the error budget, the nearest to it {worst}"


# -- time, memory, products --------------------------------------------------------------------------------------------


class Stepper:
    """Whole steps of a side, with its own optimizer; a learning rate of 0 keeps the weights."""

    def __init__(self, side: Side, *, bf16: bool) -> None:
        self.side, self.bf16 = side, bf16
        self.optimizer = torch.optim.AdamW((p for p in side.model.parameters() if p.requires_grad), lr=0.0, fused=True)
        side.model.backbone.vision.register_forward_hook(self._watch)

    def _watch(self, _module: nn.Module, _inputs: object, tokens: Tensor) -> None:
        """The image encoder's backward begins when all of the gradient at its tokens is there."""
        tokens.register_hook(lambda _: self.side.clock.becomes(f"{VIT}, backward"))

    def __call__(self) -> None:
        side, clock = self.side, self.side.clock
        with clock.part("momentum update"):
            side.update_momentum()
        with clock.part("other"), torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            loss = side.losses()["total"]
        with clock.part("backward"):
            loss.backward()
        with clock.part("AdamW"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients have their place before a step

    def seconds(self) -> dict[str, float]:
        self.side.clock.seconds.clear()
        self()
        return dict(self.side.clock.seconds)


def products(side: Side) -> dict[str, float]:
    """GFLOP of products, forward and backward, of the image encoder and of the others; none of them is done twice."""
    vision = (side.model.backbone.vision, side.model.twin.vision)
    with softmask.backend("reference"), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            side.losses()["total"].backward()
        total, of_vision = counter.get_total_flops(), 0
        images = torch.randn(1, 3, *[side.model.config.vision.image_size] * 2)
        for network in vision:
            with FlopCounterMode(display=False) as counter:
                tokens = network(images)
                if tokens.requires_grad:
                    tokens.sum().backward()
            of_vision += counter.get_total_flops()
    of_vision *= len(side.batch.images)
    return {VIT: of_vision / 1e9, "all others": (total - of_vision) / 1e9}


def matrix_rate() -> float:
    """GFLOP/s of the best of some products."""
    a, b = torch.randn(2, 2048, 2048)
    times = [harness.seconds(lambda: a @ b) for _ in range(5)]
    return 2 * 2048**3 / min(times) / 1e9


@dataclass
class Measured:
    """Medians over the turns, in seconds, and of the ratios within a turn."""

    parts: dict[str, dict[str, float]]  # side -> part -> seconds
    whole: dict[str, float]
    rest: dict[str, float]  # everything but the image encoder
    faster: float  # the plain step's time over the engine's
    rest_faster: float
    masks_cost: float  # of the engine's step, over the one without soft masks
    memory: dict[str, float]  # MiB at most beyond weights, gradients and optimizer state

    def lines(self) -> Iterator[str]:
        yield f"{'seconds':<28}" + "".join(f"{name:>10}" for name in self.parts)
        for part in dict.fromkeys(part for parts in self.parts.values() for part in parts):
            yield f"{part:<28}" + "".join(f"{parts.get(part, 0.0):10.3f}" for parts in self.parts.values())
        for label, row in (("all but the image encoder", self.rest), ("step", self.whole), ("peak MiB", self.memory)):
            yield f"{label:<28}" + "".join(f"{row[name]:10.3f}" for name in self.parts)
        yield f"step {self.faster:.2f} x faster, all but the image encoder {self.rest_faster:.2f} x"
        yield f"soft masks cost {self.masks_cost:.1%} of the step without them"
        yield f"memory {self.memory['engine'] / self.memory['plain']:.2f} of the plain recipe's"


def _rest(parts: dict[str, float]) -> float:
    return sum(seconds for part, seconds in parts.items() if not part.startswith(VIT))


def measure(steppers: dict[str, Stepper], *, turns: int) -> Measured:
    for stepper in steppers.values():
        stepper()
    taken = [{name: stepper.seconds() for name, stepper in steppers.items()} for _ in range(turns)]

    def median(value: Callable[[dict[str, dict[str, float]]], float]) -> float:
        return statistics.median(value(turn) for turn in taken)

    def whole(parts: dict[str, float]) -> float:
        return sum(parts.values())

    return Measured(
        parts={
            name: {part: median(lambda turn, n=name, p=part: turn[n][p]) for part in taken[0][name]}
            for name in steppers
        },
        whole={name: median(lambda turn, n=name: whole(turn[n])) for name in steppers},
        rest={name: median(lambda turn, n=name: _rest(turn[n])) for name in steppers},
        faster=median(lambda turn: whole(turn["plain"]) / whole(turn["engine"])),
        rest_faster=median(lambda turn: _rest(turn["plain"]) / _rest(turn["engine"])),
        masks_cost=median(lambda turn: whole(turn["engine"]) / whole(turn["no masks"])) - 1.0,
        memory={name: harness.peak_mib(stepper) for name, stepper in steppers.items()},
    )


def compare(
    config: Path, *, batch_size: int = 8, bf16: bool = False, turns: int = 5, check: bool = True
) -> Iterator[str]:
    """Lines of the report, as they come."""
    model = make_model(config)
    batch = make_batch(model, batch_size)
    draws = draw(model, batch)
    tokens, places = int(batch.attention_mask.sum()), batch.attention_mask.numel()
    yield f"{harness.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    yield f"batch {batch_size}: {tokens} tokens in {places} places, {int((draws.labels >= 0).sum())} masked"
    if check:
        yield check_values(model, batch, draws)
    sides = {name: make(copy.deepcopy(model), batch, draws) for name, make in SIDES.items()}
    del model
    rate = matrix_rate()
    measured = measure({name: Stepper(side, bf16=bf16) for name, side in sides.items()}, turns=turns)
    yield from measured.lines()
    for name, side in sides.items():
        counted = products(side)
        used = counted["all others"] / (measured.rest[name] * rate)
        parts = ", ".join(f"{part} {gflop:.0f} GFLOP" for part, gflop in counted.items())
        yield f"{name}: {parts}, the latter at {used:.0%} of the {rate:.0f} GFLOP/s of a large product"


def test_step(report: Callable[[str], None]) -> None:
    for line in compare(CONFIG, turns=3):
        report(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="products in bf16, by autocast")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--skip-check", action="store_true", help="time without comparing values first")
    chosen = parser.parse_args()
    options = {"batch_size": chosen.batch, "bf16": chosen.bf16, "turns": chosen.turns, "check": not chosen.skip_check}
    for line in compare(chosen.config, **options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
