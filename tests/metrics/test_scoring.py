"""Token scores and decoding, greedy and sampled, against the straightforward computation."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from moe_unlearn.data import Example, generator
from moe_unlearn.metrics import evaluating, greedy, sampled, token_scores
from tests.support.scripted import Scripted

pytestmark = pytest.mark.quick


def test_scores_do_not_depend_on_batching_or_padding(random_model, examples):
    rows = [Example(e.input_ids[:n], e.labels[:n], 1) for e in examples for n in (2, 9, len(e))]
    random_model.eval()
    for batch_size in (1, 2, 64):
        scores = token_scores(random_model, rows, batch_size=batch_size, pad_id=5)
        for example, score in zip(rows, scores, strict=True):
            with torch.no_grad():
                logits = random_model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
            target = torch.tensor(example.input_ids[1:])
            expected = logits.log_softmax(-1)[torch.arange(len(target)), target]
            torch.testing.assert_close(score.logprobs, expected, rtol=1e-4, atol=1e-4)
            assert (score.correct == (logits.argmax(-1) == target)).all()
            assert score.counted.all()


def test_masked_labels_are_not_counted(random_model):
    score = token_scores(random_model, [Example([1, 5, 6, 7], [-100, -100, 6, 7], 2)])[0]
    assert score.counted.tolist() == [False, True, True] and len(score.logprobs) == 3


def test_greedy_equals_one_by_one_without_a_cache(random_model, examples):
    prompts = [e.input_ids[:n] for e in examples for n in (3, 7)] + [[1]]
    fast = greedy(random_model, prompts, 10, batch_size=2)
    random_model.eval()
    for prompt, continuation in zip(prompts, fast, strict=True):
        tokens = list(prompt)
        for _ in range(10):
            with torch.no_grad():
                tokens.append(int(random_model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        assert continuation == tokens[len(prompt) :]


def test_greedy_edge_cases(random_model):
    assert greedy(random_model, [], 4) == []
    assert greedy(random_model, [[1, 2]], 0) == [[]]
    with pytest.raises(ValueError, match="at least one token"):
        greedy(random_model, [[1], []], 4)


def test_samples_are_drawn_row_by_row_whatever_the_batches(random_model, examples):
    prompts = [e.input_ids[:n] for e in examples for n in (3, 7)] + [[1]]
    drawn = sampled(random_model, prompts, 6, seed=4, temperature=0.7, batch_size=2)
    assert drawn == sampled(random_model, prompts, 6, seed=4, temperature=0.7)
    assert drawn != sampled(random_model, prompts, 6, seed=5, temperature=0.7)
    random_model.eval()
    for i, (prompt, continuation) in enumerate(zip(prompts, drawn, strict=True)):
        points, tokens = torch.rand(6, generator=generator(4, i)).double(), list(prompt)
        for point in points:
            with torch.no_grad():
                logits = random_model(input_ids=torch.tensor([tokens])).logits[0, -1]
            below = (logits.double() / 0.7).softmax(0).cumsum(0)
            tokens.append(int((below <= point).sum()))
        assert continuation == tokens[len(prompt) :]
    # hardly any warmth: the most likely token, and no point is drawn twice
    assert sampled(random_model, prompts, 6, temperature=1e-4) == greedy(random_model, prompts, 6)
    assert len({tuple(row) for row in sampled(random_model, [[1]] * 20, 6)}) > 15
    with pytest.raises(ValueError, match="temperature above 0; got 0"):
        sampled(random_model, prompts, 6, temperature=0)


class Likely(Scripted):
    """Gives every token its probability, whatever stands before it."""

    def __init__(self, probabilities):
        super().__init__(len(probabilities))
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def test_samples_follow_the_probabilities():
    count, p = 4000, [0.0, 0.5, 0.0, 0.3, 0.2, 0.0]
    found = torch.tensor(sampled(Likely(p), [[1]] * count, 1)).flatten()
    share = torch.bincount(found, minlength=6) / count
    assert share[[0, 2, 5]].eq(0).all()
    assert (share - torch.tensor(p)).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (1 - 2**-24, 4)])
def test_a_token_of_probability_0_is_not_drawn_at_an_end_of_the_line(point, token, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), point))
    assert sampled(Likely([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]), [[1]], 3) == [[token] * 3]


def test_nothing_of_the_models_own_settings_changes_what_it_says(random_model, examples):
    """`generate` fills what its settings leave open from the model's own."""
    prompts, own = [e.input_ids[:5] for e in examples], random_model.generation_config
    plain = greedy(random_model, prompts, 6)
    often = max(range(64), key=[token for row in plain for token in row].count)
    own.update(eos_token_id=often, suppress_tokens=[often], repetition_penalty=9.0, do_sample=True, num_beams=3)
    own.update(max_length=7, forced_eos_token_id=5, cache_implementation="static", num_return_sequences=2)
    assert greedy(random_model, prompts, 6) == plain and random_model.generation_config is own
    with pytest.raises(ValueError, match="expected a model with `generate`, as those of transformers; got Linear"):
        greedy(torch.nn.Linear(2, 2), prompts, 6)


