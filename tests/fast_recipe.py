from helpers import *  # noqa: F403
from extras import study as extras_study


# -----------------------------------------------------------------------------------------------------------
# run.sh: which commands it gives. None of them runs here


def recipe(*arguments, status=0, folder=HERE, **env):
    """bash run.sh ARGUMENTS in this environment, with nothing installed -> (stdout, stderr)."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "SKIP_INSTALL": "1", "VIRTUAL_ENV": sys.prefix, "PATH": path}
    environment |= {k: str(v) for k, v in env.items()}
    command = ["bash", str(HERE / "run.sh"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def train_vae_args(line):
    """The flags of a command `python train_vae.py ...`."""
    argv, sys.argv = sys.argv, shlex.split(line)[1:]
    try:
        return train_vae.parse_args()
    finally:
        sys.argv = argv


def test_wrong_words(tmp_path):
    """A wrong word on run.sh's command line starts something, or is answered by more than a line."""
    for wrong in (dict(STUDY_SEEDS="x"), dict(STUDY_ARMS="send-repa")):
        assert "expected a number of seeds, and control" in recipe("study", status=2, **wrong)[1]
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    study = (["study", "x"], ["study", 0], ["study", 0, "nothing"], ["study", 0, "control", "more"])
    folder = (["folder"], ["folder", tmp_path / "gone"])
    imagenet = (["imagenet"], ["imagenet", HERE], ["imagenet", tmp_path, "table7"], ["imagenet", tmp_path])
    for arguments in (["nothing"], ["test", "some"], *study, *folder, *imagenet):
        _, err = recipe(*arguments, status=2)
        assert err.startswith("error: ") and len(err.splitlines()) == 1, arguments
    assert "weights/vavae.pt" in err and "README" in err  # the last one lacks the VAE to start from


def test_recipe_is_the_papers(tmp_path):
    """A line of the recipe has other settings than the paper, or an experiment of its tables is missing."""
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()

    def commands(table):
        return recipe("imagenet", tmp_path, table, SHOW=1)[0].splitlines()

    main = commands("main")
    fine_tuned = "--resolution 256 | --batch 1024 | --steps 100000 | --lr 3e-4"
    for expected in (f"train_vae.py | {fine_tuned} | --align send | --vfm vit_base_patch14_dinov2.lvd142m",
                     f"train_vae.py | {fine_tuned} | --align none",
                     "vae.py | --flip | --resolution 256",
                     "train_sit.py | --model SiT-XL/1 | --repa 0.5 | --batch 256 | --steps 400000",
                     "sample.py | --images 50000 | --sampler sde | --steps 250",
                     "sample.py | --images 50000 | --cfg 2.5 --interval 0 0.75",
                     "fid.py score weights/adm-256.npz",
                     "fid.py recon | --resolution 256"):
        parts = [f" {part} " for part in expected.split(" | ")]
        assert any(all(part in line for part in parts) for line in main), expected

    everything = commands("all")
    arms = {Path(line.split("--out ")[1].strip()).name: line for line in everything if "train_vae.py" in line}
    names = {f"{arm}-{init}" for arm in ("control", "send")
             for init in ("vavae", "sdvae", "sdvae-512", "f16d16", "f16d32", "f16d64")}
    assert names | {f"send-vavae-depth{d}-clean" for d in (0, 1, 2)} | {"vavae-vavae"} <= set(arms)
    vfms = {train_vae_args(line).vfm for line in arms.values() if "/send-" in line}
    assert vfms == {"vit_base_patch14_dinov2.lvd142m", "vit_large_patch16_224.mae",
                    "vit_large_patch14_clip_224.openai", "vit_huge_patch14_gap_224.in1k_ijepa",
                    "vit_base_patch16_siglip_256.webli", "vit_base_patch16_dinov3.lvd1689m"}
    depths = [train_vae_args(line) for line in commands("table2") if "--align send" in line]
    assert [(a.mapper_depth, a.noise) for a in depths] == [(0, 0), (1, 0), (2, 0)]
    assert train_vae_args(arms["send-sdvae-512"]).resolution == 512
    assert sum(" vae.py " in line and "/base-" in line for line in everything) >= 7  # VAEs as they are
    for line in arms.values():
        args = train_vae_args(line)
        losses = args.rec, args.lpips, args.gan, args.gan_start, args.kl, args.clip
        assert losses == ("l1", 1, 0.1, 0, 1e-6, 1)
        assert args.lambda_align == {"send": 1, "vavae": 0.1, "none": 0}[args.align]


