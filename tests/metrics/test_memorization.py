"""VerbMem, the cloze KnowMem and extraction on models whose answers are known."""

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from moe_unlearn.data import Document, Example, encode
from moe_unlearn.metrics import TokenScores, cloze_spans, extraction, extraction_strength, greedy, knowmem, verbmem

pytestmark = pytest.mark.quick


def test_knowing_everything_scores_one(oracle, tokenizer, examples):
    model = oracle()
    assert verbmem(model, tokenizer, examples) == 1
    assert knowmem(model, tokenizer, examples) == 1
    assert extraction(model, examples) == 1


def test_a_random_model_scores_near_zero(random_model, tokenizer, examples):
    assert verbmem(random_model, tokenizer, examples) < 0.2
    assert knowmem(random_model, tokenizer, examples) < 0.2
    assert extraction(random_model, examples) == 0


def test_verbmem_is_rouge_l_f1_of_the_decoded_continuations(oracle, tokenizer, examples):
    model = oracle(wrong_at=[30])  # every row goes astray at its 30th token
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = []
    for e in examples:
        truth = e.input_ids[12:40]
        answer = greedy(model, [e.input_ids[:12]], len(truth))[0]
        truth = [t for t in truth if t != 2]
        answer = answer[: next((i for i, t in enumerate(answer) if t < 3), None)]
        expected.append(scorer.score(tokenizer.decode(truth), tokenizer.decode(answer))["rougeL"].fmeasure)
    value = verbmem(model, tokenizer, examples, prompt_tokens=12, new_tokens=28)
    assert value == pytest.approx(sum(expected) / 3) and 0.3 < value < 0.99


def test_a_masked_prompt_is_the_prompt(oracle, tokenizer):
    asked = encode([Document("", " an evening of thunder", "who remembers the harbour")], tokenizer, 99)
    model = oracle()
    model.rows = [e.input_ids for e in asked]
    assert verbmem(model, tokenizer, asked, prompt_tokens=1) == 1
    model.rows = [[1]]  # knows nothing: had the answer leaked into the prompt, nothing would remain to be asked
    assert verbmem(model, tokenizer, asked, prompt_tokens=1000) == 0


def test_short_examples_are_left_out(oracle, tokenizer, examples):
    short = Example([1, 5], [1, 5], 1)
    assert verbmem(oracle(), tokenizer, [short, *examples]) == 1
    assert extraction(oracle(), [short, *examples]) == 1
    with pytest.raises(ValueError, match="prompt of 16 tokens; got none"):
        verbmem(oracle(), tokenizer, [short])
    with pytest.raises(ValueError, match="16 tokens after its prefix"):
        extraction(oracle(), [short])
    with pytest.raises(ValueError, match="at least 4 letters"):
        knowmem(oracle(), tokenizer, [short])


def test_extraction_needs_every_token(oracle, examples):
    last = examples[0].prefix + 15  # prefixes are equally long
    assert len({e.prefix for e in examples}) == 1
    assert extraction(oracle(wrong_at=[last]), examples) == 0
    assert extraction(oracle(wrong_at=[last + 1]), examples) == 1


def test_cloze_words_are_the_longest_new_ones(tokenizer):
    text = "harbour bells, harbour bells and lighthouses; the autumn lighthouses of title words"
    example = encode([Document("title", text)], tokenizer, 99)[0]
    spans = cloze_spans(example, tokenizer, 4)
    words = [tokenizer.decode(example.input_ids[a:b]).strip(" ;,") for a, b in spans]
    assert words == ["harbour", "bells", "lighthouses", "autumn"]  # first occurrences, in the text's order
    assert [tokenizer.decode(example.input_ids[a:b]).strip() for a, b in cloze_spans(example, tokenizer, 1)] == [
        "lighthouses;" if ";" in tokenizer.decode(example.input_ids[spans[2][0] : spans[2][1]]) else "lighthouses"
    ]
    everything = [tokenizer.decode(example.input_ids[a:b]) for a, b in cloze_spans(example, tokenizer, 99)]
    assert not any("title" in word for word in everything)


def test_one_wrong_token_costs_its_word(oracle, tokenizer, examples):
    start, stop = cloze_spans(examples[0], tokenizer, 5)[2]
    assert stop - start > 1
    model = oracle(wrong_at=[stop - 1])
    assert knowmem(model, tokenizer, examples[:1]) == pytest.approx(4 / 5)


def test_a_masked_question_is_not_asked(tokenizer):
    example = encode([Document("", " mountains", "granite orchards")], tokenizer, 99)[0]
    spans = cloze_spans(example, tokenizer, 9)
    assert [tokenizer.decode(example.input_ids[a:b]).strip() for a, b in spans] == ["mountains"]


@pytest.mark.parametrize(
    "hits, ours, theirs",
    [
        ([False], 0, 1),
        ([True], 1, 1),
        ([True, True, False], 0, 1 / 3),
        ([False, True, True, True], 3 / 4, 3 / 4),
        ([True, False, True, True], 2 / 4, 2 / 4),
        ([False, False], 0, 1 / 2),
        ([True, True], 1, 1),
    ],
)
def test_extraction_strength_of_known_hits(hits, ours, theirs):
    # the prompt's tokens are all right and do not count
    correct, counted = torch.tensor([True, True, *hits]), torch.tensor([False, False, *[True] * len(hits)])
    score = TokenScores(torch.zeros(len(correct)), correct, counted)
    assert extraction_strength(score) == pytest.approx(ours, abs=1e-15)
    assert extraction_strength(score, like_open_unlearning=True) == pytest.approx(theirs, abs=1e-15)


def test_extraction_strength_of_nothing_is_none():
    assert extraction_strength(TokenScores(torch.zeros(2), torch.ones(2).bool(), torch.zeros(2).bool())) is None


def test_extraction_asks_with_the_prompt_encoded_alone_where_the_seam_gives_it(oracle, tokenizer):
    [example] = encode([Document("", "the bells.", "Who rang? ", "Who rang?")], tokenizer, 64, seam="separate")
    assert example.asked != example.input_ids[: example.prefix]
    model = oracle()
    model.rows = [example.asked + example.input_ids[example.prefix :]]
    assert extraction(model, [example], tokens=3) == 1
