"""Model sets: materialised, sampled on the fly, or acting on the outputs; saved without pickle, read in blocks.

Member k depends only on (state, seed, k): never on the block size, or on where a run was resumed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..identity import derive_seed

Leaves = dict[str, Tensor]
FILE = "set.safetensors"


def under(group: str, leaves: Mapping[str, Tensor]) -> Leaves:
    """Return the leaves whose names begin with `group`, by the rest of their names."""
    return {n.removeprefix(group): leaf for n, leaf in leaves.items() if n.startswith(group)}


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> Leaves:
    """Return a flat vector [param] as leaves with the names, the order and the shapes of `like`."""
    parts = flat.split([leaf.numel() for leaf in like.values()])
    return {n: part.view_as(leaf) for (n, leaf), part in zip(like.items(), parts, strict=True)}


@dataclass
class Block:
    """Members `start .. start + size`: leaves with a member axis, and leaves that all members share.

    `output`, where given, maps the logits [member, sample, class] of these members, given the images, to what the
    members really say: some sets (temperature, logit noise) are no weight vectors. `expand_at`, where given, holds the
    leaves w* around which the network is replaced by its first-order expansion.
    """

    start: int
    size: int
    params: Leaves
    buffers: Leaves
    shared_params: Leaves
    shared_buffers: Leaves
    output: Callable[[Tensor, Tensor], Tensor] | None = None
    expand_at: Leaves | None = None

    def logits(self, network: Callable[..., Tensor], params: Leaves, buffers: Leaves, images: Tensor) -> Tensor:
        """Return logits [sample, class] of the member with these leaves of its own: `f(w)`, or `f(w*) + J (w - w*)`.

        The expansion is one forward-mode pass. All that predicts with a block goes through here; `output` comes after.
        """
        buffers = {**self.shared_buffers, **buffers}

        def function(leaves: Leaves) -> Tensor:
            return network({**self.shared_params, **leaves}, buffers, images)

        if self.expand_at is None:
            return function(params)
        origin = {n: self.expand_at[n] for n in params}
        deviation = {n: leaf - origin[n] for n, leaf in params.items()}
        return torch.add(*torch.func.jvp(function, (origin,), (deviation,)))

    def member_logits(self, network: Callable[..., Tensor], index: int, images: Tensor) -> Tensor:
        """Return the logits [sample, class] of member `start + index`, before `output`."""
        params, buffers = ({n: leaf[index] for n, leaf in own.items()} for own in (self.params, self.buffers))
        return self.logits(network, params, buffers, images)

    def member(self, index: int) -> tuple[Leaves, Leaves]:
        """Return all parameters and buffers of member `start + index`."""
        params = {**self.shared_params, **{n: leaf[index] for n, leaf in self.params.items()}}
        return params, {**self.shared_buffers, **{n: leaf[index] for n, leaf in self.buffers.items()}}


@dataclass
class ModelSet:
    """Networks around one base: `size` members, `blocks(max_members)` to read them.

    shared: parameters and buffers that no member changes (by "params." / "buffers." name); stacked_buffers: buffers
    with a member axis (BatchNorm statistics re-estimated per member); deployable: a member is one weight vector;
    notes: caveats for the board; diagnostics: JSON values for the record; failed: indices of members whose making
    failed, in order: they carry the base's weights, count as drawn and are never accepted.
    """

    size: int
    shared_params: Leaves
    shared_buffers: Leaves
    stacked_buffers: Leaves = field(default_factory=dict)
    deployable: bool = True
    batchnorm: str | None = None
    notes: list[str] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[ModelSet]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            ModelSet.kinds[cls.kind] = cls

    def leaves(self, member: int) -> Leaves:
        """Return the parameters of `member` that vary within the set."""
        raise NotImplementedError

    def block(self, start: int, stop: int) -> Block:
        """Return members `start .. stop - 1` as stacked leaves."""
        params: Leaves = {}
        for k in range(start, stop):  # into its place at once: a block is large, and there is no second one beside it
            for name, leaf in self.leaves(k).items():
                if k == start:
                    params[name] = leaf.new_empty((stop - start, *leaf.shape))
                params[name][k - start] = leaf
        buffers = {name: leaf[start:stop] for name, leaf in self.stacked_buffers.items()}
        return Block(start, stop - start, params, buffers, self.shared_params, self.shared_buffers)

    def blocks(self, max_members: int) -> Iterator[Block]:
        """Yield all members in order, at most `max_members` at a time."""
        for start in range(0, self.size, max_members):
            yield self.block(start, min(start + max_members, self.size))

    def first(self, members: int) -> ModelSet:
        """Return the set of its first members, at most as many as there are; tensors are shared."""
        few = copy.copy(self)
        few.size = min(members, self.size)
        few.failed = [m for m in self.failed if m < few.size]
        return few

    def member(self, index: int) -> tuple[Leaves, Leaves]:
        """Return all parameters and buffers of one member, for deployment; UserError where it has none of its own."""
        if not 0 <= index < self.size:
            raise UserError(f"member={index} is not in the set: it has members 0 to {self.size - 1}")
        if not self.deployable:
            raise UserError("members of this set are no weight vectors (not deployable): there is nothing to export")
        if index in self.failed:
            raise UserError(f"member={index} failed when it was made and has only the base's weights: choose another")
        return self.block(index, index + 1).member(0)

    def tensors(self) -> Leaves:
        """Return the tensors that, with `settings`, define the varying part of the set."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the JSON values that, with `tensors`, define the varying part of the set."""
        return {}

    @classmethod
    def restore(cls, tensors: Leaves, settings: dict[str, Any], **common: Any) -> ModelSet:
        """Rebuild a set from what `tensors` and `settings` returned."""
        raise NotImplementedError

    def bytes_per_member(self) -> int:
        """Return the bytes that storing one more member takes."""
        return sum(leaf.nbytes for leaf in self.leaves(0).values()) + sum(
            leaf.nbytes // self.size for leaf in self.stacked_buffers.values()
        )

    def to(self, device: torch.device) -> ModelSet:
        """Return the set with its tensors on `device`."""
        move = lambda leaves: {n: leaf.to(device) for n, leaf in leaves.items()}  # noqa: E731
        return self.restore(
            move(self.tensors()),
            self.settings(),
            size=self.size,
            shared_params=move(self.shared_params),
            shared_buffers=move(self.shared_buffers),
            stacked_buffers=move(self.stacked_buffers),
            deployable=self.deployable,
            batchnorm=self.batchnorm,
            notes=self.notes,
            diagnostics=self.diagnostics,
            failed=self.failed,
            network=self.network,
        )

    def save(self, folder: Path, network: Mapping[str, Any] | None = None) -> None:
        """Write the set to `folder`: safetensors with a JSON header, which holds no code.

        `network` describes the architecture, so that the saved set can be used without the run that made it.
        """
        groups = {
            "shared_params": self.shared_params,
            "shared_buffers": self.shared_buffers,
            "stacked_buffers": self.stacked_buffers,
            "state": self.tensors(),
        }
        tensors = {
            f"{g}/{n}": leaf.detach().cpu().contiguous() for g, leaves in groups.items() for n, leaf in leaves.items()
        }
        about = {
            "kind": self.kind,
            "size": self.size,
            "deployable": self.deployable,
            "batchnorm": self.batchnorm,
            "notes": self.notes,
            "diagnostics": self.diagnostics,
            "failed": self.failed,
            "settings": self.settings(),
            "network": dict(network) if network else None,
        }
        # Leaves that share memory (a base used as shared and as mean) must be written as tensors of their own.
        save_file({n: t.clone() for n, t in tensors.items()}, folder / FILE, metadata={"about": json.dumps(about)})

    @staticmethod
    def load(folder: Path | str, device: torch.device | str = "cpu") -> ModelSet:
        """Read a set that `save` wrote; `set.network` describes its architecture. Nothing read can execute."""
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        try:
            with safe_open(path, framework="pt", device=str(device)) as f:
                about = json.loads(f.metadata()["about"])
                groups: dict[str, Leaves] = {
                    g: {} for g in ("shared_params", "shared_buffers", "stacked_buffers", "state")
                }
                for key in f.keys():  # noqa: SIM118  (no mapping)
                    group, name = key.split("/", 1)
                    groups[group][name] = f.get_tensor(key)
            kind, settings = ModelSet.kinds[about.pop("kind")], about.pop("settings")
            return kind.restore(groups.pop("state"), settings, **about, **groups)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is no model set ({error}): run its cell again") from error

    network: Mapping[str, Any] | None = None


