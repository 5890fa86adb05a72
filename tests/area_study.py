from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# The study

def test_steps_to():
    """The crossing of a curve is not linear between its points, or one that never gets there has one."""
    curve = [(100, 50.0), (200, 30.0), (300, 32.0), (400, 20.0)]
    assert [study.steps_to(curve, v) for v in (50, 40, 30, 26, 20, 19)] == [100, 150, 200, 350, 400, None]
    assert study.steps_to(curve, 60) == 100 and study.steps_to([], 60) is None


def test_speed_ups():
    """An arm is called faster for chance: seeds in which it is slower do not count, or a control that was there before its end is measured at its end."""
    of = lambda *values: dict(curve=list(zip((100, 200, 300, 400), values)))
    rows = {"control": {"seed0": of(50.0, 40.0, 30.0, 20.0), "seed1": of(50.0, 40.0, 30.0, 20.0)}, "send": {"seed1": of(40.0, 20.0, 15.0, 10.0), "seed0": of(55.0, 50.0, 40.0, 30.0)}}
    assert study.speed_ups(rows, "send", "control") == [2.0, 0.75] and study.speed_ups(rows, "control", "control") == [1, 1]
    assert study.speed_ups(rows, "control", "send") == [4 / 3, 0.5]
    early = {"control": {"seed0": of(50.0, 20.0, 30.0, 25.0)}, "send": {"seed0": of(50.0, 20.0, 30.0, 25.0)}}  # both were there before their ends
    assert study.speed_ups(early, "send", "control") == [1.0]
    assert study.speed_text(rows, "send").startswith(f"{1.5 ** 0.5:.2f} [") and study.speed_text(rows, "send").endswith("undecided") and study.speed_text(early, "send") == "1.00 (one seed)"
    assert study.speed_text({"control": rows["control"], "send": {"seed0": of(19.0, 18.0, 17.0, 16.0)}}, "send") == "4.00 (a bound) (one seed)"
    rows["send"]["seed0"] = of(44.0, 20.0, 15.0, 10.0)
    assert study.speed_text(rows, "send").endswith("faster") and study.speed_text({"control": rows["send"], "send": rows["control"]}, "send").endswith("slower")
    rng, ratios = np.random.default_rng(0), []  # arms that are the control but for noise
    for _ in range(300):
        noisy = [dict(curve=[(s, v + rng.normal() * 8) for s, v in zip((100, 200, 300, 400), (1200, 1090, 1040, 1015))]) for _ in range(2)]
        ratios += study.speed_ups(dict(control=dict(seed0=noisy[0]), send=dict(seed0=noisy[1])), "send", "control")
    assert abs(np.log(ratios).mean()) < 3 * np.log(ratios).std() / len(ratios) ** 0.5


