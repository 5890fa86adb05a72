"""Stage 0: images on disk -> tensors; attribute tables; latents on disk; the built-in avatars.

    python data.py avatars out/avatars                      # 12,000 cartoon faces, 64 x 64, with exact attributes
    python data.py avatars out/tiny/avatars --n 200 --seed 1        # tiny
    python data.py check images                             # read every image, count the bad ones

The last part of the file is the plumbing that all scripts share: errors, processes, random numbers, checkpoints, logs.
"""
import argparse
import contextlib
import csv
import ctypes
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import queue
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import tokenize
import warnings
import weakref
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata, resources
from pathlib import Path
from unittest import mock

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large memory pages for PyTorch on the CPU; read at its first allocation
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch.load runs no pickled code in any library that is used here
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # its opposite: the two together are an error

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_BAD = 0.01  # a data set with a larger share of unreadable images stops the run
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of an image, as it is and at the crop's scale: 89 million, where Pillow warns
WORKER_TIMEOUT = 600  # seconds that a batch of images may take
# What Pillow raises on damaged files. An error of the system among them is no image's fault, but for these
DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError, OverflowError, struct.error, zlib.error,
                 Image.DecompressionBombError)
OF_A_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses these
SPLITS = ("train", "val", "test")


class UserError(ValueError):
    """A user's mistake or a machine's limit; scripts print it as one line and exit with status 2."""


class Stopped(UserError):
    """A signal ended a run that saved before; the exit status is 128 and its number, as a shell counts."""

    def __init__(self, message, number):
        super().__init__(message)
        self.status = 128 + number


class UnreadableImage(UserError):
    """One image file that cannot be decoded."""


class DamagedFile(UserError):
    """A file whose content is not what was written."""


def of_the_machine(error, of_the_file=(None, errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ENOTDIR)):
    """Whether an error in reading a file tells of the machine (memory, disk, network, limits, rights) and nothing of its content."""
    return isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno not in of_the_file or "allocate memory" in str(error)


def damage(error, text):
    """What to raise for an error in reading content: UserError with this text, or an error of the machine as it is."""
    return error if isinstance(error, OSError) and of_the_machine(error) else UserError(text)


# ---------------------------------------------------------------------------------------------------------------------
# Images

def to_rgb(image):
    """Any PIL mode -> RGB, 8 bit. 16-bit greys are scaled, transparency is laid on white, EXIF rotation is applied."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64)
        if not np.isfinite(grey).all():
            raise ValueError("NaN or infinite pixels")
        return Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")  # 65535 -> 255
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """ADM's crop (Dhariwal & Nichol 2021): halve with a box filter, bicubic to a short side of `size`, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@contextlib.contextmanager
def open_image(path, size=1):
    """A PIL image for a crop of `size`. Whatever goes wrong in the context is raised as UnreadableImage, but the machine's errors as UserError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ValueError("no regular file")
        with Image.open(path) as image:
            short, long = sorted(image.size)
            if max(short * long, size * size * long / short) > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}, as it is or at the crop's scale")
            yield image
    except DAMAGED_IMAGE as e:
        reason = ' '.join(str(e).split()) or type(e).__name__
        if of_the_machine(e, OF_A_FILE):
            raise UserError(f"{path}: cannot be read now ({e.strerror}); {HINTS.get(e.errno, 'see to the disk or the network')}, then run the same command again")
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason})")


def read_image(path, size):
    """Image file -> uint8 (3, size, size) RGB, ADM centre crop. Raises UnreadableImage, or UserError when the machine is at fault."""
    with open_image(path, size) as image:
        crop = center_crop(to_rgb(image), size)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def positive(text):
    """argparse type of counts: a whole number from 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text):
    """argparse type of seeds and numbers of processes: a whole number from 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def chunks(rows, size):
    """A sequence of rows -> lists of at most `size` of them, in order."""
    return [list(rows[i:i + size]) for i in range(0, len(rows), size)]


def to_float(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float (B, 3, H, W) in [-1, 1] -> uint8, clamped and rounded: the one rule for every picture written or scored."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def identity(folder):
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def find_images(root):
    """Sorted posix paths of the images below `root`, relative to it. Raises UserError when there are none."""
    root = Path(root)
    if root.is_file():
        raise UserError(f"{root}: a file; expected a folder of images")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a folder of images (for the built-in set: python data.py avatars {root})")
    def fail(error):  # a folder that cannot be listed is not an empty one
        raise error

    files, above = [], {str(root): {identity(root)}}
    for folder, dirs, names in os.walk(str(root), followlinks=True, onerror=fail):
        inside = {d: identity(Path(folder, d)) for d in dirs if not d.startswith((".", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"))}
        dirs[:] = [d for d, key in inside.items() if key not in above[folder]]  # a link to a folder that holds it is no end
        above.update((os.path.join(folder, d), above[folder] | {inside[d]}) for d in dirs)
        files += [Path(folder, n).relative_to(root).as_posix() for n in names
                  if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
    strange = [f for f in files if f.splitlines() != [f] or f.encode(errors="ignore").decode() != f]
    if strange:
        raise UserError(f"{root}: the name {strange[0]!a} holds a line break or is not UTF-8; rename that file")
    if not files:
        raise UserError(f"{root}: no images found; expected {' '.join(IMAGE_SUFFIXES)} in it or in class folders below it")
    return sorted(files)


class ImageFolder(torch.utils.data.Dataset):
    """Images below `root`; the class is the first folder's name, or "all" when the images lie in `root` itself.

    Item i: (image uint8 (3, size, size), label int). With flip=True there are 2N items: item N + i is the mirror image
    of item i, so that flips need no random numbers. split ("train", "val", "test") keeps the files that
    attributes.csv puts there. `.files` and `.labels` have N entries; `.classes` are those of the whole folder.
    Raises UserError for a folder that cannot be used, UnreadableImage for an item that cannot be decoded.
    """

    def __init__(self, root, size, flip=False, split=None):
        self.root, self.size, self.flip = Path(root), size, flip
        files = find_images(root)
        top = [f.split("/")[0] if "/" in f else "" for f in files]
        if "" in top and any(top):
            raise UserError(f"{root}: {files[top.index('')]} lies beside the class folders ({max(top)}/...); "
                            "put every image into a class folder, or none")
        self.classes = sorted(set(top)) if any(top) else ["all"]
        if split:
            table = read_attributes(root)
            chosen = {f for f, s in zip(table.files, table.splits) if s == split}
            files = [f for f in files if f in chosen]
            if not files:
                raise UserError(f"{root}/attributes.csv: no image has split '{split}'; found {sorted(set(table.splits))}")
        self.files = files
        index = {c: i for i, c in enumerate(self.classes)}
        self.labels = [index.get(f.split("/")[0], 0) for f in files]
        self.bad, self.max_bad = {}, MAX_BAD

    def __len__(self):
        return len(self.files) * (2 if self.flip else 1)

    def __getitem__(self, i):
        n = len(self.files)
        if not 0 <= i < len(self):
            raise IndexError(i)
        image = read_image(self.root / self.files[i % n], self.size)
        return (image.flip(-1) if i >= n else image), self.labels[i % n]

    @functools.cached_property
    def hash(self):
        """16 hex digits that name the files by path and size (-1 where there is none)."""
        size = lambda path: path.stat().st_size if path.exists() else -1
        return hashlib.sha256("\n".join(f"{f} {size(self.root / f)}" for f in self.files).encode()).hexdigest()[:16]

    def note_bad(self, bad):
        """Name each new unreadable file once; raise UserError when they are more than max_bad of the folder."""
        for file, reason in bad:
            if file not in self.bad:
                self.bad[file] = reason
                print(f"skipped: {one_line(reason)}", file=sys.stderr)
        if len(self.bad) > self.max_bad * len(self.files):
            raise UserError(f"{self.root}: {len(self.bad)} of {len(self.files)} images are unreadable, more than "
                            f"{self.max_bad:.0%}; the last: {list(self.bad.values())[-1]}; mend or delete them, then run again")


def check_folder(images, batch=1):
    """Refuse what cannot be trained on: one image, a class of one, a batch above the folder, images below the crop."""
    n = len(images.files)
    if n < 2:
        raise UserError(f"{images.root}: {n} image; expected at least 2")
    label, count = min(Counter(images.labels).items(), key=lambda x: x[1])
    if count == 1:
        raise UserError(f"{images.root}: class '{images.classes[label]}' has one image; a class needs two or more "
                        "(images of one class go into one folder)")
    if batch > n:
        raise UserError(f"--batch {batch} is larger than the {n} images of {images.root}; use --batch {n} or less")
    small = median_short_side(images)
    if small is not None and small < images.size:  # single small images are enlarged, as ADM does
        raise UserError(f"{images.root}: the median short side is {small} pixels, below the crop of {images.size}; use --resolution {small} or less")


def median_short_side(images):
    """In pixels, of about 256 images; None when none of them can be read."""
    sides = []
    for file in images.files[::max(1, len(images.files) // 256)]:
        with contextlib.suppress(UnreadableImage), open_image(images.root / file) as image:  # these are named and counted when their turn comes
            sides.append(min(image.size))
    return int(np.median(sides)) if sides else None


class Batches(torch.utils.data.Dataset):
    """Item k: the images of batches[k] in one piece, read by one worker. With replace=True an unreadable image gives
    its place to the next readable one (training keeps its batch size); otherwise its row is left out."""

    def __init__(self, images, batches, replace, workers):
        self.images, self.batches, self.replace = images, batches, replace
        self.reading = torch.full((max(1, workers),), -1).share_memory_()  # the row that each worker is at

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, k):
        try:
            return self.read(self.batches[k])
        except (UserError, OSError, MemoryError) as e:  # a worker's own way to raise would show its traceback
            return e

    def read(self, asked):
        worker, n = torch.utils.data.get_worker_info(), len(self.images)
        pixels, labels, rows, bad = [], [], [], []
        for row in asked:
            for candidate in range(row, row + (n if self.replace else 1)):
                self.reading[worker.id if worker else 0] = candidate % n
                try:
                    pixel, label = self.images[candidate % n]
                except UnreadableImage as e:
                    bad.append((self.images.files[candidate % len(self.images.files)], str(e)))
                    if len(dict(bad)) > self.images.max_bad * len(self.images.files):
                        break  # note_bad will stop the run
                    continue
                pixels.append(pixel), labels.append(label), rows.append(row)
                break
        self.reading[worker.id if worker else 0] = -1
        shape = (0, 3, self.images.size, self.images.size)
        return (torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8)), torch.tensor(labels), rows, bad


def ignore_signals(_):
    """torchrun and Ctrl-C signal the workers too; only the main process, which saves, decides when to stop."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def load_batches(images, batches, workers=0, replace=False):
    """Yield (uint8 (B, 3, S, S), int64 labels (B,), rows) for each list of rows in `batches`, in order. Raises UserError also for a
    worker that died, or that has been at a batch for WORKER_TIMEOUT seconds; then it names the file."""
    dataset = Batches(images, batches, replace, workers)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals,
                                         timeout=WORKER_TIMEOUT if workers else 0)
    try:
        for item in loader:
            if isinstance(item, Exception):
                raise item
            pixels, labels, rows, bad = item
            images.note_bad(bad)
            yield pixels, labels, rows
    except RuntimeError as e:
        if "DataLoader timed out" not in str(e):
            raise
        for process in multiprocessing.active_children():
            process.kill()  # they ignore gentler signals
        files = sorted({images.files[row % len(images.files)] for row in dataset.reading.tolist() if row >= 0})
        raise UserError(f"{images.root}: no batch of images for {WORKER_TIMEOUT} s; the {workers} workers are reading {', '.join(files)}; see to the disk or to those files, then run the same command again")


