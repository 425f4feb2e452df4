"""Benchmarks, one file an op or model."""
