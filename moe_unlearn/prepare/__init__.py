"""Preparation: the routing, masks and references that a recipe needs of the unchanged model, each computed once.

`stages` runs the stages that a recipe needs, in order. `reference` gives the model that references are computed with.
`rows` keeps the values computed for each row, in memory and in a folder.
"""