def ahead(items, device):
    """The same items in the same order; for a GPU a thread makes the next two meanwhile, their tensors in pinned memory."""
    if device.type != "cuda":
        return iter(items)
    pin = lambda item: tree_map(lambda v: v.pin_memory() if isinstance(v, torch.Tensor) else v, item)
    return threaded(items, pin, begin=lambda: torch.cuda.set_device(device))  # a thread begins on GPU 0


def threaded(items, finish, depth=2, begin=lambda: None):
    """finish(item) of each item, worked out in a thread at most `depth` items ahead; its errors are raised here. The thread ends with
    the reader."""
    ready, left = queue.Queue(depth), threading.Event()

    def put(item, error):
        while not left.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            begin()
            for item in items:
                put(finish(item), None)
                if left.is_set():
                    return
            put(None, StopIteration())
        except BaseException as e:  # carried to the reader, whatever it is
            put(None, e)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        left.set()


def one_behind(items):
    """The same items, each after the next was begun: a GPU computes the next while this one is stored."""
    held = None
    for item in items:
        if held is not None:
            yield held
        held = item
    if held is not None:
        yield held


def to_host(x):
    """A tensor on its way to the CPU -> a function that waits for it and returns it."""
    if x.device.type != "cuda":
        return lambda: x.cpu()
    host, arrived = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True), torch.cuda.Event()
    arrived.record()
    return lambda: (arrived.synchronize(), host)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Attribute tables and latents on disk

@dataclass
class Attributes:
    """files[i] is in splits[i] and has values[i, a] in {0, 1, nan = unknown} for the attribute names[a]."""
    files: list
    splits: list
    names: list
    values: np.ndarray


def read_attributes(root):
    """`root`/attributes.csv -> Attributes. Raises UserError for a missing column, a bad value, an unknown or double file."""
    path = Path(root) / "attributes.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a table with the columns file,split,<attribute>... (values 0, 1 or empty)")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            header, *rows = list(csv.reader(f)) or [[]]
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: not a CSV table in UTF-8 ({e})")
    for column in ("file", "split"):
        if column not in header:
            raise UserError(f"{path}: no column '{column}'; found {header[:4]}, expected file,split,<attribute>...")
    file_at, split_at = header.index("file"), header.index("split")
    attribute_at = [i for i in range(len(header)) if i not in (file_at, split_at)]
    known, codes = set(find_images(root)), {"0": 0.0, "1": 1.0, "": np.nan}
    if len(set(header)) < len(header):
        raise UserError(f"{path}: the column '{max(header, key=header.count)}' stands in the header twice")
    files, splits, values = [], [], np.empty((len(rows), len(attribute_at)), np.float32)
    for n, row in enumerate(rows):
        where = f"{path}, line {n + 2}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} fields; expected {len(header)} as in the header")
        if row[file_at] not in known:
            raise UserError(f"{where}: '{row[file_at]}' is no image below {root}; paths are relative to that folder")
        if row[split_at] not in SPLITS:
            raise UserError(f"{where}: split '{row[split_at]}'; expected one of {', '.join(SPLITS)}")
        try:
            values[n] = [codes[row[i].strip()] for i in attribute_at]
        except KeyError as e:
            raise UserError(f"{where}: value {e}; expected 0, 1 or empty")
        files.append(row[file_at]), splits.append(row[split_at])
    if len(set(files)) != len(files):
        raise UserError(f"{path}: '{Counter(files).most_common(1)[0][0]}' stands in more than one line; expected one line per image")
    return Attributes(files, splits, [header[i] for i in attribute_at], values)


def split_lines(path):
    """Yield the non-empty lines of a text table, split at blanks. Raises UserError for a missing file."""
    try:
        with open(path, encoding="utf-8") as f:
            yield from (line.split() for line in f if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); README's table of data sets says which files belong together")


def words(path, expected=None):
    """All split_lines of a table. Raises UserError for (expected) another number of lines."""
    rows = list(split_lines(path))
    if expected is not None and len(rows) != expected:
        raise UserError(f"{path}: {len(rows)} lines, expected {expected}")
    return rows


def listing(path, rows=None):
    """MMLAB's tables: a count, a header, then a row an image -> (header, rows). Raises UserError when the count disagrees."""
    head, *rows = (words(path) if rows is None else rows) or [["nothing"]]
    if not rows or not head[0].isdigit() or int(head[0]) != len(rows) - 1:
        raise UserError(f"{path}: its first line says {' '.join(head[:9])}, but {max(0, len(rows) - 1)} rows follow the header; the file is cut or of another kind (.csv is not read)")
    return rows[0], rows[1:]


def signs(path, width=None):
    """A listing with the rows `file -1 1 0 ...` -> (header, files, float32 (N, width) in {0, 1, nan}), width: the header's unless
    given. Line by line: DeepFashion's 289 million labels would be 20 GiB of words. Raises UserError for another width or value."""
    lines = []
    for row in split_lines(path):
        if len(lines) > 1:
            expected, strange = width or len(lines[1]), set(row[1:]) - {"-1", "0", "1"}
            if len(row) != expected + 1:
                raise UserError(f"{path}: {row[0]} has {len(row) - 1} labels; expected {expected}, one an attribute")
            if strange:
                raise UserError(f"{path}: {row[0]} has the label '{min(strange)}'; expected -1, 1, or 0 (unknown)")
            row = row[0], np.array(row[1:], np.int8)
        lines.append(row)
    header, rows = listing(path, lines)
    values = np.stack([signs for _, signs in rows]) if rows else np.empty((0, width or len(header)), np.int8)
    return header, [file for file, _ in rows], np.array([np.nan, 1, 0], np.float32)[values]  # -1 is the last


def partition(path, files, rows, codes):
    """Rows `file code` of a split table -> the split of each file. Raises UserError for a file without one, or with two."""
    found = {}
    for file, code in ((row + ["missing"])[:2] for row in rows):
        if found.setdefault(file, code) != code:
            raise UserError(f"{path}: {file} is in two splits, {found[file]} and {code}; expected one")
    missing = [f for f in files if found.get(f) not in codes]
    if missing:
        raise UserError(f"{path}: {missing[0]} has the split {found.get(missing[0])}, expected one of {', '.join(codes)} ({len(missing)} such files)")
    return [codes[found[f]] for f in files]


def read_celeba(root):
    """CelebA, aligned images: 40 attributes, official partition (Liu et al. 2015). Its own folders (Img, Anno, Eval) or all in one."""
    table, parts, images = (root / name if (root / name).exists() else root / folder / name for folder, name in
                            (("Anno", "list_attr_celeba.txt"), ("Eval", "list_eval_partition.txt"), ("Img", "img_align_celeba")))
    names, files, values = signs(table)
    return images, files, partition(parts, files, words(parts, len(files)), dict(zip("012", SPLITS))), names, values


def read_deepfashion(root):
    """DeepFashion category and attribute prediction (Liu et al. 2016): root is its Anno_coarse (1,000 attributes) or Anno_fine (26)."""
    names = [" ".join(row[:-1]) for row in listing(root / "list_attr_cloth.txt")[1]]  # the last word is the type
    if root.name != "Anno_fine" and (root / "list_attr_img.txt").exists():
        path = root.parent / "Eval/list_eval_partition.txt"
        _, files, values = signs(root / "list_attr_img.txt", len(names))
        splits = partition(path, files, listing(path)[1], {s: s for s in SPLITS})
    else:
        files, splits, values = [], [], []
        for split in SPLITS:
            listed = [row[0] for row in words(root / f"{split}.txt")]
            labels = words(root / f"{split}_attr.txt", len(listed))
            for file, row in zip(listed, labels):
                if len(row) != len(names) or set(row) - {"0", "1"}:
                    raise UserError(f"{root}/{split}_attr.txt: {file} has {len(row)} labels, {' '.join(sorted(set(row)))}; expected {len(names)} as in list_attr_cloth.txt, 0 or 1")
            files, splits, values = files + listed, splits + [split] * len(listed), values + labels
        values = np.array(values, np.float32).reshape(len(files), len(names))
    return root.parent / "Img/img", [f.removeprefix("img/") for f in files], splits, names, values


