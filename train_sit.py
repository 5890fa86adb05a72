"""Stage 3: a SiT flow transformer on cached latents.

    python train_sit.py --latents out/latents --data images --out out/sit                     # one process
    torchrun --nproc_per_node=8 train_sit.py --latents out/latents --data images --out out/sit
    python train_sit.py --latents out/demo/send/latents --model SiT-demo/1 --repa 0 --batch 64 --steps 20 \\
        --out out/tiny/sit                                                                    # tiny

Rerunning a command goes on where it stopped. Random numbers depend on (seed, step, place in the global batch)
alone. The latents are normalised with the mean and std that vae.py stored; the checkpoint carries both for
sample.py.
"""
import copy
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import data
from common import UserError
from fid import frechet_distance, load_stats, statistics
from mapper import VFM, cache_tokens, describe_cache, vfm_flags
from sit import SIT_MODELS, draw_time, interpolate, repa_loss, sample_ode, velocity_loss
from vae import load_vae


def parse_args():
    p = common.Parser(description=__doc__)
    switch = dict(type=int, choices=(0, 1))
    p.add_argument("--latents", required=True, help="folder written by vae.py")
    p.add_argument("--out", required=True, help="folder for sit.pt and metrics.jsonl")
    p.add_argument("--model", default="SiT-XL/1", choices=SIT_MODELS,
                   help="size / patch (paper: XL/1 on f16, XL/2 on f8)")
    p.add_argument("--qk-norm", **switch, default=0, help="1: RMS norm of queries and keys")
    # Optimisation: the paper's values
    p.add_argument("--steps", type=common.positive, default=400_000,
                   help="optimiser steps (80 ImageNet epochs at 256: 400,000)")
    p.add_argument("--batch", type=common.positive, default=256, help="images a step, over all processes")
    p.add_argument("--micro-batch", type=common.positive,
                   help="images per forward pass and process (default: all); memory only, divides its share")
    p.add_argument("--lr", type=common.scale, default=1e-4, help="AdamW, betas 0.9 0.999, no weight decay")
    p.add_argument("--lr-warmup", type=common.natural, default=0, help="steps of linear warm-up")
    p.add_argument("--lr-decay", **switch, default=0, help="1: half a cosine down to zero at --steps")
    p.add_argument("--clip", type=common.norm, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=common.decay, default=0.9999,
                   help="decay of the averaged weights, at most (1 + step) / (10 + step)")
    # The flow
    p.add_argument("--path", default="linear", choices=("linear", "cosine"), help="from data to noise")
    p.add_argument("--time", default="uniform", choices=("uniform", "lognormal"),
                   help="distribution of t in training")
    p.add_argument("--label-dropout", type=common.share, default=0.1,
                   help="share of images trained without their label")
    # REPA
    p.add_argument("--repa", type=common.scale, default=0.5, help="weight of the REPA loss; 0: off")
    p.add_argument("--data", help="image folder of the latents (for REPA)")
    vfm_flags(p)
    # Scores during training: one convergence curve out of one run (the paper's Figure 4)
    p.add_argument("--eval-every", type=common.positive,
                   help="steps between scores of averaged samples (default: none)")
    p.add_argument("--eval-stats",
                   help="reference: a file of fid.py score ... --save-stats FILE; it names the network too")
    p.add_argument("--eval-images", type=common.Range(int, 4, 10 ** 9), default=2000,
                   help="samples a score, 4 or more")
    p.add_argument("--eval-steps", type=common.positive, default=25, help="Heun steps of those samples")
    p.add_argument("--grad-checkpointing", **switch, default=0,
                   help="1: less memory for about a third more time; the result stays the same")
    common.run_flags(p, save_every=5000)
    args = p.parse_args()
    if args.cache_vfm and not args.repa:
        p.error("--cache-vfm: has no effect with --repa 0")
    if args.repa and not args.data:
        p.error("--repa needs the raw images: give --data DIR, or switch it off with --repa 0")
    if args.eval_every and not args.eval_stats:
        p.error("--eval-every needs --eval-stats FILE; make it with: python fid.py score REFERENCE none "
                "--save-stats FILE")
    return args


