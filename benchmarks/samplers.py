"""Samplers and numbers of steps against quality and seconds, with a trained denoiser.

    python -m benchmarks.samplers [--quick] [--model FOLDER] [--prompts 100] [--out data/results/samplers.json] [--device cpu]

Each sampler paints the same held-out prompts of the easy slice, as people write and descriptive, from the same noise with the same
guidance. Recorded for each: the share of facts that the detector finds, the CLIP score, calls of the model, seconds a picture (the
processor's time on a CPU, the clock's on a GPU; median over batches), and the error: the RMS distance of a picture's latents to those of
the reference, 100 steps of Heun's method, median over pictures, since a picture that tips over into another tells nothing of the rest (--quick: 8 prompts of each kind, fewer numbers of steps, nothing written).
The knee is the default to take. Two things anchor it: the reference, and the sampler to beat (DPM-Solver++ 2M with Karras' noise levels,
15 steps). A row passes that is not worse than either, pair by pair: the 95 % interval of the difference, over prompts, stays above
-2 points of facts found and above -0.5 of CLIP score. Of the rows that pass, the knee has the fewest calls of the model, then the least
distance. Where none passes, and few prompts cannot show that anything is as good, it is the sampler to beat.
The last line's `ours` and `peer` are pictures a second of the knee and of the sampler to beat."""
import argparse
import statistics

from benchmarks import clock, say

STEPS, QUICK, BEAT, REFERENCE = (5, 8, 10, 15, 20, 30, 50), (5, 10, 15, 20), ("dpm-karras", 15), ("heun", 100)
MARGINS = dict(facts=.02, clip=.5)
RULE = ("The knee: fewest calls of the model, then least error, of all rows whose facts found and CLIP score are, with 95 % confidence over prompts, at most "
        f"{100*MARGINS['facts']:g} points and {MARGINS['clip']:g} below those of the reference ({REFERENCE[1]} steps of {REFERENCE[0]}) and of the sampler to beat.")


def questions(n, seed):
    "Held-out scenes of the easy slice, asked for in both kinds of text: [(group, prompt, facts, noise seed)]."
    from recap.evaluate import ask, picture_seeds
    from recap.world import facts_of, scenes_of, visible_scene
    seen = [visible_scene(s, 64) for s in scenes_of("easy", 2*n, seed, "test")]
    asked, _ = ask({("test", f"{i:06d}"): (s, set(facts_of(s))) for i, s in enumerate(seen)}, n, seed)
    return [(q.index, q.prompts[t], q.facts[t], s) for t in ("people", "descriptive") for q, s in zip(asked, picture_seeds(asked, 1, seed))]


