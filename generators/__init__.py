"""Generators: methods that turn one trained network into a set of equally good networks."""
