from helpers import *  # noqa: F403

from extras import convert  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# The scripts: one tiny run of the whole chain


def test_chain_vae(demo, avatars):
    """vae.pt lacks what a consumer or a resume needs, the arms begin apart, or one arm has another VAE or
    data order."""
    for arm, parts in (("control", set()), ("send", {"mapper"})):
        checkpoint = common.load_checkpoint(demo / arm / "vae.pt")
        assert checkpoint["step"] == 3 and checkpoint["args"]["lambda_align"] == float(arm == "send")
        stored = {k for k, v in checkpoint.items() if v is not None}
        assert {"config", "vae", "ema", "optimizer"} | parts <= stored
        assert all(v.dtype == torch.float32 for v in checkpoint["vae"].values())
        loaded = vae.load_vae(demo / arm / "vae.pt").state_dict()
        assert common.weights_hash(loaded) == common.weights_hash(checkpoint["ema"])
        settings, records = metrics(demo / arm)
        assert settings["data"] == str(avatars) and [r["step"] for r in records] == [1, 2, 3]
        assert {"rec", "kl", "grad_norm", "lr", "images_per_s", "seconds"} <= records[0].keys()
        assert ("align" in records[0]) == (arm == "send")
    (_, control), (_, send) = metrics(demo / "control"), metrics(demo / "send")
    assert control[0]["rec"] == pytest.approx(send[0]["rec"], rel=1e-5)
    assert control[2]["rec"] != send[2]["rec"]


def test_chain_latents(demo, avatars):
    """The latent cache is out of order, of another type, or its statistics are not those of its moments."""
    files = data.ImageFolder(avatars, 32, split="train").files
    n = len(files)
    for arm, flips in (("control", 1), ("send", 2)):
        latents, model = data.load_latents(demo / arm / "latents"), vae.load_vae(demo / arm / "vae.pt")
        assert latents.moments.shape == (n, flips, 8, 8, 8) and latents.moments.dtype == np.float16
        assert latents.files == files and latents.labels.dtype == np.int64
        assert [latents.meta["classes"][y] for y in latents.labels] == [f.split("/")[0] for f in files]
        assert latents.meta["vae_hash"] == common.weights_hash(model.state_dict())
        assert latents.meta["resolution"] == 32
        stats = np.load(demo / arm / "latents/stats.npz")
        moments = latents.moments[:].astype(np.float64).swapaxes(0, 2).reshape(8, -1)
        mean, std = np.split(moments, 2)  # (c, everything else)
        deviation = np.sqrt((mean ** 2 + std ** 2).mean(1) - mean.mean(1) ** 2)
        assert stats["mean"].dtype == stats["std"].dtype == np.float64
        np.testing.assert_allclose(stats["mean"], mean.mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats["std"], deviation, rtol=1e-9)
        for row in (0, 57, n - 1):
            x = data.to_float(data.read_image(avatars / files[row], 32)[None])
            for f in range(flips):
                with torch.no_grad():
                    q = model.encode(x.flip(-1) if f else x)
                stored = torch.from_numpy(latents.moments[row, f]).float()
                torch.testing.assert_close(stored, torch.cat([q.mean, q.std], 1)[0], rtol=2e-3, atol=1e-3)


def test_chain_sit(demo):
    """sit.pt lacks the latents' statistics or their VAE, or REPA is trained where it is off."""
    for arm, repa in (("control", False), ("send", True)):
        model, checkpoint = sit.load_sit(demo / arm / "sit/sit.pt")
        latents = data.load_latents(demo / arm / "latents")
        assert torch.equal(checkpoint["latent_mean"], latents.mean)
        assert torch.equal(checkpoint["latent_std"], latents.std)
        assert checkpoint["vae_hash"] == latents.meta["vae_hash"]
        assert checkpoint["vae"] == str(demo / arm / "vae.pt")
        assert model.config["num_classes"] == 5 and model.config["z_dim"] == (112 if repa else 0)
        records = metrics(demo / arm / "sit")[1]
        assert [r["step"] for r in records] == [1, 2, 3] and all(("repa" in r) == repa for r in records)
        # E |eps - x|^2 of normalised latents, at zero output
        assert records[0]["velocity"] == pytest.approx(2, rel=0.3)


def test_chain_samples(demo):
    """Samples are not what evaluators read, the picture shows others, or the arms have other labels."""
    for arm, evaluations in (("control", 5), ("send", 3)):
        z = np.load(demo / arm / "samples.npz")
        images, labels = z["arr_0"], z["arr_1"]
        assert z.files == ["arr_0", "arr_1"] and images.shape == (40, 32, 32, 3) and images.dtype == np.uint8
        assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [8] * 5
        assert images.std() > 1 and not np.array_equal(images[0], images[5])
        grid = np.array(Image.open(demo / arm / "samples.png"))
        assert grid.shape == (5 * 32, 8 * 32, 3) and np.array_equal(grid[32:64, 32:64], images[9])
        assert not list((demo / arm).glob("*.part"))
        assert common.read_json(demo / arm / "samples.json")["nfe"] == evaluations


