#!/usr/bin/env python3
"""What change tracking costs: the same highwater with its history on and off, in turns.

    bench/tracking.py --highwater target/release/highwater [--rounds 5] [--seconds 3] [--json FILE] [CASE ...]
    bench/tracking.py memory changes
    bench/tracking.py --seconds 30 epoch

4k random writes of fio (nbd engine, over a unix socket) to images that were written all over before. Both servers run, each
has an image of its own, and they take turns. `steady`: every granule has changed since the last mark already. `cold`: a mark
is taken right before each run, so that the first write to each granule is journalled. Shown are medians of IOPS and of the
99th percentile of latency, the server's CPU time per request over all runs (user and system, from /proc/PID/stat), and
ratios on to off, for IOPS the median of the pairs: 1.00 means that tracking costs nothing. `epoch` has one server and one
image, and sets runs right after a mark against runs in the steady state: nothing differs but the first writes, and what one
of them costs is told, too. `memory` writes to 100,000 random places of a sparse disk of 2 TiB, with 1 mark and with 1,000, and
`changes` asks over the API what changed on a disk of 1 TiB. Needs qemu-utils, fio and python3-libnbd.
"""

import argparse, http.client, json, os, random, re, socket, statistics, subprocess, sys, tempfile, time
from processes import cpu_seconds, remove_sockets, run, size_bytes, stop, wait_for

CASES = {
    # name: (format, cache mode, depth, bytes of the working set, cold)
    f"{epoch}-{size}-{fmt}-{cache}-{depth}": (fmt, cache, depth, size, epoch == "cold")
    for epoch, sizes in (("steady", ("1G",)), ("cold", ("1G", "4G")))
    for size in sizes
    for fmt in ("raw", "qcow2")
    for cache in ("writeback", "none")
    for depth in (1, 32)
}
EPOCHS = {
    # name: (format, cache mode, depth); of 1 GiB
    f"epoch-{fmt}-{cache}-{depth}": (fmt, cache, depth)
    for fmt in ("raw", "qcow2")
    for cache in ("writeback", "none")
    for depth in (1, 32)
}


def memory_bytes(pid, field="VmRSS"):
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read()).group(1)) << 10


class Server:
    """highwater serve, with the API."""

    def __init__(self, args, image, fmt, directory, history, *more):
        self.history = history
        self.sock, self.api = (os.path.join(directory, name) for name in ("nbd.sock", "api.sock"))
        remove_sockets(self.sock, self.api)
        command = [args.highwater, "serve", image, "-f", fmt, "--name", "disk", "--socket", self.sock, "--api", self.api,
                   "--history", history, *more]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for path in (self.sock, self.api):
            wait_for(path, self.process, "highwater", 60)
        self.disk = self.ask("GET", "/v1/disks")["disks"][0]["spec"]["name"]
        self.pid, self.uri = self.process.pid, f"nbd+unix:///disk?socket={self.sock}"

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.api)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        if response.status >= 300:
            sys.exit(f"{method} {path}: {response.status} {answer.decode()}")
        return json.loads(answer)

    def mark(self, name):
        self.ask("POST", "/v1/marks", {"disks": [self.disk], "name": name})

    def stop(self):
        stop(self.process)


def fio(sock, depth, seconds, size, seed):
    out = subprocess.run(
        ["fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={sock}", "--rw=randwrite", "--bs=4k",
         f"--iodepth={depth}", "--time_based", f"--runtime={round(seconds * 1000)}ms", f"--randseed={seed}", f"--size={size}",
         "--norandommap", "--output-format=json"], check=True, stdout=subprocess.PIPE).stdout
    text = out.decode()
    side = json.loads(text[text.index("{"):])["jobs"][0]["write"]
    return side["iops"], side["total_ios"], side["clat_ns"]["percentile"].get("99.000000", 0) / 1000


def full_images(directory, fmt, size):
    """Two images without a hole: neither allocation nor a parent has part in what is measured."""
    paths = {}
    for history in ("off", "on"):
        os.makedirs(os.path.join(directory, history), exist_ok=True)
        paths[history] = path = os.path.join(directory, history, f"full.{fmt}")
        run("qemu-img", "create", "-q", "-f", fmt, path, size)
        run("qemu-img", "bench", "-q", "-f", fmt, "-w", "--pattern=85", "-s", "1M", "-d", "4", "-t", "none", "-n",
            "-c", str(size_bytes(size) >> 20), path)
    return paths


def measure(args, server, depth, size, mark, seed):
    # The run before has nothing left to write.
    run("qemu-io", "-f", "raw", server.uri, "-c", "flush")
    if mark:
        server.mark(f"m{time.time_ns()}")
    os.sync()
    before = cpu_seconds(server.pid)
    iops, count, p99 = fio(server.sock, depth, args.seconds, size, seed)
    return {"iops": iops, "count": count, "cpu": cpu_seconds(server.pid) - before, "p99_us": p99}


