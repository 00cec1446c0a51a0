"""Report results as text, markdown, JSON or JUnit XML, and give their exit code.

0   fine
1   a regression: less accurate, other bits under --strict, an error, slower, more registers
2   usage: nothing recorded, a case that cannot be judged, a record that would be overwritten
3   the environment does not reproduce the recorded inputs
4   a corrupt store (raised as `store.StoreError`)
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from moe_unlearn.files import write_text
from moe_unlearn.regress.alarms import Alarms
from moe_unlearn.regress.fingerprint import cpu
from moe_unlearn.regress.numeric import EQUAL, Verdict
from moe_unlearn.regress.store import Entry

FINE, REGRESSION, USAGE, ENVIRONMENT, CORRUPT = range(5)

# status -> exit code, in the order of the summary
STATUSES = {
    "equal": FINE,
    "accurate": FINE,
    "recorded": FINE,
    "unchanged": FINE,
    "accepted": FINE,
    "new": FINE,
    "inaccurate": REGRESSION,
    "different": REGRESSION,
    "failed": REGRESSION,
    "slower": REGRESSION,
    "suspicious": REGRESSION,
    "static": REGRESSION,
    "environment": ENVIRONMENT,
    "unrecorded": USAGE,
    "gone": USAGE,
    "changed": USAGE,
    "refused": USAGE,
    "invalid": USAGE,
}
_WORDS = {"accurate": "as accurate", "inaccurate": "less accurate", "different": "not bitwise equal"}


@dataclass(frozen=True)
class Result:
    """Result of one case."""

    case: str
    status: str
    message: str = ""
    outputs: tuple[Verdict, ...] = ()
    seconds: float = 0.0
    repro: str = ""
    speed: str = ""

    @property
    def code(self) -> int:
        return STATUSES[self.status]


def exit_code(results: Sequence[Result]) -> int:
    """Return the exit code: a regression outweighs a different environment, and that outweighs a wrong use."""
    codes = {result.code for result in results}
    return next((code for code in (REGRESSION, ENVIRONMENT, USAGE) if code in codes), FINE)


def summary(results: Sequence[Result]) -> str:
    """Return one line: how many cases, and how many of each status."""
    counts = Counter(result.status for result in results)
    parts = [f"{counts[status]} {_WORDS.get(status, status)}" for status in STATUSES if counts[status]]
    seconds = sum(result.seconds for result in results)
    return f"{len(results)} cases: {', '.join(parts) or 'none'} ({seconds:.1f} s)"


def text(results: Sequence[Result], *, verbose: bool = False) -> str:
    """Return a line per case that is not bitwise equal (all of them if `verbose`), and the summary last."""
    lines = []
    for result in results:
        if not (verbose or result.status not in ("equal", "unchanged") or result.speed):
            continue
        ratio = f"  error {_ratio(result)} x" if result.status == "accurate" else ""
        lines.append(f"{_WORDS.get(result.status, result.status):<18} {result.case}{ratio}")
        details = (result.message, result.speed, result.repro and f"repro: {result.repro}")
        lines += [f"    {line}" for detail in details if detail for line in detail.splitlines()]
    return "\n".join([*lines, summary(results)])


def markdown(results: Sequence[Result]) -> str:
    """Return a markdown table, with the summary first."""
    rows = ["| case | verdict | error, of the recorded | speed | remark |", "|---|---|---|---|---|"]
    for r in results:
        remark = " ".join((r.message + (f" Repro: `{r.repro}`" if r.repro else "")).split())
        cells = (f"`{r.case}`", _WORDS.get(r.status, r.status), _ratio(r), r.speed, remark)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return summary(results) + "\n\n" + "\n".join(rows)


def to_json(results: Sequence[Result], environment: dict[str, str]) -> str:
    """Return everything as JSON, with the environment; numbers that JSON does not have are null."""
    made = {
        "exit_code": exit_code(results),
        "summary": summary(results),
        "environment": environment,
        "results": [
            {
                "case": r.case,
                "status": r.status,
                "message": r.message,
                "seconds": round(r.seconds, 4),
                "speed": r.speed,
                "repro": r.repro,
                "outputs": [
                    {
                        "output": v.output,
                        "level": v.level,
                        "message": v.message,
                        "error_ratio": v.ratio if math.isfinite(v.ratio) else None,
                    }
                    for v in r.outputs
                ],
            }
            for r in results
        ],
    }
    return json.dumps(made, indent=1, allow_nan=False)


def junit(results: Sequence[Result]) -> str:
    """Return JUnit XML; regressions are failures, cases that could not be judged are errors."""
    failures = sum(r.code == REGRESSION for r in results)
    errors = sum(r.code in (USAGE, ENVIRONMENT) for r in results)
    suite = ElementTree.Element(
        "testsuite",
        name="moe-unlearn kernels",
        tests=str(len(results)),
        failures=str(failures),
        errors=str(errors),
        skipped="0",
        time=f"{sum(r.seconds for r in results):.3f}",
    )
    for r in results:
        case = ElementTree.SubElement(suite, "testcase", classname="kernels", name=r.case, time=f"{r.seconds:.3f}")
        if r.code != FINE:
            kind = "failure" if r.code == REGRESSION else "error"
            found = ElementTree.SubElement(case, kind, message=_printable(r.message), type=r.status)
            found.text = _printable("\n".join(filter(None, (r.message, r.repro))))
        elif r.speed or r.status != EQUAL:
            ElementTree.SubElement(case, "system-out").text = _printable(f"{r.status} {r.message} {r.speed}".strip())
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def store_table(entries: Sequence[Entry], *, markdown: bool = False) -> str:
    """Return a line per record, the newest of each case first, and a count."""
    head = ("case", "recorded", "torch", "kernel", "yardstick", "largest RMS error", "remark")
    rows = [tuple(_row(entry)) for entry in entries]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    else:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
    count = len({entry.case for entry in entries})
    return "\n".join([*lines, "", f"{count} cases, {len(entries)} records, all whole"])


def _row(entry: Entry) -> Iterator[str]:
    content = entry.content
    source = content["source"]
    errors = [output["rms_error"] for output in content["outputs"].values() if "rms_error" in output]
    yield entry.case
    yield content["recorded"]
    yield content["environment"].get("torch", "")
    yield " ".join(filter(None, (source.get("commit", "")[:9], "changed" if source.get("dirty") else "")))
    yield content.get("yardstick", {}).get("arithmetic", "not kept")
    yield f"{max(errors):.2e}" if errors else "integers"
    yield f"superseded the former: {content['reason']}" if content["supersedes"] else ""


def criterion(found: Alarms) -> str:
    """Return one line that says how far verdicts can be trusted on this machine."""
    return f"criterion on {cpu()}: {found} (a short run; `kernels selftest` has a longer one)"


def store_json(entries: Sequence[Entry]) -> str:
    """Return the records as they are, each with its SHA-256, as JSON."""
    return json.dumps([{"sha256": entry.sha256, **entry.content} for entry in entries], indent=1)


def write(path: Path, content: str) -> None:
    """Write a report whole or not at all."""
    write_text(path, content + "\n")


def _ratio(result: Result) -> str:
    ratios = [v.ratio for v in result.outputs if not math.isnan(v.ratio)]
    return f"{max(ratios):.3g}" if ratios else ""


def _printable(text: str) -> str:
    """Return the text with "?" for the control characters that XML forbids."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
