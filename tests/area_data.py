from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# data.py

def ramp():
    """(16, 16, 3) uint8: different along both axes and in each channel."""
    y, x = np.mgrid[:16, :16]
    return np.stack([x * 16, y * 16, (x + y) * 8], -1).astype(np.uint8)


def as_read(path, image, **options):
    image.save(path, **options)
    return data.read_image(path, 16).permute(1, 2, 0).numpy()


def test_colour_files_become_rgb(tmp_path):
    """PNG, lossless WebP, JPEG, GIF or BMP files change their colours on the way in."""
    image = Image.fromarray(ramp())
    assert np.array_equal(as_read(tmp_path / "a.png", image), ramp())
    assert np.array_equal(as_read(tmp_path / "a.webp", image, lossless=True), ramp())
    assert np.array_equal(as_read(tmp_path / "a.bmp", image), ramp())
    assert np.abs(as_read(tmp_path / "a.jpg", image, quality=95, subsampling=0) - ramp().astype(float)).max() < 12
    four = image.quantize(4)
    assert np.array_equal(as_read(tmp_path / "a.gif", four), np.array(four.convert("RGB")))


def test_palette_with_and_without_transparency(tmp_path):
    """Palette indices are read as greys, or transparent pixels show the colour under them instead of white."""
    index = np.arange(256, dtype=np.uint8).reshape(16, 16) % 3
    image = Image.fromarray(index, "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    assert np.array_equal(as_read(tmp_path / "a.png", image), colours[index])
    colours[1] = 255
    assert np.array_equal(as_read(tmp_path / "b.png", image, transparency=1), colours[index])


def test_greys(tmp_path):
    """8-bit, 1-bit or 16-bit greys come out dark, clipped or on another scale."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = np.repeat(grey[:, :, None], 3, 2)
    assert np.array_equal(as_read(tmp_path / "a.png", Image.fromarray(grey)), three)
    assert np.array_equal(as_read(tmp_path / "b.png", Image.fromarray((grey > 99)).convert("1")), 255 * (three > 99))
    for name in ("c.png", "c.tif"):
        assert np.array_equal(as_read(tmp_path / name, Image.fromarray(grey.astype(np.uint16) * 257)), three)


def test_cmyk(tmp_path):
    """CMYK inks are read as RGB, or inverted."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert (as_read(tmp_path / "a.tif", image) == [255, 0, 0]).all()
    assert np.abs(as_read(tmp_path / "a.jpg", image, quality=95) - np.array([255.0, 0, 0])).max() < 8


def test_alpha_lies_on_white(tmp_path):
    """Transparent pixels come out black, or with their hidden colour, in any mode that has transparency."""
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(255.0 - alpha[:, :, None], 3, 2)  # black under alpha on white
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 3] = alpha
    assert np.abs(as_read(tmp_path / "a.png", Image.fromarray(rgba)) - expected).max() <= 1
    assert np.abs(as_read(tmp_path / "b.png", Image.fromarray(rgba).convert("LA")) - expected).max() <= 1
    keyed = as_read(tmp_path / "c.png", Image.fromarray(ramp()), transparency=(0, 16, 8))  # colour of row 1, column 0
    assert (keyed[1, 0] == 255).all() and np.array_equal(keyed[2:], ramp()[2:])