def images_for(images, directory, fmt, size):
    if (fmt, size) not in images:
        for old in images.values():
            for path in old.values():
                os.unlink(path)
        images.clear()
        images[fmt, size] = full_images(directory, fmt, size)
    return images[fmt, size]


def touch_every_granule(server, size):
    """Then there is no first write in the runs that follow."""
    run("qemu-img", "bench", "-q", "-f", "raw", "-w", "--pattern=85", "-s", "4k", "-S", "64k", "-d", "32",
        "-c", str(size_bytes(size) >> 16), server.uri)


def medians(samples):
    # CPU time of all runs together: the clock of /proc has steps of 10 ms.
    return {key: statistics.median(s[key] for s in samples) for key in ("iops", "p99_us")} | {
        "cpu_us": sum(s["cpu"] for s in samples) / sum(s["count"] for s in samples) * 1e6}


def compare(args, case, images, directory):
    fmt, cache, depth, size, cold = CASES[case]
    servers = {history: Server(args, image, fmt, os.path.join(directory, history), history, "--cache", cache)
               for history, image in images_for(images, directory, fmt, size).items()}
    samples = {history: [] for history in servers}
    try:
        for server in servers.values() if not cold else ():
            touch_every_granule(server, size)
        for round_ in range(args.rounds):
            for history in ("off", "on") if round_ % 2 == 0 else ("on", "off"):
                samples[history].append(measure(args, servers[history], depth, size, cold and history == "on", round_ + 1))
    finally:
        for server in servers.values():
            server.stop()
    row = {"case": case, "samples": samples}
    for history, taken in samples.items():
        row[history] = medians(taken)
    # Of neighbours in time, whose machine was alike.
    pairs = [on["iops"] / off["iops"] for off, on in zip(samples["off"], samples["on"])]
    row |= {"iops_ratio": statistics.median(pairs), "iops_ratios": sorted(pairs)}
    row |= {f"{key}_ratio": row["on"][key] / max(row["off"][key], 0.001) for key in ("cpu_us", "p99_us")}
    sides = "  ".join(f"{h} {row[h]['iops']:8.0f} IOPS {row[h]['cpu_us']:6.2f} us p99 {row[h]['p99_us']:7.0f} us"
                      for h in ("off", "on"))
    print(f"{case:28} {sides}  IOPS x{row['iops_ratio']:.3f} ({pairs_text(pairs)}) CPU x{row['cpu_us_ratio']:.3f} "
          f"p99 x{row['p99_us_ratio']:.2f}", flush=True)
    return row


def epoch(args, case, images, directory):
    """One server, one image: runs from a mark on, and runs without."""
    fmt, cache, depth = EPOCHS[case]
    size = "1G"
    server = Server(args, images_for(images, directory, fmt, size)["on"], fmt, os.path.join(directory, "on"), "on",
                    "--cache", cache)
    samples = {"steady": [], "cold": []}
    try:
        # What is thrown away: the first run of a server is not like the others.
        measure(args, server, depth, size, True, 99)
        for round_ in range(args.rounds):
            for side in ("steady", "cold") if round_ % 2 == 0 else ("cold", "steady"):
                if side == "steady":
                    touch_every_granule(server, size)
                samples[side].append(measure(args, server, depth, size, side == "cold", round_ + 1))
    finally:
        server.stop()
    row = {"case": case, "seconds": args.seconds, "samples": samples} | {side: medians(s) for side, s in samples.items()}
    pairs = [cold["iops"] / steady["iops"] for steady, cold in zip(samples["steady"], samples["cold"])]
    granules = size_bytes(size) >> 16
    # The share of granules that so many random writes reach.
    firsts = sum(granules * (1 - (1 - 1 / granules) ** s["count"]) for s in samples["cold"])
    writes = sum(s["count"] for s in samples["cold"])
    more = row["cold"]["cpu_us"] - row["steady"]["cpu_us"]
    row |= {"iops_ratio": statistics.median(pairs), "cpu_ratio": row["cold"]["cpu_us"] / row["steady"]["cpu_us"],
            "firsts": firsts, "writes": writes, "first_write_us": more * writes / firsts}
    print(f"{case:28} steady {row['steady']['iops']:8.0f} IOPS {row['steady']['cpu_us']:6.2f} us  from a mark on "
          f"{row['cold']['iops']:8.0f} IOPS {row['cold']['cpu_us']:6.2f} us  IOPS x{row['iops_ratio']:.3f} "
          f"({pairs_text(pairs)}) CPU x{row['cpu_ratio']:.3f}; {firsts / writes:.1%} first writes, each "
          f"{row['first_write_us']:+.1f} us of CPU", flush=True)
    return row


def pairs_text(pairs):
    return f"{min(pairs):.2f} to {max(pairs):.2f}"


def scatter(sock, places, size, seed):
    """4 KiB at each of so many random places."""
    import nbd
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///disk?socket={sock}")
    chance, buffer = random.Random(seed), nbd.Buffer.from_bytearray(bytearray(b"\x55" * 4096))
    for _ in range(places):
        while handle.aio_in_flight() >= 64:
            handle.poll(-1)
        handle.aio_pwrite(buffer, chance.randrange(size >> 12) << 12, completion=lambda error: 1)
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.flush()
    handle.shutdown()


