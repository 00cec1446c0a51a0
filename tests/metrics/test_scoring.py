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
