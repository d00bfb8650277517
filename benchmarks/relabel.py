"""Relabelling: what the whole pass costs beside the captioner alone, reading against webdataset, memory against the number of pictures, Ray against this process.

    python -m benchmarks.relabel [--quick] [--out data/results/relabel.json] [--pictures 10000] [--parts pass,reading,memory,ray]

pass: Sprite World at 64 px in two styles, by the foundation's captioners. One side is `relabel`: reads, decodes, captions, writes tables, counts them. The
other is the captioner alone, on the same pictures in memory, in the same batches. They take turns, 1,000 pictures each; torch has one thread.
reading: 512 px JPEG shards. One side is `relabel` with a captioner that does nothing: it reads, decodes and writes tables. The other is webdataset, which reads
and decodes, with as many processes as we have threads; its pictures come as Pillow images or as tensors, and the faster of the two counts.
memory: the peak of a process that relabels 1,000 and of one that relabels 50,000 small pictures, with the same captioner.
ray: two workers against this process, and what it takes to start them.
Times are the wall's, since overlapping is what is measured, so the machine must be quiet; processor times stand beside them.
The ratio of the last line: pictures a second of the whole pass over those of the captioner alone."""
import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import say, spread

ROOT = Path(__file__).resolve().parent.parent
STYLES, SEED, SHARD = ("ssc", "dsc"), 0, 1000
SIZES = dict(pictures=10_000, round=1000, shard=500, jpegs=1000, rounds=5, small=1000, large=50_000, ray=1000)
QUICK = dict(pictures=16, round=8, shard=4, jpegs=12, rounds=1, small=20, large=60, ray=0)


class Nothing:
    "A captioner that does nothing."
    name = "nothing"
    def caption_rows(self, images): return [dict(caption="a picture", tokens=2, logprob=0.)]*len(images)


def timed(fn):
    "What fn returns, its seconds by the wall and by this process's processor time."
    wall, work = time.perf_counter(), time.process_time()
    said = fn()
    return said, time.perf_counter() - wall, time.process_time() - work


