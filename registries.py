"""The registries of the package, importable in milliseconds: names and one-liners come without torch or numpy.

`generators.api`, `datasets.api`, `metrics.api` and `benchmark.networks` hand them on beside the types they hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registry import Registry

if TYPE_CHECKING:
    from .datasets.api import Dataset
    from .generators.api import Generator
    from .metrics.api import Metric

GENERATORS: Registry[type[Generator]] = Registry(
    "generator",
    "multiplicity_bench.generators",
    "register_generator",
    "multiplicity_bench.generators",
    ("__dataclass_fields__", "generate"),
)
DATASETS: Registry[type[Dataset]] = Registry(
    "dataset",
    "multiplicity_bench.datasets",
    "register_dataset",
    "multiplicity_bench.datasets",
    ("__dataclass_fields__", "load"),
)
METRICS: Registry[Metric] = Registry(
    "metric", "multiplicity_bench.metrics", "register_metric", "multiplicity_bench.metrics", ("info", "__call__")
)
NETWORKS: Registry[Any] = Registry("network", "multiplicity_bench.benchmark.networks", "register_network")

register_generator = GENERATORS.register
register_dataset = DATASETS.register
register_network = NETWORKS.register

BY_KIND: dict[str, Registry[Any]] = {r.kind: r for r in (GENERATORS, DATASETS, NETWORKS, METRICS)}
