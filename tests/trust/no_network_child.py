"""Run commands, given as JSON on stdin, in the current folder; print whom each of them asked on the network."""

import json
import sys
import time

from moe_unlearn.cli.main import main

ASKED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
asked = []


def heard(event, given):
    """Keep who is asked, and let it fail."""
    if event in ASKED:
        asked[-1].append(f"{event} {given[-1] if event == 'socket.connect' else given[0]}")
        raise OSError("there is no network here")


time.sleep = lambda seconds: None  # nobody comes back
sys.addaudithook(heard)
codes = []
for command in json.load(sys.stdin):
    asked.append([])
    codes.append(main(command))
print(json.dumps({"codes": codes, "asked": asked}))
