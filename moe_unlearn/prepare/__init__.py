"""What a recipe needs of the unchanged model: routing, masks and references, each computed once and kept.

`stages` runs what a recipe needs, in order; `reference` is the model that references are of; `rows` keeps what was
computed of each row, in memory and in a folder.
"""
