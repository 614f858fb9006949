"""Accuracy of every network under attack: on images that were changed to mislead it, or another one (transfer)."""

from __future__ import annotations

from .api import PerMember, Undefined, register_metric
from .context import Context, Models
from .explanations import defined_means
from .shift import accuracy_on
from .views import ATTACKS

TRANSFER = "transfer/"
"""Evidence of a part: which share of images changed for other networks each network decides rightly, by case."""


@register_metric(
    "robust_accuracy",
    direction="higher",
    level="property",
    unit="share of samples",
    citation="Madry et al. (ICLR 2018)",
    needs="a view of an attack",
)
def _robust_accuracy(context: Context, models: Models) -> dict[str, PerMember]:
    """Share of attacked samples decided correctly, per attack."""
    names = [name for name in context.views if name.partition("-")[0] in ATTACKS]
    if not names:
        raise Undefined("no view of an attack")
    return {f"/{name}": accuracy_on(context, models, name) for name in names}


@register_metric(
    "transfer_accuracy",
    direction="higher",
    level="property",
    unit="share of samples",
    citation="Papernot, McDaniel, Goodfellow (2016)",
    needs="images that were changed for other networks of the set",
)
def _transfer_accuracy(context: Context, models: Models) -> dict[str, PerMember | Undefined]:
    """Share of samples decided correctly that were attacked for other networks of the set, per attack."""
    found: dict[str, PerMember | Undefined] = {}
    for name in sorted(n for n in context.evidence if n.startswith(TRANSFER)):
        found[f"/{name.removeprefix(TRANSFER)}"] = defined_means(
            context.bootstrap, models.evidence(context, name), "no images that were changed for another network"
        )
    if not found:
        raise Undefined("no transfer of attacks was measured")
    return found
