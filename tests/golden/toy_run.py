"""Run the golden toy suite and write its numbers as JSON: `make golden` writes those that tests compare with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTINUOUS = r"(nll|brier)\.(base|member_mean|ensemble)|(vpr|capacity)(@3)?|score_sd|mutual_information"
"""Scores that a small change of the weights changes little; a share of decided cases may jump."""


def toy_run() -> dict[str, dict]:
    """Return {row: {"key", "versions", "scores"}} of a fresh run of toy_run.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).parent / "run-benchmark", f"suite={HERE / 'toy_run.yaml'}"]
        subprocess.run(
            [*command, f"artifacts_dir={folder}/artifacts", f"records_dir={folder}/records"], check=True, cwd=folder
        )
        records = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder, "records").glob("*.json")]
    return {record["row"]: numbers(record) for record in sorted(records, key=lambda record: record["row"])}


def numbers(record: dict) -> dict:
    """Return what of a record must not move on its own."""
    parts = {name: record["identity"][name]["version"] for name in ("dataset", "network", "training", "generator")}
    parts["predictions"] = record["protocol"]["predictions"]
    metrics = record["protocol"]["metrics"]
    scores = {key: score for key, score in record["scores"].items() if re.fullmatch(CONTINUOUS, key)}
    return {
        "key": record["key"],
        "versions": parts | {name: metrics[name] for name in sorted({re.split(r"[.@]", key)[0] for key in scores})},
        "scores": {key: round(score["value"], 7) for key, score in sorted(scores.items())},
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(toy_run(), indent=1) + "\n", encoding="utf-8")
