"The captioner against open_clip: same folder, same outputs, same greedy tokens."
import json, os, random, subprocess, sys, types, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recap.captioner import (CaptionTokenizer, Loaded, as_pixels, captioner_config, captioner_tokenizer, load_captioner,
    make_captioner, normalise, plain_greedy, save_captioner)
from recap.core import RecapError, keyed_torch
from recap.decode import Captioner, Decoder, generate, sampler
from recap.world import render, sample_scene


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def words():
    texts = ["A big red cat stands on the left, on a beach.", "There is a tiny blue boat in the centre. It takes place in a meadow."]
    return captioner_tokenizer(texts*3, 330)


def noise(n, size=64, seed=0): return torch.randn(n, 3, size, size, generator=keyed_torch(seed, "noise"))


def differences(model, images, got, start, end, tie=1e-4):
    "Places where `got` leaves open_clip's own greedy path although no other token was within `tie` of the best."
    wrong = 0
    for image, w in zip(images, got, strict=True):
        ids = [start, *w.ids] + ([end] if w.finished else [])
        with torch.no_grad(): logits = model(image[None], torch.tensor([ids]))["logits"][0].float()
        best = logits.max(-1).values
        wrong += int((best - logits[range(len(ids) - 1), ids[1:]] > tie).sum())
    return wrong


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [{}, {"text": 2, "decoder": 3}])
def test_greedy_is_open_clips_full_forward_step_by_step(seed, shape):
    from recap import captioner
    captioner.SIZES["test"] = {**captioner.SIZES["tiny"], **shape}
    try: model = make_captioner(captioner_config("test", 90, context_length=32), seed).eval()
    finally: del captioner.SIZES["test"]
    images = noise(9, seed=seed)
    long = plain_greedy(model, images, end=-1, max_len=32)
    firsts = {t: {r.index(t) if t in r else 31 for r in long} for r in long for t in r}
    end = max(firsts, key=lambda t: len(firsts[t]))  # the token that would end the captions at the most different places
    slow, fast = plain_greedy(model, images, end=end, max_len=32), generate(model, images, max_len=32, end=end)
    assert differences(model, images, fast, 2, end) == 0
    assert [len(w.ids) for w in fast] == [len(s) for s in slow]
    assert len({len(s) for s in slow}) > 1, "the captions must end at different places for the test to mean something"
    whole = {tuple(w.ids) for i in range(9) for w in generate(model, images[i:i + 1], max_len=32, end=end)}
    assert whole == {tuple(w.ids) for w in fast}, "the batch must not change a caption"


def test_attentional_pooling_and_layer_scale_as_in_open_clips_configs():
    cfg = captioner_config("tiny", 70, context_length=20)
    cfg["vision_cfg"].update(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=9)
    cfg["text_cfg"]["ls_init_value"] = cfg["multimodal_cfg"]["ls_init_value"] = .5
    model = make_captioner(cfg, 4).eval()
    images = noise(4)
    assert differences(model, images, generate(model, images, max_len=20), 2, 1) == 0


def test_token_zero_hides_the_next_place_as_open_clips_mask_does():
    model = make_captioner(captioner_config("tiny", 50, context_length=24), 7).eval()
    images, r = noise(3), random.Random(0)
    tokens = torch.tensor([[2] + [r.choice([0, 0, 5, 6, 7]) for _ in range(22)] for _ in range(3)])
    with torch.no_grad():
        full = model(images, tokens, output_labels=False)["logits"]
        decoder = Decoder(model, images, 24)
        steps = torch.stack([decoder.step(t) for t in tokens.T], 1)
    assert torch.allclose(full, steps, atol=1e-4)


