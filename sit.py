"""SiT (Ma et al. 2024, arXiv 2401.08740): the transformer, the path, the losses, the samplers.

Time runs from t = 1 (noise) to t = 0 (data), here and everywhere:
    x_t = alpha(t) x + sigma(t) eps
    v(x_t, t) = alpha'(t) x + sigma'(t) eps                           what the model predicts
    linear path: alpha = 1 - t, sigma = t, so that v = eps - x
    cosine path: alpha = cos(pi t / 2), sigma = sin(pi t / 2)
Parameter names are those of the SiT, REPA and REPA-E releases. This file needs torch alone (extras/convert.py
reads the releases' checkpoints).
"""
import argparse
import math
import pickle
import struct
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def modulate(x, shift, scale):  # (B, N, d), (B, d), (B, d)
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_2d(dim, grid):
    """Fixed positions of the MAE and DiT code (grid * grid, dim); first half of dim: column, second: row."""
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], 1).float()  # (grid, dim/2)
    return torch.cat([one.repeat(grid, 1), one.repeat_interleave(grid, 0)], 1)


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x):  # (B, c, h, w) -> (B, N, dim)
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, dim): 256 sinusoids of t, then two linear layers."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t.float()[:, None] * freqs
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


class LabelEmbedder(nn.Module):
    """One row a class, and the last row (index num_classes) for no class: what guidance needs."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d) each. On CPUs in bf16, with few tokens, plain products
    run 1.5 to 3 times faster than the fused kernel."""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.shape[-2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x):  # (B, N, dim) -> same
        B, N, dim = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        h = attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.proj(h.transpose(1, 2).reshape(B, N, dim))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by time and label (adaLN-Zero, DiT)."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads, qk_norm)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):  # (B, N, dim), (B, dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim, patch, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):  # (B, N, dim), (B, dim) -> (B, N, p*p*c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """x (B, c, h, w) normalised latents, t (B,) in [0, 1], y (B,) labels -> velocity (B, c, h, w), float32.

    y = num_classes means no class. z_dim > 0 adds REPA's projector after block `repa_block` (counted from 1);
    forward with features=True then returns (velocity, projection (B, N, z_dim)). With `checkpointing` set,
    the backward pass computes each block anew instead of keeping what is in it: about a third more time, a
    fraction of the memory. Raises ValueError for a latent that the patch size does not divide.
    """

    checkpointing = False

    def __init__(self, input_size, in_channels, num_classes, depth, hidden_size, num_heads, patch_size,
                 qk_norm=False, z_dim=0, repa_block=8, projector_dim=2048):
        super().__init__()
        self.config = dict(input_size=input_size, in_channels=in_channels, num_classes=num_classes,
                           depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size,
                           qk_norm=qk_norm, z_dim=z_dim, repa_block=repa_block, projector_dim=projector_dim)
        if input_size % patch_size:
            raise ValueError(f"latent of {input_size} x {input_size}: no multiple of patch {patch_size}")
        self.num_classes = num_classes
        self.patch = patch_size
        self.grid = input_size // patch_size
        self.repa_block = min(repa_block, depth)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, self.grid).unsqueeze(0), persistent=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        if z_dim:
            self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(),
                                                           nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                                                           nn.Linear(projector_dim, z_dim))])
        self.initialise()

    def initialise(self):
        """DiT's: Xavier, N(0, 0.02) embeddings, zero modulation and output: blocks are the identity."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as a linear layer of the patch
        nn.init.zeros_(self.x_embedder.proj.bias)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in (*self.blocks, self.final_layer):
            nn.init.zeros_(m.adaLN_modulation[1].weight)
            nn.init.zeros_(m.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(self, x, t, y, features=False):
        h = self.x_embedder(x) + self.pos_embed  # (B, N, d)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, d)
        projection = None
        for i, block in enumerate(self.blocks):
            if self.checkpointing:
                h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, c)
            if features and i + 1 == self.repa_block:
                projection = self.projectors[0](h)
        h = self.final_layer(h, c)  # (B, N, p*p*c)
        B, g, p = len(x), self.grid, self.patch
        h = h.view(B, g, g, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B, c, g, p, g, p)
        v = h.reshape(B, -1, g * p, g * p).float()
        return (v, projection) if features else v


SIZES = {"XL": dict(depth=28, hidden_size=1152, num_heads=16),
         "L": dict(depth=24, hidden_size=1024, num_heads=16),
         "B": dict(depth=12, hidden_size=768, num_heads=12),
         "S": dict(depth=12, hidden_size=384, num_heads=6),
         "demo": dict(depth=6, hidden_size=128, num_heads=2, repa_block=3)}
SIT_MODELS = {f"SiT-{s}/{p}": partial(SiT, patch_size=p, **SIZES[s]) for s in SIZES for p in (1, 2)}


# What torch.load raises on torn, flipped or foreign files, and on code in a pickle
UNREADABLE = (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError,
              AssertionError, ArithmeticError, struct.error, pickle.UnpicklingError)


