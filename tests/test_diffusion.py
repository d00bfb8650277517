"Losses and samplers against closed forms and diffusers: where pictures are Gaussian numbers, the best model and the end of every way are known."
import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from recap.core import RecapError
from recap.diffusion import (OBJECTIVES, SAMPLERS, SD, ddim, diffusion_loss, euler, flow_as_epsilon, guided, min_snr, noise_scheduler, noised,
                             paint_latents, signal_and_noise, times_of)

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = 2., .5
DDPM = diffusers.DDPMScheduler(**SD)
# A quadratic's mean over a Gaussian is its mean over two points, one spread to either side: four samples give a loss exactly.
PICTURES = MEAN + STD*torch.tensor([-1., -1., 1., 1.]).double()
NOISE = torch.tensor([-1., 1., -1., 1.]).double()


def told(x0, x, t, objective):
    "A guess of the picture as the objective wants it told."
    a, s = signal_and_noise(t, objective)
    noise = (x - a*x0)/s
    return noise - x0 if objective == "flow" else noise if objective == "epsilon" else a*noise - s*x0

def best(objective):
    "The model that no other beats on N(MEAN, STD^2)."
    def model(x, t):
        a, s = signal_and_noise(t, objective)
        return told(MEAN + a*STD**2/(a**2*STD**2 + s**2)*(x - a*MEAN), x, t, objective)
    return model

def refused(call, *words):
    with pytest.raises(RecapError) as e: call()
    for w in words: assert w in str(e.value), e.value


def test_schedule_and_targets_are_diffusers_own():
    k, g = torch.arange(1000), torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1000, 2, 3, generator=g) for _ in range(2))
    for objective in ("epsilon", "v"):
        x, target = noised(x0, noise, k/1000, objective)
        assert torch.allclose(x, DDPM.add_noise(x0, noise, k), atol=1e-5)
        assert torch.allclose(target, noise if objective == "epsilon" else DDPM.get_velocity(x0, noise, k), atol=1e-5)
    x, target = noised(x0, noise, k/1000)
    assert torch.allclose(x + (1 - k/1000).view(-1, 1, 1)*target, noise, atol=1e-5)      # a step along the velocity to the end is the noise


def test_each_of_the_thousand_times_is_drawn_alike_and_flow_times_are_logit_normal():
    assert torch.equal((1000*times_of((torch.arange(1000) + .5)/1000, "epsilon")).round().long(), torch.arange(1000))
    z = torch.linspace(-3, 3, 13).double()
    assert torch.allclose(torch.logit(times_of(torch.special.ndtr(z))), z)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_the_best_model_is_the_variance_that_is_left(objective):
    for u in (.01, .2, .5, .8, .99):
        u = torch.full((4,), u).double()
        a, s = signal_and_noise(times_of(u[:1], objective), objective)
        left = a**2*STD**2/(a**2*STD**2 + s**2) if objective == "epsilon" else STD**2/(a**2*STD**2 + s**2)
        assert torch.allclose(diffusion_loss(best(objective), PICTURES, NOISE, u, objective), left.squeeze(), rtol=1e-8)
        off = diffusion_loss(lambda x, t: best(objective)(x, t) + .1, PICTURES, NOISE, u, objective)
        assert torch.allclose(off, left.squeeze() + .01, rtol=1e-8)


def test_min_snr_weighs_a_guess_of_the_picture_alike_in_both_objectives():
    g = torch.Generator().manual_seed(0)
    x0, noise, u = torch.randn(64, 5, generator=g).double(), torch.randn(64, 5, generator=g).double(), torch.rand(64, generator=g).double()
    def poor(objective): return lambda x, t: told(torch.tanh(x), x, t[:, None], objective)
    snr = compute_snr(DDPM, (1000*times_of(u, "v")).round().long()).double()
    guess = torch.tanh(noised(x0, noise, times_of(u, "v"), "v")[0])
    error = (guess - x0).square().mean(1)
    for gamma in (1., 5.):
        for objective in ("epsilon", "v"):
            assert torch.allclose(diffusion_loss(poor(objective), x0, noise, u, objective, gamma), (error*snr.clamp(max=gamma)).mean(), rtol=1e-3)
    assert torch.allclose(diffusion_loss(poor("v"), x0, noise, u, "v"), (error*(snr + 1)).mean(), rtol=1e-3)
    assert min_snr(torch.tensor([.9]), "epsilon", 5.) == 1                               # below gamma nothing changes
    refused(lambda: diffusion_loss(best("flow"), PICTURES, NOISE, torch.rand(4), snr_gamma=5.), "epsilon and v")
    refused(lambda: min_snr(torch.rand(3), "v", -1.), "above 0")


