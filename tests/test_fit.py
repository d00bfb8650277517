"The training loop outside a page: kills, bad steps, several processes; with the captioner as the model."
import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from recap.core import RecapError
from recap.fit import Draws, FitConfig, fit, load_checkpoint, optimizers, step_indices

# A captioner small enough for a second a run: 24 scenes, 6 a step, so an epoch is 4 steps. Every run is a process of its own, forked
# from one that has imported everything; `fit` is what is tested, `batch_loss` is the captioner's own.
SCRIPT = '''
import json, os, signal, sys, traceback
import accelerate, contextlib, open_clip, torch     # once, before the forks
import recap.fit
from recap.captioner import batch_loss, captioner_config, captioner_tokenizer, draw_text, make_captioner, normalise, scene_pool, CaptionTokenizer
from recap.core import RecapError, keyed_rng, write_json
from recap.fit import FitConfig, fit

torch.set_num_threads(1)
os.fsync = lambda file: None          # a kill does not need it
scenes, pictures = scene_pool(24, size=32)
shares = dict(short=1.)
class Fixed(CaptionTokenizer):       # every batch as wide as any other: what the class token reads depends on the width
    def encode(self, texts, max_len=76, policy="truncate"):
        ids = super().encode(texts, max_len, policy)
        return torch.nn.functional.pad(ids, (0, max_len - ids.shape[1]), value=self.pad)
words = Fixed(captioner_tokenizer((draw_text(s, keyed_rng(0, i), shares) for i, s in enumerate(scenes)), 300).tokenizer)
pixels, rank = torch.from_numpy(pictures).permute(0, 3, 1, 2), int(os.environ.get("RANK", 0))

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def dying_write(where, real=recap.fit.atomic_write, written=[]):
    "The second checkpoint is the last thing that is written, in part or whole."
    @contextlib.contextmanager
    def write(path, *mode):
        written.append(path)
        with real(path, *mode) as f:
            if len(written) == 2 and where == "half": f.write = lambda data, put=f.write: (put(data[:len(data)//2]), f.flush(), die())
            if len(written) == 2 and where == "before the rename": os.replace = die
            yield f
    return write

def run(out, die_at=-1, die_writing="", **settings):
    os.makedirs(out, exist_ok=True)
    if die_writing: recap.fit.atomic_write = dying_write(die_writing)
    model, seen, found = make_captioner(captioner_config("tiny", words.tokenizer.get_vocab_size(), image_size=32)), [], {}
    def loss_of(net, step, indices, generator):
        if step == die_at: os.kill(os.getpid(), signal.SIGKILL)
        seen.append([int(i) for i in indices])
        texts = [draw_text(scenes[i], keyed_rng(0, "text", step, int(i)), shares) for i in indices]
        return batch_loss(net, words, normalise(pixels[torch.as_tensor(indices)]), texts, 24)[0]
    cfg = {**dict(steps=7, batch_size=6, lr=1e-3, muon_lr=.02, warmup=2, save_every=2, dtype="no"), **settings}
    try: found["loss"] = fit(model, loss_of, 24, FitConfig(**cfg), out + "/run")["loss"]
    except RecapError as e: found["refused"] = str(e)
    write_json(f"{out}/{rank}.json", {"seen": seen, **found})
    if rank == 0: torch.save(model.state_dict(), out + "/weights.pt")

jobs = json.loads(sys.argv[1])
for job in jobs:
    if "RANK" in os.environ: run(**job); continue
    if not (pid := os.fork()):
        try: run(**job)
        except BaseException: traceback.print_exc(); os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def train(folder, jobs, launch=()):
    "Run the jobs one after the other, each in a folder of its name; what each left behind."
    (folder/"train.py").write_text(SCRIPT)
    jobs = [{**job, "out": str(folder/job["out"])} for job in jobs]
    done = subprocess.run([sys.executable, *launch, folder/"train.py", json.dumps(jobs)], env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                          capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-3000:]
    return [int(line) for line in done.stdout.split()]


def left(folder):
    "Losses and samples of each process, and the weights."
    return [json.loads(p.read_text()) for p in sorted(folder.glob("[0-9].json"))], torch.load(folder/"weights.pt", weights_only=True)


PLACES = {"at step 3": 3, "at an epoch's end": 4, "in epoch 2": 6}
WRITES = ("half", "before the rename")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A straight run; one killed at each place and started again; one killed and started with other settings."
    folder = tmp_path_factory.mktemp("runs")
    jobs = [dict(out="straight")] + [dict(out=str(k), **die) for k in PLACES.values() for die in (dict(die_at=k), {})] + [dict(out="changed", die_at=2), dict(out="changed", lr=2e-3, batch_size=4)]
    codes = train(folder, jobs)
    assert codes == [0] + 3*[-signal.SIGKILL, 0] + [-signal.SIGKILL, 0]
    assert train(folder, [dict(out=w, die_writing=w) for w in WRITES]) == 2*[-signal.SIGKILL]
    (folder/"left").write_text(json.dumps({w: [p.name for p in (folder/w/"run").iterdir()] for w in WRITES}))
    assert train(folder, [dict(out=w) for w in WRITES]) == [0, 0]
    return folder


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- fault 26: killed and resumed

@pytest.mark.parametrize("place", PLACES)
def test_a_killed_training_of_the_captioner_ends_bit_equal(runs, place):
    ([rest], weights), ([whole], expected), die_at = left(runs/str(PLACES[place])), left(runs/"straight"), PLACES[place]
    assert rest["loss"] == whole["loss"] and rest["seen"] == whole["seen"][die_at//2*2:]     # from the last checkpoint on, nothing left out
    assert equal(weights, expected)


# --- fault 23: killed while a checkpoint is written

@pytest.mark.parametrize("where", WRITES)
def test_a_kill_while_writing_leaves_the_checkpoint_before(runs, where):
    ([rest], weights), ([whole], expected) = left(runs/where), left(runs/"straight")
    scraps = [n for n in json.loads((runs/"left").read_text())[where] if n.endswith(".tmp")]
    assert len(scraps) == 1 and not list((runs/where).rglob("*.tmp"))                        # swept away
    assert rest["seen"] == whole["seen"][2:] and rest["loss"] == whole["loss"] and equal(weights, expected)


# --- fault 24: disk full

def test_a_full_disk_is_told_and_the_last_checkpoint_kept(tmp_path, monkeypatch):
    cfg, real, written = FitConfig(steps=8, batch_size=6, save_every=2, keep=2, dtype="no"), os.fsync, []
    def full(file):
        written.append(file)
        if len(written) == 3: raise OSError(errno.ENOSPC, "No space left on device")
        return real(file)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecapError, match="disk full while writing .*checkpoint.safetensors: free some space"): fit(small(), spoiled("nan", ()), 20, cfg, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoint-00000002.safetensors", "checkpoint-00000004.safetensors", "checkpoint.safetensors"]
    fit(model := small(), spoiled("nan", ()), 20, cfg, tmp_path)
    fit(whole := small(), spoiled("nan", ()), 20, replace(cfg, save_every=0))
    assert equal(model.state_dict(), whole.state_dict())


# --- fault 25: two processes, one folder

def test_a_second_run_in_the_folder_is_refused_and_the_lock_given_back(tmp_path):
    other = f"import sys; from recap.runs import lock_folder; from recap.core import RecapError\ntry: lock_folder({str(tmp_path)!r})\nexcept RecapError as e: sys.exit(str(e))"
    said, cfg = [], FitConfig(steps=2, batch_size=6, dtype="no")
    def loss_of(model, step, indices, draws):
        if step == 1: said.append(subprocess.run([sys.executable, "-c", other], capture_output=True, text=True))
        return spoiled("nan", ())(model, step, indices, draws)
    fit(small(), loss_of, 20, cfg, tmp_path)
    assert said[0].returncode == 1 and f"another run is writing in {tmp_path} (process {os.getpid()})" in said[0].stderr
    assert subprocess.run([sys.executable, "-c", other], capture_output=True).returncode == 0
    with subprocess.Popen([sys.executable, "-c", other + "\nprint(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(RecapError, match="another training is writing"): fit(small(), loss_of, 20, cfg, tmp_path)
        holder.communicate(b"\n")


# --- noise of a batch that is cut

def test_noise_belongs_to_a_place_in_the_batch():
    whole = Draws(3, 9, range(12))
    noise, u = whole.randn(2, 3), whole.rand()
    for processes, pieces in ((2, 3), (3, 1), (1, 4), (4, 3)):
        for p in range(processes):
            for j in range(pieces):
                places = np.arange(12)[p::processes][j::pieces]
                d = Draws(3, 9, places)
                assert torch.equal(d.randn(2, 3), noise[places]) and torch.equal(d.rand(), u[places])
    assert len({tuple(r) for r in noise.flatten(1).tolist()}) == 12


# --- fault 27: other settings

def test_other_settings_are_refused_with_the_difference(runs):
    [after], _ = left(runs/"changed")
    assert "batch_size: 6 -> 4; lr: 0.001 -> 0.002" in after["refused"] and not after["seen"]


# --- fault 28: other numbers of workers and processes

def test_the_number_of_workers_changes_nothing():
    from recap import captioner
    one, two = captioner.scene_pool(501, size=16), captioner.scene_pool(501, size=16, workers=2)
    assert one[0] == two[0] and np.array_equal(one[1], two[1])


@pytest.mark.parametrize("n, batch, processes", [(40, 8, 2), (41, 6, 3), (7, 20, 4)])
def test_each_sample_once_an_epoch_with_any_number_of_processes(n, batch, processes):
    steps = range(3*n)
    shares = [i for step in steps for rank in range(processes) for i in step_indices(n, batch, step, 5)[rank::processes]]
    alone = [i for step in steps for i in step_indices(n, batch, step, 5)]
    assert sorted(shares) == sorted(alone)
    for epoch in range(2): assert sorted(alone[epoch*n:(epoch + 1)*n]) == list(range(n))


def test_two_processes_learn_what_one_learns(runs, tmp_path):
    train(tmp_path, [dict(out="uneven", batch_size=5), dict(out="two")], TWO)
    [alone], expected = left(runs/"straight")
    (a, b), weights = left(tmp_path/"two")
    assert [sorted(x + y) for x, y in zip(a["seen"], b["seen"], strict=True)] == [sorted(s) for s in alone["seen"]] and not set(a["seen"][0]) & set(b["seen"][0])
    assert a["loss"] == b["loss"] and a["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-6)    # the contrastive table is the whole batch's
    assert a["loss"] == pytest.approx(alone["loss"], rel=3e-4) and a["loss"][-1] < a["loss"][0]
    for k in expected: assert torch.allclose(weights[k], expected[k], atol=5e-3), k
    assert [r["refused"] for r in left(tmp_path/"uneven")[0]] == ["fit: batch_size=5 does not divide by 2 processes"]*2


# --- fault 29: steps that are not finite

def small():
    torch.manual_seed(3)
    return torch.nn.Linear(2, 2)


X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))


def spoiled(kind, at):
    "A loss that goes wrong at some steps: its value or only its gradient."
    def loss_of(model, step, indices, generator):
        loss = model(X[torch.as_tensor(indices)]).square().mean()
        if step not in at: return loss
        if kind == "gradient": return loss + (model.weight.sum()*0).sqrt()      # 0, with a gradient of 0/0
        return loss*float(kind)
    return loss_of


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("clip", [1., 0.])
def test_a_bad_step_stops_and_leaves_the_last_good_checkpoint(tmp_path, kind, clip):
    cfg, good = FitConfig(steps=10, batch_size=6, save_every=2, dtype="no", clip=clip), small()
    with pytest.raises(RecapError, match="at step 5.*samples p.*last good checkpoint is kept") as e:
        fit(good, spoiled(kind, {5}), 20, cfg, tmp_path, key_of=lambda i: f"p{i}")
    assert ("gradient is not finite" if kind == "gradient" else f"loss is {kind}") in str(e.value)
    kept, expected = small(), small()
    opts = optimizers(kept, cfg)
    assert len(load_checkpoint(tmp_path/"checkpoint.safetensors", kept, opts, None, {k: v for k, v in cfg.to_dict().items() if k not in ("save_every", "keep")})) == 4
    fit(expected, spoiled(kind, ()), 20, replace(cfg, steps=10), tmp_path/"other")
    line = json.loads((tmp_path/"bad_steps.jsonl").read_text())
    assert line["step"] == 5 and line["samples"] == [f"p{i}" for i in step_indices(20, 6, 5, cfg.seed)]
    assert all(p.isfinite().all() for p in kept.parameters())
    fit(good := small(), spoiled(kind, ()), 20, cfg, tmp_path)          # the cause put right: it goes on and ends as if nothing had been
    assert equal(good.state_dict(), expected.state_dict())


@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_skipped_steps_leave_the_weights_alone_and_are_counted(tmp_path, kind):
    cfg, model = FitConfig(steps=10, batch_size=6, save_every=5, dtype="no", on_bad="skip", ema=.5), small()
    found = fit(model, spoiled(kind, {0, 4, 9}), 20, cfg, tmp_path)
    assert [k for k, l in enumerate(found["loss"]) if not math.isfinite(l)] == [0, 4, 9]
    assert [json.loads(line)["step"] for line in (tmp_path/"bad_steps.jsonl").read_text().splitlines()] == [0, 4, 9]
    assert all(v.isfinite().all() for v in [*model.state_dict().values(), *found["ema"].values()])
    before = small()
    fit(still := small(), spoiled(kind, {0}), 20, replace(cfg, steps=1))
    assert equal(still.state_dict(), before.state_dict())


def test_ten_skipped_steps_in_a_row_stop_the_run(tmp_path):
    cfg = FitConfig(steps=40, batch_size=6, dtype="no", on_bad="skip")
    with pytest.raises(RecapError, match="at step 14 .*ten steps in a row"): fit(small(), spoiled("nan", set(range(5, 40))), 20, cfg, tmp_path)
    assert len((tmp_path/"bad_steps.jsonl").read_text().splitlines()) == 10
    fit(small(), spoiled("nan", {*range(5, 14), *range(15, 24)}), 20, cfg)      # nine in a row, twice


# --- fault 30: checkpoints that are none

@pytest.mark.parametrize("damage", ["pickle", "cut", "empty", "text"])
def test_a_damaged_checkpoint_is_refused_and_never_unpickled(tmp_path, damage):
    cfg, model = FitConfig(steps=4, batch_size=6, save_every=2, dtype="no"), small()
    fit(model, spoiled("nan", ()), 20, cfg, tmp_path)
    file = tmp_path/"checkpoint.safetensors"
    if damage == "pickle":
        class Bomb:
            def __reduce__(self): return (os.mkdir, (str(tmp_path/"unpickled"),))
        torch.save({"x": Bomb()}, file)
    else: file.write_bytes({"cut": file.read_bytes()[:-40], "empty": b"", "text": b"<html>404</html>"}[damage])
    before = small()
    with pytest.raises(RecapError, match="not a readable checkpoint") as e: fit(before, spoiled("nan", ()), 20, cfg, tmp_path)
    assert "\n" not in str(e.value) and not (tmp_path/"unpickled").exists() and equal(before.state_dict(), small().state_dict())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    cfg = FitConfig(steps=2, batch_size=6, save_every=2, dtype="no")
    fit(small(), spoiled("nan", ()), 20, cfg, tmp_path)
    with pytest.raises(RecapError, match="another model"): fit(torch.nn.Linear(2, 3), spoiled("nan", ()), 20, cfg, tmp_path)