def test_open_clip_loads_the_folder_and_agrees(words, tmp_path):
    import open_clip
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size())
    save_captioner(tmp_path, make_captioner(cfg, 1), words, cfg, {"stage": "test"})
    ours = load_captioner(tmp_path)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    picture = render(sample_scene(0, 3), 64)
    x = preprocess(picture)[None]
    assert torch.allclose(x, normalise(as_pixels([picture], 64)), atol=1e-6)
    text = "A big red cat stands on the left."
    ids = words.encode([text])
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")([text])[0, :ids.shape[1]].tolist() == ids[0].tolist()
    a, b = ours.model(x, ids), theirs(x, ids)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_pretrained_by_configuration_name_and_path(words, tmp_path):
    import open_clip
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size())
    save_captioner(tmp_path/"w", make_captioner(cfg, 2), words, cfg, {})
    (tmp_path/"recap_tiny.json").write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path/"recap_tiny.json")
    theirs, *_ = open_clip.create_model_and_transforms("recap_tiny", pretrained=str(tmp_path/"w"/"open_clip_model.safetensors"))
    x = noise(2)
    with torch.no_grad(): assert torch.equal(theirs.eval().encode_image(x), load_captioner(tmp_path/"w").model.encode_image(x))


def test_open_clips_own_configurations_pass_through_the_maker():
    with torch.device("meta"): model = make_captioner("coca_ViT-B-32")
    assert model.text.vocab_size == 49408 and sum(p.numel() for p in model.parameters()) > 2e8
    with pytest.raises(RecapError, match="unknown captioner size 'ViT-B-32'"): make_captioner("ViT-B-32")


# --- open_clip's folders and files, in both directions

def clip_like():
    "coca_ViT-L-14 made small: CLIP's vocabulary, attentional pooling, layers of one size in the towers and another in the decoder."
    cfg = captioner_config("coca_ViT-L-14")
    cfg["embed_dim"] = 48
    cfg["vision_cfg"].update(image_size=32, patch_size=8, width=64, head_width=32, layers=2, attn_pooler_heads=4, attn_pooler_queries=7)
    cfg["text_cfg"].update(width=48, heads=2, layers=2)
    cfg["multimodal_cfg"].update(width=48, heads=2, layers=1)
    return cfg