def test_a_flow_model_tells_the_noise():
    x, t = torch.linspace(-3, 3, 1000).double(), torch.arange(1000).double()/1000
    assert torch.allclose(flow_as_epsilon(best("flow"))(x, t), best("epsilon")(x, t), atol=1e-9)


@pytest.mark.parametrize("n", (1, 2, 20, 50))
def test_ddim_by_hand_is_diffusers(n):
    noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    model = lambda x, t: torch.tanh(x)*(1 + t.view(-1, 1, 1)) - .3                       # any model: bent, and of the time
    s = diffusers.DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing"); s.set_timesteps(n)
    s.alphas_cumprod, x = s.alphas_cumprod.double(), noise
    for t in s.timesteps: x = s.step(model(x, (t.double()/1000).expand(3)), t, x).prev_sample
    assert torch.allclose(ddim(model, noise, n), x, atol=1e-9)
    assert torch.allclose(paint_latents(model, noise, n, "ddim", "epsilon"), x, atol=1e-4)


def ends(sampler, objective):
    "Mean and spread where the way of N(MEAN, STD^2) ends when it starts in nothing but noise."
    if objective == "flow" and "flow" in SAMPLERS[sampler]: return MEAN, STD
    a, s = (p.item() for p in signal_and_noise(torch.tensor(.999).double(), "epsilon"))  # a little of the picture is left there
    root = (a**2*STD**2 + s**2)**.5
    return MEAN*(1 - STD*a/root), STD/root

@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reaches_the_gaussian(sampler, objective):
    mean, std = ends(sampler, objective)
    def error(n):
        low, high = paint_latents(best(objective), torch.tensor([-1., 1.]).double(), n, sampler, objective).tolist()   # linear in the noise
        return max(abs((low + high)/2 - mean), abs((high - low)/2 - std))
    few, some, many = (error(n) for n in (10, 20, 40))
    floor = .008                                                                         # the last step is first-order, times are rounded to thousandths
    assert many < .05 and some < max(few, floor) and many < max(.6*some, floor), (few, some, many)


def test_diffusers_pipeline_takes_the_same_steps():
    from recap.denoiser import denoise, make_unet
    torch.manual_seed(0)
    unet = make_unet("xs", 4, 8, 16).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=.05)
    noise, states, empty = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 16), torch.randn(1, 16)
    model = guided(lambda x, t, s, m: denoise(unet, x, t, s, m), states, torch.ones(2, 1, dtype=torch.bool), empty, 3.)
    for objective, sampler in (("flow", "euler"), ("flow", "dpm"), ("epsilon", "dpm-karras"), ("v", "ddim"), ("epsilon", "euler")):
        pipe = diffusers.StableDiffusionPipeline(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=noise_scheduler(objective, sampler),
                                                 safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(prompt_embeds=states, negative_prompt_embeds=empty[None].expand(2, -1, -1), guidance_scale=3., num_inference_steps=6, latents=noise.clone(),
                      height=64, width=64, output_type="latent").images
        ours = paint_latents(model, noise, 6, sampler, objective)
        assert torch.allclose(ours, theirs, atol=2e-3*theirs.abs().max()), (objective, sampler, (ours - theirs).abs().max())


def test_first_order_on_a_line_is_eulers_method():
    noise = torch.linspace(-2, 2, 9).double()
    s = noise_scheduler("flow"); s.set_timesteps(10)
    b = diffusers.FlowMatchEulerDiscreteScheduler(); b.set_timesteps(sigmas=s.sigmas[:-1].tolist(), timesteps=s.timesteps.tolist())
    x = noise
    for t in b.timesteps: x = b.step(best("flow")(x, t.double()/1000), t, x).prev_sample
    assert torch.allclose(paint_latents(best("flow"), noise, 10), x, atol=1e-5)
    assert torch.allclose(euler(best("flow"), noise, 10), x, atol=.01)                   # which starts at 1, not 0.999


def test_a_wrong_name_is_told_with_the_nearest():
    x = torch.zeros(2)
    refused(lambda: paint_latents(best("flow"), x, sampler="dpm-karas"), "'dpm-karras'?")
    refused(lambda: paint_latents(best("flow"), x, objective="epsilom"), "'epsilon'?")
    refused(lambda: diffusion_loss(best("flow"), x, x, x + .5, "flov"), "'flow'?")
    refused(lambda: noise_scheduler("flow", "dpm-karras"), "euler, heun, dpm")
    for n in (0, 1001): refused(lambda: paint_latents(best("flow"), x, n), "1 to 1000")
