"""What the small upsampler keeps, contradicts and adds, on short prompts about held-out scenes, before and after its checker.

`python -m benchmarks.upsample [--quick] [--out data/results/upsample.json]`"""
import argparse
from collections import Counter

from benchmarks import clock, say

SEED = 7
SETS = {"easy": ("easy", "test"), "easy, new compositions": ("easy", "novel"), "middle": ("middle", "test"), "whole": ("whole", "test")}   # world and split


def rounded(portrait):
    "Fewer digits, and the openings that matter."
    return {"words": portrait["words"], "kinds": {k: round(v, 3) for k, v in portrait["kinds"].items()}, "openings": {k: round(v, 4) for k, v in list(portrait["openings"].items())[:24]}}


def measure_set(upsampler, world, split, n):
    "One set of prompts: drafts as the model writes them, rewrites as the checker lets them through."
    import torch
    from recap.caption_eval import distribution_distance
    from recap.upsample import held_out_prompts, measure_rewrites, portrait
    prompts, dsc = held_out_prompts(n, world, SEED, split)
    drafts, begin = upsampler.write(prompts), clock(torch.device("cpu"))
    rewrites = upsampler.rewrite(prompts)
    seconds, good = clock(torch.device("cpu")) - begin, [r for r in rewrites if r.ok]
    texts = [r.text for r in good]
    why = Counter(" ".join(r.why.split()[:2]).rstrip(":") for r in rewrites if not r.ok)
    found = dict(world=world, split=split, prompts=len(prompts), drafts=measure_rewrites(prompts, drafts, SEED), rewrites=measure_rewrites([r.prompt for r in good], texts, SEED),
                 refused=len(prompts) - len(good), why=dict(why), per_second=round(len(prompts)/seconds, 2), distance=distribution_distance(texts, dsc, SEED),
                 portraits={"DSC": rounded(portrait(dsc)), "drafts": rounded(portrait(drafts)), "rewritten": rounded(portrait(texts))},
                 examples=[{"prompt": r.prompt, "text": r.text, "kept": len(r.kept), "added": len(r.added)} for r in good[:6]])
    show = lambda m: f"kept {100*m['kept']['mean']:.1f} %, contradicted {100*m['contradicted']['mean']:.1f} %, good {100*m['good']['mean']:.1f} %, words kept {100*m['words_kept']['mean']:.1f} %, added {m['added']['mean']:.1f}"
    print(f"{world} {split}: drafts {show(found['drafts'])}; rewrites {show(found['rewrites'])}; refused {found['refused']} of {len(prompts)}; {found['per_second']} a second", flush=True)
    return found


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="a few prompts, to see that all works")
    args.add_argument("--out", help="where the numbers go, as JSON")
    args.add_argument("-n", type=int, default=200, help="prompts of each set")
    args = args.parse_args()
    import torch
    from recap.core import foundation, hash_folder, write_json
    from recap.runs import provenance
    from recap.upsample import Upsampler
    torch.set_num_threads(1)
    upsampler, n = Upsampler.from_pretrained(foundation("upsampler"), device="cpu"), 12 if args.quick else args.n
    sets = {name: measure_set(upsampler, *where, n) for name, where in SETS.items()}
    settings = dict(tries=upsampler.tries, temperature=upsampler.temperature, top_p=upsampler.top_p, seed=upsampler.seed)
    if args.out: write_json(args.out, dict(seed=SEED, threads=1, settings=settings, weights=hash_folder(foundation("upsampler")), sets=sets, provenance=provenance(), complete=not args.quick and n >= 200))
    say("upsample", sets["easy"]["per_second"], unit="prompts a second", kept=sets["easy"]["rewrites"]["kept"]["mean"], prompts=n)


if __name__ == "__main__": main()
