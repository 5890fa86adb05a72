"""Data sets with attributes, as their owners distribute them -> a folder of images with attributes.csv.

    python extras/datasets.py celeba DIR out/celeba              # then: python probe.py VAE --data out/celeba
    python extras/datasets.py deepfashion DIR/Anno_fine out/fine
    python extras/datasets.py awa2 DIR out/awa2
    python extras/datasets.py fashion out/fashion                # or: fashion DIR out/fashion

What lies in DIR:
    celeba       list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba/, or Anno/, Eval/ and Img/
                 with them; or Kaggle's .csv of both; or img_align_celeba_png/
    deepfashion  Anno_coarse (1,000 attributes) or Anno_fine (26) of the "Category and Attribute Prediction
                 Benchmark", beside Img/img/ and Eval/
    awa2         predicate-matrix-binary.txt, the other tables, and JPEGImages/; 85 attributes of the class
    fashion      Fashion-MNIST's four .gz files; without DIR those of Debian's dataset-fashion-mnist, or a
                 download. Its ten classes are the attributes; images of 28 x 28 become PNGs of 32 x 32

Images are linked, or copied where the file system has no links; Fashion-MNIST's are written.
"""
import csv
import gzip
import shutil
import struct
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
from common import UserError  # noqa: E402
from data import SPLITS, find_images  # noqa: E402

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


# ------------------------------------------------------------------------------------------------------------
# Text tables