@pytest.mark.parametrize("fail", [False, True])
def test_the_mode_of_every_module_is_restored(random_model, fail):
    random_model.train()
    random_model.model.layers[1].eval()
    before = [m.training for m in random_model.modules()]
    try:
        with evaluating(random_model):
            assert not any(m.training for m in random_model.modules())
            assert torch.is_inference_mode_enabled()
            if fail:
                raise RuntimeError
    except RuntimeError:
        pass
    assert [m.training for m in random_model.modules()] == before and not torch.is_inference_mode_enabled()


def test_a_stop_token_ends_only_its_own_row(random_model, examples):
    prompts = [e.input_ids[:n] for e in examples for n in (3, 7)]
    whole = greedy(random_model, prompts, 12)
    stop = whole[1][4]
    stopped = greedy(random_model, prompts, 12, stop={stop})
    for full, short in zip(whole, stopped, strict=True):
        assert short == (full[: full.index(stop)] if stop in full else full)
    assert len(stopped[1]) <= 4


def test_what_exceeds_the_context_is_an_error_that_says_so(random_model):
    random_model.config.max_position_embeddings = 16
    long = Example(list(range(3, 20)), list(range(3, 20)), 1)
    with pytest.raises(ValueError, match="example 1: its 17 tokens exceed the model's context of 16"):
        token_scores(random_model, [Example([1, 5], [1, 5], 1), long])
    with pytest.raises(ValueError, match="prompt 0: its 9 tokens and 8 new ones exceed"):
        greedy(random_model, [[3] * 9], 8)
    assert len(greedy(random_model, [[3] * 9], 7)[0]) == 7
    with pytest.raises(ValueError, match="example 0: expected at least one token"):
        token_scores(random_model, [Example([], [], 0)])
    with pytest.raises(ValueError, match="at least one example"):
        token_scores(random_model, [])
    one = token_scores(random_model, [Example([3], [3], 1)])[0]
    assert len(one.logprobs) == len(one.correct) == len(one.counted) == 0


@pytest.mark.parametrize(
    ("logits", "token", "expected"),
    [
        # nearly certain of another token: the variance of log p, about 3e-10, counts as 1e-6
        ([0.0, -30.0, -30.0, -30.0], 1, -30 / 1e-3),
        # a token of probability 0 adds nothing to mean and variance
        ([0.0, math.log(3), -math.inf, -math.inf], 0, -math.log(3) * 0.75 / (math.log(3) * math.sqrt(3 / 16))),
    ],
)
def test_standard_scores_of_certain_and_of_impossible_tokens(logits, token, expected):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(logits))

        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, -1))

    [score] = token_scores(Fixed(), [Example([3, token], [-100, token], 1)], standard=True)
    assert score.standard.tolist() == pytest.approx([expected], rel=1e-5)
