"""The sections of `benchmarks.gpu_suite`: generators of rows, each run in a process of its own."""
