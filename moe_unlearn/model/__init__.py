"""A causal language model with MoE layers, and what the procedures ask of it."""
