"""A causal language model with MoE layers, and what the procedures ask of it.

`loading` reads it from a folder; `batches` says what it is given; `head` makes per-token losses of its hidden states;
`states` are those of its layers, `capture` is its routing; `scope` says which parameters train; `modes` switches it to
evaluation for a while.
"""
