from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# Processes, micro-batches, resume

SMALL_VAE = ("--preset", "demo", "--resolution", 32, "--batch", 4, "--lr", 1e-3, "--lpips", 0, "--kl", 1e-4, "--log-every", 1, "--save-every", 1, *FP32)
SMALL_SIT = ("--model", "SiT-demo/2", "--batch", 4, "--lr", 1e-3, "--log-every", 1, "--save-every", 1, *FP32)
ALL_LOSSES = ("--gan", 0.1, "--lambda-align", 1, *VFM)
PLAIN = ("--gan", 0, "--lambda-align", 0)
SLOW = ("--lr", 1e-4)  # Adam's first steps are lr * sign(gradient): a larger lr blows up the rounding of gradients near zero


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


def test_two_processes_train_the_same_vae(small, tmp_path):
    """Losses depend on the number of processes or on --micro-batch: a gradient, draw or statistic is not global."""
    command = ("--data", small / "images", *SMALL_VAE, *ALL_LOSSES, *SLOW, "--steps", 3)
    run("train_vae", *command, "--out", tmp_path / "two", ranks=2)
    do("train_vae", *command, "--out", tmp_path / "one")
    do("train_vae", *command, "--micro-batch", 3, "--out", tmp_path / "micro")
    assert metrics(tmp_path / "one")[1][0].keys() >= {"rec", "kl", "gan", "align", "disc"}
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "micro")
    assert common.load_checkpoint(tmp_path / "one/vae.pt")["discriminator"] is not None


def test_two_processes_encode_the_same_moments(small, tmp_path):
    """Ranks overwrite each other's rows, or statistics are one rank's."""
    run("vae", "--vae", small / "vae/vae.pt", "--data", small / "images", "--resolution", 32, "--flip", *FP32, "--out", tmp_path, ranks=2)
    one, two = data.load_latents(small / "latents"), data.load_latents(tmp_path)
    np.testing.assert_allclose(one.moments[:].astype(float), two.moments[:].astype(float), rtol=2e-3, atol=1e-3)  # last digit of float16
    assert one.files == two.files and np.array_equal(one.labels, two.labels)
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.std, two.std, rtol=1e-4, atol=1e-5)


def test_two_processes_train_the_same_sit(small, tmp_path):
    """Losses depend on the number of processes or on --micro-batch."""
    command = ("--latents", small / "latents", "--data", small / "images", *SMALL_SIT, "--repa", 0.5, *VFM, *SLOW, "--steps", 3)
    run("train_sit", *command, "--out", tmp_path / "two", ranks=2)
    do("train_sit", *command, "--out", tmp_path / "one")
    do("train_sit", *command, "--micro-batch", 3, "--out", tmp_path / "micro")
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "micro")


