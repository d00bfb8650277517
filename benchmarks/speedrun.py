"""Minutes to half of the facts: how fast a denoiser learns to paint what it is asked, from scratch, on one core.

    python -m benchmarks.speedrun [--quick] [--only papers,muon] [--device auto] [--out data/results/speedrun.json]

A fixed slice: 8,000 pictures of the easy world with descriptions written from the truth, encoded once by the foundation's autoencoder and
text encoder, and 100 held-out scenes with descriptions of the same kind. Every run starts from random weights, reads the same samples in
the same order, and is stopped when its averaged weights paint `TARGET` of the facts that the detector finds in the prompts (guidance 5;
the detector finds `ceiling` of them in the true pictures), or at its limit. Rates are constant after the warmup, because nobody knows
beforehand when a run will end. Time is the processor time of this process with one thread on a CPU, the clock's on a GPU; drawing and
scoring do not count. Each run changes one thing of the run it names as `over`. The minutes to the target are read off the line between
the two evaluations around it. Results are kept run by run: `--only` replaces some and leaves the others, if the slice and the weights are the same.
The last line: `ours` is the papers' minutes (U-Net, epsilon, AdamW), `peer` the best run's, so that `ratio` says how many times fewer."""
import argparse
import dataclasses
import itertools
import os
import tempfile
from pathlib import Path

from benchmarks import clock, say

SIZE, TESTS, SEED, TARGET, EVERY, LIMIT = 8000, 100, 0, .5, .5, 30.   # pictures, prompts, share of the facts, minutes between two looks, minutes at most
SHOWN, AFTER = 8, 2.   # pictures kept, after so many minutes


@dataclasses.dataclass(frozen=True)
class Run:
    "One way to train."
    story: str
    over: str = ""              # the run that differs in one thing
    denoiser: str = "s"         # a size of page 15
    objective: str = "flow"     # of page 16
    snr_gamma: float = 0.
    lr: float = 1.5e-3
    muon_lr: float = 0.
    batch_size: int = 64
    align: float = 0.           # weight of the alignment to the captioner's view of the picture
    contrast: float = 0.        # weight of the push away from another picture's velocity


RUNS = {
    "papers": Run("U-Net, noise prediction, AdamW, as the papers train it", objective="epsilon", lr=1e-3),
    "papers, slow": Run("the same with a rate three times lower", "papers", objective="epsilon", lr=3e-4),
    "min-snr": Run("losses weighted by the signal (Min-SNR 5)", "papers", objective="epsilon", lr=1e-3, snr_gamma=5.),
    "v": Run("the v target", "papers", objective="v", lr=1e-3),
    "flow": Run("rectified flow, times drawn from the middle", "papers", lr=1e-3),
    "muon": Run("Muon for the matrices", "flow", muon_lr=.015),
    "small batch": Run("32 pictures a step", "muon", muon_lr=.015, batch_size=32),
    "contrast": Run("pushed away from another picture's velocity", "muon", muon_lr=.015, contrast=.05),
    "align": Run("aligned with what the captioner sees", "muon", muon_lr=.015, align=.5),
    "transformer": Run("a diffusion transformer in the U-Net's place", "muon", denoiser="dit-s", lr=1e-3, muon_lr=.015),
}


def slice_of_world(home, size, tests):
    "The encoded slice, and the prompts with the facts that can be seen: made once."
    from recap.cache import CacheConfig, build_cache, load_cache
    from recap.core import keyed_rng
    from recap.corpus import CorpusConfig, make_world, open_corpus
    from recap.language import descriptive_caption
    from recap.reader import compare
    make_world(CorpusConfig(n=size, truth_styles="dsc", split="train", seed=5), home/"corpus")
    make_world(CorpusConfig(n=2*tests, split="test", seed=6), home/"prompts")
    made = build_cache(CacheConfig(corpus=str(home/"corpus"), styles="dsc"), home/"cache")
    asked, pictures = [], open_corpus(home/"prompts")
    images = {(s, x.key): x.image for s in pictures.shards for x in pictures.read_shard(s, 64)}
    for key, (scene, visible) in sorted(pictures.truth().items()):
        prompt = descriptive_caption(scene, keyed_rng(SEED, "descriptive", *key), "captioner")
        if facts := sorted(compare(prompt, visible).told): asked.append((prompt, [tuple(f) for f in facts], images[key]))
    return load_cache(home/"cache"), asked[:tests], made["encoders"]


def views(home, cache):
    "What the foundation's captioner sees in each cell of each picture, the mean taken away."
    import torch
    from recap.captioner import load_captioner
    from recap.core import foundation, hash_folder
    from recap.corpus import open_corpus
    path, made_by = home/"views.pt", hash_folder(foundation("captioner"))
    if path.exists() and (kept := torch.load(path, weights_only=True))["made_by"] == made_by: return kept["views"]
    captioner, corpus, out = load_captioner(foundation("captioner")), open_corpus(home/"corpus"), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for shard in corpus.shards:
            samples = list(corpus.read_shard(shard, size=64))
            out += [captioner.model.eval().visual(captioner.prepare([x.image for x in samples[i:i+64]]))[1].half() for i in range(0, len(samples), 64)]
    seen = torch.cat(out)
    seen = seen - seen.float().mean((0, 1)).half()
    torch.save({"made_by": made_by, "views": seen}, path)
    return seen


