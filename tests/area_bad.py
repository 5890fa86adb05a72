from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, status 2

def vae_command(images, out, *flags):
    return "train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 2, "--out", out, *flags


def encode_command(small, images, out, *flags):
    return "vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, *FP32, "--out", out, *flags


def one_image(root):
    return write_images(root, 1), ["1 image"]


def empty(root):
    root.mkdir()
    return root, ["no images"]


def missing(root):
    return root, ["no such folder"]


def a_class_of_one(root):
    write_images(root, 8)
    write_images(root, 1, classes=("lonely",))
    return root, ["lonely", "one image"]


def smaller_than_the_crop(root):
    return write_images(root, 8, size=20), ["20", "32"]


def truncated(root):
    for i in range(8):
        path = write_images(root, 8) / f"b/{i:03d}.jpg"
        Image.effect_noise((64, 64), 90).save(path)
        truncate(path)
    return root, [".jpg", "of 16", "1%"]


def text_named_png(root):
    (write_images(root, 8) / "a/zzz.png").write_text("no image")
    return root, ["zzz.png", "1 of 9"]


def beside_classes(root):
    write_images(write_images(root, 8), 1, classes=("",))
    return root, ["000.png", "class folder"]


@pytest.mark.parametrize("make", [missing, empty, one_image, a_class_of_one, smaller_than_the_crop, truncated, text_named_png, beside_classes])
@pytest.mark.parametrize("stage", ["train", "encode"])
def test_bad_folders(stage, make, small, tmp_path):
    """A folder that cannot be used ends in a traceback, or is used."""
    root, words = make(tmp_path / "images")
    flags = ("--steps", 9)  # enough to meet every file
    assert_refused(call(*(vae_command(root, tmp_path / "out", *flags) if stage == "train" else encode_command(small, root, tmp_path / "out"))), *words)
    assert not (tmp_path / "out/meta.json").exists()


@pytest.mark.parametrize("text,words", [("file,split,hat\na/000.png,train,1\nx/1.png,val,0\n", ["line 3", "x/1.png"]),
                                        ("file,hat\na/000.png,1\n", ["'split'"]), (None, ["attributes.csv"]), ("file,split,hat,hat\n", ["'hat'", "twice"]),
                                        ("file,split,hat\na/000.png,train,1\nb/001.png,val,1\n", ["no attribute"])])
def test_bad_tables(text, words, small, tmp_path):
    """A wrong attribute table ends in a traceback, or is used."""
    root = write_images(tmp_path / "images", 8)
    if text:
        (root / "attributes.csv").write_text(text)
    assert_refused(call("probe", small / "vae/vae.pt", "--data", root, "--resolution", 32, *FP32), *words)
    if "'split'" in words or text is None:
        assert_refused(call(*vae_command(root, tmp_path / "out", "--split", "train")), *words)


def test_bad_numbers(small, tmp_path):
    """A batch above the data set or a resolution that the VAE cannot divide is used, or ends in a traceback."""
    images, latents = small / "images", small / "latents"
    assert_refused(call(*vae_command(images, tmp_path, "--batch", 41)), "--batch 41", "40")
    assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--batch", 41, "--out", tmp_path), "--batch 41", "40")
    assert_refused(call(*vae_command(images, tmp_path, "--resolution", 34)), "34", "multiple of 4")
    assert_refused(call(*encode_command(small, images, tmp_path, "--resolution", 34)), "34", "multiple of 4")
    assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0.5, "--out", tmp_path), "--data")
    assert_refused(call("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--out", tmp_path / "a.zip"), ".npz")
    assert_refused(call(*vae_command(images, tmp_path, "--init", small / "vae/vae.pt")), "--init", "--preset")


