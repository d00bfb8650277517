"What 09a_captioners cannot show on a page: other architectures, all kinds of pictures, kills in the middle of a paid pass, the command, a real `transformers serve`."
import base64
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image
from conftest import borrow, one_line, recap

pytest.importorskip("openai")
from recap.captioners import CocaCaptioner, ServerCaptioner, TransformersCaptioner, caption_prompts, default_captioner, judge_rows, open_captioner
from recap.core import RecapError, project_root
from recap.corpus import CorpusConfig, make_world, open_corpus
from recap.relabel import relabel
from recap.servers import Loopback, ServerConfig, as_picture

CHAT = "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %} assistant: "
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=.3)
SEEN = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


@pytest.fixture(scope="module", autouse=True)
def offline():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    torch.set_num_threads(1)


def pieces(texts, special):
    "A byte-level BPE of these texts, as transformers saves it."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE()); bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, special_tokens=["<pad>", "<s>", "</s>", *special], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=special)


def letters():
    "BERT's kind of tokenizer, for letters alone."
    from transformers import BertTokenizerFast
    abc = "abcdefghijklmnopqrstuvwxyz"
    return BertTokenizerFast(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *abc, *("##" + c for c in abc)])})


def make_llava(folder):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    words = pieces([*caption_prompts().values()], ["<image>"])
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **SMALL), image_token_id=3, vision_feature_layer=-1,
                         text_config=LlamaConfig(vocab_size=len(words), num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SMALL))
    return LlavaForConditionalGeneration(config), LlavaProcessor(CLIPImageProcessor(**SEEN), words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT)


def make_blip(folder):
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
    words = letters()
    config = BlipConfig(text_config=dict(vocab_size=len(words), encoder_hidden_size=32, bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0, max_position_embeddings=64, projection_dim=16, **SMALL),
                        vision_config=dict(image_size=28, patch_size=14, projection_dim=16, **SMALL), projection_dim=16, image_text_hidden_size=16)
    return BlipForConditionalGeneration(config), BlipProcessor(BlipImageProcessor(size={"height": 28, "width": 28}), words)


def make_git(folder):
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor
    words = letters()
    config = GitConfig(vocab_size=len(words), max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0, vision_config=dict(image_size=28, patch_size=14, **SMALL), **SMALL)
    return GitForCausalLM(config), GitProcessor(CLIPImageProcessor(**SEEN), words)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of tiny models with random weights, in the files of the real ones."
    import torch
    home = tmp_path_factory.mktemp("models")
    for name, make in (("llava", make_llava), ("blip", make_blip), ("git", make_git)):
        torch.manual_seed(1)
        for part in make(home/name): part.save_pretrained(home/name)
    return home


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + 7*i, 60 - 6*i, 3), dtype=np.uint8)) for i in range(5)]


# --- models of transformers

@pytest.mark.parametrize("name", ["llava", "blip", "git"])
def test_batches_give_what_each_picture_gives_alone(models, pictures, name):
    maker = open_captioner(models/name, device="cpu")
    assert isinstance(maker, TransformersCaptioner) and maker.styles == (tuple(caption_prompts()) if name == "llava" else ())
    rows = [maker.caption_rows(pictures, batch_size=b, max_len=9) for b in (1, 2, 64)]
    assert len({tuple((r["caption"], r.get("said"), r["tokens"], r["flags"]) for r in told) for told in rows}) == 1
    assert all(abs(a["logprob"] - b["logprob"]) < 1e-3 and 0 < a["tokens"] <= 9 and (not a["caption"] or not a["flags"]) for a, b in zip(rows[0], rows[2]))
    assert len({r["logprob"] for r in rows[2]}) > 1, "the pictures make no difference"


@pytest.mark.parametrize("name", ["blip", "git"])
def test_log_probability_is_that_of_the_whole_text(models, pictures, name):
    import torch
    maker = TransformersCaptioner(models/name, device="cpu")
    (row,), model = maker.generate(pictures[:1], "", 9), maker.loaded[0]
    pixels = maker.inputs(pictures[:1], "")["pixel_values"]
    ids = model.generate(pixel_values=pixels, max_new_tokens=9, do_sample=False, num_beams=1)
    with torch.no_grad():
        if name == "git": logits = model(input_ids=ids, pixel_values=pixels).logits[:, -ids.shape[1]:]
        else: logits = model(input_ids=ids, pixel_values=pixels).logits
    steps = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[0, :, 0]
    assert abs(steps.sum().item() - row["logprob"]) < 1e-3


