"""Agreement of explanations: do members that decide a case alike look at the same pixels?

Maps of two networks are compared by rank correlation, by the overlap of their strongest pixels and by structural
similarity. A constant map (a class that nothing speaks for in Grad-CAM) agrees with nothing and disagrees with nothing:
NaN, counted. A level of agreement means little by itself: networks of fresh weights share the image and the
architecture (the null), and a network does not agree perfectly with itself on an image that rounding changed (the
ceiling). The maps are made by `benchmark/explanations.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter
from scipy.stats import rankdata

from ..errors import UserError, suggest
from .api import NonFinite, PerMember, Undefined, register_metric
from .context import Context, Models, sample_blocks
from .intervals import CaseMean, Estimate, PatientBootstrap

MEASURES = ("spearman", "top10", "ssim")
WINDOW = 7  # pixels, of the structural similarity
_PREFIX = "saliency/"


@dataclass(frozen=True)
class PairwiseAgreement:
    """Agreement with the members that decide a case alike, by one measure.

    members: float64 [member, sample], mean over the other members; base: float64 [sample], over all members; NaN where
    no such member, or only ones with a constant map, are there. pairs: int64 [sample], pairs of members that were
    compared; constant: int64 [sample], constant maps among the members' and the base's.
    """

    members: np.ndarray
    base: np.ndarray
    pairs: np.ndarray
    constant: np.ndarray


@dataclass(frozen=True)
class Comparators:
    """What agreement is held against, float64 [sample], NaN where undefined.

    null: of the base's maps with those of networks of fresh weights, mean over these; ceiling: of the base's maps with
    its own on images with rounding noise.
    """

    null: np.ndarray
    ceiling: np.ndarray


@dataclass(frozen=True)
class ExplanationSummary:
    """Agreement within a set beside its comparators, all over the same cases.

    share: `(agreement - null)/(ceiling - null)`, the part of the way from null to ceiling, above 1 for copies of one
    network, whose images are not changed; cases: that all three are defined for; left_out: the others.
    """

    agreement: Estimate
    null: Estimate
    ceiling: Estimate
    share: Estimate | Undefined
    cases: int
    left_out: int


def evidence_name(method: str, measure: str) -> str:
    """Return the name in `Context.evidence` of agreement by this measure of explanations by this method.

    What stands there is `Evidence(found.members, found.base)` of a `PairwiseAgreement` of the accepted members: the
    others have no say in how well a member agrees.
    """
    return f"{_PREFIX}{method}/{measure}"


@register_metric(
    "saliency_agreement",
    direction="higher",
    level="property",
    unit="agreement (1: the same map)",
    citation="Adebayo et al. (NeurIPS 2018), measures; pairs that decide alike: this package",
    needs="explanations of the members; two that decide alike",
)
def _saliency_agreement(context: Context, models: Models) -> dict[str, PerMember | Undefined]:
    """Mean agreement of a model's explanations with those of the members that decide the case alike."""
    found: dict[str, PerMember | Undefined] = {}
    for name in sorted(name for name in context.evidence if name.startswith(_PREFIX)):
        method, measure = name.removeprefix(_PREFIX).split("/")
        found[f"/{method}:{measure}"] = defined_means(
            context.bootstrap,
            models.evidence(context, name),
            "a model decides no case as another member does, with maps that vary",
        )
    if not found:
        raise Undefined("no explanations")
    return found


def agreement(maps_a: np.ndarray, maps_b: np.ndarray, measure: str) -> np.ndarray:
    """Return the agreement of two maps, [..., height, width] twice (leading axes broadcast) -> float64 [...].

    spearman: correlation of the ranks of the pixels, ties at their mean rank. top10: `|A n B| / n`, A and B the n
    largest pixels of each map, n a tenth of the pixels (rounded, at least 1), ties in the order of the pixels; n over
    the number of pixels by chance. ssim: structural similarity (Wang et al. 2004) of the maps scaled to [0, 1], as
    scikit-image defines it by default: mean over all windows of 7 x 7 pixels within the image, evenly weighted, sample
    covariances, K1 = .01, K2 = .03.

    NaN where a map is constant. Raises UserError for an unknown measure, NonFinite for maps that are not finite,
    Undefined for the structural similarity of maps smaller than a window.
    """
    _check(maps_a, measure, "the first")
    _check(maps_b, measure, "the second")
    if measure == "ssim":
        return _similarity(_Windows.of(maps_a), _Windows.of(maps_b))
    a, b = _vectors(maps_a, measure), _vectors(maps_b, measure)
    return np.matmul(a[..., None, :], b[..., :, None])[..., 0, 0]


