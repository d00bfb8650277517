"CLIP score against torchmetrics and transformers, on a tiny random CLIP in the real format; long texts; pairs that do not pair up."
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from test_text import clip_folder

from recap.core import RecapError, foundation
from recap.metrics import PretrainedClip, clip_score, clip_texts, fact_counts, open_clip_scorer, true_prompt_rank
from recap.scorers import ClipScorer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["A large red cat is on the left.", "a blue car", "Two green boats.", "a kite in the snow, as a drawing", "a blue car", "x"]
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 40, 52, 3), dtype=np.uint8)
LONG = "There is a red cat on a green mat. A blue dog sleeps beside it. "*12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "CLIP as the hub keeps it: OpenAI's vocabulary of 49,408, 77 places, random weights."
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor
    root = tmp_path_factory.mktemp("clip")
    text = clip_folder(root)
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16), projection_dim=8)).eval().save_pretrained(root/"clip")
    for f in (root/"tokenizer").iterdir(): shutil.copy(f, root/"clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(root/"clip")
    return root/"clip"


@pytest.fixture(scope="module")
def clip(folder): return open_clip_scorer(folder, device="cpu")


def theirs(clip, folder, images, texts):
    "torchmetrics' cosines x 100, pair by pair, before it cuts at 0."
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from transformers import CLIPProcessor
    class Tensors: # transformers 5 returns an object where torchmetrics 1.9 expects its tensor
        config = clip.model.config
        def to(self, device): return self
        def get_image_features(self, x): return clip.model.get_image_features(x).pooler_output
        def get_text_features(self, ids, mask): return clip.model.get_text_features(ids, attention_mask=mask).pooler_output
    with torch.no_grad(): return _clip_score_update(torch.as_tensor(images).permute(0, 3, 1, 2), list(texts), Tensors(), CLIPProcessor.from_pretrained(folder, local_files_only=True))[0].numpy()


def test_clip_score_agrees_with_torchmetrics(clip, folder):
    full = next(t for n in range(1, 40) if len(clip.words.encode([t := "a cat " * n + "!"])[0]) == 75)    # 77 with its frame: just fits
    texts = [*TEXTS[:5], full]
    peer, ours = theirs(clip, folder, PICTURES, texts), clip_score(PICTURES, texts, clip)
    assert (peer > 0).any() and np.abs(ours - np.maximum(peer, 0)).max() < 1e-3
    assert np.abs(100*clip.score(PICTURES, texts) - peer).max() < 1e-3


def test_torchmetrics_metric_agrees_on_the_mean(clip, folder):
    peer = theirs(clip, folder, PICTURES, TEXTS).mean()
    assert 100*np.mean(clip.score(PICTURES, TEXTS)) == pytest.approx(peer, abs=1e-3)


def test_a_pairs_score_does_not_depend_on_its_batch(clip):
    alone = [clip.score(PICTURES[i:i+1], TEXTS[i:i+1])[0] for i in range(6)]
    assert np.allclose(clip.score(PICTURES, TEXTS), alone, atol=1e-6) and np.allclose(clip.image_features(PICTURES, 4), clip.image_features(PICTURES), atol=1e-6)
    assert np.allclose(clip.text_features(TEXTS, 2), clip.text_features(TEXTS), atol=1e-6)


def test_arrays_tensors_and_pictures_are_read_alike(clip):
    want = clip.image_features(PICTURES)
    for form in (torch.as_tensor(PICTURES), torch.as_tensor(PICTURES).permute(0, 3, 1, 2), [Image.fromarray(p) for p in PICTURES]):
        assert np.allclose(clip.image_features(form), want, atol=1e-6)
    with pytest.raises(RecapError, match="uint8"): clip.image_features(PICTURES/255)


def test_bfloat16_stays_near(folder, clip):
    half = PretrainedClip.from_pretrained(folder, "cpu", "bfloat16")
    assert np.abs(half.score(PICTURES, TEXTS) - clip.score(PICTURES, TEXTS)).max() < 0.03


@pytest.mark.parametrize("which", ["pretrained", "small"])
def test_fault_21_a_long_text_is_never_cut_in_silence(which, clip):
    scorer, limit = (clip, 77) if which == "pretrained" else (ClipScorer.from_pretrained(foundation("clip_scorer")), 96)
    texts, pictures = ["a cat", LONG], PICTURES[:2]
    with pytest.raises(RecapError, match=f"text 1 has .* the limit is {limit}"): clip_score(pictures, texts, scorer)
    with pytest.warns(UserWarning, match=rf"1 of 2 texts \(50.0%\) are over {limit} tokens.*truncate"): cut = clip_score(pictures, texts, scorer, long="truncate")
    with pytest.warns(UserWarning, match=rf"1 of 2 texts \(50.0%\) are over {limit} tokens.*window: 0 tokens are not read"): windows = clip_score(pictures, texts, scorer, long="window")
    first = clip_texts([LONG], scorer, "truncate")[0][0]
    parts = clip_texts([LONG], scorer, "window")[0][0]
    assert len(first) == 1 and first[0].endswith(".") and LONG.startswith(first[0]) and parts[0] == first[0] and " ".join(parts) == LONG.strip()
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                 # every piece fits as it stands
        assert cut[1] == pytest.approx(clip_score(pictures[1:], first, scorer)[0], abs=1e-4)
        assert windows[1] == pytest.approx(100*max(0, np.mean(scorer.score(np.repeat(pictures[1:], len(parts), 0), parts))), abs=1e-3)
        assert cut[0] == windows[0] == pytest.approx(clip_score(pictures[:1], texts[:1], scorer)[0], abs=1e-4)
    with pytest.raises(RecapError, match="unknown policy"): clip_score(pictures, texts, scorer, long="cut")


def test_ranks_follow_the_same_policy(clip):
    texts = [f"a cat and {w}" for w in ("a dog", "two dogs", "a boat", "a kite", "snow")] + [LONG]
    with pytest.raises(RecapError, match="the limit is 77"): true_prompt_rank(PICTURES, texts, clip, k=4)
    with pytest.warns(UserWarning, match="1 of 6 texts"): ranks = true_prompt_rank(PICTURES, texts, clip, k=4, long="window")
    assert ranks.shape == (6,) and ranks.min() >= 1 and ranks.max() <= 4


@pytest.mark.parametrize("call", [
    lambda c: clip_score(PICTURES, TEXTS[:5], c), lambda c: clip_score(PICTURES[:1], TEXTS, c), lambda c: c.score(PICTURES, TEXTS[:2]),
    lambda c: true_prompt_rank(PICTURES, TEXTS[:3], c), lambda c: fact_counts([[("object", "cat")]], []), lambda c: clip_score([], ["a cat"], c),
])
def test_fault_45_numbers_that_differ_are_an_error(clip, call):
    with pytest.raises(RecapError) as e: call(clip)
    assert "\n" not in str(e.value)


def test_folders_that_are_no_clip(folder, tmp_path):
    with pytest.raises(RecapError, match="no CLIP here"): PretrainedClip.from_pretrained(tmp_path)
    shutil.copytree(folder, copy := tmp_path/"copy")
    (copy/"preprocessor_config.json").unlink()
    with pytest.raises(RecapError, match="preprocessor_config.json is missing"): open_clip_scorer(copy)
    shutil.copy(folder/"preprocessor_config.json", copy)
    (copy/"model.safetensors").rename(copy/"pytorch_model.bin")
    with pytest.raises(RecapError, match="pickled"): open_clip_scorer(copy)
    (copy/"config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecapError, match="'bert' is not a CLIP"): open_clip_scorer(copy)


def test_the_default_is_the_small_one():
    assert isinstance(open_clip_scorer(device="cpu"), ClipScorer)
    assert isinstance(open_clip_scorer(foundation("clip_scorer"), device="cpu"), ClipScorer)
