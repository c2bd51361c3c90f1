"""Measurements: run from the repository's root, e.g. `python -m benchmarks.proof`; results/ holds what was measured."""
