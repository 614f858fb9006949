"""Files of views: what is written is read again, to the digits that are kept, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard.predictions import save_predictions
from multiplicity_bench.leaderboard.view_files import arrays_views, load_views, save_views, view_arrays, views_of
from multiplicity_bench.metrics.api import Predictions
from multiplicity_bench.metrics.context import decide, softmax


def predictions(task: str = "binary", classes: int = 2, part: str = "test") -> Predictions:
    rng = np.random.default_rng([classes, len(part)])
    labels = rng.integers(0, 2, (20, classes)) if task == "multilabel" else rng.integers(0, classes, 20)
    positive = 1 if task == "binary" else None
    logits, base = rng.normal(size=(5, 20, classes)) * 3, rng.normal(size=(20, classes))
    patient = rng.integers(0, 9, 20)
    return Predictions(
        logits, base, labels, task, part, positive, patient, np.arange(20), {"sex": patient % 2}, failed=(1, 4)
    )


def rows(p: Predictions) -> np.ndarray:
    """Logits with the base first."""
    return np.concatenate([p.base[None], p.logits])


@pytest.mark.parametrize(("task", "classes"), [("binary", 2), ("multiclass", 4), ("multilabel", 3)])
def test_a_view_read_again_decides_as_it_did_with_probabilities_to_a_percent_of_the_log_odds(task, classes):
    part = predictions(task, classes)
    shown = replace(part, logits=part.logits[:3] + 1.0, base=part.base + 1.0, view="test/jpeg-3")
    arrays = view_arrays({"test/jpeg-3": rows(shown)}, {}, task)
    assert arrays["test/jpeg-3"].dtype == np.float16
    assert arrays["test/jpeg-3"].shape == (4, 20, 1 if task == "binary" else classes)
    again = arrays_views(arrays, {"test": part}).predictions["test/jpeg-3"]
    assert again.view == "test/jpeg-3" and again.failed == (1,)
    np.testing.assert_array_equal(again.labels, part.labels)
    np.testing.assert_array_equal(again.attributes["sex"], part.attributes["sex"])
    for old, new in ((shown.logits, again.logits), (shown.base, again.base)):
        if task == "multilabel":
            np.testing.assert_allclose(new, old, rtol=2**-7 + 2**-11)
            continue
        differences = [z - z.max(axis=-1, keepdims=True) for z in (old, new.astype(np.float64))]
        np.testing.assert_allclose(differences[1], differences[0], rtol=2**-7 + 2**-10)
        np.testing.assert_array_equal(decide(softmax(new.astype(np.float64))), decide(softmax(old)))


def test_outliers_have_no_labels_no_patients_and_cases_of_their_own():
    part = predictions()
    outside = replace(part, logits=part.logits[:, :7], base=part.base[:7], labels=np.full(7, -1), patient=None)
    arrays = view_arrays({"test/ood-noise": rows(outside)}, {}, "binary")
    again = arrays_views(arrays, {"test": part}).predictions["test/ood-noise"]
    assert (again.labels == -1).all() and len(again.labels) == 7
    assert again.patient is None and again.attributes == {}


def test_evidence_keeps_its_place_its_name_and_what_is_undefined():
    values = np.array([[1.23456, np.nan], [-7e9, 3e-4]])
    arrays = view_arrays(
        {}, {"test": {"saliency/gradient/ssim": values}, "test/ood-noise": {"detector/knn": values}}, ""
    )
    found = arrays_views(arrays, {}).evidence
    assert set(found) == {"test", "test/ood-noise"}
    (stored,) = found["test"].values()
    np.testing.assert_allclose(stored[0], values[0], rtol=2**-7)
    assert stored[1, 0] == -np.finfo(np.float16).max and stored[1, 1] == pytest.approx(3e-4, rel=2**-7)


def test_a_file_of_other_predictions_or_none_is_told(tmp_path):
    part = predictions()
    path = tmp_path / "a.views.npz"
    save_views(path, view_arrays({"test/jpeg-3": rows(part)}, {}, "binary"))
    assert load_views(path, {"test": part}).predictions["test/jpeg-3"].logits.shape == (5, 20, 2)
    with pytest.raises(UserError, match="is no file of views"):
        load_views(path, {"val": part})
    save_predictions(tmp_path / "other.npz", {"values": np.zeros(3, np.float16)})
    with pytest.raises(UserError, match="is no file of views"):
        load_views(tmp_path / "other.npz", {"test": part})
    record = {"views": {"file": "a.views.npz"}}
    assert views_of(record, tmp_path / "a.npz") == path
    assert views_of(record, tmp_path / "elsewhere" / "a.npz") is None and views_of({}, tmp_path / "a.npz") is None
