"""Five captioners side by side: the base, SSC and DSC as two tunes, and RECAP's single captioner with its two prefixes.

    python -m benchmarks.finetune [--quick] [--captioner FOLDER] [--steps N] [--out data/results/finetune.json]

SSC and DSC learn as the cpu study has them (scales/cpu/tune_*.yaml); RECAP's captioner learns from 100 written pairs, half short and half
long, in 300 steps of 64 with dropout 0.1, once at the paper's rate and once at one that suits a captioner as small as ours. Then all of them
caption the same twelve held-back pictures, and scenes of each world that none has seen, whose facts are counted."""
import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks import say
from recap.caption_eval import share_interval
from recap.captioner import caption_loss, load_captioner, scene_pool
from recap.core import foundation, hash_folder, project_root, set_threads, write_json
from recap.corpus import CorpusConfig, make_world
from recap.finetune import FinetuneConfig, as_pixels, check_pairs, gather, hold_back, read_pairs, style_measures, style_words, tune, write
from recap.reader import compare
from recap.runs import git_revision, machine
from recap.study import read_stage
from recap.world import facts_of

RECAP = dict(corpus="written", style="short,long", pairs=100, held_out=60, steps=300, batch_size=64, muon_lr=0., dropout=.1)
LOOKS = (0, 10, 20, 40, 80, 150, 225, 300)   # steps at which a captioner is looked at, of those it takes


def round_all(x):
    return {k: round_all(v) for k, v in x.items()} if isinstance(x, dict) else [round_all(v) for v in x] if isinstance(x, list) else float(f"{x:.4g}") if isinstance(x, float) else x


def arm(base, cfg, seed, seen):
    "One tune, looked at on the way; what it writes is measured on the same held-back pictures."
    learn, held, notes = gather(cfg, base, seed)
    held = check_pairs(held, base.words, base.model.text.context_length - 8)[0]
    looks, began, away = [], time.time(), [0.]
    marks = {s: style_words(learn.of(s).captions, seen["plain"]) for s in cfg.styles}

    def look(step, loaded):
        start = time.time()
        for s in cfg.styles:
            mine = held.of(s)
            mine = mine.take(range(min(40, len(mine))))
            loss = caption_loss(loaded, mine.pixels, mine.captions, prefixes=[cfg.prefixes[s]]*len(mine) if cfg.prefixes else None)
            looks.append({"step": step, "style": s, "loss": loss, **style_measures(write(loaded, seen["pixels"], s), marks[s])})
        away[0] += time.time() - start

    tuned, curve = tune(base, learn, cfg, seed=seed, watch=lambda step, loaded: look(step, loaded) if step in LOOKS else None, every=1)
    look(cfg.steps, tuned)
    given = {s: style_measures(learn.of(s).captions, marks[s]) for s in cfg.styles}
    return tuned, dict(pairs={s: len(learn.of(s)) for s in cfg.styles}, notes=notes, parameters=cfg.to_dict() | {"corpus": Path(cfg.corpus).name}, curve=curve[::5], looks=looks, given=given,
                       marks={s: sorted(m) for s, m in marks.items()}, seconds=round(time.time() - began - away[0], 1))


def side_by_side(captioner=None, steps=0, scenes=60, seed=0):
    "Everything that the file holds."
    source = Path(captioner) if captioner else foundation("captioner")
    base, began = load_captioner(source), time.time()
    world = {k: v for k, v in read_stage("cpu", "pairs")[1].items() if k not in ("out", "threads")}
    folder = project_root()/"runs/finetune/pairs"
    make_world(CorpusConfig.from_dict(world), folder, overwrite=True)
    cut = {"steps": steps} if steps else {}
    study = {s: FinetuneConfig.from_dict({k: v for k, v in read_stage("cpu", f"tune_{s}")[1].items() if k not in ("out", "seed", "threads", "save_every")} | {"corpus": str(folder)} | cut) for s in ("ssc", "dsc")}
    _, held = hold_back(read_pairs("written", "short,long", base.pixels), RECAP["held_out"], seed)
    twelve, held = held.of("short").take(range(12)), held.of("short")
    seen = {"pixels": held.pixels[:24], "plain": write(base, held.pixels)}
    arms, told = {}, {"base": (base, "")}
    for name, cfg in (study | {"recap": FinetuneConfig(**RECAP | cut, lr=4e-4), "recap at the paper's rate": FinetuneConfig(**RECAP | cut, lr=4e-5)}).items():
        tuned, arms[name] = arm(base, cfg, seed, seen)
        told |= {name: (tuned, cfg.style)} if len(cfg.styles) == 1 else {f"{name} {s}": (tuned, s) for s in cfg.styles}
        print(f"{name}: {arms[name]['seconds']} s", flush=True)
    worlds = {}
    for w in ("easy", "middle", "whole"):
        truth, pictures = scene_pool(scenes, w, seed + 7, "test", base.image_size)
        truth, pixels = [facts_of(t) for t in truth], as_pixels(pictures, base.image_size)
        worlds[w] = {name: shares(write(loaded, pixels, s), truth) for name, (loaded, s) in told.items()}
    return dict(captioner=dict(hash=hash_folder(source), parameters=sum(p.numel() for p in base.model.parameters()), world=base.manifest.get("params", {}).get("world", "")),
                machine=machine(), revision=git_revision(), seed=seed, seconds=round(time.time() - began, 1), scenes=scenes, arms=arms, worlds=worlds,
                twelve=dict(keys=twelve.keys, captions={name: write(loaded, twelve.pixels, s) for name, (loaded, s) in told.items()}))


def shares(captions, truth):
    "Coverage and hallucination with their intervals, and the manner."
    read = [compare(c, t) for c, t in zip(captions, truth, strict=True)]
    told, missed, invented = (np.array([len(getattr(r, k)) for r in read]) for k in ("told", "missed", "invented"))
    return dict(coverage=share_interval(told, told + missed), hallucination=share_interval(invented, told + invented), **style_measures(captions))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--captioner", default="")
    ap.add_argument("--out", default="")
    ap.add_argument("--steps", type=int, default=0, help="of every tune; 0: what the study and RECAP have")
    given = ap.parse_args()
    set_threads()
    found = round_all(side_by_side(given.captioner, *((6, 8) if given.quick else (given.steps,))))
    if given.out: write_json(given.out, found)
    last = {r["style"]: r["words"] for r in found["arms"]["recap"]["looks"][-2:]}
    say("words a caption: RECAP's captioner, long against short", last["long"], last["short"], seconds=found["seconds"], quick=given.quick, captioner=found["captioner"]["hash"])


if __name__ == "__main__": main()
