"""Do equally accurate networks decide alike? Model sets, multiplicity metrics and an honest leaderboard."""

__version__ = "0.1.0"


def load_model_set(record, artifacts_dir="outputs/artifacts", device="cpu"):
    """Load the model set behind a record; see `multiplicity_bench.benchmark.load.load_model_set`."""
    from .benchmark.load import load_model_set as load  # torch is imported when it is needed, not by the import itself

    return load(record, artifacts_dir, device)
