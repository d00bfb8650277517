"""Judges on planted errors: how often each is right, by kind of error, on single pictures and on pairs.

    python -m benchmarks.judge [--quick] [--n CASES] [--server ADDRESS]

Runs page 23 on the easy slice and on the whole world and writes data/results/judge.json (--quick: few cases of the easy slice,
nothing written). --server measures a vision-language model too, such as http://127.0.0.1:8000/v1#MODEL. The last line's `ours` and
`peer` are the balanced accuracy of the default judge and of a coin, all kinds of the easy slice together."""
import argparse
import tempfile
from pathlib import Path

from benchmarks import say
from recap.core import RecapError, project_root, read_json, write_json
from recap.judge import LOCAL, PLANTS
from recap.runs import launch


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true")
    args.add_argument("--n", type=int, default=100)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--server", default="")
    args = args.parse_args()
    params = dict(seed=args.seed, n=6 if args.quick else args.n, worlds="easy" if args.quick else "easy+whole", server=args.server)
    (project_root()/"runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=project_root()/"runs") as folder:
        try: results = read_json(launch("23_judge", params, out=Path(folder)/"judge", whole=False))
        except RecapError as e: raise SystemExit(str(e))
        run = read_json(Path(folder)/"judge"/"run.json")
    run["params"].pop("out")
    if not args.quick: write_json(project_root()/"data/results/judge.json", {"provenance": run, **results})
    told = lambda s: f"{s['mean']:.2f} [{s['lo']:.2f}, {s['hi']:.2f}]" if s else "none"
    for world, judged in results["worlds"].items():
        print(f"{world}\n{'':22} {'cases':>5} {'passed':>18} {'caught':>18} {'verdict':>18} {'alpha':>6} {'pair':>18} {'excluded':>8}")
        for name, found in judged.items():
            for k in (*PLANTS, "all"):
                v = found["kinds"][k]
                alpha = "" if v["alpha"] is None else f"{v['alpha']:+.2f}"
                print(f"{name:11} {k:10} {v['cases']:5} {told(v['passed']):>18} {told(v['caught']):>18} {told(v['verdict']):>18} {alpha:>6} {told(v['pair']):>18} {v['excluded']:8}")
    first = results["worlds"]["easy"][next(iter(LOCAL))]["kinds"]["all"]["verdict"]
    say("judge (balanced accuracy)", first["mean"], .5, lo=first["lo"], hi=first["hi"], kinds=list(PLANTS), quick=args.quick, **params)


if __name__ == "__main__": main()
