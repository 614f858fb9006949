"""Adversarial images for the members of a set, for each member its own: FGSM, PGD, and Square attack without gradients.

What is climbed is the log of a case's cross-entropy, taken from the log odds against its labels in float64: the same
direction as the cross-entropy itself, which underflows to 0 where a network is sure (its gradient is then 0 without any
robustness). Random numbers depend on (seed, sample) alone: all members start from the same noise, whatever the blocks
and batches. Images are in grey levels, 0 to 255.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from ..errors import UserError
from ..generators.api import NetworkFunction, choices
from ..generators.modelset import Block, ModelSet
from ..identity import derive_seed
from .predict import BATCH, STRATEGIES

STEPS = {"fgsm": 1, "pgd": 10, "square": 200}
"""How many steps (of Square: queries) an attack takes by default."""
NORMS = ("linf", "l2")
CPU_BATCH = 32
"""Images at once on a CPU: what is kept for the gradient of more of them leaves the cache."""
CPU_NUMBERS = 2**19  # in the images at once on a CPU: activations are a hundred times as large

_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of the queries, after which Square halves its area
_FIRST_AREA = 0.8  # share of the image that Square changes at first
_SURE = -30.0  # log odds below which softplus is exp to float64
_GREY = 255.0
_HALF_ULP = 2.0**-17  # of a float32 grey level of at least 128
_Say = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """What may be changed in an image, and how a change that misleads a network is looked for.

    name: fgsm (Goodfellow, Shlens, Szegedy 2015) | pgd (Madry et al. 2018; one random start) | square (Andriushchenko
    et al. 2020; its loss is the cross-entropy); norm: linf | l2; radius: largest norm of the change, in units of the
    pixel range, 2/255 for two grey levels; steps: of pgd, queries of square, by default `STEPS`; step: length of a step
    of pgd, in units of radius, by default `2.5 radius / steps`.
    """

    name: str
    norm: str = "linf"
    radius: float = 2 / 255
    steps: int | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        choices(self.name, "attack.name", STEPS)
        choices(self.norm, "attack.norm", NORMS)
        for name in ("radius", "steps", "step"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"attack.{name}={value} must be positive")
        if self.name == "square" and self.norm != "linf":
            raise UserError("attack.norm=l2 with attack.name=square: Square attack is made for linf")
        if self.name == "fgsm" and self.steps not in (None, 1):
            raise UserError(f"attack.steps={self.steps} with attack.name=fgsm, which takes one: use pgd")
        if self.name != "pgd" and self.step is not None:
            raise UserError(f"attack.step={self.step} with attack.name={self.name}: it is a setting of pgd")

    @property
    def step_count(self) -> int:
        """Steps, or queries, that are taken."""
        return STEPS[self.name] if self.steps is None else self.steps

    @property
    def step_length(self) -> float:
        """Length of a step, in units of radius: fgsm takes the whole radius at once."""
        if self.name == "fgsm":
            return self.radius
        return 2.5 * self.radius / self.step_count if self.step is None else self.step


def attack(
    network: NetworkFunction,
    block: Block,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    seed: int,
    strategy: str = "loop",
    first: int = 0,
) -> Tensor:
    """Return images, float32 [member, sample, channel, height, width], that mislead each member most.

    Of all images that were tried, the clean one among them, each sample keeps the one that is wrong in most labels and,
    of these, has the largest loss: at a given step more steps never give a weaker attack. The change is within the
    radius and the image within 0..255, rounding included. A sample without a label is attacked to change what the
    member itself decides.

    images: uint8 [sample, channel, height, width], of which the first is sample number `first` of the data; labels:
    int64 [sample] or [sample, label] with -1 = missing; strategy: loop | vmap, equal to rounding. Out of memory halves
    the batch and goes on.
    """
    alike = not block.params and not block.buffers and block.output is None

    def run(part: Block, batch: int) -> Tensor:
        found = [
            _attacked(network, part, pixels, known, attack, seed, first + batch * i)
            for i, (pixels, known) in enumerate(zip(images.split(batch), labels.split(batch)))
        ]
        return torch.cat(found, dim=1)

    parts = [_only(block, 0)] if alike else _parts(block, strategy)
    found = torch.cat([_halving(partial(run, part), images) for part in parts])
    return found.expand(block.size, *found.shape[1:])


def predict_each(network: NetworkFunction, block: Block, images: Tensor, strategy: str = "loop") -> Tensor:
    """Return logits [member, sample, class] of a block of members, of which each sees images of its own.

    images: [member, sample, channel, height, width]. Out of memory halves the batch and goes on.
    """

    def run(part: Block, own: Tensor, batch: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([_logits(network, part, pixels) for pixels in own.split(batch, dim=1)], dim=1)

    parts = _parts(block, strategy)
    own = images.split(1) if len(parts) > 1 else [images]
    return torch.cat([_halving(partial(run, *pair), images[0]) for pair in zip(parts, own)])


def choose_attack_strategy(network: NetworkFunction, model_set: ModelSet, images: Tensor) -> str:
    """Return the strategy in which one step of a few members is faster; `loop` where nothing is stacked.

    images: uint8 [sample, channel, height, width]. Not the strategy of predictions: a gradient costs other passes.
    """
    block = model_set.block(0, min(4 if images.is_cuda else 2, model_set.size))
    if (not block.params and not block.buffers) or model_set.size < 2:
        return "loop"
    few = images[: BATCH if images.is_cuda else CPU_BATCH]
    unknown = torch.full((len(few),), -1, device=few.device)
    seconds = {}
    for strategy in STRATEGIES:
        for rows in (8, len(few)):  # the first is a warm-up
            start = time.perf_counter()
            attack(network, block, few[:rows], unknown[:rows], Attack("fgsm"), 0, strategy).cpu()  # to read is to wait
            seconds[strategy] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


def _halving(run: Callable[[int], Tensor], images: Tensor) -> Tensor:
    """Return `run(batch)`; where the device's memory is too small for a batch of these images, of half of it."""
    batch = BATCH if images.is_cuda else max(1, min(CPU_BATCH, CPU_NUMBERS // max(1, images[0].numel())))
    while True:
        try:
            return run(batch)
        except torch.OutOfMemoryError:
            if batch <= 1:
                raise
        torch.cuda.empty_cache()  # only now does nothing hold on to the failed batch
        batch //= 2


def _parts(block: Block, strategy: str) -> list[Block]:
    return {"loop": lambda: [_only(block, k) for k in range(block.size)], "vmap": lambda: [block]}[strategy]()


def _only(block: Block, index: int) -> Block:
    """Return one member of a block as a block of its own."""
    output, whole = None, block.output
    if whole is not None:

        def output(logits: Tensor, images: Tensor) -> Tensor:
            return whole(logits.expand(block.size, -1, -1), images)[index : index + 1]

    params, buffers = ({n: leaf[index : index + 1] for n, leaf in own.items()} for own in (block.params, block.buffers))
    return replace(block, start=block.start + index, size=1, params=params, buffers=buffers, output=output)


def _logits(network: NetworkFunction, block: Block, images: Tensor) -> Tensor:
    """Return logits [member, sample, class] of members on images of their own [member, sample, ...]."""
    if block.size == 1:
        logits = block.member_logits(network, 0, images[0])[None]
    else:
        say = torch.func.vmap(lambda params, buffers, own: block.logits(network, params, buffers, own))
        logits = say(block.params, block.buffers, images)
    if block.output is None:
        return logits
    return torch.cat([block.output(logits[k].expand_as(logits), own)[k][None] for k, own in enumerate(images)])


def _attacked(
    network: NetworkFunction, block: Block, images: Tensor, labels: Tensor, attack: Attack, seed: int, first: int
) -> Tensor:
    """Attack one batch, whose first image is sample number `first`, in one pass for all members of the block."""

    def say(shown: Tensor) -> Tensor:
        return _logits(network, block, shown)

    clean = images.float()
    ball = _Ball(clean, attack)
    shown = clean.expand(block.size, *clean.shape)
    with torch.no_grad():
        logits = say(shown)
    found = _Found.start(shown, logits, _targets(logits, labels))
    if attack.name == "fgsm":
        _climb(say, found, ball, attack, shown)
        return found.images
    numbers = [torch.Generator().manual_seed(derive_seed(seed, "adversarial", first + i)) for i in range(len(images))]
    if attack.name == "square":
        _square(say, found, ball, attack.step_count, numbers)
    else:
        _climb(say, found, ball, attack, ball.random(numbers).expand_as(shown))
    return found.images


def _climb(say: _Say, found: _Found, ball: _Ball, attack: Attack, images: Tensor) -> None:
    """Take projected steps along the sign (L2: the direction) of the gradient; no gradient is taken of weights."""
    for _ in range(attack.step_count):
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            wrong, loss = _judge(say(images), found.targets)
            (gradient,) = torch.autograd.grad(loss.sum(), images)
        images = images.detach()
        found.offer(images, wrong, loss.detach())
        images = ball.project(images + _GREY * attack.step_length * ball.steepest(gradient))
    with torch.no_grad():
        found.offer(images, *_judge(say(images), found.targets))


@torch.no_grad()
def _square(say: _Say, found: _Found, ball: _Ball, queries: int, numbers: list[torch.Generator]) -> None:
    """Search by random squares of extreme changes; a sample is left alone once it is wrong in all known labels.

    Starts from vertical stripes. The square covers a share of the image of .8 at first, halved as queries are spent.
    A square that would change nothing changes the other way.
    """
    _, channels, height, width = ball.clean.shape
    device = ball.clean.device
    # one call per sample and kind of number, so that a sample's numbers depend on it alone
    stripes = torch.stack([torch.rand(channels, 1, width, generator=g) for g in numbers]).to(device)
    places = torch.stack([torch.rand(queries, 2, generator=g) for g in numbers]).to(device)
    signs = torch.stack([torch.rand(queries, channels, 1, 1, generator=g) for g in numbers]).to(device) > 0.5
    known = (found.targets >= 0).sum(-1) if found.targets.ndim == 3 else torch.ones_like(found.wrong)
    striped = torch.where(stripes > 0.5, ball.high, ball.low).expand_as(found.images)
    present = _Found.start(striped, say(striped), found.targets)
    for query in range(1, queries):
        standing = present.wrong < known
        rows = standing.any(0).nonzero()[:, 0]
        if not len(rows):
            break
        inside = _windows(places[rows, query], _side(query / queries, height, width), height, width)
        held = present.images[:, rows]
        changed = _extreme(ball, rows, signs[rows, query], inside, held)
        same = (changed == held).flatten(2).all(2)[..., None, None, None]
        changed = torch.where(same, _extreme(ball, rows, ~signs[rows, query], inside, held), changed)
        wrong, loss = _judge(say(changed), found.targets[:, rows])
        present.offer(changed, wrong, loss.masked_fill(~standing[:, rows], -math.inf), rows)
    found.offer(present.images, present.wrong, present.loss)


def _extreme(ball: _Ball, rows: Tensor, up: Tensor, inside: Tensor, images: Tensor) -> Tensor:
    return torch.where(inside, torch.where(up, ball.high[rows], ball.low[rows]), images)


def _side(spent: float, height: int, width: int) -> int:
    """Return the side of the square after a share of the queries."""
    area = _FIRST_AREA / 2 ** sum(spent > limit for limit in _HALVINGS)
    return min(max(1, round(math.sqrt(area * height * width))), height, width)


def _windows(places: Tensor, side: int, height: int, width: int) -> Tensor:
    """Return bool masks [sample, 1, height, width] of squares at places [sample, 2] in [0, 1)."""
    tops, lefts = ((places[:, i] * (size - side + 1)).long()[:, None] for i, size in enumerate((height, width)))
    rows, columns = (torch.arange(size, device=places.device) for size in (height, width))
    vertical, horizontal = (rows >= tops) & (rows < tops + side), (columns >= lefts) & (columns < lefts + side)
    return (vertical[:, :, None] & horizontal[:, None, :])[:, None]


class _Ball:
    """What may be shown instead of clean images [sample, channel, height, width]: no farther than the radius, 0..255.

    low, high: the ends of every pixel, rounded inward.
    """

    def __init__(self, clean: Tensor, attack: Attack):
        self.clean, self.norm, self.radius = clean, attack.norm, _GREY * attack.radius
        low, high = clean - self.radius, clean + self.radius
        exact = clean.double()
        low = torch.where(exact - low.double() > self.radius, torch.nextafter(low, clean), low)
        high = torch.where(high.double() - exact > self.radius, torch.nextafter(high, clean), high)
        self.low, self.high = low.clamp(min=0.0), high.clamp(max=_GREY)
        # adding a change rounds every pixel, its norm is rounded as well: this much less keeps the sum inside
        self.length = max(0.0, (1 - 1e-5) * self.radius - _HALF_ULP * math.sqrt(clean[0].numel()))

    def project(self, images: Tensor) -> Tensor:
        """Return the nearest images in the ball, then within 0..255, which takes them nearer to the clean ones."""
        if self.norm == "linf":
            return torch.clamp(images, self.low, self.high)
        change = images - self.clean
        shrink = self.length / _length(change).clamp(min=max(self.length, torch.finfo(change.dtype).tiny))
        return (self.clean + shrink * change).clamp(0.0, _GREY)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the change of norm 1 along which the loss grows most; 0 where the gradient is."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _length(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)

    def random(self, numbers: list[torch.Generator]) -> Tensor:
        """Return images drawn uniformly from the ball, each by a generator of its own, then projected."""
        shape, device = self.clean.shape[1:], self.clean.device
        if self.norm == "linf":
            uniform = torch.stack([torch.rand(shape, generator=g) for g in numbers]).to(device)
            return self.project(self.clean + self.radius * (2 * uniform - 1))
        normal = torch.stack([torch.randn(shape, generator=g) for g in numbers]).to(device)
        share = torch.stack([torch.rand(1, 1, 1, generator=g) for g in numbers]).to(device)
        distance = self.radius * share ** (1 / self.clean[0].numel())
        return self.project(self.clean + distance * normal / _length(normal))


def _length(change: Tensor) -> Tensor:
    return torch.linalg.vector_norm(change, dim=(-3, -2, -1), keepdim=True)


@dataclass
class _Found:
    """The most misleading images so far [member, sample, ...].

    targets: labels to get away from, int64 [member, sample(, label)]; wrong: in how many of them the member is;
    loss: log of the cross-entropy, both [member, sample].
    """

    targets: Tensor
    images: Tensor
    wrong: Tensor
    loss: Tensor

    @staticmethod
    def start(images: Tensor, logits: Tensor, targets: Tensor) -> _Found:
        return _Found(targets, images, *_judge(logits, targets))

    def offer(self, images: Tensor, wrong: Tensor, loss: Tensor, rows: Tensor | None = None) -> None:
        """Take images (of the samples `rows`) where they mislead more."""
        if rows is not None:
            images, wrong, loss = (
                old.index_copy(1, rows, new)
                for old, new in ((self.images, images), (self.wrong, wrong), (self.loss, loss))
            )
        better = (wrong > self.wrong) | ((wrong == self.wrong) & (loss > self.loss))
        self.images = torch.where(better[..., None, None, None], images, self.images)
        self.wrong, self.loss = torch.where(better, wrong, self.wrong), torch.where(better, loss, self.loss)


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    """Return labels by member; a sample without any gets what the member decides."""
    own = logits.argmax(-1) if labels.ndim == 1 else (logits > 0).to(labels.dtype)
    unknown = labels < 0 if labels.ndim == 1 else (labels < 0).all(1, keepdim=True)
    return torch.where(unknown, own, labels)


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return in how many known labels cases are wrong, and the log of their cross-entropy, float64 [member, sample].

    Cross-entropy is `softplus(m)`, m the log odds against the label, summed over known labels.
    """
    logits = logits.double()
    if targets.ndim == 2:
        true = one_hot(targets, logits.shape[-1]).bool()
        others = logits.masked_fill(true, -math.inf).logsumexp(-1)
        odds = others - logits.gather(-1, targets[..., None])[..., 0]
        return (logits.argmax(-1) != targets).long(), _log_softplus(odds)
    known = targets >= 0
    wrong = ((logits > 0) != (targets > 0)) & known
    terms = _log_softplus(torch.where(targets > 0, -logits, logits))
    return wrong.sum(-1), terms.masked_fill(~known, -math.inf).logsumexp(-1)


def _log_softplus(odds: Tensor) -> Tensor:
    return torch.where(odds < _SURE, odds, softplus(odds.clamp(min=_SURE)).log())
