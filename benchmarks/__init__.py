"""Benchmarks: `python -m benchmarks.NAME [--quick]`; `python -m benchmarks` runs all and makes the table.

Each prints as its last line one JSON object: name, ours, peer, ratio, share_of_limit (null where there is none), settings."""
import json
import statistics
import time


def say(name, ours, peer=None, share_of_limit=None, **settings):
    "Print a benchmark's last line."
    ratio = round(ours/peer, 3) if ours and peer else None
    print(json.dumps(dict(name=name, ours=ours, peer=peer, ratio=ratio, share_of_limit=share_of_limit, settings=settings)))


def clock(device):
    "Seconds: of this process's work on a CPU, of the wall on a GPU."
    import torch
    if device.type != "cuda": return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def rate(dtype, device):
    "What large square products reach now, operations a second."
    import torch
    n = 8192 if device.type == "cuda" else 1024
    a, times = torch.randn(n, n, device=device).to(dtype), 8 if dtype == torch.float32 else 32
    if device.type == "cuda": a @ a
    begin = clock(device)
    for _ in range(times): a @ a
    return times*2*n**3/(clock(device) - begin)


def spread(values): return dict(median=statistics.median(values), low=min(values), high=max(values), repeats=len(values))
