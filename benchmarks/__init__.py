"""Benchmarks: `python -m benchmarks.NAME [--quick]`; `python -m benchmarks` runs all and makes the table.

Each prints as its last line one JSON object: name, ours, peer, ratio, share_of_limit (null where there is none), settings."""
import json


def say(name, ours, peer=None, share_of_limit=None, **settings):
    "Print a benchmark's last line."
    ratio = round(ours/peer, 3) if ours and peer else None
    print(json.dumps(dict(name=name, ours=ours, peer=peer, ratio=ratio, share_of_limit=share_of_limit, settings=settings)))
