"""Stage 3: a SiT flow transformer on cached latents.

    python train_sit.py --latents out/latents --data images --out out/sit                               # one process
    torchrun --nproc_per_node=8 train_sit.py --latents out/latents --data images --out out/sit
    python train_sit.py --latents out/demo/send/latents --model SiT-demo/2 --repa 0 --batch 64 --steps 20 --out out/tiny/sit
    python train_sit.py --bench 10 --model SiT-B/1 --batch 32 --micro-batch 8                            # speed, on random data

Rerunning a command goes on where it stopped. Random numbers depend on (seed, step, place in the global batch) alone.
The latents are normalised with the mean and std that vae.py stored; the checkpoint carries both for sample.py.
"""
import argparse
import copy
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import common
import data
from common import UserError
from fid import frechet_distance, load_stats, statistics
from mapper import VFM, TokenCache, cache_size
from sit import SIT_MODELS, draw_time, interpolate, repa_loss, sample_ode, velocity_loss
from vae import load_vae


def parse_args():
    p = common.Parser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    p.add_argument("--latents", help="folder written by vae.py")
    p.add_argument("--out", help="folder for sit.pt and metrics.jsonl")
    p.add_argument("--model", default="SiT-XL/1", choices=SIT_MODELS, help="size / patch (paper: XL/1 on f16, XL/2 on f8)")
    p.add_argument("--qk-norm", type=int, default=0, choices=(0, 1))
    # Optimisation: the paper's values
    p.add_argument("--steps", type=common.positive, default=400_000, help="optimiser steps (80 ImageNet epochs at 256: 400,000)")
    p.add_argument("--batch", type=common.positive, default=256, help="images a step, over all processes")
    p.add_argument("--micro-batch", type=common.positive, help="images per forward pass and process: memory only (default: all)")
    p.add_argument("--lr", type=float, default=1e-4, help="AdamW, betas 0.9 0.999, no weight decay")
    p.add_argument("--lr-warmup", type=common.natural, default=0, help="steps of linear warm-up")
    p.add_argument("--lr-decay", type=int, default=0, choices=(0, 1), help="1: half a cosine down to zero at --steps")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=float, default=0.9999, help="decay of the averaged weights")
    # The flow
    p.add_argument("--path", default="linear", choices=("linear", "cosine"))
    p.add_argument("--time", default="uniform", choices=("uniform", "lognormal"), help="distribution of t in training")
    p.add_argument("--label-dropout", type=float, default=0.1, help="share of images trained without their label")
    # REPA
    p.add_argument("--repa", type=float, default=0.5, help="weight of the REPA loss; 0: off")
    p.add_argument("--data", help="image folder of the latents (for REPA)")
    p.add_argument("--vfm", default="vit_base_patch14_dinov2.lvd142m", help="any timm model")
    p.add_argument("--vfm-ckpt", help="local weights of the VFM")
    p.add_argument("--vfm-layer", type=int, help="block (ViT, default the last) or stage (CNN, default stride 16)")
    p.add_argument("--cache-vfm", metavar="DIR", help="compute the VFM's tokens once, into this folder, instead of in each step")
    # Scores during training: one convergence curve out of one run (the paper's Figure 4)
    p.add_argument("--eval-every", type=common.positive, help="steps between scores of averaged samples (default: none)")
    p.add_argument("--eval-stats", help="reference: a file of fid.py score ... --save-stats FILE; it names the network too")
    p.add_argument("--eval-images", type=common.positive, default=2000)
    p.add_argument("--eval-steps", type=common.positive, default=25, help="Heun steps of those samples")
    # The run
    p.add_argument("--seed", type=common.natural, default=0)
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    p.add_argument("--deterministic", action="store_true", help="equal bits in each run on CUDA too, slower (a CPU needs no flag)")
    p.add_argument("--compile", type=int, default=int(on_gpu), choices=(0, 1))
    p.add_argument("--grad-checkpointing", type=int, default=0, choices=(0, 1), help="1: less memory for about a third more time; the result stays the same")
    p.add_argument("--workers", type=common.natural, default=4 if on_gpu else 0, help="image reading processes (REPA)")
    p.add_argument("--save-every", type=common.positive, default=5000, help="steps between checkpoints")
    p.add_argument("--log-every", type=common.positive, default=50, help="steps between lines of metrics.jsonl")
    p.add_argument("--dry-run", action="store_true", help="print the plan (parameters, tokens, memory, disk), and end; needs no VFM weights")
    data.bench_flags(p)
    args = p.parse_args()
    data.required(p, args, "latents", "out")
    return args


