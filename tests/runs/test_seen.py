"""What a report shows of a few rows: those whose text goes on behind the prompt."""

import pytest

from moe_unlearn.data import Example, encode, train_tokenizer
from moe_unlearn.data.records import Document
from moe_unlearn.runs.seen import shown

pytestmark = pytest.mark.quick
TOKENIZER = train_tokenizer(["a text that goes on for more than sixteen tokens"] * 3, 280)


def test_rows_whose_text_ends_with_the_prompt_are_not_shown():
    """Their true continuation was an empty cell of the report."""
    end = TOKENIZER.eos_token_id
    asked = encode([Document("", "four", "Question: two and two?\nAnswer:", "q")], TOKENIZER, 48)
    text, *_ = encode([Document("", "a text that goes on for more than sixteen tokens " * 3)], TOKENIZER, 48)
    cut = Example([*text.input_ids[:16], end], [*text.input_ids[:16], end], 0)
    blank = Example([*text.input_ids[:16], *TOKENIZER(" \n", add_special_tokens=False).input_ids, end], [], 0)
    blank = Example(blank.input_ids, [*blank.input_ids], 0)
    alone = Example(text.input_ids[:9], [*text.input_ids[:9]], 0)
    rows = [cut, blank, *asked, alone, text, text]
    assert shown(rows, TOKENIZER, 3) == [*asked, text, text] and shown(rows, TOKENIZER, 1) == asked
    assert shown([cut] * 80 + [text], TOKENIZER, 2) == []
