"""Training the denoiser: pictures a second of a plain diffusers text-to-image script, of that script step by step made faster, and of ours.

    python -m benchmarks.train [--quick] [--out data/results/train.json] [--device auto] [--sizes s] [--repeats 3] [--steps 3] [--compile]

The plain script follows diffusers' examples/text_to_image/train_text_to_image.py: float32, pictures decoded and texts tokenized as they come,
the autoencoder and the text encoder run on every batch, captions padded to the text encoder's limit, AdamW and the averages of the weights
one tensor after the other. Every rung of the ladder changes one thing more; the last two are `recap.fit.fit` with the loss of page 17_train
as it is shipped, once with AdamW (the same work as the script's) and once with Muon (which is chosen because it learns more from a picture).
All of them train the same denoiser from the same weights on the same pictures, batches of 64, clipped gradients, averaged weights. They take
turns; the ratios are medians over the turns. On a CPU the time is the processor time of this one-threaded process, so that other programs on
the machine count little; on a GPU it is the clock's. `tried` is what the last rung of the script does not do, and what it would bring there:
more than 1 is a gain. The ratio of the last line: ours with AdamW over the plain script."""
import argparse
import dataclasses
import io
import statistics
import tempfile
import time
from itertools import chain, repeat
from pathlib import Path

from benchmarks import clock, rate, say, spread

BATCH, PICTURES, SEED, WARM, LR, DECAY = 64, 256, 0, 1, 1e-4, .99
RUNGS = {  # each adds to those before it
    "plain script": {},
    "latents and text kept": dict(kept=True),
    "fused AdamW": dict(fused=True),
    "averages in one call": dict(one_call=True),
    "bfloat16": dict(dtype="bf16", tuned=True),
    "captions to the batch's longest": dict(trimmed=True),
}
OURS = {"recap": dict(lr=LR), "recap with Muon": dict(lr=LR, muon_lr=.01)}
TRIED = {  # beside the last rung
    "float32": dict(dtype="no"),
    "diffusers' own attention": dict(tuned=False),
    "channels_last": dict(layout=True),
    "captions of like length together": dict(alike=True),
    "compiled": dict(compiled=True),
}
PEER = "latents and text kept"   # the script that caches, as others do


@dataclasses.dataclass(frozen=True)
class How:
    "What of the script is replaced."
    kept: bool = False       # latents and text states encoded beforehand
    fused: bool = False      # AdamW in one pass over each tensor
    one_call: bool = False   # averages of all weights in one call
    dtype: str = "no"        # autocast
    tuned: bool = False      # the attention that recap takes on this device
    trimmed: bool = False    # captions as long as the batch's longest, the padding masked
    layout: bool = False     # channels_last
    alike: bool = False      # batches of captions of like length
    compiled: bool = False


class Material:
    "Pictures of the world with descriptive captions: as files in memory, and encoded."
    def __init__(self, n, device):
        from recap.cache import CacheConfig, build_cache, load_cache
        from recap.corpus import CorpusConfig, make_world, open_corpus
        from recap.latents import load_vae
        from recap.text import TextEncoder
        self.folder = tempfile.TemporaryDirectory()
        home, self.device = Path(self.folder.name), device
        make_world(CorpusConfig(n=n, shard_size=128, seed=SEED, truth_styles="dsc"), home/"corpus")
        build_cache(CacheConfig(corpus=str(home/"corpus"), styles="dsc"), home/"encoded")
        corpus, self.cache = open_corpus(home/"corpus"), load_cache(home/"encoded")
        captions = corpus.captions("dsc")
        self.files = [(s.read(), captions[shard, s.key]) for shard in corpus.shards for s in corpus.sources(shard)]
        self.vae, self.text = load_vae(None, device), TextEncoder.from_pretrained(None, device)
        self.kept = None

    def encoded(self):
        "Latents, text states and mask of every picture, the text padded to the limit; as a script keeps them."
        import torch
        if self.kept is None:
            states, mask = self.cache.states(range(n := len(self.files)), ["dsc"]*n)
            room = self.text.max_tokens - mask.shape[1]
            self.kept = self.cache.latents[list(range(n))].float(), torch.nn.functional.pad(states, (0, 0, 0, room)), torch.nn.functional.pad(mask, (0, room))
        return self.kept


