#!/usr/bin/env python3
"""Compares NBD servers on the same image: highwater, qemu-nbd, qemu-storage-daemon.

    bench/serve.py --highwater target/release/highwater [--rounds 5] [--seconds 3] [--size 2G] [--json FILE] [CASE ...]

Servers take turns on every case, round after round, so that a machine whose speed drifts treats all alike. Each
run is fio (nbd engine, over a unix socket). Shown are medians: IOPS, and the server's CPU time per request (user
and system, from /proc/PID/stat), the truer figure where client and server share few cores; then the ratios of
highwater to the better of the peers. Every run of a writing case starts from a fresh copy of its image. Needs
qemu-utils and fio.
"""

import argparse, json, os, statistics, subprocess, tempfile
from processes import cpu_seconds, remove_sockets, run, size_bytes, stop, wait_for

CASES = {
    # name: (fio rw, block size, depth, image)
    "4k-read-1": ("randread", "4k", 1, "full"),
    "4k-read-32": ("randread", "4k", 32, "full"),
    "4k-write-1": ("randwrite", "4k", 1, "full"),
    "4k-write-32": ("randwrite", "4k", 32, "full"),
    "4k-allocate-1": ("randwrite", "4k", 1, "empty"),
    "4k-allocate-32": ("randwrite", "4k", 32, "empty"),
    "64k-read-8": ("read", "64k", 8, "full"),
    "64k-write-8": ("write", "64k", 8, "full"),
    "1m-read-4": ("read", "1m", 4, "full"),
    "1m-write-4": ("write", "1m", 4, "full"),
}


class Server:
    def __init__(self, name, command, sock):
        self.name, self.sock = name, sock
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for(sock, self.process, name)

    def stop(self):
        stop(self.process)


def start(name, args, image, fmt, cache, directory):
    sock = os.path.join(directory, f"{name}.sock")
    remove_sockets(sock)
    if name == "highwater":
        command = [args.highwater, "serve", image, "-f", fmt, "--name", "disk", "--socket", sock, "--cache", cache,
                   "--api", os.path.join(directory, "api.sock"), "--io-backend", args.io_backend]
    elif name == "qemu-nbd":
        command = ["qemu-nbd", "-t", "-x", "disk", "-k", sock, "-f", fmt, "-e", "8", "--aio=io_uring",
                   "--discard=unmap", f"--cache={cache}", image]
    else:
        direct = "on" if cache == "none" else "off"
        file = f"driver=file,node-name=f,filename={image},aio=io_uring,cache.direct={direct},discard=unmap"
        node = f"driver={fmt},node-name=d,file=f,discard=unmap,cache.direct={direct}"
        command = ["qemu-storage-daemon", "--blockdev", file, "--blockdev", node,
                   "--nbd-server", f"addr.type=unix,addr.path={sock}",
                   "--export", "type=nbd,id=e,node-name=d,name=disk,writable=on"]
    return Server(name, command, sock)


def fio(sock, rw, bs, depth, seconds, size):
    out = subprocess.run(
        ["fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={sock}", f"--rw={rw}", f"--bs={bs}",
         f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--randrepeat=1", f"--size={size}",
         "--output-format=json"], check=True, stdout=subprocess.PIPE).stdout
    text = out.decode()
    job = json.loads(text[text.index("{"):])["jobs"][0]
    side = job["read" if "read" in rw else "write"]
    return side["iops"], side["total_ios"], side["clat_ns"]["percentile"].get("99.000000", 0) / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--size", default="2G")
    parser.add_argument("--format", default="qcow2", choices=["qcow2", "raw"])
    parser.add_argument("--cache", default="writeback,none")
    parser.add_argument("--options", default="", help="qemu-img create -o options of the image")
    parser.add_argument("--peers", default="qemu-nbd,qemu-storage-daemon")
    parser.add_argument("--io-backend", default="auto")
    parser.add_argument("--dir", default=None, help="where images are made (not a tmpfs: no direct I/O there)")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    names = ["highwater"] + [p for p in args.peers.split(",") if p]
    report = []
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
        full, empty, work = (os.path.join(directory, f"{n}.img") for n in ("full", "empty", "work"))
        options = ["-o", args.options] if args.options else []
        for path in (full, empty):
            run("qemu-img", "create", "-q", "-f", args.format, *options, path, args.size)
        # A pattern, for a file system may keep zeroes as holes, and writing there is another matter.
        run("qemu-img", "bench", "-q", "-f", args.format, "-w", "--pattern=85", "-s", "1M", "-d", "4", "-t", "none", "-n",
            "-c", str(size_bytes(args.size) >> 20), full)
        for cache in args.cache.split(","):
            for case in args.cases or CASES:
                rw, bs, depth, image = CASES[case]
                samples = {name: [] for name in names}
                for round_ in range(args.rounds):
                    for name in names[round_ % len(names):] + names[:round_ % len(names)]:
                        target = full
                        if "write" in rw:
                            run("cp", "--sparse=auto", full if image == "full" else empty, work)
                            target = work
                            os.sync()
                        server = start(name, args, target, args.format, cache, directory)
                        try:
                            before = cpu_seconds(server.process.pid)
                            iops, count, p99 = fio(server.sock, rw, bs, depth, args.seconds, args.size)
                            cpu = cpu_seconds(server.process.pid) - before
                            samples[name].append((iops, cpu / max(count, 1) * 1e6, p99))
                        finally:
                            server.stop()
                row = {"format": args.format, "cache": cache, "case": case, "options": args.options}
                for name in names:
                    row[name] = {key: statistics.median(s[i] for s in samples[name])
                                 for i, key in enumerate(("iops", "cpu_us", "p99_us"))}
                if len(names) > 1:
                    row["iops_ratio"] = row["highwater"]["iops"] / max(row[n]["iops"] for n in names[1:])
                    row["cpu_ratio"] = min(row[n]["cpu_us"] for n in names[1:]) / max(row["highwater"]["cpu_us"], 0.01)
                report.append(row)
                line = "  ".join(f"{n} {row[n]['iops']:8.0f} IOPS {row[n]['cpu_us']:6.1f} us" for n in names)
                ratios = f"  IOPS x{row['iops_ratio']:.2f} CPU x{row['cpu_ratio']:.2f}" if len(names) > 1 else ""
                print(f"{args.format} {cache:9} {case:15} {line}{ratios}", flush=True)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"load": os.getloadavg(), "rounds": args.rounds, "rows": report}, out, indent=1)


if __name__ == "__main__":
    main()
