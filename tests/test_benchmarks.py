"The benchmarks measure what they say: small runs, and the parts of a loop against the libraries that they replace."
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

from benchmarks import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_training_benchmark_runs_from_end_to_end(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.train", "--quick", "--device", "cpu", "--out", str(tmp_path/"train.json")],
                          cwd=ROOT, env=environment(ROOT, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said, told = json.loads(done.stdout.strip().split("\n")[-1]), json.loads((tmp_path/"train.json").read_text())
    one = told["sizes"][0]
    assert said["name"] == "train" and said["ratio"] == pytest.approx(said["ours"]/said["peer"], abs=1e-3)
    assert [r["name"] for r in one["rungs"]] == [*train.RUNGS, *train.OURS] and [r["name"] for r in one["tried"]] == [k for k in train.TRIED if k != "compiled"]
    for r in one["rungs"]: assert 0 < r["share_of_limit"] < 1.5 and r["per_second"]["low"] <= r["per_second"]["median"] <= r["per_second"]["high"]
    assert sum(one["parts"].values()) == pytest.approx(1, abs=1e-3) and not told["complete"]
    assert {"provenance", "seed", "threads", "clock"} <= set(told)


@pytest.fixture(scope="module")
def material():
    torch.set_num_threads(1)
    return train.Material(12, torch.device("cpu"))


def trained(material, **how):
    torch.manual_seed(3)
    _, unet, averages = train.script(material, train.How(**how), "xs", 4, 3)
    return torch.cat([p.detach().flatten() for p in unet.parameters()]), torch.cat([p.flatten() for p in averages])


def test_a_faster_optimiser_and_averages_in_one_call_train_as_the_script_does(material):
    first = torch.cat([p.detach().flatten() for p in train.denoiser(material, "xs").parameters()])
    weights, averages = trained(material, kept=True)
    fused, together = trained(material, kept=True, fused=True, one_call=True)
    moved = (weights - first).abs().max()
    assert moved > 1e-4 and (fused - weights).abs().max() < .02*moved     # AdamW of torch's own loop
    assert (together - averages).abs().max() < .02*moved and not torch.equal(averages, weights)     # diffusers' EMAModel


def test_what_is_kept_is_what_the_script_computes(material):
    pixels, ids = next(iter(train.batches(material, train.How(), 64, 12)))
    z, states, mask = material.encoded()
    with torch.no_grad(): mean, said = material.vae.encode(pixels).latent_dist.mean, material.text.model(input_ids=ids, attention_mask=(ids != material.text.tokenizer.pad).long())[0]
    mean = (mean - material.vae.config.shift_factor)*material.vae.config.scaling_factor
    near = torch.cdist(mean.flatten(1), z.flatten(1)).argmin(1)           # the loader's order is random
    assert sorted(near.tolist()) == list(range(12)) and (mean - z[near]).abs().max() < .02
    words = mask[near]
    assert torch.equal((ids != material.text.tokenizer.pad), words) and (said - states[near])[words].abs().max() < .02


def test_batches_of_like_length_hold_every_sample_once(material):
    groups = list(train.Alike(material, 4))
    lengths = material.encoded()[2].sum(1)
    assert sorted(i for g in groups for i in g) == list(range(12))
    sums = sum(int(lengths[g].max() - lengths[g].min()) for g in groups)
    assert sums <= int(lengths.max() - lengths.min())


def test_the_relabelling_benchmark_runs_from_end_to_end(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.relabel", "--quick", "--out", str(tmp_path/"relabel.json")],
                          cwd=ROOT, env=environment(ROOT, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said, told = json.loads(done.stdout.strip().split("\n")[-1]), json.loads((tmp_path/"relabel.json").read_text())
    assert said["name"] == "relabel" and said["ratio"] == pytest.approx(said["ours"]/said["peer"], abs=1e-3)
    assert told["pass"]["same_captions"] == told["pass"]["captions"] == 32       # the pass says what the captioner says
    assert {w: set(r["per_second"]) for w, r in told["reading"]["workers"].items()} == {w: {"recap", "webdataset, Pillow", "webdataset, tensors"} for w in "12"}
    assert told["memory"]["large"]["images"] == 60 and not told["complete"] and {"provenance", "seed", "clock"} <= set(told)
