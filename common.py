"""What every script shares and no reader needs in order to understand the method: errors, processes,
precision, files, checkpoints, the training run.

A training script is flat: its loop shows forward, losses, backward, clip, step and EMA, and everything else
stands behind one object of this file:

    run = common.Run(args, "vae.pt", advice)               # processes, device, precision, lock
    ...models, optimisers...
    if not run.resume(dict(vae=vae, ...), inputs, record): # the newest checkpoint, if there is one
        return                                             # nothing is left to do
    for step, batch in run.steps(batches, name_images):    # what is left of --steps
        ...one optimiser step...
        run.after_step(losses)                             # finite? log? save? draw? stop?
"""
import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tokenize
import zipfile
import zlib
from datetime import timedelta
from importlib import metadata
from pathlib import Path

# large memory pages for PyTorch on the CPU; read at its first allocation
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# torch.load runs no pickled code in any library that is used here
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # its opposite: the two together are an error

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image, PngImagePlugin  # noqa: E402
from torch.utils._pytree import keystr, tree_flatten_with_path  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# Errors: a user's mistake is one line and status 2


class UserError(ValueError):
    """A user's mistake or a machine's limit; scripts print it as one line and exit with status 2."""


class DamagedFile(UserError):
    """A file whose content is not what was written."""


# What readers raise on torn, flipped, foreign or code-carrying content, and what they raise in all
BROKEN = (EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError,
          SyntaxError, RecursionError, tokenize.TokenError, struct.error, pickle.UnpicklingError,
          safetensors.SafetensorError, zipfile.BadZipFile, zlib.error)
DAMAGED = (*BROKEN, OSError, RuntimeError, MemoryError)
# errors of the system that tell of a file
OF_A_FILE = (None, errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ENOTDIR)
HINTS = {errno.ENOSPC: "free space", errno.EDQUOT: "free space",
         errno.EMFILE: "raise the limit of open files (ulimit -n 65536) or use fewer --workers"}


def of_the_machine(error, of_a_file=OF_A_FILE):
    """Whether an error in reading a file tells of the machine (memory, disk, rights), not of its content."""
    if isinstance(error, OSError):
        return error.errno not in of_a_file
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def damage(error, text):
    """UserError with this text for an error in reading content; an error of the machine as it is."""
    return error if of_the_machine(error) else UserError(text)


def brief(error, most=120):
    """The text of an exception on one line, cut."""
    return " ".join(str(error).split())[:most]


def one_line(text, most=1500):
    """Text for a terminal, whatever a file put into it: no line breaks, no control characters, no
    megabytes."""
    text = text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def explain(error):
    """One line for an error that is the user's or the machine's; None for one of the code."""
    text, again = " ".join(str(error).split()), "run the same command again"
    if isinstance(error, UserError):
        return one_line(str(error))
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {text or 'SIGINT'}; what was written before is intact; {again}"
    no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if no_memory or any(w in text for w in ("allocate memory", "bad_alloc", "out of memory")):
        kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return (f"out of {kind} ({text[:200]}); use a smaller --micro-batch where the script has it: "
                "the result stays the same (except with --disc-ckpt)")
    if isinstance(error, OSError):
        number = errno.ENOSPC if "requested and" in text else error.errno  # NumPy's words for a full disk
        hint = HINTS.get(number, "mend that or choose another folder")
        return (f"{error.filename or 'reading or writing'}: {error.strerror or text}; what was written "
                f"before is intact; {hint}, then {again}")
    if isinstance(error, RuntimeError) and ("DataLoader worker" in text or "ancdata" in text):
        return (f"a process that reads images was lost ({text[:200]}): out of memory, of /dev/shm or of open "
                f"files (ulimit -n); use fewer --workers, then {again}")
    lost = isinstance(error, RuntimeError) and any(w in text for w in ("gloo", "NCCL", "Connection"))
    if dist.is_initialized() and (isinstance(error, dist.DistError) or lost):
        return (f"rank {dist.get_rank()}: another process of this run is lost or does not answer (its own "
                f"message, or torchrun's, says why); the last checkpoint is intact; {again} "
                f"({text.rpartition('] ')[2][:100]})")
    return None


def interrupt(number, _):
    raise KeyboardInterrupt(signal.Signals(number).name)


