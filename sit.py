"""SiT (Ma et al. 2024, arXiv 2401.08740): the transformer, the paths, the velocity and REPA losses, the samplers.

Time runs from t = 1 (noise) to t = 0 (data), here and everywhere:
    x_t = alpha(t) x + sigma(t) eps        linear: alpha = 1 - t, sigma = t        cosine: alpha = cos(pi t / 2), sigma = sin(pi t / 2)
    v(x_t, t) = alpha'(t) x + sigma'(t) eps, which the model predicts; linear: v = eps - x
Parameter names are those of the SiT, REPA and REPA-E releases, whose checkpoints load too. This file needs torch alone.
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
    """Fixed positions of the MAE and DiT code: (grid * grid, dim); first half of the width: column, second: row."""
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
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d) each. On CPUs in bf16, with few tokens, plain products run 1.5 to 3 times faster than
    the fused kernel."""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.shape[-2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x):  # (B, N, dim) -> same
        B, N, dim = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        h = attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.proj(h.transpose(1, 2).reshape(B, N, dim))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the time and label embedding (adaLN-Zero, DiT)."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, heads, qk_norm), Mlp(dim, 4 * dim)
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

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """x (B, c, h, w) normalised latents, t (B,) in [0, 1], y (B,) labels -> velocity (B, c, h, w), float32.

    y = num_classes means no class. z_dim > 0 adds REPA's projector after block `repa_block` (counted from 1); forward
    with features=True then returns (velocity, projection (B, N, z_dim)). With `checkpointing` set, the backward pass computes each
    block anew instead of keeping what is in it: about a third more time, a fraction of the memory.
    """

    checkpointing = False

    def __init__(self, input_size, in_channels, num_classes, depth, hidden_size, num_heads, patch_size, qk_norm=False,
                 z_dim=0, repa_block=8, projector_dim=2048):
        super().__init__()
        self.config = dict(input_size=input_size, in_channels=in_channels, num_classes=num_classes, depth=depth,
                           hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size, qk_norm=qk_norm,
                           z_dim=z_dim, repa_block=repa_block, projector_dim=projector_dim)
        if input_size % patch_size:
            raise ValueError(f"latent of {input_size} x {input_size}: expected a multiple of the patch size {patch_size}")
        self.num_classes, self.patch, self.grid = num_classes, patch_size, input_size // patch_size
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
        """DiT's: Xavier linears, N(0, 0.02) embeddings, zero modulation and output: each block begins as the identity."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for w in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(w, std=0.02)
        for m in [b.adaLN_modulation[1] for b in self.blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, y, features=False):
        h = self.x_embedder(x) + self.pos_embed  # (B, N, d)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, d)
        projection = None
        for i, block in enumerate(self.blocks):
            h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False) if self.checkpointing else block(h, c)
            if features and i + 1 == self.repa_block:
                projection = self.projectors[0](h)
        h = self.final_layer(h, c)  # (B, N, p*p*c)
        B, g, p = len(x), self.grid, self.patch
        v = h.view(B, g, g, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, g * p, g * p).float()
        return (v, projection) if features else v


SIZES = {"XL": dict(depth=28, hidden_size=1152, num_heads=16), "L": dict(depth=24, hidden_size=1024, num_heads=16),
         "B": dict(depth=12, hidden_size=768, num_heads=12), "S": dict(depth=12, hidden_size=384, num_heads=6),
         "demo": dict(depth=6, hidden_size=128, num_heads=2, repa_block=3)}
SIT_MODELS = {f"SiT-{s}/{p}": partial(SiT, patch_size=p, **SIZES[s]) for s in SIZES for p in (1, 2)}


def load_sit(path, weights="ema"):
    """Checkpoint of train_sit.py, REPA, REPA-E or SiT -> (model in evaluation mode, checkpoint). weights: "ema" or "model".

    checkpoint has config, step, path, and what sample.py decodes with: latent_mean, latent_std (c,), vae, vae_hash; of another
    project these four are None where its file does not say. Raises ValueError for a missing or torn file, and for weights
    that do not fit; it names the first such key.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA and SiT keep their settings in one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint")
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error,
            pickle.UnpicklingError) as e:  # torn, flipped or foreign files, code in a pickle
        text = " ".join(str(e).split())
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__}: {text[max(0, text.find('GLOBAL')):][:120]})")
    try:
        if "config" not in checkpoint:
            checkpoint = from_release(checkpoint, path, weights)
        if isinstance(checkpoint.get("vae"), dict):
            raise LookupError("it holds no SiT; a VAE goes to --vae")
        model = SiT(**checkpoint["config"])
        model.load_state_dict(checkpoint[weights])
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not a checkpoint of train_sit.py, REPA, REPA-E or SiT ({type(e).__name__}: {' '.join(str(e).split())[:300]})")
    return model.eval().requires_grad_(False), checkpoint


