"""Stage 1: fine-tune (or pre-train) a VAE, with or without alignment. Eq. (3): L = lambda_align L_align +
L_VAE.

    python train_vae.py --data images --init vavae/vae.pt --out out/send                        # one process
    torchrun --nproc_per_node=8 train_vae.py --data images --init vavae/vae.pt --out out/send   # one node
    python train_vae.py --data out/demo/avatars --preset f4d16 --align none --lpips 0 --gan 0 --batch 64 \\
        --steps 20 --out out/tiny/vae                                                           # tiny

The control of every claim is the same command with --align none, the rival's arm with --align vavae.
Rerunning a command goes on where it stopped. Random numbers depend on (seed, step, place in the global
batch), so the checkpoint needs no generator state, and the number of processes and --micro-batch change
memory and speed only (but see --disc-ckpt: its batch norm sees the split).

Which loss moves what (the VFM and LPIPS are frozen; L_align is Send-VAE's or VA-VAE's):

    loss            encoder   decoder   mapper   discriminator
    L_rec, L_LPIPS     x         x
    L_KL               x
    L_GAN              x         x
    L_align            x                   x
    L_disc                                              x
"""
import argparse
import contextlib
import copy
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import data
from common import UserError
from fid import build_lpips
from mapper import (
    VFM,
    LinearMapper,
    Mapper,
    add_noise,
    align_loss,
    cache_tokens,
    describe_cache,
    vavae_loss,
    vfm_flags,
)
from vae import VAE_CONFIGS, AutoencoderKL, GroupNorm, load_vae


def parse_args():
    p = common.Parser(description=__doc__)
    switch = dict(type=int, choices=(0, 1))
    p.add_argument("--data", required=True, help="image folder")
    p.add_argument("--out", required=True, help="folder for vae.pt and metrics.jsonl")
    p.add_argument("--split", choices=data.SPLITS,
                   help="only the images that attributes.csv puts there (default: all)")
    p.add_argument("--init", help="VAE to fine-tune (any format of vae.load_vae, or a hub id: org/name, "
                   "org/name:file); its architecture is kept")
    p.add_argument("--preset", choices=VAE_CONFIGS,
                   help="architecture for training from scratch (without --init)")
    p.add_argument("--resolution", type=common.side, help="crop in pixels (default: the VAE's)")
    p.add_argument("--flip", **switch, default=1, help="mirror images are data too")
    # Optimisation: the paper's values
    p.add_argument("--steps", type=common.positive, default=100_000,
                   help="optimiser steps (80 ImageNet epochs at 1024: 100,000)")
    p.add_argument("--batch", type=common.positive, default=1024, help="images a step, over all processes")
    p.add_argument("--micro-batch", type=common.positive,
                   help="images per forward pass and process (default: --batch / processes, which it must "
                   "divide); changes memory alone")
    p.add_argument("--lr", type=common.scale, default=3e-4, help="AdamW, betas 0.9 0.999, no weight decay")
    p.add_argument("--lr-warmup", type=common.natural, default=0,
                   help="steps of linear warm-up (not of the discriminator)")
    p.add_argument("--lr-decay", **switch, default=0,
                   help="1: half a cosine down to zero at --steps (likewise)")
    p.add_argument("--clip", type=common.norm, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=common.decay, default=0.9999,
                   help="decay of the averaged weights, at most (1 + step) / (10 + step)")
    # L_VAE: REPA-E's weights
    p.add_argument("--rec", choices=("l1", "mse"), default="l1",
                   help="weight 1; the paper writes MSE, REPA-E trains L1")
    p.add_argument("--lpips", type=common.scale, default=1.0, help="weight of LPIPS (VGG); 0: off")
    p.add_argument("--lpips-ckpt", help="local torchvision VGG16 weights instead of the download")
    p.add_argument("--gan", type=common.scale, default=0.1, help="weight of the hinge GAN; 0: none")
    p.add_argument("--gan-start", type=common.natural, default=0, help="first step with the GAN")
    p.add_argument("--disc-ckpt",
                   help="pre-trained discriminator of taming, LDM or REPA-E, with its batch norm "
                   "(default: from scratch, group norm)")
    p.add_argument("--kl", type=common.scale, default=1e-6, help="weight of the KL, summed over the latent")
    # L_align
    p.add_argument("--align", default="send", choices=("send", "vavae", "none"),
                   help="this paper's, VA-VAE's, or no alignment (the control arm)")
    p.add_argument("--lambda-align", type=common.scale,
                   help="its weight (default: send 1, vavae 0.1 times the ratio of gradients); 0: none")
    vfm_flags(p)
    p.add_argument("--grid", type=common.positive,
                   help="tokens a side (default: resolution / 16; below 256 pixels the latent's side)")
    p.add_argument("--mapper-depth", type=common.natural, default=1, help="ViT blocks; 0: MLP only")
    p.add_argument("--mapper-width", type=common.positive, help="default: the VFM's dimension")
    p.add_argument("--mapper-mlp", type=common.positive, default=2048, help="width of the mapper's projector")
    p.add_argument("--noise", type=noise_level, default="1", help="1: a ~ U(0, 1) in eq. (1), "
                   "the paper's; 0: no noise (a = 1); between: this a for all; lognormal: as train_sit.py "
                   "--time lognormal")
    p.add_argument("--align-ratio", **switch, help="1: the alignment's weight times the ratio of gradients "
                   "in the encoder's last layer, VA-VAE's rule (default: for vavae)")
    p.add_argument("--vfm-normalise", choices=("channel", "spatial"),
                   help="tokens with zero mean and unit deviation: of each channel over 256 images, so that "
                   "the cosine is not ruled by what all tokens share; or of each image and channel over its "
                   "tokens (iREPA, arXiv 2512.10794). Not in the paper")
    common.run_flags(p, save_every=1000)
    return check_args(p, p.parse_args())


