"""The speed of every stage, measured from outside: no stage contains a line for it.

    python extras/bench.py train_sit --model SiT-B/1 --batch 8 --steps 5 --json out/speed.json
    python extras/bench.py train_vae --preset f16d32 --batch 2
    python extras/bench.py encode --vae f16d32 --micro-batch 8     # vae.py; a checkpoint will do too
    python extras/bench.py sample --sit SiT-B/1 --micro-batch 4    # a checkpoint will do too
    python extras/bench.py fid                                     # beside torch-fidelity and scipy
    python extras/bench.py probe
    python extras/bench.py peers sit                               # training beside plain code; or: vae
    python extras/bench.py gpu --json out/gpu.json                 # all that speed.md has of one GPU
    torchrun --nproc_per_node=2 extras/bench.py train_sit ...      # the first four

Flags that are not listed below go to the script. Its own main() runs in this process, on random data of the
real shapes and random weights (no download), in a temporary folder, without logs and checkpoints. Three steps
warm up; --steps are timed whole; up to three more by parts, waiting for the GPU at both ends of each; in the
last the operations are counted. "--cache-vfm given": the VFM does not run, its tokens are random.
"""
import contextlib
import functools
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

sys.path.insert(0, str(Path(__file__).parent.parent))
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

# ------------------------------------------------------------------------------------------------------------
# Random data and weights


def random_images(bench, count, size):
    """JPEG files of 2 x 1.5 times `size` pixels (ImageNet's usual 500 x 375 for 256), smooth with a little
    noise, in the run's folder. 64 of them differ, the others are links."""
    rng, shape, folder = np.random.default_rng(0), (2 * size, 3 * size // 2), bench.folder
    if bench.rank:
        return common.barrier()
    for i in range(min(count, 64)):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize(shape, Image.Resampling.BICUBIC))
        noisy = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:06d}.jpg", quality=90)
    for i in range(64, count):
        os.link(folder / f"{i % 64:06d}.jpg", folder / f"{i:06d}.jpg")
    common.barrier()


def random_vae(name):
    return vae.AutoencoderKL(**vae.VAE_CONFIGS[name]).eval().requires_grad_(False)


def vae_of(model):
    """The VAE whose latents a SiT of this name takes (patch 1: f16d32, patch 2: f8d4) -> it, their shape."""
    patch = sit.SIT_MODELS[model].keywords["patch_size"]
    network = random_vae("demo" if "demo" in model else "f16d32" if patch == 1 else "f8d4")
    return network, network.latent_shape(network.config["resolution"])


def random_latents(count, model):
    """What data.load_latents reads."""
    network, (c, *sides) = vae_of(model)
    moments = np.random.default_rng(0).standard_normal((count, 1, 2 * c, *sides), np.float32)
    meta = dict(resolution=network.config["resolution"], split=None, vae="random", vae_hash="random",
                classes=list(range(1000)))
    files = [f"{i:06d}.jpg" for i in range(count)]
    return data.Latents(np.abs(moments).astype(np.float16), np.arange(count) % 1000, files,
                        torch.zeros(c), torch.ones(c), meta)


def random_pair(args):
    """What sample.load_pair reads."""
    network, (c, side, _) = vae_of(args.sit)
    model = sit.SIT_MODELS[args.sit](input_size=side, in_channels=c, num_classes=1000)
    checkpoint = dict(path="linear", step=0, vae_hash="random", latent_mean=torch.zeros(c),
                      latent_std=torch.ones(c))
    return model.eval().requires_grad_(False), checkpoint, network


def random_tokens(_, vfm, weights, images, run):
    """What mapper.cache_tokens reads."""
    shape = len(images), vfm.grid ** 2, vfm.dim
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)