def test_study_statistics():
    """Differences are not paired by seed, the interval is not Student's, or better and worse are turned round."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 5))
    rows = {a: {f"seed{i}": dict(fd=100 + 50 * i + 10 * k + v, f1=0.5 + 0.1 * i + 0.05 * k + v / 1000) for i, v in enumerate(noise[k])} for k, a in enumerate(("control", "send"))}
    d = study.differences(rows, "send", "fd")
    expected = scipy.stats.ttest_rel([r["fd"] for r in rows["send"].values()], [r["fd"] for r in rows["control"].values()]).confidence_interval(0.95)
    assert study.interval(d) == pytest.approx((expected.low, expected.high)) and 8 < np.mean(d) < 12
    compared = lambda arm, key, reference="control": study.compared(study.differences(rows, arm, key, reference), key)
    assert (compared("send", "fd"), compared("send", "f1"), compared("control", "fd", "send")) == ("worse", "better", "better")
    del rows["send"]["seed0"]
    assert len(study.differences(rows, "send", "fd")) == 4 and study.differences(rows, "send", "fd") == d[1:]
    rows["send"] = {"seed1": rows["send"]["seed1"]}
    assert compared("send", "fd") == "undecided" and study.compared([], "fd") == "undecided"
    assert study.mean_sd([1, 2, 4], 2) == "2.33 ± 1.53" and study.mean_sd([1], 1) == "1.0"


def fake_hash(name):
    return hashlib.sha256(str(name).encode()).hexdigest()[:16]


def write_arm(folder, fd, f1, curve, psnr=24.0, vae=True, commit="c0ffee", init="shipped"):
    """The files of a finished arm."""
    made, folder, vae_hash = dict(command="x.py --out here", commit=commit), Path(folder), fake_hash(str(folder).removesuffix("-repa"))
    (folder / "sit").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps(dict(made=made, steps=200, batch=32, inputs=dict(init=init))) + "\n")
    lines = [dict(lr=1, made=made, steps=400, batch=64, inputs=dict(latents=f"{vae_hash}-files")), *({"step": s, "FD(net@96)-500": v} for s, v in curve), dict(step=curve[-1][0], velocity=1, seconds=9.5)]
    (folder / "sit/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = dict(fd=fd, precision=0.4, recall=0.3, class_agreement=0.9, rfd=fd / 4, fd_to_reconstructions=fd / 2)
    judged = lambda net, scale: dict(network=net, inputs=dict(vae=vae_hash), fd={"s.npz": fd / scale}, n={"s.npz": 1000}, scores={"s.npz": {k: v / scale for k, v in scores.items()}}, floor=17.0, floor_n=500, fd_real={"s.npz": 27.0})
    records = {"fd.json": judged("net@96", 1), "fd2.json": judged("other@64", 10), "fd3.json": judged("vgg16@64", 100), "samples.json": dict(sampler="heun", steps=5, vae_hash=vae_hash)}
    if vae:
        records["recon.json"] = dict(psnr=psnr, ssim=0.8, lpips=0.1, fd=fd / 2, inputs=dict(vae=vae_hash, data="x"))
        records["probe.json"] = dict(inputs={"data": "y", "vae.pt": vae_hash}, results={"vae.pt": dict(f1=f1, kde_gini=0.3 + fd / 1000, psnr=psnr, seconds=3.0), "pixels 18 x 18": dict(f1=0.4), "majority": dict(f1=0.1)})
    for name, record in records.items():
        (folder / name).write_text(json.dumps(dict(record, made=made)))
    common.save_grid(torch.from_numpy(np.random.default_rng(int(fd)).integers(0, 256, (16, 3, 8, 8), np.uint8)), folder / "samples.png", columns=8)


def test_study_report(tmp_path):
    """A number of the report is not its file's, an unfinished arm counts, or what cannot be compared is."""
    for i in range(3):
        for k, arm in enumerate(("control", "send", "depth1-clean", "lambda4")):
            write_arm(tmp_path / f"seed{i}/{arm}", 900.0 - 40 * k + i, 0.6 + 0.02 * k + 0.01 * i, [(100, 1000.0 - 50 * k), (200, 900.0 - 40 * k + i)], psnr=24 + 0.1 * k * (-1) ** i)
        write_arm(tmp_path / f"seed{i}/send-repa", 700.0 + i, None, [(100, 800.0), (200, 700.0)], vae=False)
        write_arm(tmp_path / f"seed{i}/control-repa", 690.0 + i ** 2, None, [(100, 800.0), (200, 690.0)], vae=False, commit=None)
    (tmp_path / "seed2/lambda4/probe.json").unlink()
    (tmp_path / "seed0/half/sit").mkdir(parents=True)
    out = do("study", tmp_path)
    assert "left out: seed0/half, seed2/lambda4" in out and "| `send` |" in out
    text = (tmp_path / "report.md").read_text()
    send = next(line for line in text.splitlines() if line.startswith("| `send` | Send-VAE"))
    assert "8 of 8 end at a lower distance than their control, 8 of 8 by the second judge" in text and "| 24.03 ± 0.12 | 215 ± 0 | 0.630 ± 0.010 | +0.020 [+0.020, +0.020] better |" in send
    assert "| 861 ± 1 | -40 [-40, -40] better | 430 ± 0 | -20 [-20, -20] better | -4.0 [-4.0, -4.0] better | -0.4 [-0.4, -0.4] better | 0.40 ± 0.00 | 0.30 ± 0.00 | 0.900 ± 0.000 | 1.29 [1.28, 1.30] faster |" in send
    claims = {line.split(" | ")[1] + line.split(" | ")[2]: line for line in text[text.index("## Claims"):text.index("## Arms")].splitlines() if line.startswith("| ")}
    assert "-40 [-40, -40] | 3 | 0.0 | **supported**" in claims["`send` - `control`fd"] and "not run" in claims["`oracle` - `control`fd"] and "+9 [" in claims["`send-repa` - `control-repa`fd"]
    assert "the opposite is seen" in claims["`send-repa` - `control-repa`fd"] and "an effect of 0.254" in claims["`send` - `control`psnr"] and "as many 27" in text
    expected = np.mean([10, 10, 8]) + scipy.stats.t.ppf([0.025, 0.975], 2) * np.std([10, 10, 8], ddof=1) / 3 ** 0.5  # against control-repa, not control
    assert f"| +9 [{expected[0]:+.0f}, {expected[1]:+.0f}] worse |" in next(line for line in text.splitlines() if line.startswith("| `send-repa` | Send"))
    assert "Commits of the arms: None, c0ffee" in text and "nan" not in text and "| `depth1-clean` | depth 1, no noise | +0.03 [" in text and " undecided | +0.020 [+0.020, +0.020] better | -40 [" in text
    record = json.loads((tmp_path / "rows.json").read_text())
    row = next(r for r in record if r["arm"] == "send" and r["seed"] == 1)
    assert (row["fd"], row["probe_f1"], row["recon_fd"], row["curve"]) == (861, 0.63, 430.5, [[100, 950.0], [200, 861.0]]) and len(record) == 17 and row["sources"]["fd"] == str(tmp_path / "seed1/send/fd.json")
    assert (row["rfd"], row["fd_to_reconstructions"], row["precision"], row["fd2"], row["fd2_to_reconstructions"], row["fd3"]) == (215.25, 430.5, 0.4, 86.1, 43.05, 8.61)
    correlations = json.loads((tmp_path / "correlations.json").read_text())
    assert correlations["probe_kde_gini"]["pearson"] == pytest.approx(1) and correlations["probe_kde_gini"]["n"] == 4 and not {"fd2", "precision", "class_agreement"} & correlations.keys()
    for figure in ("convergence", "predictors", "tradeoff", "samples"):
        assert f"]({figure}.png)" in text
        with Image.open(tmp_path / f"{figure}.png") as picture:
            assert picture.width > 400 and len(picture.convert("RGB").getcolors(10 ** 6)) > 20
    probed = tmp_path / "seed1/send/probe.json"
    probed.write_text(probed.read_text().replace(fake_hash(tmp_path / "seed1/send"), "another"))
    assert_refused(call("study", tmp_path), "seed1/send", "different VAEs")
    broken = tmp_path / "seed1/send/sit/metrics.jsonl"
    broken.write_text("{}\n")
    assert_refused(call("study", tmp_path), broken, "--eval-every")
    broken.write_text("no json\n")
    assert_refused(call("study", tmp_path), broken)
    shutil.rmtree(tmp_path / "seed1/send")
    write_arm(tmp_path / "seed1/send", 861, 0.6, [(100, 1.0)])
    other = tmp_path / "seed1/send/fd.json"
    other.write_text(other.read_text().replace("net@96", "other@96"))
    assert_refused(call("study", tmp_path), "FD(other@96)-1000", "FD(net@96)-1000")
    shutil.rmtree(tmp_path / "seed1/send")
    write_arm(tmp_path / "seed1/send", 861, 0.6, [(100, 1.0)], init="another")
    assert_refused(call("study", tmp_path), "VAE another", "VAE shipped")
    scored = tmp_path / "seed1/send/fd.json"
    scored.write_text(scored.read_text().replace('"rfd"', '"other"'))
    assert_refused(call("study", tmp_path), "seed1/send/fd.json", "no rFD", "--vae")
    scored.write_text(scored.read_text().replace('"other"', '"rfd"'))
    trained = tmp_path / "seed0/lambda4/metrics.jsonl"
    trained.write_text(trained.read_text().replace('"steps": 200', '"steps": 100'))
    assert_refused(call("study", tmp_path), "100 steps of 32", "200 steps of 32")
    (tmp_path / "seed1/send/samples.json").write_text(json.dumps(dict(sampler="sde", steps=5, vae_hash=fake_hash(tmp_path / "seed1/send"), made=dict(command="", commit=""))))
    assert_refused(call("study", tmp_path), "sde 5 steps")
    (tmp_path / "seed1/send/fd.json").write_text("{}")
    assert_refused(call("study", tmp_path), "seed1/send", "delete its fd.json")
    assert_refused(call("study", tmp_path / "nothing"), "run.sh study")
    shutil.rmtree(tmp_path / "seed1")
    for i in (0, 2):
        (tmp_path / f"seed{i}/control/fd.json").unlink()
    assert_refused(call("study", tmp_path), "run.sh study")


