"""Slow tests: the diffs of forks/ apply to the code as it is, and do what they say."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import (
    HERE, ONE_STEP, VFM, assert_same_bits, do, forked, metrics, tiny_vae)

import common


def fork(name, most, folder):
    """A copy of the code with a diff of at most so many changed lines -> a function that runs its scripts."""
    patch = HERE / f"forks/{name}.patch"
    changed = [line for line in patch.read_text().splitlines() if line.startswith(("+", "-"))]
    assert len([line for line in changed if not line.startswith(("+++", "---"))]) <= most
    shutil.copytree(HERE / "extras", folder / "extras")
    for file in HERE.glob("*.py"):
        shutil.copy(file, folder)
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)

    def prepare():  # modules of the copy in the place of those that are loaded
        sys.path.insert(0, str(folder))
        for name, module in [*sys.modules.items()]:
            if Path(getattr(module, "__file__", None) or "").resolve().parent in (HERE, HERE / "extras"):
                del sys.modules[name]

    def run(script, *args):
        status, _, said = forked(script, *args, log=folder / "log", prepare=prepare)
        assert status == 0, said

    return run


def test_gram(small, tmp_path):
    """gram.patch does not apply, its loss is not logged, does not reach the encoder, or is there without its
    flag."""
    run = fork("gram", 14, tmp_path / "copy")
    command = "train_vae", "--data", small / "images", *ONE_STEP, *VFM
    do(*command, "--out", tmp_path / "core")
    run(*command, "--out", tmp_path / "off")
    assert_same_bits(tmp_path / "off/vae.pt", tmp_path / "core/vae.pt")
    assert "gram" not in metrics(tmp_path / "off")[1][0]
    curves = []
    for weight in (1e-9, 100):
        run(*command, "--steps", 20, "--gram", weight, "--out", tmp_path / f"{weight}")
        curves.append([row["gram"] for row in metrics(tmp_path / f"{weight}")[1]])
    assert curves[0][0] == curves[1][0] and curves[1][-1] < 0.5 * min(curves[0][-1], curves[1][0]), curves


def test_fsq(small, tmp_path):
    """fsq.patch does not apply, latents take other values than the levels, or few of them, or the encoder has
    no gradient."""
    run, latents = fork("fsq", 25, tmp_path / "copy"), tmp_path / "latents"
    run("train_vae", "--data", small / "images", *ONE_STEP, "--align", "none", "--levels", 5,
        "--out", tmp_path / "vae")
    run("vae", "--vae", tmp_path / "vae/vae.pt", "--data", small / "images", "--out", latents)
    mean, std = np.split(np.load(latents / "moments.npy"), 2, axis=2)
    assert (std == 0).all() and {-0.5, 0, 0.5} <= {*np.unique(mean)} <= {-1, -0.5, 0, 0.5, 1}
    moved, before = common.load_checkpoint(tmp_path / "vae/vae.pt")["vae"], tiny_vae().state_dict()
    assert (moved["encoder.conv_in.weight"] - before["encoder.conv_in.weight"]).abs().max() > 5e-4


def test_ve(small, tmp_path):
    """ve.patch does not apply, is at work without its flag, or does not let the variance grow."""
    run, latents = fork("ve", 14, tmp_path / "copy"), {}
    command = "train_vae", "--data", small / "images", *ONE_STEP, "--align", "none"
    do(*command, "--out", tmp_path / "core")
    run(*command, "--out", tmp_path / "off")
    assert_same_bits(tmp_path / "off/vae.pt", tmp_path / "core/vae.pt")
    shipped = "--init", HERE / "results/weights/avatars-f4d16.safetensors"  # its deviations are near 0.1
    for weight in (0, 1e-4):
        out = tmp_path / f"{weight}"
        run("train_vae", "--data", small / "images", *shipped, *ONE_STEP[4:], "--align", "none",
            "--steps", 20, "--ve", weight, "--out", out)
        do("vae", "--vae", out / "vae.pt", "--data", small / "images", "--out", out / "latents")
        latents[weight] = np.load(out / "latents/moments.npy")
    assert "ve" in metrics(tmp_path / "0.0001")[1][0] and "ve" not in metrics(tmp_path / "0")[1][0]
    std = {k: np.split(v.astype(float), 2, axis=2)[1].mean() for k, v in latents.items()}
    assert std[1e-4] > 1.1 * std[0], std


def test_modern(small, tmp_path):
    """modern.patch does not apply, its SiT does not learn or sample, or its attention sees where a token is
    and not only how far another lies."""
    run = fork("modern", 40, tmp_path / "copy")
    latents = small / "latents"
    run("train_sit", "--latents", latents, "--model", "SiT-demo/2", "--batch", 8, "--steps", 30, "--lr", 1e-3,
        "--log-every", 5, "--repa", 0, "--out", tmp_path / "sit")
    losses = [row["velocity"] for row in metrics(tmp_path / "sit")[1] if "velocity" in row]
    assert losses[-1] < losses[0]
    run("sample", "--sit", tmp_path / "sit/sit.pt", "--vae", small / "vae/vae.pt", "--images", 4,
        "--steps", 2, "--out", tmp_path / "samples.npz")
    check = """
import sit, torch
angle = sit.axial_angles(6, 16, "cpu").view(6, 6, 8)
q, k = torch.randn(16), torch.randn(16)
at = lambda x, row, column: sit.rotate(x.view(1, 1, 1, 16), angle[row, column][None]).flatten()
near = torch.stack([at(q, r, c) @ at(k, r + 1, c + 2) for r in range(5) for c in range(4)])
assert torch.allclose(near, near[0], atol=1e-4), near
assert abs(at(q, 0, 0) @ at(k, 2, 1) - near[0]) > 1e-3
count = lambda m: sum(p.numel() for p in m.parameters())
assert abs(count(sit.Mlp(128, 512)) / (2 * 128 * 512 + 640) - 1) < 0.05
"""
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path / "copy", check=True)
