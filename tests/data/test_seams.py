"""Prompt and answer are encoded as one; a token on both sides of the seam is the answer's."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe_unlearn.data import DataReport, Document, ExampleStream, encode, refusals, train_tokenizer
from moe_unlearn.data.pairs import REFUSALS
from moe_unlearn.data.seams import split

pytestmark = pytest.mark.quick
TEXT = "The harbour is quiet. Answer: x y"


def sentencepiece(normalizer=None):
    """As SentencePiece's: each word begins with its space, and a text with one that it does not have."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator([TEXT, *REFUSALS] * 3, trainer)
    if normalizer is not None:
        made.normalizer = normalizer
        made.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TRIMMED = train_tokenizer([TEXT] * 3, 300)
TRIMMED.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)


class Offsetless:
    """A tokenizer that knows no offsets, as those written in Python."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    is_fast = False

    def __call__(self, *texts, return_offsets_mapping=False, **keywords):
        assert not return_offsets_mapping
        return self.tokenizer(*texts, **keywords)


TOKENIZERS = {
    "metaspace": sentencepiece(),
    "prepend": sentencepiece(PREPEND),
    "bytes": train_tokenizer([TEXT] * 3, 300),
    "bytes, trimmed offsets": TRIMMED,
    "without offsets": Offsetless(train_tokenizer([TEXT] * 3, 300)),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("cut", range(len(TEXT) + 1))
def test_the_tokens_are_those_of_the_whole_wherever_it_is_cut(tokenizer, cut):
    found = split(tokenizer, [TEXT[:cut], TEXT[cut:]])
    prompt, answer = found.parts
    assert prompt + answer == whole(tokenizer, TEXT)
    # all of the prompt's tokens end in it, and the answer's first token does not
    shown = [tokenizer.decode(whole(tokenizer, TEXT)[:n]) for n in (len(prompt), len(prompt) + 1)]
    assert len(shown[0].rstrip()) <= cut and (cut == len(TEXT) or len(shown[1]) > cut)
    begins = len(shown[0]) < cut and TEXT[len(shown[0]) : cut].strip() != ""
    assert found.straddled or not begins


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
