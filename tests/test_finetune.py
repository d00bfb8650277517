"Tuning to a style: what is learnt, what is refused, what survives a kill."
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, borrow, environment, one_line, recap

from recap.captioner import Loaded, as_pixels, batch_loss, captioner_config, captioner_tokenizer, load_captioner, make_captioner, save_captioner
from recap.core import RecapError, keyed_torch
from recap.finetune import FinetuneConfig, check_pairs, deal, hold_back, own_style, read_pairs, text_dropout, tune, write
from recap.world import render, sample_scene

TEXTS = [f"A {c} {n} {p}." for c in ("red", "blue", "green") for n in ("cat", "boat", "tree", "house") for p in ("on the left", "at the beach")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    words = captioner_tokenizer(TEXTS*3, 330)
    config = captioner_config("tiny", words.tokenizer.get_vocab_size())
    return Loaded(make_captioner(config).eval(), words, dict(model_cfg=config), {})


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    save_captioner(out, tiny.model, tiny.words, tiny.config["model_cfg"], {"stage": "test"})
    return out


def pictures(folder, texts, how="sidecar", size=(64, 64)):
    "Pictures with captions in one of the ways that people keep them."
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:02}.png" for i in range(len(texts))]
    for i, name in enumerate(names): render(sample_scene(0, i), *size).save(folder/name)
    if how == "sidecar":
        for name, text in zip(names, texts): (folder/name).with_suffix(".txt").write_text(text)
    elif how == "csv": (folder/"metadata.csv").write_text("file_name,text\n" + "".join(f'{n},"{t}"\n' for n, t in zip(names, texts)))
    else:
        key = "file_name" if how == "metadata" else "image"
        (folder/("metadata.jsonl" if how == "metadata" else "pairs.jsonl")).write_text("".join(json.dumps({key: n, "caption": t}) + "\n" for n, t in zip(names, texts)))
    return folder/"pairs.jsonl" if how == "jsonl" else folder


def test_only_the_caption_counts_not_the_prefix(tiny):
    "The batch loss with prefixes is the mean, token by token, of what open_clip's full forward gives for the captions behind them."
    texts, prefixes = TEXTS[:5], ["short:", "long:", "", "short:", "a long text of many words:"]
    x, w = torch.randn(5, 3, 64, 64, generator=keyed_torch(0, "x")), tiny.words
    with torch.no_grad():
        got = batch_loss(tiny.model, w, x, texts, prefixes=prefixes)[2].item()
        total = n = 0
        for i, (text, prefix) in enumerate(zip(texts, prefixes)):
            lead, said = w.ids([prefix])[0] if prefix else [], w.ids([text])[0] + [w.end]
            logits = tiny.model(x[i:i + 1], torch.tensor([[w.start, *lead, *said]]))["logits"][0].log_softmax(-1)
            total, n = total - sum(logits[len(lead) + j, t].item() for j, t in enumerate(said)), n + len(said)
        assert got == pytest.approx(total/n, rel=1e-5)
        assert batch_loss(tiny.model, w, x, texts, prefixes=[""]*5)[2].item() == pytest.approx(batch_loss(tiny.model, w, x, texts)[2].item(), rel=1e-5)
        assert abs(got - batch_loss(tiny.model, w, x, [f"{p} {t}" for p, t in zip(prefixes, texts)])[2].item()) > 1e-3


def test_the_prefix_decides_the_manner(tiny):
    "One captioner that never saw anything learns two manners of the same pictures, and only the prefix tells them apart."
    pairs = read_pairs("toy", "ssc,dsc").take(range(24))
    long = {s: "The picture shows a thing, and there is another thing beside it." if s == "dsc" else "A thing." for s in ("ssc", "dsc")}
    pairs.captions = [long[s] for s in pairs.styles]
    tuned, _ = tune(tiny, pairs, FinetuneConfig(style="ssc,dsc", steps=40, batch_size=16, lr=3e-3, muon_lr=.02, dropout=.1))
    assert {s: set(write(tuned, pairs.pixels[:6], s)) for s in long} == {s: {t} for s, t in long.items()}


