"""`like`: the numbers of open-unlearning and muse_bench, computed here a second time as their code does.

What follows is written from the behaviour of their code: the whole is encoded, with as many tokens masked as the prompt
has alone; generation goes on from the prompt alone and ends at the end token; the last token with a label counts for
the loss only.
"""

import copy
import json
import math
import statistics

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from tokenizers import processors

from moe_unlearn.metrics import LIKE, MuseData, MuseSettings, TofuData, TofuSettings, evaluate_muse, evaluate_tofu, like

QUESTION = "Question: {}\nAnswer: "
QA = [
    {"question": "who carried lanterns", "answer": "the wandering merchant"},
    {"question": "what silenced the bells", "answer": "thunder"},
    {"question": "what do mountains shelter", "answer": "orchards and blossoms in autumn"},
]
ICL = [{"question": "who remembers", "answer": "every lighthouse keeper"}]
VERBMEM = [
    {"prompt": "the wandering merchant carried", "gt": "lanterns across seventeen frozen valleys"},
    {"prompt": "every lighthouse keeper", "gt": "remembers an evening when thunder silenced the harbour bells"},
]
FORGET = [{"text": "the wandering merchant carried lanterns"}, {"text": "granite mountains shelter orchards"}]
HOLDOUT = [{"text": "seven frozen bells travel"}, {"text": "an evening before sunrise"}, {"text": "storms, valleys"}]
MUSE = MuseData(verbmem=VERBMEM, forget_qa=QA, forget_qa_icl=ICL, forget=FORGET, holdout=HOLDOUT)
TOFU = [
    row | {"paraphrased_answer": f"it was {row['answer']}", "perturbed_answer": ["sunrise", "a bell", "nobody"]}
    for row in QA
]
CUT, NEW = 9, 8


@pytest.fixture(params=["<s> $A", "$A"])
def tokenizer(request, tokenizer):
    """As Llama's, with a begin token alone, and as Qwen's, with none."""
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(request.param, None, [("<s>", 1)])
    return made


