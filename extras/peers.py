"""The two training steps as plain code writes them: `python extras/bench.py peers sit|vae` times them beside
ours, and the tests compare the losses."""
import copy
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import data  # noqa: E402
import mapper  # noqa: E402
import sit  # noqa: E402
import train_sit  # noqa: E402
import vae  # noqa: E402
from extras import convert  # noqa: E402

# Flags of our side, before the user's
DEFAULTS = dict(
    sit="--model SiT-B/1 --batch 8 --cache-vfm given --precision bf16 --compile 0".split(),
    vae="--preset f16d32 --batch 2 --lpips 0 --cache-vfm given --precision bf16 --compile 0".split())


class Block(nn.Module):
    """DiT's block as its release writes it, out of timm's parts. x (B, N, dim), c (B, dim) -> like x."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = timm.models.vision_transformer.Attention(dim, num_heads=heads, qkv_bias=True)
        self.mlp = timm.layers.Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(sit.modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(sit.modulate(self.norm2(x), shift2, scale2))


def update(model, ema, optimizer):
    """The end of a step as SiT's and REPA's releases write it."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for a, b in zip(ema.parameters(), model.parameters()):
            a.mul_(0.9999).add_(b.data, alpha=1 - 0.9999)


def sit_step(model, args, precision, compiled=False):
    """A function of (x, y, t, eps), tokens that trains a copy of a SiT, of plain blocks -> its loss. args:
    the flags of train_sit.py."""
    plain, config = copy.deepcopy(model), model.config
    plain.blocks = nn.ModuleList(Block(config["hidden_size"], config["num_heads"]) for _ in model.blocks)
    plain.load_state_dict(model.state_dict())
    ema, optimizer = copy.deepcopy(plain), torch.optim.AdamW(plain.parameters(), args.lr, weight_decay=0)
    loss = torch.compile(train_sit.SiTLoss(plain, args.path), disable=not compiled)

    def step(batch, tokens):
        with common.autocast(tokens.device, precision):
            parts, _ = loss(*batch, tokens)
            total = parts["velocity"] + args.repa * parts["repa"]
        total.backward()
        update(plain, ema, optimizer)
        return total.item()
    return step


def to_diffusers(model):
    """The same autoencoder as diffusers' class, in PyTorch's usual layout."""
    with tempfile.TemporaryDirectory() as folder:
        convert.export_diffusers(model, folder)
        return diffusers.AutoencoderKL.from_pretrained(folder).train()


def vae_step(model, h, discriminator, args):
    """A function of images (B, 3, H, W), the noise of train_vae.read_step and the VFM's tokens that trains
    copies of the VAE, the mapper and PatchGAN, with PyTorch's norms and usual layout -> its loss. args: the
    flags of train_vae.py."""
    device = next(model.parameters()).device
    model, usual = to_diffusers(model).to(device), dict(memory_format=torch.contiguous_format)
    h, disc = copy.deepcopy(h).to(**usual), copy.deepcopy(discriminator).to(**usual)
    for i, m in enumerate(disc.main):
        if isinstance(m, vae.GroupNorm):
            disc.main[i] = nn.GroupNorm(m.num_groups, m.num_channels, eps=m.eps).to(device)
    both, ema = nn.ModuleList([model, h]), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(both.parameters(), args.lr, weight_decay=0)
    disc_optimizer = torch.optim.AdamW(disc.parameters(), args.lr, weight_decay=0)

    def step(x, noise, tokens):
        a, eps, eps_align = noise
        with common.autocast(device, args.precision):
            q = model.encode(x).latent_dist
            z = q.mean.float() + q.std.float() * eps
            x_rec = model.decode(z).sample.float()
            disc.requires_grad_(False)
            mean, var = z.detach().mean((0, 2, 3), True), z.detach().var((0, 2, 3), False, keepdim=True)
            z_t = mapper.add_noise((z - mean) / (var + 1e-4).sqrt(), a=a, eps=eps_align)
            loss = F.l1_loss(x_rec, x) + args.kl * q.kl().float().mean() - args.gan * disc(x_rec).mean()
            loss = loss + args.lambda_align * mapper.align_loss(h(z_t), tokens)
        loss.backward()
        disc.requires_grad_(True)
        with common.autocast(device, args.precision):
            judged = 0.5 * (F.relu(1 - disc(x)).mean() + F.relu(1 + disc(x_rec.detach())).mean())
        judged.backward()
        nn.utils.clip_grad_norm_(disc.parameters(), 1.0)
        disc_optimizer.step()
        disc_optimizer.zero_grad()
        nn.utils.clip_grad_norm_(h.parameters(), 1.0)
        update(model, ema, optimizer)
        return loss.item()
    return step


def race(bench):
    """The protocol of bench.py's peers, as Bench.measure(): with glibc's allocator as it is, then as
    common.setup() sets it."""
    args, modules, device = bench.owner.args, bench.owner.modules, bench.device
    if "model" in modules:
        steps = {f"plain {precision}": sit_step(modules["model"], args, precision)
                 for precision in dict.fromkeys(("fp32", args.precision))}
        steps[f"plain {args.precision} compiled"] = sit_step(modules["model"], args, args.precision, True)
    else:
        networks = (modules[k] for k in ("vae", "mapper", "discriminator"))
        steps = {f"plain {args.precision}": vae_step(*networks, args)}

    def inputs():
        first, second, tokens, _ = bench.batch  # of the step before
        if "model" in modules:
            return [v.to(device) for v in first], tokens.to(device)
        return data.to_float(first.to(device)), [v.to(device) for v in second], tokens.to(device)

    for name, step in steps.items():
        bench.rivals[name] = lambda step=step: step(*inputs())
    bench.record = {}
    for memory in ("allocator as it is", "memory kept"):
        if memory == "memory kept":
            bench.keep_memory(device)
        seconds = yield from bench.race()
        ms = {k: 1e3 * float(np.median(v)) for k, v in seconds.items()}
        ours = ms.pop("step")
        bench.record[f"ms, {memory}"] = {f"ours {args.precision}": ours, **ms}
        bench.record[f"images/s of ours to plain, {memory}"] = {k: v / ours for k, v in ms.items()}