@dataclass
class StackedSet(ModelSet):
    """Materialised members: `params` holds the leaves with a member axis."""

    params: Leaves = field(default_factory=dict)
    kind: ClassVar[str] = "stacked"

    def leaves(self, member: int) -> Leaves:
        """Return the parameters of `member` that vary within the set."""
        return {name: leaf[member] for name, leaf in self.params.items()}

    def block(self, start: int, stop: int) -> Block:
        """Return members `start .. stop - 1` as views of the stacked leaves."""
        cut = lambda leaves: {n: leaf[start:stop] for n, leaf in leaves.items()}  # noqa: E731
        return Block(
            start, stop - start, cut(self.params), cut(self.stacked_buffers), self.shared_params, self.shared_buffers
        )

    def tensors(self) -> Leaves:
        """Return the stacked leaves."""
        return self.params

    @classmethod
    def restore(cls, tensors: Leaves, settings: dict[str, Any], **common: Any) -> StackedSet:
        """Rebuild the set from its stacked leaves."""
        return cls(params=tensors, **common)


@dataclass
class LinearisedSet(StackedSet):
    """Members of the linearised network: they say `f(w*) + J (w - w*)`, J the Jacobian at w* on the image at hand.

    origin: w*, for the leaves that vary. A member's leaves are w, with which the network itself says something else.
    """

    origin: Leaves = field(default_factory=dict)
    deployable: bool = False
    kind: ClassVar[str] = "linearised"

    def block(self, start: int, stop: int) -> Block:
        """Return members `start .. stop - 1` as views of the stacked leaves, to be evaluated by expansion."""
        return replace(super().block(start, stop), expand_at=self.origin)

    def tensors(self) -> Leaves:
        """Return the stacked leaves and w*."""
        return {f"params.{n}": p for n, p in self.params.items()} | {f"origin.{n}": p for n, p in self.origin.items()}

    @classmethod
    def restore(cls, tensors: Leaves, settings: dict[str, Any], **common: Any) -> LinearisedSet:
        """Rebuild the set from its stacked leaves and w*."""
        return cls(params=under("params.", tensors), origin=under("origin.", tensors), **common)


