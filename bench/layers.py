#!/usr/bin/env python3
"""What a chain costs per layer: opened, and read through, by highwater and by qemu-nbd.

    bench/layers.py --highwater target/release/highwater [--layers 1 10 30] [--rounds 5] [--seconds 2] [--json FILE]

A qcow2 image of 1 GiB whose every byte is in the lowest layer; each layer above it holds 64 KiB. `open`: the time until
`info` of the whole chain has ended (with the verification of all links, which qemu-img has no word for), and `qemu-img info
--backing-chain`. `read`: 4k random reads of fio over NBD at depth 1, of bytes that the lowest layer holds. Servers and chains
take turns; shown are medians, IOPS and the server's CPU time per read. Needs qemu-utils and fio.
"""

import argparse, json, os, statistics, subprocess, tempfile, time
from processes import cpu_seconds, remove_sockets, run, stop, wait_for


def make_chain(directory, layers):
    base = os.path.join(directory, "l0.qcow2")
    if not os.path.exists(base):
        run("qemu-img", "create", "-q", "-f", "qcow2", base, "1G")
        run("qemu-img", "bench", "-q", "-f", "qcow2", "-w", "--pattern=85", "-s", "1M", "-c", "1024", "-t", "none", "-n", base)
        for n in range(1, layers):
            over = os.path.join(directory, f"l{n}.qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"l{n - 1}.qcow2", "-F", "qcow2", over)
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {n} {n}M 64k", over)
    return lambda n: os.path.join(directory, f"l{n - 1}.qcow2")


def timed(*command):
    started = time.perf_counter()
    run(*command)
    return time.perf_counter() - started


def read(name, args, image, directory, seed):
    sock = os.path.join(directory, f"{name}.sock")
    remove_sockets(sock)
    if name == "highwater":
        command = [args.highwater, "serve", image, "-f", "qcow2", "-r", "--name", "disk", "--socket", sock,
                   "--api", os.path.join(directory, "api.sock")]
    else:
        command = ["qemu-nbd", "-t", "-r", "-x", "disk", "-k", sock, "-f", "qcow2", "--aio=io_uring", image]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(sock, process, name)
    try:
        before = cpu_seconds(process.pid)
        out = subprocess.run(
            ["fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={sock}", "--rw=randread", "--bs=4k",
             "--iodepth=1", "--time_based", f"--runtime={args.seconds}", f"--randseed={seed}", "--offset=512M", "--size=512M",
             "--norandommap", "--output-format=json"], check=True, stdout=subprocess.PIPE).stdout.decode()
        side = json.loads(out[out.index("{"):])["jobs"][0]["read"]
        return side["iops"], (cpu_seconds(process.pid) - before) / max(side["total_ios"], 1) * 1e6
    finally:
        stop(process)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 10, 30])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    opened, served = {}, {}
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
        image = make_chain(directory, max(args.layers))
        for round_ in range(args.rounds):
            for layers in args.layers:
                top = image(layers)
                for name, command in (("highwater", [args.highwater, "--json", "chain", "verify", "-f", "qcow2", top]),
                                      ("qemu", ["qemu-img", "info", "--backing-chain", "-f", "qcow2", top])):
                    opened.setdefault((layers, name), []).append(timed(*command))
                for name in ("highwater", "qemu-nbd") if round_ % 2 == 0 else ("qemu-nbd", "highwater"):
                    served.setdefault((layers, name), []).append(read(name, args, top, directory, round_ + 1))
    rows = []
    for layers in args.layers:
        row = {"layers": layers}
        for name in ("highwater", "qemu"):
            row[f"{name}_open_ms"] = statistics.median(opened[layers, name]) * 1e3
        for name in ("highwater", "qemu-nbd"):
            row[f"{name}_iops"] = statistics.median(iops for iops, _ in served[layers, name])
            row[f"{name}_cpu_us"] = statistics.median(cpu for _, cpu in served[layers, name])
        rows.append(row)
        print(f"{layers:3} layers: open {row['highwater_open_ms']:6.1f} ms (qemu-img {row['qemu_open_ms']:6.1f})  read "
              f"{row['highwater_iops']:7.0f} IOPS {row['highwater_cpu_us']:5.2f} us (qemu-nbd {row['qemu-nbd_iops']:7.0f} IOPS "
              f"{row['qemu-nbd_cpu_us']:5.2f} us)", flush=True)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"load": os.getloadavg(), "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
