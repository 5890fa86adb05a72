"""Slow tests: data."""
import json
import multiprocessing.dummy
from collections import Counter

import numpy as np
import pytest
from helpers import (
    assert_refused, call, do, draw_avatars, truncate, write_images)
from PIL import Image

import data
from common import UserError
from extras import avatars as extras_avatars


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


def test_check(tmp_path):
    """`data.py check` misses an unreadable image or a wrong table."""
    root = write_images(tmp_path / "x", 101, size=8)
    files = data.find_images(root)
    (root / "attributes.csv").write_text("file,split,hat\n" + "".join(f"{f},train,1\n" for f in files))
    truncate(root / "a/010.png")
    Image.new("RGB", (8, 8), "gray").save(root / "b/001.png")
    status, out, err = call("data", "check", root, "--size", 8)
    assert "1 images are of one colour" in out and "b/001.png" in out
    assert status == 0 and "100 images in 2 classes, 1 unreadable" in out and "1 attributes" in out
    assert "a/010.png" in err
    truncate(root / "b/011.png")
    assert_refused(call("data", "check", root, "--size", 8), "2 of 101")
    assert_refused(call("data", "check", tmp_path / "gone"), "gone", "python extras/avatars.py")


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
    row = extras_avatars.render_avatar((str(tmp_path), 7, 32, 0, tuple(extras_avatars.STYLES)))  # alone
    assert row["file"] == f"{style}/00007.png"
    assert (tmp_path / row["file"]).read_bytes() == (root / row["file"]).read_bytes()
    at = table.files.index(row["file"])
    known = {name: value for name, value in zip(table.names, table.values[at], strict=True) if value == value}
    assert known == {name: value for name, value in row.items() if name != "file"}

    before = (root / "attributes.csv").stat().st_mtime_ns
    assert "already" in do(*command, 30)
    assert (root / "attributes.csv").stat().st_mtime_ns == before
    assert_refused(call(*command, 31), "'n': 30", "'n': 31")
    assert "already" in do(*command, 30, "--styles", *reversed(extras_avatars.STYLES))
    assert_refused(call(*command, 30, "--styles", "micah"), "'only': None", "'only': ['micah']")
    do("extras.avatars", tmp_path / "two", "--size", 32, "--n", 10, "--styles", "pixel-art", "micah")
    assert data.ImageFolder(tmp_path / "two", 32).classes == ["micah", "pixel-art"]