def check_args(p, args):
    """The alignment's default weight; flags that do not go together are refused."""
    if args.lambda_align is None:
        args.lambda_align = {"send": 1.0, "vavae": 0.1, "none": 0.0}[args.align]
    if args.align == "none" and args.lambda_align:
        p.error(f"--lambda-align {args.lambda_align:g}: has no effect with --align none")
    if args.align == "none" or not args.lambda_align:
        args.align, args.lambda_align = "none", 0.0
    if (args.init is None) == (args.preset is None):
        p.error("give either --init CKPT (fine-tune) or --preset NAME (from scratch)")
    if args.vfm_normalise and args.align != "send":
        p.error("--vfm-normalise: has no effect here; expected --align send")
    if args.align_ratio and args.align == "none":
        p.error("--align-ratio: has no effect without alignment")
    if args.cache_vfm and args.align == "none":
        p.error("--cache-vfm: has no effect without alignment")
    return args


def noise_level(text):
    """argparse type of --noise."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        return text if text == "lognormal" else common.share(text)
    raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 0 to 1, or lognormal")


# ------------------------------------------------------------------------------------------------------------
# The losses


class VAELoss(nn.Module):
    """The parts of eq. (3) in one forward pass: images -> (each part, reconstruction, latent)."""

    def __init__(self, vae, mapper, weights, rec, align):
        """weights: {name of a part: its weight}; rec "l1" or "mse"; align "send", "vavae" or "none"."""
        super().__init__()
        self.vae, self.mapper, self.weights, self.rec, self.align = vae, mapper, weights, rec, align

    def forward(self, x, noise, tokens, stats, critic, lpips):
        """x (B, 3, H, W); noise: a (B,) or None, eps of the posterior and of eq. (1), (B, c, h, w) each;
        tokens (B, N, D) of the VFM or None; stats: LatentStats; critic: the frozen discriminator or None;
        lpips: the frozen metric or None."""
        a, eps_posterior, eps_align = noise
        posterior = self.vae.encode(x)
        z = posterior.sample(eps_posterior)  # (B, c, h, w)
        x_rec = self.vae.decode(z)
        parts = {"rec": F.l1_loss(x_rec, x) if self.rec == "l1" else F.mse_loss(x_rec, x),
                 "kl": posterior.kl()}
        if lpips is not None:
            parts["lpips"] = lpips(x_rec, x).mean()
        if critic is not None:
            parts["gan"] = -critic(x_rec).mean()
        if self.align == "send":
            z_n = stats.normalise(z)
            z_t = z_n if a is None else add_noise(z_n, a=a, eps=eps_align)  # eq. (1)
            parts["align"] = align_loss(self.mapper(z_t), tokens)  # eq. (2)
        elif self.align == "vavae":  # the latent as it is, without noise
            parts["align"] = vavae_loss(self.mapper(z), tokens)
        return parts, x_rec, z


class PatchGAN(nn.Module):
    """PatchGAN of three strided layers (Isola et al. 2017), names as in taming-transformers and LDM:
    (B, 3, H, W) -> logits (B, 1, H/8-2, W/8-2).

    norm "batch" is the release's (statistics of the images passed in, so the result depends on the split of
    the batch); "group" sees one image at a time.
    """

    def __init__(self, ch=64, norm="batch"):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            normalise = nn.BatchNorm2d(c_out) if norm == "batch" else GroupNorm(c_out, eps=1e-5)
            layers += [nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False), normalise, nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x).float()


class DiscriminatorLoss(nn.Module):
    """Hinge loss of the discriminator: mean relu(1 - D(x)) and relu(1 + D(x_rec)), halved (LDM)."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x, x_rec):
        return 0.5 * (F.relu(1 - self.discriminator(x)).mean() + F.relu(1 + self.discriminator(x_rec)).mean())