def measure_pass(sizes, home):
    "The whole pass and the captioner alone, in turns."
    import torch
    from recap.captioners import CocaCaptioner, default_captioner
    from recap.corpus import CorpusConfig, make_world, open_corpus
    from recap.relabel import relabel
    makers = {}
    captioners = {s: makers.setdefault(default_captioner(s), CocaCaptioner(default_captioner(s), "cpu")) for s in STYLES}
    eye, rounds, seen = captioners[STYLES[0]], [], 0     # all see 64 pixels
    for i in range(max(2, sizes["pictures"]//sizes["round"])):
        make_world(CorpusConfig(n=sizes["round"], shard_size=sizes["shard"], seed=SEED + i, split="pairs", world="easy", workers=os.cpu_count()), home/f"world{i}")
        corpus = open_corpus(home/f"world{i}", home/f"out{i}")
        batches = [b for shard in corpus.shards for b in eye.model.loaded.pixels([s.image for s in corpus.read_shard(shard, eye.view[0], fit=eye.view[1])]).split(64)]
        def alone(): return {s: [r for b in batches for r in c.model.caption_rows(b, s if s in c.styles else None, 64)] for s, c in captioners.items()}
        def whole(): return relabel(corpus, captioners, STYLES)
        if not i:     # what is done once: weights, hashes, the first call of everything
            for s, c in captioners.items(): c.model.caption_rows(batches[0][:2], s if s in c.styles else None); c.hash
        order = [("alone", alone), ("whole", whole)]
        told = {name: timed(fn) for name, fn in (order if i % 2 else order[::-1])}
        same = sum(a["caption"] == b for s in STYLES for a, b in zip(told["alone"][0][s], corpus.captions(s).values(), strict=True))
        seen += sizes["round"]
        rounds.append({name: dict(wall=t[1], work=t[2]) for name, t in told.items()} | dict(same=same))
        print(f"pass, round {i + 1}: {sizes['round']/rounds[-1]['whole']['wall']:.1f} pictures a second, the captioner alone {sizes['round']/rounds[-1]['alone']['wall']:.1f}", flush=True)
    rate = {name: [sizes["round"]/r[name]["wall"] for r in rounds] for name in ("whole", "alone")}
    ratios = [w/a for w, a in zip(rate["whole"], rate["alone"])]
    return dict(pictures=seen, styles=STYLES, batch=64, threads=2, torch_threads=torch.get_num_threads(), per_second={k: spread(v) for k, v in rate.items()}, ratio=spread(ratios),
                processor=spread([r["alone"]["work"]/r["whole"]["work"] for r in rounds]), captions=2*seen, same_captions=sum(r["same"] for r in rounds))


def make_jpegs(folder, n, shard, distinct=48):
    "Shards of 512 px JPEG files with grain, as photographs have."
    import numpy as np
    from PIL import Image
    from recap.core import keyed_numpy
    from recap.corpus import pack_tar
    from recap.world import render, sample_scene
    files = []
    for i in range(min(n, distinct)):
        pixels = np.asarray(render(sample_scene(SEED, i), 512)).astype(np.int16) + keyed_numpy(SEED, "grain", i).normal(0, 8, (512, 512, 3)).astype(np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f := io.BytesIO(), "JPEG", quality=90)
        files.append(f.getvalue())
    for at in range(0, n, shard):
        pack_tar(folder/f"{at//shard:05d}.tar", ((f"{i:09d}.{kind}", data) for i in range(at, min(n, at + shard)) for kind, data in (("jpg", files[i % len(files)]), ("txt", b"a picture"))))
    return folder


def read_webdataset(folder, workers, kind):
    "Read and decode all of a folder's shards with webdataset."
    import webdataset as wds
    from torch.utils.data import DataLoader
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=wds.split_by_worker, empty_check=False).decode(kind).to_tuple("__key__", "jpg")
    return sum(len(batch) for batch in DataLoader(data, batch_size=64, num_workers=workers, collate_fn=list, prefetch_factor=2 if workers else None))


def measure_reading(sizes, home):
    "Ours with a captioner that does nothing, and webdataset, in turns."
    from recap.relabel import relabel
    folder, n = make_jpegs(home/"jpegs", sizes["jpegs"], max(2, sizes["jpegs"]//6)), sizes["jpegs"]
    speed = {}
    for i in range(sizes["rounds"]):
        for workers in (1, 2):
            jobs = {"recap": lambda: relabel(folder, Nothing(), ["dsc"], home/f"read{i}-{workers}", threads=workers)["dsc"]["images"],
                    "webdataset, Pillow": lambda: read_webdataset(folder, workers if workers > 1 else 0, "pil"), "webdataset, tensors": lambda: read_webdataset(folder, workers if workers > 1 else 0, "torchrgb8")}
            for name, job in list(jobs.items())[::1 if i % 2 else -1]:
                seen, wall, _ = timed(job)
                if seen != n: raise RuntimeError(f"{name} read {seen} of {n} pictures")
                speed.setdefault(workers, {}).setdefault(name, []).append(n/wall)
        print(f"reading, round {i + 1}: " + "; ".join(f"{w}: " + ", ".join(f"{k} {v[-1]:.0f}" for k, v in s.items()) for w, s in speed.items()), flush=True)
    def against(s):
        peer = max((k for k in s if k != "recap"), key=lambda k: statistics.median(s[k]))
        return dict(per_second={k: spread(v) for k, v in s.items()}, peer=peer, ratio=spread([a/b for a, b in zip(s["recap"], s[peer])]))
    return dict(pictures=n, side=512, workers={str(w): against(s) for w, s in speed.items()})


SMALL = '''
import json, sys
from benchmarks.relabel import Nothing
from recap.relabel import relabel
from recap.runs import peak_memory
told = relabel(sys.argv[1], Nothing(), ["dsc"], sys.argv[2])
print(json.dumps([told["dsc"]["images"], peak_memory()]))
'''

def measure_memory(sizes, home):
    "The peak of a process that relabels few and of one that relabels many."
    from PIL import Image
    from recap.corpus import pack_tar
    found = {}
    Image.effect_noise((48, 48), 60).convert("RGB").save(f := io.BytesIO(), "JPEG")
    for name in ("small", "large"):
        n, shard = sizes[name], min(SHARD, sizes["small"])
        for at in range(0, n, shard): pack_tar(home/name/f"{at//shard:05d}.tar", ((f"{i:09d}.jpg", f.getvalue()) for i in range(at, min(n, at + shard))))
        done = subprocess.run([sys.executable, "-c", SMALL, home/name, home/f"{name}-out"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        if done.returncode: raise RuntimeError(done.stderr[-2000:])
        images, peak = json.loads(done.stdout.strip().split("\n")[-1])
        if images != n: raise RuntimeError(f"{images} of {n} pictures")
        found[name] = dict(images=n, peak_mb=peak)
        print(f"memory: {n} pictures, {peak:.0f} MB", flush=True)
    return found | dict(growth=round(found["large"]["peak_mb"]/found["small"]["peak_mb"] - 1, 4))


def measure_ray(sizes, home):
    "Two workers against this process, with the foundation's captioner; what starting takes."
    from recap.corpus import CorpusConfig, make_world, open_corpus
    from recap.ray_engine import ray_session
    from recap.relabel import relabel
    n = sizes["ray"]
    if not n: return None
    make_world(CorpusConfig(n=n, shard_size=n//8, seed=SEED, split="pairs", world="easy"), home/"ray")
    where = {e: open_corpus(home/"ray", home/f"ray-{e}") for e in ("local", "ray")}
    _, here, _ = timed(lambda: relabel(where["local"], "", ["dsc"]))
    begin = time.perf_counter()
    with ray_session(2):
        started = time.perf_counter() - begin
        _, empty, _ = timed(lambda: relabel(open_corpus(home/"ray", home/"ray-nothing"), Nothing(), ["dsc"], engine="ray", workers=2))
        _, there, _ = timed(lambda: relabel(where["ray"], "", ["dsc"], engine="ray", workers=2))
    a, b = (list(c.captions("dsc").values()) for c in where.values())
    found = dict(pictures=n, workers=2, seconds=dict(start=round(started, 2), empty_pass=round(empty, 2), local=round(here, 2), ray=round(there, 2)), same=sum(x == y for x, y in zip(a, b)),
                 byte_equal=all(where["local"].column("dsc", s).read_bytes() == where["ray"].column("dsc", s).read_bytes() for s in where["local"].shards))
    print(f"ray: {found}", flush=True)
    return found


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="a few pictures, to see that all works")
    args.add_argument("--out", help="where the numbers go, as JSON")
    args.add_argument("--pictures", type=int, help="of the pass; fewer than 10,000 make the other parts smaller too")
    args.add_argument("--parts", default="pass,reading,memory,ray")
    args = args.parse_args()
    import torch
    from recap.core import write_json
    from recap.runs import provenance
    torch.set_num_threads(1)
    sizes, began, found = dict(QUICK if args.quick else SIZES), time.time(), {}
    if args.pictures: # as many for the pass, and less of the rest in proportion
        less = args.pictures/sizes["pictures"]
        sizes |= dict(pictures=args.pictures, round=min(sizes["round"], args.pictures//2), jpegs=max(96, int(less*sizes["jpegs"])), rounds=3, ray=max(200, int(less*sizes["ray"])))
        sizes["shard"] = sizes["round"]//2
    jobs = dict(memory=measure_memory, reading=measure_reading, ray=measure_ray)
    jobs["pass"] = measure_pass
    with tempfile.TemporaryDirectory() as home:
        for name in ("pass", "reading", "memory", "ray"):
            if name in args.parts.split(","): found[name] = jobs[name](sizes, Path(home))
            if args.out: write_json(args.out, dict(seed=SEED, clock="wall", **found, provenance=provenance(), seconds=round(time.time() - began, 1), complete=len(found) == 4 and not args.quick and not args.pictures))
    whole = found.get("pass")
    say("relabel", *([whole["per_second"][k]["median"] for k in ("whole", "alone")] if whole else (None, None)), unit="pictures a second", styles=len(STYLES),
        reading=found.get("reading") and found["reading"]["workers"]["2"]["ratio"]["median"], memory_growth=found.get("memory") and found["memory"]["growth"])


if __name__ == "__main__": main()
