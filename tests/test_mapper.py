"""Slow tests: mapper."""
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    HERE, SMALL_SIT, SMALL_VAE, VFM, assert_same_losses, do, do_on_ranks, metrics)

import data
import mapper
from common import UserError

# ---------------------------------------------------------------------------------------------------------
# mapper.py: real architectures


# The table of vision foundation models in docs/: name -> (tokens a side at 256, at 512, width, heads of the
# mapper)
def vfm_table():
    rows = {}
    for line in (HERE / "docs/choices.md").read_text().splitlines():
        cells = [c.strip() for c in line.strip("| ").split("|")]
        if len(cells) == 5 and cells[0].startswith("`vit_"):
            for name in cells[0].split(","):
                assert name.strip("` ") not in rows, f"{name} stands in the table twice"
                rows[name.strip("` ")] = tuple(cells[1:])
    return rows


@pytest.mark.parametrize("name", vfm_table())
def test_vfm_table(name):
    """A row of the table gives other tokens, width or heads, or does not exist in timm."""
    at_256, at_512, dim, heads = vfm_table()[name]
    with torch.device("meta"):
        for size, shown in ((256, at_256), (512, at_512)):
            vfm = mapper.VFM(name, size, size // 16, weights=False)
            tokens, grid = vfm(torch.empty(1, 3, size, size)), size // 16
            assert tokens.shape == (1, grid ** 2, int(dim)) and shown == f"{grid} x {grid} (input {vfm.size})"
        h = mapper.Mapper(32, 16, 16, vfm.dim)
    assert (h.config["width"], h.config["heads"]) == (int(dim), int(heads))


FAMILIES = ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m",
            "vit_small_patch16_dinov3.lvd1689m", "vit_base_patch16_clip_224.openai",
            "vit_base_patch16_siglip_224.webli",
            "vit_base_patch16_224.mae"]


@pytest.mark.parametrize("name", FAMILIES)
def test_vfm_families(name, tmp_path):
    """Tokens of a family are not timm's own normed patch tokens: class or register tokens stay, positions are
    not resampled, mean and std are another model's."""
    torch.manual_seed(0)
    peer = timm.create_model(name).eval()
    for p in peer.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    vfm, x = mapper.VFM(name, 64, 5, tmp_path / "w.pth"), torch.rand(2, 3, 64, 64) * 2 - 1
    embed = peer.patch_embed
    assert vfm.size == 5 * embed.patch_size[0] != embed.img_size[0]
    if getattr(peer, "pos_embed", None) is not None:
        prefix = 0 if peer.no_embed_class else peer.num_prefix_tokens
        resampled = timm.layers.resample_abs_pos_embed(peer.pos_embed, [5, 5], num_prefix_tokens=prefix)
        peer.pos_embed = nn.Parameter(resampled)
    embed.img_size, embed.grid_size, embed.strict_img_size = (vfm.size, vfm.size), (5, 5), False
    if hasattr(peer, "rope"):
        peer.rope.update_feat_shape([5, 5])
    mean, std = (torch.tensor(peer.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    x_n = F.interpolate(((x + 1) / 2 - mean) / std, (vfm.size, vfm.size), mode="bicubic")
    with torch.no_grad():
        expected = peer.forward_features(x_n)[:, peer.num_prefix_tokens:]
        torch.testing.assert_close(vfm(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES[:2])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_dinov2_release(name, suffix, tmp_path):
    """The original DINOv2 files do not load, or give other tokens than the same weights under timm's
    names."""
    torch.manual_seed(0)
    peer = timm.create_model(name).eval()
    state = dict(peer.state_dict())
    torch.save(state, tmp_path / "timm.pth")
    state["mask_token"] = torch.zeros(1, 384)
    if "reg_token" in state:  # the release adds a position to the class token, timm stores their sum
        state["register_tokens"] = state.pop("reg_token")
        at_class = torch.randn(1, 1, 384)
        state["cls_token"] = state["cls_token"] - at_class
        state["pos_embed"] = torch.cat([at_class, state["pos_embed"]], 1)
    path, x = tmp_path / f"dinov2_release.{suffix}", torch.rand(1, 3, 64, 64) * 2 - 1
    torch.save(state, path) if suffix == "pth" else safetensors.torch.save_file(state, path)
    ours, timms = (mapper.VFM(name, 64, 4, file)(x) for file in (path, tmp_path / "timm.pth"))
    assert timms.std() > 0.1
    torch.testing.assert_close(ours, timms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gmixer_12_224", "hieradet_small"])
def test_vfm_without_a_grid(name):
    """A network that cannot give the grid ends in a traceback."""
    with pytest.raises(UserError, match=f"--vfm {name}: gives no 4 x 4 tokens"):
        mapper.VFM(name, 64, 4, weights=False)


def test_cache_on_two_processes(small, tmp_path):
    """Two processes write other tokens than one."""
    command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM,
               "--steps", 2)
    do(*command, "--cache-vfm", tmp_path / "tokens1", "--out", tmp_path / "sit1")
    do_on_ranks(*command, "--cache-vfm", tmp_path / "tokens2", "--out", tmp_path / "sit2", folder=tmp_path)
    one, two = (np.load(tmp_path / f"tokens{k}/tokens.npy") for k in (1, 2))
    np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-3)
    assert_same_losses(tmp_path / "sit1", tmp_path / "sit2")


def test_training_with_cached_tokens(small, tmp_path, monkeypatch):
    """--cache-vfm changes the losses, or a step still reads images or runs the VFM."""
    vae_command = ("train_vae", "--data", small / "images", *SMALL_VAE, "--gan", 0, *VFM, "--mapper-mlp", 64,
                   "--steps", 2)
    sit_command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM,
                   "--steps", 2)
    for command, loss in ((vae_command, "align"), (sit_command, "repa")):
        script = command[0]
        for name, more in dict(plain=(), cached=("--cache-vfm", tmp_path / script / "tokens")).items():
            do(*command, *more, "--out", tmp_path / script / name)
        with monkeypatch.context() as m:
            m.setattr(mapper.VFM, "forward", lambda *_: pytest.fail("the VFM was run"))
            if script == "train_sit":
                m.setattr(data, "read_image", lambda *_: pytest.fail("an image was read"))
            do(*command, "--cache-vfm", tmp_path / script / "tokens", "--out", tmp_path / script / "again")
        runs = [[r[loss] for r in metrics(tmp_path / script / k)[1]] for k in ("plain", "cached", "again")]
        assert runs[0] == pytest.approx(runs[1], rel=1e-3) and runs[1] == runs[2]
