"The autoencoder against closed forms, torch's distributions, diffusers' own pre- and postprocessing, and the benchmark's arithmetic."
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from recap.core import RecapError
from recap.fit import FitConfig
from recap.latents import (VAEConfig, decode, downscale, encode, load_vae, make_vae, picture_pool, reconstruction_loss, sharpen_decoder, to_pixels, to_tensor, train_vae,
                           vae_loss)

SMALL = dict(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4, norm_num_groups=4)

pytestmark = pytest.mark.usefixtures("one_thread")

def noise(n, h, w, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)

def test_pixels_are_read_and_written_as_diffusers_does():
    x, processor = noise(3, 16, 24), VaeImageProcessor(do_resize=False)
    assert torch.allclose(to_tensor(x), processor.preprocess([Image.fromarray(p) for p in x]), atol=1e-6)
    y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(to_pixels(y), np.stack([np.asarray(p) for p in processor.postprocess(y, output_type="pil")]))

def test_every_value_of_a_pixel_comes_back():
    x = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_pixels(to_tensor(x)), x)

@pytest.mark.parametrize("widths, factor", [("8,8", 2), ("8,8,8", 4), ("8,8,8,8", 8), ("8, 8, 16, 16, 16", 16)])
def test_every_resolution_after_the_first_halves_the_picture(widths, factor):
    cfg = VAEConfig(latent_channels=3, widths=widths)
    vae = make_vae(cfg).eval()
    assert cfg.downscale == downscale(vae) == factor
    z = encode(vae, noise(2, 32, 64))
    assert z.shape == (2, 3, 32//factor, 64//factor) and decode(vae, z).shape == (2, 32, 64, 3)

def test_pictures_that_do_not_divide_are_refused_and_not_cut():
    vae = make_vae(VAEConfig(widths="8,8,8")).eval()
    assert encode(vae, noise(1, 36, 28)).shape[2:] == (9, 7)
    for h, w in ((36, 30), (34, 28)):
        with pytest.raises(RecapError, match=f"{w} x {h} pixels do not divide into latent cells of 4"): encode(vae, noise(1, h, w))

@pytest.mark.parametrize("widths", ["", ",", "16,", "16;32", "16,32,x", "16,20", "-8,8", "0,8"])
def test_widths_that_cannot_be_built_say_so(widths):
    with pytest.raises(RecapError, match="multiple of 8") as e: VAEConfig.from_dict({"widths": widths})
    assert "\n" not in str(e.value)

def test_reconstruction_loss_by_hand():
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1., 0.], [0., 0.]]]])
    cfg = VAEConfig(square_weight=2., edge_weight=4.)     # one pixel of four is off by one: 1/4 each; of two edges a direction one is off by one: 1/2 each
    assert reconstruction_loss(y, x, cfg).item() == pytest.approx(.5*.25 + 2*.25 + 4*(.5 + .5))

def test_the_whole_loss_against_torch_s_distributions():
    cfg, x = VAEConfig(latent_channels=2, widths="8,8", kl_weight=.7), to_tensor(noise(2, 8, 8))
    vae = make_vae(cfg, 8).eval()
    with torch.no_grad():
        q = vae.encode(x).latent_dist
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(0., 1.)).mean()
        y = vae.decode(q.mean + q.std*torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(3))).sample
        assert torch.allclose(vae_loss(vae, x, cfg, torch.Generator().manual_seed(3)), reconstruction_loss(y, x, cfg) + .7*kl, rtol=1e-5)

@pytest.mark.parametrize("widths", ["8,8,8,8", "8,8,8"])
def test_latents_of_a_trained_one_have_unit_variance_and_its_decoder_can_be_trained_alone(widths):
    pool, cfg, fit_cfg = picture_pool(32, 32), VAEConfig(latent_channels=4, widths=widths), FitConfig(steps=3, batch_size=8, dtype="no")
    vae, curve = train_vae(pool, cfg, fit_cfg)
    z = encode(vae, pool)
    assert len(curve) == 3 and abs(z.mean()) < .01 and abs(z.std() - 1) < .01
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    sharpen_decoder(vae, pool, cfg, fit_cfg)
    changed = {k for k, v in vae.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith(("decoder", "post_quant_conv")) for k in changed) and torch.equal(encode(vae, pool), z)

