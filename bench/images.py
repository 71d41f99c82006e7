#!/usr/bin/env python3
"""Compares image work: highwater against qemu-img, in turns on the same files.

    bench/images.py --highwater target/release/highwater [--rounds 5] [--size 2G] [--json FILE] [CASE ...]

The source holds half data (text-like, so that it compresses) and half holes. Shown are medians of wall and CPU
seconds, then the ratios of qemu-img to highwater (above 1: highwater is faster, or needs less). Files are in the
page cache. Needs qemu-utils.
"""

import argparse, json, os, random, resource, statistics, subprocess, tempfile, time

CASES = {
    "raw-to-qcow2": (["convert", "-f", "raw", "-O", "qcow2", "RAW", "OUT"],),
    "qcow2-to-raw": (["convert", "-f", "qcow2", "-O", "raw", "QCOW2", "OUT"],),
    "qcow2-to-qcow2": (["convert", "-f", "qcow2", "-O", "qcow2", "QCOW2", "OUT"],),
    "to-zlib": (["convert", "-c", "-f", "raw", "-O", "qcow2", "RAW", "OUT"],),
    "to-zstd": (["convert", "-c", "-o", "compression_type=zstd", "-f", "raw", "-O", "qcow2", "RAW", "OUT"],),
    "from-zlib": (["convert", "-f", "qcow2", "-O", "raw", "ZLIB", "OUT"],),
    "compare": (["compare", "-f", "raw", "-F", "qcow2", "RAW", "QCOW2"],),
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


def timed(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="2G")
    parser.add_argument("--dir", default=None)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    size = int(args.size[:-1]) << {"M": 20, "G": 30}[args.size[-1]]
    rows = []
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
        files = {name: os.path.join(directory, name.lower()) for name in ("RAW", "QCOW2", "ZLIB", "OUT")}
        make_source(files["RAW"], size)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", files["RAW"], files["QCOW2"]], check=True)
        subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", files["RAW"], files["ZLIB"]], check=True)
        for case in args.cases or CASES:
            (template,) = CASES[case]
            arguments = [files.get(word, word) for word in template]
            samples = {"highwater": [], "qemu-img": []}
            for round_ in range(args.rounds + 1):
                for name in ("highwater", "qemu-img") if round_ % 2 else ("qemu-img", "highwater"):
                    if os.path.exists(files["OUT"]):
                        os.unlink(files["OUT"])
                    sample = timed([args.highwater if name == "highwater" else name, *arguments])
                    if round_:  # The first round warms up.
                        samples[name].append(sample)
            row = {"case": case}
            for name, taken in samples.items():
                row[name] = {"wall": statistics.median(s[0] for s in taken), "cpu": statistics.median(s[1] for s in taken)}
            row["wall_ratio"] = row["qemu-img"]["wall"] / row["highwater"]["wall"]
            row["cpu_ratio"] = row["qemu-img"]["cpu"] / max(row["highwater"]["cpu"], 1e-3)
            rows.append(row)
            h, q = row["highwater"], row["qemu-img"]
            print(f"{case:15} highwater {h['wall']:6.2f} s wall {h['cpu']:6.2f} s CPU   qemu-img {q['wall']:6.2f} s wall "
                  f"{q['cpu']:6.2f} s CPU   wall x{row['wall_ratio']:.2f} CPU x{row['cpu_ratio']:.2f}", flush=True)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"load": os.getloadavg(), "rounds": args.rounds, "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
