"""Records of runs and the leaderboard that is a pure function of them."""
