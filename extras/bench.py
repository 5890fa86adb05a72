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


def cpu_name():
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
