"""Runs: one unlearning run, and what is written about one or several."""