class SiTLoss(nn.Module):
    """The velocity loss, and REPA's: (each part, the velocity loss of each image)."""

    def __init__(self, model, path):
        super().__init__()
        self.model, self.path = model, path

    def forward(self, x, y, t, eps, tokens):
        """x, eps (B, c, h, w); y, t (B,); tokens (B, N, D) of the VFM or None."""
        x_t, target = interpolate(x, eps, t, self.path)
        if tokens is None:
            v = self.model(x_t, t, y)
        else:
            v, projection = self.model(x_t, t, y, features=True)
        each = velocity_loss(v, target)  # (B,)
        parts = {"velocity": each.mean()}
        if tokens is not None:
            parts["repa"] = repa_loss(projection, tokens)
        return parts, each


# ------------------------------------------------------------------------------------------------------------
# Batches


def pair_images(latents, root, check):
    """The raw images that belong to the rows of a latent cache, same files, crop and flips (REPA's input) ->
    (ImageFolder, its row of each latent). check: compare their hash too. Raises UserError."""
    meta = latents.meta
    images = data.ImageFolder(root, meta["resolution"], flip=latents.moments.shape[1] == 2,
                              split=meta["split"])
    at = {f: i for i, f in enumerate(images.files)}
    missing = [f for f in latents.files if f not in at]
    if missing:
        raise UserError(f"--data {root}: {missing[0]} of the latent cache is not there ({len(missing)} "
                        "missing in all); bring it back, or encode again into another folder")
    if check and meta.get("files_hash", images.hash) != images.hash:
        raise UserError(f"--data {root}: not the images that the latents were made of ({len(images.files)} "
                        f"files, hash of names and sizes {images.hash}; then {meta['n'] + meta['skipped']}, "
                        f"{meta['files_hash']}); a file was added, removed or replaced: bring it back, or "
                        "encode again into another folder")
    return images, np.array([at[f] for f in latents.files])