def load_discriminator(discriminator, path):
    """Weights of taming's, LDM's (inside its .ckpt) or REPA-E's PatchGAN, strictly. Raises UserError."""
    state = common.load_checkpoint(common.local_path(path))
    for wrapper in ("state_dict", "discriminator"):  # LDM; our own vae.pt
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    prefixes = ("main.", "discriminator.main.", "loss.discriminator.main.")
    found = {k[k.index("main."):]: v for k, v in state.items() if k.startswith(prefixes)}
    if not found:
        raise UserError(f"--disc-ckpt {path}: no discriminator in it (expected tensors named main.0.weight, "
                        "or loss.discriminator.main.0.weight)")
    common.load_weights(discriminator, found, f"--disc-ckpt {path}")


class LatentStats(nn.Module):
    """Per-channel normalisation of z before the mapper, with running statistics (REPA-E's
    BatchNorm2d(affine=False, eps=1e-4) in evaluation mode), summed over all processes and micro-batches.

    Its gradient is a choice of this project: that of batch norm in training mode, (g - mean(g) - z_n mean(g
    z_n)) / std, with running means too. Without these two terms the encoder escapes the noise of eq. (1) by
    scaling z up. In evaluation mode (gradient_ratio) the means are those of the images at hand, and no sum is
    kept.
    """

    def __init__(self, channels, device, world=1):
        super().__init__()
        # a rank's loss is the mean over its own images: its gradients are `world` times the global mean's
        self.world = world
        for name, value in dict(mean=0.0, var=1.0, grad_mean=0.0, grad_scale=0.0).items():
            self.register_buffer(name, torch.full((channels,), value, device=device))
        exact = torch.float64 if device.type != "mps" else torch.float32
        self.register_buffer("sums", torch.zeros(5, channels, device=device, dtype=exact), persistent=False)

    def normalise(self, z):  # (B, c, h, w) -> same, zero mean and unit variance per channel
        values = self.mean, (self.var + 1e-4).sqrt(), self.grad_mean, self.grad_scale
        mean, std, grad_mean, grad_scale = (v.view(1, -1, 1, 1) for v in values)
        z_n = (z - mean) / std
        if z_n.requires_grad:
            value = z_n.detach()

            def batch_norm_gradient(g):
                if not self.training:
                    mean, scale = (v.mean((0, 2, 3), keepdim=True) for v in (g, g * value))
                    return g - mean - scale * value
                self.sums[3] += g.sum((0, 2, 3))
                self.sums[4] += (g * value).sum((0, 2, 3))
                return g - self.world * (grad_mean + grad_scale * value)
            z_n.register_hook(batch_norm_gradient)
        return z_n

    def add(self, z):  # (B, c, h, w)
        z = z.to(self.sums.dtype)
        count = torch.full_like(self.sums[0], z.numel() / z.shape[1])
        self.sums[:3] += torch.stack([count, z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])

    def update(self, momentum):
        """Once a step: fold the sums over all processes and micro-batches into the running means."""
        count, *sums = common.all_reduce(self.sums)
        mean, square, grad_mean, grad_scale = (s / count for s in sums)
        new = dict(mean=mean, var=square - mean.square(), grad_mean=grad_mean / self.world,
                   grad_scale=grad_scale / self.world)
        for name, value in new.items():
            getattr(self, name).lerp_(value.to(self.mean.dtype), momentum)
        self.sums.zero_()


