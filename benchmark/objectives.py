"""What a training minimises: the mean loss, a class-balanced one, or the worst of groups (group DRO).

Each objective gives the order of an epoch's samples (as many as there are, so that all cost the same number of steps)
and the loss of a batch. The L2 term of the recipe is added by whoever trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, suggest
from ..identity import derive_seed

OBJECTIVES = ("erm", "class_balanced", "group_dro")
RANDOM_GROUPS = 4


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy in nats, mean over samples.

    Multi-label targets ([sample, label], -1 = missing): the sum over the known labels of a sample of binary
    cross-entropies, divided by the number of labels, so that a missing label contributes nothing.
    """
    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(logits, labels)
    return _known_terms(logits, labels).sum(1).mean() / labels.shape[1]


def case_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every sample in nats, [sample], whose mean is `mean_loss`."""
    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return _known_terms(logits, labels).sum(1) / labels.shape[1]


def _known_terms(logits: Tensor, labels: Tensor) -> Tensor:
    terms = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels.clamp(min=0).to(logits.dtype), reduction="none"
    )
    return terms * (labels >= 0)


class Objective(Protocol):
    """What a training minimises besides its L2 term; `state` is what a checkpoint has to hold of it."""

    state: dict[str, Tensor]

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the rows of an epoch, int64 on the CPU, as many as there are samples."""
        ...

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of a batch; rows: its samples' places in the training data."""
        ...


class MeanLoss:
    """Empirical risk: the mean loss, every sample once per epoch."""

    def __init__(self, n: int):
        self.n = n
        self.state: dict[str, Tensor] = {}

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return a permutation of the samples."""
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the mean loss of the batch."""
        return mean_loss(logits, labels)


class ClassBalanced(MeanLoss):
    """Cross-entropy weighted by inverse class frequency, in the order of empirical risk.

    The loss of a sample of class c counts `w_c = N / (C n_c)`, C the number of classes that occur, so that every class
    weighs the same and the mean weight is 1; a batch's loss is `sum_i w_i loss_i / batch size`. Multi-label: the same
    for each label's known positives and negatives; a label with one of them alone keeps the weight 1.
    """

    def __init__(self, labels: Tensor, classes: int):
        super().__init__(len(labels))
        self.weights = class_weights(labels, classes)

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted loss of the batch."""
        weights = self.weights.to(logits.dtype)
        if labels.ndim == 1:
            return (weights[labels] * case_losses(logits, labels)).mean()
        columns = torch.arange(labels.shape[1], device=labels.device)
        return (weights[labels.clamp(min=0), columns] * _known_terms(logits, labels)).sum(1).mean() / labels.shape[1]


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return `N / (C n_c)`, float64 [class]; multi-label: [2, label], of absence and presence among known labels.

    C counts the classes that occur; the mean weight over samples is 1. What does not occur has weight 0.
    """
    if labels.ndim == 1:
        counts = torch.bincount(labels, minlength=classes).double()
    else:
        counts = torch.stack([(labels == value).sum(0) for value in (0, 1)]).double()
    shares = counts.sum(0) / (counts > 0).sum(0).clamp(min=1)
    return torch.where(counts > 0, shares / counts.clamp(min=1), 0.0)


