"""Records and layouts exactly as the benchmarks publish them, of whatever content a test gives."""

import json
from pathlib import Path


def write(path: Path, content: str | bytes | list) -> Path:
    """A file of text, bytes, or records: JSON lines if it is named .jsonl, else one JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        lines = json_lines(content)
        content = lines if path.suffix == ".jsonl" else "[" + ", ".join(lines.splitlines()) + "]"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_parts(folder: Path, parts: dict[str, dict[str, list]], ending: str) -> Path:
    """A mirror of a hub data set: CONFIG/SPLIT.ENDING."""
    for config, splits in parts.items():
        for split, rows in splits.items():
            write(folder / config / f"{split}.{ending}", rows)
    return folder


def write_tofu(folder: Path, configs: dict[str, list]) -> Path:
    """TOFU's own files: JSON lines named .json, one file a config."""
    for config, rows in configs.items():
        write(folder / f"{config}.json", json_lines(rows))
    return folder


def texts(*values: str) -> list[dict]:
    """MUSE's raw and privleak, RWKU's and WMDP's corpora, C4."""
    return [{"text": value} for value in values]


def muse(raw: dict, verbmem: list, qa: list, privleak: dict, folds: list[str]) -> dict[str, dict[str, list]]:
    """MUSE's configs and splits; `raw` and `privleak` hold the texts of each split, `folds` four of them."""
    return {
        "raw": {split: texts(*own) for split, own in raw.items()},
        "verbmem": {"forget": verbmem},
        "knowmem": {split: qa for split in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl")},
        "privleak": {split: texts(*own) for split, own in privleak.items()},
        "scal": {f"forget_{i}": texts(*folds[:i]) for i in (1, 2, 3, 4)},
        "sust": {f"forget_{i}": texts(folds[i - 1]) for i in (1, 2, 3, 4)},
        "train": {"full": texts(*raw["forget"], *raw["retain2"])},
    }


def perturbed(question: str, answer: str, wrong: list[str]) -> dict:
    """A row of TOFU's forget and retain `_perturbed` files."""
    return {
        "question": question,
        "answer": answer,
        "paraphrased_question": f"{question}'",
        "paraphrased_answer": f"{answer}'",
        "perturbed_answer": wrong,
    }


def rlhf(prompt: str, responses: tuple[str, str], safe: tuple[bool, bool]) -> dict:
    """A record of PKU-SafeRLHF."""
    answers = {f"response_{i}": response for i, response in enumerate(responses)}
    flags = {f"is_response_{i}_safe": value for i, value in enumerate(safe)}
    return {
        "prompt": prompt,
        **answers,
        **flags,
        "safer_response_id": int(not safe[0]),
        "response_0_harm_category": {"Animal Abuse": False},
    }


def probe(subject: str, query: str, answer: str) -> dict:
    """A record of RWKU's probes."""
    return {"query": query, "answer": answer, "subject": subject, "level": "1", "type": "cloze"}


def paper(title: str, abstract: str | None, text: str) -> dict:
    """A record of WMDP's bio_remove_dataset."""
    return {"title": title, "abstract": abstract, "text": text, "doi": "10/x"}
