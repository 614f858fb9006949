"""Do equally accurate networks decide alike? Model sets, multiplicity metrics and an honest leaderboard."""

__version__ = "0.1.0"