def split_lines(path):
    """Yield the non-empty lines of a text table, split at blanks, or a .csv at commas. Raises UserError for a
    missing file."""
    at = "," if path.suffix == ".csv" else None
    try:
        with open(path, encoding="utf-8") as f:
            yield from (line.strip().split(at) for line in f if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be read ({reason}); --help names the files of a data set") from None


def read_rows(path, count=None):
    """All split_lines of a table. Raises UserError for (count) another number of lines."""
    rows = list(split_lines(path))
    if count is not None and len(rows) != count:
        raise UserError(f"{path}: {len(rows)} lines, expected {count}")
    return rows


def check_count(path, head, count):
    """Raise UserError when the first line of one of MMLAB's tables names another number of rows."""
    if not count or head != [str(count)]:
        raise UserError(f"{path}: its first line says {' '.join(head[:9])}, but {count} rows follow the "
                        "header; the file is cut or of another kind")


def read_listing(path):
    """Rows of one of MMLAB's tables: a count, a header, then a row an image."""
    head, *rows = read_rows(path) or [[]]
    check_count(path, head, max(0, len(rows) - 1))
    return rows[1:]


def read_labels(path, width=None):
    """A listing with the rows `file -1 1 0 ...` -> (header, files, int8 (N, width) in {0, 1, -1 = unknown});
    width: the header's unless given. A .csv has no count above its header, which names the file's column too.
    Line by line: as words DeepFashion's 289 million labels would be 20 GiB. Raises UserError for another
    width or value."""
    lines, is_csv = split_lines(path), path.suffix == ".csv"
    head = [] if is_csv else next(lines, [])
    header, files, labels = next(lines, [])[is_csv:], [], []
    for file, *row in lines:
        if len(row) != (width or len(header)):
            raise UserError(f"{path}: {file} has {len(row)} labels; expected {width or len(header)}")
        strange = set(row) - {"-1", "0", "1"}
        if strange:
            raise UserError(f"{path}: {file} has the label '{min(strange)}'; expected -1, 1, or 0 (unknown)")
        files.append(file)
        labels.append(np.array(row, np.int8))
    if is_csv and not files:
        raise UserError(f"{path}: no rows below its header")
    if not is_csv:
        check_count(path, head, len(files))
    return header, files, np.array([-1, 1, 0], np.int8)[np.array(labels)]  # at 0, 1, and -1, the last


def find_splits(path, files, rows, codes):
    """Rows `file code` of a split table -> the split of each file. Raises UserError for a file without one,
    or with two."""
    found = {}
    for file, code in ((row + ["missing"])[:2] for row in rows):
        if found.setdefault(file, code) != code:
            raise UserError(f"{path}: {file} is in two splits, {found[file]} and {code}; expected one")
    missing = [f for f in files if found.get(f) not in codes]
    if missing:
        raise UserError(f"{path}: {missing[0]} has the split {found.get(missing[0])}, expected one of "
                        f"{', '.join(codes)} ({len(missing)} such files)")
    return [codes[found[f]] for f in files]


def binary(path, rows, names):
    """Rows of 0 and 1 -> int8 (N, len(names)). Raises UserError for another width or value."""
    for i, row in enumerate(rows):
        if len(row) != len(names) or set(row) - {"0", "1"}:
            raise UserError(f"{path}, row {i + 1}: {len(row)} labels, {' '.join(sorted(set(row)))[:80]}; "
                            f"expected {len(names)} of 0 or 1")
    return np.array(rows, np.int8).reshape(len(rows), len(names))


# ------------------------------------------------------------------------------------------------------------
# Readers: folder -> (folder of the images, files, splits, attribute names, labels as of read_labels())


def read_celeba(root):
    """CelebA, aligned images: 40 attributes, official partition (Liu et al. 2015). The tables say .jpg of
    PNGs too; Kaggle's images lie in a folder within a folder of the same name."""
    def find(folder, *names):
        places = [place / name for name in names for place in (root, root / folder)]
        return next((place for place in places if place.exists()), places[1])

    table = find("Anno", "list_attr_celeba.txt", "list_attr_celeba.csv")
    parts = find("Eval", "list_eval_partition.txt", "list_eval_partition.csv")
    images = find("Img", "img_align_celeba", "img_align_celeba_png")
    images = images / images.name if (images / images.name).is_dir() else images
    names, files, labels = read_labels(table)
    is_csv = parts.suffix == ".csv"  # with a header
    rows = read_rows(parts, len(files) + is_csv)[is_csv:]
    splits = find_splits(parts, files, rows, dict(zip("012", SPLITS, strict=True)))
    png = [str(Path(f).with_suffix(".png")) for f in files]
    return images, png if (images / png[0]).exists() else files, splits, names, labels


def read_deepfashion(root):
    """DeepFashion category and attribute prediction (Liu et al. 2016): Anno_coarse or Anno_fine."""
    below = [str(path.parent) for path in sorted(root.glob("Anno*/list_attr_cloth.txt"))]
    if below:
        raise UserError(f"{root}: the attribute tables lie below it; give {' or '.join(below)}")
    table = read_listing(root / "list_attr_cloth.txt")
    names = [" ".join(row[:-1]) for row in table]  # the last word is the attribute's type
    if (root / "list_attr_img.txt").exists() and root.name != "Anno_fine":
        _, files, labels = read_labels(root / "list_attr_img.txt", len(names))
        path = root.parent / "Eval/list_eval_partition.txt"
        splits = find_splits(path, files, read_listing(path), {s: s for s in SPLITS})
    else:
        files, splits, rows = [], [], []
        for split in SPLITS:
            listed = [row[0] for row in read_rows(root / f"{split}.txt")]
            files += listed
            splits += [split] * len(listed)
            path = root / f"{split}_attr.txt"
            rows.append(binary(path, read_rows(path, len(listed)), names))
        labels = np.concatenate(rows)
    return root.parent / "Img/img", [f.removeprefix("img/") for f in files], splits, names, labels


def read_awa2(root):
    """Animals with Attributes 2 (Xian et al. 2018): every image of a class has its labels. Its split by
    classes: 40 to train, 10 others to test; validation is every tenth image of the training classes."""
    classes, names = ([row[-1] for row in read_rows(root / f"{f}.txt")] for f in ("classes", "predicates"))
    path = root / "predicate-matrix-binary.txt"
    labels = binary(path, read_rows(path, len(classes)), names)
    role = {}
    for split, table in (("train", root / "trainclasses.txt"), ("test", root / "testclasses.txt")):
        for c, *_ in read_rows(table):
            if c not in classes or role.setdefault(c, split) != split:
                raise UserError(f"{table}: the class {c} " + ("is in two splits" if c in classes else
                                                              "is not in classes.txt"))
    files, splits, seen = [], [], Counter()
    for file in find_images(root / "JPEGImages"):
        c = file.split("/")[0]
        if c in role:
            seen[c] += 1
            files.append(file)
            splits.append("val" if role[c] == "train" and seen[c] % 10 == 0 else role[c])
    if set(role) - set(seen):
        raise UserError(f"{root}/JPEGImages: no images of the class {min(set(role) - set(seen))}")
    print("AwA2: the labels are of classes, not of images, and the test classes are not seen in training")
    return root / "JPEGImages", files, splits, names, labels[[classes.index(f.split("/")[0]) for f in files]]


READERS = dict(celeba=read_celeba, deepfashion=read_deepfashion, awa2=read_awa2)


def link_images(root, out, files):
    """Links in `out` to the files of the folder `root`; copies where links fail. Raises UserError for a file
    that is missing, or listed twice."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the data set's images there, unpacked")
    known = set(find_images(root))
    missing = [f for f in files if f not in known]
    if missing:
        raise UserError(f"{missing[0]} of the table is no image below {root} ({len(missing)} such files)")
    file, count = Counter(files).most_common(1)[0]
    if count > 1:
        raise UserError(f"{file} stands in the table {count} times; expected once")
    for file in tqdm(files, "images", disable=None):
        target = out / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # of a run that was stopped
            continue
        try:
            target.symlink_to((root / file).resolve())
        except OSError:
            with common.whole_file(target) as part:
                shutil.copyfile(root / file, part)


# ------------------------------------------------------------------------------------------------------------
# Fashion-MNIST


def read_idx(path):
    """A gzipped idx file of bytes -> uint8 array. Raises UserError."""
    try:
        content = gzip.decompress(path.read_bytes())
        axes = content[3]  # 0, 0, type, number of axes, then a 32-bit length of each
        shape = struct.unpack(f">{axes}I", content[4:4 + 4 * axes])
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, LookupError, ValueError, struct.error, zlib.error) as e:
        raise UserError(f"{path}: no gzipped idx file ({common.brief(e)}); see --help") from None


def download_fashion(folder):
    """torchvision's download of the four files -> their folder. Raises UserError."""
    import torchvision
    try:
        torchvision.datasets.FashionMNIST(folder, download=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"Fashion-MNIST cannot be downloaded ({common.brief(e)}); give the folder of its "
                        "four .gz files, or: apt-get install dataset-fashion-mnist") from None
    return Path(folder) / "FashionMNIST/raw"


def write_fashion(root, out):
    """Class folders of PNGs of 32 x 32 in `out` -> (files, splits, names, labels) of the classes, one-hot.
    Validation is the last sixth of the training file: 10,000 images. Raises UserError."""
    files, splits, labels = [], [], []
    for name in ("train", "t10k"):
        pixels = read_idx(root / f"{name}-images-idx3-ubyte.gz")
        classes = read_idx(root / f"{name}-labels-idx1-ubyte.gz")
        n, last = len(pixels), classes.max(initial=0)
        if pixels.shape != (n, 28, 28) or classes.shape != (n,) or last >= len(GARMENTS):
            raise UserError(f"{root}/{name}-*: images {pixels.shape}, labels {classes.shape} up to {last}; "
                            "expected (N, 28, 28) and (N,) up to 9")
        for i, (image, c) in enumerate(zip(tqdm(pixels, name, disable=None), classes, strict=True)):
            file = f"{GARMENTS[c]}/{name}_{i:05d}.png"
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.pad(image, 2)).save(out / file)
            files.append(file)
            splits.append("test" if name == "t10k" else "val" if i >= n - n // 6 else "train")
        labels.append(np.eye(len(GARMENTS), dtype=np.int8)[classes])
    return files, splits, GARMENTS, np.concatenate(labels)


# ------------------------------------------------------------------------------------------------------------


def write_table(path, files, splits, names, labels):
    """attributes.csv."""
    with common.whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["file", "split", *names])
        for file, split, row in zip(files, splits, labels.tolist(), strict=True):
            writer.writerow([file, split, *("" if v < 0 else v for v in row)])


