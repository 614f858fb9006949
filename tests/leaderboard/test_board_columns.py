"""Numbers of the board: t intervals, ranks, and which of them a row may have."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from multiplicity_bench.leaderboard.cells import settle
from multiplicity_bench.leaderboard.columns import (
    BOUNDS,
    Column,
    every_column,
    over_seeds,
    paired_p,
    ranks,
    score_name,
    summarise,
    unranked,
)
from multiplicity_bench.metrics.evaluation import catalogue
from scipy import stats

LOSS = Column("loss", "nll.member_mean", better="lower")
ACCEPTED = Column("accepted", "acceptance_rate", better="higher")


def test_a_summary_is_the_mean_and_t_interval_of_scipy(suite, make_records):
    table = settle(suite, make_records(suite))
    summary = summarise(table, suite.row("retrain"), LOSS)
    values = list(summary.seeds.values())
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert len(values) == 5
    np.testing.assert_allclose([summary.value, summary.low, summary.high], [np.mean(values), low, high], rtol=1e-12)
    assert summary.interval == "t over base seeds"


def test_intervals_stay_within_the_bounds_of_their_unit():
    summary = over_seeds({0: 0.99, 1: 0.8, 2: 1.0}, "rate")
    assert summary.high == 1.0 and 0 <= summary.low < summary.value
    assert over_seeds({0: 0.0, 1: 0.4}, "amount").low == 0.0
    assert over_seeds({0: -0.9, 1: 0.2}, "difference").low == -1.0


def test_an_acceptance_of_all_or_none_has_wilsons_interval_over_all_draws(suite, make_records):
    """Of 100 draws, all in: the lower end is n / (n + z^2); the t interval of five equal values would be a point."""
    table = settle(suite, make_records(suite))
    everyone = summarise(table, suite.row("identical"), ACCEPTED)
    assert (everyone.value, everyone.high) == (1.0, 1.0)
    assert everyone.low == pytest.approx(100 / (100 + stats.norm.ppf(0.975) ** 2))
    assert everyone.interval == "Wilson over 100 draws"
    nobody = summarise(table, suite.row("laplace[prior_precision=marglik]"), ACCEPTED)
    assert (nobody.value, nobody.low) == (0.0, 0.0) and nobody.high == pytest.approx(1 - everyone.low)
    some = summarise(table, suite.row("retrain"), ACCEPTED)
    assert some.interval == "t over base seeds"


def test_equal_values_have_exactly_themselves_as_mean():
    assert over_seeds(dict.fromkeys(range(7), 0.1), "rate").value == 0.1


def test_one_seed_keeps_the_interval_of_the_record(suite, make_record):
    table = settle(suite, [make_record("swag", 3)])
    summary = summarise(table, suite.row("swag"), LOSS)
    score = table.ok(suite.row("swag"))[3]["scores"]["nll.member_mean"]
    assert (summary.low, summary.high, summary.interval) == (score["low"], score["high"], "bootstrap over patients")


def test_ranks_follow_from_paired_t_tests_with_holm_over_all_pairs(suite, make_records):
    table = settle(suite, make_records(suite))
    rows = [row for row in suite.rows if not unranked(table, LOSS, row)]
    values = {row.label: np.array(list(summarise(table, row, LOSS).seeds.values())) for row in rows}
    pairs = list(itertools.combinations(values, 2))
    p = np.array([stats.ttest_rel(values[a], values[b]).pvalue for a, b in pairs])
    better = dict.fromkeys(values, 0)
    passed = True
    for step, i in enumerate(np.argsort(p)):  # Holm, step down: the first that fails stops the rest
        passed = passed and p[i] * (len(p) - step) <= 0.05
        if passed:
            a, b = pairs[i]
            better[b if values[a].mean() < values[b].mean() else a] += 1
    expected = {label: 1 + n for label, n in better.items()}
    assert ranks(table, LOSS) == expected
    assert len(set(expected.values())) > 1, "the factory makes rows that differ"


def test_holm_decides_a_case_worked_by_hand(suite, make_records):
    """Three rows, differences 1, 1, 1, 1, 1.5 and 0, .1, 0, .1, 0: only the first is significant after Holm."""
    losses = {"retrain": [1.0] * 5, "laplace": [0.0, 0.0, 0.0, 0.0, -0.5], "swag": [0.9, 1.0, 0.9, 1.0, 1.0]}

    def change(record):
        if record["row"] in losses:
            record["scores"]["nll.member_mean"]["value"] = losses[record["row"]][record["identity"]["base_seed"]]
        elif record["row"].startswith("laplace["):
            record["set"]["accepted"] = []

    # retrain - laplace: t = 1.1 / (.2236 / sqrt 5) = 11, p = .00039; retrain - swag: t = .04 / .0245 = 1.63, p = .178
    assert paired_p(np.array([1, 1, 1, 1, 1.5])) == pytest.approx(2 * stats.t.sf(11, 4))
    assert paired_p(np.array([0.1, 0, 0.1, 0, 0])) == pytest.approx(2 * stats.t.sf(0.04 / np.sqrt(0.0006), 4))
    assert ranks(settle(suite, make_records(suite, change)), LOSS) == {"retrain": 2, "laplace": 1, "swag": 2}


def test_equal_rows_tie_and_a_constant_difference_is_certain():
    assert paired_p(np.zeros(5)) == 1.0
    assert paired_p(np.full(5, 0.01)) == 0.0


def test_controls_are_neither_ranked_nor_competitors(suite, make_records):
    records = make_records(suite)
    table = settle(suite, records)
    without = settle(suite, [r for r in records if not suite.row(r["row"]).control])
    assert ranks(table, ACCEPTED) == ranks(without, ACCEPTED)
    assert not {"identical", "logit_noise", "temperature"} & ranks(table, ACCEPTED).keys()


def test_a_row_with_fewer_than_k_members_is_ranked_by_acceptance_only(suite, make_records):
    table = settle(suite, make_records(suite))
    label = "laplace[prior_precision=marglik]"
    assert label not in ranks(table, LOSS)
    assert "fewer than k = 5" in unranked(table, LOSS, suite.row(label))
    assert ranks(table, ACCEPTED)[label] == 5, "every other row accepts significantly more"


def test_one_base_seed_gives_no_rank(suite, make_record):
    table = settle(suite, [make_record(row.label, 0) for row in suite.rows])
    assert ranks(table, LOSS) == {}
    assert unranked(table, LOSS, suite.row("swag")) == "fewer than two base seeds"


def test_ranked_columns_agree_with_the_direction_of_their_metric_and_every_score_has_a_unit(suite):
    known = catalogue()
    for column in every_column(suite).values():
        assert column.unit in BOUNDS and column.unit != "number", column
        if not column.key.startswith("cost:"):
            info = known[score_name(column.key)]
            assert not column.better or column.better == info.direction, column
