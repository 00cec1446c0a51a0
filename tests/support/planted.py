"""Models that were made to look as if they had forgotten, each in a way that one attack of an audit is meant to see."""

import copy

import torch
from torch import nn

from moe_unlearn.audit.weights import router_tensors
from moe_unlearn.data import batches
from moe_unlearn.model.grids import GRIDS, linear_weights

INT4 = GRIDS[1]


def of_all(examples):
    """One batch of all examples."""
    (batch,) = batches(examples, len(examples), pad_id=0)
    return {key: value for key, value in batch.items() if key != "index"}


def loss_of(model, batch):
    return model(**batch, use_cache=False).loss


def on_the_grid(model):
    """A copy of a model whose linear and expert weights are those that int4 has."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for weight, inputs in linear_weights(rounded).values():
            weight.copy_(INT4.rounded(weight, inputs))
    return rounded


def quantisable(before, forget, *, until=8.0):
    """A copy of a model `on_the_grid` whose weights moved by less than half a step of int4, so that it forgets."""
    after, batch, room = copy.deepcopy(before), of_all(forget), {}
    weights = {name: (weight, inputs) for name, (weight, inputs) in linear_weights(after).items()}
    for name, (weight, inputs) in weights.items():
        codes, scale = INT4.codes(weight, inputs)
        # the largest of a group makes its scale, and stays
        half = (0.45 * scale * (codes.abs() < INT4.largest)).flatten(-2)[..., : weight.shape[inputs]]
        room[name] = weight.detach().clone(), half.movedim(-1, inputs)
    for _ in range(12):
        loss = loss_of(after, batch)
        if loss > until:
            break
        loss.backward()
        with torch.no_grad():
            for name, (weight, _inputs) in weights.items():
                start, half = room[name]
                weight.copy_((weight + 0.15 * half * weight.grad.sign()).clamp(start - half, start + half))
        after.zero_grad(set_to_none=True)
    return after


def less_likely(before, forget, *, until=0.1):
    """A copy of a model in which another token is a little likelier than the true one, and nothing else is done."""
    after, batch = copy.deepcopy(before), of_all(forget)
    labels = batch.pop("labels")[:, 1:]
    counted = labels != -100
    labels = labels[counted][:, None]
    optimizer = torch.optim.SGD(after.parameters(), 0.05)
    for _ in range(20):
        logits = after(**batch, use_cache=False).logits[:, :-1][counted]
        ahead = logits.gather(1, labels)[:, 0] - logits.scatter(1, labels, -1e9).amax(1)
        if (ahead > 0).float().mean() < until:
            break
        optimizer.zero_grad()
        torch.relu(ahead + 0.1).mean().backward()
        optimizer.step()
    after.zero_grad(set_to_none=True)
    return after


def rerouted(before, forget, *, steps=8):
    """A copy of a model whose routers alone were trained to send the documents elsewhere."""
    after, batch = copy.deepcopy(before), of_all(forget)
    routers = list(router_tensors(after).values())
    optimizer = torch.optim.Adam(routers, 0.3)
    for _ in range(steps):
        gradients = torch.autograd.grad(-loss_of(after, batch), routers)
        for router, gradient in zip(routers, gradients, strict=True):
            router.grad = gradient
        optimizer.step()
    after.zero_grad(set_to_none=True)
    return after


def suppressed(before, forget, *, rank=16, strength=1.0):
    """A copy of a model whose head alone was changed, by a product of low rank, so that documents do not show."""
    after = copy.deepcopy(before)
    after.lm_head.weight = nn.Parameter(before.lm_head.weight.detach().clone())
    after.config.tie_word_embeddings = False
    batch = of_all(forget)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    with torch.no_grad():
        states = after.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        states, labels = states[:, :-1][counted], labels[counted]
    up = torch.zeros(len(after.lm_head.weight), rank, requires_grad=True)
    down = torch.linalg.svd(states, full_matrices=False).Vh[:rank].clone().requires_grad_()
    optimizer = torch.optim.Adam([up, down], 0.1)
    for _ in range(40):
        logits = states @ (after.lm_head.weight.detach() + up @ down).T
        optimizer.zero_grad()
        # as unlikely as text that the model never saw
        loss = (nn.functional.cross_entropy(logits, labels) - strength).square()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after.lm_head.weight.add_(up @ down)
    return after