def memory(args, directory):
    rows = []
    for history, marks in (("off", 0), ("on", 1), ("on", 1000)):
        image, size = os.path.join(directory, "sparse.raw"), 2 << 40
        with open(image, "wb") as file:
            file.truncate(size)
        server = Server(args, image, "raw", directory, history, "--threads", "1")
        try:
            idle = memory_bytes(server.pid)
            started = time.perf_counter()
            for n in range(marks):
                server.mark(f"m{n}")
            marking = time.perf_counter() - started
            started = time.perf_counter()
            scatter(server.sock, args.places, size, 1)
            writing = time.perf_counter() - started
            said = server.ask("GET", f"/v1/disks/{server.disk}/history") if history == "on" else {}
            row = {"case": "memory", "history": history, "marks": marks, "idle_rss": idle,
                   "rss": memory_bytes(server.pid), "peak_rss": memory_bytes(server.pid, "VmHWM"),
                   "history_memory": said.get("memory"), "writing_s": writing, "mark_ms": marking / max(marks, 1) * 1e3,
                   "sidecar": os.stat(image + ".history").st_blocks << 9 if history == "on" else 0}
        finally:
            server.stop()
        os.unlink(image)
        if history == "on":
            os.unlink(image + ".history")
        rows.append(row)
        of_history = f", of it the history {row['history_memory'] / 1024:.0f} KiB" if row["history_memory"] else ""
        print(f"2 TiB, {args.places} places, history {history}, {marks} marks: RSS {idle / 1024:.0f} KiB idle, "
              f"{row['rss'] / 1024:.0f} KiB then (peak {row['peak_rss'] / 1024:.0f}){of_history}; "
              f"{writing:.1f} s of writing, {row['mark_ms']:.1f} ms a mark, sidecar {row['sidecar'] >> 10} KiB", flush=True)
    return rows


def changes(args, directory):
    rows = []
    image, size = os.path.join(directory, "sparse.raw"), 1 << 40
    with open(image, "wb") as file:
        file.truncate(size)
    server = Server(args, image, "raw", directory, "on")

    def ask(what, most):
        """One answer over the API, as often as it takes for a median; and the whole, in parts."""
        path = f"/v1/disks/{server.disk}/changes?since=start"
        times = []
        for _ in range(9):
            started = time.perf_counter()
            server.ask("GET", f"{path}&most={most}")
            times.append(time.perf_counter() - started)
        started, start, ranges, parts = time.perf_counter(), 0, 0, 0
        while start is not None:
            part = server.ask("GET", f"{path}&start={start}")
            start, ranges, parts = part.get("next"), ranges + len(part["ranges"]), parts + 1
        whole = time.perf_counter() - started
        row = {"case": "changes", "what": what, "ranges": ranges, "parts": parts, "first_ms": statistics.median(times) * 1e3,
               "most": most, "whole_ms": whole * 1e3}
        rows.append(row)
        print(f"1 TiB, {what}: first answer of at most {most} ranges {row['first_ms']:.1f} ms; "
              f"all {ranges} ranges in {parts} parts {row['whole_ms']:.1f} ms", flush=True)

    try:
        server.mark("start")
        ask("nothing changed", 16384)
        scatter(server.sock, 10, size, 2)
        ask("10 places changed", 16384)
        scatter(server.sock, args.places, size, 3)
        ask(f"{args.places} places changed", 100)
        server.mark("later")
        ask(f"{args.places} places changed, then a mark", 100)
    finally:
        server.stop()
    for _ in range(3):
        started = time.perf_counter()
        run(args.highwater, "--json", "changes", image, "-f", "raw", "--since", "later", "--summary")
        rows.append({"case": "changes", "what": "offline, nothing since", "ms": (time.perf_counter() - started) * 1e3})
    print(f"1 TiB, nothing since the mark, `highwater changes` on the file: {rows[-1]['ms']:.1f} ms", flush=True)
    os.unlink(image)
    os.unlink(image + ".history")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="memory, changes, or parts of: " + ", ".join((*CASES, *EPOCHS)))
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--places", type=int, default=100_000)
    parser.add_argument("--dir", default=None, help="where images are made (not a tmpfs: no direct I/O there; 12 GiB)")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    asked = args.cases or ["steady", "cold", "epoch", "memory", "changes"]
    rows, images = [], {}
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
        for case in sorted(CASES, key=lambda c: (CASES[c][0], CASES[c][3])):
            if any(part in case for part in asked):
                rows.append(compare(args, case, images, directory))
        for case in sorted(EPOCHS, key=lambda c: EPOCHS[c][0]):
            if any(part in case for part in asked):
                rows.append(epoch(args, case, images, directory))
        for name, how in (("memory", memory), ("changes", changes)):
            if name in asked:
                rows += how(args, directory)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"load": os.getloadavg(), "rounds": args.rounds, "seconds": args.seconds, "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