class SiTLoss(nn.Module):
    """Velocity loss, plus REPA: (weighted sum, each part, the velocity loss of each image)."""

    def __init__(self, model, path, repa):
        super().__init__()
        self.model, self.path, self.repa = model, path, repa

    def forward(self, x, y, t, eps, tokens):
        """x, eps (B, c, h, w); y, t (B,); tokens (B, N, D) of the VFM or None."""
        x_t, target = interpolate(x, eps, t, self.path)
        v, projection = self.model(x_t, t, y, features=True) if tokens is not None else (self.model(x_t, t, y), None)
        each = velocity_loss(v, target)
        parts = {"velocity": each.mean()}
        total = parts["velocity"]
        if tokens is not None:
            parts["repa"] = repa_loss(projection, tokens)
            total = total + self.repa * parts["repa"]
        return total, {k: v.detach() for k, v in parts.items()}, each.detach()


class PairedImages:
    """The raw images that belong to the rows of a latent cache: same files, crop and flips (REPA's input)."""

    def __init__(self, latents, root, check):
        if not root:
            raise UserError("--repa needs the raw images: give --data DIR, or switch it off with --repa 0")
        self.images = data.ImageFolder(root, latents.meta["resolution"], flip=True, split=latents.meta["split"])
        at = {f: i for i, f in enumerate(self.images.files)}
        missing = [f for f in latents.files if f not in at]
        if missing:
            raise UserError(f"--data {root}: {missing[0]} of the latent cache is not there ({len(missing)} missing in all); bring it back, or encode again into another folder")
        if check and latents.meta.get("files_hash", self.images.hash) != self.images.hash:
            raise UserError(f"--data {root}: not the images that the latents were made of ({len(self.images.files)} files, hash of names and sizes {self.images.hash}; then {latents.meta['n'] + latents.meta['skipped']}, {latents.meta['files_hash']}); "
                            "a file was added, removed or replaced: bring it back, or encode again into another folder")
        self.index = np.array([at[f] for f in latents.files])

    def rows(self, rows, flips):
        return (self.index[rows] + len(self.images.files) * flips).tolist()