def batches(material, how, size, batch):
    "The script's loader: batches without end, in a new order every epoch."
    import torch
    from PIL import Image
    from torchvision import transforms as T
    look = T.Compose([T.Resize(size, interpolation=T.InterpolationMode.BILINEAR), T.CenterCrop(size), T.ToTensor(), T.Normalize([.5], [.5])])
    text = material.text

    class Files(torch.utils.data.Dataset):
        def __len__(self): return len(material.files)
        def __getitem__(self, i): data, caption = material.files[i]; return look(Image.open(io.BytesIO(data)).convert("RGB")), caption

    def together(rows):
        ids = [r + [text.tokenizer.pad]*(text.max_tokens - len(r)) for r in text.tokens([c for _, c in rows], "truncate")[0]]
        return torch.stack([p for p, _ in rows]), torch.tensor(ids)

    def trim(rows):
        z, states, mask = map(torch.stack, zip(*rows))
        if not how.trimmed: return z, states
        longest = int(mask.sum(1).max())
        return z, states[:, :longest], mask[:, :longest]

    data, collate = (torch.utils.data.TensorDataset(*material.encoded()), trim) if how.kept else (Files(), together)
    order = dict(batch_sampler=Alike(material, batch)) if how.alike else dict(batch_size=batch, shuffle=True, drop_last=True)
    return chain.from_iterable(repeat(torch.utils.data.DataLoader(data, collate_fn=collate, **order)))


class Alike:
    "Batches of samples whose captions are about equally long, in random order."
    def __init__(self, material, batch): self.lengths, self.batch = material.encoded()[2].sum(1), batch
    def __iter__(self):
        import torch
        order = torch.randperm(len(self.lengths))
        order = order[self.lengths[order].argsort(stable=True)]
        groups = order[:len(order)//self.batch*self.batch].view(-1, self.batch)
        return iter(groups[torch.randperm(len(groups))].tolist())


def denoiser(material, size):
    "The same denoiser every time; its last layer is not zero, as in a run that has begun."
    import torch
    from recap.denoiser import make_unet
    torch.manual_seed(SEED)
    z, states, _ = material.encoded()
    unet = make_unet(size, z.shape[1], z.shape[2], states.shape[2])
    torch.nn.init.normal_(unet.conv_out.weight, std=.02)
    return unet.to(material.device).train()


def script(material, how, size, batch, steps):
    "The loop of the script: seconds of each step but the first, the denoiser and its averages."
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from recap.denoiser import tune_attention
    AcceleratorState._reset_state()
    acc, unet = Accelerator(mixed_precision=how.dtype, cpu=material.device.type == "cpu"), denoiser(material, size)
    if how.tuned: tune_attention(unet)
    else: unet.set_default_attn_processor()
    if how.layout: unet.to(memory_format=torch.channels_last)
    vae, text, schedule = material.vae, material.text.model, DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=.01, **({"fused": True} if how.fused else {}))
    ema = [p.detach().clone() for p in unet.parameters()] if how.one_call else EMAModel(unet.parameters(), decay=DECAY)
    net, optimizer, lr = acc.prepare(unet, optimizer, get_scheduler("constant", optimizer))
    if how.compiled: net = torch.compile(net)
    loader, seconds = iter(batches(material, how, 64, batch)), []
    for step in range(steps + WARM):
        begin, mask = clock(material.device), None
        if how.kept: z, states, *mask = (v.to(acc.device) for v in next(loader)); mask = mask[0] if mask else None
        else:
            pixels, ids = (v.to(acc.device) for v in next(loader))
            with torch.no_grad():
                z = (vae.encode(pixels).latent_dist.sample() - vae.config.shift_factor)*vae.config.scaling_factor
                states = text(input_ids=ids)[0]
        if how.layout: z = z.contiguous(memory_format=torch.channels_last)
        noise, t = torch.randn_like(z), torch.randint(0, schedule.config.num_train_timesteps, (len(z),), device=z.device)
        said = net(schedule.add_noise(z, noise, t), t, states, encoder_attention_mask=mask).sample
        loss = torch.nn.functional.mse_loss(said.float(), noise.float())
        acc.gather(loss.detach().repeat(batch)).mean().item()
        acc.backward(loss)
        acc.clip_grad_norm_(unet.parameters(), 1.)
        optimizer.step(); lr.step(); optimizer.zero_grad()
        if how.one_call: torch._foreach_lerp_(ema, [p.detach() for p in unet.parameters()], 1 - min(DECAY, (step + 1)/(step + 10))*(step > 0))   # EMAModel's own rise
        else: ema.step(unet.parameters())
        seconds.append(clock(material.device) - begin)
    return seconds[WARM:], unet, ema if how.one_call else ema.shadow_params