def stack(members: list[tuple[Leaves, Leaves]], **about: Any) -> StackedSet:
    """Return the set of the given (parameters, buffers), every leaf with a member axis."""
    params = {n: torch.stack([p[n] for p, _ in members]) for n in members[0][0]}
    buffers = {n: torch.stack([b[n] for _, b in members]) for n in members[0][1]}
    return StackedSet(
        size=len(members), shared_params={}, shared_buffers={}, stacked_buffers=buffers, params=params, **about
    )


def member_noise(seed: int, member: int, size: int, device: torch.device, stream: str = "") -> Tensor:
    """Return standard normal noise [size] float32 that depends on (seed, member, stream) alone.

    It is drawn on the CPU, so that a set has the same members on every device.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "member", member, stream))
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(device)


@dataclass
class GaussianSet(ModelSet):
    """Members `mean + perturbation(noise_k)`, drawn on the fly from a Gaussian over some leaves.

    mean: the leaves that vary; seed: that of the noise; factors: tensors of the covariance, by structure.
    """

    mean: Leaves = field(default_factory=dict)
    factors: Leaves = field(default_factory=dict)
    seed: int = 0
    scale: float = 1.0

    def perturbation(self, member: int) -> Tensor:
        """Return the flat deviation [param] of `member` from the mean, in the order of `mean`'s leaves."""
        raise NotImplementedError

    def leaves(self, member: int) -> Leaves:
        """Return the parameters of `member` that vary within the set."""
        moved = unflatten(self.perturbation(member), self.mean)
        return {n: leaf + moved[n] for n, leaf in self.mean.items()}

    def noise(self, member: int, size: int, stream: str = "") -> Tensor:
        """Return the standard normal noise [size] of `member`."""
        return member_noise(self.seed, member, size, next(iter(self.mean.values())).device, stream)

    def tensors(self) -> Leaves:
        """Return mean and factors; leaf order is kept by an index in the name, for files sort their names."""
        mean = {f"mean.{i:04d}.{n}": leaf for i, (n, leaf) in enumerate(self.mean.items())}
        return mean | {f"factor.{n}": leaf for n, leaf in self.factors.items()}

    def settings(self) -> dict[str, Any]:
        """Return the seed of the noise (as text: JSON readers may round integers of 63 bits) and its scale."""
        return {"seed": str(self.seed), "scale": self.scale}

    @classmethod
    def restore(cls, tensors: Leaves, settings: dict[str, Any], **common: Any) -> GaussianSet:
        """Rebuild the set from mean, factors and seed."""
        mean = {n.split(".", 2)[2]: leaf for n, leaf in sorted(tensors.items()) if n.startswith("mean.")}
        factors = under("factor.", tensors)
        return cls(mean=mean, factors=factors, seed=int(settings["seed"]), scale=settings["scale"], **common)


