"""Tiny OLMoE models of the embedded experiment, trained when first needed on text that is already installed.

`target` is trained on forget and retain documents, `retrain` (the gold standard, which never saw the forget
documents) on the retain documents alone. Trained models are cached, so that a second run starts at once.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from moe_unlearn import data
from moe_unlearn.benchmark.trained_cache import cache_folder, ensure
from moe_unlearn.data import Corpus, Document, Example
from moe_unlearn.model.whole import no_loading_bars

# a tokenizer, and the forget, retain and holdout examples
Data = tuple[transformers.PreTrainedTokenizerFast, list[Example], list[Example], list[Example]]
RECIPE_VERSION = 1  # to be raised when a change below leads to other weights from the same settings
MODELS = ("target", "retrain")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that, besides corpus and seed, determine the documents and the models."""

    forget: int = 40
    retain: int = 260
    holdout: int = 64
    unlearn_share: float = 0.25  # share of the retain documents that unlearning sees; the others measure utility
    vocab_size: int = 1024
    max_length: int = 64
    hidden_size: int = 128
    intermediate_size: int = 64
    layers: int = 3
    heads: int = 4
    experts: int = 32
    top_k: int = 4
    epochs: int = 40
    lr: float = 3e-3
    batch_size: int = 16


SIZES = {
    "demo": Settings(),
    # trained in a few seconds, for tests that need a model which has memorised something
    "test": Settings(
        forget=16,
        retain=32,
        holdout=16,
        max_length=32,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        experts=8,
        top_k=2,
        epochs=40,
        lr=4e-3,
        batch_size=8,
    ),
}


@dataclass(frozen=True)
class Experiment:
    """Two trained models and the examples that tell them apart; `retain` joins the two retain parts."""

    corpus: str
    seed: int
    settings: Settings
    tokenizer: transformers.PreTrainedTokenizerFast = field(repr=False)
    target: nn.Module = field(repr=False)
    retrain: nn.Module = field(repr=False)
    forget: list[Example] = field(repr=False)
    retain_unlearn: list[Example] = field(repr=False)
    retain_eval: list[Example] = field(repr=False)
    holdout: list[Example] = field(repr=False)
    seconds: dict[str, float]  # seconds that training or loading each model took

    @property
    def retain(self) -> list[Example]:
        """Return all retain examples: those that unlearning sees, then the others."""
        return self.retain_unlearn + self.retain_eval

    @property
    def evaluation_sets(self) -> dict[str, list[Example]]:
        """Return the sets to pass to `metrics.evaluate`."""
        return {"forget": self.forget, "retain": self.retain_eval, "holdout": self.holdout}

    def fresh_target(self) -> nn.Module:
        """Return a copy of the target model to unlearn."""
        with torch.random.fork_rng():
            model: OlmoeForCausalLM = OlmoeForCausalLM._from_config(
                self.target.config, experts_implementation="grouped_mm"
            )
        model.load_state_dict(self.target.state_dict())
        return model


def prepare_experiment(
    corpus: str | Corpus = "builtin:pydoc",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    *,
    size: str | Settings = "demo",
) -> Experiment:
    """Prepare documents, tokenizer and both models for one seed, which draws the documents and the initial weights.

    The tokenizer is trained on all documents of the corpus, a name or the documents themselves, so that it treats
    forget, retain and holdout text alike. `size` is a name in `SIZES` or a `Settings`; `cache_dir` is the folder of
    `cache_folder`. Raises ValueError for an unknown corpus or size, FileNotFoundError when the corpus is not installed.
    """
    settings = settings_of(size)
    tokenizer, forget, retain, holdout = built = build_data(corpus, seed, settings)
    models, seconds = {}, {}
    for name in MODELS:
        start = time.perf_counter()
        models[name] = _cached_model(name, built, settings, seed, cache_folder(cache_dir))
        seconds[name] = time.perf_counter() - start
    cut = max(1, round(settings.unlearn_share * len(retain)))
    return Experiment(
        corpus if isinstance(corpus, str) else corpus.name,
        seed,
        settings,
        tokenizer,
        models["target"],
        models["retrain"],
        forget,
        retain[:cut],
        retain[cut:],
        holdout,
        seconds,
    )