def read_step(latents, pair, cached, args, rank, world, step):
    """What this process needs of `step` from the CPU: (x, y, t, eps): normalised latents (B, c, h, w),
    labels, times (B,), noise like x; raw images or cached tokens (one of the two for REPA, else None);
    unreadable files."""
    places = data.step_places(args.batch, rank, world, step)
    n, flips, c2, *side = latents.moments.shape
    shape = (c2 // 2, *side)
    u, normal, eps_posterior, eps = data.draw_noise(args.seed, places, 3, (1,), shape, shape)
    rows = np.array(data.sample_order(n, args.seed, places))
    flip = (u[:, 0] < 0.5).numpy().astype(np.int64) if flips == 2 else np.zeros(len(rows), np.int64)
    moments = torch.from_numpy(np.stack([latents.moments[r, f] for r, f in zip(rows, flip)])).float()
    mean, std = moments.chunk(2, dim=1)
    z = mean + std * eps_posterior
    x = (z - latents.mean.view(1, -1, 1, 1)) / latents.std.view(1, -1, 1, 1)  # unit variance per channel
    no_class = torch.tensor(len(latents.meta["classes"]))
    y = torch.from_numpy(latents.labels[rows]).where(u[:, 2] >= args.label_dropout, no_class)
    batch = x, y, draw_time(u[:, 1], normal[:, 0], args.time, args.path), eps
    if pair is None:
        return batch, None, None, []
    images, index = pair
    rows = (index[rows] + len(images.files) * flip).tolist()
    if cached is not None:
        return batch, None, torch.from_numpy(cached[rows]).float(), []
    pixels, _, _, unreadable = data.read_rows(images, rows, replace=True)
    return batch, pixels, None, unreadable


class Sampler:
    """Samples, decoded by the VAE that made the latents: Heun, no guidance, the same noise each time."""

    def __init__(self, run, latents, path):
        self.run = run
        if not path.exists():
            command = latents.meta.get("made", {}).get("command", "vae.py --vae ...")
            raise UserError(f"{path}, the VAE of {run.args.latents}, is not there; if it has moved, run "
                            f"again, with its new --vae: python {command}; or train with --sample-every 0 "
                            "and without --eval-every")
        self.vae = load_vae(path)
        if common.weights_hash(self.vae.state_dict()) != latents.meta["vae_hash"]:
            raise UserError(f"{latents.meta['vae']}: no longer the VAE that made {run.args.latents}; encode "
                            "again, or train with --sample-every 0 and without --eval-every")
        self.vae.to(run.device, memory_format=torch.channels_last)
        self.mean, self.std = (s.view(1, -1, 1, 1).to(run.device) for s in (latents.mean, latents.std))

    @torch.no_grad()
    def __call__(self, model, rows, y, steps):
        """rows (B,): which noise; labels y (B,) -> uint8 (B, 3, H, W)."""
        args, device, c = self.run.args, self.run.device, model.config
        shape = c["in_channels"], c["input_size"], c["input_size"]
        noise = data.draw_noise(args.seed + 2 ** 61, rows, 0, shape)[1].to(device)
        with common.autocast(device, args.precision):
            z = sample_ode(model, noise, y.to(device), steps, path=args.path) * self.std + self.mean
            return data.to_uint8(self.vae.decode(z.contiguous(memory_format=torch.channels_last)))


class Evaluation:
    """Fréchet distance of samples of the averaged model: --eval-steps steps, the classes in turn."""

    def __init__(self, run, sample):
        self.run, self.sample, args = run, sample, run.args
        self.net, self.stats = load_stats(args.eval_stats)
        network = "FID" if self.net.label == "inception" else f"FD({self.net.label})"
        self.name = f"{network}-{args.eval_images}"
        self.net.to(run.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, model):
        """{its name: the distance}, on rank 0 (0 elsewhere), whatever the number of ranks."""
        run, args = self.run, self.run.args
        features = torch.zeros(args.eval_images, self.net.dim)
        for rows in common.chunks(common.split_rows(args.eval_images, run.rank, run.world), 64):
            images = self.sample(model, rows, torch.tensor(rows) % model.num_classes, args.eval_steps)
            with torch.backends.cudnn.flags(allow_tf32=False):
                features[rows] = self.net(images).cpu()
        features = common.all_reduce(features)
        reference = self.stats["mu"], self.stats["sigma"]
        return {self.name: 0.0 if run.rank else frechet_distance(*reference, *statistics(features))}


def print_plan(args, run, latents, model, vfm, pair):
    """What will happen, before it happens."""
    n, flips, c2, *side = latents.moments.shape
    size = sum(p.numel() for p in model.parameters())
    print(f"{'go on with' if run.step else 'train'} {run.path}: step {run.step} of {args.steps}, batch "
          f"{args.batch} on {run.world} process(es), {'dry run' if args.dry_run else run.device.type} "
          f"{args.precision}; {n} latents {(c2 // 2, *side)}, {len(latents.meta['classes'])} classes, "
          f"{args.steps * args.batch / n:.1f} epochs, {'with' if flips == 2 else 'without'} flips")
    repa = "no REPA" if vfm is None else f"REPA {args.repa:g} with {args.vfm} after block {model.repa_block}"
    print(f"{args.model} {size / 1e6:.1f} M, {model.grid ** 2} tokens, {args.path} path, {args.time} t; "
          f"{repa}")
    if args.dry_run:
        print(f"disk {3 * 16 * size / 1e9:.1f} GB for checkpoints")
        if args.cache_vfm:
            print(f"--cache-vfm: {describe_cache(vfm, len(pair[0]))}")


def main():
    args = parse_args()
    run = common.Run(args, "sit.pt", advice="a smaller --lr, --qk-norm 1 or --precision "
                     "fp32; where one image is named, encode its latents again and go on")
    device = run.device
    latents = data.load_latents(args.latents)
    n, flips, c2, side, _ = latents.moments.shape
    if args.batch > n:
        raise UserError(f"--batch {args.batch} is larger than the {n} latents of {args.latents}; use {n} "
                        "or less")
    make = SIT_MODELS[args.model]
    patch = make.keywords["patch_size"]
    if side % patch:
        raise UserError(f"--model {args.model}: patch {patch} does not divide the {side} x {side} latent")

    # Models: the SiT, and for REPA the frozen VFM and the raw images
    vfm = pair = None
    if args.repa:
        pair = pair_images(latents, args.data, check=run.rank == 0)
        vfm = VFM(args.vfm, latents.meta["resolution"], side // patch, args.vfm_ckpt, args.vfm_layer,
                  weights=not args.dry_run)
    torch.manual_seed(args.seed)
    model = make(input_size=side, in_channels=c2 // 2, num_classes=len(latents.meta["classes"]),
                 qk_norm=bool(args.qk_norm), z_dim=vfm.dim if args.repa else 0)
    if args.dry_run:
        if run.rank == 0:
            print_plan(args, run, latents, model, vfm, pair)
        return
    model = model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    model.checkpointing = bool(args.grad_checkpointing)
    loss, weights = SiTLoss(model, args.path), dict(velocity=1.0, repa=args.repa)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=fused)
    meta = latents.meta
    inputs = dict(latents=f"{meta.get('vae_hash')}-{meta.get('files_hash')}")
    if vfm is not None:
        inputs["vfm"] = common.weights_hash(vfm.state_dict())
        common.cast_matmuls(vfm.to(memory_format=torch.channels_last), device, args.precision)
    record = dict(config=model.config, path=args.path, classes=meta["classes"], vae=meta["vae"],
                  vae_hash=meta["vae_hash"], latent_mean=latents.mean, latent_std=latents.std)
    if not run.resume(dict(model=model, ema=ema, optimizer=optimizer), inputs, record):
        return

    # Pictures of 16 samples, from the first class to the last, and scores
    sampler = None
    if args.eval_every or args.sample_every:
        path = common.local_path(meta["vae"])  # by all processes: it may come from the hub
        if args.eval_every or run.rank == 0:
            sampler = Sampler(run, latents, path)
    labels = torch.arange(16) * model.num_classes // 16
    draw = sampler and partial(sampler, ema, range(16), labels, steps=10)
    evaluate = Evaluation(run, sampler) if args.eval_every else None

    # Compile and wrap: the plain module stays for checkpoints and EMA
    forward = torch.compile(loss, fullgraph=True, disable=not args.compile)
    if args.compile and vfm is not None:
        vfm.compile()
    if run.world > 1:
        ids = [device.index] if device.type == "cuda" else None
        forward = DDP(forward, device_ids=ids, gradient_as_bucket_view=True)
    cached = None
    if args.cache_vfm:
        cached = cache_tokens(args.cache_vfm, vfm, inputs["vfm"], pair[0], run)
        vfm.to("meta")  # frees its memory
    if run.rank == 0:
        print_plan(args, run, latents, model, vfm, pair)

    def name_images(step, places):
        rows = data.sample_order(n, args.seed, [step * args.batch + p for p in places])
        return [latents.files[row] for row in rows]

    read = partial(read_step, latents, pair, cached, args, run.rank, run.world)
    batches = data.load(read, range(run.step, args.steps), args.workers)
    for step, (batch, pixels, cached_tokens, unreadable) in run.steps(batches, name_images, draw):
        if unreadable:
            pair[0].note_bad(unreadable)
        # 1. Forward and backward, in pieces of --micro-batch
        learning_rate = common.learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        parts, of_images, share = {}, [], run.micro / run.local
        for i in range(0, run.local, run.micro):
            part = slice(i, i + run.micro)
            x, y, t, eps = (v[part].to(device, non_blocking=True) for v in batch)
            tokens = None if cached_tokens is None else cached_tokens[part].to(device, non_blocking=True)
            with common.autocast(device, args.precision), common.sync_if(forward, i + run.micro == run.local):
                if pixels is not None:
                    images = data.to_float(pixels[part].to(device, non_blocking=True))
                    tokens = vfm(images.contiguous(memory_format=torch.channels_last))  # (B, N, D)
                losses, each = forward(x, y, t, eps, tokens)
                total = sum(weights[k] * v for k, v in losses.items())
                (total * share).backward()
            for k, v in losses.items():
                parts[k] = parts.get(k, 0) + v.detach() * share
            of_images.append(each.detach())

        # 2. Clip, step, averaged weights
        parts["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        common.update_ema(ema, model, step, args.ema)

        # 3. Log, score the averaged model, save and stop where it is due
        scores = evaluate is not None and run.due(args.eval_every, step + 1)
        run.after_step(parts, each=torch.cat(of_images), t=batch[2],
                       score=partial(evaluate, ema) if scores else None)


if __name__ == "__main__":
    common.run_script(main)
