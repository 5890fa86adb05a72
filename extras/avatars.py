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
