"""A directory on a slow device: bindfs lets so many bytes a second be written, by whoever and to whichever file of it."""

import os, shutil, subprocess, sys, time


class SlowDirectory:
    """The device takes one request at a time, of 128 KiB at most. It needs no root, but /dev/fuse and fusermount."""

    def __init__(self, directory, rate):
        self.behind, self.path = (os.path.join(directory, name) for name in ("behind", "slow"))
        for path in (self.behind, self.path):
            os.makedirs(path)
        if shutil.which("bindfs") is None:
            sys.exit("bindfs is needed for a slow target (apt install bindfs)")
        self.process = subprocess.Popen(
            ["bindfs", "-f", "--no-allow-other", f"--write-rate={rate}", "-o", "big_writes", self.behind, self.path],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.time() + 10
        while not os.path.ismount(self.path):
            if self.process.poll() is not None or time.time() > deadline:
                self.stop()
                sys.exit(f"bindfs did not start: {self.process.stderr.read().decode()}")
            time.sleep(0.02)

    def written(self):
        """Bytes that were written to files there; the bytes of answers to the kernel, some 20 for each request, are in it."""
        with open(f"/proc/{self.process.pid}/io") as counters:
            return next(int(line.split()[1]) for line in counters if line.startswith("wchar"))

    def stop(self):
        """After the files in it were closed."""
        for _ in range(50):
            if not os.path.ismount(self.path):
                break
            tool = shutil.which("fusermount3") or "fusermount"
            subprocess.run([tool, "-u", self.path], stderr=subprocess.DEVNULL)
            time.sleep(0.1)
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.behind, ignore_errors=True)
        if not os.path.ismount(self.path):
            os.rmdir(self.path)
