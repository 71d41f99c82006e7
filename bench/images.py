#!/usr/bin/env python3
"""Compares image work: highwater against qemu-img, in turns on the same files.

    bench/images.py --highwater target/release/highwater [--rounds 5] [--size 2G] [--mode MODE] [--json FILE] [CASE ...]

The source holds half data (text-like, so that it compresses) and half holes. Shown are medians of wall and CPU
seconds, then the ratios of qemu-img to highwater (above 1: highwater is faster, or needs less). Files are in the
page cache. Needs qemu-utils.

qemu-img's default leaves its result in the page cache (-t unsafe), highwater's makes it durable. So conversions are
compared in two modes, and both are fair:

    unsafe   both with -t unsafe: nobody waits for the device
    durable  both with -t writeback, and after qemu-img the file's directory is synced, as highwater does
    default  each as it comes: highwater durable, qemu-img not

Before each run the target is removed and the device's queue is drained, so that nobody pays for the other's writeback.
"""

import argparse, json, os, random, resource, statistics, subprocess, tempfile, time

MODES = ("unsafe", "durable", "default")
CASES = {
    "raw-to-qcow2": ["convert", "-f", "raw", "-O", "qcow2", "RAW", "OUT"],
    "qcow2-to-raw": ["convert", "-f", "qcow2", "-O", "raw", "QCOW2", "OUT"],
    "qcow2-to-qcow2": ["convert", "-f", "qcow2", "-O", "qcow2", "QCOW2", "OUT"],
    "raw-to-raw": ["convert", "-f", "raw", "-O", "raw", "RAW", "OUT"],
    "copy-range": ["convert", "-C", "-f", "raw", "-O", "qcow2", "RAW", "OUT"],
    "to-zlib": ["convert", "-c", "-f", "raw", "-O", "qcow2", "RAW", "OUT"],
    "to-zstd": ["convert", "-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2", "RAW", "OUT"],
    "from-zlib": ["convert", "-f", "qcow2", "-O", "raw", "ZLIB", "OUT"],
    "from-zstd": ["convert", "-f", "qcow2", "-O", "raw", "ZSTD", "OUT"],
    "compare": ["compare", "-f", "raw", "-F", "qcow2", "RAW", "QCOW2"],
    "compare-zlib": ["compare", "-f", "raw", "-F", "qcow2", "RAW", "ZLIB"],
    "compare-empty": ["compare", "-f", "raw", "-F", "qcow2", "EMPTY_RAW", "EMPTY_QCOW2"],
}


def make_source(path, size):
    words = [bytes(random.Random(n).choices(b"abcdefghij klmnop\n0123456789", k=24)) for n in range(4096)]
    rng = random.Random(1)
    with open(path, "wb") as out:
        out.truncate(size)
        for offset in range(0, size, 4 << 20):
            out.seek(offset)
            chunk = b"".join(rng.choices(words, k=(2 << 20) // 24 + 1))[: 2 << 20]
            out.write(chunk)


def timed(commands):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    for command in commands:
        if callable(command):
            command()
        else:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def sync_directory(path):
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def commands_of(name, program, arguments, mode, out):
    if arguments[0] != "convert" or mode == "default":
        return [[program, *arguments]]
    cache = {"unsafe": "unsafe", "durable": "writeback"}[mode]
    commands = [[program, "convert", "-t", cache, *arguments[1:]]]
    if name == "qemu-img" and mode == "durable":
        commands.append(lambda: sync_directory(out))
    return commands


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="2G")
    parser.add_argument("--mode", choices=MODES, action="append", help="unsafe and durable by default")
    parser.add_argument("--dir", default=None)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    size = int(args.size[:-1]) << {"M": 20, "G": 30}[args.size[-1]]
    rows = []
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
        names = ("RAW", "QCOW2", "ZLIB", "ZSTD", "EMPTY_RAW", "EMPTY_QCOW2", "OUT")
        files = {name: os.path.join(directory, name.lower()) for name in names}
        make_source(files["RAW"], size)
        for name, options in (("QCOW2", []), ("ZLIB", ["-c"]), ("ZSTD", ["-c", "-o", "compression_type=zstd"])):
            # Made by highwater where it is the faster way; both read them alike.
            made = [args.highwater, "convert", *options, "-f", "raw", "-O", "qcow2", files["RAW"], files[name]]
            subprocess.run(made, check=True)
        for name, kind in (("EMPTY_RAW", "raw"), ("EMPTY_QCOW2", "qcow2")):
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, files[name], "4T"], check=True)
        for case in args.cases or CASES:
            arguments = [files.get(word, word) for word in CASES[case]]
            for mode in (args.mode or ["unsafe", "durable"]) if arguments[0] == "convert" else ["-"]:
                rows.append(run_case(args, case, mode, arguments, files["OUT"]))
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"load": os.getloadavg(), "rounds": args.rounds, "rows": rows}, out, indent=1)


def run_case(args, case, mode, arguments, target):
    samples = {"highwater": [], "qemu-img": []}
    for round_ in range(args.rounds + 1):
        for name in ("highwater", "qemu-img") if round_ % 2 else ("qemu-img", "highwater"):
            if os.path.exists(target):
                os.unlink(target)
            os.sync()
            program = args.highwater if name == "highwater" else name
            sample = timed(commands_of(name, program, arguments, mode, target))
            if round_:  # The first round warms up.
                samples[name].append(sample)
    row = {"case": case, "mode": mode, "load": os.getloadavg()[0]}
    for name, taken in samples.items():
        row[name] = {"wall": statistics.median(s[0] for s in taken), "cpu": statistics.median(s[1] for s in taken)}
    row["wall_ratio"] = row["qemu-img"]["wall"] / row["highwater"]["wall"]
    row["cpu_ratio"] = row["qemu-img"]["cpu"] / max(row["highwater"]["cpu"], 1e-3)
    h, q = row["highwater"], row["qemu-img"]
    print(f"{case:15} {mode:8} highwater {h['wall']:6.2f} s wall {h['cpu']:6.2f} s CPU   qemu-img {q['wall']:6.2f} s wall "
          f"{q['cpu']:6.2f} s CPU   wall x{row['wall_ratio']:.2f} CPU x{row['cpu_ratio']:.2f}   load {row['load']:.1f}",
          flush=True)
    return row


if __name__ == "__main__":
    main()
