"""Stage 1: fine-tune (or pre-train) a VAE, with or without alignment. Eq. (3): L = lambda_align L_align + L_VAE.

    python train_vae.py --data images --init vavae/vae.pt --out out/send                                # one process
    torchrun --nproc_per_node=8 train_vae.py --data images --init vavae/vae.pt --out out/send           # one node
    python train_vae.py --data out/tiny/avatars --preset demo --lambda-align 0 --lpips 0 --gan 0 --batch 64 --steps 20 --out out/tiny/vae
    python train_vae.py --bench 10 --preset f16d32 --batch 4 --micro-batch 2                            # speed, on random data

The control of every claim is the same command with --align none, the rival's arm with --align vavae. Rerunning a command goes on where it stopped.
Random numbers depend on (seed, step, place in the global batch), so the checkpoint needs no generator state, and the
number of processes and --micro-batch change memory and speed only (but see --disc-ckpt: its batch norm sees the split).

Which loss moves what (the VFM and LPIPS are frozen; before --mapper-warmup L_align moves the mapper alone; L_align is
Send-VAE's or VA-VAE's):

    loss            encoder   decoder   mapper   discriminator
    L_rec, L_LPIPS     x         x
    L_KL               x
    L_GAN              x         x
    L_align            x                   x
    L_disc                                              x
"""
import argparse
import copy
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import common
import data
from common import UserError
from fid import build_lpips
from mapper import VFM, LinearMapper, Mapper, TokenCache, add_noise, align_loss, cache_size, vavae_loss
from vae import VAE_CONFIGS, AutoencoderKL, GroupNorm, load_vae


def parse_args():
    p = common.Parser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    p.add_argument("--data", help="image folder")
    p.add_argument("--out", help="folder for vae.pt and metrics.jsonl")
    p.add_argument("--split", choices=data.SPLITS, help="only the images that attributes.csv puts there (default: all)")
    p.add_argument("--init", help="VAE to fine-tune (any format of vae.load_vae); its architecture is kept")
    p.add_argument("--preset", choices=VAE_CONFIGS, help="architecture for training from scratch (without --init)")
    p.add_argument("--resolution", type=common.positive, help="crop in pixels (default: the VAE's)")
    p.add_argument("--flip", type=int, default=1, choices=(0, 1), help="mirror images are data too")
    # Optimisation: the paper's values
    p.add_argument("--steps", type=common.positive, default=100_000, help="optimiser steps (80 ImageNet epochs at 1024: 100,000)")
    p.add_argument("--batch", type=common.positive, default=1024, help="images a step, over all processes")
    p.add_argument("--micro-batch", type=common.positive, help="images per forward pass and process: memory only (default: all)")
    p.add_argument("--lr", type=float, default=3e-4, help="AdamW, betas 0.9 0.999, no weight decay")
    p.add_argument("--lr-warmup", type=common.natural, default=0, help="steps of linear warm-up")
    p.add_argument("--lr-decay", type=int, default=0, choices=(0, 1), help="1: half a cosine down to zero at --steps")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=float, default=0.9999, help="decay of the averaged weights")
    # L_VAE: REPA-E's weights
    p.add_argument("--rec", choices=("l1", "mse"), default="l1", help="weight 1; the paper writes MSE, REPA-E trains L1")
    p.add_argument("--lpips", type=float, default=1.0, help="weight of LPIPS (VGG); 0: off")
    p.add_argument("--lpips-ckpt", help="local torchvision VGG16 weights instead of the download")
    p.add_argument("--gan", type=float, default=0.1, help="weight of the hinge GAN; 0: no discriminator")
    p.add_argument("--gan-start", type=common.natural, default=0, help="first step with the GAN")
    p.add_argument("--gan-adaptive", type=int, default=0, choices=(0, 1), help="1: weigh the GAN by LDM's ratio of gradients too; costs a second forward pass")
    p.add_argument("--disc-ckpt", help="pre-trained discriminator of taming, LDM or REPA-E, with its batch norm (default: from scratch, group norm)")
    p.add_argument("--kl", type=float, default=1e-6, help="weight of the KL, summed over the latent")
    # L_align
    p.add_argument("--align", default="send", choices=("send", "vavae", "none"), help="this paper's, VA-VAE's, or no alignment (the control arm)")
    p.add_argument("--lambda-align", type=float, help="its weight (default: send 1, vavae 0.1 times the ratio of gradients); 0: none")
    p.add_argument("--vfm", default="vit_base_patch14_dinov2.lvd142m", help="any timm model")
    p.add_argument("--vfm-ckpt", help="local weights of the VFM")
    p.add_argument("--vfm-layer", type=int, help="block (ViT, default the last) or stage (CNN, default stride 16)")
    p.add_argument("--cache-vfm", metavar="DIR", help="compute the VFM's tokens once, into this folder, instead of in each step")
    p.add_argument("--grid", type=int, help="tokens a side (default: resolution / 16; below 256 pixels the latent's side)")
    p.add_argument("--mapper-depth", type=int, default=1, help="ViT blocks; 0: MLP only")
    p.add_argument("--mapper-width", type=int, help="default: the VFM's dimension")
    p.add_argument("--mapper-mlp", type=int, default=2048, help="width of the mapper's projector")
    p.add_argument("--mapper-warmup", type=common.natural, default=0, help="first steps in which L_align trains the mapper alone")
    p.add_argument("--noise", type=int, default=1, choices=(0, 1), help="eq. (1) on the latent before the mapper")
    p.add_argument("--vfm-standardise", type=int, default=0, choices=(0, 1), help="1: tokens with zero mean and unit deviation per channel, so that the cosine is not ruled by what all tokens share (not in the paper)")
    # The run
    p.add_argument("--seed", type=common.natural, default=0)
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    p.add_argument("--deterministic", action="store_true", help="equal bits in each run on CUDA too, slower (a CPU needs no flag)")
    p.add_argument("--compile", type=int, default=int(on_gpu), choices=(0, 1))
    p.add_argument("--workers", type=common.natural, default=4 if on_gpu else 0, help="image reading processes")
    p.add_argument("--save-every", type=common.positive, default=1000, help="steps between checkpoints")
    p.add_argument("--log-every", type=common.positive, default=50, help="steps between lines of metrics.jsonl")
    p.add_argument("--dry-run", action="store_true", help="print the plan (parameters, tokens, memory, disk), and end; needs no VFM or LPIPS weights")
    data.bench_flags(p)
    args = p.parse_args()
    data.required(p, args, "data", "out")
    if args.lambda_align is None:
        args.lambda_align = {"send": 1.0, "vavae": 0.1, "none": 0.0}[args.align]
    if args.align == "none" or not args.lambda_align:
        args.align, args.lambda_align = "none", 0.0
    if args.vfm_standardise and args.align != "send":
        p.error("--vfm-standardise: has no effect here; expected --align send")
    return args


