"""Images, attribute tables and latents on disk -> batches; the order of rows and the noise.

    python data.py check images                             # read every image, count the bad ones

Whatever is random depends on (seed, index) alone: the same batches come from any number of processes, and a
checkpoint holds no generator state.
"""
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import os
import signal
import stat
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageCms, ImageOps, features
from tqdm import tqdm

import common
from common import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_SUFFIXES += (".avif",) if "avif" in features.modules and features.check("avif") else ()
# how the names of folders begin that systems and network disks make: hidden ones, wastebaskets, thumbnails
NOT_OURS = (".", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir",
            "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot")
MAX_BAD = 0.01  # a data set with a larger share of unreadable images stops the run
# of an image, as it is and at the crop's scale: 89 million, where Pillow warns
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
WORKER_TIMEOUT = 600  # seconds that a batch of images may take
SPLITS = ("train", "val", "test")
# What Pillow raises on damaged files. An error of the system among them is no image's fault, but for these
DAMAGED_IMAGE = (*common.BROKEN, OSError, Image.DecompressionBombError)
OF_A_FILE = (*common.OF_A_FILE, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses these
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of broken metadata


class UnreadableImage(UserError):
    """One image file that cannot be decoded."""


# ------------------------------------------------------------------------------------------------------------
# Images


def scale_grey(image, tags):
    """A grey image of more than 8 bits -> L. tags: its TIFF's, or {}. White is the largest number of 12, 15
    (signed) or 16 bits, and 1 in floats up to 1. 32 bits do not say what is white: 65535 where values reach
    half of it. Raises ValueError for others, and for 16 bits of which 12 or fewer are used."""
    bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]  # BitsPerSample, SampleFormat
    grey = np.asarray(image).astype(np.float64)
    low, high = grey.min(), grey.max()
    if not np.isfinite(low + high):
        raise ValueError("NaN or infinite pixels")
    white = 2 ** min(bits, 15 if bits == 16 and kind == 2 else 16) - 1
    dark = white / (16 if bits <= 16 else 2)
    if image.mode == "F" and high <= 1:
        white, dark = 1, 0
    if low < 0 or high > white or 0 < high < dark:
        raise ValueError(f"greys from {low:g} to {high:g} in {bits} bits do not say what is white; save it "
                         "in 8 bits, or in 16 with 65535 as white")
    if tags.get(262) == 0:  # PhotometricInterpretation: WhiteIsZero
        grey = white - grey
    return Image.fromarray((grey / (white / 255)).round().astype(np.uint8))


def to_rgb(image):
    """Any PIL mode -> RGB, 8 bit. Greys of more bits are scaled, transparency is laid on white, EXIF rotation
    is applied; an ICC profile only to CMYK."""
    tags = getattr(image, "tag_v2", {})
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = scale_grey(image, tags)
    if image.mode == "CMYK":
        return to_srgb(image, image.info.get("icc_profile"))
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@functools.lru_cache(maxsize=32)
def srgb_transform(profile, mode):
    """The bytes of an ICC profile, mode L, RGB or CMYK -> transform to sRGB. None for a broken profile, one
    of other channels, and sRGB itself, whatever its name."""
    bands = Image.getmodebands(mode)
    levels = 17 * np.indices((16,) * bands, np.uint8).reshape(bands, -1).T
    colours = Image.frombytes(mode, (1, len(levels)), levels.tobytes())
    try:
        transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
        found = np.array(ImageCms.applyTransform(colours, transform), np.int16)[:, 0]
    except (ImageCms.PyCMSError, *common.BROKEN, OSError):
        return None
    moved = np.abs(found - np.array(colours.convert("RGB"))[:, 0]).max()
    black, white = sorted((found[0], found[-1]), key=sum)
    # sRGB's own profiles differ by rounding; a broken one makes anything of black and white
    return transform if moved > 3 and black.max() < 96 and white.min() > 192 else None


def to_srgb(image, profile):
    """An image of mode L, RGB or CMYK and the bytes of its ICC profile (or None) -> sRGB."""
    transform = srgb_transform(profile, image.mode) if profile else None
    return ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")