@dataclass
class DiagonalSet(GaussianSet):
    """Independent weights: `w = mean + scale * sd * z`; factors: sd [param]."""

    kind: ClassVar[str] = "diagonal"

    def perturbation(self, member: int) -> Tensor:
        """Return scale * sd * z."""
        sd = self.factors["sd"]
        return self.scale * sd * self.noise(member, sd.numel())


@dataclass
class LowRankSet(GaussianSet):
    """SWAG's Gaussian: `w = mean + sqrt(scale) (sd * z1 + D z2 / sqrt(K - 1))` (Maddox et al. 2019, eq. 1).

    factors: sd [param], D [param, rank] with K = rank columns. Covariance: scale (diag(sd^2) + D D' / (K - 1)).
    """

    kind: ClassVar[str] = "lowrank"

    def perturbation(self, member: int) -> Tensor:
        """Return sqrt(scale) (sd * z1 + D z2 / sqrt(K - 1))."""
        sd, deviations = self.factors["sd"], self.factors["D"]
        rank = deviations.shape[1]
        low = deviations @ self.noise(member, rank, "low rank") / max(rank - 1, 1) ** 0.5
        return self.scale**0.5 * (sd * self.noise(member, sd.numel()) + low)


@dataclass
class KroneckerSet(GaussianSet):
    """KFAC's Gaussian, damped in the eigenbasis: `W = W* + U_B ((U_B' E U_A) . (l_B l_A' + a)^(-1/2)) U_A'`.

    The symmetric root of the covariance: unlike noise drawn in the eigenbasis, it does not depend on the signs and
    rotations of eigenvectors, which differ from one linear-algebra library to the next.

    factors: for leaf i `values.i.j` and `vectors.i.j` with j = 0 (rows) and, for matrices, j = 1 (columns: the inputs;
    eigenvectors whose eigenvalue is 0 may be left out); scale: the prior precision a. The product of the eigenvalues
    holds the sum over samples.
    """

    kind: ClassVar[str] = "kronecker"

    def perturbation(self, member: int) -> Tensor:
        """Return the deviation leaf by leaf."""
        parts = []
        for i, leaf in enumerate(self.mean.values()):
            rows, u = self.factors[f"values.{i}.0"], self.factors[f"vectors.{i}.0"]
            noise = self.noise(member, leaf.numel(), str(i))
            if f"values.{i}.1" not in self.factors:
                parts.append(u @ ((u.T @ noise) / (rows + self.scale).sqrt()))
                continue
            columns, v = self.factors[f"values.{i}.1"], self.factors[f"vectors.{i}.1"]
            if v.shape[1] < v.shape[0]:
                noise = noise.view(len(rows), len(v))
                shrink = (torch.outer(rows, columns) + self.scale).rsqrt() - self.scale**-0.5
                moved = u @ (shrink * (u.T @ noise @ v)) @ v.T
                parts.append((self.scale**-0.5 * noise + moved).reshape(-1))
                continue
            white = (u.T @ noise.view(len(rows), len(columns)) @ v) / (torch.outer(rows, columns) + self.scale).sqrt()
            parts.append((u @ white @ v.T).reshape(-1))
        return torch.cat(parts)