def train_model(
    name: str,
    corpus: str,
    seed: int,
    cache_dir: str | Path | None = None,
    *,
    size: str | Settings = "demo",
    on_step: Callable[[], None] | None = None,
) -> None:
    """Train one of the two models of `prepare_experiment` unless it is in the cache; `on_step` is as in `train`."""
    settings = settings_of(size)
    _cached_model(name, build_data(corpus, seed, settings), settings, seed, cache_folder(cache_dir), on_step)


def settings_of(size: str | Settings) -> Settings:
    """Return the `Settings` named `size` in `SIZES`, or `size` itself if it is a `Settings`."""
    if isinstance(size, Settings):
        return size
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; expected one of {', '.join(SIZES)} or a Settings")
    return SIZES[size]


def build_data(corpus: str | Corpus, seed: int, settings: Settings) -> Data:
    """Build the tokenizer and the forget, retain and holdout examples; no two sets share a run of 12 tokens."""
    whole = data.load_builtin(corpus) if isinstance(corpus, str) else corpus
    documents = [*whole.forget, *whole.retain, *whole.holdout]
    tokenizer = data.train_tokenizer((f"{d.title}\n{d.text}" for d in documents), settings.vocab_size)

    def encode(chosen: Sequence[Document]) -> list[Example]:
        return data.encode(chosen, tokenizer, settings.max_length, overflow="truncate")

    clean = data.drop_shared_runs(whole, lambda document: encode([document])[0].input_ids)
    draw = torch.Generator().manual_seed(seed)
    sets = []
    for side in ("forget", "retain", "holdout"):
        available, wanted = getattr(clean, side), getattr(settings, side)
        order = torch.randperm(len(available), generator=draw).tolist()
        sets.append(encode([available[i] for i in order[:wanted]]))
    forget, retain, holdout = sets
    return tokenizer, forget, retain, holdout


def tiny_olmoe(vocab_size: int, seed: int = 0, settings: Settings = SIZES["demo"]) -> OlmoeForCausalLM:
    """Make a randomly initialised float32 OLMoE with tied embeddings; the global random state stays untouched."""
    config = OlmoeConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2 * settings.max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: OlmoeForCausalLM = OlmoeForCausalLM._from_config(config, experts_implementation="grouped_mm")
    return model


def train(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int = 0,
    pad_id: int = 0,
    name: str = "training",
    on_step: Callable[[], None] | None = None,
) -> float:
    """Train a causal LM by AdamW: no decay, 20 warm-up steps, cosine to 0; return the last epoch's mean loss.

    The model ends in evaluation mode. `on_step` is called after each step; without it a terminal shows a progress bar.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    total = epochs * math.ceil(len(examples) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 20) * 0.5 * (1 + math.cos(math.pi * i / total))
    )
    device = next(model.parameters()).device
    last: list[float] = []
    model.train()
    silent = None if on_step is None else True
    with tqdm(total=total, desc=name, unit="step", disable=silent, leave=False) as progress:
        for epoch in range(epochs):
            last = []
            for batch in data.batches(examples, batch_size, pad_id=pad_id, seed=seed, epoch=epoch):
                batch = {k: v.to(device) for k, v in batch.items() if k != "index"}
                loss = model(**batch, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                last.append(loss.item())
                progress.update()
                if on_step is not None:
                    on_step()
            progress.set_postfix(loss=f"{sum(last) / len(last):.3f}")
    model.eval()
    return sum(last) / len(last)


def _cached_model(
    name: str, built: Data, settings: Settings, seed: int, cache: Path, on_step: Callable[[], None] | None = None
) -> nn.Module:
    tokenizer, forget, retain, _ = built
    examples = forget + retain if name == "target" else retain
    versions = [RECIPE_VERSION, torch.__version__, transformers.__version__, tokenizers.__version__]
    rows = [e.input_ids for e in examples]
    identity = json.dumps([versions, asdict(settings), seed, rows, tokenizer.get_vocab()], sort_keys=True)
    entry = cache / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"

    def build(folder: Path) -> None:
        model = tiny_olmoe(len(tokenizer), seed, settings)
        train(
            model,
            examples,
            epochs=settings.epochs,
            lr=settings.lr,
            batch_size=settings.batch_size,
            seed=seed,
            pad_id=tokenizer.pad_token_id,
            name=f"training {name}",
            on_step=on_step,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    with no_loading_bars():
        ensure(entry, build)
        model = AutoModelForCausalLM.from_pretrained(
            entry,
            local_files_only=True,
            trust_remote_code=False,
            dtype="auto",
            experts_implementation="grouped_mm",
        )
    cached: nn.Module = model.eval()
    return cached
