from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# The paper's recipe at tiny scale

@pytest.fixture(scope="session")
def imagenet(small, tmp_path_factory):
    """A folder like ImageNet of 24 images, and a VAE under every name that run.sh starts from: (folder, environment of run.sh)."""
    out = tmp_path_factory.mktemp("imagenet")
    write_images(out / "data/train", 16), write_images(out / "data/val", 4)
    (out / "weights").mkdir()
    for name in ("vavae", "e2e-vavae", "sdvae", "f16d16", "f16d32", "f16d64"):
        shutil.copy(small / "vae/vae.pt", out / f"weights/{name}.pt")
    do("fid", "score", out / "data/val", out / "data/val", "--resolution", 32, "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32, "--save-stats", out / "weights/adm-256.npz")
    shutil.copy(out / "weights/adm-256.npz", out / "weights/adm-512.npz")
    vfm = shlex.join(map(str, VFM))
    flags = dict(VAE_FLAGS=f"--resolution 32 --steps 2 --batch 4 --lpips 0 --mapper-width 16 --mapper-mlp 16 {vfm}", ENCODE_FLAGS="--resolution 32",
                 SIT_FLAGS=f"--model SiT-demo/2 --steps 2 --batch 4 {vfm}", SAMPLE_FLAGS="--images 5 --steps 2 --micro-batch 5", RECON_FLAGS=f"--resolution 32 --net tf_efficientnet_lite0 --net-ckpt {LITE0} --net-size 32 --lpips 0",
                 SCORE_FLAGS=f"--resolution 32 --net tf_efficientnet_lite0 --net-ckpt {LITE0} --net-size 32")
    return out / "data", dict(INIT=str(out / "weights"), OUT=str(out / "out"), **flags)


def recipe(imagenet, *words, **changes):
    """bash run.sh imagenet DIR WORDS -> its output; nothing is installed."""
    folder, env = imagenet
    environment = {**os.environ, **env, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **changes}
    done = subprocess.run(["bash", "run.sh", "imagenet", str(folder), *words], capture_output=True, text=True, cwd=HERE, env=environment, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_recipe_is_the_papers(imagenet):
    """A line of the recipe has other settings than the paper, or an experiment of Tables 1 to 6 is missing."""
    plain = dict.fromkeys([k for k in imagenet[1] if k.endswith("FLAGS")], "")
    lines = recipe(imagenet, "main", SHOW="1", **plain).splitlines()
    for words in ("train_vae.py --resolution 256 | --batch 1024 | --steps 100000 | --lr 3e-4 | --align send | --vfm vit_base_patch14_dinov2.lvd142m",
                  "train_vae.py --resolution 256 | --batch 1024 | --steps 100000 | --lr 3e-4 | --align none", "vae.py | --flip | --resolution 256",
                  "train_sit.py | --model SiT-XL/1 | --repa 0.5 | --batch 256 | --steps 400000", "sample.py | --images 50000 | --sampler sde | --steps 250",
                  "sample.py | --images 50000 | --cfg 2.5 --interval 0 0.75", "fid.py score | adm-256.npz", "fid.py recon | --resolution 256"):
        words = words.replace("train_vae.py ", "train_vae.py | ").split(" | ")
        assert any(all(f" {w} " in line.replace("/adm", " adm") for w in words) for line in lines), words
    everything = recipe(imagenet, "all", SHOW="1", **plain).splitlines()
    arms = {line.split("--out ")[1].split("/")[-1].strip(): line for line in everything if "train_vae.py" in line}
    assert {"control-vavae", "send-vavae", "vavae-vavae", "control-sdvae", "send-sdvae", "control-sdvae-512", "send-sdvae-512"} <= set(arms)
    assert {f"send-vavae-depth{d}-clean" for d in (0, 1, 2)} | {f"{a}-f16d{d}" for a in ("send", "control") for d in (16, 32, 64)} <= set(arms)
    assert sum("--vfm" in line and line.split("--vfm ")[1].split()[0] in vfm_table() for line in arms.values() if "send-vavae" in line) >= 6
    depths = [train_vae_args(line) for line in recipe(imagenet, "table2", SHOW="1", **plain).splitlines() if "train_vae.py" in line and "--align send" in line]
    assert [(a.mapper_depth, a.noise) for a in depths] == [(0, 0), (1, 0), (2, 0)]
    assert "--resolution 512" in arms["send-sdvae-512"] and "--noise 0 " in arms["send-vavae-depth1-clean"] + " "
    assert sum("/base-" in line and "vae.py --vae" in line and "sample" not in line for line in everything) >= 7
    defaults = {line: train_vae_args(line) for line in arms.values()}
    for args in defaults.values():
        assert (args.rec, args.lpips, args.gan, args.gan_start, args.kl, args.clip) == ("l1", 1, 0.1, 0, 1e-6, 1)
        assert args.lambda_align == {"send": 1, "vavae": 0.1, "none": 0}[args.align]


def train_vae_args(line):
    argv, sys.argv = sys.argv, shlex.split(line)[1:]
    try:
        return train_vae.parse_args()
    finally:
        sys.argv = argv


def test_every_line_of_the_recipe_runs(imagenet):
    """A command of the recipe is mistyped, or what one writes the next cannot read. Of arms that differ in names alone, once the tiny
    settings stand in for theirs, one is run."""
    out, arms = Path(imagenet[1]["OUT"]), {}
    lines = list(dict.fromkeys(recipe(imagenet, "all", SHOW="1").splitlines()))
    for line in lines:
        arms.setdefault(re.search(f"{out}/([^/ ]+)", line)[1], []).append(line)
    assert len(lines) > 150 and len(arms) >= 25

    def meant(line, arm):
        words = [re.sub(r"weights/(adm)?[\w.-]+", r"\1VAE", w.replace(f"/{arm}/", "/ARM/")) for w in shlex.split(line) if not w.endswith(f"/{arm}")]
        flags = {}
        for word in words[1:]:  # of a flag given twice the second counts
            if word.startswith("--"):
                flags[word] = values = []
            elif flags:
                values.append(word)
        flags.pop("--micro-batch", None)
        return repr(([w for w in words if not w.startswith("--")][:3], sorted(flags.items())))

    kinds = {tuple(meant(line, arm) for line in of): arm for arm, of in reversed(arms.items())}
    kept = {*kinds.values(), "send-vavae", "send-vavae-depth2-clean", "control-vavae"}
    assert 6 <= len(kinds) < 20, kinds
    for line in (line for arm in arms if arm in kept for line in arms[arm]):
        python, script, *args = shlex.split(line)
        do(script.removesuffix(".py"), *args)
    scores = {p.parent.parent.name for p in out.glob("*/SiT-*/samples.npz.json")}
    assert len(scores) == len(list(out.glob("*/recon.json"))) == len(list(out.iterdir())) == len(kept)
    assert (out / "send-vavae/SiT-XL-1/samples-cfg.npz").exists() and (out / "send-vavae/SiT-B-1/samples.npz").exists()
    assert metrics(out / "send-vavae-depth2-clean")[0]["mapper_depth"] == 2 and metrics(out / "control-vavae")[0]["align"] == "none"


def test_recipe_is_resumable(imagenet, tmp_path):
    """`bash run.sh imagenet` does not run as such, or does again what is done."""
    celeba, _, _ = attribute_folders(tmp_path / "sets")
    probed = dict(OUT=str(tmp_path), PROBE=str(celeba), PROBE_FLAGS="--resolution 32")
    recipe(imagenet, "rival", **probed)
    (row,) = probe.read_run(tmp_path / "vavae-vavae")
    assert {"psnr", "fd", "probe_f1", "probe_kde_gini"} <= row.keys() and row["measure"].endswith("of SiT-B-1")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.is_file()}
    assert len(before) > 12
    assert "already" in recipe(imagenet, "rival", **probed)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.is_file()} == before
    done = subprocess.run(["bash", "run.sh", "imagenet", str(imagenet[0])], capture_output=True, text=True, cwd=HERE, env={**os.environ, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix})
    assert done.returncode == 2 and "weights/vavae.pt" in done.stderr
    for words in (["nothing"], ["imagenet"], ["imagenet", str(tmp_path)], ["imagenet", str(imagenet[0]), "table7"]):
        done = subprocess.run(["bash", "run.sh", *words], capture_output=True, text=True, cwd=HERE)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("size", [256, 512])