class PatchGAN(nn.Module):
    """PatchGAN of three strided layers (Isola et al. 2017), names as in taming-transformers and LDM:
    (B, 3, H, W) -> logits (B, 1, H/8-2, W/8-2).

    norm "batch" is the release's (statistics of the images passed in, so the result depends on the split of the batch);
    "group" sees one image at a time.
    """

    def __init__(self, ch=64, norm="batch"):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out) if norm == "batch" else GroupNorm(c_out, eps=1e-5), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x).float()


def load_discriminator(discriminator, path):
    """Weights of taming's, LDM's (inside its .ckpt) or REPA-E's PatchGAN, strictly. Raises UserError."""
    state = common.load_checkpoint(path)
    for wrapper in ("state_dict", "discriminator"):  # LDM; our own vae.pt
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    found = {k[k.index("main."):]: v for k, v in state.items() if k.startswith(("main.", "discriminator.main.", "loss.discriminator.main."))}
    if not found:
        raise UserError(f"--disc-ckpt {path}: no discriminator in it (expected tensors named main.0.weight, or loss.discriminator.main.0.weight)")
    common.load_weights(discriminator, found, f"--disc-ckpt {path}")


class DiscriminatorLoss(nn.Module):
    """Hinge loss of the discriminator: mean relu(1 - D(x)) and relu(1 + D(x_rec)), halved (LDM)."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x, x_rec):
        return 0.5 * (F.relu(1 - self.discriminator(x)).mean() + F.relu(1 + self.discriminator(x_rec)).mean())


def gradient_ratio(reference, loss, most):
    """LDM's adaptive weight (Esser et al. 2021, eq. 7) out of two gradients by one layer, those of the global batch."""
    return (reference.norm() / (loss.norm() + 1e-4)).clamp(max=most)