def main():
    p = common.Parser(description=__doc__)
    p.add_argument("name", choices=(*READERS, "fashion"))
    p.add_argument("dir", nargs="?", type=Path, help="the data set as it is distributed (fashion: optional)")
    p.add_argument("out", type=Path, help="a new folder, for the images and attributes.csv")
    args = p.parse_args()
    if (args.out / "attributes.csv").exists():
        raise UserError(f"{args.out}: holds an attributes.csv already; choose another folder")
    if args.name != "fashion" and args.dir is None:
        p.error(f"{args.name} needs DIR and OUT")
    if args.name == "fashion":
        with tempfile.TemporaryDirectory() as folder:
            root = args.dir or (DEBIAN if DEBIAN.is_dir() else download_fashion(folder))
            common.open_out(args.out, flag="OUT")
            files, splits, names, labels = write_fashion(root, args.out)
    else:
        images, files, splits, names, labels = READERS[args.name](args.dir)
        common.open_out(args.out, flag="OUT")
        link_images(images, args.out, files)
    write_table(args.out / "attributes.csv", files, splits, names, labels)
    counts = ", ".join(f"{n} {s}" for s, n in Counter(splits).items())
    print(f"{args.out}: {len(files)} images ({counts}), {len(names)} attributes")


if __name__ == "__main__":
    common.run_script(main)
