"""The configuration of a run, and its identity: what decides its result, and nothing else.

Device index, threads, block size, paths and log level are no part of an identity; neither are epsilon and k, which
define scores of stored predictions and belong to the digest of the scores.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ..datasets.api import DATASETS, Data
from ..errors import UserError, suggest
from ..generators.api import GENERATORS, Generator, choices
from ..identity import digest, plain, row_label
from ..metrics.api import LOSSES, Settings
from ..metrics.views import EVIDENCE, View, parse_views
from ..registry import Registry
from .networks import NETWORKS
from .train import Training


@dataclass
class Options:
    """Options of `run-benchmark`.

    members: networks drawn; epsilon: tolerance of membership, in nats on val; epsilons: those at which acceptance is
    shown; k: the common number of members at which set metrics are compared; loss: that of membership; draws, seed: of
    the bootstrap over patients; views: shifted views to predict on, as in [jpeg-3,pgd-4,ood-noise]; evidence: what else
    to measure, of energy, max_logit, mahalanobis, knn, vim (detectors of outliers), saliency, transfer and membership;
    view_members: networks of the set that both take; view_cases: cases of val and of test that they show, drawn at
    random once for all (0: all); threads: CPU threads (0 = all); the rest is told by its name or in the README.
    """

    dataset: Any = None
    network: Any = None
    generator: Any = None
    training: Training = field(default_factory=Training)
    suite: str | None = None
    data_root: str | None = None
    base_seed: int = 0
    generator_seed: int = 0
    resample_seed: int | None = None
    members: int = 20
    epsilon: float = Settings.epsilon
    epsilons: tuple[float, ...] = field(default_factory=lambda: Settings.epsilons)
    k: int = Settings.k
    loss: str = Settings.loss
    draws: int = Settings.draws
    seed: int = Settings.seed
    views: Any = field(default_factory=list)
    evidence: Any = field(default_factory=list)
    view_members: int = 20
    view_cases: int = 0
    device: str = "auto"
    tf32: bool = False
    threads: int = 0
    artifacts_dir: str = "outputs/artifacts"
    records_dir: str = "outputs/records"
    list: bool = False
    dry_run: bool = False


@dataclass
class Spec:
    """One run, checked: its components as instances and every option that it depends on."""

    dataset: Any
    network: Any
    generator: Generator
    training: Training
    options: Options
    device: torch.device
    names: dict[str, str]

    @property
    def row(self) -> str:
        """Return the name of the run's row: the generator and its non-default fields."""
        defaults, settings = plain(type(self.generator)()), plain(self.generator)
        return row_label(self.names["generator"], {k: v for k, v in settings.items() if v != defaults.get(k)})

    @property
    def settings(self) -> Settings:
        """Return what the run declares about scoring."""
        o = self.options
        return Settings(o.epsilon, tuple(o.epsilons), o.k, o.loss, o.draws, o.seed)

    @property
    def views(self) -> list[View]:
        """Return the shifted views that the run is asked for."""
        return parse_views(self.options.views)

    def part(self, kind: str) -> dict[str, Any]:
        """Return {"name", "version", fields...} of one component."""
        component = getattr(self, kind)
        return {"name": self.names[kind], "version": type(component).version, **plain(component)}

    def base_identity(self, data: Data) -> dict[str, Any]:
        """Return what the base network depends on."""
        return {
            "dataset": {**self.part("dataset"), "digest": data.digest},
            "network": self.part("network"),
            "training": {"version": Training.version, **plain(self.training)},
            "base_seed": self.options.base_seed,
            "resample_seed": self.options.resample_seed,
            "numerics": self.numerics,
        }

    def identity(self, data: Data) -> dict[str, Any]:
        """Return the identity of the run: the base's and the generator's."""
        return self.base_identity(data) | {
            "generator": self.part("generator"),
            "generator_seed": self.options.generator_seed,
            "members": self.options.members,
        }

    def keys(self, data: Data) -> dict[str, str]:
        """Return the key of every stage."""
        base = digest(self.base_identity(data))
        model_set = digest(self.identity(data))
        return {"base": base, "set": model_set, "predictions": digest({"set": model_set, "views": ["val", "test"]})}

    @property
    def numerics(self) -> dict[str, Any]:
        """Return the declared numerics."""
        tf32, autocast = self.options.tf32, self.training.autocast
        return {"device": self.device.type, "dtype": "float32", "tf32": tf32, "autocast": autocast}


