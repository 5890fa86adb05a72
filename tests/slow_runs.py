from helpers import *  # noqa: F403

# ------------------------------------------------------------------------------------------------------------
# Encoding and sampling: what goes on, what is left out, whose models


def test_sampling_goes_on(small, tmp_path):
    """A killed sample.py loses or doubles an image when it is run again, on more processes too, or takes
    another run's left-overs."""
    command = ("sample", "--sit", small / "sit/sit.pt", "--images", 21, "--steps", 2, "--sampler", "sde",
               "--labels", "blocks", "--micro-batch", 2, *FP32)
    out = tmp_path / "parts.npz"
    do(*command, "--out", tmp_path / "whole.npz")
    whole = np.load(tmp_path / "whole.npz")
    assert whole["arr_1"].tolist() == [0] * 11 + [1] * 10
    settings = common.read_json(tmp_path / "whole.json")
    settings = {k: v for k, v in settings.items() if k not in ("seconds", "made", *sample.PATHS)}

    def leave(settings):  # what a kill leaves: nine images that no run would draw
        half = np.lib.format.open_memmap(f"{out}.part", "w+", np.uint8, whole["arr_0"].shape)
        done = np.lib.format.open_memmap(f"{out}.done", "w+", np.uint8, (21,))
        half[:9], done[:9] = 77, 1
        half.flush()
        done.flush()
        common.write_json(f"{out}.run", settings)

    leave({**settings, "seed": 8})
    do(*command, "--out", out)  # other settings: begins anew
    assert np.array_equal(np.load(out)["arr_0"], whole["arr_0"])
    out.unlink()
    leave(settings)
    assert "9 of 21 images are there" in do_on_two(*command, "--out", out, folder=tmp_path)
    images = np.load(out)["arr_0"]
    assert (images[:9] == 77).all() and np.abs(images[9:].astype(int) - whole["arr_0"][9:]).max() <= 1
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.json", "parts.npz", "parts.png"]
    before = out.stat().st_mtime_ns
    assert "already there" in do(*command, "--out", out) and out.stat().st_mtime_ns == before
    do(*command, "--seed", 9, "--out", out)
    assert not np.array_equal(np.load(out)["arr_0"][9:], whole["arr_0"][9:])