def test_both_resolutions(size, tmp_path):
    """256 or 512 pixels do not go through all stages with a patch-14 VFM: token grids, input size, or the latent's size."""
    images = write_images(tmp_path / "images", 4, size=size)
    torch.save(timm.create_model("vit_small_patch14_dinov2.lvd142m").state_dict(), tmp_path / "dino.pth")
    torch.manual_seed(0)
    narrow = vae.AutoencoderKL(**{**vae.VAE_CONFIGS["f16d32"], "ch": 8, "num_res_blocks": 1})
    torch.save({"config": narrow.config, "vae": {}, "ema": narrow.state_dict()}, tmp_path / "init.pt")
    dino, grid = ("--vfm", "vit_small_patch14_dinov2.lvd142m", "--vfm-ckpt", tmp_path / "dino.pth"), size // 16
    out = do("train_vae", "--data", images, "--init", tmp_path / "init.pt", "--resolution", size, "--batch", 1, "--steps", 1, "--lpips", 0, "--gan", 0, *dino, "--out", tmp_path / "vae")
    assert f"at {14 * grid} x {14 * grid}, {grid} x {grid} tokens of 384" in out
    config = vae.load_vae(tmp_path / "vae/vae.pt").config
    assert (config["resolution"], config["attn_resolutions"]) == (size, (grid,))
    do("vae", "--vae", tmp_path / "vae/vae.pt", "--data", images, "--flip", "--out", tmp_path / "latents")  # the crop is the checkpoint's
    assert data.load_latents(tmp_path / "latents").moments.shape == (4, 2, 64, grid, grid)
    do("train_sit", "--latents", tmp_path / "latents", "--data", images, "--model", "SiT-demo/1", "--batch", 1, "--steps", 1, *dino, "--out", tmp_path / "sit")
    do("sample", "--sit", tmp_path / "sit/sit.pt", "--images", 1, "--steps", 2, "--out", tmp_path / "samples.npz")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (1, size, size, 3)