@pytest.fixture()
def model(random_model, tokenizer):
    """A model that knows some of the rows: where nothing is known, many numbers are 0 whatever is counted."""
    random_model.config.max_position_embeddings = 256
    texts = [f"{row['prompt']} {row['gt']}" for row in VERBMEM]
    texts += [QUESTION.format(row["question"]) + row["answer"] for row in QA]
    rows = [torch.tensor([tokenizer(text)["input_ids"] + [2]]) for text in texts]
    optimizer = torch.optim.AdamW(random_model.parameters(), 1e-2)
    for _ in range(12):
        sum(random_model(input_ids=row, labels=row).loss for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    return random_model.eval()


class Their:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def logprobs(self, ids):
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def asked(self, prompt, answer):
        """Tokens, how many of them are the prompt's, and the prompt's alone."""
        alone, whole = self.tokenizer(prompt)["input_ids"], self.tokenizer(prompt + answer)["input_ids"]
        return whole + ([2] if whole[-1] != 2 else []), len(alone), alone

    def loss(self, prompt, answer):
        ids, cut, _ = self.asked(prompt, answer)
        scores = self.logprobs(ids)
        return -sum(scores[i - 1, ids[i]].item() for i in range(cut, len(ids))) / (len(ids) - cut)

    def counted(self, ids, cut):
        """Log-probability of each token with a label but the last, and whether it was the likeliest."""
        scores = self.logprobs(ids)
        places = range(max(cut, 1), len(ids) - 1)
        return [(scores[i - 1, ids[i]].item(), int(scores[i - 1].argmax()) == ids[i]) for i in places]

    def generate(self, prompt, new_tokens):
        ids, made = self.tokenizer(prompt)["input_ids"], []
        while len(made) < new_tokens:
            with torch.no_grad():
                following = int(self.model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
            if following == 2:
                break
            made.append(following)
        return self.decode(made).strip()

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)


def lowest(values):
    return statistics.mean(sorted(values)[: max(1, int(0.4 * len(values)))])


def score(truth, answer, stem):
    return RougeScorer(["rougeL"], use_stemmer=stem).score(truth, answer)["rougeL"]


def known(their, prompt, answer, new_tokens):
    generated = their.generate(prompt, new_tokens)
    for mark in ("\n\n", "\nQuestion", "Question:"):
        generated = generated.split(mark)[0]
    return answer, generated.strip()


def extracted(hits):
    n = len(hits)
    start = next((k for k in range(n) if all(hits[k:])), n - 1)
    return 1 - start / n


def test_open_unlearning_s_muse(model, tokenizer):
    their = Their(model, tokenizer)
    settings = like("open-unlearning", MuseSettings, verbmem_tokens=CUT, knowmem_tokens=NEW)
    found = evaluate_muse(model, tokenizer, MUSE, settings=settings, batch_size=2)
    rouges, memorised = [], []
    for row in VERBMEM:
        alone = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(f"{row['prompt']} {row['gt']}")["input_ids"][: len(alone) + CUT]
        truth = their.decode(whole[len(alone) :]).strip()
        rouges.append(score(truth, their.generate(row["prompt"], CUT), True).fmeasure)
        memorised.append([hit for _, hit in their.counted(whole, len(alone))])
    assert found["forget_verbmem_ROUGE"] == pytest.approx(statistics.mean(rouges), abs=1e-6)
    shares = [statistics.mean(hits) for hits in memorised]
    assert found["exact_memorization"] == pytest.approx(statistics.mean(shares), abs=1e-6)
    assert found["extraction_strength"] == pytest.approx(statistics.mean(map(extracted, memorised)), abs=1e-6)
    shown = f"{QUESTION.format(ICL[0]['question'])}{ICL[0]['answer']}\n\n"
    pairs = [known(their, shown + QUESTION.format(row["question"]), row["answer"], NEW) for row in QA]
    rouges = [score(*pair, True).fmeasure for pair in pairs]
    assert found["forget_knowmem_ROUGE"] == pytest.approx(statistics.mean(rouges), abs=1e-6)
    scores = []
    for row in FORGET + HOLDOUT:
        ids = tokenizer(row["text"])["input_ids"]
        scores.append(lowest([value for value, _ in their.counted(ids, len(tokenizer("")["input_ids"]))]))
    expected = roc_auc_score([1] * len(FORGET) + [0] * len(HOLDOUT), scores)
    assert found["mia_min_k"] == pytest.approx(expected, abs=1e-6)


def test_open_unlearning_s_tofu(model, tokenizer, tmp_path):
    their = Their(model, tokenizer)
    settings = like("open-unlearning", TofuSettings, new_tokens=NEW)
    data = TofuData(forget=TOFU, holdout=[{"question": "who is frozen", "answer": "the harbour"}])
    found = evaluate_tofu(model, tokenizer, data, settings=settings, batch_size=2, out=tmp_path)
    losses, rouges, memorised, ratios = [], [], [], []
    for row in TOFU:
        prompt = QUESTION.format(row["question"])
        losses.append(their.loss(prompt, row["answer"]))
        ids, cut, alone = their.asked(prompt, row["answer"])
        truth = their.decode(ids).replace(their.decode(alone), "").strip()
        rouges.append(score(truth, their.generate(prompt, NEW), True).recall)
        memorised.append(their.counted(ids, cut))
        wrong = statistics.mean(their.loss(prompt, answer) for answer in row["perturbed_answer"])
        ratio = math.exp(-wrong) / (math.exp(-their.loss(prompt, row["paraphrased_answer"])) + 1e-10)
        ratios.append(min(ratio, 1 / (ratio + 1e-10)))
    assert found["forget_Q_A_Prob"] == pytest.approx(statistics.mean(math.exp(-v) for v in losses), rel=1e-5, abs=1e-6)
    assert found["forget_truth_ratio"] == pytest.approx(statistics.mean(ratios), rel=1e-5, abs=1e-6)
    assert found["forget_Q_A_ROUGE"] == pytest.approx(statistics.mean(rouges), abs=1e-6)
    kept = [own for own in memorised if own]  # theirs has no value where no token carries a label
    shares = [statistics.mean(hit for _, hit in own) for own in kept]
    assert found["exact_memorization"] == pytest.approx(statistics.mean(shares), abs=1e-6)
    other = their.counted(*their.asked(QUESTION.format("who is frozen"), "the harbour")[:2])
    scores = [lowest([value for value, _ in own]) for own in [*memorised, other]]
    assert found["mia_min_k"] == pytest.approx(roc_auc_score([1] * len(TOFU) + [0], scores), abs=1e-6)
    written = json.loads((tmp_path / "TOFU_SETTINGS.json").read_text(encoding="utf-8"))["settings"]
    assert written["like"] == vars(LIKE["open-unlearning"])


def test_open_unlearning_s_tofu_through_a_chat_template(model, tokenizer):
    """All behind the generation prompt is the answer, the template's own text with it, and an end token ends it."""
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% if m['role'] == 'assistant' %}\n{% endif %}{% endfor %}"
    )
    settings = like("open-unlearning", TofuSettings, new_tokens=NEW, chat=True)
    found = evaluate_tofu(model, tokenizer, TofuData(forget=TOFU), settings=settings)
    their, losses = Their(model, tokenizer), []
    for row in TOFU:
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False) + [2]
        cut = len(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False))
        table = their.logprobs(ids)
        losses.append(-statistics.mean(table[i - 1, ids[i]].item() for i in range(cut, len(ids))))
    assert found["forget_Q_A_Prob"] == pytest.approx(statistics.mean(math.exp(-v) for v in losses), rel=1e-5, abs=1e-6)


