"""Stage 4: images from noise: NAME.npz for evaluators (arr_0 uint8 NHWC, arr_1 labels), NAME.png for people.

    python sample.py --sit out/sit/sit.pt --vae out/send/vae.pt --out out/samples.npz            # one process
    torchrun --nproc_per_node=8 sample.py --sit out/sit/sit.pt --vae out/send/vae.pt --out out/samples.npz
    python sample.py --sit out/demo/send/sit/sit.pt --sampler heun --steps 10 --images 16 --out a.npz   # tiny
    python sample.py --sit sit-repae-vavae.pt --cfg 2.5 --out out/repae.npz         # a release of REPA-E

Image i depends on (seed, i) only, not on the number of processes or the batch. t = 1 is noise, t = 0 is data.
A stopped run goes on with the same command, on any number of processes of one node.
Guidance acts on all channels: v = v_u + s (v_c - v_u) for t within --interval; s = 1 is off. With --guide
CKPT (AutoGuidance) v_u is the velocity of that weaker SiT, which knows the class.
"""
import math
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
from common import UserError
from sit import load_sit, sample_ode, sample_sde
from vae import load_vae

STREAM = 2 ** 32  # times i, added to the seed: the noise of SDE step i, from 1; 0: of the starting points
LABELS = 2 ** 62  # and this for the labels
PATHS = ("sit", "vae", "guide", "latent_stats")  # what these hold is compared by its hash: a folder may move
FREE_FLAGS = ("out", "micro_batch", "dry_run", "compile", "deterministic")  # the images stay the same


def parse_args():
    p = common.Parser(description=__doc__)
    p.add_argument("--sit", required=True, help="checkpoint of train_sit.py, REPA, REPA-E, SiT; or a hub id")
    p.add_argument("--vae", help="VAE to decode with (default: the one that made the latents)")
    p.add_argument("--latent-stats", help="for other projects' SiT: REPA-E's NAME-latents-stats.pt, vae.py's "
                   "stats.npz, or a scaling factor (0.18215 for SiT and REPA on SD-VAE)")
    p.add_argument("--out", required=True, type=common.npz_name, help="NAME.npz; NAME.png lies beside it")
    p.add_argument("--images", type=common.positive, default=50_000, help="how many")
    p.add_argument("--sampler", default="sde", choices=("sde", "euler", "heun"),
                   help="sde: Euler-Maruyama, w(t) = 2t (paper)")
    p.add_argument("--steps", type=common.positive, default=250, help="of the sampler")
    p.add_argument("--cfg", type=common.scale, default=1.0, help="guidance scale s (paper: 2.5)")
    p.add_argument("--guide", help="AutoGuidance: a weaker SiT (smaller, or trained for less)")
    p.add_argument("--interval", type=common.share, nargs=2, default=(0.0, 0.75), metavar=("LOW", "HIGH"),
                   help="times t with guidance (default: 0 0.75, as REPA-E)")
    p.add_argument("--labels", default="random", choices=("random", "equal", "blocks"),
                   help="random classes; equal counts, 0 1 2 ... 0 1 2 ...; equal counts, class after class")
    p.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged, or not")
    p.add_argument("--seed", type=common.seed, default=0, help="of noise and random labels")
    p.add_argument("--micro-batch", type=common.positive, default=64, help="images at a time: memory only")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    p.add_argument("--compile", type=int, default=int(torch.cuda.is_available()), choices=(0, 1),
                   help="1: torch.compile")
    p.add_argument("--deterministic", action="store_true", help="equal bits in each run on CUDA too, slower")
    p.add_argument("--dry-run", action="store_true", help="print the plan (images, NFE, disk), and end")
    args = p.parse_args()
    low, high = args.interval
    if low >= high:
        p.error(f"--interval {low:g} {high:g}: expected LOW below HIGH (no guidance at all: --cfg 1)")
    return args


# ------------------------------------------------------------------------------------------------------------
# Networks that belong together


def read_sit(path, weights):
    """load_sit() of a path or hub id, with the checksums of the file. Raises UserError for a file that is no
    SiT's, or damaged."""
    path = common.local_path(path)
    try:
        if zipfile.is_zipfile(path):
            common.check_zip(path, checksums=True)
        return load_sit(path, weights)
    except common.DAMAGED as e:
        raise common.damage(e, str(e) if str(path) in str(e) else f"{path}: {common.brief(e, 400)}") from None