def read_awa2(root):
    """Animals with Attributes 2 (Xian et al. 2018): 85 attributes *of the class*: every image of a class has the same labels.
    Its split by classes: 40 to train, 10 others to test; validation is every tenth image of the training classes."""
    classes, names = ([row[-1] for row in words(root / f"{f}.txt")] for f in ("classes", "predicates"))
    path = root / "predicate-matrix-binary.txt"
    rows = words(path, len(classes))
    if any(len(row) != len(names) or set(row) - {"0", "1"} for row in rows):
        raise UserError(f"{path}: rows of {', '.join(sorted({str(len(row)) for row in rows}))} values; expected {len(names)} as in predicates.txt, 0 or 1")
    role = {}
    for split, name in (("train", "trainclasses.txt"), ("test", "testclasses.txt")):
        for (c, *_) in words(root / name):
            if c not in classes or role.setdefault(c, split) != split:
                raise UserError(f"{root / name}: the class {c} {'is in two splits' if c in classes else 'is not in classes.txt'}")
    files, splits, seen = [], [], Counter()
    for file in find_images(root / "JPEGImages"):
        c = file.split("/")[0]
        if c in role:
            seen[c] += 1
            files.append(file), splits.append("val" if role[c] == "train" and seen[c] % 10 == 0 else role[c])
    if set(role) - set(seen):
        raise UserError(f"{root}/JPEGImages: no images of the class {min(set(role) - set(seen))}; expected a folder of it")
    print("AwA2: the labels are of classes, not of images, and the test classes are not seen in training")
    values = np.array(rows, np.float32)
    return root / "JPEGImages", files, splits, names, values[[classes.index(f.split("/")[0]) for f in files]]


def load_attributes(root):
    """An attribute table as its owners distribute it -> (folder of the images, Attributes). Raises UserError.

    DIR/attributes.csv                          any folder: file,split,<attribute>...
    DIR/{Anno,Eval,Img} or all three in DIR     CelebA: list_attr_celeba.txt, list_eval_partition.txt, img_align_celeba/
    DIR/Anno_coarse or DIR/Anno_fine            DeepFashion category and attribute prediction, beside Img/img/ and Eval/
    DIR/predicate-matrix-binary.txt             AwA2, beside JPEGImages/
    """
    root = Path(root)
    readers = {"list_attr_celeba.txt": read_celeba, "Anno/list_attr_celeba.txt": read_celeba, "list_attr_cloth.txt": read_deepfashion,
               "predicate-matrix-binary.txt": read_awa2}
    found = [reader for file, reader in readers.items() if (root / file).exists()]
    below = [str(root / folder) for folder in ("Anno", "Anno_coarse", "Anno_fine") if (root / folder / "list_attr_cloth.txt").exists()]
    if below:
        raise UserError(f"{root}: DeepFashion's attribute tables lie below it; give {' or '.join(below)}")
    if (root / "attributes.csv").exists():
        return root, read_attributes(root)
    if not found:
        raise UserError(f"{root}: no attribute table; expected attributes.csv, list_attr_celeba.txt (also below Anno/), list_attr_cloth.txt or predicate-matrix-binary.txt in it")
    images, files, splits, names, values = found[0](root)
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; expected the data set's images there, unpacked")
    if not files:
        raise UserError(f"{root}: no image stands in its tables")
    known = set(find_images(images))
    missing = [f for f in files if f not in known]
    if missing:
        raise UserError(f"{root}: {missing[0]} of the table is no image below {images} ({len(missing)} such files)")
    file, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise UserError(f"{root}: {file} stands in the table {count} times, in {' and '.join(sorted({s for f, s in zip(files, splits) if f == file}))}; expected once")
    return images, Attributes(files, splits, names, values)


# What readers raise on torn, flipped, foreign or code-carrying content, and what they raise in all.
BROKEN = (EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError, SyntaxError, RecursionError, struct.error, tokenize.TokenError, pickle.UnpicklingError,
          safetensors.SafetensorError, zipfile.BadZipFile, zlib.error)
DAMAGED = (*BROKEN, OSError, RuntimeError, MemoryError)


