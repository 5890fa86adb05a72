"""Slow tests: train_vae."""
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    LITE0, ONE_STEP, VFM, assert_refused, call, do, metrics)

import common
import data
import mapper
import sit
import train_vae


def test_normalised_tokens(small, tmp_path):
    """--vfm-normalise measures over other axes or images, is left out of the loss, or depends on the
    cache."""
    folder, args = data.ImageFolder(small / "images", 32), SimpleNamespace(precision="fp32")
    cpu = SimpleNamespace(device=torch.device("cpu"), args=args)
    vfm = mapper.VFM("tf_efficientnet_lite0", 32, 8, LITE0)
    known = vfm(data.to_float(torch.stack([folder[i][0] for i in range(40)])))
    mean, std = train_vae.token_statistics(vfm, None, folder, cpu)
    torch.testing.assert_close(mean, known.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, known.flatten(0, 1).std(0), rtol=1e-3, atol=1e-5)
    spatial = train_vae.spatial_normalise(known)
    assert spatial.mean(1).abs().max() < 1e-3 and (spatial.std(1) - 1).abs().median() < 1e-3
    command, losses = ("train_vae", "--data", small / "images", *ONE_STEP, *VFM), {}
    for kind in ("none", "channel", "spatial"):
        flag = () if kind == "none" else ("--vfm-normalise", kind)
        for cache in ((), ("--cache-vfm", tmp_path / "tokens")):
            out = tmp_path / f"{kind}{len(cache)}"
            do(*command, *flag, *cache, "--out", out)
            losses[out.name] = metrics(out)[1][0]["align"]
        assert losses[f"{kind}0"] == pytest.approx(losses[f"{kind}2"], abs=1e-3)
    assert min(abs(losses[a] - losses[b]) for a, b in
               (("none0", "channel0"), ("none0", "spatial0"), ("channel0", "spatial0"))) > 1e-4


def test_levels_of_noise(small, tmp_path):
    """--noise draws other levels than it says."""
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert train_vae.noise_levels(u, 0) is None and train_vae.noise_levels(u, 1) is u
    assert (train_vae.noise_levels(u, 0.25) == 0.25).all()
    times = 1 - sit.draw_time(u, torch.randn(100_000), "lognormal")  # z_t = (1 - a) eps + a z; x_t: t eps
    levels = train_vae.noise_levels(u, "lognormal")
    at = torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98])
    torch.testing.assert_close(levels.quantile(at), times.quantile(at), atol=0.01, rtol=0)
    command, losses = ("train_vae", "--data", small / "images", *ONE_STEP, *VFM), set()
    for noise in ("0", "1", "0.5", "lognormal"):
        do(*command, "--noise", noise, "--out", tmp_path / noise)
        losses.add(metrics(tmp_path / noise)[1][0]["align"])
    assert len(losses) == 4
    assert_refused(call(*command, "--noise", "2", "--out", tmp_path / "x"), "--noise", "0 to 1, or lognormal")


def test_weight_by_ratio(small, tmp_path):
    """--align-ratio leaves Send-VAE's weight as it is, or its measurement leaves traces in the statistics."""
    command, runs = ("train_vae", "--data", small / "images", *ONE_STEP, *VFM), {}
    for ratio in (0, 1):
        do(*command, "--align-ratio", ratio, "--lambda-align", 1, "--out", tmp_path / f"{ratio}")
        runs[ratio] = metrics(tmp_path / f"{ratio}")[1][0]
    ratio = runs[1]["align_ratio"]
    assert "align_ratio" not in runs[0] and ratio > 0 and abs(ratio - 1) > 0.01
    do(*command, "--lambda-align", ratio, "--out", tmp_path / "same")  # the weight by hand
    by_hand, by_ratio = (common.load_checkpoint(tmp_path / f"{n}/vae.pt") for n in ("same", "1"))
    for name in ("grad_mean", "grad_scale", "mean"):
        torch.testing.assert_close(by_ratio["latent_stats"][name], by_hand["latent_stats"][name], rtol=1e-3,
                                   atol=1e-9)
    assert_refused(call(*command, "--align", "none", "--align-ratio", 1, "--out", tmp_path / "x"),
                   "--align-ratio")


def test_a_run_from_before_a_flag(small, tmp_path):
    """A run that was begun before a flag existed cannot go on, or goes on although the flag now says
    something else."""
    command = ("train_vae", "--data", small / "images", *ONE_STEP, *VFM, "--out", tmp_path)
    do(*command)
    checkpoint = common.load_checkpoint(tmp_path / "vae.pt")
    for flag in ("vfm_normalise", "align_ratio"):
        del checkpoint["args"][flag]
    common.save_checkpoint(tmp_path / "vae.pt", checkpoint)
    for flag in (("--vfm-normalise", "spatial"), ("--align-ratio", 1)):
        assert_refused(call(*command, "--steps", 2, *flag), flag[0], "to go on")
    do(*command, "--steps", 2)
    assert common.load_checkpoint(tmp_path / "vae.pt")["step"] == 2


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