def run_script(main):
    """Run main(); what explain() knows ends in one line on stderr and exit status 2, a signal in 128 and its
    number."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        commit()  # of the code that runs, not of what it may be changed to meanwhile
        main()
    except (Exception, KeyboardInterrupt) as e:
        message, status = explain(e), 2
        if message is None:
            raise
        if isinstance(e, KeyboardInterrupt):  # "SIGTERM; saved at step 7"
            status = 128 + getattr(signal, str(e).partition(";")[0], signal.SIGINT)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    finally:
        # other ranks may still write: the lock goes with the process
        for f in [] if dist.is_initialized() else [*CLAIMS]:
            release(f)
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    # do not wait for ranks that wait in a collective
    os._exit(status) if dist.is_initialized() else sys.exit(status)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it is written, and the defaults."""

    def add_argument(self, action):
        none = any(action.default is v for v in (None, False, argparse.SUPPRESS))
        if not none and "default" not in (action.help or ""):
            action.help = f"{action.help or ''} (default: %(default)s)".strip()
        super().add_argument(action)


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and help by HelpFormatter."""

    def __init__(self, **settings):
        super().__init__(formatter_class=HelpFormatter, **settings)

    def error(self, message):
        raise UserError(f"{self.prog}: {message} (--help lists the flags)")


class Range:
    """argparse type: an int or a float from `low` to `high`, both among them."""

    def __init__(self, kind, low, high):
        self.kind, self.low, self.high = kind, low, high

    def __call__(self, text):
        with contextlib.suppress(ValueError):
            value = self.kind(text)
            if self.low <= value <= self.high:  # nan is not
                return value
        kind = "a whole number" if self.kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r}; expected {kind} from {self.low:,} to {self.high:,}")


positive = Range(int, 1, 10 ** 9)  # counts
natural = Range(int, 0, 10 ** 9)  # and counts that may be 0
seed = Range(int, 0, 2 ** 32 - 1)  # further ones would meet other streams of noise (sample.STREAM)
side = Range(int, 1, 8192)  # in pixels
scale = Range(float, 0, 10 ** 9)  # weights of losses, learning rates, guidance
share = Range(float, 0, 1)
decay = Range(float, 0, 1 - 1e-7)  # of an average, which 1 would leave at its first value
norm = Range(float, 1e-9, math.inf)  # inf: gradients are not clipped
layer = Range(int, -999, 999)  # of a network, which knows how many it has


def npz_name(text):
    """argparse type of an .npz to write: what reads it knows it by its name."""
    if Path(text).suffix != ".npz":
        raise argparse.ArgumentTypeError(f"{text!r}; expected a name ending in .npz")
    return text


# ------------------------------------------------------------------------------------------------------------
# Processes and precision


def setup(deterministic=False):
    """(device, rank, world size): CUDA, else MPS, else CPU; a process group when torchrun started the script.
    deterministic: PyTorch's repeatable algorithms on CUDA; it warns of an operation that has none."""
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
        # one node: torchrun's restarts share a store with dead addresses in it
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # gloo: tensors on the CPU never wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=2))
    return device, rank, world


