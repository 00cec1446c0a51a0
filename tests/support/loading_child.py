"""A process of its own that loads one model and prints how much memory that took, in bytes.

Counted is anonymous memory. `mapped` says how often files of the large model are mapped in the end, whose pages would
come on top of it.
"""

import json
import re
import sys
import threading
from pathlib import Path

from moe_unlearn.model.loading import Loading, load_model


def held() -> int:
    """Return the bytes of anonymous memory in use."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024


def main(small: str, large: str) -> None:
    """Load a small model first, which brings in all code that is needed, and then measure the large one."""
    load_model(small, Loading(device="cpu"))
    before, peak, done = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = load_model(large, Loading(device="cpu"))
    done.set()
    watcher.join()
    sizes = [parameter.nbytes for parameter in model.parameters()]
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").count(large)
    found = {"peak": max(peak, held()) - before, "weights": sum(sizes), "largest": max(sizes), "mapped": mapped}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
