"""The autoencoder; as a script, stage 2: images -> latent moments on disk.

    python vae.py --vae out/send/vae.pt --data images --out latents --flip                       # one process
    torchrun --nproc_per_node=8 vae.py --vae out/send/vae.pt --data images --out latents --flip
    python vae.py --vae out/demo/send/vae.pt --data out/demo/avatars --split train --out out/tiny/latents
    python vae.py export --vae out/send/vae.pt --out send.safetensors     # the averaged weights, in float16

The network is the KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752) with the
parameter names of its release, so one class is SD-VAE (f8d4), VA-VAE and IN-VAE (f16d32), and the demo's
small models. Checkpoints of other projects are read by extras/convert.py.
"""
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
from common import UserError
from sit import attention

# Name -> constructor arguments of AutoencoderKL. The factor f is 2 ** (len(ch_mult) - 1), d is z_channels
F4 = dict(ch=16, ch_mult=(1, 2, 8), num_res_blocks=1, attn_resolutions=(), resolution=32)
F8 = dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=(), resolution=256)
F16 = dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256)
DEMO = dict(ch=16, ch_mult=(1, 1, 4), num_res_blocks=1, attn_resolutions=(), resolution=64)
VAE_CONFIGS = {
    "f8d4": dict(F8, z_channels=4), "f16d16": dict(F16, z_channels=16), "f16d32": dict(F16, z_channels=32),
    "f16d64": dict(F16, z_channels=64), "f4d16": dict(F4, z_channels=16), "f4d32": dict(F4, z_channels=32),
    "demo": dict(DEMO, z_channels=4)}

# ------------------------------------------------------------------------------------------------------------
# The network