def open_clips_folder(path, mean=(.48, .46, .41), **preprocess):
    "A folder that open_clip itself wrote, with weights of both kinds, and the model they came from."
    from open_clip.factory import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_for_hf
    model = make_captioner(clip_like(), 5).eval()
    set_model_preprocess_cfg(model, {"size": 32, "mode": "RGB", "mean": mean, "std": (.27, .26, .28), "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0, **preprocess})
    save_for_hf(model, types.SimpleNamespace(save_pretrained=lambda folder: None), clip_like(), path, "both")
    return model


def same_outputs(a, b, x, ids):
    with torch.no_grad(): one, two = a(x, ids), b(x, ids)
    assert all(torch.equal(one[k], two[k]) for k in ("logits", "image_features", "text_features", "logit_scale"))
    assert one["logits"].std() > 0


def test_a_folder_of_open_clip_loads_here_and_gives_its_outputs(tmp_path):
    import open_clip
    open_clips_folder(tmp_path)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    texts, photo = ["a red boat, on the left", "two cats!"], render(sample_scene(0, 3), 90).crop((0, 0, 90, 60))
    for path in (tmp_path, str(tmp_path), f"local-dir:{tmp_path}"):
        ours = load_captioner(path)
        ids = ours.words.encode(texts)
        assert tokens(texts)[:, :ids.shape[1]].tolist() == ids.tolist()
        x = ours.prepare([photo])
        assert torch.allclose(x[0], preprocess(photo), atol=1e-6) and ours.preprocess["resize_mode"] == "shortest"
        same_outputs(ours.model, theirs.eval(), torch.cat([x, x.flip(-1)]), ids)


def test_what_we_saved_of_an_open_clip_model_goes_back_to_it(tmp_path):
    import open_clip
    source = open_clips_folder(tmp_path/"theirs", mean=(.4, .5, .6), resize_mode="longest", interpolation="bilinear", fill_color=9)
    loaded = load_captioner(tmp_path/"theirs")
    save_captioner(tmp_path/"ours", loaded.model, loaded.words, loaded.config["model_cfg"], {"style": "dsc"}, dtype=torch.float32)
    back, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path/'ours'}")
    ids = loaded.words.encode(["a red boat", "the sea"])
    same_outputs(source, back.eval(), noise(2, 32), ids)
    again, photo = load_captioner(tmp_path/"ours"), render(sample_scene(0, 3), 90).crop((0, 0, 90, 60))
    assert again.manifest == {"style": "dsc"} and not (tmp_path/"ours"/"tokenizer.json").exists()
    assert again.preprocess["mean"] == [.4, .5, .6] and torch.allclose(again.prepare([photo])[0], preprocess(photo), atol=1e-6)
    (tmp_path/"small_coca.json").write_text(json.dumps(clip_like()))
    open_clip.add_model_config(tmp_path/"small_coca.json")
    by_name, *_ = open_clip.create_model_and_transforms("small_coca", pretrained=str(tmp_path/"ours"/"open_clip_model.safetensors"))
    same_outputs(source, by_name.eval(), noise(2, 32), ids)


def test_one_file_needs_a_name_and_takes_older_keys(tmp_path):
    from safetensors.torch import load_file, save_file
    source = open_clips_folder(tmp_path)
    file = tmp_path/"epoch_3.safetensors"
    save_file({f"module.{k}": v for k, v in load_file(tmp_path/"open_clip_model.safetensors").items()}, file)   # as open_clip's training on several GPUs names them
    with pytest.raises(RecapError, match="does not say which model it is"): load_captioner(file)
    ours = load_captioner(file, name=clip_like())
    same_outputs(source, ours.model, noise(2, 32), ours.words.encode(["a cat", "two dogs"]))
    assert ours.preprocess["mean"][0] == pytest.approx(.48145466) and ours.preprocess["resize_mode"] == "shortest"     # open_clip's defaults
    with pytest.raises(RecapError, match="does not fit") as e: load_captioner(file, name=captioner_config("tiny"))
    assert "\n" not in str(e.value)
    with pytest.raises(RecapError, match="is not there"): load_captioner(tmp_path/"nowhere")


# --- fault 30

@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_pickle_is_refused_and_the_command_it_names_converts_it(tmp_path, suffix):
    source = open_clips_folder(tmp_path)
    pickle = tmp_path/f"weights{suffix}"
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, pickle)
    with pytest.raises(RecapError, match="is a pickle.*only safetensors") as e: load_captioner(pickle, name=clip_like())
    command = str(e.value).partition("convert it once: python ")[2]
    assert "\n" not in str(e.value) and not subprocess.run(f"{sys.executable} {command}", shell=True).returncode
    ours = load_captioner(pickle.with_suffix(".safetensors"), name=clip_like())
    same_outputs(source, ours.model, noise(2, 32), ours.words.encode(["a cat", "two dogs"]))


def test_a_folder_with_pickles_only_is_refused_and_nothing_is_unpickled(tmp_path):
    open_clips_folder(tmp_path)
    (tmp_path/"open_clip_model.safetensors").unlink()
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/"unpickled"),))
    torch.save({"x": Bomb()}, tmp_path/"open_clip_pytorch_model.bin")
    with pytest.raises(RecapError, match="open_clip_pytorch_model.bin is a pickle"): load_captioner(tmp_path)
    (tmp_path/"open_clip_pytorch_model.bin").rename(tmp_path/"open_clip_model.safetensors")
    with pytest.raises(RecapError, match="does not fit"): load_captioner(tmp_path)
    assert not (tmp_path/"unpickled").exists()


# --- pictures as open_clip prepares them

PREPARATIONS = [(mode, how) for mode in ("squash", "shortest", "longest") for how in ("bicubic", "bilinear")]


