"""Integrations of the engine into other frameworks."""
