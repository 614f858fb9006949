"""Identities: equal specs give equal keys on every machine, different ones different keys."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.identity import (
    added_later,
    array_digest,
    canonical_json,
    derive_seed,
    digest,
    plain,
    row_label,
)


@dataclass
class Inner:
    rate: float = 1.0


@dataclass
class Outer:
    name: str = "é"
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)


def test_canonical_json_of_a_known_value_is_known_bytes():
    value = {"b": [1.0, 0.1, True, None], "a": Outer()}
    wanted = r'{"a":{"inner":{"rate":1},"name":"\u00e9","sizes":[1,2]},"b":[1,0.1,true,null]}'
    assert canonical_json(value) == wanted
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # SHA-256 of "{}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, np.int64(1)),
        (1.0, np.float64(1)),
        (0.5, np.float32(0.5)),
        (0.0, -0.0),
        (True, np.bool_(True)),
        ((1, 2), [1, 2]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (Inner(1), {"rate": 1}),
        (1e22, 10**22),
    ],
)
def test_values_that_mean_the_same_have_one_identity(one, other):
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, "1"), (1, True), (0, False), (0, None), ([], {}), ([1, 2], [2, 1]), (0.1, 0.1 + 2e-17 + 1e-16), ("a", "A")],
)
def test_values_that_mean_something_else_have_another_identity(one, other):
    assert digest(one) != digest(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1, np.float32("-inf")]}])
def test_numbers_that_json_cannot_say_are_refused(value):
    with pytest.raises(UserError, match="cannot be part of an identity: give a finite number"):
        digest(value)


@pytest.mark.parametrize("value", [{1, 2}, b"x", np.arange(2), object(), Inner])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(TypeError, match="no canonical form for"):
        plain(value)


@dataclass
class Grown:
    rate: float = 1.0
    objective: str = added_later("erm")


def test_a_setting_that_was_added_later_is_part_of_an_identity_only_where_it_is_changed():
    assert digest(Grown()) == digest({"rate": 1})
    assert plain(Grown(objective="group_dro")) == {"rate": 1, "objective": "group_dro"}


def test_an_array_digest_is_that_of_a_header_and_the_bytes():
    x = np.arange(6, dtype="<i8").reshape(2, 3)
    assert array_digest({"x": x}) == hashlib.sha256(b'["x","<i8",[2,3]]' + x.tobytes()).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.arange(6, dtype=np.int32).reshape(2, 3)},
        {"x": np.arange(6, dtype=np.uint64).reshape(2, 3)},
        {"x": np.arange(6, dtype=np.int64).reshape(3, 2)},
        {"x": np.arange(6, dtype=np.int64)},
        {"x": np.arange(6, dtype=np.int64).reshape(2, 3) + np.eye(2, 3, dtype=np.int64)},
        {"y": np.arange(6, dtype=np.int64).reshape(2, 3)},
        {"x": np.arange(6, dtype=np.int64).reshape(2, 3), "y": np.zeros(0)},
        {},
    ],
    ids=["width", "sign", "shape", "flat", "bytes", "name", "more", "none"],
)
def test_an_array_digest_sees_type_shape_bytes_and_names(other):
    assert array_digest(other) != array_digest({"x": np.arange(6, dtype=np.int64).reshape(2, 3)})


def test_an_array_digest_does_not_see_memory_order_or_the_order_of_names():
    x, y = np.arange(6.0).reshape(2, 3), np.arange(4)
    twin = {"y": y[::-1].copy()[::-1], "x": np.asfortranarray(x)}
    assert array_digest(twin) == array_digest({"x": x, "y": y})
    assert array_digest({"x": np.arange(12.0).reshape(2, 6)[:, ::2]}) == array_digest({"x": x * 2})


def test_texts_are_hashed_by_what_they_say_not_by_their_width():
    narrow, wide = np.array(["F", "M"]), np.array(["F", "M"], dtype="U20")
    assert array_digest({"sex": narrow}) == array_digest({"sex": wide})
    assert array_digest({"sex": narrow}) == array_digest({"sex": narrow.astype(object)})
    assert array_digest({"sex": narrow}) != array_digest({"sex": narrow[::-1]})


def test_derived_seeds_are_stable_and_fit_every_generator_of_random_numbers():
    assert derive_seed(0, "retrain", 3) == int(hashlib.sha256(b'[0,"retrain",3]').hexdigest()[:16], 16) >> 1
    seeds = [derive_seed(0, "member", k) for k in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Half of 2,000 seeds above the middle: 1000 +- 5 standard deviations of sqrt(500).
    assert abs(sum(seed >= 2**62 for seed in seeds) - 1000) < 112
    np.random.default_rng(max(seeds))


def test_derived_seeds_depend_on_every_part_and_on_their_order():
    seeds = {
        derive_seed(*parts)
        for parts in [
            (),
            (0,),
            (1,),
            (0, 0),
            (0, "a"),
            ("a", 0),
            (0, "a", 0),
            (0, "a", 1),
            ("0", "a", 0),
            (0, ("a", 0)),
        ]
    }
    assert len(seeds) == 10
    grid = {derive_seed(a, b) for a in range(100) for b in range(100)}
    assert len(grid) == 100 * 100  # (1, 11) and (11, 1) among them


def test_a_row_is_labelled_by_its_settings_in_the_order_of_their_names():
    assert row_label("laplace", {}) == "laplace"
    settings = {"structure": "kron", "prior_precision": 10.0, "flag": True, "sizes": [1, 2], "nothing": None}
    label = "laplace[flag=true,nothing=null,prior_precision=10,sizes=[1,2],structure=kron]"
    assert row_label("laplace", settings) == label
