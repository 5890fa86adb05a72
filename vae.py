"""The autoencoder; as a script, stage 2: images -> latent moments on disk.

    python vae.py --vae out/send/vae.pt --data images --out latents --flip            # one process
    torchrun --nproc_per_node=8 vae.py --vae out/send/vae.pt --data images --out latents --flip
    python vae.py --vae out/demo/send/vae.pt --data out/demo/avatars --out out/demo/send/latents --split train   # tiny
    python vae.py --bench 10 --vae f16d32 --micro-batch 8                             # speed, on random data
    python vae.py export-diffusers --vae out/send/vae.pt --out send_diffusers        # a folder for diffusers' AutoencoderKL

The network is the KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752) with the parameter names
of its release, so one class is SD-VAE (f8d4), VA-VAE and IN-VAE (f16d32), and the demo's 64 x 64 model. --vae takes
checkpoints of train_vae.py, LDM, LightningDiT, REPA-E, and diffusers.
"""
import argparse
import json
import os
import re
import statistics
import tempfile
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

# name -> constructor arguments of AutoencoderKL. The factor f is 2 ** (len(ch_mult) - 1), d is z_channels.
VAE_CONFIGS = {
    "f8d4": dict(z_channels=4, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=(), resolution=256),
    "f16d16": dict(z_channels=16, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256),
    "f16d32": dict(z_channels=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256),
    "f16d64": dict(z_channels=64, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256),
    "f4d16": dict(z_channels=16, ch=16, ch_mult=(1, 2, 8), num_res_blocks=1, attn_resolutions=(), resolution=32),
    "f4d32": dict(z_channels=32, ch=16, ch_mult=(1, 2, 8), num_res_blocks=1, attn_resolutions=(), resolution=32),
    "demo": dict(z_channels=4, ch=16, ch_mult=(1, 1, 4), num_res_blocks=1, attn_resolutions=(), resolution=64),
}


class GroupNorm(nn.GroupNorm):
    """LDM's 32 groups; narrow models (below 128 channels) keep 4 channels a group, since a group of one erases its mean."""

    def __init__(self, channels, eps=1e-6):
        super().__init__(min(32, channels // 4), channels, eps=eps)

    def forward(self, x):
        if x.device.type == "cpu":
            return ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class ChannelsLastGroupNorm(torch.autograd.Function):
    """Group norm on the CPU, fast and exact on channels-last tensors. There PyTorch's backward is 5 to 20 times slower than on others
    (and copies into the other layout cost more than the norm), and its variance of one pass loses digits to a large mean, which
    float32 feels."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        B, C = x.shape[:2]
        if x.dtype == torch.bfloat16:
            y, mean, rstd = torch.native_group_norm(x, weight, bias, B, C, x.shape[2] * x.shape[3], groups, eps)
        else:
            centre = x.mean((2, 3))
            y, each = x - centre.view(B, C, 1, 1), centre.view(B, groups, C // groups)  # (B, G, C/G)
            mean = each.mean(2)
            rstd = ((y.square().mean((2, 3)).view(each.shape) + (each - mean[..., None]).square()).mean(2) + eps).rsqrt()
            gain = (weight.view(groups, -1) * rstd[..., None]).to(x.dtype)
            shift = bias.view(groups, -1) + (each - mean[..., None]) * gain
            y = torch.addcmul(shift.view(B, C, 1, 1), y, gain.view(B, C, 1, 1))
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, mean, rstd = ctx.saved_tensors
        (B, C, H, W), G = x.shape, mean.shape[1]
        n, exact = C // G * H * W, torch.promote_types(g.dtype, torch.float32)
        mean, rstd, w = mean.to(exact)[..., None], rstd.to(exact)[..., None], weight.to(exact).view(1, G, -1)  # (B, G, 1), (1, G, C/G)
        near = mean.to(x.dtype)  # what of the mean the dtype can hold goes first, so that a large one costs no digits below
        x, mean = x - near.expand(B, G, C // G).reshape(B, C, 1, 1), mean - near.to(exact)
        db = g.sum((2, 3), dtype=exact).view(B, G, C // G)
        dw = ((g * x).sum((2, 3), dtype=exact).view(B, G, C // G) - db * mean) * rstd  # sum of g times the normalised x
        # dx = w rstd g - rstd / n (sum of w g + normalised x sum of w g normalised x), each sum over a group
        slope = -rstd.square() * (dw * w).sum(2, keepdim=True) / n
        shift = -rstd * (db * w).sum(2, keepdim=True) / n - slope * mean
        gain, slope, shift = (v.expand(B, G, C // G).reshape(B, C, 1, 1).to(g.dtype) for v in (w * rstd, slope, shift))
        dx = torch.addcmul(shift, x, slope).addcmul_(g, gain)
        return dx, dw.sum(0).flatten().to(weight.dtype), db.sum(0).flatten().to(weight.dtype), None, None


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d) each. On CPUs in bf16, with few tokens, plain products run 1.5 to 3 times faster than
    the fused kernel."""
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and v.shape[-2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


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
    """Single-head self-attention over positions; q, k, v, proj_out are 1 x 1 convolutions, as in the LDM release."""

    def __init__(self, c):
        super().__init__()
        self.norm = GroupNorm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):  # (B, c, H, W) -> same
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, HW, c)
        h = attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, c, H, W)
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


