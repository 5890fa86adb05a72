"""The paper's idea (arXiv 2601.05823, section 3): noised latents must predict a frozen vision model's patch tokens.

    z   = V_theta.encode(x).sample()                     latent, normalised per channel       vae.py
    z_t = (1 - a) eps + a z,  eps ~ N(0, I), a ~ U(0, 1)                              (1)     add_noise
    y   = f(x)                                           tokens of the frozen VFM             VFM
    L_align = mean_n [1 - cos(h_phi(z_t)[n], y[n])]                                   (2)     Mapper, align_loss
    L(theta, phi) = lambda_align L_align + L_VAE                                      (3)     train_vae.py
"""
import contextlib
import math
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from tqdm import tqdm

import common
import data
from common import UserError, load_checkpoint
from vae import attention


def add_noise(z, generator=None, a=None, eps=None):
    """Eq. (1): z (B, c, h, w) normalised -> z_t, same shape; one a ~ U(0, 1) an image; a = 1 is clean, a = 0 is noise.
    a (B,) and eps (B, c, h, w) are drawn here when they are not given."""
    a = torch.rand(len(z), generator=generator, device=z.device) if a is None else a
    eps = torch.randn(z.shape, generator=generator, device=z.device) if eps is None else eps
    a = a.view(-1, 1, 1, 1)
    return (1 - a) * eps + a * z


def align_loss(pred, target):
    """Eq. (2): pred, target (B, N, D) -> scalar in [0, 2], the mean over tokens of 1 - cosine similarity, in float32."""
    return (1 - F.cosine_similarity(pred.float(), target.float(), dim=-1)).mean()


class Block(nn.Module):
    """Pre-norm ViT block (Dosovitskiy et al. 2021)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):  # (B, N, dim) -> same
        B, N, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        x = x + self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, dim))
        return x + self.mlp(self.norm2(x))


def sincos_2d(dim, grid):
    """Fixed 2-D sine-cosine positions (grid * grid, dim), rows first; dim must be a multiple of 4."""
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    one = torch.cat([angle.sin(), angle.cos()], 1).float()  # (grid, dim/2)
    return torch.cat([one.repeat(grid, 1), one.repeat_interleave(grid, 0)], 1)  # (grid*grid, dim)


def patch_side(latent_size, grid):
    """Latent cells a token and side. f16 with 16 x 16 tokens at 256: 1; f8: 2. Raises UserError if grid does not divide."""
    if latent_size % grid:
        raise UserError(f"the VFM's {grid} x {grid} tokens do not divide the {latent_size} x {latent_size} latent")
    return latent_size // grid


class Mapper(nn.Module):
    """h_phi: patch embedding -> `depth` ViT blocks -> MLP projector. z_t (B, z_channels, h, h) -> (B, grid*grid, vfm_dim).

    depth 1 is the paper's best (Table 2); depth 0 is the plain MLP alignment of earlier work. No time conditioning.
    width defaults to vfm_dim, heads to width / 64 (12 for 768, 16 for 1024). Raises UserError if grid does not divide h.
    """

    def __init__(self, z_channels, latent_size, grid, vfm_dim, depth=1, width=None, heads=None, mlp_width=2048):
        super().__init__()
        width = width or vfm_dim
        heads, patch = heads or max(1, width // 64), patch_side(latent_size, grid)
        if width % (4 * heads):
            raise UserError(f"mapper width {width}: expected a multiple of {4 * heads}")
        self.config = dict(z_channels=z_channels, latent_size=latent_size, grid=grid, vfm_dim=vfm_dim, depth=depth,
                           width=width, heads=heads, mlp_width=mlp_width)
        self.patch_embed = nn.Conv2d(z_channels, width, patch, stride=patch)
        self.register_buffer("pos", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6) if depth else nn.Identity()
        self.projector = nn.Sequential(nn.Linear(width, mlp_width), nn.SiLU(), nn.Linear(mlp_width, mlp_width), nn.SiLU(),
                                       nn.Linear(mlp_width, vfm_dim))

    def forward(self, z_t):
        h = self.patch_embed(z_t).flatten(2).transpose(1, 2) + self.pos  # (B, N, width)
        for block in self.blocks:
            h = block(h)
        return self.projector(self.norm(h))  # (B, N, vfm_dim)


class LinearMapper(nn.Module):
    """The rival's mapper (VA-VAE, arXiv 2501.01423): one linear map a token, without bias. Shapes and errors as Mapper."""

    def __init__(self, z_channels, latent_size, grid, vfm_dim):
        super().__init__()
        self.config, patch = dict(z_channels=z_channels, latent_size=latent_size, grid=grid, vfm_dim=vfm_dim), patch_side(latent_size, grid)
        self.proj = nn.Conv2d(z_channels, vfm_dim, patch, stride=patch, bias=False)

    def forward(self, z):
        return self.proj(z).flatten(2).transpose(1, 2)  # (B, N, vfm_dim)


