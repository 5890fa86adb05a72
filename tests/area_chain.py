from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# The scripts: one tiny run of the whole chain, each stage a command of its own

FP32 = ("--precision", "fp32")
TRAIN = ("--split", "train", "--steps", 3, "--batch", 8, "--lr", 1e-3, "--log-every", 1, *FP32)


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


def test_chain_vae(demo, avatars):
    """vae.pt lacks what a consumer or a resume needs, the arms begin apart, or one arm has another VAE or data order."""
    for arm, keys in (("control", set()), ("send", {"mapper"})):
        checkpoint = common.load_checkpoint(demo / arm / "vae.pt")
        assert checkpoint["step"] == 3 and checkpoint["args"]["lambda_align"] == float(arm == "send")
        assert {"config", "vae", "ema", "optimizer"} | keys <= {k for k, v in checkpoint.items() if v is not None}
        assert all(v.dtype == torch.float32 for v in checkpoint["vae"].values())
        assert common.weights_hash(vae.load_vae(demo / arm / "vae.pt").state_dict()) == common.weights_hash(checkpoint["ema"])
        settings, records = metrics(demo / arm)
        assert settings["data"] == str(avatars) and [r["step"] for r in records] == [1, 2, 3]
        assert {"rec", "kl", "grad_norm", "lr", "images_per_s", "seconds"} | ({"align"} if keys else set()) <= records[0].keys()
    (_, control), (_, send) = metrics(demo / "control"), metrics(demo / "send")
    assert control[0]["rec"] == pytest.approx(send[0]["rec"], rel=1e-5) and control[2]["rec"] != send[2]["rec"]


def test_chain_latents(demo, avatars):
    """The latent cache is out of order, of another type, or its statistics are not those of its moments."""
    files = data.ImageFolder(avatars, 64, split="train").files
    for arm, flips in (("control", 1), ("send", 2)):
        latents, model = data.load_latents(demo / arm / "latents"), vae.load_vae(demo / arm / "vae.pt")
        assert latents.moments.shape == (500, flips, 8, 16, 16) and latents.moments.dtype == np.float16
        assert latents.files == files and latents.labels.dtype == np.int64
        assert [latents.meta["classes"][y] for y in latents.labels] == [f.split("/")[0] for f in files]
        assert latents.meta["vae_hash"] == common.weights_hash(model.state_dict()) and latents.meta["resolution"] == 64
        stats = np.load(demo / arm / "latents/stats.npz")
        mean, std = np.split(latents.moments[:].astype(np.float64).swapaxes(0, 2).reshape(8, -1), 2)  # (c, everything else)
        assert stats["mean"].dtype == stats["std"].dtype == np.float64
        np.testing.assert_allclose(stats["mean"], mean.mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats["std"], np.sqrt((mean ** 2 + std ** 2).mean(1) - mean.mean(1) ** 2), rtol=1e-9)
        for row in (0, 137, 499):
            x = data.to_float(data.read_image(avatars / files[row], 64)[None])
            for f in range(flips):
                with torch.no_grad():
                    q = model.encode(x.flip(-1) if f else x)
                moments = torch.from_numpy(latents.moments[row, f]).float()
                torch.testing.assert_close(moments, torch.cat([q.mean, q.std], 1)[0], rtol=2e-3, atol=1e-3)


def test_chain_sit(demo):
    """sit.pt lacks the latents' statistics or their VAE, or REPA is trained where it is off."""
    for arm, repa in (("control", False), ("send", True)):
        model, checkpoint = sit.load_sit(demo / arm / "sit/sit.pt")
        latents = data.load_latents(demo / arm / "latents")
        assert torch.equal(checkpoint["latent_mean"], latents.mean) and torch.equal(checkpoint["latent_std"], latents.std)
        assert checkpoint["vae_hash"] == latents.meta["vae_hash"] and checkpoint["vae"] == str(demo / arm / "vae.pt")
        assert model.config["num_classes"] == 5 and model.config["z_dim"] == (112 if repa else 0)
        records = metrics(demo / arm / "sit")[1]
        assert [r["step"] for r in records] == [1, 2, 3] and all(("repa" in r) == repa for r in records)
        assert records[0]["velocity"] == pytest.approx(2, rel=0.3)  # E |eps - x|^2 of normalised latents, at zero output


def test_chain_samples(demo):
    """Samples are not what evaluators read, the picture shows others, or the arms have other labels."""
    for arm in ("control", "send"):
        z = np.load(demo / arm / "samples.npz")
        assert z.files == ["arr_0", "arr_1"] and z["arr_0"].shape == (40, 64, 64, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].dtype == np.int64 and np.bincount(z["arr_1"]).tolist() == [8] * 5
        assert z["arr_0"].std() > 1 and not np.array_equal(z["arr_0"][0], z["arr_0"][5])
        grid = np.array(Image.open(demo / arm / "samples.png"))
        assert grid.shape == (5 * 64, 8 * 64, 3) and np.array_equal(grid[64:128, 64:128], z["arr_0"][9])
        assert not list((demo / arm).glob("*.part")) and json.loads((demo / arm / "samples.json").read_text())["nfe"] == (5 if arm == "control" else 3)


