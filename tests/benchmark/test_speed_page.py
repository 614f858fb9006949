"""The committed SPEED.md says what speed.json holds, and has the rows that were promised."""

from __future__ import annotations

import json

import pytest
from multiplicity_bench.benchmark import speed

PROMISED = [
    "train_ensemble_smallcnn",
    "train_ensemble_resnet18",
    "predict_set_smallcnn",
    "kfac_resnet18",
    "diag_resnet18",
    "last_layer_1000",
    "metrics_1000x22000",
    "geodesic_mlp_s100",
    "geodesic_smallcnn_s50",
    "geodesic_vs_retraining",
]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return json.loads((speed.HERE / "speed.json").read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_rows(rows):
    page = (speed.HERE / "SPEED.md").read_text(encoding="utf-8")
    assert speed.render(rows, speed.figures_of(page)) == page


def test_every_promised_row_is_there_and_every_ratio_is_that_of_its_seconds(rows):
    assert {row["name"] for row in rows} >= set(PROMISED)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["ours_s"]), row["name"]
        assert {"name", "device", "ratio", "ours_s", "baseline_s", "spread", "versions"} <= set(row)


def test_every_row_and_every_figure_is_measured_by_a_function_that_is_there(rows):
    measures, figures = speed.all_measures()
    assert {row["name"] for row in rows} == {f.__name__ for f in measures}
    page = (speed.HERE / "SPEED.md").read_text(encoding="utf-8")
    assert len(speed.figures_of(page)) == len(figures)
