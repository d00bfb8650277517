"""Selection, repair and grounding of captions against plain greedy, with the descriptive captioner of the cpu study.

    python -m benchmarks.repair [--quick] [--captioner FOLDER] [--n PICTURES]

Runs page 11a on held-out pictures of the easy slice and of the whole world, and writes data/results/repair.json (--quick: fewer
pictures, nothing written). The captioner is runs/cpu/tune_dsc: make it with `recap stage pairs --scale cpu`, then
`recap stage tune_dsc --scale cpu`. The last line's `ours` and `peer` are the share of told facts that is true, of the method
that invents least without telling less than greedy, and of greedy, on the easy slice."""
import argparse
import tempfile
from pathlib import Path

from benchmarks import say
from recap.core import RecapError, project_root, read_json, resolve_path, write_json
from recap.runs import launch

WORLDS = "easy+whole,words=0.5"


def best(methods):
    "The method that invents least among those that do not tell less than greedy; the oracle is none."
    able = {m: s for m, s in methods.items() if "oracle" not in m and s["coverage_gained"]["hi"] >= 0}
    return min(able, key=lambda m: able[m]["hallucination"]["mean"])


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true")
    args.add_argument("--captioner", default="runs/cpu/tune_dsc")
    args.add_argument("--n", type=int, default=400)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    if not (resolve_path(args.captioner)/"manifest.json").exists():
        raise SystemExit(f"{args.captioner} holds no captioner: run `recap stage pairs --scale cpu`, then `recap stage tune_dsc --scale cpu`")
    params = dict(seed=args.seed, captioner=args.captioner, worlds=WORLDS, n=32 if args.quick else args.n, ks="1,2,4" if args.quick else "1,2,4,8")
    with tempfile.TemporaryDirectory(dir=project_root()/"runs") as folder:
        try: results = read_json(launch("11a_repair", params, out=Path(folder)/"repair", whole=False))
        except RecapError as e: raise SystemExit(str(e))
        run = read_json(Path(folder)/"repair"/"run.json")
    run["params"].pop("out")
    if not args.quick: write_json(project_root()/"data/results/repair.json", {"scale": "cpu", "provenance": run, **results})
    for world, w in results["worlds"].items():
        print(f"{world}, {w['pictures']} pictures\n{'':50} {'coverage':>9} {'gained':>24} {'invented':>9} {'gained':>24} {'subject':>8}")
        for m, s in w["methods"].items():
            iv = lambda d: f"{100*d['mean']:+.1f} [{100*d['lo']:+.1f}, {100*d['hi']:+.1f}]"
            print(f"{m:50} {100*s['coverage']['mean']:8.1f} {iv(s['coverage_gained']):>24} {100*s['hallucination']['mean']:9.1f} {iv(s['hallucination_gained']):>24} {100*s['main_subject']['mean']:8.1f}")
    easy = results["worlds"]["easy"]["methods"]
    right = lambda m: round(1 - easy[m]["hallucination"]["mean"], 4)
    say("repair (share of told facts that is true)", right(best(easy)), right("greedy"), method=best(easy), quick=args.quick, **params)


if __name__ == "__main__": main()