def recipe_of(*words, folder=HERE, status=0, **env):
    """bash run.sh WORDS with nothing installed -> (stdout, stderr)."""
    environment = {**os.environ, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **{k: str(v) for k, v in env.items()}}
    done = subprocess.run(["bash", str(HERE / "run.sh"), *words], capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


TINY = dict(VAE_FLAGS="--steps 2 --batch 4", SIT_FLAGS="--steps 2 --batch 4 --eval-every 1 --eval-images 8 --eval-steps 1", SAMPLE_FLAGS="--images 10 --steps 1")


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """600 avatars of 32 pixels, and a VAE of two steps in the place of the shipped one."""
    out = tmp_path_factory.mktemp("shipped")
    do("data", "avatars", out / "avatars", "--n", 600, "--size", 32)
    do("train_vae", "--data", out / "avatars", "--preset", "f4d16", "--batch", 4, "--steps", 2, "--lpips", 0, *PLAIN, *FP32, "--out", out / "vae")
    do("vae", "export", "--vae", out / "vae/vae.pt", "--out", out / "vae.safetensors")
    return out


def share_weights(folder, vgg):
    """What `bash run.sh` shares between arms, without its downloads and its training."""
    folder.mkdir(parents=True)
    shutil.copy(vgg[1], folder / "vgg16.pth")
    for name in ("random", "oracle"):
        do("extras.oracle", "unused", folder / f"{name}.safetensors", "--steps", 0)


def test_demo_recipe(shipped, vgg, tmp_path):
    """`bash run.sh` does not run as such, with the study's judges, its arms begin apart or from another VAE, or the reports lack a score."""
    share_weights(tmp_path / "shared", vgg)
    env = dict(OUT=tmp_path / "seed0", SHARED=tmp_path / "shared", DATA=shipped / "avatars", INIT=shipped / "vae.safetensors", JUDGES=1, **TINY)
    out, _ = recipe_of(**env)
    report = json.loads((tmp_path / "seed0/report.json").read_text())
    names = {"fd", "rfd", "fd_to_reconstructions", "precision", "recall", "class_agreement", "psnr", "lpips", "probe_f1", "recon_fd"}
    assert list(report["arms"]) == ["control", "send"] and all(names | {"seconds"} <= a.keys() for a in report["arms"].values()) and report["baselines"]["fd_floor"] > 0
    first = [metrics(tmp_path / "seed0" / arm)[1][0] for arm in ("control", "send")]
    assert "align" in first[1] and "align" not in first[0] and "control: " in out and "send: " in out
    begun = common.load_checkpoint(tmp_path / "seed0/send/vae.pt")
    assert begun["inputs"]["init"] == common.weights_hash(vae.load_vae(shipped / "vae.safetensors").state_dict())
    do("study", tmp_path)  # the demo's folder is that of one seed
    rows = {r["arm"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["control", "send"] and all(names | {"fd2", "fd2_to_reconstructions", "fd3", "probe_kde_gini"} <= r.keys() and r["seed"] == 0 for r in rows.values())
    assert [s for s, _ in rows["send"]["curve"]] == [1, 2] and rows["send"]["fd"] == report["arms"]["send"]["fd"]
    (tmp_path / "seed0/send/fd.json").write_text("{}")
    assert_refused(call("fid", "report", tmp_path / "seed0"), "send", "fd.json")
    said, _ = recipe_of(status=1, **{**env, "OUT": tmp_path / "other", "INIT": tmp_path / "gone.safetensors"})
    assert "control: error: " in said and "gone.safetensors: no such checkpoint" in said


def test_words_of_the_recipe(tmp_path):
    """A wrong word on run.sh's command line starts something, or is answered by more than a line."""
    for wrong in (dict(STUDY_SEEDS="x"), dict(STUDY_ARMS="send-repa")):
        assert "expected a number of seeds, and control" in recipe_of("study", status=2, **wrong)[1]
    for words in (["study", "x"], ["study", "0"], ["study", "0", "nothing"], ["study", "0", "control", "more"], ["folder"], ["folder", str(tmp_path / "gone")]):
        _, err = recipe_of(*words, status=2)
        assert err.startswith("error: ") and len(err.splitlines()) == 1


def fake_python(folder):
    """An environment of run.sh in which python prints its command line and does nothing; it fails where that line holds $FAIL."""
    fake = folder / "bin/python"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ncase \"$1\" in -c) exec {sys.executable} \"$@\" ;; esac\necho \"COMMAND $@\"\ncase \"$*\" in *${{FAIL:-nothing at all}}*) exit 3 ;; esac\n")
    fake.chmod(0o755)
    return dict(os.environ, SKIP_INSTALL="1", VIRTUAL_ENV=sys.prefix, PATH=f"{fake.parent}:{os.environ['PATH']}", OUT=str(folder))


def test_one_arm_that_fails(tmp_path):
    """A failing or mistyped arm of the study stops the others or passes for done, REPA comes before the VAE it needs, or a seed is left out."""
    env = dict(fake_python(tmp_path), STUDY_SEEDS="2", STUDY_ARMS="control depth-2", STUDY_MORE="send-repa send", FAIL="seed1/control/latents", JOBS="1")
    done = subprocess.run(["bash", str(HERE / "run.sh"), "study"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and f"COMMAND study.py {tmp_path}" in done.stdout, done.stderr
    said = [line.split(":")[0] for line in done.stdout.splitlines() if ": done" in line]
    assert said[:11] == [f"- {p}" for p in ("avatars", "vgg16", "random", "oracle", "judge", "judge2", "judge3", "tokens-lite0", "tokens-lite2", "tokens-random", "tokens-oracle")]
    assert said[11:] == ["0 control", "0 send", "1 send", "0 send-repa", "1 send-repa"]
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert [line.split(":")[0] for line in failed] == ["1 control", "0 depth-2", "1 depth-2"] and "no such arm" in done.stdout


def test_every_arm_of_the_study_is_a_command(tmp_path):
    """An arm of run.sh is mistyped, or changes something else than its name says."""
    env, parsed = fake_python(tmp_path), {}
    for arm in study.ARMS:
        done = subprocess.run(["bash", str(HERE / "run.sh"), "study", "1", arm], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        lines = [line.removeprefix("COMMAND ") for line in done.stdout.splitlines() if line.startswith("COMMAND ")]
        name = lambda line: line.split()[0] + next((f" {k}" for k in ("fd2", "fd3", "recon") if f"{k}.json" in line), "")
        parsed[arm] = {name(line): line for line in lines}
        own = [] if "repa" in arm else ["fid.py recon", "probe.py"]
        assert list(parsed[arm]) == ["train_vae.py"] * ("repa" not in arm) + ["vae.py", "train_sit.py", "sample.py", "fid.py", "fid.py fd2", "fid.py fd3", *own]
        for k, net, cache in (("", "lite0", "judge.npz"), (" fd2", "lite2", "judge2.npz"), (" fd3", "vgg16", "judge3.npz")):
            assert net in parsed[arm][f"fid.py{k}"] and cache in parsed[arm][f"fid.py{k}"] and f"seed1/{arm}/samples.npz" in parsed[arm][f"fid.py{k}"]
    tuned = {a: vars(train_vae_args("python " + p["train_vae.py"])) for a, p in parsed.items() if "train_vae.py" in p}
    assert set(study.ARMS) - set(tuned) == {"control-repa", "send-repa"}
    expected = dict(control=dict(align="none", lambda_align=0.0), send={}, vavae=dict(align="vavae", lambda_align=0.1), depth2=dict(mapper_depth=2), lambda8=dict(lambda_align=8.0), standardised=dict(vfm_standardise=1),
                    vfm2=dict(vfm="tf_efficientnet_lite2"), random=dict(vfm="resnet10t"), oracle=dict(vfm="resnet10t"),
                    **{"depth0-clean": dict(mapper_depth=0, noise=0), "depth1-clean": dict(noise=0), "lambda0.5": dict(lambda_align=0.5)})
    matched = tuned.pop("random-matched")
    assert matched["vfm_ckpt"] == tuned["random"]["vfm_ckpt"] and matched["lambda_align"] > 2 and "oracle.safetensors" in tuned["oracle"]["vfm_ckpt"] and "random.safetensors" in tuned["random"]["vfm_ckpt"]
    assert tuned.keys() == expected.keys() and "lite2" in tuned["vfm2"]["vfm_ckpt"] and len({t["cache_vfm"] for t in tuned.values()}) == 5
    for arm, changes in expected.items():
        ignored = {"out", "vfm_ckpt", "cache_vfm"} | ({"vfm", "grid", "mapper_mlp"} if arm in ("control", "vavae") else set())
        assert {k: v for k, v in tuned[arm].items() if v != tuned["send"][k] and k not in ignored} == changes, arm
    assert (tuned["send"]["lambda_align"], tuned["send"]["mapper_depth"], tuned["send"]["noise"], tuned["send"]["seed"]) == (2.0, 1, 1, 1)
    flows = {a: re.sub(r"--(out|latents) \S+", "", p["train_sit.py"]) for a, p in parsed.items()}
    assert len({f for a, f in flows.items() if "repa" not in a}) == 1 and flows["control-repa"] == flows["send-repa"] and "--repa 0.5" in flows["send-repa"]
    assert "seed1/send/latents" in parsed["send-repa"]["train_sit.py"] and "seed1/send/vae.pt" in parsed["send-repa"]["sample.py"]


def test_photographs(tmp_path):
    """`bash run.sh folder DIR` does not take photographs as they lie: JPEG of several sizes, in class folders or none, without attributes."""
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    for i in range(64):
        path = tmp_path / "my photos" / ("people", "cats", "food", "things")[i % 4] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos[i % 4][i:i + 200 + 2 * i, i:i + 180]).save(path)
    _, err = recipe_of("folder", str(tmp_path / "my photos/cats"), status=2)
    assert_refused((2, "", err), "16 images", "64")
    out, _ = recipe_of("folder", "my photos", folder=tmp_path, OUT=tmp_path / "out", **dict(TINY, SIT_FLAGS="--steps 2 --batch 4"))
    assert "no probe: no " in out and "people" in (tmp_path / "out/send/latents/meta.json").read_text()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"psnr", "fd"} <= report["arms"]["send"].keys() and "probe_f1" not in report["arms"]["send"] and report["arms"]["send"]["fd"] > 0
    assert np.load(tmp_path / "out/send/samples.npz")["arr_0"].shape == (10, 64, 64, 3) and not (tmp_path / "out/probe.json").exists()
