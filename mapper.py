"""The paper's idea (arXiv 2601.05823, section 3): noised latents must predict a frozen vision model's patch
tokens.

    z   = V_theta.encode(x).sample()                     latent                               vae.py
    z_t = (1 - a) eps + a z,  eps ~ N(0, I), a ~ U(0, 1)                              (1)     add_noise
          z normalised per channel                                     LatentStats of train_vae.py
    y   = f(x)                                           tokens of the frozen VFM             VFM
    L_align = mean_n [1 - cos(h_phi(z_t)[n], y[n])]                                 (2)     Mapper, align_loss
    L(theta, phi) = lambda_align L_align + L_VAE                                      (3)     train_vae.py
"""
import contextlib
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
from sit import attention, sincos_2d


def add_noise(z, generator=None, a=None, eps=None):
    """Eq. (1): z (B, c, h, w) normalised -> z_t, same shape; one a ~ U(0, 1) an image; a = 1 is clean, a = 0
    is noise. a (B,) and eps (B, c, h, w) are drawn here when they are not given."""
    a = torch.rand(len(z), generator=generator, device=z.device) if a is None else a
    eps = torch.randn(z.shape, generator=generator, device=z.device) if eps is None else eps
    a = a.view(-1, 1, 1, 1)
    return (1 - a) * eps + a * z


def align_loss(pred, target):
    """Eq. (2): pred, target (B, N, D) -> scalar in [0, 2], the mean over tokens of 1 - cosine similarity, in
    float32."""
    return (1 - F.cosine_similarity(pred.float(), target.float(), dim=-1)).mean()


