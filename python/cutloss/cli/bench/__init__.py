"""Measuring: cases, methods, times, memory, errors; command.py runs them."""