class GroupNorm(nn.GroupNorm):
    """LDM's 32 groups; below 128 channels they have 4 channels each, since a group of one erases its mean."""

    def __init__(self, channels, eps=1e-6):
        super().__init__(min(32, channels // 4), channels, eps=eps)

    def forward(self, x):
        if x.device.type == "cpu":
            return ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class ChannelsLastGroupNorm(torch.autograd.Function):
    """Group norm on the CPU, fast and exact on channels-last tensors: x (B, C, H, W), G groups.

    There PyTorch's backward pass is 5 to 20 times slower than in the other layout (and copies into that cost
    more than the norm), and its variance of one pass loses digits to a large mean, which float32 feels.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        B, C, H, W = x.shape
        if x.dtype == torch.bfloat16:
            y, mean, rstd = torch.native_group_norm(x, weight, bias, B, C, H * W, groups, eps)
        else:
            centre = x.mean((2, 3))  # (B, C)
            y = x - centre.view(B, C, 1, 1)
            each = centre.view(B, groups, C // groups)
            mean = each.mean(2)  # (B, G)
            within = y.square().mean((2, 3)).view(each.shape)  # variance within a channel
            between = (each - mean[..., None]).square()  # and between those of a group
            rstd = ((within + between).mean(2) + eps).rsqrt()
            gain = (weight.view(groups, -1) * rstd[..., None]).to(x.dtype)  # (B, G, C/G)
            shift = bias.view(groups, -1) + (each - mean[..., None]) * gain
            y = torch.addcmul(shift.view(B, C, 1, 1), y, gain.view(B, C, 1, 1))
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, mean, rstd = ctx.saved_tensors
        B, C, H, W = x.shape
        G = mean.shape[1]
        n = C // G * H * W  # numbers in a group
        exact = torch.promote_types(g.dtype, torch.float32)

        def channels(v):  # (B, G, C/G or 1) -> (B, C, 1, 1)
            return v.expand(B, G, C // G).reshape(B, C, 1, 1)

        mean, rstd = mean.to(exact)[..., None], rstd.to(exact)[..., None]  # (B, G, 1)
        w = weight.to(exact).view(1, G, -1)
        near = mean.to(x.dtype)  # what x's dtype holds of a large mean goes first: it costs no digits below
        x = x - channels(near)
        mean = mean - near.to(exact)
        db = g.sum((2, 3), dtype=exact).view(B, G, C // G)
        # with the normalised x^ = (x - mean) rstd: dw = sum of g x^, and over a group
        # dx = w rstd g - rstd / n (sum of w g + x^ sum of w g x^)
        dw = ((g * x).sum((2, 3), dtype=exact).view(B, G, C // G) - db * mean) * rstd
        slope = -rstd.square() * (dw * w).sum(2, keepdim=True) / n
        shift = -rstd * (db * w).sum(2, keepdim=True) / n - slope * mean
        gain, slope, shift = (channels(v).to(g.dtype) for v in (w * rstd, slope, shift))
        dx = torch.addcmul(shift, x, slope).addcmul_(g, gain)
        dw, db = (v.sum(0).flatten().to(weight.dtype) for v in (dw, db))  # (C,)
        return dx, dw, db, None, None


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = GroupNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # from scratch: each block begins near the identity
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (B, c_in, H, W) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over positions; q, k, v and proj_out are 1 x 1 convolutions, as in LDM."""

    def __init__(self, c):
        super().__init__()
        self.norm = GroupNorm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):  # (B, c, H, W) -> same
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT.unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, HW, c)
        h = attention(q, k, v).squeeze(1).mT.reshape(x.shape)  # (B, c, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):  # (B, c, H, W) -> (B, c, H/2, W/2); LDM pads right and bottom only
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):  # (B, c, H, W) -> (B, c, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if asked for."""

    def __init__(self, c_in, c_out, blocks, attend):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attend else 0))

    def forward(self, h):  # (B, c_in, H, W) -> (B, c_out, H, W)
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1 = ResnetBlock(c, c)
        self.attn_1 = AttnBlock(c)
        self.block_2 = ResnetBlock(c, c)

    def forward(self, h):  # (B, c, H, W) -> same
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    def __init__(self, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            attend = resolution // 2 ** i in attn_resolutions
            level = Level(widths[i], widths[i + 1], num_res_blocks, attend)
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W) -> (B, 2c, H/f, W/f)
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        widths.append(widths[-1])  # the deepest level is entered at its own width
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()  # up[i] works at resolution / 2**i: forward() runs the list backwards
        for i in range(len(ch_mult)):
            attend = resolution // 2 ** i in attn_resolutions
            level = Level(widths[i + 1], widths[i], num_res_blocks + 1, attend)
            if i > 0:
                level.upsample = Upsample(widths[i])
            self.up.append(level)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):  # (B, c, h, w) -> (B, 3, f*h, f*w)
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


@dataclass
class Posterior:
    """q(z|x) = N(mean, std^2), both (B, c, h, w) float32."""
    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, eps=None):
        """z = mean + std * eps; eps (B, c, h, w) standard normal, drawn here when not given."""
        return self.mean + self.std * (torch.randn_like(self.mean) if eps is None else eps)

    def kl(self):
        """KL(q || N(0, I)) summed over the latent, averaged over the batch -> scalar (LDM's convention)."""
        var = self.std.square()
        return 0.5 * (self.mean.square() + var - 1 - var.log()).sum((1, 2, 3)).mean()


