"A plan: its arithmetic by hand, its bytes against files, its counts against a model that exists."
import json

import pytest
import torch
import yaml
from conftest import ROOT, one_line, recap
from recap.cache import CacheConfig, build_cache, load_cache
from recap.core import RecapError
from recap.corpus import CorpusConfig, make_world
from recap.plan import FORMULAS, PLANS, human, make_plan, model_cost, plan_config, plan_table


def values(scale, **changes): return {line["name"]: line["value"] for line in make_plan(plan_config(scale, **changes))}


def test_hours_and_money_by_hand():
    v = values("real", images=7200, written=3, caption_per_second=2, encode_per_second=4, train_per_second=8, arms=2, steps=900, batch_size=16,
               pictures=100, inference_steps=10, price=3, devices=2)
    assert v["caption_hours"] == pytest.approx(3)            # 21,600 captions at 2 a second
    assert v["encode_hours"] == pytest.approx(.5)            # 7,200 pictures at 4
    assert v["train_hours"] == pytest.approx(1)              # 28,800 samples at 8
    assert v["paint_hours"] == pytest.approx(200/1.2/3600)   # a picture: ten steps of two passes, a sample of training: three; 8*3/20 a second
    assert v["cost"] == pytest.approx(3*(4.5 + 200/1.2/3600)) and v["days"] == pytest.approx((4.5 + 200/1.2/3600)/48)


def test_the_papers_run_by_hand():
    v = values("paper")
    assert v["samples"] == 1_024_000_000                     # "about a billion" (DALL-E 3, section 3)
    assert v["latents"] == 1e8*4*32*32*2 and v["text_states"] == 1e8*3*32*4096*2
    assert v["train_hours"] == pytest.approx(6*1.024e9/137/3600)


def test_storage_against_bytes_on_disk(tmp_path):
    make_world(CorpusConfig(n=20, shard_size=10, size=32, truth_styles="ssc,dsc"), tmp_path/"corpus")
    build_cache(CacheConfig(corpus=str(tmp_path/"corpus"), styles="ssc,dsc", size=32), tmp_path/"cache")
    cache = load_cache(tmp_path/"cache")
    from recap.text import TextEncoder
    texts = [c for s in ("ssc", "dsc") for c in cache.columns[s].values()]
    tokens = sum(len(r) for r in TextEncoder.from_pretrained().tokens(texts)[0])/len(texts)      # counted by the tokenizer, not by the cache
    v = values("cpu", images=20, size=32, columns=2, tokens=tokens)
    on_disk = {kind: sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in (tmp_path/"cache").glob(f"*.{kind}*")) for kind in ("latents", "text-")}
    assert v["latents"] == on_disk["latents"]
    assert v["text_states"] == pytest.approx(on_disk["text-"] - 4*2*20)      # beside the states, a length of four bytes each
    held = sum(a.nbytes for p in cache.parts for a in (p.bucket, p.row, *p.ends.values())) + sum(m.nbytes for m in cache.buckets.values())
    assert v["places"] == pytest.approx(held, abs=8*2*2)                     # one end more than captions, in each column and shard


def test_memory_against_a_model_that_is_trained():
    from recap.denoiser import make_unet
    unet = make_unet("xs", 8, 4, 256)
    opt = torch.optim.AdamW(unet.parameters())
    sum(p.square().sum() for p in unet.parameters()).backward(); opt.step()
    size = lambda tensors: sum(t.numel()*t.element_size() for t in tensors)
    v = values("cpu", denoiser="xs", size=32)
    assert v["weights"] == size(unet.parameters()) and v["gradients"] == size(p.grad for p in unet.parameters())
    assert v["optimiser"] == size(t for s in opt.state.values() for k, t in s.items() if k != "step")
    assert v["training_memory"] == pytest.approx(sum(v[k] for k in ("weights", "gradients", "optimiser", "average", "activations")))


def test_operations_against_a_layer_by_hand():
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as count: torch.nn.Conv2d(8, 16, 3, padding=1)(torch.zeros(1, 8, 10, 10))
    assert count.get_total_flops() == 2*100*16*8*9           # a product and a sum for each of nine places, eight channels in, sixteen out
    small, large = (model_cost("s", 8, n, 256, 16) for n in (8, 16))
    assert small[0] == large[0] and 3 < large[1]/small[1] < 5 and 3 < large[2]/small[2] < 5


def test_the_cpu_plan_is_the_cpu_scale():
    read = lambda name: yaml.safe_load((ROOT/"scales/cpu"/f"{name}.yaml").read_text())
    corpus, latents, arm = read("corpus"), read("latents"), read("train_dsc95")
    cfg = plan_config("cpu")
    assert (cfg.images, cfg.size, cfg.columns) == (corpus["n"], latents["size"], len(latents["styles"].split(",")))
    assert (cfg.steps, cfg.batch_size) == (arm["steps"], arm["batch_size"])
    assert cfg.arms == len(list((ROOT/"scales/cpu").glob("train_*.yaml")))


def test_what_is_printed_is_what_was_computed():
    for scale in PLANS:
        lines = make_plan(plan_config(scale))
        assert [line["name"] for line in lines] == [f[1] for f in FORMULAS]
        for line in lines: assert eval(line["numbers"]) == pytest.approx(line["value"], rel=1e-4)
        text = plan_table(lines, plan_config(scale))
        for line in lines: assert f"= {line['formula']}\n" in text and human(line["value"], line["unit"]) in text


def test_mistakes_in_one_line():
    for scale, changes in (("papre", {}), ("cpu", {"imagse": 3}), ("cpu", {"images": 0}), ("cpu", {"size": 60}), ("cpu", {"price": "much"})):
        with pytest.raises(RecapError) as e: plan_config(scale, **changes)
        assert "\n" not in str(e.value)


def test_the_command():
    done = recap(ROOT, "plan", "--scale", "cpu", "-p", "price=2", "--json")
    found = json.loads(done.stdout)
    v = {line["name"]: line["value"] for line in found["lines"]}
    assert done.returncode == 0 and v["cost"] == pytest.approx(2*v["device_hours"]) and found["inputs"]["price"] == 2
    assert "= steps*batch_size" in recap(ROOT, "plan").stdout
    one_line(recap(ROOT, "plan", "--scale", "papre"), "paper")