def register_config() -> None:
    """Put the options and every component that can be imported into Hydra's ConfigStore."""
    store = ConfigStore.instance()
    store.store(name="options", node=Options)
    for group, registry in (("dataset", DATASETS), ("network", NETWORKS), ("generator", GENERATORS)):
        for name, component in registry.load_all():
            named = [("name", str, field(default=name))]
            try:
                node = dataclasses.make_dataclass(component.__name__, named, bases=(component,))
                node.__module__ = component.__module__
                OmegaConf.structured(node)
            except Exception as error:  # a plug-in's field may be anything; the rest of the suite must go on
                reason = " ".join(str(error).split())
                warnings.warn(f"{group} '{name}' cannot be configured: {reason}", stacklevel=2)
                continue
            store.store(group=group, name=name, node=node)


def build_spec(config: DictConfig) -> Spec:
    """Return the checked run that a composed configuration describes; UserError for what cannot be."""
    composed: Any = OmegaConf.to_container(config, resolve=True)
    values: dict[str, Any] = {k: v for k, v in composed.items() if k != "training"}
    known = [f.name for f in dataclasses.fields(Options)]
    for name in values.keys() - set(known):  # +name=value adds what no schema knows
        raise UserError(f"there is no option '{name}': {suggest(name, known)}")
    options = Options(**{k: v for k, v in values.items() if k not in ("dataset", "network", "generator")})
    options.training = Training(**composed["training"])
    _check(options)
    components, names = {}, {}
    for kind, registry in (("dataset", DATASETS), ("network", NETWORKS), ("generator", GENERATORS)):
        chosen = values.get(kind)
        if not isinstance(chosen, Mapping):
            raise UserError(f"{kind}: none is chosen: add {kind}=NAME (list=true shows the names)")
        names[kind] = chosen["name"]
        components[kind] = create(registry, chosen)
    return Spec(
        components["dataset"],
        components["network"],
        components["generator"],
        options.training,
        options,
        resolve_device(options.device),
        names,
    )


def create(registry: Registry[Any], chosen: Mapping[str, Any]) -> Any:
    """Return an instance of the component that {"name", fields...} describes."""
    component = registry.get(chosen["name"])(**{k: v for k, v in chosen.items() if k not in ("name", "version")})
    component.name = chosen["name"]
    return component


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto | cpu | cuda` means here; UserError for CUDA asked for and absent."""
    choices(name, "device", ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here: use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def set_numerics(spec: Spec) -> None:
    """Apply threads and TF32 to this process."""
    if spec.options.threads:
        torch.set_num_threads(spec.options.threads)
    torch.backends.cuda.matmul.allow_tf32 = spec.options.tf32
    torch.backends.cudnn.allow_tf32 = spec.options.tf32
    torch.backends.cudnn.deterministic = True


def _check(o: Options) -> None:
    least = dict.fromkeys(("threads", "view_cases", "base_seed", "generator_seed", "resample_seed", "seed"), 0)
    for name, low in (least | {"members": 1, "k": 1, "draws": 1, "view_members": 1}).items():
        value = getattr(o, name)
        if value is not None and value < low:
            raise UserError(f"{name}={value} must be at least {low}")
        if value is not None and value >= 2**63:
            raise UserError(f"{name}={value} must be less than 2^63")
    for value in (o.epsilon, *o.epsilons):
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"epsilon={value:g} must be a finite number of at least 0 (nats on val)")
    choices(o.loss, "loss", LOSSES)
    for name in ("views", "evidence"):
        given = getattr(o, name)
        setattr(o, name, [given] if isinstance(given, str) else list(given))
    parse_views(o.views)
    for kind in o.evidence:
        choices(kind, "evidence", EVIDENCE)