def test_two_processes_sample_the_same_images(small, tmp_path):
    """An image depends on the number of processes or the batch. (A level may differ: sums in convolutions are reordered.)"""
    command = ("--sit", small / "sit/sit.pt", "--images", 9, "--steps", 3, "--sampler", "sde", "--cfg", 2, *FP32)
    run("sample", *command, "--out", tmp_path / "two.npz", ranks=2)
    do("sample", *command, "--micro-batch", 2, "--out", tmp_path / "one.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["arr_1"], two["arr_1"]) and len(set(one["arr_1"])) == 2
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and one["arr_0"].std() > 1


def test_sampling_survives_a_kill(small, tmp_path):
    """A killed sample.py loses or doubles an image when it is run again, on more processes too, or takes another run's leftovers."""
    command = ("--sit", small / "sit/sit.pt", "--images", 21, "--steps", 4, "--sampler", "sde", "--labels", "blocks", "--micro-batch", 2, *FP32)
    do("sample", *command, "--out", tmp_path / "whole.npz")
    whole = np.load(tmp_path / "whole.npz")
    assert whole["arr_1"].tolist() == [0] * 11 + [1] * 10
    out, process = tmp_path / "parts.npz", subprocess.Popen(command_line("sample", *command, "--steps", 2000, "--out", tmp_path / "parts.npz"), cwd=HERE)
    end = time.time() + 120
    while not Path(f"{out}.run").exists() or not np.load(f"{out}.done").any():
        assert process.poll() is None and time.time() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < np.load(f"{out}.done").sum() < 21 and not out.exists()
    do("sample", *command, "--out", out)  # other settings: begins anew
    assert np.array_equal(np.load(out)["arr_0"], whole["arr_0"])
    out.unlink()
    settings = {k: v for k, v in json.loads((tmp_path / "parts.json").read_text()).items() if k not in ("seconds", "made", *sample.PATHS)}
    half = np.lib.format.open_memmap(f"{out}.part", "w+", np.uint8, whole["arr_0"].shape)
    done = np.lib.format.open_memmap(f"{out}.done", "w+", np.uint8, (21,))
    half[:9], done[:9] = 77, 1  # what is there is not drawn again
    half.flush(), done.flush()
    common.write_json(f"{out}.run", settings)
    printed, _ = run("sample", *command, "--out", out, ranks=2)
    images = np.load(out)["arr_0"]
    assert "9 of 21 images are there" in printed and (images[:9] == 77).all() and images[9:].any() and np.abs(images[9:].astype(int) - whole["arr_0"][9:]).max() <= 1
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.json", "parts.npz", "parts.png"]
    shutil.copy(out, f"{out}.part"), common.write_json(f"{out}.run", settings)  # killed between .json and .npz: not finished
    assert "already there" not in do("sample", *command, "--out", out)
    before = out.stat().st_mtime_ns
    assert "already there" in do("sample", *command, "--out", out) and out.stat().st_mtime_ns == before
    do("sample", *command, "--seed", 9, "--out", out)
    assert not np.array_equal(np.load(out)["arr_0"][9:], whole["arr_0"][9:])


def test_scores_during_training(small, tmp_path, monkeypatch):
    """--eval-every logs another distance than that of the averaged model's samples, changes the training, or depends on the processes."""
    net = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    do("fid", "score", small / "images", small / "images", *net, "--save-stats", tmp_path / "ref.npz")
    command = ("--latents", small / "latents", *SMALL_SIT, *SLOW, "--repa", 0, "--steps", 4, "--ema", 0.5)
    scored = (*command, "--eval-every", 3, "--eval-stats", tmp_path / "ref.npz", "--eval-images", 9, "--eval-steps", 7)
    do("train_sit", *command, "--out", tmp_path / "plain")
    do("train_sit", *scored, "--out", tmp_path / "one")
    run("train_sit", *scored, "--out", tmp_path / "two", ranks=2)
    name = "FD(tf_efficientnet_lite0@32)-9"
    curves = {k: {r["step"]: r[name] for r in metrics(tmp_path / k)[1] if name in r} for k in ("plain", "one", "two")}
    assert curves["plain"] == {} and list(curves["one"]) == [3, 4] and curves["one"] == pytest.approx(curves["two"], rel=2e-4)
    losses = [[r["velocity"] for r in metrics(tmp_path / k)[1] if "velocity" in r] for k in ("plain", "one")]
    assert losses[0] == losses[1]
    assert_same_bits(tmp_path / "plain/sit.pt", tmp_path / "one/sit.pt")
    model, checkpoint = sit.load_sit(tmp_path / "one/sit.pt")
    noise, y = data.draw_noise(2 ** 61, range(9), 0, (4, 8, 8))[1], torch.arange(9) % 2
    z = sit.sample_ode(model, noise, y, 7) * checkpoint["latent_std"].view(1, -1, 1, 1) + checkpoint["latent_mean"].view(1, -1, 1, 1)
    images = data.to_uint8(vae.load_vae(small / "vae/vae.pt").decode(z))
    ref, stats = fid.load_stats(tmp_path / "ref.npz")
    assert curves["one"][4] == pytest.approx(fid.frechet_distance(stats["mu"], stats["sigma"], *fid.statistics(ref(images))), rel=1e-5)
    seen = []  # so young a model hardly moves: the distance does not tell the steps
    monkeypatch.setattr(train_sit, "sample_ode", lambda model, noise, y, steps, **_: seen.append(steps) or noise)
    do("train_sit", *scored, "--out", tmp_path / "steps")
    assert seen == [7, 7]
    assert_refused(call("train_sit", *command, "--eval-every", 2, "--out", tmp_path / "x"), "--eval-stats")
    np.savez(tmp_path / "bare.npz", mu=stats["mu"], sigma=stats["sigma"])
    assert_refused(call("train_sit", *command, "--eval-every", 2, "--eval-stats", tmp_path / "bare.npz", "--out", tmp_path / "x"), "bare.npz", "--save-stats")


def train_command(script, small, out):
    """A command of each training script with everything that has a state."""
    return ("--data", small / "images", *SMALL_VAE, *ALL_LOSSES, "--out", out) if script == "train_vae" else \
        ("--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--out", out)


NAME = {"train_vae": "vae.pt", "train_sit": "sit.pt"}


@pytest.mark.parametrize("script", NAME)
def test_resume(script, small, tmp_path):
    """3 steps, a restart and 3 more are not the same 6 steps, bit for bit; or the log has gaps or doubles."""
    do(script, *train_command(script, small, tmp_path / "whole"), "--steps", 6)
    do(script, *train_command(script, small, tmp_path / "parts"), "--steps", 3)
    assert common.load_checkpoint(tmp_path / "parts" / NAME[script])["step"] == 3
    do(script, *train_command(script, small, tmp_path / "parts"), "--steps", 6)
    assert_same_bits(tmp_path / "whole" / NAME[script], tmp_path / "parts" / NAME[script])
    (_, whole), (_, parts) = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [r["step"] for r in parts] == [1, 2, 3, 4, 5, 6]
    assert [[r[k] for k in r if k not in ("seconds", "images_per_s")] for r in whole] == [[r[k] for k in r if k not in ("seconds", "images_per_s")] for r in parts]
    before = (tmp_path / "parts" / NAME[script]).read_bytes()
    assert_refused(call(script, *train_command(script, small, tmp_path / "parts"), "--steps", 9, "--seed", 7), "--seed", "7")
    assert_refused(call(script, *train_command(script, small, tmp_path / "parts"), "--steps", 9, "--lr", 0.5), "--lr", "0.5")
    assert (tmp_path / "parts" / NAME[script]).read_bytes() == before


def start(script, small, out, *flags, ranks=1):
    """A training process that would take for ever (what it does once must not depend on --steps), once it has logged two steps."""
    command = command_line(script, *train_command(script, small, out), "--steps", 10 ** 9, *flags, ranks=ranks)
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = out / "metrics.jsonl", time.time() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("script,number,ranks", [("train_vae", signal.SIGTERM, 1), ("train_sit", signal.SIGINT, 1), ("train_sit", signal.SIGTERM, 2)])
def test_a_signal_saves(script, number, ranks, small, tmp_path):
    """SIGTERM or Ctrl-C loses the steps since the last checkpoint, or ends in a traceback."""
    process = start(script, small, tmp_path, "--save-every", 10 ** 9, ranks=ranks)
    assert not (tmp_path / NAME[script]).exists()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    step = common.load_checkpoint(tmp_path / NAME[script])["step"]
    assert step == metrics(tmp_path)[1][-1]["step"] >= 2
    if ranks == 1:  # torchrun adds a report and a status of its own
        assert_refused((process.returncode, "", err), f"stopped by {number.name}; saved at step {step}", expected=128 + number)
    assert process.returncode != 0 and f"saved at step {step}" in err


def test_a_non_finite_loss_is_never_saved(small, tmp_path):
    """A diverged run overwrites its last good checkpoint, or does not say which step and part."""
    command = ("--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--out", tmp_path)
    do("train_sit", *command, "--steps", 1)
    checkpoint = common.load_checkpoint(tmp_path / "sit.pt")
    checkpoint["model"]["final_layer.linear.bias"][0] = 3e38  # finite, but not its square
    common.save_checkpoint(tmp_path / "sit.pt", checkpoint)
    before = (tmp_path / "sit.pt").read_bytes()
    assert_refused(call("train_sit", *command, "--steps", 5), "step 2", "velocity")
    assert (tmp_path / "sit.pt").read_bytes() == before


def test_an_image_that_cannot_be_read_leaves_no_hole(small, tmp_path):
    """Encoding with an unreadable image shifts the rows, leaves zeros in them, or counts them in the statistics."""
    images = write_images(tmp_path / "images", 120, size=8)
    truncate(images / "a/010.png")
    flags = ("--vae", small / "vae/vae.pt", "--data", images, "--resolution", 8, *FP32)
    status, _, err = call("vae", *flags[:-1], "bf16", "--micro-batch", 1, "--out", tmp_path / "bf16")
    assert status == 0 and "a/010.png" in err
    status, _, err = call("vae", *flags, "--micro-batch", 1, "--out", tmp_path / "skipped")
    assert status == 0 and "a/010.png" in err
    (images / "a/010.png").unlink()
    do("vae", *flags, "--out", tmp_path / "without")
    one, two = data.load_latents(tmp_path / "skipped"), data.load_latents(tmp_path / "without")
    assert one.files == two.files and len(one.files) == 119 and np.array_equal(one.labels, two.labels)
    np.testing.assert_allclose(one.moments[:].astype(float), two.moments[:].astype(float), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(one.std, two.std, rtol=1e-3, atol=1e-4)


def test_a_folder_without_classes(small, tmp_path):
    """A flat folder, one class, cannot be encoded, trained on or sampled."""
    images = write_images(tmp_path / "images", 6, classes=("",))
    do(*encode_command(small, images, tmp_path / "latents"))
    do("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--steps", 1, "--out", tmp_path)
    do("sample", "--sit", tmp_path / "sit.pt", "--images", 3, "--sampler", "euler", "--steps", 2, "--cfg", 2, *FP32, "--out", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("schedule,lr", [((), [1e-3, 1e-3]), (("--lr-warmup", 10 ** 9), [1e-12, 2e-12]), (("--lr-decay", 1), [1e-3, 5e-4])])
def test_sit_schedule(schedule, lr, small, tmp_path):
    """train_sit.py logs a learning rate and steps with another one."""
    do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, *schedule, "--out", tmp_path)
    assert [r["lr"] for r in metrics(tmp_path)[1]] == pytest.approx(lr)
    checkpoint = common.load_checkpoint(tmp_path / "sit.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(lr[-1])
    torch.manual_seed(0)
    fresh = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=2).state_dict()
    moved = max((checkpoint["model"][k] - v).abs().max().item() for k, v in fresh.items())
    assert 0.5 * sum(lr) < moved < 2 * sum(lr) if lr[0] > 1e-9 else moved < 1e-7  # Adam's first steps: about lr each


@pytest.mark.parametrize("dropout,moved", [(0, [True, True, False]), (1, [False, False, True])])
def test_label_dropout(dropout, moved, small, tmp_path):
    """The row of "no class" is not trained, or labels are dropped where they should not be."""
    do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--label-dropout", dropout, "--steps", 5, "--out", tmp_path)
    torch.manual_seed(0)
    fresh = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=2).state_dict()["y_embedder.embedding_table.weight"]
    now = common.load_checkpoint(tmp_path / "sit.pt")["model"]["y_embedder.embedding_table.weight"]
    assert (now != fresh).any(1).tolist() == moved


def test_bf16(small, tmp_path):
    """Under autocast weights, EMA or optimiser leave float32, or the losses are others."""
    for precision in ("fp32", "bf16"):
        do("train_vae", "--data", small / "images", *SMALL_VAE, *ALL_LOSSES, *SLOW, "--steps", 2, "--precision", precision, "--out", tmp_path / precision)
        do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, "--precision", precision, "--out", tmp_path / precision / "sit")
        for name in ("vae.pt", "sit/sit.pt"):
            assert all(v.dtype == torch.float32 for v in tensors(common.load_checkpoint(tmp_path / precision / name)).values())
    for part in ("", "sit"):
        for x, y in zip(metrics(tmp_path / "fp32" / part)[1], metrics(tmp_path / "bf16" / part)[1]):
            for k in {"rec", "kl", "align", "disc", "velocity"} & x.keys():
                assert x[k] == pytest.approx(y[k], rel=0.05), k


