"""Runs that are asked for shifted views and other evidence: what they store, resume, record and commit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from multiplicity_bench.benchmark import evidence, views
from multiplicity_bench.benchmark.board import spec_of
from multiplicity_bench.benchmark.stages import Run, Session
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard.predictions import load_predictions
from multiplicity_bench.leaderboard.view_files import load_view_arrays, load_views, save_views, views_of
from multiplicity_bench.metrics.api import Undefined
from multiplicity_bench.metrics.views import shown_cases

VIEWS = "views=[gaussian_noise-3,pgd-8,test/pgd_transfer-8,ood-noise]"
EVIDENCE = "evidence=[mahalanobis,energy,saliency,transfer,membership]"
ASKED = ("generator=retrain", "network=smallcnn", "network.width=4", "view_members=3", VIEWS, EVIDENCE)


@pytest.fixture(scope="module")
def seen(make_spec, tmp_path_factory):
    """A finished run with views: its spec, its record and the path of it."""
    spec = make_spec(tmp_path_factory.mktemp("views"), *ASKED)
    record, path = Run(spec, Session()).record("tiny")
    return spec, record, path


@pytest.fixture(scope="module")
def file(seen):
    """The committed file of views of that run, with its predictions."""
    _, record, path = seen
    predictions = path.parent.parent / "predictions" / "tiny" / record["predictions"]["file"]
    val, test = load_predictions(predictions, "binary", record["data"]["positive"])
    found = views_of(record, predictions)
    assert found is not None
    return load_views(found, {"val": val, "test": test}), test


def test_a_record_says_what_was_seen_and_scores_the_views_of_test(seen):
    _, record, _ = seen
    views = record["views"]
    assert views["members"] == 3
    assert views["views"] == [
        "test/gaussian_noise-3", "test/ood-noise", "test/pgd-8", "test/pgd_transfer-8",
        "val/gaussian_noise-3", "val/ood-noise", "val/pgd-8",
    ]  # fmt: skip
    assert "detector/energy" in views["evidence"]["test/ood-noise"]
    assert views["evidence"]["test"][-1] == "transfer/pgd-8" and views["seconds"]["saliency"] > 0
    scored = {key.partition("/")[2] for key in record["scores"] if "/" in key}
    assert scored == {"gaussian_noise-3", "pgd-8", "pgd_transfer-8"}
    plain = record["scores"]["accuracy.base"]["value"]
    assert record["scores"]["accuracy.base/pgd-8"]["value"] <= plain
    # what was made for the base misleads it as its own attack does
    assert record["scores"]["accuracy.base/pgd_transfer-8"]["value"] == record["scores"]["accuracy.base/pgd-8"]["value"]


def test_the_record_is_what_it_is_without_views_but_for_them(seen, make_spec):
    spec, record, _ = seen
    folder = Path(spec.options.records_dir).parent
    asked = [o for o in ASKED if o not in (VIEWS, EVIDENCE)]
    plain, _ = Run(make_spec(folder, *asked, f"records_dir={folder}/plain"), Session()).record()
    assert "views" not in plain and plain["key"] == record["key"]
    assert plain["scores"] == {k: v for k, v in record["scores"].items() if "/" not in k}


def test_views_are_stored_one_by_one_so_that_one_more_computes_that_one_alone(seen, make_spec):
    spec, _, _ = seen
    folder = Path(spec.options.records_dir).parent
    stored = {p.name: (p / "manifest.json").stat().st_mtime_ns for p in (folder / "artifacts" / "view").glob("[!.]*")}
    asked = [VIEWS.replace("]", ",jpeg-5]") if o == VIEWS else o for o in ASKED]
    more = make_spec(folder, *asked, f"records_dir={folder}/more")
    Run(more, Session()).record()
    now = {p.name: (p / "manifest.json").stat().st_mtime_ns for p in (folder / "artifacts" / "view").glob("[!.]*")}
    assert stored.items() <= now.items() and len(now) == len(stored) + 2


def test_the_file_holds_the_first_members_and_evidence_of_all_of_them(file):
    views, test = file
    shown = views.predictions["test/gaussian_noise-3"]
    assert shown.logits.shape == (3, 40, 2) and np.array_equal(shown.labels, test.labels)
    assert (views.predictions["test/ood-noise"].labels == -1).all()
    assert views.evidence["test"]["detector/mahalanobis"].shape == (4, 40)
    assert views.evidence["val/ood-noise"]["detector/energy"].shape == (4, 40)
    inside = views.evidence["test"]["membership/loss/in"]
    assert inside.shape[0] == 4 and np.isfinite(inside).all()
    transferred = views.evidence["test"]["transfer/pgd-8"]
    own = views.predictions["test/pgd-8"].base.argmax(axis=-1) == test.labels
    assert transferred.shape == (4, 40) and transferred[0].mean() >= own.mean()  # its own attack is the worst
    assert views.evidence["test"]["saliency_null/gradient/spearman"].shape == (1, 40)


def test_a_run_made_again_from_its_record_sees_the_same_views(seen, tmp_path):
    spec, record, _ = seen
    again = spec_of(record, artifacts_dir=str(tmp_path), records_dir=str(tmp_path))
    assert set(again.views) == set(spec.views) and again.options.view_members == 3


def test_verify_scores_the_views_again_and_finds_one_that_was_changed(seen, leaderboard):
    _, _, path = seen
    answer = leaderboard("verify", str(path))
    assert answer.code == 0, answer.err
    changed = json.loads(path.read_text())
    file = path.parent.parent / "predictions" / "tiny" / changed["views"]["file"]
    kept = file.read_bytes()
    try:
        save_views(file, {n: (-a if n == "test/pgd-8" else a) for n, a in load_view_arrays(file).items()})
        answer = leaderboard("verify", str(path))
        assert answer.code == 2 and "is not the file that the record was made from" in answer.err[0]
        file.unlink()
        assert "the file of its views is not beside it" in leaderboard("verify", str(path)).err[0]
    finally:
        file.write_bytes(kept)


def test_copies_of_the_base_see_what_it_sees_and_outputs_without_weights_have_no_detectors(make_spec, tmp_path):
    asked = ("network=smallcnn", "network.width=4", "views=[test/jpeg-3,test/pgd-4,ood-noise]", "evidence=[knn]")
    for generator in ("identical", "temperature"):
        record, _ = Run(make_spec(tmp_path, f"generator={generator}", *asked), Session()).record("tiny")
        for view in ("jpeg-3", "pgd-4"):
            assert record["scores"][f"disagreement/{view}"]["value"] == 0
            assert (
                record["scores"][f"accuracy.member_mean/{view}"]["value"]
                == record["scores"][f"accuracy.base/{view}"]["value"]
            )
    assert record["views"]["evidence"] == {}
    assert record["views"]["notes"][-1].startswith("no detectors: members that change the outputs")


def test_views_of_some_cases_show_these_as_views_of_all_do_and_verify_finds_them(make_spec, tmp_path, leaderboard):
    few = ("generator=retrain", "network=smallcnn", "network.width=4", "members=3", "views=[contrast_down-3,pgd-4]")
    asked = (*few, "evidence=[energy,transfer,saliency,membership]")
    whole, all_of_it = Run(make_spec(tmp_path, *asked, f"records_dir={tmp_path}/all/r"), Session()).record("tiny")
    spec = make_spec(tmp_path, *asked, "view_cases=11", f"records_dir={tmp_path}/some/r")
    record, path = Run(spec, Session()).record("tiny")
    assert record["views"]["cases"] == 11 and "cases" not in whole["views"] and record["key"] == whole["key"]
    rows = shown_cases("test", 40, 11)
    (test, shown), (full_test, full) = (read_views(*pair) for pair in ((record, path), (whole, all_of_it)))
    view, of_all = (v.predictions["test/contrast_down-3"] for v in (shown, full))
    assert np.array_equal(view.labels, test.labels[rows]) and np.array_equal(test.labels, full_test.labels)
    assert np.allclose(view.logits, of_all.logits[:, rows], atol=1e-2)
    assert {n: len(v.base) for n, v in shown.predictions.items()} == dict.fromkeys(shown.predictions, 11)
    for name in ("detector/energy", "transfer/pgd-4", "saliency/gradient/spearman", "membership/loss/out"):
        assert shown.evidence["test"][name].shape == (4, 11)
    out, of_all = (v.evidence["test"]["membership/loss/out"] for v in (shown, full))
    assert np.array_equal(out, of_all[:, rows], equal_nan=True)
    assert spec_of(record, artifacts_dir=str(tmp_path), records_dir=str(tmp_path)).options.view_cases == 11
    assert leaderboard("verify", str(path)).code == 0


def read_views(record, path):
    """Return the predictions on test and the file of views that stand beside a record."""
    file = path.parent.parent / "predictions" / "tiny" / record["predictions"]["file"]
    val, test = load_predictions(file, "binary", record["data"]["positive"])
    return test, load_views(views_of(record, file), {"val": val, "test": test})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("views=[saturate-3]", "view saturate-3: "),
        ("views=[jpg-3]", "jpeg"),
        ("views=[ood-phantom_cxr]", "images of phantom_cxr are no outliers of phantom_cxr"),
    ],
)
def test_a_view_that_the_dataset_cannot_have_is_refused_before_anything_is_computed(make_spec, tmp_path, asked, said):
    with pytest.raises(UserError) as error:
        Run(make_spec(tmp_path, asked), Session()).record()
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "artifacts").glob("set/*"))


@pytest.mark.parametrize(
    ("asked", "said"), [("evidence=[salience]", "saliency"), ("views=[pgd]", "pgd-4"), ("view_members=0", "at least 1")]
)
def test_options_are_checked_with_close_names(run_benchmark, tmp_path, asked, said):
    answer = run_benchmark("generator=retrain", f"records_dir={tmp_path}", f"artifacts_dir={tmp_path}", asked)
    assert answer.code == 2 and len(answer.err) == 1 and said in answer.err[0]


def test_one_run_prints_what_its_set_does_on_the_views(run_benchmark, tmp_path):
    answer = run_benchmark(
        "generator=identical",
        *("dataset.train=80", "dataset.val=40", "dataset.test=40", "network=mlp", "network.width=8"),
        *("training.epochs=1", "members=3", "k=2", "draws=20", "device=cpu", "threads=1", "view_members=2"),
        *(f"records_dir={tmp_path}/r", f"artifacts_dir={tmp_path}/a", "views=[jpeg-3,ood-noise]"),
    )
    assert answer.code == 0
    header, plain, jpeg, members, noise = answer.out[2:]
    assert header.split()[:4] == ["accuracy", "on", "test", "base"] and jpeg.startswith("jpeg-3 ")
    assert plain.split()[-1] == jpeg.split()[-1] == "0.000", "copies of the base never disagree"
    assert members == "2 members are seen on views" and noise.startswith("ood-noise: uniform noise")


def test_the_listing_names_what_views_are_made_of(run_benchmark):
    out = "\n".join(run_benchmark("list=true").out)
    for name in ("jpeg-1 to jpeg-5", "pgd-N", "ood-DATASET", "mahalanobis", "saliency"):
        assert name in out.partition("\nviews\n")[2]


def test_clean_keeps_the_views_of_a_record(seen, leaderboard):
    spec, _, _ = seen
    folders = ("--artifacts", spec.options.artifacts_dir, "--records", spec.options.records_dir)
    lines = [line for line in leaderboard("clean", *folders).out if line.startswith("view ")]
    assert lines and all(line.endswith("MB  needed") for line in lines)


def test_an_attack_that_was_interrupted_goes_on_where_it_stopped(make_spec, tmp_path, monkeypatch):
    asked = ("generator=retrain", "members=3", "views=[test/pgd-8]")
    whole, _ = Run(make_spec(tmp_path / "whole", *asked), Session()).record()
    monkeypatch.setattr(views, "MEMBERS", 1)
    attacked, calls = views.attacked_images, []

    def failing(run, block, view, strategy):
        calls.append(block.start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attacked(run, block, view, strategy)

    monkeypatch.setattr(views, "attacked_images", failing)
    spec = make_spec(tmp_path / "parts", *asked)
    with pytest.raises(KeyboardInterrupt):
        Run(spec, Session()).record()
    assert calls == [0, 0, 1], "the base, the first member, and the second, which was interrupted"
    again, _ = Run(spec, Session()).record()
    assert calls[3:] == [0, 1, 2], "the base once more, and the members that were left"
    assert again["scores"] == whole["scores"] and again["views"]["digest"] == whole["views"]["digest"]


def test_images_too_small_for_a_measure_of_explanations_are_a_note(make_spec, tmp_path, monkeypatch):
    compared = evidence.comparators

    def refusing(*maps):
        if maps[-1] == "ssim":
            raise Undefined("maps of 6 x 6 pixels are smaller than a window of 7")
        return compared(*maps)

    monkeypatch.setattr(evidence, "comparators", refusing)
    record, _ = Run(make_spec(tmp_path, "generator=identical", "evidence=[saliency]"), Session()).record()
    assert "no ssim of explanations: maps of 6 x 6 pixels are smaller than a window of 7" in record["views"]["notes"]
    assert "no Grad-CAM: network=mlp has no convolution" in record["views"]["notes"]
    names = record["views"]["evidence"]["test"]
    assert "saliency/gradient/spearman" in names and "saliency/gradient/ssim" not in names
