"Pretrained weights in the layouts of the hub, with tiny random numbers: Stable Diffusion 1 and 2, PixArt-alpha with T5-XXL."
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_text import clip_folder, encoder_of, tiny_t5, unigram

from recap.core import RecapError
from recap.denoiser import TextAndDenoiser, denoise, grow, load_denoiser
from recap.latents import decode, encode, load_vae
from recap.text import TextEncoder

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["A large red cat is on the left.", "a blue car"]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


def tiny_vae():
    from diffusers import AutoencoderKL
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8, 16, 16, 16), down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4, layers_per_block=1,
                         latent_channels=4, norm_num_groups=4, sample_size=64)


def tiny_unet(edition):
    from diffusers import UNet2DConditionModel
    torch.manual_seed(2)
    heads = {1: dict(attention_head_dim=8), 2: dict(attention_head_dim=[2, 4, 4, 4], use_linear_projection=True)}[edition]
    return UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
                                down_block_types=("CrossAttnDownBlock2D",)*3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",)*3, **heads)


def save(model, folder, variant=None, shards=1):
    "As `save_pretrained` of either library does, in half precision for a variant."
    size = sum(p.nbytes for p in model.parameters())//(2 if variant else 1)
    kept = model.half() if variant else model
    kept.save_pretrained(folder, variant=variant, **({"max_shard_size": size*2//3} if shards > 1 else {}))
    model.float()


LAYOUTS = {"sd1": (1, None, 1), "sd1-shards": (1, None, 2), "sd1-fp16": (1, "fp16", 1), "sd2-fp16-shards": (2, "fp16", 2)}


@pytest.fixture(scope="module", params=LAYOUTS)
def stable(request, tmp_path_factory):
    "A Stable Diffusion folder, and the pipeline that diffusers makes of it."
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    edition, variant, shards = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    text = clip_folder(root, "<|endoftext|>" if edition == 1 else "!")
    shutil.rmtree(root/"text_encoder")
    for part, model in (("vae", tiny_vae()), ("unet", tiny_unet(edition)), ("text_encoder", text)): save(model, root/part, variant, shards if part != "vae" else 1)
    PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1).save_pretrained(root/"scheduler")
    (root/"model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "feature_extractor": [None, None], "safety_checker": [None, None],
        "requires_safety_checker": False, "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}))
    names = sorted(p.name for p in (root/"unet").iterdir())
    v = f".{variant}" if variant else ""
    assert names == ["config.json"] + ([f"diffusion_pytorch_model{v}.safetensors"] if shards == 1 else
        [f"diffusion_pytorch_model{v}-0000{i}-of-00002.safetensors" for i in (1, 2)] + [f"diffusion_pytorch_model.safetensors.index{v}.json"])
    pipe = StableDiffusionPipeline.from_pretrained(root, variant=variant, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return root, pipe


@torch.no_grad()
def test_stable_diffusions_autoencoder(stable):
    root, pipe = stable
    vae = load_vae(root/"vae")
    assert vae.config.scaling_factor == .18215 and vae.config.shift_factor is None and vae.dtype == torch.float32 and not any(p.requires_grad for p in vae.parameters())
    z = encode(vae, PICTURES)
    theirs = pipe.vae.encode(pipe.image_processor.preprocess(np.float32(PICTURES/255))).latent_dist.mean*.18215
    assert z.shape == (2, 4, 8, 8) and torch.allclose(z, theirs, atol=1e-6)
    drawn = pipe.image_processor.postprocess(pipe.vae.decode(theirs/.18215).sample, output_type="np")
    assert np.abs(decode(vae, z) - drawn*255).max() < .51


@torch.no_grad()
def test_stable_diffusions_unet_and_text(stable):
    "One step as the pipeline takes it: all 77 states are read, the padding too."
    root, pipe = stable
    encoder, unet = TextEncoder.from_pretrained(root/"text_encoder"), load_denoiser(root/"unet")
    theirs, empty = pipe.encode_prompt(TEXTS, "cpu", 1, True)
    states, mask = encoder.encode([*TEXTS, ""])
    assert torch.allclose(states[:2], theirs, atol=1e-5) and torch.allclose(states[2], empty[0], atol=1e-5) and mask.sum(1).tolist()[2] == 2
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([.401, .401])
    expected = pipe.unet(x, 401, encoder_hidden_states=theirs).sample
    assert expected.abs().max() > .1
    for model in (unet, load_denoiser(root)): assert torch.allclose(denoise(model, x, t, states[:2]), expected, atol=1e-4)
    assert torch.allclose(TextAndDenoiser(encoder, unet, read_padding=True)(x, t, TEXTS), expected, atol=1e-4)
    assert not torch.allclose(denoise(unet, x, t, states[:2], mask[:2]), expected, atol=1e-3)      # with words alone it says something else
    wide = torch.randn(2, 4, 8, 16)
    assert torch.allclose(denoise(grow(unet, 16), wide, t, states[:2]), pipe.unet(wide, 401, encoder_hidden_states=theirs).sample, atol=1e-4)


def test_names_of_the_first_edition(tmp_path):
    "Stable Diffusion 1's files keep names that have changed since, and settings that did not exist then are not in its config."
    root, text = tmp_path, clip_folder(tmp_path)
    vae = tiny_vae().eval(); save(vae, root/"vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename = lambda k: next((k.replace(new, was) for new, was in old.items() if f"attentions.0.{new}." in k), k)
    weights = {rename(k): v for k, v in vae.state_dict().items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, root/"vae/diffusion_pytorch_model.safetensors", {"format": "pt"})
    known = "_class_name act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block norm_num_groups out_channels sample_size up_block_types".split()
    config = json.loads((root/"vae/config.json").read_text())
    (root/"vae/config.json").write_text(json.dumps({k: config[k] for k in known} | {"_diffusers_version": "0.6.0"}))
    with torch.no_grad(): assert torch.allclose(encode(load_vae(root/"vae"), PICTURES), encode(vae, PICTURES), atol=1e-6)
    file = root/"text_encoder/model.safetensors"
    names = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in load_file(file).items()}
    save_file(names | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    encoder = TextEncoder.from_pretrained(root/"text_encoder")
    with torch.no_grad(): assert torch.allclose(encoder.encode(TEXTS)[0], text(torch.tensor([r + [49407]*(77 - len(r)) for r in encoder.tokens(TEXTS)[0]])).last_hidden_state, atol=1e-5)


# --- PixArt-alpha: a transformer, and T5-XXL in shards

def tiny_pixart(side):
    from diffusers import PixArtTransformer2DModel
    torch.manual_seed(4)
    return PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=24, caption_channels=32, sample_size=side, patch_size=2).eval()


@pytest.mark.parametrize("side, variant", [(64, None), (128, "fp16")])     # 512 pixels; 1024, which is told the picture's size
@torch.no_grad()
def test_pixart_with_t5_xxl(tmp_path, side, variant):
    from diffusers import PixArtTransformer2DModel
    from transformers import T5EncoderModel
    words = unigram()
    save(tiny_pixart(side), tmp_path/"transformer", variant, 2); save(tiny_vae(), tmp_path/"vae", variant); save(encoder_of(tiny_t5()), tmp_path/"text_encoder", variant, 2)
    words.save_pretrained(tmp_path/"tokenizer"); (tmp_path/"tokenizer/spiece.model").write_bytes(b"not read where tokenizer.json is")
    assert len(list((tmp_path/"text_encoder").glob("*-of-00002.safetensors"))) == 2
    encoder, dit = TextEncoder.from_pretrained(tmp_path/"text_encoder", max_tokens=120), load_denoiser(tmp_path)
    theirs = T5EncoderModel.from_pretrained(tmp_path/"text_encoder", variant=variant, dtype=torch.float32)
    asked = words(TEXTS, return_tensors="pt", padding="longest")
    states, mask = encoder.encode(TEXTS)
    assert torch.equal(mask, asked.attention_mask.bool())
    expected = theirs(**asked).last_hidden_state
    assert torch.allclose(states[mask], expected[mask], atol=1e-5)
    model = PixArtTransformer2DModel.from_pretrained(tmp_path/"transformer", variant=variant, torch_dtype=torch.float32)
    x, t = torch.randn(2, 4, 8, 12), torch.full((2,), .4)
    size = {"resolution": torch.tensor([[64., 96.]]*2), "aspect_ratio": torch.tensor([[64/96]]*2)} if side == 128 else {"resolution": None, "aspect_ratio": None}
    noise = model(x, encoder_hidden_states=expected, encoder_attention_mask=asked.attention_mask, timestep=torch.tensor([400, 400]), added_cond_kwargs=size, return_dict=False)[0].chunk(2, 1)[0]
    assert torch.allclose(denoise(dit, x, t, states, mask), noise, atol=1e-4)
    assert torch.allclose(denoise(grow(dit, side*2), x, t, states, mask), noise, atol=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("sentencepiece"), reason="the package sentencepiece is not installed")
def test_t5_xxl_with_its_spiece_model(tmp_path):
    import sentencepiece
    from recap.text import all_texts
    (tmp_path/"tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(all_texts(100)), model_prefix=str(tmp_path/"tokenizer/spiece"), vocab_size=200, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    save(encoder_of(tiny_t5()), tmp_path/"text_encoder", None, 2)
    rows = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path/"tokenizer/spiece.model")).encode(TEXTS, add_eos=True)
    assert TextEncoder.from_pretrained(tmp_path/"text_encoder").tokens(TEXTS)[0] == rows


# --- what is refused

PARTS = {"autoencoder": (tiny_vae, load_vae), "U-Net": (lambda: tiny_unet(1), load_denoiser), "transformer": (lambda: tiny_pixart(64), load_denoiser)}


@pytest.mark.parametrize("part", PARTS)
def test_pickled_missing_and_damaged_weights_are_refused_by_name(tmp_path, part):
    make, load = PARTS[part]
    model, stem = make(), "diffusion_pytorch_model"
    model.save_pretrained(tmp_path/"pickled", safe_serialization=False)
    with pytest.raises(RecapError, match=f"{stem}.safetensors missing; {stem}.bin is pickled.*convert it"): load(tmp_path/"pickled")
    save(model, tmp_path/"shards", shards=2)
    (tmp_path/"shards"/f"{stem}-00002-of-00002.safetensors").rename(tmp_path/"second")
    with pytest.raises(RecapError, match=f"{stem}-00002-of-00002.safetensors missing$"): load(tmp_path/"shards")
    save(model, tmp_path/"shards", "fp16")                    # half precision beside it does not stand in for the lost shard
    with pytest.raises(RecapError, match=f"{stem}-00002-of-00002.safetensors missing$"): load(tmp_path/"shards")
    save(model, tmp_path/"whole")
    file = tmp_path/"whole"/f"{stem}.safetensors"
    whole = file.read_bytes(); file.write_bytes(whole[:-100])
    with pytest.raises(RecapError, match="cannot be read"): load(tmp_path/"whole")
    torch.save({}, file)
    with pytest.raises(RecapError, match="cannot be read"): load(tmp_path/"whole")
    file.write_bytes(whole)
    weights = load_file(file); lost = sorted(weights)[3]; weights.pop(lost); save_file(weights, file, {"format": "pt"})
    with pytest.raises(RecapError, match=f"1 weights are in no file, {lost} for one"): load(tmp_path/"whole")
    file.unlink()
    with pytest.raises(RecapError, match=f"{stem}.safetensors missing$"): load(tmp_path/"whole")


def test_t5_xxl_as_google_keeps_it_is_pickled(tmp_path):
    model = encoder_of(tiny_t5())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path/"pytorch_model.bin")
    with pytest.raises(RecapError, match="model.safetensors missing; pytorch_model.bin is pickled"): TextEncoder.from_pretrained(tmp_path)


def test_what_is_no_denoiser(tmp_path):
    tiny_vae().save_pretrained(tmp_path)
    with pytest.raises(RecapError, match="'AutoencoderKL' is no denoiser that is known here: UNet2DConditionModel or PixArtTransformer2DModel"): load_denoiser(tmp_path)
    with pytest.raises(RecapError, match="no denoiser here"): load_denoiser(tmp_path/"gone")
