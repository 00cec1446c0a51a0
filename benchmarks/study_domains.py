"""Prepare an experiment in which unlearning sees retain text of another domain than the text that measures utility.

Both models learn documents of two domains: `NEAR`, the corpus' own retain documents, written in the language of the
forget documents, and `FAR`, the licences that Debian installs. Unlearning sees the far ones only, so that experts which
serve the forget documents are seldom touched by them; utility is measured on the near ones, which use these experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moe_unlearn import data
from moe_unlearn.benchmark.tiny_models import Experiment, Settings, prepare_experiment
from moe_unlearn.data import Corpus, Document
from moe_unlearn.data.builtin import paragraph_blocks

ANOTHER = "another domain"
LICENCES = Path("/usr/share/common-licenses")


def licences(folder: Path = LICENCES) -> list[Document]:
    """Return the licences of Debian's package base-files in blocks; a paragraph of several licences is kept once.

    Raises FileNotFoundError where the folder has none.
    """
    # GPL and its like are links to their latest version
    texts = {p.name: p.read_text("utf-8") for p in sorted(folder.glob("*")) if p.is_file() and not p.is_symlink()}
    if not texts:
        raise FileNotFoundError(f"{folder} has no licences; they come with Debian's package base-files")
    return paragraph_blocks(texts, texts, set())


def mixed(name: str, seed: int, settings: Settings, far: Sequence[Document]) -> tuple[Corpus, list[Document]]:
    """Return a builtin corpus whose retain documents are of two domains, and those of them that are far.

    Of the `settings.retain` documents the share that unlearning sees is drawn from `far`, the others from the corpus.
    """
    corpus, draw = data.load_builtin(name), torch.Generator().manual_seed(seed)

    def some(documents: Sequence[Document], count: int) -> list[Document]:
        return [documents[i] for i in torch.randperm(len(documents), generator=draw)[:count].tolist()]

    seen = round(settings.unlearn_share * settings.retain)
    other = some(far, seen)
    whole = replace(corpus, name=f"{name}+far", retain=some(corpus.retain, settings.retain - seen) + other)
    return data.drop_shared_runs(whole), other


def prepare(name: str, seed: int, settings: Settings) -> Experiment:
    """Prepare both models of a mixed corpus; `retain_unlearn` has all far documents and `retain_eval` all near ones."""
    corpus, far = mixed(name, seed, settings, licences())
    made = prepare_experiment(corpus, seed, size=settings)
    rows = {tuple(e.input_ids) for e in data.encode(far, made.tokenizer, settings.max_length, overflow="truncate")}
    sides: dict[bool, list] = {True: [], False: []}
    for example in made.retain:
        sides[tuple(example.input_ids) in rows].append(example)
    return replace(made, retain_unlearn=sides[True], retain_eval=sides[False])