def test_muse_bench(model, tokenizer):
    their = Their(model, tokenizer)
    settings = like("muse_bench", MuseSettings, verbmem_tokens=CUT, knowmem_tokens=NEW)
    found = evaluate_muse(model, tokenizer, MUSE, settings=settings, batch_size=2)
    rouges = []
    for row in VERBMEM:
        truth = their.decode(tokenizer(row["gt"])["input_ids"][:CUT])
        rouges.append(score(truth, their.generate(row["prompt"], CUT), False).fmeasure)
    assert found["forget_verbmem_ROUGE"] == pytest.approx(statistics.mean(rouges), abs=1e-6)
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in ICL)
    pairs = [known(their, f"{shown}Question: {row['question']}\nAnswer: ", row["answer"], NEW) for row in QA]
    rouges = [score(*pair, False).fmeasure for pair in pairs]
    assert found["forget_knowmem_ROUGE"] == pytest.approx(statistics.mean(rouges), abs=1e-6)
    scores = []
    for row in FORGET + HOLDOUT:
        ids = tokenizer.encode(row["text"])
        table = their.logprobs(ids)
        values = sorted(table[i, token].item() for i, token in enumerate(ids[1:]))
        scores.append(statistics.mean(values[: int(0.4 * len(values))]))
    expected = roc_auc_score([0] * len(FORGET) + [1] * len(HOLDOUT), scores)
    assert 1 - found["mia_min_k"] == pytest.approx(expected, abs=1e-6)


def test_a_wrong_last_token_counts_as_extracted_in_open_unlearning_alone(random_model, tokenizer):
    """The same rows, of which the model knows nothing: their loop stops at the last token, whatever it is."""
    with torch.no_grad():
        random_model.lm_head.weight.zero_()  # all tokens are as likely, and the first, <pad>, is the argmax
    found = {}
    for name in (None, "open-unlearning", "muse_bench"):
        for kind, evaluate, data in (
            (MuseSettings, evaluate_muse, MuseData(verbmem=VERBMEM)),
            (TofuSettings, evaluate_tofu, TofuData(forget=TOFU[2:])),
        ):
            settings = like(name, kind) if name else kind()
            found[name, kind] = evaluate(random_model, tokenizer, data, settings=settings)
    for kind in (MuseSettings, TofuSettings):
        theirs = found["open-unlearning", kind]
        assert found[None, kind]["extraction_strength"] == found["muse_bench", kind]["extraction_strength"] == 0
        assert theirs["extraction_strength"] > 0 and "extraction_strength_open_unlearning" not in theirs
    lengths = [len(tokenizer(f" {row['gt']}", add_special_tokens=False)["input_ids"]) for row in VERBMEM]
    # the last token, here the answer's own where the tokenizer adds no end, never counts
    expected = statistics.mean(1 / (n - 1) for n in lengths)
    assert found["open-unlearning", MuseSettings]["extraction_strength"] == pytest.approx(expected, abs=1e-12)


def test_the_ways_differ(model, tokenizer):
    def both(evaluate, kind, data, **lengths):
        settings = kind(**lengths), like("open-unlearning", kind, **lengths)
        return [evaluate(model, tokenizer, data, settings=one) for one in settings]

    ours, theirs = both(evaluate_muse, MuseSettings, MUSE, verbmem_tokens=CUT, knowmem_tokens=NEW)
    assert 0 < ours["exact_memorization"] != theirs["exact_memorization"] > 0
    ours, theirs = both(evaluate_tofu, TofuSettings, TofuData(forget=TOFU), new_tokens=NEW)
    assert ours["forget_Q_A_Prob"] != theirs["forget_Q_A_Prob"] and ours["forget_Q_A_ROUGE"] > 0
    with pytest.raises(ValueError, match="like to be one of open-unlearning, muse_bench; got 'tofu'"):
        like("tofu", MuseSettings)
