"""Decoding: captions a second of our decoder, of open_clip's own `generate` with the same weights and pictures, and of transformers' BLIP.

    python -m benchmarks.decode [--quick] [--out data/results/decode.json] [--device auto] [--repeats 3] [--only greedy-64-60]

open_clip's `generate` does not run on transformers 5. A second process runs it, with transformers 4.55.4 from `.peers` (installed there
once by pip; git ignores the folder) and everything else from this environment. The two take turns, one thread each.
On a CPU the time is the processor time of the process that works, so that other programs on the machine count little; on a GPU it is the
clock's. The model has random weights from a fixed seed (64 pixels, 4 + 4 + 4 layers of 256, places for 76 tokens, CLIP's vocabulary of
49,408), and the end token is forbidden until the caption is full: both sides write exactly as many tokens as the case says.
A caption that parts from open_clip's is a tie if open_clip's own scores of the two tokens are closer than 1e-4 there, else it is wrong.
The ratio of the last line: greedy, batch 64, 60 tokens, float32, against open_clip."""
import argparse
import os
import pickle
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import clock, rate, say, spread

ROOT = Path(__file__).resolve().parent.parent
PEERS, PINNED = ROOT/".peers"/"transformers-4.55", ("transformers==4.55.4", "tokenizers>=0.21,<0.22", "huggingface_hub>=0.34,<1.0")
START, END, CONTEXT, VOCAB, WIDTH, HEADS, LAYERS, SEED = 49406, 49407, 76, 49408, 256, 4, 4, 0
CASES = [("greedy", b, t) for t in (20, 60) for b in (1, 16, 64)] + [("beam", 16, 20), ("beam", 16, 60)]
QUICK = [("greedy", 4, 8), ("beam", 2, 8)]