def test_another_init_under_the_same_name(small, tmp_path):
    """A fine-tuning goes on, or counts as done, although --init now holds other weights."""
    shutil.copy(small / "vae/vae.pt", tmp_path / "init.pt")
    tune = ("train_vae", "--data", small / "images", "--init", tmp_path / "init.pt", "--resolution", 32, "--batch", 4, "--lpips", 0, *PLAIN, "--steps", 2, *FP32)
    do(*tune, "--out", tmp_path / "out")
    do(*tune, "--out", tmp_path / "out")  # the same weights: already there
    shutil.copy(small / "other/vae.pt", tmp_path / "init.pt")
    assert_refused(call(*tune, "--out", tmp_path / "out"), "other content of --init", "out/vae.pt")


def test_feature_net_of_a_vit(tmp_path):
    """A ViT at another size than its own ends in a traceback, or its positions are not resampled."""
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pt")
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    net = fid.FeatureNet("vit_tiny_patch16_224", str(tmp_path / "vit.pt"), 96)
    assert net(x).shape == (2, 192) and net.net.pos_embed.shape[1] == 36 + 1 and net.label == "vit_tiny_patch16_224@96"
    with pytest.raises(UserError, match="--net-size 100.*multiple of 16"):
        fid.FeatureNet("vit_tiny_patch16_224", str(tmp_path / "vit.pt"), 100)
    with pytest.raises(UserError, match="--net-ckpt .*no such file"):
        fid.FeatureNet("vit_tiny_patch16_224", str(tmp_path / "none.pt"), 96)


