"""Names of shifted views, and the scores that a record holds of them."""

from __future__ import annotations

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.metrics.api import Predictions, Settings
from multiplicity_bench.metrics.evaluation import view_scores
from multiplicity_bench.metrics.views import View, parse_view, parse_views, shown_cases


def test_a_name_means_both_parts_unless_it_names_one():
    assert parse_view("jpeg-3") == [View("val", "jpeg", 3), View("test", "jpeg", 3)]
    assert parse_view("test/pgd-4") == [View("test", "pgd", 4)]
    assert [str(v) for v in parse_views(["ood-noise", "val/ood-noise", "test/jpeg-1"])] == [
        "val/ood-noise",
        "test/ood-noise",
        "test/jpeg-1",
    ]


def test_cases_that_are_shown_are_the_same_for_all_and_fewer_are_among_more():
    few, more = shown_cases("test", 300, 40), shown_cases("test", 300, 200)
    assert len(set(few)) == 40 and set(few) < set(more) and (np.diff(more) > 0).all()
    assert not np.array_equal(few, shown_cases("val", 300, 40))
    assert np.array_equal(shown_cases("test", 30, 40), np.arange(30))
    assert abs(more.mean() - 149.5) < 4 * 300 / np.sqrt(12 * 200), "drawn from everywhere"


@pytest.mark.parametrize(
    ("text", "kind"), [("motion_blur-2", "corruption"), ("pgd_l2-4", "attack"), ("ood-phantom_cxr", "outliers")]
)
def test_the_kind_of_a_view_follows_from_its_operation(text, kind):
    (view,) = parse_view(f"test/{text}")
    assert view.kind == kind and view.name == text and str(view) == f"test/{text}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jpeg", "write a corruption and its severity"),
        ("jpeg-0", "write a corruption and its severity"),
        ("jpeg-6", "the number of a corruption is 1 to 5"),
        ("pgd-256", "the number of a attack is 1 to 255"),
        ("train/jpeg-1", "there is no part 'train'"),
        ("ood-", "say which outliers"),
        ("../jpeg-1", "there is no part '..'"),
    ],
)
def test_what_is_no_name_of_a_view_is_told_in_one_line(text, said):
    with pytest.raises(UserError, match="view '") as error:
        parse_view(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_scores_are_of_the_accepted_members_that_the_view_has_and_of_test_with_labels_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 30)

    def shown(view: str, of: np.ndarray) -> Predictions:
        return Predictions(rng.normal(size=(4, 30, 2)), rng.normal(size=(30, 2)), of, "binary", view, 1)

    views = {
        "test/jpeg-3": shown("test/jpeg-3", labels),
        "val/jpeg-3": shown("val/jpeg-3", labels),
        "test/ood-noise": shown("test/ood-noise", np.full(30, -1)),
    }
    found = view_scores(views, np.array([0, 2, 3, 7]), Settings(k=2, draws=20))
    assert {key.partition("/")[2].partition("@")[0] for key in found} == {"jpeg-3"}
    members = views["test/jpeg-3"].logits[[0, 2, 3]].argmax(axis=-1)
    assert found["accuracy.member_mean/jpeg-3"].value == pytest.approx((members == labels).mean())
    assert found["accuracy.base/jpeg-3"].n == 30
    assert np.isfinite(found["disagreement/jpeg-3"].value)
