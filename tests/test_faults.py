"""Slow tests: faults."""
import ast
import contextlib
import errno
import io
import multiprocessing.dummy
import operator
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    FP32, HERE, NAME, SLOW, VFM, assert_refused, assert_same_bits, assert_same_losses, call, command_line, do,
    do_on_ranks, encode_command, ended, fork, forked, metrics, on_ranks, ramp, run, sit_command,
    train_command, truncate, vae_command, write_images)
from PIL import Image

import common
import data
import fid
import sample
import train_vae
import vae
from common import UserError
from extras import convert, study

"""Kills, lost processes, full disks, exhausted memory, readers that hang, fuzzed files.

`python tests/soak.py` runs the long version of the kills and the fuzzing."""


# ------------------------------------------------------------------------------------------------------------
# Kills

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
            everything = io.BytesIO()
            original(state, everything)
            f.write(everything.getvalue()[:len(everything.getvalue()) // 2])
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = half
    return prepare


def killed_command(script, small, out):
    """A command of each stage that takes about a second."""
    if script == "vae":
        return encode_command(small, small / "images", out, "--flip", "--micro-batch", 1)
    if script == "sample":
        flags = "--images", 40, "--steps", 6, "--micro-batch", 1, *FP32
        return "sample", "--sit", small / "sit/sit.pt", *flags, "--out", out / "a.npz"
    return script, *train_command(script, small, out), "--steps", 12, "--save-every", 2, "--log-every", 3


# By stage: in the first step or row, in a checkpoint, between its renames, between the last files
IN_TRAINING = [die_in(common, "update_ema"), die_in_half_a_save(1), die_in_half_a_save(4),
               die_in(os, "fsync", 2, after=True), *(die_in(os, "replace", k) for k in range(2, 6))]
IN_RENAMES = [die_in(os, "replace", k, after=after) for k in range(1, 4) for after in (False, True)]
IN_ROWS = [die_in(common.RowFiles, "put"), die_in(common.RowFiles, "flush", 30),
           die_in(np.lib.format, "open_memmap", 2), *IN_RENAMES]
BAD_MOMENTS = {
    "train_vae": IN_TRAINING, "train_sit": IN_TRAINING,
    "vae": [*IN_ROWS, die_in(np, "save"), die_in(np, "savez", after=True)],
    "sample": [*IN_ROWS, die_in(common, "save_grid", after=True), die_in(common, "write_npz"),
               *(die_in(Path, "unlink", k, after=True) for k in (1, 2, 3))]}


def assert_same_output(script, a, b):
    """Two folders of killed_command() hold the same bits, and b nothing that a has not."""
    def plain(record):
        return {k: v for k, v in record.items() if k not in ("seconds", "images_per_s", "made")}

    def read(name):
        return [plain(common.read_json(folder / name)) for folder in (a, b)]

    if script in NAME:
        assert_same_bits(a / NAME[script], b / NAME[script])
        assert [plain(r) for r in metrics(a)[1]] == [plain(r) for r in metrics(b)[1]]
    elif script == "vae":
        for name in ("moments.npy", "labels.npy", "files.txt"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
        stats = [np.load(folder / "stats.npz") for folder in (a, b)]
        assert all(np.array_equal(stats[0][k], stats[1][k]) for k in ("mean", "std"))
        assert operator.eq(*read("meta.json"))
    else:
        one, two = np.load(a / "a.npz"), np.load(b / "a.npz")
        assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])
        assert np.array_equal(Image.open(a / "a.png"), Image.open(b / "a.png"))
        assert operator.eq(*read("a.json"))
    assert {p.name for p in b.iterdir()} == {p.name for p in a.iterdir()}


def what_is_stored(script, out):
    """What the next run must say that it goes on with ("" when nothing was stored)."""
    if script in NAME:
        places = out / NAME[script], (out / NAME[script]).with_suffix(".prev.pt")
        step = next((common.load_checkpoint(p)["step"] for p in places if p.exists()), 0)
        return "already at step 12" if step == 12 else f": step {step} of 12" if step else ""
    names = dict(vae=("done.npy", "unfinished.json", "meta.json"),
                 sample=("a.npz.done", "a.npz.run", "a.npz"))
    done, mark, result = (out / name for name in names[script])
    if result.exists() and (script == "vae" or not mark.exists()):
        return "already"
    return f"going on, {np.count_nonzero(np.load(done) == 1)} of 40 images are there" if mark.exists() else ""


def kill_rounds(script, small, folder, kills, terms, moments, seed=0):
    """Kill a stage with SIGKILL at these bad moments and at `kills` random ones, then `terms` times with
    SIGTERM; after each, the same command must go on with what was stored, and end with the bits of a run that
    was left alone. -> yields a line for each kill."""
    def often():
        common.RowFiles.EVERY = 0

    rng, whole, log = np.random.default_rng(seed), folder / "whole", folder / "log"
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    assert forked(*killed_command(script, small, whole), log=log)[0] == 0, log.read_text()
    seconds = time.time() - begin
    for k in range(len(moments) + kills + terms):
        out = folder / f"{k}"
        command = killed_command(script, small, out)
        number = signal.SIGTERM if k >= len(moments) + kills else signal.SIGKILL
        if k < len(moments):
            def prepare(moment=moments[k]):
                often()
                moment()
            where, status = f"bad moment {k}", ended(fork(*command, log=log, prepare=prepare))
        else:
            wait = rng.uniform(0.02, 0.95 * seconds)  # 20 ms: the child is there
            where, pid = f"{wait:.2f} s of {seconds:.2f}", fork(*command, log=log, prepare=often)
            time.sleep(wait)
            os.kill(pid, number)
            status = ended(pid)
        left = sorted(p.name for p in out.iterdir()) if out.exists() else []
        stored, printed = what_is_stored(script, out), log.read_text()
        if number == signal.SIGTERM:
            stopped = status == 128 + signal.SIGTERM and "error: stopped by SIGTERM" in printed
            assert status == 0 or stopped, (status, printed)
        again = forked(*command, log=log, prepare=often)
        assert again[0] == 0, (where, left, again)
        assert stored in again[2], (where, stored, again)
        assert_same_output(script, whole, out)
        shutil.rmtree(out)
        yield f"{script}: {number.name} at {where} (status {status}), left {left}"


@pytest.mark.parametrize("script", BAD_MOMENTS)
def test_kills(script, small, tmp_path):
    """After a kill (in a checkpoint, in the first step, between two files, anywhere) the same command ends
    with other bits, or not at all."""
    moments = BAD_MOMENTS[script][::2]
    lines = list(kill_rounds(script, small, tmp_path, 1, 1, moments))
    assert sum("status -9" in line for line in lines) >= len(moments)  # they did die there


def test_a_mended_image_is_encoded_after_all(small, tmp_path):
    """An image that could not be read before a stop stays out of the latents although it can be read now; or
    a kill among the last files changes them."""
    images, log = write_images(tmp_path / "images", 120, size=8), tmp_path / "log"
    good = (images / "a/010.png").read_bytes()

    def command(out):
        return encode_command(small, images, tmp_path / out, "--resolution", 8, "--micro-batch", 16)
    truncate(images / "a/010.png")
    do(*command("119"))
    for k in range(2, 5):
        assert forked(*command(f"killed{k}"), log=log, prepare=die_in(os, "replace", k))[0] == -9
        do(*command(f"killed{k}"))
        assert_same_output("vae", tmp_path / "119", tmp_path / f"killed{k}")
    (images / "a/010.png").write_bytes(bytes(len(good)))  # as long as it will be
    assert forked(*command("mended"), log=log, prepare=die_in(np, "save"))[0] == -9
    (images / "a/010.png").write_bytes(good)
    assert "going on, 119 of 120" in do(*command("mended"))
    assert len(data.load_latents(tmp_path / "mended").files) == 120


# ------------------------------------------------------------------------------------------------------------
# Processes that come and go

def elastic_command(script, small, out, *flags):
    return script, *train_command(script, small, out), *SLOW, *flags


@pytest.mark.parametrize("script", NAME)
def test_elastic(script, small, tmp_path):
    """A run of two processes cannot go on with one or four, or goes on with other data or losses."""
    do(*elastic_command(script, small, tmp_path / "whole", "--steps", 5))
    do_on_ranks(*elastic_command(script, small, tmp_path / "one", "--steps", 2), folder=tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    do(*elastic_command(script, small, tmp_path / "one", "--steps", 5))
    do_on_ranks(*elastic_command(script, small, tmp_path / "four", "--steps", 5), folder=tmp_path, ranks=4)
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
    """Train a SiT on two processes, kill one of them after the first checkpoint -> (status of torchrun, its
    stderr)."""
    command = elastic_command("train_sit", small, out, "--steps", steps, "--save-every", 5)
    words = command_line(*command, ranks=2)
    words.insert(3, f"--max-restarts={restarts}")
    process = subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while not (out / "sit.pt").exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60 if not restarts else 120)
    return process.returncode, err


def test_a_lost_rank_ends_the_others(small, tmp_path):
    """When one process dies the others wait for ever, do not say why, or the run cannot go on."""
    out = tmp_path / "out"
    status, err = lose_a_rank(small, out, 10 ** 9, restarts=0, victim=1)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status and "rank 0: another process of this run is lost" in line
    assert "run the same command again" in line
    assert "SIGKILL" in err  # torchrun names who died
    assert f'Traceback (most recent call last):\n  File "{HERE / "train_sit.py"}' not in err
    step = common.load_checkpoint(out / "sit.pt")["step"]
    run(*elastic_command("train_sit", small, out, "--steps", step + 2), ranks=2)
    do(*elastic_command("train_sit", small, tmp_path / "whole", "--steps", step + 2))
    assert_same_losses(tmp_path / "whole", out)


def test_torchrun_restarts(small, tmp_path):
    """torchrun --max-restarts does not bring a run back by itself after a process died."""
    status, err = lose_a_rank(small, tmp_path / "out", 60, restarts=1, victim=0)
    assert status == 0, err
    assert [r["step"] for r in metrics(tmp_path / "out")[1]] == list(range(1, 61))
    do(*elastic_command("train_sit", small, tmp_path / "whole", "--steps", 60))
    for a, b in zip(metrics(tmp_path / "whole")[1], metrics(tmp_path / "out")[1]):
        assert a["velocity"] == pytest.approx(b["velocity"], rel=1e-4)


def test_ranks_resume_from_one_checkpoint(small, tmp_path):
    """One rank falls back to an older checkpoint than the others, or an error of the machine is taken for
    damage."""
    out = tmp_path / "out"
    command = sit_command(small, out, "--save-every", 1)
    do(*command, "--steps", 3)
    before = (out / "sit.pt").read_bytes()

    def no_memory():
        def load(*_, **__):
            raise MemoryError
        torch.load = load
    first, second = on_ranks(*command, "--steps", 6, folder=tmp_path, second=no_memory)
    assert_refused(second, "cannot be read now", "MemoryError")
    assert_refused(first, "another process of this run is lost")
    assert (out / "sit.pt").read_bytes() == before and not (out / "sit.damaged").exists()
    truncate(out / "sit.pt")
    first, second = on_ranks(*command, "--steps", 6, folder=tmp_path)
    assert first[0] == second[0] == 0 and "step 2 of 6" in first[2]
    assert first[2].count("going on from") == 1 and "going on from" not in second[2]
    assert [r["step"] for r in metrics(out)[1]] == [1, 2, 3, 4, 5, 6]


def test_two_runs_in_one_place(small, tmp_path):
    """Two runs write into one folder; the refusal does not say who is there; or a dead owner keeps it."""
    commands = {script: killed_command(script, small, tmp_path / script) for script in BAD_MOMENTS}
    locks = {script: tmp_path / script / ".lock" for script in commands}
    repa = "--data", small / "images", "--repa", 0.5, *VFM
    cached = sit_command(small, tmp_path / "sit", *repa, "--steps", 1)
    commands["cache"] = *cached, "--cache-vfm", tmp_path / "tokens"
    commands["avatars"] = "avatars", tmp_path / "avatars", "--n", 5
    locks |= dict(sample=tmp_path / "sample/a.npz.lock", cache=tmp_path / "tokens/.lock",
                  avatars=tmp_path / "avatars.lock")
    for name, lock in locks.items():
        lock.parent.mkdir(exist_ok=True)
        reader, writer = os.pipe()
        owner = os.fork()
        if not owner:
            common.claim(lock)
            os.write(writer, b"x")
            time.sleep(1000)
        os.read(reader, 1)
        there = f"in use by process {owner} on {socket.gethostname()}"
        assert_refused(call(*commands[name]), lock, there, "choose another", "it runs ")
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        do(*commands[name])
        assert not lock.exists()
    both = call(*cached, "--cache-vfm", tmp_path / "both", "--out", tmp_path / "both")
    assert_refused(both, "--cache-vfm", "something else there already")
    # a run that works, not a lock alone
    for script, steps, sign in (("train_sit", 10 ** 9, "sit.prev.pt"), ("sample", 2000, "a.npz.run")):
        out = tmp_path / f"{script} at work"
        command, end = (*killed_command(script, small, out), "--steps", steps), time.time() + 60
        pid = fork(*command, log=tmp_path / "log")
        while not (out / sign).exists():
            assert time.time() < end
            time.sleep(0.01)
        assert_refused(call(*command), f"in use by process {pid}", f"{script}.py")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ------------------------------------------------------------------------------------------------------------
# Limits of the machine

def limit(name, value):
    """prepare() for fork(): a limit of the operating system."""
    return lambda: resource.setrlimit(getattr(resource, name), (value, value))


@pytest.mark.parametrize("script", NAME)
def test_a_file_size_limit(script, small, tmp_path):
    """A checkpoint that cannot be written ends in a traceback, or takes the one before it away."""
    out, log, name = tmp_path / "out", tmp_path / "log", NAME[script]
    command = script, *train_command(script, small, out), "--save-every", 1
    do(*command, "--steps", 2)
    before = (out / name).read_bytes()
    half = limit("RLIMIT_FSIZE", len(before) // 2)
    assert_refused(forked(*command, "--steps", 3, log=log, prepare=half), name, "File too large", "is intact")
    assert (out / name).read_bytes() == before
    assert {p.name for p in out.iterdir()} == {"metrics.jsonl", name, name.replace(".pt", ".prev.pt")}
    do(*command, "--steps", 4)
    do(script, *train_command(script, small, tmp_path / "whole"), "--steps", 4)
    assert_same_bits(tmp_path / "whole" / name, out / name)
    for other, result in (("vae", "meta.json"), ("sample", "a.npz")):
        command = killed_command(other, small, tmp_path / other)
        assert_refused(forked(*command, log=log, prepare=limit("RLIMIT_FSIZE", 50_000)), "File too large")
        assert not (tmp_path / other / result).exists()


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: disk(size or "ro") mounts it, or mounts it anew -> its folder."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def mount(options):
        options = f"remount,{options}" if mounted else options
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
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
    """A disk that fills up during a run ends it in a traceback or a bus error, or takes the last checkpoint;
    or the rerun is refused."""
    log, out = tmp_path / "log", disk("size=70m")  # the checkpoint is 30 MB, and a third does not fit
    command = sit_command(small, out, "--save-every", 1, "--steps", 4)
    full = forked(*command, log=log, prepare=lie_about_space)
    assert_refused(full, "sit.pt", "No space left on device", "free space", "is intact")
    assert common.load_checkpoint(out / "sit.pt")["step"] == 2 and not (out / "sit.pt.tmp").exists()
    assert_refused(forked(*command, log=log), "GiB are free")
    disk("ro")
    assert_refused(forked(*command, log=log), str(out), "Read-only file system")
    disk("rw,size=105m")  # room for the third, but not for three more
    assert forked(*command, log=log)[0] == 0, log.read_text()
    do(*sit_command(small, tmp_path / "whole", "--steps", 4))
    assert_same_bits(tmp_path / "whole/sit.pt", out / "sit.pt")
    for p in out.iterdir():
        p.unlink()
    disk("size=100k")
    for script in ("vae", "sample"):
        command = killed_command(script, small, out)
        assert_refused(forked(*command, log=log, prepare=lie_about_space), "No space left on device")
        assert not (out / "meta.json").exists() and not (out / "a.npz").exists()
    for p in out.iterdir():
        p.unlink()
    images, need = write_images(tmp_path / "images", 120, size=32), 120 * 2 * 8 * 8 * 8 * 2
    truncate(images / "a/010.png")  # its row is taken out, by a second copy
    disk(f"size={need * 3 // 2}")
    command = encode_command(small, images, out, "--flip")
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
        train_vae.VAELoss.forward = lambda *_, **__: torch.zeros(2 ** 34)  # 64 GiB
    out, log = tmp_path / "out", tmp_path / "log"
    do(*vae_command(small / "images", out, "--steps", 1))
    for flags in ((), ("--preset", "f8d4", "--out", tmp_path / "large")):
        result = forked(*vae_command(small / "images", out, "--steps", 3, *flags), log=log, prepare=starve)
        assert_refused(result, "out of memory", "--micro-batch")
    assert common.load_checkpoint(out / "vae.pt")["step"] == 1
    # NumPy's words, on a full disk
    assert "free space" in common.explain(OSError("1000000 requested and 12484 written"))
    gpu = common.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "out of GPU memory" in gpu and "--micro-batch" in gpu


@pytest.mark.parametrize("act,words", [
    (lambda: time.sleep(10 ** 6), ["no batch for 2 s", "python data.py check"]),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), ["was lost", "--workers"])], ids=["hangs", "dies"])