def level(c_in, c_out, blocks, attention):
    """One resolution of the encoder or decoder: `blocks` residual blocks, each followed by attention if asked for."""
    m = nn.Module()
    m.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
    m.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
    return m


def run_level(m, h):
    for i, block in enumerate(m.block):
        h = block(h)
        if len(m.attn):
            h = m.attn[i](h)
    return h


def middle(c):
    m = nn.Module()
    m.block_1, m.attn_1, m.block_2 = ResnetBlock(c, c), AttnBlock(c), ResnetBlock(c, c)
    return m


class Encoder(nn.Module):
    def __init__(self, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            m = level(widths[i], widths[i + 1], num_res_blocks, resolution // 2 ** i in attn_resolutions)
            if i < len(ch_mult) - 1:
                m.downsample = Downsample(widths[i + 1])
            self.down.append(m)
        self.mid = middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):  # (B, 3, H, W) -> (B, 2c, H/f, W/f)
        h = self.conv_in(x)
        for m in self.down:
            h = run_level(m, h)
            if hasattr(m, "downsample"):
                h = m.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        widths.append(widths[-1])  # the deepest level is entered at its own width
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()  # up[i] works at resolution / 2**i, so the forward pass runs the list backwards
        for i in range(len(ch_mult)):
            m = level(widths[i + 1], widths[i], num_res_blocks + 1, resolution // 2 ** i in attn_resolutions)
            if i > 0:
                m.upsample = Upsample(widths[i])
            self.up.append(m)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):  # (B, c, h, w) -> (B, 3, f*h, f*w)
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for m in reversed(self.up):
            h = run_level(m, h)
            if hasattr(m, "upsample"):
                h = m.upsample(h)
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
    """x (B, 3, H, W) in [-1, 1] -> encode(x): Posterior of (B, z_channels, H/f, W/f); decode(z) -> (B, 3, H, W).

    Raises UserError for an image size that the factor f = 2 ** (len(ch_mult) - 1) does not divide.
    Source: arXiv 2112.10752, appendix G; names and shapes of the release.
    """

    def __init__(self, z_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        self.config = dict(z_channels=z_channels, ch=ch, ch_mult=tuple(ch_mult), num_res_blocks=num_res_blocks,
                           attn_resolutions=tuple(attn_resolutions), resolution=resolution)
        self.encoder = Encoder(**self.config)
        self.decoder = Decoder(**self.config)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.factor = 2 ** (len(ch_mult) - 1)

    def encode(self, x):
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise UserError(f"image {x.shape[-2]} x {x.shape[-1]}: expected a multiple of {self.factor}")
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30, 20)))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z)).float()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, ours and other projects'