def is_zip(path):
    """Whether a file is, or was, a zip file with its end."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def check_zip(path, checksums=False):
    """Refuse a zip file that unpacks to more than a gibibyte and a hundred times its size (a bomb), and, when asked to, one whose
    content is not what its checksums say. Raises ValueError."""
    with zipfile.ZipFile(path) as z:
        unpacked, size = sum(i.file_size for i in z.infolist()), os.path.getsize(path)
        if unpacked > max(2 ** 30, 100 * size):
            raise ValueError(f"{size} bytes that unpack to {unpacked}: refused as a zip bomb")
        if checksums and any(i.CRC for i in z.infolist()):  # all zero: written without
            damaged = z.testzip()
            if damaged:
                raise ValueError(f"wrong checksum of {damaged}")


def read_npz(path, *names):
    """{name: array} of an .npz; all that it holds, or `names`. Raises what DAMAGED lists; never unpickles."""
    check_zip(path)
    with np.load(path, allow_pickle=False) as z:
        return {k: z[k] for k in names or z.files}


@dataclass
class Latents:
    """What vae.py wrote: moments (N, F, 2c, h, w) float16 memmap (mean, then std), labels (N,), latent mean/std (c,)."""
    moments: np.ndarray
    labels: np.ndarray
    files: list
    mean: torch.Tensor
    std: torch.Tensor
    meta: dict


def load_latents(folder):
    """Open a latent cache. Raises UserError when it is missing, unfinished or damaged."""
    folder = Path(folder)
    again = f"make it with: python vae.py --vae CKPT --data DIR --out {folder}"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; if it has moved, give its new place; else {again}")
    if not (folder / "meta.json").is_file():  # written last
        raise UserError(f"{folder}: no finished latent cache (meta.json is missing); {again}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        moments = np.load(folder / "moments.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        stats = read_npz(folder / "stats.npz", "mean", "std")
        mean, std = (torch.from_numpy(stats[k]).float() for k in ("mean", "std"))
        files = (folder / "files.txt").read_text("utf-8").splitlines()
        if not len(moments) == len(labels) == len(files) == meta["n"]:
            raise ValueError(f"{len(moments)} moments, {len(labels)} labels, {len(files)} files, meta.json says {meta['n']}; expected equal counts")
        n, flips, c2, *side = moments.shape
        if moments.dtype != np.float16 or len(side) != 2 or flips not in (1, 2) or mean.shape != (c2 // 2,) or std.shape != mean.shape or labels.shape != (n,) or labels.dtype != np.int64:
            raise ValueError(f"moments {moments.dtype} {moments.shape}, mean {tuple(mean.shape)}, std {tuple(std.shape)}, labels {labels.dtype} {labels.shape}; expected float16 (N, 1 or 2, 2c, h, w), (c,), (c,), int64 (N,)")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all() and 0 <= labels.min() and labels.max() < len(meta["classes"])):
            raise ValueError("a mean or std that is not finite and positive, or a label beyond the classes")
        for key in ("resolution", "split", "vae", "vae_hash"):
            meta[key]
    except DAMAGED as e:
        raise damage(e, f"{folder}: the latent cache is damaged ({type(e).__name__}: {' '.join(str(e).split())}); delete the folder and {again}")
    return Latents(moments, labels, files, mean, std, meta)


# ---------------------------------------------------------------------------------------------------------------------
# The built-in data set

# Colour families, shared by all styles: attribute "<part>_<family>", two shades each.
AVATAR_COLORS = {
    "background": {"blue": "9ec9f0 86bbee", "green": "b2e2a8 98d49c", "yellow": "fbf2a4 f8e878",
                   "pink": "f9c9d8 f6b2c6", "purple": "cdbcf0 b09ce6", "orange": "f8b272 f29a4e",
                   "grey": "a3a9b0 8f959c", "white": "ffffff f7f7f7"},
    "hair": {"black": "1c1a1e 2a2226", "brown": "5c3218 6e4020", "blond": "dfb858 ecca78",
             "red": "c8400f b02a18", "grey": "c6c6cc d8d8de", "blue": "3f6fd8 3560c0",
             "pink": "e0559c ec6cac", "green": "2f9a55 3f8f48"},
    "skin": {"light": "fbdcc2 f4cfae", "tan": "d9a272 c98f5c", "dark": "96633f 7a4c30"},
    "clothes": {"red": "d8343a c02838", "yellow": "f2c230 f6d44c", "green": "3f9f57 2f8550",
                "blue": "3d6fd6 2f57b4", "purple": "8a4fc8 7440b0", "pink": "f27fb0 ee66a0",
                "white": "e6e8ec dfe2e8", "black": "2a2a30 3c3c44"},
}

# One entry per drawing style (= class).
#   zoom    base scale, such that the tallest hair still fits
#   over    draw this many times larger and average down: this style is drawn without antialiasing
#   colors  which dicebear colours each family above paints
#   fixed   options that are the same in every image
#   parts   component -> groups (weight, attributes of the group, its variants; "" = leave it out)
# A style's attributes are all the words in its groups; the word's value is 1 when the drawn group
# has it. Variants whose difference cannot be seen at 64 x 64 are left out or share a group.
AVATAR_STYLES = {
    "avataaars": {
        "zoom": 0.97, "fixed": {"accessoriesColor": "262e33"},
        "colors": {"hair": "hair facialHair", "skin": "skin", "clothes": "clothes hat"},
        "parts": {
            "top": ((27, "hair_short", "shortFlat shortRound shortWaved theCaesar frizzle"),
                    (8, "hair_short hair_curly", "shortCurly dreads01 dreads02"),
                    (10, "hair_curly hair_big", "fro froBand curly"),
                    (13, "hair_long", "straight01 straight02 straightAndStrand"),
                    (8, "hair_long hair_curly", "curvy dreads bigHair"),
                    (10, "hair_bob", "bob miaWallace longButNotTooLong"),
                    (6, "hair_bun", "bun"), (5, "flowers hair_bun", "frida"), (6, "hair_bald", "sides"),
                    (13, "hat hair_none", "hat winterHat02 winterHat03 winterHat1"),
                    (5, "turban hair_none", "turban"), (5, "hijab hair_none", "hijab")),
            "eyes": ((45, "", "default side"), (20, "eyes_closed", "closed happy"), (12, "eyes_wink", "wink"),
                     (12, "eyes_wide", "surprised"), (6, "eyes_hearts", "hearts"), (5, "eyes_crossed", "xDizzy")),
            "eyebrows": ((1, "", "default defaultNatural raisedExcited flatNatural"),),
            "mouth": ((20, "mouth_smile", "twinkle"), (30, "mouth_smile mouth_open", "smile default"),
                      (12, "mouth_tongue mouth_smile mouth_open", "tongue"), (14, "mouth_sad", "sad"),
                      (10, "mouth_open", "screamOpen"), (8, "mouth_teeth", "grimace"), (6, "", "serious")),
            "facialHair": ((66, "", ""), (24, "beard", "beardLight beardMedium beardMajestic"),
                           (10, "moustache", "moustacheFancy moustacheMagnum")),
            "accessories": ((60, "", ""), (25, "glasses", "prescription01 prescription02 round"),
                            (15, "sunglasses", "kurt sunglasses wayfarers")),
            "clothes": ((40, "", "shirtCrewNeck shirtScoopNeck shirtVNeck"), (14, "clothes_hoodie", "hoodie"),
                        (14, "clothes_jacket", "blazerAndShirt blazerAndSweater"),
                        (10, "clothes_collar", "collarAndSweater"), (12, "clothes_overall", "overall"),
                        (10, "clothes_print", "graphicShirt")),
            "clothesGraphic": ((1, "", "bat bear deer diamond hola pizza skull"),)}},
    "adventurer": {
        "zoom": 1.05, "fixed": {}, "colors": {"hair": "hair", "skin": "skin"},
        "parts": {
            "hair": ((26, "hair_short", "short01 short02 short04 short07 short08 short10 short11 short14"),
                     (10, "hair_short hair_curly", "short03 short17 short18"), (7, "hair_spiky", "short15 short16"),
                     (10, "hair_long", "long04 long07"), (8, "hair_long hair_curly", "long06 long09 long22"),
                     (11, "hair_bob", "long01 long05 long21 long25"), (8, "hair_bun", "long10 long12 long13"),
                     (7, "hair_ponytail", "long16 long19"), (7, "hair_pigtails", "long14 long15 long23"),
                     (3, "flowers hair_long", "long08"), (3, "flowers hair_bob", "long03"),
                     (6, "hair_bald hair_none", "short19")),
            "eyes": ((45, "", "01 02 03 24 25 26"), (20, "eyes_closed", "19 20"), (15, "eyes_wink", "21 22"),
                     (20, "eyes_sleepy", "04 16 17 18")),
            "eyebrows": ((1, "", "06 07 08 10 12 13 14"),),
            "mouth": ((16, "mouth_smile", "02 29"), (24, "mouth_smile mouth_open", "01 26 27 28 30"),
                      (14, "mouth_smile mouth_teeth", "05 22 23"), (10, "mouth_sad", "04"),
                      (6, "mouth_sad mouth_open", "14"), (8, "mouth_open", "15"), (8, "mouth_tongue", "16"),
                      (6, "mouth_pucker", "17"), (8, "", "09 10")),
            "details": ((60, "", ""), (20, "moustache", "mustache"), (20, "blush", "blush")),
            "glasses": ((62, "", ""), (25, "glasses", "02 04 05"), (13, "sunglasses", "01")),
            "earrings": ((1, "", ""),)}},
    "big-smile": {
        "zoom": 0.9, "fixed": {}, "colors": {"hair": "hair", "skin": "skin"},
        "parts": {
            "hair": ((26, "hair_short", "shortHair bowlCutHair shavedHead"),
                     (12, "hair_short hair_curly", "curlyShortHair"), (16, "hair_bun", "bunHair froBun"),
                     (16, "hair_bob", "curlyBob"), (16, "hair_long", "straightHair bangs"),
                     (8, "hair_long hair_curly", "wavyBob"), (6, "hair_mohawk", "mohawk")),
            "eyes": ((45, "", "normal cheery"), (20, "eyes_closed", "sleepy"), (13, "eyes_wink", "winking"),
                     (10, "eyes_star", "starstruck"), (12, "eyes_angry", "angry")),
            "mouth": ((20, "mouth_smile", "kawaii"), (35, "mouth_smile mouth_open mouth_teeth", "openedSmile gapSmile"),
                      (15, "mouth_smile mouth_teeth", "teethSmile"), (18, "mouth_sad mouth_open", "openSad"),
                      (12, "", "unimpressed")),
            "accessories": ((26, "", ""), (18, "glasses", "glasses"), (10, "sunglasses", "sunglasses"),
                            (12, "moustache", "mustache"), (8, "face_mask", "faceMask"), (6, "sleep_mask", "sleepMask"),
                            (7, "cat_ears", "catEars"), (7, "clown_nose", "clownNose"),
                            (6, "tiara", "sailormoonCrown"))}},
    "micah": {
        "zoom": 0.95, "fixed": {"glassesColor": "000000", "earringColor": "f4d150", "facialHairColor": "b0b0b4"},
        "colors": {"hair": "hair", "skin": "base", "clothes": "shirt"},  # a dark beard would cover the mouth
        "parts": {
            "hair": ((32, "hair_short", "fonze"), (22, "hair_long", "full"), (24, "hair_bob", "pixie dannyPhantom"),
                     (10, "hair_mohawk", "mrT"), (12, "hair_bald hair_none", "mrClean")),
            "eyes": ((70, "", "eyes round"), (30, "eyes_closed", "smiling")),
            "eyebrows": ((1, "", "up down"),),
            "nose": ((1, "", "curve pointed tound"),),
            "ears": ((1, "", "attached"),),
            "mouth": ((25, "mouth_smile", "smile smirk"), (25, "mouth_smile mouth_open", "laughing"),
                      (18, "mouth_sad", "frown sad"), (14, "mouth_open", "surprised"), (10, "mouth_teeth", "nervous"),
                      (8, "mouth_pucker", "pucker")),
            "facialHair": ((72, "", ""), (18, "beard", "beard"), (10, "stubble", "scruff")),
            "glasses": ((55, "", ""), (22, "glasses glasses_round", "round"), (23, "glasses glasses_square", "square")),
            "earrings": ((70, "", ""), (30, "earrings", "hoop")),
            "clothes": ((60, "", "open"), (40, "clothes_collar", "collared"))}},
    "pixel-art": {
        "zoom": 0.92, "over": 2,
        "fixed": {"glassesColor": "191919", "mouthColor": "c81414", "accessoriesColor": "ffd700"},
        "colors": {"hair": "hair", "skin": "skin", "clothes": "clothing hat"},
        "parts": {
            "hair": ((36, "hair_short", "short01 short02 short06 short10 short14 short15 short16 short17"),
                     (34, "hair_long", "long01 long02 long03 long07 long09 long12 long13"),
                     (15, "hair_bob", "long04 long11 long17"), (15, "hair_spiky", "short11 short13 long15")),
            "eyes": ((1, "", "01 03 06 07 09 11"),),
            "mouth": ((50, "mouth_smile", "happy06 happy07 happy08 happy09"), (20, "mouth_sad", "sad01"),
                      (15, "mouth_lips", "happy12 happy13"), (15, "", "sad04 sad06")),
            "glasses": ((60, "", ""), (25, "glasses", "light05 light06 light07"),
                        (15, "sunglasses", "dark01 dark02 dark05 dark06")),
            "hat": ((80, "", ""), (20, "hat", "01 02 03 04 06 10")),
            "accessories": ((75, "", ""), (25, "earrings", "01 03")),
            "beard": ((1, "", ""),),
            "clothes": ((75, "", "01 03 04 05 08 11 14"), (25, "clothes_print", "02 06 13"))}},
}
# Drawn in three-quarter view, so that a mirrored image can be told: these have `flipped`.
AVATAR_ASYMMETRIC = ("adventurer", "big-smile", "micah")
# When all attributes on the left hold, those on the right cannot be seen and are 0 (a prefix is enough).
AVATAR_HIDES = {"sunglasses": ("eyes_",), "sleep_mask": ("eyes_",), "face_mask": ("mouth_",),
                "hair_none": tuple("hair_" + c for c in AVATAR_COLORS["hair"]),
                "hat hair_short": tuple("hair_" + c for c in AVATAR_COLORS["hair"]),
                "clothes_white": ("clothes_print",),  # the prints are white
                "hijab": ("clothes_collar", "clothes_hoodie", "clothes_jacket", "clothes_print")}


def avatar_vocabulary(style):
    """Names of the attributes that apply to `style`, in a fixed order."""
    s = AVATAR_STYLES[style]
    words = [w for groups in s["parts"].values() for _, names, _ in groups for w in names.split()]
    words += [f"{part}_{c}" for part in ("background", *s["colors"]) for c in AVATAR_COLORS[part]]
    return list(dict.fromkeys(words + ["flipped"] * (style in AVATAR_ASYMMETRIC)))


def draw_options(style, rng):
    """Draw one avatar: (every dicebear option, set of attributes that are 1). Units: degrees, percent."""
    def pick(seq):  # rng.random() is the one draw whose stream numpy keeps across releases
        return seq[int(rng.random() * len(seq))]

    def uniform(low, high):
        return round(low + (high - low) * rng.random(), 3)

    s = AVATAR_STYLES[style]
    flip = rng.random() < 0.5
    opts = {"flip": "horizontal" if flip else "none", "scale": s["zoom"] * uniform(0.9, 1.1),
            "rotate": uniform(-3, 3), "translateX": uniform(-3, 3), "translateY": uniform(-3, 3), **s["fixed"]}
    true = {"flipped"} if flip else set()
    for part, families in AVATAR_COLORS.items():
        family = pick(list(families))
        true.add(f"{part}_{family}")
        for name in s["colors"].get(part, "background" if part == "background" else "").split():
            opts[name + "Color"] = pick(families[family].split())
    for component, groups in s["parts"].items():
        weights = np.cumsum([g[0] for g in groups])
        _, words, variants = groups[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
        opts[component + "Probability"] = 100 if variants else 0
        if variants:
            variant = pick(variants.split())
            opts[component + "Variant"] = "variant" + variant if variant.isdigit() else variant
        true.update(words.split())
    for cover, hidden in AVATAR_HIDES.items():
        if true.issuperset(cover.split()):
            true = {w for w in true if not w.startswith(hidden)}
    return opts, true


@functools.lru_cache(None)
def avatar_style(style):
    from dicebear import Style
    return Style(json.loads((resources.files("dicebear_styles") / f"{style}.json").read_text("utf-8")))


def render_avatar(job):
    """Write image i and return its row of attributes; depends on (seed, i) alone. Runs in a worker."""
    folder, i, size, seed = job
    import resvg_py
    from dicebear import Avatar
    style = list(AVATAR_STYLES)[i % len(AVATAR_STYLES)]
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))
    opts, true = draw_options(style, rng)
    over = AVATAR_STYLES[style].get("over", 1)
    svg = Avatar(avatar_style(style), {**opts, "size": over * size}).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    file = f"{style}/{i:05d}.png"
    Image.open(io.BytesIO(png)).convert("RGB").reduce(over).save(Path(folder, file))
    return {"file": file, **{w: int(w in true) for w in avatar_vocabulary(style)}}


def render_avatars(out, n=12000, size=64, seed=0):
    """Render the built-in data set `avatars`: n cartoon faces, size x size pixels, into folder `out`.

    Writes <style>/<index>.png, attributes.csv (0/1, empty = the style has no such attribute) and
    avatars.json. The same (n, size, seed) gives the same bytes. Raises UserError when a package is
    missing or `out` holds something else.
    """
    try:
        import dicebear  # noqa: F401
        import dicebear_styles  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as e:
        raise UserError(f"cannot draw avatars ({e}): pip install -r requirements-dev.txt")
    out, part = Path(out), Path(f"{out}.part")
    settings = {"n": n, "size": size, "seed": seed, "drawing": 2,  # a new number when the same seed draws other images
                "packages": {p: metadata.version(p) for p in ("dicebear-core", "dicebear-styles", "resvg-py")}}
    if out.exists():
        record = out / "avatars.json"
        found = read_json(record) if record.is_file() else {}
        found = {k: found.get(k) for k in settings}
        if found == settings and (out / "attributes.csv").is_file():
            return print(f"{out}: already rendered")
        raise UserError(f"{out} exists but is not this data set: found {found}, expected {settings}")
    begin = time.time()
    open_out(out.parent)
    claim(f"{out}.lock", flag="folder")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    for style in AVATAR_STYLES:
        open_out(part / style)
    jobs = [(str(part), i, size, seed) for i in range(n)]
    with multiprocessing.get_context("spawn").Pool(max(1, min(os.cpu_count() or 1, n // 100))) as pool:
        rows = list(tqdm(pool.imap(render_avatar, jobs, chunksize=32), "avatars", n, unit="image", disable=None))
    # A permutation keyed apart from every image: 1/12 validation, 1/12 test, the rest training.
    key = np.array([seed, 2**64 - 1], np.uint64)
    order = np.argsort(np.random.Generator(np.random.Philox(key=key)).random(n))
    for rank, i in enumerate(order):
        rows[i]["split"] = "val" if rank < n // 12 else "test" if rank < 2 * (n // 12) else "train"
    names = dict.fromkeys(w for style in AVATAR_STYLES for w in avatar_vocabulary(style))
    with open(part / "attributes.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["file", "split", *names], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    styles = {}
    for style in AVATAR_STYLES:
        meta = json.loads((resources.files("dicebear_styles") / f"{style}.json").read_text("utf-8"))["meta"]
        styles[style] = {"license": meta["license"], "creator": meta["creator"], "source": meta["source"]}
    text = json.dumps({**settings, "styles": styles}, indent=2, ensure_ascii=False)
    (part / "avatars.json").write_text(text + "\n", "utf-8")
    part.rename(out)
    write_json(f"{out}.time.json", {**settings, "seconds": round(time.time() - begin, 1)})  # beside the folder, which is the same bytes each time
    print(f"{out}: {n} images, {len(names)} attributes, {time.time() - begin:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------
# What every script shares: errors, processes, random numbers, checkpoints, logs

class Parser(argparse.ArgumentParser):
    """argparse with one line for an error."""

    def error(self, message):
        raise UserError(f"{self.prog}: {message} (--help lists the flags)")


# What to do about an error of the system
HINTS = {errno.ENOSPC: "free space", errno.EDQUOT: "free space", errno.EFBIG: "raise the limit of file sizes (ulimit -f)", errno.EROFS: "choose another folder",
         errno.EACCES: "choose another folder, or change its permissions", errno.EPERM: "choose another folder, or change its permissions",
         errno.EMFILE: "raise the limit of open files (ulimit -n 65536) or use fewer --workers", errno.ENFILE: "close other programs"}


def one_line(text, most=1500):
    """Text for a terminal, whatever a file put into it: no line breaks, no control characters, no megabytes."""
    text = text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def explain(error):
    """One line for an error that is the user's or the machine's; None for one of the code."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return one_line(str(error))
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {text or 'SIGINT'}; what was written before is intact; run the same command again"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text or "bad_alloc" in text:
        kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return f"out of {kind} ({text[:200]}); use a smaller --micro-batch where the script has it: the result stays the same (except with --disc-ckpt)"
    if isinstance(error, OSError):
        number = errno.ENOSPC if "requested and" in text else error.errno  # NumPy's words for a full disk
        return f"{error.filename or 'reading or writing'}: {error.strerror or text}; what was written before is intact; {HINTS.get(number, 'mend that')}, then run the same command again"
    if isinstance(error, RuntimeError) and ("DataLoader worker" in text or "ancdata" in text):
        return f"a process that reads images was lost ({text[:200]}): out of memory, of /dev/shm or of open files (ulimit -n); use fewer --workers, then run the same command again"
    if dist.is_initialized() and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(w in text for w in ("gloo", "NCCL", "Connection"))):
        return f"rank {dist.get_rank()}: another process of this run is lost or does not answer (its own message, or torchrun's, says why); the last checkpoint is intact; run the same command again ({text.rpartition('] ')[2][:100]})"
    return None


