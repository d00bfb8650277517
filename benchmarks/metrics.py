"""FID and CLIP score over 10,000 pictures: ours, torchmetrics, torch-fidelity, on the same features and networks, in turns.

    python -m benchmarks.metrics [--quick] [--out FILE] [--repeats N]

`frechet`: FID from features that are there already, 10,000 a side with Inception's 2,048 numbers: moments and distance. `inception`: the
network with random weights in torch-fidelity's format, over few pictures, because 10,000 would take half an hour a library on one core.
From the two follows what FID of 10,000 pictures against kept statistics would take; that sum is named `estimated`. `clip`: CLIP score of
10,000 pairs, measured as a whole, by a small random CLIP in transformers' format; once with 10,000 texts, once with four pictures a text, as
prompt suites have them. Times are of this process on one core. Every case also holds how far the answers differ. The last line's `ours`
and `peer` are those of the case where ours gains least, against the faster library; writes data/results/metrics.json (--quick: small
numbers, nothing written without --out)."""
import argparse
import importlib.metadata
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import clock, say, spread

SEED, PICTURES, INCEPTION = 0, 10_000, 24


def turns(ways, n, repeats, device):
    "Each way once a turn, every turn begun by another; items a second, and what the last turn answered. A few items first, to warm up."
    rates, answers, names = {k: [] for k in ways}, {}, list(ways)
    for way in ways.values(): way(40)
    for turn in range(repeats):
        for k in names[turn % len(names):] + names[:turn % len(names)]:
            begin = clock(device)
            answers[k] = ways[k](n)
            rates[k].append(n/(clock(device) - begin))
            print(f"  {k:14} {rates[k][-1]:9.1f} a second", flush=True)
    return rates, answers


def case(name, n, rates, differences, **more):
    "One case of the result: speeds, and ours over each peer in the same turn."
    ratio = {k: statistics.median(a/b for a, b in zip(rates["ours"], v)) for k, v in rates.items() if k != "ours"}
    print(f"{name}: " + ", ".join(f"{v:.2f}x {k}" for k, v in ratio.items()) + f"; differs by {max(differences.values()):.1e}", flush=True)
    return dict(name=name, pictures=n, per_second={k: spread(v) for k, v in rates.items()}, ratio=ratio, difference=differences, **more)


def passed_on(features):
    "torchmetrics takes a network; this one passes on what it is given."
    import torch
    class Given(torch.nn.Module):
        num_features = features
        def forward(self, x): return x
    return Given()


def frechet_case(n, d, repeats, device):
    "FID from features: correlated, not negative, of unequal scales."
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance
    from recap.distances import fid
    rng = np.random.default_rng(SEED)
    mix = (rng.normal(size=(d, d))*rng.gamma(1, 1, d)/np.sqrt(d)).astype(np.float32)
    x, y = (np.maximum(rng.normal(size=(n, d)).astype(np.float32) @ mix + s, 0) for s in (.3, .4))
    some = lambda m: (x, y) if m == n else (x[:m, :16], y[:m, :16])        # few: to warm up
    def torchmetrics(m):
        a, b = some(m)
        peer = FrechetInceptionDistance(passed_on(a.shape[1])).set_dtype(torch.float64)
        for v, real in ((a, True), (b, False)):
            for part in torch.tensor(v).split(256): peer.update(part, real=real)
        return float(peer.compute())
    fidelity = lambda m: fid_statistics_to_metric(*(fid_features_to_statistics(torch.tensor(v)) for v in some(m)), False)["frechet_inception_distance"]
    rates, found = turns({"ours": lambda m: fid(*some(m)), "torchmetrics": torchmetrics, "torch-fidelity": fidelity}, n, repeats, device)
    return case("frechet", n, rates, {k: abs(found[k] - found["ours"]) for k in found if k != "ours"}, features=d, value=found["ours"])


def inception_case(n, repeats, device):
    "Inception, pictures a second; the difference is of features, as a share of their length."
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchvision.models import inception_v3
    from recap.distances import Inception
    torch.manual_seed(SEED)
    x = torch.randint(0, 256, (n, 256, 256, 3), dtype=torch.uint8).numpy()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(), path := f"{folder}/weights.pth")
        ours, fidelity = Inception(path, device), FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path).to(device)
        metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=path, antialias=False).to(device).inception
    def by(net, m):
        with torch.inference_mode(): return np.concatenate([(out[0] if isinstance(out := net(part.to(device)), tuple) else out).cpu().numpy() for part in torch.tensor(x[:m]).permute(0, 3, 1, 2).split(8)])
    few = lambda m: n if m == n else 2
    rates, found = turns({"ours": lambda m: ours(x[:few(m)], batch_size=8), "torchmetrics": lambda m: by(metric, few(m)), "torch-fidelity": lambda m: by(fidelity, few(m))}, n, repeats, device)
    off = {k: float(np.linalg.norm(found[k] - found["ours"])/np.linalg.norm(found[k])) for k in found if k != "ours"}
    return case("inception", n, rates, off)


