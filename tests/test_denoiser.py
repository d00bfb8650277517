"U-Net and DiT behind one face: what they read, any shape, growth, wrappers, and a text encoder that learns with them."
import pytest
import torch
from test_text import clip_folder

from recap.core import RecapError
from recap.denoiser import DITS, UNETS, TextAndDenoiser, denoise, grow, load_denoiser, make_denoiser
from recap.fit import FitConfig, fit
from recap.text import TextConfig, TextEncoder, all_texts, make_t5, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("size", ["xs", "dit-xs"])
TEXTS = ["a red cat", "a large blue car on a beach", ""]


def awake(size, side=8, width=32, seed=0):
    "A tiny denoiser whose last layer is not zero."
    torch.manual_seed(seed)
    model = make_denoiser(size, 4, side, width)
    torch.nn.init.normal_((model.conv_out if size in UNETS else model.proj_out).weight, std=.1)
    return model.eval()


def inputs(n=3, h=8, w=8, length=6, width=32):
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(length) < torch.tensor([length, 2, 1])[:n, None]
    return torch.randn(n, 4, h, w, generator=g), torch.rand(n, generator=g), torch.randn(n, length, width, generator=g), mask


@BOTH
@pytest.mark.parametrize("h, w", [(8, 8), (8, 12), (4, 4), (12, 8)])
@torch.no_grad()
def test_padding_is_not_there_words_are_and_a_batch_changes_nothing(size, h, w):
    model, (*asked, mask) = awake(size).double(), inputs(h=h, w=w)   # the U-Net's groups of two numbers at 1 x 1 blow rounding up
    x, t, states = (a.double() for a in asked)
    clean = denoise(model, x, t, states, mask)
    assert clean.shape == x.shape
    assert torch.equal(clean, denoise(model, x, t, torch.where(mask[..., None], states, -30.), mask))
    for i in range(3):     # alone, and without its padding
        n = int(mask[i].sum())
        assert torch.allclose(clean[i], denoise(model, x[i:i+1], t[i:i+1], states[i:i+1, :n], mask[i:i+1, :n])[0], atol=1e-5)
    assert torch.equal(denoise(model, x, t, states), denoise(model, x, t, states, torch.ones_like(mask)))
    first = states.clone(); first[:, 0] += 1                 # one word of each text, far from padding
    for other in (denoise(model, x, t, first, mask), denoise(model, x, t, states), denoise(model, x, 1 - t, states, mask)):
        assert ((other - clean).abs().amax((1, 2, 3))[1:] > 1e-4).all()


@BOTH
@torch.no_grad()
def test_it_asks_diffusers_what_a_pipeline_asks(size):
    model, (x, t, states, mask) = awake(size), inputs()
    if size in UNETS: theirs = model(x, t*1000, states, encoder_attention_mask=mask.float(), return_dict=False)[0]
    else: theirs = model(x, states, t*1000, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask.float(), return_dict=False)[0]
    assert torch.equal(denoise(model, x, t, states, mask), theirs)


@BOTH
def test_fused_and_plain_attention_agree(size):
    from diffusers.models.attention_processor import AttnProcessor2_0
    model, (x, t, states, mask) = awake(size), inputs()
    with torch.no_grad():
        plain = denoise(model, x, t, states, mask)
        model.set_attn_processor(AttnProcessor2_0())
        assert torch.allclose(plain, denoise(model, x, t, states, mask), atol=1e-5)


@BOTH
def test_larger_latents_with_the_same_weights(size, tmp_path):
    "What 4 x 4 has learnt answers alike at 8 x 8 and 8 x 12 before and after `grow`, and after a save."
    young = awake(size, 4)
    new = grow(young, 8)
    assert new.config.sample_size == 8 and young.config.sample_size == 4 and all(torch.equal(v, young.state_dict()[k]) for k, v in new.state_dict().items())
    new.save_pretrained(tmp_path/"one")
    again = grow(load_denoiser(tmp_path/"one"), 16)
    for h, w in ((4, 4), (8, 8), (8, 12)):
        x, t, states, mask = inputs(h=h, w=w)
        with torch.no_grad(): answers = [denoise(m, x, t, states, mask) for m in (young, new, load_denoiser(tmp_path/"one"), again)]
        for a in answers[1:]: assert torch.allclose(a, answers[0], atol=1e-5)


@torch.no_grad()
def test_places_are_shares_of_the_picture():
    "The table of a DiT made for 4 x 4, in closed form: sines and cosines of column and row, stretched to four over any number of tokens."
    dit = awake("dit-xs", 4).requires_grad_(False)
    for p in dit.pos_embed.proj.parameters(): p.zero_()                          # all that a token knows is its place
    table = lambda h, w: dit.pos_embed(torch.zeros(1, 4, h, w)).view(h, w, 64)
    for h, w in ((4, 4), (8, 8), (8, 12)):
        frequencies = 1/10000**(torch.arange(16)/16)
        angle = lambda i, n: i*4/n*frequencies
        closed = torch.stack([torch.stack([torch.cat([angle(c, w).sin(), angle(c, w).cos(), angle(r, h).sin(), angle(r, h).cos()]) for c in range(w)]) for r in range(h)])
        assert torch.allclose(table(h, w), closed, atol=1e-5)