def keep_memory(device):
    """glibc gives large freed blocks back, and each step of a CPU pays for their pages anew: keep them."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def fast_precision(device):
    """bf16 where matrix units for it exist (CUDA Ampere and later, AVX512-BF16, AMX), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    units = (getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return "bf16" if device.type == "cpu" and any(units) else "fp32"


def autocast(device, precision):
    """bf16 for matmuls and convolutions; weights, losses and KL stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cast_matmuls(module, device, precision):
    """A frozen network's matmuls and convolutions in bf16, as autocast would cast them in each pass."""
    for m in module.modules() if precision == "bf16" else ():
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
            m.to(torch.bfloat16)
    return module.to(device)


def all_reduce(x, op=None):
    """Sum (or `op`) of a tensor over all ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(x, op or dist.ReduceOp.SUM)
    return x


def barrier():
    all_reduce(torch.zeros(1))


@contextlib.contextmanager
def rank_zero_first():
    """The first process may download; the others then find its copy."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank:
        barrier()
    try:
        yield
    finally:  # the others do not wait for a first one that failed
        if not rank:
            barrier()


def sync_if(module, last):
    """Gradients travel between processes with the last micro-batch only."""
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()


def split_rows(n, rank, world):
    """The contiguous slice of range(n) that belongs to a rank; the slices are disjoint and cover all rows."""
    return range(n * rank // world, n * (rank + 1) // world)


def chunks(rows, size):
    """A sequence of rows -> lists of at most `size` of them, in order."""
    return [list(rows[i:i + size]) for i in range(0, len(rows), size)]


def to_host(x):
    """A tensor on its way to the CPU -> a function that waits for it and returns it."""
    if x.device.type != "cuda":
        return lambda: x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return lambda: (arrived.synchronize(), host)[1]


def one_behind(items):
    """The same items, each after the next was begun: a GPU computes the next while this one is stored."""
    held = None
    for item in items:
        if held is not None:
            yield held
        held = item
    if held is not None:
        yield held


# ------------------------------------------------------------------------------------------------------------
# Files


def command():
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@functools.lru_cache
def commit():
    """The commit of the code, with "-dirty" when files differ from it; None outside a git repository."""
    here = str(Path(__file__).resolve().parent)
    words = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    fork = Path(here, "FORK")  # run.sh writes it beside a copy with a patch of forks/
    fork = f"+{fork.read_text().strip()}" if fork.exists() else ""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip() + fork
    except (OSError, subprocess.SubprocessError):
        return None


def made():
    """What every output says of its making: command, commit, versions, processor."""
    packages = {p: metadata.version(p) for p in ("torch", "numpy", "pillow", "timm")}
    versions = dict(python=platform.python_version(), **packages)
    return dict(command=command(), commit=commit(), versions=versions, cpu=cpu_name())


def without_folders(text):
    """A text to publish: names of files, without this machine's folders."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/\"]+/)+", "", text)


def cpu_name():
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


CLAIMS = []  # open files that stand for the outputs of this process


def claim(path, flag="--out"):
    """Refuse a second run in one place: hold a lock on the file `path` until the script ends. The system
    drops it with the process, however that ends. Raises UserError, which names the owner."""
    if any(os.path.exists(path) and os.path.samestat(os.fstat(f.fileno()), os.stat(path)) for f in CLAIMS):
        raise UserError(f"{flag} {Path(path).parent}: this run writes something else there already; choose "
                        "another folder")
    while True:
        f = open(str(path), "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"{path}: this file system has no locks ({e.strerror}); nothing will stop a second run "
                      "in the same place", file=sys.stderr)
                return None
            f.seek(0)
            owner, _, what = f.read().strip().partition(": ")
            raise UserError(f"{path}: in use by {owner or 'another process'}; wait for it, stop it, or "
                            f"choose another {flag} (it runs {what[:200]})") from None
        if os.path.exists(path) and os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
            break  # else its owner has just deleted it
    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H.%M')}: "
            f"{command()}\n")
    f.flush()
    CLAIMS.append(f)
    return f


def release(f):
    """End a claim()."""
    if f in CLAIMS:
        CLAIMS.remove(f)
        with contextlib.suppress(FileNotFoundError):
            # if its file was deleted before, this name is another owner's by now
            if os.path.samestat(os.fstat(f.fileno()), os.stat(f.name)):
                os.unlink(f.name)
        f.close()


def open_out(folder, need_bytes=0, flag="--out"):
    """Make an output folder. Raises OSError where it cannot be written, UserError where the disk lacks
    `need_bytes`; that names the `flag`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        e.filename = str(folder)
        raise
    free = shutil.disk_usage(folder).free
    if need_bytes > free:
        raise UserError(f"{folder}: needs {need_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
                        f"free space or choose another {flag}")
    return folder


def open_file(path, flag):
    """Make the folder of a file that will be written. Raises as open_out()."""
    open_out(Path(path).parent, flag=flag)
    if Path(path).is_dir():
        raise UserError(f"{flag} {path}: is a folder; expected the name of a file")


def sync(path):
    """A file's content, or a folder's names, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        # some network file systems know no fsync of a folder
        if e.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path, before=None):
    """`path` appears whole or not at all: yields another name to write to. before: a name for the old one."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it may fill the disk
        raise
    if before and os.path.exists(path):
        os.replace(path, before)
    os.replace(temporary, path)
    sync(temporary.parent)


def write_text(path, text):
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path, record):
    """A JSON file that says how it was made."""
    write_text(path, json.dumps(dict(record, made=made()), indent=1) + "\n")


def read_json(path, kind=dict):
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"holds a {type(found).__name__}")
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage before (bash run.sh runs them all)") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not the JSON that a stage wrote ({e}); delete it and run that stage "
                        "again") from None


def save_png(image, path):
    """A PIL image as PNG that says how it was made (in its text chunk "made")."""
    info = PngImagePlugin.PngInfo()
    info.add_text("made", json.dumps(made()))
    with whole_file(path) as temporary:
        image.save(temporary, "png", pnginfo=info)


