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