def interrupt(number, _):
    raise KeyboardInterrupt(signal.Signals(number).name)


def run_script(main):
    """Run main(); what explain() knows ends in one line on stderr and exit status 2, a signal in 128 and its number."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        commit()  # of the code that runs, not of what it may be changed to meanwhile
        main()
    except (Exception, KeyboardInterrupt) as e:
        message, status = explain(e), getattr(e, "status", 2)
        if message is None:
            raise
        if isinstance(e, KeyboardInterrupt):
            status = 128 + getattr(signal, str(e), signal.SIGINT)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    finally:
        for f in [] if dist.is_initialized() else [*CLAIMS]:  # other ranks may still write: then the lock goes with the process
            release(f)
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(status) if dist.is_initialized() else sys.exit(status)  # other ranks may wait in a collective: do not wait for them


CLAIMS = []  # open files that stand for the outputs of this process


def claim(path, flag="--out"):
    """Refuse a second run in one place: hold a lock on the file `path` until the script ends. The system drops it with the process, however
    that ends, so a file that is left is taken over. Raises UserError, which names the owner."""
    if any(os.path.exists(path) and os.path.samestat(os.fstat(f.fileno()), os.stat(path)) for f in CLAIMS):
        raise UserError(f"{flag} {Path(path).parent}: this run writes something else there already; choose another folder")
    while True:
        f = open(str(path), "a+", encoding="utf-8", errors="replace")
        f.seek(0)
        owner, _, what = f.read().strip().partition(": ")
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"{path}: this file system has no locks ({e.strerror}); nothing will stop a second run in the same place", file=sys.stderr)
                return None
            raise UserError(f"{path}: in use by {owner or 'another process'}; wait for it, stop it, or choose another {flag} (it runs {what[:200]})")
        if os.path.exists(path) and os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
            break  # else its owner has just deleted it
    if owner:
        print(f"{path}: left by {owner}, which is gone; taken over (it ran {what[:200]})", file=sys.stderr)
    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H.%M')}: {command()}\n")
    f.flush()
    CLAIMS.append(f)
    return f


def release(f):
    """End a claim()."""
    if f in CLAIMS:
        CLAIMS.remove(f)
        Path(f.name).unlink(missing_ok=True)
        f.close()


def sweep(lock, *paths):
    """Delete what only an unfinished output needs, after its end or after a kill there."""
    if any(map(os.path.exists, (lock, *paths))):
        held = [f for f in CLAIMS if f.name == str(lock)]
        own = None if held else claim(lock)
        for path in paths:
            Path(path).unlink(missing_ok=True)
        release(own)


def command():
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@functools.lru_cache
def commit():
    """The commit of the code, with "-dirty" when files differ from it; None outside a git repository."""
    words = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def made():
    """What every output says of its making: command, commit, versions."""
    packages = {p: metadata.version(p) for p in ("torch", "numpy", "pillow", "timm")}
    return dict(command=command(), commit=commit(), versions=dict(python=platform.python_version(), **packages))


def setup(deterministic=False):
    """(device, rank, world size): CUDA, else MPS, else CPU; a process group when torchrun started the script. deterministic: PyTorch's
    repeatable algorithms on CUDA; it warns of an operation that has none."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    keep_memory(device)
    if world > 1:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # on one node torchrun's restarts share a store, and would read the dead processes' addresses
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo too, for tensors on the CPU: they never wait for the GPU
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=2))
    return device, rank, world


