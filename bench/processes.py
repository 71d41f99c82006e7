"""What the benchmarks share: servers as processes, their sockets, and what they cost."""

import os, signal, socket, subprocess, sys, time

TICK = os.sysconf("SC_CLK_TCK")


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def cpu_seconds(pid):
    """User and system time, with steps of 10 ms."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def size_bytes(text):
    return int(text[:-1]) << {"M": 20, "G": 30, "T": 40}[text[-1]]


def remove_sockets(*paths):
    """Those of an earlier server, so that nobody takes them for the next one's."""
    for path in paths:
        if os.path.exists(path):
            os.unlink(path)


def wait_for(path, process, name, seconds=20):
    """Waits until the process takes connections there; ends the program if it does not."""
    deadline = time.time() + seconds
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(path)
            return
        except OSError:
            if process.poll() is not None or time.time() > deadline:
                # While it lives, its standard error has no end.
                process.kill()
                sys.exit(f"{name} did not start: {process.stderr.read().decode()}")
            time.sleep(0.02)


def stop(process, seconds=60):
    """An orderly end, or the other one."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
