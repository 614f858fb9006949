"""The board as text: deterministic, complete, and honest about what is missing, stale, unverified or broken."""

from __future__ import annotations

import csv
import io
import random
import re
from dataclasses import replace

import pytest
from multiplicity_bench.leaderboard.cells import settle
from multiplicity_bench.leaderboard.columns import Column, summarise
from multiplicity_bench.leaderboard.render import render, render_csv, render_terminal, summary_line
from multiplicity_bench.leaderboard.text import number


def rows_of(text: str, label: str) -> list[list[str]]:
    """Return the cells of every table line of a row."""
    lines = [line for line in text.splitlines() if line.startswith(f"| `{label}`")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(text: str, title: str) -> str:
    return re.split(r"^#{2,3} ", text.split(f"### {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def test_the_board_does_not_depend_on_the_order_of_the_records(suite, make_records):
    records = make_records(suite)
    text, table = render(records, [suite]), render_csv(records, [suite])
    for seed in range(3):
        random.Random(seed).shuffle(records)
        assert render(records, [suite]) == text
        assert render_csv(records, [suite]) == table


def test_the_header_says_what_the_data_and_the_protocol_are(suite, make_records):
    text = " ".join(render(make_records(suite), [suite]).split())
    for part in (
        "**synthetic** images",
        "train 491, tune 55, val 78, test 156",
        "1 = normal, benign (positive: 1)",
        "no patient ids",
        "exact duplicates across splits: train/test 2",
        "CC BY 4.0",
        "no patient is real",
        "epochs 20, lr 0.1, optimizer sgd",
        "TF32 off",
        "x86_64, 2 cores, 2 threads",
        "nll on val ≤ base + 0.05",
        "k = 5",
        "20 members drawn",
        "5 base seeds (0–4)",
        "40 of 40 cells scored",
    ):
        assert part in text, part


def test_rows_stand_in_the_order_of_the_suite_with_controls_marked(suite, make_records):
    overview = section(render(make_records(suite), [suite]), "Overview")
    labels = re.findall(r"^\| `(.+?)`( \(control\))? ", overview, flags=re.M)
    assert [label for label, _ in labels] == [row.label for row in suite.rows]
    assert [bool(mark) for _, mark in labels] == [row.control for row in suite.rows]


def test_the_lines_of_every_table_have_equal_length(suite, make_records):
    for block in re.findall(r"(?:^\|.*\n)+", render(make_records(suite), [suite]), flags=re.M):
        assert len({len(line) for line in block.splitlines()}) == 1
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_no_rank_stands_in_a_table_of_multiplicity(suite, make_records):
    text = render(make_records(suite), [suite])
    assert "rank |" not in section(text, "Multiplicity")
    assert section(text, "Overview").splitlines()[1].count("rank") == 3


def test_a_cell_is_the_mean_with_its_interval(suite, make_records):
    records = make_records(suite)
    summary = summarise(settle(suite, records), suite.row("swag"), Column("", "accuracy.member_mean"))
    cell = f"{summary.value:.3f} [{summary.low:.3f},{summary.high:.3f}]"
    assert cell in rows_of(section(render(records, [suite]), "Overview"), "swag")[0]


def test_one_base_seed_is_labelled_test_cases_only_and_has_no_ranks(suite, make_record):
    suite = replace(suite, base_seeds=(0,), board=False)
    text = render([make_record(row.label, 0) for row in suite.rows], [suite])
    assert "Brackets: **test cases only**" in text
    assert " rank |" not in text
    assert "t interval over base seeds." not in section(text, "Overview")


def test_a_single_seed_among_several_is_marked(suite, make_records):
    records = [r for r in make_records(suite) if r["row"] != "swag" or r["identity"]["base_seed"] == 2]
    text = render(records, [suite])
    cells = rows_of(text, "swag")[0]
    assert cells[1] == "1 of 5, 4 missing" and cells[2].endswith(" *")
    assert "a single base seed, brackets for test cases only" in " ".join(text.split())


def test_missing_cells_are_holes(suite, make_records):
    text = render([r for r in make_records(suite) if r["row"] != "swag"], [suite])
    assert all(cells[1] == "missing" and not any(cells[2:]) for cells in rows_of(text, "swag"))
    assert "`swag`: missing on base seeds 0–4." in text


def test_skips_and_failures_are_shown_with_their_reasons(suite, make_records):
    def change(record):
        if record["row"] == "swag":
            record.update(status="skipped", reason="no such likelihood", scores={}, cost={})
        if record["row"] == "laplace" and record["identity"]["base_seed"] == 1:
            record.update(status="failed", reason="loss is NaN in epoch 3", scores={}, cost={})

    text = render(make_records(suite, change), [suite])
    assert rows_of(text, "swag")[0][1] == "skipped"
    assert rows_of(text, "laplace")[0][1] == "4 of 5, 1 failed"
    assert "`swag`: skipped on base seeds 0–4: no such likelihood." in text
    assert "`laplace`: failed on base seed 1: loss is NaN in epoch 3." in text


@pytest.mark.parametrize(
    ("section_name", "field", "value", "reason"),
    [
        ("identity.dataset", "digest", "e" * 64, "dataset.digest eeeeeeeeeeee, the table has dddddddddddd"),
        ("identity.dataset", "size", 64, "dataset.size 64, the suite declares 28"),
        ("identity.network", "norm", "batch", "network.norm batch, the table has nothing"),
        ("identity.training", "lr", 0.2, "training.lr 0.2, the table has 0.1"),
        ("identity.training", "epochs", 3, "training.epochs 3, the suite declares 20"),
        ("identity.numerics", "tf32", True, "numerics.tf32 true, the table has false"),
        ("identity.numerics", "device", "cuda", "device cuda, the suite declares cpu"),
        ("identity.generator", "version", 2, "generator.version 2, the table has 1"),
        ("identity", "members", 8, "members 8, the suite declares 20"),
        ("identity", "resample_seed", 1, "resample_seed 1, the table has 0"),
        ("identity", "generator_seed", 1, "generator_seed 1, the suite declares 0"),
        ("protocol", "epsilon", 0.1, "epsilon 0.1, the suite declares 0.05"),
        ("protocol", "k", 3, "k 3, the suite declares 5"),
        ("protocol.metrics", "vpr", 2, "metrics.vpr 2, the table has 1"),
    ],
)
def test_a_record_that_departs_is_stale_and_enters_no_number(suite, make_records, section_name, field, value, reason):
    def change(record):
        if record["row"] == "swag" and record["identity"]["base_seed"] == 4:
            part = record
            for name in section_name.split("."):
                part = part[name]
            part[field] = value
            for score in record["scores"].values():
                score["value"] = 0.777

    text = render(make_records(suite, change), [suite])
    assert f"`swag`: stale on base seed 4: {reason}" in " ".join(text.split())
    assert rows_of(text, "swag")[0][1] == "4 of 5, 1 stale"
    absent = render([r for r in make_records(suite) if (r["row"], r["identity"]["base_seed"]) != ("swag", 4)], [suite])
    assert rows_of(text, "swag")[0][2:] == rows_of(absent, "swag")[0][2:]


def test_records_of_other_metric_versions_do_not_share_a_table_and_the_majority_is_kept(suite, make_records):
    def change(record):
        if record["identity"]["base_seed"] < 2:
            record["protocol"]["metrics"]["nll"] = 2

    table = settle(suite, make_records(suite, change))
    assert {cell.state for (_, seed), cell in table.cells.items() if seed < 2} == {"stale"}
    assert {cell.state for (_, seed), cell in table.cells.items() if seed >= 2} == {"ok"}


def test_a_record_of_one_suite_is_not_stale_in_another(suite, make_records):
    small = replace(suite, name="small", title="Small", members=8)
    small = replace(small, rows=tuple(replace(row, members=8) for row in suite.rows))
    text = render(make_records(suite), [suite, small])
    assert "stale on" not in text
    assert "stale on" in render(make_records(suite), [small])


def test_records_of_a_dirty_tree_stand_apart(suite, make_records):
    def change(record):
        record["provenance"]["dirty"] = record["row"] == "swag"

    text = render(make_records(suite, change), [suite])
    main, unverified = text.split("### Unverified\n")
    assert rows_of(main, "swag")[0][1] == "missing"
    assert rows_of(unverified, "swag")[0][1] == "5"
    assert not rows_of(unverified, "retrain")
    everything = render(make_records(suite, lambda r: r["provenance"].update(dirty=True)), [suite])
    assert "### Overview" not in everything and "### Unverified" in everything


def test_identical_at_its_null_values_is_said_and_anything_else_is_flagged(suite, make_records):
    assert "`identical` is exactly at its null values on base seeds 0–4." in render(make_records(suite), [suite])

    def change(record):
        if record["row"] == "identical" and record["identity"]["base_seed"] == 2:
            record["scores"]["vpr@5"]["value"] = 1e-9

    text = " ".join(render(make_records(suite, change), [suite]).split())
    assert "**CONTROL BROKEN**: `identical` is not at its null values on base seed 2: vpr@5 = 1e-09." in text
    assert "exactly at its null values" not in text
    without = [r for r in make_records(suite) if r["row"] != "identical"]
    assert "**No control**" in render(without, [suite])


def test_undefined_scores_are_dashes_with_one_note_per_reason(suite, make_records):
    text = render(make_records(suite), [suite])
    label = "laplace[prior_precision=marglik]"
    assert rows_of(section(text, "Multiplicity"), label)[0][1:] == ["–"] * 9
    notes = " ".join(section(text, "Notes").split())
    assert notes.count(f"`{label}`: accuracy.ensemble") == 1
    assert f"`{label}`: not ranked but by acceptance: fewer than k = 5 members accepted on base seeds 0–4." in notes


def test_a_mean_over_the_defined_seeds_only_is_marked(suite, make_records):
    def change(record):
        if record["row"] == "swag" and record["identity"]["base_seed"] == 0:
            record["scores"]["ambiguity@5"] |= {"value": None, "reason": "4 of 5 accepted"}

    text = render(make_records(suite, change), [suite])
    assert rows_of(text, "swag")[0][7].endswith("] (4)")
    assert "`swag`: ambiguity@5 undefined on base seed 0: 4 of 5 accepted." in text


def test_costs_on_other_hardware_are_left_out(suite, make_records):
    def change(record):
        if record["row"] == "swag" and record["identity"]["base_seed"] == 0:
            record["cost"] |= {"hardware": "another machine", "fixed_cost_s": 1000}

    text = render(make_records(suite, change), [suite])
    assert rows_of(section(text, "Cost"), "swag")[1][1] == "1.500 (4)"
    assert "`swag`: ran on another machine, 2 threads for base seed 0" in text


def test_resumed_runs_are_flagged(suite, make_records):
    def change(record):
        record["cost"]["resumed"] = record["row"] == "swag" and record["identity"]["base_seed"] in (1, 2)

    text = section(render(make_records(suite, change), [suite]), "Cost")
    assert rows_of(text, "swag")[1][-1] == "1–2"
    assert rows_of(text, "retrain")[1][-1] == "no"


def test_bases_that_differ_within_a_base_seed_are_flagged(suite, make_records):
    def change(record):
        if record["row"] == "swag" and record["identity"]["base_seed"] == 3:
            record["scores"]["accuracy.base"]["value"] += 0.01

    assert "the rows of base seed 3 disagree about accuracy.base." in render(make_records(suite, change), [suite])
    assert "Bases differ" not in render(make_records(suite), [suite])


def test_epsilon_below_two_standard_errors_is_marked(suite, make_records):
    text = section(render(make_records(suite), [suite]), "Membership")
    assert rows_of(text, "swag")[0][-1] == "! 1.6–3.6"
    fine = make_records(suite, lambda record: record["set"].update(epsilon_in_se=2.5))
    assert rows_of(section(render(fine, [suite]), "Membership"), "swag")[0][-1] == "2.5"


def test_acceptance_stands_beside_that_of_retraining_the_same_bases(suite, make_records):
    records = [r for r in make_records(suite) if r["row"] != "swag" or r["identity"]["base_seed"] < 2]
    counts = {
        (r["row"], r["identity"]["base_seed"]): len(r["set"]["accepted"])
        for r in records
        if r["row"] in ("swag", "retrain")
    }
    cells = rows_of(section(render(records, [suite]), "Membership"), "swag")[0]
    retrained = (counts["retrain", 0] + counts["retrain", 1]) / 40
    assert cells[1] == f"{counts['swag', 0]} {counts['swag', 1]} – – – of 20"
    assert cells[5] == f"{retrained:.3f}"
    assert cells[6].startswith(f"{(counts['swag', 0] + counts['swag', 1]) / 40 - retrained:+.3f} [")


def test_notes_that_differ_in_numbers_only_share_a_line(suite, make_records):
    def change(record):
        if record["row"] == "swag":
            record["set"]["notes"] = [f"epsilon 0.05 is 1.{record['identity']['base_seed']} standard errors"]

    notes = section(render(make_records(suite, change), [suite]), "Notes")
    assert "`swag`: epsilon 0.05 is 1.0 standard errors (and 4 alike, with other numbers)." in notes


def test_the_csv_gives_back_what_the_records_say(suite, make_records):
    records = make_records(suite)
    lines = list(csv.DictReader(io.StringIO(render_csv(records, [suite]))))
    by_cell = {(r["row"], r["identity"]["base_seed"]): r for r in records}
    seen = 0
    for line in lines:
        for pair in line["per_seed"].split():
            seed, value = pair.split(":")
            record = by_cell[line["row"], int(seed)]
            key = line["key"]
            expected = record["cost"][key[5:]] if key.startswith("cost:") else record["scores"][key]["value"]
            assert float(value) == pytest.approx(expected, rel=1e-8)
            seen += key in record["scores"]
    defined = sum(score["value"] is not None for r in records for score in r["scores"].values())
    assert seen == defined
    ranked = {line["key"] for line in lines if line["rank"]}
    assert ranked == {
        "acceptance_rate",
        "cost:cost_per_accepted_bt",
        "ece.ensemble",
        "ece.member_mean",
        "nll.ensemble",
        "nll.member_mean",
    }


def test_the_csv_has_a_line_for_a_row_without_scores(suite, make_records):
    def change(record):
        if record["row"] == "swag":
            record.update(status="skipped", reason="no such likelihood", scores={}, cost={})

    lines = list(csv.DictReader(io.StringIO(render_csv(make_records(suite, change), [suite]))))
    (line,) = [line for line in lines if line["row"] == "swag"]
    assert (line["state"], line["key"], line["reason"]) == ("skipped", "", "no such likelihood")


def test_the_summary_of_a_record_is_one_line(make_record):
    line = summary_line(make_record("laplace[structure=kron]", 2))
    assert "\n" not in line
    assert line.startswith("laplace[structure=kron], base seed 2: accepted ")
    assert " of 20 at epsilon 0.05, accuracy 0." in line and "ambiguity@5 0." in line
    skipped = make_record("swag", 0, lambda r: r.update(status="skipped", reason="needs BatchNorm", scores={}, cost={}))
    assert summary_line(skipped) == "swag, base seed 0: skipped, needs BatchNorm"


def test_the_terminal_table_has_a_line_per_row_and_the_reasons_of_holes(suite, make_record):
    suite = replace(suite, base_seeds=(0,), board=False)
    records = [make_record(row.label, 0) for row in suite.rows if row.label != "swag"]
    records.append(make_record("swag", 0, lambda r: r.update(status="failed", reason="diverged", scores={}, cost={})))
    lines = render_terminal(records, suite).splitlines()
    assert [line.split()[0] for line in lines[1:9]] == [row.label for row in suite.rows]
    assert max(map(len, lines[:9])) <= 100
    assert lines[8].split()[1] == "failed"
    assert "swag, base seed 0: failed, diverged" in lines


def test_only_zero_reads_as_zero():
    assert [number(x, "amount") for x in (0.0, 1e-9, 0.0004999, 0.0005001)] == ["0.000", "<0.001", "<0.001", "0.001"]
    assert [number(x, "difference") for x in (0.1, -0.1, -1e-9)] == ["+0.100", "-0.100", "0.000"]
    assert [number(x, "bytes") for x in (4, 94152, 3e8, None)] == ["4 B", "91.9 KiB", "286.1 MiB", "–"]