def ours(material, settings, size, batch, steps):
    "Our loop, as page 17_train calls it: seconds of each step but the first."
    from recap.blend import parse_recipe
    from recap.fit import FitConfig, fit
    from recap.train import CaptionDraw, recipe_loss
    cache, marks = material.cache, []
    loss_of = recipe_loss(cache, CaptionDraw(parse_recipe("dsc:1"), cache, SEED), batch)
    def marked(*args): marks.append(clock(material.device)); return loss_of(*args)
    fit(denoiser(material, size), marked, len(cache.keys), FitConfig(steps=steps + WARM + 1, batch_size=batch, warmup=1, ema=DECAY, seed=SEED, **settings))
    return [b - a for a, b in zip(marks, marks[1:])][WARM:]


def operations(material, size, batch):
    "Floating-point operations of the products and convolutions of one step, forward and back; and the length of its captions."
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    z, states, mask = (v.to(material.device) for v in next(iter(batches(material, How(kept=True, trimmed=True), 64, batch))))
    unet = denoiser(material, size)
    with FlopCounterMode(display=False) as count: unet(z, torch.full((len(z),), 500, device=z.device), states, encoder_attention_mask=mask).sample.square().mean().backward()
    return count.get_total_flops(), mask.shape[1]


KINDS = {"convolutions": ("conv",), "products": ("mm", "linear", "attention"), "norms": ("norm",), "copies and casts": ("copy", "cat", "clone", "_to_"),
         "optimiser and averages": ("adam", "lerp", "foreach")}

def parts(material, settings, size, batch):
    "Share of our step's time, by the kind of kernel."
    from torch.profiler import ProfilerActivity, profile
    gpu = material.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*gpu) as seen: ours(material, settings, size, batch, 2)
    found = {}
    for e in seen.key_averages():
        if not e.key.startswith("aten::"): continue
        kind = next((k for k, words in KINDS.items() if any(w in e.key for w in words)), "sums, activations, the rest")
        found[kind] = found.get(kind, 0) + (e.self_device_time_total if gpu else e.self_cpu_time_total)
    return {k: round(v/sum(found.values()), 4) for k, v in sorted(found.items(), key=lambda kv: -kv[1])}


def ladder():
    "Every rung's name and what the script does there."
    done, found = {}, {}
    for name, more in RUNGS.items(): done |= more; found[name] = How(**done)
    return found


def measure(material, size, batch, steps, repeats, wanted, keep):
    "All rungs of one size, in turns; `keep` is told after every round what is known by then."
    import torch
    last, jobs = list(ladder().values())[-1], {}
    for name, how in ladder().items(): jobs[name] = lambda how=how: script(material, how, size, batch, steps)[0]
    for name, more in OURS.items(): jobs[name] = lambda more=more: ours(material, more, size, batch, steps)
    for name in wanted: jobs[name] = lambda how=dataclasses.replace(last, **TRIED[name]): script(material, how, size, batch, steps)[0]
    speed, share, limits = {k: [] for k in jobs}, {k: [] for k in jobs}, {"float32": [], "bfloat16": []}
    work, length = operations(material, size, batch)
    for i in range(repeats):
        for name, job in jobs.items():
            how = ladder().get(name)
            kind = torch.float32 if how and how.dtype == "no" or name == "float32" else torch.bfloat16
            before, seconds = rate(kind, material.device), statistics.median(job())
            limit = (before + rate(kind, material.device))/2
            limits[str(kind).split(".")[1]].append(limit/1e9)
            speed[name].append(batch/seconds); share[name].append(work/seconds/limit)
            print(f"{size:6} round {i + 1}  {name:32} {batch/seconds:9.1f} pictures a second, {share[name][-1]:.0%} of the rate of products", flush=True)
        keep(result := summary(material, size, batch, length, work, wanted, speed, share, limits))
    return result | dict(parts=parts(material, OURS["recap"], size, batch))


