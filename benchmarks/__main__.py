"Run every benchmark and print a table."
import json
import subprocess
import sys
from pathlib import Path


def main(args):
    rows, failed = [], []
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{path.stem}", *args], capture_output=True, text=True)
        try: rows.append(json.loads(done.stdout.strip().split("\n")[-1]))
        except ValueError: failed.append(f"{path.stem}: {(done.stderr or done.stdout).strip().split(chr(10))[-1]}")
    text = lambda v: "" if v is None else f"{v:g}" if isinstance(v, (int, float)) else str(v)
    print("| benchmark | ours | peer | ratio | share of limit |\n|---|---|---|---|---|")
    for r in rows: print("| " + " | ".join([r["name"], *(text(r[k]) for k in ("ours", "peer", "ratio", "share_of_limit"))]) + " |")
    for f in failed: print(f"failed: {f}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
