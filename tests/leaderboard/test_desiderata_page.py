"""The page on desiderata, on made-up JSON: every number in its cell, bold only above chance, what is undefined said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from multiplicity_bench.leaderboard.desiderata_page import (
    ESTIMATORS,
    SHIFTS,
    WORDS,
    headlines,
    property_title,
    render_desiderata,
)
from multiplicity_bench.leaderboard.desiderata_tables import split
from multiplicity_bench.leaderboard.figures import draw
from multiplicity_bench.leaderboard.suite import Suite, load_suite
from multiplicity_bench.metrics.selection import NO, OPEN, YES

ROWS = ("identical", "laplace", "swag", "perturb_sgd")
CONTROL, FULL, PARTIAL, EMPTY = ROWS
NOBODY = "no member accepted"
VIEWS = ("clean", "brightness-2", "brightness-10", "pgd-2", "pgd_transfer-2")
OUT = ("ood-noise", "ood-zoo")
DETECTORS = ("knn", "mahalanobis", "max_softmax")
SCORES = ("disagreement", "ensemble_entropy", "mutual_information", "range")
MAPS = ("grad_cam:ssim", "gradient:spearman")
HEADLINES = (
    *("corrupted_accuracy", "robust_accuracy/pgd-2", "robust_accuracy/pgd_transfer-2"),
    *(f"ood_auroc/{view}:{detector}" for view in OUT for detector in ("mahalanobis", "max_softmax")),
    *("adaptive_calibration_error", "saliency_agreement/gradient:spearman"),
)
"""In the order of the page."""


class Numbers:
    """Numbers between 0.1 and 0.9 that no two entries share to three decimals."""

    def __init__(self) -> None:
        self.given = 0

    def __call__(self) -> float:
        self.given += 1
        assert self.given < 800
        return round(0.1 + 7 * self.given % 800 / 1000, 3)  # 7 and 800 share no divisor


def value(number: float | None, ends: bool = True, seeds: int = 2, reason: str = "") -> dict[str, Any]:
    low, high = (None, None) if number is None or not ends else (round(number - 0.05, 3), round(number + 0.05, 3))
    known = seeds if number is not None else 0
    return {"value": number, "low_end": low, "high_end": high, "seeds": known, "reason": reason}


def quantity(new: Numbers, ends: bool = True) -> dict[str, Any]:
    """A value of every row: one has it on one base seed alone, one has none."""
    return {
        CONTROL: value(new(), ends),
        FULL: value(new(), ends),
        PARTIAL: value(new(), ends, 1, "3 of 5 accepted"),
        EMPTY: value(None, reason=NOBODY),
    }


def a_property(new: Numbers, direction: str = "higher", same_base: bool = True) -> dict[str, Any]:
    """A control at chance, a set whose range is above chance, one on one base seed below it, one without members."""
    base, rows = value(new()), {}
    for label, spread, chance in ((CONTROL, 0.0, 0.0), (FULL, 0.08, 0.03), (PARTIAL, 0.02, 0.03), (EMPTY, None, None)):
        members = value(None, reason=NOBODY) if spread is None else value(new(), seeds=1 if label == PARTIAL else 2)
        rows[label] = {
            "base": base if same_base else value(new()),
            "members": members,
            "range": spread,
            "chance": chance,
            "p": None,
            "seeds": members["seeds"],
        }
    return {"direction": direction, "rows": rows}


def verdict(gain: float, words: str) -> dict[str, Any]:
    ends = {"gain_low": gain - 0.01, "gain_high": gain + 0.01, "loss_low": -0.01, "loss_high": 0.01}
    zeros = dict.fromkeys(("gain_val", "loss", "curse", "oracle_gap", "violation", "stability"), 0.0)
    return {"gain": gain, **ends, **zeros, "resolvable": 2 * gain, "verdict": words, "reason": "", "seeds": {"0": gain}}


def verdicts() -> dict[str, Any]:
    rows = {CONTROL: verdict(0.01, NO), FULL: verdict(0.03, YES), PARTIAL: verdict(0.02, OPEN)}
    return {key: {**rows, EMPTY: {"gain": None, "reason": "0 of 5 accepted", "seeds": {}}} for key in HEADLINES}


def made_up() -> dict[str, Any]:
    new = Numbers()
    accuracies = {
        view: {
            name: quantity(new)
            for name in ("base", "members", "ensemble", "balanced_error", "disagreement", "ambiguity")
            + (() if view == "clean" else ("relative", "variance_ratio", "rank_correlation"))
        }
        for view in VIEWS
    }
    for told in accuracies.values():
        told["base"] = dict.fromkeys(ROWS, value(new()))
    outliers = {
        view: {
            "ensemble_max_softmax": quantity(new),
            **{before + name: quantity(new) for before in ("", "gain of ", "unseen, by ") for name in SCORES},
            **{
                f"{words} {d}": quantity(new, False) for words in ("correlation of", "flags of") for d in ("knn", "vim")
            },
        }
        for view in OUT
    }
    names = ("ece", "ece after temperature", "temperature", "reliability", "resolution")
    calibrated = {f"{who}: {n}": quantity(new) for who in ("members", "ensemble") for n in names}
    calibrated |= {f"base: {n}": dict.fromkeys(ROWS, value(new())) for n in names} | {"epistemic": quantity(new)}
    estimators = ("gde", "atc_confidence", "confidence")
    blind = {
        view: {n: quantity(new) for n in ("error", *estimators)}
        | {n: quantity(new, False) for n in (*(f"off {e}" for e in estimators), "hard", "soft")}
        for view in VIEWS
    }
    maps = {item: {n: quantity(new) for n in ("agreement", "null", "ceiling", "share")} for item in MAPS}
    leaks = ("one", "k", "all", "k less one", "one: tpr", "all: tpr")
    leaked = {
        a: {n: quantity(new) for n in leaks} | {b: dict.fromkeys(ROWS, value(new())) for b in ("base", "base: tpr")}
        for a in ("loss", "lira")
    }
    properties = {
        **{f"corrupted_accuracy{s}": a_property(new) for s in ("", "/brightness-2", "/brightness-10")},
        **{f"robust_accuracy/{v}": a_property(new) for v in VIEWS[3:]},
        **{f"ood_auroc/{v}:{d}": a_property(new) for v in OUT for d in DETECTORS},
        **{f"ood_fpr95/{v}:max_softmax": a_property(new, "lower") for v in OUT},
        **{
            f"{n}{s}": a_property(new, "lower")
            for n in ("adaptive_calibration_error", "classwise_calibration_error", "aurc")
            for s in ("", *(f"/{v}" for v in VIEWS[1:]))
        },
        **{f"saliency_agreement/{item}": a_property(new, same_base=False) for item in MAPS},
        **{f"membership_auc:{a}": a_property(new, "lower") for a in ("loss", "lira")},
    }
    rungs = {"members": [20.0, 12.5, 3.0]} | {key: [0.2, round(new() / 10, 3), None] for key in HEADLINES}
    return {
        "members": 20,
        "notes": ["ood-zoo: 30 images of animals"],
        "axes": {
            "accuracy": accuracies,
            "outliers": outliers,
            "calibration": {"clean": calibrated},
            "unlabelled": blind,
            "saliency": maps,
            "membership": leaked,
        },
        "properties": properties,
        "verdicts": verdicts(),
        "ladder": {"rungs": ["drawn", "loss within epsilon", "as accurate"], "rows": {FULL: rungs}},
    }


def as_read(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(found, sort_keys=True, allow_nan=False))


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    path = tmp_path_factory.mktemp("suite") / "toy.yaml"
    path.write_text(
        "title: Toy board\ndataset: {name: toy}\nnetwork: {name: smallcnn}\nbase_seeds: [0, 1]\nmembers: 30\n"
        f"rows: [{', '.join(ROWS)}]\n",
        encoding="utf-8",
    )
    return load_suite(path)


@pytest.fixture
def found() -> dict[str, Any]:
    return as_read(made_up())


def science(found: dict[str, Any]) -> dict[str, Any]:
    return {"k": 5, "margin": 0.01, "fairness": {"patients": 156}, "desiderata": found}


def rendered(suite: Suite, found: dict[str, Any]) -> str:
    return render_desiderata([(suite, science(found))])


@pytest.fixture
def page(suite, found) -> str:
    return rendered(suite, found)


Table = dict[str, dict[str, str]]


def tables(page: str) -> dict[str, dict[str, Table]]:
    """Return section -> the bold line above ("" without) -> row -> column -> cell; parts of one table are joined."""
    out: dict[str, dict[str, Table]] = {}
    section, above, header = "", "", []
    for line in page.splitlines():
        if line.startswith("#"):
            section, above = line.lstrip("# "), ""
        elif re.fullmatch(r"\*\*[^|]+\*\*", line):
            above = line.strip("*")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not header:
                header = cells
            elif not re.fullmatch(r"-+:?", cells[0]):
                own = out.setdefault(section, {}).setdefault(above, {}).setdefault(cells[0].strip("`"), {})
                own |= dict(zip(header[1:], cells[1:], strict=True))
        else:
            header = []
    return out


def shown(entry: dict[str, Any], sign: str = "", ends: bool = True) -> str:
    if entry["value"] is None:
        return "–"
    text = f"{entry['value']:{sign}.3f}"
    if ends and entry["low_end"] is not None:
        text += f" [{entry['low_end']:{sign}.3f},{entry['high_end']:{sign}.3f}]"
    return text + (" (1)" if entry["seeds"] == 1 else "")


def spread(row: dict[str, Any], mean: bool = True) -> str:
    """The cell of a property; the made-up ranges are 0, above chance, below it on one base seed, and none."""
    before = f"{row['members']['value']:.3f}, " if mean and row["members"]["value"] is not None else ""
    ranges = {0.0: "0.000 / 0.000", 0.08: "**0.080** / 0.030", 0.02: "0.020 / 0.030 (1)", None: "–"}
    return before + ranges[row["range"]]


NAMES = {f"{CONTROL}` (control)": CONTROL, **{label: label for label in ROWS[1:]}}


def column(table: Table, name: str) -> dict[str, str]:
    return {NAMES[row]: cells[name] for row, cells in table.items() if row in NAMES}


def test_every_number_of_the_accuracy_on_views_is_in_its_cell(found, page):
    of_section = tables(page)["Corruptions and attacks: accuracy"]
    views = found["axes"]["accuracy"]
    for view in VIEWS:
        assert column(of_section[""], view) == {
            label: shown(row, ends=False) for label, row in views[view]["members"].items()
        }
        assert of_section[""]["base"][view] == shown(views[view]["base"][FULL], ends=False)
        for name, (text, _) in SHIFTS.items():
            if name in views[view]:
                assert column(of_section[text], view) == {label: shown(r) for label, r in views[view][name].items()}
    assert list(of_section[""]["base"]) == list(VIEWS), "by severity, clean first"
    for view, key in (("brightness-2", "corrupted_accuracy/brightness-2"), ("pgd-2", "robust_accuracy/pgd-2")):
        rows = found["properties"][key]["rows"]
        assert column(of_section["Range of members' accuracies / chance"], view) == {
            label: spread(row, mean=False) for label, row in rows.items()
        }


def test_every_headline_property_has_mean_range_and_chance_with_bold_only_above_it(found, page):
    table = tables(page)["Do equally good members differ?"][""]
    assert headlines(found) == list(HEADLINES)
    arrows = {"higher": "↑", "lower": "↓"}
    titles = {key: f"{property_title(key)} {arrows[found['properties'][key]['direction']]}" for key in HEADLINES}
    assert list(table["base"]) == list(titles.values())
    for key, title in titles.items():
        rows = found["properties"][key]["rows"]
        assert column(table, title) == {label: spread(row) for label, row in rows.items()}
        if key.startswith("saliency"):
            values = [row["base"]["value"] for row in rows.values()]
            assert table["base"][title] == f"{min(values):.3f} to {max(values):.3f}", "it differs from set to set"
        else:
            assert table["base"][title] == shown(rows[FULL]["base"])
    assert "Above chance: 9 of 18 cells, and 0 of 9 of controls." in " ".join(page.split())
    assert set(re.findall(r"\*\*0\.\d+\*\*", page)) == {"**0.080**"}


def test_a_range_at_chance_is_not_bold_and_one_just_above_it_is(found, suite):
    row = found["properties"]["corrupted_accuracy"]["rows"][FULL]
    for spread_, bold in ((0.03, False), (0.0304, True)):
        row["range"] = spread_
        cell = tables(rendered(suite, found))["Do equally good members differ?"][""][FULL]["accuracy, corruptions ↑"]
        assert ("**" in cell) == bold and cell.replace("*", "").endswith(", 0.030 / 0.030")
    row |= {"range": None, "chance": None, "seeds": 0}
    table = tables(rendered(suite, found))["Do equally good members differ?"][""]
    assert table[FULL]["accuracy, corruptions ↑"] == f"{row['members']['value']:.3f}, –"


def test_verdicts_are_counted_by_property_with_what_could_be_resolved(page):
    of_section = tables(page)["Better at no cost?"]
    table = of_section[""]
    for key in HEADLINES:
        assert column(table, property_title(key)) == {
            CONTROL: "+0.010 [0.000,+0.020] no",
            FULL: "+0.030 [+0.020,+0.040] **yes**",
            PARTIAL: "+0.020 [+0.010,+0.030] ?",
            EMPTY: "–",
        }
        assert table[property_title(key)] == {
            **{"yes": "1", "no": "0", "?": "1"},
            **{"resolvable": "0.040 to 0.060", "largest gain": "+0.030"},
        }, "of the sets that are no controls"
        assert of_section[property_title(key)][FULL]["resolvable"] == "0.060"
    text = " ".join(page.split())
    assert f"In all 27 verdicts: 9 times *{YES}*, 9 times *{NO}*, 9 times *{OPEN}*." in text
    assert "not resolved with this many patients (156)" in text and "at most 0.01 nats" in text


def test_every_number_out_of_distribution_is_in_its_cell(found, page):
    of_section = tables(page)["Out of distribution"]
    for view in OUT:
        told = found["axes"]["outliers"][view]
        expected = {"confidence": {label: shown(row) for label, row in told["ensemble_max_softmax"].items()}}
        words = {name: name.removeprefix("ensemble_").replace("_", " ") for name in SCORES}
        for name, text in words.items():
            expected[f"{text}, gain"] = {label: shown(row, "+") for label, row in told[f"gain of {name}"].items()}
            for where, before in (("AUROC of the set's scores", ""), ("unseen by confidence", "unseen, by ")):
                assert column(of_section[f"{view}: {where}"], text) == {
                    label: shown(row) for label, row in told[before + name].items()
                }
        assert {name: column(of_section[view], name) for name in of_section[view][FULL]} == expected
        for detector in DETECTORS:
            rows = found["properties"][f"ood_auroc/{view}:{detector}"]["rows"]
            table = of_section[f"{view}: AUROC of members' own detectors"]
            assert column(table, detector) == {label: spread(row) for label, row in rows.items()}
            assert table["base"][detector] == shown(rows[FULL]["base"])
        for before, text in (("correlation of", "correlation"), ("flags of", "flags that differ")):
            for detector in ("knn", "vim"):
                assert column(of_section[f"{view}: members' detectors, {text}"], detector) == {
                    label: shown(row) for label, row in told[f"{before} {detector}"].items()
                }
        rows = found["properties"][f"ood_fpr95/{view}:max_softmax"]["rows"]
        alarms = of_section["False alarms at 95% detected: members' mean, range / chance"]
        assert column(alarms, f"{view}, max_softmax") == {label: spread(row) for label, row in rows.items()}


def test_gains_are_counted_by_their_intervals_over_the_sets_that_are_no_controls(found, suite):
    told = found["axes"]["outliers"]
    for view in OUT:
        for name in SCORES:
            told[view][f"gain of {name}"] = {label: value(-0.01) for label in ROWS}
    told["ood-noise"]["gain of range"] = {
        CONTROL: value(0.3),
        FULL: value(0.2),
        PARTIAL: value(-0.2),
        EMPTY: value(None),
    }
    text = " ".join(rendered(suite, found).split())
    assert "Of 23 gains in this section, 1 have an interval above 0 and 1 one below" in text
    for attack in ("loss", "lira"):
        found["axes"]["membership"][attack]["k less one"] = {
            CONTROL: value(0.3),
            FULL: value(0.2),
            PARTIAL: value(0.01),
        }
    text = " ".join(rendered(suite, found).split())
    assert "Of 4 differences *k less one* in this section, 2 have an interval above 0" in text


def test_every_number_of_calibration_is_in_its_cell(found, page):
    of_section = tables(page)["Calibration"]
    told = found["axes"]["calibration"]["clean"]
    folded = of_section["Temperature and parts of the Brier score"]
    for table, names in (
        (of_section[""], {"ECE": "ece", "ECE after temperature": "ece after temperature"}),
        (folded, {name: name for name in ("temperature", "reliability", "resolution")}),
    ):
        for text, name in names.items():
            for who in ("members", "ensemble"):
                rows = told[f"{who}: {name}"]
                assert column(table, f"{text}, {who}") == {label: shown(row) for label, row in rows.items()}
            assert table["base"][f"{text}, members"] == shown(told[f"base: {name}"][FULL])
            assert table["base"][f"{text}, ensemble"] == "–"
    assert column(of_section[""], "epistemic") == {label: shown(row) for label, row in told["epistemic"].items()}
    for name in ("adaptive_calibration_error", "classwise_calibration_error", "aurc"):
        for view in VIEWS:
            rows = found["properties"][name + ("" if view == "clean" else f"/{view}")]["rows"]
            table = of_section[f"{WORDS[name].capitalize()} (lower is better): members' mean, range / chance"]
            assert column(table, view) == {label: spread(row) for label, row in rows.items()}


def test_errors_without_labels_are_means_over_the_sets_beside_the_truth_and_set_by_set_below(found, page):
    of_section = tables(page)["Errors without labels"]
    for view, told in found["axes"]["unlabelled"].items():
        own = {name: [rows[label]["value"] for label in (FULL, PARTIAL)] for name, rows in told.items()}
        means = {name: f"{sum(values) / 2:.3f}" for name, values in own.items()}
        ends = [f"{min(own[kind]):.3f} to {max(own[kind]):.3f}" for kind in ("hard", "soft")]
        line = of_section[""][view]
        assert line["true error"] == means["error"] and line["labels shifted, p"] == "; ".join(ends)
        assert column(of_section["True error"], view) == {
            label: shown(row, ends=False) for label, row in told["error"].items()
        }
        for name in ("gde", "atc_confidence", "confidence"):
            assert line[ESTIMATORS[name]] == f"{means[name]}, off {means[f'off {name}']}"
            cells = column(of_section[ESTIMATORS[name]], view)
            both = {label: (row["value"], told[f"off {name}"][label]["value"]) for label, row in told[name].items()}
            assert cells[FULL] == "{:.3f}, off {:.3f}".format(*both[FULL])
            assert cells[PARTIAL] == "{:.3f}, off {:.3f} (1)".format(*both[PARTIAL]) and cells[EMPTY] == "–"
        cells = column(of_section["Labels shifted, p"], view)
        assert cells[FULL] == f"{told['hard'][FULL]['value']:.3f}; {told['soft'][FULL]['value']:.3f}"
    assert "that are no controls (3)" in " ".join(page.split())


def test_every_number_of_explanations_and_membership_is_in_its_cell(found, page):
    of_section = tables(page)["Explanations"]
    words = {
        "gradient:spearman": "Gradient by the image: rank correlation of the pixels",
        "grad_cam:ssim": "Grad-CAM: structural similarity",
    }
    for item, text in words.items():
        for name, rows in found["axes"]["saliency"][item].items():
            assert column(of_section[text], name) == {label: shown(row) for label, row in rows.items()}
        rows = found["properties"][f"saliency_agreement/{item}"]["rows"]
        assert column(of_section[text], "range / chance") == {label: spread(r, mean=False) for label, r in rows.items()}
        values = [row["base"]["value"] for row in rows.values()]
        assert of_section[text]["base"]["agreement"] == f"{min(values):.3f} to {max(values):.3f}"
    of_section = tables(page)["Who was in the training data?"]
    titles = {"one": "AUC, one", "k": "AUC, 5", "all": "AUC, all", "one: tpr": "TPR, one", "all: tpr": "TPR, all"}
    for attack, told in found["axes"]["membership"].items():
        table, rows = of_section[f"Attack: {attack}"], found["properties"][f"membership_auc:{attack}"]["rows"]
        for name, title in titles.items():
            assert column(table, title) == {label: shown(row) for label, row in told[name].items()}
        assert column(table, "5 less one") == {label: shown(row, "+") for label, row in told["k less one"].items()}
        assert column(table, "range / chance") == {label: spread(row, mean=False) for label, row in rows.items()}
        assert table["base"]["AUC, one"] == shown(rows[FULL]["base"]) and table["base"]["AUC, all"] == "–"
        assert table["base"]["TPR, one"] == shown(told["base: tpr"][FULL])


def test_the_ladder_shows_every_headline_rung_by_rung(found, page):
    (row,) = tables(page)["Do differences persist as specifications are added?"][""].values()
    assert row.pop("members left") == "20 → 12.5 → 3"
    rungs = found["ladder"]["rows"][FULL]
    assert row == {property_title(key): f"0.200 → {rungs[key][1]:.3f} → –" for key in HEADLINES}
    assert "(1) drawn. (2) loss within epsilon. (3) as accurate." in " ".join(page.split())


def test_headlines_are_open_and_the_rest_is_closed(page):
    assert page.count("<details><summary>") == page.count("</details>") == page.count("<details") == 6
    opened = tables(re.sub(r"<details>.*?</details>\n", "", page, flags=re.DOTALL))
    everything = tables(page)
    assert list(opened) == list(everything), "no section is closed as a whole"
    kept = {section: list(of_section) for section, of_section in opened.items()}
    assert kept == {
        "Do equally good members differ?": [""],
        "Better at no cost?": [""],
        "Corruptions and attacks: accuracy": [""],
        "Out of distribution": list(OUT),
        "Calibration": [""],
        "Errors without labels": [""],
        "Explanations": ["Gradient by the image: rank correlation of the pixels"],
        "Who was in the training data?": ["Attack: lira", "Attack: loss"],
        "Do differences persist as specifications are added?": [""],
    }


def test_the_page_is_valid_tables_and_short_lines_without_nan_or_none(page):
    header: list[str] = []
    for line in page.splitlines():
        if not line.startswith("|"):
            header = []
            assert len(line) <= 120 or line.startswith("!")
            continue
        header = header or [line]
        assert line.endswith("|")
        assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", header[0]))
    assert re.search(r"\bnan\b|\bNone\b|\binf\b|\{|\}", page) is None and "\n\n\n" not in page
    legends = re.findall(r"\|\n\n((?!\*\*|[#<|!])[^|]+?)\n\n", page)
    assert len(legends) > 12 and all(legend.count("\n") < 6 for legend in legends)


def test_what_was_seen_names_views_members_notes_and_the_sets_without_any(page):
    seen = page[page.index("### What was seen") : page.index("### Do equally")]
    assert "the first 20 members of each set" in seen and "at most 20." in seen
    assert "- Corruptions: `brightness-2`, `brightness-10`." in seen and "- Attacks: `pgd-2`, `pgd_transfer-2`." in seen
    assert "- Out of distribution: `ood-noise`, `ood-zoo`." in seen and "- ood-zoo: 30 images of animals." in seen
    assert f"Undefined, no accepted member among them: `{EMPTY}`." in seen
    assert NOBODY not in page, "it is said once, of the whole set"


def test_reasons_name_the_sets_and_the_columns_that_they_hold_for(found, suite):
    views = found["axes"]["accuracy"]
    for view in VIEWS[1:]:
        views[view]["rank_correlation"][FULL] = value(None, reason="12 of 20 members")
    views["brightness-2"]["variance_ratio"][PARTIAL] = value(None, reason="all members are alike")
    text = " ".join(rendered(suite, found).split())
    assert f"Undefined, 12 of 20 members: `{FULL}`." in text
    assert f"Undefined, all members are alike: `{PARTIAL}` (brightness-2)." in text


def test_intervals_end_where_values_do(found, suite):
    told = found["axes"]["accuracy"]["brightness-2"]
    told["rank_correlation"][FULL] = {**value(-0.5), "low_end": -1.4, "high_end": 1.2}
    told["variance_ratio"][FULL] = {**value(2.0), "low_end": -2.0, "high_end": 6.0}
    told["relative"][FULL] = {**value(0.98), "low_end": 0.9, "high_end": 1.06}
    told["disagreement"][FULL] = {**value(0.01), "low_end": -0.01, "high_end": 0.03}
    of_section = tables(rendered(suite, found))["Corruptions and attacks: accuracy"]
    cells = {text: of_section[text][FULL]["brightness-2"] for text, _ in SHIFTS.values()}
    assert cells["Rank correlation"] == "-0.500 [-1.000,1.000]"
    assert cells["Variance ratio"] == "2.000 [0.000,6.000]"
    assert cells["Relative accuracy"] == "0.980 [0.900,1.060]"
    assert cells["Disagreement"] == "0.010 [0.000,0.030]"


def test_a_page_says_when_views_show_some_cases(found, suite, page):
    assert "drawn at random once" not in page
    text = " ".join(rendered(replace(suite, view_cases=30), found).split())
    assert "Views show 30 cases of val and of test" in text
    assert "not resolved with this many patients (30 cases)." in text


def test_suites_without_views_are_left_out_and_with_none_the_page_says_so(found, suite):
    for empty in ([], [(suite, {"k": 5})], [(suite, {"k": 5, "margin": 0.01, "desiderata": {}})]):
        page = render_desiderata(empty)
        assert page.splitlines()[-1] == "No suite commits shifted views." and "## Toy board" not in page
    both = render_desiderata([(suite, {"k": 5}), (suite, science(found))])
    assert both == rendered(suite, found) and "No suite" not in both


def test_parts_that_a_suite_does_not_have_leave_no_headings(suite):
    bare = {"members": 3, "notes": [], "axes": {"accuracy": made_up()["axes"]["accuracy"]}}
    page = rendered(suite, bare | {"properties": {}, "verdicts": {}, "ladder": None})
    assert re.findall(r"^#+ .*", page, flags=re.MULTILINE)[1:] == [
        *("## Toy board", "### What was seen", "### Corruptions and attacks: accuracy"),
    ]
    assert "figures/" not in page and page.count("<details>") == page.count("</details>") == 1


def test_the_page_depends_on_no_order(found, suite, page):
    backwards = json.loads(json.dumps(found), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert backwards == found and rendered(suite, backwards) == page


@pytest.mark.parametrize(("columns", "sizes"), [(4, [4]), (5, [2, 3]), (9, [3, 3, 3]), (10, [3, 4, 3]), (0, [0])])
def test_columns_are_split_evenly(columns, sizes):
    parts = split(list(range(columns)), 4)
    assert sorted(map(len, parts)) == sorted(sizes) and [c for part in parts for c in part] == list(range(columns))


def test_the_figure_shows_what_the_page_links(found, suite, page, tmp_path):
    pytest.importorskip("matplotlib")
    from multiplicity_bench.leaderboard import figures

    parts = {"selection": {}, "fidelity": {}, "cost": {}, "ladder": None}
    assert [path.name for path in draw(suite, science(found) | parts, tmp_path)] == ["toy-properties.png"]
    assert re.findall(r"\]\(figures/(.+?)\)", page) == ["toy-properties.png"]
    figure = figures._properties(suite, science(found))
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert len(panels) == len(HEADLINES)
    for axis, key in zip(panels, HEADLINES, strict=True):
        rows = found["properties"][key]["rows"]
        drawn = [(round(bar.get_x() + bar.get_width() / 2, 9), round(bar.get_width(), 9)) for bar in axis.patches]
        expected = [(row["members"]["value"], row[n]) for row in rows.values() for n in ("chance", "range")]
        assert np.array(sorted(drawn)) == pytest.approx(np.array(sorted(e for e in expected if e[0] is not None)))
        ticks = {line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 2}
        assert ticks == {row["base"]["value"] for row in rows.values() if row["members"]["value"] is not None}
    assert figures._properties(suite, {"k": 5}) is None and figures._properties(suite, {"desiderata": {}}) is None
