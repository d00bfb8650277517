"""Votes through HTTP: eight programs at once that misbehave, a server that is killed three times, and a comparison of every list at the end.

    python -m benchmarks.vote [--quick] [--out data/results/vote.json] [--votes 1000] [--raters 8] [--kills 3]

Each program keeps its own list of what the server acknowledged. It sends some answers twice, hangs up before some replies, takes some
answers back and then sends the old vote again, and sends what is no vote. `lost`: acknowledged and not in the file, or in it with another
answer; `twice`: in the file and not acknowledged, or there more than once. The seconds are those of one acknowledged vote, with the next
task in the reply, on whatever else the machine does. The last line: votes a second. The raters are programs, and the file says so.

    python -m benchmarks.vote --picture data/results/vote.jpg

takes the picture of the page instead, in a headless Chromium: desk, phone, dark."""
import argparse
import http.client
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import say

ROOT = Path(__file__).resolve().parent.parent
SERVER = """
import sys; sys.path.insert(0, {root!r})
from benchmarks.vote import study_of
from recap.vote import serve
serve(study_of({box!r}, {pairs}), {db!r}, {raters}, port={port})
"""


def study_of(box, pairs, size=24):
    "Plain squares of three painters; made once."
    from PIL import Image
    from recap.vote import pair_study
    box = Path(box)
    for k, name in enumerate(("first", "second", "third")):
        if (box/name).is_dir(): continue
        (box/name).mkdir(parents=True)
        for i in range(pairs): Image.new("RGB", (size, size), (80*k, i % 256, i//256)).save(box/name/f"{i:05d}_0.png")
        (box/name/"prompts.jsonl").write_text("".join(json.dumps(dict(index=i, prompt=f"square {i}")) + "\n" for i in range(pairs)))
    return pair_study({n: box/n for n in ("first", "second", "third")}, seed=3, per_pair=4)


class Server:
    "The server as a process of its own, that can be killed."
    def __init__(self, box, pairs, raters):
        self.box, self.pairs, self.raters = Path(box), pairs, raters
        with socket.create_server(("127.0.0.1", 0)) as s: self.port = s.getsockname()[1]
    def start(self):
        code = SERVER.format(root=str(ROOT), box=str(self.box), pairs=self.pairs, db=str(self.box/"votes.db"), raters=self.raters, port=self.port)
        self.process, self.links = subprocess.Popen([sys.executable, "-u", "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True), []
        for _ in range(self.raters): self.links.append(self.process.stdout.readline().strip().rpartition("=")[2])
        if not all(self.links): raise SystemExit("the server did not start")
        return self
    def kill(self): self.process.send_signal(signal.SIGKILL); self.process.wait()
    def stop(self): self.process.terminate(); self.process.wait()


class Rater(threading.Thread):
    "A program that votes and misbehaves."
    def __init__(self, port, token, seed, wanted):
        super().__init__(daemon=True)
        self.port, self.token, self.rng, self.wanted = port, token, random.Random(seed), wanted
        self.acknowledged, self.old, self.requests, self.seconds, self.wrong, self.bad = {}, [], 0, [], [], 0

    def post(self, path, body, hang_up=False, tries=60):
        "Status and reply; sent again until there is one."
        for _ in range(tries):
            self.requests += 1
            try:
                c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                c.request("POST", path, json.dumps(body) if isinstance(body, dict) else body, {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"})
                if hang_up: hang_up = False; c.close(); continue       # the answer may have arrived: send it again
                r = c.getresponse(); told = json.loads(r.read()); c.close()
                if r.status < 500: return r.status, told
            except (OSError, http.client.HTTPException, ValueError): time.sleep(.1)
        raise RuntimeError("no server")

    def run(self):
        try: self.go()
        except Exception as e: self.wrong.append(f"{type(e).__name__}: {e}")

    def expect(self, status, *wanted):
        if status not in wanted: self.wrong.append(f"status {status}, expected {wanted}")

    def go(self):
        status, state = self.post("/api/state", {}); self.expect(status, 200)
        while state["tasks"] and len(self.acknowledged) < self.wanted:
            t, luck = state["tasks"][0], self.rng.random()
            body = dict(id=t["id"], turn=t["turn"], answer=self.rng.choice(("left", "right", "tie")))
            begin = time.perf_counter()
            status, told = self.post("/api/vote", body, hang_up=luck < .1); self.expect(status, 200)
            if luck >= .1: self.seconds.append(time.perf_counter() - begin)
            self.acknowledged[t["id"]] = body["answer"]
            if told["done"] != len(self.acknowledged): self.wrong.append(f"{told['done']} done, {len(self.acknowledged)} acknowledged")
            if .1 <= luck < .2: self.expect(self.post("/api/vote", body)[0], 200)                                         # sent twice
            if .2 <= luck < .25: self.expect(self.post("/api/vote", body | dict(answer="left" if body["answer"] != "left" else "tie"))[0], 409)
            if .25 <= luck < .3:                                                                                          # taken back, then a late copy of it
                status, told = self.post("/api/undo", told["undo"], hang_up=luck < .27); self.expect(status, 200)
                del self.acknowledged[t["id"]]; self.old.append(body)
                self.expect(self.post("/api/vote", body)[0], 409)
            if .3 <= luck < .35 and self.old: self.expect(self.post("/api/vote", self.rng.choice(self.old))[0], 409)
            if .35 <= luck < .4: self.expect(self.post("/api/vote", self.rng.choice(('{"id":', "[" * 3000, '{"id": 1e999}', json.dumps(body | dict(system="first")), json.dumps(body | dict(answer="'; DROP TABLE answers"))))) [0], 400, 422); self.bad += 1
            if .4 <= luck < .43: self.expect(self.post("/api/vote", dict(id=self.rng.randrange(10**6, 10**9), turn=0, answer="left"))[0], 404); self.bad += 1
            state = told


def thousand(box, votes, raters, kills):
    "Let the programs vote; compare their lists with the file."
    from recap.vote import votes_of
    pairs = -(-votes//(3*4))
    study_of(box, pairs)
    server = Server(box, pairs, raters).start()
    voting = [Rater(server.port, token, k, 10**9) for k, token in enumerate(server.links)]
    for r in voting: r.start()
    begin, killed = time.perf_counter(), 0
    while any(r.is_alive() for r in voting):
        time.sleep(.05)
        if killed < kills and sum(len(r.acknowledged) for r in voting) > (killed + 1)*votes//(kills + 2): server.kill(); killed += 1; links = server.links; server.start(); assert server.links == links
    seconds = time.perf_counter() - begin
    server.stop()
    acknowledged, kept, lost, twice = {i: a for r in voting for i, a in r.acknowledged.items()}, votes_by_task(Path(box)/"votes.db"), 0, 0
    for i, a in acknowledged.items(): lost += kept.get(i, [None])[0] != a
    for i, found in kept.items(): twice += len(found) - (i in acknowledged)
    real = [v for v in votes_of(Path(box)/"votes.db") if not v["check"]]
    by_pair = {}
    for v in real: by_pair.setdefault(v["task"], []).append(v["rater"])
    times = sorted(t for r in voting for t in r.seconds)
    return dict(simulated=True, raters=raters, votes=len(real), checks=sum(map(len, kept.values())) - len(real), requests=sum(r.requests for r in voting), refused=sum(r.bad for r in voting), taken_back=sum(len(r.old) for r in voting),
                killed=killed, lost=lost, twice=twice, wrong=[w for r in voting for w in r.wrong][:5], raters_a_pair=sorted({len(r) for r in by_pair.values()}), same_rater_twice=sum(len(r) - len(set(r)) for r in by_pair.values()),
                seconds=round(seconds, 2), seconds_median=round(statistics.median(times), 4), seconds_most=round(times[-1], 3))


def votes_by_task(db):
    "What the file holds: shown -> the answers that stand."
    import sqlite3
    found, c = {}, sqlite3.connect(db)
    for shown, answer in c.execute("SELECT shown, answer FROM answers WHERE undone IS NULL ORDER BY id"): found.setdefault(shown, []).append(answer)
    c.close()
    return found


FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()

def picture(out):
    "The page on a desk, in the dark and on a phone, in one JPEG."
    import io
    from PIL import Image
    from playwright.sync_api import sync_playwright
    from recap.core import atomic_write, keyed_rng
    from recap.language import descriptive_caption
    from recap.scorers import change_one
    from recap.vote import pair_study, serve
    from recap.world import render, scenes_of, visible_scene
    with tempfile.TemporaryDirectory() as box, sync_playwright() as p:
        box, scenes = Path(box), [s for s in scenes_of("whole", 200, 11, "test") if len(s.things) == 2 and (s.style, s.weather) == ("flat", "day")][:8]
        for name, of in (("one", lambda s: s), ("two", lambda s: change_one(s, keyed_rng(2, name), "colour") or s)):
            (box/name).mkdir()
            for i, s in enumerate(scenes): render(of(s), 512).save(box/name/f"{i:05d}_0.png")
            (box/name/"prompts.jsonl").write_text("".join(json.dumps(dict(index=i, prompt=descriptive_caption(visible_scene(s, 256), keyed_rng(0, "p", i), "people"))) + "\n" for i, s in enumerate(scenes)))
        told, study = [], pair_study({n: box/n for n in ("one", "two")}, seed=3, every=0)
        with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
        threading.Thread(target=serve, args=(study, box/"votes.db", 1), kwargs=dict(port=port, show=told.append), daemon=True).start()
        while not told: time.sleep(.05)
        browser, shots, link = p.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS), [], told[0].split(": ", 1)[1]
        for size, scheme, touch in (((1100, 720), "light", False), ((1100, 720), "dark", False), ((360, 720), "light", True)):
            page = browser.new_context(viewport=dict(zip(("width", "height"), size)), color_scheme=scheme, has_touch=touch, is_mobile=touch).new_page()
            page.goto(link)
            page.wait_for_selector("body:not([data-view=wait])")
            if page.get_attribute("body", "data-view") == "intro":
                page.keyboard.press("Enter")
                for n in range(3):   # some progress to be seen
                    page.wait_for_selector("body[data-ready]"); before = page.get_attribute("body", "data-ready"); page.wait_for_timeout(350); page.keyboard.press("ArrowLeft"); page.wait_for_function("b => document.body.dataset.ready != b", arg=before)
            page.wait_for_selector("body[data-ready]"); page.wait_for_timeout(300)
            shots.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        browser.close()
    light, dark, phone = shots
    scale = lambda im, h: im.resize((round(im.width*h/im.height), h), Image.Resampling.LANCZOS)
    half = [scale(im, 354) for im in (light, dark)]
    sheet = Image.new("RGB", (half[0].width + 12 + 360, 720), "#8a8f98")
    for im, at in ((half[0], (0, 0)), (half[1], (0, 366)), (phone, (half[0].width + 12, 0))): sheet.paste(im, at)
    sheet = scale(sheet, 560)   # what a page of the book can carry
    with atomic_write(out) as f: sheet.save(f, "JPEG", quality=60, optimize=True)


def main():
    p = argparse.ArgumentParser(prog="python -m benchmarks.vote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true"); p.add_argument("--out", type=Path); p.add_argument("--picture", type=Path)
    p.add_argument("--votes", type=int, default=1000); p.add_argument("--raters", type=int, default=8); p.add_argument("--kills", type=int, default=3)
    a = p.parse_args()
    from recap.core import write_json
    from recap.runs import provenance
    if a.picture: return picture(a.picture)
    if a.quick: a.votes, a.raters, a.kills = 60, 4, 1
    with tempfile.TemporaryDirectory() as box: found = thousand(Path(box), a.votes, a.raters, a.kills)
    if a.out: write_json(a.out, found | dict(seed=3, provenance=provenance()))
    say("vote", round(found["votes"]/found["seconds"], 1), lost=found["lost"], twice=found["twice"], votes=found["votes"], raters=found["raters"])


if __name__ == "__main__": sys.exit(main())