def estimate(found):
    "Minutes that FID of 10,000 pictures against kept statistics would take by the rates measured: every picture through Inception, then half of what both sides' features took."
    cases = {c["name"]: c["per_second"] for c in found}
    if not {"frechet", "inception"} <= set(cases): return None
    return {k: round(PICTURES*(1/v["median"] + .5/cases["frechet"][k]["median"])/60, 2) for k, v in cases["inception"].items()}


def make_clip(folder):
    "A CLIP in transformers' format with OpenAI's vocabulary and random weights."
    import gzip, open_clip, torch
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor
    folder, letters = Path(folder), list(bytes_to_unicode().values())
    merges = gzip.open(Path(open_clip.__file__).parent/"bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")[1:49152 - 256 - 2 + 1]
    pieces = [*letters, *(v + "</w>" for v in letters), *("".join(m.split()) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    sizes = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    torch.manual_seed(SEED)
    CLIPModel(CLIPConfig(text_config=dict(num_hidden_layers=2, **sizes), vision_config=dict(num_hidden_layers=4, image_size=64, patch_size=16, **sizes), projection_dim=128)).save_pretrained(folder)
    CLIPImageProcessor(size=dict(shortest_edge=64), crop_size=dict(height=64, width=64)).save_pretrained(folder)
    (folder/"vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)})); (folder/"merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder/"tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="CLIPTokenizer", model_max_length=77, bos_token="<|startoftext|>", eos_token="<|endoftext|>",
                                                               unk_token="<|endoftext|>", pad_token="<|endoftext|>")))


def clip_cases(n, repeats, device):
    "CLIP score, one text a picture and four pictures a text. The difference is of the mean of all cosines x 100."
    import torch
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPProcessor
    from recap.core import keyed_rng
    from recap.language import descriptive_caption
    from recap.metrics import clip_score, open_clip_scorer
    from recap.world import sample_scene
    with tempfile.TemporaryDirectory() as folder:
        make_clip(folder)
        scorer, processor = open_clip_scorer(folder, device), CLIPProcessor.from_pretrained(folder, local_files_only=True)
    class Tensors(torch.nn.Module): # transformers 5 returns an object where torchmetrics 1.9 expects its tensor
        def __init__(self): super().__init__(); self.model, self.config = scorer.model, scorer.model.config
        def get_image_features(self, x): return self.model.get_image_features(x).pooler_output
        def get_text_features(self, ids, mask): return self.model.get_text_features(ids, attention_mask=mask).pooler_output
    x = np.random.default_rng(SEED).integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)
    told = [f"{descriptive_caption(sample_scene(SEED, i, split='test'), keyed_rng(SEED, 'metrics', i))} {i}" for i in range(n)]  # a number behind each: no two alike
    for name, texts in (("clip", told), ("clip, four pictures a text", [told[i//4] for i in range(n)])):
        def torchmetrics(m):
            peer, pixels = CLIPScore(lambda: (Tensors(), processor)).to(device), torch.tensor(x[:m]).permute(0, 3, 1, 2)
            for i in range(0, m, 64): peer.update(list(pixels[i:i+64].to(device)), texts[i:min(m, i+64)])
            return float(peer.score/peer.n_samples)                                                             # before its cut at 0
        with torch.inference_mode(): rates, found = turns({"ours": lambda m: clip_score(x[:m], texts[:m], scorer), "torchmetrics": torchmetrics}, n, repeats, device)
        with torch.inference_mode(): few = torchmetrics(64)
        yield case(name, n, rates, {"torchmetrics": abs(few - 100*float(scorer.score(x[:64], texts[:64]).mean(dtype=float)))}, texts=len(set(texts)))


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="small numbers, to see that all works; nothing is written without --out")
    args.add_argument("--out", default="", help="where the numbers go, as JSON")
    args.add_argument("--device", default="cpu")
    args.add_argument("--repeats", type=int, default=3, help="turns")
    args = args.parse_args()
    import torch
    from recap.core import pick_device, project_root, write_json
    from recap.runs import provenance
    torch.set_num_threads(1)
    device, repeats, n = pick_device(args.device), 1 if args.quick else args.repeats, 256 if args.quick else PICTURES
    out, found = args.out or ("" if args.quick else project_root()/"data/results/metrics.json"), []
    def result(complete=False): # written after every case, so that a run that is cut short has told something
        if out: write_json(out, dict(seed=SEED, threads=1, device=str(device), clock="wall" if device.type == "cuda" else "process", repeats=repeats, quick=args.quick, cases=found, estimated=estimate(found), complete=complete,
                                 peers={k: importlib.metadata.version(k) for k in ("torchmetrics", "torch-fidelity")}, provenance=provenance()))
    for made in (lambda: [frechet_case(n, 64 if args.quick else 2048, repeats, device)], lambda: [inception_case(2 if args.quick else INCEPTION, repeats, device)], lambda: clip_cases(n, repeats, device)):
        for c in made(): found.append(c); result()
    result(complete=True)
    least, peer = min(((c, k) for c in found for k in c["ratio"]), key=lambda v: v[0]["ratio"][v[1]])
    say("metrics", least["per_second"]["ours"]["median"], least["per_second"][peer]["median"], case=least["name"], against=peer, unit="pictures a second",
        ratios={c["name"]: {k: round(v, 2) for k, v in c["ratio"].items()} for c in found})


if __name__ == "__main__": main()