def config():
    "What open_clip calls `model_cfg`."
    text = dict(context_length=CONTEXT, vocab_size=VOCAB, width=WIDTH, heads=HEADS, mlp_ratio=4)
    return dict(embed_dim=WIDTH, custom_text=True, multimodal_cfg=dict(**text, layers=LAYERS), text_cfg=dict(**text, layers=LAYERS, embed_cls=True, output_tokens=True),
                vision_cfg=dict(image_size=64, patch_size=8, width=WIDTH, head_width=WIDTH//HEADS, layers=LAYERS, mlp_ratio=4., output_tokens=True))


def pictures(n):
    from recap.core import keyed_torch
    import torch
    return torch.randn(n, 3, 64, 64, generator=keyed_torch(SEED, "pictures"))


# the peer: a process of its own, told what to do over a pipe
def send(pipe, what):
    data = pickle.dumps(what)
    pipe.write(struct.pack("<Q", len(data)) + data); pipe.flush()

def receive(pipe):
    head = pipe.read(8)
    if len(head) < 8: raise EOFError("the peer process has ended")
    return pickle.loads(pipe.read(struct.unpack("<Q", head)[0]))

def peer(device):
    "What the second process does: answer (mode, batch, tokens) with open_clip's tokens and the seconds they took."
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)   # what libraries print must not reach the pipe
    import torch, transformers
    from transformers import MaxLengthCriteria
    from recap.captioner import make_captioner
    from recap.core import pick_device
    device = pick_device(device)
    torch.set_num_threads(1)
    model = make_captioner(config(), SEED).to(device).eval()
    send(answers, transformers.__version__)
    while (job := receive(source)) is not None:
        mode, batch, tokens = job
        images = pictures(batch).to(device)
        # no pass for the end that open_clip would put behind a full caption, and no stop at token 0, which it pads with: exactly `tokens` tokens, one pass each
        how = dict(generation_type="top_k", top_k=1, pad_token_id=-1) if mode == "greedy" else dict(generation_type="beam_search", num_beams=6, num_beam_groups=3)
        begin = clock(device)
        out = model.generate(images, seq_len=tokens + 2, max_seq_len=CONTEXT, min_seq_len=tokens + 1, sot_token_id=START, eos_token_id=END,
                             stopping_criteria=[MaxLengthCriteria(max_length=tokens + 1)], **how)
        seconds = clock(device) - begin
        send(answers, (out[:, 1:tokens + 1].tolist(), seconds))

class Peer:
    def __init__(self, device):
        if not (PEERS/"transformers").is_dir():
            print("installing the peer's packages into .peers (once)", flush=True)
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", str(PEERS), *PINNED], check=True)
        path = os.pathsep.join([str(PEERS), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "benchmarks.decode", "--peer", "--device", device], cwd=ROOT, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
        self.version = receive(self.process.stdout)

    def __call__(self, *job):
        send(self.process.stdin, job)
        return receive(self.process.stdout)

    def close(self): send(self.process.stdin, None); self.process.wait(60)


# ours
def ours(packed, mode, images, tokens):
    "Captions of exactly so many tokens, and the seconds they took."
    from recap.decode import beam, generate
    how = dict(max_len=tokens + 1, start=START, end=END, min_len=tokens + 1)
    begin = clock(images.device)
    found = generate(packed, images, **how) if mode == "greedy" else beam(packed, images, legacy=True, **how)
    return [w.ids for w in found], clock(images.device) - begin


def compare(model, mode, images, theirs, found):
    "Captions equal, ties and wrong ones: a greedy caption that differs must do so where open_clip's forward has two scores closer than 1e-4."
    import torch
    equal, ties, wrong = 0, 0, 0
    for image, a, b in zip(images, theirs, found, strict=True):
        if a == b: equal += 1; continue
        at = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        if mode == "greedy":
            with torch.no_grad(): scores = model(image[None], torch.tensor([[START, *a[:at]]], device=image.device), output_labels=False)["logits"][0, -1]
            close = bool((scores[a[at]] - scores[b[at]]).abs() < 1e-4)
        else: close = abs(raw_sum(model, image, a) - raw_sum(model, image, b)) < 1e-4*len(a)
        ties, wrong = ties + close, wrong + (not close)
    return dict(captions=len(found), equal=equal, ties=ties, wrong=wrong)

def raw_sum(model, image, ids): # what open_clip's beam search adds up
    import torch
    row = torch.tensor([[START, *ids]], device=image.device)
    with torch.no_grad(): return model(image[None], row)["logits"][0].gather(1, row[0, 1:, None]).double().sum().item()


def work(batch, tokens):
    "Floating-point operations of the products of one greedy run: image tower, keys and values of patches, layers, attention, vocabulary."
    d, patches = WIDTH, 64
    image = 65*LAYERS*24*d*d + LAYERS*4*d*65*65 + patches*(2*d*3*8*8 + LAYERS*4*d*d)
    layers = 2*LAYERS*24*d*d + LAYERS*20*d*d
    attention = LAYERS*4*d*patches + 2*LAYERS*4*d*(tokens + 1)/2
    return batch*(image + tokens*(layers + attention + 2*d*VOCAB))


def parts(packed, dtype, batch, repeats):
    "Milliseconds of one step, by part, at the middle of a caption."
    import torch
    from recap import decode
    torch.set_grad_enabled(False)
    decoder = decode.Decoder(packed, pictures(batch).to(packed.device), CONTEXT)
    tokens, middle = torch.randint(1, 40000, (batch,), device=packed.device), 30
    for _ in range(middle): decoder.advance(tokens, head=False)
    room, query = [list(zip(*decoder.room(i))) for i in (0, 1)], torch.randn(batch*HEADS, 1, WIDTH//HEADS, device=packed.device)
    x, wide = torch.randn(batch, WIDTH, device=packed.device), torch.randn(batch, 4*WIDTH, device=packed.device)
    own, look = packed.towers[0] + packed.towers[1], packed.look
    kept = [k for r in room for _, k in r]
    def products():
        for l in own + look: l.product(x, l.ask), l.product(x, l.out), l.product(x, l.up), l.product(wide, l.down)
    def attention():
        for k in kept + list(decoder.seen): decode.attend(query, *k, HEADS)
    def step(): decoder.place = middle; decoder.advance(tokens, head=False)
    jobs = dict(products=products, attention=attention, step=step, vocabulary=lambda: decoder.vocabulary(x), choice=lambda: decode._choose(decoder.scores[:, :VOCAB], decode.greedy))
    if packed.draft: state = decoder.draft(x); jobs |= dict(vocabulary=lambda: decoder.draft(x), choice=lambda: decoder.settle(state))
    found = {k: [] for k in jobs}
    for _ in range(repeats + 1):
        for k, f in jobs.items(): begin = clock(packed.device); f(); found[k].append(1e3*(clock(packed.device) - begin))
    torch.set_grad_enabled(True)
    ms = {k: statistics.median(v[1:]) for k, v in found.items()}
    ms["norms, sums, calls"] = max(0., ms.pop("step") - ms["products"] - ms["attention"])
    return dict(dtype=dtype, batch=batch, milliseconds={k: round(ms[k], 3) for k in ("products", "attention", "norms, sums, calls", "vocabulary", "choice")})


def make_blip(dtype, device):
    "BLIP with the same image tower, as many text blocks, the same vocabulary; random weights."
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration
    text = dict(hidden_size=WIDTH, intermediate_size=4*WIDTH, num_hidden_layers=2*LAYERS, num_attention_heads=HEADS, vocab_size=VOCAB, max_position_embeddings=CONTEXT + 8,
                encoder_hidden_size=WIDTH, bos_token_id=START, eos_token_id=END, sep_token_id=END, pad_token_id=0, projection_dim=WIDTH)
    vision = dict(hidden_size=WIDTH, intermediate_size=4*WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=64, patch_size=8)
    torch.manual_seed(SEED)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).to(device, dtype).eval()

def blip_captions(blip, images, tokens):
    import torch
    begin = clock(images.device)
    with torch.no_grad(): out = blip.generate(pixel_values=images.to(blip.dtype), do_sample=False, num_beams=1, use_cache=True, min_new_tokens=tokens, max_new_tokens=tokens)
    seconds = clock(images.device) - begin
    if out.shape[1] < tokens: raise RuntimeError(f"BLIP wrote {out.shape[1]} tokens, not {tokens}")
    return seconds


def real_lengths(repeats):
    "The base captioner on held-out pictures, captions of the length they have: dropping what has ended against carrying it on."
    import torch
    from recap.core import RecapError, foundation
    from recap.captioner import as_pixels, load_captioner, normalise, plain_greedy
    from recap.decode import Packed, generate
    from recap.world import render, sample_scene
    try: loaded = load_captioner(foundation("captioner"))
    except RecapError: return None
    x = normalise(as_pixels([render(sample_scene(SEED, i, split="test"), loaded.image_size) for i in range(64)], loaded.image_size))
    packed, ways, seconds = Packed(loaded.model), {}, {}
    half = Packed(loaded.model, torch.bfloat16)
    how = dict(start=loaded.words.start, end=loaded.words.end)
    ways = {"open_clip's forward, every step": lambda: plain_greedy(loaded.model, x, how["start"], how["end"]),
            "float32": lambda: generate(packed, x, **how), "bfloat16": lambda: generate(half, x, **how)}
    for _ in range(repeats):
        for k, f in ways.items(): begin = time.process_time(); f(); seconds.setdefault(k, []).append(len(x)/(time.process_time() - begin))
    plain, single, double = (ways[k]() for k in ways)
    return dict(captions=len(x), mean_tokens=statistics.mean(map(len, plain)), equal=dict(float32=sum(p == w.ids for p, w in zip(plain, single)), bfloat16=sum(p == w.ids for p, w in zip(plain, double))),
                per_second={k: spread(v) for k, v in seconds.items()})


def measure_case(other, model, packs, mode, batch, tokens, repeats, device):
    "One case: the two sides in turns."
    images, kinds = pictures(batch).to(device), list(packs)
    speed, share = {k: [] for k in ("open_clip", *kinds)}, {k: [] for k in kinds}
    for k in kinds: ours(packs[k], mode, images, min(tokens, 4))
    for _ in range(repeats):
        theirs, seconds = other(mode, batch, tokens)
        speed["open_clip"].append(batch/seconds)
        for k in kinds:
            before = rate(packs[k].dtype, device)
            found, seconds = ours(packs[k], mode, images, tokens)
            limit = (before + rate(packs[k].dtype, device))/2
            speed[k].append(batch/seconds); share[k].append(work(batch, tokens)/seconds/limit)
            if k == "float32": single = found
            else: double = found
    case = dict(mode=mode, batch=batch, tokens=tokens, per_second={k: spread(v) for k, v in speed.items()}, identity=compare(model, mode, images, theirs, single),
                times=statistics.median(a/b for a, b in zip(speed["float32"], speed["open_clip"])),
                bfloat16_over_float32=statistics.median(a/b for a, b in zip(speed["bfloat16"], speed["float32"])),
                bfloat16_equal=dict(captions=sum(a == b for a, b in zip(single, double)), tokens=sum(x == y for a, b in zip(single, double) for x, y in zip(a, b))/(batch*tokens)))
    if mode == "greedy": case["share_of_limit"] = {k: statistics.median(v) for k, v in share.items()}
    print(f"{mode:7}{batch:4} x {tokens:<3} open_clip {case['per_second']['open_clip']['median']:8.3f}  ours {case['per_second']['float32']['median']:8.2f} ({case['times']:.1f}x)"
          f"  bfloat16 {case['per_second']['bfloat16']['median']:8.2f} (x{case['bfloat16_over_float32']:.2f})  equal {case['identity']['equal']}/{batch}, ties {case['identity']['ties']}, wrong {case['identity']['wrong']}", flush=True)
    return case


def measure_blip(packs, batch, tokens, repeats, device):
    "Ours and BLIP in turns, each in both number types."
    images, row = pictures(batch).to(device), dict(batch=batch, tokens=tokens, ours={}, blip={})
    for k, packed in packs.items():
        blip, a, b = make_blip(packed.dtype, device), [], []
        blip_captions(blip, images, 4); ours(packed, "greedy", images, 4)
        for _ in range(repeats):
            b.append(batch/blip_captions(blip, images, tokens)); a.append(batch/ours(packed, "greedy", images, tokens)[1])
        row["ours"][k], row["blip"][k] = spread(a), spread(b)
    print(f"BLIP   {batch:4} x {tokens:<3} " + "  ".join(f"{k}: ours {row['ours'][k]['median']:.2f}, BLIP {row['blip'][k]['median']:.2f}" for k in packs), flush=True)
    return row


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--quick", action="store_true", help="small cases, to see that all works")
    args.add_argument("--out", help="where the numbers go, as JSON")
    args.add_argument("--device", default="cpu")
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--only", action="append", help="these cases only: mode-batch-tokens")
    args.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.peer: return peer(args.device)
    import torch
    from recap.captioner import make_captioner
    from recap.core import pick_device, write_json
    from recap.decode import Packed
    from recap.runs import provenance
    torch.set_num_threads(1)
    device, repeats = pick_device(args.device), 1 if args.quick else args.repeats
    cases = [c for c in (QUICK if args.quick else CASES) if not args.only or "-".join(map(str, c)) in args.only]
    model = make_captioner(config(), SEED).to(device).eval()
    packs = {"float32": Packed(model, torch.float32), "bfloat16": Packed(model, torch.bfloat16)}
    found, blip, real = [], [], None
    batches, tokens = ((4,), 8) if args.quick else ((1, 16, 64), 20)
    shown = [parts(p, k, 4 if args.quick else 64, 3 if args.quick else 9) for k, p in packs.items()]
    for p in shown: print(p["dtype"], p["milliseconds"], flush=True)
    def result(): # written after every case, so that a run that is cut short has told something
        main_case = next((c for c in found if (c["mode"], c["batch"], c["tokens"]) == ("greedy", 64, 60)), found[-1])
        told = dict(seed=SEED, threads=1, device=str(device), clock="process" if device.type != "cuda" else "wall", peer=f"transformers {other.version}", cases=found, blip=blip, parts=shown,
                    share_of_limit=main_case.get("share_of_limit", {}), real_lengths=real, provenance=provenance(),
                    model=dict(config=config(), parameters=sum(p.numel() for p in model.parameters())), complete=len(found) == len(CASES) and bool(real))
        if args.out: write_json(args.out, told)
        return main_case, told
    other = Peer(args.device)
    for c in cases: found.append(measure_case(other, model, packs, *c, repeats, device)); result()
    other.close()
    for b in batches: blip.append(measure_blip(packs, b, tokens, repeats, device)); result()
    if not args.quick: real = real_lengths(repeats)
    main_case, told = result()
    say("decode", main_case["per_second"]["float32"]["median"], main_case["per_second"]["open_clip"]["median"], told["share_of_limit"].get("float32"),
        mode=main_case["mode"], batch=main_case["batch"], tokens=main_case["tokens"], unit="captions a second", dtype="float32")


if __name__ == "__main__": main()