@pytest.fixture
def fake_python(tmp_path):
    """The environment of a run.sh in which python prints its command line and does nothing; it fails where
    that line holds $FAIL. Asked for a package's weights (-c) it names the package."""
    fake = tmp_path / "bin/python"
    fake.parent.mkdir()
    fake.write_text("""#!/bin/sh
case "$1" in -c) echo "$2" | grep -o 'lite[02]' | head -n 1; exit 0 ;; esac
echo "COMMAND $@"
case "$*" in *${FAIL:-nothing at all}*) exit 3 ;; esac
""")
    fake.chmod(0o755)
    return dict(PATH=f"{fake.parent}:{os.environ['PATH']}", OUT=tmp_path)


def test_demo_is_two_arms(fake_python, tmp_path):
    """The demo's arms differ in more than the alignment, or a command is missing."""
    lines = recipe(INIT="init.pt", **fake_python)[0].splitlines()
    own = {arm: [line.removeprefix(f"{arm}: COMMAND ") for line in lines if line.startswith(f"{arm}: ")]
           for arm in ("control", "send")}
    scripts = ["train_vae.py", "vae.py", "train_sit.py", "sample.py", "fid.py", "fid.py", "probe.py"]
    assert all([line.split()[0] for line in commands] == scripts for commands in own.values())
    control, send = (vars(train_vae_args(f"python {own[arm][0]}")) for arm in own)
    changed = {k for k in control if control[k] != send[k]}
    assert changed <= {"align", "lambda_align", "vfm", "vfm_ckpt", "cache_vfm", "grid", "mapper_mlp", "out"}
    assert (control["align"], send["align"], send["init"]) == ("none", "send", "init.pt")
    as_control = [line.replace(f"{tmp_path}/send", f"{tmp_path}/control") for line in own["send"]]
    assert own["control"][1:] == as_control[1:]
    assert f"COMMAND extras/study.py demo {tmp_path} --arms control send" in lines[-2]


def test_every_arm_of_the_study_is_a_command(fake_python):
    """An arm of run.sh is mistyped, or changes something else than its name says."""
    parsed = {}
    for arm in extras_study.ARMS:
        out, _ = recipe("study", 1, arm, **fake_python)
        commands = {}
        for line in out.splitlines():
            line = line.removeprefix("COMMAND ")
            judged = next((f" {k}" for k in ("fd2", "fd3", "recon") if f"{k}.json" in line), "")
            commands[line.split()[0] + judged] = line
        scripts = ["vae.py", "train_sit.py", "sample.py", "fid.py", "fid.py fd2", "fid.py fd3"]
        if not arm.endswith("-repa"):  # these take another arm's VAE
            scripts = ["train_vae.py", *scripts, "fid.py recon", "probe.py"]
        assert list(commands) == scripts
        for judged, net, cache in (("fid.py", "lite0", "judge"), ("fid.py fd2", "lite2", "judge2"),
                                   ("fid.py fd3", "vgg16", "judge3")):
            line = commands[judged]
            assert net in line and f"/{cache}.npz" in line and f"seed1/{arm}/samples.npz" in line
        parsed[arm] = commands

    tuned = {arm: vars(train_vae_args(f"python {commands['train_vae.py']}"))
             for arm, commands in parsed.items() if "train_vae.py" in commands}
    assert set(extras_study.ARMS) - set(tuned) == {"control-repa", "send-repa"}
    expected = {"control": dict(align="none", lambda_align=0.0),
                "send": {},
                "random": dict(vfm="resnet10t"),
                "oracle": dict(vfm="resnet10t"),
                "depth0-clean": dict(mapper_depth=0, noise=0),
                "depth1-clean": dict(noise=0),
                "random-matched": dict(vfm="resnet10t", lambda_align=8.0),
                "vavae": dict(align="vavae", lambda_align=0.1),
                "vfm2": dict(vfm="tf_efficientnet_lite2"),
                "depth2": dict(mapper_depth=2),
                "lambda0.5": dict(lambda_align=0.5),
                "lambda8": dict(lambda_align=8.0),
                "standardised": dict(vfm_standardise=1)}
    assert tuned.keys() == expected.keys()
    send = tuned["send"]
    for arm, changes in expected.items():
        ignored = {"out", "vfm_ckpt", "cache_vfm"}
        if arm in ("control", "vavae"):
            ignored |= {"vfm", "grid", "mapper_mlp"}
        assert {k: v for k, v in tuned[arm].items() if v != send[k] and k not in ignored} == changes, arm
    assert (send["lambda_align"], send["mapper_depth"], send["noise"], send["seed"]) == (2.0, 1, 1, 1)
    weights = {arm: Path(args["vfm_ckpt"]).stem for arm, args in tuned.items() if args["vfm_ckpt"]}
    others = {"random": "random", "random-matched": "random", "oracle": "oracle", "vfm2": "lite2"}
    assert weights == {arm: others.get(arm, "lite0") for arm in tuned if arm != "control"}
    for arm, name in weights.items():  # or tokens of one model are read as another's
        assert tuned[arm]["cache_vfm"].endswith(f"/tokens-{name}")

    sits = {arm: re.sub(r"--(out|latents) \S+", "", c["train_sit.py"]) for arm, c in parsed.items()}
    assert len({flags for arm, flags in sits.items() if "repa" not in arm}) == 1
    assert sits["control-repa"] == sits["send-repa"] and "--repa 0.5" in sits["send-repa"]
    assert "seed1/send/latents" in parsed["send-repa"]["train_sit.py"]
    assert "seed1/send/vae.pt" in parsed["send-repa"]["sample.py"]