def test_a_reader_that_hangs_or_dies(act, words, small, tmp_path):
    """A worker that hangs is waited for for ever; one that dies ends in a traceback."""
    def prepare():
        def ill(path, size, read=data.read_image):
            if Path(path).name == "007.png":
                act()
            return read(path, size)
        data.read_image, data.WORKER_TIMEOUT = ill, 2
    command = vae_command(small / "images", tmp_path / "out", "--workers", 1, "--save-every", 1)
    do(*command, "--steps", 1)
    assert_refused(forked(*command, "--steps", 30, log=tmp_path / "log", prepare=prepare), *words)
    assert common.load_newest(tmp_path / "out/vae.pt")["step"] >= 1
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_open_files(workers, small, tmp_path):
    """Good images are skipped as unreadable when the machine has no more file descriptors, or there is a
    traceback."""
    def prepare():
        seen = []  # the first look is at the size, in the main process

        def opening(path, *args, normal=Image.open, **kwargs):
            seen.append(path)
            if "007" in str(path) and seen.count(path) > 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return normal(path, *args, **kwargs)
        Image.open = opening

    def low():  # no file can be opened at all
        free = os.dup(1)
        os.close(free)
        limit("RLIMIT_NOFILE", free)()
    command = vae_command(small / "images", tmp_path / "out", "--workers", workers, "--steps", 30)
    result = forked(*command, log=tmp_path / "log", prepare=prepare)
    assert_refused(result, "007.png", "Too many open files", "ulimit -n", "--workers")
    assert "skipped" not in result[2]
    result = forked(*command, "--out", tmp_path / "other", log=tmp_path / "log", prepare=low)
    assert_refused(result, "Too many open files", "ulimit -n")