def summary(material, size, batch, length, work, wanted, speed, share, limits):
    "What the rounds say: medians, ratios of the same round, shares."
    def times(a, b): return round(statistics.median(x/y for x, y in zip(speed[a], speed[b])), 3)
    names = [*RUNGS, *OURS]
    plain, top, before = names[0], list(RUNGS)[-1], dict(zip(names[1:], names))
    rungs = [dict(name=k, per_second=spread(speed[k]), over_plain=times(k, plain), over_last=times(k, before.get(k, k)), share_of_limit=statistics.median(share[k])) for k in names]
    return dict(size=size, parameters=sum(p.numel() for p in denoiser(material, size).parameters()), operations_a_picture=work/batch, caption_length=dict(longest=length, padded=material.text.max_tokens),
                rungs=rungs, tried=[dict(name=k, per_second=spread(speed[k]), times=times(k, top)) for k in wanted], limit={k: spread(v) for k, v in limits.items()},
                ratios=dict(plain=times("recap", plain), caches=times("recap", PEER)),
                muon_milliseconds=round(1e3*statistics.median(batch/b - batch/a for a, b in zip(speed["recap"], speed["recap with Muon"])), 1))


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="a tiny denoiser and one step each, to see that all works")
    args.add_argument("--out", help="where the numbers go, as JSON")
    args.add_argument("--device", default="auto")
    args.add_argument("--sizes", default="s", help="denoisers of page 15, the headline first: s,m")
    args.add_argument("--repeats", type=int, default=3, help="turns")
    args.add_argument("--steps", type=int, default=3, help="of a turn")
    args.add_argument("--compile", action="store_true", help="try torch.compile on a CPU as well: minutes")
    args = args.parse_args()
    import torch
    from recap.core import pick_device, write_json
    from recap.runs import provenance
    torch.set_num_threads(1)
    device, began = pick_device(args.device), time.time()
    sizes, batch, n, steps, repeats = (["xs"], 8, 24, 1, 1) if args.quick else (args.sizes.split(","), BATCH, PICTURES, args.steps, args.repeats)
    wanted = [k for k in TRIED if k != "compiled" or args.compile or device.type == "cuda" and not args.quick]
    material, found = Material(n, device), []
    def keep(*new, complete=False):
        if args.out: write_json(args.out, dict(seed=SEED, threads=1, device=str(device), clock="wall" if device.type == "cuda" else "process", batch=batch, pictures=n, steps=steps, world="easy",
                                               sizes=[*found, *new], provenance=provenance(), seconds=round(time.time() - began, 1), complete=complete))
    for size in sizes: found.append(measure(material, size, batch, steps, repeats, wanted, keep))
    keep(complete=not args.quick)
    head = found[0]
    rungs = {r["name"]: r for r in head["rungs"]}
    for r in head["rungs"]: print(f"{r['name']:32} {r['per_second']['median']:9.1f}  x{r['over_plain']:.2f}  (x{r['over_last']:.2f})")
    for r in head["tried"]: print(f"  tried: {r['name']:30} x{r['times']:.2f}")
    mine = rungs["recap"]
    say("train", mine["per_second"]["median"], rungs["plain script"]["per_second"]["median"], mine["share_of_limit"], ratios=head["ratios"], size=head["size"], batch=batch,
        device=str(device), unit="pictures a second", muon_milliseconds=head["muon_milliseconds"])


if __name__ == "__main__": main()