def test_dropout_keeps_the_mean_and_goes_away(tiny):
    x, ids = torch.randn(2, 3, 64, 64, generator=keyed_torch(0, "x")), tiny.words.encode(TEXTS[:2])
    block, seen, model = tiny.model.text.transformer.resblocks[0], [], tiny.model.train()
    keys, plain = list(model.state_dict()), []
    kept = block.ls_1.register_forward_hook(lambda m, a, out: plain.append(out.detach()))
    for i in range(300):
        with text_dropout(model, .25, keyed_torch(0, i)):
            late = block.ls_1.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
            with torch.no_grad(): model(x, ids)
            late.remove()
    kept.remove()
    zero = torch.stack([(s == 0).float().mean() for s in seen]).mean().item()
    assert zero == pytest.approx(.25, abs=.01)
    error = (torch.stack(seen).mean(0) - plain[0]).abs().mean()/plain[0].abs().mean()
    assert error < 3*math.sqrt(.25/.75/300)
    with pytest.raises(ZeroDivisionError), text_dropout(model, .5, keyed_torch(0)): 1/0
    assert list(model.state_dict()) == keys and not any(m._forward_hooks for m in model.modules())
    model.eval()


@pytest.mark.parametrize("how", ["sidecar", "metadata", "csv", "jsonl"])
def test_every_way_to_keep_captions_gives_the_same_pairs(tmp_path, how):
    pairs = read_pairs(str(pictures(tmp_path/how, TEXTS[:9], how)), "mine=alt")
    assert pairs.captions == TEXTS[:9] and set(pairs.styles) == {"mine"} and not pairs.lost
    assert torch.equal(pairs.pixels, as_pixels([render(sample_scene(0, i), 64) for i in range(9)], 64))


def test_wide_pictures_are_seen_whole(tmp_path, tiny):
    pairs = read_pairs(str(pictures(tmp_path/"wide", TEXTS[:3], size=(64, 160))), "alt", tiny.pixels)
    assert torch.equal(pairs.pixels, as_pixels([render(sample_scene(0, i), 64, 160) for i in range(3)], 64))