def pairwise_agreement(
    maps: np.ndarray, decisions: np.ndarray, base_maps: np.ndarray, base_decisions: np.ndarray, measure: str
) -> PairwiseAgreement:
    """Return how every member, and the base, agrees with the members that decide a case alike, for all pairs at once.

    maps: [member, sample, height, width]; decisions: [member, sample]; base_maps: [sample, height, width];
    base_decisions: [sample]. Maps are ranked once, a case's pairs are one matrix product. Errors: as `agreement`.
    """
    _check(base_maps, measure, "the base's")
    for member, own in enumerate(maps):
        _check(own, measure, f"member {member}'s")
    count, samples = decisions.shape
    members, base = np.full((count, samples), np.nan), np.full(samples, np.nan)
    pairs, constant = np.zeros(samples, np.int64), np.zeros(samples, np.int64)
    for block in sample_blocks(maps):
        both = np.concatenate([maps[:, block], base_maps[None, block]])
        decided = np.concatenate([decisions[:, block], base_decisions[None, block]]).T
        alike = decided[:, :, None] == decided[:, None, :count]
        alike[:, np.arange(count), np.arange(count)] = False
        values = np.where(alike, _all_pairs(both, measure)[:, :, :count], np.nan)
        means = _mean_of_defined(values, axis=2)
        members[:, block], base[block] = means[:, :count].T, means[:, count]
        pairs[block] = np.isfinite(values[:, :count]).sum(axis=(1, 2)) // 2
        constant[block] = _constant(both).sum(axis=0)
    return PairwiseAgreement(members, base, pairs, constant)


def comparators(base_maps: np.ndarray, random_maps: np.ndarray, noised_maps: np.ndarray, measure: str) -> Comparators:
    """Return null and ceiling of the agreement, per case.

    base_maps: [sample, height, width]; random_maps: of networks of fresh weights, [model, sample, height, width];
    noised_maps: the base's on images with rounding noise [sample, height, width]. Errors: as `agreement`.
    """
    null = _mean_of_defined(agreement(base_maps[None], random_maps, measure), axis=0)
    return Comparators(null, agreement(base_maps, noised_maps, measure))


def explanation_summary(members: np.ndarray, beside: Comparators, bootstrap: PatientBootstrap) -> ExplanationSummary:
    """Return the set's mean agreement beside null and ceiling, with intervals over patients.

    members: [member, sample], as in `PairwiseAgreement`. A case's agreement is the mean over its members. Cases for
    which one of the three is undefined are left out of all of them, and counted. The share of the way is Undefined
    where the ceiling is not above the null. Raises Undefined when no case is left.
    """
    per_case = np.stack([_mean_of_defined(members, axis=0), beside.null, beside.ceiling])
    defined = np.isfinite(per_case).all(axis=0)
    if not defined.any():
        raise Undefined("no case that two members decide alike, with maps that vary")
    weight = defined.astype(np.float64)
    own, null, ceiling = (bootstrap.mean(values, weight) for values in per_case)
    return ExplanationSummary(
        agreement=own,
        null=null,
        ceiling=ceiling,
        share=_share(own, null, ceiling),
        cases=int(defined.sum()),
        left_out=int((~defined).sum()),
    )


def _share(own: Estimate, null: Estimate, ceiling: Estimate) -> Estimate | Undefined:
    """Return the part of the way from null to ceiling; draws whose ceiling is not above the null have none."""
    if not ceiling.value > null.value:
        return Undefined("the ceiling is not above the null")
    way = ceiling.draws - null.draws
    draws = np.divide(own.draws - null.draws, way, out=np.full(len(way), np.nan), where=way > 0)
    return Estimate((own.value - null.value) / (ceiling.value - null.value), draws, own.n)


def defined_means(bootstrap: PatientBootstrap, values: np.ndarray, reason: str) -> PerMember | Undefined:
    """Return the mean over the defined cases of every model, values [model, sample], NaN where undefined.

    Undefined with the reason where a model has no such case.
    """
    means = bootstrap.means([CaseMean(own, np.isfinite(own).astype(np.float64)) for own in values])
    estimates = [mean for mean in means if isinstance(mean, Estimate)]
    if len(estimates) < len(means) or not means:
        return Undefined(reason)
    return PerMember(np.array([e.value for e in estimates]), np.stack([e.draws for e in estimates], axis=1))