def load_pair(args):
    """The SiT, its checkpoint with the statistics of the latents, and the VAE they belong to. Raises
    UserError for any other VAE."""
    model, checkpoint = read_sit(args.sit, args.weights)
    path = args.vae or checkpoint["vae"]
    if path is None:
        raise UserError(f"{args.sit} does not say which VAE made its latents: give --vae")
    if not args.vae and not common.local_path(path).exists():
        raise UserError(f"{args.sit} was trained on latents of {path}, which is not there; if it has moved, "
                        "give its new place with --vae")
    vae = load_vae(path)
    found, known = common.weights_hash(vae.state_dict()), checkpoint["vae_hash"]
    if known is None and checkpoint["vae"] and args.vae:  # a joint file of REPA-E holds its VAE
        known = common.weights_hash(load_vae(args.sit).state_dict())
    if known not in (None, found):
        raise UserError(f"--vae {path}: weights {found}, but {args.sit} was trained on latents of {known} "
                        f"({checkpoint['vae']}); decode with that file")
    channels, decoded = model.config["in_channels"], vae.config["z_channels"]
    if channels != decoded:
        raise UserError(f"--vae {path}: {decoded} latent channels, but {args.sit} has {channels}")
    if args.latent_stats and known is not None:
        raise UserError(f"--latent-stats: {args.sit} holds the statistics of its latents; leave the flag out")
    if args.latent_stats:
        from extras import convert  # here, since other projects' files are no part of the method
        checkpoint["latent_mean"], checkpoint["latent_std"] = convert.read_stats(args.latent_stats, channels)
    elif checkpoint["latent_mean"] is None and vae.latent_stats:
        checkpoint["latent_mean"], checkpoint["latent_std"] = vae.latent_stats
    if checkpoint["latent_mean"] is None:
        raise UserError(f"{args.sit} does not hold the mean and std of its latents: give --latent-stats (a "
                        "file, or a scaling factor such as 0.18215)")
    return model, dict(checkpoint, vae_hash=found), vae


def load_guide(args, model, checkpoint):
    """AutoGuidance's weaker model, or None. Raises UserError when it lives on other latents or classes."""
    if not args.guide:
        return None
    if args.cfg == 1:
        raise UserError("--guide: needs a guidance scale, --cfg S with S above 1")
    guide, other = read_sit(args.guide, args.weights)
    for key in ("in_channels", "input_size", "num_classes"):
        if guide.config[key] != model.config[key]:
            raise UserError(f"--guide {args.guide}: {key} {guide.config[key]}, but {args.sit} has "
                            f"{model.config[key]}; both need the same latents")
    vae_hash, path = checkpoint["vae_hash"], checkpoint["path"]
    if other["vae_hash"] not in (None, vae_hash) or other["path"] != path:
        raise UserError(f"--guide {args.guide}: trained on latents of VAE {other['vae_hash']}, "
                        f"{other['path']} path; {args.sit} on {vae_hash}, {path}; both need the same")
    for key in ("latent_mean", "latent_std"):
        if other[key] is not None and not torch.allclose(other[key], checkpoint[key], rtol=1e-3, atol=1e-4):
            raise UserError(f"--guide {args.guide}: its latents were normalised with another mean and std "
                            f"than those of {args.sit}")
    return guide


# ------------------------------------------------------------------------------------------------------------
# Sampling


def choose_labels(args, num_classes):
    """(N,) labels; every order depends on the seed and the index alone."""
    if args.labels == "equal":
        return np.arange(args.images) % num_classes
    if args.labels == "blocks":
        return np.arange(args.images) * num_classes // args.images
    u = data.draw_noise(args.seed + LABELS, range(args.images), 1)[0][:, 0].numpy()
    return np.minimum((u * num_classes).astype(np.int64), num_classes - 1)


@torch.no_grad()
def sample_batch(model, vae, guide, checkpoint, args, rows, labels, device):
    """Rows (indices of images) and labels (B,) -> functions that wait for the images, uint8 (B, H, W, 3), and
    for whether they are finite. No step waits for a GPU."""
    shape = (model.config["in_channels"], model.config["input_size"], model.config["input_size"])

    def noise(stream):
        drawn = data.draw_noise(args.seed + stream * STREAM, rows, 0, shape)[1]
        return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)

    y = torch.from_numpy(labels).to(device)
    flags = dict(steps=args.steps, cfg=args.cfg, interval=args.interval, path=checkpoint["path"], guide=guide)
    mean, std = (checkpoint[k].view(1, -1, 1, 1).to(device) for k in ("latent_mean", "latent_std"))
    with common.autocast(device, args.precision):
        if args.sampler == "sde":
            z = sample_sde(model, noise(0), y, draw=lambda i: noise(i + 1), **flags)
        else:
            z = sample_ode(model, noise(0), y, method=args.sampler, **flags)
        x = vae.decode((z * std + mean).contiguous(memory_format=torch.channels_last))
        return common.to_host(data.to_uint8(x).permute(0, 2, 3, 1)), common.to_host(x.isfinite().all())


# ------------------------------------------------------------------------------------------------------------
# The stage


