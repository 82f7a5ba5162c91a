"""The two sides that bench_step compares for each method, this library and the plain recipe, timed by part."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from benchmarks import harness
from benchmarks.step.cases import Case
from benchmarks.step.plain_softmask_pp import PlainSoftMaskPP
from benchmarks.step.plain_sycoca import PlainSyCoCa
from softmask.models import SoftMaskPP, SoftMaskPPConfig, SyCoCa, SyCoCaConfig, SyCoCaOutput
from softmask.models.layers.vision import VisionEncoder
from softmask.models.softmask_pp.model import SoftMaskPPOutput
from softmask.ranges import observed_by

ALPHA = 0.4
VIT = "image encoder"
BACKWARD = "backward"


class Clock:
    """Seconds, or another count, by part. Time in a nested part does not count for the outer one."""

    def __init__(self) -> None:
        self._now: Callable[[], float] = harness.now
        self._taken: dict[str, float] = defaultdict(float)
        self._running: list[tuple[str, float]] = []

    def measure(self, call: Callable[[], object], *, now: Callable[[], float] = harness.now) -> dict[str, float]:
        """How much each part of the call adds to `now()`. The models' named ranges are parts too."""
        self._now = now
        self._taken.clear()
        with observed_by(self.part):
            call()
        return dict(self._taken)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._pause()
        self._running.append((name, self._now()))
        try:
            yield
        finally:
            self._pause()
            self._running.pop()
            if self._running:
                self._running[-1] = (self._running[-1][0], self._now())

    def _pause(self) -> None:
        if self._running:
            name, since = self._running[-1]
            self._taken[name] += self._now() - since

    def becomes(self, name: str) -> None:
        """From here on, the running part, if any, counts under another name."""
        self._pause()
        if self._running:
            self._running[-1] = (name, self._now())

    def wrap(self, owner: object, names: str, part: str) -> None:
        """Time the calls of an object's methods as a part."""
        for name in names.split():
            function = getattr(owner, name)

            def timed(*arguments, _function=function, **options):
                with self.part(part):
                    return _function(*arguments, **options)

            setattr(owner, name, timed)

    def watch(self, vision: VisionEncoder) -> None:
        """Time an image encoder's backward pass, from the moment its tokens' gradient is complete."""

        def begin(_module: nn.Module, _inputs: object, tokens: Tensor) -> None:
            if tokens.requires_grad:
                tokens.register_hook(lambda _: self.becomes(f"{VIT}, {BACKWARD}"))

        def end(_module: nn.Module, _inputs: object, patches: Tensor) -> None:
            if patches.requires_grad:
                _first_node(patches.grad_fn).register_hook(lambda *_: self.becomes(BACKWARD))

        vision.register_forward_hook(begin)
        vision.vit.patch_embed.register_forward_hook(end)


def _first_node(node: Node) -> Node:
    """The last node of the backward pass, found along a chain that starts at an input without gradient."""
    while earlier := [before for before, _ in node.next_functions if before is not None and before.next_functions]:
        node = earlier[0]
    return node


@dataclass
class Side:
    """The losses of a step ("total" and its terms), and the momentum update before it."""

    model: SoftMaskPP | SyCoCa
    losses: Callable[[], dict[str, Tensor]]
    update_momentum: Callable[[], None]
    clock: Clock

    def add_gradients(self, *, bf16: bool = False) -> None:
        with self.clock.part("other"), torch.autocast(harness.DEVICE, torch.bfloat16) if bf16 else nullcontext():
            loss = self.losses()["total"]
        with self.clock.part(BACKWARD):
            loss.backward()


def _total(model: SoftMaskPP | SyCoCa, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"total": sum(getattr(model.config.weights, name) * term for name, term in terms.items()), **terms}


def _losses_of(model: SoftMaskPP | SyCoCa, output: SoftMaskPPOutput | SyCoCaOutput) -> dict[str, Tensor]:
    """The loss and its weighted terms."""
    weighted = {name: output.terms[name] for name in vars(model.config.weights) if name in output.terms}
    return {"total": output.loss, **weighted}


# -- SoftMask++ --------------------------------------------------------------------------------------------------------


def softmask_pp(case: Case) -> Side:
    model, clock = case.model, Clock()
    clock.watch(model.backbone.vision)

    def losses() -> dict[str, Tensor]:
        return _losses_of(model, model(case.batch, alpha=ALPHA, draws=case.draws))

    return Side(model, losses, model.update_momentum, clock)


def softmask_pp_without_masks(case: Case) -> Side:
    case.model.config = replace(case.model.config, soft_mask=False)
    return softmask_pp(case)


def plain_softmask_pp(case: Case) -> Side:
    model, recipe, clock = case.model, PlainSoftMaskPP(case.model), Clock()
    clock.wrap(recipe, "contrastive", "contrastive loss")
    clock.wrap(recipe, "image_weight", "soft mask")
    clock.wrap(recipe, "masked_tokens", "masked tokens")
    clock.wrap(recipe, "text", "text encoder")
    clock.wrap(recipe, "fuse", "fusion")
    clock.watch(model.backbone.vision)

    def losses() -> dict[str, Tensor]:
        return _total(model, recipe.losses(case.batch, case.draws, alpha=ALPHA))

    return Side(model, losses, recipe.update_momentum, clock)


# -- SyCoCa ------------------------------------------------------------------------------------------------------------


def sycoca(case: Case) -> Side:
    model, clock = case.model, Clock()
    clock.watch(model.backbone.vision)
    return Side(model, lambda: _losses_of(model, model(case.batch)), model.update_momentum, clock)


def plain_sycoca(case: Case) -> Side:
    model, recipe, clock = case.model, PlainSyCoCa(case.model), Clock()
    clock.watch(model.backbone.vision)
    clock.wrap(recipe, "text", "text encoder")
    clock.wrap(recipe, "spoken_patches", "masks")
    clock.wrap(recipe, "caption_decoder", "caption decoder")
    clock.wrap(recipe, "caption", "caption head and loss")
    clock.wrap(recipe, "image_decoder", "image decoder")
    clock.wrap(recipe, "reconstruction", "pixel head and loss")
    return Side(model, lambda: _total(model, recipe.losses(case.batch)), model.update_momentum, clock)


SIDES: dict[type, dict[str, Callable[[Case], Side]]] = {
    SoftMaskPPConfig: {"plain": plain_softmask_pp, "softmask": softmask_pp, "no masks": softmask_pp_without_masks},
    SyCoCaConfig: {"plain": plain_sycoca, "softmask": sycoca},
}


def make_side(name: str, case: Case) -> Side:
    """A side with a copy of the case's model that shares its parameters and their gradients."""
    shared = {id(parameter): parameter for parameter in case.model.parameters()}
    return SIDES[type(case.model.config)][name](replace(case, model=copy.deepcopy(case.model, shared)))


def make_sides(case: Case) -> dict[str, Side]:
    return {name: make_side(name, case) for name in SIDES[type(case.model.config)]}
