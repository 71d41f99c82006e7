#!/usr/bin/env python3
"""What changing images under a running disk costs: highwater beside QEMU.

    bench/change.py --highwater target/release/highwater [--rounds 3] [--json FILE] [CASE ...]

    promote   A linked clone (qcow2 over raw, 1 GiB) becomes a full one (raw) while its guest writes 64k at random places,
              100 MiB/s if it can. The new image is on a device that takes 60 MiB/s: a directory of bindfs, the same for
              all, which the copier and the guest's writes share, and which the disk is on after a switch. highwater
              promote, and QEMU's blockdev-mirror in both of its modes. Given up after 70 s.
    snapshot  Snapshots of a disk to which the guest writes 100 MiB/s: highwater snapshot create, and QEMU's
              blockdev-snapshot into an overlay that is open already.
    offline   A delta of 512 MiB (64k at random places) is merged into its base of 2 GiB, raw or qcow2, while nobody uses
              them: highwater commit, and `qemu-img commit -d`, which leaves the delta as it is, too. Both make it durable.
              The result is compared with what the delta showed before.
    commit    The same, while a guest writes 5 MiB/s: highwater's commit by the daemon, and QEMU's active block-commit.

The guest is fio over NBD with a log of all requests; its figures are 50th and 99th percentile of latency before, during
and after. `held` is for how long highwater says that it held the guest's writes. `gap` is the longest time in which
none of the guest's requests ended, in the job's last second (of a snapshot: from the command's beginning to its end):
what a pause comes to by the guest's clock, which has steps of 1 ms; a guest of 5 MiB/s writes each 12 ms. `moved` is
what was written to the target's device, the guest's own writes with it. CPU seconds are the server's, the guest's
requests included, or the command's. Peers take turns where there are rounds; medians are shown with ratios (above 1:
highwater is faster, or needs less). All of it takes six minutes. Needs qemu-utils, qemu-system-common
(qemu-storage-daemon), fio, and for `promote` bindfs.
"""

import argparse, glob, json, os, shutil, signal, statistics, subprocess, sys, tempfile, time
from contextlib import ExitStack
from changing import Highwater, Qemu, Watch
from guest import Guest, between, latency, longest_gap
from images import timed
from processes import remove_sockets, run, size_bytes, stop, wait_for
from slow import SlowDirectory

CASES = ("promote", "snapshot", "offline", "commit")
# A guest that has just begun opens its connection.
WARM = 1
# A switch comes this long before a job's end, at most: what is tidied up after it belongs to the job, too.
BEFORE_END = 1
AFTER_END = 0.1


def full_image(path, fmt, size):
    """Without a hole."""
    run("qemu-img", "create", "-q", "-f", fmt, path, size)
    run("qemu-img", "bench", "-q", "-f", fmt, "-w", "--pattern=85", "-s", "1M", "-d", "4", "-t", "none", "-n",
        "-c", str(size_bytes(size) >> 20), path)


def remove_with_sidecars(path):
    for found in [path, *glob.glob(f"{glob.escape(path)}.*"), *glob.glob(f"{glob.escape(os.path.splitext(path)[0])}@*")]:
        if os.path.exists(found):
            os.unlink(found)


def forget_sidecars(path):
    for found in glob.glob(f"{glob.escape(path)}.*"):
        os.unlink(found)


def begin_guest(work, *words, **more):
    guest = Guest(*words, **more)
    work.callback(guest.kill)
    return guest


def begin_server(work, server):
    work.callback(server.stop)
    return server


def ms(value):
    return "    -" if value is None else f"{value:5.1f}" if value < 1000 else f"{value:5.0f}"


def phase(name, seen):
    return f"{name} {seen['mib_s']:5.1f} MiB/s p50 {ms(seen['p50_ms'])} p99 {ms(seen['p99_ms'])} ms"


def median(rows, key):
    found = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(found) if found else None


def ratio(peer, ours):
    return None if peer is None or not ours else peer / ours


def promote(args, directory):
    base = os.path.join(directory, "base.raw")
    full_image(base, "raw", args.size)
    rows = []
    for peer in args.peers.split(","):
        clone = os.path.join(directory, "clone.qcow2")
        remove_with_sidecars(clone)
        forget_sidecars(base)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", clone)
        os.sync()
        with ExitStack() as work:
            slow = SlowDirectory(directory, args.target_rate)
            work.callback(slow.stop)
            if peer == "highwater":
                server = begin_server(work, Highwater(args, directory, clone, "qcow2"))
            else:
                server = begin_server(work, Qemu(args, directory, clone, "qcow2", args.size, (base, "raw"), peer))
            rows.append(promoted(args, directory, work, slow, server, peer))
    os.unlink(base)
    return rows


