"""Measurements: run from the root, e.g. `python -m benchmarks.presets`; results/ holds what was measured."""