def test_report_of_few_images(small, tmp_path):
    """With fewer images than the picture has places, originals and reconstructions are mixed up."""
    table = ["file,split"] + [f"{f},{'test' if i % 4 == 0 else 'train'}" for i, f in enumerate(data.find_images(small / "images"))]
    root = tmp_path / "images"
    shutil.copytree(small / "images", root)
    for name in ("wide", "few"):
        (root / "attributes.csv").write_text("\n".join(table if name == "wide" else table[:1] + [r.replace("test", "train") if i % 8 else r for i, r in enumerate(table[1:])]) + "\n")
        do("fid", "recon", "--vae", small / "vae/vae.pt", "--data", root, "--split", "test", "--resolution", 32, "--net", "none", "--lpips", 0, "--png", tmp_path / f"{name}.png", *FP32)
        sheet = np.asarray(Image.open(tmp_path / f"{name}.png"))
        first = data.ImageFolder(root, 32, split="test")
        shown = len(first) if len(first) < 8 else 8
        assert sheet.shape == (64, 32 * shown, 3)  # one row of originals, one of copies
        top = np.stack(np.split(sheet[:32], shown, axis=1))
        assert (top[0] == first[0][0].permute(1, 2, 0).numpy()).all() and (top[-1] == first[len(first) - 1][0].permute(1, 2, 0).numpy()).all()


