"An arm outside its page: drawn by diffusers alone, killed and resumed, from bases of other makers, with a text encoder that learns."
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_text import clip_folder

from recap import train
from recap.cache import CacheConfig, build_cache, load_cache, toy_cache
from recap.core import RecapError, hash_folder, read_json, write_json
from recap.denoiser import make_unet
from recap.pipeline import RecapPipeline
from recap.train import Painter, TrainConfig, train_arm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("train")]
PROMPTS = ["a red cat", "a blue car on a street, at night, and a long way behind it a small green house"]
TINY = TrainConfig(steps=10, batch_size=16, ema=.9, warmup=2, save_every=2, keep=2, dtype="no")     # 64 pictures: an epoch is 4 steps


@pytest.fixture(scope="module")
def home(): return toy_cache()


@pytest.fixture(scope="module")
def straight(home, tmp_path_factory):
    "An arm trained without a break."
    out = tmp_path_factory.mktemp("arms")/"straight"
    train_arm(TINY, out, 5)
    return out


def files(arm): return {f: load_file(arm/f) for f in ("unet/diffusion_pytorch_model.safetensors", "checkpoint.safetensors")}
def equal(a, b): return all(a[f].keys() == b[f].keys() and all(torch.equal(v, b[f][k]) for k, v in a[f].items()) for f in a)


# --- drawn without this project

ALONE = '''
import sys
sys.modules["recap"] = None        # an editable install would be found
import numpy as np, torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer
folder, prompts, found = sys.argv[1], sys.argv[2:4], []
for how in (dict(trust_remote_code=True), dict(custom_pipeline=folder, trust_remote_code=True)):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **how)
    found.append(pipe(prompts, num_inference_steps=6, generator=[torch.Generator().manual_seed(s) for s in (3, 4)], output_type="np").images)
assert sys.modules["recap"] is None and not any(m.startswith("recap.") for m in sys.modules)
assert AutoTokenizer.from_pretrained(folder + "/tokenizer")("a cat").input_ids[-1] == 1
np.save(sys.argv[4], np.stack(found))
'''


