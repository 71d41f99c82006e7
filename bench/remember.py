#!/usr/bin/env python3
"""Shows what a killed server still knows of the changes since a backup: qemu-storage-daemon and highwater.

    bench/remember.py --highwater target/release/highwater [--format qcow2] [--json FILE] [CASE ...]

Each case is the same for both: an image, a point in time, writes and a flush by qemu-io over NBD, then SIGKILL (or an
orderly end), and the question what has changed since. The point is a persistent dirty bitmap in qemu-storage-daemon
(block-dirty-bitmap-add over QMP) and a mark in highwater. QEMU's answer is what `qemu-img info` and a server started anew
say of the bitmap: without a usable one the next backup copies all. Needs qemu-utils, qemu-system-common
(qemu-storage-daemon), and qcow2 for QEMU's side, as a raw image has no place for a bitmap.
"""

import argparse, json, os, signal, socket, subprocess, sys, tempfile
from processes import remove_sockets, wait_for

GRANULE = 64 << 10
SIZE = 1 << 30
BEFORE = ["write -P 1 0 256M", "flush"]
WRITES = [f"write -P 2 {at}M 64k" for at in range(0, 256, 4)]
STREAM = [f"write -P 2 {at * 64}k 64k" for at in range(512)]
DISCARDS = ["discard 512M 512M", "flush"]

CASES = {
    # name: (what happens after the point, whether the servers are closed once in between, how they end)
    "kill": (WRITES + ["flush"], False, signal.SIGKILL),
    "kill-after-close": (WRITES + ["flush"], True, signal.SIGKILL),
    "kill-idle-after-close": ([], True, signal.SIGKILL),
    "kill-sequential": (STREAM + ["flush"], False, signal.SIGKILL),
    "close": (WRITES + ["flush"], False, signal.SIGTERM),
    "discard-unwritten": (DISCARDS, False, signal.SIGTERM),
    "discard-unwritten-live": (DISCARDS, False, None),
}


def output(*command, check=True):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if check and result.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {result.returncode}: {result.stderr.decode()}")
    return result.stdout.decode()


