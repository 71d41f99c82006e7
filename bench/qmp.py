"""QEMU's monitor protocol: commands, and events that are waited for."""

import json, socket, sys, time


class Qmp:
    def __init__(self, path):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        self.buffer, self.events = b"", []
        self.line(None)
        self("qmp_capabilities")

    def line(self, deadline):
        """The next line; `None` when none has come by then."""
        while b"\n" not in self.buffer:
            left = None if deadline is None else deadline - time.time()
            if left is not None and left <= 0:
                return None
            self.connection.settimeout(left)
            try:
                more = self.connection.recv(65536)
            except socket.timeout:
                return None
            if not more:
                sys.exit("QEMU has closed its monitor")
            self.buffer += more
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def __call__(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.connection.settimeout(60)
        self.connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self.line(time.time() + 60)
            if answer is None:
                sys.exit(f"{command}: QEMU does not answer")
            if "error" in answer:
                sys.exit(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self.events.append(answer)

    def wait(self, names, deadline, meanwhile=lambda: None):
        """The next event of one of these names; `None` when none has come by then. `meanwhile` is called now and then."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] in names:
                    return event
            if time.time() >= deadline:
                return None
            meanwhile()
            event = self.line(min(deadline, time.time() + 0.2))
            if event is not None:
                self.events.append(event)

    def close(self):
        self.connection.close()