def test_diffusers_draws_the_same_picture_without_this_project(straight, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RECAP_ROOT")} | {"HF_MODULES_CACHE": str(tmp_path/"modules"), "HF_HUB_OFFLINE": "1"}
    (tmp_path/"alone.py").write_text(ALONE)
    done = subprocess.run([sys.executable, "alone.py", str(straight), *PROMPTS, "found.npy"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = Painter.from_pretrained(straight).paint(PROMPTS, [3, 4], num_inference_steps=6, dtype="no")
    for theirs in np.load(tmp_path/"found.npy"): assert np.abs(theirs.astype(int) - ours).max() <= 1
    assert ours.std() > 5


# --- killed and resumed, looked at or not

@pytest.mark.parametrize("at", [3, 4, 7], ids=["in an epoch", "at its end", "in the second"])
def test_a_broken_training_ends_bit_equal_and_looking_changes_nothing(home, straight, tmp_path, monkeypatch, at):
    steps, real = [], train.diffusion_loss
    def breaks(*args, **kw):
        steps.append(0)
        if len(steps) == at + 1: raise KeyboardInterrupt
        return real(*args, **kw)
    monkeypatch.setattr(train, "diffusion_loss", breaks)
    with pytest.raises(KeyboardInterrupt): train_arm(TINY, tmp_path, 5)
    torch.rand(3)                                           # another state of the global generator
    train_arm(replace(TINY, validate_every=4 if at == 3 else 0, validation="a cat"), tmp_path, 5)
    assert len(steps) == at + 1 + 10 - at//2*2 and equal(files(tmp_path), files(straight))
    assert sorted(p.name for p in tmp_path.glob("validation/*")) == (["000004.png", "000008.png"] if at == 3 else [])
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-00000008.safetensors", "checkpoint-00000010.safetensors"]


def test_micro_batches_give_the_curve_of_the_whole_batch(home, straight, tmp_path):
    train_arm(replace(TINY, accumulate=4), tmp_path, 5)
    cut, whole = files(tmp_path)["checkpoint.safetensors"], files(straight)["checkpoint.safetensors"]
    assert torch.allclose(cut["losses"], whole["losses"], rtol=1e-4) and not torch.equal(cut["losses"], whole["losses"])


def test_other_settings_are_refused(straight):
    with pytest.raises(RecapError, match="objective: 'flow' -> 'v'"): train_arm(replace(TINY, objective="v"), straight, 5)
    with pytest.raises(RecapError, match="dropout: 0.1 -> 0.2"): train_arm(replace(TINY, dropout=.2), straight, 5)


# --- other objectives, other denoisers, buckets

@pytest.mark.parametrize("more", [dict(objective="epsilon", snr_gamma=5.), dict(objective="v"), dict(unet="dit-xs")], ids=["epsilon", "v", "DiT"])
def test_every_kind_of_arm_is_a_pipeline(home, tmp_path, more):
    train_arm(replace(TINY, steps=2, **more), tmp_path)
    painter, pipe = Painter.from_pretrained(tmp_path), RecapPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():      # an untrained last layer says nothing
        for model in (painter.unet, pipe.unet or pipe.transformer): torch.nn.init.normal_((model.conv_out if hasattr(model, "conv_out") else model.proj_out).weight, std=.03, generator=torch.Generator().manual_seed(0))
    ours = painter.paint(PROMPTS, [1, 2], 3., num_inference_steps=4, dtype="no")
    theirs = pipe(PROMPTS, 3., 4, [torch.Generator().manual_seed(s) for s in (1, 2)], output_type="np").images
    assert np.abs(theirs.astype(int) - ours).max() <= 1 and ours.std() > 5
    assert painter.objective == more.get("objective", "flow") and (tmp_path/"transformer").is_dir() == ("unet" in more)
    with pytest.raises(RecapError, match="objective="): train_arm(replace(TINY, base=str(tmp_path), objective="flow" if "objective" in more else "v"), tmp_path/"next")


# --- a text encoder that learns

def test_the_text_encoder_learns_too(home, tmp_path):
    train_arm(replace(TINY, steps=3, train_text=True, lr=1e-2), tmp_path)
    card, folders = read_json(tmp_path/"model.json"), train.encoders_of(home)[0]
    assert card["hashes"]["text"] == hash_folder(tmp_path/"text_encoder") != hash_folder(folders["text"]) and card["hashes"]["vae"] == hash_folder(folders["vae"])
    before, after = (load_file(f/"model.safetensors") for f in (folders["text"], tmp_path/"text_encoder"))
    assert any(not torch.equal(v, after[k].to(v.dtype)) for k, v in before.items() if k in after)
    assert Painter.from_pretrained(tmp_path).paint(PROMPTS[:1], [1], num_inference_steps=2).shape == (1, 64, 64, 3)


# --- pipelines of other makers

@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    "A tiny random Stable Diffusion in the real layout."
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer
    root = tmp_path_factory.mktemp("sd")
    text = clip_folder(root)
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4, latent_channels=4, norm_num_groups=4, sample_size=64)
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    scheduler = PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(vae, text, CLIPTokenizer.from_pretrained(root/"tokenizer"), unet, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(root/"whole")
    return root/"whole"


def test_stable_diffusion_is_drawn_as_its_own_pipeline_draws_it(stable_diffusion):
    from diffusers import StableDiffusionPipeline
    theirs = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None, torch_dtype=torch.float32)
    images = theirs(PROMPTS, guidance_scale=4., num_inference_steps=7, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], output_type="np").images
    ours = Painter.from_pretrained(stable_diffusion).paint(PROMPTS, [1, 2], 4., num_inference_steps=7, dtype="no")
    assert np.abs((255*images).round().astype(int) - ours).max() <= 1 and ours.std() > 5


def test_stable_diffusion_is_a_base(home, stable_diffusion, tmp_path):
    assert train.base_objective(stable_diffusion) == "epsilon"
    cfg = CacheConfig(styles="alt,dsc", vae=str(stable_diffusion/"vae"), text=str(stable_diffusion/"text_encoder"))
    write_json(tmp_path/"enc/results.json", build_cache(cfg, tmp_path/"enc"))
    write_json(tmp_path/"enc/run.json", {"params": cfg.to_dict()})
    mine = replace(TINY, encoded=str(tmp_path/"enc"), base=str(stable_diffusion), objective="epsilon", steps=2, muon_lr=0.)
    with pytest.raises(RecapError, match="4 channels"): train_arm(replace(mine, encoded=str(home)), tmp_path/"wrong")
    train_arm(mine, tmp_path/"arm")
    ours = Painter.from_pretrained(tmp_path/"arm").paint(PROMPTS, [1, 2], num_inference_steps=3, dtype="no")
    theirs = RecapPipeline.from_pretrained(tmp_path/"arm", trust_remote_code=True)(PROMPTS, num_inference_steps=3, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], output_type="np").images
    assert np.abs(theirs.astype(int) - ours).max() <= 1 and ours.std() > 5
    model = train.start_model(mine, load_cache(tmp_path/"enc"), *train.encoders_of(tmp_path/"enc"))
    stored = load_file(stable_diffusion/"unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())


def test_an_arm_whose_encoder_was_exchanged_is_refused(straight, tmp_path):
    import shutil
    shutil.copytree(straight, tmp_path/"arm")
    config = read_json(tmp_path/"arm/vae/config.json")
    write_json(tmp_path/"arm/vae/config.json", config | {"scaling_factor": 1.})
    with pytest.raises(RecapError, match="another vae"): Painter.from_pretrained(tmp_path/"arm")
    assert make_unet("xs").config.sample_size == 8 and json.loads((straight/"model_index.json").read_text())["_class_name"] == ["pipeline", "RecapPipeline"]
