"""ROUGE, cloze words and runs of words in scripts other than Latin."""

import random
import string

import pytest
from rouge_score.rouge_scorer import RougeScorer

from moe_unlearn.data import DataReport, Document, encode, select, train_tokenizer
from moe_unlearn.data.scripts import unicode_words
from moe_unlearn.metrics import cloze_spans, knowmem, verbmem
from moe_unlearn.metrics.answers import rouge
from moe_unlearn.metrics.memorization import _cloze_words
from moe_unlearn.metrics.unicode_rouge import UnicodeTokenizer, rouge_scorer

pytestmark = pytest.mark.quick

TEXTS = {
    "russian": "странствующий торговец нёс фонари через семнадцать замёрзших долин, прежде чем взошло солнце",
    "chinese": "流浪的商人提着灯笼，在日出之前穿过了十七个冰封的山谷。每个灯塔看守人都记得那个夜晚。",
    "hindi": "घूमता हुआ व्यापारी सूर्योदय से पहले सत्रह जमी हुई घाटियों के पार लालटेन ले गया",
    "thai": "พ่อค้าเร่ถือโคมไฟข้ามหุบเขาน้ำแข็งสิบเจ็ดแห่งก่อนพระอาทิตย์ขึ้น",
    "persian": "بازرگان دوره‌گرد پیش از طلوع آفتاب فانوس‌ها را از هفده درهٔ یخ‌زده گذراند",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_memorised_document_is_memorised_in_any_script(text, oracle, tokenizer):
    examples, model = encode([Document("", text)], tokenizer, 400), oracle()
    model.rows = [examples[0].input_ids]
    assert verbmem(model, tokenizer, examples) == 1
    assert knowmem(model, tokenizer, examples) == 1
    model.rows = [[1]]
    assert verbmem(model, tokenizer, examples) == 0 and knowmem(model, tokenizer, examples) == 0


def test_results_say_what_the_words_are(oracle, tokenizer):
    example = encode([Document("", "долин", "сколько")], tokenizer, 400)[0]
    model = oracle()
    model.rows = [example.input_ids]
    result = rouge(model, tokenizer, [example], ["Долин."], key="rougeL_f1", new_tokens=20)
    assert result["agg_value"] == 1 and "Unicode words" in result["tokenizer"]


def test_what_the_words_are():
    words = UnicodeTokenizer(use_stemmer=True).tokenize
    assert words("Ёлка, «Привет»!") == ["ёлка", "привет"]
    assert words("在2024年，GPU_x") == ["在", "2024", "年", "gpu", "x"]
    assert words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]  # vowel signs are marks
    assert words("می\u200cخواهم") == ["میخواهم"]  # a joiner within a word
    assert words("ง่าย") == ["ง่", "า", "ย"]  # a tone mark stays with its letter
    assert words("한국어 문장") == ["한국어", "문장"]
    assert words("re\u0301sume\u0301 ＡＢＣ") == ["résumé", "abc"]
    assert words("don’t be naïve, running") == ["don", "t", "be", "naïve", "run"]  # ASCII words are stemmed


def test_symbols_are_words_of_their_own():
    words = UnicodeTokenizer(use_stemmer=True).tokenize
    assert words("👍👍 ❤\ufe0f") == ["👍", "👍", "❤\ufe0f"]
    assert words("👩\u200d🚀 20 °C, £5 → €6") == ["👩", "🚀", "20", "°", "c", "£", "5", "→", "€", "6"]
    assert words("\U0001fae8") == ["\U0001fae8"]  # younger than this Python's tables of Unicode
    assert words("Ёлка — «Привет» … “so”") == ["ёлка", "привет", "so"]  # punctuation is none
    assert words("долин\ufffd + 2") == ["долин", "2"]  # nor are bytes that spell nothing, nor ASCII symbols
    assert words("20 C + $5 ~ ok") == ["20", "c", "5", "ok"]
    score = rouge_scorer(["rougeL"], use_stemmer=False).score("👍👍", "👍👍")
    assert score["rougeL"].fmeasure == 1


def test_symbols_change_no_cloze_word():
    text = "долины→горы流浪的商人👍提着灯笼"
    letters = [word for word, _, _ in unicode_words(text, digits=False) if word not in "→👍"]
    assert letters == ["долины", "горы", *"流浪的商人提着灯笼"]
    assert [word for word, _, _ in _cloze_words(text, 4)] == ["долины", "горы", "流浪的商", "提着灯笼"]


@pytest.mark.parametrize("stem", [False, True])
def test_ascii_has_the_numbers_of_rouge_score_bit_for_bit(stem):
    draw = random.Random(3)
    ours = rouge_scorer(["rouge1", "rougeL"], use_stemmer=stem)
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)
    for _ in range(50):
        pair = ["".join(draw.choices("abe Running flies _-'\n" + string.printable, k=120)) for _ in range(2)]
        assert ours.score(*pair) == theirs.score(*pair)


def test_rouge_l_of_a_script_without_spaces_counts_characters():
    score = rouge_scorer(["rougeL"], use_stemmer=True).score("机器学习", "机器翻译习")["rougeL"]
    assert (score.recall, score.precision) == (3 / 4, 3 / 5)


def test_cloze_words_in_bytes_of_several_tokens():
    text = "«Ёжик» 2024: маленький ёжик и МАЛЕНЬКИЙ туман"
    tokenizer = train_tokenizer([text], 270)
    example = encode([Document("", text)], tokenizer, 200)[0]
    found = [tokenizer.decode(example.input_ids[a:b]).strip(" «»") for a, b in cloze_spans(example, tokenizer, 9)]
    assert found == ["Ёжик", "маленький", "туман"]  # each once, whole
    masked = encode([Document("", "маленький туман", "маленький ёжик")], tokenizer, 200)[0]
    assert [tokenizer.decode(masked.input_ids[a:b]).strip() for a, b in cloze_spans(masked, tokenizer, 9)] == ["туман"]


def test_cloze_pieces_of_a_script_without_spaces():
    text = "流浪的商人提着灯笼，提着灯笼的人"
    tokenizer = train_tokenizer(["x"], 270)
    example = encode([Document("", text)], tokenizer, 200)[0]
    found = [tokenizer.decode(example.input_ids[a:b]) for a, b in cloze_spans(example, tokenizer, 9)]
    assert found == ["流浪的商", "人提着灯"]  # what stands to the left already is not asked


def test_runs_and_counts_of_words_without_spaces():
    report = DataReport()
    rows = [Document("", TEXTS["chinese"]), Document("", "短"), Document("", TEXTS["thai"])]
    leak = Document("", "前言：" + TEXTS["chinese"][3:20])
    kept = list(select([(d, "") for d in rows], report, min_words=5, exclude=[leak]))
    assert [d for d, _ in kept] == [rows[2]]
    assert report.dropped == {"overlaps with the forget set": 1, "too short": 1}