class AutoencoderKL(nn.Module):
    """x (B, 3, H, W) in [-1, 1] -> encode(x): Posterior of (B, z_channels, H/f, W/f); decode(z): like x.

    Raises UserError for an image size that the factor f = 2 ** (len(ch_mult) - 1) does not divide.
    Source: arXiv 2112.10752, appendix G; names and shapes of the release.
    """

    def __init__(self, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        self.config = dict(z_channels=z_channels, ch=ch, ch_mult=tuple(ch_mult), resolution=resolution,
                           num_res_blocks=num_res_blocks, attn_resolutions=tuple(attn_resolutions))
        self.encoder = Encoder(**self.config)
        self.decoder = Decoder(**self.config)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.factor = 2 ** (len(ch_mult) - 1)
        self.latent_stats = None  # mean and std (c,) of the latents, where a release says them

    def latent_shape(self, size):
        """(c, h, w) of images of size x size pixels. Raises UserError."""
        if size % self.factor:
            raise UserError(f"images of {size} pixels (--resolution): expected a multiple of {self.factor}, "
                            "the VAE's factor")
        return self.config["z_channels"], size // self.factor, size // self.factor

    def encode(self, x):
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise UserError(f"image {x.shape[-2]} x {x.shape[-1]}: expected a multiple of {self.factor}")
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30, 20)))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z)).float()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_vae(path):
    """Weights of a VAE -> AutoencoderKL in evaluation mode, frozen.

    path: a checkpoint of train_vae.py (its averaged weights), a .safetensors of `vae.py export`, or another
    project's: a file of LDM, Stable Diffusion, LightningDiT (VA-VAE) or REPA-E, a diffusers folder or its
    weights file; or the hub id of one of these, `org/name` or `org/name:file`. Latents are never scaled in
    here (diffusers' scaling_factor is not used): stage 2 measures their mean and std; those of a diffusers
    configuration are .latent_stats. Raises UserError, which names the first key that does not fit.
    """
    path, stats = common.local_path(path), None
    if (path / "vae.pt").is_file():
        raise UserError(f"{path}: a folder of train_vae.py; give its file {path / 'vae.pt'}")
    checkpoint = None if path.is_dir() else common.load_checkpoint(path)
    ours = isinstance(checkpoint, dict) and "config" in checkpoint and isinstance(checkpoint.get("vae"), dict)
    try:
        if ours:
            config, state = checkpoint["config"], checkpoint.get("ema", {})
        elif path.suffix == ".safetensors" and (config := exported_config(path)):
            state = {k: v.float() for k, v in checkpoint.items()}
        else:
            from extras import convert  # here, since other projects' files are no part of the method
            config, state, stats = convert.read_vae(path, checkpoint)
        vae = AutoencoderKL(**config)
    except (TypeError, RuntimeError, ZeroDivisionError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: its configuration is no autoencoder's ({e})") from None
    common.load_weights(vae, state, path)
    vae.latent_stats = stats
    return vae.eval().requires_grad_(False)


def exported_config(path):
    """Constructor arguments in a file of export(); None in any other .safetensors."""
    with safetensors.safe_open(path, "pt") as f:
        text = (f.metadata() or {}).get("config")
    return text and json.loads(text)


def export(vae, path, source):
    """A small file to pass on: weights in float16, the constructor's arguments, how `source` was made."""
    if Path(path).suffix != ".safetensors":
        raise UserError(f"--out {path}: expected a name that ends in .safetensors")
    common.open_file(path, "--out")
    state = {k: v.half().contiguous() for k, v in vae.state_dict().items()}
    ours = Path(source).suffix == ".pt" and Path(source).exists()  # a hub id does not
    before = common.load_checkpoint(source).get("made") if ours else str(source)
    made = common.without_folders(json.dumps(dict(common.made(), source=before)))
    with common.whole_file(path) as part:
        safetensors.torch.save_file(state, part, dict(config=json.dumps(vae.config), made=made))
    print(f"{path}: {Path(path).stat().st_size / 2 ** 20:.1f} MiB")


# ------------------------------------------------------------------------------------------------------------
# Stage 2: images -> moments.npy, labels.npy, files.txt, stats.npz, meta.json

UNFINISHED = ("sums.npy", "done.npy", "unfinished.json", ".lock")  # what lies there too until the end


def parse_args():
    p = common.Parser(description=__doc__)
    p.add_argument("command", nargs="?", default="encode", choices=("encode", "export"),
                   help="encode (default): latents; export: the weights alone (with --vae and --out only)")
    p.add_argument("--vae", required=True, help="checkpoint, in any format of load_vae")
    p.add_argument("--data", help="image folder (encode)")
    p.add_argument("--out", required=True, help="folder for the latents; export: NAME.safetensors")
    p.add_argument("--split", choices=data.SPLITS, help="of attributes.csv (default: all images)")
    p.add_argument("--resolution", type=common.side, help="crop in pixels (default: the VAE's)")
    p.add_argument("--flip", action="store_true", help="store the mirror image's moments too (F = 2)")
    p.add_argument("--micro-batch", type=common.positive, default=64, help="images at a time: memory only")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    gpu = torch.cuda.is_available()
    p.add_argument("--compile", type=int, default=int(gpu), choices=(0, 1), help="1: torch.compile")
    p.add_argument("--workers", type=common.natural, default=4 if gpu else 0, help="image reading processes")
    p.add_argument("--deterministic", action="store_true", help="equal bits in each run on CUDA too, slower")
    p.add_argument("--dry-run", action="store_true", help="print the plan (images, disk), and end")
    args = p.parse_args()
    if args.command == "encode" and not args.data:
        p.error("the following arguments are required: --data")
    return args


def already_encoded(out, settings):
    """Whether `out` holds finished latents of these settings. Raises UserError when it holds others."""
    if not (out / "meta.json").exists():
        return False
    found = common.read_json(out / "meta.json")
    paths = ("vae", "data")  # these may move: what they hold is compared by its hash
    other = [k for k in settings if k not in paths and found.get(k, settings[k]) != settings[k]]
    if other == ["files_hash"]:
        raise UserError(f"{out} holds the latents of other images than --data {settings['data']}: some were "
                        "added, removed or replaced; bring them back, or choose another --out")
    if other:
        raise UserError(f"{out} holds latents with {other[0]} {found.get(other[0])}, this command says "
                        f"{settings[other[0]]}; choose another --out or delete it")
    return True


@torch.no_grad()
def encode_batches(vae, images, batches, args, device):
    """Yield, for each list of rows, those whose image can be read and a function that waits for their moments
    (B, F, 2c, h, w) float16."""
    for pixels, _, rows in data.load_batches(images, batches, args.workers):
        x = data.to_float(pixels.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        with common.autocast(device, args.precision):
            posteriors = [vae.encode(x.flip(-1) if mirrored else x) for mirrored in range(1 + args.flip)]
        moments = torch.stack([torch.cat([q.mean, q.std], 1).half() for q in posteriors], 1)
        yield rows, common.to_host(moments)


def store_moments(store, rows, moments, images, vae_path):
    """Put moments (B, F, 2c, h, w) into their rows. Raises UserError for any that are not finite."""
    bad = [images.files[row] for row, m in zip(rows, moments, strict=True) if not m.isfinite().all()]
    if bad:
        raise UserError(f"{vae_path}: moments of {', '.join(bad[:8])} exceed float16 or are not finite")
    mean, std = moments.double().chunk(2, dim=2)
    # z = mean + std eps, so E[z] = E[mean] and E[z^2] = E[mean^2 + std^2]: exact, without sampling
    sums = torch.stack([v.sum((1, 3, 4)) for v in (mean, mean ** 2 + std ** 2)], 1)  # (B, 2, c)
    store.put(rows, moments.numpy(), sums.numpy())


def keep_rows(path, kept):
    """Leave the rows `kept` of the array at `path`: those of the images that could be read."""
    old = np.load(path, mmap_mode="r", allow_pickle=False)
    with common.whole_file(path) as part:
        common.new_array(part, old.dtype, (len(kept), *old.shape[1:]))
        new = np.load(part, mmap_mode="r+", allow_pickle=False)
        for i in range(0, len(kept), 1024):
            new[i:i + 1024] = old[kept[i:i + 1024]]
        new.flush()


def finish(out, images, store, settings, seconds):
    """Write the other files of the cache; meta.json, the last, marks it whole -> (its content, std (c,))."""
    n, kept = len(images.files), np.flatnonzero(store.done == 1)  # the other images could not be read
    moments, sums = store.arrays
    if n - len(kept) > data.MAX_BAD * n:  # each process has seen its own part alone
        raise UserError(f"{images.root}: {n - len(kept)} of {n} images are unreadable, more than "
                        f"{data.MAX_BAD:.0%}; mend or delete them, delete {out} and run again")
    shape = [len(kept), *moments.shape[1:]]
    mean, square = sums[kept].sum(0) / (len(kept) * shape[1] * shape[3] * shape[4])
    std = np.sqrt(np.maximum(square - mean ** 2, 0))
    if not std.min() > 1e-6:
        raise UserError(f"{settings['vae']}: latent channel {std.argmin()} is constant (std {std.min():.2g}) "
                        f"over {images.root}; the VAE has collapsed")
    np.save(out / "labels.npy", np.asarray(images.labels, np.int64)[kept])
    np.savez(out / "stats.npz", mean=mean, std=std)
    for name in ("labels.npy", "stats.npz"):
        common.sync(out / name)
    common.write_text(out / "files.txt", "".join(images.files[i] + "\n" for i in kept))
    if len(kept) < n:
        keep_rows(out / "moments.npy", kept)  # a kill between this and the next line would encode all anew
    meta = dict(settings, n=len(kept), skipped=n - len(kept), shape=shape, seconds=round(seconds, 1))
    common.write_json(out / "meta.json", meta)
    return meta, std


def remove_unfinished(out):
    for name in UNFINISHED:
        (out / name).unlink(missing_ok=True)


def main():
    args = parse_args()
    device, rank, world = common.setup(args.deterministic)
    args.precision = args.precision or common.fast_precision(device)
    begin = time.time()
    vae = load_vae(args.vae)
    if args.command == "export":
        return export(vae, args.out, args.vae)

    # What is encoded
    size = args.resolution or vae.config["resolution"]
    c, side, _ = vae.latent_shape(size)
    images = data.ImageFolder(args.data, size, split=args.split)
    data.check_folder(images, step=vae.factor)
    n = len(images.files)
    shape = (n, 1 + args.flip, 2 * c, side, side)
    if rank == 0:
        print(f"{n} images, {len(images.classes)} classes, with{'' if args.flip else 'out'} mirror images -> "
              f"moments {shape} float16, {2 * np.prod(shape) / 2**20:.0f} MiB of disk; {device.type} in "
              f"{args.precision}, {world} process(es)")
    if args.dry_run:
        return

    # Where it goes
    settings = dict(vae=args.vae, vae_hash=common.weights_hash(vae.state_dict()), data=args.data,
                    split=args.split, resolution=size, flip=args.flip, precision=args.precision,
                    crop="ADM centre", classes=images.classes, files_hash=images.hash)
    out = Path(args.out)
    if already_encoded(out, settings):
        if rank == 0:
            remove_unfinished(out)
            meta = common.read_json(out / "meta.json")
            places = dict(vae=args.vae, data=args.data)  # where they lie now, for train_sit.py
            if meta != meta | places and os.access(out, os.W_OK):
                common.write_text(out / "meta.json", json.dumps(meta | places, indent=1) + "\n")
            print(f"{out}: already encoded")
        return
    # moments; sums of E[z] and E[z^2] of each image over flips and positions; which rows are there
    files = {out / "moments.npy": (np.float16, shape), out / "sums.npy": (np.float64, (n, 2, c)),
             out / "done.npy": (np.uint8, (n,))}
    store = common.open_rows(out, out / "unfinished.json", out / ".lock", settings, files, rank)
    batches = common.chunks(store.missing(rank, world), args.micro_batch)

    # Encode: a batch is stored while a GPU works on the next
    common.cast_matmuls(vae.to(memory_format=torch.channels_last), device, args.precision)
    if args.compile:
        vae.encoder.compile()
    encoded = common.one_behind(encode_batches(vae, images, batches, args, device))
    for rows, arrived in tqdm(encoded, "encode", len(batches), disable=rank > 0 or None):
        store_moments(store, rows, arrived(), images, args.vae)
    store.flush()
    common.barrier()
    if rank:
        return

    # The other files
    meta, std = finish(out, images, store, settings, time.time() - begin)
    remove_unfinished(out)
    count, seconds = sum(map(len, batches)) * world, max(meta["seconds"], 0.1)
    print(f"{out}: {meta['n']} images, {count} of them in {seconds:.0f} s ({count * shape[1] / seconds:.0f} "
          f"images/s), latent std {std.min():.3g} to {std.max():.3g}")


if __name__ == "__main__":
    common.run_script(main)