class Studio:
    "A trained denoiser and its prompts; paints them with any sampler and counts the calls."
    def __init__(self, painter, asked, objective, guidance_scale, batch_size, dtype):
        import torch
        from recap.core import keyed_torch
        self.painter, self.objective, self.guidance_scale, self.batch_size, self.dtype = painter, objective, guidance_scale, batch_size, dtype
        self.states, self.mask = painter.text.encode([prompt for _, prompt, _, _ in asked])
        self.empty, config = painter.text.encode([""])[0], painter.unet.config
        self.noise = torch.stack([torch.randn(config.in_channels, config.sample_size, config.sample_size, generator=keyed_torch(seed, "noise")) for *_, seed in asked])

    def paint(self, sampler, steps):
        "Latents, calls of the model, seconds a picture of each batch."
        import torch
        from recap.denoiser import denoise
        from recap.diffusion import guided, paint_latents
        unet, latents, seconds, calls = self.painter.unet, [], [], 0
        device = next(unet.parameters()).device
        for i in range(0, len(self.noise), self.batch_size):
            noise, states, mask = (x[i:i + self.batch_size].to(device) for x in (self.noise, self.states, self.mask))
            told = guided(lambda x, t, s, m: denoise(unet, x, t, s, m).float(), states, mask, self.empty, self.guidance_scale)
            calls = 0
            def model(x, t):
                nonlocal calls
                calls += 1
                return told(x, t)
            begin = clock(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
                latents.append(paint_latents(model, noise, steps, sampler, self.objective))
            seconds.append((clock(device) - begin)/len(noise))
        return torch.cat(latents), calls, seconds

    def look(self, latents, asked, detector, scorer):
        "Facts found and asked for, and the CLIP score, picture by picture."
        import numpy as np
        from PIL import Image
        from recap.latents import decode
        from recap.metrics import clip_score
        pictures = [Image.fromarray(x) for i in range(0, len(latents), 64) for x in decode(self.painter.vae, latents[i:i + 64])]
        said = detector.check(pictures, [[tuple(f) for f in facts] for _, _, facts, _ in asked])
        return dict(found=np.array([sum(p > .5 for p in ps) for ps in said]), asked=np.array([len(ps) for ps in said]),
                    clip=clip_score(pictures, [prompt for _, prompt, _, _ in asked], scorer))


def row_of(sampler, steps, calls, seconds, error, looks, groups, seed):
    "What is told of one sampler and number of steps."
    from recap.statistics import bootstrap_mean, bootstrap_ratio
    plain = lambda interval: {k: round(float(v), 4) for k, v in interval._asdict().items()}
    return dict(sampler=sampler, steps=steps, calls=calls, error=round(error, 5), facts=plain(bootstrap_ratio(looks["found"], looks["asked"], groups, seed=seed)),
                clip=plain(bootstrap_mean(looks["clip"], groups, seed=seed)), seconds=dict(median=statistics.median(seconds), low=min(seconds), high=max(seconds), batches=len(seconds)))


def differences(looks, anchor, groups, seed):
    "How much better than an anchor, pair by pair: the interval of each measure."
    from recap.statistics import paired_difference
    pairs = dict(facts=[x["found"]/x["asked"] for x in (looks, anchor)], clip=[x["clip"] for x in (looks, anchor)])
    return {k: {n: round(float(v), 4) for n, v in paired_difference(*ab, groups, seed=seed)._asdict().items()} for k, ab in pairs.items()}


def knee(rows):
    "By the rule; the sampler to beat where no row passes."
    able = [r for r in rows if all(d[k]["lo"] >= -MARGINS[k] for d in r["against"].values() for k in MARGINS)]
    return min(able or [r for r in rows if (r["sampler"], r["steps"]) == BEAT], key=lambda r: (r["calls"], r["error"])), len(able)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="8 prompts and fewer numbers of steps, to see that all works")
    args.add_argument("--model", default="", help="folder of an arm; the foundation's base denoiser by default")
    args.add_argument("--prompts", type=int, default=100, help="held-out scenes; each is asked for in two texts")
    args.add_argument("--out", default="data/results/samplers.json", help="where the numbers go, as JSON")
    args.add_argument("--guidance", type=float, default=5.)
    args.add_argument("--batch-size", type=int, default=32)
    args.add_argument("--dtype", default="bf16", help="bf16 or no, as in training")
    args.add_argument("--device", default="cpu", help="auto, cpu, cuda")
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    import torch
    from recap.core import RecapError, foundation, hash_folder, pick_device, read_json, resolve_path, write_json
    from recap.diffusion import SAMPLERS
    from recap.runs import provenance
    from recap.scorers import ClipScorer, Detector
    from recap.train import Painter
    torch.set_num_threads(1)
    try:
        device, n, counts = pick_device(args.device), 8 if args.quick else args.prompts, QUICK if args.quick else STEPS
        folder = resolve_path(args.model) if args.model else foundation("denoiser")
        painter, asked = Painter.from_pretrained(folder, device), questions(n, args.seed)
        detector, scorer = Detector.from_pretrained(foundation("detector")), ClipScorer.from_pretrained(foundation("clip_scorer"))
        objective = read_json(folder/"model.json").get("objective", "flow")
        studio = Studio(painter, asked, objective, args.guidance, min(args.batch_size, max(1, len(asked)//2)), args.dtype)
    except RecapError as e: raise SystemExit(str(e))
    groups = [q[0] for q in asked]
    goal, calls, seconds = studio.paint(*REFERENCE)
    looks = {REFERENCE: studio.look(goal, asked, detector, scorer)}
    reference, rows = row_of(*REFERENCE, calls, seconds, 0., looks[REFERENCE], groups, args.seed), []
    names = [s for s in SAMPLERS if objective != "flow" or s != "ddim"]       # on a flow, DDIM is Euler's method
    print(f"{len(asked)} pictures, {objective}, guidance {args.guidance:g}; reference: facts {100*reference['facts']['mean']:.1f} %, CLIP {reference['clip']['mean']:.2f}", flush=True)
    print(f"{'sampler':12}{'steps':>6}{'calls':>6}{'facts, %':>22}{'CLIP':>8}{'error':>9}{'s a picture':>13}")
    for sampler, steps in [(s, k) for s in names for k in counts]:
        latents, calls, seconds = studio.paint(sampler, steps)
        looks[sampler, steps] = studio.look(latents, asked, detector, scorer)
        rows.append(r := row_of(sampler, steps, calls, seconds, (latents - goal).square().flatten(1).mean(1).sqrt().median().item(), looks[sampler, steps], groups, args.seed))
        f = r["facts"]
        print(f"{sampler:12}{steps:6}{calls:6}{100*f['mean']:8.1f} [{100*f['lo']:4.1f}, {100*f['hi']:4.1f}]{r['clip']['mean']:8.2f}{r['error']:9.4f}{r['seconds']['median']:13.4f}", flush=True)
    for r in rows: r["against"] = {name: differences(looks[r["sampler"], r["steps"]], looks[anchor], groups, args.seed) for name, anchor in (("reference", REFERENCE), ("beat", BEAT))}
    best, able = knee(rows)
    beat = next(r for r in rows if (r["sampler"], r["steps"]) == BEAT)
    told = dict(seed=args.seed, prompts=n, pictures=len(asked), objective=objective, guidance_scale=args.guidance, dtype=args.dtype, device=str(device), threads=1,
                clock="wall" if device.type == "cuda" else "process", model=dict(folder=args.model or "foundation", hash=hash_folder(folder)), rule=RULE, margins=MARGINS,
                samplers=names, rows=rows, reference=reference, knee=best, beat=beat, passing=able, provenance=provenance())
    if not args.quick: write_json(resolve_path(args.out), told)
    d = best["against"]["beat"]
    print(f"{RULE}\n{able} of {len(rows)} rows pass. Knee: {best['sampler']}, {best['steps']} steps, {best['calls']} calls; beside {BEAT[0]}, {BEAT[1]} steps: "
          f"facts {100*d['facts']['diff']:+.1f} [{100*d['facts']['lo']:+.1f}, {100*d['facts']['hi']:+.1f}] points, CLIP {d['clip']['diff']:+.2f} [{d['clip']['lo']:+.2f}, {d['clip']['hi']:+.2f}]")
    say("samplers", round(1/best["seconds"]["median"], 3), round(1/beat["seconds"]["median"], 3), sampler=best["sampler"], steps=best["steps"], beat=" ".join(map(str, BEAT)),
        facts=best["facts"]["mean"], facts_to_beat=beat["facts"]["mean"], unit="pictures a second", quick=args.quick)


if __name__ == "__main__": main()