class Peer:
    """What both servers share: an image, a directory, a process."""

    def __init__(self, args, directory):
        self.args, self.directory = args, directory
        self.image = os.path.join(directory, f"disk.{self.format}")
        self.sock, self.control = (os.path.join(directory, name) for name in ("nbd.sock", "control.sock"))
        self.process = None
        output("qemu-img", "create", "-q", "-f", self.format, self.image, str(SIZE))

    def start(self):
        remove_sockets(self.sock, self.control)
        self.process = subprocess.Popen(self.words(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for(self.sock, self.process, self.name)

    def end(self, how):
        self.process.send_signal(how)
        self.process.wait(60)

    def do(self, commands):
        if commands:
            uri = f"nbd+unix:///disk?socket={self.sock}"
            said = output("qemu-io", "-f", "raw", uri, *(word for command in commands for word in ("-c", command)))
            if "failed" in said:
                sys.exit(f"{self.name}: {said}")


class Qemu(Peer):
    name, format = "qemu-storage-daemon", "qcow2"

    def words(self):
        return ["qemu-storage-daemon",
                "--blockdev", f"driver=file,node-name=f,filename={self.image},discard=unmap",
                "--blockdev", "driver=qcow2,node-name=d,file=f,discard=unmap",
                "--nbd-server", f"addr.type=unix,addr.path={self.sock}",
                "--export", "type=nbd,id=e,node-name=d,name=disk,writable=on",
                "--chardev", f"socket,id=c,path={self.control},server=on,wait=off", "--monitor", "chardev=c"]

    def qmp(self, command, **arguments):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.control)
            stream = connection.makefile("rw")
            stream.readline()
            for line in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                while True:
                    answer = json.loads(stream.readline())
                    if "event" not in answer:
                        break
            if "error" in answer:
                sys.exit(f"{command}: {answer['error']['desc']}")
            return answer["return"]

    def point(self):
        self.qmp("block-dirty-bitmap-add", node="d", name="backup", persistent=True, granularity=GRANULE)

    def told(self, running):
        """What a server knows that has the image open."""
        if not running:
            info = json.loads(output("qemu-img", "info", "--output=json", "-f", "qcow2", self.image))
            stored = info["format-specific"]["data"].get("bitmaps", [])
            flags = [b["flags"] for b in stored if b["name"] == "backup"]
            self.start()
        node = next(n for n in self.qmp("query-named-block-nodes", flat=True) if n["node-name"] == "d")
        bitmap = next((b for b in node.get("dirty-bitmaps", []) if b["name"] == "backup"), None)
        self.end(signal.SIGTERM)
        if bitmap is None:
            return {"knows": "no bitmap", "bytes": None}
        if bitmap.get("inconsistent") or not running and "in-use" in flags[0]:
            return {"knows": "bitmap in use, inconsistent", "bytes": None}
        return {"knows": "bitmap", "bytes": bitmap["count"]}


class Highwater(Peer):
    name = "highwater"

    def __init__(self, args, directory):
        self.format = args.format
        super().__init__(args, directory)

    def words(self):
        return [self.args.highwater, "serve", self.image, "-f", self.format, "--name", "disk", "--socket", self.sock,
                "--api", self.control, "--history", "on", "--history-granule", str(GRANULE)]

    def ask(self, *words):
        return json.loads(output(self.args.highwater, "--json", "--api", self.control, *words))

    def point(self):
        self.ask("mark", "disk", "backup")

    def told(self, running):
        if not running:
            self.start()
        found = self.ask("changes", "disk", "--since", "backup")["summary"]
        self.end(signal.SIGTERM)
        # Zeroes and what was discarded need no reading, and no space in a backup.
        return {"knows": "mark", "bytes": found["data"], "zero": found["zero"] + found["discarded"]}


def run(peer, case):
    commands, closed, end = CASES[case]
    peer.start()
    peer.do(BEFORE)
    peer.point()
    if closed:
        peer.end(signal.SIGTERM)
        peer.start()
    peer.do(commands)
    if end is not None:
        peer.end(end)
    return peer.told(end is None)


def show(told):
    if told["bytes"] is None:
        return f"{told['knows']}: copies all, {SIZE >> 20} MiB"
    text = f"{told['knows']}: {told['bytes'] / (1 << 20):g} MiB"
    return text + (f", and {told['zero'] / (1 << 20):g} MiB of zeroes" if told.get("zero") else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--highwater", default="target/release/highwater")
    parser.add_argument("--format", default="qcow2", choices=["qcow2", "raw"], help="of highwater's image")
    parser.add_argument("--dir", default=None, help="where images are made")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    rows = []
    print(f"{'case':24} {'written':>10}  {'QEMU copies':54} highwater copies")
    for case in args.cases or CASES:
        commands = CASES[case][0]
        written = len([c for c in commands if c.startswith("write")]) * GRANULE
        row = {"case": case, "written": written, "size": SIZE}
        for kind in (Qemu, Highwater):
            with tempfile.TemporaryDirectory(dir=args.dir, prefix="highwater-bench-") as directory:
                peer = kind(args, directory)
                try:
                    row[kind.name] = run(peer, case)
                finally:
                    if peer.process is not None and peer.process.poll() is None:
                        peer.process.kill()
        rows.append(row)
        qemu, ours = show(row[Qemu.name]), show(row[Highwater.name])
        print(f"{case:24} {written / (1 << 20):6g} MiB  {qemu:54} {ours}", flush=True)
    if args.json:
        with open(args.json, "w") as out:
            version = output("qemu-storage-daemon", "--version").splitlines()[0]
            json.dump({"qemu": version, "format": args.format, "granule": GRANULE, "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