def vavae_loss(pred, target, cos_margin=0.5, distance_margin=0.25):
    """VA-VAE's marginal cosine and marginal distance-matrix losses, summed: pred, target (B, N, D) -> scalar, in float32.
    A token counts while its cosine is below 1 - cos_margin, a pair while its two similarities differ by distance_margin."""
    pred, target = (F.normalize(v.float(), dim=-1) for v in (pred, target))
    cosine = F.relu(1 - cos_margin - (pred * target).sum(-1)).mean()
    return cosine + F.relu((pred @ pred.mT - target @ target.mT).abs() - distance_margin).mean()  # (B, N, N)


class VFM(nn.Module):
    """A frozen vision foundation model from timm. x (B, 3, H, W) in [-1, 1] -> tokens (B, grid*grid, dim), float32.

    name   any timm model with intermediate features. ViT: patch tokens after the final norm, without class and
           register tokens. CNN: a feature map as a grid of tokens.
    layer  ViT: block (negative counts from the end; default: the last). CNN: feature stage (default: stride 16).
    ckpt   local .pth/.pt/.bin/.safetensors instead of timm's download.
    The input is resized (bicubic) to grid * patch or grid * stride pixels, which gives grid x grid tokens, and
    normalised with the model's own mean and std. Raises UserError for an unknown name, a missing file, weights that do
    not fit, or a failed download. Never falls back to another model. weights=False: random weights, for a plan.
    """

    def __init__(self, name, image_size, grid, ckpt=None, layer=None, weights=True):
        super().__init__()
        self.name, self.grid = name, grid
        spec = empty_model(name)
        stages = [(s["reduction"], s["num_chs"]) for s in getattr(spec.feature_info, "info", spec.feature_info)]
        is_vit = hasattr(spec, "patch_embed") and hasattr(spec, "blocks")
        if layer is None and not is_vit and 16 not in [r for r, _ in stages]:
            raise UserError(f"--vfm {name}: no feature map of stride 16; choose one with --vfm-layer 0..{len(stages) - 1}")
        if layer is None:
            layer = len(stages) - 1 if is_vit else max(i for i, (r, _) in enumerate(stages) if r == 16)
        if not -len(stages) <= layer < len(stages):
            raise UserError(f"--vfm-layer {layer}: {name} has the layers 0..{len(stages) - 1}")
        self.layer = layer % len(stages)
        stride, self.dim = stages[self.layer]
        self.size = grid * stride
        fixed = {"img_size": self.size} if is_vit else {}  # position embeddings are resampled to it
        self.check_grid(fixed)
        self.net = pretrained(name, ckpt, weights=weights, **fixed)
        config = self.net.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def check_grid(self, fixed):
        """Raise UserError for a model that does not give grid x grid tokens, before its weights are loaded."""
        try:
            net = empty_model(self.name, **fixed).eval()
            found = tuple(self.tokens(net, torch.empty(1, 3, self.size, self.size, device="meta")).shape[1:])
        except (AssertionError, RuntimeError, TypeError) as e:  # built for one size, for whole windows, or without an img_size
            raise UserError(f"--vfm {self.name}: gives no {self.grid} x {self.grid} tokens at {self.size} x {self.size} pixels ({' '.join(str(e).split())[:100]})")
        if found != (self.dim, self.grid, self.grid):
            raise UserError(f"--vfm {self.name}: features {found}, expected {(self.dim, self.grid, self.grid)}")

    def tokens(self, net, x):
        """-> (B, dim, grid, grid), final norm applied (ViT)."""
        return net.forward_intermediates(x, indices=[self.layer], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True)[0]

    def train(self, mode=True):  # frozen: batch norm must never leave evaluation mode
        return super().train(False)

    @torch.no_grad()  # not inference_mode: its tensors cannot be kept for a loss, and torch.compile stumbles over its views
    def forward(self, x):
        x = ((x + 1) / 2 - self.mean) / self.std
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic")  # as REPA: normalised first, no antialiasing
        return self.tokens(self.net, x).flatten(2).transpose(1, 2).float()  # (B, grid*grid, dim)