def test_an_end_ends(models, pictures):
    "A model whose first token is the end has written nothing, and its row says so."
    maker = TransformersCaptioner(models/"llava", device="cpu")
    maker.loaded[0].generation_config.eos_token_id = list(range(len(maker.loaded[1].tokenizer)))
    rows = maker.caption_rows(pictures, "ssc", max_len=5)
    assert [(r["caption"], r["tokens"], r["flags"]) for r in rows] == [("", 0, "empty")]*5 and all(r["logprob"] < 0 for r in rows)


def test_the_instruction_reaches_the_model(models, pictures):
    maker = TransformersCaptioner(models/"llava", device="cpu", prompts={"fruit": "Name the fruit."})
    words = maker.loaded[1].tokenizer
    text = words.decode(maker.inputs(pictures[:1], maker.prompt("fruit"))["input_ids"][0])
    assert text.replace(" ", "").startswith("user:<image>") and text.rstrip().endswith("Name the fruit. assistant:")
    assert maker.prompt(None) == caption_prompts()["dsc"]
    assert len({TransformersCaptioner(models/"llava", prompts=p).hash for p in (None, {"fruit": "a"}, {"fruit": "b"})}) == 3


def test_pickled_weights_and_other_folders_are_refused(models, tmp_path):
    import shutil, torch
    folder = tmp_path/"pickled"
    shutil.copytree(models/"blip", folder)
    torch.save({}, folder/"pytorch_model.bin"); (folder/"model.safetensors").unlink()
    with pytest.raises(RecapError, match="cannot be loaded") as e: open_captioner(folder).caption([Image.new("RGB", (9, 9))])
    assert "\n" not in str(e.value)
    (tmp_path/"text").mkdir(); (tmp_path/"text"/"config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(RecapError, match="cannot be loaded as an image-text-to-text model"): open_captioner(tmp_path/"text").caption([Image.new("RGB", (9, 9))])
    (tmp_path/"void").mkdir()
    with pytest.raises(RecapError, match="is no captioner"): open_captioner(tmp_path/"void")
    with pytest.raises(RecapError, match="nothing is downloaded"): open_captioner("Qwen/Qwen3-VL-8B-Instruct")


# --- what all makers do

def kinds():
    "One picture in every form that a caller may hold."
    im = Image.new("RGB", (30, 20), (200, 30, 40)); im.paste((20, 30, 200), (0, 0, 10, 20))
    f = io.BytesIO(); im.save(f, "PNG")
    return im, [im, im.convert("RGBA"), np.asarray(im), np.asarray(im).transpose(2, 0, 1), f.getvalue()]


def test_pictures_of_every_kind(models, tmp_path):
    im, same = kinds()
    (tmp_path/"p.png").write_bytes(same[-1])
    coca, blip = CocaCaptioner(default_captioner()), open_captioner(models/"blip", device="cpu")
    with Loopback(lambda body, n: coca.caption([base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1])])[0]) as service:
        server = ServerCaptioner(ServerConfig(service.url, "coca", cache="", concurrency=2))
        for maker in (coca, blip, server):
            told = [{k: r.get(k) for k in ("caption", "said", "flags")} for r in maker.caption_rows([*same, tmp_path/"p.png"], max_len=8 if maker is blip else None)]
            assert all(t == told[0] for t in told) and (told[0]["caption"] or told[0]["said"]), type(maker).__name__
        odd = [Image.new("L", (1, 1)), Image.new("CMYK", (5, 500)), Image.new("P", (500, 5)), Image.new("I;16", (9, 9)), Image.new("LA", (9, 9))]
        for maker in (coca, blip, server): assert len(maker.caption_rows(odd)) == 5


def test_a_tensor_of_pictures():
    import torch
    coca = CocaCaptioner(default_captioner())
    x = np.stack([np.asarray(kinds()[0].resize((64, 64)))]*3)
    assert coca.caption(x) == coca.caption(torch.from_numpy(x).permute(0, 3, 1, 2)) == coca.caption([Image.fromarray(a) for a in x])


