"""Names of shifted views: `jpeg-3`, `pgd-4`, `ood-noise`, with a part before them (`test/jpeg-3`) where it is not both.

A view shows a part of the data (val or test) otherwise. Corruptions have a severity of 1 to 5. Attacks have the largest
change of a pixel, in grey levels of 255; `pgd_transfer-4` is made for the base and shown to every member. Outliers
(`ood-...`) are other images, of noise or of another dataset, without labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError, suggest
from ..identity import derive_seed

PARTS = ("val", "test")
ATTACKS = ("fgsm", "pgd", "pgd_l2", "square", "pgd_transfer")
"""Of `pgd_l2`, the number is the root mean square of the change of the pixels, in grey levels."""
OUTLIERS = "ood"
DETECTORS = ("energy", "max_logit", "mahalanobis", "knn", "vim")
"""Detectors of outliers that need more of a network than its probabilities."""
EVIDENCE = (*DETECTORS, "saliency", "transfer", "membership")
"""What can be measured of the networks beside their predictions."""
SCORED = ("accuracy", "ambiguity", "balanced_accuracy", "disagreement", "ece", "nll")
"""Metrics whose values on test's views with labels stand in a record."""
LARGEST = {"corruption": 5, "attack": 255}


@dataclass(frozen=True, order=True)
class View:
    """One shifted view. number: severity of a corruption, grey levels of an attack; source: of outliers."""

    part: str
    operation: str
    number: int = 0
    source: str = ""

    @property
    def kind(self) -> str:
        """corruption | attack | outliers."""
        if self.operation == OUTLIERS:
            return "outliers"
        return "attack" if self.operation in ATTACKS else "corruption"

    @property
    def name(self) -> str:
        """The view's name within its part."""
        return f"{self.operation}-{self.source or self.number}"

    def __str__(self) -> str:
        return f"{self.part}/{self.name}"


def parse_view(text: str) -> list[View]:
    """Return the views that a name means: of both parts unless it names one. UserError for what is no name of a view.

    Whether a corruption or a dataset of that name exists is for those to say who make the images.
    """
    part, _, name = text.rpartition("/")
    if part and part not in PARTS:
        raise UserError(f"view '{text}': there is no part '{part}': {suggest(part, PARTS)}")
    parts = (part,) if part else PARTS
    operation, _, rest = name.partition("-")
    if operation == OUTLIERS:
        if not re.fullmatch(r"\w+", rest):
            raise UserError(f"view '{text}': say which outliers, as in ood-noise or ood-phantom_cxr")
        return [View(p, operation, source=rest) for p in parts]
    if not re.fullmatch(r"[a-z]\w*", operation) or not re.fullmatch(r"[1-9]\d{0,2}", rest):
        raise UserError(
            f"view '{text}': write a corruption and its severity (jpeg-3), an attack and its grey levels (pgd-4), or "
            "outliers (ood-noise)"
        )
    views = [View(p, operation, int(rest)) for p in parts]
    largest = LARGEST[views[0].kind]
    if views[0].number > largest:
        raise UserError(f"view '{text}': the number of a {views[0].kind} is 1 to {largest}")
    return views


def parse_views(names: Iterable[str]) -> list[View]:
    """Return the views of several names, each once, in their order."""
    return list(dict.fromkeys(view for name in names for view in parse_view(name)))


def shown_cases(part: str, total: int, count: int) -> np.ndarray:
    """Return which cases of a part views show, sorted rows int64 [min(count, total)]: drawn at random, once for all.

    They depend on the numbers alone, and the cases of a smaller count are among those of a larger one.
    """
    rng = np.random.default_rng(derive_seed("views", "cases", part))
    return np.sort(rng.permutation(total)[:count])