def cache_size(vfm, images, flips):
    """What a TokenCache holds, in words."""
    shape = flips * len(images.files), vfm.grid ** 2, vfm.dim
    return f"{shape[0]} crops x {shape[1]} tokens x {shape[2]} in float16, {2 * np.prod(shape) / 2**30:.2f} GiB of disk"


class TokenCache:
    """The VFM's tokens of each crop of an image folder on disk, so that no step computes them: cache[rows] -> (B, grid*grid, dim).

    Row i < N is image i, row N + i (flips = 2) its mirror image. folder: tokens.npy (float16), done.npy (which rows are there; a
    stopped run goes on) and meta.json. weights: the VFM's hash before it was cast. Images are known by name and size of the file.
    Raises UserError for a folder of other tokens, and for a disk that is too small.
    """

    def __init__(self, folder, vfm, weights, images, flips, args, device, rank, world):
        self.folder, shape = Path(folder), (flips * len(images.files), vfm.grid ** 2, vfm.dim)
        files = {self.folder / "tokens.npy": (np.float16, shape), self.folder / "done.npy": (np.uint8, shape[:1])}
        if rank == 0:
            lock = self.begin(dict(vfm=vfm.name, weights=weights, layer=vfm.layer, input=vfm.size, crop=images.size, precision=args.precision, shape=list(shape), files=images.hash), files)
        common.barrier()
        store = common.RowFiles(*files, mode="r" if self.whole(files) else "r+")
        if rank == 0:
            print(f"--cache-vfm {folder}: {cache_size(vfm, images, flips)}; {int((store.done == 0).sum())} crops to go")
        mine = common.chunks(store.missing(rank, world), args.micro_batch or 64)
        for pixels, _, part in tqdm(data.load_batches(images, mine, args.workers, replace=True), "tokens", len(mine), disable=rank > 0 or None):
            with common.autocast(device, args.precision):
                tokens = vfm(data.to_float(pixels.to(device)).contiguous(memory_format=torch.channels_last)).half().cpu()
            if not tokens.isfinite().all():
                raise UserError(f"--cache-vfm: tokens of {images.files[part[0] % len(images.files)]} and its batch exceed float16 or are not finite")
            store.put(part, tokens.numpy())
        if mine:
            store.flush()
        common.barrier()
        store = common.RowFiles(*files, mode="r")  # as the other processes left them
        if not store.done.all():
            raise UserError(f"--cache-vfm {folder}: {int((store.done == 0).sum())} crops have no tokens; run the same command again")
        if rank == 0:
            common.release(lock)  # others may read it now
        self.tokens = store.arrays[0]

    @staticmethod
    def whole(files):
        """Whether all rows are there."""
        with contextlib.suppress(FileNotFoundError, *common.BROKEN):
            *arrays, done = (np.load(f, mmap_mode="r", allow_pickle=False) for f in files)
            return [a.shape for a in (*arrays, done)] == [shape for _, shape in files.values()] and bool(done.all())
        return False

    def begin(self, settings, files):
        """New files, or those of a stopped run, with a lock on them; or whole ones (None). Raises UserError for a folder that holds something else."""
        mark = self.folder / "meta.json"
        if mark.exists():
            found = common.read_json(mark)
            different = [k for k in settings if found.get(k) != settings[k]]
            if different:
                raise UserError(f"--cache-vfm {self.folder} holds tokens with {different[0]} {found.get(different[0])}, this run needs {settings[different[0]]}; "
                                "choose another folder or delete it")
            if self.whole(files):
                return None
        common.open_out(self.folder, need_bytes=2 * math.prod(settings["shape"]) - sum(p.stat().st_blocks * 512 for p in files if p.exists()), flag="--cache-vfm")
        strange = {p.name for p in self.folder.iterdir() if not p.name.startswith(".")} - {"tokens.npy", "done.npy", "meta.json", "meta.json.tmp"}
        if strange:
            raise UserError(f"--cache-vfm {self.folder}: holds {min(strange)} and is no cache; expected a new or empty folder")
        lock = common.claim(self.folder / ".lock", flag="--cache-vfm")
        common.begin_rows(mark, settings, files)
        return lock

    def __getitem__(self, rows):
        return torch.from_numpy(self.tokens[rows]).float()