def test_check(tmp_path):
    """`data.py check` misses a bad file, or counts the good ones wrongly."""
    images = write_images(tmp_path, 120, size=8)
    truncate(images / "a/010.png")
    status, out, err = call("data", "check", images, "--size", 8)
    assert status == 0 and "119 images in 2 classes, 1 unreadable" in out and "a/010.png" in err
    truncate(images / "a/012.png")
    truncate(images / "b/111.png")  # past the first per cent: counted too
    status, out, err = call("data", "check", images, "--size", 8)
    assert status == 2 and "117 images in 2 classes, 3 unreadable" in out and "3 of 120" in err and "b/111.png" in err


def test_lpips_and_gan_train(small, vgg, tmp_path):
    """The full loss of the paper does not run, or gan-start and warm-ups are ignored."""
    do("train_vae", "--data", small / "images", *SMALL_VAE, *ALL_LOSSES, "--lpips", 1, "--lpips-ckpt", vgg[1], "--gan-start", 1, "--steps", 2,
       "--lr-warmup", 4, "--lr-decay", 1, "--noise", 0, "--mapper-depth", 0, "--out", tmp_path)
    first, second = metrics(tmp_path)[1]
    assert "gan" not in first and "disc" not in first and {"gan", "disc", "lpips", "align"} <= second.keys()
    assert first["lr"] == pytest.approx(1e-3 / 4, abs=1e-6)


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


def test_sampling_from_released_checkpoints(small, tmp_path):
    """REPA-E's files do not sample, their latents are not brought back to the VAE's scale, or statistics that are missing are made up."""
    release(tmp_path, small)
    common = ("--images", 3, "--steps", 3, "--sampler", "euler", "--seed", 4, *FP32)
    do("sample", "--sit", tmp_path / "joint.pt", *common, "--out", tmp_path / "joint.npz")
    shown = np.load(tmp_path / "joint.npz")["arr_0"]
    assert shown.shape == (3, 32, 32, 3) and shown.std() > 1
    for stats in ("vae-latents-stats.pt", "stats.npz"):
        do("sample", "--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", "--latent-stats", tmp_path / stats, *common, "--out", tmp_path / "alone.npz")
        assert np.abs(np.load(tmp_path / "alone.npz")["arr_0"].astype(int) - shown).max() <= 1
    do("sample", "--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", "--latent-stats", 0.5, *common, "--out", tmp_path / "factor.npz")
    model, _ = sit.load_sit(tmp_path / "alone.pt")
    noise, labels = data.draw_noise(4, range(3), 0, (3, 16, 16))[1], torch.from_numpy(np.load(tmp_path / "factor.npz")["arr_1"])
    x = data.to_uint8(vae.load_vae(tmp_path / "vae.pt").decode(sit.sample_ode(model, noise, labels, 3, method="euler") * 2))
    assert np.abs(np.load(tmp_path / "factor.npz")["arr_0"].astype(int) - x.permute(0, 2, 3, 1).numpy()).max() <= 1
    def refused(*flags, words):
        assert_refused(call("sample", *flags, *common, "--out", tmp_path / "x.npz"), *words)
    refused("--sit", tmp_path / "alone.pt", words=["alone.pt", "--vae"])
    refused("--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", words=["--latent-stats"])
    refused("--sit", tmp_path / "alone.pt", "--vae", small / "vae/vae.pt", "--latent-stats", 1, words=["4 latent channels", "has 3"])
    np.savez(tmp_path / "bad.npz", mean=np.zeros(2), std=np.ones(2))
    for stats in (tmp_path / "bad.npz", tmp_path / "vae.pt", tmp_path / "none.pt", 0, -1, "nan"):
        refused("--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", "--latent-stats", stats, words=[stats])
    refused("--sit", small / "sit/sit.pt", "--latent-stats", 1, words=["leave the flag out"])


