"The command line: quick, plain, one line for a mistake."
import importlib.util
import json
import subprocess
import sys
import time

import pytest
from PIL import Image
from conftest import ROOT, borrow, one_line, recap


def best_of(n, code):
    def once():
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return time.perf_counter() - began
    return min(once() for _ in range(n))


def test_help_and_import_are_quick():
    bare = best_of(3, "pass")
    assert best_of(5, "import recap") - bare < 0.5
    assert best_of(5, "import sys; sys.argv = ['recap', '--help']\nfrom recap.command import main\ntry: main()\nexcept SystemExit: pass") - bare < 1.0


def test_the_command_starts_without_heavy_libraries():
    code = "import sys, recap.command\nprint(sorted({'torch', 'numpy', 'pandas', 'pyarrow', 'diffusers', 'open_clip', 'papermill', 'snakemake'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_command_has_help():
    top = recap(ROOT, "--help").stdout
    for c in ("study", "stage", "world", "corpus", "relabel", "caption", "tune", "train", "sample", "upsample", "evaluate", "judge", "vote", "results", "plan"):
        assert f"  {c} " in top
    for args in (["study"], ["stage"], ["world", "make"], ["corpus", "inspect"], ["corpus", "validate"], ["corpus", "convert"], ["relabel"], ["caption"], ["tune"], ["train"], ["sample"], ["upsample"], ["evaluate"], ["judge"], ["vote"], ["results"], ["plan"]):
        assert "Usage: recap" in recap(ROOT, *args, "--help").stdout


needs = lambda *modules: pytest.mark.skipif(any(importlib.util.find_spec(f"recap.{m}") is None for m in modules), reason=f"pages missing: {modules}")


@pytest.fixture(scope="module")
def root(tmp_path_factory): return borrow(tmp_path_factory.mktemp("command"))


def test_unknown_words(root):
    one_line(recap(root, "stduy"), "stduy")
    one_line(recap(root, "study", "--sclae", "cpu"), "sclae")
    one_line(recap(root, "study", "cpu"), "--scale")
    one_line(recap(root, "study", "--scale", "cpuu"), "did you mean 'cpu'")
    one_line(recap(root, "stage", "17_trian"), "there is no page")
    one_line(recap(root, "results", "--scale", "smoke"), "has no results yet")


@needs("corpus")
def test_folders_that_hold_nothing(root, tmp_path):
    (tmp_path/"empty").mkdir()
    one_line(recap(root, "corpus", "inspect", tmp_path/"none"), "none")
    one_line(recap(root, "corpus", "inspect", tmp_path/"empty"), "empty")


@needs("corpus", "world", "language")
def test_world_make_and_inspect(root, tmp_path):
    done = recap(root, "world", "make", "--n", 6, "--out", tmp_path/"w", "--seed", 3)
    assert done.returncode == 0, done.stderr
    seen = json.loads(recap(root, "corpus", "inspect", tmp_path/"w", "--json").stdout)
    assert seen["images"] == 6
    one_line(recap(root, "world", "make", "--n", 6, "--out", tmp_path/"w"), "not an empty folder")