def empty_model(name, **kwargs):
    """timm model without storage for its weights. Raises UserError for an unknown name."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **kwargs)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{name}: timm {timm.__version__} has no such model, or cannot lay it out ({' '.join(str(e).split())[:100]}); timm.list_models() names all")


def pretrained(name, ckpt=None, flag="--vfm", weights=True, **kwargs):
    """timm model without its classifier, with weights from the hub or the local file `ckpt`, loaded strictly (weights=False:
    random ones). Raises UserError, which names the script's `flag`."""
    if not weights:
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
    if ckpt is None:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0, **kwargs)
        except (OSError, RuntimeError, ValueError) as e:  # what timm and huggingface_hub raise without a network
            raise UserError(f"{flag} {name}: its weights cannot be fetched ({type(e).__name__}: {' '.join(str(e).split())[:100]}); "
                            f"give a local file with {flag}-ckpt")
    if not Path(ckpt).is_file():
        raise UserError(f"{flag}-ckpt {ckpt}: no such file")
    in_order = state_in_order(empty_model(name), ckpt)
    try:
        if in_order is None:  # timm's own loading: known foreign names, position embeddings resampled to img_size; strict
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(ckpt)), **kwargs)
        else:
            model = timm.create_model(name, pretrained=False, **kwargs)
            model.load_state_dict(in_order)
        model.reset_classifier(0)
        return model
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        raise UserError(f"{flag}-ckpt {ckpt}: does not fit {name} ({' '.join(str(e).split())[:200]})")


def state_in_order(model, ckpt):
    """A state dict under foreign names whose tensors have the model's count, order and shapes, renamed; else None."""
    if str(ckpt).endswith(".safetensors"):
        return None
    theirs, ours = load_checkpoint(ckpt), model.state_dict()
    if not isinstance(theirs, dict):
        raise UserError(f"{ckpt}: holds a {type(theirs).__name__}, expected a dictionary of weights")
    if set(theirs) & set(ours) or [tuple(getattr(v, "shape", ())) for v in theirs.values()] != [tuple(v.shape) for v in ours.values()]:
        return None
    print(f"{ckpt}: no name matches, but all {len(ours)} shapes do, in order: loaded by position")
    return dict(zip(ours, theirs.values()))
