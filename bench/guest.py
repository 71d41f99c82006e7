"""A guest for the benchmarks that change a disk under it: fio over NBD, with a line in a log for each request."""

import glob, os, signal, subprocess, sys, time


class Guest:
    """Random writes at a rate, until it is stopped."""

    def __init__(self, directory, uri, name, size, rate="100m", depth=8, seed=1):
        self.log = os.path.join(directory, f"fio-{name}")
        self.name, self.errors = name, open(f"{self.log}.errors", "w+")
        # The log has a line for each request: when it ended, in milliseconds since 1970, and how long it took, in nanoseconds.
        self.process = subprocess.Popen(
            ["fio", f"--name={name}", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=64k", f"--iodepth={depth}", "--thread",
             f"--rate={rate}", "--time_based", "--runtime=600", "--norandommap", f"--randseed={seed}", f"--size={size}",
             f"--write_lat_log={self.log}", "--per_job_logs=0", "--log_unix_epoch=1", "--output-format=json",
             f"--output={self.log}.json"],
            stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors)

    def check(self):
        """Ends the program if the guest has ended, which it does when a request fails."""
        if self.process.poll() is not None:
            self.errors.seek(0)
            sys.exit(f"the guest {self.name!r} has ended early: {self.errors.read()}")

    def rest(self, seconds):
        """Waits while the guest works."""
        deadline = time.time() + seconds
        while time.time() < deadline:
            self.check()
            time.sleep(min(0.1, max(0, deadline - time.time())))

    def stop(self):
        """Ends it; its requests as pairs: when each ended (seconds since 1970), and how long it took (milliseconds)."""
        self.check()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        self.errors.close()
        with open(f"{self.log}_clat.log") as log:
            lines = [line.split(",", 2) for line in log]
        return [(int(ended) / 1e3, int(took) / 1e6) for ended, took, _ in lines]

    def kill(self):
        """For a way out in disorder."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def forget(self):
        for path in glob.glob(f"{glob.escape(self.log)}*"):
            os.unlink(path)


def between(requests, since, until):
    return [request for request in requests if since <= request[0] < until]


def percentile(values, percent):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * percent / 100))] if values else None


def latency(requests, seconds, block=64 << 10):
    """What the guest saw: throughput in MiB/s, and latencies in milliseconds."""
    took = [request[1] for request in requests]
    return {"mib_s": len(took) * block / seconds / (1 << 20) if seconds > 0 else None, "requests": len(took),
            "p50_ms": percentile(took, 50), "p99_ms": percentile(took, 99), "worst_ms": max(took, default=None)}


def longest_gap(requests, since, until):
    """The longest time, in milliseconds, in which no request ended."""
    ends = sorted(ended for ended, _ in between(requests, since, until))
    return max(((b - a) * 1e3 for a, b in zip(ends, ends[1:])), default=None)