def keep_memory(device):
    """glibc gives large freed blocks back to the system, and each step of a CPU pays for their pages anew: keep them."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def fast_precision(device):
    """bf16 where matrix units for it exist (CUDA Ampere and later, CPUs with AVX512-BF16 or AMX), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() or getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return "bf16" if device.type == "cpu" and has else "fp32"


def autocast(device, precision):
    """bf16 for matmuls and convolutions; weights, losses and KL stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cast_matmuls(module, device, precision):
    """Keep the weights of a frozen network's matmuls and convolutions in bf16: the values that autocast would make of them in each
    pass. Norms and embeddings stay float32."""
    for m in module.modules() if precision == "bf16" and device.type != "meta" else ():
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
            m.to(torch.bfloat16)
    return module.to(device)


def barrier():
    all_reduce(torch.zeros(1))


@contextlib.contextmanager
def rank_zero_first():
    """The first process may download; the others then find its copy."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank:
        barrier()
    yield
    if not rank:
        barrier()


def sync_if(module, last):
    """Gradients travel between processes with the last micro-batch only."""
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()


def any_batch(x, varies):
    """x; where the size of batches `varies`, torch.compile is told, and compiles once for all sizes from 2."""
    if varies:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def all_reduce(x, op=None):
    """Sum (or `op`) of a tensor over all ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(x, op or dist.ReduceOp.SUM)
    return x


class Parts:
    """The loss parts of the steps since the last look. They stay on the device until then: only a look waits for it.

    A step in which a WATCHED part is SPIKE times its running geometric mean is listed in `spikes`.
    Losses of single images are also summed by time, in BINS equal parts of [0, 1], until by_time(). What lasts from look to look belongs
    into the checkpoint: state().
    """

    WATCHED, SPIKE, DECAY, BEGIN, BINS = ("velocity", "rec", "grad_norm"), 4.0, 0.98, 20, 10  # BEGIN: steps before the first spike

    def __init__(self, state=None):
        self.usual, self.sums = (state or {}).get("usual", {}), np.array((state or {}).get("sums", np.zeros((2, self.BINS))))
        self.rows, self.spikes = [], []

    def state(self):
        return dict(usual=self.usual, sums=self.sums.tolist())

    def add(self, step, parts, each=None, t=None):
        """parts: {name: scalar tensor of this rank}; each (B,): a number of each of its images that shows whether it is finite, with
        their times t (B,) its loss."""
        self.rows.append((step, list(parts), torch.stack([v.detach().float() for v in parts.values()]), each, t))

    def look(self, advice, name_images=lambda step, places: [""] * len(places)):
        """{name: float} of the last step, means over ranks. Raises UserError for the first step since the last look with a value that is not
        finite; name_images(step, places in the global batch) names the images that are not."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        values = all_reduce(torch.cat([row[2] for row in self.rows])) / world
        hardest = self.hardest()
        self.spikes = []
        for i, ((step, names, _, each, _), row) in enumerate(zip(self.rows, values.cpu().split([len(row[1]) for row in self.rows]))):
            parts = dict(zip(names, row.tolist()))
            bad = [k for k, v in parts.items() if not np.isfinite(v)]
            if bad:
                places = [] if each is None else self.not_finite(each, rank, world)
                shown = ", ".join(f"{p} ({name})" for p, name in zip(places, name_images(step, places[:8])))
                images = f"; {len(places)} of the batch's images, {shown}" if places else ""
                raise UserError(f"step {step}: {', '.join(bad)} not finite ({', '.join(f'{k} {v:.4g}' for k, v in parts.items())}){images}; the last checkpoint is intact; "
                                f"begin anew with another --out and {advice}")
            high = {k: self.usual[k][1] for k in self.WATCHED if self.unusual(k, parts.get(k, 0))}
            if high:
                self.spikes.append(dict(step=step, spike={k: parts[k] for k in high}, usual=high, grad_norm=parts.get("grad_norm"), time_bin=hardest[i]))
        self.rows = []
        return parts

    def unusual(self, name, value):
        """Whether a value is a spike; it moves the running mean no further than a spike would."""
        if value <= 0:
            return False
        n, mean = self.usual.get(name, (0, value))
        ratio, decay = value / mean, min(self.DECAY, n / (n + 1))
        spike = n >= self.BEGIN and ratio > self.SPIKE
        self.usual[name] = n + 1, mean * (self.SPIKE if spike else ratio) ** (1 - decay)
        return spike

    def hardest(self):
        """Of each step, the time bin of the image with the largest loss over all ranks (None without times); adds to the sums by time."""
        if self.rows[0][4] is None:
            return [None] * len(self.rows)
        each, t = (torch.stack([row[k].detach().float() for row in self.rows]).cpu() for k in (3, 4))  # (steps, B)
        bins, finite = (t * self.BINS).long().clamp(0, self.BINS - 1), each.isfinite()
        sums = torch.stack([torch.bincount(bins[finite], w.double(), self.BINS) for w in (each[finite], torch.ones_like(each[finite]))])
        self.sums += all_reduce(sums).numpy()
        most, at = each.nan_to_num(-1).max(1)
        top = all_reduce(most.clone(), dist.ReduceOp.MAX)
        return all_reduce(bins.gather(1, at[:, None])[:, 0].where(most == top, torch.tensor(-1)), dist.ReduceOp.MAX).tolist()

    def not_finite(self, each, rank, world):
        """Places in the global batch whose number in `each` (B,) is not finite."""
        flags = torch.zeros(world, len(each))
        flags[rank] = (~each.detach().isfinite()).float().cpu()
        return all_reduce(flags).flatten().nonzero()[:, 0].tolist()

    def by_time(self):
        """[mean loss of the images in each time bin since the last call], None where there were none."""
        means = [float(f"{a / n:.6g}") if n else None for a, n in self.sums.T]
        self.sums[:] = 0
        return means


def split_rows(n, rank, world):
    """The contiguous slice of range(n) that belongs to a rank; the slices are disjoint and cover all rows."""
    return range(n * rank // world, n * (rank + 1) // world)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.Generator(np.random.Philox(key=(seed << 64) + epoch)).permutation(n)


def sample_order(n, seed, start, count):
    """Rows of positions start .. start+count-1 in an endless stream of epochs, each a permutation of range(n) drawn
    from (seed, epoch): the data position is the step alone, whatever the number of processes."""
    return [int(epoch_order(n, seed, p // n)[p % n]) for p in range(start, start + count)]


class StepRows:
    """Rows of this rank in each step from `first` to `last`, worked out when a reading process asks for them."""

    def __init__(self, n, args, first, rank, world):
        self.n, self.args, self.first, self.rank, self.local = n, args, first, rank, args.batch // world

    def __len__(self):
        return self.args.steps - self.first

    def __getitem__(self, k):
        return sample_order(self.n, self.args.seed, (self.first + k) * self.args.batch + self.rank * self.local, self.local)


def draw_noise(seed, rows, uniforms, *shapes):
    """Random numbers that depend on (seed, row) only: U(0,1) (B, uniforms), then one standard normal (B, *shape) a shape.

    A counter-based generator (Philox, key = seed and row) makes them equal for any number of processes or batch size,
    and leaves no generator state to store in a checkpoint.
    """
    generators = [np.random.Generator(np.random.Philox(key=(seed << 64) + int(r))) for r in rows]
    drawn = [torch.from_numpy(np.stack([g.random(uniforms, dtype=np.float32) for g in generators]))]
    for shape in shapes:
        drawn.append(torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])))
    return drawn


def open_out(folder, need_bytes=0, flag="--out"):
    """Make an output folder. Raises UserError, which names the `flag`, when it cannot be written or the disk lacks `need_bytes`."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        full = e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)
        raise UserError(f"{folder}: cannot be written ({e.strerror}); {HINTS[e.errno] if full else f'choose another {flag}'}")
    free = shutil.disk_usage(folder).free
    if need_bytes > free:
        raise UserError(f"{folder}: needs {need_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
                        f"free space or choose another {flag}")
    return folder


def new_array(path, dtype, shape):
    """A .npy file of zeros that has its place on disk: a memory map would end in a bus error when that is full."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as f:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)


def begin_rows(mark, settings, files):
    """Arrays on disk for RowFiles: files {path: (dtype, shape)}, the last of uint8 says which rows are there. They are made anew, with their
    place on disk, unless the JSON file `mark` says that they are of the same settings -> whether they were there."""
    mark = Path(mark)
    with contextlib.suppress(FileNotFoundError, *BROKEN):  # an error of the machine must not end in files made anew
        found = json.loads(mark.read_text())
        found.pop("made")
        arrays = [np.load(p, mmap_mode="r", allow_pickle=False) for p in files]
        if found == json.loads(json.dumps(settings)) and [(a.dtype, a.shape) for a in arrays] == [(np.dtype(d), tuple(s)) for d, s in files.values()]:
            return True
    if mark.exists():
        print(f"{mark}: of other settings, or damaged; begun anew", file=sys.stderr)
        mark.unlink()
    for path, (dtype, shape) in files.items():
        new_array(path, dtype, shape)
    write_json(mark, settings)  # last: without it the others do not count
    return False


class RowFiles:
    """Arrays on disk that processes fill in row by row, in any order; a stopped run goes on. Made by begin_rows()."""

    EVERY = 2  # seconds between marks

    def __init__(self, *files, mode="r+"):
        *self.arrays, self.done = (np.load(p, mmap_mode=mode, allow_pickle=False) for p in files)
        self.pending, self.flushed = [], time.time()

    def missing(self, rank, world):
        """This rank's share of the rows that are not there. Called by all ranks, before anyone stores."""
        rows = np.flatnonzero(self.done == 0)
        barrier()
        return rows[split_rows(len(rows), rank, world)].tolist()

    def put(self, rows, *values, done=1):
        """Store the values of these rows; every few seconds mark what is then safe on disk (a kill in between repeats it)."""
        for array, value in zip(self.arrays, values):
            array[rows] = value
        self.pending.append((rows, done))
        if time.time() > self.flushed + self.EVERY:
            self.flush()

    def flush(self):
        for array in self.arrays:
            array.flush()
        for rows, done in self.pending:
            self.done[rows] = done
        self.done.flush()
        self.pending, self.flushed = [], time.time()


def weights_hash(state_dict):
    """16 hex digits that name a set of weights: sha256 over names, shapes and values (float32)."""
    h = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().float().cpu().contiguous()
        h.update(f"{name}{tuple(value.shape)}".encode())
        h.update(value.numpy().tobytes())
    return h.hexdigest()[:16]


def sync(path):
    """A file's content, or a folder's names, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some network file systems know no fsync of a folder
            raise
    finally:
        os.close(handle)


def save_checkpoint(path, state):
    """Write `path` so that a kill at any moment leaves a whole checkpoint; the one before stays as NAME.prev.pt. Raises UserError, and
    leaves both as they are, for a value that is not finite and for a disk that fails."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    bad = [keystr(k) for k, v in tree_flatten_with_path(state)[0] if isinstance(v, torch.Tensor) and v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise UserError(f"{path}: not saved, {bad[0]} is not finite ({len(bad)} such tensors); the checkpoint before it is intact; begin anew with another --out and a smaller --lr")
    try:
        with open(temporary, "wb") as f:
            torch.save(dict(state, made=made()), f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        cause = e.__context__ if isinstance(e, RuntimeError) else e  # torch.save hides the system's error
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause}); the checkpoint before it is intact; {HINTS.get(cause.errno, 'mend that')}, then run the same command again")
    if path.exists():
        os.replace(path, path.with_suffix(".prev.pt"))
    os.replace(temporary, path)
    sync(path.parent)


