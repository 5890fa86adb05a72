from helpers import *  # noqa: F403
import multiprocessing.dummy

from extras import avatars as extras_avatars


# -----------------------------------------------------------------------------------------------------------
# The code itself


def test_style():
    """A line is too long, or a name unused or unknown: what `ruff check` finds."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", HERE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -----------------------------------------------------------------------------------------------------------
# data.py: images


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
    jpeg = as_read(tmp_path / "a.jpg", image, quality=95, subsampling=0)
    assert np.abs(jpeg - ramp().astype(float)).max() < 12
    four = image.quantize(4)
    assert np.array_equal(as_read(tmp_path / "a.gif", four), np.array(four.convert("RGB")))


def test_palette_with_and_without_transparency(tmp_path):
    """Palette indices are read as greys, or transparent pixels show their hidden colour instead of white."""
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
    one_bit = Image.fromarray(grey > 99).convert("1")
    assert np.array_equal(as_read(tmp_path / "b.png", one_bit), 255 * (three > 99))
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
    second_row = (0, 16, 8)  # the colour of row 1, column 0
    keyed = as_read(tmp_path / "c.png", Image.fromarray(ramp()), transparency=second_row)
    assert (keyed[1, 0] == 255).all() and np.array_equal(keyed[2:], ramp()[2:])


def test_exif_rotation(tmp_path):
    """Photographs taken upright lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    turned = as_read(tmp_path / "a.png", Image.fromarray(ramp()), exif=exif)
    assert np.array_equal(turned, np.rot90(ramp(), -1))


@pytest.mark.parametrize("width,height,size", [
    (16, 16, 16), (33, 47, 16), (131, 67, 16), (64, 31, 16), (97, 97, 31), (20, 13, 16)])
