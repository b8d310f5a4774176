"""Measurements: every figure in the documentation is printed by a module of this folder.

Each runs as ``python -m benchmarks.<name>`` from the repository's root and has ``--help``.
"""
