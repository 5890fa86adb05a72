"""Slow tests: speed."""
import functools
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import bench  # noqa: E402
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    FP32, VFM, assert_refused, call, do, do_on_ranks, metrics, small_vae, vae_batch)

import common
import mapper
import sit
import train_vae
from extras import peers  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# Speed: every stage of extras/bench.py, two processes, compiled steps

LITE = ("--vfm", "tf_efficientnet_lite0")
TRAIN_VAE = ("train_vae", "--preset", "demo", "--resolution", 32, "--batch", 4, "--lpips", 0, *LITE)
TRAIN_SIT = ("train_sit", "--model", "SiT-demo/2", "--batch", 4, *LITE)
# Name -> (command, images of a step, parts, further keys)
BENCHES = {
    "train_vae": ((*TRAIN_VAE, "--micro-batch", 2, "--mapper-mlp", 64), 4,
                  "data vfm forward backward optimiser discriminator ema", ()),
    "train_vae, LPIPS": ((*TRAIN_VAE, "--lpips", 1, "--gan", 0, "--align", "none"), 4,
                         "data forward backward optimiser ema", ()),
    "train_vae, tokens given": ((*TRAIN_VAE, "--gan", 0, "--cache-vfm", "x"), 4,
                                "data forward backward optimiser ema", ()),
    "train_sit": (TRAIN_SIT, 4, "data vfm forward backward optimiser ema", ()),
    "encode": (("encode", "--vae", "demo", "--micro-batch", 4, "--flip"), 4, "data encode store",
               ("share_of_bare",)),
    "sample": (("sample", "--sit", "SiT-demo/2", "--micro-batch", 2, "--sampler-steps", 3, "--cfg", 1.5,
                "--sampler", "heun"), 2, "other sit decode store", ("share_of_bare",)),
    "fid": (("fid", "--images", 50), 2, "network",
            ("share_of_torch_fidelity", "frechet_distance_s", "scipy_sqrtm_s", "precision_recall_s")),
    "probe": (("probe",), 100, "other axes solver", ())}


@pytest.mark.parametrize("which", BENCHES)
def test_bench_of_every_stage(which, tmp_path, monkeypatch):
    """A stage's speed needs data or weights, its parts are others, or its numbers contradict each other."""
    monkeypatch.setattr(bench, "INCEPTION", (2, 64))
    monkeypatch.setattr(bench, "PROBE", (100, 512, 3))
    command, images, parts, more = BENCHES[which]
    do("bench", *command, "--steps", 1, "--json", tmp_path / "bench.json")
    check_record(tmp_path / "bench.json", images, parts, more)


@pytest.mark.parametrize("which", ["train_sit", "encode"])
def test_bench_on_two_processes(which, tmp_path):
    """The speed on two processes fails, or is one process's share."""
    command, images, parts, more = BENCHES[which]
    do_on_ranks("bench", *command, "--steps", 1, "--json", tmp_path / "a.json", folder=tmp_path)
    images *= 2 if which == "encode" else 1  # --micro-batch is of each process, --batch of all
    assert check_record(tmp_path / "a.json", images, parts, more)["processes"] == 2


@pytest.mark.parametrize("flags", [("sit", "--model", "SiT-demo/2"), ("vae", "--resolution", 32)])
def test_peers(flags, tmp_path, monkeypatch):
    """Our step and plain code are not timed on the same batch, or plain code does not run (without C++)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    do("bench", "peers", *flags, *LITE, *FP32, "--batch", 2, "--steps", 1, "--json", tmp_path / "peers.json")
    r = json.loads((tmp_path / "peers.json").read_text())
    plain = {"plain fp32", "plain fp32 compiled"} if flags[0] == "sit" else {"plain fp32"}
    for memory in ("allocator as it is", "memory kept"):
        ms = r[f"ms, {memory}"]
        ours = ms.pop("ours fp32")
        ratios = {k: v / ours for k, v in ms.items()}
        assert set(ms) == plain and r[f"images/s of ours to plain, {memory}"] == pytest.approx(ratios)


VIT = ("--vfm", "test_vit", "--vfm-ckpt", "vit.pth")


@pytest.mark.parametrize("script,backend,vfm", [
    pytest.param("train_sit", "inductor", (*VIT, "--cache-vfm", "tokens"), marks=pytest.mark.skipif(
        shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")),
    ("train_sit", "aot_eager", VFM), ("train_vae", "aot_eager", VIT)])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_steps(script, backend, vfm, small, tmp_path, monkeypatch):
    """A compiled step breaks into graphs (an error with fullgraph), compiles anew for a later step or
    micro-batch, or computes something else. C++ is compiled for the SiT's loss alone: a VAE's takes minutes,
    and is compiled whole by tests/gpu.py alone, on a GPU. The VAE's with GAN, mapper and a ViT as VFM."""
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.save(timm.create_model("test_vit").state_dict(), "vit.pth")
    if script == "train_sit":
        flags = ("--latents", small / "latents", "--model", "SiT-demo/2")
    else:
        flags = ("--preset", "demo", "--resolution", 32, "--lpips", 0, "--grid", 2, "--mapper-mlp", 64)
    for compiled in (0, 1):
        do(script, "--data", small / "images", *flags, *vfm, *FP32, "--batch", 6, "--micro-batch", 3,
           "--steps", 5, "--lr", 1e-4, "--log-every", 1, "--compile", compiled, "--out",
           tmp_path / str(compiled))
    (_, eager), (_, found) = (metrics(tmp_path / str(k)) for k in (0, 1))
    assert len(eager) == len(found) == 5
    for a, b in zip(eager, found):
        parts = [k for k in a if k in {"velocity", "repa", "rec", "kl", "gan", "align", "disc"}]
        assert len(parts) >= 2 and [b[k] for k in parts] == pytest.approx([a[k] for k in parts], rel=1e-3)


