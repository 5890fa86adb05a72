from helpers import *  # noqa: F403

from fast_speed import check_record  # noqa: E402

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
    "fid": (("fid", "--images", 50), 32, "network",
            ("share_of_torch_fidelity", "frechet_distance_s", "scipy_sqrtm_s", "precision_recall_s")),
    "probe": (("probe",), 2000, "other axes solver", ())}


@pytest.mark.parametrize("which", BENCHES)
def test_bench_of_every_stage(which, tmp_path):
    """A stage's speed needs data or weights, its parts are others, or its numbers contradict each other."""
    command, images, parts, more = BENCHES[which]
    do("bench", *command, "--steps", 1, "--json", tmp_path / "bench.json")
    check_record(tmp_path / "bench.json", images, parts, more)


@pytest.mark.parametrize("which", ["train_sit", "encode"])
def test_bench_on_two_processes(which, tmp_path):
    """The speed under torchrun fails, or is one process's share."""
    command, images, parts, more = BENCHES[which]
    run("extras/bench", *command, "--steps", 1, "--json", tmp_path / "a.json", ranks=2)
    images *= 2 if which == "encode" else 1  # --micro-batch is of each process, --batch of all
    assert check_record(tmp_path / "a.json", images, parts, more)["processes"] == 2


@pytest.mark.parametrize("flags", [("sit", "--model", "SiT-demo/2"), ("vae", "--resolution", 32)])
def test_peers(flags, tmp_path):
    """Our step and plain code are not timed on the same batch, or plain code does not run."""
    do("bench", "peers", *flags, *LITE, "--batch", 2, "--steps", 1, "--json", tmp_path / "peers.json")
    r = json.loads((tmp_path / "peers.json").read_text())
    plain = {"plain fp32", "plain bf16", "plain bf16 compiled"} if flags[0] == "sit" else {"plain bf16"}
    for memory in ("allocator as it is", "memory kept"):
        ms = r[f"ms, {memory}"]
        ours = ms.pop("ours bf16")
        ratios = {k: v / ours for k, v in ms.items()}
        assert set(ms) == plain and r[f"images/s of ours to plain, {memory}"] == pytest.approx(ratios)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("script", ["train_sit", "train_vae"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_steps(script, small, tmp_path):
    """A compiled step breaks into graphs (an error with fullgraph), compiles anew for a later step or
    micro-batch, or computes something else. The VAE's with GAN, mapper and a ViT as VFM."""
    torch._dynamo.reset()
    if script == "train_sit":
        flags = ("--latents", small / "latents", "--model", "SiT-demo/2", *VFM)
    else:
        torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
        flags = ("--preset", "demo", "--resolution", 32, "--lpips", 0, "--vfm", "deit_tiny_patch16_224",
                 "--vfm-ckpt", tmp_path / "vit.pth", "--grid", 2, "--mapper-mlp", 64)
    for compiled in (0, 1):
        do(script, "--data", small / "images", *flags, "--batch", 6, "--micro-batch", 3, *FP32, "--lr", 1e-4,
           "--steps", 5, "--log-every", 1, "--compile", compiled, "--out", tmp_path / str(compiled))
    (_, eager), (_, found) = (metrics(tmp_path / str(k)) for k in (0, 1))
    assert len(eager) == len(found) == 5
    for a, b in zip(eager, found):
        parts = [k for k in a if k in {"velocity", "repa", "rec", "kl", "gan", "align", "disc"}]
        assert len(parts) >= 2 and [b[k] for k in parts] == pytest.approx([a[k] for k in parts], rel=1e-3)
