"""Experiments: which runs a question needs, and running them on what devices there are."""
