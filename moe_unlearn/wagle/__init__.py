"""WAGLE: scores all weights and lets the top fraction move; `weight_mask` is in `mask`, which says what is computed.

mask        the procedure: both sides' gradients, scores, threshold, packed bits
pieces      the parts of parameters, and the groups of them whose gradients fit a budget of memory
gradients   the gradients of a group, which the backward pass adds up where it makes them
scores      histograms, masks and magnitudes of a group's scores, of whole and of sharded weights
threshold   the exact threshold of the model, found in few rounds over the groups
packed      the words of the mask while it is made; `mapped` has their memory in a file
journal     what was found of each group in files, from which an interrupted run goes on
"""

from moe_unlearn.masks import WeightMask
from moe_unlearn.wagle.gradients import Loss
from moe_unlearn.wagle.journal import Resume
from moe_unlearn.wagle.mask import Rule, mask_of, weight_mask

__all__ = ["Loss", "Resume", "Rule", "WeightMask", "mask_of", "weight_mask"]
