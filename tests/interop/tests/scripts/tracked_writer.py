"""Writes whose every change must be told of after the server has died.

tracked_writer.py write URI API STATE SEED           writes and takes marks until the connection breaks
tracked_writer.py verify URI API STATE OFFLINE COPY  compares what has changed with what is told

The writer notes every request that it sends, answered or not, and what each block may have held at each mark: what was
there, or what was under way while the mark was taken. The judge reads the whole disk. A block that holds nothing that
it may have held at a mark has changed since, and must be told of. OFFLINE holds what was told before the disk was opened
again, [[mark, report], …], and COPY the disk's content then.
"""
import hashlib
import http.client
import json
import os
import pickle
import random
import socket
import struct
import sys
import threading
import time
import urllib.parse

import nbd

BLOCK = 4096
mode, uri, api, state_path = sys.argv[1:5]


def digest(data):
    return hashlib.blake2b(data, digest_size=8).digest()


ZERO = digest(bytes(BLOCK))


class Api:
    """The daemon's, over its unix socket."""

    def __init__(self, path):
        self.path = path

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.path)
        headers = {"content-type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text else None

    def get(self, path):
        status, answer = self.ask("GET", path)
        assert status == 200, f"GET {path}: {status} {answer}"
        return answer

    def disk(self):
        return self.get("/v1/disks")["disks"][0]["spec"]["name"]

    def changes(self, disk, **query):
        ranges = []
        while True:
            answer = self.get(f"/v1/disks/{disk}/changes?{urllib.parse.urlencode(query)}")
            ranges += answer["ranges"]
            if "next" not in answer:
                return {**answer, "ranges": ranges}
            query["start"] = answer["next"]


def load():
    try:
        with open(state_path, "rb") as file:
            return pickle.load(file)
    except FileNotFoundError:
        # content: block -> what it may hold. log: (offset, bytes) of every request sent. marks: by name.
        return {"next": 1, "content": None, "log": [], "marks": {}, "kills": 0, "refused": set()}


def save(state):
    with open(state_path + ".new", "wb") as file:
        pickle.dump(state, file)
    os.replace(state_path + ".new", state_path)


def write(state, rng):
    handle = nbd.NBD()
    try:
        handle.connect_uri(uri)
    except nbd.Error:
        save(state)  # Killed before we came, on a slow machine.
        return
    client = Api(api)
    disk = None
    size = handle.get_size()
    blocks = size // BLOCK
    if state["content"] is None:
        state["content"] = [(ZERO,)] * blocks
    content, log, marks = state["content"], state["log"], state["marks"]
    under_way = {}  # first block -> (blocks, what they will hold)
    busy = set()
    requests = 0
    marking = None  # the mark that is being taken
    sequential = rng.randrange(blocks)

    def note(span, held):
        log.append((span.start * BLOCK, len(span) * BLOCK))
        if marking is not None:
            for block, new in zip(span, held):
                marking["maybe"].setdefault(block, set()).update(new)

    def take_mark(name, entry):
        try:
            status, answer = client.ask("POST", "/v1/marks", {"disks": [disk], "name": name})
            assert status == 201, f"{status} {answer}"
            entry["taken"] = True
        except (OSError, http.client.HTTPException):
            pass  # Killed meanwhile: it may have been taken.
        entry["answered"] = True

    def begin_mark():
        nonlocal marking
        name = f"m{state['next']}"
        entry = {"base": list(content), "maybe": {}, "taken": False, "answered": False, "log": len(log),
                 "kills": state["kills"]}
        state["next"] += 1
        marks[name] = marking = entry
        for span, held in under_way.values():
            note(span, held)
        threading.Thread(target=take_mark, args=(name, entry), daemon=True).start()

    def issue():
        nonlocal requests, sequential
        what = rng.random()
        if what < 0.03:
            requests += 1
            handle.aio_flush(completion=answered(None))
            return
        if what < 0.15:
            sequential = sequential if sequential + 16 <= blocks else 0
            span = range(sequential, sequential + 16)
        else:
            # Most requests stay in a corner, where blocks are written again and again.
            start = rng.randrange(blocks if rng.random() < 0.1 else blocks // 16)
            count = rng.choice([1, 1, 1, 2, 4, 16]) if what < 0.8 else rng.choice([1, 3, 16, 16, 40, 256])
            span = range(start, min(start + count, blocks))
        if not busy.isdisjoint(span):
            return
        number = state["next"]
        state["next"] += 1
        at, length = span.start * BLOCK, len(span) * BLOCK
        flags = nbd.CMD_FLAG_FUA if rng.random() < 0.02 else 0
        if what < 0.8:
            sequential = span.stop if what < 0.15 else sequential
            data = [struct.pack("<QQ", block, number) * (BLOCK // 16) for block in span]
            held = [(digest(piece),) for piece in data]
            call = lambda done: handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"".join(data))), at, done, flags)
        elif what < 0.9:
            flags |= nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.5 else 0
            held = [(ZERO,)] * len(span)
            call = lambda done: handle.aio_zero(length, at, done, flags)
        else:
            # What is given back may read as zero or as before.
            held = [tuple({ZERO, *content[block]}) for block in span]
            call = lambda done: handle.aio_trim(length, at, done, flags)
        busy.update(span)
        under_way[span.start] = (span, held)
        note(span, held)
        requests += 1
        call(answered(span))

    def answered(span):
        def done(error):
            nonlocal requests
            requests -= 1
            if error.value == 0 and span is not None:
                _, held = under_way.pop(span.start)
                content[span.start:span.stop] = held
                busy.difference_update(span)
            return 1

        return done

    next_mark = time.monotonic() + rng.random() * 0.1
    try:
        disk = client.disk()
        while True:
            while requests < 16:
                issue()
            handle.poll(5)
            if marking is not None and marking["answered"]:
                marking = None
            if marking is None and time.monotonic() > next_mark:
                if len(marks) >= 8:
                    name = rng.choice(sorted(marks))
                    del marks[name]
                    client.ask("DELETE", f"/v1/disks/{disk}/marks/{name}")
                begin_mark()
                next_mark = time.monotonic() + rng.random() * 0.2
    except (nbd.Error, OSError, http.client.HTTPException):
        if marking is not None:
            end = time.monotonic() + 10
            while not marking["answered"] and time.monotonic() < end:
                time.sleep(0.01)
        for span, held in under_way.values():
            content[span.start:span.stop] = [(*old, *new) for old, new in zip(content[span.start:span.stop], held)]
        state["kills"] += 1
        save(state)


def read_all(size, read):
    step, found = 1 << 20, []
    zeroes, zero_digests = bytes(step), [ZERO] * (step // BLOCK)
    for start in range(0, size, step):
        data = read(min(step, size - start), start)
        if data == zeroes:
            found += zero_digests
        else:
            found += [digest(data[at:at + BLOCK]) for at in range(0, len(data), BLOCK)]
    return found


def read_copy(path, size):
    with open(path, "rb") as file:
        return read_all(size, lambda length, start: os.pread(file.fileno(), length, start).ljust(length, b"\0"))


def granules_of(ranges, granule):
    """The granules that these (offset, bytes) touch."""
    return {n for start, length in ranges for n in range(start // granule, -(-(start + length) // granule))}


def may_have_held(mark, block):
    return {*mark["base"][block], *mark["maybe"].get(block, ())}


def judge(name, mark, report, now, log):
    """No miss; zeroes are zeroes; and how many bytes were told of that no request touched."""
    granule = report["granule"]
    told = [(r["start"], r["length"]) for r in report["ranges"]]
    told_blocks = {n for start, length in told for n in range(start // BLOCK, -(-(start + length) // BLOCK))}
    changed = [b for b, held in enumerate(now) if held not in may_have_held(mark, b)]
    missed = [b for b in changed if b not in told_blocks]
    assert not missed, f"MISS: {name}: {len(missed)} blocks have changed and are not told of: {missed[:8]}"
    for r in report["ranges"]:
        if r["kind"] != "data":
            blocks = range(r["start"] // BLOCK, -(-(r["start"] + r["length"]) // BLOCK))
            wrong = [b for b in blocks if now[b] != ZERO]
            assert not wrong, f"WRONG KIND: {name}: {len(wrong)} blocks are told to be {r['kind']}: {wrong[:8]}"
    touched = granules_of(log[mark["log"]:], granule)
    over = granules_of(told, granule) - touched
    return len(changed), len(over) * granule, len(touched) * granule


def verify(state, offline, copy):
    client = Api(api)
    disk = client.disk()
    handle = nbd.NBD()
    newest = next(reversed(offline), None)
    for words in ("qemu:dirty-bitmap", "highwater:changes") if newest else ():
        handle.add_meta_context(f"{words}:{newest}")
    handle.connect_uri(uri)
    now = read_all(handle.get_size(), handle.pread)
    then = read_copy(copy, handle.get_size())
    if copy.endswith("raw.copy") and state["content"] is not None:
        # A kill takes nothing back that was answered: the kernel has it, or the server puts it back.
        lost = [block for block, held in enumerate(now) if held not in state["content"][block]]
        assert not lost, f"LOST: {len(lost)} blocks do not hold what was answered: {lost[:8]}"
    listed = client.get(f"/v1/disks/{disk}/marks")["marks"]
    refused = [m for m in listed if "refused" in m]
    assert not refused, f"marks are refused though nobody else wrote: {refused}"
    names = [m["name"] for m in listed]
    assert names == list(offline), f"marks before {list(offline)} and after {names} the disk was opened"
    marks, log = state["marks"], state["log"]
    lost = [name for name, mark in marks.items() if mark["taken"] and name not in names]
    assert not lost, f"marks that were answered are gone: {lost}"
    state["marks"] = marks = {name: marks[name] for name in names if name in marks}
    rows, most = [], 0
    for name, mark in marks.items():
        before = judge(f"{name} before the disk was opened", mark, offline[name], then, log)
        report = client.changes(disk, since=name)
        changed, over, touched = judge(name, mark, report, now, log)
        rows.append({"changed": changed * BLOCK, "touched": touched, "over": over, "over_offline": before[1],
                     "kills": state["kills"] - mark["kills"]})
        if name == newest:
            told = [(r["start"], r["length"]) for r in report["ranges"]]
            for words in ("qemu:dirty-bitmap", "highwater:changes"):
                dirty = dirty_ranges(handle, f"{words}:{name}")
                assert granules_of(dirty, BLOCK) == granules_of(told, BLOCK), f"{words} and the API tell other changes"
    for first, second in zip(list(marks), list(marks)[1:]):
        report = client.changes(disk, since=first, until=second)
        told = granules_of([(r["start"], r["length"]) for r in report["ranges"]], BLOCK)
        missed = [b for b in range(len(now)) if b not in told
                  and may_have_held(marks[first], b).isdisjoint(may_have_held(marks[second], b))]
        assert not missed, f"MISS: between {first} and {second}: {missed[:8]}"
    state["content"] = [(held,) for held in now]
    handle.flush()
    handle.shutdown()
    save(state)
    print(json.dumps(rows))


def dirty_ranges(handle, context):
    size, at, ranges = handle.get_size(), 0, []
    while at < size:
        seen = []

        def extents(name, offset, entries, error):
            if name == context:
                seen.extend(zip(entries[::2], entries[1::2]))
            return 0

        handle.block_status(size - at, at, extents)
        assert seen, f"no answer for {context}"
        for length, status in seen:
            if status & 1:
                ranges.append((at, length))
            at += length
    return ranges


if mode == "write":
    write(load(), random.Random(int(sys.argv[5])))
else:
    with open(sys.argv[5]) as offline_file:
        verify(load(), dict(json.load(offline_file)), sys.argv[6])