def test_an_image_that_cannot_be_read_leaves_no_hole(small, tmp_path):
    """Encoding with an unreadable image shifts the rows, leaves zeros in them, or counts them in the
    statistics."""
    images = write_images(tmp_path / "images", 120, size=8)
    truncate(images / "a/010.png")
    command = "vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 8
    for precision, micro in (("bf16", 1), ("fp32", 16)):
        flags = "--precision", precision, "--micro-batch", micro, "--out", tmp_path / precision
        status, _, err = call(*command, *flags)
        assert status == 0 and "a/010.png" in err
    (images / "a/010.png").unlink()
    do(*command, *FP32, "--out", tmp_path / "without")
    one, two = data.load_latents(tmp_path / "fp32"), data.load_latents(tmp_path / "without")
    assert one.files == two.files and len(one.files) == 119 and np.array_equal(one.labels, two.labels)
    moments = [latents.moments[:].astype(float) for latents in (one, two)]
    np.testing.assert_allclose(*moments, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(one.std, two.std, rtol=1e-3, atol=1e-4)


def release(folder):
    """Files as REPA-E publishes them: joint.pt (VAE and statistics inside), alone.pt without them, the VAE
    and the statistics apart."""
    torch.save(ldm_state(), folder / "vae.pt")
    model = sit.SIT_MODELS["SiT-demo/2"](input_size=16, in_channels=3, num_classes=2)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.03)
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    state = dict(model.state_dict(), pos_embed=sit.sincos_2d(128, 8)[None])
    torch.save({"ema": state, "steps": 5}, folder / "alone.pt")
    bn = {"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(9)}
    joint = {"ema": {**state, **bn}, "vae": ldm_state(), "args": argparse.Namespace(lr=1), "steps": 5}
    torch.save(joint, folder / "joint.pt")
    stats = {"latents_scale": var.rsqrt().view(1, 3, 1, 1), "latents_bias": mean.view(1, 3, 1, 1)}
    torch.save(stats, folder / "vae-latents-stats.pt")
    np.savez(folder / "stats.npz", mean=mean.numpy(), std=var.sqrt().numpy())


def test_sampling_from_released_checkpoints(small, tmp_path):
    """REPA-E's files do not sample, their latents are not brought back to the VAE's scale, or statistics that
    are missing are made up."""
    release(tmp_path)
    flags = ("--images", 3, "--steps", 3, "--sampler", "euler", "--seed", 4, *FP32)
    alone = "sample", "--sit", tmp_path / "alone.pt", "--vae", tmp_path / "vae.pt", *flags

    def sampled(*command, name):
        do(*command, "--out", tmp_path / name)
        return np.load(tmp_path / name)["arr_0"].astype(int)
    shown = sampled("sample", "--sit", tmp_path / "joint.pt", *flags, name="joint.npz")
    assert shown.shape == (3, 32, 32, 3) and shown.std() > 1
    for stats in ("vae-latents-stats.pt", "stats.npz"):
        again = sampled(*alone, "--latent-stats", tmp_path / stats, name="alone.npz")
        assert np.abs(again - shown).max() <= 1
    halved = sampled(*alone, "--latent-stats", 0.5, name="factor.npz")
    model, _ = sit.load_sit(tmp_path / "alone.pt")
    noise = data.draw_noise(4, range(3), 0, (3, 16, 16))[1]
    labels = torch.from_numpy(np.load(tmp_path / "factor.npz")["arr_1"])
    z = sit.sample_ode(model, noise, labels, 3, method="euler")
    x = data.to_uint8(vae.load_vae(tmp_path / "vae.pt").decode(2 * z)).permute(0, 2, 3, 1)
    assert np.abs(halved - x.numpy()).max() <= 1
    np.savez(tmp_path / "bad.npz", mean=np.zeros(2), std=np.ones(2))
    bad = [(("--latent-stats", s), s) for s in (tmp_path / "bad.npz", tmp_path / "none.pt", 0, -1, "nan")]
    for more, word in [((), "--latent-stats"), (("--vae", small / "vae/vae.pt"), "4 latent channels"), *bad]:
        assert_refused(call(*alone, *more, "--out", tmp_path / "x.npz"), word)
    bare = call("sample", "--sit", tmp_path / "alone.pt", "--out", tmp_path / "x.npz")
    assert_refused(bare, "alone.pt", "--vae")
    ours = call("sample", "--sit", small / "sit/sit.pt", "--latent-stats", 1, "--out", tmp_path / "x.npz")
    assert_refused(ours, "leave the flag out")


def test_sampling_with_a_guide(small, tmp_path):
    """--guide is ignored, guides outside its interval, or takes a model of other latents."""
    release(tmp_path)
    do(*sit_command(small, tmp_path / "guide", "--steps", 1, "--seed", 5, "--lr", 0.1))
    command = "sample", "--sit", small / "sit/sit.pt", "--images", 3, "--steps", 3, "--sampler", "heun", *FP32
    guide, images = ("--cfg", 3, "--guide", tmp_path / "guide/sit.pt"), {}
    kinds = dict(plain=(), cfg=("--cfg", 3), guide=guide, outside=(*guide, "--interval", 0.96, 0.97))
    for name, flags in kinds.items():
        out = do(*command, "--interval", 0, 1, *flags, "--out", tmp_path / f"{name}.npz")
        assert ("guide/sit.pt" in out) == ("--guide" in flags)
        images[name] = np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
    assert np.array_equal(images["plain"], images["outside"])
    assert np.abs(images["guide"] - images["plain"]).max() > 3
    assert np.abs(images["guide"] - images["cfg"]).max() > 3
    do(*encode_command(small, small / "images", tmp_path / "latents", "--vae", small / "other/vae.pt"))
    do(*sit_command(tmp_path, tmp_path / "foreign", "--steps", 1))
    for file, words in (("alone.pt", ["in_channels 3", "4"]), ("foreign/sit.pt", ["latents of VAE"])):
        result = call(*command, "--cfg", 2, "--guide", tmp_path / file, "--out", tmp_path / "x.npz")
        assert_refused(result, file, *words)