class Block(nn.Module):
    """Pre-norm ViT block (Dosovitskiy et al. 2021)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):  # (B, N, dim) -> same
        B, N, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        x = x + self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, dim))
        return x + self.mlp(self.norm2(x))


def patch_side(latent_size, grid):
    """Latent cells a token and side. f16 with 16 x 16 tokens at 256: 1; f8: 2. Raises UserError if grid does
    not divide."""
    if latent_size % grid:
        raise UserError(f"the VFM's {grid} x {grid} tokens do not divide the {latent_size} x {latent_size} "
                        "latent")
    return latent_size // grid


class Mapper(nn.Module):
    """h_phi: patch embedding -> `depth` ViT blocks -> MLP projector. z_t (B, z_channels, h, h) -> (B,
    grid*grid, vfm_dim).

    depth 1 is the paper's best (Table 2); depth 0 is the plain MLP alignment of earlier work. No time
    conditioning. width defaults to vfm_dim, heads to width / 64 (12 for 768, 16 for 1024). Raises UserError
    if grid does not divide h.
    """

    def __init__(self, z_channels, latent_size, grid, vfm_dim, depth=1, width=None, heads=None,
                 mlp_width=2048):
        super().__init__()
        width = width or vfm_dim
        heads = heads or max(1, width // 64)
        patch = patch_side(latent_size, grid)
        if width % (4 * heads):
            raise UserError(f"mapper width {width}: expected a multiple of {4 * heads}")
        self.config = dict(z_channels=z_channels, latent_size=latent_size, grid=grid, vfm_dim=vfm_dim,
                           depth=depth, width=width, heads=heads, mlp_width=mlp_width)
        self.patch_embed = nn.Conv2d(z_channels, width, patch, stride=patch)
        self.register_buffer("pos", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6) if depth else nn.Identity()
        self.projector = nn.Sequential(nn.Linear(width, mlp_width), nn.SiLU(),
                                       nn.Linear(mlp_width, mlp_width), nn.SiLU(),
                                       nn.Linear(mlp_width, vfm_dim))

    def forward(self, z_t):
        h = self.patch_embed(z_t).flatten(2).transpose(1, 2) + self.pos  # (B, N, width)
        for block in self.blocks:
            h = block(h)
        return self.projector(self.norm(h))  # (B, N, vfm_dim)


class LinearMapper(nn.Module):
    """The rival's mapper (VA-VAE, arXiv 2501.01423): one linear map a token, without bias. Shapes and errors
    as Mapper."""

    def __init__(self, z_channels, latent_size, grid, vfm_dim):
        super().__init__()
        self.config = dict(z_channels=z_channels, latent_size=latent_size, grid=grid, vfm_dim=vfm_dim)
        patch = patch_side(latent_size, grid)
        self.proj = nn.Conv2d(z_channels, vfm_dim, patch, stride=patch, bias=False)

    def forward(self, z):
        return self.proj(z).flatten(2).transpose(1, 2)  # (B, N, vfm_dim)


def vavae_loss(pred, target, cos_margin=0.5, distance_margin=0.25):
    """VA-VAE's marginal cosine and marginal distance-matrix losses, summed: pred, target (B, N, D) -> scalar
    (under autocast its products are bf16). A token counts while its cosine is below 1 - cos_margin, a pair
    while its two similarities differ by distance_margin."""
    pred, target = (F.normalize(v.float(), dim=-1) for v in (pred, target))
    cosine = F.relu(1 - cos_margin - (pred * target).sum(-1)).mean()
    return cosine + F.relu((pred @ pred.mT - target @ target.mT).abs() - distance_margin).mean()  # (B, N, N)


class VFM(nn.Module):
    """A frozen vision foundation model from timm.
    x (B, 3, H, W) in [-1, 1] -> tokens (B, grid*grid, dim), float32.

    name   any timm model with intermediate features. ViT: patch tokens after the final norm, without class
           and register tokens. CNN: a feature map as a grid of tokens.
    layer  ViT: block (negative counts from the end; default: the last). CNN: stage (default: stride 16).
    ckpt   local .pth, .pt, .bin or .safetensors instead of timm's download.

    The input is resized (bicubic) to grid * patch or grid * stride pixels, which gives grid x grid tokens,
    and normalised with the model's own mean and std. Never falls back to another model. Raises UserError for
    an unknown name, a missing file, weights that do not fit, or a failed download. weights=False: random
    weights, for a plan.
    """

    def __init__(self, name, image_size, grid, ckpt=None, layer=None, weights=True):
        super().__init__()
        self.name, self.grid = name, grid
        self.layer, stride, self.dim, is_vit = choose_layer(name, layer)
        self.size = grid * stride
        fixed = {"img_size": self.size} if is_vit else {}  # position embeddings are resampled to it
        self.check_grid(fixed)
        self.net = pretrained(name, ckpt, weights=weights, **fixed)
        config = self.net.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def check_grid(self, fixed):
        """Raise UserError for a model that does not give grid x grid tokens, before its weights are
        loaded."""
        try:
            net = empty_model(self.name, **fixed).eval()
            found = tuple(self.tokens(net, torch.empty(1, 3, self.size, self.size, device="meta")).shape[1:])
        # models of one input size, of whole windows (Swin), or without img_size raise here
        except (AssertionError, RuntimeError, TypeError) as e:
            raise UserError(f"--vfm {self.name}: gives no {self.grid} x {self.grid} tokens at {self.size} x "
                            f"{self.size} pixels ({common.brief(e, 100)})") from None
        if found != (self.dim, self.grid, self.grid):
            raise UserError(f"--vfm {self.name}: features {found}, expected "
                            f"{(self.dim, self.grid, self.grid)}")

    def tokens(self, net, x):
        """-> (B, dim, grid, grid), final norm applied (ViT)."""
        return net.forward_intermediates(x, indices=[self.layer], norm=True, stop_early=True,
                                         output_fmt="NCHW", intermediates_only=True)[0]

    def train(self, mode=True):  # frozen: batch norm must never leave evaluation mode
        return super().train(False)

    # not inference_mode: its tensors cannot be kept for a loss, and torch.compile stumbles over its views
    @torch.no_grad()
    def forward(self, x):
        x = ((x + 1) / 2 - self.mean) / self.std
        if x.shape[-1] != self.size:
            # as REPA: normalised first, no antialiasing
            x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        return self.tokens(self.net, x).flatten(2).transpose(1, 2).float()  # (B, grid*grid, dim)


def vfm_flags(p):
    """The flags of a VFM, for an argument parser."""
    p.add_argument("--vfm", default="vit_base_patch14_dinov2.lvd142m", help="any timm model")
    p.add_argument("--vfm-ckpt", help="local weights of the VFM")
    p.add_argument("--vfm-layer", type=common.layer,
                   help="block (ViT, default the last) or stage (CNN, default stride 16)")
    p.add_argument("--cache-vfm", metavar="DIR",
                   help="compute the VFM's tokens once, into this folder, instead of in each step")


def choose_layer(name, layer=None):
    """A block or stage of a timm model -> (its index, pixels a token and side, width, whether it is a ViT).
    Raises UserError."""
    model = empty_model(name)
    stages = [(s["reduction"], s["num_chs"]) for s in getattr(model.feature_info, "info", model.feature_info)]
    is_vit = hasattr(model, "patch_embed") and hasattr(model, "blocks")
    if layer is None and is_vit:
        layer = len(stages) - 1
    elif layer is None:
        of_stride_16 = [i for i, (reduction, _) in enumerate(stages) if reduction == 16]
        if not of_stride_16:
            raise UserError(f"--vfm {name}: no feature map of stride 16; choose one with --vfm-layer "
                            f"0..{len(stages) - 1}")
        layer = of_stride_16[-1]
    if not -len(stages) <= layer < len(stages):
        raise UserError(f"--vfm-layer {layer}: {name} has the layers 0..{len(stages) - 1}")
    layer %= len(stages)
    return layer, *stages[layer], is_vit


def empty_model(name, **kwargs):
    """timm model without storage for its weights. Raises UserError for an unknown name."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **kwargs)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{name}: timm {timm.__version__} has no such model, or cannot lay it out "
                        f"({common.brief(e, 100)}); timm.list_models() names all") from None