def test_sampling_is_the_latents_inverse(demo, tmp_path):
    """Samples are denormalised with other statistics than the SiT's, or decoded wrongly: redo one with the
    library."""
    do("sample", "--sit", demo / "control/sit/sit.pt", "--images", 3, "--sampler", "euler", "--steps", 2,
       "--seed", 5, "--micro-batch", 2, "--out", tmp_path / "a.npz", *FP32)
    z = np.load(tmp_path / "a.npz")
    model, _ = sit.load_sit(demo / "control/sit/sit.pt")
    noise = data.draw_noise(5, range(3), 0, (4, 8, 8))[1]
    latent = sit.sample_ode(model, noise, torch.from_numpy(z["arr_1"]), 2, method="euler")
    stats = np.load(demo / "control/latents/stats.npz")
    mean, std = (torch.from_numpy(stats[k]).float().view(1, -1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = data.to_uint8(vae.load_vae(demo / "control/vae.pt").decode(latent * std + mean))
    assert np.abs(expected.permute(0, 2, 3, 1).numpy().astype(int) - z["arr_0"]).max() <= 1


def test_chain_scores(demo, avatars, net):
    """A score is not the one of its arm, of these images, or of this network; or the table of the arms holds
    another."""
    fd, report = common.read_json(demo / "send/fd.json"), common.read_json(demo / "report.json")
    judge = fid.FeatureNet("test_vit", net[3], 32)

    def images(split):
        folder = data.ImageFolder(avatars, 32, split=split)
        return torch.stack([folder[i][0] for i in range(len(folder))])

    def distance(a, b):
        return fid.frechet_distance(*fid.statistics(judge(a)), *fid.statistics(judge(b)))

    x, reference = images("test"), images("val")
    assert fd["n_reference"] == len(reference) and fd["network"] == "test_vit@32" and fd["floor"] > 0
    for arm in ("control", "send"):
        samples = torch.from_numpy(np.load(demo / arm / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
        model = vae.load_vae(demo / arm / "vae.pt")
        with torch.no_grad():
            y = data.to_uint8(model.decode(model.encode(data.to_float(x)).mean))
        row = report["arms"][arm]
        assert row["fd"] == pytest.approx(distance(reference, samples), rel=1e-3) and row["fd_n"] == 40
        assert row["recon_fd"] == pytest.approx(distance(x, y), rel=1e-3)
        assert row["psnr"] == pytest.approx(fid.psnr(x, y).mean().item(), abs=1e-2)
        assert row["ssim"] == pytest.approx(fid.ssim(x, y).mean().item(), abs=1e-3)
        found = common.read_json(demo / arm / "probe.json")["results"][str(demo / arm / "vae.pt")]
        assert row["probe_f1"] == found["f1"]


def test_finished_commands_do_nothing(demo, avatars):
    """Running run.sh twice trains or encodes again."""
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()}
    out = do("train_vae", "--data", avatars, *TRAIN, "--lpips", 0, "--gan", 0, "--preset", "demo",
             "--lambda-align", 0, "--out", demo / "pretrain")
    assert "already at step 3" in out
    do("vae", "--vae", demo / "send/vae.pt", "--data", avatars, "--split", "train", "--flip", *FP32,
       "--out", demo / "send/latents")
    do("train_sit", "--latents", demo / "send/latents", "--data", avatars, "--model", "SiT-demo/2",
       "--steps", 3,
       "--batch", 8, "--repa", 0.5, *VFM, *FP32, "--out", demo / "send/sit")
    do("avatars", avatars, "--n", 200)
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*") if p.is_file()} == before


def test_outputs_say_how_they_were_made(demo):
    """A file does not say by which command, commit, versions and inputs it was made."""
    def good(made, script):
        assert made["command"].startswith(f"{script}.py ") and made["commit"] == common.commit()
        assert set(made["versions"]) == {"python", "torch", "numpy", "pillow", "timm"}
        assert torch.__version__.startswith(made["versions"]["torch"])

    send = demo / "send"
    for name, script in {"latents/meta.json": "vae", "samples.json": "sample", "recon.json": "fid",
                         "fd.json": "fid", "probe.json": "probe"}.items():
        good(common.read_json(send / name)["made"], script)
    good(common.read_json(demo / "report.json")["made"], "study")
    for name, script in (("vae.pt", "train_vae"), ("sit/sit.pt", "train_sit")):
        checkpoint, (settings, _) = common.load_checkpoint(send / name), metrics((send / name).parent)
        good(checkpoint["made"], script)
        good(settings["made"], script)
        assert settings["inputs"] == checkpoint["inputs"]
    for name, script in (("samples.png", "sample"), ("recon.png", "fid")):
        good(json.loads(Image.open(send / name).text["made"]), script)
    vae_hash = common.weights_hash(vae.load_vae(send / "vae.pt").state_dict())
    meta = common.read_json(send / "latents/meta.json")
    assert meta["vae_hash"] == vae_hash == common.read_json(send / "recon.json")["inputs"]["vae"]
    assert metrics(send / "sit")[0]["inputs"]["latents"] == f"{vae_hash}-{meta['files_hash']}"
    init = common.weights_hash(vae.load_vae(demo / "pretrain/vae.pt").state_dict())
    assert metrics(send)[0]["inputs"]["init"] == init
    samples = hashlib.sha256((send / "samples.npz").read_bytes()).hexdigest()[:16]
    assert common.read_json(send / "fd.json")["inputs"][str(send / "samples.npz")] == samples
    assert len(common.read_json(send / "probe.json")["inputs"]) == 2


# ------------------------------------------------------------------------------------------------------------
# Processes, micro-batches, resume

@pytest.mark.parametrize("losses", [ALL_LOSSES, ("--align", "vavae", *VFM, "--gan", 0)])
def test_processes_and_micro_batches_train_the_same_vae(losses, small, tmp_path):
    """Losses depend on the number of processes or on --micro-batch (a gradient, draw or statistic is not
    global), or a run of two processes cannot go on with one."""
    command = "train_vae", "--data", small / "images", *SMALL_VAE, *losses, *SLOW
    do(*command, "--steps", 3, "--out", tmp_path / "one")
    do_on_two(*command, "--steps", 2, "--out", tmp_path / "parts", folder=tmp_path)
    do(*command, "--steps", 3, "--micro-batch", 2, "--out", tmp_path / "parts")
    assert metrics(tmp_path / "one")[1][0].keys() > {"rec", "kl", "align", "mapper_grad_norm"}
    assert_same_losses(tmp_path / "one", tmp_path / "parts")
    micro = call(*command, "--micro-batch", 3, "--out", tmp_path / "uneven")
    assert_refused(micro, "--batch 4", "multiple of 1 process(es) times --micro-batch 3")


def test_processes_and_micro_batches_train_the_same_sit(small, tmp_path):
    """Losses, also those by time, depend on the number of processes or on --micro-batch, or a run of two
    processes cannot go on with one."""
    command = ("train_sit", "--latents", small / "latents", "--data", small / "images", *SMALL_SIT, *SLOW,
               "--repa", 0.5, *VFM, "--log-every", 2)
    do(*command, "--steps", 4, "--out", tmp_path / "one")
    do_on_two(*command, "--steps", 2, "--out", tmp_path / "parts", folder=tmp_path)
    do(*command, "--steps", 4, "--micro-batch", 2, "--out", tmp_path / "parts")
    assert_same_losses(tmp_path / "one", tmp_path / "parts")
    for r in metrics(tmp_path / "one")[1]:
        known = [v for v in r["velocity_t"] if v is not None]
        assert len(r["velocity_t"]) == 10 and 3 <= len(known) <= 8 and min(known) > 0.1 and r["repa"] < 0


def test_two_processes_encode_the_same_moments(small, tmp_path):
    """Ranks overwrite each other's rows, or statistics are one rank's."""
    do_on_two(*encode_command(small, small / "images", tmp_path / "latents", "--flip"), folder=tmp_path)
    one, two = data.load_latents(small / "latents"), data.load_latents(tmp_path / "latents")
    moments = [latents.moments[:].astype(float) for latents in (one, two)]
    np.testing.assert_allclose(*moments, rtol=2e-3, atol=1e-3)  # last digit of float16
    assert one.files == two.files and np.array_equal(one.labels, two.labels)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.std, two.std, rtol=1e-4, atol=1e-5)


def test_two_processes_sample_the_same_images(small, tmp_path):
    """An image depends on the number of processes or the batch. (A level may differ: sums in convolutions are
    reordered.)"""
    command = ("sample", "--sit", small / "sit/sit.pt", "--images", 9, "--steps", 3, "--sampler", "sde",
               "--cfg", 2, *FP32)
    do_on_two(*command, "--out", tmp_path / "two.npz", folder=tmp_path)
    do(*command, "--micro-batch", 2, "--out", tmp_path / "one.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["arr_1"], two["arr_1"]) and len(set(one["arr_1"])) == 2
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and one["arr_0"].std() > 1


def test_scores_during_training(small, net, tmp_path, monkeypatch):
    """--eval-every logs another distance than that of the averaged model's samples, changes the training,
    depends on the processes, or scores what is no longer finite."""
    reference = tmp_path / "ref.npz"
    do("fid", "score", small / "images", small / "images", *net, "--save-stats", reference)
    command = sit_command(small, tmp_path / "plain", *SLOW, "--steps", 4, "--ema", 0.5)
    eval_flags = ("--eval-every", 3, "--eval-stats", reference, "--eval-images", 9, "--eval-steps", 7)
    do(*command)
    do(*command, *eval_flags, "--out", tmp_path / "one")
    do_on_two(*command, *eval_flags, "--out", tmp_path / "two", folder=tmp_path)
    name = "FD(test_vit@32)-9"
    curves = [{r["step"]: r[name] for r in metrics(tmp_path / k)[1] if name in r}
              for k in ("plain", "one", "two")]
    assert curves[0] == {} and list(curves[1]) == [3, 4] and curves[1] == pytest.approx(curves[2], rel=2e-4)
    assert_same_bits(tmp_path / "plain/sit.pt", tmp_path / "one/sit.pt")
    model, checkpoint = sit.load_sit(tmp_path / "one/sit.pt")
    noise, y = data.draw_noise(2 ** 61, range(9), 0, (4, 8, 8))[1], torch.arange(9) % 2
    mean, std = (checkpoint[k].view(1, -1, 1, 1) for k in ("latent_mean", "latent_std"))
    z = sit.sample_ode(model, noise, y, 7) * std + mean
    images = data.to_uint8(vae.load_vae(small / "vae/vae.pt").decode(z))
    judge, stats = fid.load_stats(reference)
    expected = fid.frechet_distance(stats["mu"], stats["sigma"], *fid.statistics(judge(images)))
    assert curves[1][4] == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "bare.npz", mu=stats["mu"], sigma=stats["sigma"])
    bare = call(*command, *eval_flags, "--eval-stats", tmp_path / "bare.npz", "--out", tmp_path / "x")
    assert_refused(bare, "bare.npz", "--save-stats")
    assert_refused(call(*command, "--eval-every", 2, "--out", tmp_path / "x"), "--eval-stats")
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    monkeypatch.setattr(train_sit.Evaluation, "__call__", lambda *_: pytest.fail("scored"))
    rare = ("--log-every", 100, "--save-every", 100, "--out", tmp_path / "nan")
    assert_refused(call(*command, *eval_flags, *rare), "step 1: grad_norm not finite")


@pytest.mark.parametrize("script", NAME)
def test_resume(script, small, tmp_path):
    """3 steps, a restart and 3 more are not the same 6 steps, bit for bit; or the log has gaps or doubles; or
    a run goes on under other settings."""
    name = NAME[script]
    do(script, *train_command(script, small, tmp_path / "whole"), "--steps", 6)
    parts = script, *train_command(script, small, tmp_path / "parts")
    do(*parts, "--steps", 3)
    assert common.load_checkpoint(tmp_path / "parts" / name)["step"] == 3
    do(*parts, "--steps", 6)
    assert_same_bits(tmp_path / "whole" / name, tmp_path / "parts" / name)
    whole, again = (metrics(tmp_path / folder)[1] for folder in ("whole", "parts"))
    for r in (*whole, *again):
        del r["seconds"], r["images_per_s"]
    assert whole == again and [r["step"] for r in whole] == [1, 2, 3, 4, 5, 6]
    before = (tmp_path / "parts" / name).read_bytes()
    assert_refused(call(*parts, "--steps", 9, "--seed", 7), "--seed", "7")
    assert_refused(call(*parts, "--steps", 9, "--lr", 0.5), "--lr", "0.5")
    assert (tmp_path / "parts" / name).read_bytes() == before


@pytest.mark.parametrize("script,number", [("train_vae", signal.SIGTERM), ("train_sit", signal.SIGINT)])
def test_a_signal_saves(script, number, small, tmp_path):
    """SIGTERM or Ctrl-C loses the steps since the last checkpoint, or ends in a traceback."""
    command = script, *train_command(script, small, tmp_path), "--steps", 10 ** 6, "--save-every", 10 ** 6
    pid = fork(*command, log=tmp_path / "log")
    wait_for_steps(tmp_path)
    os.kill(pid, number)
    status = ended(pid)
    step = common.load_checkpoint(tmp_path / NAME[script])["step"]
    assert step == metrics(tmp_path)[1][-1]["step"] >= 2
    result = status, "", (tmp_path / "log").read_text()
    assert_refused(result, f"stopped by {number.name}; saved at step {step}", expected=128 + number)


def wait_for_steps(folder):
    """Until a run has logged two steps."""
    log, end = folder / "metrics.jsonl", time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert time.time() < end
        time.sleep(0.02)


def test_torchrun(small, tmp_path):
    """Under torchrun the processes do not find each other, or a signal to it loses steps."""
    command = train_command("train_sit", small, tmp_path)
    words = command_line("train_sit", *command, "--steps", 10 ** 6, "--save-every", 10 ** 6, ranks=2)
    process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path)
    process.terminate()
    out, err = process.communicate(timeout=60)
    step = common.load_checkpoint(tmp_path / "sit.pt")["step"]
    assert step == metrics(tmp_path)[1][-1]["step"] >= 2
    assert process.returncode and f"saved at step {step}" in err and "batch 4 on 2 process(es)" in out


@pytest.mark.parametrize("schedule,lr", [
    ((), [1e-3, 1e-3]), (("--lr-warmup", 10 ** 9), [1e-12, 2e-12]), (("--lr-decay", 1), [1e-3, 5e-4])])
def test_sit_schedule(schedule, lr, small, tmp_path):
    """train_sit.py logs a learning rate and steps with another one."""
    do(*sit_command(small, tmp_path, "--steps", 2, *schedule))
    assert [r["lr"] for r in metrics(tmp_path)[1]] == pytest.approx(lr)
    checkpoint = common.load_checkpoint(tmp_path / "sit.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(lr[-1])
    moved = max((checkpoint["model"][k] - v).abs().max().item() for k, v in fresh_sit().items())
    # Adam's first steps: about lr each
    assert 0.5 * sum(lr) < moved < 2 * sum(lr) if lr[0] > 1e-9 else moved < 1e-7


def fresh_sit():
    torch.manual_seed(0)
    return sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=2).state_dict()


@pytest.mark.parametrize("dropout,moved", [(0, [True, True, False]), (1, [False, False, True])])
def test_label_dropout(dropout, moved, small, tmp_path):
    """The row of "no class" is not trained, or labels are dropped where they should not be."""
    do(*sit_command(small, tmp_path, "--label-dropout", dropout, "--steps", 5))
    name = "y_embedder.embedding_table.weight"
    now = common.load_checkpoint(tmp_path / "sit.pt")["model"][name]
    assert (now != fresh_sit()[name]).any(1).tolist() == moved


def test_bf16(small, tmp_path):
    """Under autocast weights, EMA or optimiser leave float32, or the losses are others."""
    for precision in ("fp32", "bf16"):
        for script, name in NAME.items():
            command = train_command(script, small, tmp_path / precision / script)
            do(script, *command, *SLOW, "--steps", 2, "--precision", precision)
            checkpoint = common.load_checkpoint(tmp_path / precision / script / name)
            assert all(v.dtype == torch.float32 for v in tensors(checkpoint).values())
    for script in NAME:
        for x, y in zip(*(metrics(tmp_path / precision / script)[1] for precision in ("fp32", "bf16"))):
            for k in {"rec", "kl", "align", "disc", "velocity"} & x.keys():
                assert x[k] == pytest.approx(y[k], rel=0.05), k


def test_deterministic(small, tmp_path):
    """--deterministic fails, changes what a CPU computes, or is not passed on."""
    for script, name in NAME.items():
        for flags in ((), ("--deterministic",)):
            out = tmp_path / f"{script}{len(flags)}"
            do(script, *train_command(script, small, out), "--steps", 2, *flags)
            assert torch.are_deterministic_algorithms_enabled() == bool(flags)
        assert_same_bits(tmp_path / f"{script}0" / name, tmp_path / f"{script}1" / name)
    out = "--out", tmp_path / "a.npz"
    sampling = "sample", "--sit", small / "sit/sit.pt", "--images", 2, "--steps", 2, *out
    for command in (encode_command(small, small / "images", tmp_path / "latents"), sampling):
        common.setup()
        assert not torch.are_deterministic_algorithms_enabled()
        do(*command, "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    common.setup()


def test_a_folder_without_classes(small, tmp_path):
    """A flat folder, one class, cannot be encoded, trained on or sampled."""
    images = write_images(tmp_path / "images", 6, classes=("",))
    do(*encode_command(small, images, tmp_path / "latents"))
    do(*sit_command(tmp_path, tmp_path, "--steps", 1))
    do("sample", "--sit", tmp_path / "sit.pt", "--images", 3, "--sampler", "euler", "--steps", 2, "--cfg", 2,
       *FP32, "--out", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------
# Inputs that change

def test_a_changed_data_set_is_seen(small, tmp_path):
    """Images that were replaced or added after encoding are paired with the old latents, or a run goes on
    with them."""
    images, latents, moved = tmp_path / "images", tmp_path / "latents", tmp_path / "moved"
    write_images(images, 40)
    do(*encode_command(small, images, latents))
    repa = (*sit_command(tmp_path, tmp_path / "sit"), "--data", images, "--repa", 0.5, *VFM)
    fine = vae_command(images, tmp_path / "vae")
    for command in (repa, fine):
        do(*command, "--steps", 1)
    images.rename(moved)  # the same files elsewhere
    for command in (repa, fine):
        do(*command, "--data", moved, "--steps", 2)
    moved.rename(images)
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "a/000.png")
    assert_refused(call(*repa, "--steps", 3), "--data")
    assert_refused(call(*fine, "--steps", 3), "other content of --data")
    assert_refused(call(*encode_command(small, images, latents)), "other images than --data")


def test_weights_may_move_but_not_change(small, tmp_path):
    """A run does not go on when its weight files have moved, or goes on, or counts as done, when they have
    changed."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copy(small / "vae/vae.pt", here / "init.pt")
    shutil.copy(LITE0, here / "vfm.pth")

    def tune(folder, steps):
        weights = "--init", folder / "init.pt", *VFM, "--vfm-ckpt", folder / "vfm.pth"
        flags = "--lpips", 0, "--gan", 0, *FP32, "--batch", 4, "--steps", steps, "--out", tmp_path / "out"
        return "train_vae", "--data", small / "images", *weights, *flags
    do(*tune(here, 1))
    here.rename(there)
    do(*tune(there, 2))
    state = common.load_checkpoint(LITE0)
    next(v for v in state.values() if v.ndim == 4).mul_(1.01)
    torch.save(state, there / "vfm.pth")
    assert_refused(call(*tune(there, 3)), "other content of --vfm")
    shutil.copy(LITE0, there / "vfm.pth")
    shutil.copy(small / "other/vae.pt", there / "init.pt")
    assert_refused(call(*tune(there, 2)), "other content of --init", "out/vae.pt")


def test_latents_of_another_vae(small, tmp_path):
    """A cache is overwritten with another VAE's latents, or a SiT goes on training on them."""
    latents = tmp_path / "latents"
    shutil.copytree(small / "latents", latents)
    before = digest(latents)
    other = (*encode_command(small, small / "images", latents, "--flip"), "--vae", small / "other/vae.pt")
    assert_refused(call(*other), "vae")
    assert digest(latents) == before
    command = sit_command(tmp_path, tmp_path / "sit")
    do(*command, "--steps", 1)
    shutil.rmtree(latents)
    assert_refused(call(*command, "--steps", 2), "latents: no such folder; if it has moved")
    do(*other)
    assert_refused(call(*command, "--steps", 2), data.load_latents(latents).meta["vae_hash"])
    truncate(latents / "moments.npy")
    assert_refused(call(*command, "--steps", 2), "damaged")


# ------------------------------------------------------------------------------------------------------------
# Bad input: one line, status 2

BAD_FOLDERS = {"missing": ["no such folder"], "empty": ["no images"], "one image": ["1 image"],
               "class of one": ["lonely", "one image"], "smaller than the crop": ["20", "32"],
               "truncated": [".jpg", "of 16", "1%"], "text": ["zzz.png", "1 of 9"],
               "beside classes": ["000.png", "class folder"]}


def make_bad_folder(kind, root):
    if kind == "empty":
        root.mkdir()
    elif kind != "missing":
        write_images(root, 1 if kind == "one image" else 8, size=20 if "crop" in kind else 64)
    if kind in ("class of one", "beside classes"):
        write_images(root, 1, classes=("lonely" if "one" in kind else "",))
    if kind == "text":
        (root / "a/zzz.png").write_text("no image")
    if kind == "truncated":
        for i in range(8):
            Image.effect_noise((64, 64), 90).save(root / f"b/{i:03d}.jpg")
            truncate(root / f"b/{i:03d}.jpg")


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders(kind, small, tmp_path):
    """A folder that cannot be used ends in a traceback, or is used."""
    root, out = tmp_path / "images", tmp_path / "out"
    make_bad_folder(kind, root)
    training = call(*vae_command(root, out, "--steps", 9))  # enough to meet every file
    for result in (training, call(*encode_command(small, root, out))):
        assert_refused(result, *BAD_FOLDERS[kind])
    assert not (out / "meta.json").exists()


@pytest.mark.parametrize("text,words", [
    ("file,split,hat\na/000.png,train,1\nx/1.png,val,0\n", ["line 3", "x/1.png"]),
    ("file,hat\na/000.png,1\n", ["'split'"]), (None, ["attributes.csv"]),
    ("file,split,hat,hat\n", ["'hat'", "twice"]),
    *((f"file,split,hat\na/000.png,train,1\n{path},train,0\n", ["line 3", "is no image below"])
      for path in ("../outside.png", "/outside.png", "a/../../outside.png", '""', "a", "a/000.png/"))])
def test_bad_tables(text, words, small, tmp_path):
    """A wrong attribute table ends in a traceback, is used, or makes a script read a file outside the image
    folder."""
    root = write_images(tmp_path / "images", 8)
    shutil.copy(root / "a/000.png", tmp_path / "outside.png")
    if text:
        (root / "attributes.csv").write_text(text.replace("\n/", f"\n{tmp_path}/"))
    assert_refused(call("probe", small / "vae/vae.pt", "--data", root, "--resolution", 32, *FP32), *words)
    assert_refused(call(*vae_command(root, tmp_path / "out", "--split", "train")), *words)


BAD_COMMANDS = """
train_vae --data IMAGES SMALL_VAE PLAIN --batch 41 --out O          | --batch 41 | 40
train_vae --data IMAGES SMALL_VAE PLAIN --resolution 34 --out O     | 34 | multiple of 4
train_vae --data IMAGES SMALL_VAE --init VAE --out O                | --init | --preset
train_vae --data IMAGES SMALL_VAE --vfm dinov9 --out O              | dinov9
train_vae --data IMAGES SMALL_VAE --out O                           | vit_base_patch14_dinov2 | --vfm-ckpt
train_vae --data IMAGES SMALL_VAE VFM --grid 3 --out O              | 3 x 3
train_vae --data IMAGES --init SIT --out O                          | sit.pt | train_vae.py
train_vae --steps x                                                 | --steps | 'x'
vae --vae VAE --data IMAGES --resolution 34 --out O                 | 34 | multiple of 4
vae --vae SIT --data IMAGES --out O                                 | sit.pt | train_vae.py
vae --vae text.pt --data IMAGES --out O                             | text.pt: not a readable checkpoint (cut
vae --vae none.pt --data IMAGES --out O                             | no such
vae --vae VAE_FOLDER --data IMAGES --out O                          | give its file | vae.pt
vae --vae IMAGES --data IMAGES --out O                              | holds no VAE
vae --vae VAE --data VAE --out O                                    | a file; expected a folder
vae --precision fp8                                                 | 'fp8'
vae --workers -1                                                    | --workers | '-1'
train_sit --latents LATENTS SMALL_SIT --repa 0 --batch 41 --out O   | --batch 41 | 40
train_sit --latents LATENTS SMALL_SIT --out O                       | --data
train_sit --latents none --repa 0 --out O                           | no such folder; if it has moved
train_sit --latnts x                                                | --latents, --out
sample --sit SIT --images 2 --out a.zip                             | .npz
sample --sit VAE --out a.npz                                        | vae.pt | a VAE goes to --vae
sample --sit moved.pt --out a.npz                                   | gone.pt, which is not there | --vae
sample --sit SIT --vae OTHER --images 2 --out a.npz                 | other/vae.pt | vae/vae.pt
sample                                                              | --sit, --out | --help
fid score IMAGES IMAGES --net dinov9                                | dinov9
fid score                                                           | required
probe SIT --data IMAGES                                             | sit.pt | train_vae.py
probe                                                               | required
data draw                                                           | 'draw'
avatars x --seed -1                                                 | --seed | '-1'
"""


@pytest.mark.parametrize("line", BAD_COMMANDS.strip().splitlines())
def test_bad_commands(line, small, tmp_path, monkeypatch):
    """A wrong flag or number, a file where a folder is expected, the checkpoint of another stage, or what has
    moved ends in a traceback, a page of usage, or is used."""
    write_table(small / "images")
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("no checkpoint")
    torch.save(dict(common.load_checkpoint(small / "sit/sit.pt"), vae="gone.pt"), "moved.pt")
    flags = dict(SMALL_VAE=SMALL_VAE, SMALL_SIT=SMALL_SIT, PLAIN=PLAIN, VFM=VFM)
    files = dict(IMAGES="images", VAE="vae/vae.pt", VAE_FOLDER="vae", OTHER="other/vae.pt", LATENTS="latents",
                 SIT="sit/sit.pt")
    flags |= {k: [small / file] for k, file in files.items()}
    command, *words = line.split(" | ")
    command = [w for word in command.split() for w in flags.get(word, [word])]
    assert_refused(call(*command), *(w.strip() for w in words))
    assert not Path("a.npz").exists() and not Path("O/meta.json").exists()


def test_misfits(small, tmp_path):
    """A checkpoint of another size, or latents whose images are gone, are used, or end in a traceback."""
    checkpoint = common.load_checkpoint(small / "vae/vae.pt")
    checkpoint["config"]["ch"] = 32
    torch.save(checkpoint, tmp_path / "size.pt")
    words = "encoder.conv_in.weight", "(16, 3, 3, 3)", "(32, 3, 3, 3)"
    out = ("--data", small / "images", "--out", tmp_path / "out")
    assert_refused(call("vae", "--vae", tmp_path / "size.pt", *out), *words)
    assert_refused(call("train_vae", "--init", tmp_path / "size.pt", *out), *words)
    few = write_images(tmp_path / "images", 8)
    assert_refused(call(*sit_command(small, tmp_path / "sit", "--data", few, "--repa", 1, *VFM)), "a/008.png")
    (tmp_path / "taken/vae.pt").mkdir(parents=True)
    assert_refused(call(*vae_command(small / "images", tmp_path / "taken")), "vae.pt: a folder")


def test_output_that_cannot_be_written(small, net, tmp_path, monkeypatch):
    """A read-only or impossible output folder ends in a traceback. (It lies below a file: nobody can write
    there.) Or a run begins that the disk cannot hold."""
    write_table(small / "images")
    (tmp_path / "file").write_text("no folder")
    below, images, vae_pt = tmp_path / "file/out", small / "images", small / "vae/vae.pt"
    sampling = "sample", "--sit", small / "sit/sit.pt", "--images", 2, "--steps", 2
    recon = "fid", "recon", "--vae", vae_pt, "--data", images, "--net", "none", "--lpips", 0
    score, probing = ("fid", "score", images, images, *net), ("probe", vae_pt, "--data", images)
    for command in [
            ("avatars", below, "--n", 5), vae_command(images, below), encode_command(small, images, below),
            sit_command(small, below), (*sampling, "--out", below / "a.npz"),
            (*recon, "--json", below / "a.json"), (*recon, "--png", below / "a.png"),
            (*score, "--json", below / "a.json"), (*probing, "--json", below / "a.json"),
            (*probing, "--csv", below / "a.csv")]:
        assert_refused(call(*command), tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    for command in (vae_command(images, tmp_path), encode_command(small, images, tmp_path),
                    (*sampling, "--out", tmp_path / "a.npz")):
        assert_refused(call(*command), "GiB are free")
    assert not (tmp_path / "moments.npy").exists()


# ------------------------------------------------------------------------------------------------------------
# Numbers that are not finite

@pytest.mark.parametrize("script", NAME)
def test_a_step_that_is_not_finite(script, small, tmp_path, monkeypatch):
    """A run with NaN in one image's loss, or in gradients alone, goes on, or does not name the step, the part
    and the images."""
    command = script, *train_command(script, small, tmp_path)
    do(*command, "--steps", 2)
    before = (tmp_path / NAME[script]).read_bytes()
    loss = train_vae.VAELoss if script == "train_vae" else train_sit.SiTLoss
    normal, calls = loss.forward, []

    def ill(self, *inputs, **options):  # in the second step from here, image 1 of the batch
        calls.append(1)
        total, parts, *rest = normal(self, *inputs, **options)
        if len(calls) == 2:
            rest[0] = rest[0].clone()
            rest[0][1], parts["ill"] = float("nan"), torch.tensor(float("nan"))
        return total, parts, *rest

    with monkeypatch.context() as m:
        m.setattr(loss, "forward", ill)
        images = data.ImageFolder(small / "images", 32, flip=script == "train_vae")
        (row,) = data.sample_order(len(images), 0, [3 * 4 + 1])  # step 4 of batches of 4, place 1
        result = call(*command, "--steps", 8, "--log-every", 5)
        assert_refused(result, "step 4: ill", f"1 of the batch's images, 1 ({images.files[row % 40]});")
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    assert_refused(call(*command, "--steps", 8), "step 3: ", "grad_norm", "not finite")
    assert (tmp_path / NAME[script]).read_bytes() == before


def test_a_latent_that_is_not_finite(small, tmp_path):
    """A damaged latent is trained on, or its image is not named."""
    shutil.copytree(small / "latents", tmp_path / "latents")
    command = sit_command(tmp_path, tmp_path / "sit", "--save-every", 1)
    do(*command, "--steps", 1)
    moments = np.load(tmp_path / "latents/moments.npy", mmap_mode="r+")
    moments[5, :, 1, 2, 3] = np.inf
    moments.flush()
    file = data.load_latents(small / "latents").files[5]
    result = call(*command, "--steps", 30)
    assert_refused(result, "step ", file, "not finite", "(1 of the batch)", "encode again")
    np.savez(tmp_path / "latents/stats.npz", mean=np.full(4, np.nan), std=np.ones(4))
    assert_refused(call(*command, "--steps", 30), "damaged", "not finite")


# ------------------------------------------------------------------------------------------------------------
# Hostile files

class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_file_runs_code(legacy, small, tmp_path):
    """A file given to any flag runs the code that it carries, or ends in a traceback."""
    ran, evil, images, sit_pt = tmp_path / "ran", tmp_path / "evil.pt", small / "images", small / "sit/sit.pt"
    torch.save({"state_dict": ldm_state(), "x": Evil(ran)}, evil, _use_new_zipfile_serialization=not legacy)
    fine, out = vae_command(images, tmp_path / "out"), ("--out", tmp_path / "a.npz")
    lite0 = "tf_efficientnet_lite0"
    score = "fid", "score", images, images, "--net-ckpt", evil
    for command in [
            (*fine, "--lpips", 1, "--lpips-ckpt", evil), (*fine, "--gan", 0.1, "--disc-ckpt", evil),
            (*fine, "--lambda-align", 1, "--vfm", lite0, "--vfm-ckpt", evil), score, (*score, "--net", lite0),
            ("train_vae", "--data", images, "--init", evil, "--out", tmp_path / "out"),
            ("vae", "--vae", evil, "--data", images, "--out", tmp_path / "l"),
            ("sample", "--sit", evil, *out), ("sample", "--sit", sit_pt, "--vae", evil, *out),
            ("sample", "--sit", sit_pt, "--guide", evil, "--cfg", 2, *out),
            ("fid", "recon", "--vae", evil, "--data", images), ("probe", evil, "--data", images)]:
        assert_refused(call(*command), evil)
    do(*fine)
    shutil.copy(evil, tmp_path / "out/vae.pt")
    assert_refused(call(*fine, "--steps", 3), "out/vae.pt")  # the run's own checkpoint
    with pytest.raises(UserError):
        convert.read_stats(str(evil), 4)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(evil, weights_only=False)  # what a library might do
    assert not ran.exists()


def test_every_reader_is_a_safe_one():
    """A torch.load or np.load in the code leaves pickles to chance."""
    calls, never = [], ("pickle.load", "pickle.loads", "eval", "exec", "os.system")
    for path in [*HERE.glob("*.py"), *HERE.glob("extras/*.py")]:
        for node in ast.walk(ast.parse("" if path.name.startswith("test_") else path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in never, f"{path}:{node.lineno}"
            if name in ("torch.load", "np.load", "torch.hub.load_state_dict_from_url"):
                flags = [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords]
                assert {"allow_pickle=False", "weights_only=True"} & {*flags}, f"{path}:{node.lineno}"
                calls.append(name)
    assert len(calls) > 8


def test_hostile_npz(small, net, tmp_path):
    """A zip bomb is unpacked, an array of objects unpickled."""
    bomb, objects, latents = tmp_path / "bomb.npz", tmp_path / "objects.npz", tmp_path / "latents"
    with zipfile.ZipFile(bomb, "w") as z:
        z.writestr("arr_0.npy", b"")
        z.filelist[0].file_size = 2 ** 31  # what it says that it unpacks to
    evil = np.array([Evil(tmp_path / "ran")] * 40, object)
    np.savez(objects, **dict.fromkeys(("mean", "std", "mu", "sigma", "arr_0"), evil))
    shutil.copytree(small / "latents", latents)
    command = sit_command(tmp_path, tmp_path / "out")
    for path, words in ((bomb, ["zip bomb"]), (objects, [])):
        assert_refused(call("fid", "score", small / "images", path, *net), path, *words)
        scoring = sit_command(small, tmp_path / "out", "--eval-every", 1, "--eval-stats", path)
        assert_refused(call(*scoring), path, *words)
        with pytest.raises(UserError, match="bomb" if words else "allow_pickle"):
            convert.read_stats(str(path), 4)
        shutil.copy(path, latents / "stats.npz")
        assert_refused(call(*command), latents, "damaged", *words)
    for name in ("labels", "moments"):
        shutil.copytree(small / "latents", latents, dirs_exist_ok=True)
        np.save(latents / f"{name}.npy", evil)
        assert_refused(call(*command), latents, "damaged")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------
# The machine

@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error,words", [
    (ZeroDivisionError("float division"), ["ZeroDivisionError in a reader"]),
    (OSError(errno.EMFILE, "Too many open files"), ["Too many", "ulimit -n"]),
    (MemoryError(), ["out of memory", "--micro-batch"])])
def test_a_reader_that_raises(error, words, workers, small, tmp_path):
    """An exception in a process that reads images hangs the run for ever, ends in a traceback, or makes good
    images count as unreadable."""
    def prepare():
        def failing(path, size, read=data.read_image):
            if Path(path).name == "007.png":
                raise error
            return read(path, size)
        data.read_image = failing
    command = vae_command(small / "images", tmp_path / "out", "--steps", 30, "--workers", workers)
    result = forked(*command, log=tmp_path / "log", prepare=prepare)
    assert "skipped" not in result[2]
    assert_refused(result, *words)