def load_vae(path):
    """Weights of a VAE -> AutoencoderKL in evaluation mode, frozen. Raises UserError, which names the first key that does not fit.

    path: a checkpoint of train_vae.py (its averaged weights); a .ckpt, .pt or .safetensors of LDM, Stable Diffusion,
    LightningDiT (VA-VAE) or REPA-E (VAE alone or joint checkpoint); a diffusers folder or its weights file. Latents are never
    scaled in here (diffusers' scaling_factor is not used): vae.py measures their mean and std.
    """
    path, config = Path(path), None
    if path.is_dir() and not any((path / name).exists() for name in ("config.json", "vae")):
        raise UserError(f"{path}: a folder of train_vae.py; give its file {path / 'vae.pt'}" if (path / "vae.pt").exists() else f"{path}: holds no VAE; expected a checkpoint file, or a folder of diffusers")
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path  # a whole pipeline
        config = diffusers_config(path / "config.json")
        safe = path / "diffusion_pytorch_model.safetensors"
        path = safe if safe.exists() or not safe.with_suffix(".bin").exists() else safe.with_suffix(".bin")
    state = common.load_checkpoint(path)
    if isinstance(state, dict) and "config" in state and isinstance(state.get("vae"), dict):  # ours
        config, state = state["config"], state.get("ema", {})
    elif path.suffix == ".safetensors" and (exported := exported_config(path)):
        config, state = exported, {k: v.float() for k, v in state.items()}
    else:
        state = bare_weights(state)
    try:
        vae = AutoencoderKL(**(config or infer_config(state, path)))
    except (TypeError, RuntimeError, ZeroDivisionError) as e:
        raise UserError(f"{path}: its configuration is no autoencoder's ({e})")
    ours = {diffusers_name(k, len(vae.encoder.down)): k for k in vae.state_dict()}
    common.load_weights(vae, {ours.get(k, k): v for k, v in state.items()}, path)
    return vae.eval().requires_grad_(False)


def export_weights(vae, path, source):
    """The averaged weights alone, in float16, with the constructor's arguments and how `source` was made: the small file that is passed on."""
    state = {k: v.half().contiguous() for k, v in vae.state_dict().items()}
    made = dict(common.made(), source=common.load_checkpoint(source).get("made") if Path(source).suffix == ".pt" else str(source))
    made = re.sub(r"(?<![\w.])/(?:[^\s/\"]+/)+", "", json.dumps(made))  # names of files, without this machine's folders
    safetensors.torch.save_file(state, f"{path}.part", dict(config=json.dumps(vae.config), made=made))
    os.replace(f"{path}.part", path)


def exported_config(path):
    """Constructor arguments in a file of export_weights; None in any other .safetensors. Raises UserError for ones that cannot be read."""
    with safetensors.safe_open(path, "pt") as f:
        text = (f.metadata() or {}).get("config")
    try:
        return text and json.loads(text)
    except ValueError as e:
        raise UserError(f"{path}: its configuration is not readable ({e}); fetch the file again")


def bare_weights(state):
    """The autoencoder's tensors alone, out of what other projects wrap around them; attention weights as 1 x 1 convolutions."""
    for wrapper in ("state_dict", "vae"):  # LDM and LightningDiT; REPA-E's joint checkpoints
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if any(k.startswith("first_stage_model.") for k in state):  # a whole Stable Diffusion checkpoint
        state = {k.removeprefix("first_stage_model."): v for k, v in state.items() if k.startswith("first_stage_model.")}
    # losses with their discriminator, LDM's running average, VA-VAE's VFM and its projection: no part of the autoencoder
    state = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema.", "foundation_model.", "linear_proj."))}
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):  # diffusers before 0.17
        state = {k.replace(f".{old}.", f".{new}."): v for k, v in state.items()}
    return {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in state.items()}


def infer_config(state, path):
    """Constructor arguments from the shapes of a foreign state dict. Each size is what most of its tensors say, so that
    one missing or misshapen tensor is later refused by its own name."""
    def size(pattern, dim):
        shapes = [v.shape for k, v in state.items() if re.fullmatch(pattern, k)]
        if not shapes:
            raise UserError(f"{path}: not a VAE (no tensor {pattern.replace(chr(92), '')}); expected a checkpoint of train_vae.py, LDM, LightningDiT, REPA-E or diffusers")
        return statistics.mode(shape[dim] for shape in shapes)

    block = r"encoder\.down(_blocks)?\.(\d+)\.(block|resnets)\.(\d+)\..*"
    found = [(int(m[2]), int(m[4])) for m in (re.fullmatch(block, k) for k in state) if m]
    levels, blocks = 1 + max([i for i, _ in found], default=0), 1 + max([j for _, j in found], default=0)
    widths = [size(rf"encoder\.down(_blocks)?\.{i}\.(block|resnets)\.\d+\.(norm2|conv1|conv2)\.(weight|bias)", 0) for i in range(levels)]
    attention = {int(m[2]) for m in (re.match(r"encoder\.down(_blocks)?\.(\d+)\.att", k) for k in state) if m}
    z_channels = size(r"(encoder\.conv_out|quant_conv)\.(weight|bias)", 0) // 2
    ch = size(r"encoder\.(conv_in|down(_blocks)?\.0\.(block|resnets)\.0\.norm1)\.(weight|bias)", 0)
    return foreign_config(path, z_channels, ch, widths, blocks, attention)


