"""Prompt and answer are encoded as one; a token on both sides of the seam is the answer's."""

import pytest

from moe_unlearn.data import DataReport, Document, ExampleStream, encode, refusals
from moe_unlearn.data.pairs import REFUSALS
from moe_unlearn.data.seams import split
from tests.support.tokenizers import TEXT, TOKENIZERS

pytestmark = pytest.mark.quick


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokens_are_those_of_the_whole_wherever_it_is_cut(tokenizer):
    for cut in range(len(TEXT) + 1):
        found = split(tokenizer, [TEXT[:cut], TEXT[cut:]])
        prompt, answer = found.parts
        assert prompt + answer == whole(tokenizer, TEXT), cut
        # all of the prompt's tokens end in it, and the answer's first token does not
        shown = [tokenizer.decode(whole(tokenizer, TEXT)[:n]) for n in (len(prompt), len(prompt) + 1)]
        assert len(shown[0].rstrip()) <= cut and (cut == len(TEXT) or len(shown[1]) > cut)
        begins = len(shown[0]) < cut and TEXT[len(shown[0]) : cut].strip() != ""
        assert found.straddled or not begins, cut


def test_a_word_in_two_and_a_space_too_many(tokenizer):
    [cut] = encode([Document("", "bour is quiet.", "The har")], tokenizer, 99)
    [spaced] = encode([Document("", " x y", "Answer:")], tokenizer, 99)
    ended = [2] if tokenizer.bos_token_id is not None else []
    for example, text in ((cut, "The harbour is quiet."), (spaced, "Answer: x y")):
        kept = [t for t in example.input_ids if t not in tokenizer.all_special_ids]
        assert kept == whole(tokenizer, text) and example.input_ids[-1:] == ended
        assert tokenizer.decode(kept).strip() == text
    assert tokenizer.decode(spaced.input_ids[spaced.prefix :], skip_special_tokens=True).strip() == "x y"
    report = DataReport(kept=2)
    encode([Document("", "bour is quiet.", "The har"), Document("", " x y", "Answer:")], tokenizer, 99, report=report)
    straddled = not tokenizer.decode(cut.input_ids[: cut.prefix]).endswith("har")
    assert report.straddled == straddled == cut.straddled and not spaced.straddled
    assert ("on both sides of prompt and answer" in str(report)) == straddled


def test_the_separate_form_masks_as_many_tokens_as_the_prompt_has_alone():
    tokenizer = TOKENIZERS["bytes"]
    document = Document("", "x y", "Answer: ")
    [joint] = encode([document], tokenizer, 99)
    [apart] = encode([document], tokenizer, 99, seam="separate")
    alone = [1, *whole(tokenizer, "Answer: ")]
    assert apart.input_ids == joint.input_ids and apart.asked == alone and joint.asked is None
    assert tokenizer.decode(joint.input_ids[joint.prefix : -1]) == " x y" and joint.straddled
    assert apart.prefix == len(alone) and apart.labels == [-100] * len(alone) + apart.input_ids[len(alone) :]
    assert tokenizer.decode(apart.input_ids[apart.prefix : -1]) == " y"  # the token across the seam is lost
    assert list(ExampleStream([document], tokenizer, 99, seam="separate")) == [(apart, 0)]
    text = [Document("fox", "x y")]
    assert encode(text, tokenizer, 99, seam="separate") == encode(text, tokenizer, 99)
    with pytest.raises(ValueError, match="seam 'joint' or 'separate'; got 'none'"):
        encode([document], tokenizer, 99, seam="none")


def test_refusals_stand_where_the_answers_stood(tokenizer):
    examples = encode([Document("", " x y", "Answer:")] * 8, tokenizer, 99)
    for made in refusals(examples, tokenizer):
        said = tokenizer.decode(made.input_ids[made.prefix :], skip_special_tokens=True).strip()
        kept = [t for t in made.input_ids if t not in tokenizer.all_special_ids]
        assert kept == whole(tokenizer, f"Answer: {said}") and said in REFUSALS
        assert made.input_ids[-1] == tokenizer.eos_token_id
