"What 12_relabel cannot show on a page: kills, full disks, second processes, servers that are slow, a captioner's weights, whole folders."
import hashlib, json, os, random, signal, subprocess, sys, threading, time
from pathlib import Path

import pyarrow.parquet as pq, pytest
from PIL import Image

from recap.core import RecapError, project_root
from recap.corpus import CorpusConfig, make_world, open_corpus
from recap.relabel import NOT_ANSWERED, relabel, relabel_path, summary
from recap.servers import Loopback, ServerConfig

REAL = Path(os.environ["RECAP_REAL"]) if os.environ.get("RECAP_REAL") else None
real = pytest.mark.skipif(REAL is None, reason="RECAP_REAL names no folder of real files")

# a captioner in a module of its own, for this process and for those that are killed
FAKE = '''
import hashlib, os, signal, sys, time
from pathlib import Path
import numpy as np
class Fake:
    name, hash, wait, seen, notes = "fake", "abc", 0.0, 0, ""
    def caption_rows(self, images):
        time.sleep(self.wait)
        self.seen += len(images)
        if self.notes:
            with open(self.notes, "a") as f: f.write(f"{len(images)}\\n")
        texts = [hashlib.sha256(np.asarray(im).tobytes()).hexdigest()[:12] for im in images]
        return [dict(caption=f"picture {t}", tokens=len(t), logprob=-int(t[:4], 16)/100) for t in texts]
if __name__ == "__main__":
    from recap.relabel import relabel
    path, out, wait, kill_at, Fake.notes = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    writes, replace = [0], os.replace
    def counted(*args):
        writes[0] += 1
        if writes[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)       # written, not yet in place
        replace(*args)
        if writes[0] == -kill_at: os.kill(os.getpid(), signal.SIGKILL)      # in place, nothing after it
    os.replace = counted
    Fake.wait = wait
    print("ready", flush=True)
    relabel(path, Fake(), ["ssc", "dsc"], out, batch_size=4)
'''
space = {}
exec(FAKE.replace('__name__ == "__main__"', "False"), space)
Fake = space["Fake"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")/"corpus"
    make_world(CorpusConfig(n=30, shard_size=5, size=32), out)
    return out


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    "Start the fake captioner's pass in a process of its own."
    script = tmp_path_factory.mktemp("child")/"fake.py"
    script.write_text(FAKE)
    def start(path, out, wait=0.0, kill_at=0, notes=""):
        env = os.environ | {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, script, path, out, str(wait), str(kill_at), str(notes)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process
    return start


def tree(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    relabel(world, Fake(), ["ssc", "dsc"], out, batch_size=4)
    return tree(out)


# --- kills

def killed_often(world, whole, child, tmp_path, kills, wait, seed):
    "Kill the pass so many times, let it end: the bytes of an uninterrupted one, nothing half-written, a shard (and a batch) lost a kill."
    rng, out, notes, killed = random.Random(seed), tmp_path/"out", tmp_path/"notes", 0
    tmp_path.mkdir(exist_ok=True); notes.touch()
    for _ in range(kills):
        if tree(out) == whole: break
        process, before = child(world, out, wait, 0, notes), notes.stat().st_size
        while notes.stat().st_size == before and process.poll() is None: time.sleep(.005)     # it is at work
        time.sleep(rng.uniform(0, 3*wait))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        for table in out.rglob("[0-9]*.parquet"): assert pq.read_table(table).num_rows == 5
    assert child(world, out, 0, 0, notes).wait() == 0
    assert tree(out) == whole
    asked = sum(map(int, notes.read_text().split()))
    assert killed >= kills/2 and 60 < asked <= 60 + killed*2*(5 + 4)      # two styles, shards of 5, batches of 4
    return killed


def test_killed_at_random_moments(world, whole, child, tmp_path): killed_often(world, whole, child, tmp_path, 3, .1, 0)


@pytest.mark.slow
def test_killed_thirty_times(world, whole, child, tmp_path):
    for i in range(6): killed_often(world, whole, child, tmp_path/str(i), 5, .1, i + 1)


@pytest.mark.parametrize("kill_at", [1, -1, 3, -4, 8, -14])
def test_killed_at_a_write(world, whole, child, tmp_path, kill_at):
    assert child(world, tmp_path, kill_at=kill_at).wait() == -signal.SIGKILL
    for table in tmp_path.rglob("*.parquet"):
        if not table.name.startswith("."): pq.read_table(table)   # whole, or not there
    relabel(world, Fake(), ["ssc", "dsc"], tmp_path, batch_size=4)
    assert tree(tmp_path) == whole


def test_what_is_finished_is_not_asked_for_again(world, tmp_path):
    first = Fake()
    relabel(world, first, "dsc", tmp_path)
    assert first.seen == 30
    (tmp_path/"captions"/"dsc"/"00002.parquet").unlink()
    again = Fake()
    relabel(world, again, "dsc", tmp_path)
    assert again.seen == 5


@pytest.mark.parametrize("how", [dict(threads=0), dict(threads=1), dict(threads=7)])
def test_28_the_number_of_threads_changes_nothing(world, whole, tmp_path, how):
    relabel(world, Fake(), ["ssc", "dsc"], tmp_path, batch_size=4, **how)
    assert tree(tmp_path) == whole


def test_a_batch_is_the_same_whatever_else_is_wanted(world, tmp_path):
    "Sums depend on what else is in a batch: it is cut within its shard, and by no other shard's gaps."
    class Sees(Fake):
        def caption_rows(self, images):
            self.batches = getattr(self, "batches", []) + [tuple(hashlib.sha256(im.tobytes()).hexdigest() for im in images)]
            return super().caption_rows(images)
    first, again = Sees(), Sees()
    relabel(world, first, "dsc", tmp_path, batch_size=3)
    for s in ("00001", "00004"): (tmp_path/"captions"/"dsc"/f"{s}.parquet").unlink()
    relabel(world, again, "dsc", tmp_path, batch_size=3)
    assert [len(b) for b in first.batches] == [3, 2]*6 and again.batches == first.batches[2:4] + first.batches[8:10]


def test_what_one_sees_does_not_depend_on_the_other(world, tmp_path):
    "Two captioners with eyes of different sizes, together or one after the other."
    def pair(): small, large = Fake(), Fake(); small.view, large.view = (8, "crop"), (16, "squash"); return {"ssc": small, "dsc": large}
    relabel(world, pair(), ["ssc", "dsc"], tmp_path/"together")
    for style in ("ssc", "dsc"): relabel(world, pair(), [style], tmp_path/"apart")
    assert tree(tmp_path/"together") == tree(tmp_path/"apart")
    assert len({p.read_bytes() for p in (tmp_path/"apart").rglob("00000.parquet")}) == 2


# --- disks that are full

@pytest.mark.parametrize("when", [3, 6])
def test_24_disk_full(world, whole, tmp_path, monkeypatch, when):
    "One line that names the file; what was finished stays and is whole; with room again the rerun ends as if nothing had been."
    import errno
    fsync, calls = os.fsync, [0]
    def full(fd):
        calls[0] += 1
        if calls[0] >= when: raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecapError, match="disk full while writing") as e: relabel(world, Fake(), ["ssc", "dsc"], tmp_path, batch_size=4)
    assert "\n" not in str(e.value) and list(tmp_path.rglob("*.tmp")) == []
    tables = [t for t in tmp_path.rglob("[0-9]*.parquet") if pq.read_table(t).num_rows == 5]
    assert len(tables) == when - 3            # two manifests were written before the first table
    monkeypatch.undo()
    again = Fake()
    relabel(world, again, ["ssc", "dsc"], tmp_path, batch_size=4)
    assert tree(tmp_path) == whole and again.seen == 5*(12 - len(tables))


def test_24_a_limit_on_files_held_by_the_system(world, tmp_path):
    "The kernel itself refuses to write more than so many bytes into a file."
    code = ("import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
            + FAKE.replace('__name__ == "__main__"', "False") + "\nfrom recap.relabel import relabel\nrelabel(sys.argv[1], Fake(), 'dsc', sys.argv[2])")
    done = subprocess.run([sys.executable, "-c", code, world, tmp_path], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "File too large" in done.stderr
    assert list(tmp_path.rglob("*.tmp")) == list(tmp_path.rglob("[0-9]*.parquet")) == []
    assert relabel(world, Fake(), "dsc", tmp_path)["dsc"]["complete"]


# --- servers

def number(body): return int(hashlib.sha256(body["messages"][0]["content"][0]["image_url"]["url"].encode()).hexdigest()[:8], 16)


def test_a_server_is_never_without_requests(world, tmp_path):
    "No barrier at the end of a batch or of a shard: the next requests start while the slowest answer of the last batch is waited for."
    under_way, most, begun, late, lock = [0], [0], [], [], threading.Lock()
    def answer(body, n):
        with lock: under_way[0] += 1; most[0] = max(most[0], under_way[0]); begun.append(n); early = n == 0
        if early: deadline = time.time() + 10
        while early and len(begun) < 7 and time.time() < deadline: time.sleep(.005)      # the first answer waits for the seventh request, in another batch and another shard
        if early: late.append(len(begun))
        time.sleep(.01)
        with lock: under_way[0] -= 1
        return f"picture number {number(body)} of the world"
    with Loopback(answer) as server:
        told = relabel(world, ServerConfig(server.url, "toy", cache="", concurrency=4), ["dsc"], tmp_path/"out", batch_size=4)["dsc"]
        assert late[0] >= 7 and 2 <= most[0] <= 4 and told["images"] == 30
        server.answer = lambda body, n: f"picture number {number(body)} of the world"
        relabel(world, ServerConfig(server.url, "toy", cache="", concurrency=1), ["dsc"], tmp_path/"one", batch_size=4)
    assert {k: v for k, v in tree(tmp_path/"out").items()} == tree(tmp_path/"one")         # the order is the corpus's, whoever answers first


def test_two_styles_share_a_servers_places(world, tmp_path):
    under_way, most, lock = [0], [0], threading.Lock()
    def answer(body, n):
        with lock: under_way[0] += 1; most[0] = max(most[0], under_way[0])
        time.sleep(.005)
        with lock: under_way[0] -= 1
        return f"{body['messages'][0]['content'][1]['text'][:20]} {number(body)}"
    with Loopback(answer) as server: told = relabel(world, ServerConfig(server.url, "toy", cache="", concurrency=3), ["ssc", "dsc"], tmp_path, batch_size=4)
    assert most[0] <= 3 and {s: m["images"] for s, m in told.items()} == {"ssc": 30, "dsc": 30} and len(server.requests) == 60
    corpus = open_corpus(world, tmp_path/"captions")
    assert all(corpus.captions("ssc")[k] != corpus.captions("dsc")[k] for k in corpus.captions("ssc"))


def test_34_and_retry_failed(world, whole, tmp_path):
    "What failed is asked again by the next run, what was refused only if asked for; good rows are neither asked nor paid for again, though no reply is kept."
    moods = [lambda n: (400, {}, b'{"error": {"message": "no"}}') if n in (3, 11) else Loopback.reply(None, refusal="I can't.") if n == 7 else Loopback.reply("cut in the", "length") if n == 20 else None, lambda n: None]
    mood = [moods[0]]
    def answer(body, n): return mood[0](n) or f"picture number {number(body)} of the world"
    with Loopback(answer) as server:
        def run(out=tmp_path/"out", **how):
            before = len(server.requests)
            told = relabel(world, ServerConfig(server.url, "toy", cache="", concurrency=1), ["dsc"], out, batch_size=4, **how)["dsc"]
            return told["flags"], told["failures"], told["complete"], told["images"], len(server.requests) - before
        assert run() == ({"failed": 2, "refusal": 1, "cut": 1}, {NOT_ANSWERED: 2}, False, 30, 30)
        mood[0] = moods[1]
        assert run() == ({"refusal": 1, "cut": 1}, {}, True, 30, 2)
        assert run() == ({"refusal": 1, "cut": 1}, {}, True, 30, 0)
        assert run(retry_failed=True) == ({}, {}, True, 30, 2)
        run(tmp_path/"healthy")
    assert tree(tmp_path/"out") == tree(tmp_path/"healthy")


def test_a_picture_that_always_fails_stops_nobody(world, tmp_path):
    "A model that cannot read one picture: the others are captioned, each run tries that one again, and none ends with an error."
    class Picky(Fake):
        def caption_rows(self, images):
            odd = [hashlib.sha256(im.tobytes()).hexdigest() < "28" for im in images]
            if all(odd): raise RecapError("captions no picture")       # as page 09a's transformers captioner does
            return [dict(caption="", flags="failed") if o else row for row, o in zip(super().caption_rows(images), odd)]
    first = relabel(world, Picky(), "dsc", tmp_path)["dsc"]
    assert first["flags"]["failed"] == first["failures"][NOT_ANSWERED] > 0
    before, again = tree(tmp_path), Picky()
    assert relabel(world, again, "dsc", tmp_path)["dsc"]["flags"] == first["flags"] and again.seen == 0
    assert {k: v for k, v in tree(tmp_path).items() if k.endswith("json")} == {k: v for k, v in before.items() if k.endswith("json")}
    assert relabel(world, Fake(), "dsc", tmp_path)["dsc"]["complete"]


# --- one author, one writer

def test_another_captioner_is_refused(world, tmp_path):
    relabel(world, Fake(), "dsc", tmp_path)
    before = tree(tmp_path)
    other = Fake(); other.hash = "xyz"
    with pytest.raises(RecapError, match="hash abc -> xyz") as e: relabel(world, other, "dsc", tmp_path)
    assert "\n" not in str(e.value) and tree(tmp_path) == before
    assert relabel(world, other, "dsc", tmp_path, overwrite=True)["dsc"]["images"] == 30
    assert {r["model"] for r in pq.read_table(tmp_path/"captions"/"dsc"/"00000.parquet").to_pylist()} == {"fake:xyz"}


def test_27_the_setting_that_changed_is_named(world, tmp_path):
    with Loopback(lambda body, n: "a picture of nothing much at all") as server:
        def run(**how): return relabel(world, ServerConfig(server.url, "toy", cache="", **how), ["dsc"], tmp_path)
        run()
        for how, said in ((dict(max_tokens=64), "max_tokens 512 -> 64"), (dict(temperature=.5), "temperature 0.0 -> 0.5"), (dict(model="other"), "name toy -> other")):
            with pytest.raises(RecapError, match=said) as e: relabel(world, ServerConfig(**(dict(url=server.url, model="toy", cache="") | how)), ["dsc"], tmp_path)
            assert "\n" not in str(e.value)
        run(concurrency=2)      # how hard it is asked is nobody's business


def test_captions_of_the_truth_are_not_mixed_with_others(tmp_path):
    make_world(CorpusConfig(n=3, size=32, truth_styles="dsc"), tmp_path)
    with pytest.raises(RecapError, match="truth -> fake"): relabel(tmp_path, Fake(), "dsc")
    relabel(tmp_path, Fake(), "own")
    assert open_corpus(tmp_path).styles() == ["alt", "dsc", "own"]


def test_a_second_process_is_refused(world, child, tmp_path):
    process = child(world, tmp_path, wait=2)
    try:
        deadline = time.time() + 20
        while not (tmp_path/"captions"/"dsc"/"_manifest.json").exists() and time.time() < deadline: time.sleep(.02)
        with pytest.raises(RecapError, match=str(process.pid)) as e: relabel(world, Fake(), "dsc", tmp_path)
        assert "\n" not in str(e.value)
    finally: process.kill(); process.wait()
    assert relabel(world, Fake(), "dsc", tmp_path)["dsc"]["complete"]


@pytest.mark.parametrize("styles", ["", "alt", "../dsc", "a b"])
def test_names_that_cannot_be_columns(world, tmp_path, styles):
    with pytest.raises(RecapError): relabel(world, Fake(), styles, tmp_path)


def test_captioner_that_returns_too_few(world, tmp_path):
    class Short(Fake):
        def caption_rows(self, images): return super().caption_rows(images)[1:]
    with pytest.raises(RecapError, match="4 captions for 5 images"): relabel(world, Short(), "dsc", tmp_path)


# --- folders of photographs

def photos(folder, n=3):
    folder.mkdir()
    for i in range(n): Image.effect_noise((40 + i, 30), 50).convert("RGB").save(folder/f"photo{i}.jpg")
    (folder/"gone.jpg").write_bytes(b"<!DOCTYPE html>404")
    (folder/"empty.png").write_bytes(b"")
    (folder/"notes.txt").write_text("no picture")
    return folder


def test_a_folder_of_photographs(tmp_path):
    source = photos(tmp_path/"in")
    before = tree(source)
    done = relabel_path(source, "dsc", tmp_path/"out", Fake())
    rows = [json.loads(l) for l in (tmp_path/"out"/"metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows] == ["photo0.jpg", "photo1.jpg", "photo2.jpg"] and all(r["text"].startswith("picture") for r in rows)
    gone = [json.loads(l) for l in (tmp_path/"out"/"quarantine.jsonl").read_text().splitlines()]
    assert {r["file_name"]: r["reason"] for r in gone} == {"gone.jpg": "HTML page", "empty.png": "empty file"}
    assert done["images"] == 3 and tree(source) == before
    told = tree(tmp_path/"out")
    relabel_path(source, "dsc", tmp_path/"out", Fake())          # nothing to do, the same files
    assert tree(tmp_path/"out") == told


def test_a_new_photograph_is_captioned(tmp_path):
    source = photos(tmp_path/"in")
    relabel_path(source, "dsc", tmp_path/"out", Fake())
    Image.new("RGB", (9, 9)).save(source/"new.png")
    assert relabel_path(source, "dsc", tmp_path/"out", Fake())["images"] == 4


def test_mistakes_are_one_line(tmp_path):
    (tmp_path/"void").mkdir()
    source = photos(tmp_path/"in", 1)
    for call, said in [(lambda: relabel_path(tmp_path/"void", "dsc", tmp_path/"o", Fake()), "no images"), (lambda: relabel_path(tmp_path/"none", "dsc", tmp_path/"o", Fake()), "does not exist"),
                       (lambda: relabel_path(source, "dsc", None, Fake()), "--out"), (lambda: relabel_path(source, "dsc", source, Fake()), "never changed"),
                       (lambda: relabel_path(source, "dsc", tmp_path/"o", "no/such/weights"), "no/such/weights")]:
        with pytest.raises(RecapError, match=said) as e: call()
        assert "\n" not in str(e.value)


@real
def test_real_shards_and_files(tmp_path):
    shards = relabel_path(REAL/"img2dataset", "dsc", tmp_path/"shards", Fake())
    assert (shards["images"], shards["skipped"]) == (195, []) and not (tmp_path/"shards"/"metadata.jsonl").exists()
    assert len(open_corpus(REAL/"img2dataset", tmp_path/"shards"/"captions").captions("dsc")) == 195
    edge = relabel_path(REAL/"pillow-edge", "dsc", tmp_path/"edge", Fake())
    assert edge["images"] + len(edge["skipped"]) == 11 and edge["images"] >= 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A captioner with random weights, saved as the real ones are."
    from recap.captioner import captioner_config, captioner_tokenizer, make_captioner, save_captioner
    folder = tmp_path_factory.mktemp("tiny")/"captioner"
    words = captioner_tokenizer(["a red cat on the left", "a large blue dog in the snow"], 100)
    config = captioner_config("tiny", words.tokenizer.get_vocab_size(), context_length=12)
    save_captioner(folder, make_captioner(config), words, config, {"stage": "test"})
    return folder


def test_weights_from_a_folder(tiny, tmp_path):
    from recap.decode import Captioner
    source = photos(tmp_path/"in")
    lines = summary(relabel_path(source, "dsc", tmp_path/"out", tiny)).split("\n")
    assert "3 images captioned in dsc" in lines[0] and sum("Sprite World" in l for l in lines) == 1
    assert any("gone.jpg" in l for l in lines) and any("empty.png" in l for l in lines)
    corpus = open_corpus(source, tmp_path/"out"/"captions")
    pictures = [Image.open(source/f"photo{i}.jpg") for i in range(3)]
    assert list(corpus.captions("dsc").values()) == Captioner.from_pretrained(tiny, device="cpu").caption(pictures)
    manifest = corpus.manifest("dsc")
    assert manifest["images"] == 3 and manifest["failures"] == {"HTML page": 1, "empty file": 1} and len(manifest["captioner"]["hash"]) == 16