def print_plan(args, settings, shape, num_classes, device):
    n, side, *_ = shape
    guidance = "no guidance"
    if args.cfg != 1:
        guidance = f"v = v_u + {args.cfg:g} (v_c - v_u) for t in {settings['interval']}"
        guidance += f", v_u of {args.guide}" if args.guide else ""
    print(f"{n} images of {side} x {side}, {args.labels} labels of {num_classes} classes, {args.weights} "
          f"weights of step {settings['step']}, {args.sampler} {args.steps} steps (NFE {settings['nfe']}), "
          f"{guidance}, {device.type} {args.precision}, disk {2 * np.prod(shape) / 2**30:.2f} GiB")


def describe(args, model, guide, checkpoint):
    """What decides on the images: flags and the content of files."""
    stats = {k: checkpoint[k] for k in ("latent_mean", "latent_std")}
    flags = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
    return dict(flags, interval=list(args.interval), step=checkpoint["step"], vae_hash=checkpoint["vae_hash"],
                nfe=2 * args.steps - 1 if args.sampler == "heun" else args.steps,
                sit_hash=common.weights_hash(model.state_dict()), stats_hash=common.weights_hash(stats),
                guide_hash=guide and common.weights_hash(guide.state_dict()))


def finished(out, decides):
    """Whether `out` was written with these settings."""
    record, unfinished = out.with_suffix(".json"), Path(f"{out}.run")
    if not out.exists() or not record.exists() or unfinished.exists():
        return False
    found = common.read_json(record)
    return all(found.get(k) == v for k, v in decides.items())


def unfinished_files(out):
    """What stands beside `out` while it is made, .run first: with it, the images are not finished."""
    return [Path(f"{out}.{suffix}") for suffix in ("run", "part", "done", "lock")]


def remove_unfinished(out):
    for path in unfinished_files(out):
        path.unlink(missing_ok=True)


def main():
    args = parse_args()
    device, rank, world = common.setup(args.deterministic)
    args.precision = args.precision or common.fast_precision(device)
    out, begin = Path(args.out), time.time()

    # What is sampled
    model, checkpoint, vae = load_pair(args)
    guide = load_guide(args, model, checkpoint)
    settings = describe(args, model, guide, checkpoint)
    side = model.config["input_size"] * vae.factor
    shape = (args.images, side, side, 3)
    if rank == 0:
        print_plan(args, settings, shape, model.num_classes, device)
    if args.dry_run:
        return

    # Where it goes
    decides = {k: v for k, v in settings.items() if k not in PATHS}
    if finished(out, decides):
        if rank == 0:
            if any(p.exists() for p in unfinished_files(out)):  # left by a stop, if nobody is at work there
                common.claim(f"{out}.lock")
                remove_unfinished(out)
            print(f"{out}: already there")
        return
    if rank == 0 and out.exists() and not os.path.exists(f"{out}.run"):
        print(f"{out}: of another command; drawn anew")
    files = {f"{out}.part": (np.uint8, shape), f"{out}.done": (np.uint8, shape[:1])}
    again = math.prod(shape)  # bytes of the .npz beside it
    store = common.open_rows(out, f"{out}.run", f"{out}.lock", decides, files, rank, spare=again)
    batches = common.chunks(store.missing(rank, world), args.micro_batch)

    # Sample; a batch is stored while a GPU works on the next
    vae.to(memory_format=torch.channels_last)
    for network in filter(None, (model, vae, guide)):
        common.cast_matmuls(network, device, args.precision)
    for network in filter(None, (model, vae.decoder, guide) if args.compile else ()):
        network.compile()
    labels = choose_labels(args, model.num_classes)
    sampled = ((rows, *sample_batch(model, vae, guide, checkpoint, args, rows, labels[rows], device))
               for rows in batches)
    sampled = tqdm(common.one_behind(sampled), "sample", len(batches), disable=rank > 0 or None)
    for rows, pixels, finite in sampled:
        if not finite():
            raise UserError(f"{args.sit}: samples {rows[0]} to {rows[-1]} are not finite; train longer, or "
                            "use --precision fp32")
        store.put(rows, pixels().numpy())
    store.flush()
    common.barrier()
    if rank:
        return

    # NAME.png, NAME.json, NAME.npz
    images = store.arrays[0]
    shown = torch.from_numpy(images[:64].copy()).permute(0, 3, 1, 2)
    common.save_grid(shown, out.with_suffix(".png"), columns=8)
    seconds = time.time() - begin
    common.write_json(out.with_suffix(".json"), dict(settings, seconds=round(seconds, 1)))
    common.write_npz(out, arr_0=images, arr_1=labels.astype(np.int64))
    remove_unfinished(out)
    count = sum(map(len, batches)) * world
    print(f"{out}: {args.images} images in {seconds:.0f} s ({count / seconds:.1f} images/s)")


if __name__ == "__main__":
    common.run_script(main)
