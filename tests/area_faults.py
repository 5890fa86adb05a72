from helpers import *  # noqa: F403


# ---------------------------------------------------------------------------------------------------------------------
# Faults: kills, limits, numbers, hostile files. `python test_all.py --soak` runs the long version of the kills and the fuzzing.

def fork(script, *args, log, prepare=lambda: None):
    """A script in a child of this process, where all is loaded already -> its process id; its output goes to the file `log`. prepare()
    runs in the child first."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), [f"{script}.py", *map(str, args)]
        prepare()
        common.run_script(importlib.import_module(script).main)
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def ended(pid, seconds=120):
    """Wait for a child -> its exit status, minus the signal's number when one killed it."""
    end = time.time() + seconds
    while time.time() < end:
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"still running after {seconds} s")


def forked(script, *args, log, prepare=lambda: None):
    """fork() to its end -> (status, "", what it printed), for assert_refused()."""
    Path(log).unlink(missing_ok=True)
    status = ended(fork(script, *args, log=log, prepare=prepare))
    return status, "", Path(log).read_text()


def die_in(module, name, call=1, after=False):
    """prepare() for fork(): SIGKILL at the given call of module.name, before or after its work."""
    def prepare():
        original, calls = getattr(module, name), []

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(module, name, dying)
    return prepare


def die_in_half_a_save(call):
    """prepare() for fork(): SIGKILL when half of a checkpoint is written."""
    def prepare():
        original, calls = torch.save, []

        def half(state, f):
            calls.append(1)
            if len(calls) < call:
                return original(state, f)
            whole = io.BytesIO()
            original(state, whole)
            f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = half
    return prepare


def killed_command(script, small, out):
    """A command of each stage that takes about a second -> (arguments, the output that counts)."""
    if script == "vae":
        return ("--vae", small / "vae/vae.pt", "--data", small / "images", "--resolution", 32, "--flip", "--micro-batch", 1, *FP32, "--out", out), out / "moments.npy"
    if script == "sample":
        return ("--sit", small / "sit/sit.pt", "--images", 40, "--steps", 6, "--micro-batch", 1, *FP32, "--out", out / "a.npz"), out / "a.npz"
    return (*train_command(script, small, out), "--steps", 12, "--save-every", 2, "--log-every", 3), out / NAME[script]


# Kills at bad moments, by stage: in the first step or row, in a checkpoint, between its renames, between the last files
BAD_MOMENTS = {"train_vae": [die_in(train_vae.Trainer, "train_step"), die_in_half_a_save(1), die_in_half_a_save(4), die_in(os, "fsync", 2, after=True), *(die_in(os, "replace", k) for k in range(2, 6))],
               "train_sit": [die_in(train_sit.Trainer, "train_step"), die_in_half_a_save(1), die_in_half_a_save(4), die_in(os, "fsync", 2, after=True), *(die_in(os, "replace", k) for k in range(2, 6))],
               "vae": [die_in(common.RowFiles, "put"), die_in(common.RowFiles, "flush", 30), die_in(np.lib.format, "open_memmap", 2), die_in(np, "save"), die_in(np, "savez", after=True),
                       *(die_in(os, "replace", k, after=a) for k in range(1, 4) for a in (False, True))],
               "sample": [die_in(common.RowFiles, "put"), die_in(common.RowFiles, "flush", 30), die_in(np.lib.format, "open_memmap", 2), die_in(data, "save_grid", after=True), die_in(sample, "write_npz"),
                          die_in(os, "remove"), die_in(os, "remove", after=True), *(die_in(os, "replace", k, after=a) for k in range(1, 4) for a in (False, True))]}


def assert_same_output(script, a, b):
    """Two folders of killed_command() hold the same bits, and b nothing that a has not but a spare checkpoint."""
    skip = ("seconds", "images_per_s", "made")
    plain = lambda record: {k: v for k, v in record.items() if k not in skip}
    if script in NAME:
        assert_same_bits(a / NAME[script], b / NAME[script])
        assert [plain(r) for r in metrics(a)[1]] == [plain(r) for r in metrics(b)[1]]
    elif script == "vae":
        for name in ("moments.npy", "labels.npy", "files.txt"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
        stats = [np.load(folder / "stats.npz") for folder in (a, b)]
        assert all(np.array_equal(stats[0][k], stats[1][k]) for k in ("mean", "std"))
        assert plain(common.read_json(a / "meta.json")) == plain(common.read_json(b / "meta.json"))
    else:
        one, two = np.load(a / "a.npz"), np.load(b / "a.npz")
        assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])
        assert np.array_equal(Image.open(a / "a.png"), Image.open(b / "a.png")) and plain(common.read_json(a / "a.json")) == plain(common.read_json(b / "a.json"))
    assert {p.name for p in b.iterdir()} == {p.name for p in a.iterdir()}


def what_is_stored(script, out):
    """What the next run must say that it goes on with ("" when nothing was stored)."""
    if script in NAME:
        step = next((common.load_checkpoint(p)["step"] for p in (out / NAME[script], (out / NAME[script]).with_suffix(".prev.pt")) if p.exists()), 0)
        return "already at step 12" if step == 12 else f": step {step} of 12" if step else ""
    done, mark, result = (out / "done.npy", out / "unfinished.json", out / "meta.json") if script == "vae" else (out / "a.npz.done", out / "a.npz.run", out / "a.npz")
    if script == "vae" and result.exists() or script == "sample" and result.exists() and not mark.exists():
        return "already"
    return f"going on, {np.count_nonzero(np.load(done) == 1)} of 40 images are there" if mark.exists() else ""


def kill_rounds(script, small, folder, kills, terms, seed=0):
    """Kill a stage with SIGKILL at its BAD_MOMENTS and at `kills` random ones, then `terms` times with SIGTERM; after each, the same command must go on
    with what was stored, and end with the bits of a run that was left alone. -> yields a line for each kill."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    whole, log, often = folder / "whole", folder / "log", lambda: setattr(common.RowFiles, "EVERY", 0)
    command, _ = killed_command(script, small, whole)
    begin = time.time()
    assert forked(script, *command, log=log)[0] == 0, log.read_text()
    seconds, moments = time.time() - begin, BAD_MOMENTS[script]
    for k in range(len(moments) + kills + terms):
        out = folder / f"{k}"
        command, _ = killed_command(script, small, out)
        number = signal.SIGTERM if k >= len(moments) + kills else signal.SIGKILL
        if k < len(moments):
            where, status = f"bad moment {k}", ended(fork(script, *command, log=log, prepare=lambda: (often(), moments[k]())))
        else:
            wait = rng.uniform(0.02, 0.95 * seconds)  # 20 ms: the child is there
            where, pid = f"{wait:.2f} s of {seconds:.2f}", fork(script, *command, log=log, prepare=often)
            time.sleep(wait)
            os.kill(pid, number)
            status = ended(pid)
        left = sorted(p.name for p in out.iterdir()) if out.exists() else []
        stored, printed = what_is_stored(script, out), log.read_text()
        if number == signal.SIGTERM:
            assert status == 0 or status == 128 + signal.SIGTERM and "error: stopped by SIGTERM" in printed, (status, printed)
        again = forked(script, *command, log=log, prepare=often)
        assert again[0] == 0, (where, left, again)
        assert stored in again[2], (where, stored, again)
        assert_same_output(script, whole, out)
        shutil.rmtree(out)
        yield f"{script}: {number.name} at {where} (status {status}), left {left}"


@pytest.mark.parametrize("script", BAD_MOMENTS)
def test_kills(script, small, tmp_path, monkeypatch):
    """After a kill (in a checkpoint, in the first step, between two files, anywhere) the same command ends with other bits, or not at all.
    The long version: python test_all.py --soak."""
    monkeypatch.setitem(BAD_MOMENTS, script, BAD_MOMENTS[script][::2])
    lines = list(kill_rounds(script, small, tmp_path, kills=1, terms=1))
    assert sum("status -9" in line for line in lines) >= len(BAD_MOMENTS[script])  # they did die there


def elastic_command(script, small, out, *flags):
    return (script, *train_command(script, small, out), *SLOW, *flags)


@pytest.mark.parametrize("script", NAME)
def test_elastic(script, small, tmp_path):
    """A run of two processes cannot go on with one or four, or goes on with other data or losses."""
    do(*elastic_command(script, small, tmp_path / "whole", "--steps", 5))
    run(*elastic_command(script, small, tmp_path / "one", "--steps", 2), ranks=2)
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    do(*elastic_command(script, small, tmp_path / "one", "--steps", 5))
    run(*elastic_command(script, small, tmp_path / "four", "--steps", 5), ranks=4)
    for other in ("one", "four"):
        assert_same_losses(tmp_path / "whole", tmp_path / other)


def children(pid):
    """Process ids of a process's children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return sorted(found)