class VAELoss(nn.Module):
    """Eq. (3) in one forward pass: images -> (weighted sum, each part, reconstruction, latent)."""

    def __init__(self, vae, mapper, weights, rec, align, varies=False):
        """varies: whether the last micro-batch is a short one."""
        super().__init__()
        self.vae, self.mapper, self.weights, self.rec, self.align, self.varies = vae, mapper, weights, rec, align, varies

    def losses(self, x, noise, tokens, stats, encoder_aligns, judge, lpips):
        """x (B, 3, H, W); noise: a (B,), eps of the posterior and of eq. (1), (B, c, h, w) each; tokens (B, N, D) of the
        VFM or None; stats: LatentStats; judge: the frozen discriminator or None; lpips: the frozen metric or None
        -> (each part of the loss, reconstruction, latent)."""
        a, eps_posterior, eps_align = noise
        posterior = self.vae.encode(data.any_batch(x, self.varies))
        z = posterior.sample(eps_posterior)
        x_rec = data.any_batch(self.vae.decode(data.any_batch(z, self.varies)), self.varies)
        parts = {"rec": F.l1_loss(x_rec, x) if self.rec == "l1" else F.mse_loss(x_rec, x), "kl": posterior.kl()}
        if lpips is not None:
            parts["lpips"] = lpips(x_rec, x).mean()
        if judge is not None:
            parts["gan"] = -judge(x_rec).mean()
        aligned = z if encoder_aligns else z.detach()
        if self.align == "send":
            z_n = stats.normalise(aligned)
            z_t = z_n if a is None else add_noise(z_n, a=a, eps=eps_align)
            parts["align"] = align_loss(self.mapper(data.any_batch(z_t, self.varies)), tokens)
        elif self.align == "vavae":  # the latent as it is, without noise
            parts["align"] = vavae_loss(self.mapper(aligned), tokens)
        return parts, x_rec, z

    def forward(self, *inputs, ratios):
        """inputs as losses(); ratios: adaptive weights by name."""
        parts, x_rec, z = self.losses(*inputs)
        total = sum(self.weights[k] * ratios.get(k, 1.0) * v for k, v in parts.items())
        return total, {k: v.detach() for k, v in parts.items()}, x_rec.detach(), z.detach()

    def ratio_gradients(self, wanted, *inputs):
        """{name: (gradient of the likelihood, gradient of the loss `name`)}: the GAN's by the decoder's last layer (LDM),
        VA-VAE's alignment by the encoder's."""
        parts, _, _ = self.losses(*inputs)
        likelihood = sum(self.weights[k] * parts[k] for k in ("rec", "lpips") if k in parts)
        layers = {"gan": self.vae.decoder.conv_out.weight, "align": self.vae.encoder.conv_out.weight}
        return {k: [torch.autograd.grad(v, layers[k], retain_graph=True)[0].float() for v in (likelihood, parts[k])] for k in wanted}


class LatentStats:
    """Per-channel normalisation of z before the mapper, with running statistics (REPA-E's BatchNorm2d(affine=False,
    eps=1e-4) in evaluation mode), summed over all processes and micro-batches.

    Its gradient is a choice of this project: that of batch norm in training mode, (g - mean(g) - z_n mean(g z_n)) / std,
    with running means too. Without these two terms the encoder escapes the noise of eq. (1) by scaling z up.
    """

    NAMES = ("mean", "var", "grad_mean", "grad_scale")

    def __init__(self, channels, device, world=1):
        self.world = world  # a rank's loss is the mean over its own images: its gradients are `world` times the global mean's
        self.mean, self.var, self.grad_mean, self.grad_scale = (torch.full((channels,), v, device=device) for v in (0.0, 1.0, 0.0, 0.0))
        self.sums = torch.zeros(5, channels, device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)

    def normalise(self, z):  # (B, c, h, w) -> same, zero mean and unit variance per channel
        mean, std, grad_mean, grad_scale = (v.view(1, -1, 1, 1) for v in (self.mean, (self.var + 1e-4).sqrt(), self.grad_mean, self.grad_scale))
        z_n = (z - mean) / std
        if z_n.requires_grad:
            value = z_n.detach()

            def batch_norm_gradient(g):
                self.sums[3] += g.sum((0, 2, 3))
                self.sums[4] += (g * value).sum((0, 2, 3))
                return g - self.world * (grad_mean + grad_scale * value)
            z_n.register_hook(batch_norm_gradient)
        return z_n

    def add(self, z):  # (B, c, h, w)
        z = z.to(self.sums.dtype)
        self.sums[:3] += torch.stack([torch.full_like(self.sums[0], z.numel() / z.shape[1]), z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])

    def update(self, momentum):
        """Once a step: fold the sums over all processes and micro-batches into the running means."""
        count, *sums = common.all_reduce(self.sums)
        mean, square, grad_mean, grad_scale = sums[0] / count, sums[1] / count, sums[2] / count / self.world, sums[3] / count / self.world
        for name, new in zip(self.NAMES, (mean, square - mean.square(), grad_mean, grad_scale)):
            getattr(self, name).lerp_(new.to(self.mean.dtype), momentum)
        self.sums.zero_()


