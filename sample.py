"""Stage 4: images from noise: NAME.npz for evaluators (arr_0 uint8 NHWC, arr_1 labels), NAME.png for people.

    python sample.py --sit out/sit/sit.pt --vae out/send/vae.pt --images 50000 --out out/samples.npz         # one process
    torchrun --nproc_per_node=8 sample.py --sit out/sit/sit.pt --vae out/send/vae.pt --images 50000 --out out/samples.npz
    python sample.py --sit out/demo/send/sit/sit.pt --sampler heun --steps 10 --images 16 --out out/tiny/samples.npz     # tiny
    python sample.py --bench 3 --sit SiT-B/1 --steps 5 --micro-batch 4                      # speed, on random weights
    python sample.py --sit sit-repae-vavae.pt --cfg 2.5 --out out/repae.npz                # a released checkpoint of REPA-E

Image i depends on (seed, i) only, not on the number of processes or the batch. t = 1 is noise, t = 0 is data.
A stopped run goes on with the same command, on any number of processes of one node.
Guidance acts on all channels: v = v_u + s (v_c - v_u) for t within --interval; s = 1 is off. With --guide CKPT (AutoGuidance)
v_u is the velocity of that weaker SiT, which knows the class.
"""
import argparse
import os
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
from common import UserError
from sit import SIT_MODELS, SiT, load_sit, sample_ode, sample_sde
from vae import VAE_CONFIGS, AutoencoderKL, load_vae

STREAM, LABELS = 2 ** 32, 2 ** 62  # added to the seed: noise of SDE step i, and labels, apart from the first noise


def parse_args():
    p = common.Parser(description=__doc__)
    p.add_argument("--sit", help="checkpoint of train_sit.py, REPA, REPA-E or SiT (--bench: or the name of a size, such as SiT-B/1)")
    p.add_argument("--vae", help="VAE to decode with (default: the one the latents were made with)")
    p.add_argument("--latent-stats", help="for other projects' SiT without statistics: REPA-E's NAME-latents-stats.pt, vae.py's stats.npz, "
                   "or a scaling factor (0.18215 for SiT and REPA on SD-VAE)")
    p.add_argument("--out", help="NAME.npz; NAME.png is written beside it")
    p.add_argument("--images", type=common.positive, default=50_000, help="how many")
    p.add_argument("--sampler", default="sde", choices=("sde", "euler", "heun"), help="sde: Euler-Maruyama, w(t) = 2t (paper)")
    p.add_argument("--steps", type=common.positive, default=250)
    p.add_argument("--cfg", type=float, default=1.0, help="guidance scale s (paper: 2.5)")
    p.add_argument("--guide", help="AutoGuidance: a weaker SiT on the same latents (smaller, or trained for less)")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 0.75), metavar=("LOW", "HIGH"), help="times t with guidance (REPA-E: 0 0.75)")
    p.add_argument("--labels", default="random", choices=("random", "equal", "blocks"),
                   help="classes drawn at random; in equal counts, 0 1 2 ... 0 1 2 ...; in equal counts, class after class")
    p.add_argument("--weights", choices=("ema", "model"), default="ema")
    p.add_argument("--seed", type=common.natural, default=0)
    p.add_argument("--micro-batch", type=common.positive, default=64, help="images at a time and process: memory only")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    p.add_argument("--compile", type=int, default=int(torch.cuda.is_available()), choices=(0, 1))
    p.add_argument("--deterministic", action="store_true", help="equal bits in each run on CUDA too, slower (a CPU needs no flag)")
    p.add_argument("--dry-run", action="store_true", help="print the plan (images, evaluations, memory, disk), and end")
    data.bench_flags(p)
    args = p.parse_args()
    data.required(p, args, "sit", "out")
    return args


def read_sit(path, weights):
    """The SiT of a file. Raises UserError for a file that is none, or damaged."""
    try:
        if common.is_zip(path):
            common.check_zip(path, checksums=True)
        return load_sit(path, weights)
    except common.DAMAGED as e:
        raise common.damage(e, str(e) if str(path) in str(e) else f"{path}: {' '.join(str(e).split())}")