class GroupDRO:
    """Group distributionally robust optimisation: minimise the largest mean loss of the groups.

    On every batch `q_g <- q_g exp(step loss_g)` for the groups in it, normalised over all (in log space: no loss makes
    it overflow, and a weight that has become tiny can grow again), then the loss is `sum_g q_g loss_g` over the groups
    in the batch, loss_g their mean there. The sampler draws a group evenly for every place of a batch, then one of
    its samples, both with replacement; a group is then in a batch of B with chance `c = 1 - (1 - 1/G)^B`, and the
    sum is divided by c, without which the L2 term would outweigh the loss where groups are many.

    An over-parameterised network fits every group's training samples, and then no group is worse than another: the
    method needs strong regularisation (a large prior_precision, few epochs) to differ from a balanced sampler.

    codes: int64 [sample], any integers, each a group; step: eta of the exponentiated gradient. Source: Sagawa, Koh,
    Hashimoto, Liang (ICLR 2020), Algorithm 1, with its batches and reweighted sampling.
    """

    def __init__(self, codes: Tensor, step: float):
        self.codes = torch.unique(codes, return_inverse=True)[1]
        counts = torch.bincount(self.codes)
        self.step, self.groups = step, len(counts)
        self._rows = torch.argsort(self.codes, stable=True).cpu()
        self._counts = counts.cpu()
        self._starts = self._counts.cumsum(0) - self._counts
        even = torch.full((self.groups,), 1 / self.groups, dtype=torch.float64, device=codes.device)
        self.state = {"log_q": even.log()}

    @property
    def weights(self) -> Tensor:
        """The weights q of the groups in the order of their codes, float64 [group]."""
        return self.state["log_q"].exp()

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return rows drawn with replacement: each place is a sample of an evenly drawn group."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "balanced order", epoch))
        n = len(self.codes)
        group = torch.randint(self.groups, (n,), generator=generator)
        within = torch.rand(n, generator=generator, dtype=torch.float64) * self._counts[group]
        return self._rows[self._starts[group] + within.long()]

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the weighted loss of the batch, after updating the weights by it."""
        return self.robust(case_losses(logits, labels), rows)

    def robust(self, losses: Tensor, rows: Tensor) -> Tensor:
        """Return `sum_g q_g loss_g / c` of the samples' losses [sample], after updating q by them."""
        member = torch.nn.functional.one_hot(self.codes[rows], self.groups).to(losses.dtype)
        group_loss = losses @ member / member.sum(0).clamp(min=1)
        log_q = self.state["log_q"] + self.step * group_loss.detach().double()  # groups that are absent add 0
        self.state["log_q"] = torch.log_softmax(log_q, 0)
        present = 1 - (1 - 1 / self.groups) ** len(rows)
        return (self.weights.to(losses.dtype) * group_loss).sum() / present


@dataclass(frozen=True)
class Grouping:
    """What training samples can be grouped by, as arrays over samples.

    labels: [sample], or [sample, label]; attributes: name -> codes, -1 = unknown; patient: codes, None where unknown;
    strata: makes the codes of hidden strata, None where there are none.
    """

    labels: np.ndarray
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)
    patient: np.ndarray | None = None
    strata: Callable[[], Tensor | np.ndarray] | None = None

    def codes(self, groups: str) -> Tensor:
        """Return the group of every sample, int64 [sample], 0..G-1, for a product of names such as `sex*label`.

        Names: the attributes, `label`, `strata`, and `random`: four groups of (nearly) as many patients, the same for
        every training. Unknown values of an attribute are a group of their own. A combination without samples is no
        group. Raises UserError for what the data do not know, and where all samples are in one group.
        """
        factors = [np.asarray(self._factor(name, groups), np.int64) for name in groups.split("*")]
        codes = np.unique(np.stack(factors), axis=1, return_inverse=True)[1].reshape(-1)
        if codes.max(initial=0) == 0:
            raise UserError(f"groups={groups}: all training samples are in one group: name what tells them apart")
        return torch.from_numpy(codes.astype(np.int64))

    def _factor(self, name: str, groups: str) -> Tensor | np.ndarray:
        if name == "label":
            if self.labels.ndim > 1:
                raise UserError(
                    f"groups={groups}: 'label' is one of several in a multi-label task: group by attributes"
                )
            return self.labels
        if name == "strata":
            if self.strata is None:
                raise UserError(f"groups={groups}: this run knows no strata: declare some, or group by attributes")
            return self.strata()
        if name == "random":
            return self._random()
        if name not in self.attributes:
            known = [*self.attributes, "label", "random"] + (["strata"] if self.strata else [])
            raise UserError(f"groups={groups}: the data know no attribute '{name}': {suggest(name, known)}")
        return self.attributes[name]

    def _random(self) -> np.ndarray:
        n = len(self.labels)
        index = np.arange(n) if self.patient is None else np.unique(self.patient, return_inverse=True)[1].reshape(-1)
        generator = torch.Generator().manual_seed(derive_seed("random groups"))
        return (torch.randperm(int(index.max()) + 1, generator=generator).numpy() % RANDOM_GROUPS)[index]