@needs("corpus", "formats")
def test_corpus_commands(root, tmp_path):
    (tmp_path/"in").mkdir()
    for i in range(3): Image.new("RGB", (32, 24), (90*i, 90, 90)).save(tmp_path/"in"/f"{i}.png")
    (tmp_path/"in"/"0.txt").write_text("a grey field")
    fine = recap(root, "corpus", "validate", tmp_path/"in")
    assert (fine.returncode, fine.stderr) == (0, "") and not (tmp_path/"in"/"validate.jsonl").exists()
    (tmp_path/"in"/"3.jpg").write_text("<html>")
    lost = recap(root, "corpus", "validate", tmp_path/"in", "--json", "--quarantine", tmp_path/"q.jsonl")
    assert (lost.returncode, lost.stderr, json.loads(lost.stdout)["lost"]) == (1, "", {"HTML page": 1})     # an answer, not a failure
    assert json.loads((tmp_path/"q.jsonl").read_text()) == {"key": "3.jpg", "shard": "00000", "reason": "HTML page", "detail": ""}
    seen = recap(root, "corpus", "inspect", tmp_path/"in", "--sheet", tmp_path/"sheet.png")
    assert seen.returncode == 0 and "images: 3" in seen.stdout and Image.open(tmp_path/"sheet.png").width > 400
    done = recap(root, "corpus", "convert", tmp_path/"in", "--to", "imagefolder", "--out", tmp_path/"out", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["skipped"] == {"HTML page": 1} and (tmp_path/"out"/"metadata.jsonl").exists()
    one_line(recap(root, "corpus", "inspect", tmp_path/"in", "--sheet", tmp_path/"sheet.jpg"), "must end in .png")
    one_line(recap(root, "corpus", "inspect", tmp_path/"in", "--sheet", tmp_path), "is a folder")
    one_line(recap(root, "corpus", "validate", tmp_path/"in", "--quarantine", tmp_path), "is a folder")
    (tmp_path/"bad").mkdir(); (tmp_path/"bad"/"3.jpg").write_text("<html>")
    none = recap(root, "corpus", "convert", tmp_path/"bad", "--to", "open_clip", "--out", tmp_path/"none")
    assert (none.returncode, none.stdout, none.stderr.count("\n")) == (1, "", 1) and "no picture can be read (1 HTML page)" in none.stderr
    one_line(recap(root, "corpus", "convert", tmp_path/"in", "--to", "webdatset", "--out", tmp_path/"x"), "did you mean 'webdataset'")
    one_line(recap(root, "corpus", "convert", tmp_path/"in", "--to", "sidecar", "--out", tmp_path/"in"/"x"), "never changed")
    one_line(recap(root, "corpus", "inspect", tmp_path/"in", "--style", "dsc"), "no captions of style 'dsc'")


@needs("corpus", "world", "language")
def test_world_make_takes_a_world(root, tmp_path):
    args = ["world", "make", "--n", 40, "--world", "middle,nouns=9", "--width", 96, "--split", "test", "--truth-styles", "dsc"]
    for workers in (1, 2): assert recap(root, *args, "--workers", workers, "--out", tmp_path/f"w{workers}").returncode == 0
    files = lambda w: {p.relative_to(tmp_path/w): p.read_bytes() for p in (tmp_path/w).rglob("*") if p.is_file() and p.name != ".lock"}
    assert files("w1") == files("w2")
    assert json.loads((tmp_path/"w1"/"world.json").read_text())["config"]["world"] == "middle,nouns=9"
    for wrong in ("hard", "easy,nuns=3", "easy,nouns=x"): one_line(recap(root, "world", "make", "--world", wrong, "--out", tmp_path/"x"), "world" if wrong == "hard" else "nuns" if "nuns" in wrong else "number")
    assert not (tmp_path/"x").exists()


@needs("relabel", "captioner")
def test_relabel_mistakes(root, tmp_path):
    (tmp_path/"empty").mkdir(); (tmp_path/"w").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path/"w"/"a.png")
    one_line(recap(root, "relabel", tmp_path/"none", "--style", "dsc", "--out", tmp_path/"o"), "none")
    one_line(recap(root, "relabel", tmp_path/"empty", "--style", "dsc", "--out", tmp_path/"o"), "empty")
    one_line(recap(root, "relabel", tmp_path/"empty", "--style", "d/sc", "--out", tmp_path/"o"), "style")
    one_line(recap(root, "relabel", tmp_path/"w", "--style", "cds", "--out", tmp_path/"o"), "unknown style 'cds'")
    one_line(recap(root, "relabel", tmp_path/"empty", "--style", "dsc", "--captioner", tmp_path/"none", "--out", tmp_path/"o"))
    assert not (tmp_path/"o").exists()


@needs("relabel", "captioner")
def test_caption_does_what_it_can(tmp_path, monkeypatch, capsys):
    import recap.relabel
    from recap.command import run_command
    monkeypatch.setattr(recap.relabel, "Scribe", lambda captioner, style: None)
    monkeypatch.setattr(recap.relabel, "ask", lambda scribe, pictures, style: [{"caption": f"{p.width} wide"} for p in pictures])
    for n in (8, 9): Image.new("RGB", (n, 8)).save(tmp_path/f"{n}.png")
    (tmp_path/"bad.jpg").write_text("<html>"); (tmp_path/"gone.png").symlink_to(tmp_path/"nowhere")
    names = [str(tmp_path/n) for n in ("8.png", "bad.jpg", "gone.png", "9.png")]
    assert run_command(["caption", *names]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{names[0]}: 8 wide", f"{names[3]}: 9 wide"]
    assert [l.split(" is ")[0] for l in err.splitlines()] == [f"recap: {n}" for n in names[1:3]] and "HTML page" in err
    assert run_command(["caption", names[0]]) == 0 and run_command(["caption", *names[1:3]]) == 2


@needs("finetune")
@pytest.mark.skipif(not (ROOT/"data/foundation/captioner").is_dir(), reason="foundation weights missing: captioner")
def test_a_corpus_without_captions(root, tmp_path):
    done = recap(root, "world", "make", "--n", 8, "--out", tmp_path/"w")
    assert done.returncode == 0, done.stderr
    one_line(recap(root, "stage", "10_finetune", "-p", f"corpus={tmp_path/'w'}", "-p", "style=dsc", "--out", tmp_path/"o"), "dsc")


def test_debug_shows_the_traceback(root):
    code = "import recap.command as c\n@c.app.command()\ndef broken(): raise KeyError('inner')\nc.sys.argv = ['recap', 'broken']\nc.main()"
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert plain.returncode == 1 and plain.stderr.count("\n") == 1 and "RECAP_DEBUG=1" in plain.stderr
    import os
    loud = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"RECAP_DEBUG": "1"})
    assert "Traceback" in loud.stderr