def center_crop(image, size):
    """ADM's crop (Dhariwal & Nichol 2021): halve with a box filter, bicubic to a short side of `size`, cut
    the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        size_scaled = round(image.width * scale), round(image.height * scale)
        image = image.resize(size_scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@contextlib.contextmanager
def open_image(path, size=1):
    """A PIL image for a crop of `size`. Whatever goes wrong in the context is raised as UnreadableImage, but
    the machine's errors as UserError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ValueError("no regular file")
        with Image.open(path) as image:
            short, long = sorted(image.size)
            if max(short * long, size * size * long / short) > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}, as it is "
                                 "or at the crop's scale")
            yield image
    except DAMAGED_IMAGE as e:
        if common.of_the_machine(e, OF_A_FILE):
            hint = common.HINTS.get(getattr(e, "errno", None), "see to the disk or the network")
            reason = getattr(e, "strerror", None) or common.brief(e)
            raise UserError(f"{path}: cannot be read now ({reason}); {hint}, then run the same command "
                            "again") from None
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason})") from None


def read_image(path, size):
    """Image file -> uint8 (3, size, size) sRGB, ADM centre crop. Raises UnreadableImage, or UserError when
    the machine is at fault."""
    with open_image(path, size) as image:
        crop = center_crop(to_rgb(image), size)
        if image.mode != "LAB" and image.getbands()[0] in "1LIF":  # grey, so is its profile
            crop = crop.convert("L")
        crop = to_srgb(crop, image.info.get("icc_profile"))  # of few pixels: it is slow
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def to_float(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float (B, 3, H, W) in [-1, 1] -> uint8, clamped and rounded: the one rule for every picture written or
    scored."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def find_images(root, left_out=None):
    """Sorted posix paths of the images below `root`, relative to it. left_out: a Counter, which is told of
    everything else, by suffix. Raises UserError when there are none."""
    root = Path(root)
    if root.is_file():
        raise UserError(f"{root}: a file; expected a folder of images")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a folder of images (for the built-in set: "
                        f"python extras/avatars.py {root})")

    def fail(error):  # a folder that cannot be listed is not an empty one
        raise error

    left_out = Counter() if left_out is None else left_out
    files, above = [], {str(root): {os.path.realpath(root)}}
    for folder, dirs, names in os.walk(str(root), followlinks=True, onerror=fail):
        left_out.update(f"{d}/" for d in dirs if d.startswith(NOT_OURS))
        inside = {d: os.path.realpath(os.path.join(folder, d)) for d in dirs if not d.startswith(NOT_OURS)}
        # a link to a folder that holds it is no end
        dirs[:] = [d for d, key in inside.items() if key not in above[folder]]
        above.update((os.path.join(folder, d), above[folder] | {inside[d]}) for d in dirs)
        images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
        files += [Path(folder, n).relative_to(root).as_posix() for n in images]
        left_out.update("hidden" if n.startswith(".") else Path(n).suffix.lower() or "without a suffix"
                        for n in {*names}.difference(images, ("attributes.csv", "avatars.json")))
    strange = [f for f in files if f.splitlines() != [f] or f.encode(errors="ignore").decode() != f]
    if strange:
        raise UserError(f"{root}: the name {strange[0]!a} holds a line break or is not UTF-8; rename that "
                        "file")
    if not files:
        raise UserError(f"{root}: no images found; expected {' '.join(IMAGE_SUFFIXES)} in it or in class "
                        f"folders below it, found {in_words(left_out) or 'nothing'}")
    return sorted(files)


def in_words(counts):
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


@functools.lru_cache
def say_what_was_taken(root, classes, left_out):
    """Once for all processes and parts of a folder: what is no image, and class names that are no classes."""
    if dist.is_initialized() and dist.get_rank():
        return
    if left_out:
        print(common.one_line(f"{root}: left out {left_out}"), file=sys.stderr)
    named = {c.lower() for c in classes} <= {*SPLITS, "training", "valid", "validation", "testing"}
    if named and not (root / "attributes.csv").exists():
        print(f"warning: {root}: the classes are named {', '.join(classes)}; if these are splits, give one "
              "of them as the folder, or put the splits into attributes.csv", file=sys.stderr)


class ImageFolder(torch.utils.data.Dataset):
    """Images below `root`; the class is the first folder's name, or "all" when the images lie in `root`
    itself. Classes are numbered in the order of their names as text ("10" before "2").

    Item i: (image uint8 (3, size, size), label int). With flip=True there are 2N items: item N + i is the
    mirror image of item i, so that flips need no random numbers. split ("train", "val", "test") keeps the
    files that attributes.csv puts there. `.files` and `.labels` have N entries; `.classes` are those of the
    whole folder. Raises UserError for a folder that cannot be used, UnreadableImage for an item that cannot
    be decoded.
    """

    def __init__(self, root, size, flip=False, split=None):
        self.root, self.size, self.flip = Path(root), size, flip
        self.name = f"{root} (split {split})" if split else str(root)
        left_out = Counter()
        files = find_images(root, left_out)
        top = [f.split("/")[0] if "/" in f else "" for f in files]
        if "" in top and any(top):
            raise UserError(f"{root}: {files[top.index('')]} lies beside the class folders ({max(top)}/...); "
                            "put every image into a class folder, or none")
        self.classes = sorted(set(top)) if any(top) else ["all"]
        say_what_was_taken(self.root, tuple(self.classes), in_words(left_out))
        if split:
            table = read_attributes(root)
            chosen = {f for f, s in zip(table.files, table.splits) if s == split}
            files = [f for f in files if f in chosen]
            if not files:
                raise UserError(f"{root}/attributes.csv: no image has split '{split}'; found "
                                f"{sorted(set(table.splits))}")
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
        paths = ((f, self.root / f) for f in self.files)
        text = "\n".join(f"{f} {p.stat().st_size if p.exists() else -1}" for f, p in paths)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def note_bad(self, bad):
        """Name each new unreadable file once; raise UserError when they are more than max_bad of the
        folder."""
        for file, reason in bad:
            if file not in self.bad:
                self.bad[file] = reason
                print(f"skipped: {common.one_line(reason)}", file=sys.stderr)
        if len(self.bad) > self.max_bad * len(self.files):
            raise UserError(f"{self.root}: {len(self.bad)} of {len(self.files)} images are unreadable, more "
                            f"than {self.max_bad:.0%}; the last: {list(self.bad.values())[-1]}; mend or "
                            "delete them, then run again")


def check_folder(images, batch=1, step=1, flags=("--batch ", "--resolution ")):
    """Refuse what cannot be trained on: one image, a class of one, a batch above the folder, images below the
    crop, which is a multiple of `step`. flags: what the user may change."""
    n = len(images.files)
    if n < 2:
        raise UserError(f"{images.root}: {n} image; expected at least 2")
    label, count = min(Counter(images.labels).items(), key=lambda x: x[1])
    if count == 1:
        raise UserError(f"{images.root}: class '{images.classes[label]}' has one image; a class needs two or "
                        "more (images of one class go into one folder)")
    if batch > n:
        raise UserError(f"--batch {batch} is larger than the {n} images of {images.name}; use {flags[0]}{n} "
                        "or less")
    small = int(np.median(short_sides(images) or [images.size]))
    if small < images.size:  # single small images are enlarged, as ADM does
        fits = small // step * step
        advice = f"use {flags[1]}{fits} or less" if fits >= 2 * step else "use larger ones"
        raise UserError(f"{images.root}: the median short side is {small} pixels, below the crop of "
                        f"{images.size}; {advice}")


def short_sides(images):
    """In pixels, of about 256 of the images: those that can be read."""
    sides = []
    for file in images.files[::max(1, len(images.files) // 256)]:
        # counted when their turn comes
        with contextlib.suppress(UnreadableImage), open_image(images.root / file) as image:
            sides.append(min(image.size))
    return sides


# ------------------------------------------------------------------------------------------------------------
# Batches


def read_rows(images, rows, replace=False):
    """Images of these rows in one piece: (uint8 (B, 3, S, S), labels (B,), rows, [(file, reason) of the
    unreadable]). With replace=True an unreadable image gives its place to the next readable one (training
    keeps its batch size); otherwise its row is left out."""
    n, pixels, labels, kept, bad = len(images), [], [], [], []
    for row in rows:
        for candidate in range(row, row + (n if replace else 1)):
            try:
                pixel, label = images[candidate % n]
            except UnreadableImage as e:
                bad.append((images.files[candidate % len(images.files)], str(e)))
                if len(dict(bad)) > images.max_bad * len(images.files):
                    break  # note_bad will stop the run
                continue
            pixels.append(pixel)
            labels.append(label)
            kept.append(row)
            break
    shape = (0, 3, images.size, images.size)
    stack = torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8)
    return stack, torch.tensor(labels), kept, bad


def guarded(read, item):
    """(read(item), None), or (None, the exception): a worker's own way to raise ends in a traceback and a
    hang."""
    try:
        return read(item), None
    except (UserError, OSError, MemoryError) as e:
        return None, e
    except Exception as e:  # any fault at all: uncaught in a worker it would hang the main process's exit
        last = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return None, UserError(f"{type(e).__name__} in a reader ({where}): {common.brief(e)}")


def ignore_signals(_):
    """torchrun and Ctrl-C signal the workers too; only the main process, which saves, decides when to
    stop."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def load(read, items, workers=0):
    """Yield read(i) of each item, in order: read ahead by `workers` processes, in pinned memory where there
    is a GPU. Raises what read raised, and UserError for a worker that takes longer than WORKER_TIMEOUT."""
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, collate_fn=functools.partial(guarded, read), num_workers=workers,
        worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available(),
        timeout=WORKER_TIMEOUT if workers else 0)
    try:
        for item, error in loader:
            if error is not None:
                raise error
            yield item
    except RuntimeError as e:
        if "DataLoader timed out" not in str(e):
            raise
        for process in torch.multiprocessing.active_children():
            process.kill()  # they ignore gentler signals
        raise UserError(f"no batch for {WORKER_TIMEOUT} s from the {workers} reading workers; see to the "
                        "disk or to damaged files (python data.py check DIR), then run the same command "
                        "again") from None


def load_batches(images, batches, workers=0, replace=False):
    """Yield (uint8 (B, 3, S, S), int64 labels (B,), rows) for each list of rows in `batches`, in order."""
    read = functools.partial(read_rows, images, replace=replace)
    for pixels, labels, rows, bad in load(read, batches, workers):
        images.note_bad(bad)
        yield pixels, labels, rows


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.Generator(np.random.Philox(key=(seed << 64) + epoch)).permutation(n)


def step_places(batch, rank, world, step):
    """Places of a process's share of `step` in the endless stream of samples; batch is the global one."""
    first = step * batch + rank * (batch // world)
    return range(first, first + batch // world)


def sample_order(n, seed, places):
    """Rows at these places in an endless stream of epochs, each a permutation of range(n) drawn from (seed,
    epoch): the data position is the step alone, whatever the number of processes."""
    return [int(epoch_order(n, seed, p // n)[p % n]) for p in places]


def draw_noise(seed, rows, uniforms, *shapes):
    """Random numbers that depend on (seed, row) only: U(0,1) (B, uniforms), then one standard normal (B,
    *shape) a shape.

    A counter-based generator (Philox, key = seed and row) makes them equal for any number of processes or
    batch size, and leaves no generator state to store in a checkpoint.
    """
    generators = [np.random.Generator(np.random.Philox(key=(seed << 64) + int(r))) for r in rows]
    drawn = [torch.from_numpy(np.stack([g.random(uniforms, dtype=np.float32) for g in generators]))]
    for shape in shapes:
        normal = [g.standard_normal(shape, dtype=np.float32) for g in generators]
        drawn.append(torch.from_numpy(np.stack(normal)))
    return drawn


# ------------------------------------------------------------------------------------------------------------
# Attribute tables and latents on disk


@dataclass
class Attributes:
    """files[i] is in splits[i] and has values[i, a] in {0, 1, nan = unknown} for the attribute names[a]."""
    files: list
    splits: list
    names: list
    values: np.ndarray


def read_csv(path):
    """Yield the rows of a table, one at a time: DeepFashion's has 289 million cells. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            yield from csv.reader(f)
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: not a CSV table in UTF-8 ({e})") from None


def read_attributes(root):
    """`root`/attributes.csv -> Attributes. Raises UserError for a missing column, a bad value, an unknown or
    double file."""
    path = Path(root) / "attributes.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a table with the columns file,split,<attribute>... "
                        "(values 0, 1 or empty); CelebA, DeepFashion and AwA2 become one by: python "
                        "extras/datasets.py")
    rows = read_csv(path)
    header = next(rows, [])
    for column in ("file", "split"):
        if column not in header:
            raise UserError(f"{path}: no column '{column}'; found {header[:4]}, expected "
                            "file,split,<attribute>...")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: the column '{max(header, key=header.count)}' stands in the header twice")
    file_at, split_at = header.index("file"), header.index("split")
    attribute_at = [i for i in range(len(header)) if i not in (file_at, split_at)]
    known = set(find_images(root))
    codes = {"0": 0.0, "1": 1.0, "": np.nan, "0.0": 0.0, "1.0": 1.0}  # 1.0: pandas, in columns with gaps
    files, splits, values = [], [], []
    for n, row in enumerate(rows):
        where = f"{path}, line {n + 2}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} fields; expected {len(header)} as in the header")
        if row[file_at] not in known:
            raise UserError(f"{where}: '{row[file_at]}' is no image below {root}; paths are relative to that "
                            "folder")
        if row[split_at] not in SPLITS:
            raise UserError(f"{where}: split '{row[split_at]}'; expected one of {', '.join(SPLITS)}")
        try:
            values.append(np.array([codes[row[i].strip()] for i in attribute_at], np.float32))
        except KeyError as e:
            raise UserError(f"{where}: value {e}; expected 0, 1 or empty") from None
        files.append(row[file_at])
        splits.append(row[split_at])
    if len(set(files)) != len(files):
        raise UserError(f"{path}: '{Counter(files).most_common(1)[0][0]}' stands in more than one line; "
                        "expected one line per image")
    values = np.stack(values) if values else np.empty((0, len(attribute_at)), np.float32)
    return Attributes(files, splits, [header[i] for i in attribute_at], values)


def usable_attributes(table):
    """Indices of attributes with both values in every split. Raises UserError when there is none."""
    splits = np.asarray(table.splits)
    parts = [table.values[splits == s] for s in SPLITS]
    empty = [s for s, v in zip(SPLITS, parts) if not len(v)]
    if empty:
        raise UserError(f"attributes.csv: no image has split '{empty[0]}'; the probe needs "
                        f"{', '.join(SPLITS)}")
    usable = np.all([(v == 0).any(0) & (v == 1).any(0) for v in parts], axis=0)
    if not usable.any():
        raise UserError("no attribute of attributes.csv has both values in each of train, val and test; the "
                        "probe needs one (where there is no such file, run.sh folder leaves the probe out)")
    return np.flatnonzero(usable).tolist()


@dataclass
class Latents:
    """What vae.py wrote: moments (N, F, 2c, h, w) float16 memmap (mean, then std), labels (N,), latent
    mean/std (c,)."""
    moments: np.ndarray
    labels: np.ndarray
    files: list
    mean: torch.Tensor
    std: torch.Tensor
    meta: dict


def load_latents(folder):
    """Open a latent cache. Raises UserError when it is missing, unfinished or damaged."""
    folder = Path(folder)
    again = "make it with: python vae.py --vae CKPT --data DIR --out LATENTS"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; if it has moved, give its new place; else {again}")
    if not (folder / "meta.json").is_file():  # written last
        raise UserError(f"{folder}: no finished latent cache (meta.json is missing); {again}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        moments = np.load(folder / "moments.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        stats = common.read_npz(folder / "stats.npz", "mean", "std")
        mean, std = (torch.from_numpy(stats[k]).float() for k in ("mean", "std"))
        files = (folder / "files.txt").read_text("utf-8").splitlines()
        n, flips, c2, _, _ = moments.shape
        whole = (moments.dtype == np.float16 and labels.dtype == np.int64 and labels.shape == (n,)
                 and flips in (1, 2) and len(files) == meta["n"] == n
                 and mean.shape == std.shape == (c2 // 2,)
                 and mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
                 and 0 <= labels.min() and labels.max() < len(meta["classes"])
                 and {"resolution", "split", "vae", "vae_hash"} <= meta.keys())
        if not whole:
            raise ValueError("its parts do not belong together, or are not finite")
    except common.DAMAGED as e:
        raise common.damage(e, f"{folder}: the latent cache is damaged ({type(e).__name__}: "
                               f"{common.brief(e, 400)}); delete the folder and {again}") from None
    return Latents(moments, labels, files, mean, std, meta)


# ------------------------------------------------------------------------------------------------------------


def check_stages(parts, table, batches):
    """Refuse images with which a later stage of run.sh folder would stop: parts, the ImageFolder of each of
    SPLITS, or with table None the one of all images, all read; batches: of the VAE and of the SiT."""
    check_folder(parts[0], step=8, flags=(None, "RES="))  # latents of RES / 4, in patches of 2
    n, names = len(parts[0]) - len(parts[0].bad), ("VAE_FLAGS", "SIT_FLAGS")
    large = [f"{name}=--batch={n}" for name, batch in zip(names, batches) if batch > n]
    if large:
        raise UserError(f"{parts[0].name}: {n} images, less than a batch of {max(batches)}; run it with "
                        f"{' '.join(large)}")
    for images in (parts[0], parts[-1]):  # scored
        if len(images) < 4:
            raise UserError(f"{images.name}: {len(images)} images; a covariance needs 4")
    if table:
        usable_attributes(table)


def check_images(images):
    """Read them all: say how many are unreadable or of one colour. Raises UserError for too many of the
    former."""
    images.max_bad, flat = 1.0, []  # judged below
    rows = common.chunks(range(len(images)), 64)
    batches = load_batches(images, rows, workers=os.cpu_count())
    for pixels, _, kept in tqdm(batches, total=len(rows), disable=None):
        spans = (pixels.amax((2, 3)) - pixels.amin((2, 3))).amax(1)
        flat += [images.files[row] for row, span in zip(kept, spans) if span < 8]
    print(f"{images.name}: {len(images) - len(images.bad)} images in {len(images.classes)} classes, "
          f"{len(images.bad)} unreadable")
    sides = np.array(short_sides(images))
    if (sides < images.size).any():
        print(f"warning: {(sides < images.size).sum()} of {len(sides)} images looked at are smaller than the "
              f"crop of {images.size} (median {np.median(sides):.0f}; training refuses a median below it)")
    if flat:
        print(f"warning: {len(flat)} images are of one colour (within 8 levels of 256), as {flat[0]}")
    images.max_bad = MAX_BAD
    images.note_bad([])


def main():
    p = common.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="read every image of a folder and its attribute table")
    c.add_argument("dir", help="class/name.png, or name.png")
    c.add_argument("--size", type=common.side, default=64, help="crop, in pixels")
    c.add_argument("--batch", type=common.positive, nargs=2, metavar=("VAE", "SIT"), help="refuse, too, what "
                   "would stop run.sh folder later; these are its batches")
    args = p.parse_args()
    table = read_attributes(args.dir) if (Path(args.dir) / "attributes.csv").exists() else None
    parts = [ImageFolder(args.dir, args.size, split=s) for s in (SPLITS if args.batch and table else (None,))]
    for images in parts:
        check_images(images)
    if args.batch:
        check_stages(parts, table, args.batch)
    if table:
        rows, count = Counter(table.splits), len(find_images(args.dir))
        of = ", ".join(f"{rows[split]} {split}" for split in SPLITS)
        print(f"attributes.csv: {len(table.names)} attributes of images: {of}, {count - len(table.files)} "
              "without a row")


if __name__ == "__main__":
    common.run_script(main)