def lose_a_rank(small, out, steps, restarts, victim):
    """Train a SiT on two processes, kill one of them after the first checkpoint -> (status of torchrun, its stderr)."""
    command = command_line(*elastic_command("train_sit", small, out, "--steps", steps, "--save-every", 5), ranks=2)
    command.insert(3, f"--max-restarts={restarts}")
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while not (out / "sit.pt").exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60 if not restarts else 120)
    return process.returncode, err


def test_a_lost_rank_ends_the_others(small, tmp_path):
    """When one process dies the others wait for ever, do not say why, or the run cannot go on."""
    status, err = lose_a_rank(small, tmp_path / "out", 10 ** 9, restarts=0, victim=1)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status != 0 and len(lines) == 1 and "rank 0: another process of this run is lost" in lines[0] and "run the same command again" in lines[0], err
    assert "SIGKILL" in err and "Traceback (most recent call last):\n  File \"" + str(HERE / "train_sit.py") not in err  # torchrun names who died
    step = common.load_checkpoint(tmp_path / "out/sit.pt")["step"]
    assert (tmp_path / "out/.lock").exists()  # while a rank may still write, the lock goes with the process alone
    run(*elastic_command("train_sit", small, tmp_path / "out", "--steps", step + 2), ranks=2)
    do(*elastic_command("train_sit", small, tmp_path / "whole", "--steps", step + 2))
    assert_same_losses(tmp_path / "whole", tmp_path / "out")


def test_torchrun_restarts(small, tmp_path):
    """torchrun --max-restarts does not bring a run back by itself after a process died."""
    status, err = lose_a_rank(small, tmp_path / "out", 60, restarts=1, victim=0)
    assert status == 0 and "taken over" in err, err
    assert [r["step"] for r in metrics(tmp_path / "out")[1]] == list(range(1, 61))
    do(*elastic_command("train_sit", small, tmp_path / "whole", "--steps", 60))
    for a, b in zip(metrics(tmp_path / "whole")[1], metrics(tmp_path / "out")[1]):
        assert a["velocity"] == pytest.approx(b["velocity"], rel=1e-4)


def limit(name, value):
    """prepare() for fork(): a limit of the operating system."""
    return lambda: resource.setrlimit(getattr(resource, name), (value, value))