def load_sit(path, weights="ema"):
    """Checkpoint of train_sit.py, REPA, REPA-E or SiT -> (model in evaluation mode, checkpoint).

    weights: "ema" or "model". checkpoint has config, step, path, and what sample.py decodes with:
    latent_mean, latent_std (c,), vae, vae_hash; of another project these four are None where its file does
    not say. Raises ValueError for a missing or torn file, and for weights that do not fit; it names the first
    such key.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # holds the settings of REPA and SiT
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; expected a file in it, as sit.pt") from None
    except UNREADABLE as e:
        text = " ".join(str(e).split())
        text = text[max(0, text.find("GLOBAL")):][:120]
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__}: {text})") from None
    try:
        if "config" not in checkpoint:
            from extras import convert  # here, since other projects' files are no part of the method
            checkpoint = convert.read_sit(checkpoint, path, weights)
        if isinstance(checkpoint.get("vae"), dict):
            raise LookupError("it holds no SiT; a VAE goes to --vae")
        model = SiT(**checkpoint["config"])
        model.load_state_dict(checkpoint[weights])
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, ImportError) as e:
        text = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        raise ValueError(f"{path}: not a checkpoint of train_sit.py, REPA, REPA-E or SiT ({text})") from None
    return model.eval().requires_grad_(False), checkpoint


# ------------------------------------------------------------------------------------------------------------
# Path and losses

def path_coefficients(t, path="linear"):
    """alpha, sigma and their derivatives at t (any shape)."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        a = t * (math.pi / 2)
        return a.cos(), a.sin(), -math.pi / 2 * a.sin(), math.pi / 2 * a.cos()
    raise ValueError(f"path '{path}': expected linear or cosine")


def interpolate(x, eps, t, path="linear"):
    """x, eps (B, c, h, w), t (B,) -> the point x_t and its velocity v, both (B, c, h, w)."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t.view(-1, 1, 1, 1), path)
    return alpha * x + sigma * eps, d_alpha * x + d_sigma * eps


def draw_time(u, n, distribution="uniform", path="linear"):
    """u ~ U(0,1) (B,), n ~ N(0,1) (B,) -> t (B,): uniform, or such that sigma(t) / alpha(t) = exp(n) (REPA's
    "lognormal"; on the linear path t = sigmoid(n), SD3's logit-normal)."""
    if distribution == "uniform":
        return u
    return torch.sigmoid(n) if path == "linear" else torch.atan(n.exp()) * (2 / math.pi)


def velocity_loss(v, target):
    """(B, c, h, w) twice -> mean squared error of each image (B,)."""
    return (v - target).square().mean((1, 2, 3))


def repa_loss(projection, tokens):
    """REPA (Yu et al. 2024, arXiv 2410.06940): minus the mean cosine similarity of projection and VFM tokens,
    both (B, N, D)."""
    return -F.cosine_similarity(projection.float(), tokens.float(), dim=-1).mean()


# ------------------------------------------------------------------------------------------------------------
# Samplers. State in float64, model in float32, as in the SiT and REPA code.

def score_from_velocity(v, x, t, path="linear"):
    """The score of p_t from its velocity (SiT, eq. 9): x, v (B, c, h, w), t a 0-dim tensor in (0, 1]."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    ratio = alpha / d_alpha
    return (ratio * v - x) / (sigma ** 2 - ratio * d_sigma * sigma)


def guided_velocity(model, x, t, labels, cfg, interval, guide=None):
    """v_u + cfg (v_c - v_u) on all channels where interval[0] <= t <= interval[1]; elsewhere, and at cfg = 1,
    v_c alone (one evaluation instead of two). v_u is the model's velocity without a class, or (AutoGuidance,
    Karras et al. 2024, arXiv 2406.02507) that of a weaker model `guide` with the class. t: a 0-dim tensor on
    the CPU, so that no step waits for a GPU."""
    def run(network, x, y):
        time = torch.full((len(x),), float(t), device=x.device)
        return network(x.to(torch.float32), time, y).to(x.dtype)

    if cfg == 1.0 or not interval[0] <= float(t) <= interval[1]:
        return run(model, x, labels)
    if guide is not None:
        v_c = run(model, x, labels)
        v_u = run(guide, x, labels)
    else:
        no_class = torch.full_like(labels, model.num_classes)
        v_c, v_u = run(model, torch.cat([x, x]), torch.cat([labels, no_class])).chunk(2)
    return v_u + cfg * (v_c - v_u)


@torch.no_grad()
def sample_ode(model, noise, labels, steps, cfg=1.0, interval=(0, 1), method="heun", path="linear",
               guide=None):
    """Probability-flow ODE from t = 1 to 0 in equal steps: noise (B, c, h, w), labels (B,) -> latents
    (B, c, h, w) float32. NFE: `steps` for "euler", 2 steps - 1 for "heun" (whose last step is Euler's)."""
    if method not in ("euler", "heun"):
        raise ValueError(f"ODE method '{method}': expected euler or heun")
    x = noise.to(torch.float64 if noise.device.type != "mps" else torch.float32)
    times = torch.linspace(1, 0, steps + 1, dtype=x.dtype)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = guided_velocity(model, x, t, labels, cfg, interval, guide)
        x_next = x + (t_next - t) * v
        if method == "heun" and t_next > 0:
            v_next = guided_velocity(model, x_next, t_next, labels, cfg, interval, guide)
            x_next = x + (t_next - t) * (v + v_next) / 2
        x = x_next
    return x.float()


@torch.no_grad()
def sample_sde(model, noise, labels, steps, cfg=1.0, interval=(0, 1), path="linear", draw=None, guide=None):
    """Reverse SDE with w(t) = 2t by Euler-Maruyama from t = 1 to 0.04 in steps - 1 steps, then one step to 0
    without noise (REPA's sampler): noise (B, c, h, w), labels (B,) -> latents (B, c, h, w) float32. NFE:
    `steps`. draw(i) gives the normal noise (B, c, h, w) of step i; torch.randn by default."""
    x = noise.to(torch.float64 if noise.device.type != "mps" else torch.float32)
    draw = draw or (lambda i: torch.randn_like(x))
    times = torch.cat([torch.linspace(1, 0.04, steps, dtype=x.dtype), torch.zeros(1, dtype=x.dtype)])
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = guided_velocity(model, x, t, labels, cfg, interval, guide)
        w = 2 * t
        drift = v - 0.5 * w * score_from_velocity(v, x, t, path)
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + (w * (t - t_next)).sqrt() * draw(i).to(x)
    return x.float()
