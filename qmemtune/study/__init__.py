"""Comparisons over seeds and settings, made of ordinary runs, with paired statistics."""
