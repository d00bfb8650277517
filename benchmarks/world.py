"""Sprite World: pictures a second by size, slice of the world and number of processes, and the minutes of a corpus of 10,000.

    python -m benchmarks.world [--quick]

Each number is the median of repeats over scenes that differ from repeat to repeat. --quick draws fewer pictures, and reckons the
corpus from 300 of them. The limit is 4 ms for a picture of the whole world at 64 pixels on one core."""
import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import say
from recap.corpus import CorpusConfig, make_world
from recap.world import WORLDS, render, sample_scene, visible_scene

LIMIT = 4.0  # ms a picture of the whole world at 64 pixels, one core
WORK = {"render": render, "truth": visible_scene}


def paint(job):
    "Do one kind of work on some scenes of a world, scenes and all."
    kind, world, size, first, n = job
    for i in range(first, first + n): WORK[kind](sample_scene(0, i, WORLDS[world]), size)


def per_second(kind, world, size, processes, n, repeats, pool):
    "Median of pictures a second."
    found = []
    for k in range(repeats):
        first, share = 1000 + k*n, n//processes
        jobs = [(kind, world, size, first + p*share, share) for p in range(processes)]
        start = time.perf_counter()
        if processes == 1: paint(jobs[0])
        else: pool.map(paint, jobs, chunksize=1)
        found.append(share*processes/(time.perf_counter() - start))
    return statistics.median(found)


def corpus_minutes(n, world, workers):
    "Minutes of `recap world make --n 10000 --size 64`, reckoned from n pictures where that is less."
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_world(CorpusConfig(n=n, size=64, world=world, workers=workers), Path(folder)/"corpus")
        return (time.perf_counter() - start)/60*10_000/n


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true")
    args = args.parse_args()
    repeats, n = (3, 40) if args.quick else (5, 200)
    table = {}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(paint, [("render", w, 64, 0, 30) for w in ("easy", "whole")]*2)   # sprites are read and painted once
        paint(("render", "whole", 64, 0, 60))
        print(f"{'work':8} {'world':7} {'pixels':>6} {'processes':>9} {'a second':>9} {'ms each':>8}")
        for kind, sizes in (("render", (64, 128, 256)), ("truth", (64,))):
            for world in ("easy", "whole"):
                for size in sizes:
                    for processes in (1, 2):
                        rate = per_second(kind, world, size, processes, n, repeats, pool)
                        table[f"{kind} {world} {size} px, {processes} process{'es' if processes > 1 else ''}"] = round(rate, 1)
                        print(f"{kind:8} {world:7} {size:6} {processes:9} {rate:9.1f} {1000*processes/rate:8.2f}")
    minutes = {w: round(corpus_minutes(300 if args.quick else 10_000, w, 2), 2) for w in ("easy", "whole")}
    for w, m in minutes.items(): print(f"corpus of 10,000 pictures of the {w} world on 2 processes: {m:.2f} minutes{' (reckoned)' if args.quick else ''}")
    ours = table["render whole 64 px, 1 process"]
    say("world (pictures/s, whole, 64 px)", ours, share_of_limit=round(1000/ours/LIMIT, 3), per_second=table, corpus_minutes=minutes,
        quick=args.quick, repeats=repeats, limit_ms=LIMIT)


if __name__ == "__main__": main()
