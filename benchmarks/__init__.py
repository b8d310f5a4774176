"""Measurements: every figure in the documentation is printed by a module of this folder.

``python -m benchmarks`` lists them. Each runs as ``python -m benchmarks.<folder>.<name>`` from the
repository's root and has ``--help``.
"""