def promoted(args, directory, work, slow, server, peer):
    start = time.time() + WARM
    guest = begin_guest(work, directory, server.uri, "during", args.size, depth=args.depth)
    guest.rest(WARM + args.seconds)
    cpu, written = server.cpu(), slow.written()
    watch = Watch(args.limit, guest.check, lambda: {"bytes": slow.written() - written, "cpu": server.cpu() - cpu})
    outcome = server.promote(os.path.join(slow.path, "full.raw"), watch)
    began, ended = outcome["began"], outcome["ended"]
    if outcome["finished"]:
        guest.rest(2 * AFTER_END)
    requests = guest.stop()
    # Another one: the first has a backlog, and would write faster than its rate now.
    guest = begin_guest(work, directory, server.uri, "after", args.size, depth=args.depth, seed=2)
    again = time.time() + WARM
    guest.rest(WARM + args.seconds)
    until = time.time()
    after = guest.stop()
    row = {"case": "promote", "peer": peer, "load": os.getloadavg()[0], "finished": outcome["finished"],
           "seconds": ended - began, "moved_over_size": outcome["bytes"] / size_bytes(args.size), "cpu": outcome["cpu"],
           "before": latency(between(requests, start, began), began - start),
           "during": latency(between(requests, began, ended), ended - began),
           "after": latency(between(after, again, until), until - again)}
    if "copied" in outcome:
        row |= {key: outcome[key] / size_bytes(args.size) for key in ("copied", "mirrored")}
    if outcome["finished"]:
        row["pause_ms"] = outcome["pause-us"] / 1e3 if "pause-us" in outcome else None
        row["gap_ms"] = longest_gap(requests, ended - BEFORE_END, ended + AFTER_END)
    said = "finished after" if row["finished"] else "given up after"
    pause = "" if row.get("pause_ms") is None else f"held {row['pause_ms']:.1f} ms"
    gap = "" if row.get("gap_ms") is None else f"gap {row['gap_ms']:.0f} ms"
    parts = f" (copied x{row['copied']:.3f}, the guest's x{row['mirrored']:.3f})" if "copied" in row else ""
    print(f"promote   {peer:14} {said} {row['seconds']:5.1f} s, moved x{row['moved_over_size']:.3f} of the disk{parts}, "
          f"{row['cpu']:.1f} s CPU  {', '.join(filter(None, (pause, gap)))}   load {row['load']:.1f}")
    for name in ("before", "during", "after"):
        print(f"{'':25}{phase(f'{name:6}', row[name])}, worst {ms(row[name]['worst_ms'])} ms", flush=True)
    return row


