"""The whole study: minutes from its first stage's begin to its last one's end, and time and memory by stage.

    python -m benchmarks.study [--quick] [--scale cpu]

Reads the records of a finished study (`make study`) and runs nothing. --quick takes the smoke study where there is no other.
The limit is 25 minutes on two cores."""
import argparse
from datetime import datetime

from benchmarks import say
from recap.core import RecapError, project_root, read_json
from recap.study import study_graph

LIMIT = 25  # minutes


def records(scale):
    "stage -> run.json of a finished study; empty if a stage is missing."
    runs = project_root()/"runs"/scale
    found = {s: runs/s/"run.json" for s in study_graph(scale)}
    if not all(p.exists() and p.with_name("results.json").exists() for p in found.values()): return {}
    return {s: read_json(p) for s, p in found.items()}


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--quick", action="store_true")
    args.add_argument("--scale", default=None)
    args = args.parse_args()
    scales = [args.scale] if args.scale else ["cpu", "smoke"] if args.quick else ["cpu"]
    for scale in scales:
        try: found = records(scale)
        except RecapError as e: raise SystemExit(f"benchmarks.study: {e}")
        if found: break
    else:
        print(f"no finished study at scale {' or '.join(scales)}: `make study` first")
        return say("study (minutes)", None, reason="no finished study")
    print(f"{'stage':16} {'seconds':>8} {'peak MB':>8}")
    for s, r in found.items(): print(f"{s:16} {r['seconds']:8.1f} {r['peak_memory_mb']:8.0f}")
    ends = {s: datetime.fromisoformat(r["finished"].replace("Z", "+00:00")).timestamp() for s, r in found.items()}
    wall = max(ends.values()) - min(ends[s] - r["seconds"] for s, r in found.items())
    last = found[max(ends, key=ends.get)]
    stages = {s: {"seconds": r["seconds"], "peak_mb": r["peak_memory_mb"]} for s, r in found.items()}
    say("study (minutes)", round(wall/60, 2), share_of_limit=round(wall/60/LIMIT, 3) if scale == "cpu" else None, scale=scale,
        cores=last["machine"]["cores"], cpu=last["machine"]["cpu"], revision=last["revision"], stages=stages,
        peak_mb=max(r["peak_memory_mb"] for r in found.values()), limit_minutes=LIMIT)


if __name__ == "__main__": main()
