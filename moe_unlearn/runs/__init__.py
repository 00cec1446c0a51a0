"""Unlearning runs: one run on a user's data, and the reports on one or several runs."""