def load_pair(args):
    """The SiT, its checkpoint with statistics of the latents, and the VAE they belong to; refuses any other VAE."""
    model, checkpoint = read_sit(args.sit, args.weights)
    path = args.vae or checkpoint["vae"]
    if path is None:
        raise UserError(f"{args.sit} does not say which VAE made its latents: give --vae")
    if not args.vae and not Path(path).exists():
        raise UserError(f"{args.sit} was trained on latents of {path}, which is not there; if it has moved, give its new place with --vae")
    vae = load_vae(path)
    found = common.weights_hash(vae.state_dict())
    if checkpoint["vae_hash"] is None and checkpoint["vae"] and args.vae:  # REPA-E's joint file
        checkpoint = dict(checkpoint, vae_hash=common.weights_hash(load_vae(args.sit).state_dict()))
    if checkpoint["vae_hash"] not in (None, found):
        raise UserError(f"--vae {path}: weights {found}, but {args.sit} was trained on latents of {checkpoint['vae_hash']} "
                        f"({checkpoint['vae']}); decode with that file")
    channels = model.config["in_channels"]
    if channels != vae.config["z_channels"]:
        raise UserError(f"--vae {path}: {vae.config['z_channels']} latent channels, but {args.sit} has {channels}")
    if args.latent_stats and checkpoint["vae_hash"] is None:
        checkpoint["latent_mean"], checkpoint["latent_std"] = read_stats(args.latent_stats, channels)
    elif args.latent_stats:
        raise UserError(f"--latent-stats: {args.sit} holds the statistics of its latents; leave the flag out")
    if checkpoint["latent_mean"] is None:
        raise UserError(f"{args.sit} does not hold the mean and std of its latents: give --latent-stats (a file, or a scaling factor such as 0.18215)")
    return model, dict(checkpoint, vae_hash=found), vae


def read_stats(text, channels):
    """REPA-E's latents_scale (1 / std) and latents_bias, vae.py's stats.npz, or a scaling factor -> mean and std, each (c,)."""
    try:
        factor = float(text)
    except ValueError:
        factor = None
    try:
        if factor is not None:
            mean, std = torch.zeros(channels), torch.full((channels,), 1 / factor)
        elif text.endswith(".npz"):
            mean, std = (torch.from_numpy(v).float() for v in common.read_npz(text, "mean", "std").values())
        else:
            stats = common.load_checkpoint(text)
            mean, std = stats["latents_bias"].float().flatten(), 1 / stats["latents_scale"].float().flatten()
    except UserError:
        raise
    except (*common.DAMAGED, ZeroDivisionError) as e:
        raise common.damage(e, f"--latent-stats {text}: expected latents_scale and latents_bias, mean and std, or a number ({type(e).__name__}: {e})")
    if mean.shape != (channels,) or std.shape != (channels,) or not (std > 0).all() or not (mean.isfinite() & std.isfinite()).all():
        raise UserError(f"--latent-stats {text}: statistics {tuple(mean.shape)} and {tuple(std.shape)}, expected {channels} finite means and {channels} positive stds")
    return mean, std


def load_guide(args, model, checkpoint):
    """AutoGuidance's weaker model, or None. Raises UserError when it lives on other latents or classes."""
    if not args.guide:
        return None
    if args.cfg == 1:
        raise UserError("--guide: needs a guidance scale, --cfg S with S above 1")
    guide, other = read_sit(args.guide, args.weights)
    for key in ("in_channels", "input_size", "num_classes"):
        if guide.config[key] != model.config[key]:
            raise UserError(f"--guide {args.guide}: {key} {guide.config[key]}, but {args.sit} has {model.config[key]}; both need the same latents")
    if other["vae_hash"] not in (None, checkpoint["vae_hash"]) or other["path"] != checkpoint["path"]:
        raise UserError(f"--guide {args.guide}: trained on latents of VAE {other['vae_hash']}, {other['path']} path; {args.sit} on "
                        f"{checkpoint['vae_hash']}, {checkpoint['path']}; both need the same")
    known = [other[k] is not None for k in ("latent_mean", "latent_std")]
    if all(known) and not all(torch.allclose(other[k], checkpoint[k], rtol=1e-3, atol=1e-4) for k in ("latent_mean", "latent_std")):
        raise UserError(f"--guide {args.guide}: its latents were normalised with another mean and std than those of {args.sit}")
    return guide