def test_sampling_is_the_latents_inverse(demo, tmp_path):
    """Samples are denormalised with other statistics than the SiT's, or decoded wrongly: redo one with the library."""
    run("sample", "--sit", demo / "control/sit/sit.pt", "--images", 3, "--sampler", "euler", "--steps", 2, "--seed", 5, "--micro-batch", 2, "--out", tmp_path / "a.npz", *FP32)
    z = np.load(tmp_path / "a.npz")
    model, checkpoint = sit.load_sit(demo / "control/sit/sit.pt")
    noise = data.draw_noise(5, range(3), 0, (4, 16, 16))[1]
    latent = sit.sample_ode(model, noise, torch.from_numpy(z["arr_1"]), 2, method="euler")
    stats = np.load(demo / "control/latents/stats.npz")
    mean, std = (torch.from_numpy(stats[k]).float().view(1, -1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = data.to_uint8(vae.load_vae(demo / "control/vae.pt").decode(latent * std + mean)).permute(0, 2, 3, 1)
    assert np.abs(expected.numpy().astype(int) - z["arr_0"]).max() <= 1


def test_chain_scores(demo, avatars):
    """A score in the report is not the one of its arm, of these images, or of this network."""
    fd, report = (json.loads((demo / name).read_text()) for name in ("send/fd.json", "report.json"))
    net = fid.FeatureNet("tf_efficientnet_lite0", LITE0, 64)
    images = data.ImageFolder(avatars, 64, split="val")
    reference = net(torch.stack([images[i][0] for i in range(50)]))
    assert fd["n_reference"] == 50 and fd["network"] == report["network"] == "tf_efficientnet_lite0@64" and fd["floor"] > 0
    for arm in ("control", "send"):
        results = json.loads((demo / arm / "probe.json").read_text())["results"]
        samples = net(torch.from_numpy(np.load(demo / arm / "samples.npz")["arr_0"]).permute(0, 3, 1, 2))
        expected = fid.frechet_distance(*fid.statistics(reference), *fid.statistics(samples))
        r = report["arms"][arm]
        assert r["fd"] == pytest.approx(expected, rel=1e-3) and r["fd_n"] == 40 and r["fd"] > fd["floor"]
        assert r["probe_f1"] == results[str(demo / arm / "vae.pt")]["f1"]
        model = vae.load_vae(demo / arm / "vae.pt")
        images = data.ImageFolder(avatars, 64, split="test")
        x = torch.stack([images[i][0] for i in range(50)])
        with torch.no_grad():
            y = data.to_uint8(model.decode(model.encode(data.to_float(x)).mean))
        assert r["recon_fd"] == pytest.approx(fid.frechet_distance(*fid.statistics(net(x)), *fid.statistics(net(y))), rel=1e-3)
        assert r["psnr"] == pytest.approx(fid.psnr(x, y).mean().item(), abs=1e-2) and r["ssim"] == pytest.approx(fid.ssim(x, y).mean().item(), abs=1e-3)
        assert all(r["seconds"][stage] > 0 for stage in ("train_vae", "encode", "train_sit", "sample", "recon"))
    baselines = report["baselines"]
    assert baselines["fd_floor"] == fd["floor"] and 0 <= baselines["probe_f1_majority"] < baselines["probe_f1_pixels"] <= 1
    assert report["torch"] == torch.__version__ and report["cpu"]
    picture = Image.open(demo / "report.png")
    assert picture.width >= 900 and len(picture.getcolors(10 ** 6)) > 50


def test_majority_baseline(demo, avatars):
    """The probe's baseline is not the training split's more frequent value, scored on the test split."""
    record = json.loads((demo / "send/probe.json").read_text())
    table = data.read_attributes(avatars)
    columns, split = [table.names.index(n) for n in record["attributes"]], np.array(table.splits)
    train, test = (table.values[split == s][:, columns] for s in ("train", "test"))
    expected = []
    for a in range(len(columns)):
        known = ~np.isnan(test[:, a])
        guess = np.full(known.sum(), float(np.nanmean(train[:, a]) > 0.5))
        expected.append(sklearn.metrics.f1_score(test[known, a], guess, zero_division=0))
    assert record["results"]["majority"]["f1"] == pytest.approx(np.mean(expected), abs=1e-6) and len(columns) >= 40
    lines = (demo / "send/probe.csv").read_text().splitlines()
    assert len(lines) == len(columns) + 1 and lines[0].startswith("attribute,")


def test_finished_commands_do_nothing(demo, avatars):
    """Running run.sh twice trains or encodes again."""
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()}
    out = do("train_vae", "--data", avatars, *TRAIN, "--lpips", 0, "--gan", 0, "--preset", "demo", "--lambda-align", 0, "--out", demo / "pretrain")
    assert "already at step 3" in out
    do("vae", "--vae", demo / "send/vae.pt", "--data", avatars, "--split", "train", "--out", demo / "send/latents", "--flip", *FP32)
    do("train_sit", "--latents", demo / "send/latents", "--data", avatars, "--model", "SiT-demo/2", "--steps", 3, "--batch", 8, "--repa", 0.5, *VFM,
       *FP32, "--out", demo / "send/sit")
    do("data", "avatars", avatars, "--n", 600)
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()} == before
