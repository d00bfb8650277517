"""Training images a second of the U-Net `s` and the DiT `dit-s`, which have about as many parameters, with both kinds of attention and both number formats.

    python -m benchmarks.denoiser [--quick] [--out data/results/denoiser.json] [--device auto] [--repeats 5]

A step is the flow loss forwards and backwards, and fused AdamW, on latents and text states that lie ready; random numbers serve as both.
On a CPU the time is the processor time of this one-thread process, so that other programs count little; on a GPU it is the clock's. The
cases take turns, and the median of their turns counts. The ratio of the last line: the DiT's best over the U-Net's best."""
import argparse
import statistics
from pathlib import Path

from benchmarks import clock, say

ROOT = Path(__file__).resolve().parent.parent
BATCH, CHANNELS, SIDE, WIDTH, SEED = 64, 8, 8, 256, 0


def case(model, attention, dtype, words, device):
    "A function that trains one step and returns its seconds."
    import torch
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
    from recap.core import keyed_torch
    from recap.denoiser import denoise
    from recap.diffusion import flow_loss
    g = keyed_torch(SEED, "denoiser")
    x0, states, mask = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=g).to(device), torch.randn(BATCH, words, WIDTH, generator=g).to(device), torch.ones(BATCH, words, dtype=torch.bool, device=device)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    def step():
        model.set_attn_processor(AttnProcessor() if attention == "plain" else AttnProcessor2_0())
        begin = clock(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"): loss = flow_loss(lambda x, t: denoise(model, x, t, states, mask), x0, g)
        loss.backward(); opt.step(); opt.zero_grad()
        return clock(device) - begin
    return step


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--quick", action="store_true"); ask.add_argument("--out"); ask.add_argument("--device", default="auto"); ask.add_argument("--repeats", type=int, default=5)
    args = ask.parse_args()
    import torch
    from recap.core import pick_device, write_json
    from recap.denoiser import make_denoiser, tune_attention
    from recap.runs import provenance
    torch.set_num_threads(1)
    device, words = pick_device(args.device), 20
    repeats = 1 if args.quick else args.repeats
    torch.manual_seed(SEED)
    models = {k: make_denoiser(k, CHANNELS, SIDE, WIDTH).to(device).train() for k in ("s", "dit-s")}
    cases = {(k, a, d): case(m, a, d, words, device) for k, m in models.items() for a in ("plain", "fused") for d in ("fp32", "bf16") if not args.quick or (a, d) == ("plain", "bf16")}
    took = {c: [] for c in cases}
    for turn in range(repeats + 1):                        # the first turn warms up
        for c, step in cases.items():
            seconds = step()
            if turn: took[c].append(seconds)
    arms = [dict(model=k, parameters=sum(p.numel() for p in models[k].parameters()), attention=a, dtype=d, images_per_second=round(BATCH/statistics.median(s), 1),
                 slowest=round(BATCH/max(s), 1), fastest=round(BATCH/min(s), 1)) for (k, a, d), s in took.items()]
    for r in arms: print(f"{r['model']:<6} {r['attention']} {r['dtype']}: {r['images_per_second']:7.1f} images a second ({r['slowest']} to {r['fastest']})")
    best = {k: max(r["images_per_second"] for r in arms if r["model"] == k) for k in models}
    chosen = {k: "fused" if "2_0" in str(next(iter(tune_attention(m).attn_processors.values()))) else "plain" for k, m in models.items()}
    settings = dict(device=device.type, batch_size=BATCH, latents=f"{CHANNELS} x {SIDE} x {SIDE}", words=words, text_width=WIDTH, threads=1, repeats=repeats, seed=SEED, tuned=chosen["s"])
    if args.out: write_json(Path(args.out) if Path(args.out).is_absolute() else ROOT/args.out, {"settings": settings, "arms": arms, **provenance()})
    say("denoiser", best["dit-s"], best["s"], **settings)


if __name__ == "__main__": main()