def diffusers_config(path):
    """config.json of diffusers' AutoencoderKL -> constructor arguments. Raises UserError for what this file cannot build."""
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"holds a {type(config).__name__}")
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a readable configuration of diffusers ({e})")
    widths, z_channels, blocks = (config.get(k, default) for k, default in (("block_out_channels", [64]), ("latent_channels", 4), ("layers_per_block", 1)))
    if not (isinstance(widths, list) and widths and all(isinstance(v, int) and v > 0 for v in (*widths, z_channels, blocks))):
        raise UserError(f"{path}: block_out_channels {widths}, latent_channels {z_channels}, layers_per_block {blocks}; expected a list of counts, and two counts")
    down = config.get("down_block_types") or ["DownEncoderBlock2D"]
    prefix = ["Attn" if kind == "AttnDownEncoderBlock2D" else "" for kind in down]  # the decoder mirrors the encoder
    needed = dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3, act_fn="silu", norm_num_groups=32, use_quant_conv=True,
                  use_post_quant_conv=True, mid_block_add_attention=True, down_block_types=[f"{k}DownEncoderBlock2D" for k in prefix[:len(widths)]],
                  up_block_types=[f"{k}UpDecoderBlock2D" for k in prefix[::-1]])
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise UserError(f"{path}: {key} is {config[key]}, expected {value}; this file builds the autoencoder of latent diffusion alone")
    return foreign_config(path, z_channels, widths[0], widths, blocks, [i for i, k in enumerate(prefix) if k])


