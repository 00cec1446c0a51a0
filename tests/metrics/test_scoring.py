"""Token scores and greedy decoding against the straightforward computation."""

import pytest
import torch

from moe_unlearn.data import Example
from moe_unlearn.metrics import evaluating, greedy, token_scores

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