class Trainer:
    """Everything a step needs and a checkpoint holds."""

    def __init__(self, args, device, rank, world):
        self.args, self.device, self.rank, self.world = args, device, rank, world
        if (args.init is None) == (args.preset is None):
            raise UserError("give either --init CKPT (fine-tune) or --preset NAME (from scratch)")
        torch.manual_seed(args.seed)  # initial weights only
        self.vae = load_vae(args.init).requires_grad_(True).train() if args.init else AutoencoderKL(**VAE_CONFIGS[args.preset])
        self.inputs = dict(init=common.weights_hash(self.vae.state_dict()) if args.init else None)  # of a resumed run: the same content, wherever it lies
        self.size = args.resolution or self.vae.config["resolution"]
        if self.size % self.vae.factor:
            raise UserError(f"--resolution {self.size}: expected a multiple of {self.vae.factor}, the VAE's downsampling factor")
        side, c = self.size // self.vae.factor, self.vae.config["z_channels"]
        self.latent_shape = (c, side, side)
        attention = tuple(self.size // 2 ** i for i, m in enumerate(self.vae.encoder.down) if len(m.attn))
        self.vae.config |= dict(resolution=self.size, attn_resolutions=attention)  # the same network; its crop is now this one
        self.vfm = self.mapper = self.lpips = self.discriminator = self.tokens = None
        self.clock, random, local = data.Clock(device), args.dry_run or args.bench, args.batch // world
        if args.cache_vfm and args.align == "none":
            raise UserError("--cache-vfm: has no effect without alignment")
        if args.align != "none":
            grid = args.grid or min(side, max(1, self.size // 16) if self.size >= 256 else side)
            with common.rank_zero_first():
                self.vfm = VFM(args.vfm, self.size, grid, args.vfm_ckpt, args.vfm_layer, weights=not random)
            torch.manual_seed(args.seed + 1)
            if args.align == "send":
                self.mapper = Mapper(c, side, grid, self.vfm.dim, args.mapper_depth, args.mapper_width, mlp_width=args.mapper_mlp)
            else:
                self.mapper = LinearMapper(c, side, grid, self.vfm.dim)
            self.inputs["vfm"] = None if random else common.weights_hash(self.vfm.state_dict())
            common.cast_matmuls(self.vfm.to(memory_format=torch.channels_last), device, args.precision)
        if args.lpips:
            with common.rank_zero_first():
                self.lpips = build_lpips(args.lpips_ckpt, device, weights=not random)
            self.inputs["lpips"] = None if random else common.weights_hash(self.lpips.state_dict())
        if args.gan:
            torch.manual_seed(args.seed + 2)
            self.discriminator = PatchGAN(norm="batch" if args.disc_ckpt else "group")
            if args.disc_ckpt:
                load_discriminator(self.discriminator, args.disc_ckpt)
                self.inputs["disc_ckpt"] = common.weights_hash(self.discriminator.state_dict())
        self.ema = copy.deepcopy(self.vae).to(device).requires_grad_(False)
        weights = dict(rec=1.0, kl=args.kl, lpips=args.lpips, gan=args.gan, align=args.lambda_align)
        self.loss = VAELoss(self.vae, self.mapper, weights, args.rec, args.align, varies=bool(local % (args.micro_batch or local))).to(device, memory_format=torch.channels_last)
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.loss.parameters(), args.lr, weight_decay=0.0, fused=fused)
        if self.discriminator is not None:
            self.disc_loss = DiscriminatorLoss(self.discriminator).to(device, memory_format=torch.channels_last)
            self.disc_optimizer = torch.optim.AdamW(self.discriminator.parameters(), args.lr, weight_decay=0.0, fused=fused)
        self.stats, self.token_stats = LatentStats(c, device, world), None
        self.step, self.seconds = 0, 0.0

    def cache_tokens(self, images):
        """--cache-vfm: all tokens on disk, and the VFM's weights out of memory."""
        if self.args.cache_vfm and self.vfm is not None:
            self.tokens = TokenCache(self.args.cache_vfm, self.vfm, self.inputs["vfm"], images, 1 + images.flip, self.args, self.device, self.rank, self.world)
            self.vfm.to("meta")

    def measure_tokens(self, images):
        """Mean and std (D,) of the tokens of up to 256 images, for --vfm-standardise."""
        if not self.args.vfm_standardise:
            return
        rows = torch.linspace(0, len(images.files) - 1, min(256, len(images.files))).long().tolist()
        if self.tokens is not None:
            found = self.tokens[rows]
        else:
            with common.autocast(self.device, self.args.precision):
                found = torch.cat([self.vfm(data.to_float(pixels.to(self.device))) for pixels, _, _ in data.load_batches(images, common.chunks(rows, 64), replace=True)])
        self.token_stats = tuple(v.to(self.device) for v in (found.mean((0, 1)), found.std((0, 1))))

    def parallel(self):
        """Compile what a step calls (names of parameters stay), then wrap: plain modules remain for checkpoints and EMA."""
        if self.args.gan_adaptive or self.args.align == "vavae":
            torch._functorch.config.donated_buffer = False  # ratio_gradients runs parts of the backward pass twice
        self.judge = self.discriminator
        if self.args.compile:
            self.vae.encode, self.vae.decode = (torch.compile(f, fullgraph=True) for f in (self.vae.encode, self.vae.decode))
            for module in filter(None, (self.mapper, self.vfm, self.disc_loss if self.judge is not None else None)):
                module.compile(fullgraph=module is not self.vfm)
            if self.judge is not None:  # apart from its own loss: here it is frozen and its input has gradients
                self.judge = torch.compile(lambda x: self.discriminator(x), fullgraph=True)
        self.run = self.loss
        self.run_disc = self.disc_loss if self.discriminator is not None else None
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrap = partial(DDP, device_ids=ids, gradient_as_bucket_view=True)
            self.run, self.run_disc = wrap(self.run), self.run_disc and wrap(self.run_disc)

    def state(self):
        modules = dict(vae=self.vae, ema=self.ema, mapper=self.mapper, discriminator=self.discriminator, optimizer=self.optimizer,
                       disc_optimizer=self.discriminator and self.disc_optimizer)
        return dict({k: v and v.state_dict() for k, v in modules.items()}, config=self.vae.config, args=vars(self.args), inputs=self.inputs,
                    mapper_config=self.mapper and self.mapper.config, step=self.step, seconds=self.seconds,
                    latent_stats={k: getattr(self.stats, k) for k in LatentStats.NAMES})

    def load(self, checkpoint):
        for name in ("vae", "ema", "mapper", "discriminator"):
            if getattr(self, name) is not None:
                common.load_weights(getattr(self, name), checkpoint[name], f"{self.args.out}/vae.pt, {name}")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.discriminator is not None:
            self.disc_optimizer.load_state_dict(checkpoint["disc_optimizer"])
        for name in LatentStats.NAMES:
            getattr(self.stats, name).copy_(checkpoint["latent_stats"][name])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]

    def first_stats(self, batches):
        """Latent statistics of the first global batch, before the first step needs them (with gradients, as the compiled encoder knows it)."""
        for x, noise, _, _ in batches:
            with common.autocast(self.device, self.args.precision):
                self.stats.add(self.vae.encode(data.any_batch(x, self.loss.varies)).sample(noise[1]).detach())
        self.stats.update(momentum=1.0)

    def draw(self, step):
        """Noise of this rank's images at `step`: a (B,) of eq. (1) or None, eps of the posterior and of eq. (1), (B, c, h, w) each."""
        local = self.args.batch // self.world
        first = step * self.args.batch + self.rank * local  # place of the rank's first image in the stream of samples
        a, *eps = data.draw_noise(self.args.seed, range(first, first + local), 1, self.latent_shape, self.latent_shape)
        return (a[:, 0] if self.args.noise else None), *eps

    def micro_batches(self, pixels, noise, tokens):
        """The rank's images (B, 3, S, S) uint8, noise, and tokens when they are known -> list of (x, noise, tokens, share of the rank's
        batch); x and what the VFM sees in it on the device."""
        local = len(pixels)
        size = self.args.micro_batch or local
        move = lambda v, i: v if v is None else v[i:i + size].to(self.device, non_blocking=True)
        out = []
        for i in range(0, local, size):
            x = data.to_float(move(pixels, i)).contiguous(memory_format=torch.channels_last)
            known = move(tokens, i)
            if known is None and self.vfm is not None:
                with self.clock("vfm"), common.autocast(self.device, self.args.precision):
                    known = self.vfm(data.any_batch(x, self.loss.varies))
            if self.token_stats is not None:
                known = (known - self.token_stats[0]) / (self.token_stats[1] + 1e-6)
            out.append((x, [move(n, i) for n in noise], known, len(x) / local))
        return out

    def adaptive_ratios(self, batches, judge):
        """Adaptive weights of this step from the whole global batch, in a forward pass of their own: {name: ratio}."""
        args, sums = self.args, {}
        wanted = ["gan"] if args.gan_adaptive and judge is not None else []
        wanted += ["align"] if args.align == "vavae" and self.step >= args.mapper_warmup else []
        if not wanted:
            return {}
        for x, noise, tokens, share in batches:
            with common.autocast(self.device, args.precision):
                gradients = self.loss.ratio_gradients(wanted, x, noise, tokens, self.stats, True, judge, self.lpips)
            for k, pair in gradients.items():
                sums[k] = [share * g + s for g, s in zip(pair, sums.get(k, (0, 0)))]
        mean = {k: [common.all_reduce(g / self.world) for g in pair] for k, pair in sums.items()}
        return {k: gradient_ratio(*pair, most={"gan": 1e4, "align": 1e8}[k]) for k, pair in mean.items()}

    def train_step(self, pixels, noise, tokens):
        """One optimiser step of the VAE and the mapper, then one of the discriminator; returns the rank's loss parts, and leaves in self.each (B,)
        which of its images came out finite. Arguments as micro_batches()."""
        args, clock, batches = self.args, self.clock, self.micro_batches(pixels, noise, tokens)
        if args.align == "send" and self.step == 0:
            self.first_stats(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = common.learning_rate(args, self.step)
        judge = self.judge if self.step >= args.gan_start else None
        if judge is not None:
            self.discriminator.requires_grad_(False)
        self.optimizer.zero_grad(set_to_none=True)
        fakes, ratios = [], self.adaptive_ratios(batches, judge)
        parts = {f"{k}_ratio": v for k, v in ratios.items()}
        for i, (x, noise, tokens, share) in enumerate(batches):
            with common.autocast(self.device, args.precision), common.sync_if(self.run, i == len(batches) - 1):
                with clock("forward"):
                    total, each, x_rec, z = self.run(x, noise, tokens, self.stats, self.step >= args.mapper_warmup, judge, self.lpips, ratios=ratios)
                with clock("backward"):
                    (total * share).backward()
            for k, v in each.items():
                parts[k] = parts.get(k, 0) + v * share
            self.stats.add(z)
            fakes.append(x_rec)
        self.each = torch.cat([x_rec.sum((1, 2, 3)) for x_rec in fakes])
        with clock("optimiser"):
            parts["grad_norm"] = nn.utils.clip_grad_norm_(self.vae.parameters(), args.clip)
            if self.mapper is not None:  # apart, so that the mapper's gradient does not shorten the VAE's step
                parts["mapper_grad_norm"] = nn.utils.clip_grad_norm_(self.mapper.parameters(), args.clip)
            self.optimizer.step()
            self.stats.update(momentum=0.1)
        if judge is not None:
            with clock("discriminator"):
                parts |= self.disc_step(batches, fakes)
        with clock("ema"):
            common.update_ema(self.ema, self.vae, self.step, args.ema)
        self.step += 1
        return parts

    def disc_step(self, batches, fakes):
        self.discriminator.requires_grad_(True)
        self.disc_optimizer.zero_grad(set_to_none=True)
        loss = 0
        for i, ((x, _, _, share), fake) in enumerate(zip(batches, fakes)):
            with common.autocast(self.device, self.args.precision), common.sync_if(self.run_disc, i == len(batches) - 1):
                part = self.run_disc(data.any_batch(x, self.loss.varies), data.any_batch(fake, self.loss.varies)) * share
                part.backward()
            loss = loss + part.detach()
        norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.args.clip)
        self.disc_optimizer.step()
        return {"disc": loss, "disc_grad_norm": norm}

    def traced(self, n):
        """What a step on n images computes, without the discriminator's own; self must live on the "meta" device. -> the images."""
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        x, eps = torch.empty(n, 3, self.size, self.size), torch.empty(n, *self.latent_shape)
        tokens = None
        if self.vfm is not None:
            tokens = torch.empty(n, self.vfm.grid ** 2, self.vfm.dim) if self.args.cache_vfm else self.vfm(x)
        self.loss(x, (torch.empty(n), eps, eps), tokens, self.stats, True, self.discriminator, self.lpips, ratios={})[0].backward()
        return x

    def memory(self, n=None):
        """Estimated bytes at the peak of a step in float32, on each process; self must live on the "meta" device."""
        args, modules = self.args, [m for m in (self.loss, self.discriminator, self.vfm, self.lpips) if m is not None]
        parameters = {id(p): p for m in modules for p in m.parameters()}.values()
        held = sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in (*parameters, *self.ema.parameters()))  # weight, gradient, two moments
        with torch.device("meta"):
            self.traced(1)  # the gradients, which are counted above, are there from the second step on
            return held + data.peak_bytes(lambda: self.traced(n or args.micro_batch or args.batch // self.world))


def batches(t, images):
    """Images, noise, and VFM tokens when --cache-vfm holds them, of every step that is left; the arguments of Trainer.train_step()."""
    rows = data.StepRows(len(images), t.args, t.step, t.rank, t.world)
    for step, (pixels, _, chosen) in enumerate(data.load_batches(images, rows, t.args.workers, replace=True), t.step):
        yield pixels, t.draw(step), None if t.tokens is None else t.tokens[chosen]


def bench(args, device, rank, world):
    """--bench: the steps of main() on random images and weights, without logs and checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        args.steps = args.bench + 10
        t = Trainer(args, device, rank, world)
        t.parallel()
        images = data.ImageFolder(data.random_images(folder, 64, t.size), t.size, flip=bool(args.flip))
        if args.cache_vfm and t.vfm is not None:
            t.tokens = torch.randn(len(images), t.vfm.grid ** 2, t.vfm.dim)
        t.measure_tokens(images)
        source, parts = data.ahead(batches(t, images), device), data.Parts()

        def step():
            with t.clock("data"):
                batch = next(source)
            parts.add(t.step + 1, t.train_step(*batch), t.each)

        def traced():
            x = plan.traced(1)
            if plan.discriminator is not None:
                plan.discriminator.requires_grad_(True)
                plan.disc_loss(x, x).backward()

        plan = Trainer(argparse.Namespace(**{**vars(args), "dry_run": True}), torch.device("meta"), rank, world)
        with torch.device("meta"):
            flops = data.count_flops(traced)
        used, switches = args.micro_batch or args.batch // world, dict(LPIPS=args.lpips, GAN=args.gan, mapper=plan.mapper is not None)
        tokens = " (tokens given)" if args.cache_vfm else f" with {args.vfm}"
        data.run_bench(args, f"train_vae {args.init or args.preset} at {t.size}, batch {args.batch}, {used} at a time, "
                       + ", ".join(k if v else f"no {k}" for k, v in switches.items()) + tokens * (t.mapper is not None),
                       device, step, args.batch, flops, t.clock, largest_micro_batch=lambda: data.largest_micro_batch(plan.memory, used, device))


def plan(t, images, path, disk):
    """What will happen, before it happens."""
    args, millions = t.args, lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    print(f"{'go on with' if t.step else 'train'} {path}: step {t.step} of {args.steps}, batch {args.batch} on {t.world} process(es), "
          f"{'dry run' if args.dry_run else t.device.type} {args.precision}; {len(images.files)} images of {t.size} x {t.size}, "
          f"{args.steps * args.batch / len(images.files):.1f} epochs")
    print(f"VAE {millions(t.vae):.2f} M, latent {t.latent_shape}"
          + (f"; mapper {millions(t.mapper):.2f} M ({args.align}), depth {args.mapper_depth if args.align == 'send' else 0}, noise {'on' if args.noise and args.align == 'send' else 'off'}; {args.vfm} at "
             f"{t.vfm.size} x {t.vfm.size}, {t.vfm.grid} x {t.vfm.grid} tokens of {t.vfm.dim}, lambda {args.lambda_align:g}"
             if t.mapper is not None else "; no alignment")
          + (f"; discriminator {millions(t.discriminator):.2f} M" if t.discriminator is not None else ""))
    if args.dry_run:
        print(f"memory about {t.memory() / 2**30:.1f} GiB a process with {args.micro_batch or args.batch // t.world} images at a time, counted in "
              f"float32 (bf16 needs less); disk {disk / 2**30:.1f} GiB for checkpoints")
        if args.cache_vfm and t.vfm is not None:
            print(f"--cache-vfm: {cache_size(t.vfm, images, 1 + images.flip)}")


def main():
    args = parse_args()
    device, rank, world = common.setup(args.deterministic)
    args.precision = args.precision or common.fast_precision(device)
    if args.batch % world:
        raise UserError(f"--batch {args.batch}: expected a multiple of the {world} processes")
    if args.bench:
        return bench(args, device, rank, world)
    out = Path(args.out) if args.dry_run else common.open_out(args.out)
    path = out / "vae.pt"
    if rank == 0 and not args.dry_run:
        common.claim(out / ".lock")
    t = Trainer(args, torch.device("meta") if args.dry_run else device, rank, world)
    disk = 3 * sum(p.numel() for p in t.loss.parameters()) * 16
    images = data.ImageFolder(args.data, t.size, flip=bool(args.flip), split=args.split)
    data.check_folder(images, args.batch)
    if args.dry_run:
        return plan(t, images, path, disk) if rank == 0 else None
    checkpoint, t.inputs["data"] = common.load_newest(path), images.hash if rank == 0 else None
    if checkpoint is not None:
        common.same_run(checkpoint, args, path, t.inputs if rank == 0 else {})
        t.load(checkpoint)
    if t.step >= args.steps:
        return print(f"{path}: already at step {t.step}") if rank == 0 else None
    t.parallel()
    common.open_out(out, need_bytes=data.disk_left(disk, path))
    t.cache_tokens(images)
    t.measure_tokens(images)
    if rank == 0:
        plan(t, images, path, disk)
    log = common.Log(out / "metrics.jsonl", t.step, dict(vars(args), inputs=t.inputs), rank)
    stop, since, seen, pending = common.Stop(), time.time(), 0, data.Parts((checkpoint or {}).get("losses"))
    name_images = lambda step, places: [images.files[data.sample_order(len(images), args.seed, (step - 1) * args.batch + p, 1)[0] % len(images.files)] for p in places]
    bar = tqdm(total=args.steps, initial=t.step, disable=rank > 0 or None)
    for batch in data.ahead(batches(t, images), device):
        pending.add(t.step + 1, t.train_step(*batch), t.each)
        seen += args.batch
        bar.update()
        logs, saves = (t.step % n == 0 or t.step == args.steps for n in (args.log_every, args.save_every))
        stopping = stop.asked()
        if logs or saves or stopping:
            parts = pending.look("a smaller --lr, or --precision fp32", name_images)
            for spike in pending.spikes:
                log.write(**spike)
        if logs:
            now = time.time()
            t.seconds, rate, since, seen = t.seconds + now - since, seen / (now - since), now, 0
            log.write(step=t.step, **parts, lr=common.learning_rate(args, t.step - 1), images_per_s=round(rate, 1), seconds=round(t.seconds, 1))
            bar.set_postfix({k: f"{v:.4g}" for k, v in parts.items()}, refresh=False)
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
