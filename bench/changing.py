"""Servers whose disks are changed while a guest writes: highwater's daemon, and qemu-storage-daemon."""

import http.client, json, os, shutil, socket, subprocess, sys, time
from processes import cpu_seconds, remove_sockets, run, stop, wait_for
from qmp import Qmp

LOOK = 0.01
CONTROL = "control.sock"


class Watch:
    """Who waits for a job: no longer than `limit` seconds, looking after the guest meanwhile."""

    def __init__(self, limit, meanwhile, measure=dict):
        self.limit, self.meanwhile, self.measure = limit, meanwhile, measure

    def ended(self, finished, began, **more):
        """Called at the very end, or at the limit, before the job is cancelled."""
        return {"finished": finished, "began": began, "ended": time.time(), **self.measure(), **more}


class Server:
    """A process, its NBD export `disk`, and the socket that it is governed by."""

    def __init__(self, command, directory):
        self.directory = directory
        self.sock, self.control = (os.path.join(directory, name) for name in ("nbd.sock", CONTROL))
        self.uri = f"nbd+unix:///disk?socket={self.sock}"
        remove_sockets(self.sock, self.control)
        self.process = subprocess.Popen(command(self), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE)
        try:
            wait_for(self.control, self.process, self.name)
            self.ready()
            wait_for(self.sock, self.process, self.name)
        except BaseException:
            stop(self.process)
            raise

    def ready(self):
        """Has it export its disk, once it can be told to."""

    def cpu(self):
        return cpu_seconds(self.process.pid)

    def stop(self):
        stop(self.process)


class Highwater(Server):
    name = "highwater"

    number = 0

    def __init__(self, args, directory, image, fmt):
        self.add = [args.highwater, "--api", os.path.join(directory, CONTROL), "disk", "add", image, "-f", fmt, "--name", "disk",
                    "--history", args.history]
        state = os.path.join(directory, "state")
        shutil.rmtree(state, ignore_errors=True)
        super().__init__(lambda new: [args.highwater, "daemon", "--state", state, "--api", new.control,
                                      "--nbd-socket", new.sock], directory)

    def ready(self):
        run(*self.add)

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("localhost", timeout=120)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.control)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        if response.status >= 300:
            sys.exit(f"{method} {path}: {response.status} {answer.decode()}")
        return json.loads(answer) if answer else None

    def job(self, kind, watch):
        """Has the daemon do it."""
        began, running = time.time(), True
        job = self.ask("POST", "/v1/jobs", kind)
        while job["state"] in ("running", "paused"):
            time.sleep(LOOK)
            watch.meanwhile()
            if running and time.time() > began + watch.limit:
                running, outcome = False, watch.ended(False, began, done=job["done"])
                self.ask("POST", f"/v1/jobs/{job['id']}/cancel")
            job = self.ask("GET", f"/v1/jobs/{job['id']}")
        if running and job["state"] == "done":
            return watch.ended(True, began, **job["result"])
        if running or job["state"] not in ("done", "cancelled"):
            sys.exit(f"{kind['job']}: {job['state']}: {job.get('error')}")
        return outcome

    def promote(self, target, watch):
        return self.job({"job": "promote", "disk": "disk", "target": target, "format": "raw"}, watch)

    def commit(self, watch):
        return self.job({"job": "consolidate", "disk": "disk"}, watch)

    def prepare_snapshot(self):
        self.number += 1
        return f"s{self.number}"

    def snapshot(self, name):
        """For how many milliseconds the guest's writes were held."""
        answer = self.ask("POST", "/v1/snapshots", {"disks": ["disk"], "name": name})
        return answer["snapshots"][0]["pause-us"] / 1e3


def file_node(path):
    return {"driver": "file", "filename": path, "aio": "io_uring", "discard": "unmap", "auto-read-only": True}


class Qemu(Server):
    name = "qemu-storage-daemon"

    def __init__(self, args, directory, image, fmt, size, base=None, copy_mode="background"):
        self.copy_mode, self.top, self.image, self.size, self.number = copy_mode, "disk0", image, size, 0
        node = {"driver": fmt, "node-name": self.top, "discard": "unmap", "file": file_node(image)}
        if base is not None:
            base_file, base_format = base
            node["backing"] = {"driver": base_format, "node-name": "base", "read-only": True, "discard": "unmap",
                               "file": file_node(base_file)}
        super().__init__(lambda new: [
            "qemu-storage-daemon", "--blockdev", json.dumps(node),
            "--nbd-server", f"addr.type=unix,addr.path={new.sock}",
            "--export", f"type=nbd,id=e,node-name={self.top},name=disk,writable=on",
            "--chardev", f"socket,id=c,path={new.control},server=on,wait=off", "--monitor", "chardev=c"], directory)
        self.qmp = Qmp(self.control)

    def stop(self):
        self.qmp.close()
        super().stop()

    def job(self, command, watch, **arguments):
        """Runs a job that becomes ready, and is completed then."""
        began = time.time()
        self.qmp(command, job_id="j", device=self.top, **arguments)
        ends = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        event = self.qmp.wait(("BLOCK_JOB_READY", *ends), began + watch.limit, watch.meanwhile)
        if event is None:
            job = next(job for job in self.qmp("query-block-jobs") if job["device"] == "j")
            outcome = watch.ended(False, began, done=job["offset"])
            self.qmp("block-job-cancel", device="j", force=True)
            self.qmp.wait(ends, time.time() + 60)
            return outcome
        ready = time.time() - began
        if event["event"] == "BLOCK_JOB_READY":
            self.qmp("block-job-complete", device="j")
            event = self.qmp.wait(ends, time.time() + 60, watch.meanwhile)
        if event is None or event["event"] != "BLOCK_JOB_COMPLETED" or "error" in event["data"]:
            sys.exit(f"{command}: {event}")
        return watch.ended(True, began, ready_s=ready, moved=event["data"]["offset"])

    def promote(self, target, watch):
        run("qemu-img", "create", "-q", "-f", "raw", target, self.size)
        self.qmp("blockdev-add", driver="raw", node_name="target", discard="unmap", file=file_node(target))
        return self.job("blockdev-mirror", watch, target="target", sync="full", copy_mode=self.copy_mode)

    def commit(self, watch):
        return self.job("block-commit", watch)

    def prepare_snapshot(self):
        """The overlay is made and opened before, as the one who asks would do it."""
        self.number += 1
        path, node = f"{self.image}.{self.number}", f"disk{self.number}"
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", self.image, "-F", "qcow2", path, self.size)
        self.qmp("blockdev-add", driver="qcow2", node_name=node, discard="unmap", file=file_node(path), backing=None)
        return node

    def snapshot(self, node):
        self.qmp("blockdev-snapshot", node=self.top, overlay=node)
        self.top = node