def test_exif_rotation(tmp_path):
    """Photographs taken upright lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    assert np.array_equal(as_read(tmp_path / "a.png", Image.fromarray(ramp()), exif=exif), np.rot90(ramp(), -1))


@pytest.mark.parametrize("width,height,size", [(16, 16, 16), (33, 47, 16), (131, 67, 16), (64, 31, 16), (97, 97, 31), (20, 13, 16)])
def test_centre_crop_is_adms(width, height, size):
    """The crop differs from the one that all published figures use (guided-diffusion's center_crop_arr)."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    small = image
    while min(*small.size) >= 2 * size:
        small = small.resize(tuple(x // 2 for x in small.size), resample=Image.Resampling.BOX)
    scale = size / min(*small.size)
    small = np.array(small.resize(tuple(round(x * scale) for x in small.size), resample=Image.Resampling.BICUBIC))
    top, left = (small.shape[0] - size) // 2, (small.shape[1] - size) // 2
    assert np.array_equal(np.array(data.center_crop(image, size)), small[top:top + size, left:left + size])


def test_uint8_round_trip():
    """Images drift by a level between disk, model range and disk, or wrap around outside [-1, 1]."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(data.to_uint8(data.to_float(x)), x)
    assert data.to_float(x).min() == -1 and data.to_float(x).max() == 1
    assert data.to_uint8(torch.tensor([-7.0, 7.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_image_folder(tmp_path):
    """Labels do not follow the class folders, nested folders become classes, or flips are no mirror images."""
    root = write_images(tmp_path / "x", 6, classes=("b/deep", "a", "c"))
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    shutil.copy(root / "a/001.png", root / ".hidden/001.png")
    images = data.ImageFolder(root, 32, flip=True)
    assert images.classes == ["a", "b", "c"] and len(images) == 12 and len(images.files) == 6
    assert images.files == ["a/001.png", "a/004.png", "b/deep/000.png", "b/deep/003.png", "c/002.png", "c/005.png"]
    assert [images[i][1] for i in range(12)] == [0, 0, 1, 1, 2, 2] * 2
    assert images[3][0].dtype == torch.uint8 and images[3][0].shape == (3, 32, 32)
    assert torch.equal(images[9][0], images[3][0].flip(2)) and not torch.equal(images[9][0], images[3][0])
    with pytest.raises(IndexError):  # or `for image, label in images` never ends
        images[12]

    flat = data.ImageFolder(write_images(tmp_path / "flat", 3, classes=("",)), 32)
    assert flat.classes == ["all"] and flat.labels == [0, 0, 0]
    shutil.copy(root / "a/001.png", root / "stray.png")
    with pytest.raises(UserError, match="stray.png"):
        data.ImageFolder(root, 32)


def test_split_keeps_the_folders_classes(tmp_path):
    """A split reads other files than the table names, or numbers its classes anew."""
    root = write_images(tmp_path, 6, classes=("a", "b", "c"))
    rows = [f"{f},{'val' if f[0] == 'b' else 'train'},1" for f in data.find_images(root)]
    (root / "attributes.csv").write_text("\n".join(["file,split,hat", *rows]) + "\n")
    images = data.ImageFolder(root, 32, split="val")
    assert images.files == ["b/001.png", "b/004.png"] and images.labels == [1, 1] and images.classes == ["a", "b", "c"]
    with pytest.raises(UserError, match="test"):
        data.ImageFolder(root, 32, split="test")


def test_unreadable_files(tmp_path, capsys):
    """A bad file stops or shifts a run: it must be named, left out in order when encoding, replaced when training."""
    root = write_images(tmp_path, 120, size=8)
    truncate(root / "a/010.png")
    bad = data.find_images(root).index("a/010.png")
    images, whole = data.ImageFolder(root, 8), {f: data.read_image(root / f, 8) for f in data.find_images(root) if f != "a/010.png"}
    batches = [list(range(k, k + 10)) for k in range(0, 120, 10)]

    rows = []
    for pixels, labels, kept in data.load_batches(images, batches):
        assert len(pixels) == len(labels) == len(kept)
        for pixel, label, row in zip(pixels, labels, kept):
            assert torch.equal(pixel, whole[images.files[row]]) and label == images.labels[row]
        rows += kept
    assert rows == [r for r in range(120) if r != bad] and list(images.bad) == ["a/010.png"]

    for (pixels, labels, kept), asked in zip(data.load_batches(images, batches, replace=True), batches):
        assert len(pixels) == 10 and kept == asked
        if bad in asked:
            assert torch.equal(pixels[asked.index(bad)], whole[images.files[bad + 1]])
    assert capsys.readouterr().err.count("a/010.png") == 1

    truncate(root / "b/011.png")  # 2 of 120 are more than 1 %
    with pytest.raises(UserError, match="2 of 120"):
        list(data.load_batches(data.ImageFolder(root, 8), batches, workers=1))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, about damaged tags
def test_damaged_files_raise_nothing_else(tmp_path):
    """A damaged file ends the program with a traceback instead of being skipped."""
    rng, outcomes = np.random.default_rng(0), set()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera"
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp"):
        Image.fromarray(ramp()).save(tmp_path / name, **({} if name[-3:] in ("gif", "bmp") else {"exif": exif}))
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            broken = bytearray(whole)
            for at in rng.integers(0, len(whole), 4):
                broken[at] = rng.integers(256)
            (tmp_path / name).write_bytes(broken[:rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else broken)
            try:
                outcomes.add(data.read_image(tmp_path / name, 16).shape)
            except data.UnreadableImage as e:
                assert name in str(e)
                outcomes.add("unreadable")
    assert outcomes == {(3, 16, 16), "unreadable"}


def test_sample_order():
    """An epoch repeats or misses images, or the order depends on how a run is cut into steps, ranks or resumes."""
    whole = data.sample_order(7, 3, 0, 35)
    for e in range(5):
        assert sorted(whole[7 * e:7 * e + 7]) == list(range(7))
    assert whole[:7] != whole[7:14] and whole != data.sample_order(7, 4, 0, 35)
    assert [row for start in range(0, 35, 5) for row in data.sample_order(7, 3, start, 5)] == whole
    assert [row for start in range(35) for row in data.sample_order(7, 3, start, 1)] == whole


def test_draw_noise():
    """Noise depends on the batch it is drawn in, repeats between rows or seeds, or is not standard."""
    u, n, m = data.draw_noise(5, range(2000), 2, (4, 2), (3,))
    assert u.shape == (2000, 2) and n.shape == (2000, 4, 2) and m.shape == (2000, 3) and n.dtype == torch.float32
    other = data.draw_noise(5, [1999, 7], 2, (4, 2), (3,))
    assert all(torch.equal(a[[1999, 7]], b) for a, b in zip((u, n, m), other))
    assert not torch.equal(n, data.draw_noise(6, range(2000), 2, (4, 2), (3,))[1]) and len(n.flatten().unique()) > 15900
    assert abs(n.mean()) < 0.03 and abs(n.std() - 1) < 0.03 and abs((n ** 4).mean() - 3) < 0.25
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005


def test_checkpoints_survive_a_torn_file(tmp_path, capsys):
    """A kill while saving, a cut or a flipped bit loses the run or is read as if it were right: the checkpoint before must load, and the next
    save must not put the damaged one in its place."""
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    assert common.load_newest(path) is None
    state = lambda step: {"step": step, "w": torch.full((1000,), float(step))}
    for step in (1, 2, 3):
        common.save_checkpoint(path, state(step))
    assert common.load_newest(path)["step"] == 3 and len(list(tmp_path.iterdir())) == 2
    good, weights = path.read_bytes(), state(3)["w"].numpy().tobytes()
    at = good.index(weights)
    for flip in (at, at + 3999, *(at + rng.integers(0, 4000, 20)), "cut"):
        flipped = bytearray(good)
        flipped[0 if flip == "cut" else flip] ^= 1 << rng.integers(8)
        path.write_bytes(good[:len(good) // 2] if flip == "cut" else flipped)
        with pytest.raises(UserError, match="x.pt: not a readable"):
            common.load_checkpoint(path)
        assert common.load_newest(path)["step"] == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and f"{path}: not" in err and "going on from" in err and "x.prev.pt" in err, err
        assert not path.exists() and path.with_suffix(".damaged").exists()
    common.save_checkpoint(path, state(5))
    common.save_checkpoint(path, state(6))
    path.unlink()
    assert common.load_newest(path)["step"] == 5
    truncate(tmp_path / "x.prev.pt")
    shutil.copy(tmp_path / "x.prev.pt", path)
    with pytest.raises(UserError, match="x.pt: not .*x.prev.pt: not .*no checkpoint is left.*another --out"):
        common.load_newest(path)
    assert path.exists() and "going on" not in capsys.readouterr().err


def test_what_is_not_finite_is_not_saved(tmp_path):
    """A checkpoint with NaN or infinity takes the place of a good one, or is loaded."""
    path = tmp_path / "x.pt"
    for step in (1, 2):
        common.save_checkpoint(path, {"step": step, "model": {"w": torch.ones(3)}, "n": torch.tensor([1])})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"not saved, \['model'\]\['w'\] is not finite \(1 such"):
            common.save_checkpoint(path, {"step": 3, "model": {"w": torch.tensor([1, bad, 1])}, "n": torch.tensor([1])})
        with pytest.raises(UserError, match="a file: weight holds NaN or infinity"):
            common.load_weights(nn.Linear(1, 1, bias=False), {"weight": torch.full((1, 1), bad)}, "a file")
    assert common.load_checkpoint(path)["step"] == 2 and common.load_checkpoint(tmp_path / "x.prev.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.prev.pt", "x.pt"]


@pytest.mark.parametrize("text,word", [
    ("name,split,hat\na/000.png,train,1\n", "'file'"), ("file,hat\na/000.png,1\n", "'split'"),
    ("file,split,hat\na/000.png,train,2\n", "line 2"), ("file,split,hat\na/000.png,train\n", "line 2"),
    ("file,split,hat\na/000.png,train,1\na/009.png,train,1\n", "a/009.png"), ("file,split,hat\na/000.png,dev,1\n", "'dev'"),
    ("file,split,hat\na/000.png,train,1\na/000.png,val,1\n", "a/000.png"), ("", "'file'"), (None, "no such file")])
def test_bad_attribute_tables(tmp_path, text, word):
    """A wrong table is read as if it were right; the error must name the column, line or file."""
    root = write_images(tmp_path, 2)
    if text is not None:
        (root / "attributes.csv").write_text(text)
    with pytest.raises(UserError, match=word):
        data.read_attributes(root)


def test_attribute_table(tmp_path):
    """Values land in another row or column, or an empty field is not unknown."""
    root = write_images(tmp_path, 2)
    (root / "attributes.csv").write_text("hat,file,split,red\n1,b/001.png,val,0\n,a/000.png,train,1\n")
    table = data.read_attributes(root)
    assert (table.files, table.splits, table.names) == (["b/001.png", "a/000.png"], ["val", "train"], ["hat", "red"])
    assert np.array_equal(table.values, [[1, 0], [np.nan, 1]], equal_nan=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_end_in_one_error(tmp_path, legacy):
    """Flipped bytes, a cut, or an empty file end in a traceback instead of a line that names the file."""
    path = tmp_path / "x.pt"
    torch.save({"config": {"depth": 1}, "ema": {"w": torch.zeros(50)}}, path, _use_new_zipfile_serialization=not legacy)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(300):
        damaged = bytearray(good[:rng.integers(len(good))] if i % 3 == 0 else good)
        for at in rng.integers(len(damaged), size=4) if damaged else ():
            damaged[at] = rng.integers(256)
        path.write_bytes(b"" if i == 1 else bytes(damaged))
        with pytest.raises(ValueError, match="x.pt"):  # never a SiT, even when whole
            sit.load_sit(path)
        try:
            common.load_checkpoint(path)
        except UserError as e:
            refused += "x.pt" in str(e)
    assert refused > 100


def test_load_weights_names_the_misfit():
    """Weights of another size load in part, or the error hides which ones and how they differ."""
    state = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    with pytest.raises(UserError, match=r"a.pt.*weight is \(3, 2\), expected \(3, 4\)"):
        common.load_weights(nn.Linear(4, 3), state, "a.pt")
    with pytest.raises(UserError, match="bias is missing"):
        common.load_weights(nn.Linear(2, 3), {"weight": state["weight"]}, "a.pt")
    with pytest.raises(UserError, match="more is unexpected"):
        common.load_weights(nn.Linear(2, 3), {**state, "more": state["bias"]}, "a.pt")


def test_ema():
    """The average starts from noise, or follows another decay than the one asked for."""
    model, ema = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0), ema.weight.data.fill_(0.0)
    common.update_ema(ema, model, 0, 0.99)
    assert ema.weight.item() == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    common.update_ema(ema, model, 10 ** 6, 0.99)
    assert ema.weight.item() == pytest.approx(0.901)


@pytest.fixture(scope="session")
def avatars(tmp_path_factory):
    """The built-in data set, 600 images: 500 train, 50 val, 50 test."""
    root = tmp_path_factory.mktemp("avatars") / "avatars"
    run("data", "avatars", root, "--n", 600)
    return root


def digest(root):
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.*"))}


def test_avatars_are_reproducible(avatars, tmp_path):
    """The same seed draws other images, or an image depends on how many are drawn."""
    data.render_avatars(tmp_path / "a", n=120)
    data.render_avatars(tmp_path / "b", n=120)
    a, b, more = digest(tmp_path / "a"), digest(tmp_path / "b"), digest(avatars)
    assert a == b and len(a) == 122  # with the table and the licences
    assert all(more[f] == h for f, h in a.items() if f.endswith(".png")) and len(set(a.values())) == 122
    before = (tmp_path / "a/attributes.csv").stat().st_mtime_ns
    data.render_avatars(tmp_path / "a", n=120)  # is done
    assert (tmp_path / "a/attributes.csv").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="120"):
        data.render_avatars(tmp_path / "a", n=121)


def test_avatars_are_a_data_set(avatars):
    """Too few classes or usable attributes, a missing licence, or splits that overlap."""
    images, table = data.ImageFolder(avatars, 64), data.read_attributes(avatars)
    assert len(images.classes) >= 4 and images[0][0].shape == (3, 64, 64)
    assert sorted(table.files) == images.files and len(images.files) == 600
    assert [table.splits.count(s) for s in data.SPLITS] == [500, 50, 50]
    style = np.array([f.split("/")[0] for f in table.files])
    with np.errstate(all="ignore"):
        share = np.array([[table.values[style == s, a].mean() for a in range(len(table.names))] for s in images.classes])
    assert ((share >= 0.02) & (share <= 0.9)).any(0).sum() >= 40
    assert set(json.loads((avatars / "avatars.json").read_text())["styles"]) == set(images.classes)
    assert all(s["license"] for s in json.loads((avatars / "avatars.json").read_text())["styles"].values())
