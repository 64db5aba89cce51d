"""Benchmarks: each prints a table, and with --json its figures in the last line."""