def differs_from_open_clip(pictures, size, mode, how):
    "The largest difference to open_clip's own transform, in levels of 0 to 255."
    from open_clip.transform import PreprocessCfg, image_transform_v2
    theirs = image_transform_v2(PreprocessCfg(size=size, mean=(0., 0., 0.), std=(1., 1., 1.), interpolation=how, resize_mode=mode, fill_color=30), is_train=False)
    ours = as_pixels(pictures, size, mode, how, fill=30)
    return max((o.float() - 255*theirs(p)).abs().max().item() for o, p in zip(ours, pictures, strict=True))


@pytest.mark.parametrize("mode, how", PREPARATIONS)
def test_rendered_pictures_are_prepared_as_by_open_clip(mode, how):
    pictures = [render(sample_scene(0, i), 150).crop((0, 0, *box)) for i, box in enumerate([(150, 150), (150, 97), (61, 150), (150, 31), (40, 23), (24, 24)])]
    assert differs_from_open_clip(pictures, 64, mode, how) < 1e-3       # the same bytes; open_clip divides them by 255
    assert differs_from_open_clip([p.convert("L") for p in pictures], 64, mode, how) < 1e-3


@pytest.mark.skipif(not os.environ.get("RECAP_REAL"), reason="RECAP_REAL names no folder of real files")
@pytest.mark.parametrize("mode, how", PREPARATIONS)
def test_photographs_are_prepared_as_by_open_clip(mode, how):
    pictures = []
    for p in sorted((Path(os.environ["RECAP_REAL"])/"skimage-photos").iterdir()):
        if p.suffix in (".png", ".jpg"): pictures.append(Image.open(p))
    opaque = [p for p in pictures if p.mode in ("RGB", "L")]
    assert len(opaque) >= 5 and len({p.size for p in opaque}) >= 3
    assert differs_from_open_clip(opaque, 224, mode, how) < 1e-3


def test_transparent_shows_white_and_arrays_are_as_pictures():
    clear = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    assert as_pixels([clear], 16).min() == 255                           # open_clip drops the alpha channel: black
    picture = render(sample_scene(0, 3), 90)
    array = np.asarray(picture)[None]
    for mode, how in PREPARATIONS:
        expected = as_pixels([picture], 48, mode, how)
        assert torch.equal(as_pixels(array, 48, mode, how), expected) and torch.equal(as_pixels(torch.from_numpy(array).permute(0, 3, 1, 2), 48, mode, how), expected)
    with pytest.raises(RecapError, match="resize_mode"): as_pixels([picture], 16, "crop")


# --- fault 21: captions over the limit

@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("policy", ["truncate", "cut", "refuse"])
def test_a_caption_over_the_limit_keeps_its_end_and_is_counted(words, clip, policy):
    from open_clip.tokenizer import SimpleTokenizer
    words = CaptionTokenizer(SimpleTokenizer() if clip else words.tokenizer)
    texts = ["A big red cat.", "A big red cat stands on the left, on a beach. " + "A tiny blue boat. "*30, ""]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if policy == "refuse":
            with pytest.raises(RecapError, match="text 1 has .* the limit is 40"): words.encode(texts, 40, policy)
            return
        ids = words.encode(texts, 40, policy)
    assert ids.shape[1] <= 40 and len(told) == 1 and f"policy {policy}" in str(told[0].message)
    assert (words.read, words.over, words.over_share) == (3, 1, 1/3)
    for row in ids.tolist(): assert row[0] == words.start and row.count(words.end) == 1 and all(i == words.pad for i in row[row.index(words.end) + 1:])
    kept = words.decode(ids[1]).replace(" .", ".")
    assert kept.lower().startswith("a big red cat stands on the left") and (kept.endswith("boat.") if policy == "truncate" else ids[1, -1] == words.end)
    with pytest.raises(RecapError, match="unknown policy"): words.encode(texts, 40, "window")


