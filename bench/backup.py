#!/usr/bin/env python3
"""What backups of a disk cost: highwater beside restic and borg, on the same image file.

    bench/backup.py --highwater target/release/highwater [--size 4G] [--source /usr/lib] [--rounds 1] [--dir DIR] [--json FILE] [TOOL ...]

A raw image with an ext4 file system that holds a copy of --source. Every tool makes, in turns:

    first      the first backup into an empty repository
    again      after 1 % of the disk has changed (4k to 64k at random places, through highwater's NBD server, which is at rest
               again): highwater asks its history, the others read the whole image
    restore    the newest backup into a new file, which is compared with the image
    verify     all data of the repository, read and proven
    prune      the first backup is forgotten and its space given back

Shown are wall time, CPU seconds (the command with its children), peak memory of its largest process, and by how many bytes the
repository has grown. All repositories are encrypted, and compressed as the tool does by default, but for borg, which is told zstd.
restic and borg cut the image into pieces by content, also by default. Needs e2fsprogs, qemu-utils, restic, borgbackup. CPU seconds are the
truer figure where the machine is shared; no repository is dropped from the page cache.
"""

import argparse, json, os, random, statistics, subprocess, sys, tempfile, time
from processes import remove_sockets, run, size_bytes, stop, wait_for

STEPS = ("first", "again", "restore", "verify", "prune")


def measured(command, env=None, out=None):
    """Wall and CPU seconds, and peak memory in bytes."""
    started = time.perf_counter()
    child = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=out or subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    if status:
        sys.exit(f"{command}: {errors.decode()}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss << 10}


def stored(directory):
    total = 0
    for root, _, files in os.walk(directory):
        total += sum(os.lstat(os.path.join(root, name)).st_size for name in files)
    return total


class Highwater:
    name = "highwater"

    def __init__(self, args, directory):
        self.binary, self.repo = args.highwater, os.path.join(directory, "highwater-repo")
        self.env = {"XDG_CONFIG_HOME": directory, "XDG_CACHE_HOME": os.path.join(directory, "cache")}
        measured([self.binary, "repo", "init", self.repo], self.env)

    def backup(self, image):
        return measured([self.binary, "backup", "-f", "raw", image, self.repo], self.env)

    def restore(self, image, target):
        return measured([self.binary, "restore", self.repo, "latest", target, "-O", "raw"], self.env)

    def verify(self):
        return measured([self.binary, "repo", "verify", self.repo], self.env)

    def prune(self):
        first = measured([self.binary, "forget", self.repo, "--keep-last", "1"], self.env)
        # One prune names what is dead, a later one deletes it: nobody who still reads is cut off.
        rows = [first] + [measured([self.binary, "repo", "prune", self.repo, "--grace", "0s"], self.env) for _ in range(2)]
        return {"wall": sum(r["wall"] for r in rows), "cpu": sum(r["cpu"] for r in rows), "memory": max(r["memory"] for r in rows)}


class Restic:
    name = "restic"

    def __init__(self, args, directory):
        self.repo = os.path.join(directory, "restic-repo")
        self.env = {"RESTIC_PASSWORD": "secret", "RESTIC_CACHE_DIR": os.path.join(directory, "restic-cache"), "RESTIC_REPOSITORY": self.repo}
        measured(["restic", "init", "--repository-version", "2"], self.env)

    def backup(self, image):
        return measured(["restic", "backup", image], self.env)

    def restore(self, image, target):
        with open(target, "wb") as out:
            return measured(["restic", "dump", "latest", image], self.env, out)

    def verify(self):
        return measured(["restic", "check", "--read-data"], self.env)

    def prune(self):
        return measured(["restic", "forget", "--keep-last", "1", "--prune"], self.env)


class Borg:
    name = "borg"

    def __init__(self, args, directory):
        self.repo, self.count = os.path.join(directory, "borg-repo"), 0
        self.env = {"BORG_PASSPHRASE": "secret", "BORG_BASE_DIR": directory, "BORG_REPO": self.repo}
        measured(["borg", "init", "--encryption", "repokey-blake2"], self.env)

    def backup(self, image):
        self.count += 1
        return measured(["borg", "create", "-C", "zstd,1", f"::{self.count}", image], self.env)

    def restore(self, image, target):
        with open(target, "wb") as out:
            return measured(["borg", "extract", "--stdout", f"::{self.count}", image.lstrip("/")], self.env, out)

    def verify(self):
        return measured(["borg", "check", "--verify-data"], self.env)

    def prune(self):
        one = measured(["borg", "prune", "--keep-last", "1"], self.env)
        two = measured(["borg", "compact", "--threshold", "0"], self.env)
        return {"wall": one["wall"] + two["wall"], "cpu": one["cpu"] + two["cpu"], "memory": max(one["memory"], two["memory"])}


def make_image(path, size, source):
    with open(path, "wb") as image:
        image.truncate(size)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", source, path], check=True)


def change(args, directory, image, size):
    """Changes 1 % of the disk through a server that keeps the history."""
    socket = os.path.join(directory, "nbd.sock")
    remove_sockets(socket)
    server = subprocess.Popen([args.highwater, "serve", "-f", "raw", image, "--socket", socket], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(socket, server, "highwater")
    left, commands = size // 100, []
    while left > 0:
        length = random.choice((4, 4, 4, 8, 16, 64)) << 10
        commands.append(f"write -P {random.randrange(1, 256)} {random.randrange(size // 65536) * 65536} {length}")
        left -= length
    commands.append("flush")
    name = os.path.splitext(os.path.basename(image))[0]
    subprocess.run(["qemu-io", "-f", "raw", f"nbd+unix:///{name}?socket={socket}"], input="\n".join(commands).encode() + b"\n",
                   check=True, stdout=subprocess.DEVNULL)
    stop(server)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", default=["highwater", "restic", "borg"])
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--size", default="4G")
    parser.add_argument("--source", default="/usr/lib")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    size, samples = size_bytes(args.size), {}
    known = {tool.name: tool for tool in (Highwater, Restic, Borg)}
    for round_ in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
            random.seed(round_)
            image, target = os.path.join(directory, "disk.raw"), os.path.join(directory, "restored.raw")
            make_image(image, size, args.source)
            # The history begins here; the first backup of highwater takes the mark.
            tools = [known[name](args, directory) for name in args.tools]
            order = tools if round_ % 2 == 0 else tools[::-1]

            def step(name, work):
                for tool in order:
                    before = stored(tool.repo)
                    row = {**work(tool), "grown": stored(tool.repo) - before, "load": os.getloadavg()[0]}
                    samples.setdefault((name, tool.name), []).append(row)

            step("first", lambda tool: tool.backup(image))
            change(args, directory, image, size)
            step("again", lambda tool: tool.backup(image))

            def restore(tool):
                row = tool.restore(image, target)
                run("cmp", image, target)
                os.unlink(target)
                return row

            step("restore", restore)
            step("verify", lambda tool: tool.verify())
            step("prune", lambda tool: tool.prune())
    for name in STEPS:
        for tool in args.tools:
            rows = samples[(name, tool)]
            wall, cpu, memory, grown = (statistics.median(row[key] for row in rows) for key in ("wall", "cpu", "memory", "grown"))
            print(f"{name:8} {tool:10} {wall:7.2f} s wall {cpu:7.2f} s CPU {memory / 2**20:6.0f} MiB memory "
                  f"{grown / 2**20:9.1f} MiB stored   load {rows[-1]['load']:.1f}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump([{"step": step, "tool": tool, "samples": rows} for (step, tool), rows in samples.items()], file, indent=1)


main()