def save_grid(images, path, columns):
    """uint8 (N, 3, H, W) -> one PNG with `columns` images a row."""
    n, _, h, w = images.shape
    sheet = torch.full((-(-n // columns) * columns, 3, h, w), 255, dtype=torch.uint8)
    sheet[:n] = images
    sheet = sheet.view(-1, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, 3)
    save_png(Image.fromarray(sheet.numpy()), path)


def check_zip(path, checksums=False):
    """Refuse a zip file that unpacks to more than a gibibyte and a hundred times its size (a bomb), and, when
    asked to, one whose content is not what its checksums say. Raises ValueError."""
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


def write_npz(path, **arrays):
    """An uncompressed .npz; memory maps are streamed, without a copy in memory."""
    with whole_file(path) as part, open(part, "wb") as f:
        np.savez(f, **arrays)


# Arrays on disk that several processes fill in, row by row


def new_array(path, dtype, shape):
    """A .npy file of zeros that has its place on disk: a full one would end a memory map in a bus error."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as f:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)


def begin_rows(mark, settings, files):
    """Arrays on disk for RowFiles: files {path: (dtype, shape)}, the last of uint8 says which rows are there.
    They are made anew, unless the JSON file `mark` says that they are of the same settings -> whether they
    were there."""
    mark = Path(mark)
    # an error of the machine must not end in files made anew
    with contextlib.suppress(FileNotFoundError, *BROKEN):
        found = json.loads(mark.read_text())
        found.pop("made")
        arrays = [np.load(p, mmap_mode="r", allow_pickle=False) for p in files]
        fits = [(a.dtype, a.shape) for a in arrays] == [(np.dtype(d), tuple(s)) for d, s in files.values()]
        if fits and found == json.loads(json.dumps(settings)):
            return True
    if mark.exists():
        print(f"{mark}: of other settings, or damaged; begun anew", file=sys.stderr)
        mark.unlink()
    for path, (dtype, shape) in files.items():
        new_array(path, dtype, shape)
    write_json(mark, settings)  # last: without it the others do not count
    return False


def open_rows(name, mark, lock, settings, files, rank, spare=0, flag="--out"):
    """RowFiles of begin_rows(), new or of a stopped run. Called by all ranks; the first one makes them, and
    holds the lock from then on. name: of the output, for messages; spare: bytes that the disk must have
    beside."""
    if rank == 0:
        size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in files.values())
        there = sum(os.stat(p).st_blocks * 512 for p in files if os.path.exists(p))
        open_out(Path(mark).parent, need_bytes=size + spare - there, flag=flag)
        lock = claim(lock, flag)
        if begin_rows(mark, settings, files):
            done = np.load(list(files)[-1], allow_pickle=False)
            print(f"{name}: going on, {np.count_nonzero(done == 1)} of {len(done)} images are there")
    barrier()
    return RowFiles(*files, lock=lock)


class RowFiles:
    """Arrays on disk that processes fill in row by row, in any order; a stopped run goes on."""

    EVERY = 2  # seconds between marks

    def __init__(self, *files, mode="r+", lock=None):
        self.lock = lock  # the claim() on them, for release()
        *self.arrays, self.done = (np.load(p, mmap_mode=mode, allow_pickle=False) for p in files)
        self.pending, self.flushed = [], time.time()

    def missing(self, rank, world):
        """This rank's share of the rows that are not there. Called by all ranks, before anyone stores."""
        rows = np.flatnonzero(self.done == 0)
        barrier()
        return rows[split_rows(len(rows), rank, world)].tolist()

    def put(self, rows, *values):
        """Store the values of these rows; every few seconds mark what is then safe on disk."""
        for array, value in zip(self.arrays, values):
            array[rows] = value
        self.pending += rows
        if time.time() > self.flushed + self.EVERY:
            self.flush()

    def flush(self):
        for array in self.arrays:
            array.flush()
        self.done[self.pending] = 1
        self.done.flush()
        self.pending, self.flushed = [], time.time()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def weights_hash(state_dict):
    """16 hex digits that name a set of weights: sha256 over names, shapes and values (float32)."""
    h = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().float().cpu().contiguous()
        h.update(f"{name}{tuple(value.shape)}".encode())
        h.update(value.numpy().tobytes())
    return h.hexdigest()[:16]


def save_checkpoint(path, state):
    """Write `path` so that a kill at any moment leaves a whole checkpoint; the one before stays as
    NAME.prev.pt. Raises UserError for a value that is not finite, OSError for a disk that fails, and leaves
    both as they are."""
    path = Path(path)
    bad = [keystr(k) for k, v in tree_flatten_with_path(state)[0]
           if isinstance(v, torch.Tensor) and v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise UserError(f"{path}: not saved, {bad[0]} is not finite ({len(bad)} such tensors); the "
                        "checkpoint before it is intact; begin anew with another --out and a smaller --lr")
    try:
        with whole_file(path, before=path.with_suffix(".prev.pt")) as part, open(part, "wb") as f:
            torch.save(dict(state, made=made()), f)
    except (OSError, RuntimeError) as e:
        cause = e.__context__ if isinstance(e, RuntimeError) else e  # torch.save hides the system's error
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        cause.filename = str(path)
        raise cause from None


# What other projects pickle beside their weights (settings, Lightning's callbacks, counters): read as
# nothing, never imported
BYSTANDERS = ("argparse.", "builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str",
              "collections.", "ldm.", "lightning.", "numpy.", "omegaconf.", "pathlib.", "pytorch_lightning.",
              "typing.")


class Placeholder:
    """Stands for an object of another project's class: takes any arguments and state, and does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


def load_checkpoint(path):
    """Tensors of a .safetensors or torch file, on the CPU; runs no pickled code. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        kind = "a folder, expected a checkpoint file" if path.is_dir() else "no such checkpoint"
        raise UserError(f"{path}: {kind}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            check_zip(path, checksums=True)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        else:
            foreign = ["argparse.Namespace"]
        strange = [name for name in foreign if not name.startswith(BYSTANDERS)]
        if strange:
            raise UserError(f"{path}: not a readable checkpoint: it holds {strange[0]}, which is no weight; "
                            "pickled code is never run")
        with torch.serialization.safe_globals([(Placeholder, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except DAMAGED as e:
        text = f"{type(e).__name__}: {' '.join(str(e).split())[-120:]}"
        if of_the_machine(e):
            raise UserError(f"{path}: cannot be read now ({text})") from None
        before = path.with_suffix(".prev.pt")
        hint = f"; the one before it is {before}" if before.exists() and before != path else ""
        raise DamagedFile(f"{path}: not a readable checkpoint (cut, damaged, or not written by torch.save: "
                          f"{text}){hint}") from None


def load_newest(path):
    """The checkpoint `path`, or the one kept before it when the newest is missing or damaged; None when there
    is neither. Called by all ranks; the first one chooses. A damaged file is renamed, lest the next save puts
    it in the place of the good one."""
    path, found, choice, damaged = Path(path), None, 0, {}
    rank, places = dist.get_rank() if dist.is_initialized() else 0, [path, path.with_suffix(".prev.pt")]
    for p in [p for p in places if p.exists()] if rank == 0 else ():
        try:
            found, choice = load_checkpoint(p), 1 + places.index(p)
            break
        except DamagedFile as e:
            damaged[p] = one_line(str(e))
    if damaged and found is None:
        raise UserError(f"{'; '.join(damaged.values())}; no checkpoint is left to go on from; begin anew "
                        "with another --out")
    for p, reason in damaged.items():
        print(f"{reason}; going on from {places[1]}, the damaged file is now {p.with_suffix('.damaged')}",
              file=sys.stderr)
        os.replace(p, p.with_suffix(".damaged"))
    choice = int(all_reduce(torch.tensor(choice)))
    return load_checkpoint(places[choice - 1]) if choice and rank else found


def load_weights(module, state, source):
    """Strict load_state_dict; names the first missing, unexpected or misshapen key and both shapes."""
    want, have = ({k: tuple(v.shape) for k, v in s.items()} for s in (module.state_dict(), state))
    wrong = [f"{k} is {have.get(k, 'missing')}, expected {want.get(k, 'none')}" for k in want | have
             if have.get(k) != want.get(k)]
    if wrong:
        raise UserError(f"{source}: does not fit {type(module).__name__}: {wrong[0]} ({len(wrong)} such "
                        "entries)")
    bad = [k for k, v in state.items() if not v.isfinite().all()]
    if bad:
        raise UserError(f"{source}: {bad[0]} holds NaN or infinity ({len(bad)} such tensors)")
    module.load_state_dict(state)


# Flags that may change between the first and the second half of a run without changing what it computes. What
# files hold is compared by its hash (inputs): a folder may move
FREE_FLAGS = {"out", "data", "latents", "init", "vfm_ckpt", "lpips_ckpt", "disc_ckpt", "steps", "micro_batch",
              "workers", "save_every", "log_every", "compile", "eval_every", "eval_stats", "eval_images",
              "eval_steps", "grad_checkpointing", "deterministic", "sample_every", "log_to"}


def same_run(checkpoint, args, path, inputs):
    """Refuse to resume `path` under other settings than it was begun with, or on other inputs: {name: hash or
    None}, the names those of the flags."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("args"), dict):
        raise UserError(f"{path}: not a checkpoint of this script; choose another --out")
    # a schedule that ends at --steps cannot be extended
    fixed = {"steps"} if getattr(args, "lr_decay", 0) else set()
    fixed |= {"micro_batch"} if getattr(args, "disc_ckpt", None) else set()  # batch norm sees the split
    for name, value in vars(args).items():
        if name not in checkpoint["args"] and (not value or name == "align"):
            continue  # a flag that is younger than the run; lambda tells the arms apart
        before = checkpoint["args"].get(name)
        if name == "cache_vfm":  # its folder may move
            before, value = bool(before), bool(value)
        if name not in FREE_FLAGS - fixed and before != value:
            raise UserError(f"{path} was begun with --{name.replace('_', '-')} {before}, this command says "
                            f"{value}; use the same settings to go on, or another --out to begin anew")
    known = checkpoint.get("inputs", {})
    for name, value in inputs.items():
        if known.get(name, value) != value:
            raise UserError(f"{path} was begun with other content of --{name.replace('_', '-')} "
                            f"{getattr(args, name)} (hash {known[name]}, now {value}); bring that back to go "
                            "on, or choose another --out to begin anew")


# ------------------------------------------------------------------------------------------------------------
# Weights by name: a repository of huggingface's hub in the place of a path

WEIGHTS = ".safetensors", ".ckpt", ".pt", ".pth", ".bin"


def local_path(text):
    """A path as it is; of a hub id, `org/name` or `org/name:file`, that is no path here, the path of its
    weights in huggingface's cache, to which the first process downloads what is missing. Raises UserError for
    what cannot be had."""
    repo, _, file = str(text).partition(":")
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) and not repo.endswith(WEIGHTS)
    if Path(text).exists() or not is_id or Path(repo).parent.is_dir():
        return Path(text)
    from extras import convert  # here, since few runs need the hub
    return convert.download(text, repo, file)


# ------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(args, step):
    """args.lr, times a linear warm-up over --lr-warmup steps, times (--lr-decay 1) half a cosine to 0."""
    warm = min(1.0, (step + 1) / args.lr_warmup) if args.lr_warmup else 1.0
    return args.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / args.steps) if args.lr_decay else 1.0)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + step) / (10 + step)): early averages are no noise."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


class Losses:
    """The losses of the steps since the last look. They stay on the device until then: only a look waits for
    it.

    Losses of single images are also summed by their time, in BINS equal parts of [0, 1], until by_time()."""

    BINS = 10

    def __init__(self, sums=None):
        self.rows, self.sums = [], np.array(np.zeros((2, self.BINS)) if sums is None else sums)

    def add(self, step, parts, each=None, t=None):
        """parts: {name: scalar tensor of this rank}; each (B,): a number of each of its images that shows
        whether it is finite; with their times t (B,) its loss."""
        values = torch.stack([v.detach().float() for v in parts.values()])
        self.rows.append((step, list(parts), values, each, t))

    def look(self, name_images, advice):
        """{name: float} of the last step, means over ranks. Raises UserError for the first step since the
        last look with a value that is not finite; name_images(step, places in the global batch) names the
        images that are not."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        means = all_reduce(torch.cat([row[2] for row in self.rows])) / world
        means = means.cpu().split([len(row[1]) for row in self.rows])
        self.sum_by_time()
        for (step, names, _, each, _), row in zip(self.rows, means):
            parts = dict(zip(names, row.tolist()))
            bad = [k for k, v in parts.items() if not np.isfinite(v)]
            if bad:
                flags = torch.zeros(world, 0 if each is None else len(each))
                if each is not None:
                    flags[rank] = (~each.detach().isfinite()).float().cpu()
                places = all_reduce(flags).flatten().nonzero()[:, 0].tolist()  # in the global batch
                names = name_images(step - 1, places[:8])
                images = ", ".join(f"{p} ({name})" for p, name in zip(places, names))
                images = f"; {len(places)} of the batch's images, {images}" if places else ""
                values = ", ".join(f"{k} {v:.4g}" for k, v in parts.items())
                raise UserError(f"step {step}: {', '.join(bad)} not finite ({values}){images}; the last "
                                f"checkpoint is intact; begin anew with another --out and {advice}")
        self.rows = []
        return parts

    def sum_by_time(self):
        if self.rows[0][4] is None:
            return
        each, t = (torch.cat([row[k].detach().float() for row in self.rows]).cpu() for k in (3, 4))
        each, t = each[each.isfinite()], t[each.isfinite()]
        bins = (t * self.BINS).long().clamp(0, self.BINS - 1)
        sums = [torch.bincount(bins, w.double(), self.BINS) for w in (each, torch.ones_like(each))]
        self.sums += all_reduce(torch.stack(sums)).numpy()

    def by_time(self):
        """[mean loss of the images in each time bin since the last call], None where there were none."""
        means = [float(f"{a / n:.6g}") if n else None for a, n in self.sums.T]
        self.sums[:] = 0
        return means


class Log:
    """metrics.jsonl: the run's settings first, then one JSON object a line; a resumed run drops what came
    after its checkpoint, and says by which command it goes on (these lines stay). Only rank 0 writes.
    track: None, or what takes ({name: number}, step) too."""

    def __init__(self, path, step, settings, rank, track=None):
        self.path, self.rank, self.track, kept = Path(path), rank, track, []
        if rank:
            return
        before = self.path.read_text("utf-8", "replace") if step and self.path.exists() else ""
        for line in before.splitlines():
            with contextlib.suppress(*DAMAGED):  # a torn last line
                kept += [line] if json.loads(line).get("step", 0) <= step else []
        first = json.dumps(dict(settings, made=made()))
        write_text(self.path, "".join(line + "\n" for line in kept or [first]))
        if kept:
            self.write(resumed=made(), from_step=step)

    def write(self, **record):
        if not self.rank:
            record = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")
            if self.track and "step" in record:
                numbers = {f"{k}/{i}" if isinstance(v, list) else k: number for k, v in record.items()
                           for i, number in enumerate(np.ravel(v)) if number is not None and k != "step"}
                self.track(numbers, record["step"])


def import_tracker(name):
    """The module of --log-to. Raises UserError."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except (ImportError, TypeError, AttributeError) as e:  # the latter two: of other versions
        raise UserError(f"--log-to {name}: cannot be imported ({brief(e)}); pip install {name}, or leave the "
                        "flag out") from None


def open_tracker(module, out, step, settings):
    """The module of --log-to -> what takes ({name: number}, step) and what takes (picture (H, W, 3) uint8,
    step), or None twice. step: the checkpoint's; later numbers come again. Raises UserError."""
    if module is None:
        return None, None
    if hasattr(module, "SummaryWriter"):
        board = module.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        return (lambda numbers, step: [*(board.add_scalar(k, v, step) for k, v in numbers.items()),
                                       board.flush()],
                lambda picture, step: board.add_image("samples", picture, step, dataformats="HWC"))
    try:  # "auto": a run that was stopped goes on
        board = module.init(project="send-vae", dir=str(out), config=settings, resume="auto")
    except module.Error as e:
        raise UserError(f"--log-to wandb: {brief(e, 400)}") from None
    board.define_metric("*", step_metric="step")  # wandb's own steps cannot go back to the checkpoint's
    return (lambda numbers, step: board.log({**numbers, "step": step}),
            lambda picture, step: board.log({"samples": module.Image(picture), "step": step}))


def load_figure():
    """matplotlib's Figure; None, and a line that says so, where there is none."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as e:
        print(f"no curves.png is drawn ({brief(e)}): pip install matplotlib")


def draw_curves(Figure, log, path):
    """What a metrics.jsonl says over the steps, but for the speed, a panel each -> PNG."""
    records = [r for r in map(json.loads, log.read_text().splitlines()) if "step" in r]
    is_drawn = lambda k, v: isinstance(v, (float, list)) and k not in ("lr", "images_per_s", "seconds")
    names = dict.fromkeys(k for r in records for k, v in r.items() if is_drawn(k, v))
    down = -(-len(names) // 4)
    figure = Figure((14, 0.4 + 2.6 * down), layout="constrained")
    for i, name in enumerate(names):
        steps, values = zip(*[(r["step"], r[name]) for r in records if is_drawn(name, r.get(name))])
        axis = figure.add_subplot(down, 4, i + 1, title=name)
        axis.plot(steps, np.array(values, float), ".-", lw=0.8, markersize=3)  # velocity_t: a line a bin
    with whole_file(path) as part:
        figure.savefig(part, dpi=80, format="png", metadata=dict(made=json.dumps(made())))


def run_flags(p, save_every):
    """The flags of Run, for an argument parser."""
    on_gpu = torch.cuda.is_available()
    p.add_argument("--seed", type=seed, default=0, help="of weights, order and noise")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    p.add_argument("--deterministic", action="store_true",
                   help="equal bits in each run on CUDA too, slower (a CPU needs no flag)")
    p.add_argument("--compile", type=int, default=int(on_gpu), choices=(0, 1), help="1: torch.compile")
    p.add_argument("--workers", type=Range(int, 0, 256), default=4 if on_gpu else 0,
                   help="processes that read batches")
    p.add_argument("--save-every", type=positive, default=save_every, help="steps between checkpoints")
    p.add_argument("--log-every", type=positive, default=50, help="steps between lines of metrics.jsonl")
    p.add_argument("--log-to", choices=("tensorboard", "wandb"), help="numbers and samples go there too")
    p.add_argument("--sample-every", type=natural, default=500,
                   help="steps between pictures: samples/STEP.png, curves.png; 0: none")
    p.add_argument("--dry-run", action="store_true",
                   help="print the plan (parameters, tokens, steps, disk), and end; needs no frozen weights")


class Run:
    """A training run: processes, device, precision, one owner of --out, resume, log, checkpoints, signals.

    args: the script's flags, kept in the checkpoint. Raises UserError for a batch that the processes do not
    divide, a folder in use, other settings than the checkpoint's.
    """

    def __init__(self, args, name, advice):
        """name: of the checkpoint in --out; advice: what to change after losses that are not finite."""
        self.args, self.path, self.advice = args, Path(args.out) / name, advice
        self.device, self.rank, self.world = setup(args.deterministic)
        args.precision = args.precision or fast_precision(self.device)
        self.local = args.batch // self.world  # images of a step on this process
        self.micro = args.micro_batch or max(1, self.local)
        if args.batch % (self.world * self.micro):
            raise UserError(f"--batch {args.batch}: expected a multiple of {self.world} process(es) times "
                            f"--micro-batch {self.micro}")
        self.tracker = import_tracker(args.log_to) if args.log_to and self.rank == 0 else None
        other = self.path.with_name({"vae.pt": "sit.pt", "sit.pt": "vae.pt"}[name])
        there = [any(p.exists() for p in (f, f.with_suffix(".prev.pt"))) for f in (self.path, other)]
        if there == [False, True]:
            raise UserError(f"--out {args.out}: holds another stage's run ({other.name}); choose another "
                            "folder")
        if not args.dry_run:
            open_out(args.out)
            if self.rank == 0:
                claim(Path(args.out) / ".lock")
        self.step, self.seconds, self.losses = 0, 0.0, Losses()

    def resume(self, modules, inputs, record):
        """Go on from the newest checkpoint. modules: {name: what has a state_dict, or None}; inputs: {flag:
        hash of what it holds, or None}; record: what the checkpoint says beside them -> whether there are
        steps left."""
        self.modules, self.inputs, self.record = modules, inputs, record
        checkpoint = load_newest(self.path)
        if checkpoint is not None:
            same_run(checkpoint, self.args, self.path, inputs if self.rank == 0 else {})
            for name, module in modules.items():
                if isinstance(module, torch.nn.Module):
                    load_weights(module, checkpoint[name], f"{self.path}, {name}")
                elif module is not None:
                    module.load_state_dict(checkpoint[name])
            self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
            self.losses = Losses((checkpoint.get("losses") or {}).get("sums"))
        if self.step >= self.args.steps:
            if self.rank == 0:
                print(f"{self.path}: already at step {self.step}")
            return False
        networks = [m for m in modules.values() if isinstance(m, torch.nn.Module)]
        optimizers = [m for m in modules.values() if isinstance(m, torch.optim.Optimizer)]
        weights = sum(p.numel() for m in networks for p in m.parameters())
        trained = sum(p.numel() for m in optimizers for group in m.param_groups for p in group["params"])
        there = sum(p.stat().st_size for p in (self.path, self.path.with_suffix(".prev.pt")) if p.exists())
        # three files: this one, the one before and the one being written; Adam keeps two moments a weight
        open_out(self.path.parent, need_bytes=3 * 4 * (weights + 2 * trained) - there)
        return True

    def steps(self, batches, name_images, draw=None):
        """Yield (step, batch) of each step that is left, counted from 0; after_step() must follow each.
        name_images(step, places in the global batch) -> names; draw() -> what the model can do, two rows of
        images, uint8 (N, 3, H, W): called by the first process alone."""
        settings, out = dict(vars(self.args), inputs=self.inputs), self.path.parent
        track, self.track_picture = open_tracker(self.tracker, out, self.step, settings)
        self.log = Log(out / "metrics.jsonl", self.step, settings, self.rank, track)
        self.signal = torch.zeros(1)  # the number of the signal that asks for a save and an end
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, lambda number, _: self.signal.fill_(number))
        self.since, self.seen, self.name_images = time.time(), 0, name_images
        self.draw, self.last, self.told = draw, {}, (self.since, self.step)
        self.figure = load_figure() if self.args.sample_every and self.rank == 0 else None
        with tqdm(total=self.args.steps, initial=self.step, disable=self.rank > 0 or None) as self.bar:
            for batch in batches:
                yield self.step, batch
        if self.rank == 0:
            print(f"{self.path}: step {self.step}, {self.last_losses()}{self.seconds:.0f} s")

    def last_losses(self):
        return "".join(f"{k} {v:.4g}, " for k, v in self.last.items())

    def tell(self):
        """Where there is no terminal for the bar: a line a minute."""
        now, (then, step) = time.time(), self.told
        if self.rank == 0 and self.bar.disable and now >= then + 60:
            rate, self.told = (self.step - step) / (now - then), (now, self.step)
            left = timedelta(seconds=round((self.args.steps - self.step) / rate))
            print(f"step {self.step} of {self.args.steps}, {self.last_losses()}{rate * self.args.batch:.1f} "
                  f"images/s, {left} left", file=sys.stderr, flush=True)

    def show(self):
        """samples/STEP.png and curves.png, as of now."""
        begin, out = time.time(), self.path.parent
        if self.draw is not None:
            images, picture = self.draw(), open_out(out / "samples") / f"{self.step:06d}.png"
            save_grid(images, picture, columns=len(images) // 2)
            if self.track_picture:
                self.track_picture(np.asarray(Image.open(picture)), self.step)
        if self.figure is not None:
            draw_curves(self.figure, self.log.path, out / "curves.png")
        self.since += time.time() - begin  # no part of the training's speed

    def due(self, every, step=None):
        """Whether something that is done `every` so many steps is due after this step."""
        step = self.step if step is None else step
        return bool(every) and (step % every == 0 or step == self.args.steps)

    def after_step(self, losses, each=None, t=None, score=None):
        """Note the losses, {name: scalar tensor of this rank}, and of each of its images a number that shows
        whether it is finite (with times t: its loss). Then log, score, save, draw, and stop if a signal asked
        for it. score() -> {name: float}, for the log; only finite losses are followed by it."""
        args, rank = self.args, self.rank
        self.step += 1
        self.seen += args.batch
        self.losses.add(self.step, losses, each, t)
        self.bar.update()
        stopping = int(all_reduce(self.signal.clone(), dist.ReduceOp.MAX))  # on all ranks, or on none
        logs, saves, shows = (self.due(n) for n in (args.log_every, args.save_every, args.sample_every))
        if logs or saves or shows or stopping or score is not None:
            self.last = self.losses.look(self.name_images, self.advice)
        if logs:
            now = time.time()
            rate, self.seconds = self.seen / (now - self.since), self.seconds + now - self.since
            self.since, self.seen = now, 0
            by_time = {} if t is None else dict(velocity_t=self.losses.by_time())
            self.log.write(step=self.step, **self.last, **by_time, lr=learning_rate(args, self.step - 1),
                           images_per_s=round(rate, 1), seconds=round(self.seconds, 1))
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in self.last.items()}, refresh=False)
        if score is not None:
            begin = time.time()
            self.log.write(step=self.step, **score())
            self.since += time.time() - begin  # no part of the training's speed
        if (saves or stopping) and rank == 0:
            state = {k: m and m.state_dict() for k, m in self.modules.items()}
            state |= dict(self.record, args=vars(args), inputs=self.inputs, step=self.step,
                          seconds=self.seconds, losses=dict(sums=self.losses.sums.tolist()))
            save_checkpoint(self.path, state)
        if shows and rank == 0:
            self.show()
        self.tell()
        if stopping:
            barrier()  # no rank leaves, and takes the others with it, before the checkpoint is on disk
            raise KeyboardInterrupt(f"{signal.Signals(stopping).name}; saved at step {self.step}")
