"""Measuring: cases, methods, times, memory, errors. cutloss/bench.py is the command."""