def make_delta(args, directory, fmt):
    """A full base, a delta over it that is copied for each round, and what they show together."""
    base, golden, shown = (os.path.join(directory, name) for name in (f"base.{fmt}", "golden.qcow2", "shown.raw"))
    full_image(base, fmt, args.base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", fmt, golden)
    sock = os.path.join(directory, "golden.sock")
    remove_sockets(sock)
    server = subprocess.Popen(["qemu-nbd", "-t", "-x", "disk", "-k", sock, "-f", "qcow2", golden], stderr=subprocess.PIPE)
    try:
        wait_for(sock, server, "qemu-nbd")
        run("fio", "--name=delta", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={sock}", "--rw=randwrite", "--bs=64k",
            "--iodepth=16", f"--size={args.base}", f"--io_size={args.delta}", "--randrepeat=1")
    finally:
        stop(server)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", golden, shown)
    # All of the base is in the page cache then, for the first one as for the last.
    run("cat", base)
    return base, golden, shown


def fresh_delta(directory, base, golden):
    delta = os.path.join(directory, "delta.qcow2")
    remove_with_sidecars(delta)
    forget_sidecars(base)
    shutil.copyfile(golden, delta)
    os.sync()
    return delta


def offline(args, directory, fmt, base, golden, shown):
    samples = {"highwater": [], "qemu-img": []}
    for round_ in range(args.rounds + 1):
        for peer in turn(samples, round_):
            delta = fresh_delta(directory, base, golden)
            if peer == "highwater":
                commands = [[args.highwater, "--quiet", "commit", "-f", "qcow2", delta]]
            else:
                commands = [["qemu-img", "commit", "-q", "-d", "-f", "qcow2", delta]]
            wall, cpu = timed(commands)
            if round_:
                samples[peer].append({"wall": wall, "cpu": cpu})
            else:
                # The first round warms up. The next ones write the same bytes.
                run("qemu-img", "compare", "-q", "-f", fmt, "-F", "raw", base, shown)
    return [told(f"offline {fmt}", samples, "qemu-img")]


def turn(samples, round_):
    names = list(samples)
    return names if round_ % 2 == 0 else names[::-1]


def told(case, samples, other):
    row = {"case": case, "load": os.getloadavg()[0], "samples": samples}
    for name, taken in samples.items():
        row[name] = {key: median(taken, key) for key in ("wall", "cpu")}
    ours, theirs = row["highwater"], row[other]
    row["wall_ratio"], row["cpu_ratio"] = (ratio(theirs[key], max(ours[key], 1e-2)) for key in ("wall", "cpu"))
    print(f"{case:14} highwater {ours['wall']:6.2f} s wall {ours['cpu']:5.2f} s CPU   {other} {theirs['wall']:6.2f} s wall "
          f"{theirs['cpu']:5.2f} s CPU   wall x{row['wall_ratio']:.2f} CPU x{row['cpu_ratio']:.2f}   load {row['load']:.1f}",
          flush=True)
    return row


def commit(args, directory, fmt, base, golden):
    samples = {"highwater": [], "qemu-storage-daemon": []}
    for round_ in range(args.rounds):
        for peer in turn(samples, round_):
            delta = fresh_delta(directory, base, golden)
            with ExitStack() as work:
                if peer == "highwater":
                    server = begin_server(work, Highwater(args, directory, delta, "qcow2"))
                else:
                    server = begin_server(work, Qemu(args, directory, delta, "qcow2", args.base, (base, fmt)))
                samples[peer].append(committed(args, directory, work, server))
    row = told(f"commit {fmt}", samples, "qemu-storage-daemon")
    for name, taken in samples.items():
        unfinished = sum(not sample["finished"] for sample in taken)
        if unfinished:
            print(f"{'':15}{name}: {unfinished} of {len(taken)} not finished within {args.limit} s")
        row[name] |= {key: median(taken, key) for key in ("gap_ms", "pause_ms", "moved")}
        # One job is too short for a percentile: all rounds have their part in it.
        phases = [sample.pop("phases") for sample in taken]
        seen = {}
        for when in ("before", "during", "after"):
            requests = [request for phase in phases for request in phase[when][0]]
            seen[when] = latency(requests, sum(phase[when][1] for phase in phases))
        row[name] |= seen
        pause = "" if row[name]["pause_ms"] is None else f", held {row[name]['pause_ms']:.1f} ms"
        gap = "" if row[name]["gap_ms"] is None else f", gap {row[name]['gap_ms']:.0f} ms"
        print(f"{'':15}{name:20} " + "; ".join(
            f"{when} p50 {ms(seen[when]['p50_ms'])} p99 {ms(seen[when]['p99_ms'])}" for when in seen) + f" ms{pause}{gap}",
            flush=True)
    return [row]


def committed(args, directory, work, server):
    start = time.time() + WARM
    guest = begin_guest(work, directory, server.uri, "guest", args.base, rate="5m", depth=args.depth)
    guest.rest(WARM + args.seconds)
    cpu = server.cpu()
    outcome = server.commit(Watch(args.limit, guest.check, lambda: {"cpu": server.cpu() - cpu}))
    began, ended = outcome["began"], outcome["ended"]
    guest.rest(args.seconds)
    until = time.time()
    requests = guest.stop()
    return {"finished": outcome["finished"], "wall": ended - began, "cpu": outcome["cpu"], "moved": outcome.get("moved"),
            "pause_ms": outcome["pause-us"] / 1e3 if "pause-us" in outcome else None,
            # The light guest writes every 12 ms or so.
            "gap_ms": longest_gap(requests, ended - BEFORE_END, ended + AFTER_END) if outcome["finished"] else None,
            "phases": {"before": (between(requests, start, began), began - start),
                       "during": (between(requests, began, ended), ended - began),
                       "after": (between(requests, ended, until), until - ended)}}


def snapshot(args, directory):
    rows = []
    for peer in ("highwater", "qemu-storage-daemon"):
        image = os.path.join(directory, "snapped.qcow2")
        remove_with_sidecars(image)
        full_image(image, "qcow2", args.size)
        os.sync()
        with ExitStack() as work:
            if peer == "highwater":
                server = begin_server(work, Highwater(args, directory, image, "qcow2"))
            else:
                server = begin_server(work, Qemu(args, directory, image, "qcow2", args.size))
            rows.append(snapped(args, directory, work, server))
        remove_with_sidecars(image)
    return rows


def snapped(args, directory, work, server):
    start = time.time() + WARM
    guest = begin_guest(work, directory, server.uri, "guest", args.size, depth=args.depth)
    guest.rest(WARM + args.seconds)
    taken, first = [], time.time()
    for _ in range(args.snapshots):
        prepared = server.prepare_snapshot()
        began = time.time()
        held = server.snapshot(prepared)
        taken.append((began, time.time(), held))
        guest.rest(args.between)
    until = time.time()
    requests = guest.stop()
    gaps = [longest_gap(requests, began - 0.05, ended + 0.05) for began, ended, _ in taken]
    # As long, half-way to the next one: what the machine itself does to the guest.
    shift = args.between / 2
    quiet = [longest_gap(requests, began + shift - 0.05, ended + shift + 0.05) for began, ended, _ in taken]
    row = {"case": "snapshot", "peer": server.name, "count": len(taken), "load": os.getloadavg()[0],
           "before": latency(between(requests, start, first), first - start),
           "during": latency(between(requests, first, until), until - first)}
    for name, values in (("held_ms", [held for *_, held in taken]), ("command_ms", [(b - a) * 1e3 for a, b, _ in taken]),
                         ("gap_ms", gaps), ("quiet_gap_ms", quiet)):
        values = [value for value in values if value is not None]
        row[name] = {"median": statistics.median(values), "worst": max(values)} if values else None
    told = {name: "not told" if row[name] is None else f"{row[name]['median']:.1f} (worst {row[name]['worst']:.1f}) ms"
            for name in ("held_ms", "command_ms", "gap_ms", "quiet_gap_ms")}
    print(f"snapshot  {server.name:20} {row['count']} times: held {told['held_ms']}, the command {told['command_ms']}, "
          f"gap {told['gap_ms']}, without a snapshot {told['quiet_gap_ms']}   load {row['load']:.1f}")
    for name in ("before", "during"):
        print(f"{'':31}{phase(f'{name:6}', row[name])}, worst {ms(row[name]['worst_ms'])} ms", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--rounds", type=int, default=3, help="of offline and commit")
    parser.add_argument("--seconds", type=float, default=4, help="of the guest before and after")
    parser.add_argument("--limit", type=float, default=70, help="seconds that a job may take")
    parser.add_argument("--size", default="1G", help="of the disk of promote and snapshot")
    parser.add_argument("--peers", default="highwater,background,write-blocking", help="of promote")
    parser.add_argument("--depth", type=int, default=8, help="the guest's requests at a time")
    parser.add_argument("--target-rate", default="60M", help="bytes a second that promote's target takes")
    parser.add_argument("--base", default="2G", help="of the base of offline and commit")
    parser.add_argument("--delta", default="512M")
    parser.add_argument("--formats", default="raw,qcow2", help="of the base; commit takes the last one")
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--between", type=float, default=0.8, help="seconds between snapshots")
    parser.add_argument("--history", default="auto", choices=("auto", "on", "off"), help="of highwater's disks")
    parser.add_argument("--dir", default=None, help="where images are made (not a tmpfs; 8 GiB)")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    cases = args.cases or CASES
    for case in cases:
        if case not in CASES:
            parser.error(f"there is no case {case!r}")
    # An orderly way out: servers end, the slow directory is unmounted, images are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
        if "promote" in cases:
            rows += promote(args, directory)
        if "snapshot" in cases:
            rows += snapshot(args, directory)
        formats = [fmt for fmt in args.formats.split(",") if fmt]
        for fmt in formats if {"offline", "commit"} & set(cases) else ():
            base, golden, shown = made = make_delta(args, directory, fmt)
            if "offline" in cases:
                rows += offline(args, directory, fmt, base, golden, shown)
            if "commit" in cases and fmt == formats[-1]:
                rows += commit(args, directory, fmt, base, golden)
            for path in (*made, os.path.join(directory, "delta.qcow2")):
                remove_with_sidecars(path)
    if args.json:
        with open(args.json, "w") as out:
            version = subprocess.run(["qemu-storage-daemon", "--version"], stdout=subprocess.PIPE).stdout.decode()
            json.dump({"qemu": version.splitlines()[0], "rounds": args.rounds, "options": vars(args), "rows": rows}, out,
                      indent=1)


if __name__ == "__main__":
    main()