def test_dry_run(small, vgg, tmp_path):
    """--dry-run writes, needs weights, or leaves out a part of the plan."""
    (small / "images/attributes.csv").write_text("file,split,a\n" + "".join(
        f"{f},{s},{int(f[0] == 'a')}\n" for s, f in zip(data.SPLITS * 20, data.find_images(small / "images"))))
    table = {"train_vae": (("--data", small / "images", *SMALL_VAE, "--lpips", 1, "--gan", 0.1, "--out", tmp_path / "o"),
                           ["step 0 of", "VAE 0.61 M", "vit_base_patch14_dinov2.lvd142m", "discriminator 2.77 M", "memory about", "disk"]),
             "vae": (("--vae", small / "vae/vae.pt", "--data", small / "images", "--flip", "--out", tmp_path / "o"), ["40 images", "(40, 2, 8, 8, 8)", "MiB of disk", "GiB of memory"]),
             "train_sit": (("--latents", small / "latents", "--data", small / "images", "--model", "SiT-B/1", "--batch", 8, "--out", tmp_path / "o"),
                           ["SiT-B/1 136.9 M, 64 tokens", "REPA 0.5", "memory about", "disk"]),
             "sample": (("--sit", small / "sit/sit.pt", "--out", tmp_path / "o/a.npz"), ["50000 images of 32 x 32", "NFE 250", "memory about", "disk"]),
             "probe": ((small / "vae/vae.pt", "--data", small / "images", "--json", tmp_path / "a.json"), ["1 attributes", "features 256", "main memory"])}
    for script, (flags, words) in table.items():
        status, out, err = call(script, *flags, "--dry-run")
        assert status == 0 and all(w in out for w in words), (script, out, err)
    plan = call("data", "avatars", tmp_path / "o", "--n", 1000, "--dry-run")
    assert plan[0] == 0 and "1000 images of 64 x 64 in 5 classes" in plan[1] and "2 MiB" in plan[1]
    score = call("fid", "score", small / "images", small / "images", "--net", "vit_base_patch14_dinov2.lvd142m", "--dry-run", "--json", tmp_path / "b.json")
    assert score[0] == 0 and "vit_base_patch14_dinov2.lvd142m@518" in score[1] and "40 images" in score[1]
    recon = call("fid", "recon", "--vae", small / "vae/vae.pt", "--data", small / "images", "--dry-run")
    assert recon[0] == 0 and "40 images of 32 x 32, latent 4 x 8 x 8" in recon[1]
    assert list(tmp_path.iterdir()) == []


def test_peak_bytes():
    """The memory estimate counts weights that were there, forgets what autograd keeps, or never sees memory freed."""
    with torch.device("meta"):
        model, x = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(5))), torch.empty(50, 100)
        one, weight = 4 * 50 * 100, 4 * 100 * 100
        with torch.no_grad():
            assert data.peak_bytes(lambda: model(x)) == 2 * one  # a layer's input and output
        forward = data.peak_bytes(lambda: model(x).sum())
        assert 5 * one <= forward < 5 * one + 100  # every output is kept, for the backward pass or as the result
        whole = data.peak_bytes(lambda: model(x).sum().backward())
        assert 5 * weight <= whole <= 5 * (weight + one) + 4 * one
        q = torch.empty(2, 4, 64, 8, requires_grad=True)
        attention = data.peak_bytes(lambda: F.scaled_dot_product_attention(q, q, q))
        assert attention == 2 * q.numel() * 4  # no 64 x 64 matrix
