"""Suite files: what they give, and what is said about those that are wrong."""

from __future__ import annotations

import pytest
from multiplicity_bench.errors import UserError
from multiplicity_bench.leaderboard.cells import settle
from multiplicity_bench.leaderboard.cli import main
from multiplicity_bench.leaderboard.record import write
from multiplicity_bench.leaderboard.science import inputs
from multiplicity_bench.leaderboard.suite import board_suites, load_suite, suite_names, suite_of


def test_every_packaged_suite_is_valid_and_the_board_consists_of_those_that_say_so():
    assert {load_suite(name).name for name in suite_names()} >= {"breastmnist", "phantom", "quickstart"}
    names = ["breastmnist", "exact", "geodesics", "nih", "nih_resnet18", "phantom"]
    assert [suite.name for suite in board_suites()] == names


def test_rows_are_named_by_generator_and_settings_in_the_order_of_the_file(suite):
    assert [row.label for row in suite.rows][-3:] == [
        "laplace[prior_precision=marglik]",
        "laplace[structure=kron]",
        "swag",
    ]
    assert [row.control for row in suite.rows][:4] == [True, True, True, False]
    assert suite.row("laplace[structure=kron]").settings == {"structure": "kron"}


def test_cells_run_all_rows_of_a_base_seed_before_the_next(suite):
    cells = [(row.label, seed) for row, seed in suite.cells()]
    assert len(cells) == 8 * 5
    assert [seed for _, seed in cells] == sorted(seed for _, seed in cells)
    assert [label for label, seed in cells if seed == 3] == [row.label for row in suite.rows]


def test_a_row_may_draw_its_own_number_of_members(suite_path):
    suite_path.write_text(suite_path.read_text() + "  - retrain: {resample: bootstrap}\n    members: 8\n")
    suite = load_suite(suite_path)
    assert suite.row("retrain[resample=bootstrap]").members == 8
    assert suite.row("retrain").members == 20


def test_settings_for_scoring_are_those_of_the_file(suite_path):
    suite_path.write_text(suite_path.read_text() + "epsilon: 1e-2\nk: 3\nloss: brier\nepsilons: [0, 0.5]\n")
    settings = load_suite(suite_path).settings
    assert (settings.epsilon, settings.k, settings.loss, settings.epsilons) == (0.01, 3, "brier", (0.0, 0.5))


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("members: 20", "member: 20", ["unknown key 'member'", "'members'"]),
        ("title: Toy board", "", ["key 'title' is missing"]),
        ("members: 20", "members: twenty", ["members", "whole number", "'twenty'"]),
        ("members: 20", "members: 0", ["members", "at least 1", "0"]),
        ("members: 20", "members: true", ["members", "whole number"]),
        ("members: 20", "members: 4", ["rows[0]", "4 members", "k = 5"]),
        ("members: 20", "epsilon: -0.1", ["epsilon", "at least 0", "-0.1"]),
        ("members: 20", "epsilon: .nan", ["epsilon", "at least 0"]),
        ("members: 20", "epsilons: []", ["epsilons", "at least one entry"]),
        ("members: 20", "loss: nlll", ["loss", "'nlll'", "'nll'"]),
        ("members: 20", "min_patients: 4", ["min_patients", "at least 5", "4"]),
        ("members: 20", "min_patients: 20.0", ["min_patients", "whole number", "20.0"]),
        ("members: 20", "device: gpu", ["device", "'gpu'", "cpu"]),
        ("predictions: true", "predictions: 1", ["predictions", "true or false"]),
        ("[0, 1, 2, 3, 4]", "[0, 1, 2, 2, 4]", ["base_seeds", "twice"]),
        ("[0, 1, 2, 3, 4]", "[0, 1, -2, 3, 4]", ["base_seeds[2]", "-2"]),
        ("[0, 1, 2, 3, 4]", "[0, 1, 2]", ["base_seeds", "board needs at least 5"]),
        ("  - temperature\n", "", ["every control", "temperature"]),
        ("{name: toy, size: 28}", "{size: 28}", ["dataset", "needs a name"]),
        ("{name: toy, size: 28}", "toy", ["dataset", "mapping"]),
        ("{name: toy, size: 28}", "{name: toy, size: {a: 1}}", ["dataset.size"]),
        ("  - retrain\n", "  - swag\n", ["rows[7]", "repeats 'swag'"]),
        ("  - retrain\n", "  - [retrain]\n", ["rows[3]", "no row"]),
        ("  - retrain\n", "  - retrain: {}\n    swag: {}\n", ["rows[3]", "no row"]),
        ("  - retrain\n", "  - retrain: bootstrap\n", ["rows[3].retrain", "mapping of settings"]),
        ("  - retrain\n", "  - retrain\n    resample: bootstrap\n", ["not YAML"]),
        ("k: 5", "k: 5", ["'k' of line", "stands above already"]),
        ("title:", "\ttitle:", ["not YAML"]),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(suite_path, old, new, parts):
    text = suite_path.read_text()
    text = text + "k: 5\nk: 6\n" if old == "k: 5" else text.replace(old, new)
    suite_path.write_text(text)
    with pytest.raises(UserError) as error:
        load_suite(suite_path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(suite_path))
    assert all(part in message for part in parts), message


def test_a_declared_number_of_patients_is_part_of_what_the_science_depends_on_where_it_is_not_25(
    suite_path, make_records
):
    digests = []
    for declared in ("", "min_patients: 25\n", "min_patients: 20\n", "min_patients: 30\n"):
        suite_path.write_text(suite_path.read_text().split("min_patients")[0] + declared)
        suite = load_suite(suite_path)
        assert suite.min_patients == int(declared.split()[-1] if declared else 25)
        digests.append(inputs(settle(suite, make_records(suite))))
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_an_unknown_suite_suggests_close_names_and_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"unknown suite 'brestmnist': did you mean 'breastmnist'"):
        load_suite("brestmnist")
    with pytest.raises(UserError, match=r"absent\.yaml: the suite file cannot be read"):
        load_suite(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="a suite is a mapping"):
        load_suite(str(tmp_path / "list.yaml"))


def test_records_that_no_suite_planned_make_a_suite_of_their_own(make_record):
    labels = ["swag", "laplace[prior_precision=marglik]", "laplace[structure=kron]"]
    records = [make_record(label, seed) for label in labels for seed in (3, 1)]
    suite = suite_of(records, "own", "Own runs")
    assert [row.label for row in suite.rows] == labels
    assert suite.base_seeds == (1, 3) and suite.members == 20
    table = settle(suite, records)
    assert {(c.row.label, c.base_seed) for c in table.cells.values() if c.state == "ok"} == {
        (label, seed) for label in labels for seed in (1, 3)
    }


def test_build_puts_unplanned_records_of_different_protocols_into_different_tables(make_record, tmp_path, capsys):
    def stricter(record):
        record["protocol"]["epsilon"] = 0.01

    for record in (make_record("swag", 0), make_record("laplace", 0, stricter)):
        write(record, tmp_path / "records")
    assert main(["build", "--records", str(tmp_path / "records")]) == 0
    text = capsys.readouterr().out
    assert text.count("## toy, smallcnn") == 2 and "stale" not in text.split("## toy, smallcnn", 1)[1]