def test_centre_crop_is_adms(width, height, size):
    """The crop differs from the one that all published figures use (guided-diffusion's center_crop_arr)."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    small = image
    while min(*small.size) >= 2 * size:
        small = small.resize(tuple(x // 2 for x in small.size), resample=Image.Resampling.BOX)
    scale = size / min(*small.size)
    scaled = tuple(round(x * scale) for x in small.size)
    small = np.array(small.resize(scaled, resample=Image.Resampling.BICUBIC))
    top, left = (small.shape[0] - size) // 2, (small.shape[1] - size) // 2
    expected = small[top:top + size, left:left + size]
    assert np.array_equal(np.array(data.center_crop(image, size)), expected)


def test_uint8_round_trip():
    """Images drift by a level between disk, model range and disk, or wrap around outside [-1, 1]."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(data.to_uint8(data.to_float(x)), x)
    assert data.to_float(x).min() == -1 and data.to_float(x).max() == 1
    assert data.to_uint8(torch.tensor([-7.0, 7.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_image_folder(tmp_path):
    """Labels do not follow the class folders, nested folders are classes, or flips are no mirror images."""
    root = write_images(tmp_path / "x", 6, classes=("b/deep", "a", "c"))
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    shutil.copy(root / "a/001.png", root / ".hidden/001.png")
    images = data.ImageFolder(root, 32, flip=True)
    assert images.classes == ["a", "b", "c"] and len(images) == 12
    assert images.files == ["a/001.png", "a/004.png", "b/deep/000.png", "b/deep/003.png",
                            "c/002.png", "c/005.png"]
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
    assert images.files == ["b/001.png", "b/004.png"] and images.labels == [1, 1]
    assert images.classes == ["a", "b", "c"]
    with pytest.raises(UserError, match="test"):
        data.ImageFolder(root, 32, split="test")


def test_unreadable_files(tmp_path, capsys):
    """A bad file stops or shifts a run: it must be named, left out in order when encoding, replaced when
    training."""
    root = write_images(tmp_path, 120, size=8)
    truncate(root / "a/010.png")
    bad = data.find_images(root).index("a/010.png")
    images = data.ImageFolder(root, 8)
    intact = {f: data.read_image(root / f, 8) for f in images.files if f != "a/010.png"}
    batches = [list(range(k, k + 10)) for k in range(0, 120, 10)]

    rows = []
    for pixels, labels, kept in data.load_batches(images, batches):
        assert len(pixels) == len(labels) == len(kept)
        for pixel, label, row in zip(pixels, labels, kept, strict=True):
            assert torch.equal(pixel, intact[images.files[row]]) and label == images.labels[row]
        rows += kept
    assert rows == [r for r in range(120) if r != bad] and list(images.bad) == ["a/010.png"]

    replaced = data.load_batches(images, batches, replace=True)
    for (pixels, _, kept), asked in zip(replaced, batches, strict=True):
        assert len(pixels) == 10 and kept == asked
        if bad in asked:
            assert torch.equal(pixels[asked.index(bad)], intact[images.files[bad + 1]])
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
        tags = {} if name[-3:] in ("gif", "bmp") else {"exif": exif}
        Image.fromarray(ramp()).save(tmp_path / name, **tags)
        intact = (tmp_path / name).read_bytes()
        for _ in range(60):
            broken = bytearray(intact)
            for at in rng.integers(0, len(intact), 4):
                broken[at] = rng.integers(256)
            if rng.random() < 0.3:
                broken = broken[:rng.integers(1, len(intact) + 1)]
            (tmp_path / name).write_bytes(broken)
            try:
                outcomes.add(data.read_image(tmp_path / name, 16).shape)
            except data.UnreadableImage as e:
                assert name in str(e)
                outcomes.add("unreadable")
    assert outcomes == {(3, 16, 16), "unreadable"}


def test_check(tmp_path):
    """`data.py check` misses an unreadable image or a wrong table, or its old command leads nowhere."""
    root = write_images(tmp_path / "x", 101, size=8)
    files = data.find_images(root)
    (root / "attributes.csv").write_text("file,split,hat\n" + "".join(f"{f},train,1\n" for f in files))
    truncate(root / "a/010.png")
    status, out, err = call("data", "check", root, "--size", 8)
    assert status == 0 and "100 images in 2 classes, 1 unreadable" in out and "1 attributes" in out
    assert "a/010.png" in err
    truncate(root / "b/011.png")
    assert_refused(call("data", "check", root, "--size", 8), "2 of 101")
    assert_refused(call("data", "check", tmp_path / "gone"), "gone", "python extras/avatars.py")
    assert_refused(call("data", "avatars", "out/x", "--n", 5), "python extras/avatars.py out/x --n 5")


# -----------------------------------------------------------------------------------------------------------
# data.py: order, noise, attribute tables


def test_sample_order():
    """An epoch repeats or misses images, or the order depends on how a run is cut into steps or processes."""
    order = data.sample_order(7, 3, range(35))
    for e in range(5):
        assert sorted(order[7 * e:7 * e + 7]) == list(range(7))
    assert order[:7] != order[7:14] and order != data.sample_order(7, 4, range(35))
    in_steps = [data.sample_order(7, 3, range(start, start + 5)) for start in range(0, 35, 5)]
    assert sum(in_steps, []) == order
    assert data.sample_order(7, 3, [34, 2, 9]) == [order[34], order[2], order[9]]


def test_draw_noise():
    """Noise depends on the batch it is drawn in, repeats between rows or seeds, or is not standard."""
    u, n, m = data.draw_noise(5, range(2000), 2, (4, 2), (3,))
    assert u.shape == (2000, 2) and n.shape == (2000, 4, 2) and m.shape == (2000, 3)
    assert n.dtype == torch.float32
    other = data.draw_noise(5, [1999, 7], 2, (4, 2), (3,))
    assert all(torch.equal(a[[1999, 7]], b) for a, b in zip((u, n, m), other, strict=True))
    assert not torch.equal(n, data.draw_noise(6, range(2000), 2, (4, 2), (3,))[1])
    assert len(n.flatten().unique()) > 15900
    assert abs(n.mean()) < 0.03 and abs(n.std() - 1) < 0.03 and abs((n ** 4).mean() - 3) < 0.25
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005


@pytest.mark.parametrize("text,word", [
    ("name,split,hat\na/000.png,train,1\n", "'file'"),
    ("file,hat\na/000.png,1\n", "'split'"),
    ("file,split,hat\na/000.png,train,2\n", "line 2"),
    ("file,split,hat\na/000.png,train\n", "line 2"),
    ("file,split,hat\na/000.png,train,1\na/009.png,train,1\n", "a/009.png"),
    ("file,split,hat\na/000.png,dev,1\n", "'dev'"),
    ("file,split,hat\na/000.png,train,1\na/000.png,val,1\n", "a/000.png"),
    ("file,split,hat,hat\na/000.png,train,1,1\n", "'hat'"),
    ("", "'file'"),
    (None, "no such file")])
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
    assert table.files == ["b/001.png", "a/000.png"] and table.splits == ["val", "train"]
    assert table.names == ["hat", "red"]
    assert np.array_equal(table.values, [[1, 0], [np.nan, 1]], equal_nan=True)


# -----------------------------------------------------------------------------------------------------------
# common.py: checkpoints


def test_checkpoints_survive_a_torn_file(tmp_path, capsys):
    """A kill while saving, a cut or a flipped bit loses the run or is read as if it were right: the
    checkpoint before must load, and the next save must not put the damaged one in its place."""
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)

    def save(step):
        common.save_checkpoint(path, {"step": step, "w": torch.full((1000,), float(step))})

    assert common.load_newest(path) is None
    for step in (1, 2, 3):
        save(step)
    assert common.load_newest(path)["step"] == 3 and len(list(tmp_path.iterdir())) == 2
    good = path.read_bytes()
    at = good.index(torch.full((1000,), 3.0).numpy().tobytes())
    for flip in (at, at + 3999, *(at + rng.integers(0, 4000, 20)), "cut"):
        flipped = bytearray(good)
        flipped[0 if flip == "cut" else flip] ^= 1 << rng.integers(8)
        path.write_bytes(good[:len(good) // 2] if flip == "cut" else flipped)
        with pytest.raises(UserError, match="x.pt: not a readable"):
            common.load_checkpoint(path)
        assert common.load_newest(path)["step"] == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path}: not" in line and "going on from" in line and "x.prev.pt" in line
        assert not path.exists() and path.with_suffix(".damaged").exists()

    save(5)
    save(6)
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
            weights = {"w": torch.tensor([1, bad, 1])}
            common.save_checkpoint(path, {"step": 3, "model": weights, "n": torch.tensor([1])})
        with pytest.raises(UserError, match="a file: weight holds NaN or infinity"):
            common.load_weights(nn.Linear(1, 1, bias=False), {"weight": torch.full((1, 1), bad)}, "a file")
    assert common.load_checkpoint(path)["step"] == 2
    assert common.load_checkpoint(tmp_path / "x.prev.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.prev.pt", "x.pt"]


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_end_in_one_error(tmp_path, legacy):
    """Flipped bytes, a cut, or an empty file end in a traceback instead of a line that names the file."""
    path = tmp_path / "x.pt"
    state = {"config": {"depth": 1}, "ema": {"w": torch.zeros(50)}}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(90):
        damaged = bytearray(good[:rng.integers(len(good))] if i % 3 == 0 else good)
        for at in rng.integers(len(damaged), size=4) if damaged else ():
            damaged[at] = rng.integers(256)
        path.write_bytes(b"" if i == 1 else bytes(damaged))
        with pytest.raises(ValueError, match="x.pt"):  # never a SiT, even when intact
            sit.load_sit(path)
        try:
            common.load_checkpoint(path)
        except UserError as e:
            refused += "x.pt" in str(e)
    assert refused > 30


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
    model.weight.data.fill_(1.0)
    ema.weight.data.fill_(0.0)
    common.update_ema(ema, model, 0, 0.99)
    assert ema.weight.item() == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    common.update_ema(ema, model, 10 ** 6, 0.99)
    assert ema.weight.item() == pytest.approx(0.901)


# -----------------------------------------------------------------------------------------------------------
# extras/avatars.py


def draw_avatars(n, seed=0):
    """[(style, options, attributes)] of the first n avatars."""
    drawn = []
    for i in range(n):
        style = list(extras_avatars.STYLES)[i % len(extras_avatars.STYLES)]
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
        drawn.append((style, *extras_avatars.draw_options(style, rng)))
    return drawn


def test_avatars_are_drawn_as_ever():
    """The same seed draws other images than those that results were measured on."""
    drawn = [[options, sorted(present)] for _, options, present in draw_avatars(500)]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == "d9112f95c4cab372"


def test_avatars_have_usable_attributes():
    """Too few classes or attributes that are neither rare nor everywhere, or splits of other sizes."""
    drawn, usable = draw_avatars(600), set()
    styles = list(extras_avatars.STYLES)
    assert len(styles) >= 4
    for style in styles:
        of_style = [present for s, _, present in drawn if s == style]
        assert set().union(*of_style) - {"flipped"} <= set(extras_avatars.vocabulary(style)) | \
            {f"{part}_{family}" for part, families in extras_avatars.COLORS.items() for family in families}
        for name in extras_avatars.vocabulary(style):
            share = np.mean([name in present for present in of_style])
            usable |= {name} if 0.02 <= share <= 0.9 else set()
    assert len(usable) >= 40
    rows = [{} for _ in range(600)]
    extras_avatars.assign_splits(rows, 0)
    assert Counter(row["split"] for row in rows) == dict(train=500, val=50, test=50)


def test_avatars_are_rendered(tmp_path, monkeypatch):
    """An image depends on how many are drawn, the folder is no data set, a licence is missing, or another
    set is overwritten."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: multiprocessing.dummy)  # threads: faster
    root = tmp_path / "a"
    command = ("extras.avatars", root, "--size", 32, "--n")
    assert "30 images of 32 x 32 in 5 classes" in do(*command, 30, "--dry-run") and not root.exists()
    do(*command, 30)
    images, table = data.ImageFolder(root, 32), data.read_attributes(root)
    assert sorted(table.files) == images.files and len(images.files) == 30
    assert images.classes == sorted(extras_avatars.STYLES)
    assert set(table.splits) == set(data.SPLITS)
    record = json.loads((root / "avatars.json").read_text())
    assert set(record["styles"]) == set(images.classes)
    assert all(style["license"] for style in record["styles"].values())

    style = list(extras_avatars.STYLES)[2]
    (tmp_path / style).mkdir()
    row = extras_avatars.render_avatar((str(tmp_path), 7, 32, 0))  # alone, in this process
    assert row["file"] == f"{style}/00007.png"
    assert (tmp_path / row["file"]).read_bytes() == (root / row["file"]).read_bytes()
    at = table.files.index(row["file"])
    known = {name: value for name, value in zip(table.names, table.values[at], strict=True) if value == value}
    assert known == {name: value for name, value in row.items() if name != "file"}

    before = (root / "attributes.csv").stat().st_mtime_ns
    assert "already" in do(*command, 30)
    assert (root / "attributes.csv").stat().st_mtime_ns == before
    assert_refused(call(*command, 31), "'n': 30", "'n': 31")
