"""Two processes share an evaluation, and meet what ends it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import fully_shard

from moe_unlearn.checkpoint import CheckpointError
from moe_unlearn.data import Document, Example, encode
from moe_unlearn.metrics import MuseData, MuseSettings, evaluate_muse, greedy, relearning_attack, token_scores
from moe_unlearn.metrics.attacks import gradient_norms
from moe_unlearn.metrics.workers import share
from moe_unlearn.ranks import gathered, on_first, together
from tests.support.models import tiny_olmoe


def evaluations(folder: Path | None) -> dict:
    """Scores, continuations and MUSE of a model and texts that are always the same."""
    from moe_unlearn.data import train_tokenizer
    from tests.support.tokenizers import TEXTS

    tokenizer = train_tokenizer(TEXTS * 4, 320)
    torch.manual_seed(0)
    model = tiny_olmoe(len(tokenizer))
    if folder is not None:
        model = torch.nn.parallel.DistributedDataParallel(model)
    examples = encode([Document("", text) for text in TEXTS], tokenizer, 60)
    data = MuseData(
        verbmem=[{"prompt": t[:20], "gt": t[20:]} for t in TEXTS],
        forget=[{"text": t} for t in TEXTS],
        holdout=[{"text": t[::-1]} for t in TEXTS[:2]],
    )
    place = {} if folder is None else {"out": folder / "run", "cache_dir": folder / "cache"}
    settings = MuseSettings(verbmem_tokens=8)
    summaries = [evaluate_muse(model, tokenizer, data, settings=settings, batch_size=2, **place) for _ in range(2)]
    assert summaries[0] == summaries[1]
    return {
        "logprobs": [s.logprobs.tolist() for s in token_scores(model, examples)],
        "greedy": greedy(model, [e.input_ids[:n] for e, n in zip(examples, (3, 9, 5), strict=True)], 6),
        "one": greedy(model, [[1, 5]], 3),  # fewer prompts than ranks
        "summary": summaries[0],
    }


def sharded_scores() -> tuple[list, list[str]]:
    """Of a model no rank holds alone, for which every rank must do every forward pass; and what it is refused."""
    torch.manual_seed(0)
    model = tiny_olmoe()
    rows = [Example(list(range(3, n)), list(range(3, n)), 1) for n in (9, 20, 5)]
    alone = [s.logprobs for s in token_scores(model, rows[:1], batch_size=1)]
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    together = [s.logprobs for s in token_scores(model, rows, batch_size=1)]
    torch.testing.assert_close(together[0], alone[0])
    refused = []
    for attempt in (lambda: relearning_attack(model, rows), lambda: gradient_norms(model, rows)):
        try:
            attempt()
        except ValueError as error:
            refused.append(str(error))
    return [row.tolist() for row in together], refused


def found_by(rank: int, folder: Path) -> dict:
    """Return scores, continuations and MUSE of this rank, what it shared, and the errors that it met."""
    found = evaluations(folder)
    plain, mine = torch.nn.Linear(1, 1), []

    def work(items):
        mine.extend(items)
        return [item * 0.1 for item in items]

    found["shared"], found["mine"] = share(plain, [1, 2, 3], work), mine
    found["sharded"], found["refused"] = sharded_scores()
    found["errors"] = []

    def fail(items):
        if rank == 1:
            raise KeyError("broken")
        return items

    def full_disk():
        raise OSError("no space")

    def no_tensor():
        raise SafetensorError("no tensor")

    found["told"] = gathered(lambda: "one", lambda _: rank + 1)

    for attempt in (
        lambda: share(plain, [1, 2], fail),
        lambda: share(plain, [1] * (rank + 1), list),
        lambda: on_first(full_disk),
        lambda: on_first(no_tensor),
        lambda: together(list if rank else full_disk, error=CheckpointError),
    ):
        try:
            attempt()
        except Exception as error:
            found["errors"].append(f"{type(error).__name__}: {error}")
    return found