def choose_labels(args, num_classes):
    """(N,) labels; every order depends on the seed and the index alone."""
    if args.labels == "equal":
        return np.arange(args.images) % num_classes
    if args.labels == "blocks":
        return np.arange(args.images) * num_classes // args.images
    u = data.draw_noise(args.seed + LABELS, range(args.images), 1)[0][:, 0].numpy()
    return np.minimum((u * num_classes).astype(np.int64), num_classes - 1)


@torch.no_grad()
def sample_batch(model, vae, guide, checkpoint, args, rows, labels, device, clock):
    """Rows (indices of images) and their labels -> functions that wait for the images, uint8 (B, H, W, 3), and for whether they are
    finite. A GPU is waited for only where the first noise and the labels are copied to it."""
    shape = (model.config["in_channels"], model.config["input_size"], model.config["input_size"])
    noise = data.draw_noise(args.seed, rows, 0, shape)[1]
    y = torch.from_numpy(labels).to(device)
    common = dict(steps=args.steps, cfg=args.cfg, interval=args.interval, path=checkpoint["path"], guide=guide)
    with clock("sit"), common.autocast(device, args.precision):
        if args.sampler == "sde":
            noises = data.ahead((data.draw_noise(args.seed + (i + 1) * STREAM, rows, 0, shape)[1] for i in range(args.steps)), device)
            z = sample_sde(model, noise.to(device), y, draw=lambda i: next(noises).to(device, non_blocking=True), **common)
        else:
            z = sample_ode(model, noise.to(device), y, method=args.sampler, **common)
    with clock("decode"), common.autocast(device, args.precision):
        mean, std = (checkpoint[k].view(1, -1, 1, 1).to(device) for k in ("latent_mean", "latent_std"))
        x = vae.decode((z * std + mean).contiguous(memory_format=torch.channels_last))
        return common.to_host(data.to_uint8(x).permute(0, 2, 3, 1)), common.to_host(x.isfinite().all())


def sample_batches(model, vae, guide, checkpoint, args, parts, labels, store, device, clock):
    """Put the images of each list of rows into `store` (RowFiles), while the next is under way; yield once a list."""
    launched = ((part, *sample_batch(model, vae, guide, checkpoint, args, part, labels[part], device, clock)) for part in parts)
    for part, pixels, finite in common.one_behind(launched):
        with clock("store"):
            if not finite():
                raise UserError(f"{args.sit}: samples {part[0]} to {part[-1]} are not finite; train longer, or use --precision fp32")
            store.put(part, pixels().numpy())
        yield


def prepare(model, vae, guide, args, device):
    """On the device, as the sampling pass wants them."""
    for network in filter(None, (model, vae.to(memory_format=torch.channels_last), guide)):
        common.cast_matmuls(network, device, args.precision)
    for network in filter(None, (model, vae.decoder, guide) if args.compile else ()):
        network.compile()


class Evaluations:
    """Stands for a SiT, and notes the size of each batch it is asked for."""

    def __init__(self, num_classes):
        self.num_classes, self.sizes = num_classes, []

    def __call__(self, x, t, y):
        self.sizes.append(len(x))
        return torch.zeros_like(x)