@dataclass
class DualSet(GaussianSet):
    """The Gaussian N(mean, (V L V' + a I)^-1): `w = mean + a^(-1/2) z + V ((L + a)^(-1/2) - a^(-1/2)) V' z`.

    The symmetric root of the covariance, as for KroneckerSet. factors: vectors V [param, rank] (orthonormal columns)
    and values L [rank]; scale: the prior precision a.
    """

    kind: ClassVar[str] = "dual"

    def perturbation(self, member: int) -> Tensor:
        """Return isotropic noise, shrunk along the eigenvectors."""
        vectors, values = self.factors["vectors"], self.factors["values"]
        noise = self.noise(member, len(vectors)).to(vectors)
        shrink = (values + self.scale).rsqrt() - self.scale**-0.5
        return self.scale**-0.5 * noise + vectors @ (shrink.to(vectors) * (vectors.T @ noise))


@dataclass
class OutputSet(ModelSet):
    """The base network with its outputs changed: a control, not a set of weight vectors.

    temperature: logits / T_k; noise: logits + s z(seed, member, image, class), a function of the image alone, so that
    the same image gets the same noise in every batch and split.
    """

    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    change: str = "temperature"
    seed: int = 0
    kind: ClassVar[str] = "output"

    def leaves(self, member: int) -> Leaves:
        """Return nothing: all weights are the base's."""
        return {}

    def block(self, start: int, stop: int) -> Block:
        """Return the base's weights with the output change of members `start .. stop - 1`."""

        def output(logits: Tensor, images: Tensor) -> Tensor:
            return self.change_outputs(logits, images, range(start, stop))

        return Block(start, stop - start, {}, {}, self.shared_params, self.shared_buffers, output)

    def change_outputs(self, logits: Tensor, images: Tensor, members: range) -> Tensor:
        """Return what `members` say [member, sample, class], given the base's logits (with or without member axis)."""
        values = self.values[members.start : members.stop].view(-1, 1, 1).to(logits)
        if self.change == "temperature":
            return logits / values
        return logits + values * image_noise(images, self.seed, members, logits.shape[-1]).to(logits)

    def bytes_per_member(self) -> int:
        """Return the bytes of one value."""
        return self.values.element_size()

    def tensors(self) -> Leaves:
        """Return the value (temperature or noise sd) of every member."""
        return {"values": self.values}

    def settings(self) -> dict[str, Any]:
        """Return the kind of change and the seed of the noise."""
        return {"change": self.change, "seed": str(self.seed)}

    @classmethod
    def restore(cls, tensors: Leaves, settings: dict[str, Any], **common: Any) -> OutputSet:
        """Rebuild the set from its values."""
        return cls(values=tensors["values"], change=settings["change"], seed=int(settings["seed"]), **common)


def image_noise(images: Tensor, seed: int, members: range, classes: int) -> Tensor:
    """Return standard normal noise [member, sample, class] that is a function of (seed, member, image, class).

    A 64-bit hash of the pixels is mixed with seed, member and class (splitmix64; Steele, Lea, Flood 2014) and turned
    into normals by Box and Muller.
    """
    pixels = images.detach().cpu().numpy().reshape(len(images), -1).astype(np.uint64)
    weights = _mix(np.arange(1, pixels.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    image = _mix((pixels * weights).sum(1, dtype=np.uint64))
    keys = [np.uint64(derive_seed(seed, "output", k)) for k in members]
    counter = _mix(np.array(keys, np.uint64))[:, None, None] ^ image[None, :, None]
    counter = _mix(counter) + np.arange(classes, dtype=np.uint64) * np.uint64(2)
    first, second = (_mix(_mix(counter + np.uint64(i))) >> np.uint64(11) for i in (0, 1))
    radius = np.sqrt(-2 * np.log((first.astype(np.float64) + 1) / 2**53))
    return torch.from_numpy(radius * np.cos(2 * np.pi * second.astype(np.float64) / 2**53))


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser of uint64 values (overflow is the point)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