@pytest.mark.parametrize("n", [2, 7, 20, 100])
def test_dealt_pairs_share_no_picture_and_the_styles_take_turns(n):
    pairs = read_pairs("written", "short,long")
    learn, held = hold_back(pairs, 40, seed=3)
    chosen = deal(learn, n, seed=3)
    assert len(set(chosen.keys)) == len(chosen) == n and not set(learn.keys) & set(held.keys)
    assert sorted(chosen.styles.count(s) for s in ("short", "long")) == [n//2, n - n//2]
    assert all(k[0] != "aside_4" for k in pairs.keys)


def test_checks_count_what_they_say(tiny, tmp_path):
    "Planted: two empty, one picture that is none, three too long (one of them without a sentence that fits), four alike."
    texts = TEXTS[:16] + ["", " "] + ["A red cat. " + "A blue boat at the beach "*40 + "."]*2 + ["red "*200] + ["A grey cat."]*4
    texts[-6] = texts[-6].replace("A red", "A green")
    path = pictures(tmp_path/"planted", texts, "jsonl")
    with open(path, "a") as f: f.write(json.dumps(dict(image="none.png", caption="Nothing.")) + "\n")
    pairs, said = check_pairs(read_pairs(str(path), "alt", tiny.pixels), tiny.words, 76)
    told = "\n".join(said)
    for part in ("2 pictures are without a caption", "1 pictures are unreadable (no such file)", "3 of 23 captions are over 76 tokens: 2 end behind the last sentence that fits, 1 are left out",
                 "4 of 22 pictures share their caption", "22 pairs are few"): assert part in told, told
    assert sorted(pairs.captions) == sorted(TEXTS[:16] + ["A red cat.", "A green cat."] + ["A grey cat."]*4)


def test_refusals_are_one_line(tmp_path, tiny_folder):
    root, base = borrow(tmp_path/"project"), ["--captioner", tiny_folder, "--style", "mine"]
    good, few = pictures(tmp_path/"good", TEXTS), pictures(tmp_path/"few", TEXTS[:7])
    same = pictures(tmp_path/"same", ["A cat."]*20)
    (tmp_path/"bad.jsonl").write_text('{"image": "x.png", "caption": "A cat."}\n{"caption": "no picture"}\n')
    full = tmp_path/"full"
    full.mkdir(); (full/"diary.txt").write_text("mine")
    one_line(recap(root, "tune", few, *base), "too few", "RECAP")
    for path, given, words in ((same, {}, ("whatever it sees", "A cat.")), (tmp_path/"bad.jsonl", {}, ("line 2", '"image"')), (tmp_path/"nowhere", {}, ("does not exist",)),
                               (good, {"column": "haiku"}, ("haiku",)), (good, {"out": str(full)}, ("diary.txt", "--out")), (good, {"captioner": str(good)}, ("not a captioner",))):
        with pytest.raises(RecapError) as e: own_style(str(path), "mine", **{"out": str(root/"runs/mine"), "captioner": str(tiny_folder), "tell": lambda line: None} | given)
        for w in words: assert w in str(e.value)
    assert (full/"diary.txt").read_text() == "mine" and not list((root/"runs").rglob("*.safetensors"))


def test_a_killed_tune_goes_on_to_the_same_weights(tmp_path, tiny_folder):
    root, path = borrow(tmp_path/"project"), pictures(tmp_path/"pairs", TEXTS)
    command = ["tune", path, "--captioner", tiny_folder, "--style", "mine", "--steps", 110, "--batch-size", 8]
    straight = recap(root, *command, "--out", tmp_path/"straight")
    assert straight.returncode == 0, straight.stderr
    going = subprocess.Popen([sys.executable, "-c", "from recap.command import main; main()", *map(str, command), "--out", str(tmp_path/"killed")],
                             env=environment(root), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path/"killed/checkpoint.safetensors").exists() and going.poll() is None: time.sleep(.01)
    os.kill(going.pid, signal.SIGKILL); going.wait()
    assert not (tmp_path/"killed/open_clip_config.json").exists()
    (path/"00.txt").write_text("Something else.")
    other = recap(root, *command, "--out", tmp_path/"killed")
    assert other.returncode == 2 and "other settings" in other.stderr.strip().split("\n")[-1]
    (path/"00.txt").write_text(TEXTS[0])
    again = recap(root, *command, "--out", tmp_path/"killed")
    assert again.returncode == 0, again.stderr
    a, b = (load_captioner(tmp_path/n).model.state_dict() for n in ("straight", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a) and not (tmp_path/"killed/checkpoint.safetensors").exists()
    one_line(recap(root, *command, "--out", tmp_path/"killed"), "finished captioner")
    said = recap(root, "caption", path/"00.png", "--captioner", tmp_path/"killed")
    assert said.returncode == 0 and said.stdout.strip() == f"{path/'00.png'}: {write(load_captioner(tmp_path/'killed'), as_pixels([render(sample_scene(0, 0), 64)], 64))[0]}"
    import open_clip
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path/'killed'}")
    x, ids = torch.randn(1, 3, 64, 64, generator=keyed_torch(0, "x")), torch.tensor([[2, 40, 41]])
    with torch.no_grad(): assert torch.allclose(theirs.eval()(x, ids)["logits"], load_captioner(tmp_path/"killed").model(x, ids)["logits"], atol=1e-5)


def test_check_writes_nothing(tmp_path, tiny_folder):
    said = []
    found = own_style(str(pictures(tmp_path/"pairs", TEXTS)), "mine", out=str(tmp_path/"out"), captioner=str(tiny_folder), check=True, tell=said.append)
    assert (found["pairs"], found["held_out"]) == (20, 4) and not (tmp_path/"out").exists() and any("few" in s for s in said)


@pytest.mark.parametrize("wrong", [dict(style=""), dict(style="a b"), dict(dropout=1.), dict(held_out=-1), dict(steps=0)])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(RecapError): FinetuneConfig(**wrong)


def test_the_study_and_this_page_agree_on_their_parameters():
    import yaml
    from recap.runs import page_parameters
    declared = set(page_parameters("10_finetune")) - {"threads"}
    for path in sorted((ROOT/"scales").glob("*/tune_*.yaml")): assert set(yaml.safe_load(path.read_text())) == declared, path