def from_release(file, path, weights):
    """A file of REPA, REPA-E or SiT -> the entries of our checkpoints. Raises LookupError or ValueError when it is none."""
    state = {k.removeprefix("module."): v.float() for k, v in file.get(weights, file).items()}  # SiT publishes the bare averaged weights
    args = vars(file.get("args", argparse.Namespace()))
    path_type, prediction = (str(args.get(k, default)).lower() for k, default in (("path_type", "linear"), ("prediction", "v")))
    sigma = state["final_layer.linear.weight"].shape[0] == 2 * state["x_embedder.proj.weight"][0].numel()
    if prediction not in ("v", "velocity") or path_type not in (("linear",) if sigma else ("linear", "cosine")):
        raise ValueError(f"prediction {prediction} on the {path_type} path; expected the velocity on a linear (REPA: or cosine) path")
    table, (hidden, channels, patch, _) = state["y_embedder.embedding_table.weight"], state["x_embedder.proj.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    heads = next((s["num_heads"] for s in SIZES.values() if (s["depth"], s["hidden_size"]) == (depth, hidden)), None)
    if heads is None:
        raise ValueError(f"depth {depth} and width {hidden} are those of no SiT-S, B, L or XL")
    positions = state.pop("pos_embed")  # a constant, computed here
    grid = math.isqrt(positions.shape[1])
    if positions.shape != (1, grid * grid, hidden) or not torch.allclose(positions, sincos_2d(hidden, grid), atol=1e-4):
        raise ValueError(f"pos_embed {tuple(positions.shape)} is not the fixed sine-cosine table {(1, grid * grid, hidden)}")
    if sigma:
        state = reverse_time({**state, **without_sigma(state, patch, channels)})
    last = state.get("projectors.0.4.weight")
    config = dict(input_size=grid * patch, in_channels=channels, num_classes=len(table) - 1, depth=depth, hidden_size=hidden, num_heads=heads,
                  patch_size=patch, qk_norm="blocks.0.attn.q_norm.weight" in state, z_dim=0 if last is None else last.shape[0],
                  projector_dim=2048 if last is None else last.shape[1])
    bn = {k: state.pop(f"bn.{k}", None) for k in ("running_mean", "running_var", "num_batches_tracked")}  # REPA-E: the latents' statistics
    known = bn["running_mean"] is not None and bool((bn["running_var"] != 1).any() or (bn["running_mean"] != 0).any())
    return {weights: state, "config": config, "step": file.get("steps"), "path": path_type, "vae_hash": None,
            "vae": str(path) if isinstance(file.get("vae"), dict) else None,  # a joint checkpoint of REPA-E holds its VAE
            "latent_mean": bn["running_mean"] if known else None, "latent_std": bn["running_var"].sqrt() if known else None}


def without_sigma(state, patch, channels):
    """The last layer without the second half of its channels, which learn_sigma adds and SiT never uses."""
    keep = torch.arange(2 * patch * patch * channels).view(-1, 2 * channels)[:, :channels].flatten()  # rows (patch, patch, channel)
    return {k: state[k][keep] for k in ("final_layer.linear.weight", "final_layer.linear.bias")}


def reverse_time(state):
    """SiT's release runs from noise at t = 0 to data at t = 1: v(x, t) = -v_release(x, 1 - t). Exactly the same function, by new
    weights: cos(w - w t) and sin(w - w t) are rotations of cos(w t) and sin(w t), and the last layer changes its sign."""
    w = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    on_cos, on_sin = state["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)  # (d, 128) each
    turned = torch.cat([on_cos * w.cos() + on_sin * w.sin(), on_cos * w.sin() - on_sin * w.cos()], 1).float()
    return {**state, "t_embedder.mlp.0.weight": turned, **{k: -state[k] for k in ("final_layer.linear.weight", "final_layer.linear.bias")}}


# ---------------------------------------------------------------------------------------------------------------------
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
    """u ~ U(0,1) (B,), n ~ N(0,1) (B,) -> t (B,): uniform, or such that sigma(t) / alpha(t) = exp(n) (REPA's "lognormal";
    on the linear path t = sigmoid(n), SD3's logit-normal)."""
    if distribution == "uniform":
        return u
    return torch.sigmoid(n) if path == "linear" else torch.atan(n.exp()) * (2 / math.pi)


def velocity_loss(v, target):
    """(B, c, h, w) twice -> mean squared error of each image (B,)."""
    return (v - target).square().mean((1, 2, 3))


def repa_loss(projection, tokens):
    """REPA (Yu et al. 2024, arXiv 2410.06940): minus the mean cosine similarity of projection and VFM tokens (B, N, D)."""
    return -F.cosine_similarity(projection.float(), tokens.float(), dim=-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Samplers. State in float64, model in float32, as in the SiT and REPA code.

def score_from_velocity(v, x, t, path="linear"):
    """The score of p_t from its velocity (SiT, eq. 9): x, v (B, c, h, w), t a 0-dim tensor in (0, 1]."""
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    ratio = alpha / d_alpha
    return (ratio * v - x) / (sigma ** 2 - ratio * d_sigma * sigma)


def guided_velocity(model, x, t, labels, cfg, interval, guide=None):
    """v_u + cfg (v_c - v_u) on all channels where interval[0] <= t <= interval[1]; elsewhere, and at cfg = 1, v_c alone
    (one evaluation instead of two). v_u is the model's velocity without a class, or (AutoGuidance, Karras et al. 2024,
    arXiv 2406.02507) that of a weaker model `guide` with the class. t: a 0-dim tensor on the CPU, so that no step waits for a GPU."""
    def run(network, x, y):
        return network(x.to(torch.float32), torch.full((len(x),), float(t), device=x.device), y).to(x.dtype)

    if cfg == 1.0 or not interval[0] <= float(t) <= interval[1]:
        return run(model, x, labels)
    if guide is not None:
        v_c, v_u = run(model, x, labels), run(guide, x, labels)
    else:
        nothing = torch.full_like(labels, model.num_classes)
        v_c, v_u = run(model, torch.cat([x, x]), torch.cat([labels, nothing])).chunk(2)
    return v_u + cfg * (v_c - v_u)


@torch.no_grad()
def sample_ode(model, noise, labels, steps, cfg=1.0, interval=(0, 1), method="heun", path="linear", guide=None):
    """Probability-flow ODE from t = 1 to 0 in equal steps: noise (B, c, h, w), labels (B,) -> latents (B, c, h, w) float32.
    Evaluations of the model: `steps` for "euler", 2 steps - 1 for "heun" (whose last step is Euler's)."""
    if method not in ("euler", "heun"):
        raise ValueError(f"ODE method '{method}': expected euler or heun")
    x = noise.to(torch.float64 if noise.device.type != "mps" else torch.float32)
    times = torch.linspace(1, 0, steps + 1, dtype=x.dtype)
    for t, t_next in zip(times[:-1], times[1:]):
        v = guided_velocity(model, x, t, labels, cfg, interval, guide)
        x_next = x + (t_next - t) * v
        if method == "heun" and t_next > 0:
            x_next = x + (t_next - t) * (v + guided_velocity(model, x_next, t_next, labels, cfg, interval, guide)) / 2
        x = x_next
    return x.float()


@torch.no_grad()
def sample_sde(model, noise, labels, steps, cfg=1.0, interval=(0, 1), path="linear", draw=None, guide=None):
    """Reverse SDE with w(t) = 2t by Euler-Maruyama from t = 1 to 0.04 in steps - 1 steps, then one step to 0 without noise
    (REPA's sampler): noise (B, c, h, w), labels (B,) -> latents (B, c, h, w) float32; `steps` evaluations of the model.
    draw(i) gives the normal noise (B, c, h, w) of step i; torch.randn by default."""
    x = noise.to(torch.float64 if noise.device.type != "mps" else torch.float32)
    draw = draw or (lambda i: torch.randn_like(x))
    times = torch.cat([torch.linspace(1, 0.04, steps, dtype=x.dtype), torch.zeros(1, dtype=x.dtype)])
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        v = guided_velocity(model, x, t, labels, cfg, interval, guide)
        w = 2 * t
        drift = v - 0.5 * w * score_from_velocity(v, x, t, path)
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + (w * (t - t_next)).sqrt() * draw(i).to(x)
    return x.float()