@pytest.mark.parametrize("script", NAME)
def test_a_file_size_limit(script, small, tmp_path):
    """A checkpoint that cannot be written ends in a traceback, or takes the one before it away."""
    out, log = tmp_path / "out", tmp_path / "log"
    do(script, *train_command(script, small, out), "--steps", 2)
    before = (out / NAME[script]).read_bytes()
    more = (script, *train_command(script, small, out), "--steps", 4)
    assert_refused(forked(*more[:-1], 3, log=log, prepare=limit("RLIMIT_FSIZE", len(before) // 2)), NAME[script], "File too large", "ulimit -f", "is intact")
    assert (out / NAME[script]).read_bytes() == before and sorted(p.name for p in out.iterdir()) == sorted(["metrics.jsonl", NAME[script], NAME[script].replace(".pt", ".prev.pt")])
    do(*more)
    do(script, *train_command(script, small, tmp_path / "whole"), "--steps", 4)
    assert_same_bits(tmp_path / "whole" / NAME[script], out / NAME[script])
    for other in ("vae", "sample"):
        command, result = killed_command(other, small, tmp_path / other)
        assert_refused(forked(other, *command, log=log, prepare=limit("RLIMIT_FSIZE", 50_000)), "File too large")
        assert other == "vae" and not (tmp_path / "vae/meta.json").exists() or not result.exists()


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: disk(size or "ro") mounts it, or mounts it anew -> its folder."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def mount(options):
        words = ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if mounted else options, "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this user may not mount a disk")
        mounted.append(1)
        return folder
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def lie_about_space():
    """prepare() for fork(): the disk fills up after the check at the start."""
    shutil.disk_usage = lambda _: SimpleNamespace(free=10 ** 15)


def test_a_full_disk(small, tmp_path, disk):
    """A disk that fills up during a run ends it in a traceback or a bus error, or takes the last checkpoint; or the rerun is refused."""
    log, out = tmp_path / "log", disk("size=70m")  # the checkpoint is 30 MB, and a third does not fit
    command = ("train_sit", *train_command("train_sit", small, out), "--steps", 4)
    assert_refused(forked(*command, log=log, prepare=lie_about_space), "sit.pt", "No space left on device", "free space", "is intact")
    assert common.load_checkpoint(out / "sit.pt")["step"] == 2 and not (out / "sit.tmp").exists()
    assert_refused(forked(*command, log=log), "GiB are free")
    disk("ro")
    assert_refused(forked(*command, log=log), "cannot be written", "Read-only file system")
    disk("rw,size=105m")  # room for the third, but not for three more
    assert forked(*command, log=log)[0] == 0, log.read_text()
    do("train_sit", *train_command("train_sit", small, tmp_path / "whole"), "--steps", 4)
    assert_same_bits(tmp_path / "whole/sit.pt", out / "sit.pt")
    for p in out.iterdir():
        p.unlink()
    disk("size=100k")
    for script in ("vae", "sample"):
        command, result = killed_command(script, small, out)
        assert_refused(forked(script, *command, log=log, prepare=lie_about_space), "No space left on device")
        assert not (out / "meta.json").exists() and not (out / "a.npz").exists()
    for p in out.iterdir():
        p.unlink()
    images, disk_need = write_images(tmp_path / "images", 120, size=32), 120 * 2 * 8 * 8 * 8 * 2
    truncate(images / "a/010.png")  # its row is taken out, by a second copy
    disk(f"size={disk_need * 3 // 2}")
    command = ("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, "--flip", *FP32, "--out", out)
    assert_refused(forked(*command, log=log, prepare=lie_about_space), "No space left on device")
    assert not (out / "moments.npy.part").exists()
    disk("size=2m")
    status, _, printed = forked(*command, log=log)
    assert status == 0 and "going on, 119 of 120" in printed and len(data.load_latents(out).files) == 119


def test_out_of_memory(small, tmp_path):
    """Exhausted memory ends in a traceback, or the line does not name --micro-batch."""
    def starve():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit("RLIMIT_AS", size + 64 * 2 ** 20)()
        train_vae.Trainer.train_step = lambda *_: torch.zeros(2 ** 34)  # 64 GiB
    out, log = tmp_path / "out", tmp_path / "log"
    command = ("train_vae", "--data", small / "images", *SMALL_VAE, *PLAIN, "--out", out)
    do(*command, "--steps", 1)
    assert_refused(forked(*command, "--steps", 3, log=log, prepare=starve), "out of memory", "--micro-batch")
    assert_refused(forked(*command[:-1], tmp_path / "large", "--preset", "f8d4", "--steps", 3, log=log, prepare=starve), "out of memory", "--micro-batch")
    assert common.load_checkpoint(out / "vae.pt")["step"] == 1
    assert "free space" in common.explain(OSError("1000000 requested and 12484 written"))  # NumPy's, on a full disk
    gpu = common.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "out of GPU memory" in gpu and "--micro-batch" in gpu


def ill_reader(file, act):
    """prepare() for fork(): reading one image calls act()."""
    def prepare():
        original, data.WORKER_TIMEOUT = data.read_image, 2
        data.read_image = lambda path, size: (act() if Path(path).name == file else None, original(path, size))[1]
    return prepare


def no_more_files():
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("act,words", [(lambda: time.sleep(10 ** 6), ["no batch of images for 2 s", "007.png"]), (lambda: os.kill(os.getpid(), signal.SIGKILL), ["was lost", "--workers"])])
def test_a_reader_that_hangs_or_dies(act, words, small, tmp_path):
    """A worker that hangs is waited for for ever, or its file is not named; one that dies ends in a traceback."""
    command = ("train_vae", "--data", small / "images", *SMALL_VAE, *PLAIN, "--workers", 1, "--out", tmp_path / "out")
    do(*command, "--steps", 1)
    assert_refused(forked(*command, "--steps", 30, log=tmp_path / "log", prepare=ill_reader("007.png", act)), *words)
    assert common.load_newest(tmp_path / "out/vae.pt")["step"] >= 1
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_open_files(workers, small, tmp_path):
    """Good images are skipped as unreadable when the machine has no more file descriptors, or there is a traceback."""
    def prepare():
        original, seen = Image.open, []  # the first look is at the size, in the main process

        def opening(path, *args, **kwargs):
            seen.append(path)
            return no_more_files() if "007" in str(path) and seen.count(path) > 1 else original(path, *args, **kwargs)
        Image.open = opening
    command = ("train_vae", "--data", small / "images", *SMALL_VAE, *PLAIN, "--workers", workers, "--steps", 30, "--out", tmp_path / "out")
    result = forked(*command, log=tmp_path / "log", prepare=prepare)
    assert_refused(result, "007.png", "Too many open files", "ulimit -n", "--workers")
    assert "skipped" not in result[2]
    def low():  # no file can be opened at all
        free = os.dup(1)
        os.close(free)
        limit("RLIMIT_NOFILE", free)()
    assert_refused(forked(*command[:-1], tmp_path / "other", log=tmp_path / "log", prepare=low), "Too many open files", "ulimit -n")


def test_two_runs_in_one_place(small, tmp_path):
    """Two runs write into one folder; the refusal does not say who is there; or a dead owner keeps it."""
    where = {script: killed_command(script, small, tmp_path / script) for script in BAD_MOMENTS}
    locks = {script: tmp_path / script / ("a.npz.lock" if script == "sample" else ".lock") for script in where}
    commands = {script: (script, *command) for script, (command, _) in where.items()}
    commands["avatars"], locks["avatars"] = ("data", "avatars", tmp_path / "avatars", "--n", 5), tmp_path / "avatars.lock"
    commands["cache"], locks["cache"] = ("train_sit", "--latents", small / "latents", *SMALL_SIT, "--data", small / "images", *VFM, "--steps", 1, "--cache-vfm", tmp_path / "tokens",
                                         "--out", tmp_path / "sit"), tmp_path / "tokens/.lock"
    for name, lock in locks.items():
        lock.parent.mkdir(exist_ok=True)
        reader, writer = os.pipe()
        owner = os.fork()
        if not owner:
            common.claim(lock)
            os.write(writer, b"x")
            time.sleep(1000)
        os.read(reader, 1)
        assert_refused(call(*commands[name]), lock, f"in use by process {owner} on {socket.gethostname()}", "choose another", "it runs ")
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        status, _, err = call(*commands[name])
        assert status == 0 and f"left by process {owner} on {socket.gethostname()}" in err and "taken over" in err, err
        assert not lock.exists()
    assert_refused(call(*commands["cache"][:-3], tmp_path / "both", "--out", tmp_path / "both"), "--cache-vfm", "something else there already")
    for script, more in (("train_sit", ("--steps", 10 ** 9)), ("sample", ("--steps", 2000))):  # a run that works, not a lock alone
        out = tmp_path / f"{script} at work"
        command, pid = (*killed_command(script, small, out)[0], *more), None
        pid = fork(script, *command, log=tmp_path / "log", prepare=lambda: setattr(common.RowFiles, "EVERY", 0))
        end = time.time() + 60
        while not ((out / "sit.prev.pt").exists() if script == "train_sit" else (out / "a.npz.done").exists() and np.load(out / "a.npz.done").any()):
            assert time.time() < end
            time.sleep(0.01)
        assert_refused(call(script, *command), f"in use by process {pid}", f"{script}.py")
        os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)


def on_two_ranks(script, *args, folder, second=lambda: None):
    """A script in two forked processes; second() prepares rank 1 -> [(status, "", output)]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    place = lambda rank: os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logs = [folder / "rank0", folder / "rank1"]
    for log in logs:
        log.unlink(missing_ok=True)
    pids = [fork(script, *args, log=logs[0], prepare=lambda: place(0)), fork(script, *args, log=logs[1], prepare=lambda: (place(1), second()))]
    return [(ended(pid), "", log.read_text()) for pid, log in zip(pids, logs)]


def test_ranks_resume_from_one_checkpoint(small, tmp_path):
    """One rank falls back to an older checkpoint than the others, or an error of the machine is taken for damage."""
    command = ("train_sit", *train_command("train_sit", small, tmp_path / "out"))
    do(*command, "--steps", 3)
    before = (tmp_path / "out/sit.pt").read_bytes()

    def no_memory():
        def load(*_, **__):
            raise MemoryError
        torch.load = load
    first, second = on_two_ranks(*command, "--steps", 6, folder=tmp_path, second=no_memory)
    assert_refused(second, "cannot be read now", "MemoryError"), assert_refused(first, "another process of this run is lost")
    assert (tmp_path / "out/sit.pt").read_bytes() == before and not (tmp_path / "out/sit.damaged").exists()
    truncate(tmp_path / "out/sit.pt")
    first, second = on_two_ranks(*command, "--steps", 6, folder=tmp_path)
    assert first[0] == second[0] == 0 and "step 2 of 6" in first[2] and first[2].count("going on from") == 1 and "going on from" not in second[2]
    assert [r["step"] for r in metrics(tmp_path / "out")[1]] == [1, 2, 3, 4, 5, 6]


def test_errors_of_the_machine_are_no_damage(small, tmp_path, monkeypatch):
    """A disk error while reading makes stored rows begin anew, puts a good checkpoint away, or makes images unreadable for good."""
    files = {tmp_path / "a": (np.float16, (5, 2)), tmp_path / "done": (np.uint8, (5,))}
    assert common.begin_rows(tmp_path / "mark", {"x": 1}, files) is False
    store = common.RowFiles(*files)
    store.put([0, 3], np.ones((2, 2))), store.flush()
    for step in (1, 2):
        common.save_checkpoint(tmp_path / "x.pt", {"step": step})

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as m:
        m.setattr(np, "load", fail), m.setattr(torch, "load", fail)
        with pytest.raises(OSError, match="Input/output"):
            common.begin_rows(tmp_path / "mark", {"x": 1}, files)
        with pytest.raises(UserError, match="cannot be read now"):
            common.load_newest(tmp_path / "x.pt")
        with pytest.raises(OSError, match="Input/output"):
            data.load_latents(small / "latents")
    with monkeypatch.context() as m:
        def denied(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")
        m.setattr(torch, "load", denied), m.setattr(zipfile, "is_zipfile", lambda _: False)
        with pytest.raises(UserError, match="cannot be read now .*Permission denied"):
            common.load_newest(tmp_path / "x.pt")
    with monkeypatch.context() as m:
        def no_folders(handle, fsync=os.fsync):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            fsync(handle)
        m.setattr(os, "fsync", no_folders)
        common.write_json(tmp_path / "a.json", {}), common.save_checkpoint(tmp_path / "x.pt", {"step": 2})
        m.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            common.write_json(tmp_path / "b.json", {})
        assert not list(tmp_path.glob("b.json*"))
    assert common.begin_rows(tmp_path / "mark", {"x": 1}, files) and np.load(tmp_path / "done").tolist() == [1, 0, 0, 1, 0] and common.load_newest(tmp_path / "x.pt")["step"] == 2
    images = write_images(tmp_path / "images", 4)
    with monkeypatch.context() as m:
        (images / "lost+found").mkdir()  # of root, on every disk
        m.setattr(os, "scandir", lambda path=".", original=os.scandir: fail() if str(path).endswith(("lost+found")) else original(path))
        assert len(data.find_images(images)) == 4
        m.setattr(os, "scandir", lambda path=".", original=os.scandir: fail() if str(path).endswith("b") else original(path))
        with pytest.raises(OSError, match="Input/output"):
            data.find_images(images)
    for number in (errno.EIO, errno.ENOTCONN, errno.ESTALE):
        with monkeypatch.context() as m:
            def lost(*_, number=number):
                raise OSError(number, "lost")
            m.setattr(Image, "open", lost)
            with pytest.raises(UserError, match="cannot be read now") as e:
                data.read_image(images / "a/000.png", 8)
            assert not isinstance(e.value, data.UnreadableImage)


def test_rows_are_marked_after_they_are_on_disk(tmp_path, monkeypatch):
    """A row counts as stored before it is safe: after a power loss it would be zeros."""
    files = {tmp_path / "a": (np.float32, (5, 2)), tmp_path / "done": (np.uint8, (5,))}
    common.begin_rows(tmp_path / "mark", {}, files)
    store, marks, flush = common.RowFiles(*files), [], np.memmap.flush
    monkeypatch.setattr(common.RowFiles, "EVERY", 1000)
    store.put([1, 2], np.ones((2, 2)))
    store.put([4], done=2)
    assert not store.done.any() and store.arrays[0][1:3].all()
    monkeypatch.setattr(np.memmap, "flush", lambda self: marks.append(store.done.tolist()) or flush(self))
    store.flush()
    assert marks == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 2]]  # at the flush of the rows, at that of the marks
    assert store.missing(0, 1) == [0, 3] and common.begin_rows(tmp_path / "mark", {}, files) and not common.begin_rows(tmp_path / "mark", {"x": 1}, files)


def test_neighbours_that_are_unreadable(tmp_path):
    """Neighbouring bad files, few enough to be skipped, make rows of a batch vanish."""
    root = write_images(tmp_path, 1200, size=4, classes=("",))
    images = data.ImageFolder(root, 4)
    for file in images.files[30:42]:
        (root / file).write_bytes(b"")
    batches = [list(range(k, k + 64)) for k in range(0, 192, 64)]
    for (pixels, _, kept), asked in zip(data.load_batches(images, batches, replace=True), batches):
        assert len(pixels) == 64 and kept == asked
    (root / images.files[50]).write_bytes(b"")
    with pytest.raises(UserError, match="13 of 1200"):
        list(data.load_batches(data.ImageFolder(root, 4), batches, replace=True))


def test_a_mended_image_is_encoded_after_all(small, tmp_path):
    """An image that could not be read before a stop stays out of the latents although it can be read now; or a kill among the last files
    changes them."""
    images, log = write_images(tmp_path / "images", 120, size=8), tmp_path / "log"
    good = (images / "a/010.png").read_bytes()
    command = lambda out: ("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 8, *FP32, "--micro-batch", 16, "--out", tmp_path / out)
    truncate(images / "a/010.png")
    do(*command("119"))
    for k in range(2, 5):
        assert forked(*command(f"killed{k}"), log=log, prepare=die_in(os, "replace", k))[0] == -9
        do(*command(f"killed{k}"))
        assert_same_output("vae", tmp_path / "119", tmp_path / f"killed{k}")
    (images / "a/010.png").write_bytes(bytes(len(good)))  # as long as it will be
    assert forked(*command("mended"), log=log, prepare=die_in(np, "save"))[0] == -9
    (images / "a/010.png").write_bytes(good)
    assert "going on, 119 of 120" in do(*command("mended")) and len(data.load_latents(tmp_path / "mended").files) == 120


def test_locks_that_a_file_system_lacks(tmp_path, monkeypatch, capsys):
    """On a file system without locks nothing runs at all."""
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(data.fcntl, "lockf", lockf)
    assert common.claim(tmp_path / ".lock") is None and "has no locks" in capsys.readouterr().err


# Numbers

def test_parts_name_the_images_that_are_not_finite():
    """A step with NaN does not say which images of the batch it came from, or names those of another step."""
    parts, named = data.Parts(), []
    for step in (1, 2, 3):
        each = torch.tensor([1.0, 2.0, float("nan") if step == 2 else 0.5, float("inf") if step == 3 else 1])
        parts.add(step, {"rec": each.mean(), "grad_norm": torch.tensor(1.0)}, each)
    with pytest.raises(UserError, match="step 2: rec not finite .*1 of the batch's images, 2 \\(c.png\\); the last checkpoint is intact"):
        parts.look("x", lambda step, places: named.append((step, places)) or ["c.png"])
    assert named == [(2, [2])]
    parts = data.Parts()
    parts.add(7, {"rec": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))}, torch.ones(4))
    with pytest.raises(UserError, match="step 7: grad_norm not finite") as e:
        parts.look("x")
    assert "images" not in str(e.value)  # the loss of each is finite


def test_spikes_and_time_bins():
    """A spike is missed, named at another step or time, found where there is none, found for ever after a rise; or the means by time are
    wrong, or what a checkpoint keeps of both is not all."""
    def feed(looks_at, through_checkpoints):
        parts, found, rng = data.Parts(), [], np.random.default_rng(0)
        for step in range(1, 201):
            each, t = torch.from_numpy(rng.uniform(0.5, 1.5, 8)).float(), torch.from_numpy(rng.uniform(0, 1, 8)).float()
            if step == 60:
                each[3], t[3] = 60.0, 0.75
            norm = 30.0 if step == 100 else 10.0 if step >= 150 else 1 + 0.1 * math.sin(step)
            parts.add(step, {"velocity": each.mean(), "grad_norm": torch.tensor(norm)}, each, t)
            if step in looks_at:
                parts.look("x")
                found += parts.spikes
                parts = data.Parts(json.loads(json.dumps(parts.state()))) if through_checkpoints else parts
        return parts, found
    once, spikes = feed([200], False)
    often, others = feed(range(7, 201, 1), True)
    assert [(s["step"], *s["spike"]) for s in spikes if s["step"] < 150] == [(60, "velocity"), (100, "grad_norm")] and spikes[0]["time_bin"] == 7
    assert spikes[0]["spike"]["velocity"] == pytest.approx(8.4, abs=0.6) and spikes[0]["usual"]["velocity"] == pytest.approx(1, abs=0.2) and spikes[1]["grad_norm"] == 30
    later = [s["step"] for s in spikes if s["step"] >= 150]
    assert later[0] == 150 and later == list(range(150, 150 + len(later))) and len(later) < 40  # a new level becomes the usual one
    assert [s["step"] for s in spikes] == [s["step"] for s in others] and [s["spike"] for s in spikes] == [s["spike"] for s in others]
    assert json.loads(json.dumps(once.state())) == json.loads(json.dumps(often.state()))
    parts = data.Parts()
    parts.add(1, {"velocity": torch.tensor(2.0)}, torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([0.0, 0.05, 0.1, 1.0]))
    parts.add(2, {"velocity": torch.tensor(2.0)}, torch.tensor([5.0, 3.0, 2.0, 6.0]), torch.tensor([0.01, 0.55, 0.1, 0.999]))
    parts.look("x")
    assert parts.by_time() == [3.0, 2.0, None, None, None, 3.0, None, None, None, 5.5] and parts.by_time() == [None] * 10


def test_metrics_have_time_bins_and_spikes(small, tmp_path, monkeypatch):
    """metrics.jsonl lacks the loss by time, or a spike; on two processes they are others."""
    command = ("train_sit", "--latents", small / "latents", *SMALL_SIT, *SLOW, "--repa", 0, "--steps", 6, "--log-every", 3)
    do(*command, "--out", tmp_path / "one")
    run(*command, "--out", tmp_path / "two", ranks=2)
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    for r in metrics(tmp_path / "one")[1]:
        known = [v for v in r["velocity_t"] if v is not None]
        assert len(r["velocity_t"]) == 10 and 3 <= len(known) <= 10 and min(known) > 0.1
    monkeypatch.setattr(data.Parts, "BEGIN", 2), monkeypatch.setattr(data.Parts, "SPIKE", 0.5)
    do(*command, "--out", tmp_path / "all")
    lines = [json.loads(line) for line in (tmp_path / "all/metrics.jsonl").read_text().splitlines()]
    spikes = [line for line in lines if "spike" in line]
    assert [s["step"] for s in spikes] == [3, 4, 5, 6] and all({"velocity", "grad_norm"} == set(s["spike"]) and 0 <= s["time_bin"] < 10 and s["grad_norm"] > 0 for s in spikes)
    assert_same_bits(tmp_path / "one/sit.pt", tmp_path / "all/sit.pt")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_not_finite(value, small, tmp_path):
    """A damaged latent is trained on, or its image is not named."""
    shutil.copytree(small / "latents", tmp_path / "latents")
    command = ("train_sit", "--latents", tmp_path / "latents", *SMALL_SIT, "--repa", 0, "--out", tmp_path / "sit")
    do(*command, "--steps", 1)
    moments = np.load(tmp_path / "latents/moments.npy", mmap_mode="r+")
    moments[5, :, 1, 2, 3] = value
    moments.flush()
    assert_refused(call(*command, "--steps", 30), "step ", data.load_latents(small / "latents").files[5], "not finite", "(1 of the batch)", "encode again")
    assert common.load_checkpoint(tmp_path / "sit/sit.pt")["step"] >= 1
    np.savez(tmp_path / "latents/stats.npz", mean=np.full(4, value), std=np.ones(4))
    assert_refused(call(*command, "--steps", 30), "damaged", "not finite")


@pytest.mark.parametrize("script", NAME)
def test_a_step_that_is_not_finite(script, small, tmp_path, monkeypatch):
    """A run with NaN in one image's loss, or in gradients alone, goes on, or does not name the step, the part and the images."""
    command = (script, *train_command(script, small, tmp_path / "out"))
    do(*command, "--steps", 2)
    before, module = (tmp_path / "out" / NAME[script]).read_bytes(), importlib.import_module(script)
    normal, calls = (module.VAELoss if script == "train_vae" else module.SiTLoss).forward, []

    def ill(self, *inputs, **options):  # in the second step from here, image 1 of the batch
        calls.append(1)
        total, parts, *rest = normal(self, *inputs, **options)
        if len(calls) == 2:
            rest[0] = rest[0].clone()
            rest[0][1], parts["ill"] = float("nan"), torch.tensor(float("nan"))
        return total, parts, *rest
    with monkeypatch.context() as m:
        m.setattr(module.VAELoss if script == "train_vae" else module.SiTLoss, "forward", ill)
        images = data.ImageFolder(small / "images", 32, flip=script == "train_vae")
        row = data.sample_order(len(images), 0, 3 * 4 + 1, 1)[0] % 40  # step 4 of batches of 4, place 1
        result = call(*command, "--steps", 8, "--save-every", 100, "--log-every", 5)
        assert_refused(result, "step 4: ill", "not finite", f"1 of the batch's images, 1 ({images.files[row]});")
    with monkeypatch.context() as m:
        m.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
        assert_refused(call(*command, "--steps", 8), "step 3: ", "grad_norm", "not finite")
    assert (tmp_path / "out" / NAME[script]).read_bytes() == before


def test_scores_wait_for_a_look(small, tmp_path, monkeypatch):
    """--eval-every scores a model whose losses are no longer finite."""
    net = ("--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0, "--net-size", 32)
    do("fid", "score", small / "images", small / "images", *net, "--save-stats", tmp_path / "ref.npz")
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    monkeypatch.setattr(train_sit.Evaluation, "__call__", lambda *_: pytest.fail("scored"))
    assert_refused(call("train_sit", "--latents", small / "latents", *SMALL_SIT, "--log-every", 100, "--save-every", 100, "--repa", 0, "--steps", 50, "--eval-every", 2, "--eval-stats", tmp_path / "ref.npz",
                        "--out", tmp_path), "step 1: grad_norm not finite")


# Hostile files

class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_file_runs_code(legacy, small, vgg, tmp_path):
    """A file given to any flag runs the code that it carries, or ends in a traceback."""
    ran, evil, images = tmp_path / "ran", tmp_path / "evil.pt", small / "images"
    torch.save({"state_dict": ldm_state(), "x": Evil(ran)}, evil, _use_new_zipfile_serialization=not legacy)
    fine = ("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--steps", 1, "--out", tmp_path / "out")
    commands = [("vae", "--vae", evil, "--data", images, "--out", tmp_path / "l"), ("probe", evil, "--data", images), ("sample", "--sit", evil, "--out", tmp_path / "a.npz"),
                ("sample", "--sit", small / "sit/sit.pt", "--vae", evil, "--out", tmp_path / "a.npz"), ("fid", "recon", "--vae", evil, "--data", images),
                ("fid", "score", images, images, "--net-ckpt", evil), ("fid", "score", images, images, "--net", "tf_efficientnet_lite0", "--net-ckpt", evil),
                [*fine[:3], *[a for a in fine[3:] if a not in ("--preset", "demo")], "--init", evil], (*fine, "--lpips", 1, "--lpips-ckpt", evil), (*fine, "--gan", 0.1, "--disc-ckpt", evil),
                (*fine, "--lambda-align", 1, "--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", evil), ("sample", "--sit", small / "sit/sit.pt", "--guide", evil, "--cfg", 2, "--out", tmp_path / "a.npz")]
    for command in commands:
        assert_refused(call(*command), evil)
    do(*fine)
    shutil.copy(evil, tmp_path / "out/vae.pt")
    (tmp_path / "out/vae.prev.pt").unlink(missing_ok=True)
    assert_refused(call(*fine[:-3], 2, *fine[-2:]), "out/vae.pt")  # the run's own checkpoint
    with pytest.raises(UserError):
        sample.read_stats(str(evil), 4)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(evil, weights_only=False)  # what a library might do
    assert not ran.exists()


def test_every_reader_is_a_safe_one():
    """A torch.load or np.load in the code leaves pickles to chance."""
    calls = []
    for path in HERE.glob("*.py"):
        if path.name != "test_all.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "torch.hub.load_state_dict_from_url"):
                    flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert flags.get("allow_pickle") == "False" or flags.get("weights_only") == "True", f"{path.name}:{node.lineno}"
                    calls.append(node)
                assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("pickle.load", "pickle.loads", "eval", "exec", "os.system")), f"{path.name}:{node.lineno}"
    assert len(calls) > 10


def bomb_png(width, height):
    """A PNG of a few bytes that unpacks to width x height white pixels (1 bit each)."""
    chunk = lambda name, content: struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * (-(-width // 8))
    lines = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def test_hostile_images(small, tmp_path):
    """A bomb is unpacked, a pipe waited for, a circle of links followed, NaN taken as a grey, or a name breaks files.txt."""
    images = write_images(tmp_path / "images", 400, size=32)
    Path(images / "a/000.png").write_bytes(bomb_png(20000, 20000))
    Path(images / "a/002.png").write_bytes(bomb_png(200000, 1))  # enlarged to 6,400,000 x 32
    (images / "a/004.png").unlink(), os.mkfifo(images / "a/004.png")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(images / "a/005.tif")
    assert (images / "a/000.png").stat().st_size < 10 ** 5
    (images / "a/loop").symlink_to(images / "a"), (images / "b/loop").symlink_to(images)
    (images / "c").mkdir(), (images / "d").mkdir(), (images / "c/d").symlink_to(images / "d"), (images / "d/c").symlink_to(images / "c")
    status, out, err = call("data", "check", images, "--size", 32)
    assert status == 0 and "397 images" in out and "4 unreadable" in out
    for name, word in (("000.png", "400000000 pixels"), ("002.png", "200000 x 1 pixels"), ("004.png", "no regular file"), ("005.tif", "NaN")):
        assert len([line for line in err.splitlines() if f"a/{name}" in line and word in line]) == 1, (name, err)
    assert len(data.find_images(images)) == 401  # no image twice
    (images / "a/gone.png").symlink_to(tmp_path / "nowhere")
    assert data.ImageFolder(images, 8).hash.isalnum()
    (images / "a/gone.png").unlink()
    for p in ("a/000.png", "a/002.png", "a/005.tif"):
        (images / p).unlink()
    (images / "a/new\nline.png").write_bytes((images / "a/006.png").read_bytes())
    assert_refused(call(*encode_command(small, images, tmp_path / "out")), "new\\nline.png", "line break")
    os.rename(images / "a/new\nline.png", os.fsencode(images) + b"/a/\xff.png")
    assert_refused(call(*encode_command(small, images, tmp_path / "out")), "udcff.png", "not UTF-8")


@pytest.mark.parametrize("path", ["../outside.png", "{}", "a/../../outside.png", "a\\..\\..\\outside.png", "", "a", "a/000.png/", "./a/000.png"])
def test_attribute_paths_stay_inside(path, small, tmp_path):
    """A table makes a script read a file outside the image folder."""
    images = write_images(tmp_path / "images", 8)
    outside = tmp_path / "outside.png"
    shutil.copy(images / "a/000.png", outside)
    (images / "attributes.csv").write_text(f"file,split,hat\na/000.png,train,1\n{path.format(outside)},train,0\n")
    assert_refused(call(*vae_command(images, tmp_path / "out", "--split", "train")), "line 3", "is no image below")
    assert_refused(call("probe", small / "vae/vae.pt", "--data", images), "line 3", "is no image below")


def zip_bomb(path, name, gigabytes):
    """An .npz of about a megabyte a gigabyte whose array `name` is all zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open(f"{name}.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=(gigabytes * 2 ** 14, 256, 256, 1)))
        for _ in range(gigabytes * 16):
            f.write(bytes(2 ** 26))


def test_hostile_npz(small, tmp_path):
    """A zip bomb is unpacked, an array of objects unpickled."""
    bomb, objects, latents = tmp_path / "bomb.npz", tmp_path / "objects.npz", tmp_path / "latents"
    zip_bomb(bomb, "arr_0", 2)
    assert bomb.stat().st_size < 10 ** 7
    bad = dict.fromkeys(("mean", "std", "mu", "sigma", "arr_0"), np.array([Evil(tmp_path / "ran")], object))
    np.savez(objects, **bad)
    shutil.copytree(small / "latents", latents)
    for path, words in ((bomb, ["zip bomb"]), (objects, [])):
        shutil.copytree(small / "latents", latents, dirs_exist_ok=True)
        assert_refused(call("fid", "score", small / "images", path, "--net", "tf_efficientnet_lite0", "--net-ckpt", LITE0), path, *words)
        assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--eval-every", 1, "--eval-stats", path, "--out", tmp_path / "out"), path, *words)
        with pytest.raises(UserError, match="bomb" if words else "allow_pickle"):
            sample.read_stats(str(path), 4)
        shutil.copy(path, latents / "stats.npz")
        assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--out", tmp_path / "out"), latents, "damaged", *words)
    for name in ("labels", "moments"):
        shutil.copytree(small / "latents", latents, dirs_exist_ok=True)
        np.save(latents / f"{name}.npy", np.array([Evil(tmp_path / "ran")] * 40, object))
        assert_refused(call("train_sit", "--latents", latents, *SMALL_SIT, "--repa", 0, "--out", tmp_path / "out"), latents, "damaged")
    assert not (tmp_path / "ran").exists()


def fuzz_seeds(small, folder):
    """What is fuzzed: kind -> (whole files, a function that reads one and may refuse it)."""
    folder.mkdir(parents=True)
    rng, image = np.random.default_rng(0), Image.fromarray(ramp())
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera"
    kinds = {"png": image, "jpg": image, "webp": image, "gif": image, "tif": image, "bmp": image}
    pictures = [folder / f"{k}.{k}" for k in kinds]
    for k, v in kinds.items():
        v.save(folder / f"{k}.{k}", **({} if k in ("gif", "bmp") else {"exif": exif}))
    others = dict(grey16=("png", Image.fromarray(ramp()[..., 0].astype(np.uint16) * 257)), floats=("tif", Image.fromarray(ramp()[..., 0].astype(np.float32))), cmyk=("jpg", image.convert("CMYK")),
                  palette=("png", image.quantize(4)), packed=("tif", image), alpha=("png", image.convert("RGBA")))
    for k, (suffix, v) in others.items():
        v.save(folder / f"{k}.{suffix}", **({"compression": "tiff_lzw"} if k == "packed" else {}))
        pictures.append(folder / f"{k}.{suffix}")
    tables = folder / "tables"
    for i in range(4):
        (tables / "a").mkdir(parents=True, exist_ok=True), image.save(tables / f"a/{i}.png")
    (folder / "attributes.csv").write_text("file,split,hat,red\na/0.png,train,1,0\na/1.png,val,,1\n\"a/2.png\",test,0,0\n")
    torch.save({"config": {"depth": 1, "x": [1, (2.5, "y")]}, "ema": {"w": torch.arange(30.0)}, "step": 3}, folder / "zip.pt")
    torch.save({"config": {"depth": 1}, "ema": {"w": torch.arange(30.0)}}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({"w": torch.arange(30.0)}, folder / "safe.safetensors")
    np.savez(folder / "stats.npz", mean=rng.normal(size=4), std=np.ones(4), mu=rng.normal(size=4), sigma=np.eye(4))
    np.savez_compressed(folder / "samples.npz", arr_0=np.stack([ramp()] * 4), arr_1=np.arange(4))
    latents = folder / "latents"
    shutil.copytree(small / "latents", latents)

    def read_table(path):
        shutil.copy(path, tables / "attributes.csv")
        data.load_attributes(tables)

    def read_checkpoint(path):
        for read in (common.load_checkpoint, common.load_newest, vae.load_vae, lambda p: sample.read_sit(p, "ema")):
            with contextlib.suppress(UserError):
                read(path)
        common.load_checkpoint(path)

    def read_npz(path):
        with contextlib.suppress(UserError):
            sample.read_stats(str(path), 4)
        source = fid.load_source(path)
        if source.images is not None:
            source.images([0])

    def read_latents(path):
        shutil.copy(path, latents / path.name)
        try:
            found = data.load_latents(latents)
            found.moments[0], found.labels[0]
        finally:
            shutil.copy(small / "latents" / path.name, latents / path.name)

    def read_log(path):
        common.Log(path, 5, {}, rank=0)
        fid.last_seconds(path)

    parts = [folder / f"part_{name}" for name in ("meta.json", "labels.npy", "files.txt", "stats.npz")]
    for p in parts:
        shutil.copy(small / "latents" / p.name.removeprefix("part_"), p)
    (folder / "metrics.jsonl").write_text((small / "sit/metrics.jsonl").read_text())
    return {"image": (pictures, lambda p: data.read_image(p, 16)), "table": ([folder / "attributes.csv"], read_table),
            "checkpoint": ([folder / "zip.pt", folder / "legacy.pt", folder / "safe.safetensors"], read_checkpoint), "npz": ([folder / "stats.npz", folder / "samples.npz"], read_npz),
            "latents": (parts, read_latents), "json": ([small / "latents/meta.json"], common.read_json), "log": ([folder / "metrics.jsonl"], read_log)}


def mutated(draw, whole, others):
    """Bytes of a file, damaged as hypothesis wills: bytes changed, cut out, inserted, repeated, a number made huge, a part of another file."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at, n = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(1, 16))
        how = draw(st.sampled_from(["change", "flip", "cut", "end", "insert", "repeat", "huge", "splice"]))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "end":
            del content[at:]
        elif how == "cut":
            del content[at:at + n]
        elif how == "repeat":
            content[at:at] = content[at:at + n] * draw(st.sampled_from([1, 2, 1000]))
        elif how == "huge":
            content[at:at + 4] = draw(st.sampled_from([b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"9999", b"\0\0\0\0", b"-1,,"]))
        elif how == "splice":
            content[at:at + n] = draw(st.sampled_from(others))[at:at + n]
        else:
            content[at:at + (n if how == "change" else 0)] = draw(st.binary(min_size=1, max_size=16))
    return bytes(content)


def fuzz(kind, seeds, folder, examples):
    """Read `examples` damaged files of a kind -> how many were read and refused. Any other error, 20 s for one file, or a new file beside
    those being read is a failure."""
    files, read = seeds
    contents, counts = [p.read_bytes() for p in files], Counter()

    def too_long(*_):
        raise AssertionError("hangs")

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def one(choice):
        i = choice.draw(st.integers(0, len(files) - 1))
        path = folder / files[i].name.removeprefix("part_")
        path.write_bytes(mutated(choice.draw, contents[i], contents))
        before = sorted(folder.rglob("*"))
        signal.alarm(20)
        try:
            read(path)
            counts["read"] += 1
        except (UserError, OSError, MemoryError) as e:
            assert common.explain(e).isprintable() and len(common.explain(e)) < 2000  # the line that a script prints
            counts["refused"] += 1
        finally:
            signal.alarm(0)
        assert {p for p in folder.rglob("*")} <= {*before, path.with_suffix(".damaged")}, "wrote a file"
        path.with_suffix(".damaged").unlink(missing_ok=True)

    handler, there, out = signal.signal(signal.SIGALRM, too_long), sorted(Path.cwd().iterdir()), io.StringIO()
    try:
        with contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert sorted(Path.cwd().iterdir()) == there
    return counts


FUZZED = ("image", "table", "checkpoint", "npz", "latents", "json", "log")


@pytest.mark.parametrize("kind", FUZZED)
def test_fuzz(kind, small, tmp_path, monkeypatch):
    """A damaged file ends in a traceback, a hang, or a file in another place. The long version: python test_all.py --soak."""
    (tmp_path / "cwd").mkdir(), (tmp_path / "read").mkdir()
    seeds = fuzz_seeds(small, tmp_path / "seeds")
    monkeypatch.chdir(tmp_path / "cwd")
    counts = fuzz(kind, seeds[kind], tmp_path / "read", 150)
    assert counts["refused"] > 5 and counts["read"] > 1, counts


# Reproducible

def test_outputs_say_how_they_were_made(demo):
    """A file does not say by which command, commit, versions and inputs it was made."""
    def good(made, script):
        return made["command"].startswith(f"{script}.py ") and set(made["versions"]) == {"python", "torch", "numpy", "pillow", "timm"} and torch.__version__.startswith(made["versions"]["torch"]) \
            and made["commit"] == common.commit()
    send = demo / "send"
    jsons = {send / "latents/meta.json": "vae", send / "samples.json": "sample", send / "recon.json": "fid", send / "fd.json": "fid", demo / "report.json": "fid", send / "probe.json": "probe"}
    for path, script in jsons.items():
        assert good(json.loads(path.read_text())["made"], script), path
    for path, script in ((send / "vae.pt", "train_vae"), (send / "sit/sit.pt", "train_sit")):
        assert good(common.load_checkpoint(path)["made"], script)
        assert good(metrics(path.parent)[0]["made"], script) and metrics(path.parent)[0]["inputs"] == common.load_checkpoint(path)["inputs"]
    for path, script in ((send / "samples.png", "sample"), (send / "recon.png", "fid"), (demo / "report.png", "fid")):
        assert good(json.loads(Image.open(path).text["made"]), script)
    vae_hash = common.weights_hash(vae.load_vae(send / "vae.pt").state_dict())
    meta, inputs = json.loads((send / "latents/meta.json").read_text()), common.load_checkpoint(send / "sit/sit.pt")["inputs"]
    assert meta["vae_hash"] == vae_hash and inputs["latents"] == f"{vae_hash}-{meta['files_hash']}" and json.loads((send / "recon.json").read_text())["inputs"]["vae"] == vae_hash
    assert common.load_checkpoint(send / "vae.pt")["inputs"]["init"] == common.weights_hash(vae.load_vae(demo / "pretrain/vae.pt").state_dict())
    assert json.loads((send / "fd.json").read_text())["inputs"][str(send / "samples.npz")] == hashlib.sha256((send / "samples.npz").read_bytes()).hexdigest()[:16]
    assert len(json.loads((send / "probe.json").read_text())["inputs"]) == 2
    if common.commit() is not None:
        head = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert common.commit().removesuffix("-dirty") == head and len(head) == 40


def test_a_changed_data_set_is_seen(small, tmp_path):
    """Images that were replaced or added after encoding are paired with the old latents, or a run goes on with them."""
    images, latents = tmp_path / "images", tmp_path / "latents"
    shutil.copytree(small / "images", images)
    (images / "attributes.csv").unlink(missing_ok=True)
    do("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, *FP32, "--out", latents)
    repa = ("train_sit", "--latents", latents, "--data", images, *SMALL_SIT, "--repa", 0.5, *VFM, "--out", tmp_path / "sit")
    fine = ("train_vae", "--data", images, *SMALL_VAE, *PLAIN, "--out", tmp_path / "vae")
    do(*repa, "--steps", 1), do(*fine, "--steps", 1)
    moved = tmp_path / "moved"
    images.rename(moved)  # the same files elsewhere
    do(*repa, "--data", moved, "--steps", 2), do(*fine, "--data", moved, "--steps", 2)
    moved.rename(images)
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "a/000.png")
    for command, word in ((repa, "--data"), (fine, "--data"), (("vae", "--vae", small / "vae/vae.pt", "--data", images, "--resolution", 32, *FP32, "--out", latents), "other images than --data")):
        assert_refused(call(*command, *(("--steps", 3) if command[0] != "vae" else ())), word)


def test_weights_may_move_but_not_change(small, vgg, tmp_path):
    """A run does not go on when its weight files have moved, or goes on when they have changed."""
    places = [tmp_path / "here", tmp_path / "there"]
    places[0].mkdir()
    shutil.copy(small / "vae/vae.pt", places[0] / "init.pt"), shutil.copy(LITE0, places[0] / "vfm.pth"), shutil.copy(vgg[1], places[0] / "vgg.pth")

    def tune(folder, steps):
        return ("train_vae", "--data", small / "images", "--init", folder / "init.pt", "--resolution", 32, "--batch", 4, "--vfm", "tf_efficientnet_lite0", "--vfm-ckpt", folder / "vfm.pth", "--lpips-ckpt",
                folder / "vgg.pth", "--gan", 0, *FP32, "--steps", steps, "--out", tmp_path / "out")
    do(*tune(places[0], 1))
    places[0].rename(places[1])
    do(*tune(places[1], 2))
    for name in ("vfm.pth", "vgg.pth"):
        before = (places[1] / name).read_bytes()
        state = common.load_checkpoint(places[1] / name)
        next(v for k, v in state.items() if v.ndim == 4).mul_(1.01)
        torch.save(state, places[1] / name)
        assert_refused(call(*tune(places[1], 3)), "other content of --" + {"vfm.pth": "vfm", "vgg.pth": "lpips"}[name])
        (places[1] / name).write_bytes(before)


def test_deterministic(small, tmp_path):
    """--deterministic fails, changes what a CPU computes, or is not passed on."""
    commands = {"train_vae": train_command("train_vae", small, tmp_path / "{}"), "train_sit": ("--latents", small / "latents", "--data", small / "images", *SMALL_SIT, *VFM, "--out", tmp_path / "{}/sit")}
    for script, command in commands.items():
        for name, flags in (("plain", ()), ("exact", ("--deterministic",))):
            do(script, *(str(c).format(name) for c in command), "--steps", 2, *flags)
            assert torch.are_deterministic_algorithms_enabled() == bool(flags)
    assert_same_bits(tmp_path / "plain/vae.pt", tmp_path / "exact/vae.pt"), assert_same_bits(tmp_path / "plain/sit/sit.pt", tmp_path / "exact/sit/sit.pt")
    for script in ("vae", "sample"):
        do(script, *killed_command(script, small, tmp_path / script)[0], "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    common.setup()
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_places_are_named(small, tmp_path):
    """A file where a folder is expected, the checkpoint of another stage, or what has moved ends in a line that helps nobody."""
    sit_pt, vae_pt, images = small / "sit/sit.pt", small / "vae/vae.pt", small / "images"
    (tmp_path / "text.pt").write_text("hello")
    moved = common.load_checkpoint(sit_pt)
    torch.save(dict(moved, vae=str(tmp_path / "gone.pt")), tmp_path / "sit.pt")
    encode = lambda vae_path, folder=images: call("vae", "--vae", vae_path, "--data", folder, "--out", tmp_path / "out")
    assert_refused(encode(tmp_path / "text.pt"), "text.pt: not a readable checkpoint (cut, or not written by torch.save)")
    assert_refused(encode(small / "vae"), "give its file", vae_pt)
    assert_refused(encode(images), "holds no VAE")
    assert_refused(encode(vae_pt, vae_pt), "a file; expected a folder")
    assert_refused(call("sample", "--sit", vae_pt, "--out", tmp_path / "a.npz"), "a VAE goes to --vae")
    assert_refused(call("sample", "--sit", tmp_path / "sit.pt", "--out", tmp_path / "a.npz"), "gone.pt, which is not there", "--vae")
    assert_refused(call("train_sit", "--latents", tmp_path / "none", "--repa", 0, "--out", tmp_path / "out"), "no such folder; if it has moved")
    command = vae_command(images, tmp_path / "out")
    (tmp_path / "out/vae.pt").mkdir(parents=True)
    assert_refused(call(*command), "vae.pt: a folder")


def test_flags_end_in_one_line():
    """A wrong flag ends in a page of usage."""
    for command, words in ((("train_vae", "--steps", "x"), ["--steps", "'x'"]), (("train_sit", "--latnts", "x"), ["unrecognized arguments: --latnts"]), (("sample",), ["--sit, --out", "--help"]), (("data", "draw"), ["'draw'"]),
                           (("vae", "--precision", "fp8"), ["'fp8'"]), (("vae", "--workers", -1), ["--workers", "'-1'"]), (("data", "avatars", "x", "--seed", -1), ["--seed", "'-1'"]), (("fid", "score"), ["required"]), (("probe",), ["required"])):
        assert_refused(call(*command), *words)
