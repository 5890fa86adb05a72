"""Slow tests: train_vae."""
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    LITE0, ONE_STEP, VFM, assert_refused, call, do, metrics)

import common
import data
import mapper
import train_vae


def test_standardised_tokens(small, tmp_path):
    """--vfm-standardise measures over other axes or images, is left out of the loss, or depends on the
    cache."""
    folder, args = data.ImageFolder(small / "images", 32), SimpleNamespace(precision="fp32")
    cpu = SimpleNamespace(device=torch.device("cpu"), args=args)
    vfm = mapper.VFM("tf_efficientnet_lite0", 32, 8, LITE0)
    known = vfm(data.to_float(torch.stack([folder[i][0] for i in range(40)])))
    mean, std = train_vae.token_statistics(vfm, None, folder, cpu)
    torch.testing.assert_close(mean, known.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, known.flatten(0, 1).std(0), rtol=1e-3, atol=1e-5)
    command, losses = ("train_vae", "--data", small / "images", *ONE_STEP, *VFM), {}
    standard = ("--vfm-standardise", 1)
    arms = dict(plain=(), standard=standard, cached=(*standard, "--cache-vfm", tmp_path / "tokens"))
    for name, more in arms.items():
        do(*command, *more, "--out", tmp_path / name)
        losses[name] = metrics(tmp_path / name)[1][0]["align"]
    assert losses["standard"] == pytest.approx(losses["cached"], abs=1e-3)
    assert abs(losses["plain"] - losses["standard"]) > 1e-4


def test_a_pretrained_discriminator(small, tmp_path):
    """--disc-ckpt is ignored, or its batch norm is left behind."""
    torch.manual_seed(7)
    torch.save(train_vae.PatchGAN().state_dict(), tmp_path / "disc.pt")
    command = ("train_vae", "--data", small / "images", *ONE_STEP, "--align", "none", "--gan", 0.1, "--lr", 0)
    do(*command, "--disc-ckpt", tmp_path / "disc.pt", "--out", tmp_path / "out")
    found = common.load_checkpoint(tmp_path / "out/vae.pt")["discriminator"]
    given = torch.load(tmp_path / "disc.pt")
    assert all(torch.equal(found[k], given[k]) for k in given if "running" not in k and "tracked" not in k)
    assert found["main.3.num_batches_tracked"] > 0
    assert_refused(call(*command, "--disc-ckpt", tmp_path / "gone.pt", "--out", tmp_path / "x"), "gone.pt")