def test_foreign_checkpoints(small, tmp_path):
    """A checkpoint of another size, kind or VAE is used, or ends in a traceback."""
    checkpoint = common.load_checkpoint(small / "vae/vae.pt")
    checkpoint["config"]["ch"] = 32
    torch.save(checkpoint, tmp_path / "size.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, words in (("size.pt", ["encoder.conv_in.weight", "(16, 3, 3, 3)", "(32, 3, 3, 3)"]), ("text.pt", ["text.pt"]), ("none.pt", ["no such"])):
        assert_refused(call("vae", "--vae", tmp_path / name, "--data", small / "images", "--out", tmp_path / "out"), *words)
        assert_refused(call(*[a for a in vae_command(small / "images", tmp_path / "out", "--init", tmp_path / name) if a not in ("--preset", "demo")]), *words)
    sit_pt, vae_pt, other = small / "sit/sit.pt", small / "vae/vae.pt", small / "other/vae.pt"
    assert_refused(call("sample", "--sit", vae_pt, "--images", 2, "--out", tmp_path / "a.npz"), vae_pt)
    assert_refused(call("sample", "--sit", sit_pt, "--vae", other, "--images", 2, "--out", tmp_path / "a.npz"), other, vae_pt)
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("stage", ["train", "encode", "probe"])
def test_a_sit_is_no_vae(stage, small, tmp_path):
    """The checkpoint of another stage ends in a traceback."""
    sit_pt, images = small / "sit/sit.pt", small / "images"
    (images / "attributes.csv").write_text("file,split,hat\n")
    commands = {"train": ("train_vae", "--data", images, "--init", sit_pt, "--lpips", 0, *PLAIN, "--batch", 4, "--out", tmp_path),
                "encode": ("vae", "--vae", sit_pt, "--data", images, "--out", tmp_path), "probe": ("probe", sit_pt, "--data", images)}
    assert_refused(call(*commands[stage]), sit_pt, "train_vae.py")


def test_latents_of_another_vae(small, tmp_path):
    """A cache is overwritten with another VAE's latents, or a SiT goes on training on them."""
    shutil.copytree(small / "latents", tmp_path / "latents")
    before = digest(tmp_path / "latents")
    other = ("vae", "--vae", small / "other/vae.pt", "--data", small / "images", "--resolution", 32, "--flip", *FP32, "--out", tmp_path / "latents")
    assert_refused(call(*other), "vae")
    assert digest(tmp_path / "latents") == before
    command = ("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--out", tmp_path / "sit")
    do(*command, "--steps", 1)
    shutil.rmtree(tmp_path / "latents")
    assert_refused(call(*command, "--steps", 2), "latents: no such folder; if it has moved")
    do(*other)
    assert_refused(call(*command, "--steps", 2), data.load_latents(tmp_path / "latents").meta["vae_hash"])
    truncate(tmp_path / "latents/moments.npy")
    assert_refused(call(*command, "--steps", 2), "damaged")


def test_vfm_that_cannot_be_had(small, tmp_path):
    """An unknown or unreachable VFM, or one whose images are gone, ends in a traceback or in another model."""
    def align(*flags):
        return call(*vae_command(small / "images", tmp_path, "--lambda-align", 1, *flags))
    assert_refused(align("--vfm", "dinov9"), "dinov9")
    assert_refused(align("--vfm", "vit_base_patch14_dinov2.lvd142m"), "vit_base_patch14_dinov2.lvd142m", "--vfm-ckpt")
    assert_refused(align(*VFM, "--grid", 3), "3 x 3")
    assert_refused(call("fid", "score", small / "images", small / "images", "--net", "dinov9"), "dinov9")
    few = write_images(tmp_path / "images", 8)
    assert_refused(call("train_sit", "--latents", small / "latents", "--data", few, *SMALL_SIT, "--repa", 1, *VFM, "--out", tmp_path / "sit"), "a/008.png")


@pytest.mark.parametrize("stage", ["avatars", "train_vae", "vae", "train_sit", "sample", "recon json", "recon png", "score", "probe json", "probe csv"])
def test_output_that_cannot_be_written(stage, small, tmp_path):
    """A read-only or impossible output folder ends in a traceback. (It lies below a file: nobody can write there.)"""
    (tmp_path / "file").write_text("no folder")
    below, images, vae_pt = tmp_path / "file/out", small / "images", small / "vae/vae.pt"
    table = [f"{f},{s},{int(f[0] == 'a')}" for s, f in zip(data.SPLITS * 20, data.find_images(images))]
    (images / "attributes.csv").write_text("\n".join(["file,split,a", *table]) + "\n")
    recon = ("fid", "recon", "--vae", vae_pt, "--data", images, "--resolution", 32, "--net", "none", "--lpips", 0)
    score = ("fid", "score", images, images, "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    linear = ("probe", vae_pt, "--data", images, "--resolution", 32)
    commands = {"avatars": ("data", "avatars", below, "--n", 5), "train_vae": vae_command(images, below), "vae": encode_command(small, images, below),
                "train_sit": ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--repa", 0, "--steps", 2, "--out", below),
                "sample": ("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--steps", 2, "--out", below / "a.npz"),
                "recon json": (*recon, "--json", below / "a.json"), "recon png": (*recon, "--png", below / "a.png"),
                "score": (*score, "--json", below / "a.json"), "probe json": (*linear, "--json", below / "a.json"), "probe csv": (*linear, "--csv", below / "a.csv")}
    assert_refused(call(*commands[stage]), tmp_path / "file")


def test_short_disk(small, tmp_path, monkeypatch):
    """A run begins that the disk cannot hold."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    for command in (vae_command(small / "images", tmp_path), encode_command(small, small / "images", tmp_path),
                    ("sample", "--sit", small / "sit/sit.pt", "--images", 2, "--out", tmp_path / "a.npz")):
        assert_refused(call(*command), "GiB are free")
    assert not (tmp_path / "moments.npy").exists()


def test_bad_input_in_a_process_of_its_own(small, tmp_path):
    """As above through the operating system: the status, one line on stderr, no traceback; also without a network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    lpips_flags = ("--lpips", 1)
    for command, words in ((vae_command(tmp_path / "none", tmp_path), ["no such folder"]), (vae_command(small / "images", tmp_path, *lpips_flags), ["--lpips-ckpt"])):
        _, err = run(*command, status=2, **nowhere, TORCH_HOME=str(tmp_path / "torch"))
        assert_refused((2, "", err), *words)