def _all_pairs(maps: np.ndarray, measure: str) -> np.ndarray:
    """Return the agreement of all pairs, [model, sample, height, width] -> [sample, model, model]."""
    if measure != "ssim":
        vectors = _vectors(maps, measure).swapaxes(0, 1)
        return vectors @ vectors.swapaxes(1, 2)
    windows, count = _Windows.of(maps), len(maps)
    out = np.full((maps.shape[1], count, count), np.nan)
    for i in range(count):
        out[:, i, i:] = out[:, i:, i] = _similarity(windows[i : i + 1], windows[i:]).T
    return out


def _vectors(maps: np.ndarray, measure: str) -> np.ndarray:
    """Return vectors [..., pixel] whose inner products are the agreement; NaN for a constant map."""
    flat = maps.reshape(*maps.shape[:-2], -1)
    if measure == "spearman":
        ranks = rankdata(flat, axis=-1)
        ranks -= (flat.shape[-1] + 1) / 2
        with np.errstate(invalid="ignore"):
            return ranks / np.linalg.norm(ranks, axis=-1, keepdims=True)
    n = max(1, round(flat.shape[-1] / 10))
    strongest = np.argsort(-flat, axis=-1, kind="stable")[..., :n]
    vectors = np.zeros(flat.shape)
    np.put_along_axis(vectors, strongest, 1 / math.sqrt(n), axis=-1)
    vectors[_constant(maps)] = np.nan
    return vectors


@dataclass(frozen=True)
class _Windows:
    """Maps scaled to [0, 1] with the means and variances of their windows, all [..., height, width]."""

    maps: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, maps: np.ndarray) -> _Windows:
        """Return the windows of maps of any range; NaN for a constant map."""
        lowest, highest = (end(maps, axis=(-2, -1), keepdims=True).astype(np.float64) for end in (np.min, np.max))
        with np.errstate(invalid="ignore"):
            scaled = (maps - lowest) / (highest - lowest)
        mean = _window_means(scaled)
        return cls(scaled, mean, _sample_covariance(scaled * scaled, mean * mean))

    def __getitem__(self, index: slice) -> _Windows:
        return _Windows(self.maps[index], self.mean[index], self.variance[index])


def _similarity(a: _Windows, b: _Windows) -> np.ndarray:
    c1, c2 = 0.01**2, 0.03**2
    product = a.mean * b.mean
    covariance = _sample_covariance(a.maps * b.maps, product)
    similarity = (2 * product + c1) * (2 * covariance + c2)
    similarity /= (a.mean**2 + b.mean**2 + c1) * (a.variance + b.variance + c2)
    return similarity.mean(axis=(-2, -1))


def _sample_covariance(products: np.ndarray, product_of_means: np.ndarray) -> np.ndarray:
    size = WINDOW * WINDOW
    return size / (size - 1) * (_window_means(products) - product_of_means)


def _window_means(maps: np.ndarray) -> np.ndarray:
    """Return the means over all windows that lie within the image, [..., height - 6, width - 6]."""
    edge = WINDOW // 2
    return uniform_filter(maps, WINDOW, axes=(-2, -1))[..., edge:-edge, edge:-edge]


def _constant(maps: np.ndarray) -> np.ndarray:
    return maps.max(axis=(-2, -1)) == maps.min(axis=(-2, -1))


def _mean_of_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of what is not NaN, NaN where nothing is."""
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _check(maps: np.ndarray, measure: str, whose: str) -> None:
    if measure not in MEASURES:
        raise UserError(f"measure={measure} is not a choice: {suggest(measure, MEASURES)}")
    if len(bad := np.argwhere(~np.isfinite(maps))):
        raise NonFinite(f"{whose} maps are not finite: first at {tuple(map(int, bad[0]))} (..., row, column)")
    if measure == "ssim" and min(maps.shape[-2:]) < WINDOW:
        size = " x ".join(map(str, maps.shape[-2:]))
        raise Undefined(f"structural similarity needs maps of {WINDOW} x {WINDOW} pixels, these have {size}")