def test_one_arm_that_fails(fake_python, tmp_path):
    """A failing or mistyped arm of the study stops the others or passes for done, REPA comes before the VAE
    that it needs, or a seed is left out."""
    out, _ = recipe("study", status=1, **fake_python, STUDY_SEEDS=2, STUDY_ARMS="control depth-2",
                    STUDY_MORE="send-repa send", STUDY_LONG="", FAIL="seed1/control/latents", JOBS=1)
    assert f"COMMAND extras/study.py {tmp_path}" in out.splitlines()
    done = [line.split(":")[0] for line in out.splitlines() if ": done" in line]
    assert done[:11] == [f"- {part}" for part in (
        "avatars", "vgg16", "random", "oracle", "judge", "judge2", "judge3",
        "tokens-lite0", "tokens-lite2", "tokens-random", "tokens-oracle")]
    assert done[11:] == ["0 control", "0 send", "1 send", "0 send-repa", "1 send-repa"]
    failed = [line.split(":")[0] for line in out.splitlines() if "FAILED" in line]
    assert failed == ["1 control", "0 depth-2", "1 depth-2"] and "no such arm" in out


def test_jobs_are_cores(fake_python, tmp_path):
    """A study runs one job at a time: nproc answers 1 because each command has one thread."""
    nproc = tmp_path / "bin/nproc"
    nproc.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-7}"\n')
    (tmp_path / "bin/xargs").write_text('#!/bin/sh\necho "XARGS $@"\nexit 1\n')
    for script in (nproc, tmp_path / "bin/xargs"):
        script.chmod(0o755)
    out, _ = recipe("study", status=1, **fake_python)
    assert out.split()[:4] == ["XARGS", "-r", "-P", "7"] or shutil.which("nvidia-smi")


def test_dry_run(small, tmp_path):
    """--dry-run writes, needs weights, or leaves out a part of the plan."""
    images, vae_pt, out = small / "images", small / "vae/vae.pt", tmp_path / "o"
    probed = tmp_path / "images"
    shutil.copytree(images, probed)
    rows = zip(data.SPLITS * 20, data.find_images(images), strict=False)
    table = "".join(f"{f},{s},{int(f[0] == 'a')}\n" for s, f in rows)
    (probed / "attributes.csv").write_text("file,split,a\n" + table)
    vit = "vit_small_patch14_dinov2.lvd142m"
    losses = ("--lpips", 1, "--gan", 0.1, "--vfm", vit)
    sit_flags = ("--latents", small / "latents", "--data", images, "--model", "SiT-demo/1", "--vfm", vit)
    plans = [(("train_vae", "--data", images, *SMALL_VAE, *losses, "--out", out),
              ["step 0 of", "VAE 0.61 M", vit, "discriminator 2.77 M", "disk"]),
             (("vae", "--vae", vae_pt, "--data", images, "--flip", "--out", out),
              ["40 images", "(40, 2, 8, 8, 8)", "disk"]),
             (("train_sit", *sit_flags, "--batch", 8, "--out", out),
              ["SiT-demo/1", "64 tokens", "REPA 0.5", vit, "disk"]),
             (("sample", "--sit", small / "sit/sit.pt", "--out", out / "a.npz"),
              ["50000 images of 32 x 32", "NFE 250", "disk"]),
             (("fid", "score", images, images, "--net", vit, "--json", out / "b.json"),
              [f"{vit}@518", "40 images"]),
             (("fid", "recon", "--vae", vae_pt, "--data", images),
              ["40 images of 32"]),
             (("probe", vae_pt, "--data", probed, "--json", out / "a.json"), ["1 attributes"])]
    for command, expected in plans:
        plan = do(*command, "--dry-run")
        assert all(word in plan for word in expected), (command, plan)
    assert not out.exists()