@pytest.mark.parametrize("more", [dict(latent_channels=4, scaling_factor=.18215), dict(latent_channels=4, scaling_factor=.13025, force_upcast=True),
    dict(latent_channels=16, scaling_factor=.3611, shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False)], ids=["stable diffusion", "sdxl", "flux"])
@pytest.mark.parametrize("half", [False, True])
def test_pretrained_layouts_load_by_the_same_function(tmp_path, more, half):
    torch.manual_seed(1)
    made = AutoencoderKL(**SMALL, **more)
    (made.half() if half else made).save_pretrained(tmp_path)
    vae, x = load_vae(tmp_path), noise(2, 32, 32)
    assert vae.dtype == torch.float32 and not any(p.requires_grad for p in vae.parameters())
    with torch.no_grad(): raw = made.float().eval().encode(VaeImageProcessor(do_resize=False).preprocess([Image.fromarray(p) for p in x])).latent_dist.mean
    z = encode(vae, x)
    assert torch.allclose(z, (raw - more.get("shift_factor", 0.))*more["scaling_factor"], atol=1e-5)       # what the pipelines write
    with torch.no_grad(): theirs = made.decode(z/more["scaling_factor"] + more.get("shift_factor", 0.)).sample
    theirs = VaeImageProcessor().postprocess(theirs, output_type="np")
    assert np.abs(decode(vae, z) - 255*theirs).max() <= .51

def test_latents_scaled_channel_by_channel_are_refused(tmp_path):
    AutoencoderKL(**SMALL, latents_mean=[.1]*4, latents_std=[2.]*4).save_pretrained(tmp_path)
    with pytest.raises(RecapError, match="scales each latent channel by itself"): load_vae(tmp_path)
    with pytest.raises(RecapError, match="no autoencoder here"): load_vae(tmp_path/"none")

def test_the_benchmark_s_arithmetic():
    from torchmetrics.functional.image import peak_signal_noise_ratio
    from benchmarks.vae import psnr, summary
    a, b = noise(3, 8, 8), noise(3, 8, 8, 1)
    want = [peak_signal_noise_ratio(torch.tensor(x).float(), torch.tensor(y).float(), data_range=255.).item() for x, y in zip(a, b)]
    assert psnr(a, b) == pytest.approx(want, rel=1e-5)
    asked, f = np.array([2., 2., 4., 4.]), lambda *v: np.array(v, float)
    real = {"colour": (f(2, 1, 4, 2), asked), "all": (f(2, 1, 4, 2), asked)}, f(80, 60, 80, 60)
    told = summary({"colour": (f(1, 1, 2, 2), asked), "all": (f(1, 1, 2, 2), asked)}, f(70, 60, 70, 60), real)
    mean = lambda d: d["mean"]
    assert mean(told["facts"]) == 6/12 and mean(told["lost"]) == 3/12 and mean(told["clip_lost"]) == 5 and mean(told["kinds"]["colour"]) == 6/12
    assert mean(told["worlds"]["easy"]) == 3/6 and mean(told["lost_worlds"]["easy"]) == 3/6 and mean(told["lost_worlds"]["whole"]) == 0     # even ones are easy

def test_the_denoiser_s_cost_grows_with_the_cells_and_hardly_with_the_channels():
    from benchmarks.vae import multiply_adds
    from recap.denoiser import make_unet
    base, wide, long = multiply_adds(4, 8), multiply_adds(8, 8), multiply_adds(4, 16)
    first, last = (9*4*make_unet("s", 4, 8).conv_in.out_channels*64,)*2     # 3x3 weights from and to four more channels, at every cell
    assert wide - base == first + last
    assert 3.9*base < long < 5*base