# ------------------------------------------------------------------------------------------------------------
# Files

def bomb_png(width, height):
    """A PNG of a few bytes that unpacks to width x height white pixels (1 bit each)."""
    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * (-(-width // 8))
    lines = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def test_hostile_images(small, tmp_path):
    """A bomb is unpacked, a pipe waited for, a circle of links followed, NaN taken as a grey, or a name
    breaks files.txt."""
    images = write_images(tmp_path / "images", 400, size=32)
    (images / "a/000.png").write_bytes(bomb_png(20000, 20000))
    (images / "a/002.png").write_bytes(bomb_png(200000, 1))  # enlarged to 6,400,000 x 32
    (images / "a/004.png").unlink()
    os.mkfifo(images / "a/004.png")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(images / "a/005.tif")
    for link, target in (("a/loop", "a"), ("b/loop", "."), ("c/d", "d"), ("d/c", "c")):
        (images / link).parent.mkdir(exist_ok=True)
        (images / link).symlink_to(images / target)
    status, out, err = call("data", "check", images, "--size", 32)
    assert status == 0 and "397 images" in out and "4 unreadable" in out
    for name, word in (("000.png", "400000000 pixels"), ("002.png", "200000 x 1 pixels"),
                       ("004.png", "no regular file"), ("005.tif", "NaN")):
        (line,) = [line for line in err.splitlines() if f"a/{name}" in line]
        assert word in line
    assert len(data.find_images(images)) == 401  # no image twice
    (images / "a/gone.png").symlink_to(tmp_path / "nowhere")
    assert data.ImageFolder(images, 8).hash.isalnum()
    (images / "a/new\nline.png").write_bytes((images / "a/006.png").read_bytes())
    assert_refused(call(*encode_command(small, images, tmp_path / "out")), "new\\nline.png", "line break")
    os.rename(images / "a/new\nline.png", os.fsencode(images) + b"/a/\xff.png")
    assert_refused(call(*encode_command(small, images, tmp_path / "out")), "udcff.png", "not UTF-8")


def test_errors_of_the_machine_are_no_damage(small, tmp_path, monkeypatch):
    """A disk error while reading makes stored rows begin anew, puts a good checkpoint away, or makes images
    unreadable for good; or a file system without locks or folder syncs cannot be used at all."""
    files = {tmp_path / "a": (np.float16, (5, 2)), tmp_path / "done": (np.uint8, (5,))}
    assert common.begin_rows(tmp_path / "mark", {"x": 1}, files) is False
    store, images = common.RowFiles(*files), write_images(tmp_path / "images", 4)
    store.put([0, 3], np.ones((2, 2)))
    store.flush()
    for step in (1, 2):
        common.save_checkpoint(tmp_path / "x.pt", {"step": step})

    def raising(number, when=lambda *_: True, normal=None):
        def maybe(*args, **flags):
            if when(*args):
                raise OSError(number, os.strerror(number))
            return normal(*args, **flags)
        return maybe
    with monkeypatch.context() as m:
        m.setattr(np, "load", raising(errno.EIO))
        for read in (lambda: common.begin_rows(tmp_path / "mark", {"x": 1}, files),
                     lambda: data.load_latents(small / "latents")):
            with pytest.raises(OSError, match="Input/output"):
                read()
    for number in (errno.EIO, errno.EACCES):
        with monkeypatch.context() as m:
            m.setattr(torch, "load", raising(number))
            with pytest.raises(UserError, match="cannot be read now"):
                common.load_newest(tmp_path / "x.pt")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", raising(errno.EINVAL, lambda f: stat.S_ISDIR(os.fstat(f).st_mode), os.fsync))
        m.setattr(common.fcntl, "lockf", raising(errno.ENOLCK))
        common.write_json(tmp_path / "a.json", {})
        common.save_checkpoint(tmp_path / "x.pt", {"step": 2})
        assert common.claim(tmp_path / ".lock") is None
        m.setattr(os, "fsync", raising(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            common.write_json(tmp_path / "b.json", {})
        assert not list(tmp_path.glob("b.json*"))
    assert common.begin_rows(tmp_path / "mark", {"x": 1}, files)
    assert np.load(tmp_path / "done").tolist() == [1, 0, 0, 1, 0]
    assert common.load_newest(tmp_path / "x.pt")["step"] == 2
    with monkeypatch.context() as m:
        (images / "lost+found").mkdir()  # of root, on every disk
        scandir = os.scandir
        m.setattr(os, "scandir", raising(errno.EIO, lambda path: str(path).endswith("lost+found"), scandir))
        assert len(data.find_images(images)) == 4
        m.setattr(os, "scandir", raising(errno.EIO, lambda path: str(path).endswith("b"), scandir))
        with pytest.raises(OSError, match="Input/output"):
            data.find_images(images)
    for number in (errno.EIO, errno.ENOTCONN, errno.ESTALE):
        with monkeypatch.context() as m:
            m.setattr(Image, "open", raising(number))
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
    store.put([4])
    assert not store.done.any() and store.arrays[0][1:3].all()
    monkeypatch.setattr(np.memmap, "flush", lambda self: marks.append(store.done.tolist()) or flush(self))
    store.flush()
    assert marks == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 1]]  # at the flush of the rows, at that of the marks
    assert store.missing(0, 1) == [0, 3] and common.begin_rows(tmp_path / "mark", {}, files)
    assert not common.begin_rows(tmp_path / "mark", {"x": 1}, files)


def test_neighbours_that_are_unreadable(tmp_path):
    """Neighbouring bad files, few enough to be skipped, make rows of a batch vanish."""
    images = data.ImageFolder(write_images(tmp_path, 1200, size=4, classes=("",)), 4)
    for file in images.files[30:42]:
        (tmp_path / file).write_bytes(b"")
    batches = [list(range(k, k + 64)) for k in range(0, 192, 64)]
    for (pixels, _, kept), asked in zip(data.load_batches(images, batches, replace=True), batches):
        assert len(pixels) == 64 and kept == asked
    (tmp_path / images.files[50]).write_bytes(b"")
    with pytest.raises(UserError, match="13 of 1200"):
        list(data.load_batches(data.ImageFolder(tmp_path, 4), batches, replace=True))


def test_bad_input_in_a_process_of_its_own(small, tmp_path):
    """As in the fast tests, through the operating system: the status, one line on stderr, no traceback; also
    without a network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    for command, word in ((vae_command(tmp_path / "none", tmp_path), "no such folder"),
                          (vae_command(small / "images", tmp_path, "--lpips", 1), "--lpips-ckpt")):
        _, err = run(*command, status=2, **nowhere, TORCH_HOME=str(tmp_path / "torch"))
        assert_refused((2, "", err), word)


# ------------------------------------------------------------------------------------------------------------
# Fuzzing

def write_pictures(folder):
    """A small picture in every format and mode."""
    image, exif = Image.fromarray(ramp()), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera"
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp"):
        image.save(folder / f"{suffix}.{suffix}", **({} if suffix in ("gif", "bmp") else {"exif": exif}))
    Image.fromarray(ramp()[..., 0].astype(np.uint16) * 257).save(folder / "grey16.png")
    Image.fromarray(ramp()[..., 0].astype(np.float32)).save(folder / "floats.tif")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.quantize(4).save(folder / "palette.png")
    image.save(folder / "packed.tif", compression="tiff_lzw")
    image.convert("RGBA").save(folder / "alpha.png")
    return sorted(folder.iterdir())


def fuzz_seeds(small, folder):
    """What is fuzzed: kind -> (whole files, a function that reads one and may refuse it)."""
    rng, tables, latents = np.random.default_rng(0), folder / "tables", folder / "latents"
    (folder / "pictures").mkdir(parents=True)
    write_images(tables, 4, classes=("a",))
    (folder / "attributes.csv").write_text(
        "file,split,hat,red\na/000.png,train,1,0\na/001.png,val,,1\n\"a/002.png\",test,0,0\n")
    state = {"config": {"depth": 1, "x": [1, (2.5, "y")]}, "ema": {"w": torch.arange(30.0)}, "step": 3}
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state["ema"], folder / "safe.safetensors")
    stats = dict(mean=rng.normal(size=4), std=np.ones(4), mu=rng.normal(size=4), sigma=np.eye(4))
    np.savez(folder / "stats.npz", **stats)
    np.savez_compressed(folder / "samples.npz", arr_0=np.stack([ramp()] * 4), arr_1=np.arange(4))
    shutil.copytree(small / "latents", latents)
    shutil.copy(small / "sit/metrics.jsonl", folder)
    parts = [folder / f"part_{name}" for name in ("meta.json", "labels.npy", "files.txt", "stats.npz")]
    for p in parts:
        shutil.copy(small / "latents" / p.name.removeprefix("part_"), p)

    def read_table(path):
        shutil.copy(path, tables / "attributes.csv")
        data.read_attributes(tables)

    def read_checkpoint(path):
        def read_sit(path):
            return sample.read_sit(path, "ema")

        for read in (common.load_checkpoint, common.load_newest, vae.load_vae, read_sit):
            with contextlib.suppress(UserError):
                read(path)
        common.load_checkpoint(path)

    def read_npz(path):
        with contextlib.suppress(UserError):
            convert.read_stats(str(path), 4)
        source = fid.load_source(path)
        if source.n:
            source.read([0])

    def read_latents(path):
        shutil.copy(path, latents / path.name)
        try:
            found = data.load_latents(latents)
            found.moments[0], found.labels[0]
        finally:
            shutil.copy(small / "latents" / path.name, latents / path.name)

    def read_log(path):
        common.Log(path, 5, {}, rank=0)
        study.last_seconds(path)

    def files(*names):
        return [folder / name for name in names]

    return {"image": (write_pictures(folder / "pictures"), lambda p: data.read_image(p, 16)),
            "table": (files("attributes.csv"), read_table), "latents": (parts, read_latents),
            "checkpoint": (files("zip.pt", "legacy.pt", "safe.safetensors"), read_checkpoint),
            "npz": (files("stats.npz", "samples.npz"), read_npz), "log": (files("metrics.jsonl"), read_log),
            "json": ([small / "latents/meta.json"], common.read_json)}


HUGE = [b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"9999", b"\0\0\0\0", b"-1,,"]


def mutated(draw, whole, others):
    """Bytes of a file, damaged as hypothesis wills: bytes changed, cut out, inserted, repeated, a number made
    huge, a part of another file."""
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
            content[at:at + 4] = draw(st.sampled_from(HUGE))
        elif how == "splice":
            content[at:at + n] = draw(st.sampled_from(others))[at:at + n]
        else:
            content[at:at + (n if how == "change" else 0)] = draw(st.binary(min_size=1, max_size=16))
    return bytes(content)


def fuzz(seeds, folder, examples):
    """Read `examples` damaged files of a kind -> how many were read and refused. Any other error, 20 s for
    one file, or a new file beside those being read is a failure."""
    files, read = seeds
    contents, counts = [p.read_bytes() for p in files], Counter()
    health = list(hypothesis.HealthCheck)

    def too_long(*_):
        raise AssertionError("hangs")

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                         suppress_health_check=health)
    @hypothesis.given(st.data())
    def one(choice):
        i = choice.draw(st.integers(0, len(files) - 1))
        path = folder / files[i].name.removeprefix("part_")
        path.write_bytes(mutated(choice.draw, contents[i], contents))
        before = {*folder.rglob("*"), path.with_suffix(".damaged")}
        signal.alarm(20)
        try:
            read(path)
            counts["read"] += 1
        except (UserError, OSError, MemoryError) as e:
            line = common.explain(e)  # what a script prints
            assert line.isprintable() and len(line) < 2000
            counts["refused"] += 1
        finally:
            signal.alarm(0)
        assert {*folder.rglob("*")} <= before, "wrote a file"
        path.with_suffix(".damaged").unlink(missing_ok=True)

    handler, there = signal.signal(signal.SIGALRM, too_long), sorted(Path.cwd().iterdir())
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert sorted(Path.cwd().iterdir()) == there
    return counts


@pytest.mark.parametrize("kind", ["image", "table", "checkpoint", "npz", "latents", "json", "log"])
def test_fuzz(kind, small, tmp_path, monkeypatch):
    """A damaged file ends in a traceback, a hang, or a file in another place."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "read").mkdir()
    seeds = fuzz_seeds(small, tmp_path / "seeds")
    monkeypatch.chdir(tmp_path / "cwd")
    counts = fuzz(seeds[kind], tmp_path / "read", 100)
    assert counts["refused"] > 5 and counts["read"] > 1, counts


def test_every_reader_is_a_safe_one():
    """A torch.load or np.load in the code leaves pickles to chance."""
    calls, never = [], ("pickle.load", "pickle.loads", "eval", "exec", "os.system")
    for path in [*HERE.glob("*.py"), *HERE.glob("extras/*.py")]:
        for node in ast.walk(ast.parse("" if path.name.startswith("test_") else path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in never, f"{path}:{node.lineno}"
            if name in ("torch.load", "np.load", "torch.hub.load_state_dict_from_url"):
                flags = [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords]
                assert {"allow_pickle=False", "weights_only=True"} & {*flags}, f"{path}:{node.lineno}"
                calls.append(name)
    assert len(calls) > 8