def test_sampling_with_a_guide(small, tmp_path):
    """--guide is ignored, guides outside its interval, or takes a model of other latents."""
    release(tmp_path, small)
    do("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 1, "--seed", 5, "--lr", 0.1, "--out", tmp_path / "guide")
    images = {}
    for name, flags in (("plain", ()), ("cfg", ("--cfg", 3)), ("guide", ("--cfg", 3, "--guide", tmp_path / "guide/sit.pt")),
                        ("outside", ("--cfg", 3, "--guide", tmp_path / "guide/sit.pt", "--interval", 0.96, 0.97))):
        out = do("sample", "--sit", small / "sit/sit.pt", "--images", 3, "--steps", 3, "--sampler", "heun", "--interval", 0, 1, *flags, *FP32, "--out", tmp_path / f"{name}.npz")
        assert ("guide/sit.pt" in out) == ("--guide" in flags)
        images[name] = np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
    assert np.array_equal(images["plain"], images["outside"])
    assert np.abs(images["guide"] - images["plain"]).max() > 3 and np.abs(images["guide"] - images["cfg"]).max() > 3
    common = ("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--cfg", 2, "--out", tmp_path / "a.npz")
    assert_refused(call(*common, "--guide", tmp_path / "alone.pt"), "alone.pt", "in_channels 3", "4")
    do("vae", "--vae", small / "other/vae.pt", "--data", small / "images", *FP32, "--out", tmp_path / "latents")
    do("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--steps", 1, "--out", tmp_path / "foreign")
    assert_refused(call(*common, "--guide", tmp_path / "foreign/sit.pt"), "foreign/sit.pt", "latents of VAE")


@pytest.mark.parametrize("flags", [("--align", "vavae", *VFM, "--gan", 0), ("--align", "none", "--gan", 0.1, "--gan-adaptive", 1)])
def test_adaptive_arms_on_two_processes(flags, small, tmp_path):
    """VA-VAE's arm or the adaptive weight does not train, does not resume, or depends on the number of processes."""
    command = ("--data", small / "images", *SMALL_VAE, *SLOW, *flags)
    run("train_vae", *command, "--steps", 3, "--micro-batch", 1, "--out", tmp_path / "two", ranks=2)
    do("train_vae", *command, "--steps", 2, "--out", tmp_path / "one")
    do("train_vae", *command, "--steps", 3, "--out", tmp_path / "one")
    do("train_vae", *command, "--steps", 3, "--micro-batch", 3, "--out", tmp_path / "micro")
    assert any(k.endswith("_ratio") for k in metrics(tmp_path / "one")[1][0])
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    assert_same_losses(tmp_path / "one", tmp_path / "micro")


def test_a_pretrained_discriminator(small, tmp_path):
    """--disc-ckpt is ignored, or its batch norm is left behind."""
    torch.manual_seed(7)
    torch.save(train_vae.PatchGAN().state_dict(), tmp_path / "disc.pt")
    command = ("--data", small / "images", *SMALL_VAE, "--align", "none", "--gan", 0.1, "--steps", 1, "--lr", 0)
    do("train_vae", *command, "--disc-ckpt", tmp_path / "disc.pt", "--out", tmp_path / "out")
    found, given = common.load_checkpoint(tmp_path / "out/vae.pt")["discriminator"], torch.load(tmp_path / "disc.pt")
    assert all(torch.equal(found[k], given[k]) for k in given if "running" not in k and "tracked" not in k) and found["main.3.num_batches_tracked"] > 0
    assert_refused(call("train_vae", *command, "--disc-ckpt", tmp_path / "gone.pt", "--out", tmp_path / "x"), "gone.pt")