def learn(run, cache, asked, device, limit, every, home):
    "Train until the target or the limit; the curve: minutes, steps, share of the facts, loss."
    import numpy as np
    import torch
    from recap.blend import parse_recipe
    from recap.core import keyed_torch
    from recap.denoiser import denoise, make_denoiser
    from recap.diffusion import diffusion_loss
    from recap.fit import FitConfig, optimizers, step_indices
    from recap.train import CaptionDraw
    torch.manual_seed(SEED)
    ((side, _),) = cache.buckets
    net = make_denoiser(run.denoiser, cache.channels, side, cache.empty.shape[-1]).to(device)
    parameters = sum(p.numel() for p in net.parameters())
    whole = torch.nn.ModuleDict({"denoiser": net})
    if run.align:
        seen, kept = views(home, cache), {}
        first = net.down_blocks[0].attentions[-1]
        first.register_forward_hook(lambda m, i, o: kept.update(h=o[0] if isinstance(o, tuple) else o.sample))
        whole["view"] = torch.nn.Sequential(torch.nn.Linear(net.config.block_out_channels[0], 256), torch.nn.SiLU(), torch.nn.Linear(256, seen.shape[-1])).to(device)
    cfg = FitConfig(lr=run.lr, muon_lr=run.muon_lr, batch_size=run.batch_size, seed=SEED)
    opts, draw = optimizers(whole, cfg), CaptionDraw(parse_recipe("dsc:1"), cache, SEED)
    params, mean = list(net.parameters()), [p.detach().clone() for p in net.parameters()]
    def loss_of(indices, step):
        states, mask = (v.to(device) for v in cache.states(indices, draw(step*run.batch_size//len(cache.keys), indices)))
        x0, g = cache.x0(indices), keyed_torch(SEED, "step", step)
        noise, u = torch.randn(x0.shape, generator=g).to(device), torch.rand(len(x0), generator=g).to(device)
        said, x0 = [], x0.to(device)
        def model(x, t): said.append(denoise(net, x, t, states, mask)); return said[-1]
        loss = diffusion_loss(model, x0, noise, u, run.objective, run.snr_gamma)
        if run.contrast: loss = loss - run.contrast*(said[-1].float() - (noise - x0).roll(1, 0)).square().mean()
        if run.align:
            view = whole["view"](kept["h"].flatten(2).transpose(1, 2)).float()
            loss = loss + run.align*(1 - torch.nn.functional.cosine_similarity(view, seen[indices].float().to(device), dim=-1)).mean()
        return loss
    spent, losses, curve, early = 0., [], [], []
    for step in itertools.count():
        begun = clock(device)
        with torch.autocast(device.type, torch.bfloat16): loss = loss_of(step_indices(len(cache.keys), run.batch_size, step, SEED), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), cfg.clip)
        for o in opts:
            for g in o.param_groups: g["lr"] = g["peak"]*min(1., (step + 1)/50)
            o.step(); o.zero_grad()
        torch._foreach_lerp_(mean, [p.detach() for p in params], 1 - min(.995, (step + 1)/(step + 10)))
        losses.append(loss.item())
        spent += clock(device) - begun
        if spent < 60*every*(len(curve) + 1): continue
        pictures = look(net, params, mean, asked, run, device)
        if spent/60 >= AFTER and not any(c["minutes"] >= AFTER for c in curve): early = pictures[:SHOWN]
        curve.append({"minutes": round(spent/60, 3), "step": step + 1, "loss": round(float(np.mean(losses[-100:])), 4), **share_found(pictures, asked)})
        print(f"  {curve[-1]['minutes']:6.2f} min  step {step + 1:6}  loss {curve[-1]['loss']:.3f}  facts {curve[-1]['facts']:.3f}", flush=True)
        if curve[-1]["facts"] >= TARGET or spent/60 >= limit: return {"parameters": parameters, "curve": curve}, early


def look(net, params, mean, asked, run, device):
    "What the averaged weights paint for the prompts."
    import torch
    from recap.core import keyed_torch
    from recap.denoiser import denoise
    from recap.diffusion import guided, paint_latents
    from recap.latents import decode
    prompts, (states, mask), empty, vae, _ = asked
    now = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, mean); net.eval()
        c, side = net.config.in_channels, net.config.sample_size
        noise = torch.stack([torch.randn(c, side, side, generator=keyed_torch(i, "noise")) for i in range(len(prompts))]).to(device)
        model = guided(lambda x, t, s, m: denoise(net, x, t, s, m).float(), states.to(device), mask.to(device), empty.to(device), 5.)
        with torch.autocast(device.type, torch.bfloat16):
            z = paint_latents(model, noise, 20, "euler" if run.objective == "flow" else "ddim", run.objective)
        pictures = decode(vae, z.float())
        torch._foreach_copy_(params, now); net.train()
    return pictures


def share_found(pictures, asked):
    "Share of the prompts' facts in the pictures, with an interval, and by kind."
    import numpy as np
    from PIL import Image
    from recap.statistics import bootstrap_ratio
    prompts, *_, detector = asked
    found = detector.check([p if isinstance(p, Image.Image) else Image.fromarray(p) for p in pictures], [facts for _, facts, _ in prompts])
    right, kinds = [int(np.sum(np.asarray(p) > .5)) for p in found], {}
    for (_, facts, _), p in zip(prompts, found):
        for f, x in zip(facts, p): kinds.setdefault(f[0], []).append(float(x > .5))
    m, lo, hi = bootstrap_ratio(right, [len(facts) for _, facts, _ in prompts], list(range(len(prompts))), seed=SEED)
    return {"facts": round(float(m), 4), "lo": round(float(lo), 4), "hi": round(float(hi), 4), "kinds": {k: round(float(np.mean(v)), 3) for k, v in sorted(kinds.items())}}


def minutes_to(curve, target=TARGET):
    "Minutes at which the line through the evaluations meets the target; None if it never does."
    before = {"minutes": 0., "facts": 0.}
    for now in curve:
        if now["facts"] >= target: return round(before["minutes"] + (now["minutes"] - before["minutes"])*(target - before["facts"])/(now["facts"] - before["facts"]), 2)
        before = now


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="a slice of 64 pictures, a few seconds a run, nothing written")
    args.add_argument("--only", default="", help="names of runs")
    args.add_argument("--limit", type=float, default=LIMIT, help="minutes a run at most")
    args.add_argument("--device", default="auto")
    args.add_argument("--out", default="data/results/speedrun.json")
    args = args.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import numpy as np
    import torch
    from PIL import Image
    from recap.core import RecapError, foundation, hash_folder, pick_device, project_root, read_json, set_threads, write_json
    from recap.latents import load_vae
    from recap.runs import provenance
    from recap.scorers import Detector
    from recap.text import TextEncoder
    set_threads(1)
    device = torch.device(pick_device() if args.device == "auto" else args.device)
    names = [n.strip() for n in args.only.split(",") if n.strip()] or (["papers", "muon"] if args.quick else list(RUNS))
    if unknown := sorted(set(names) - set(RUNS)): raise RecapError(f"no run called {unknown[0]!r}: one of {', '.join(RUNS)}")
    home = Path(tempfile.mkdtemp()) if args.quick else project_root()/"runs"/"speedrun"
    limit, every = (.1, .05) if args.quick else (args.limit, EVERY)
    cache, prompts, encoders = slice_of_world(home, *((64, 6) if args.quick else (SIZE, TESTS)))
    text, vae = TextEncoder.from_pretrained(), load_vae(None, device)
    asked = (prompts, text.encode([p for p, _, _ in prompts]), text.encode([""])[0][0], vae, Detector.from_pretrained(foundation("detector")))
    slice_ = {"pictures": len(cache.keys), "prompts": len(prompts), "target": TARGET, "encoders": encoders, "detector": hash_folder(foundation("detector")),
              "ceiling": share_found([p for *_, p in prompts], asked), "guidance_scale": 5., "seed": SEED}
    file = project_root()/args.out
    pictures = file.with_suffix("")
    old = read_json(file) if file.exists() and not args.quick else {}
    runs = old.get("runs", {}) if old.get("slice") == slice_ else {}
    for name in names:
        print(f"{name}: {RUNS[name].story}", flush=True)
        done, early = learn(RUNS[name], cache, asked, device, limit, every, home)
        runs[name] = {**dataclasses.asdict(RUNS[name]), **done, "limit": limit, "minutes": minutes_to(done["curve"]), "provenance": provenance()}
        if args.quick: continue
        write_json(file, {"slice": slice_, "shown": {"prompts": [p for p, _, _ in prompts[:SHOWN]], "minutes": AFTER}, "runs": {n: runs[n] for n in RUNS if n in runs}})
        strip = np.concatenate(list(early), 1) if len(early) else np.full((64, 64*SHOWN, 3), 255, np.uint8)   # a run that ended before has none
        pictures.mkdir(exist_ok=True, parents=True); Image.fromarray(strip).save(pictures/f"{name.replace(', ', '_').replace(' ', '_')}.png")
    print(f"\n{'run':14} {'minutes to ' + format(TARGET, '.0%'):>16} {'best':>7}  what is new")
    for n in runs: print(f"{n:14} {runs[n]['minutes'] or '> ' + str(round(runs[n]['curve'][-1]['minutes'], 1)):>16} {max(c['facts'] for c in runs[n]['curve']):7.3f}  {runs[n]['story']}")
    best = min((n for n in runs if runs[n]["minutes"]), key=lambda n: runs[n]["minutes"], default=None)
    papers = next((runs[n]["minutes"] or runs[n]["curve"][-1]["minutes"] for n in ("papers",) if n in runs), None)
    say("speedrun (minutes to half of the facts, papers' over the best)", papers, best and runs[best]["minutes"], best=best, target=TARGET,
        papers_reached=bool(runs.get("papers", {}).get("minutes")), quick=args.quick)


if __name__ == "__main__": main()