@BOTH
def test_it_learns_which_picture_the_words_mean(size):
    "From pure noise only the text can tell: the error must fall far below that of the mean picture."
    torch.manual_seed(0)
    model, (x0, _, states, mask) = make_denoiser(size, 4, 4, 32).train(), inputs(3, 4, 4)
    x0 = x0.mean((2, 3), keepdim=True).expand_as(x0)*4
    opt, g = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    ignorant = (x0 - x0.mean(0)).square().mean().item()
    for step in range(60):
        loss = (denoise(model, torch.randn(3, 4, 4, 4, generator=g), torch.ones(3), states, mask) - x0).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        if not step: assert abs(loss.item() - x0.square().mean().item()) < 1e-5      # it began with zero
    assert loss.item() < .3*ignorant


@BOTH
def test_behind_the_wrapper_of_several_processes(size):
    class Wrapped(torch.nn.Module):
        def __init__(self, module): super().__init__(); self.module = module
        def forward(self, *args, **kw): return self.module(*args, **kw)
    model, asked = awake(size), inputs()
    with torch.no_grad(): assert torch.equal(denoise(Wrapped(model), *asked), denoise(model, *asked))


def test_names_and_shapes_that_do_not_exist():
    with pytest.raises(RecapError, match="did you mean 'dit-xs'.*one of xs, s, m, paper, dit-xs"): make_denoiser("dit_xs")
    with torch.device("meta"): big = make_denoiser("dit-xl", 4, 32, 32)
    with pytest.raises(RecapError, match="8 x 7 cannot be cut into patches of 2 x 2"): denoise(big, *inputs(w=7))
    assert all(v["width"] % v["head"] == 0 for v in DITS.values()) and all(c % v["head"] == 0 for v in UNETS.values() for c in v["channels"])


# --- the text encoder learns too

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    clip_folder(root)
    return root/"text_encoder"


def tiny_t5(_):
    torch.manual_seed(0)
    return TextEncoder(make_t5(TextConfig(width=32, layers=1, heads=2), 400).get_encoder(), train_tokenizer(all_texts(50), 400))


TOWERS = pytest.mark.parametrize("tower", [TextEncoder.from_pretrained, tiny_t5], ids=["clip", "t5"])


@TOWERS
def test_captions_give_what_fresh_states_give(tower, clip):
    encoder, unet = tower(clip), awake("xs")
    both, (x, t, *_) = TextAndDenoiser(encoder, unet).eval(), inputs()
    with torch.no_grad():
        assert torch.allclose(both(x, t, TEXTS), denoise(unet, x, t, *encoder.encode(TEXTS)), atol=1e-5)
        for i in range(3): assert torch.allclose(both(x, t, TEXTS)[i], both(x[i:i+1], t[i:i+1], TEXTS[i:i+1])[0], atol=1e-5)
        both.read_padding = True
        assert torch.allclose(both(x, t, TEXTS), denoise(unet, x, t, encoder.encode(TEXTS)[0]), atol=1e-5)


@TOWERS
def test_gradients_reach_the_words_and_agree_with_differences(tower, clip):
    "The gradient at one weight of the first layer, against the loss a little to its left and right."
    encoder = tower(clip); encoder.model.double()
    both, (x, t, *_) = TextAndDenoiser(encoder, awake("dit-xs")).eval(), inputs()
    loss = lambda: (both(x, t, TEXTS) - x).double().square().mean()
    loss().backward()
    params = dict(both.text.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in params.values())
    name, p = max(((n, p) for n, p in params.items() if p.dim() == 2 and "embed" not in n), key=lambda np: np[1].grad.abs().max())
    at = divmod(p.grad.abs().argmax().item(), p.shape[1])
    values = []
    with torch.no_grad():
        for d in (1e-2, -2e-2): p[at] += d; values.append(loss().item())
    assert p.grad[at].item() == pytest.approx((values[0] - values[1])/2e-2, rel=.05), name


def test_both_learn_in_the_loop_of_the_book(clip):
    encoder = TextEncoder.from_pretrained(clip)
    both, (x, *_) = TextAndDenoiser(encoder, make_denoiser("xs", 4, 8, 32)), inputs()
    before, kept = {k: v.clone() for k, v in both.state_dict().items()}, encoder.encode(TEXTS)
    loss_of = lambda net, step, indices, generator: (net(torch.randn(x.shape, generator=generator)[indices], torch.ones(len(indices)), [TEXTS[i] for i in indices]) - x[indices]).square().mean()
    done = fit(both, loss_of, 3, FitConfig(steps=3, batch_size=3, lr=1e-3, dtype="bf16", ema=.9, warmup=0))
    assert done["loss"][-1] < done["loss"][0] and set(done["ema"]) == set(before)
    moved = [k for k, v in both.state_dict().items() if not torch.equal(v, before[k])]
    assert any(k.startswith("text.") for k in moved) and any(k.startswith("denoiser.") for k in moved)
    assert not torch.allclose(encoder.encode(TEXTS)[0], kept[0], atol=1e-3)


def test_kept_states_are_refused(clip):
    encoder = TextEncoder.from_pretrained(clip)
    both, (x, t, *_) = TextAndDenoiser(encoder, awake("xs")), inputs()
    kept = encoder.encode(TEXTS)
    for stale in (kept, kept[0], list(kept[0]), "a cat", None):
        with pytest.raises(RecapError, match="stale"): both(x, t, stale)
    with pytest.raises(RecapError, match="stale"): denoise(both, x, t, *kept)
    with pytest.raises(RecapError, match="refuse or truncate"): TextAndDenoiser(encoder, both.denoiser, policy="window")
    with pytest.raises(RecapError, match="the limit is 77"): both(x, t, ["a cat "*90]*3)
    both.policy = "truncate"
    with pytest.warns(UserWarning, match="over 77 tokens"): assert both(x, t, ["a cat "*90]*3).shape == x.shape