def foreign_config(path, z_channels, ch, widths, blocks, attention):
    """Constructor arguments at 256 pixels. Raises UserError for widths whose 32 groups (LDM's) are not those of GroupNorm above."""
    if ch < 128 or any(w % ch for w in widths):
        raise UserError(f"{path}: widths {widths}: expected multiples of the first, and that 128 or more, as in LDM's releases")
    return dict(z_channels=z_channels, ch=ch, ch_mult=[w // ch for w in widths], num_res_blocks=blocks,
                attn_resolutions=[256 // 2 ** i for i in sorted(attention)], resolution=256)


def diffusers_name(name, levels):
    """Our (LDM's) parameter name -> that of diffusers' AutoencoderKL, whose decoder counts its levels from the latent up."""
    name = re.sub(r"up\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
    if "attn" in name:
        for ours, theirs in ((".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")):
            name = name.replace(ours, theirs)
    for ours, theirs in (("mid.attn_1", "mid_block.attentions.0"), ("down.", "down_blocks."), (".block.", ".resnets."), (".attn.", ".attentions."),
                         ("norm_out", "conv_norm_out"), ("nin_shortcut", "conv_shortcut"), (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0.")):
        name = name.replace(ours, theirs)
    return name


def export_diffusers(vae, folder):
    """Write a folder that diffusers' AutoencoderKL.from_pretrained opens. Raises UserError for a model that it cannot express."""
    c, levels = vae.config, len(vae.encoder.down)
    if c["ch"] < 128:
        raise UserError(f"--vae: first width {c['ch']}; diffusers' 32 groups need 128 or more (the demo's small VAE cannot be exported)")
    kinds = ["Attn" if len(m.attn) else "" for m in vae.encoder.down]
    config = dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3, act_fn="silu", norm_num_groups=32,
                  down_block_types=[f"{k}DownEncoderBlock2D" for k in kinds], up_block_types=[f"{k}UpDecoderBlock2D" for k in kinds[::-1]],
                  block_out_channels=[c["ch"] * m for m in c["ch_mult"]], layers_per_block=c["num_res_blocks"],
                  latent_channels=c["z_channels"], sample_size=c["resolution"], scaling_factor=1.0)
    state = {diffusers_name(k, levels): v[:, :, 0, 0] if ".attn" in k and v.ndim == 4 else v for k, v in vae.state_dict().items()}
    if (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} holds a config.json already; choose another --out")
    folder = common.open_out(folder, need_bytes=4 * sum(v.numel() for v in state.values()))
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, folder / "diffusion_pytorch_model.safetensors")
    common.write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    common.write_json(folder / "made.json", dict(vae_hash=common.weights_hash(vae.state_dict())))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: images -> moments.npy, labels.npy, files.txt, stats.npz, meta.json

UNREADABLE = 2  # in done.npy, of an image without moments


def parse_args():
    p = common.Parser(description=__doc__)
    p.add_argument("command", nargs="?", default="encode", choices=("encode", "export", "export-diffusers"), help="encode (default): latents; "
                   "export: the averaged weights alone, a small .safetensors; export-diffusers: the VAE as a diffusers folder (both: --vae and --out only)")
    p.add_argument("--vae", help="checkpoint of train_vae.py, LDM, LightningDiT, REPA-E or diffusers (--bench: or the name of a preset)")
    p.add_argument("--data", help="image folder (encode)")
    p.add_argument("--out", help="folder for the latents, or for diffusers")
    p.add_argument("--split", choices=data.SPLITS, help="only the images that attributes.csv puts there (default: all)")
    p.add_argument("--resolution", type=common.positive, help="crop in pixels (default: the VAE's)")
    p.add_argument("--flip", action="store_true", help="store the mirror image's moments too (F = 2)")
    p.add_argument("--micro-batch", type=common.positive, default=64, help="images per forward pass: memory only")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    p.add_argument("--compile", type=int, default=int(torch.cuda.is_available()), choices=(0, 1))
    p.add_argument("--workers", type=common.natural, default=4 if torch.cuda.is_available() else 0, help="image reading processes")
    p.add_argument("--deterministic", action="store_true", help="equal bits in each run on CUDA too, slower (a CPU needs no flag)")
    p.add_argument("--dry-run", action="store_true", help="print the plan (images, disk, memory), and end")
    data.bench_flags(p)
    args = p.parse_args()
    data.required(p, args, "vae", *(("data",) if args.command == "encode" else ()), "out")
    return args


def encode_memory(vae, size, batch):
    """Estimated bytes at the peak of one forward pass of the encoder in float32, weights included."""
    with torch.device("meta"):
        copy, x = AutoencoderKL(**vae.config), torch.empty(batch, 3, size, size)
    with torch.no_grad():
        return 4 * sum(p.numel() for p in vae.parameters()) + data.peak_bytes(lambda: copy.encode(x))


@torch.no_grad()
def encode_batches(vae, images, rows, flips, args, device, clock):
    """Yield, for each list of rows, those that could be read and a function that gives their moments (B, flips, 2c, h, w) float16."""
    batches = data.ahead(data.load_batches(images, rows, args.workers), device)
    for _ in rows:
        with clock("data"):
            pixels, _, kept = next(batches)
        with clock("encode"):
            x = data.to_float(pixels.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            with common.autocast(device, args.precision):
                q = [vae.encode(x.flip(-1) if f else x) for f in range(flips)]
            arrived = common.to_host(torch.stack([torch.cat([v.mean, v.std], 1).half() for v in q], 1))
        yield kept, arrived


def store_batches(vae, images, rows, store, args, device, clock):
    """Put the moments of each list of rows into `store` (RowFiles), with sums (2, c) of each image over positions and flips: z, E[z^2]."""
    for asked, (kept, arrived) in zip(rows, common.one_behind(encode_batches(vae, images, rows, store.arrays[0].shape[1], args, device, clock))):
        with clock("store"):
            stored = arrived()
            bad = [images.files[row] for row, m in zip(kept, stored) if not m.isfinite().all()]
            if bad:
                raise UserError(f"{args.vae}: moments of {', '.join(bad[:8])} exceed float16 or are not finite")
            mean, std = stored.double().chunk(2, dim=2)
            # z = mean + std eps, so E[z] = E[mean] and E[z^2] = E[mean^2 + std^2]: exact, without sampling
            store.put(kept, stored.numpy(), torch.stack([v.sum((1, 3, 4)) for v in (mean, mean ** 2 + std ** 2)], 1).numpy())
            store.put([row for row in asked if row not in kept], done=UNREADABLE)
        yield


def prepare_encoder(vae, args, device):
    """On the device, as the encoding pass wants it."""
    common.cast_matmuls(vae.to(memory_format=torch.channels_last), device, args.precision)
    if args.compile:
        vae.encoder.compile()


def bench(args, device, world):
    """--bench: the encoding pass on random JPEG files and weights, beside the encoder alone."""
    with tempfile.TemporaryDirectory() as folder:
        vae = AutoencoderKL(**VAE_CONFIGS[args.vae]).eval().requires_grad_(False) if args.vae in VAE_CONFIGS else load_vae(args.vae)
        size, flips, n = args.resolution or vae.config["resolution"], 1 + args.flip, args.micro_batch
        with torch.device("meta"):
            copy, x = AutoencoderKL(**vae.config), torch.empty(1, 3, size, size)
        prepare_encoder(vae, args, device)
        images, clock = data.ImageFolder(data.random_images(folder, 64, size), size), data.Clock(device)
        files = row_files(folder, (64, flips, 2 * vae.config["z_channels"], size // vae.factor, size // vae.factor))
        common.begin_rows(f"{folder}/unfinished.json", {}, files)
        source = store_batches(vae, images, [[j % 64 for j in range(i * n, (i + 1) * n)] for i in range(args.bench + 10)], common.RowFiles(*files), args, device, clock)
        pixels = torch.zeros(n, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

        @torch.no_grad()
        def bare():
            with common.autocast(device, args.precision):
                for _ in range(flips):
                    vae.encode(pixels)

        data.run_bench(args, f"vae.py {args.vae} at {size}, {n} images at a time, flips {flips}", device, lambda: next(source), n * world,
                       flips * data.count_flops(lambda: copy.encode(x)), clock, bare)


def row_files(folder, shape):
    """What is filled in while images are encoded: moments of `shape`, sums of each image for the statistics, which rows are there."""
    return {f"{folder}/moments.npy": (np.float16, shape), f"{folder}/sums.npy": (np.float64, (shape[0], 2, shape[2] // 2)), f"{folder}/done.npy": (np.uint8, shape[:1])}


def drop_rows(path, kept):
    """Write the rows `kept` of the array at `path` to PATH.part: what is left when unreadable images are taken out."""
    whole, part = np.load(path, mmap_mode="r", allow_pickle=False), f"{path}.part"
    try:
        common.new_array(part, whole.dtype, (len(kept), *whole.shape[1:]))
    except OSError:
        Path(part).unlink(missing_ok=True)  # it may fill the disk
        raise
    rows = np.load(part, mmap_mode="r+", allow_pickle=False)
    for i in range(0, len(kept), 1024):
        rows[i:i + 1024] = whole[kept[i:i + 1024]]
    rows.flush()


def tidy(out):
    """Take away what only an unfinished cache needs."""
    data.sweep(out / ".lock", out / "sums.npy", out / "done.npy", out / "unfinished.json")


def already_encoded(out, settings):
    """Whether `out` holds finished latents of these settings. Raises UserError when it holds others; paths may differ."""
    if not (out / "meta.json").exists():
        return False
    found = common.read_json(out / "meta.json")
    different = [k for k in settings if k not in ("vae", "data") and found.get(k, settings[k]) != settings[k]]
    if different == ["files_hash"]:
        raise UserError(f"{out} holds the latents of other images than --data {settings['data']} has now ({found['n'] + found['skipped']} files then; hash of names and sizes {found['files_hash']}, now {settings['files_hash']}): one was added, removed or "
                        "replaced; bring it back, or choose another --out")
    if different:
        raise UserError(f"{out} holds latents with {different[0]} {found.get(different[0])}, this command says "
                        f"{settings[different[0]]}; choose another --out or delete it")
    return True


def finish(out, images, store, settings, seconds):
    """The other files of the cache, once all rows are there; meta.json is the last. -> what it says."""
    n, kept, (moments, sums) = len(images.files), np.flatnonzero(store.done == 1), store.arrays
    if n - len(kept) > data.MAX_BAD * n:  # each process has seen its own part alone
        raise UserError(f"{images.root}: {n - len(kept)} of {n} images are unreadable, more than {data.MAX_BAD:.0%}; mend or delete them, delete {out} and run again")
    shape = [len(kept), *moments.shape[1:]]
    mean, square = sums[kept].sum(0) / (len(kept) * shape[1] * shape[3] * shape[4])
    std = np.sqrt(np.maximum(square - mean ** 2, 0))
    if not std.min() > 1e-6:
        raise UserError(f"{settings['vae']}: latent channel {std.argmin()} is constant (std {std.min():.2g}) over {images.root}; the VAE has collapsed")
    np.save(out / "labels.npy", np.asarray(images.labels, np.int64)[kept])
    np.savez(out / "stats.npz", mean=mean, std=std)
    common.sync(out / "labels.npy"), common.sync(out / "stats.npz")
    common.write_text(out / "files.txt", "".join(images.files[i] + "\n" for i in kept))
    meta = dict(settings, n=len(kept), skipped=n - len(kept), shape=shape, seconds=round(seconds, 1))
    common.write_json(out / "meta.json.part", meta)
    if len(kept) < n:
        drop_rows(out / "moments.npy", kept)
        os.replace(out / "moments.npy.part", out / "moments.npy")  # a kill between this and the next line would encode the images anew
    os.replace(out / "meta.json.part", out / "meta.json")
    common.sync(out)
    return dict(meta, std=std)


def main():
    args = parse_args()
    device, rank, world = common.setup(args.deterministic)
    args.precision = args.precision or common.fast_precision(device)
    begin = time.time()
    if args.bench:
        args.vae = args.vae or "f16d32"
        return bench(args, device, world)
    vae = load_vae(args.vae)
    if args.command == "export-diffusers":
        export_diffusers(vae, args.out)
        return print(f"{args.out}: open it with diffusers.AutoencoderKL.from_pretrained('{args.out}'); its latents are not normalised (scaling_factor 1)")
    if args.command == "export":
        if Path(args.out).suffix != ".safetensors":
            raise UserError(f"--out {args.out}: expected a name that ends in .safetensors")
        common.open_out(Path(args.out).parent)
        export_weights(vae, args.out, args.vae)
        return print(f"{args.out}: {Path(args.out).stat().st_size / 2 ** 20:.1f} MiB")
    c, size = vae.config["z_channels"], args.resolution or vae.config["resolution"]
    if size % vae.factor:
        raise UserError(f"--resolution {size}: expected a multiple of {vae.factor}, the VAE's downsampling factor")
    images = data.ImageFolder(args.data, size, split=args.split)
    data.check_folder(images)
    n, side = len(images.files), size // vae.factor
    shape = (n, 2 if args.flip else 1, 2 * c, side, side)
    if rank == 0:
        flips = "with their mirror images" if args.flip else "without mirror images"
        print(f"{n} images, {len(images.classes)} classes, {flips} -> moments {shape} float16, {2 * np.prod(shape) / 2**20:.0f} MiB of disk; "
              f"{device.type} in {args.precision}, {world} process(es), about {encode_memory(vae, size, args.micro_batch) / 2**30:.1f} GiB of memory each (counted in float32)")
    if args.dry_run:
        return
    settings = dict(vae=args.vae, vae_hash=common.weights_hash(vae.state_dict()), data=args.data, split=args.split, resolution=size, flip=args.flip,
                    precision=args.precision, crop="ADM centre", classes=images.classes)
    out, files = Path(args.out), row_files(args.out, shape)
    if rank == 0:
        settings["files_hash"] = images.hash
    if already_encoded(out, settings):
        if rank == 0:
            tidy(out)
            print(f"{out}: already encoded")
        return
    there = sum(p.stat().st_blocks * 512 for p in map(Path, files) if p.exists())
    common.open_out(out, need_bytes=sum(np.dtype(d).itemsize * int(np.prod(s)) for d, s in files.values()) - there)
    if rank == 0:
        common.claim(out / ".lock")
        if common.begin_rows(out / "unfinished.json", settings, files):
            done = np.load(out / "done.npy", mmap_mode="r+", allow_pickle=False)
            done[done == UNREADABLE] = 0  # they may have been mended
            done.flush()
            print(f"{out}: going on, {np.count_nonzero(done)} of {n} images are there")
    common.barrier()
    store = common.RowFiles(*files)
    prepare_encoder(vae, args, device)
    rows = common.chunks(store.missing(rank, world), args.micro_batch)
    for _ in tqdm(store_batches(vae, images, rows, store, args, device, data.Clock(device)), "encode", len(rows), disable=rank > 0 or None):
        pass
    store.flush()
    common.barrier()
    if rank:
        return
    meta = finish(out, images, store, settings, time.time() - begin)
    tidy(out)
    std, encoded = meta["std"], sum(map(len, rows)) * world
    print(f"{out}: {meta['n']} images, {encoded} of them in {meta['seconds']:.0f} s ({encoded * shape[1] / max(meta['seconds'], 0.1):.0f} images/s), latent std {std.min():.3g} to {std.max():.3g}")


if __name__ == "__main__":
    common.run_script(main)