class Trainer:
    """Everything a step needs and a checkpoint holds."""

    def __init__(self, args, latents, device, rank, world):
        self.args, self.latents, self.device, self.rank, self.world = args, latents, device, rank, world
        n, self.flips, c2, side, _ = latents.moments.shape
        self.latent_shape = (c2 // 2, side, side)
        self.num_classes = len(latents.meta["classes"])
        self.vfm = self.paired = self.tokens = None
        self.inputs = dict(latents="-".join(str(latents.meta.get(k)) for k in ("vae_hash", "files_hash")))
        self.clock = data.Clock(device)
        torch.manual_seed(args.seed)  # initial weights only
        make = SIT_MODELS[args.model]
        patch = make.keywords["patch_size"]
        if side % patch:
            raise UserError(f"--model {args.model}: patch {patch} does not divide the {side} x {side} latent")
        if args.cache_vfm and not args.repa:
            raise UserError("--cache-vfm: has no effect with --repa 0")
        if args.repa:
            self.paired = PairedImages(latents, args.data, check=rank == 0 and not args.bench)
            with common.rank_zero_first():
                self.vfm = VFM(args.vfm, latents.meta["resolution"], side // patch, args.vfm_ckpt, args.vfm_layer, weights=not (args.dry_run or args.bench))
            self.inputs["vfm"] = None if args.dry_run or args.bench else common.weights_hash(self.vfm.state_dict())
            common.cast_matmuls(self.vfm.to(memory_format=torch.channels_last), device, args.precision)
            torch.manual_seed(args.seed)
        self.model = make(input_size=side, in_channels=c2 // 2, num_classes=self.num_classes, qk_norm=bool(args.qk_norm),
                          z_dim=self.vfm.dim if self.vfm is not None else 0).to(device)
        self.model.checkpointing = bool(args.grad_checkpointing)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.loss = SiTLoss(self.model, args.path, args.repa)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
        self.mean, self.std = (s.view(1, -1, 1, 1) for s in (latents.mean, latents.std))
        self.step, self.seconds = 0, 0.0

    def cache_tokens(self):
        """--cache-vfm: all tokens on disk, and the VFM's weights out of memory."""
        if self.args.cache_vfm and self.vfm is not None:
            self.tokens = TokenCache(self.args.cache_vfm, self.vfm, self.inputs["vfm"], self.paired.images, self.flips, self.args, self.device, self.rank, self.world)
            self.vfm.to("meta")

    def parallel(self):
        """Compiled and wrapped handle; the plain module stays for checkpoints and EMA. The VFM is compiled in place."""
        self.run = torch.compile(self.loss, fullgraph=True, disable=not self.args.compile)
        if self.args.compile and self.vfm is not None:
            self.vfm.compile()
        if self.world > 1:
            self.run = DDP(self.run, device_ids=[self.device.index] if self.device.type == "cuda" else None, gradient_as_bucket_view=True)

    def state(self):
        return dict(config=self.model.config, model=self.model.state_dict(), ema=self.ema.state_dict(),
                    optimizer=self.optimizer.state_dict(), step=self.step, seconds=self.seconds, args=vars(self.args), inputs=self.inputs,
                    latent_mean=self.latents.mean, latent_std=self.latents.std, classes=self.latents.meta["classes"],
                    vae=self.latents.meta["vae"], vae_hash=self.latents.meta["vae_hash"], path=self.args.path)

    def load(self, checkpoint):
        if checkpoint["vae_hash"] != self.latents.meta["vae_hash"]:
            raise UserError(f"{self.args.out}/sit.pt was trained on latents of VAE {checkpoint['vae_hash']}, {self.args.latents} is of "
                            f"{self.latents.meta['vae_hash']}; choose another --out")
        common.load_weights(self.model, checkpoint["model"], f"{self.args.out}/sit.pt")
        common.load_weights(self.ema, checkpoint["ema"], f"{self.args.out}/sit.pt, ema")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]

    def choose(self, step):
        """This rank's part of global batch `step`: the places in the stream of samples, the rows, their flips, uniforms (B, 3)."""
        local = self.args.batch // self.world
        first = step * self.args.batch + self.rank * local
        places = range(first, first + local)
        u = data.draw_noise(self.args.seed, places, 3)[0]
        flips = (u[:, 0] < 0.5).numpy().astype(np.int64) if self.flips == 2 else np.zeros(local, np.int64)
        return places, np.array(data.sample_order(len(self.latents.labels), self.args.seed, first, local)), flips, u

    def draw(self, step):
        """Latents x (B, c, h, w), labels y, times t (B,) and noise eps of this rank at `step`."""
        places, rows, flips, u = self.choose(step)
        _, normal, eps_posterior, eps = data.draw_noise(self.args.seed, places, 3, (1,), self.latent_shape, self.latent_shape)
        moments = torch.from_numpy(np.stack([self.latents.moments[r, f] for r, f in zip(rows, flips)])).float()
        bad = [self.latents.files[r] for r, m in zip(rows, moments) if not m.isfinite().all()]
        if bad:
            raise UserError(f"step {step + 1}: latents of {', '.join(bad[:8])} in {self.args.latents} are not finite ({len(bad)} of the batch); the last checkpoint is intact; "
                            "delete that folder and encode again")
        mean, std = moments.chunk(2, dim=1)
        x = (mean + std * eps_posterior - self.mean) / self.std  # unit variance per channel
        y = torch.from_numpy(self.latents.labels[rows]).where(u[:, 2] >= self.args.label_dropout, torch.tensor(self.num_classes))
        return x, y, draw_time(u[:, 1], normal[:, 0], self.args.time, self.args.path), eps

    def train_step(self, batch, pixels, tokens):
        """One optimiser step; returns the rank's loss parts. batch: (x, y, t, eps); pixels: the raw images; tokens: the VFM's of them; REPA
        needs one of the two. Leaves in self.each (B,) the velocity loss of each image."""
        args, local, clock = self.args, len(batch[0]), self.clock
        size = args.micro_batch or local
        for group in self.optimizer.param_groups:
            group["lr"] = common.learning_rate(args, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        parts, losses = {}, []
        for i in range(0, local, size):
            part = [v if v is None else v[i:i + size].to(self.device, non_blocking=True) for v in (*batch, tokens)]
            share = len(part[0]) / local
            with common.autocast(self.device, args.precision), common.sync_if(self.run, i + size >= local):
                if pixels is not None:
                    with clock("vfm"):
                        images = data.to_float(pixels[i:i + size].to(self.device, non_blocking=True))
                        part[-1] = self.vfm(data.any_batch(images.contiguous(memory_format=torch.channels_last), local % size))
                with clock("forward"):
                    total, means, each = self.run(*(v if v is None else data.any_batch(v, local % size) for v in part))
                with clock("backward"):
                    (total * share).backward()
            for k, v in means.items():
                parts[k] = parts.get(k, 0) + v * share
            losses.append(each)
        self.each = torch.cat(losses)
        with clock("optimiser"):
            parts["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
            self.optimizer.step()
        with clock("ema"):
            common.update_ema(self.ema, self.model, self.step, args.ema)
        self.step += 1
        return parts

    def traced(self, n, given=False):
        """What a step on n images computes; self must live on the "meta" device. given: the VFM's tokens are there."""
        x, t, size = torch.empty(n, *self.latent_shape), torch.empty(n), self.latents.meta["resolution"]
        tokens = None
        if self.vfm is not None:
            tokens = torch.empty(n, self.vfm.grid ** 2, self.vfm.dim) if given else self.vfm(torch.empty(n, 3, size, size))
        self.loss(x, torch.zeros(n, dtype=torch.long), t, x, tokens)[0].backward()

    def memory(self, n=None):
        """Estimated bytes at the peak of a step in float32, on each process; self must live on the "meta" device."""
        n, given = n or self.args.micro_batch or self.args.batch // self.world, bool(self.args.cache_vfm)
        held = sum(4 * p.numel() for p in self.model.parameters()) * 5  # weight, gradient, two moments, average
        held += sum(4 * p.numel() for p in self.vfm.parameters()) if self.vfm is not None and not given else 0
        with torch.device("meta"):
            self.traced(1, given)  # the gradients, which are counted above, are there from the second step on
            return held + data.peak_bytes(lambda: self.traced(n, given))


class Evaluation:
    """Fréchet distance of samples of the averaged model: Heun, --eval-steps steps, no guidance, equal class counts, the same noise each time."""

    def __init__(self, args, latents, device, rank, world):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        if not args.eval_stats:
            raise UserError("--eval-every needs --eval-stats FILE; make it with: python fid.py score REFERENCE REFERENCE --save-stats FILE")
        if args.eval_images < 4:
            raise UserError(f"--eval-images {args.eval_images}: a covariance needs 4 or more")
        with common.rank_zero_first():
            self.net, self.stats = load_stats(args.eval_stats)
        self.metric = "FID" if self.net.label == "inception" else f"FD({self.net.label})"
        self.metric += f"-{args.eval_images}"
        self.vae = load_vae(latents.meta["vae"])
        if common.weights_hash(self.vae.state_dict()) != latents.meta["vae_hash"]:
            raise UserError(f"{latents.meta['vae']}: no longer the VAE that made {args.latents}; encode again, or switch --eval-every off")
        self.vae, self.net = (m.to(device, memory_format=torch.channels_last) for m in (self.vae, self.net))
        self.mean, self.std = (s.view(1, -1, 1, 1).to(device) for s in (latents.mean, latents.std))

    @torch.no_grad()
    def __call__(self, model):
        """The distance, on rank 0 (0 elsewhere), whatever the number of ranks."""
        c, n = model.config, self.args.eval_images
        features = torch.zeros(n, self.net.dim)
        for rows in common.chunks(common.split_rows(n, self.rank, self.world), 64):
            noise = data.draw_noise(self.args.seed + 2 ** 61, rows, 0, (c["in_channels"], c["input_size"], c["input_size"]))[1].to(self.device)
            y = torch.tensor(rows, device=self.device) % c["num_classes"]
            with common.autocast(self.device, self.args.precision):
                z = sample_ode(model, noise, y, self.args.eval_steps, path=self.args.path) * self.std + self.mean
                images = data.to_uint8(self.vae.decode(z.contiguous(memory_format=torch.channels_last)))
            with torch.backends.cudnn.flags(allow_tf32=False):
                features[list(rows)] = self.net(images).cpu()
        features = common.all_reduce(features)
        return 0.0 if self.rank else frechet_distance(self.stats["mu"], self.stats["sigma"], *statistics(features))


class RawRows:
    """Raw images of each step that is left, worked out when a reading process asks for them."""

    def __init__(self, trainer, steps):
        self.trainer, self.steps = trainer, steps

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, k):
        _, rows, flips, _ = self.trainer.choose(self.steps[k])
        return self.trainer.paired.rows(rows, flips)


def batches(t):
    """(latents, labels, times, noise), raw images and VFM tokens (one of the two for REPA, else None) of every step that is left."""
    steps = range(t.step, t.args.steps)
    if t.vfm is None:
        yield from ((t.draw(s), None, None) for s in steps)
    elif t.tokens is not None:
        yield from ((t.draw(s), None, t.tokens[rows]) for s, rows in zip(steps, RawRows(t, steps)))
    else:
        loader = data.load_batches(t.paired.images, RawRows(t, steps), t.args.workers, replace=True)
        yield from ((t.draw(s), pixels, None) for s, (pixels, _, _) in zip(steps, loader))


def random_latents(args, folder):
    """Latents of the size that belongs to --model at 256 pixels (patch 1: f16d32, patch 2: f8d4; demo: f4d4 at 64), and their images."""
    images, patch = 64, SIT_MODELS[args.model].keywords["patch_size"]
    resolution, c, side, classes = (64, 4, 16, 5) if "demo" in args.model else (256, 32, 16, 1000) if patch == 1 else (256, 4, 32, 1000)
    data.random_images(folder, images if args.repa else 0, resolution)
    moments = np.lib.format.open_memmap(f"{folder}/moments.npy", "w+", np.float16, (images, 1, 2 * c, side, side))
    moments[:] = np.abs(np.random.default_rng(0).standard_normal(moments.shape))
    meta = dict(resolution=resolution, split=None, classes=list(range(classes)), vae="random", vae_hash="random")
    return data.Latents(moments, np.arange(images) % classes, [f"{i:04d}.jpg" for i in range(images)], torch.zeros(c), torch.ones(c), meta)


def bench(args, device, rank, world):
    """--bench: the steps of main() on random latents, images and weights, without logs and checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        args.data, args.steps = folder, args.bench + 10
        t = Trainer(args, random_latents(args, folder), device, rank, world)
        if args.repa and args.cache_vfm:
            t.tokens = torch.randn(64, t.vfm.grid ** 2, t.vfm.dim)
        t.parallel()
        source, parts = data.ahead(batches(t), device), data.Parts()

        def step():
            with t.clock("data"):
                batch = next(source)
            parts.add(t.step + 1, t.train_step(*batch), t.each, batch[0][2])

        plan = Trainer(argparse.Namespace(**{**vars(args), "dry_run": True}), t.latents, torch.device("meta"), rank, world)
        with torch.device("meta"):
            flops = data.count_flops(lambda: plan.traced(1, bool(args.cache_vfm)))
        used = args.micro_batch or args.batch // world
        data.run_bench(args, f"train_sit {args.model}, batch {args.batch}, {used} at a time, "
                       + ("no REPA" if not args.repa else "REPA, tokens given" if args.cache_vfm else f"REPA with {args.vfm}"),
                       device, step, args.batch, flops, t.clock, largest_micro_batch=lambda: data.largest_micro_batch(plan.memory, used, device))


def plan(t, path, params, disk):
    """What will happen, before it happens."""
    args, n = t.args, len(t.latents.labels)
    print(f"{'go on with' if t.step else 'train'} {path}: step {t.step} of {args.steps}, batch {args.batch} on {t.world} process(es), "
          f"{'dry run' if args.dry_run else t.device.type} {args.precision}; {n} latents {t.latent_shape}, {t.num_classes} classes, "
          f"{args.steps * args.batch / n:.1f} epochs, {'with' if t.flips == 2 else 'without'} flips")
    print(f"{args.model} {params / 1e6:.1f} M, {t.model.grid ** 2} tokens, {args.path} path, {args.time} t"
          + (f"; REPA {args.repa:g} with {args.vfm} after block {t.model.repa_block}" if t.vfm is not None else "; no REPA"))
    if args.dry_run:
        print(f"memory about {t.memory() / 2**30:.1f} GiB a process with {args.micro_batch or args.batch // t.world} images at a time, counted in "
              f"float32 (bf16 needs less); disk {disk / 2**30:.1f} GiB for checkpoints")
        if args.cache_vfm and t.vfm is not None:
            print(f"--cache-vfm: {cache_size(t.vfm, t.paired.images, t.flips)}")


def main():
    args = parse_args()
    device, rank, world = common.setup(args.deterministic)
    args.precision = args.precision or common.fast_precision(device)
    if args.batch % world:
        raise UserError(f"--batch {args.batch}: expected a multiple of the {world} processes")
    if args.bench:
        return bench(args, device, rank, world)
    latents = data.load_latents(args.latents)
    if args.batch > len(latents.labels):
        raise UserError(f"--batch {args.batch} is larger than the {len(latents.labels)} latents of {args.latents}; use a smaller one")
    out = Path(args.out) if args.dry_run else common.open_out(args.out)
    path = out / "sit.pt"
    if rank == 0 and not args.dry_run:
        common.claim(out / ".lock")
    t = Trainer(args, latents, torch.device("meta") if args.dry_run else device, rank, world)
    params = sum(p.numel() for p in t.model.parameters())
    disk = 3 * params * 16
    if args.dry_run:
        return plan(t, path, params, disk) if rank == 0 else None
    checkpoint = common.load_newest(path)
    if checkpoint is not None:
        common.same_run(checkpoint, args, path, t.inputs)
        t.load(checkpoint)
    if t.step >= args.steps:
        return print(f"{path}: already at step {t.step}") if rank == 0 else None
    t.parallel()
    common.open_out(out, need_bytes=data.disk_left(disk, path))
    t.cache_tokens()
    if rank == 0:
        plan(t, path, params, disk)
    evaluate = Evaluation(args, latents, device, rank, world) if args.eval_every else None
    log = common.Log(out / "metrics.jsonl", t.step, dict(vars(args), inputs=t.inputs), rank)
    stop, since, seen, pending = common.Stop(), time.time(), 0, data.Parts((checkpoint or {}).get("losses"))
    name_images = lambda step, places: [latents.files[data.sample_order(len(latents.files), args.seed, (step - 1) * args.batch + p, 1)[0]] for p in places]
    bar = tqdm(total=args.steps, initial=t.step, disable=rank > 0 or None)
    for batch in data.ahead(batches(t), device):
        pending.add(t.step + 1, t.train_step(*batch), t.each, batch[0][2])
        seen += args.batch
        bar.update()
        logs, saves, evaluates = (t.step % n == 0 or t.step == args.steps for n in (args.log_every, args.save_every, args.eval_every or args.steps))
        stopping = stop.asked()
        if logs or saves or evaluates or stopping:
            parts = pending.look("a smaller --lr, --qk-norm 1 or --precision fp32", name_images)
            for spike in pending.spikes:
                log.write(**spike)
        if logs:
            now = time.time()
            t.seconds, rate, since, seen = t.seconds + now - since, seen / (now - since), now, 0
            log.write(step=t.step, **parts, velocity_t=pending.by_time(), lr=common.learning_rate(args, t.step - 1), images_per_s=round(rate, 1), seconds=round(t.seconds, 1))
            bar.set_postfix({k: f"{v:.4g}" for k, v in parts.items()}, refresh=False)
        if evaluate is not None and evaluates:
            begin = time.time()
            log.write(step=t.step, **{evaluate.metric: evaluate(t.ema)})
            since += time.time() - begin  # no part of the training's speed
        if (saves or stopping) and rank == 0:
            common.save_checkpoint(path, dict(t.state(), losses=pending.state()))
        if stopping:
            common.barrier()  # no rank leaves, and takes the others with it, before the checkpoint is on disk
            raise common.Stopped(f"stopped by {signal.Signals(stopping).name}; saved at step {t.step}; run the same command to go on", stopping)
    bar.close()
    if rank == 0:
        print(f"{path}: step {t.step}, " + ", ".join(f"{k} {v:.4g}" for k, v in parts.items()) + f", {t.seconds:.0f} s")


if __name__ == "__main__":
    common.run_script(main)