@pytest.mark.parametrize("bad", [b"<html>", b"", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_picture_has_a_reason(bad):
    from recap.pictures import BadImage
    with pytest.raises(BadImage): as_picture(bad)


def test_flags_of_all_sorts():
    rows = judge_rows([dict(caption="Sorry, I can't help with that.", flags="cut"), dict(caption="a cat on a mat", flags=""), dict(caption=None, flags=None), dict(caption="x", flags="failed", why="no")])
    assert [(r["caption"], r["flags"]) for r in rows] == [("", "cut,refusal,apology"), ("a cat on a mat", ""), ("", "empty"), ("", "failed")]
    five = judge_rows([dict(caption="a very plain picture of nothing much")]*5)
    assert {r["flags"] for r in five} == {"repeated"} and all(r["caption"] for r in five)


# --- relabelling with a server

CHILD = '''
import sys
from recap.relabel import relabel
from recap.servers import ServerConfig
relabel(sys.argv[1], ServerConfig(sys.argv[2], "toy", cache=sys.argv[4], concurrency=2), ["dsc"], sys.argv[3], batch_size=4)
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")/"corpus"
    make_world(CorpusConfig(n=20, shard_size=5, size=32), out)
    return out


def by_colour(body, n=0):
    im = np.asarray(as_picture(base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1])))
    return f"mean colour {''.join(f'{int(v):02x}' for v in im.reshape(-1, 3).mean(0))}, sum {int(im.sum())}"


def columns(out): return {p.name: p.read_bytes() for p in sorted((out/"captions"/"dsc").iterdir()) if p.suffix in (".parquet", ".json")}


def test_22_killed_while_a_server_is_asked(world, tmp_path):
    "The rerun gives the uninterrupted output, and asks for nothing that was answered and saved."
    with Loopback(by_colour) as server:
        relabel(world, ServerConfig(server.url, "toy", cache="", concurrency=2), ["dsc"], tmp_path/"whole", batch_size=4)
        whole, before = columns(tmp_path/"whole"), len(server.requests)
        def slow(body, n): time.sleep(.05); return by_colour(body)
        server.answer = slow
        args = [sys.executable, "-c", CHILD, world, server.url, tmp_path/"out", tmp_path/"kept"]
        env = os.environ | {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1"}
        for n in (3, 9, 15):
            child = subprocess.Popen(args, env=env)
            deadline = time.time() + 120
            while len(server.requests) - before < n and time.time() < deadline and child.poll() is None: time.sleep(.01)
            child.send_signal(signal.SIGKILL); child.wait()
        subprocess.run(args, env=env, check=True)
        assert columns(tmp_path/"out") == whole
        assert len(server.requests) - before <= 20 + 3*2          # only what was on its way at a kill is asked again


def test_36_a_refused_picture_keeps_its_original(world, tmp_path):
    from recap.blend import Recipe, blend_captions
    def squeamish(body, n): return Loopback.reply(None, refusal="I can't.") if n == 4 else Loopback.reply("cut in the", "length") if n == 5 else by_colour(body)
    with Loopback(squeamish) as server: told = relabel(world, ServerConfig(server.url, "toy", cache=str(tmp_path/"kept"), concurrency=1), ["dsc"], tmp_path)["dsc"]
    assert (told["flags"], told["empty"], told["complete"], told["failures"]) == ({"refusal": 1, "cut": 1}, 2, True, {})
    corpus = open_corpus(world, tmp_path/"captions")
    texts, alt = corpus.captions("dsc"), corpus.captions("alt")
    empty = [k for k, t in texts.items() if not t]
    assert len(empty) == 2 and "cut in the" not in texts.values()
    read = dict(zip(texts, blend_captions(Recipe("all", {"dsc": 1.}), {"dsc": texts, "alt": alt}, list(texts))))
    assert all(read[k] == (alt[k] if k in empty else texts[k]) for k in texts)


def test_32_quota_used_up_in_the_middle(world, tmp_path):
    def poor(body, n): return by_colour(body) if n < 12 else (429, {}, b'{"error": {"message": "quota", "code": "insufficient_quota"}}')
    with Loopback(poor) as server:
        where = ServerConfig(server.url, "toy", cache=str(tmp_path/"kept"), concurrency=1)
        with pytest.raises(RecapError, match="quota is used up"): relabel(world, where, ["dsc"], tmp_path, batch_size=5)
        assert len(list((tmp_path/"captions"/"dsc").glob("*.parquet"))) == 2 and not open_corpus(world, tmp_path/"captions").manifest("dsc")["complete"]
        server.answer, before = by_colour, len(server.requests)
        assert relabel(world, where, ["dsc"], tmp_path, batch_size=5)["dsc"]["complete"] and len(server.requests) - before == 8


def test_another_instruction_is_another_captioner(world, tmp_path):
    with Loopback(by_colour) as server:
        maker = lambda text: ServerCaptioner(ServerConfig(server.url, "toy", cache=str(tmp_path/"kept")), {"own": text})
        relabel(world, maker("Name the colour."), ["own"], tmp_path)
        with pytest.raises(RecapError, match="written by another captioner"): relabel(world, maker("Name the colours."), ["own"], tmp_path)
    assert open_corpus(world, tmp_path/"captions").manifest("own")["made"]["prompt"] == "Name the colour."


def test_a_model_of_transformers_writes_a_column(world, models, tmp_path):
    done = relabel(world, str(models/"blip"), ["dsc"], tmp_path, batch_size=8)["dsc"]
    assert done["images"] == 20 and done["captioner"]["name"] == "blip" and done["made"] == {"maker": "transformers", "prompt": ""}


# --- the command

@pytest.fixture(scope="module")
def root(tmp_path_factory): return borrow(tmp_path_factory.mktemp("command"))


def test_caption_with_a_server(root, tmp_path):
    for c in ("red", "blue"): Image.new("RGB", (16, 16), c).save(tmp_path/f"{c}.png")
    names = [str(tmp_path/f"{c}.png") for c in ("red", "blue")]
    def answer(body, n): return "I'm sorry, but I can't help with that." if by_colour(body).startswith("mean colour 00") else "A red square."
    with Loopback(answer) as server:
        done = recap(root, "caption", *names, "--captioner", f"{server.url}?concurrency=1&cache={tmp_path}/kept#toy", "--style", "ssc", "--json")
        assert done.returncode == 1 and [(r["file"], r["caption"], r["flags"]) for r in json.loads(done.stdout)] == [(names[0], "A red square.", ""), (names[1], "", "refusal,apology")]
        assert done.stderr == f"recap: {names[1]}: no caption (refusal,apology): I'm sorry, but I can't help with that.\n"
        assert server.requests[0]["messages"][0]["content"][1]["text"] == caption_prompts()["ssc"]
        done = recap(root, "caption", names[0], "--captioner", f"{server.url}?cache={tmp_path}/kept#toy", "--style", "ssc")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{names[0]}: A red square.\n", "") and len(server.requests) == 2
        one_line(recap(root, "caption", names[0], "--captioner", f"{server.url}#toy", "--style", "haiku"), "data/prompts/captions/haiku.txt")
        one_line(recap(root, "caption", names[0], "--captioner", f"{server.url}?cach=x#toy"), "did you mean 'cache'")
    gone = recap(root, "caption", names[1], "--captioner", f"{server.url}?cache=&retries=0#toy")
    assert gone.returncode == 1 and gone.stderr.count("\n") == 1 and "no caption (failed): no connection" in gone.stderr


def test_relabel_with_a_server(root, tmp_path):
    (tmp_path/"in").mkdir()
    for i in range(3): Image.new("RGB", (16 + i, 16), (80*i, 0, 0)).save(tmp_path/"in"/f"{i}.png")
    with Loopback(by_colour) as server:
        done = recap(root, "relabel", tmp_path/"in", "--out", tmp_path/"out", "--captioner", f"{server.url}?cache={tmp_path}/kept#toy", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["images"] == 3 and told["spent"]["dsc"]["calls"] == 3 and told["captioners"]["dsc"]["name"] == "toy"
        rows = [json.loads(line) for line in (tmp_path/"out"/"metadata.jsonl").read_text().splitlines()]
        assert [r["text"].split()[:2] for r in rows] == [["mean", "colour"]]*3
        stop = recap(root, "relabel", tmp_path/"in", "--style", "ssc", "--out", tmp_path/"out", "--captioner", f"{server.url}?cache={tmp_path}/kept&max_calls=1&concurrency=1#toy")
        assert stop.returncode == 1 and stop.stderr.count("\n") == 1 and "budget is used up after 1 calls" in stop.stderr


# --- a real server

@pytest.mark.slow
@pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in ("fastapi", "uvicorn")), reason="transformers serve needs fastapi and uvicorn: pip install -e '.[dev]'")
def test_transformers_serve(models, pictures, tmp_path):
    "What a real server makes of our requests: the same words as the model gives in this process."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    (tmp_path/"hub").mkdir()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path/"hub"), "OMP_NUM_THREADS": "1"}
    log = open(tmp_path/"log", "w")
    process = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(models/"llava"), "--device", "cpu", "--port", str(port)], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 240
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5); break
            except OSError: assert process.poll() is None and time.time() < deadline, (tmp_path/"log").read_text()[-3000:]; time.sleep(.5)
        server = open_captioner(f"http://127.0.0.1:{port}/v1?concurrency=2&cache={tmp_path}/kept&timeout=300#{models/'llava'}")
        rows = server.caption_rows(pictures, "ssc", max_len=9)
        here = TransformersCaptioner(models/"llava", device="cpu").caption_rows(pictures, "ssc", max_len=9)
        assert [r["flags"].split(",")[0] for r in rows] == [r["flags"].split(",")[0] for r in here] and server.server.spent["calls"] == 5
        assert [r.get("said") or r["caption"] for r in rows] == [r.get("said") or r["caption"] for r in here]
    finally: os.killpg(process.pid, signal.SIGTERM); process.wait(30)
