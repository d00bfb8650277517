"""What is lost on the way through an autoencoder: 8 and 4 pixels a latent cell, pictures of 64 and 128 pixels.

    python -m benchmarks.vae [--quick] [--out FOLDER] [--scenes N] [--times X]

Trains four small autoencoders alike, for a short time each, and puts real pictures of held-out scenes through them and through
the foundation's (8x, 64 pixels, trained long): facts that the detector still finds, CLIP score, PSNR; beside them what a latent costs
the denoiser. Writes vae.json and vae.png into data/results after every autoencoder (--quick: a few steps, nothing written without
--out; --times 4: four times the steps). The autoencoders themselves are thrown away. The last line's `ours` and `peer` are the facts found through 8x and through 4x at 64 pixels."""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import say
from recap.core import foundation, keyed_rng, project_root, write_json
from recap.denoiser import denoise, make_unet
from recap.fit import FitConfig
from recap.language import descriptive_caption
from recap.latents import VAEConfig, decode, encode, load_vae, picture_pool, train_vae
from recap.metrics import fact_counts
from recap.runs import provenance
from recap.scorers import ClipScorer, Detector
from recap.statistics import bootstrap_mean, bootstrap_ratio
from recap.world import KINDS, facts_of, render, scenes_of, visible_scene

SEED, WORLDS, TOKENS = 0, ("easy", "whole"), 32
SHAPES = {"8x": "16,32,64,80", "4x": "16,32,64"}     # widths: one resolution less, one halving less
STEPS = {64: 500, 128: 200}                          # of BATCH pictures; one of 128 pixels costs four times the work
BATCH, POOL = 8, 1500


def interval(v): return dict(zip(("mean", "lo", "hi"), (round(float(x), 4) for x in v)))


def held_out(n):
    "Scenes of both worlds in turn, as seen at 64 pixels; their facts and descriptive captions."
    scenes = list(scenes_of("+".join(WORLDS), n, SEED, "test"))
    seen = [visible_scene(s, 64) for s in scenes]
    return scenes, [sorted(facts_of(s)) for s in seen], [descriptive_caption(s, keyed_rng(SEED, "descriptive", i), bank="people") for i, s in enumerate(seen)]


class Judge:
    "The detector and the scoring CLIP on one set of scenes."
    def __init__(self, facts, texts):
        self.facts, self.texts = facts, texts
        self.detector, self.clip = Detector.from_pretrained(foundation("detector")), ClipScorer.from_pretrained(foundation("clip_scorer"))

    def __call__(self, pictures):   # uint8 (n, h, w, 3), scaled to 64 pixels -> found and asked of each kind, CLIP score of each picture
        return fact_counts(self.facts, self.detector.check(pictures, self.facts), KINDS), 100*np.maximum(self.clip.score(pictures, self.texts), 0)


def summary(counts, clip, real=None):
    "Shares of facts found with intervals over pictures, by kind and world; what is lost against the real pictures, paired."
    share = lambda part, whole: interval(bootstrap_ratio(part, whole, seed=SEED)) | {"n": int(whole.sum())}
    kinds = {k: share(*v) for k, v in counts.items() if v[1].sum()}
    found, asked = counts["all"]
    out = dict(facts=kinds.pop("all"), kinds=kinds, worlds={w: share(found[i::2], asked[i::2]) for i, w in enumerate(WORLDS)}, clip=interval(bootstrap_mean(clip, seed=SEED)))
    if real:
        lost = real[0]["all"][0] - found
        out |= dict(lost=share(lost, asked), lost_worlds={w: share(lost[i::2], asked[i::2]) for i, w in enumerate(WORLDS)}, clip_lost=interval(bootstrap_mean(real[1] - clip, seed=SEED)))
    return out


def multiply_adds(latent_channels, latent_size):
    "One call of the small U-Net on one picture's latents, with a caption of TOKENS tokens."
    unet = make_unet("s", latent_channels, latent_size).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        denoise(unet, torch.zeros(1, latent_channels, latent_size, latent_size), torch.full((1,), .5), torch.zeros(1, TOKENS, 256), torch.ones(1, TOKENS, dtype=torch.bool))
    return count.get_total_flops()//2


def psnr(a, b): return 10*np.log10(255**2/np.maximum(((a.astype(float) - b)**2).mean((1, 2, 3)), 1e-9))


