"What 12_relabel cannot show on a page: kills, second processes, a captioner's weights, whole folders."
import hashlib, json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pyarrow.parquet as pq, pytest
from PIL import Image

from recap.core import RecapError, project_root
from recap.corpus import CorpusConfig, make_world, open_corpus
from recap.relabel import relabel, relabel_path, summary

REAL = Path(os.environ["RECAP_REAL"]) if os.environ.get("RECAP_REAL") else None
real = pytest.mark.skipif(REAL is None, reason="RECAP_REAL names no folder of real files")

# a captioner in a module of its own, for this process and for those that are killed
FAKE = '''
import hashlib, os, signal, sys, time
from pathlib import Path
import numpy as np
class Fake:
    name, hash, wait, seen = "fake", "abc", 0.0, 0
    def caption_rows(self, images):
        time.sleep(self.wait)
        self.seen += len(images)
        texts = [hashlib.sha256(np.asarray(im).tobytes()).hexdigest()[:12] for im in images]
        return [dict(caption=f"picture {t}", tokens=len(t), logprob=-int(t[:4], 16)/100) for t in texts]
if __name__ == "__main__":
    from recap.relabel import relabel
    path, out, wait, kill_at = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
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
    def start(path, out, wait=0.0, kill_at=0):
        env = os.environ | {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, script, path, out, str(wait), str(kill_at)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
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

def test_killed_at_random_moments(world, whole, child, tmp_path):
    rng, killed = random.Random(0), 0
    for _ in range(4):
        process = child(world, tmp_path, wait=.02)
        time.sleep(rng.uniform(.02, .3))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2 and tree(tmp_path) != whole
    assert child(world, tmp_path).wait() == 0
    assert tree(tmp_path) == whole


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


# --- one author, one writer

def test_another_captioner_is_refused(world, tmp_path):
    relabel(world, Fake(), "dsc", tmp_path)
    before = tree(tmp_path)
    other = Fake(); other.hash = "xyz"
    with pytest.raises(RecapError, match="hash abc -> xyz") as e: relabel(world, other, "dsc", tmp_path)
    assert "\n" not in str(e.value) and tree(tmp_path) == before
    assert relabel(world, other, "dsc", tmp_path, overwrite=True)["dsc"]["images"] == 30
    assert {r["model"] for r in pq.read_table(tmp_path/"captions"/"dsc"/"00000.parquet").to_pylist()} == {"fake:xyz"}


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
