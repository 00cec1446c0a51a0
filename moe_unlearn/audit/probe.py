"""Tell two kinds of documents apart by a linear probe that never saw the documents it judges.

    w = argmin sum_i (w . x_i - y_i)^2 + lambda |w|^2,    y = +1 or -1, balanced; x centred and scaled to mean norm 1

The probe is fitted on all folds but one and judges that one; a document lies in one fold with all of its tokens.
Ridge regression in its dual form has a closed solution of as many unknowns as there are documents, whatever the width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_unlearn.audit.verdict import ALPHA, Documents, Share, share
from moe_unlearn.data import Example, generator

FOLDS = 5
_RIDGE = 0.1  # lambda, of the mean squared norm of the features
_WORDS = 4096  # features of a text: hashed tokens and pairs of tokens


def out_of_fold(features: Tensor, positive: Tensor, *, seed: int = 0) -> Tensor:
    """Return each document's score [n] float64, larger for positives, by a probe that was fitted without it.

    `features` is [n, d], `positive` bool [n]. The folds hold positives and others alike. Raises ValueError for fewer
    documents of a kind than folds.
    """
    if min(int(positive.sum()), int((~positive).sum())) < FOLDS:
        raise ValueError(f"expected at least {FOLDS} documents of each kind to probe; got {positive.tolist()}")
    features, scores = features.double(), torch.empty(len(features), dtype=torch.float64)
    fold = torch.empty(len(features), dtype=torch.int64)
    for kind in (positive, ~positive):
        places = kind.nonzero()[:, 0]
        fold[places[torch.randperm(len(places), generator=generator(seed, 0))]] = torch.arange(len(places)) % FOLDS
    for held in range(FOLDS):
        own = fold != held
        scores[~own] = _fitted(features[own], positive[own], features[~own])
    return scores


def _fitted(features: Tensor, positive: Tensor, others: Tensor) -> Tensor:
    centre = features.mean(0)
    features, others = features - centre, others - centre
    scale = features.square().sum(1).mean().sqrt().clamp_min(1e-12)
    features, others = features / scale, others / scale
    weight = torch.where(positive, 0.5 / positive.sum(), 0.5 / (~positive).sum()) * len(positive)
    target = torch.where(positive, 1.0, -1.0).double()
    # the dual of weighted ridge regression: (X X^T + lambda W^-1) a = y
    dual = torch.linalg.solve(features @ features.T + _RIDGE * torch.diag(1 / weight), target)
    scores: Tensor = others @ (features.T @ dual)
    return scores


def text_features(rows: Sequence[Example]) -> Tensor:
    """Return [n, d] of texts alone: the square roots of counts of hashed tokens and pairs, to length 1, and a length.

    The number of tokens is one more feature, so that documents of another length are told apart too.
    """
    features = torch.zeros(len(rows), _WORDS + 1, dtype=torch.float64)
    for number, row in enumerate(rows):
        ids = torch.tensor(row.input_ids, dtype=torch.int64)
        pairs = (ids[:-1] * 1000003 + ids[1:]) * 2654435761 % 2**31
        places = torch.cat([ids * 2654435761 % 2**31, pairs]) % _WORDS
        counts = torch.bincount(places, minlength=_WORDS).double().sqrt()
        features[number, :_WORDS] = counts / counts.norm().clamp_min(1e-12)
        features[number, _WORDS] = len(ids)
    features[:, _WORDS] /= features[:, _WORDS].mean().clamp_min(1e-12) * 2
    return features


def told_apart(forget: Sequence[Example], holdout: Sequence[Example], *, seed: int = 0) -> Share:
    """Return how well texts alone tell forget from holdout documents: 2 AUC - 1, with its interval.

    Above 0 with its whole interval, holdout documents are no null: whatever differs between the two may be the texts'.
    """
    positive = torch.arange(len(forget) + len(holdout)) < len(forget)
    scores = out_of_fold(text_features([*forget, *holdout]), positive, seed=seed)
    documents = Documents(scores[positive], areas=True, others=scores[~positive])
    return share(documents, 0.5, 0.0, alpha=2 * ALPHA, seed=seed)