def bench(args, device, world):
    """--bench: whole batches of --micro-batch images on random weights, beside the bare forward passes that they need."""
    if args.sit in SIT_MODELS:
        patch = SIT_MODELS[args.sit].keywords["patch_size"]
        vae = AutoencoderKL(**VAE_CONFIGS["demo" if "demo" in args.sit else "f16d32" if patch == 1 else "f8d4"]).eval().requires_grad_(False)
        c = vae.config["z_channels"]
        model = SIT_MODELS[args.sit](input_size=vae.config["resolution"] // vae.factor, in_channels=c, num_classes=1000).eval().requires_grad_(False)
        checkpoint = dict(path="linear", latent_mean=torch.zeros(c), latent_std=torch.ones(c))
    else:
        model, checkpoint, vae = load_pair(args)
    config, n, clock = model.config, args.micro_batch, data.Clock(device)
    shape = (config["in_channels"], config["input_size"], config["input_size"])
    stub, keep = Evaluations(config["num_classes"]), (sample_sde if args.sampler == "sde" else partial(sample_ode, method=args.sampler))
    keep(stub, torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long), args.steps, args.cfg, args.interval, path=checkpoint["path"])
    with torch.device("meta"):
        one = (torch.empty(1, *shape), torch.empty(1), torch.zeros(1, dtype=torch.long))
        flops = sum(stub.sizes) * data.count_flops(lambda: SiT(**config)(*one)) + data.count_flops(lambda: AutoencoderKL(**vae.config).decode(one[0]))
    prepare(model, vae, None, args, device)
    x, t, y = (v.to(device) for v in (torch.zeros(2 * n, *shape), torch.ones(2 * n), torch.zeros(2 * n, dtype=torch.long)))

    @torch.no_grad()
    def bare():
        with common.autocast(device, args.precision):
            for size in stub.sizes:
                model(x[:size * n], t[:size * n], y[:size * n])
            vae.decode(x[:n].contiguous(memory_format=torch.channels_last))

    with tempfile.TemporaryDirectory() as folder:
        rows, side = (args.bench + 10) * n, config["input_size"] * vae.factor
        files = {f"{folder}/images": (np.uint8, (rows, side, side, 3)), f"{folder}/done": (np.uint8, (rows,))}
        common.begin_rows(f"{folder}/run", {}, files)
        source = sample_batches(model, vae, None, checkpoint, args, common.chunks(range(rows), n), np.arange(rows) % config["num_classes"], common.RowFiles(*files), device, clock)
        data.run_bench(args, f"sample.py {args.sit}, {n} images at a time, {args.sampler} {args.steps} steps, {sum(stub.sizes)} evaluations an image",
                       device, lambda: next(source), n * world, flops, clock, bare)


def decode_memory(model, vae, guide, batch):
    """Estimated bytes at the peak of decoding a batch (more than the SiT needs) in float32, all weights included."""
    side = model.config["input_size"]
    with torch.device("meta"), torch.no_grad():
        copy, z = AutoencoderKL(**vae.config), torch.empty(batch, vae.config["z_channels"], side, side)
        return 4 * sum(p.numel() for m in (model, vae, guide) if m for p in m.parameters()) + data.peak_bytes(lambda: copy.decode(z))


