"""The benchmark itself: networks, the training recipe, the stages of a run and the command line."""
