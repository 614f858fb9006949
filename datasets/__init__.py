"""Images, labels and patient attributes, in the four parts of the protocol: train, tune, val, test."""