def write_npz(path, arrays):
    """An uncompressed .npz, streamed from memory maps: no second copy in memory; whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as z:
            for name, array in arrays.items():
                with z.open(f"{name}.npy", "w", force_zip64=True) as f:
                    np.lib.format.write_array(f, array, allow_pickle=False)
        common.sync(temporary)
    except OSError:
        temporary.unlink(missing_ok=True)  # it may fill the disk
        raise
    os.replace(temporary, path)
    common.sync(Path(path).parent)


PATHS = ("sit", "vae", "guide", "latent_stats")  # what these hold is compared by its hash: a folder may move


def finished(out, settings):
    """Whether `out` was written with these settings."""
    if not out.exists() or not out.with_suffix(".json").exists() or Path(f"{out}.run").exists():  # .run is removed after the .npz is written
        return False
    found = common.read_json(out.with_suffix(".json"))
    return all(found.get(k) == v for k, v in settings.items() if k not in PATHS)


def main():
    args = parse_args()
    device, rank, world = common.setup(args.deterministic)
    args.precision = args.precision or common.fast_precision(device)
    if args.bench:
        args.sit = args.sit or "SiT-XL/1"
        return bench(args, device, world)
    out = Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"--out {args.out}: expected a name ending in .npz")
    begin = time.time()
    model, checkpoint, vae = load_pair(args)
    guide = load_guide(args, model, checkpoint)
    side = model.config["input_size"] * vae.factor
    shape = (args.images, side, side, 3)
    nfe = {"sde": args.steps, "euler": args.steps, "heun": 2 * args.steps - 1}[args.sampler]
    guidance = f"v = v_u + {args.cfg:g} (v_c - v_u) for t in {list(args.interval)}" if args.cfg != 1 else "no guidance"
    guidance += f", v_u of {args.guide}" if args.guide and args.cfg != 1 else ""
    if rank == 0:
        print(f"{args.images} images of {side} x {side}, {args.labels} labels of {model.num_classes} classes, {args.weights} weights of step "
              f"{checkpoint['step']}, {args.sampler} {args.steps} steps (NFE {nfe}), {guidance}, {device.type} {args.precision}")
        print(f"memory about {decode_memory(model, vae, guide, args.micro_batch) / 2**30:.1f} GiB a process (counted in float32), disk {2 * np.prod(shape) / 2**30:.2f} GiB")
    if args.dry_run:
        return
    files = {f"{out}.part": (np.uint8, shape), f"{out}.done": (np.uint8, shape[:1])}
    labels = choose_labels(args, model.num_classes)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "micro_batch", "dry_run", "compile", "bench", "json", "deterministic")}
    settings.update(interval=list(args.interval), step=checkpoint["step"], vae_hash=checkpoint["vae_hash"], nfe=nfe, sit_hash=common.weights_hash(model.state_dict()),
                    guide_hash=guide and common.weights_hash(guide.state_dict()), stats_hash=common.weights_hash({k: checkpoint[k] for k in ("latent_mean", "latent_std")}))
    if finished(out, settings):
        if rank == 0:
            data.sweep(f"{out}.lock", *files)
            print(f"{out}: already there")
        return
    there = Path(f"{out}.part").stat().st_blocks * 512 if Path(f"{out}.part").exists() else 0
    common.open_out(out.parent, need_bytes=2 * int(np.prod(shape)) - there)
    if rank == 0:
        common.claim(f"{out}.lock")
        if common.begin_rows(f"{out}.run", {k: v for k, v in settings.items() if k not in PATHS}, files):
            print(f"{out}: going on, {np.count_nonzero(np.load(f'{out}.done', allow_pickle=False))} of {args.images} images are there")
    common.barrier()
    store = common.RowFiles(*files)
    rows = store.missing(rank, world)
    prepare(model, vae, guide, args, device)
    parts = common.chunks(rows, args.micro_batch)
    for _ in tqdm(sample_batches(model, vae, guide, checkpoint, args, parts, labels, store, device, data.Clock(device)), "sample", len(parts), disable=rank > 0 or None):
        pass
    store.flush()
    common.barrier()
    if rank:
        return
    shown, images = min(args.images, 64), store.arrays[0]
    common.save_grid(torch.from_numpy(images[:shown].copy()).permute(0, 3, 1, 2), out.with_suffix(".png"), columns=8)
    seconds = time.time() - begin
    common.write_json(out.with_suffix(".json"), dict(settings, seconds=round(seconds, 1)))
    write_npz(out, {"arr_0": images, "arr_1": labels.astype(np.int64)})  # last: it marks the stage as done
    os.remove(f"{out}.run")
    data.sweep(f"{out}.lock", *files)
    print(f"{out}: {args.images} images in {seconds:.0f} s ({len(rows) * world / seconds:.1f} images/s)")


if __name__ == "__main__":
    common.run_script(main)