# ------------------------------------------------------------------------------------------------------------
# Measuring


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run, device):
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def matmul_rate(device, precision):
    """FLOP/s of large matmuls in the layout of a linear layer, over all processes: the limit of the machine.
    Median over half a second."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds, end = [], time.perf_counter() + 0.5
    while len(seconds) < 8 or time.perf_counter() < end:
        seconds.append(seconds_of(lambda: a @ b.T, device))
    rate = torch.tensor(2 * n ** 3 / np.median(seconds[3:]), dtype=torch.float64)
    return common.all_reduce(rate).item()


def flop_counter():
    """Counts matmuls, convolutions and attention: 4 N^2 d forward and twice that backward (not what a fused
    kernel computes anew), in the CPU's kernel too. Compiled code must run eagerly to be seen."""
    kernels = {}
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        name = f"_scaled_dot_product_{kind}"
        kernels[getattr(torch.ops.aten, name)] = lambda q, k, v, *_, **__: sdpa_flop(q, k, v)
        backward = getattr(torch.ops.aten, f"{name}_backward")
        kernels[backward] = lambda g, q, k, v, *_, **__: 2 * sdpa_flop(q, k, v)
    return FlopCounterMode(display=False, custom_mapping=kernels)


def machine(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{common.cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def peak_mib(device):
    """Largest memory so far: what PyTorch allocated on a GPU, the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Done(Exception):
    """All steps are measured: leave the script's main()."""


class Bench:
    """A script's main() with a clock around what it calls: parse() its flags, wrap() its parts, say what
    ends_step(), then run()."""

    def __init__(self, args, flags, stack):
        self.args, self.flags, self.stack, self.command = args, flags, stack, common.command()
        self.keep_memory = common.keep_memory
        if args.stage == "peers":
            self.patch(common, "keep_memory", lambda _: None)  # their race begins without
        self.device, self.rank, self.world = found = common.setup("--deterministic" in flags)
        self.patch(common, "setup", lambda *_: found)
        folder = [tempfile.mkdtemp(prefix="bench-") if self.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(folder)
        self.folder = Path(folder[0])
        self.parts = min(3, args.steps)
        self.count = 3 + args.steps + self.parts + 1  # of steps
        self.protocol = self.measure()
        self.on, self.ms, self.part, self.alias = False, Counter(), "other", None
        self.recording, self.calls = False, []  # of the second step, in order to repeat them
        self.rivals = {}  # {name: what is timed in turn with the steps}

    def patch(self, owner, name, value):
        self.stack.enter_context(mock.patch.object(owner, name, value))

    def parse(self, module, *flags):
        """The user's flags and ours -> what the script makes of them."""
        self.patch(sys, "argv", [f"{module.__name__}.py", *self.flags, *map(str, flags)])
        args = module.parse_args()
        self.precision = args.precision or common.fast_precision(self.device)
        return args

    def wrap(self, owner, name, part, bare=False):
        """Clock a function. bare: these calls alone, again, are a rival of the steps."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def clocked(*args, **kwargs):
            if bare and self.recording:
                self.calls.append(functools.partial(original, *args, **kwargs))
            with self.clock(part):
                return original(*args, **kwargs)
        self.patch(owner, name, clocked)

    @contextlib.contextmanager
    def clock(self, part):
        """The time in here counts for `part` (or the alias), and no longer for the part around it."""
        before = self.enter(self.alias or part)
        yield
        self.enter(before)

    def enter(self, part):
        """From now on time counts for `part` -> the one before. Free until the clock is on."""
        before, self.part = self.part, part
        if self.on:
            synchronise(self.device)
            now = time.perf_counter()
            self.ms[before] += 1e3 * (now - self.since) / self.parts
            self.since = now
        return before

    def ends_step(self, owner, name):
        """Each step ends with a call of this method."""
        original = getattr(owner, name)

        def last(*args, **kwargs):
            original(*args, **kwargs)
            self.owner = args[0]  # for peers: the common.Run
            self.end_step()
        self.patch(owner, name, last)

    def end_step(self):
        if next(self.protocol, "end") == "end":
            raise Done

    def run_function(self, run, images):
        """A script that is one function, in float32."""
        def repeat():
            while True:
                run()
                self.end_step()
        self.precision = "fp32"
        self.run(repeat, images)

    def run(self, main, images):
        """main() on the data in our folder; each of its steps takes `images` images."""
        self.images = images
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Done):
            main()
            raise common.UserError(f"{self.args.stage}: ended before {self.count} steps were measured")

    def measure(self):
        """Begins at the end of the first step; at each `yield` the script takes one."""
        rates, self.recording = [matmul_rate(self.device, self.precision)], True
        yield
        self.recording = False
        if self.calls:
            self.rivals["bare"] = self.bare
        seconds = yield from self.race()
        self.on, self.since = True, time.perf_counter()
        for _ in range(self.parts):
            yield
        self.enter("other")
        self.on, peak = False, peak_mib(self.device)
        with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
            yield
        rates.append(matmul_rate(self.device, self.precision))
        low, median, high = np.quantile(seconds.pop("step"), (0.25, 0.5, 0.75)).tolist()
        speed, rate = self.images / median, sum(rates) / 2
        flops = counter.get_total_flops() * self.world // self.images
        self.record = dict(
            stage=self.args.stage, machine=machine(self.device), processes=self.world,
            precision=self.precision, command=self.command, images_per_s=speed,
            spread=[self.images / high, self.images / low], ms=dict(self.ms), step_ms=1e3 * median,
            peak_mib=peak, flops_per_image=flops, matmul_rate=rate, share_of_limit=flops * speed / rate,
            **{f"share_of_{k}": float(np.median(v)) / median for k, v in seconds.items()})

    def bare(self):
        with torch.no_grad(), common.autocast(self.device, self.precision):
            for call in self.calls:
                call()

    def race(self):
        """Rivals and steps in turn -> {name: seconds of each}; "step" is the script's."""
        seconds = defaultdict(list)
        for _ in range(1 + self.args.steps):
            for name, rival in self.rivals.items():
                seconds[name].append(seconds_of(rival, self.device))
            synchronise(self.device)
            begin = time.perf_counter()
            yield
            synchronise(self.device)
            seconds["step"].append(time.perf_counter() - begin)
        return {k: v[1:] for k, v in seconds.items()}


# ------------------------------------------------------------------------------------------------------------
# The stages


def time_training(bench, module):
    """train_sit.py or train_vae.py. What lies between the other parts counts as reading the batch."""
    rare = 10 ** 9
    args = bench.parse(module, "--data", bench.folder, "--out", bench.folder / "out", "--steps",
                       bench.count + 1, "--save-every", rare, "--log-every", rare, "--sample-every", 0,
                       *(("--latents", "random") if module is train_sit else ()))
    images = max(64, args.batch)
    if module is train_sit:
        latents = random_latents(images, args.model)
        size = latents.meta["resolution"]
        bench.patch(data, "load_latents", lambda _: latents)
    else:
        size = args.resolution or train_vae.build_vae(args)[0].config["resolution"]
        bench.patch(module, "build_lpips", lambda _, device, weights: fid.build_lpips(None, device, False))
    random_images(bench, images, size)
    sync_if, update_ema, pretrained = common.sync_if, common.update_ema, mapper.pretrained

    def untrained(name, _, weights, **size):
        return pretrained(name, weights=False, **size)  # --vfm-ckpt is not read

    @contextlib.contextmanager
    def passes(network, last):  # forward and backward
        if isinstance(getattr(network, "module", network), train_vae.DiscriminatorLoss):
            bench.alias = "discriminator"  # until the end of its step
        with bench.clock("forward"), sync_if(network, last):
            yield

    def average(*inputs):
        bench.alias = None
        with bench.clock("ema"):
            update_ema(*inputs)

    bench.patch(common, "sync_if", passes)
    bench.patch(common, "update_ema", average)
    bench.patch(mapper, "pretrained", untrained)
    bench.patch(module, "cache_tokens", random_tokens)
    bench.wrap(mapper.VFM, "__call__", "vfm")
    bench.wrap(torch.Tensor, "backward", "backward")
    bench.wrap(torch.nn.utils, "clip_grad_norm_", "optimiser")
    bench.wrap(torch.optim.AdamW, "step", "optimiser")
    bench.ends_step(common.Run, "after_step")
    bench.part = "data"
    bench.run(module.main, args.batch)


def time_encode(bench):
    args = bench.parse(vae, "--data", bench.folder, "--out", bench.folder / "out")
    if args.vae in vae.VAE_CONFIGS:
        bench.patch(vae, "load_vae", random_vae)
    batch = args.micro_batch * bench.world
    size = args.resolution or vae.load_vae(args.vae).config["resolution"]
    random_images(bench, batch * (bench.count + 1), size)
    bench.wrap(vae.AutoencoderKL, "encode", "encode", bare=True)
    bench.wrap(common.RowFiles, "put", "store")
    bench.ends_step(common.RowFiles, "put")
    bench.part = "data"
    bench.run(vae.main, batch)


def time_sample(bench):
    ours = "--out", bench.folder / "samples.npz", "--steps", bench.args.sampler_steps
    batch = bench.parse(sample, *ours).micro_batch * bench.world
    args = bench.parse(sample, *ours, "--images", batch * (bench.count + 1))
    if args.sit in sit.SIT_MODELS:
        bench.patch(sample, "load_pair", random_pair)
    bench.wrap(sit.SiT, "__call__", "sit", bare=True)
    bench.wrap(vae.AutoencoderKL, "decode", "decode", bare=True)
    bench.wrap(common.RowFiles, "put", "store")
    bench.ends_step(common.RowFiles, "put")
    bench.run(sample.main, batch)


INCEPTION = 32, 2048  # images of 256 x 256 at a time; dimensions of the distances
PROBE = 2000, 8192, 40  # images; numbers of f16d32 at 256; CelebA's attributes


def time_fid(bench):
    """Inception beside torch-fidelity's; then, once each, the Fréchet distance, scipy's sqrtm for it,
    precision and recall."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    bench.stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
    batch, d = INCEPTION
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=bench.device)
    net = fid.FIDInception(weights=False).to(bench.device, memory_format=torch.channels_last)
    torch.save(net.net.state_dict(), bench.folder / "inception.pth")
    peer = FeatureExtractorInceptionV3("peer", ["2048"], str(bench.folder / "inception.pth"))
    peer.to(bench.device)
    bench.rivals["torch_fidelity"] = torch.no_grad()(lambda: peer(images)[0].cpu())
    bench.part = "network"
    bench.run_function(lambda: net(images).cpu(), len(images))
    rng, scale = np.random.default_rng(0), 1 + np.arange(d) / 500
    a, b = (fid.statistics((rng.standard_normal((2 * d, d)) * scale).astype(np.float32)) for _ in range(2))
    features = [torch.randn(bench.args.images, d) for _ in range(2)]
    for name, run in dict(frechet_distance=lambda: fid.frechet_distance(*a, *b),
                          scipy_sqrtm=lambda: scipy.linalg.sqrtm(a[1] @ b[1]),
                          precision_recall=lambda: fid.precision_recall(*features)).items():
        bench.record[f"{name}_s"] = seconds_of(run, bench.device)


def time_probe(bench):
    """Fits of made-up attributes, as many as PROBE says."""
    (n, D, A), generator = PROBE, torch.Generator().manual_seed(0)
    X, W = torch.randn(n, D, generator=generator), torch.randn(D, A, generator=generator)
    Y = (X @ W + D ** 0.5 * torch.randn(n, A, generator=generator) > 0).float()
    bench.wrap(probe, "principal_axes", "axes")
    bench.wrap(torch.optim.LBFGS, "step", "solver")
    cut = 4 * n // 5
    parts = X[:cut], Y[:cut], X[cut:], Y[cut:]
    bench.run_function(lambda: probe.fit_probe(*parts, device=bench.device), n)


def time_peers(bench):
    """Our training step beside plain code (peers.py), in turn, on the same weights and data."""
    from extras import peers
    name, *flags = bench.flags or [""]
    if name not in peers.DEFAULTS:
        raise common.UserError(f"peers {name}: expected peers sit or peers vae")
    module = dict(sit=train_sit, vae=train_vae)[name]
    bench.flags = [*peers.DEFAULTS[name], *flags]
    bench.count = 2 * bench.args.steps + 4
    load = data.load

    def keep(*args):
        for bench.batch in load(*args):
            yield bench.batch

    bench.patch(data, "load", keep)
    bench.protocol = peers.race(bench)
    time_training(bench, module)
    bench.record = dict(stage=f"peers {name}", machine=machine(bench.device), command=bench.command,
                        **bench.record)


# What `gpu` measures, the most important first. The number after --batch or --micro-batch is tried first,
# then its halves until one fits in memory
GPU = ("train_sit --model SiT-XL/1 --cache-vfm given --batch 256",
       "train_vae --preset f16d32 --batch 32",
       "train_sit --model SiT-B/1 --cache-vfm given --batch 1024",
       "peers sit --model SiT-B/1 --compile 1 --batch 256",
       "peers vae --preset f16d32 --compile 1 --batch 16",
       "encode --vae f16d32 --micro-batch 128",
       "sample --sit SiT-XL/1 --sampler sde --sampler-steps 250 --cfg 1.8 --steps 1 --micro-batch 32",
       "fid",
       # the mapper's share of a step, by size: with it and without
       *(f"train_vae --preset f16d32 --resolution {size} --lpips 0 {align} --batch {batch}"
         for size, batch in ((256, 16), (512, 4), (1024, 1))
         for align in ("--cache-vfm given", "--align none")))
PEAK = 989e12  # FLOP/s in bf16 that NVIDIA names for the H100 and the H200 (SXM, dense)


def measure_gpu(file):
    """Every line of GPU in a process of its own; the list of what was found is written after each. Without a
    GPU: a rehearsal of the same lines with the demo's networks."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for line in GPU:
            if not torch.cuda.is_available():
                line = rehearsal(line)
            row = largest_batch(line.split(), Path(folder) / "row.json")
            if re.search("H[12]00", row.get("machine", "")) and row.get("precision") == "bf16":
                row["mfu"] = row["flops_per_image"] * row["images_per_s"] / PEAK
            rows.append(row)
            print(f"\n{line}")
            print_record(row)
            sys.stdout.flush()
            if file:
                common.write_json(file, dict(rows=rows))


def largest_batch(words, path):
    """The record of a bench command with the largest batch that fits; if none does, the error."""
    batch = next((i + 1 for i, word in enumerate(words) if word.endswith("-batch")), None)
    while True:
        done = subprocess.run([sys.executable, __file__, *words, "--json", str(path)], capture_output=True,
                              text=True)
        if done.returncode == 0:
            record = common.read_json(path)
            del record["made"]  # the list says it once
            return record
        no_memory = re.search("out of (GPU )?memory", done.stderr) and batch and int(words[batch]) > 1
        if not no_memory:
            return dict(command=" ".join(words), error=done.stderr[-2000:])
        words[batch] = str(int(words[batch]) // 2)


def rehearsal(line):
    """The same command, small enough for a CPU."""
    if line.startswith("peers vae"):  # diffusers has no VAE as narrow as the demo's
        return re.sub(r"batch \d+", "batch 2", line) + " --resolution 64 --steps 1"
    for name, small in (("SiT-XL/1", "SiT-demo/1"), ("SiT-B/1", "SiT-demo/1"), ("f16d32", "demo"),
                        ("--sampler-steps 250", "--sampler-steps 2")):
        line = line.replace(name, small)
    return re.sub(r"batch \d+", "batch 2", line) + " --steps 1"


def print_record(record):
    for key, value in record.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.4g}" for k, v in value.items())
        elif isinstance(value, list):
            value = " to ".join(f"{v:.4g}" for v in value)
        print(f"{key.replace('_', ' ')}: " + (f"{value:.4g}" if isinstance(value, float) else str(value)))


STAGES = dict(train_sit=functools.partial(time_training, module=train_sit),
              train_vae=functools.partial(time_training, module=train_vae),
              encode=time_encode, sample=time_sample, fid=time_fid, probe=time_probe, peers=time_peers)


def main():
    p = common.Parser(description=__doc__, allow_abbrev=False)
    p.add_argument("stage", choices=(*STAGES, "gpu"))
    p.add_argument("--steps", type=common.positive, default=5, help="steps (batches, fits) that are timed")
    p.add_argument("--json", help="write the numbers here too")
    p.add_argument("--sampler-steps", type=common.positive, default=5, help="sample: --steps of sample.py")
    p.add_argument("--images", type=common.positive, default=10_000, help="fid: of precision and recall")
    args, flags = p.parse_known_args()
    if args.json:
        common.open_file(args.json, "--json")
    if args.stage == "gpu":
        if flags:
            p.error(f"gpu takes --json alone, found {' '.join(flags)}")
        return measure_gpu(args.json)
    with contextlib.ExitStack() as stack:
        bench = Bench(args, flags, stack)
        stack.callback(shutil.rmtree, bench.folder, ignore_errors=True)
        try:
            STAGES[args.stage](bench)
        except ModuleNotFoundError as e:  # a peer
            raise common.UserError(f"no module {e.name}: pip install -r requirements-dev.txt") from None
        common.barrier()
    if bench.rank == 0:
        if args.json:
            common.write_json(args.json, bench.record)
        print_record(bench.record)


if __name__ == "__main__":
    common.run_script(main)
