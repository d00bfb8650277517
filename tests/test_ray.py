"What 12a_ray cannot show on a page: workers and drivers that are killed, weights in two processes, clusters that are not there."
import hashlib, os, random, secrets, shutil, signal, subprocess, sys, time
from pathlib import Path

import pyarrow.parquet as pq, pytest

pytest.importorskip("ray", reason="pip install -e '.[ray]'")
from recap.core import RecapError, project_root
from recap.corpus import CorpusConfig, make_world, open_corpus
from recap.ray_engine import ray_session
from recap.relabel import relabel

pytestmark = pytest.mark.xdist_group("ray")

# a captioner that notes in a file how many pictures it has seen, and in which process
FAKE = '''
import hashlib, os, signal, sys, time
from pathlib import Path
import numpy as np
class Fake:
    name, hash = "fake", "abc"
    def __init__(self, notes="", wait=0., victim=""): self.notes, self.wait, self.victim = notes, wait, victim
    def caption_rows(self, images):
        time.sleep(self.wait)
        if self.notes:
            with open(self.notes, "a") as f: f.write(f"{os.getpid()} {len(images)}\\n")
        if self.victim:
            try: Path(self.victim).unlink(); os.kill(os.getpid(), signal.SIGKILL)   # the first that finds the file dies
            except FileNotFoundError: pass
        texts = [hashlib.sha256(np.asarray(im).tobytes()).hexdigest()[:12] for im in images]
        return [dict(caption=f"picture {t}", tokens=len(t), logprob=-int(t[:4], 16)/100) for t in texts]
'''
DRIVER = '''
import sys
sys.path.insert(0, sys.argv[1])
from fake_captioner import Fake
from recap.ray_engine import ray_engine
from recap.relabel import relabel
print("ready", flush=True)
def engine(*how):
    work = ray_engine(*how)
    def run(wanted):
        for n in work(wanted): print("shard", flush=True); yield n
    return run
relabel(sys.argv[2], Fake(sys.argv[4], float(sys.argv[5])), ["ssc", "dsc"], sys.argv[3], batch_size=4, engine=engine, workers=2, address=sys.argv[6] if len(sys.argv) > 6 else "")
'''


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    "A module that workers can import too."
    folder = tmp_path_factory.mktemp("fake")
    (folder/"fake_captioner.py").write_text(FAKE)
    sys.path.insert(0, str(folder))
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", ""), f"{folder}{os.pathsep}{project_root()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    yield __import__("fake_captioner").Fake
    sys.path.remove(str(folder)); os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")/"corpus"
    make_world(CorpusConfig(n=30, shard_size=5, size=32), out)
    return out


@pytest.fixture(scope="module")
def whole(world, fake, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    relabel(world, fake(), ["ssc", "dsc"], out, batch_size=4)
    return tree(out)


@pytest.fixture(scope="module")
def session(fake):
    "One Ray for the tests of this file; each pass uses what it finds."
    with ray_session(2) as ray: yield ray


def tree(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"}


def spent(notes): return [tuple(map(int, line.split())) for line in Path(notes).read_text().splitlines()]


# --- before Ray is started

def test_without_ray_it_says_what_to_install(world, fake, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecapError, match="pip install") as e: relabel(world, fake(), "dsc", tmp_path, engine="ray")
    assert "\n" not in str(e.value) and not (tmp_path/"captions").exists()      # found out before anything is changed


def test_a_cluster_that_is_not_there(world, fake, tmp_path):
    import ray
    if ray.is_initialized(): pytest.skip("Ray runs already")
    with pytest.raises(RecapError, match="no Ray at") as e: relabel(world, fake(), "dsc", tmp_path, engine="ray", address="127.0.0.1:1")
    assert "\n" not in str(e.value) and not ray.is_initialized()


def test_one_author_and_one_writer_hold_for_ray_too(world, fake, tmp_path):
    relabel(world, fake(), "dsc", tmp_path)
    other = fake(); other.hash = "xyz"
    with pytest.raises(RecapError, match="hash abc -> xyz"): relabel(world, other, "dsc", tmp_path, engine="ray")
    held = subprocess.Popen([sys.executable, "-c", "import sys, time; from recap.runs import lock_folder; lock_folder(sys.argv[1]); print('held', flush=True); time.sleep(60)", tmp_path/"captions"/"dsc"],
                            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(project_root())})
    try:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(RecapError, match=str(held.pid)): relabel(world, fake(), "dsc", tmp_path, engine="ray", workers=2)
    finally: held.kill(); held.wait()


# --- with Ray

def test_a_worker_killed_in_the_middle_is_survived(world, whole, fake, session, tmp_path):
    "Its shard is done again, and nothing else; another number of workers gives the same bytes."
    victim, notes = tmp_path/"victim", tmp_path/"notes"
    victim.touch()
    relabel(world, fake(str(notes), .05, str(victim)), ["ssc", "dsc"], tmp_path/"out", batch_size=4, engine="ray", workers=2)
    assert not victim.exists() and tree(tmp_path/"out") == whole
    seen = spent(notes)
    assert len({process for process, _ in seen}) == 3 and os.getpid() not in dict(seen)     # two workers, and the one in the place of the dead
    assert 60 < sum(n for _, n in seen) <= 60 + 2*5                                          # each picture in two styles, and one shard again


def test_weights_in_two_workers(world, session, tmp_path):
    "A CoCa read from its folder in each worker says what it says here."
    from recap.captioner import captioner_config, captioner_tokenizer, make_captioner, save_captioner
    words = captioner_tokenizer(["a red cat on the left", "a large blue dog in the snow"], 100)
    config = captioner_config("tiny", words.tokenizer.get_vocab_size(), context_length=12)
    save_captioner(tmp_path/"coca", make_captioner(config), words, config, {"stage": "test"})
    made = {engine: relabel(world, str(tmp_path/"coca"), "dsc", tmp_path/engine, engine=engine, workers=1 + (engine == "ray")) for engine in ("local", "ray")}
    assert made["local"] == made["ray"]
    here, there = ([r for s in open_corpus(world).shards for r in pq.read_table(tmp_path/e/"captions"/"dsc"/f"{s}.parquet").to_pylist()] for e in ("local", "ray"))
    assert [r["caption"] for r in here] == [r["caption"] for r in there] and len(set(r["caption"] for r in here)) > 1
    assert all(abs(a["logprob"] - b["logprob"]) < 1e-4 for a, b in zip(here, there))


def test_a_mistake_in_a_worker_is_one_line(world, fake, session, tmp_path):
    class Short(fake):
        def caption_rows(self, images): return super().caption_rows(images)[1:]
    with pytest.raises(RecapError, match="4 captions for 5 images") as e: relabel(world, Short(), "dsc", tmp_path/"out", engine="ray")
    assert "\n" not in str(e.value) and list((tmp_path/"out").rglob("*.parquet")) == []


def test_files_that_are_no_pictures_are_told_to_the_driver(fake, session, tmp_path):
    from PIL import Image
    from recap.relabel import relabel_path
    (tmp_path/"in").mkdir()
    for i in range(3): Image.new("RGB", (20 + i, 20), (80*i, 0, 0)).save(tmp_path/"in"/f"{i}.png")
    (tmp_path/"in"/"gone.jpg").write_bytes(b"<!DOCTYPE html>404")
    done = relabel_path(tmp_path/"in", "dsc", tmp_path/"out", fake(), engine="ray")
    assert done["images"] == 3 and [(s["file_name"], s["reason"]) for s in done["skipped"]] == [("gone.jpg", "HTML page")]


# --- the driver

def driver(folder, world, out, notes, wait, address=""):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}{os.pathsep}{project_root()}"}
    return subprocess.Popen([sys.executable, "-c", DRIVER, folder, world, out, notes, str(wait), *([address] if address else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.slow
def test_22_killed_ten_times(world, whole, fake, tmp_path):
    "Nothing half-written has a table's name; the rerun gives the uninterrupted bytes; each kill costs a shard a worker at most."
    rng, folder, notes, kills, passes, i = random.Random(0), Path(sys.modules["fake_captioner"].__file__).parent, tmp_path/"notes", 0, 1, 0
    notes.touch(); (tmp_path/"other").touch()
    begin = time.monotonic()
    assert driver(folder, world, tmp_path/"timed", tmp_path/"other", .1).wait(600) == 0
    span = time.monotonic() - begin                                              # of a whole pass, on this machine
    while kills < 10:
        process, i = driver(folder, world, tmp_path/"out", notes, .1), i + 1
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        if i % 2: time.sleep(rng.uniform(0, span))                              # anywhere, also while Ray starts
        else: process.stdout.readline(); time.sleep(rng.uniform(0, .4))         # after a shard
        if process.poll() is None: process.kill(); kills += 1
        process.wait()
        for table in (tmp_path/"out").rglob("[0-9]*.parquet"): assert pq.read_table(table).num_rows == 5
        if process.returncode == 0: assert tree(tmp_path/"out") == whole; shutil.rmtree(tmp_path/"out"); passes += 1   # it came first: the next one begins anew
        assert i < 60, "hardly any kill hits a pass at work"
    last = driver(folder, world, tmp_path/"out", notes, 0)
    assert last.wait(600) == 0, last.stderr.read()[-2000:]
    assert tree(tmp_path/"out") == whole
    assert sum(n for _, n in spent(notes)) <= 60*passes + kills*2*10


@pytest.mark.slow
def test_a_cluster_that_runs_already(world, whole, fake, tmp_path, monkeypatch):
    "Started as the page says, joined by its address, left running."
    folder, binary = Path(sys.modules["fake_captioner"].__file__).parent, Path(sys.executable).parent/"ray"
    monkeypatch.setenv("RAY_AUTH_MODE", "token"); monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))     # of this test's own cluster
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": f"{folder}{os.pathsep}{project_root()}"}
    head = subprocess.Popen([binary, "start", "--head", "--block", "--port=0", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=4", "--disable-usage-stats"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        address = next(line.split("'")[1] for line in head.stdout if "--address='" in line)
        done = driver(folder, world, tmp_path/"out", tmp_path/"notes", 0, address)
        assert done.wait(600) == 0, done.stderr.read()[-2000:]
        assert tree(tmp_path/"out") == whole and head.poll() is None
    finally: head.send_signal(signal.SIGTERM); head.wait(60)