def test_clip_vocabulary_round_trip():
    from open_clip.tokenizer import SimpleTokenizer
    words = CaptionTokenizer(SimpleTokenizer())
    assert words.decode(words.encode(["a red cat, on the left."])[0]) == "a red cat , on the left ."


def test_nothing_of_a_new_captioner_is_left_uninitialised():
    import open_clip.coca_model
    kept = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True); torch.utils.deterministic.fill_uninitialized_memory = True      # torch.empty gives NaN
    try:
        cfg = captioner_config("tiny", 400)
        model, theirs = make_captioner(cfg), open_clip.coca_model.CoCa(**{k: v for k, v in cfg.items() if k != "custom_text"})
    finally: torch.use_deterministic_algorithms(kept[0]); torch.utils.deterministic.fill_uninitialized_memory = kept[1]
    assert [k for k, v in model.named_parameters() if not v.isfinite().all()] == []
    assert [k for k, v in theirs.named_parameters() if not v.isfinite().all()] == ["text_decoder.text_projection"]     # the reason for ours
    assert .1 < model.text_decoder.text_projection.std().item() < .15  # 64 ** -.5


def test_captions_decode_cleanly(words):
    for t in ("A big red cat stands on the left, on a beach.", "There is a tiny blue boat in the centre. It takes place in a meadow."):
        assert words.decode(words.encode([t])[0]) == t


def test_captioner_takes_every_kind_of_picture(words, tmp_path):
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size(), 20)
    c = Captioner(Loaded(make_captioner(cfg), words, dict(model_cfg=cfg), {"style": "dsc"}), device="cpu")
    pictures = [render(sample_scene(0, i), 64) for i in range(5)]
    array = np.stack([np.asarray(p) for p in pictures])
    rows = c.caption_rows(pictures, batch_size=2)
    assert [r["caption"] for r in rows] == c.caption(array) == c.caption(torch.from_numpy(array).permute(0, 3, 1, 2))
    assert set(rows[0]) == {"caption", "tokens", "logprob", "flags"} and all(r["flags"] in ("", "cut") and r["logprob"] <= 0 for r in rows)
    assert c.caption([]) == []
    assert len(c.caption([pictures[0].convert("L"), pictures[1].resize((300, 90))])) == 2
    with pytest.raises(RecapError, match="writes 'dsc'"): c.caption(pictures, style="ssc")
    draws = [c.caption(pictures, pick=sampler(keyed_torch(s, "d"), top_p=.9, top_k=50)) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("damage, says", [("gone", "is missing"), ("cut", "does not fit"), ("pickle", "does not fit"), ("no decoder", "cannot write captions")])
def test_a_damaged_folder_is_refused_in_one_line(words, tmp_path, damage, says):
    cfg = captioner_config("tiny", words.tokenizer.get_vocab_size())
    save_captioner(tmp_path, make_captioner(cfg), words, cfg, {})
    weights = tmp_path/"open_clip_model.safetensors"
    if damage == "gone": weights.unlink()
    if damage == "cut": weights.write_bytes(weights.read_bytes()[:5000])
    if damage == "pickle": torch.save({}, weights)
    if damage == "no decoder":
        config = json.loads((tmp_path/"open_clip_config.json").read_text()); del config["model_cfg"]["multimodal_cfg"]
        (tmp_path/"open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(RecapError, match=says) as e: load_captioner(tmp_path)
    assert "\n" not in str(e.value)


def test_shipped_captioner_is_small_and_writes_sentences():
    from recap.core import foundation
    try: folder = foundation("captioner")
    except RecapError: pytest.skip("no foundation captioner here")
    assert (folder/"open_clip_model.safetensors").stat().st_size <= 8_400_000
    rows = Captioner.from_pretrained(device="cpu").caption_rows([render(sample_scene(77, i, split="test"), 64) for i in range(16)])
    assert all(r["caption"] and not r["flags"] for r in rows)