@pytest.mark.parametrize("precision,within", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_plain_vae_step(precision, within):
    """What `bench.py peers vae` times against begins with another loss than ours."""
    model, (x, noise), tokens = small_vae(), vae_batch(0), torch.randn(2, 64, 32)
    h, disc = mapper.Mapper(3, 16, 8, 32, mlp_width=64), train_vae.PatchGAN(norm="group")
    flags = SimpleNamespace(lr=3e-5, kl=1e-6, gan=0.1, lambda_align=1.0, precision=precision)
    x = F.interpolate(x, (32, 32))  # the PatchGAN needs that many pixels
    noise = noise[0], *(F.interpolate(n, (16, 16)) for n in noise[1:])
    expected = peers.vae_step(model, h, disc, flags)(x, noise, tokens)
    weights = dict(rec=1.0, kl=1e-6, gan=0.1, align=1.0)
    loss = train_vae.VAELoss(model, h, weights, "l1", "send")
    stats = train_vae.LatentStats(3, torch.device("cpu"))
    stats.add(model.encode(x).sample(noise[1]).detach())
    stats.update(momentum=1.0)
    parts, _, _ = loss(x, noise, tokens, stats, disc, None)
    assert expected == pytest.approx(sum(weights[k] * v.item() for k, v in parts.items()), rel=within)


def test_flops_by_hand():
    """Attention, a backward pass or a convolution is not counted, also in the CPU's fused kernel."""
    d, n, b = 128, 16, 2
    block, x, c = sit.Block(d, 2, False), torch.randn(b, n, d), torch.randn(b, d)
    forward = 2 * b * n * 12 * d * d + 2 * b * 6 * d * d + 4 * b * n * n * d
    conv, image = nn.Conv2d(3, 8, 3, padding=1), torch.randn(b, 3, 10, 10)

    def backward():
        block(x.requires_grad_(), c.requires_grad_()).sum().backward()

    for work, expected in ((lambda: block(x, c), forward), (backward, 3 * forward),
                          (lambda: conv(image), 2 * b * 100 * 3 * 8 * 9)):
        with bench.flop_counter() as counter:
            work()
        assert counter.get_total_flops() == expected


def test_clock_of_parts():
    """Parts overlap: a part within a part counts twice, or their sum is not the whole time."""
    clock = bench.Bench.__new__(bench.Bench)
    vars(clock).update(device=torch.device("cpu"), on=True, ms=Counter(), part="other", alias=None, parts=1)
    begin = clock.since = time.perf_counter()
    with clock.clock("forward"):
        time.sleep(0.02)
        with clock.clock("vfm"):
            time.sleep(0.05)
    clock.enter("other")
    assert sum(clock.ms.values()) == pytest.approx(1e3 * (time.perf_counter() - begin), abs=5)
    assert clock.ms["vfm"] > 50 and 20 < clock.ms["forward"] < 50


KEYS = {"stage", "machine", "processes", "precision", "command", "images_per_s", "spread", "ms", "step_ms",
        "peak_mib", "flops_per_image", "matmul_rate", "share_of_limit", "made"}


def check_record(file, images, parts, more=()):
    """What extras/bench.py wrote for steps of `images` images does not contradict itself."""
    r = json.loads(Path(file).read_text())
    assert r.keys() == KEYS | set(more)
    assert r["images_per_s"] == pytest.approx(images / r["step_ms"] * 1e3)
    assert r["spread"][0] <= r["images_per_s"] <= r["spread"][1]
    assert r["share_of_limit"] == pytest.approx(r["flops_per_image"] * r["images_per_s"] / r["matmul_rate"])
    assert r["flops_per_image"] > 1e5 and r["peak_mib"] > 100
    assert set(r["ms"]) == set(parts.split())
    assert 0.2 < sum(r["ms"].values()) / r["step_ms"] < 5  # wide: it is no assertion of speed
    return r


def test_bench(tmp_path, monkeypatch):
    """The speed of a stage needs data or weights, changes what a script calls for good, or leaves files."""
    forward, file = torch.Tensor.backward, tmp_path / "new" / "bench.json"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = do("bench", "train_sit", "--model", "SiT-demo/2", "--batch", 4, "--micro-batch", 2, "--vfm",
             "tf_efficientnet_lite0", "--cache-vfm", "given", "--steps", 1, "--json", file)
    r = check_record(file, 4, "data forward backward optimiser ema")
    assert r["stage"] == "train_sit" and r["processes"] == 1 and f"{r['images_per_s']:.4g}" in out
    assert r["command"].startswith("bench.py train_sit --model SiT-demo/2")
    assert torch.Tensor.backward is forward and common.setup.__module__ == "common"
    assert not list(tmp_path.glob("bench-*"))


@pytest.mark.parametrize("command,words", [
    (("train_sit", "--model", "SiT-demo/3"), ("train_sit.py", "--model")),
    (("train_sit", "--model", "SiT-demo/2", "--batch", 4, "--repa", 0, "--cache-vfm", "x"), ("--cache-vfm",)),
    (("encode",), ("required: --vae",)),
    (("encode", "--vae", "nothing.pt"), ("nothing.pt", "no such checkpoint")),
    (("sample", "--sit", "SiT-demo/2", "--dry-run"), ("sample: ended before",)),
    (("peers", "fid"), ("peers fid", "peers sit or peers vae")),
    (("train", "--steps", 1), ("invalid choice", "train_sit")),
    (("probe", "--steps", 0), ("--steps",))])
def test_bad_flags_of_bench(command, words):
    """A mistake in a flag, of bench.py or of the script that it runs, does not end in one line."""
    assert_refused(call("bench", *command), *words)