def gradient_ratio(loss, micro_batches, run, stats, lpips):
    """VA-VAE's adaptive weight (LDM's, Esser et al. 2021, eq. 7): the norm of the reconstruction's gradient
    over the alignment's, by the encoder's last layer, from the whole global batch, in a forward pass of its
    own."""
    layer, sums = loss.vae.encoder.conv_out.weight, [0, 0]
    stats.eval()

    def gradients(x, noise, tokens):  # a function, so that only one graph is alive
        with common.autocast(run.device, run.args.precision):
            parts, _, _ = loss(x, noise, tokens, stats, None, lpips)
        reconstruction = sum(loss.weights[k] * parts[k] for k in ("rec", "lpips") if k in parts)
        pair = reconstruction, parts["align"]
        return [torch.autograd.grad(v, layer, retain_graph=True)[0].float() for v in pair]

    for micro_batch in micro_batches:
        sums = [s + g * run.micro / run.local for s, g in zip(sums, gradients(*micro_batch))]
    stats.train()
    reference, align = (common.all_reduce(g / run.world).norm() for g in sums)
    return (reference / (align + 1e-4)).clamp(max=1e8)


# ------------------------------------------------------------------------------------------------------------
# Models and batches


def build_vae(args):
    """--init or --preset, at --resolution -> (VAE, the hash of --init)."""
    if args.init:
        vae = load_vae(args.init).requires_grad_(True).train()
        found = common.weights_hash(vae.state_dict())
    else:
        vae, found = AutoencoderKL(**VAE_CONFIGS[args.preset]), None
    size = args.resolution or vae.config["resolution"]
    attention = tuple(size // 2 ** i for i, m in enumerate(vae.encoder.down) if len(m.attn))
    # the same network; its crop is now this one
    vae.config |= dict(resolution=size, attn_resolutions=attention)
    return vae, found


def build_alignment(args, size, latent_shape):
    """The frozen VFM and the mapper of --align: (None, None) without."""
    if args.align == "none":
        return None, None
    c, side, _ = latent_shape
    grid = args.grid or min(side, size // 16 if size >= 256 else side)
    vfm = VFM(args.vfm, size, grid, args.vfm_ckpt, args.vfm_layer, weights=not args.dry_run)
    torch.manual_seed(args.seed + 1)
    if args.align == "vavae":
        return vfm, LinearMapper(c, side, grid, vfm.dim)
    return vfm, Mapper(c, side, grid, vfm.dim, args.mapper_depth, args.mapper_width,
                       mlp_width=args.mapper_mlp)


def noise_levels(u, noise):
    """a of eq. (1) from u ~ U(0, 1) (B,) as --noise says; None: there is none."""
    if noise == "lognormal":
        return torch.sigmoid(torch.special.ndtri(u))  # 1 - t has the distribution of t
    return None if noise == 0 else u if noise == 1 else torch.full_like(u, noise)


def read_step(images, cached, args, rank, world, latent_shape, step):
    """What this process needs of `step` from the CPU: images (B, 3, S, S) uint8; noise: a (B,) of eq. (1) or
    None, eps of the posterior and of eq. (1), (B, c, h, w) each; tokens (B, N, D) of --cache-vfm or None;
    unreadable files."""
    places = data.step_places(args.batch, rank, world, step)
    rows = data.sample_order(len(images), args.seed, places)
    pixels, _, rows, bad = data.read_rows(images, rows, replace=True)
    a, eps_posterior, eps_align = data.draw_noise(args.seed, places, 1, latent_shape, latent_shape)
    tokens = None if cached is None else torch.from_numpy(cached[rows]).float()
    return pixels, (noise_levels(a[:, 0], args.noise), eps_posterior, eps_align), tokens, bad


def token_statistics(vfm, cached, images, run):
    """Mean and std (D,) of the VFM's tokens of up to 256 images, for --vfm-normalise channel."""
    rows = torch.linspace(0, len(images.files) - 1, min(256, len(images.files))).long().tolist()
    if cached is not None:
        tokens = torch.from_numpy(cached[rows]).float()
    else:
        with common.autocast(run.device, run.args.precision):
            tokens = torch.cat([vfm(data.to_float(pixels.to(run.device))) for pixels, _, _ in
                                data.load_batches(images, common.chunks(rows, 64), replace=True)])
    return tokens.mean((0, 1)).to(run.device), tokens.std((0, 1)).to(run.device)


def spatial_normalise(tokens):
    """(B, N, D) -> same: zero mean and unit deviation over the tokens of each image and channel."""
    std, mean = torch.std_mean(tokens, 1, keepdim=True)
    return (tokens - mean) / (std + 1e-6)


def to_device(run, vfm, normalise, part, pixels, noise, tokens):
    """A slice of what read_step() returns -> x (B, 3, H, W) in [-1, 1]; noise; the VFM's tokens (B, N, D) of
    the clean images, from the cache or computed here, None without a VFM. normalise(tokens) -> tokens, or
    None."""
    x = data.to_float(pixels[part].to(run.device, non_blocking=True))
    x = x.contiguous(memory_format=torch.channels_last)
    noise = [n if n is None else n[part].to(run.device, non_blocking=True) for n in noise]
    if tokens is not None:
        tokens = tokens[part].to(run.device, non_blocking=True)
    elif vfm is not None:
        with common.autocast(run.device, run.args.precision):
            tokens = vfm(x)
    return x, noise, normalise(tokens) if normalise else tokens


@torch.no_grad()
def draw_images(images, vae, run):
    """8 images, spread over the folder, and below them their reconstructions: uint8 (16, 3, S, S)."""
    rows = torch.linspace(0, len(images.files) - 1, min(8, len(images.files))).long().tolist()
    originals, _, _, bad = data.read_rows(images, rows, replace=True)
    images.note_bad(bad)
    with common.autocast(run.device, run.args.precision):
        z = vae.encode(data.to_float(originals.to(run.device))).mean
        return torch.cat([originals, data.to_uint8(vae.decode(z)).cpu()])


def compile_parts(args, vae, mapper, vfm, discriminator, disc_loss):
    """--compile: in place, so that names of parameters stay -> the discriminator as the critic of L_GAN."""
    if not args.compile:
        return discriminator
    if args.align == "vavae" or args.align_ratio:
        torch._functorch.config.donated_buffer = False  # gradient_ratio runs parts of the backward pass twice
    vae.encode, vae.decode = (torch.compile(f, fullgraph=True) for f in (vae.encode, vae.decode))
    for module in filter(None, (mapper, vfm, disc_loss)):
        module.compile(fullgraph=module is not vfm)
    # The critic is compiled apart: frozen, but with gradients to its input
    return discriminator and torch.compile(lambda x: discriminator(x), fullgraph=True)


def print_plan(args, run, images, vae, latent_shape, vfm, mapper, discriminator):
    """What will happen, before it happens."""
    def millions(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    print(f"{'go on with' if run.step else 'train'} {run.path}: step {run.step} of {args.steps}, batch "
          f"{args.batch} on {run.world} process(es), {'dry run' if args.dry_run else run.device.type} "
          f"{args.precision}; {len(images.files)} images of {images.size} x {images.size}, "
          f"{args.steps * args.batch / len(images.files):.1f} epochs")
    text = f"VAE {millions(vae):.2f} M, latent {latent_shape}"
    if mapper is None:
        text += "; no alignment"
    else:
        send = args.align == "send"
        text += (f"; mapper {millions(mapper):.2f} M ({args.align}), depth "
                 f"{args.mapper_depth if send else 0}, noise {args.noise if send else 0}; "
                 f"{args.vfm} at {vfm.size} x {vfm.size}, {vfm.grid} x {vfm.grid} tokens of {vfm.dim}, "
                 f"lambda {args.lambda_align:g}")
    print(text + (f"; discriminator {millions(discriminator):.2f} M" if discriminator is not None else ""))
    if args.dry_run:
        size = sum(map(millions, filter(None, (vae, mapper, discriminator))))
        print(f"disk {3 * 16 * size / 1e3:.1f} GB for checkpoints")
        if args.cache_vfm:
            print(f"--cache-vfm: {describe_cache(vfm, len(images))}")


def main():
    args = parse_args()
    run = common.Run(args, "vae.pt", advice="a smaller --lr, or --precision fp32")
    device = run.device

    # Models. Each has its own seed, so that the arms begin with the same weights
    torch.manual_seed(args.seed)
    vae, init_hash = build_vae(args)
    size = vae.config["resolution"]
    latent_shape = vae.latent_shape(size)
    vfm, mapper = build_alignment(args, size, latent_shape)
    lpips = build_lpips(args.lpips_ckpt, device, weights=not args.dry_run) if args.lpips else None
    torch.manual_seed(args.seed + 2)
    discriminator = PatchGAN(norm="batch" if args.disc_ckpt else "group") if args.gan else None
    if args.gan and args.disc_ckpt:
        load_discriminator(discriminator, args.disc_ckpt)
    images = data.ImageFolder(args.data, size, flip=bool(args.flip), split=args.split)
    data.check_folder(images, args.batch, vae.factor)
    if args.dry_run:
        if run.rank == 0:
            print_plan(args, run, images, vae, latent_shape, vfm, mapper, discriminator)
        return

    # What files hold, so that a resumed run notices a change
    loaded = dict(vfm=vfm, lpips=lpips, disc_ckpt=discriminator if args.disc_ckpt else None)
    inputs = {k: common.weights_hash(m.state_dict()) for k, m in loaded.items() if m is not None}
    inputs |= dict(init=init_hash, data=images.hash if run.rank == 0 else None)

    # Optimisers: AdamW for the VAE and the mapper, another for the discriminator
    if vfm is not None:
        common.cast_matmuls(vfm.to(memory_format=torch.channels_last), device, args.precision)
    ema = copy.deepcopy(vae).to(device).requires_grad_(False)
    weights = dict(rec=1.0, kl=args.kl, lpips=args.lpips, gan=args.gan, align=args.lambda_align)
    loss = VAELoss(vae, mapper, weights, args.rec, args.align).to(device, memory_format=torch.channels_last)
    adamw = partial(torch.optim.AdamW, lr=args.lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    optimizer = adamw(loss.parameters())
    stats = LatentStats(latent_shape[0], device, run.world)
    disc_loss = disc_optimizer = None
    if discriminator is not None:
        disc_loss = DiscriminatorLoss(discriminator).to(device, memory_format=torch.channels_last)
        disc_optimizer = adamw(discriminator.parameters())
    adaptive = args.align == "vavae" if args.align_ratio is None else args.align_ratio
    modules = dict(vae=vae, ema=ema, mapper=mapper, discriminator=discriminator, optimizer=optimizer,
                   disc_optimizer=disc_optimizer, latent_stats=stats)
    record = dict(config=vae.config, mapper_config=mapper and mapper.config)
    if not run.resume(modules, inputs, record):
        return

    # Compile, and share between processes, what a step calls: checkpoints and EMA see the plain modules
    compiled_critic = compile_parts(args, vae, mapper, vfm, discriminator, disc_loss)
    forward, disc_forward = loss, disc_loss
    if run.world > 1:
        ids = [device.index] if device.type == "cuda" else None
        forward = DDP(loss, device_ids=ids, gradient_as_bucket_view=True)
        disc_forward = disc_loss and DDP(disc_loss, device_ids=ids, gradient_as_bucket_view=True)

    # Tokens of the VFM: from the cache, or from the VFM in each step
    cached = normalise = None
    if args.cache_vfm:
        cached = cache_tokens(args.cache_vfm, vfm, inputs["vfm"], images, run)
        vfm.to("meta")  # frees its memory
    if args.vfm_normalise == "channel":
        mean, std = token_statistics(vfm, cached, images, run)
        normalise = lambda tokens: (tokens - mean) / (std + 1e-6)
    elif args.vfm_normalise == "spatial":
        normalise = spatial_normalise
    if run.rank == 0:
        print_plan(args, run, images, vae, latent_shape, vfm, mapper, discriminator)

    def name_images(step, places):
        rows = data.sample_order(len(images), args.seed, [step * args.batch + p for p in places])
        return [images.files[row % len(images.files)] for row in rows]

    draw = partial(draw_images, images, ema, run)
    read = partial(read_step, images, cached, args, run.rank, run.world, latent_shape)
    batches = data.load(read, range(run.step, args.steps), args.workers)
    for step, (*batch, unreadable) in run.steps(batches, name_images, draw):
        images.note_bad(unreadable)
        # 1. The batch, in pieces of --micro-batch
        micro_batches = [to_device(run, vfm, normalise, slice(i, i + run.micro), *batch)
                         for i in range(0, run.local, run.micro)]
        share = run.micro / run.local  # of a micro-batch in this process's mean

        # 2. Latent statistics of the first global batch, before the first step needs them
        if step == 0 and args.align == "send":
            for x, (_, eps, _), _ in micro_batches:
                with common.autocast(device, args.precision):
                    stats.add(vae.encode(x).sample(eps).detach())
            stats.update(momentum=1.0)

        # 3. Eq. (3), forward and backward
        learning_rate = common.learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        with_gan = discriminator is not None and step >= args.gan_start
        if with_gan:
            discriminator.requires_grad_(False)
        critic = compiled_critic if with_gan else None
        parts, fakes, step_weights = {}, [], weights
        if adaptive:
            ratio = parts["align_ratio"] = gradient_ratio(loss, micro_batches, run, stats, lpips)
            step_weights = {**weights, "align": args.lambda_align * ratio}
        for i, (x, noise, tokens) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with common.autocast(device, args.precision), common.sync_if(forward, last):
                losses, x_rec, z = forward(x, noise, tokens, stats, critic, lpips)
                total = sum(step_weights[k] * v for k, v in losses.items())
                (total * share).backward()
            for k, v in losses.items():
                parts[k] = parts.get(k, 0) + v.detach() * share
            stats.add(z.detach())
            fakes.append(x_rec.detach())

        # 4. Clip and step. The mapper apart, so that its gradient does not shorten the VAE's step
        parts["grad_norm"] = nn.utils.clip_grad_norm_(vae.parameters(), args.clip)
        if mapper is not None:
            parts["mapper_grad_norm"] = nn.utils.clip_grad_norm_(mapper.parameters(), args.clip)
        optimizer.step()
        stats.update(momentum=0.1)

        # 5. The discriminator's step, on the same images and their reconstructions
        if with_gan:
            discriminator.requires_grad_(True)
            disc_optimizer.zero_grad(set_to_none=True)
            parts["disc"] = 0
            for i, ((x, _, _), fake) in enumerate(zip(micro_batches, fakes)):
                last = i == len(micro_batches) - 1
                with common.autocast(device, args.precision), common.sync_if(disc_forward, last):
                    disc = disc_forward(x, fake) * share
                    disc.backward()
                parts["disc"] = parts["disc"] + disc.detach()
            parts["disc_grad_norm"] = nn.utils.clip_grad_norm_(discriminator.parameters(), args.clip)
            disc_optimizer.step()

        # 6. Averaged weights; then log, save and stop where it is due
        common.update_ema(ema, vae, step, args.ema)
        finite = torch.cat([x_rec.sum((1, 2, 3)) for x_rec in fakes])  # or not: says of which image
        run.after_step(parts, each=finite)


if __name__ == "__main__":
    common.run_script(main)
