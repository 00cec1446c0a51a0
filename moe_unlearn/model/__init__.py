"""Everything that the procedures ask of a causal language model with MoE layers.

`loading` reads the model from a folder; `batches` defines its inputs; `head` computes per-token losses from its hidden
states; `states` returns the outputs of its layers and `capture` its routing; `scope` says which parameters train;
`modes` switches the model to evaluation mode for a while.
"""