def through(vae, pictures, judge, real):
    "A row of the table, and what came back."
    z = encode(vae, pictures)
    back = decode(vae, z)
    return dict(size=pictures.shape[1], downscale=pictures.shape[1]//z.shape[-1], latents=list(z.shape[1:]), latent_numbers=z[0].numel(),
                parameters=sum(p.numel() for p in vae.parameters()), psnr=interval(bootstrap_mean(psnr(back, pictures), seed=SEED)),
                denoiser_multiply_adds=multiply_adds(z.shape[1], z.shape[-1]), **summary(*judge(back), real)), back


def crops(rows, side):
    "The same part of a few scenes: real, and through each, 64-pixel pictures enlarged; (rows of scenes) x (columns of autoencoders)."
    def part(x):
        n = x.shape[1]
        return [Image.fromarray(p[3*n//8:7*n//8, n//4:3*n//4]).resize((side, side), 0) for p in x]
    columns = [part(x) for x in rows]
    grid = Image.new("RGB", ((side + 2)*len(columns) - 2, (side + 2)*len(columns[0]) - 2), "white")
    for i, column in enumerate(columns):
        for j, p in enumerate(column): grid.paste(p, ((side + 2)*i, (side + 2)*j))
    return grid


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true")
    args.add_argument("--out", help="folder of vae.json and vae.png")
    args.add_argument("--scenes", type=int, default=200)
    args.add_argument("--times", type=float, default=1., help="how much longer to train than by default")
    args = args.parse_args()
    torch.set_num_threads(1)
    out = Path(args.out) if args.out else None if args.quick else project_root()/"data/results"
    n, pool, batch = (12, 16, 4) if args.quick else (args.scenes, POOL, BATCH)
    scenes, facts, texts = held_out(n)
    judge, shown = Judge(facts, texts), [i for i in range(n) if facts[i]][:4]
    pictures = {size: np.stack([np.asarray(render(s, size)) for s in scenes]) for size in STEPS}
    real = {size: judge(x) for size, x in pictures.items()}
    told = dict(seed=SEED, scenes=n, worlds=WORLDS, tokens=TOKENS, complete=False, autoencoders=[], columns=[],
                training=dict(batch_size=batch, pictures=pool, worlds="+".join(WORLDS), steps={str(s): 2 if args.quick else round(args.times*k) for s, k in STEPS.items()}),
                real=[dict(name=f"real pictures, {size} px", size=size, **summary(*real[size])) for size in STEPS])
    tiles = []
    def add(name, vae, size, **more):
        row, back = through(vae, pictures[size], judge, real[size])
        told["autoencoders"].append(dict(name=name, **row, **more))
        if not any(c == f"real, {size} px" for c in told["columns"]): told["columns"].append(f"real, {size} px"); tiles.append(pictures[size][shown])
        told["columns"].append(name); tiles.append(back[shown])
        told.update(complete=len(told["autoencoders"]) == 1 + len(SHAPES)*len(STEPS), provenance=provenance())
        print(f"{name:24} facts {row['facts']['mean']:.3f} of {told['real'][list(STEPS).index(size)]['facts']['mean']:.3f}, CLIP {row['clip']['mean']:.1f}, PSNR {row['psnr']['mean']:.1f} dB, "
              f"{row['latent_numbers']} numbers, {row['denoiser_multiply_adds']/1e6:.0f} M multiply-adds", flush=True)
        if out: out.mkdir(parents=True, exist_ok=True); write_json(out/"vae.json", told); crops(tiles, 64).quantize(96).save(out/"vae.png", optimize=True)
    add("8x, 64 px, trained long", load_vae(), 64, kind="foundation")
    for size, most in STEPS.items():
        x = picture_pool(pool, size, SEED, world="+".join(WORLDS))
        for name, widths in SHAPES.items():
            steps, begin = told["training"]["steps"][str(size)], time.process_time()
            vae, _ = train_vae(x, VAEConfig(widths=widths), FitConfig(steps=steps, batch_size=batch, lr=3e-3, ema=.98, warmup=30, decay=.5, seed=SEED))
            add(f"{name}, {size} px", vae, size, kind="short", steps=steps, cpu_minutes=round((time.process_time() - begin)/60, 2))
    short = {r["name"]: r["facts"]["mean"] for r in told["autoencoders"]}
    say("vae (facts found in pictures that went through it)", short["8x, 64 px"], short["4x, 64 px"], quick=args.quick, scenes=n, **told["training"])


if __name__ == "__main__": main()