def pretrained(name, ckpt=None, flag="--vfm", weights=True, **kwargs):
    """timm model without its classifier, with weights from the hub or the local file `ckpt`, loaded strictly
    (weights=False: random ones). Raises UserError, which names the script's `flag`."""
    if not weights:
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
    if ckpt is None:
        try:
            with common.rank_zero_first():
                return timm.create_model(name, pretrained=True, num_classes=0, **kwargs)
        # what timm and huggingface_hub raise without a network
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"{flag} {name}: its weights cannot be fetched ({type(e).__name__}: "
                            f"{common.brief(e, 100)}); give a local file with {flag}-ckpt") from None
    if not Path(ckpt).is_file():
        raise UserError(f"{flag}-ckpt {ckpt}: no such file")
    in_order = state_in_order(empty_model(name), ckpt)
    try:
        # timm's own loading: known foreign names, position embeddings resampled to img_size; strict
        if in_order is None:
            overlay = dict(file=str(ckpt))
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        else:
            model = timm.create_model(name, pretrained=False, **kwargs)
            model.load_state_dict(in_order)
            print(f"{ckpt}: loaded by position: its names are not timm's, its {len(in_order)} shapes are")
        model.reset_classifier(0)
        return model
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        raise UserError(f"{flag}-ckpt {ckpt}: does not fit {name} ({common.brief(e, 200)})") from None


def state_in_order(model, ckpt):
    """A state dict under foreign names whose tensors have the model's count, order and shapes, renamed; else
    None."""
    if str(ckpt).endswith(".safetensors"):
        return None
    theirs, ours = load_checkpoint(ckpt), model.state_dict()
    if not isinstance(theirs, dict):
        raise UserError(f"{ckpt}: holds a {type(theirs).__name__}, expected a dictionary of weights")
    shapes = [tuple(getattr(v, "shape", ())) for v in theirs.values()]
    if set(theirs) & set(ours) or shapes != [tuple(v.shape) for v in ours.values()]:
        return None
    return dict(zip(ours, theirs.values()))


# ------------------------------------------------------------------------------------------------------------
# --cache-vfm: the tokens of each crop on disk, so that no step computes them


def describe_cache(vfm, count):
    """What a cache of `count` crops holds, in words."""
    size = 2 * count * vfm.grid ** 2 * vfm.dim / 2 ** 30
    return f"{count} crops x {vfm.grid ** 2} tokens x {vfm.dim} in float16, {size:.2f} GiB of disk"


def cache_tokens(folder, vfm, weights, images, run):
    """Compute what is missing in the folder -> tokens (len(images), grid*grid, dim), float16, a memory map.

    Row i < N is image i; of a folder with flips row N + i is its mirror image. folder: tokens.npy, done.npy
    (which rows are there; a stopped run goes on) and meta.json. weights: the VFM's hash before it was cast;
    images are known by name and size of the file. Raises UserError for a folder of other tokens, and for a
    disk that is too small.
    """
    folder, shape = Path(folder), (len(images), vfm.grid ** 2, vfm.dim)
    files = {folder / "tokens.npy": (np.float16, shape), folder / "done.npy": (np.uint8, shape[:1])}
    mark, settings = folder / "meta.json", None
    if run.rank == 0:
        settings = dict(vfm=vfm.name, weights=weights, layer=vfm.layer, input=vfm.size, crop=images.size,
                        precision=run.args.precision, shape=list(shape), files=images.hash)
        found = common.read_json(mark) if mark.exists() else settings
        for key in settings:
            if found.get(key) != settings[key]:
                raise UserError(f"--cache-vfm {folder} holds tokens with {key} {found.get(key)}, this run "
                                f"needs {settings[key]}; choose another folder or delete it")
    if mark.exists() and is_complete(files):
        store = common.RowFiles(*files, mode="r")  # several runs may read it
    else:
        store = common.open_rows(f"--cache-vfm {folder}", mark, folder / ".lock", settings, files, run.rank,
                                 flag="--cache-vfm")
    if run.rank == 0:
        missing = int((store.done == 0).sum())
        print(f"--cache-vfm {folder}: {describe_cache(vfm, shape[0])}; {missing} crops to go")
    chunks = common.chunks(store.missing(run.rank, run.world), run.args.micro_batch or 64)
    bar = tqdm(data.load_batches(images, chunks, run.args.workers, replace=True), "tokens", len(chunks),
               disable=run.rank > 0 or None)
    for pixels, _, rows in bar:
        x = data.to_float(pixels.to(run.device)).contiguous(memory_format=torch.channels_last)
        with common.autocast(run.device, run.args.precision):
            tokens = vfm(x).half().cpu()
        if not tokens.isfinite().all():
            file = images.files[rows[0] % len(images.files)]
            raise UserError(f"--cache-vfm: tokens of {file} and its batch exceed float16 or are not finite")
        store.put(rows, tokens.numpy())
    if chunks:
        store.flush()
    common.barrier()
    common.release(store.lock)  # others may read it now
    return store.arrays[0]


def is_complete(files):
    """Whether all rows of a cache are there."""
    with contextlib.suppress(FileNotFoundError, *common.BROKEN):
        arrays = [np.load(f, mmap_mode="r", allow_pickle=False) for f in files]
        return [a.shape for a in arrays] == [shape for _, shape in files.values()] and bool(arrays[-1].all())
    return False