# What other projects pickle beside their weights (settings, Lightning's callbacks, counters): read as nothing, never imported.
BYSTANDERS = ("argparse.", "builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str", "collections.", "ldm.", "lightning.",
              "numpy.", "omegaconf.", "pathlib.", "pytorch_lightning.", "typing.")


class Placeholder:
    """Stands for an object of another project's class: takes any arguments and state, and does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


def load_checkpoint(path):
    """Tensors of a .safetensors, or of a torch file without running pickled code, on the CPU. Raises UserError for a missing,
    torn or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, expected a checkpoint file' if path.is_dir() else 'no such checkpoint'}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if is_zip(path):
            check_zip(path, checksums=True)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip(path) else ["argparse.Namespace"]
        strange = [name for name in foreign if not name.startswith(BYSTANDERS)]
        if strange:
            raise UserError(f"{path}: not a readable checkpoint: it holds {strange[0]}, which is no weight; pickled code is never run")
        with torch.serialization.safe_globals([(Placeholder, name) for name in foreign if name.startswith(BYSTANDERS)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except DAMAGED as e:
        kind, what = (UserError, "cannot be read now") if of_the_machine(e) else (DamagedFile, "not a readable checkpoint")
        text = f"{type(e).__name__}: {' '.join(str(e).split())[-120:]}" if kind is UserError or path.suffix == ".safetensors" or is_zip(path) else "cut, or not written by torch.save"
        before = path.with_suffix(".prev.pt")
        raise kind(f"{path}: {what} ({text})" + (f"; the one before it is {before}" if before.exists() and before != path else ""))


def load_newest(path):
    """The checkpoint `path`, or the one kept before it when the newest is missing or damaged; None when there is neither. Called by all
    ranks; the first one chooses. A damaged file is renamed, lest the next save puts it in the place of the good one."""
    path, rank, found, choice = Path(path), dist.get_rank() if dist.is_initialized() else 0, None, 0
    places = [path, path.with_suffix(".prev.pt")]
    damaged = {}
    for p in [p for p in places if p.exists()] if rank == 0 else ():
        try:
            found, choice = load_checkpoint(p), 1 + places.index(p)
            break
        except DamagedFile as e:
            damaged[p] = one_line(str(e))
    if damaged and found is None:
        raise UserError(f"{'; '.join(damaged.values())}; no checkpoint is left to go on from; begin anew with another --out")
    for p, reason in damaged.items():
        print(f"{reason}; going on from {places[1]}, the damaged file is now {p.with_suffix('.damaged')}", file=sys.stderr)
        os.replace(p, p.with_suffix(".damaged"))
    choice = int(all_reduce(torch.tensor(choice)))
    return load_checkpoint(places[choice - 1]) if choice and rank else found


def disk_left(need, path):
    """Of `need` bytes for checkpoints, what is not on disk yet."""
    return need - sum(p.stat().st_size for p in (path, path.with_suffix(".prev.pt")) if p.exists())


# Flags that may change between the first and the second half of a run without changing what it computes. What files hold is compared
# by its hash (inputs): a folder may move.
FREE_FLAGS = {"out", "data", "latents", "init", "vfm_ckpt", "lpips_ckpt", "disc_ckpt", "steps", "micro_batch", "workers", "save_every", "log_every", "compile", "eval_every",
              "eval_stats", "eval_images", "eval_steps", "grad_checkpointing", "deterministic"}


def same_run(checkpoint, args, path, inputs):
    """Refuse to resume `path` under other settings than it was begun with, or on other inputs: {name: hash or None}, the names those of the flags."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("args"), dict):
        raise UserError(f"{path}: not a checkpoint of this script; choose another --out")
    fixed = {"steps"} if getattr(args, "lr_decay", 0) else set()  # a schedule that ends at --steps cannot be extended
    fixed |= {"micro_batch"} if getattr(args, "disc_ckpt", None) else set()  # batch norm sees the split
    for name, value in vars(args).items():
        if name not in checkpoint["args"] and (not value or name == "align"):
            continue  # a flag that is younger than the run; lambda tells the arms apart
        before = checkpoint["args"].get(name)
        before, value = (bool(before), bool(value)) if name == "cache_vfm" else (before, value)  # its folder may move
        if name not in FREE_FLAGS - fixed and before != value:
            raise UserError(f"{path} was begun with --{name.replace('_', '-')} {before}, this command says {value}; "
                            "use the same settings to go on, or another --out to begin anew")
    known = checkpoint.get("inputs", {})
    for name, value in inputs.items():
        if known.get(name, value) != value:
            raise UserError(f"{path} was begun with other content of --{name.replace('_', '-')} {getattr(args, name)} (hash {known[name]}, now {value}); bring that back to go on, or "
                            "choose another --out to begin anew")


def load_weights(module, state, source):
    """Strict load_state_dict; names the first missing, unexpected or misshapen key and both shapes."""
    have = {k: tuple(v.shape) for k, v in state.items()}
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    wrong = ([f"{k} is missing, expected {want[k]}" for k in want if k not in have] + [f"{k} is unexpected, {have[k]}" for k in have if k not in want]
             + [f"{k} is {have[k]}, expected {want[k]}" for k in want if k in have and have[k] != want[k]])
    if wrong:
        raise UserError(f"{source}: does not fit {type(module).__name__}: {wrong[0]} ({len(wrong)} such entries)")
    bad = [k for k, v in state.items() if not v.isfinite().all()]
    if bad:
        raise UserError(f"{source}: {bad[0]} holds NaN or infinity ({len(bad)} such tensors)")
    module.load_state_dict(state)


def learning_rate(args, step):
    """args.lr, times a linear warm-up over --lr-warmup steps, times (--lr-decay 1) half a cosine from 1 to 0 over all steps."""
    warm = min(1.0, (step + 1) / args.lr_warmup) if args.lr_warmup else 1.0
    return args.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / args.steps) if args.lr_decay else 1.0)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)) so that early averages are not noise."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


class Log:
    """metrics.jsonl: the run's settings first, then one JSON object a line; a resumed run drops what came after its
    checkpoint, and says by which command it goes on (these lines stay). Only rank 0 writes."""

    def __init__(self, path, step, settings, rank):
        self.path, self.rank, kept = Path(path), rank, []
        if rank:
            return
        for line in self.path.read_text("utf-8", "replace").splitlines() if step and self.path.exists() else ():
            with contextlib.suppress(*DAMAGED):  # a torn last line
                kept += [line] if json.loads(line).get("step", 0) <= step else []
        first = json.dumps(dict(settings, made=made()))
        write_text(self.path, "".join(line + "\n" for line in kept or [first]))
        if kept:
            self.write(resumed=made(), from_step=step)

    def write(self, **record):
        if not self.rank:
            with open(self.path, "a") as f:
                f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}) + "\n")


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the context, and their peak; tensors made before it do not count."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def free(self, key):
        self.now -= self.known.pop(key)

    def note(self, tree, counts):
        for t in tree_leaves(tree):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known[storage._cdata] = storage.nbytes() * counts
                self.now += storage.nbytes() * counts
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note((args, kwargs), counts=0)
        out = func(*args, **(kwargs or {}))
        self.note(out, counts=1)
        return out


def peak_bytes(run):
    """Bytes that run() would allocate at its peak; with tensors of the "meta" device nothing is computed. Attention counts as
    the fused kernels hold it: three inputs and one output, no N x N matrix (which a CPU in bf16 makes for few tokens)."""
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: q * k * v), PeakBytes() as counter:
        run()
    return counter.peak


# ---------------------------------------------------------------------------------------------------------------------
# Speed: what --bench of every stage measures

def bench_flags(p):
    p.add_argument("--bench", type=positive, metavar="STEPS", help="speed of STEPS steps on random data of the real shapes (no data, no weights needed), and end")
    p.add_argument("--json", help="with --bench: write its numbers here too")


def required(p, args, *names):
    """argparse's own message for flags that only --bench does without."""
    missing = [f"--{n}" for n in names if getattr(args, n.replace("-", "_")) is None]
    if missing and not args.bench:
        p.error(f"the following arguments are required: {', '.join(missing)}")
    if args.json and not args.bench:
        p.error("--json: has no effect without --bench")
    useless = [f for f in ("dry-run", "eval-every", "guide") if args.bench and getattr(args, f.replace("-", "_"), None)]
    if useless or args.bench and getattr(args, "command", "encode") != "encode":
        p.error(f"--bench does not go with {f'--{useless[0]}' if useless else args.command}")


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of the parts of a step: `with clock("forward"): ...`. Free until `on` is set (by --bench alone): then it waits for the
    device at both ends of each part."""

    def __init__(self, device):
        self.device, self.on, self.seconds = device, False, Counter()

    @contextlib.contextmanager
    def __call__(self, part):
        if not self.on:
            yield
            return
        synchronise(self.device)
        begin = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[part] += time.perf_counter() - begin


def count_flops(run):
    """Floating-point operations of the matmuls, convolutions and attention products of run(), backward passes too. (Attention on the "meta"
    device: the counter does not know the CPU's fused kernel.)"""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matmul_rate(device, precision):
    """FLOP/s of large matmuls in the layout of a linear layer, over all processes: the limit of the machine. Median over half a second."""
    n, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds, end = [], time.perf_counter() + 0.5
    while len(seconds) < 8 or time.perf_counter() < end:
        synchronise(device)
        begin = time.perf_counter()
        a @ b.T
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return float(all_reduce(torch.tensor(2 * n ** 3 / np.median(seconds[3:]), dtype=torch.float64)))


def peak_mib(device):
    """Largest memory so far: what PyTorch allocated on a GPU, the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def machine(device):
    threads = f", {torch.get_num_threads()} thread(s)" if device.type != "cuda" else ""
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()) + threads + f", torch {torch.__version__}"


def cpu_name():
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def run_bench(args, title, device, step, images, flops, clock, bare=None, warmup=2, **more):
    """Time args.bench calls of step(), each of `images` images over all processes and `flops` operations an image, in turn with bare(), which
    does what a step cannot do without; then up to three more by parts (clock). Prints on rank 0, and writes --json: images_per_s
    (median), spread (quartiles), ms, peak_mib, flops_per_image, matmul_rate, share_of_limit (operations a second over that rate),
    share_of_bare (bare's median over the step's), and `more`, worked out at the end."""
    if args.json:
        open_out(Path(args.json).parent, flag="--json")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rates, seconds, bares = [matmul_rate(device, args.precision)], [], []
    for _ in tqdm(range(warmup + args.bench), "bench", disable=rank > 0 or None):
        for run, taken in ((step, seconds), (bare, bares)):
            if run is not None:
                synchronise(device)
                begin = time.perf_counter()
                run()
                synchronise(device)
                taken.append(time.perf_counter() - begin)
    low, median, high = (float(np.quantile(seconds[warmup:], q)) for q in (0.25, 0.5, 0.75))
    clock.on, parts = True, min(3, args.bench)
    for _ in range(parts):
        step()
    clock.on = False
    rates.append(matmul_rate(device, args.precision))
    if bare is not None:
        more["share_of_bare"] = float(np.median(bares[warmup:])) / median
    more = {k: v() if callable(v) else v for k, v in more.items()}
    rate, ms = sum(rates) / 2, {k: 1e3 * v / parts for k, v in clock.seconds.items()}
    record = dict(stage=title, machine=machine(device), processes=world, precision=args.precision, command=" ".join(sys.argv), images_per_s=images / median,
                  spread=[images / high, images / low], ms=ms, step_ms=1e3 * median, peak_mib=peak_mib(device), flops_per_image=flops, matmul_rate=rate,
                  share_of_limit=flops * images / median / rate, **more)
    if rank == 0:
        print(f"{title}; {record['machine']}, {world} process(es), {device.type} {args.precision}")
        print(f"{record['images_per_s']:.4g} images/s, median of {args.bench} steps of {images} images and {record['step_ms']:.0f} ms (middle half: {record['spread'][0]:.4g} to {record['spread'][1]:.4g})")
        print("ms a step: " + ", ".join(f"{k} {v:.1f}" for k, v in ms.items()) + f"; peak memory {record['peak_mib']:.0f} MiB a process")
        print(f"{flops / 1e9:.4g} GFLOP an image: {flops * images / median / 1e9:.0f} GFLOP/s, {record['share_of_limit']:.0%} of the {rate / 1e9:.0f} that matmuls reach here in {args.precision}")
        for key, value in more.items():
            print(f"{key.replace('_', ' ')}: " + (f"{value:.4g}" if isinstance(value, float) else str(value)))
        if args.json:
            write_json(args.json, record)


def largest_micro_batch(memory, used, device):
    """How many images a process can take at a time: memory(n) is the estimate in bytes for n images, `used` the number that ran. On a
    GPU the measured peak corrects the estimate, which counts in float32."""
    each = memory(2) - memory(1)
    fixed, scale = memory(1) - each, 1.0
    if device.type == "cuda":
        limit, scale = torch.cuda.mem_get_info(device)[1], (peak_mib(device) * 2 ** 20 - fixed) / (used * each)
    else:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, int((0.9 * limit - fixed) / (each * min(1.0, max(0.1, scale)))))


def random_images(folder, n, size):
    """n JPEG files of 2 x 1.5 times `size` pixels (ImageNet's usual 500 x 375 for 256), smooth with a little noise."""
    rng = np.random.default_rng(0)
    for i in range(n):
        smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((2 * size, 3 * size // 2), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 8, (3 * size // 2, 2 * size, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(Path(folder, f"{i:04d}.jpg"), quality=90)
    return folder


def write_text(path, text):
    """Whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    sync(temporary.parent)


def write_json(path, record):
    """A JSON file that says how it was made."""
    write_text(path, json.dumps(dict(record, made=made()), indent=1) + "\n")


def save_png(image, path):
    """A PIL image as PNG that says how it was made (in its text chunk "made")."""
    info = PngImagePlugin.PngInfo()
    info.add_text("made", json.dumps(made()))
    image.save(path, "png", pnginfo=info)


def read_json(path, kind=dict):
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"holds a {type(found).__name__}")
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage before (bash run.sh runs them all)")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not the JSON that a stage wrote ({e}); delete it and run that stage again")


class Stop:
    """From here SIGTERM and Ctrl-C ask for a save; `asked()` is true on every rank once any rank was signalled."""

    def __init__(self):
        self.flag = torch.zeros(1)
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, lambda number, _: self.flag.fill_(number))

    def asked(self):
        """The number of the signal, else 0."""
        return int(all_reduce(self.flag.clone(), dist.ReduceOp.MAX))


def save_grid(images, path, columns):
    """uint8 (N, 3, H, W) -> one PNG with `columns` images a row."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.full((3, rows * h, columns * w), 255, dtype=torch.uint8)
    for i in range(n):
        r, c = divmod(i, columns)
        sheet[:, r * h:(r + 1) * h, c * w:(c + 1) * w] = images[i]
    save_png(Image.fromarray(sheet.permute(1, 2, 0).numpy()), path)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    a = commands.add_parser("avatars", help="render the built-in data set")
    a.add_argument("out")
    a.add_argument("--n", type=positive, default=12000, help="images (default 12000)")
    a.add_argument("--size", type=positive, default=64, help="pixels a side (default 64)")
    a.add_argument("--seed", type=natural, default=0)
    a.add_argument("--dry-run", action="store_true", help="print the plan (images, classes, disk), and end")
    c = commands.add_parser("check", help="read every image of a folder and its attribute table")
    c.add_argument("dir")
    c.add_argument("--size", type=positive, default=64, help="crop, in pixels (default 64)")
    args = p.parse_args()
    if args.command == "avatars" and args.dry_run:
        return print(f"{args.n} images of {args.size} x {args.size} in {len(AVATAR_STYLES)} classes -> {args.out}, about "
                     f"{args.n * 2.6e3 * args.size / 64 / 2**20:.0f} MiB of disk (2.6 kB an image at 64 pixels)")
    if args.command == "avatars":
        return render_avatars(args.out, args.n, args.size, args.seed)
    images = ImageFolder(args.dir, args.size)
    images.max_bad = 1.0  # read them all; judged below
    rows = chunks(range(len(images)), 64)
    for _ in tqdm(load_batches(images, rows, workers=os.cpu_count()), total=len(rows), disable=None):
        pass
    print(f"{args.dir}: {len(images) - len(images.bad)} images in {len(images.classes)} classes, {len(images.bad)} unreadable")
    if (images.root / "attributes.csv").exists():
        print(f"attributes.csv: {len(read_attributes(args.dir).names)} attributes")
    images.max_bad = MAX_BAD
    images.note_bad([])


if __name__ == "__main__":
    run_script(main)
